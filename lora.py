"""Adapters: a few trained numbers over a frozen linear layer. LoRA (Hu et al. 2021, arXiv 2106.09685) and its kin.

An adapter takes the place of a linear layer in the model and calls it. LoRA and DoRA are saved in PEFT's format.

To add an adapter: a class that inherits from `Adapter` and a line in `ADAPTERS`; nothing else. The class has
- `__init__(self, base, r, alpha, dropout=0.0, rslora=False)`, the flags --lora_r and so on. It calls
  `super().__init__(base)` and makes its trained parameters on `self.device`, in fp32. It is also called on the "meta"
  device, where tensors have no values: it must not look at any.
- `forward(x)`, (..., in_features) to (..., out_features). It may use `self.base(x)` and
  `self.base.dequantize(dtype)`, the frozen weight. Dropout is for `self.training` only.

Its parameters and buffers are saved and read back by their names. A frozen random matrix is a buffer: saved if it is
persistent, else made again from a fixed seed; layers share one through a function with `functools.cache`. Merging finds
the weight by calling `forward`; a class that can compute it directly overrides `merged_weight`. To change LoRA in one
point, inherit from `LoRALinear` and override that method.
"""

import contextlib
import ctypes
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from model import Linear
from ops.dropout import dropout
from ops.linear import low_rank_linears
from shell.cli import UserError

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
UNIT_VECTORS = 1024  # that go through an adapter at one time, to find its weight


class Adapter(nn.Module):
    """What stands in the place of the frozen linear layer `base`, and trains. The page's beginning says what to add.

    standard: whether this computes exactly LoRA or DoRA as published, as PEFT does too. Only then may code that has
        that formula stand in for `forward`: `LoRALinear.together`, decode_cpu.cpp, PEFT's file format.
    """

    standard = False

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.device = base.weight.device if isinstance(base, nn.Linear) else base.device

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

    @classmethod
    @cache
    def is_standard(cls) -> bool:
        """Whether the class is a key of `FORMULAS` (not a subclass of one) and computes that formula.

        A researcher may edit `LoRALinear` in place, so that is tried on a small layer. Then a line on standard error
        says that the fast ways are not taken.
        """
        if cls not in FORMULAS:
            return False
        with torch.random.fork_rng([]), _disable_current_modes(), torch.no_grad():
            try:
                follows = _follows_formula(cls)
            except (AttributeError, RuntimeError, TypeError, ValueError):  # what else an edit may lead to
                follows = False
        if not follows:
            print(f"note: {cls.__name__} computes something new: going on without its fast ways", file=sys.stderr)
        return follows


class LoRALinear(Adapter):
    """y = base(x) + scale * B A x. A (r, in) starts random and B (out, r) zero, so it starts as the base itself.

    A and B are fp32 whatever the model's dtype: in bf16 most of AdamW's steps would round to nothing.
    """

    def __init__(self, base: nn.Module, r: int, alpha: float, dropout: float = 0.0, rslora: bool = False):
        super().__init__(base)
        self.dropout = dropout
        self.scale = alpha / (math.sqrt(r) if rslora else r)  # rsLoRA: Kalajdzievski 2023, arXiv 2312.03732
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, device=self.device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, device=self.device))
        if not self.lora_A.is_meta:  # there it would do nothing, and take a second to import what it needs for that
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def low_rank(self, x: Tensor) -> Tensor:
        """scale * B A dropout(x), multiplied in x's dtype."""
        x = dropout(x, self.dropout) if self.dropout and self.training else x
        x = F.linear(x, self.lora_A.to(x.dtype)) * self.scale  # (..., r): scaled where it is small
        return F.linear(x, self.lora_B.to(x.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out), in x's dtype."""
        if self.trains_by_hand():
            return self.together(x, [self])[0]
        return self.base(x) + self.low_rank(x)

    def trains_by_hand(self) -> bool:
        """Whether `together` may stand in for `forward`: in training, and for standard LoRA alone.

        When nothing trains, the base may have a faster way. A subclass goes through its `forward` and `low_rank`.
        """
        compiled_dropout = self.dropout and self.training and torch.compiler.is_compiling()
        return self.standard and torch.is_grad_enabled() and not compiled_dropout

    @staticmethod
    def together(x: Tensor, layers: Sequence["LoRALinear"]) -> list[Tensor]:
        """What each of `layers` makes of x, in fewer products and with less kept than one after the other."""
        bases, scales = [layer.base for layer in layers], [layer.scale for layer in layers]
        factors = [(layer.lora_A, layer.lora_B) for layer in layers]
        dropouts = [layer.dropout if layer.training else 0.0 for layer in layers]
        ys = low_rank_linears(x, [base.dequantize for base in bases], scales, factors, dropouts)
        return [y if base.bias is None else y + base.bias.to(y.dtype) for y, base in zip(ys, bases, strict=True)]

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """As in `Adapter`: by the formula where it holds, which is faster."""
        return FORMULAS[type(self)](self) if self.standard else super().merged_weight()


class DoRALinear(LoRALinear):
    """Weight-decomposed LoRA (Liu et al. 2024, arXiv 2402.09353): W' = m V / |V| by row, V = W + scale * B A.

    m (out,) starts as |W|. As in section 4.3 of the paper |V| counts as a constant in the gradient.
    """

    def __init__(self, base: nn.Module, r: int, alpha: float, dropout: float = 0.0, rslora: bool = False):
        super().__init__(base, r, alpha, dropout, rslora)
        self.lora_magnitude_vector = nn.Parameter(self.row_norms())

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """|V|: (out,) fp32."""
        return lora_weight(self).norm(dim=1).clamp(min=1e-38)  # a row may be zero: 0 / 0 is NaN

    def ratio(self) -> Tensor:
        """m / |V|, the factor of each row: (out,) fp32."""
        return self.lora_magnitude_vector / self.row_norms()

    def trains_by_hand(self) -> bool:
        """Never: `together` knows nothing of the magnitudes."""
        return False

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out), in x's dtype."""
        y = self.base(x)
        bare = y if self.base.bias is None else y - self.base.bias.to(y.dtype)
        ratio = self.ratio().to(y.dtype)
        return y + (ratio - 1) * bare + ratio * self.low_rank(x)  # exactly y at the start, where ratio is 1


ADAPTERS = {"lora": LoRALinear, "dora": DoRALinear}


def lora_weight(adapter: LoRALinear) -> Tensor:
    """W + scale * B A, (out, in) fp32."""
    return adapter.base.dequantize(torch.float32) + adapter.scale * (adapter.lora_B @ adapter.lora_A)


def dora_weight(adapter: DoRALinear) -> Tensor:
    """m V / |V| by row, (out, in) fp32."""
    return lora_weight(adapter) * adapter.ratio()[:, None]


FORMULAS = {LoRALinear: lora_weight, DoRALinear: dora_weight}  # the published ones, which PEFT's files stand for


def _follows_formula(cls):
    """Whether `forward`, and `together` where a class takes it, agree with `FORMULAS` on a small random layer."""
    torch.manual_seed(0)
    adapter = cls(Linear(7, 5, device="cpu").requires_grad_(False), 3, 4.0)
    with torch.device("meta"):
        rslora = cls(Linear(7, 5), 3, 4.0, rslora=True)
    if (adapter.scale, rslora.scale) != (4 / 3, 4 / math.sqrt(3)):  # what PEFT makes of r and lora_alpha
        return False
    for parameter in adapter.parameters():
        parameter.copy_(torch.rand(parameter.shape, device="cpu"))
    x = torch.rand(6, 7, device="cpu")
    expected = F.linear(x, FORMULAS[cls](adapter), adapter.base.bias)
    ys = [adapter(x)]
    if cls is LoRALinear:
        ys += cls.together(x, [adapter])
    return all(torch.allclose(y, expected, rtol=1e-4) for y in ys)


@dataclass(frozen=True)
class AdapterConfig:
    """What adapters a model has: kind, rank and scale, and the linear layers they sit on.

    targets: names such as "q_proj" (the end of a module's name, or all of it), or one regular expression for it.
    rank_pattern, alpha_pattern: other ranks and alphas for the modules whose names end as a key says (PEFT's).
    layers: numbers of the blocks to which targets are narrowed, but for whole names (PEFT's `layers_to_transform`).
    residual: whether the base's weights are those without the adapters' start, as PiSSA has it: W - scale * B_0 A_0.
        Then an adapter keeps A_0 and B_0 in its buffers `start_A` and `start_B` (weights/residual.py).
    save, tokens: modules that train whole, by their names, and tokens whose rows of the embedding train, in order
        (weights/beside.py).
    """

    kind: str = "lora"
    r: int = 16
    alpha: float = 32
    dropout: float = 0.0
    rslora: bool = False
    targets: tuple | str = PROJECTIONS
    rank_pattern: dict = field(default_factory=dict)
    alpha_pattern: dict = field(default_factory=dict)
    layers: tuple[int, ...] | None = None
    residual: bool = False
    save: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()

    def adapt(self, base: nn.Module, name: str) -> Adapter:
        """The adapter over the linear layer `base`, which is called `name` in the model."""
        adapter = ADAPTERS[self.kind](base, self.rank(name), self.alpha_of(name), self.dropout, self.rslora)
        adapter.standard = adapter.is_standard()
        if self.residual:
            adapter.register_buffer("start_A", torch.zeros_like(adapter.lora_A, requires_grad=False))
            adapter.register_buffer("start_B", torch.zeros_like(adapter.lora_B, requires_grad=False))
        return adapter

    def rank(self, name: str) -> int:
        """The rank of the adapter over the linear layer called `name`."""
        return match_pattern(self.rank_pattern, name, self.r)

    def alpha_of(self, name: str) -> float:
        """The alpha of the adapter over the linear layer called `name`."""
        return match_pattern(self.alpha_pattern, name, self.alpha)

    def scale(self, name: str) -> float:
        """What B A is multiplied by, in LoRA over the linear layer called `name`."""
        r = self.rank(name)
        return self.alpha_of(name) / (math.sqrt(r) if self.rslora else r)

    def covers(self, name: str) -> bool:
        """Whether the linear layer called `name` gets an adapter; one that trains whole does not."""
        if name in self.save:
            return False
        if isinstance(self.targets, str):
            return re.fullmatch(self.targets, name) is not None
        narrowed = self.layers is not None and name not in self.targets
        return is_named(name, self.targets) and not (narrowed and layer_number(name) not in self.layers)


def is_named(name: str, ends: Sequence[str]) -> bool:
    """Whether a module's name, or the end of it, is one of these."""
    return any(name == end or name.endswith("." + end) for end in ends)


def layer_number(name: str, pattern: str = r"[^.]*") -> int | None:
    """The number of the block that a module is in, by the first number in its name; None if it is in none.

    pattern: the name of what numbers the blocks, a regular expression (PEFT's `layers_pattern`).
    """
    match = re.match(rf"(?:^|.*?\.)(?:{pattern})\.(\d+)\.", name)
    return match and int(match[1])


def match_pattern(pattern: dict, name: str, default: float | None) -> float | None:
    """The value of the first key, a regular expression, that the end of a module's name matches."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name and module of every linear layer, quantised or not, adapted or not, and not what is inside an adapter."""
    adapted = adapters(model)
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "in_features")}
    return {name: module for name, module in layers.items() if not any(outer in adapted for outer in _outer(name))}


def _outer(name):
    """The names of the modules that the module `name` is in."""
    return accumulate(name.split(".")[:-1], "{}.{}".format)


def add_lora(model: nn.Module, config: AdapterConfig, called: Callable[[str], str] | None = None) -> None:
    """Freeze the model and wrap its linear layers as `config` says. Its trainable parameters are the adapter's.

    called: of a model that has some blocks of another alone, the names that its layers have there.
    """
    layers = linear_layers(model)
    if called is not None:
        wrap(model, config, [name for name in layers if config.covers(called(name))], called)
        return
    for target in () if isinstance(config.targets, str) else config.targets:
        if not any(AdapterConfig(targets=(target,)).covers(name) for name in layers):
            choices = dict.fromkeys(name.rpartition(".")[2] for name in layers)
            raise UserError(f"--lora_targets: the model has no projection {target!r}, only {', '.join(choices)}")
    names = [name for name in layers if config.covers(name)]
    if not names:
        raise UserError(f"--lora_targets: no linear layer of the model is called {config.targets!r}")
    wrap(model, config, names)


def wrap(model: nn.Module, config: AdapterConfig, names: Sequence[str], called: Callable[[str], str] = str) -> None:
    """Freeze the model and put an adapter over each linear layer in `names`. called: as in `add_lora`."""
    model.requires_grad_(False)
    for name in names:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, config.adapt(model.get_submodule(name), called(name)))
        give_back_memory()


def give_back_memory() -> None:
    """Return what was freed to the system. glibc keeps freed memory in gaps that are too small for later tensors.

    A model of 557 MB in bf16, 251 MB in NF4, peaked at 327 MB above the bare process while it was loaded; without this
    at 400 to 1,590 MB, another figure in each run. With DoRA at 343 instead of 2,015 MB. (On the CPU, glibc 2.36.)
    """
    with contextlib.suppress(AttributeError, TypeError):  # other C libraries have no such function, or need none
        ctypes.CDLL(None).malloc_trim(0)


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Name and module of every adapter in the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}
