"""Model folders, read and written one tensor at a time; what does not fit is refused, what is written is complete.

A model folder is Hugging Face's own: `config.json`, one or more safetensors files, tokenizer files.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

import lora
from model import Config, Transformer
from quantize import BLOCKS, describe_quantization, quantizer_of, read_quantization
from shell.cli import UserError
from shell.files import check_listed, checked, damage_first, read_json, write_json
from shell.process import is_first
from shell.progress import bar
from store.address import is_url
from store.fetch import local
from weights import peft_format
from weights.families import config_from_json, current_values
from weights.names import Names
from weights.replaced import EMBEDDING, HEAD
from weights.safetensors_format import encode_header, read_tensors
from weights.stored import CHECKPOINT_AGAIN, DTYPES, INDEX, OPTIMIZER, Weights, holds_safetensors, under_our_names

NOTES = "onetune.json"  # in the folder of an adapter or a model: what generating has to know to match the training
SHARD_BYTES = 5 * 10**9
# The types of an optimiser's state, by safetensors' names.
STATES = {**DTYPES, "U8": torch.uint8, "I8": torch.int8, "I32": torch.int32, "I64": torch.int64}

# What a model folder holds besides its weights. Those that are there are copied with the weights.
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
# What says who may use a model and how: downloaded with it, and uploaded with what was made of it.
LEGAL_FILES = ("README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md")


# ------------------------------------------------------------------------------------------------------- reading


def read_config(checkpoint_dir: str | Path) -> Config:
    """The `Config` of a model folder. Raises UserError if there is none or its model is not supported.

    It is that of the model that `load_model` makes: where config.json ties a head that the weights hold for themselves,
    it is not tied (`Weights.ties_head`).
    """
    folder = Path(checkpoint_dir)
    _, config = read_config_json(folder)
    if not config.tie_word_embeddings or not holds_safetensors(folder):
        return config
    with damage_first(folder):
        weights = under_our_names(Weights(folder), config, (EMBEDDING, HEAD))
        return dataclasses.replace(config, tie_word_embeddings=weights.ties_head(True))


def read_config_json(folder: str | Path) -> tuple[dict, Config]:
    """The values of a folder's config.json, and the `Config` that they say alone. Raises UserError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist: --checkpoint_dir must be a model folder (convert_hf_checkpoint.py)")
    check_listed(folder, ["config.json"], CHECKPOINT_AGAIN)
    values = read_json(folder / "config.json")
    try:
        return values, config_from_json(values)
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from None


def model_of(values: dict, weights: Weights) -> tuple[dict, Transformer, Weights]:
    """The model, without memory, that a config.json's values and weights make.

    Returns the values to write for it, with `tie_word_embeddings` as the weights have it (`Weights.ties_head`) and
    nothing of how they were quantised, the model, and its weights under its own names. Raises ValueError for values
    that are not supported, UserError for weights that do not fit.
    """
    values = current_values(values)
    config = config_from_json(values)
    with torch.device("meta"):
        model = Transformer(config)
    weights = under_our_names(weights, config, dict.fromkeys([*dict(model.named_parameters()), HEAD]))
    if not weights.ties_head(config.tie_word_embeddings) and config.tie_word_embeddings:
        values = values | {"tie_word_embeddings": False}
        with torch.device("meta"):
            model = Transformer(dataclasses.replace(config, tie_word_embeddings=False))
    weights.check({name: tuple(parameter.shape) for name, parameter in model.named_parameters()})
    return {key: value for key, value in values.items() if key != "quantization_config"}, model, weights


def load_model(
    checkpoint_dir: str | Path,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    quantize: str | dict | None = None,
    adapter_dir: str | Path | None = None,
    change: Callable[[str, Tensor], Tensor] | None = None,
) -> Transformer:
    """A frozen `Transformer` in evaluation mode with the weights of a model folder.

    dtype: a torch dtype for the weights; quantised ones are multiplied in the dtype of their input.
    quantize: what --quantize says, for the linear layers in the blocks (quantize.py); embedding and head stay as they
        are.
    adapter_dir: an adapter to add, onetune's or PEFT's (its matrices are fp32).
    change: as in `fill_model`.

    The model is built without memory; then each tensor is read, cast, quantised on its device and put in place before
    the next is read, so peak memory is the finished model and one tensor. Raises UserError for tensors that are
    missing, surplus, of another shape or not finite, and for a file that is not as its folder's manifest says.
    """
    values, _ = read_config_json(checkpoint_dir)
    with damage_first(checkpoint_dir):
        try:
            _, model, weights = model_of(values, Weights(checkpoint_dir))
        except UserError as error:
            raise UserError(f"{checkpoint_dir}: {error}") from None
    quantization = read_quantization(quantize, model)
    residual = adapter_dir is not None and peft_format.is_on_residual(adapter_dir)
    if residual:
        change = peft_format.without_start(model, adapter_dir)
    with checked(checkpoint_dir):
        fill_model(model, weights.read, dtype, device, quantization, change)
        if adapter_dir is not None:
            peft_format.load_adapter(model, adapter_dir, residual)
    return model.eval()


def fill_model(
    model: Transformer,
    read: Callable[[str], Tensor],
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    quantization: str | dict | None = None,
    change: Callable[[str, Tensor], Tensor] | None = None,
) -> None:
    """Give a model without memory its frozen weights: `read(name)` is called for each in turn. As in `load_model`.

    quantization: as `quantize.read_quantization` returns it. change: what becomes of each parameter, by its name and as
    it is stored, before it is cast or quantised. Raises UserError for a value too large for `dtype`.
    """
    doing = "loading" if quantization is None else "quantising"
    names = [name for name, _ in model.named_parameters()]
    for name in bar(names, doing, unit=" tensors", shown=is_first(), stays=False):
        tensor = read(name).to(device)
        _put(model, name, tensor if change is None else change(name, tensor), dtype, quantization)
        lora.give_back_memory()
    model.tie_weights()
    model.requires_grad_(False)
    if torch.device(device).type == "cuda":
        for block in model.model.layers:
            if block.sparse:
                block.mlp.lay_together()


def _put(model, name, tensor, dtype, quantization):
    """Put one tensor in its place in the model; a block's linear layer becomes a quantised one on the way."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    linear = leaf == "weight" and isinstance(module, nn.Linear) and path.startswith(BLOCKS)
    if linear and (quantizer := quantizer_of(quantization, path)):
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, quantizer(tensor, module.bias))
    else:
        cast = tensor.to(dtype)
        if dtype == torch.float16 and not cast.isfinite().all():
            raise UserError(f"tensor {name} holds values too large for float16: use --precision bf16-true")
        setattr(module, leaf, nn.Parameter(cast, requires_grad=False))


# ------------------------------------------------------------------------------------------------------- writing


def write_weights(
    folder: str | Path,
    layout: dict[str, tuple[torch.dtype, tuple]],
    read: Callable[[str], Tensor],
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, str]:
    """Write tensors to `folder` as safetensors: one file, or several and an index if larger than `shard_bytes`.

    layout: (dtype, shape) by name. read: a function from a name to its tensor, called once for each, in order; no more
    than one tensor is held at a time. Returns the SHA-256 (hex) of each file with tensors, for `files.new_folder`.
    """
    shards, size = [{}], 0
    for name, (dtype, shape) in layout.items():
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = (dtype, shape)
        size += nbytes
    weight_map, hashes = {}, {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        hashes[file_name] = write_shard(Path(folder, file_name), shard, read)
        weight_map.update(dict.fromkeys(shard, file_name))
    if len(shards) > 1:
        total = sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in layout.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        Path(folder, INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return hashes


def write_model_weights(
    folder: str | Path,
    config: Config,
    layout: dict[str, tuple[torch.dtype, tuple]],
    read: Callable[[str], Tensor],
) -> dict[str, str]:
    """As `write_weights`, for a model's tensors under the decoder's names; in the files they have their family's."""
    names = Names(config)
    held = names.theirs(list(layout))
    theirs = {}
    for name, ours in held.items():
        shape = names.join(name, ours, [torch.empty(layout[own][1], device="meta") for own in ours]).shape
        theirs[name] = layout[ours[0]][0], tuple(shape)
    return write_weights(folder, theirs, lambda name: names.join(name, held[name], [read(own) for own in held[name]]))


def write_shard(
    path: Path,
    layout: dict[str, tuple[torch.dtype, tuple]],
    read: Callable[[str], Tensor],
    metadata: dict[str, str] | None = None,
) -> str:
    """Write one safetensors file, with the arguments of `write_weights`. Returns its hash.

    The library's own writer wants all tensors of a file in memory at once. While this thread writes, one hashes and one
    flushes to the disk what has been written: so a save takes about as long as a plain write.
    """
    names = {dtype: name for name, dtype in STATES.items()}
    places = {
        name: (names[dtype], shape, torch.Size(shape).numel() * dtype.itemsize)
        for name, (dtype, shape) in layout.items()
    }
    encoded = encode_header(places, metadata or {"format": "pt"})
    digest = hashlib.sha256(encoded)
    with open(path, "wb") as file, ThreadPoolExecutor(2) as threads:
        file.write(encoded)
        flushed = threads.submit(os.fsync, file.fileno())
        for name, (dtype, shape) in layout.items():
            tensor = read(name).detach()
            assert (tensor.dtype, tuple(tensor.shape)) == (dtype, tuple(shape)), name
            content = tensor.cpu().contiguous().flatten().view(torch.uint8).numpy()
            hashed = threads.submit(digest.update, content)
            file.write(content)
            if flushed.done():
                flushed.result()  # or its error
                flushed = threads.submit(os.fsync, file.fileno())
            hashed.result()  # before the tensor is gone
        flushed.result()
    return digest.hexdigest()


def save_model(model: Transformer, folder: str | Path, source: str | Path) -> dict[str, str]:
    """Write a dense model's weights, in their dtypes, to `folder`, with the side files of the folder `source`.

    Returns the hashes of `write_weights`.
    """
    parameters = dict(model.named_parameters())
    layout = {name: (parameter.dtype, tuple(parameter.shape)) for name, parameter in parameters.items()}
    hashes = write_model_weights(folder, model.config, layout, parameters.__getitem__)
    write_beside_weights(model, folder, source)
    return hashes


def write_beside_weights(model: Transformer, folder: str | Path, source: str | Path) -> None:
    """Write what belongs to a dense model beside its weights: the folder `source`'s side files, and its config.json."""
    copy_side_files(source, folder)
    config = with_dtype(current_values(read_json(Path(source, "config.json"))), next(model.parameters()).dtype)
    config["tie_word_embeddings"] = model.config.tie_word_embeddings  # which may be otherwise in the source's file
    write_json(Path(folder, "config.json"), config)


def save_optimizer(optimizer: torch.optim.Optimizer, folder: str | Path) -> dict[str, str]:
    """Write the state of any torch optimiser for each parameter, without pickle.

    Tensors go to `optimizer.safetensors`, one at a time, plain numbers to `optimizer.json`; parameters are numbered in
    the optimiser's order. Returns the SHA-256 (hex) of the first by its name, for `files.new_folder`.
    """
    tensors, numbers = {}, {}
    for index, parameter in enumerate(parameters_of(optimizer)):
        for key, value in optimizer.state[parameter].items():
            if torch.is_tensor(value):
                tensors[f"{index}.{key}"] = value
            else:
                numbers[f"{index}.{key}"] = value
    write_state_numbers(folder, numbers)
    layout = state_layout({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()})
    return {OPTIMIZER: write_shard(Path(folder, OPTIMIZER), layout, tensors.__getitem__)}


def write_state_numbers(folder: str | Path, numbers: dict[str, float]) -> None:
    """Write what of an optimiser's state are plain numbers, by name."""
    Path(folder, "optimizer.json").write_text(json.dumps(numbers, sort_keys=True) + "\n")


def state_layout(layout: dict[str, tuple[torch.dtype, tuple]]) -> dict[str, tuple[torch.dtype, tuple]]:
    """The order of an optimiser's tensors in their file: the largest items first, so that each tensor is aligned.

    Else by name, as a resumed run has them in another order.
    """
    return dict(sorted(layout.items(), key=lambda item: (-item[1][0].itemsize, item[0])))


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    folder: str | Path,
    order: list[nn.Parameter | None] | None = None,
    own: Callable[[nn.Parameter, Tensor], Tensor] = lambda parameter, value: value,
) -> None:
    """Put what `save_optimizer` wrote to `folder` into an optimiser over the same parameters.

    order: the parameters by their numbers there, None for one that this process has no part of; by default those of the
    optimiser. own: what becomes of a whole state of a parameter, where the process has a piece of both.
    Raises UserError unless all parameters have a state (or none, as before the first step), and it is finite.
    """
    parameters = order or parameters_of(optimizer)
    state, path = _read_states(folder, len(parameters)), Path(folder, OPTIMIZER)
    for number, (parameter, values) in enumerate(zip(parameters, state, strict=True)):
        if bool(values) != bool(state[0]):
            raise UserError(f"{path}: parameter {number} has no state, or is the only one: it belongs to another run")
        for key, value in values.items() if parameter is not None else ():
            if torch.is_tensor(value):
                value = own(parameter, value)
                _check_state(path, f"{number}.{key}", parameter, value)
            held = optimizer.state[parameter].get(key)
            if torch.is_tensor(held):  # from the start, such as a weight in host memory
                held.copy_(value)
            else:
                optimizer.state[parameter][key] = value.to(parameter.device) if torch.is_tensor(value) else value


def _read_states(folder, count):
    """The state of each of so many parameters, by its keys."""
    state, again = [{} for _ in range(count)], f"delete {folder} to go on from an earlier one"
    entries = read_json(Path(folder, "optimizer.json"))
    paths = sorted(Path(folder).glob("optimizer*.safetensors"))
    for path in paths or [Path(folder, OPTIMIZER)]:  # which is then missed
        entries |= read_tensors(path, again)
    for name, value in entries.items():
        index, _, key = name.partition(".")
        if not index.isdecimal() or int(index) >= len(state) or not key:
            raise UserError(
                f"{Path(folder, OPTIMIZER)}: {name} is of no parameter of this model: it belongs to another run"
            )
        state[int(index)][key] = value
    return state


def _check_state(path, name, parameter, value):
    """Raise UserError unless a tensor can be a state of a parameter."""
    if value.dim() > 1 and not _may_be_of(parameter, value.shape):
        raise UserError(f"{path}: {name} is {tuple(value.shape)}: it belongs to another run")
    if not value.isfinite().all():
        raise UserError(f"{path}: {name} holds NaN or infinity: delete {path.parent} and resume an earlier one")


def _may_be_of(parameter, shape):
    """Whether a state of this shape can be a parameter's: equal, or with one side of a matrix shorter (projected)."""
    equal = [a == b for a, b in zip(shape, parameter.shape, strict=False)]
    smaller = all(a <= b for a, b in zip(shape, parameter.shape, strict=False))
    return len(shape) == parameter.dim() and smaller and any(equal)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters of an optimiser, in its order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def read_notes(folder: str | Path) -> dict:
    """What training or merging wrote to `onetune.json`: prompt style, base model, quantisation. {} without that file.

    Raises UserError if the file has changed or is no JSON object.
    """
    path = Path(folder, NOTES)
    check_listed(folder, [NOTES], CHECKPOINT_AGAIN)
    return read_json(path) if path.exists() else {}


def find_base(adapter_dir: str | Path) -> Path:
    """The base model of an adapter, as its own files name it: a folder, or the id of a model in checkpoints/.

    What they name by an address is fetched. Raises UserError if the adapter or its base is not there.
    """
    if not Path(adapter_dir).is_dir():
        raise UserError(f"--adapter_dir {adapter_dir} does not exist")
    # Ours notes the path as it was given to the run, which still holds after the whole project has moved, and the
    # absolute one, which holds wherever a script is started.
    noted = read_notes(adapter_dir).get("checkpoint_dir")
    names = [noted, read_json(Path(adapter_dir, "adapter_config.json")).get("base_model_name_or_path")]
    for name in filter(None, names):
        if is_url(name):
            return local(name)
        for path in (Path(str(name)), Path("checkpoints", str(name))):
            if path.exists():
                return path
    name = noted or names[1]
    raise UserError(f"{adapter_dir} was trained on {name}, which is not here: say where it is (--help has the flag)")


def trained_quantization(adapter_dir: str | Path | None, quantize: str | None) -> str | dict | None:
    """How to quantise an adapter's base: as the flag --quantize says ("none": not at all), else as in training.

    A plan is kept whole in the adapter's notes, so its file need not be there any more.
    """
    if quantize is None and adapter_dir is not None:
        quantize = read_notes(adapter_dir).get("quantize")
    return None if quantize == "none" else quantize


def shared_base(bases: dict[str, Path], flag: str) -> Path:
    """The one base that several adapters, by name, were trained on. Raises UserError if they are several.

    flag: that says which, if they are the same.
    """
    first, *others = bases
    for name in others:
        if Path(bases[name]).resolve() != Path(bases[first]).resolve():
            raise UserError(
                f"{first} was trained on {bases[first]}, {name} on {bases[name]}: adapters need one base (--{flag} "
                "says which, if these are the same)"
            )
    return bases[first]


def shared_quantization(folders: dict[str, Path], quantize: str | None) -> str | dict | None:
    """As `trained_quantization`, of several adapters by name. Raises UserError if they were trained in several ways."""
    found = {name: trained_quantization(folder, quantize) for name, folder in folders.items()}
    first, *others = found
    for name in others:
        if found[name] != found[first]:
            ways = [describe_quantization(found[one] or "none") for one in (first, name)]
            raise UserError(
                f"{first} was trained with the base in {ways[0]}, {name} in {ways[1]}: adapters need one (--quantize "
                "says which)"
            )
    return found[first]


def with_dtype(config: dict, dtype: torch.dtype) -> dict:
    """config.json's values for plain weights of a torch dtype, in which transformers then loads them."""
    name, old = str(dtype).removeprefix("torch."), ("dtype", "quantization_config")
    return {key: value for key, value in config.items() if key not in old} | {"torch_dtype": name}


def copy_side_files(source: str | Path, folder: str | Path) -> None:
    """Copy the files that belong to a model besides its weights: configuration and tokenizer."""
    _copy(SIDE_FILES, source, folder)


def copy_legal_files(source: str | Path, folder: str | Path) -> None:
    """Copy a model's card and licence, for the same weights in another form: those of a tuned model are others."""
    _copy(LEGAL_FILES, source, folder)


def _copy(names, source, folder):
    for name in names:
        if Path(source, name).is_file():
            shutil.copyfile(Path(source, name), Path(folder, name))
