"""(IA)3 (Liu et al. 2022, arXiv 2205.05638): a trained factor for each of the numbers that a layer gives or gets."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adapters.adapter import Adapter

if TYPE_CHECKING:
    from lora import AdapterConfig


class IA3Linear(Adapter):
    """y = l * base(x), or base(l * x) in the MLP's second layer. l starts at one, so it starts as the base itself.

    feedforward: the input is multiplied. ia3_l is (1, in) then and else (out, 1), as in PEFT.
    By default, as in the paper, it is on keys, values and the MLP's second layer.
    """

    flags = ("lora_targets", "lora_layers")
    targets = ("k_proj", "v_proj", "down_proj")

    def __init__(self, base: nn.Module, feedforward: bool):
        super().__init__(base)
        self.feedforward = feedforward
        shape = (1, self.in_features) if feedforward else (self.out_features, 1)
        self.ia3_l = nn.Parameter(torch.ones(shape, device=self.device))

    @classmethod
    def over(
        cls, base: nn.Module, name: str, r: int, alpha: float, config: AdapterConfig, shared: Any = None
    ) -> IA3Linear:
        """As in `Adapter`."""
        return cls(base, is_feedforward(name, config.feedforward))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out), in x's dtype."""
        if self.feedforward:
            return self.base(x * self.ia3_l.flatten().to(x.dtype))
        y = self.base(x)
        return y * self.ia3_l.flatten().to(y.dtype)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W with its columns or rows multiplied: (out, in) fp32."""
        return self.base.dequantize(torch.float32) * self.ia3_l

    @torch.no_grad()
    def merged_bias(self) -> Tensor | None:
        """As in `Adapter`: where the output is multiplied, the bias is too."""
        bias = super().merged_bias()
        return bias if bias is None or self.feedforward else bias * self.ia3_l[:, 0]


def is_feedforward(name: str, feedforward: tuple | str) -> bool:
    """Whether the input of the layer `name` is multiplied: its name ends so, or is as a regular expression says."""
    if isinstance(feedforward, str):
        return re.fullmatch(feedforward, name) is not None
    return any(name.endswith(end) for end in feedforward)
