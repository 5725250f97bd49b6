"""What every adapter is: a module that stands in the place of a frozen one, calls it, and trains. lora.py says how to

add one over linear layers. One in another place, such as attention or the embedding, overrides `places` and `over` too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shell.cli import UserError

if TYPE_CHECKING:
    from lora import AdapterConfig
    from model import Transformer

UNIT_VECTORS = 1024  # that go through an adapter at one time, to find its weight


class Adapter(nn.Module):
    """What stands in the place of the frozen module `base`, by default a linear layer, and trains.

    standard: whether this computes exactly LoRA or DoRA as published, as PEFT does too. Only then may code that has
        that formula stand in for `forward`: `LoRALinear.together`, decode_cpu.cpp.
    flags: the flags of finetune.py that decide what it is. targets: if not None, those of a block's projections that
        get one by default; all otherwise.
    unmergeable: why no weights of the base's shapes do the same, None if there are some.
    in_steps: whether it changes what is computed for a token that is no virtual one.
    compiles: whether torch.compile can take a block with it.
    """

    standard = False
    flags: tuple[str, ...] = (
        "lora_r", "lora_alpha", "lora_dropout", "lora_targets", "lora_rslora", "lora_layers", "lora_rank_pattern",
        "lora_alpha_pattern", "lora_plus_ratio",
    )  # fmt: skip
    targets: tuple[str, ...] | None = None
    unmergeable: str | None = None
    in_steps = True
    compiles = True

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        if hasattr(base, "in_features"):
            self.in_features, self.out_features = base.in_features, base.out_features
        self.device = device_of(base)

    @classmethod
    def is_standard(cls) -> bool:
        """Whether the class may have `standard`: it is LoRA or DoRA, and computes that."""
        return False

    @classmethod
    def check(cls, model: Transformer, config: AdapterConfig) -> None:
        """Raise UserError if this model cannot have such adapters."""

    @classmethod
    def places(cls, model: Transformer, config: AdapterConfig) -> list[str]:
        """The names of the modules that get one; a module comes after those that are in it."""
        return [name for name in linear_layers(model) if config.covers(name)]

    @classmethod
    def shared(cls, model: Transformer, config: AdapterConfig, names: list[str], device: torch.device | str) -> Any:
        """What the adapters over the modules `names` have in common, for `over`. device: where tensors of it go."""

    @classmethod
    def over(
        cls, base: nn.Module, name: str, r: int, alpha: float, config: AdapterConfig, shared: Any = None
    ) -> Adapter:
        """The adapter over `base`, the module `name`. r, alpha: `config`'s for this module."""
        return cls(base, r, alpha, config.dropout, config.rslora)

    @classmethod
    def number_of_virtual_tokens(cls, config: AdapterConfig) -> int:
        """How many virtual tokens are put before every text: ids from the vocabulary's size on."""
        return 0

    @torch.no_grad()
    def merged_bias(self) -> Tensor | None:
        """The bias (fp32) that goes with `merged_weight`; None if the base has none."""
        return None if self.base.bias is None else self.base.bias.float()

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The one weight, (out, in) fp32, that does what base and adapter do together.

        It is what `forward` makes of the unit vectors. Raises UserError if no weight does the same, beside the base's
        bias: an adapter that is not linear, or that changes the bias.
        """
        training, columns = self.training, []
        self.eval()
        offset = self(torch.zeros(1, self.in_features, device=self.device))
        for start in range(0, self.in_features, UNIT_VECTORS):
            number = min(UNIT_VECTORS, self.in_features - start)
            x = torch.zeros(number, self.in_features, device=self.device)
            x[:, start:].fill_diagonal_(1)
            columns.append(self(x) - offset)
        weight = torch.cat(columns).float().T.contiguous()
        x = torch.randn(4, self.in_features, generator=torch.Generator().manual_seed(0)).to(self.device)
        y, bare = self(x), self.base(x)
        self.train(training)
        error = (y - F.linear(x, weight, None if self.base.bias is None else self.base.bias.float())).norm()
        if not error <= 0.01 * (y - bare).norm() + 1e-5 * y.norm():
            raise UserError(
                f"{type(self).__name__} does what no single weight does (it is not linear, or changes the bias): it "
                "cannot be merged"
            )
        return weight


def device_of(base: nn.Module) -> torch.device:
    """Where a module is. A quantised layer says so itself: its weight is no parameter."""
    quantised = [module for module in linear_layers(base).values() if not isinstance(module, nn.Linear)]
    return quantised[0].device if quantised else next(base.parameters()).device


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name and module of every linear layer, quantised or not, adapted or not, and not what is inside an adapter."""
    adapted = {name for name, module in model.named_modules() if isinstance(module, Adapter)}
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "in_features")}
    return {name: module for name, module in layers.items() if not any(outer in adapted for outer in _outer(name))}


def _outer(name):
    """The names of the modules that the module `name` is in."""
    return accumulate(name.split(".")[:-1], "{}.{}".format)


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Name and module of every adapter in the model. The names are those of the places, as without any adapter."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}
    return {place(name): module for name, module in found.items()}


def place(name: str) -> str:
    """The name of a module or parameter as it is without adapters around it."""
    return ".".join(part for part in name.split(".") if part != "base")


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the one that is called `name` in the model."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


@contextlib.contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes as its base does: what its adapters stand for is in their place."""
    found = adapters(model)
    places = {name: (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in found}
    for name, adapter in found.items():
        setattr(*places[name], adapter.base)
    try:
        yield
    finally:
        for name, adapter in found.items():
            setattr(*places[name], adapter)
