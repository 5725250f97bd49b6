"""Adapter folders in PEFT's format: `adapter_model.safetensors` and `adapter_config.json`, read strictly, written."""

import json
import math
import re
import signal
import threading
from pathlib import Path

import torch
from safetensors.torch import save_file

from lora import AdapterConfig, adapters, linear_layers, match_pattern, wrap
from shell.cli import UserError
from shell.files import check_listed, read_json
from weights.safetensors_format import read_tensors

PREFIX = "base_model.model."  # PEFT's, before every name in an adapter file
PATTERN_SECONDS = 2
ADAPTER_AGAIN = "copy or train it again"  # what mends an adapter folder

# Settings of PEFT's that change what an adapter computes, and that we do not have.
UNSUPPORTED = (
    "modules_to_save", "fan_in_fan_out", "lora_bias", "trainable_token_indices", "target_parameters",
    "layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config",
    "monteclora_config",
)  # fmt: skip


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
                match_pattern(patterns, name, None)
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
