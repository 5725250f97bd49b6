"""Adapters: a few trained numbers over a frozen linear layer. LoRA (Hu et al. 2021, arXiv 2106.09685) and its kin.

An adapter takes the place of a linear layer in the model and calls it. `ADAPTERS` has those of the folder adapters/
too, some of which take the place of other modules. What PEFT has too is saved in PEFT's format.

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
import dataclasses
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from adapters.adapter import Adapter, linear_layers, put
from adapters.adapter import adapters as adapters
from adapters.bias import BitFit
from adapters.ia3 import IA3Linear
from adapters.llama_adapter import LlamaAdapter, LlamaAdapterV2
from adapters.vera import VeRALinear
from adapters.virtual_tokens import PrefixTuning, PromptTuning
from model import Linear, Transformer
from ops.dropout import dropout
from ops.low_rank import LowRank, low_rank_linears
from shell.cli import UserError

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(Adapter):
    """y = base(x) + scale * B A x. A (r, in) starts random and B (out, r) zero, so it starts as the base itself.

    A and B are fp32 whatever the model's dtype: in bf16 most of AdamW's steps would round to nothing.
    """

    flags = (
        *Adapter.flags, "lora_init", "lora_init_iterations", "lora_eva_rho", "lora_modules_to_save", "lora_tokens",
    )  # fmt: skip

    def __init__(self, base: nn.Module, r: int, alpha: float, dropout: float = 0.0, rslora: bool = False):
        super().__init__(base)
        self.dropout = dropout
        self.scale = alpha / (math.sqrt(r) if rslora else r)  # rsLoRA: Kalajdzievski 2023, arXiv 2312.03732
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, device=self.device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, device=self.device))
        if not self.lora_A.is_meta:  # there it would do nothing, and take a second to import what it needs for that
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw A as it starts."""
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
        part = LowRank(0, x.shape[:-1].numel(), scales, factors)
        ys = low_rank_linears(x, [base.dequantize for base in bases], [part], dropouts)
        return [y if base.bias is None else y + base.bias.to(y.dtype) for y, base in zip(ys, bases, strict=True)]

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

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """As in `Adapter`: by the formula where it holds, which is faster."""
        return FORMULAS[type(self)](self) if self.standard else super().merged_weight()


class LoRAFALinear(LoRALinear):
    """LoRA whose A stays as it was drawn (LoRA-FA, Zhang et al. 2023, arXiv 2308.03303).

    So of a layer's input only A x, (..., r), is kept for the backward pass. Its file is that of LoRA.
    """

    def __init__(self, base: nn.Module, r: int, alpha: float, dropout: float = 0.0, rslora: bool = False):
        super().__init__(base, r, alpha, dropout, rslora)
        self.lora_A.requires_grad_(False)

    def trains_by_hand(self) -> bool:
        """Never: `together` keeps the input, for A's gradient."""
        return False


class DoRALinear(LoRALinear):
    """Weight-decomposed LoRA (Liu et al. 2024, arXiv 2402.09353): W' = m V / |V| by row, V = W + scale * B A.

    m (out,) starts as |W|. As in section 4.3 of the paper |V| counts as a constant in the gradient.
    over_columns: what makes of row norms (out,) of the columns that are here those of whole rows.
    """

    over_columns = staticmethod(lambda norms: norms)

    def __init__(self, base: nn.Module, r: int, alpha: float, dropout: float = 0.0, rslora: bool = False):
        super().__init__(base, r, alpha, dropout, rslora)
        self.lora_magnitude_vector = nn.Parameter(self.row_norms())

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """|V|: (out,) fp32."""
        norms = self.over_columns(lora_weight(self).norm(dim=1))
        return norms.clamp(min=1e-38)  # a row may be zero: 0 / 0 is NaN

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


ADAPTERS = {
    "lora": LoRALinear, "dora": DoRALinear, "lora-fa": LoRAFALinear, "vera": VeRALinear, "ia3": IA3Linear,
    "bitfit": BitFit, "prompt": PromptTuning, "prefix": PrefixTuning, "llama-adapter": LlamaAdapter,
    "llama-adapter-v2": LlamaAdapterV2,
}  # fmt: skip


def lora_weight(adapter: LoRALinear) -> Tensor:
    """W + scale * B A, (out, in) fp32."""
    return adapter.base.dequantize(torch.float32) + adapter.scale * (adapter.lora_B @ adapter.lora_A)


def dora_weight(adapter: DoRALinear) -> Tensor:
    """m V / |V| by row, (out, in) fp32."""
    return lora_weight(adapter) * adapter.ratio()[:, None]


# The published ones, which PEFT's files stand for.
FORMULAS = {LoRALinear: lora_weight, DoRALinear: dora_weight, LoRAFALinear: lora_weight}


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
    virtual_tokens: how many trained tokens stand before every text, or the prompts of LLaMA-Adapter have.
    adapter_layers: how many of the last blocks have such prompts. feedforward: those of `targets`, named in the same
    way, whose input (IA)3 multiplies, not their output. seed: of VeRA's random matrices.
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
    virtual_tokens: int = 20
    adapter_layers: int = 1
    feedforward: tuple | str = ("down_proj",)
    seed: int = 0
    layers: tuple[int, ...] | None = None
    residual: bool = False
    save: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()

    def adapt(self, base: nn.Module, name: str, shared: Any = None) -> Adapter:
        """The adapter over the module `base`, which is called `name` in the model. shared: `Adapter.shared`'s."""
        adapter = ADAPTERS[self.kind].over(base, name, self.rank(name), self.alpha_of(name), self, shared)
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
        return is_named(name, self.targets) and (name in self.targets or self.in_layers(name))

    def in_layers(self, name: str) -> bool:
        """Whether the module called `name` is in one of the blocks that `layers` has."""
        return self.layers is None or layer_number(name) in self.layers


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


def add_lora(model: Transformer, config: AdapterConfig) -> None:
    """Freeze the model and wrap its modules as `config` says. Its trainable parameters are the adapter's."""
    wrap(model, config, places(model, config))


def places(model: Transformer, config: AdapterConfig) -> list[str]:
    """The names of the modules of a model that get an adapter. Raises UserError if there are none."""
    kind, layers = ADAPTERS[config.kind], linear_layers(model)
    kind.check(model, config)
    if "lora_targets" in kind.flags:
        for target in () if isinstance(config.targets, str) else config.targets:
            if not any(AdapterConfig(targets=(target,)).covers(name) for name in layers):
                choices = dict.fromkeys(name.rpartition(".")[2] for name in layers)
                raise UserError(f"--lora_targets: the model has no projection {target!r}, only {', '.join(choices)}")
    names = kind.places(model, config)
    if not names:
        raise UserError(f"--lora_targets: no linear layer of the model is called {config.targets!r}")
    return names


def wrap(model: Transformer, config: AdapterConfig, names: Sequence[str], whole: Sequence[str] | None = None) -> None:
    """Freeze the model and put an adapter over each module in `names`, an inner one before what it is in.

    whole: what these are called in the whole model, if this one has only some of its blocks.
    Virtual tokens take room: the model's context is shorter by their number.
    """
    kind = ADAPTERS[config.kind]
    model.requires_grad_(False)
    shared = kind.shared(model, config, names, next(model.parameters()).device)
    for name, known in zip(names, whole or names, strict=True):
        put(model, name, config.adapt(model.get_submodule(name), known, shared))
        give_back_memory()
    if taken := kind.number_of_virtual_tokens(config):
        context = model.config.max_position_embeddings - taken
        model.config = dataclasses.replace(model.config, max_position_embeddings=context)


def give_back_memory() -> None:
    """Return what was freed to the system. glibc keeps freed memory in gaps that are too small for later tensors.

    A model of 557 MB in bf16, 251 MB in NF4, peaked at 327 MB above the bare process while it was loaded; without this
    at 400 to 1,590 MB, another figure in each run. With DoRA at 343 instead of 2,015 MB. (On the CPU, glibc 2.36.)
    """
    with contextlib.suppress(AttributeError, TypeError):  # other C libraries have no such function, or need none
        ctypes.CDLL(None).malloc_trim(0)
