"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) over dense and quantised linear layers alike.

An adapter wraps a frozen linear layer, sits in its place in the model, and trains a few fp32 parameters. Files are
PEFT's: `adapter_model.safetensors` and `adapter_config.json`, which PEFT loads and which load from PEFT.

To add an adapter: a class like `DoRALinear` and a line in `ADAPTERS`.
"""

import contextlib
import ctypes
import json
import math
import re
import signal
import threading
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from cli import UserError
from files import check_listed, read_json
from kernels import low_rank_linears
from safetensors_format import read_tensors

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PREFIX = "base_model.model."  # PEFT's, before every name in an adapter file
PATTERN_SECONDS = 2
ADAPTER_AGAIN = "copy or train it again"  # what mends an adapter folder

# Settings of PEFT's that change what an adapter computes, and that we do not have.
UNSUPPORTED = (
    "modules_to_save", "fan_in_fan_out", "lora_bias", "trainable_token_indices", "target_parameters",
    "layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config",
    "monteclora_config",
)  # fmt: skip


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
        alpha = _match_pattern(self.alpha_pattern, name, self.alpha)
        return ADAPTERS[self.kind](base, r, alpha, self.dropout, self.rslora)

    def rank(self, name):
        return _match_pattern(self.rank_pattern, name, self.r)

    def covers(self, name):
        if isinstance(self.targets, str):
            return re.fullmatch(self.targets, name) is not None
        return any(name == target or name.endswith("." + target) for target in self.targets)


def _match_pattern(pattern, name, default):
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


# ------------------------------------------------------------------------------------------------- PEFT's files


def save_adapter(model, config, folder, base_model):
    """Write the model's adapters to `folder` as PEFT would; `base_model` is the path or repo id to note in it."""
    tensors = {
        PREFIX + _peft_name(name, key): parameter.detach().cpu().contiguous()
        for name, module in adapters(model).items()
        for key, parameter in module.named_parameters(recurse=False)
    }
    save_file(tensors, Path(folder, "adapter_model.safetensors"), metadata={"format": "pt"})
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_model),
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "use_dora": config.kind == "dora",
        "target_modules": config.targets if isinstance(config.targets, str) else list(config.targets),
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "bias": "none",
        "fan_in_fan_out": False,
    }
    Path(folder, "adapter_config.json").write_text(json.dumps(description, indent=2) + "\n")


def load_adapter(model, folder):
    """Freeze the model and put the adapter in `folder`, ours or PEFT's, over it. Returns its `AdapterConfig`.

    Raises UserError if a tensor is missing, surplus, misshapen or not finite.
    """
    config, tensors = read_adapter(folder)
    layers = linear_layers(model)
    wanted = _match_names(config, layers, folder)
    for name in tensors:
        if name not in wanted:
            raise UserError(f"{folder}: it adapts {name}, which the base model or adapter_config.json does not have")
    for name in wanted:
        if name not in tensors:
            raise UserError(f"{folder}: no tensors for {name}, which adapter_config.json says it adapts")
        if "lora_A" in tensors[name]:  # before memory is taken for whatever rank adapter_config.json claims
            needed = config.rank(name), layers[name].in_features
            _check_shape(f"{folder}: {name}.lora_A", tensors[name]["lora_A"].shape, needed)
    wrap(model, config, wanted)
    for name, module in adapters(model).items():
        fill_adapter(module, tensors[name], f"{folder}: {name}")
    return config


@torch.no_grad()
def fill_adapter(module, tensors, where):
    """Copy `tensors`, by parameter name, into one adapter. Raises UserError, naming `where`, if they do not fit."""
    parameters = dict(module.named_parameters(recurse=False))
    if parameters.keys() != tensors.keys():
        raise UserError(f"{where}: it should have the tensors {', '.join(parameters)}, it has {', '.join(tensors)}")
    for key, parameter in parameters.items():
        _check_shape(f"{where}.{key}", tensors[key].shape, parameter.shape)
        if tensors[key].dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise UserError(f"{where}.{key} is {tensors[key].dtype}: expected float32, bfloat16 or float16")
        if not tensors[key].isfinite().all():
            raise UserError(f"{where}.{key} holds NaN or infinity: the run that made it had failed")
        parameter.copy_(tensors[key])


def _check_shape(what, shape, needed):
    if tuple(shape) != tuple(needed):
        shapes = f"{tuple(shape)} where the model needs {tuple(needed)}"
        raise UserError(f"{what} is {shapes}: it belongs to another base model or rank")


def _match_names(config, names, folder):
    """Those of `names` that an adapter covers. Raises UserError if its patterns take more than `PATTERN_SECONDS`.

    They may be regular expressions such as (a+)+$, which try endlessly many ways to match. Python asks for signals
    while it tries; only the main thread gets them, and other threads have no limit.
    """

    def stop(*_):
        raise UserError(
            f"{folder}: the patterns in adapter_config.json take too long to match: list the modules' names"
        )

    limited = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGALRM, stop) if limited else None
    try:
        if limited:
            signal.setitimer(signal.ITIMER_REAL, PATTERN_SECONDS)
        for name in names:
            for patterns in (config.rank_pattern, config.alpha_pattern):
                _match_pattern(patterns, name, None)
        return [name for name in names if config.covers(name)]
    finally:
        if limited:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def read_adapter(folder):
    """The adapter files in `folder`: an `AdapterConfig`, and for each module's name its tensors by parameter name."""
    config_path, tensors_path = Path(folder, "adapter_config.json"), Path(folder, "adapter_model.safetensors")
    for path in (config_path, tensors_path):
        if not path.is_file():
            raise UserError(f"{path} does not exist: --adapter_dir must be a folder such as out/RUN/final")
    check_listed(folder, [config_path.name, tensors_path.name], ADAPTER_AGAIN)
    try:
        config = _read_peft_config(read_json(config_path))
    except ValueError as error:
        raise UserError(f"{config_path}: {error}") from None
    stored, tensors = read_tensors(tensors_path, ADAPTER_AGAIN), {}
    for name, tensor in stored.items():
        if name == f"{PREFIX}lm_head.base_layer.weight":  # PEFT adds a copy of the frozen head, if it adapts it
            continue
        match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(\.weight)?", name)
        if match is None:
            raise UserError(f"{tensors_path}: tensor {name} is not one of a LoRA adapter")
        if match[2] in tensors.setdefault(match[1], {}):
            raise UserError(f"{tensors_path}: tensor {name} comes twice, with and without .weight")
        tensors[match[1]][match[2]] = tensor
    return config, tensors


def _peft_name(name, key):
    return f"{name}.{key}" if key == "lora_magnitude_vector" else f"{name}.{key}.weight"


def _read_peft_config(values):
    """PEFT's adapter_config.json as an AdapterConfig. Raises ValueError for what would compute something else."""
    if values.get("peft_type") != "LORA":
        raise ValueError(f"peft_type {values.get('peft_type')!r} is not supported, only LORA is")
    for key in UNSUPPORTED:
        if values.get(key):
            raise ValueError(f"{key} is not supported")
    if values.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal", "eva"):
        raise ValueError(f"init_lora_weights {values['init_lora_weights']!r} alters the base model: not supported")
    if values.get("bias", "none") != "none":
        raise ValueError(f"bias {values['bias']!r} is not supported, only none is")
    if values.get("layers_to_transform") or values.get("exclude_modules"):
        raise ValueError("layers_to_transform and exclude_modules are not supported: list the modules' full names")
    for key in ("r", "lora_alpha", "target_modules"):
        if not values.get(key):
            raise ValueError(f"{key} is missing")
    _check_peft_values(values)
    targets = values["target_modules"]
    return AdapterConfig(
        kind="dora" if values.get("use_dora") else "lora",
        r=values["r"],
        alpha=values["lora_alpha"],
        dropout=values.get("lora_dropout", 0.0),
        rslora=values.get("use_rslora", False),
        targets=targets if isinstance(targets, str) else tuple(targets),
        rank_pattern=values.get("rank_pattern") or {},
        alpha_pattern=values.get("alpha_pattern") or {},
    )


def _check_peft_values(values):
    """Raise ValueError if an adapter_config.json has values of the wrong kind."""
    patterns = [values.get(key) or {} for key in ("rank_pattern", "alpha_pattern")]
    if not all(isinstance(pattern, dict) for pattern in patterns):
        raise ValueError("rank_pattern and alpha_pattern must be objects")
    for rank in (values["r"], *patterns[0].values()):
        if type(rank) is not int or rank < 1:
            raise ValueError(f"a rank of {rank!r} is not a whole number above 0")
    for alpha in (values["lora_alpha"], *patterns[1].values()):
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise ValueError(f"an alpha of {alpha!r} is not a number")
    dropout, targets = values.get("lora_dropout", 0.0), values["target_modules"]
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise ValueError(f"lora_dropout {dropout!r} is not a number from 0 to below 1")
    for key in ("use_dora", "use_rslora"):
        if type(values.get(key, False)) is not bool:
            raise ValueError(f"{key} {values[key]!r} is not true or false")
    if not isinstance(targets, str) and not (isinstance(targets, list) and all(isinstance(t, str) for t in targets)):
        raise ValueError("target_modules is neither a list of names nor a regular expression")
    for pattern in (*patterns[0], *patterns[1], *([targets] if isinstance(targets, str) else [])):
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{pattern[:80]!r} is not a regular expression ({error})") from None
