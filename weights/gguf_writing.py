"""A model as one .gguf file, which llama.cpp loads: the way back of gguf_format.py, with the same tables.

Every family here, in F32, F16, BF16, Q8_0 or Q4_0, with its tokenizer (gguf_vocabulary.py). One tensor at a time is in
memory. What llama.cpp would compute otherwise is refused by name, but for Mistral v0.1's sliding window: it is noted in
the file, llama.cpp attends to all tokens, and a line says so.

To add a family: rows in the tables of gguf_format.py, and in `check_family` what its architecture lacks in llama.cpp.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from model import Config
from ops.rope import RoPE, inverse_frequencies
from shell.cli import UserError
from weights.families import config_from_json
from weights.gguf_format import ARCHITECTURES, ROPE_FACTORS, STORED, gguf_name, interleaved_part
from weights.gguf_vocabulary import add_tokenizer
from weights.meta_format import interleaved
from weights.replaced import EMBEDDING, HEAD

Type = gguf.GGMLQuantizationType
TYPES = {dtype: Type[name] for name, dtype in STORED.items()}
QUANTISED = {"q8_0": Type.Q8_0, "q4_0": Type.Q4_0}
FILE_TYPES = {  # as `general.file_type` says it
    Type.F32: gguf.LlamaFileType.ALL_F32, Type.F16: gguf.LlamaFileType.MOSTLY_F16,
    Type.BF16: gguf.LlamaFileType.MOSTLY_BF16, Type.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
    Type.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
}  # fmt: skip
ROPE_SCALINGS = ("default", "linear", "llama3")
LARGEST_FP16 = 65504.0
LARGEST = {Type.F16: LARGEST_FP16, Type.Q8_0: 127 * LARGEST_FP16, Type.Q4_0: 8 * LARGEST_FP16}  # their scales are fp16


def write_gguf(
    path: Path,
    config: dict,
    layout: dict[str, tuple[Type, tuple]],
    read: Callable[[str], Tensor],
    tokenizer: Any,
) -> None:
    """Write a model as a .gguf file.

    config: a parsed config.json, which `check_family` takes. layout: of `plan`. read: a function from a name to its
    tensor, called once for each, in order. tokenizer: a `text.tokenizer.Tokenizer`. Raises UserError for what the
    format or llama.cpp lacks, and for values too large.
    """
    c, architecture = check_family(config), ARCHITECTURES[config["model_type"]]
    heads = {"q": c.num_attention_heads, "k": c.num_key_value_heads}
    writer = gguf.GGUFWriter(path, architecture)
    _add_model(writer, c, layout)
    add_tokenizer(writer, tokenizer, config)
    if c.ropes[0].scaling == "llama3":
        _add_tensor(writer, ROPE_FACTORS, Type.F32, (c.head_dim // 2,))
    for name, (kind, shape) in layout.items():
        _add_tensor(writer, gguf_name(name), kind, shape)
    with contextlib.closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if c.ropes[0].scaling == "llama3":
            writer.write_tensor_data(rope_factors(c.ropes[0]).numpy())
        for name, (kind, _) in layout.items():
            part = interleaved_part(architecture, name)
            writer.write_tensor_data(encode(name, read(name), kind, heads[part] if part else None))


def check_family(config: dict) -> Config:
    """The `Config` of a config.json. Raises UserError if llama.cpp has no such model; prints what it ignores."""
    family = config.get("model_type")
    if family not in ARCHITECTURES:
        raise UserError(f"no GGUF is written of model_type {family!r}, only of {', '.join(ARCHITECTURES)}")
    c = config_from_json(config)
    windows = {window for window in c.windows if window is None or window < c.max_position_embeddings}
    if family != "mistral" and windows - {None} or len(windows) > 1:
        where = "in some layers only" if family == "mistral" else f"in a {family} model"
        raise UserError(f"no GGUF can be written: llama.cpp has no sliding window {where}")
    if c.ropes[0].scaling == "llama3" and ARCHITECTURES[family] != "llama":
        raise UserError(f"no GGUF can be written: llama.cpp has no RoPE scaling 'llama3' in a {family} model")
    if c.ropes[0].scaling not in ROPE_SCALINGS:
        raise UserError(f"no GGUF is written with RoPE scaling {c.ropes[0].scaling!r}, only {', '.join(ROPE_SCALINGS)}")
    if c.activation != "silu":
        raise UserError(f"no GGUF can be written: llama.cpp has silu in a {family} model, not {c.activation}")
    if family == "qwen3" and (c.qkv_bias or c.o_bias):
        raise UserError("no GGUF can be written: llama.cpp has no attention_bias in a qwen3 model")
    if c.windows[0] in windows and c.windows[0] is not None:
        print(f"note: llama.cpp ignores the sliding window: beyond {c.windows[0]:,} tokens it computes something else")
    return c


def plan(
    shapes: dict[str, tuple], dtypes: dict[str, torch.dtype], wanted: str, tied: bool
) -> dict[str, tuple[Type, tuple]]:
    """The layout of a file: (type, shape) by Hugging Face's name.

    wanted: what --dtype says; "auto" is each tensor's in `dtypes`. tied: whether the embedding is the head too.
    """

    def of(name):
        return QUANTISED.get(wanted) or TYPES[dtypes[name] if wanted == "auto" else getattr(torch, wanted)]

    return {name: (tensor_type(name, shape, of(name), tied), shape) for name, shape in shapes.items()}


def tensor_type(name: str, shape: tuple, wanted: Type, tied: bool) -> Type:
    """The type of a tensor, by Hugging Face's name, in a file of the type `wanted`: llama.cpp's choice.

    F32 for vectors (norms, biases), F16 for rows that do not divide into blocks. In Q4_0 the head, or the embedding
    that is the head too (`tied`), is Q8_0: llama.cpp's Q6_K has no encoder in the gguf package, and Q8_0 is what
    llama.cpp takes where Q6_K does not fit.
    """
    if len(shape) == 1:
        return Type.F32
    if wanted == Type.Q4_0 and name == (EMBEDDING if tied else HEAD):
        wanted = Type.Q8_0
    return Type.F16 if shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] else wanted


def describe(layout: dict[str, tuple[Type, tuple]]) -> str:
    """In words: how many tensors, of which types and size."""
    size = sum(number_of_bytes(kind, shape) for kind, shape in layout.values())
    kinds = sorted({kind.name for kind, _ in layout.values()})
    return f"{len(layout)} tensors, {' and '.join(kinds)}, {size / 1e9:.2f} GB"


def number_of_bytes(kind: Type, shape: tuple) -> int:
    """The bytes of a tensor in a file, without what aligns the next one."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * size


def encode(name: str, tensor: Tensor, kind: Type, heads: int | None = None) -> np.ndarray:
    """A tensor as it is stored in a type: an array of numbers, or of bytes. Raises UserError for values too large.

    heads: of a q or k whose rows go to Meta's RoPE layout, or None.
    """
    values = tensor.detach().cpu().float()
    if values.abs().max() > LARGEST.get(kind, math.inf):
        raise UserError(f"tensor {name} holds values too large for {kind.name}: use --dtype bfloat16")
    if heads is not None:
        values = interleaved(values, heads)
    return gguf.quants.quantize(values.contiguous().numpy(), kind)


def rope_factors(rope: RoPE) -> Tensor:
    """What Llama 3's scaling divides each of RoPE's frequencies by: (d/2,) fp32."""
    cpu = torch.device("cpu")
    return inverse_frequencies(RoPE(rope.theta, rope.dims), cpu) / inverse_frequencies(rope, cpu)


def _add_tensor(writer, name, kind, shape):
    # Told that it is fp32, the writer takes the shape as one of numbers, and the type as it is given.
    writer.add_tensor_info(name, shape, np.dtype(np.float32), number_of_bytes(kind, shape), raw_dtype=kind)


def _add_model(writer, c, layout):
    """The metadata that say what the model is: the inverse of `gguf_format.config_json`."""
    kinds = Counter(kind for kind, shape in layout.values() if len(shape) > 1)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(FILE_TYPES[kinds.most_common(1)[0][0]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.ropes[0].theta)
    if c.ropes[0].scaling == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(c.ropes[0].factor)
    if c.windows[0] is not None:
        writer.add_sliding_window(c.windows[0])
