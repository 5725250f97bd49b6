"""VeRA (Kopiczko et al. 2023, arXiv 2310.11454): one random pair of matrices for all layers, two vectors for each."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.adapter import Adapter
from ops.dropout import dropout

if TYPE_CHECKING:
    from lora import AdapterConfig
    from model import Transformer

START = 0.1  # of d; b starts at zero, so it starts as the base itself


class Projections(NamedTuple):
    """The frozen random matrices: A (r, the most inputs of any layer) and B (the most outputs, r), fp32."""

    A: Tensor
    B: Tensor


def random_projections(r: int, inputs: int, outputs: int, seed: int, device: torch.device | str) -> Projections:
    """Those of a seed: uniform, with Kaiming's bounds, drawn as PEFT does for its projection_prng_key."""
    if torch.device(device).type == "meta":
        return Projections(torch.empty(r, inputs, device=device), torch.empty(outputs, r, device=device))
    generator = torch.Generator("cpu").manual_seed(seed)

    def draw(rows, columns):
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(columns))
        return torch.empty(rows, columns, device="cpu").uniform_(-bound, bound, generator=generator).to(device)

    return Projections(draw(r, inputs), draw(outputs, r))


class VeRALinear(Adapter):
    """y = base(x) + b * B (d * A x): b (out,) and d (r,) train; * is by number.

    A (r, in) and B (out, r) are the first columns and rows of the matrices that all layers share.
    """

    flags = ("lora_r", "lora_dropout", "lora_targets", "lora_layers")

    def __init__(self, base: nn.Module, projections: Projections, dropout: float = 0.0):
        super().__init__(base)
        self.dropout, r = dropout, projections.A.size(0)
        self.register_buffer("vera_A", projections.A)
        self.register_buffer("vera_B", projections.B)
        self.vera_lambda_d = nn.Parameter(torch.full((r,), START, device=self.device))
        self.vera_lambda_b = nn.Parameter(torch.zeros(self.out_features, device=self.device))

    @classmethod
    def shared(
        cls, model: Transformer, config: AdapterConfig, names: list[str], device: torch.device | str
    ) -> Projections:
        """The random matrices, as large as the largest of the layers needs them."""
        layers = [model.get_submodule(name) for name in names]
        sizes = (max(layer.in_features for layer in layers), max(layer.out_features for layer in layers))
        return random_projections(config.r, *sizes, config.seed, device)

    @classmethod
    def over(
        cls, base: nn.Module, name: str, r: int, alpha: float, config: AdapterConfig, shared: Projections
    ) -> VeRALinear:
        """As in `Adapter`."""
        return cls(base, shared, config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out), in x's dtype."""
        y = self.base(x)
        x = dropout(x, self.dropout) if self.dropout and self.training else x
        small = F.linear(x.to(y.dtype), self.vera_A[:, : self.in_features].to(y.dtype))
        small = small * self.vera_lambda_d.to(y.dtype)
        return y + F.linear(small, self.vera_B[: self.out_features].to(y.dtype)) * self.vera_lambda_b.to(y.dtype)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + diag(b) B diag(d) A: (out, in) fp32."""
        small = self.vera_lambda_d[:, None] * self.vera_A[:, : self.in_features]
        large = self.vera_lambda_b[:, None] * self.vera_B[: self.out_features]
        return self.base.dequantize(torch.float32) + large @ small
