"""GGUF, llama.cpp's file format: its tensors, configuration and tokenizer as those of a Hugging Face model folder.

The tables here are those of both directions: gguf_writing.py goes the other way.

The architectures in gguf_architectures.py; every tensor type that the gguf package can dequantise; byte-level BPE and
SentencePiece vocabularies. What the file leaves open is refused by name, but for the sliding window of Mistral v0.1 and
StarCoder2, which no file has, and which only matters beyond 4,096 tokens.
"""

import functools
import itertools
import math
import mmap
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch

from ops.rope import RoPE, inverse_frequencies
from shell.cli import UserError
from shell.files import write_json
from weights.byte_level_bpe import BLOOM, FALCON, GPT2, GPT4O, LLAMA3, QWEN2, SEED, TEKKEN, make_tokenizer
from weights.config_keys import MOST_EXPERTS
from weights.families import COMMON, FAMILIES
from weights.gguf_architectures import (
    CLASSES,
    EMBEDDING,
    HARMLESS,
    LAYER_NAMES,
    LAYOUTS,
    LONG_FACTORS,
    NAMES,
    QKV,
    ROPE_FACTORS,
    SHORT_FACTORS,
    SINKS,
    STACKED,
    TWO_FALCON_NORMS,
    biases,
    longrope,
    yarn,
)
from weights.meta_format import half_split
from weights.stored import Weights

# Those that are written, by family.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES = {**STORED, "MXFP4": torch.bfloat16}  # that hold what is stored, by type; the other types' fp16 is enough
ENDS = ("eos", "eot", "eom")  # the keys of tokens that end a text: tokenizer.ggml.{…}_token_id


def _explained(function):
    """Turn what damaged metadata can raise into a UserError."""

    @functools.wraps(function)
    def wrapped(weights, *args):
        try:
            return function(weights, *args)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"{weights.path}: its metadata is damaged ({error!r}): download it again") from None

    return wrapped


# ------------------------------------------------------------------------------------------------------- tensors


class _Piece(NamedTuple):
    """One of our tensors: rows of a `StoredTensor`, from `first` on, and our shape of them."""

    tensor: "StoredTensor"
    first: int
    shape: tuple


class GGUFWeights(Weights):
    """The tensors of a .gguf file under the decoder's names, dequantised and as Hugging Face has them; its `metadata`.

    What llama.cpp's converter did to them is undone: rows of q and k in another order, 1 added to norms, q, k and v in
    one tensor, the experts of a layer in one. `dtypes` are those to write: as stored, and fp16 for quantised ones,
    which lie on grids whose steps are fp16 numbers (SmolLM2-135M in Q4_1: KL of the logits to those of fp32 weights
    3e-6, with bf16 7e-5), but bf16 for MXFP4. Raises UserError for a file that is damaged or not supported.
    """

    has_our_names = True

    def __init__(self, path: Path):
        self.path = self.where = path
        self._asked = set()  # of the metadata's keys: what nobody asks for is not understood
        try:
            self.metadata, tensors = read_structure(path)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is damaged or no GGUF file ({error}): download it again") from None
        if self.metadata.get("split.count", 0) not in (0, 1):
            raise UserError(f"{path} is one part of several: join them with llama.cpp's gguf-split --merge")
        architecture = self.get("general.architecture")
        if not isinstance(architecture, str) or architecture not in LAYOUTS:
            raise UserError(f"{path}: architecture {architecture!r} is not supported, only {', '.join(LAYOUTS)} are")
        self.layout = LAYOUTS[architecture]
        stored = {tensor.name: tensor for tensor in tensors}
        factors = (ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS) if self.layout.rope else ()
        self._factors = {name: stored.pop(name) for name in factors if name in stored}
        self._names = {**LAYER_NAMES, **self.layout.names}
        if architecture == "falcon" and "blk.0.attn_norm_2.weight" in stored:
            self._names |= TWO_FALCON_NORMS
        pieces = [piece for tensor in stored.values() for piece in self._pieces_of(tensor)]
        self._pieces = dict(pieces)
        if len(self._pieces) < len(pieces):
            raise UserError(f"{path} is damaged (two tensors have one name): download it again")
        self.shapes = {name: piece.shape for name, piece in pieces}
        self.dtypes = {name: DTYPES.get(piece.tensor.type.name, torch.float16) for name, piece in pieces}

    @_explained
    def _pieces_of(self, tensor):
        """The (name, `_Piece`) pairs of a `StoredTensor`; one that is not in the tables keeps its name."""
        base, _, leaf = tensor.name.rpartition(".")
        layer, shape = re.fullmatch(r"blk\.(\d+)\.(\w+)", base), tensor.shape
        if layer is None:
            return [(hugging_face_name(tensor.name), _Piece(tensor, 0, shape))]
        number, kind = layer.groups()
        prefix = f"model.layers.{number}."
        if kind in STACKED and len(shape) > 1 and shape[0] <= MOST_EXPERTS:
            rows, name = math.prod(shape[1:-1]), prefix + STACKED[kind]
            return [(f"{name.format(e)}.{leaf}", _Piece(tensor, e * rows, shape[1:])) for e in range(shape[0])]
        if fused := self._fused(kind, tensor):
            ends = itertools.pairwise(itertools.accumulate(fused.values(), initial=0))
            parts = [_Piece(tensor, start, (end - start, *shape[1:])) for start, end in ends]
            return [(f"{prefix}{name}.{leaf}", part) for name, part in zip(fused, parts, strict=True)]
        if kind == SINKS:
            return [(f"{prefix}self_attn.sinks", _Piece(tensor, 0, shape))]
        if kind == "ffn_gate_inp_shexp" and len(shape) == 1:  # the converter drops dimensions of size 1
            shape = (1, *shape)
        name = f"{prefix}{self._names[kind]}.{leaf}" if kind in self._names else tensor.name
        return [(name, _Piece(tensor, 0, shape))]

    def _fused(self, kind, tensor):
        """How many rows of a tensor each of our modules has that lie in it one after the other; {} if it is one."""
        rows = tensor.shape[0]
        if kind == "ffn_up" and self.layout.fused_mlp:
            return {"mlp.gate_proj": rows // 2, "mlp.up_proj": rows - rows // 2}
        if kind != QKV:
            return {}
        heads = self.number("attention.head_count")
        sizes = [heads * self.head_dim, *[self.number("attention.head_count_kv", self.key_heads) * self.head_dim] * 2]
        if sum(sizes) != rows or min(sizes) < 1:
            raise UserError(f"{self.path}: {tensor.name} has {rows} rows instead of {' + '.join(map(str, sizes))}")
        return {f"self_attn.{letter}_proj": size for letter, size in zip("qkv", sizes, strict=True)}

    @property
    def key_heads(self) -> int:
        """How many key heads there are where the file does not say it: as many as query heads, but one in Falcon 7B."""
        return 1 if self.get("general.architecture") == "falcon" else self.number("attention.head_count")

    @property
    def head_dim(self) -> int:
        """The size of a head."""
        divided = self.number("embedding_length") // self.number("attention.head_count")
        return self.number("attention.key_length", divided)

    def get(self, key: str, *default: Any) -> Any:
        """The metadata of `key`, or of `{architecture}.` + key. Raises UserError without it and without a default."""
        self._asked.add(key)
        own = f"{self.metadata.get('general.architecture')}.{key}"
        value = self.metadata.get(key, self.metadata.get(own, *default))
        if value is None and not default:
            raise UserError(f"{self.path}: its metadata has no {key}")
        return value

    def number(self, key: str, *default: float | None) -> float:
        """A number in the metadata. Floats are as short as fp32 allows (1e-5, not 9.999999747e-06)."""
        value = self.get(key, *default)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise UserError(f"{self.path}: {key} differs from layer to layer, which is not supported")
            value = value[0]
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def not_asked_for(self) -> dict[str, Any]:
        """The metadata of the architecture that nobody asked for, without what changes nothing or is switched off."""
        start = f"{self.get('general.architecture')}."
        own = {key.removeprefix(start): value for key, value in self.metadata.items() if key.startswith(start)}
        return {key: own[key] for key in own if own[key] and key not in (*self._asked, *HARMLESS)}

    def factors(self, name: str) -> torch.Tensor | None:
        """What RoPE's frequencies are divided by, (d/2,) fp32, of the tensor `name`; None if the file has none."""
        tensor = self._factors.get(name)
        return None if tensor is None else torch.from_numpy(self._values(_Piece(tensor, 0, tensor.shape))).view(-1)

    def quantised_alike(self, one: str, other: str) -> bool:
        """Whether two tensors are stored in one type. If not, they differ."""
        return self._pieces[one].tensor.type == self._pieces[other].tensor.type

    def view(self, name: str) -> torch.Tensor:
        """As in `Weights`, but dequantised in memory."""
        return self.read(name)

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name` in fp32. Raises UserError if it is not finite."""
        piece = self._pieces[name]
        values = torch.from_numpy(self._values(piece)).view(piece.shape)
        if not values.isfinite().all():
            raise UserError(f"{self.path}: tensor {piece.tensor.name} holds NaN or infinity")
        if rotated := interleaved_part(self.get("general.architecture"), name):
            heads = self.number("attention.head_count")
            values = half_split(values, heads if rotated == "q" else self.number("attention.head_count_kv", heads))
        if self.layout.norms_plus_one and name.endswith("norm.weight"):
            values -= 1
        return values

    def _values(self, piece):
        """A `_Piece` as a writable fp32 array of its rows. A vector's rows are its numbers, unless it is quantised."""
        tensor = piece.tensor
        block, size = gguf.GGML_QUANT_SIZES[tensor.type]
        columns = 1 if len(tensor.shape) == 1 and block == 1 else tensor.shape[-1]
        rows, width = math.prod(piece.shape) // columns, columns // block * size
        stored = np.fromfile(self.path, np.uint8, rows * width, offset=tensor.place + piece.first * width)
        dtype = {"F32": np.float32, "F16": np.float16}.get(tensor.type.name, np.uint8)
        try:
            # A quantised row is bytes; reinterpreted, they are as many numbers as its shape says.
            values = gguf.quants.dequantize(stored.reshape(rows, width).view(dtype), tensor.type)
        except NotImplementedError:
            raise UserError(f"{self.path}: type {tensor.type.name} of {tensor.name} is not supported") from None
        return np.array(values, np.float32)


def hugging_face_name(name: str) -> str:
    """Hugging Face's name of a tensor of a Llama in a GGUF file; one that is not in the tables keeps its own."""
    base, _, leaf = name.rpartition(".")
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", base)
    if layer and layer[2] in LAYER_NAMES:
        return f"model.layers.{layer[1]}.{LAYER_NAMES[layer[2]]}.{leaf}"
    return f"{NAMES.get(base, base)}.{leaf}"


def gguf_name(name: str) -> str:
    """The name in a GGUF file of a tensor with one of Hugging Face's. Raises KeyError if the tables have none."""
    base, _, leaf = name.rpartition(".")
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", base)
    if layer:
        return f"blk.{layer[1]}.{_inverse(LAYER_NAMES)[layer[2]]}.{leaf}"
    return f"{_inverse(NAMES)[base]}.{leaf}"


def _inverse(table):
    return {value: key for key, value in table.items()}


def interleaved_part(architecture: str, name: str) -> str | None:
    """ "q" or "k" for the tensors, by Hugging Face's name, whose rows a GGUF file has in Meta's RoPE layout."""
    part = re.search(r"\.([qk])_proj\.", name)
    return part[1] if part and LAYOUTS[architecture].interleaved else None


# --------------------------------------------------------------------------------------------- what is in the file
# The gguf package has a reader, but it trusts the file: a length of 2**60 makes it read without end.

NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
VERSIONS = (2, 3)
MOST_DIMENSIONS = 4  # ggml's


class StoredTensor(NamedTuple):
    """A tensor in the file: the name it has there, its shape in row order, its type, and its first byte."""

    name: str
    shape: tuple
    type: gguf.GGMLQuantizationType
    place: int


class _Cursor:
    """Reads one value after the other and never beyond the end: ValueError."""

    def __init__(self, data):
        self.data, self.place = data, 0

    def take(self, count):
        if count > len(self.data) - self.place:
            raise ValueError(f"at byte {self.place} it claims {count:,} more, it has {len(self.data) - self.place:,}")
        self.place += count
        return self.data[self.place - count : self.place]

    def number(self, form):
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self):
        return self.take(self.number("<Q")).decode()

    def value(self, kind):
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            raise ValueError(f"at byte {self.place} stands a value of the unknown type {kind}")
        kind, count = self.number("<I"), self.number("<Q")
        if kind in NUMBERS:  # in one go: a vocabulary has a hundred thousand scores
            form = f"<{count}{NUMBERS[kind][1]}" if count <= len(self.data) else None
            return list(struct.unpack(form, self.take(struct.calcsize(form)))) if form else self.take(count)
        if kind != STRING:
            raise ValueError(f"at byte {self.place} stands an array of the unknown type {kind}")
        if 8 * count > len(self.data) - self.place:
            self.take(8 * count)
        return [self.text() for _ in range(count)]


def read_structure(path: Path) -> tuple[dict[str, Any], list[StoredTensor]]:
    """The metadata of a .gguf file by key, and its tensors, a list of `StoredTensor`. Raises ValueError, OSError.

    Tensors lie end to end in the file's order, each at a multiple of `general.alignment`, as llama.cpp wants them.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(data)
        if cursor.take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = cursor.number("<I")
        if version not in VERSIONS:
            raise ValueError(f"version {version} is not supported, or its byte order is not this machine's")
        tensor_count, count = cursor.number("<Q"), cursor.number("<Q")
        metadata = dict(_unlike((cursor.text(), cursor.value(cursor.number("<I"))) for _ in range(count)))
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 8 or alignment % 8:
            raise ValueError(f"general.alignment is {alignment!r}")
        infos = dict(_unlike((cursor.text(), _tensor_info(cursor)) for _ in range(tensor_count)))
        start = end = cursor.place + -cursor.place % alignment
        tensors = []
        for name, (shape, kind, offset) in infos.items():
            if start + offset != end:
                raise ValueError(f"{name} is at byte {start + offset} instead of {end}")
            block, size = gguf.GGML_QUANT_SIZES[kind]
            tensors.append(StoredTensor(name, shape, kind, end))
            end += math.prod(shape) // block * size
            if end > len(data):
                raise ValueError(f"{name} ends at byte {end}, the file at {len(data)}")
            end += -end % alignment
    return metadata, tensors


def _tensor_info(cursor):
    """(shape in row order, type, offset) of the next tensor."""
    dimensions = cursor.number("<I")
    if not 0 < dimensions <= MOST_DIMENSIONS:
        raise ValueError(f"a tensor has {dimensions} dimensions")
    shape = tuple(reversed([cursor.number("<Q") for _ in range(dimensions)]))
    kind, offset = gguf.GGMLQuantizationType(cursor.number("<I")), cursor.number("<Q")
    if 0 in shape or shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        raise ValueError(f"a tensor of type {kind.name} has the shape {shape}")
    return shape, kind, offset


def _unlike(pairs):
    """Yield (name, value) pairs; ValueError at a name that comes twice."""
    seen = set()
    for name, value in pairs:
        if name in seen:
            raise ValueError(f"{name} comes twice")
        seen.add(name)
        yield name, value


# ------------------------------------------------------------------------------------------------- configuration


@_explained
def config_json(weights: GGUFWeights) -> dict:
    """The config.json, a dict, of the model in a `GGUFWeights`. Raises UserError for what is not supported."""
    layout, get = weights.layout, weights.number
    name = layout.family if isinstance(layout.family, str) else layout.family(weights)
    family = FAMILIES[name]
    keys = {
        "vocab_size": weights.shapes.get(EMBEDDING, (0,))[0],
        "hidden_size": get("embedding_length"),
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        **_heads(weights),
        "hidden_act": family.defaults.get("hidden_act", COMMON["hidden_act"]),
        "max_position_embeddings": get("context_length"),
        "tie_word_embeddings": _ties_head(weights, family),
        "torch_dtype": "float32" if set(weights.dtypes.values()) == {torch.float32} else "bfloat16",
        **(_rope(weights, name) if layout.rope else {}),
        **({"norm_eps": get(layout.epsilon)} if layout.epsilon else {}),
        **biases(weights, name),
        **layout.settings(weights),
    }
    if not get("attention.causal", True):
        raise UserError(f"{weights.path}: attention.causal = false is not supported: each token sees those before it")
    for key, value in weights.not_asked_for().items():
        raise UserError(f"{weights.path}: {key} = {str(value)[:100]} is not supported in a model of this architecture")
    spelled = {family.spelled.get(key, key): value for key, value in keys.items()}
    kind = "LMHeadModel" if name == "gpt2" else "ForCausalLM"
    ids = {**_special_ids(weights), "pad_token_id": weights.get("tokenizer.ggml.padding_token_id", None)}
    return {"architectures": [CLASSES[name] + kind], "model_type": name, **spelled, **ids}


def _heads(weights):
    """The keys of config.json about heads."""
    heads, head_dim = weights.number("attention.head_count"), weights.head_dim
    if weights.number("attention.value_length", head_dim) != head_dim:
        raise UserError(f"{weights.path}: values of another size than keys are not supported")
    if weights.layout.grouped:
        key_heads = weights.number("attention.head_count_kv", heads)
        return {"num_attention_heads": heads, "num_key_value_heads": key_heads, "head_dim": head_dim}
    if head_dim * heads != weights.number("embedding_length"):
        raise UserError(f"{weights.path}: attention.key_length = {head_dim} is not supported in this architecture")
    return {"num_attention_heads": heads}


def _ties_head(weights, family):
    """`tie_word_embeddings`. Some files hold a tied head too; whether it is the embedding, `Weights.ties_head` sees."""
    if "lm_head.weight" not in weights.shapes:
        return True
    tied = family.defaults.get("tie_word_embeddings", False)
    return tied and weights.quantised_alike("lm_head.weight", EMBEDDING)


WITH_ROPE_PARAMETERS = ("gpt_oss", "ministral3", "olmo3")  # which older keys do not say, or not alone


def _rope(weights, family):
    """What config.json says of RoPE: where there is a choice, in keys that transformers before and after 5 read."""
    theta, head_dim = weights.number("rope.freq_base", 10000.0), weights.head_dim
    dims = weights.number("rope.dimension_count", head_dim)
    own, older = FAMILIES[family].defaults, FAMILIES[family].older
    scaling = _scaling(weights, theta, dims)
    keys = {older.get("rope_theta", "rope_theta"): theta, "rope_scaling": scaling}
    if family in WITH_ROPE_PARAMETERS:
        full, local = {"rope_type": "default", **(scaling or {})}, {"rope_type": "default", "rope_theta": theta}
        by_kind = {"full_attention": full | {"rope_theta": theta}, "sliding_attention": local}
        keys = {"rope_parameters": by_kind if family == "olmo3" else by_kind["full_attention"]}
    if "partial_rotary_factor" in own:
        return {**keys, older.get("partial_rotary_factor", "partial_rotary_factor"): _part(dims, head_dim)}
    if dims != head_dim:
        raise UserError(f"{weights.path}: RoPE over a part of the head is not supported in a {family} model")
    return keys


def _part(dims, head_dim):
    """dims / head_dim, such that int(head_dim * it) is dims."""
    part = dims / head_dim
    return part if int(head_dim * part) == dims else math.nextafter(part, math.inf)


def _scaling(weights, theta, dims):
    """`rope_scaling` of config.json for heads of which so many dimensions turn, None without it."""
    kind, llama3 = weights.get("rope.scaling.type", "none"), weights.factors(ROPE_FACTORS)
    long, short = (weights.factors(name) for name in (LONG_FACTORS, SHORT_FACTORS))
    if kind == "yarn" and llama3 is None:
        return yarn(weights)
    if long is not None and short is not None and kind in ("none", "longrope"):
        return longrope(weights, *(_numbers(factors) for factors in (long, short)))
    if kind not in ("none", "linear") or long is not None or short is not None:
        raise UserError(f"{weights.path}: RoPE scaling {kind!r} with these tensors is not supported")
    factor = weights.number("rope.scaling.factor", weights.number("rope.scale_linear", 1.0))
    if llama3 is not None:
        return _llama3_scaling(weights, llama3, theta, dims)
    return {"rope_type": "linear", "factor": factor} if factor not in (0.0, 1.0) else None


def _numbers(values):
    """fp32 values as Python's numbers, as short as fp32 allows."""
    return [float(str(value)) for value in values.numpy()]


def _llama3_scaling(weights, factors, theta, head_dim):
    """The parameters of Llama 3's RoPE scaling, of which the file holds the result: a factor for each frequency.

    Scaled together, the original context and the two frequency factors give the same; the usual 1 and 4 are tried.
    """
    factor = float(f"{factors.max().item():.6g}")  # fp32's noise is not the model's
    plain = inverse_frequencies(RoPE(theta, head_dim), factors.device)
    for context in (2**power for power in range(5, 21)):
        found = inverse_frequencies(RoPE(theta, head_dim, "llama3", factor, context), factors.device)
        if factors.shape == plain.shape and torch.allclose(plain / found, factors, rtol=1e-4):
            names = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": context}
            return {"rope_type": "llama3", "factor": factor, **names}
    raise UserError(f"{weights.path}: the factors in rope_freqs.weight are not those of Llama 3, nothing else is known")


def _special_ids(weights):
    """bos_token_id and so on, for config.json; without them SentencePiece vocabularies have llama.cpp's defaults."""
    defaults = {"bos": 1, "eos": 2} if weights.get("tokenizer.ggml.model") == "llama" else {}
    ids = {name: weights.get(f"tokenizer.ggml.{name}_token_id", defaults.get(name)) for name in ("bos", "eos")}
    return {f"{name}_token_id": id for name, id in ids.items()}


# ----------------------------------------------------------------------------------------------------- tokenizer

# How byte-level BPE cuts a text into words before it merges, by the name that the file gives it. The patterns are those
# of the models' own tokenizer.json, or Falcon's and BLOOM's of llama.cpp (src/llama-vocab.cpp), which cut alike.
PRE_TOKENIZERS = {
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "qwen2": [QWEN2],
    "deepseek-r1-qwen": [QWEN2],
    "llama-bpe": [LLAMA3],
    "tekken": [TEKKEN],
    "bloom": [BLOOM],
    "chatglm-bpe": [LLAMA3],
    "command-r": [r"\p{N}", GPT2],
    "dbrx": [LLAMA3],
    "falcon": FALCON,
    "glm4": [LLAMA3],
    "gpt-4o": [GPT4O],
    "mpt": [GPT2],
    "olmo": [GPT2],
    "phi-2": [GPT2],
    "refact": [r"\p{N}", GPT2],
    "seed-coder": [SEED],
    "stablelm2": [QWEN2],
    "starcoder": [r"\p{N}", GPT2],
}
WHOLE_WORDS_FIRST = ("llama-bpe", "tekken")  # a word in the vocabulary is its token, and the merges are not asked
# Whose models' tokenizers put a text in its composed form first (NFC), which llama.cpp does not and no file says.
COMPOSED = ("command-r", "deepseek-r1-qwen", "mpt", "olmo", "qwen2", "stablelm2")
# The pre-tokeniser of files from before May 2024, which do not say it, by architecture.
UNNAMED = {
    "bloom": "bloom", "command-r": "command-r", "falcon": "falcon", "gpt2": "gpt-2", "gptneox": "mpt", "llama": "gpt-2",
    "mpt": "mpt", "olmo": "olmo", "phi2": "phi-2", "qwen2": "qwen2", "qwen2moe": "qwen2", "qwen3": "qwen2",
    "starcoder": "starcoder", "starcoder2": "starcoder",
}  # fmt: skip
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # token types, SentencePiece's own numbers


@_explained
def write_tokenizer(weights: GGUFWeights, folder: Path) -> None:
    """Write the tokenizer of a `GGUFWeights` as Hugging Face's files to `folder`. Raises UserError as `config_json`."""
    model = weights.get("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise UserError(f"{weights.path}: tokenizer {model!r} is not supported, only gpt2 and llama are")
    tokens = weights.get("tokenizer.ggml.tokens")
    if len(tokens) > weights.shapes["model.embed_tokens.weight"][0]:
        raise UserError(f"{weights.path}: {len(tokens)} tokens are more than the embedding has rows")
    types = weights.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    ids = _special_ids(weights)
    settings = {"clean_up_tokenization_spaces": False, "model_max_length": weights.get("context_length")}
    for name, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        id = weights.get(f"tokenizer.ggml.{key}_token_id", ids.get(f"{name}_token_id"))
        if id is not None:
            settings[f"{name}_token"] = tokens[id]
    if "eos_token" not in settings:
        raise UserError(f"{weights.path}: its metadata has no tokenizer.ggml.eos_token_id")
    write = _write_bpe if model == "gpt2" else _write_sentencepiece
    settings |= write(weights, tokens, types, folder)
    if template := _chat_template(weights):
        settings["chat_template"] = template
    write_json(Path(folder, "tokenizer_config.json"), settings)
    ends = [ids["eos_token_id"], *(weights.get(f"tokenizer.ggml.{end}_token_id", None) for end in ENDS)]
    write_json(
        Path(folder, "generation_config.json"), ids | {"eos_token_id": sorted({end for end in ends if end is not None})}
    )


def _chat_template(weights):
    """`chat_template` of tokenizer_config.json: one template, or a list of them by their names; None without any."""
    template = weights.get("tokenizer.chat_template", None)
    with_tools = weights.get("tokenizer.chat_template.tool_use", None)
    named = {"default": template, "tool_use": with_tools}
    if not with_tools:
        return template
    return [{"name": name, "template": text} for name, text in named.items() if text]


def _write_bpe(weights, tokens, types, folder):
    """tokenizer.json of a byte-level BPE vocabulary; returns its part of tokenizer_config.json."""
    pre = _pre_tokenizer_name(weights)
    merges = [tuple(merge.split(" ", 1)) for merge in weights.get("tokenizer.ggml.merges")]
    vocabulary = {token: id for id, token in enumerate(tokens) if types[id] != UNUSED}  # no fillers such as [PAD151700]
    added = {
        token: type == CONTROL for token, type in zip(tokens, types, strict=True) if type in (CONTROL, USER_DEFINED)
    }
    add_bos = weights.get("tokenizer.ggml.add_bos_token", pre in WHOLE_WORDS_FIRST)
    bos = tokens[weights.get("tokenizer.ggml.bos_token_id")] if add_bos else None
    try:
        how = PRE_TOKENIZERS[pre], added, bos, pre in WHOLE_WORDS_FIRST, pre in COMPOSED
        tokenizer = make_tokenizer(vocabulary, merges, *how)
    except ValueError as error:
        raise UserError(f"{weights.path}: its vocabulary and merges do not fit ({error})") from None
    tokenizer.save(str(folder / "tokenizer.json"))
    return {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": add_bos}


def _pre_tokenizer_name(weights):
    name = weights.get("tokenizer.ggml.pre", "default")
    if name == "default" and weights.get("general.architecture") in UNNAMED:
        name = UNNAMED[weights.get("general.architecture")]
        print(f"note: {weights.path.name} does not name its pre-tokeniser: {name}'s is taken")
    if name not in PRE_TOKENIZERS:
        raise UserError(f"{weights.path}: pre-tokeniser {name!r} is not known, only {', '.join(PRE_TOKENIZERS)} are")
    return name


def _write_sentencepiece(weights, tokens, types, folder):
    """tokenizer.model of a SentencePiece vocabulary; returns its part of tokenizer_config.json."""
    import sentencepiece

    scores = weights.get("tokenizer.ggml.scores")
    pieces = [
        _field(1, _field(1, token.encode()) + _field(2, float(score)) + _field(3, int(type)))
        for token, score, type in zip(tokens, scores, types, strict=True)
    ]
    ids = _special_ids(weights)
    unknown, bos, eos = types.index(UNKNOWN), ids["bos_token_id"], ids["eos_token_id"]
    trainer = _field(3, 2) + _field(4, len(tokens)) + _field(35, BYTE in types)  # BPE, vocab_size, byte_fallback
    trainer += _field(40, unknown) + _field(41, bos) + _field(42, eos) + _field(43, -1)  # 43: pad_id, none
    trainer += (
        _field(45, tokens[unknown].encode()) + _field(46, tokens[bos].encode()) + _field(47, tokens[eos].encode())
    )
    normalizer = _field(1, b"identity") + _field(3, weights.get("tokenizer.ggml.add_space_prefix", True))
    normalizer += _field(4, weights.get("tokenizer.ggml.remove_extra_whitespaces", False))
    model = b"".join(pieces) + _field(2, trainer) + _field(3, normalizer)
    try:
        sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise UserError(f"{weights.path}: its vocabulary is no SentencePiece model ({error})") from None
    (folder / "tokenizer.model").write_bytes(model)
    # As in llama.cpp these cut a text before all else. (The blanks in a piece are ▁, and mean nothing in a text.)
    added = {id: token for id, token in enumerate(tokens) if types[id] == USER_DEFINED and "▁" not in token}
    how = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word", "special"), False)
    gemma = weights.get("general.architecture").startswith("gemma")
    return {
        "tokenizer_class": "GemmaTokenizer" if gemma else "LlamaTokenizer",
        "added_tokens_decoder": {str(id): {"content": token, **how} for id, token in added.items()},
        "add_bos_token": weights.get("tokenizer.ggml.add_bos_token", True),
        "add_eos_token": weights.get("tokenizer.ggml.add_eos_token", False),
        "add_prefix_space": bool(weights.get("tokenizer.ggml.add_space_prefix", True)),
        "legacy": False,
    }


def _field(number, value):
    """One field of a protobuf message (protobuf.dev/programming-guides/encoding); SentencePiece's files are one."""
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    return _varint(number << 3) + _varint(int(value) & 2**64 - 1)


def read_fields(message: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """(number, value) of each field of a protobuf message, as `_field` writes it; a float is one of 32 bits."""
    place = 0

    def varint():
        nonlocal place
        value = shift = 0
        while True:
            value |= (message[place] & 127) << shift
            place, shift = place + 1, shift + 7
            if message[place - 1] < 128:
                return value

    while place < len(message):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
            continue
        size = {1: 8, 2: None, 5: 4}[kind] or varint()
        value = message[place : place + size]
        place += size
        yield number, struct.unpack("<f", value)[0] if kind == 5 else value


def _varint(value):
    """Seven bits a byte, the lowest first; the eighth bit says that more follow."""
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])
