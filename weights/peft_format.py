"""Adapter folders: `adapter_model.safetensors` and `adapter_config.json`, read strictly, written.

Standard LoRA and DoRA are in PEFT's format. Where the model's family calls an adapted layer otherwise than we do, or
has it as a part of another, they are stacked to what PEFT has there (peft_layout.py). The tensors' metadata then has a
description of ours, with which each layer comes back bit for bit, as resuming needs.

peft_kinds.py has PEFT's other types. Any other kind of adapter has the peft_type "ONETUNE_KIND", which PEFT does not
load; its tensors are called MODULE:NAME, after the parameters and buffers of its class, and :NAME if all modules share
one. So are adapters over layers where PEFT cannot have them (`outside_peft`), LoRA and DoRA with the peft_type
`OUTSIDE`.

PEFT's folders may hold more than adapters over linear layers: new values of the base's own parameters (replaced.py).
They are read; whole modules and rows of tokens are written too (beside.py).

Adapters that start from the base's weights are written as ordinary ones of twice the rank (residual.py).
"""

import contextlib
import dataclasses
import hashlib
import json
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from adapters.adapter import Adapter, adapters, linear_layers
from lora import (
    ADAPTERS,
    AdapterConfig,
    DoRALinear,
    LoRALinear,
    is_named,
    layer_number,
    match_pattern,
    places,
    wrap,
)
from model import Linear, Transformer
from shell.cli import UserError
from shell.files import check_listed, read_json
from store.cache import address_of
from weights import residual
from weights.adapter_config import (
    EMBEDDING_MODULE,
    HEAD_MODULE,
    OURS,
    OUTSIDE,
    layer_patterns,
    own_description,
    parse_adapter_config,
    token_ids,
)
from weights.beside import describe_beside, own_names, own_replaced, tensors_beside
from weights.peft_kinds import KINDS, PEFT_TYPES, PREFIX, Found, layout_of
from weights.peft_layout import Layout, outside_peft
from weights.replaced import EMBEDDING, FLOATS, HEAD, Replaced, biases, parameters_of, replace
from weights.safetensors_format import read_metadata, read_tensors, write_tensors

METADATA = "onetune"  # the key in the tensors' metadata: adapter_config.json as it would be under our names
KIND = "onetune_kind"  # the key there for an adapter that is trained in another way than its file tells
ADAPTED = "onetune_adapted"  # the key there for the names of our layers that have an adapter, of a type in `KINDS`
NAMES_IN_JSON = {dict: "object", list: "list"}
PATTERN_SECONDS = 2
SLOW_PATTERNS = "the patterns in adapter_config.json take too long to match: list the modules' names"
ADAPTER_AGAIN = "copy or train it again"  # what mends an adapter folder
UNSAVED = "hash_of_unsaved_buffers"
SAMPLED = 4096  # values of each go into that hash: of a random matrix they tell as much as all


# ------------------------------------------------------------------------------------------------------- writing


def save_adapter(model: nn.Module, config: AdapterConfig, folder: Path, base_model: Path | str) -> None:
    """Write the model's adapters to `folder`.

    base_model: the path or repo id of the base, to note there; for a folder that was fetched, its address is noted. A
    folder's path is made absolute, so that PEFT finds it wherever it is started. After the folder has moved, edit
    base_model_name_or_path or name the base on the command line; our scripts also try the path in onetune.json, which
    is as it was given.
    """
    found = adapters(model)
    tensors = _copied({name: own_tensors(adapter) for name, adapter in found.items()})
    peft_type, metadata = _peft_type(model, config, found), {"format": "pt"}
    if peft_type != "LORA" and (config.save or config.tokens):
        raise UserError(f"an adapter of the type {peft_type} cannot be saved with modules or tokens beside it")
    if config.residual:
        metadata[residual.METADATA] = residual.describe(config)
        tensors, config = residual.doubled(tensors, config)
    description = _description(config, peft_type, base_model) | describe_beside(model, config)
    if peft_type in KINDS:
        flat, adapted = KINDS[peft_type].write(tensors, model), [*found]
        metadata |= {ADAPTED: json.dumps(adapted)} if "lora_targets" in ADAPTERS[config.kind].flags else {}
        description |= KINDS[peft_type].describe(config, model, adapted)
    elif peft_type == "LORA":
        layout = Layout(model.config, linear_layers(model))
        if ADAPTERS[config.kind] not in (LoRALinear, DoRALinear):
            metadata[KIND] = config.kind
        if layout.differs(found):
            metadata[METADATA] = json.dumps(description)
            tensors = layout.stack(tensors, config, lambda name: _row_norms(model.get_submodule(name)))
            description |= layout.describe(config, [*found])
        flat = {_peft_name(name, key): t for name, own in tensors.items() for key, t in own.items()}
        flat |= {f"{PREFIX}{name}": tensor for name, tensor in tensors_beside(model, config).items()}
    else:
        flat = _flat(tensors)
        metadata |= {KIND: config.kind} if peft_type == OUTSIDE else {}
    flat = {name: tensor.contiguous() for name, tensor in flat.items()}
    write_tensors(Path(folder, "adapter_model.safetensors"), flat, metadata)
    Path(folder, "adapter_config.json").write_text(json.dumps(description, indent=2) + "\n")


def _copied(tensors):
    """The same on the CPU; what several adapters share is copied once."""
    copies = {}
    for tensor in (tensor for own in tensors.values() for tensor in own.values()):
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.detach().to("cpu", copy=True)
    return {name: {key: copies[id(tensor)] for key, tensor in own.items()} for name, own in tensors.items()}


def _flat(tensors):
    """All tensors as MODULE:NAME, and what several modules share as :NAME."""
    counts = Counter(id(tensor) for own in tensors.values() for tensor in own.values())
    each = [(name, key, tensor) for name, own in tensors.items() for key, tensor in own.items()]
    return {f"{name if counts[id(tensor)] == 1 else ''}:{key}": tensor for name, key, tensor in each}


def _peft_type(model, config, found):
    """What kind of adapters a model has, as PEFT would call it."""
    if not all(adapter.standard for adapter in found.values()):
        peft_type = PEFT_TYPES.get(config.kind)
        own = peft_type is None or KINDS[peft_type].outside(config, model, [*found])
        return f"{OURS}{config.kind}" if own else peft_type
    return OUTSIDE if outside_peft(model.config, config.kind, found) else "LORA"


def _base_name(base_model):
    """How a base is noted: by the address that it was fetched from, its absolute path, or its repo id."""
    if (name := address_of(base_model)) != str(base_model):
        return name
    return str(Path(base_model).resolve() if Path(base_model).is_dir() else base_model)


def _description(config, peft_type, base_model):
    """adapter_config.json of adapters under our names; of types in `KINDS` what all have."""
    description = {
        "peft_type": peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": _base_name(base_model),
        "inference_mode": True,
    }
    if peft_type in KINDS:
        return description
    description |= {
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
    description |= {} if config.layers is None else {"layers_to_transform": list(config.layers)}
    if peft_type in ("LORA", OUTSIDE):
        return description | {"use_dora": ADAPTERS[config.kind] is DoRALinear}
    return description | own_description(config)


@torch.no_grad()
def _row_norms(layer):
    """The lengths of the rows of a layer's weight: (out,) fp32, the magnitudes with which DoRA starts."""
    return layer.dequantize(torch.float32).norm(dim=1).cpu()


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


class StoredAdapter(NamedTuple):
    """An adapter folder's content.

    config: of its adapters. values: all of adapter_config.json. tensors: of each adapter, by its layer and by their own
    names; of the types in `KINDS`, whose tensors tell only beside a model which module they are for, all by their names
    in the file under "". replaced: new values of the base's parameters. own: where our layers are stacked as PEFT has
    them, what would be in adapter_config.json if they were not; of the types in `KINDS` the names of our layers, if we
    wrote it. start: of adapters of twice their rank, what those without their start are like (residual.py).
    """

    config: AdapterConfig
    values: dict
    tensors: dict[str, dict[str, Tensor]]
    replaced: Replaced
    own: dict | list | None = None
    start: dict | None = None


def load_adapter(model: Transformer, folder: Path, on_residual: bool = False) -> AdapterConfig:
    """Freeze the model and put the adapter in `folder`, ours or PEFT's, over it. Returns its `AdapterConfig`.

    on_residual: whether the model has been given what `without_start` leaves of its weights.
    Raises UserError if a tensor is missing, surplus, misshapen or not finite.
    """
    stored, layers = read_for(model, folder, on_residual), linear_layers(model)
    config, tensors = stored.config, stored.tensors
    if stored.values.get("peft_type", "LORA") in ("LORA", OUTSIDE):  # under our names it is left out
        covered = _covered(stored, model, folder)
        _check_same([*tensors, *([EMBEDDING_MODULE] if stored.replaced.low_rank else [])], covered, folder)
        adapted = [name for name in covered if name != EMBEDDING_MODULE]
    else:
        adapted = _places(stored, model, folder)
        _check_same(tensors, adapted, folder)
    stand_ins = _without_memory(config, model, adapted, folder)
    for name in adapted:
        _check_shapes(stand_ins[name], tensors[name], f"{folder}: {name}")
    _check_replaced(stored, model, adapted, folder)
    replace(model, stored.replaced, str(folder))
    wrap(model, config, adapted)
    for name, adapter in adapters(model).items():
        fill_adapter(adapter, tensors[name], f"{folder}: {name}")
    narrowed = set(adapted) != {name for name in layers if config.covers(name)}
    if narrowed and "lora_targets" in ADAPTERS[config.kind].flags:  # `config` has no field for what narrows it
        config = dataclasses.replace(config, targets=tuple(name for name in adapted if name in layers))
    return config


def _places(stored, model, folder):
    """The modules that have an adapter that is not LoRA. Those without tensors of their own get none."""
    config, tensors = stored.config, stored.tensors
    if (taken := ADAPTERS[config.kind].number_of_virtual_tokens(config)) >= model.config.max_position_embeddings:
        context = model.config.max_position_embeddings
        raise UserError(f"{folder}: its {taken} virtual tokens fill the model's context of {context}")
    with _time_limit(f"{folder}: {SLOW_PATTERNS}"):
        names = places(model, config)
    shared = tensors.pop("", {})
    for name in names:
        if name == EMBEDDING_MODULE:
            tensors.setdefault(name, {})
        if name in tensors:
            tensors[name] |= shared
    return names


def is_on_residual(folder: Path) -> bool:
    """Whether the adapters in `folder` started from the base's weights, and are to be loaded over the rest of them."""
    path = Path(folder, "adapter_model.safetensors")
    return path.is_file() and residual.METADATA in read_metadata(path, ADAPTER_AGAIN)


def without_start(model: Transformer, folder: Path) -> Callable[[str, Tensor], Tensor]:
    """What is to become of each of the model's weights under the adapters in `folder`, which `is_on_residual`.

    Returns a function of a parameter's name and its value, as `checkpoint.fill_model` takes it.
    """
    stored = read_for(model, folder, on_residual=True)

    def change(name, weight):
        path = name.removesuffix(".weight")
        own = stored.tensors.get(path)
        if own is None or path == name:
            return weight
        return residual.rest(weight, own["start_A"], own["start_B"], stored.config.scale(path))

    return change


def read_for(model: Transformer, folder: Path, on_residual: bool = False) -> StoredAdapter:
    """`read_adapter`, for the layers of `model`. on_residual: as in `load_adapter`.

    Raises UserError if it cannot be over these.
    """
    stored = _read_for(model, folder)
    if not on_residual:
        return stored
    try:
        start = parse_adapter_config(stored.values | {key: stored.start.get(key) for key in residual.KEYS})
        tensors, config = residual.halved(stored.tensors, stored.config, start)
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder}: in the metadata of adapter_model.safetensors: {error}: {ADAPTER_AGAIN}") from None
    return stored._replace(tensors=tensors, config=config)


def _read_for(model, folder):
    """`read_adapter`, with the names of the model's layers where PEFT has those of its family.

    PEFT's rules are those for the family's names. Of an adapter on a layer that holds several of ours, each of these
    gets the same A and its own rows of B and of the magnitudes; of one of ours it gets what it had. Raises UserError
    for what is kept beside such adapters.
    """
    stored, linears = read_adapter(folder), [*linear_layers(model)]
    if stored.values.get("fan_in_fan_out") and model.config.family != "gpt2":  # only its weights are (in, out)
        raise UserError(f"{Path(folder, 'adapter_config.json')}: fan_in_fan_out is not supported, but for GPT-2")
    if stored.values["peft_type"] in KINDS:
        return _read_kind(stored, model, folder)
    stored = _beside_by_our_names(stored, model, folder)
    if stored.values["peft_type"] != "LORA":
        return stored
    experts_are_modules = any(re.search(r"\.experts\.\d+\.", name) for name in stored.tensors)  # transformers 4
    layout = Layout(model.config, linears, in_files=experts_are_modules)
    parameters = _target_parameters(stored, layout, folder)
    _refuse_beside(stored, model, layout, folder)
    if not layout.differs(linears):
        return stored
    if stored.own is not None:
        return _unstacked(stored, layout, folder)
    adapted = {*parameters} | {*_covered_of(stored, [*layout.held], folder)}.intersection(layout.modules())
    _check_same(stored.tensors, {*layout.in_file(adapted).values()}, folder)
    config, tensors = layout.own_config(stored.config, adapted), layout.copied(stored.tensors, adapted, str(folder))
    values = {key: stored.values.get(key) for key in ("modules_to_save", "trainable_token_indices")}
    values |= {"target_modules": [*config.targets]}
    return stored._replace(config=config, values=values, tensors=tensors)


def _beside_by_our_names(stored, model, folder):
    """A folder's content with our names of what it changes beside its adapters, and that in its config."""
    values, replaced = own_names(model, stored.values), own_replaced(model, stored.replaced)
    ids = token_ids(values)
    replaced.rows = {
        name: (ids.get(name.removesuffix(".weight"), []), rows) for name, (_, rows) in replaced.rows.items()
    }
    _check_rows(values, replaced, Path(folder, "adapter_config.json"))
    whole = parameters_of(model, values.get("modules_to_save") or [])
    if EMBEDDING in whole and values.get("ensure_weight_tying") and model.config.tie_word_embeddings:
        whole.add(HEAD)
    paths = {name.rpartition(".")[0] for name in whole}
    save = tuple(path for path, _ in model.named_modules() if path in paths)
    tokens = tuple(ids.get(EMBEDDING_MODULE, ()))
    config = dataclasses.replace(stored.config, save=save, tokens=tokens)
    own = None if stored.own is None else own_names(model, stored.own)
    return stored._replace(config=config, values=values, replaced=replaced, own=own)


def _read_kind(stored, model, folder):
    """The same for a type in `KINDS`."""
    layout = layout_of(model)
    covered = lambda names: _covered_of(stored, names, folder)  # noqa: E731
    found = Found(stored.config, stored.values, stored.tensors[""], stored.own, model, layout, covered, str(folder))
    with _time_limit(f"{folder}: {SLOW_PATTERNS}"):
        config, tensors = KINDS[stored.values["peft_type"]].read(found)
    return stored._replace(config=config, tensors=tensors)


def _target_parameters(stored, layout, folder):
    """Which parameters of a layer's experts are adapted: those that `target_parameters` names, all or the end."""
    wanted = stored.values.get("target_parameters") or []
    for target in wanted:
        if not any(is_named(name, [target]) for name in layout.parameters):
            raise UserError(f"{folder}: target_parameters: {target} is not supported, only all weights of experts are")
    return [name for name in layout.parameters if is_named(name, wanted)]


def _unstacked(stored, layout, folder):
    """Our own adapters, of a folder in which they are stacked."""
    config_path = Path(folder, "adapter_config.json")
    try:
        config = dataclasses.replace(
            parse_adapter_config(stored.own), kind=stored.config.kind, save=stored.config.save,
            tokens=stored.config.tokens,
        )  # fmt: skip
        own = stored._replace(config=config, values=stored.own, tensors={}, own=None)
        adapted = _covered_of(own, layout.linears, folder)
        expected = stored.own | layout.describe(config, adapted)
    except ValueError as error:
        raise UserError(f"{folder}: in the metadata of adapter_model.safetensors: {error}: {ADAPTER_AGAIN}") from None
    for key in sorted((expected.keys() | stored.values.keys()) - {"base_model_name_or_path"}):
        if stored.values.get(key) != expected.get(key):
            raise UserError(
                f"{config_path}: {key} is {stored.values.get(key)!r}, but the tensors were saved with "
                f"{expected.get(key)!r}: {ADAPTER_AGAIN}"
            )
    called = layout.in_file({layout.module(name) for name in adapted})
    _check_same(stored.tensors, {*called.values()}, folder)
    return own._replace(tensors=layout.unstack(stored.tensors, config, adapted, str(folder)))


def _check_same(held, covered, folder):
    """Raise UserError unless the modules that a folder has tensors for are those that its rules cover."""
    for name in held:
        if name not in covered:
            raise UserError(f"{folder}: it adapts {name}, which the base model or adapter_config.json does not have")
    for name in covered:
        if name not in held:
            raise UserError(f"{folder}: no tensors for {name}, which adapter_config.json says it adapts")


def _refuse_beside(stored, model, layout, folder):
    """Raise UserError for what a folder changes beside its adapters, if that is not called in the family as with us."""
    replaced, ours = stored.replaced, {HEAD, *(name for name, _ in model.named_parameters())}
    differs = layout.differs(layout.linears)
    pieces = {name: layout.names.piece(name) for name in replaced.names()}
    same = {name for name, piece in pieces.items() if piece.theirs == (name,) or piece.row.is_whole}
    found = sorted(replaced.names() - (same & ours if differs else same))
    if differs:
        found += ["LoRA on the embedding"] if replaced.low_rank else []
        tied = stored.values.get("ensure_weight_tying") and EMBEDDING not in replaced.whole
        found += ["ensure_weight_tying"] if tied else []
        found += ["bias"] if stored.values.get("bias", "none") != "none" else []
    if found:
        raise UserError(f"{folder}: {', '.join(found)} is not supported for {model.config.family} models")


def _check_replaced(stored, model, adapted, folder):
    """Raise UserError unless the folder holds those of the base's parameters that its adapter_config.json names."""
    values, replaced = stored.values, stored.replaced
    wanted = parameters_of(model, values.get("modules_to_save") or [])
    if values.get("bias", "none") != "none":
        wanted |= biases(model, None if values["bias"] == "all" else adapted)
    resized = {EMBEDDING, HEAD}  # PEFT saves them when the vocabulary was resized, without naming them
    for name in sorted(replaced.whole.keys() - wanted - resized):
        raise UserError(f"{folder}: it brings {name}, which the base model or adapter_config.json does not have")
    for name in sorted(wanted - replaced.whole.keys()):
        raise UserError(f"{folder}: no tensor for {name}, which adapter_config.json says was trained")
    twice = [name for name in (*replaced.whole, *replaced.rows) if name.removesuffix(".weight") in adapted]
    twice += replaced.rows.keys() & replaced.whole.keys()
    twice += [EMBEDDING] if replaced.low_rank and EMBEDDING in (*replaced.whole, *replaced.rows) else []
    for name in twice:
        raise UserError(f"{folder}: {name} is changed in two ways (modules_to_save, tokens, LoRA): not supported")


def _without_memory(config, model, names, folder):
    """The adapters over these modules, by name, but without memory: for checks before any is taken for the rank."""
    layers, found, shared = linear_layers(model), {}, None
    with torch.device("meta"):
        bare = None if {*names} <= layers.keys() else Transformer(model.config)
        for name in names:
            layer = layers.get(name)
            base = layer and Linear(layer.in_features, layer.out_features, layer.bias is not None)
            try:
                shared = ADAPTERS[config.kind].shared(model, config, names, "meta") if shared is None else shared
                found[name] = config.adapt(base or bare.get_submodule(name), name, shared)
            except (OverflowError, RuntimeError, TypeError) as error:  # of a rank that no tensor can have
                reason = str(error).split("\n")[0]
                raise UserError(f"{folder}: {name}: no adapter can be as adapter_config.json says ({reason})") from None
    return found


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


def _covered(stored, model, folder):
    """The linear layers, and perhaps the embedding, that an adapter covers, by PEFT's rules.

    Raises UserError if its patterns take more than `PATTERN_SECONDS`.
    """
    config, values, names = stored.config, stored.values, [*linear_layers(model)]
    if stored.replaced.low_rank or not isinstance(config.targets, str):  # an expression of ours is for linear layers
        names.append(EMBEDDING_MODULE)
    covered = _covered_of(stored, names, folder)
    ends = {EMBEDDING_MODULE, HEAD_MODULE}
    if values.get("ensure_weight_tying") and model.config.tie_word_embeddings and ends & {*covered}:
        covered += sorted(ends - {*covered})  # an adapter on one of them is then on both
    return covered


def _covered_of(stored, names, folder):
    """Those of the modules `names` that an adapter covers."""
    config, values = stored.config, stored.values
    with _time_limit(f"{folder}: {SLOW_PATTERNS}"):
        for name in names:
            for patterns in (config.rank_pattern, config.alpha_pattern):
                match_pattern(patterns, name, None)
        return [name for name in names if config.covers(name) and not _left_out(values, name)]


def _left_out(values, name):
    """Whether a layer that `target_modules` names gets no adapter all the same."""
    exclude, save = values.get("exclude_modules") or [], values.get("modules_to_save") or []
    if re.fullmatch(exclude, name) if isinstance(exclude, str) else is_named(name, exclude):
        return True
    if any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in save):
        return True
    numbers = values.get("layers_to_transform")
    if numbers in (None, []) or name in (values.get("target_modules") or []):
        return False
    found = (layer_number(name, pattern) for pattern in layer_patterns(values))
    number = next((number for number in found if number is not None), None)
    return number not in (numbers if isinstance(numbers, list) else [numbers])


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


def read_adapter(folder: Path) -> StoredAdapter:
    """The adapter files in `folder`. Raises UserError if they are missing, damaged or of a kind that is not supported.

    Whether they fit a model is for `load_adapter` to say.
    """
    config_path, tensors_path = Path(folder, "adapter_config.json"), Path(folder, "adapter_model.safetensors")
    for path in (config_path, tensors_path):
        if not path.is_file():
            raise UserError(f"{path} does not exist: {_how_to_have_it(path)}")
    check_listed(folder, [config_path.name, tensors_path.name], ADAPTER_AGAIN)
    values = read_json(config_path)
    try:
        config = parse_adapter_config(values)
    except ValueError as error:
        raise UserError(f"{config_path}: {error}") from None
    tensors, replaced = {}, Replaced(config)
    in_peft, stored = values["peft_type"] == "LORA", read_tensors(tensors_path, ADAPTER_AGAIN)
    if values["peft_type"] in KINDS:
        own = _in_metadata(tensors_path, ADAPTED, list)
        return StoredAdapter(config, values, {"": {**stored}}, replaced, own)
    if values["peft_type"] in ("LORA", OUTSIDE):
        config = _as_trained(config, tensors_path)
    for full_name, tensor in stored.items():
        if in_peft and _sort_replaced(full_name, tensor, values, replaced):
            continue
        parts = (_split_peft_name if in_peft else _split_name)(full_name)
        if parts is None:
            raise UserError(f"{tensors_path}: tensor {full_name} is not one of a {config.kind} adapter")
        name, key = parts
        own = replaced.low_rank if in_peft and name == EMBEDDING_MODULE else tensors.setdefault(name, {})
        if key in own:
            raise UserError(f"{tensors_path}: tensor {full_name} comes twice, with and without .weight")
        own[key] = tensor
    own = _in_metadata(tensors_path, METADATA) if in_peft else None
    return StoredAdapter(config, values, tensors, replaced, own, _in_metadata(tensors_path, residual.METADATA))


def _as_trained(config, path):
    """The config with the kind that the metadata of a file name, if that is one of LoRA's kin and computes the same."""
    kind = read_metadata(path, ADAPTER_AGAIN).get(KIND)
    same = kind in ADAPTERS and issubclass(ADAPTERS[kind], LoRALinear) and config.kind == "lora"
    return dataclasses.replace(config, kind=kind) if same and ADAPTERS[kind].is_standard() else config


def _in_metadata(path, key, kind=dict):
    """What is called `key` in the metadata of a file of tensors, of this type that JSON knows; None if it is not there.

    METADATA: what adapter_config.json would be under our names, of adapters that are stacked.
    """
    text = read_metadata(path, ADAPTER_AGAIN).get(key)
    if text is None:
        return None
    try:
        own = json.loads(text)
    except (ValueError, RecursionError):
        own = None
    if not isinstance(own, kind):
        raise UserError(f"{path} is damaged ({key} in its metadata is no {NAMES_IN_JSON[kind]}): {ADAPTER_AGAIN}")
    return own


def _how_to_have_it(path):
    """What to do where a file of an adapter folder is missing."""
    old = path.with_suffix(".bin")
    if path.suffix != ".safetensors" or not old.is_file():
        return "--adapter_dir must be a folder such as out/RUN/final"
    tensors = f"{{k: v.contiguous() for k, v in torch.load('{old}', 'cpu', weights_only=True).items()}}"
    code = f"import torch; from safetensors.torch import save_file; save_file({tensors}, '{path}')"
    return f'convert {old.name} with: python -c "{code}"'


def _sort_replaced(full_name, tensor, values, replaced):
    """Put a tensor of PEFT's file that is of no adapter over a linear layer where it belongs; False if it is of one."""
    name = full_name.removeprefix(PREFIX)
    if name == full_name or ".lora_" in name:
        return False
    if ".original_module." in name:  # the base's own, beside a module that was saved: nothing uses it
        return True
    if name.endswith(".token_adapter.trainable_tokens_delta"):
        path = name.removesuffix(".token_adapter.trainable_tokens_delta")
        replaced.rows[f"{path}.weight"] = (token_ids(values).get(path, []), tensor)
    elif name in (f"{EMBEDDING_MODULE}.base_layer.weight", f"{HEAD_MODULE}.base_layer.weight"):
        replaced.base[name.replace(".base_layer", "")] = tensor
    elif match := re.fullmatch(r"(.+?)(\.base_layer(?=\.bias)|\.modules_to_save)?\.(weight|bias)", name):
        replaced.whole[f"{match[1]}.{match[3]}"] = tensor
    else:
        return False
    return True


def _check_rows(values, replaced, config_path):
    """Raise UserError unless the rows of tokens that a file holds are those that adapter_config.json names."""
    named = token_ids(values)
    for name, (ids, rows) in replaced.rows.items():
        if len(rows) != len(ids) or name not in (EMBEDDING, HEAD):
            what = f"names {len(ids)} tokens, the file has {len(rows)} rows of {name}"
            raise UserError(f"{config_path}: trainable_token_indices {what}")
    for path, ids in named.items():
        follows = path == HEAD_MODULE and ids == named.get(EMBEDDING_MODULE)  # a tied head: PEFT saves its rows once
        if f"{path}.weight" not in replaced.rows and not follows:
            raise UserError(f"{config_path}: trainable_token_indices names {path}, of which the file has no rows")


def _split_peft_name(full_name):
    """The module and the tensor's name in it, of a tensor in PEFT's file; None if it is not of LoRA or DoRA."""
    keys = "lora_A|lora_B|lora_magnitude_vector|lora_embedding_A|lora_embedding_B"
    match = re.fullmatch(re.escape(PREFIX) + rf"(.+)\.({keys})(\.weight)?", full_name)
    return match and (match[1], match[2])


def _split_name(full_name):
    """As `_split_peft_name`, of a tensor of any other kind of adapter."""
    name, colon, key = full_name.partition(":")
    return (name, key) if colon else None
