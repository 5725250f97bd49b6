"""One frozen linear layer under the adapters of several variants: its product is made for all of their rows together.

A micro-batch is one row of positions, of which each variant has a stretch. The base's weight is read, and dequantised,
once for all of them; each adapter adds what it does to its own stretch. `VariantModel.only` gives the model of one
variant by itself, as a run of its own has it: for saving, loading and validation.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from adapters.adapter import Adapter, adapters, device_of, put
from model import Transformer
from ops.low_rank import LowRank, low_rank_linears

# The positions of the micro-batch that each variant has, by its number, in their order; together they are all.
Stretches = list[tuple[int, slice]]


class KnownBase(nn.Module):
    """A frozen layer in an adapter, which may have been told already what it makes of an input."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base, self.known = base, (None, None)
        self.in_features, self.out_features, self.bias = base.in_features, base.out_features, base.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out)."""
        told, y = self.known
        return y if x is told else self.base(x)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The base's weight, (out, in) of `dtype`."""
        return self.base.dequantize(dtype)


class SharedLinear(nn.Module):
    """`base` under the adapters of some variants, by their numbers. They are no part of this module's parameters."""

    def __init__(self, base: nn.Module, by_variant: dict[int, Adapter], stretches: Stretches):
        super().__init__()
        self.base, self.stretches, self.device = base, stretches, device_of(base)
        self.in_features, self.out_features = base.in_features, base.out_features
        self._by_variant = (by_variant,)  # in a tuple, where nn.Module does not look for modules

    @property
    def by_variant(self) -> dict[int, Adapter]:
        """The adapter of each variant that has one here."""
        return self._by_variant[0]

    def forward(self, x: Tensor) -> Tensor:
        """x (1, T, in) to (1, T, out)."""
        return self.together(x, [self])[0]

    def trains_by_hand(self) -> bool:
        """Always: `model.project` may call `together`."""
        return True

    @staticmethod
    def together(x: Tensor, layers: Sequence["SharedLinear"]) -> list[Tensor]:
        """What each of `layers` makes of x (1, T, in): standard LoRA by hand, in one function with the bases."""
        bases, parts = [layer.base for layer in layers], []
        for number, rows in layers[0].stretches:
            own = [layer.by_hand(number) for layer in layers]
            scales = [adapter.scale if adapter else 0.0 for adapter in own]
            factors = [layer.factors(adapter) for layer, adapter in zip(layers, own, strict=True)]
            parts.append(LowRank(rows.start, rows.stop, scales, factors))
        ys = low_rank_linears(x, [base.dequantize for base in bases], parts)
        ys = [y if base.bias is None else y + base.bias.to(y.dtype) for y, base in zip(ys, bases, strict=True)]
        return [layer.others(x, y) for layer, y in zip(layers, ys, strict=True)]

    def by_hand(self, number: int) -> Adapter | None:
        """The adapter of a variant here, if it is standard LoRA, whose products `low_rank_linears` makes."""
        adapter = self.by_variant.get(number)
        return adapter if adapter is not None and is_by_hand(adapter) else None

    def factors(self, adapter: Adapter | None) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of standard LoRA, of rank 0 without it."""
        if adapter:
            return adapter.lora_A, adapter.lora_B
        return tuple(
            torch.empty(shape, device=self.device) for shape in ((0, self.in_features), (self.out_features, 0))
        )

    def others(self, x: Tensor, y: Tensor) -> Tensor:
        """y (1, T, out), in which variants whose adapter is no standard LoRA have what this makes of x (1, T, in)."""
        own = {n: adapter for n, adapter in self.by_variant.items() if not is_by_hand(adapter)}
        if not any(number in own for number, _ in self.stretches):
            return y
        pieces = []
        for number, rows in self.stretches:
            piece, part = y[:, rows], x[:, rows]
            if number in own:
                own[number].base.known = part, piece
                piece = own[number](part)
                own[number].base.known = None, None
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


def is_by_hand(adapter: Adapter) -> bool:
    """Whether this is standard LoRA, whose products `ops.low_rank.low_rank_linears` makes."""
    return hasattr(adapter, "together") and adapter.trains_by_hand()


class VariantModel:
    """A model whose linear layers are shared by the adapters of several variants.

    model: the base. stretches: to be set, in place, before each micro-batch.
    """

    def __init__(self, model: Transformer):
        self.model = model
        self.stretches: Stretches = []
        self.by_variant: list[dict[str, Adapter]] = []  # by the name of the layer
        self.bases: dict[str, nn.Module] = {}
        self.shared: dict[str, SharedLinear] = {}
        self.places: dict[str, tuple[nn.Module, str]] = {}  # the parent of each, and its name there

    def take(self) -> None:
        """Take the adapters that are in the model now away, as those of the next variant: it is the base again."""
        found = adapters(self.model)
        for name, adapter in found.items():
            base = adapter.base
            self.bases.setdefault(name, base)
            put(self.model, name, base)
            if not is_by_hand(adapter):
                adapter.base = KnownBase(base)
        self.by_variant.append(found)

    def share(self) -> None:
        """Put a `SharedLinear` in the place of each layer that any variant adapts: for training all together."""
        for name, base in self.bases.items():
            here = {number: found[name] for number, found in enumerate(self.by_variant) if name in found}
            self.shared[name] = SharedLinear(base, here, self.stretches)
            parent, _, leaf = name.rpartition(".")
            self.places[name] = self.model.get_submodule(parent), leaf
        self._put(self.shared)

    @contextlib.contextmanager
    def only(self, number: int) -> Iterator[Transformer]:
        """The model of one variant: its adapters over the base, and no others."""
        self._put({name: self.by_variant[number].get(name, base) for name, base in self.bases.items()})
        try:
            yield self.model
        finally:
            self._put(self.shared)

    def _put(self, modules: dict[str, nn.Module]) -> None:
        for name, module in modules.items():
            setattr(*self.places[name], module)
