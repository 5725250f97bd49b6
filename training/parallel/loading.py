"""The model of one device of several that divide it: built without memory, then filled piece by piece from files."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

import lora
from adapters.adapter import adapters, place
from model import Transformer
from objectives import OBJECTIVES
from quantize import BLOCKS, QuantizedLinear, quantizer_of
from shell.cli import UserError
from shell.files import checked
from shell.process import is_first
from shell.progress import bar
from training import initialization
from training.from_settings import DTYPES, adapter_config, base_quantization, train_only
from training.parallel.layout import layout_of
from training.parallel.part import COLUMNS, Part
from training.parallel.pieces import Box, Pieces, box_of, rows_here, take
from training.parallel.ranks import Ranks, local
from training.parallel.saving import Divided, is_of_adapter
from training.parallel.shard import as_parameters, shard
from training.parallel.tensor import connect, connect_adapters, norms_of_whole_rows
from weights import peft_format
from weights.checkpoint import model_of, read_config, read_config_json
from weights.stored import Weights

if TYPE_CHECKING:
    from training.settings import Settings


def check_division(s: Settings, model: Transformer) -> None:
    """Raise UserError if a model cannot be divided as the flags say. model: the whole one on "meta", ready to train."""
    layout = layout_of(s)
    part = Part(model.config, count=layout.tensor, stages=layout.pipeline)
    trained = [place(name) for name, parameter in model.named_parameters() if parameter.requires_grad]
    for stage in range(part.stages):  # through one without anything that trains nothing would come back
        own = dataclasses.replace(part, stage=stage)
        if not any(own.has(name) for name in trained):
            layers = f"layers {own.layers[0]} to {own.layers[-1]}"
            raise UserError(f"--parallel {s.parallel}: nothing trains in stage {stage + 1}, {layers}")
    by_length = any(rope and rope.depends_on_length for rope in model.config.ropes)
    if part.stages > 1 and by_length and OBJECTIVES[s.objective].data == "pairs":
        raise UserError(
            f"--parallel {s.parallel}: the two answers of a pair cannot share a prompt in this model, whose positions "
            "depend on the length, and a pipeline needs that"
        )


@torch.no_grad()
def load_part(
    s: Settings, ranks: Ranks, device: torch.device, newest: Path | None
) -> tuple[Transformer, lora.AdapterConfig | None, Divided]:
    """This device's part of the model to train, from the checkpoint `newest` if there is one, ready to train.

    Returns it, the adapters' config, and what is known of the whole model. Only what this device has is read of the
    files; never more than that and one tensor is in memory. Raises UserError as `checkpoint.load_model`.
    """
    folder = newest if newest and s.method == "full" else s.checkpoint_dir
    config = read_config(s.checkpoint_dir)
    adapter = None if s.method == "full" else adapter_config(s, config)
    with checked(folder if is_first() else None):  # which reads all of it
        try:
            _, whole, weights = model_of(read_config_json(folder)[0], Weights(folder))
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None
        quantization = base_quantization(s, adapter, config)
        _adapt(s, whole, adapter)
        model = _without_memory(s, ranks, adapter, whole, quantization)
        model.to_empty(device=device)
        model.tie_weights()
        norms = _fill(s, ranks, model, weights, device, quantization)
    if adapter:
        _fill_adapters(s, ranks, model, whole, norms, newest, device)
    return model, adapter, Divided(whole, Pieces(model, ranks), ranks)


def _adapt(s, model, adapter):
    if adapter:
        lora.add_lora(model, adapter)
    else:
        train_only(model, s.train)


def _without_memory(s, ranks, adapter, whole, quantization):
    """This device's model on "meta": quantised, with adapters, connected to the others and sharded.

    whole: the whole model, with its adapters.
    """
    part = ranks.part
    with torch.device("meta"):
        model = part.model().requires_grad_(False)
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                module, leaf = _owner(model, name)
                setattr(module, leaf, nn.Parameter(parameter.to(DTYPES[s.precision]), requires_grad=False))
        model.tie_weights()
        for name, layer in _linears(model):
            if quantizer := quantizer_of(quantization, name):
                parent, leaf = _owner(model, name)
                setattr(parent, leaf, quantizer(layer.weight, layer.bias))
        as_parameters(model)
        _adapt_part(model, adapter, whole)
    if ranks.link:
        model.hidden_dtype = DTYPES[s.precision]  # also where no embedding is
        ranks.link.connect(model)
    if ranks.layout.tensor > 1:
        connect(model, part, ranks.group("tensor"))
        connect_adapters(model, ranks.group("tensor"))
    if ranks.layout.shard:
        shard(model, ranks.mesh["data"])
    return model


def _adapt_part(model, adapter, whole):
    """Let those parameters train that do in the whole model, in the same adapters."""
    if adapter:
        here = lora.linear_layers(model)
        lora.wrap(model, adapter, [name for name in adapters(whole) if name in here])
        return
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(whole.get_parameter(name).requires_grad)


def _linears(model):
    """Path and module of each linear layer in the blocks."""
    layers = lora.linear_layers(model)
    return [(name, layer) for name, layer in layers.items() if name.startswith(BLOCKS)]


def _owner(model, name):
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _fill(s, ranks, model, weights, device, quantization):
    """Read what this device has of the base. Returns the row norms of the layers under DoRA, by the layer's name."""
    norms, names = {}, [name for name, _ in model.named_parameters() if not is_of_adapter(name)]
    quantized = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    plain = [name for name in names if name.rpartition(".")[0] not in quantized or name.endswith(".bias")]
    doing = bar([*plain, *quantized], "loading", unit=" tensors", shown=is_first(), stays=False)
    for name in doing:
        if layer := quantized.get(name):
            layer.device = device
            made = _fill_quantized(layer, name, ranks, weights, quantizer_of(quantization, place(name)))
            if s.method == "dora":
                norms[place(name)] = made.dequantize(torch.float32)[: len(local(layer.codes))].norm(dim=1)
        else:
            _fill_plain(model, name, ranks, weights, s, norms)
        lora.give_back_memory()
    return norms


def _fill_plain(model, name, ranks, weights, s, norms):
    module, leaf = _owner(model, name)
    parameter = getattr(module, leaf)
    tensor = read_box(weights, place(name), box_of(parameter, ranks.part.place(name)))
    local(parameter).copy_(tensor)
    if parameter.dtype == torch.float16 and not local(parameter).isfinite().all():
        raise UserError(f"tensor {name} holds values too large for float16: use --precision bf16-true")
    if s.method == "dora" and name.endswith(".base.weight"):
        norms[place(name).rpartition(".")[0]] = local(parameter).float().norm(dim=1)


def _fill_quantized(layer, name, ranks, weights, quantizer):
    """Quantise the rows that this device has of a layer, as rows of the whole layer. Returns a layer of these alone."""
    whole = place(f"{name}.weight")
    cut, where = ranks.part.cut(name, weights.shapes[whole]), ranks.part.place(whole)
    start, stop = rows_here(layer.codes) if ranks.layout.shard else (0, layer.out_features)
    box = (cut.row + start, cut.row + stop), (cut.column, cut.column + layer.in_features)
    rows = read_box(weights, whole, box).to(layer.device).contiguous()
    if not len(rows):  # more devices than rows
        rows, box = rows.new_zeros(1, layer.in_features), ((0, 1), box[1])
    divided = ["tensor"] * (where.dim is not None) + ["data"] * ranks.layout.shard
    own = cut._replace(row=box[0][0], maximum=partial(_maximum, ranks, divided))
    made = quantizer(rows, None, cut=own)
    for stored, tensor in made.by_rows().items():
        local(getattr(layer, stored)).copy_(tensor[: stop - start])
    for attribute in layer.shared:
        setattr(layer, attribute, getattr(made, attribute))
    layer.cut = cut
    return made


def _maximum(ranks, dimensions, numbers):
    """Make numbers those of the devices along these dimensions that are the largest, at each place."""
    for dimension in dimensions:
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=ranks.group(dimension))


def read_box(weights: Weights, name: str, box: Box) -> Tensor:
    """A box of a tensor, as stored: a view of the file, the rest of which is not read. It takes no memory of its own.

    Raises UserError if it holds NaN or infinity.
    """
    tensor = take(weights.view(name), box)
    if tensor.numel() and not all(extreme.isfinite() for extreme in tensor.aminmax()):
        raise UserError(f"{weights.where}: tensor {weights.called(name)} holds NaN or infinity")
    return tensor


# ------------------------------------------------------------------------------------------------------------ adapters


def _fill_adapters(s, ranks, model, whole, norms, newest, device):
    """Give this device's adapters their numbers: those of the checkpoint, or what a run on one device begins with.

    whole: the whole model with its adapters, without memory.
    """
    parameters = dict(model.named_parameters())
    here = {place(name): parameter for name, parameter in parameters.items() if is_of_adapter(name)}
    stored = peft_format.read_for(_bare(whole), newest).tensors if newest else None
    for path, adapter in _started(s, whole, device):
        for leaf, start in adapter.named_parameters(recurse=False):
            name = f"{path}.{leaf}"
            if name not in here:
                continue
            box = box_of(here[name], ranks.part.place(name))
            if stored is None and leaf == "lora_magnitude_vector":
                local(here[name]).copy_(_magnitudes(norms[path], path, ranks))
            else:
                local(here[name]).copy_(take(start if stored is None else stored[path][leaf], box))


def _bare(whole):
    with torch.device("meta"):
        return Transformer(whole.config)


def _magnitudes(norms, path, ranks):
    """DoRA's magnitudes at the start: the norms of whole rows of the base, of those rows that are here."""
    columns = path.rpartition(".")[2] in COLUMNS and ".experts." not in path
    if ranks.layout.tensor > 1 and columns:
        norms = norms_of_whole_rows(norms, ranks.group("tensor"))
    return norms.clamp(min=1e-38)


def _started(s, whole, device):
    """Path and adapter of the whole model, one after the other with its numbers at the start of a run.

    Drawn in the order of a run on one device: so a device's part is a part of the same numbers.
    """
    found = adapters(whole)
    at_random = initialization.INITIALISATIONS[s.lora_init].adapter
    for again in (False, True) if at_random else (False,):
        for path, adapter in found.items():
            A, B = adapter.lora_A, adapter.lora_B
            adapter.lora_A = nn.Parameter(torch.empty(A.shape, device=device), A.requires_grad)
            adapter.lora_B = nn.Parameter(torch.zeros(B.shape, device=device), B.requires_grad)
            adapter.device = device
            at_random(adapter) if again else adapter.reset_parameters()
            if again or not at_random:
                yield path, adapter
            adapter.lora_A, adapter.lora_B = A, B
