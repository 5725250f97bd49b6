"""Model folders, read and written: one tensor at a time, strict, and never half.

A model folder is Hugging Face's own: `config.json`, one or more safetensors files, tokenizer files.
"""

import contextlib
import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

import lora
from cli import UserError
from files import read_json
from model import Config, Transformer
from quantize import QUANTIZERS

INDEX = "model.safetensors.index.json"
NOTES = "onetune.json"  # beside an adapter or a model: what generating must know to match the training
OPTIMIZER = "optimizer.safetensors"  # beside the weights in a checkpoint to resume from
SHARD_BYTES = 5 * 10**9

# What a model folder holds beside its weights; whatever is there travels with them.
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

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # safetensors' names for ours


# ------------------------------------------------------------------------------------------------------- reading


def read_config(checkpoint_dir):
    """The `Config` of a model folder. Raises UserError if there is none or its model is not supported."""
    folder = Path(checkpoint_dir)
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist: --checkpoint_dir must be a model folder (convert_hf_checkpoint.py)")
    try:
        return Config.from_dict(read_json(folder / "config.json"))
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from None


def shard_paths(folder, index, pattern):
    """The weight files of a folder: those that its index names, or without an index those that match `pattern`."""
    if not (folder / index).is_file():
        paths = sorted(path for path in folder.glob(pattern) if path.name != OPTIMIZER)
        if not paths:
            raise UserError(f"{folder} holds no {pattern} file: make it with convert_hf_checkpoint.py")
        return paths
    weight_map = read_json(folder / index).get("weight_map")
    names = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else ["no files"]
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"{folder / index} names {name}, which is not a file in that folder")
    return [folder / name for name in names]


class Weights:
    """The tensors of a model folder: `shapes` and `dtypes` by name (None: not one of ours), and `read(name)`.

    Files are memory-mapped for one read at a time: pages of a map that stays open would count as used memory.
    """

    def __init__(self, folder):
        folder = Path(folder)
        self.shapes, self.dtypes, self._files = {}, {}, {}
        for path in shard_paths(folder, INDEX, "*.safetensors"):
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    if name in self._files:
                        raise UserError(f"{path}: tensor {name} is in {self._files[name].name} too")
                    self._files[name] = path
                    stored = file.get_slice(name)
                    self.shapes[name] = tuple(stored.get_shape())
                    self.dtypes[name] = DTYPES.get(stored.get_dtype())

    def read(self, name):
        """The tensor `name`, as stored, in memory of its own. Raises UserError if it holds NaN or infinity."""
        with _opened(self._files[name]) as file:
            tensor = file.get_tensor(name)
            if not all(extreme.isfinite() for extreme in tensor.aminmax()):
                raise UserError(f"{self._files[name]}: tensor {name} holds NaN or infinity")
            return tensor.clone()

    def check(self, expected):
        """Compare with the shapes that a model needs. Raises UserError that names the first few that differ."""
        ignored = (
            ("rotary_emb.inv_freq",) if "lm_head.weight" in expected else ("rotary_emb.inv_freq", "lm_head.weight")
        )
        surplus = [n for n in self.shapes if n not in expected and not n.endswith(ignored)]
        missing = [n for n in expected if n not in self.shapes]
        misshapen = [
            f"{n} {self.shapes[n]} instead of {tuple(expected[n])}"
            for n in expected
            if n in self.shapes and self.shapes[n] != tuple(expected[n])
        ]
        for what, names in (("missing", missing), ("surplus", surplus), ("misshapen", misshapen)):
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                raise UserError(f"the weights do not fit config.json: {what} {', '.join(names[:3])}{more}")


@contextlib.contextmanager
def _opened(path):
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}): download or convert it again") from None


def load_model(checkpoint_dir, dtype, device="cpu", quantize=None, adapter_dir=None):
    """A frozen `Transformer` in evaluation mode with the weights of a model folder.

    dtype: a torch dtype for the weights; quantised ones are multiplied in the dtype of their input.
    quantize: a key of `quantize.QUANTIZERS` for the linear layers in the blocks; embedding and head stay as they are.
    adapter_dir: an adapter to put over it, ours or PEFT's (its matrices are fp32).

    The model is built without memory; then each tensor is read, cast, quantised on its device and put in place before
    the next is touched, so the peak is the finished model and one tensor. Raises UserError for what does not fit.
    """
    if quantize is not None and quantize not in QUANTIZERS:
        raise UserError(f"--quantize {quantize}: expected one of {', '.join(QUANTIZERS)}")
    config = read_config(checkpoint_dir)
    weights = Weights(checkpoint_dir)
    with torch.device("meta"):
        model = Transformer(config)
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    try:
        weights.check(expected)
    except UserError as error:
        raise UserError(f"{checkpoint_dir}: {error}") from None
    for name in expected:
        tensor = weights.read(name).to(device)
        _put(model, name, tensor, dtype, QUANTIZERS.get(quantize))
        lora.give_back_memory()
    model.tie_weights()
    model.requires_grad_(False)
    if adapter_dir is not None:
        lora.load_adapter(model, adapter_dir)
    return model.eval()


def _put(model, name, tensor, dtype, quantizer):
    """Put one tensor in its place in the model; a block's linear layer becomes a quantised one on the way."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if quantizer and leaf == "weight" and isinstance(module, nn.Linear) and module is not model.lm_head:
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, quantizer(tensor, module.bias))
    else:
        cast = tensor.to(dtype)
        if dtype == torch.float16 and not cast.isfinite().all():
            raise UserError(f"tensor {name} holds values too large for float16: use --precision bf16-true")
        setattr(module, leaf, nn.Parameter(cast, requires_grad=False))


# ------------------------------------------------------------------------------------------------------- writing


def write_weights(folder, layout, read, shard_bytes=SHARD_BYTES):
    """Write tensors to `folder` as safetensors, several files and an index where they are larger than `shard_bytes`.

    layout: (dtype, shape) by name. read: a function from a name to its tensor, called once each, in order; no more
    than one tensor is held at a time.
    """
    shards, size = [{}], 0
    for name, (dtype, shape) in layout.items():
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = (dtype, shape)
        size += nbytes
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        _write_shard(Path(folder, file_name), shard, read)
        weight_map.update(dict.fromkeys(shard, file_name))
    if len(shards) > 1:
        total = sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in layout.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        Path(folder, INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_shard(path, layout, read):
    """One safetensors file: the header's length (8 bytes), the header (JSON), the tensors end to end.

    The library's own writer wants all tensors of a file in memory at once.
    """
    header, offset, names = {"__metadata__": {"format": "pt"}}, 0, {dtype: name for name, dtype in DTYPES.items()}
    for name, (dtype, shape) in layout.items():
        end = offset + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors start at a multiple of 8
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, (dtype, shape) in layout.items():
            tensor = read(name).detach()
            assert (tensor.dtype, tuple(tensor.shape)) == (dtype, tuple(shape)), name
            file.write(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())


def save_model(model, folder, source):
    """Write a dense model's weights, in their dtypes, to `folder`, with the side files of the folder `source`."""
    parameters = dict(model.named_parameters())
    layout = {name: (parameter.dtype, tuple(parameter.shape)) for name, parameter in parameters.items()}
    write_weights(folder, layout, parameters.__getitem__)
    copy_side_files(source, folder)
    config = with_dtype(read_json(Path(source, "config.json")), next(model.parameters()).dtype)
    Path(folder, "config.json").write_text(json.dumps(config, indent=2) + "\n")


def save_optimizer(optimizer, folder):
    """Write what an optimiser has gathered for each parameter, whichever optimiser it is, without pickle.

    Tensors go to `optimizer.safetensors`, plain numbers to `optimizer.json`; parameters are counted in their order.
    """
    tensors, numbers = {}, {}
    for index, parameter in enumerate(_parameters(optimizer)):
        for key, value in optimizer.state[parameter].items():
            if torch.is_tensor(value):
                tensors[f"{index}.{key}"] = value.detach().cpu().clone()  # 8-bit states share their value tables
            else:
                numbers[f"{index}.{key}"] = value
    save_file(tensors, Path(folder, OPTIMIZER))
    Path(folder, "optimizer.json").write_text(json.dumps(numbers) + "\n")


def load_optimizer(optimizer, folder):
    """Put what `save_optimizer` wrote to `folder` into an optimiser over the same parameters."""
    parameters = _parameters(optimizer)
    with _opened(Path(folder, OPTIMIZER)) as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    state.update(read_json(Path(folder, "optimizer.json")))
    for name, value in state.items():
        index, _, key = name.partition(".")
        parameter = parameters[int(index)]
        optimizer.state[parameter][key] = value.to(parameter.device) if torch.is_tensor(value) else value


def _parameters(optimizer):
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def read_notes(folder):
    """What a training or a merge left in `onetune.json`: prompt style, base model, quantisation. {} without it."""
    path = Path(folder, NOTES)
    return read_json(path) if path.is_file() else {}


def find_base(adapter_dir):
    """The base model of an adapter, as its own files name it: a folder, or the id of a model in checkpoints/."""
    if not Path(adapter_dir).is_dir():
        raise UserError(f"--adapter_dir {adapter_dir} does not exist")
    name = read_notes(adapter_dir).get("checkpoint_dir")
    name = name or read_json(Path(adapter_dir, "adapter_config.json")).get("base_model_name_or_path")
    for path in (Path(str(name)), Path("checkpoints", str(name))):
        if name and path.exists():
            return path
    raise UserError(f"{adapter_dir} was trained on {name}, which is not here: say where it is (--help has the flag)")


def trained_quantization(adapter_dir, quantize):
    """How to quantise an adapter's base: as the flag says, "none" for not at all, or without it as in training."""
    if quantize is None and adapter_dir is not None:
        quantize = read_notes(adapter_dir).get("quantize")
    return None if quantize == "none" else quantize


def with_dtype(config, dtype):
    """config.json's values for weights of a torch dtype, the one that transformers then loads them in."""
    name = str(dtype).removeprefix("torch.")
    return {key: value for key, value in config.items() if key != "dtype"} | {"torch_dtype": name}


def copy_side_files(source, folder):
    """Copy what belongs to a model beside its weights: configuration and tokenizer."""
    for name in SIDE_FILES:
        if Path(source, name).is_file():
            shutil.copyfile(Path(source, name), Path(folder, name))
