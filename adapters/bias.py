"""BitFit (Ben Zaken et al. 2021, arXiv 2106.10199): the biases train, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adapters.adapter import Adapter, linear_layers
from model import LayerNorm
from shell.cli import UserError

if TYPE_CHECKING:
    from lora import AdapterConfig
    from model import Transformer


class BitFit(Adapter):
    """Over a linear layer or a LayerNorm: what it adds last is `bias`, trained in fp32, in its own bias's place.

    So the base stays as it is, in any dtype or quantised.
    """

    flags = ("lora_layers",)

    def __init__(self, base: nn.Module):
        super().__init__(base)
        self.bias = nn.Parameter(base.bias.detach().to(torch.float32, copy=True))

    @classmethod
    def check(cls, model: Transformer, config: AdapterConfig) -> None:
        """As in `Adapter`: a model such as Llama has no biases."""
        if not cls.places(model, config):
            raise UserError(
                f"--method bitfit: this {model.config.family} model has no biases; --method ia3 trains about as few "
                "numbers, and --method full --train '*norm*' its norms"
            )

    @classmethod
    def places(cls, model: Transformer, config: AdapterConfig) -> list[str]:
        """Every linear layer and LayerNorm that has a bias, of the blocks in `config.layers`."""
        linears = linear_layers(model)
        return [
            name
            for name, module in model.named_modules()
            if (name in linears or isinstance(module, LayerNorm)) and module.bias is not None and config.in_layers(name)
        ]

    @classmethod
    def over(
        cls, base: nn.Module, name: str, r: int, alpha: float, config: AdapterConfig, shared: Any = None
    ) -> BitFit:
        """As in `Adapter`."""
        return cls(base)

    def forward(self, x: Tensor) -> Tensor:
        """What the base makes of x, with the trained bias: exactly that at the start."""
        y = self.base(x)
        return y + (self.bias - self.base.bias.float()).to(y.dtype)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """As in `Adapter`: the linear layer's own."""
        return self.base.dequantize(torch.float32)

    @torch.no_grad()
    def merged_bias(self) -> Tensor:
        """As in `Adapter`."""
        return self.bias.clone()
