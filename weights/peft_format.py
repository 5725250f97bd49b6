"""Adapter folders: `adapter_model.safetensors` and `adapter_config.json`, read strictly, written.

Standard LoRA and DoRA are in PEFT's format. Any other kind of adapter has the peft_type "ONETUNE_KIND", which PEFT does
not load; its tensors are called MODULE:NAME, after the parameters and buffers of its class.
"""

import contextlib
import hashlib
import json
import math
import re
import signal
import threading
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lora import ADAPTERS, Adapter, AdapterConfig, DoRALinear, LoRALinear, adapters, linear_layers, match_pattern, wrap
from model import Linear
from shell.cli import UserError
from shell.files import check_listed, read_json
from weights.safetensors_format import read_tensors

PREFIX = "base_model.model."  # PEFT's, before every name in an adapter file
OURS = "ONETUNE_"  # before the kind, in the peft_type of an adapter that is not PEFT's
PATTERN_SECONDS = 2
ADAPTER_AGAIN = "copy or train it again"  # what mends an adapter folder
UNSAVED = "hash_of_unsaved_buffers"
SAMPLED = 4096  # values of each go into that hash: of a random matrix they tell as much as all
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# Settings of PEFT's that change what an adapter computes, and that we do not have.
UNSUPPORTED = (
    "modules_to_save", "fan_in_fan_out", "lora_bias", "trainable_token_indices", "target_parameters",
    "layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config",
    "monteclora_config",
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------- writing


def save_adapter(model: nn.Module, config: AdapterConfig, folder: Path, base_model: Path | str) -> None:
    """Write the model's adapters to `folder`.

    base_model: the path or repo id of the base, to note there. A folder's path is made absolute, so that PEFT finds it
    wherever it is started. After the folder has moved, edit base_model_name_or_path or name the base on the command
    line; our scripts also try the path in onetune.json, which is as it was given.
    """
    found = adapters(model)
    in_peft = all(adapter.standard for adapter in found.values())
    tensors = {
        (_peft_name if in_peft else "{}:{}".format)(name, key): tensor.detach().to("cpu", copy=True).contiguous()
        for name, adapter in found.items()
        for key, tensor in own_tensors(adapter).items()
    }
    save_file(tensors, Path(folder, "adapter_model.safetensors"), metadata={"format": "pt"})
    description = {
        "peft_type": "LORA" if in_peft else f"{OURS}{config.kind}",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(Path(base_model).resolve() if Path(base_model).is_dir() else base_model),
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "target_modules": config.targets if isinstance(config.targets, str) else list(config.targets),
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "bias": "none",
        "fan_in_fan_out": False,
    }
    if in_peft:
        description["use_dora"] = ADAPTERS[config.kind] is DoRALinear
    Path(folder, "adapter_config.json").write_text(json.dumps(description, indent=2) + "\n")


def own_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """What is saved of an adapter, by name: its parameters and persistent buffers, without those of its base.

    And for the buffers that are not persistent, which its class makes again from a seed, a hash called `UNSAVED`.
    """
    state = adapter.state_dict(keep_vars=True)
    own = {key: tensor for key, tensor in state.items() if not key.startswith("base.")}
    unsaved = [buffer for key, buffer in adapter.named_buffers() if key not in state]
    return own | {UNSAVED: _hash(unsaved)} if unsaved else own


def _hash(tensors):
    """SHA-256 of `SAMPLED` values of each tensor: (32,) uint8, without values where these have none."""
    digest = hashlib.sha256()
    for tensor in tensors:
        if tensor.is_meta:
            return torch.empty(32, dtype=torch.uint8, device="meta")
        values = tensor.detach().flatten()[:: max(1, tensor.numel() // SAMPLED)]
        digest.update(values.cpu().contiguous().view(torch.uint8).numpy())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def _peft_name(name, key):
    return f"{PREFIX}{name}.{key}" if key == "lora_magnitude_vector" else f"{PREFIX}{name}.{key}.weight"


# ------------------------------------------------------------------------------------------------------- reading


def load_adapter(model: nn.Module, folder: Path) -> AdapterConfig:
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
        where = f"{folder}: {name}"
        _check_shapes(_without_memory(config, layers[name], name, where), tensors[name], where)
    wrap(model, config, wanted)
    for name, adapter in adapters(model).items():
        fill_adapter(adapter, tensors[name], f"{folder}: {name}")
    return config


def _without_memory(config, layer, name, where):
    """The adapter over a layer of this size, but without memory: for checks before any is taken for the rank."""
    with torch.device("meta"):
        base = Linear(layer.in_features, layer.out_features, layer.bias is not None)
        try:
            return config.adapt(base, name)
        except (OverflowError, RuntimeError, TypeError) as error:  # of a rank that no tensor can have
            reason = str(error).split("\n")[0]
            raise UserError(f"{where}: no adapter can be as adapter_config.json says ({reason})") from None


@torch.no_grad()
def fill_adapter(adapter: Adapter, tensors: dict[str, Tensor], where: str) -> None:
    """Copy `tensors`, by name, into one adapter. Raises UserError, naming `where`, if they do not fit."""
    _check_shapes(adapter, tensors, where)
    for key, own in own_tensors(adapter).items():
        tensor = tensors[key]
        if tensor.dtype != own.dtype and not (own.is_floating_point() and tensor.dtype in FLOATS):
            expected = "float32, bfloat16 or float16" if own.is_floating_point() else str(own.dtype)
            raise UserError(f"{where}.{key} is {tensor.dtype}: expected {expected}")
        if not tensor.isfinite().all():
            raise UserError(f"{where}.{key} holds NaN or infinity: the run that made it had failed")
        if key == UNSAVED and not own.is_meta and not torch.equal(own, tensor):
            raise UserError(
                f"{where}: its buffers that are not saved differ from those of the training: let "
                f"{type(adapter).__name__} make them from a fixed seed, or save them (persistent=True)"
            )
        own.copy_(tensor)


def _check_shapes(adapter, tensors, where):
    """Raise UserError, naming `where`, unless `tensors` have the names and shapes of the adapter's own."""
    own = own_tensors(adapter)
    if own.keys() != tensors.keys():
        raise UserError(f"{where}: it should have the tensors {', '.join(own)}, it has {', '.join(tensors)}")
    for key, tensor in own.items():
        if tensors[key].shape != tensor.shape:
            shapes = f"{tuple(tensors[key].shape)} where the model needs {tuple(tensor.shape)}"
            raise UserError(f"{where}.{key} is {shapes}: it belongs to another base model or rank")


def _match_names(config, names, folder):
    """Those of `names` that an adapter covers. Raises UserError if its patterns take more than `PATTERN_SECONDS`."""
    with _time_limit(f"{folder}: the patterns in adapter_config.json take too long to match: list the modules' names"):
        for name in names:
            for patterns in (config.rank_pattern, config.alpha_pattern):
                match_pattern(patterns, name, None)
        return [name for name in names if config.covers(name)]


@contextlib.contextmanager
def _time_limit(message):
    """Raise UserError(message) if what is inside takes more than `PATTERN_SECONDS`.

    A regular expression such as (a+)+$ tries endlessly many ways to match. Python looks for signals while it tries.
    Only the main thread gets signals, so other threads have no limit.
    """

    def stop(*_):
        raise UserError(message)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, PATTERN_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def read_adapter(folder: Path) -> tuple[AdapterConfig, dict[str, dict[str, Tensor]]]:
    """The adapter files in `folder`: an `AdapterConfig`, and for each module's name its tensors by their own names."""
    config_path, tensors_path = Path(folder, "adapter_config.json"), Path(folder, "adapter_model.safetensors")
    for path in (config_path, tensors_path):
        if not path.is_file():
            raise UserError(f"{path} does not exist: --adapter_dir must be a folder such as out/RUN/final")
    check_listed(folder, [config_path.name, tensors_path.name], ADAPTER_AGAIN)
    values = read_json(config_path)
    try:
        config = _adapter_config(values)
    except ValueError as error:
        raise UserError(f"{config_path}: {error}") from None
    split = _split_peft_name if values["peft_type"] == "LORA" else _split_name
    stored, tensors = read_tensors(tensors_path, ADAPTER_AGAIN), {}
    for full_name, tensor in stored.items():
        if full_name == f"{PREFIX}lm_head.base_layer.weight":  # PEFT adds a copy of the frozen head, if it adapts it
            continue
        parts = split(full_name)
        if parts is None:
            raise UserError(f"{tensors_path}: tensor {full_name} is not one of a {config.kind} adapter")
        name, key = parts
        if key in tensors.setdefault(name, {}):
            raise UserError(f"{tensors_path}: tensor {full_name} comes twice, with and without .weight")
        tensors[name][key] = tensor
    return config, tensors


def _split_peft_name(full_name):
    """The module and the tensor's name in it, of a tensor in PEFT's file; None if it is not of LoRA or DoRA."""
    match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(\.weight)?", full_name)
    return match and (match[1], match[2])


def _split_name(full_name):
    """As `_split_peft_name`, of a tensor of any other kind of adapter."""
    name, colon, key = full_name.partition(":")
    return (name, key) if colon else None


def _adapter_config(values):
    """adapter_config.json as an AdapterConfig. Raises ValueError for what would compute something else."""
    kind = _kind(values)
    _check_supported(values)
    for key in ("r", "lora_alpha", "target_modules"):
        if not values.get(key):
            raise ValueError(f"{key} is missing")
    _check_numbers(values)
    _check_targets(values)
    targets = values["target_modules"]
    return AdapterConfig(
        kind=kind,
        r=values["r"],
        alpha=values["lora_alpha"],
        dropout=values.get("lora_dropout", 0.0),
        rslora=values.get("use_rslora", False),
        targets=targets if isinstance(targets, str) else tuple(targets),
        rank_pattern=values.get("rank_pattern") or {},
        alpha_pattern=values.get("alpha_pattern") or {},
    )


def _kind(values):
    """The key of `ADAPTERS` for an adapter_config.json. Raises ValueError if it is of a kind that is not there."""
    peft_type = values.get("peft_type")
    if peft_type == "LORA":
        wanted = DoRALinear if values.get("use_dora") else LoRALinear
        if wanted.is_standard():
            for kind, adapter in ADAPTERS.items():
                if adapter is wanted:
                    return kind
        raise ValueError(f"lora.py has no {wanted.__name__} as published, which peft_type LORA stands for")
    if not isinstance(peft_type, str) or not peft_type.startswith(OURS):
        raise ValueError(f"peft_type {str(peft_type)[:80]!r} is not supported, only LORA is")
    kind = peft_type.removeprefix(OURS)
    if kind not in ADAPTERS:
        raise ValueError(f"it is an adapter of the kind {kind[:80]!r}, lora.py has only {', '.join(ADAPTERS)}")
    if ADAPTERS[kind].is_standard():
        raise ValueError(f"it was trained with another {ADAPTERS[kind].__name__} than lora.py's: take that lora.py")
    return kind


def _check_supported(values):
    """Raise ValueError if an adapter_config.json has a setting that alters the computation and that we do not have."""
    for key in UNSUPPORTED:
        if values.get(key):
            raise ValueError(f"{key} is not supported")
    if values.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal", "eva"):
        raise ValueError(f"init_lora_weights {values['init_lora_weights']!r} alters the base model: not supported")
    if values.get("bias", "none") != "none":
        raise ValueError(f"bias {values['bias']!r} is not supported, only none is")
    if values.get("layers_to_transform") or values.get("exclude_modules"):
        raise ValueError("layers_to_transform and exclude_modules are not supported: list the modules' full names")
    for key in ("use_dora", "use_rslora"):
        if type(values.get(key, False)) is not bool:
            raise ValueError(f"{key} {values[key]!r} is not true or false")


def _check_numbers(values):
    """Raise ValueError if a rank, an alpha or the dropout in an adapter_config.json is none."""
    ranks, alphas = (_pattern(values, key) for key in ("rank_pattern", "alpha_pattern"))
    for rank in (values["r"], *ranks.values()):
        if type(rank) is not int or rank < 1:
            raise ValueError(f"a rank of {rank!r} is not a whole number above 0")
    for alpha in (values["lora_alpha"], *alphas.values()):
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise ValueError(f"an alpha of {alpha!r} is not a number")
    dropout = values.get("lora_dropout", 0.0)
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise ValueError(f"lora_dropout {dropout!r} is not a number from 0 to below 1")


def _check_targets(values):
    """Raise ValueError unless the target modules are names or a regular expression, and all expressions are good."""
    targets = values["target_modules"]
    if not isinstance(targets, str) and not (isinstance(targets, list) and all(isinstance(t, str) for t in targets)):
        raise ValueError("target_modules is neither a list of names nor a regular expression")
    patterns = [key for name in ("rank_pattern", "alpha_pattern") for key in _pattern(values, name)]
    for pattern in (*patterns, *([targets] if isinstance(targets, str) else [])):
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{pattern[:80]!r} is not a regular expression ({error})") from None


def _pattern(values, key):
    """`rank_pattern` or `alpha_pattern`, which may be left out."""
    pattern = values.get(key) or {}
    if not isinstance(pattern, dict):
        raise ValueError(f"{key} must be an object")
    return pattern
