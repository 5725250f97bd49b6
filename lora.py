"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) over dense and quantised linear layers alike.

An adapter wraps a frozen linear layer, sits in its place in the model, and trains a few fp32 parameters. Files are
PEFT's: `adapter_model.safetensors` and `adapter_config.json`, which PEFT loads and which load from PEFT.

To add an adapter: a class like `DoRALinear` and a line in `ADAPTERS`.
"""

import contextlib
import ctypes
import math
import re
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from ops.linear import low_rank_linears
from shell.cli import UserError

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Module):
    """y = base(x) + scale * B A x. A (r, in) starts random and B (out, r) zero, so it starts as the base itself.

    A and B are fp32 whatever the model's dtype: in bf16 most of AdamW's steps would round to nothing.
    """

    def __init__(self, base, r, alpha, dropout=0.0, rslora=False):
        super().__init__()
        self.base, self.dropout = base, dropout
        self.in_features, self.out_features = base.in_features, base.out_features
        self.scale = alpha / (math.sqrt(r) if rslora else r)  # rsLoRA: Kalajdzievski 2023, arXiv 2312.03732
        device = base.weight.device if isinstance(base, nn.Linear) else base.codes.device
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, device=device))
        if not self.lora_A.is_meta:  # there it would do nothing, and take a second to import what it needs for that
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def low_rank(self, x):
        """scale * B A dropout(x), multiplied in x's dtype."""
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        x = F.linear(x, self.lora_A.to(x.dtype)) * self.scale  # (..., r): scaled where it is small
        return F.linear(x, self.lora_B.to(x.dtype))

    def forward(self, x):
        if not self.trains_by_hand():
            return self.base(x) + self.low_rank(x)
        return self.together(x, [self])[0]

    def trains_by_hand(self):
        """Whether `together` does what `forward` does. When nothing trains, the base may have a faster way."""
        return torch.is_grad_enabled() and not (self.dropout and self.training)

    @staticmethod
    def together(x, layers):
        """What each of `layers` makes of x, in fewer products and with less kept than one after the other."""
        bases, scales = [layer.base for layer in layers], [layer.scale for layer in layers]
        factors = [(layer.lora_A, layer.lora_B) for layer in layers]
        ys = low_rank_linears(x, [base.dequantize for base in bases], scales, factors)
        return [y if base.bias is None else y + base.bias.to(y.dtype) for y, base in zip(ys, bases, strict=True)]

    @torch.no_grad()
    def merged_weight(self):
        """The one weight, (out, in) fp32, that does what base and adapter do together."""
        return self.base.dequantize(torch.float32) + self.scale * (self.lora_B @ self.lora_A)


class DoRALinear(LoRALinear):
    """Weight-decomposed LoRA (Liu et al. 2024, arXiv 2402.09353): W' = m V / |V| by row, V = W + scale * B A.

    m (out,) starts as |W|. As in section 4.3 of the paper |V| counts as a constant in the gradient.
    """

    def __init__(self, base, r, alpha, dropout=0.0, rslora=False):
        super().__init__(base, r, alpha, dropout, rslora)
        self.lora_magnitude_vector = nn.Parameter(self.row_norms())

    @torch.no_grad()
    def row_norms(self):
        return LoRALinear.merged_weight(self).norm(dim=1).clamp(min=1e-38)  # a row may be zero: 0 / 0 is NaN

    def ratio(self):
        """m / |V|, the factor of each row: (out,) fp32."""
        return self.lora_magnitude_vector / self.row_norms()

    def trains_by_hand(self):
        return False

    def forward(self, x):
        y = self.base(x)
        bare = y if self.base.bias is None else y - self.base.bias.to(y.dtype)
        ratio = self.ratio().to(y.dtype)
        return y + (ratio - 1) * bare + ratio * self.low_rank(x)  # exactly y at the start, where ratio is 1

    @torch.no_grad()
    def merged_weight(self):
        return super().merged_weight() * self.ratio()[:, None]


ADAPTERS = {"lora": LoRALinear, "dora": DoRALinear}


@dataclass(frozen=True)
class AdapterConfig:
    """What adapters a model has: kind, rank and scale, and the linear layers they sit on.

    targets: names such as "q_proj" (the end of a module's name, or all of it), or one regular expression for it.
    rank_pattern, alpha_pattern: other ranks and alphas for the modules whose names end as a key says (PEFT's).
    """

    kind: str = "lora"
    r: int = 16
    alpha: float = 32
    dropout: float = 0.0
    rslora: bool = False
    targets: tuple | str = PROJECTIONS
    rank_pattern: dict = field(default_factory=dict)
    alpha_pattern: dict = field(default_factory=dict)

    def adapt(self, base, name):
        """The adapter over the linear layer `base`, which is called `name` in the model."""
        r = self.rank(name)
        alpha = match_pattern(self.alpha_pattern, name, self.alpha)
        return ADAPTERS[self.kind](base, r, alpha, self.dropout, self.rslora)

    def rank(self, name):
        return match_pattern(self.rank_pattern, name, self.r)

    def covers(self, name):
        if isinstance(self.targets, str):
            return re.fullmatch(self.targets, name) is not None
        return any(name == target or name.endswith("." + target) for target in self.targets)


def match_pattern(pattern, name, default):
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def linear_layers(model):
    """Name and module of every layer that an adapter could wrap: all linear ones, quantised or not."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "in_features")}


def add_lora(model, config):
    """Freeze the model and wrap its linear layers as `config` says. Its trainable parameters are the adapter's."""
    layers = linear_layers(model)
    for target in () if isinstance(config.targets, str) else config.targets:
        if not any(AdapterConfig(targets=(target,)).covers(name) for name in layers):
            choices = dict.fromkeys(name.rpartition(".")[2] for name in layers)
            raise UserError(f"--lora_targets: the model has no projection {target!r}, only {', '.join(choices)}")
    names = [name for name in layers if config.covers(name)]
    if not names:
        raise UserError(f"--lora_targets: no linear layer of the model is called {config.targets!r}")
    wrap(model, config, names)


def wrap(model, config, names):
    """Freeze the model and put an adapter over each linear layer in `names`."""
    model.requires_grad_(False)
    for name in names:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, config.adapt(model.get_submodule(name), name))
        give_back_memory()


def give_back_memory():
    """Return what was freed to the system. glibc keeps it, in holes between the results that larger ones never fit.

    A model of 557 MB in bf16, 251 MB in NF4, peaked at 327 MB above the bare process while it was loaded; without this
    at 400 to 1,590 MB, another figure in each run. With DoRA at 343 instead of 2,015 MB. (On the CPU, glibc 2.36.)
    """
    with contextlib.suppress(AttributeError, TypeError):  # other C libraries have no such function, or need none
        ctypes.CDLL(None).malloc_trim(0)


def adapters(model):
    """Name and module of every adapter in the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
