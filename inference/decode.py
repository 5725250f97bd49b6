"""One token after another, fast: the same model, laid out for reading every weight once in a step.

`fastest_decoder(model)` chooses by what the machine has, and all of them compute the same:

- `CompiledDecoder`: on a CPU. The products read the weights as they are stored, 16, 8 or 4 bits, and compute in fp32;
  they and what lies between them are decode_cpu.cpp.
- `StaticDecoder`: on CUDA, where a step is some hundred launches of small kernels. Its shapes and addresses never
  change, so the step is recorded once as a CUDA graph and replayed.
- `Decoder`: the model's blocks with its `KVCache`. What is left without a compiler.
- `PlainDecoder`: `Transformer.forward` and nothing else. The reference.

The fast ones repeat what model.py says, and model.py is there to be edited. So `fastest_decoder` lets each read a few
tokens first, and takes the fastest that computes what the model's own forward pass does. What an edit changes only
after more than PROBE_LENGTH positions, or by less than PROBE_TOLERANCE (10% in bf16), is not noticed.
"""

import ctypes
import dataclasses
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inference.kv_cache import KVCache
from lora import Adapter, DoRALinear
from model import Config, Linear, Transformer, rope_angles
from ops.attention import Attend, masked_attention
from ops.cpp import compiled_library
from ops.dtypes import compute_dtype
from ops.loss import LOSS_CHUNK
from quantize import BLOCK, Linear4bit, Linear8bit

PROBE_LENGTH = 8  # tokens on which a decoder is compared with the model: 0.2 s for 135M parameters on one core
# How far its logits may then be from the model's, |difference| / |logits|. Rounding in bf16 makes them differ by 1 to
# 2%, in fp32 by 1e-6.
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


def fastest_decoder(model: Transformer) -> "Decoder":
    """The fastest decoder of a model in evaluation mode that computes what the model does.

    The model's weights and code must not change afterwards. A line on standard error names a decoder that was not
    taken because it computes something else.
    """
    weight = model.model.embed_tokens.weight
    kinds = [Decoder]
    if weight.is_cuda and not model.config.experts:  # a graph cannot follow tokens to their experts
        kinds = [StaticDecoder, Decoder]
    elif weight.device.type == "cpu" and weight.dtype in DENSE_FORMATS and in_decode_cpp(model.config):
        kinds = [CompiledDecoder, Decoder]
    length = min(PROBE_LENGTH, model.config.max_position_embeddings)
    tokens = torch.linspace(0, model.config.vocab_size - 1, length, device=weight.device).long()[None]
    with torch.inference_mode():
        expected = model(tokens)[0, -2:].float()
    for kind in kinds:
        difference = probe(kind, model, tokens, expected)
        if isinstance(difference, Decoder):
            return difference
        print(f"note: {kind.__name__} is not taken: {difference}; decoding is slower", file=sys.stderr)
    return PlainDecoder(model)


def probe(kind: type["Decoder"], model: Transformer, tokens: Tensor, expected: Tensor) -> "Decoder | str":
    """A decoder of the class `kind` if it computes what the model does, else why it is not taken.

    tokens: (1, T). expected: the model's own logits after the last two of them, (2, V) fp32.
    """
    try:
        decoder = kind(model)
        start = decoder.start(tokens[:, :-1], torch.zeros(1, dtype=torch.int64, device=tokens.device), tokens.size(1))
        logits = torch.cat([start.float(), decoder.step(tokens[:, -1]).float()])
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever an edit of model.py leads to, such as a layer that is not there any more
        return f"it does not work with this model.py ({type(error).__name__}: {error})"
    difference = ((logits - expected).norm() / expected.norm()).item()
    if expected.isfinite().all() and not difference <= PROBE_TOLERANCE[model.model.embed_tokens.weight.dtype]:
        return f"it computes something else than this model.py (logits differ by {difference:.1%})"
    decoder.cache = None
    return decoder


class Decoder:
    """`start` reads B prompts, `step` takes one token for each: both give the logits of the next, (B, V)."""

    def __init__(self, model: Transformer):
        self.model, self.cache = model, None

    @torch.inference_mode()
    def start(
        self, tokens: Tensor, padding: Tensor, room: int, score: Callable | None = None, scored: Sequence[int] = ()
    ) -> Tensor:
        """Read prompts. tokens (B, T) int64, of which the first `padding` (B,) are none; room: positions, T included.

        score: called with (row, position, logits (n, V)) for stretches of each of the rows `scored`: what the model
        predicts after the tokens from that position of the prompt on, the last one included.
        """
        self.cache = self._new_cache(tokens, padding, room)
        logits = self._read(tokens, self.cache, score, scored)
        self.prepare()
        return logits

    @torch.inference_mode()
    def join(
        self, tokens: Tensor, padding: Tensor, more: int, score: Callable | None = None, scored: Sequence[int] = ()
    ) -> Tensor:
        """Read more prompts, which become the last rows of the batch; its logits (B, V) are those rows' alone.

        more: positions that any row may still need after its tokens so far. The rest as in `start`.
        """
        cache = self._new_cache(tokens, padding, tokens.size(1))
        logits = self._read(tokens, cache, score, scored)
        self.cache = self.cache.joined(cache, more)
        self.prepare()
        return logits

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        """Read the next token of each row: ids (B,) int64. The logits (B, V) are good until the next step."""
        return self._read(ids[:, None], self.cache)

    @torch.inference_mode()
    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone: indices (B',) int64."""
        self.cache.keep(rows)
        self.prepare()

    def prepare(self) -> None:
        """Make what a step needs, for the cache as it now is."""

    def _new_cache(self, tokens, padding, room):
        weight = self.model.model.embed_tokens.weight
        dtype = compute_dtype(weight.dtype, weight.device.type)
        padding = padding if padding.any() else None
        return KVCache(self.model.config, len(tokens), room, dtype, weight.device, padding)

    def _read(self, tokens, cache, score=None, scored=()):
        """The logits after the last of `tokens` (B, T), which extend the cache; `score` gets those before, too."""
        hidden = self.model.hidden_states(tokens, cache)
        for row in scored:
            first = 0 if cache.padding is None else int(cache.padding[row])
            for position in range(first, tokens.size(1), LOSS_CHUNK):
                chunk = hidden[row, position : position + LOSS_CHUNK]
                score(row, position - first, self.model.logits(chunk))
        return self.model.logits(hidden[:, -1])


class PlainDecoder(Decoder):
    """`Transformer.forward` alone, which makes logits for every position of a prompt, needed or not."""

    def _read(self, tokens, cache, score=None, scored=()):
        logits = self.model(tokens, cache=cache)
        for row in scored:
            first = 0 if cache.padding is None else int(cache.padding[row])
            for position in range(first, tokens.size(1), LOSS_CHUNK):
                score(row, position - first, logits[row, position : position + LOSS_CHUNK])
        return logits[:, -1]


# ------------------------------------------------------------------------------------------------------------- CUDA


class StaticCache(KVCache):
    """A cache whose position is a tensor, and which always returns all of its room: what a CUDA graph can record."""

    def __init__(self, cache: KVCache):
        self.k, self.v = cache.k, cache.v
        self.padding = (
            torch.zeros_like(self.k[0, :, 0, 0, 0], dtype=torch.int64) if cache.padding is None else cache.padding
        )
        self.position = torch.tensor([cache.length], device=self.k.device)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put k, v (B, K, 1, d) of one layer in their place; returns all its room, (B, K, room, d)."""
        self.k[layer].index_copy_(2, self.position, k)
        self.v[layer].index_copy_(2, self.position, v)
        return self.k[layer], self.v[layer]

    def back(self) -> Tensor:
        """How many positions each key lies back: (1, 1, 1, room)."""
        return (self.position - torch.arange(self.k.size(3), device=self.k.device))[None, None, None]

    def mask(self, window: int | None) -> Tensor:
        """The keys that the new position may see: bool (B, 1, 1, room)."""
        key = torch.arange(self.k.size(3), device=self.k.device)
        mask = (key <= self.position) & (key >= self.padding[:, None])
        if window is not None:
            mask &= key > self.position - window
        return mask[:, None, None]


class StaticDecoder(Decoder):
    """A step of fixed shapes, on CUDA recorded as a graph. On a CPU it runs as it is, so that it can be tested."""

    def prepare(self) -> None:
        """As in `Decoder`: the buffers whose addresses the graph will have."""
        self.static = StaticCache(self.cache)
        self.ids = torch.zeros(self.cache.k.size(1), dtype=torch.int64, device=self.cache.k.device)
        self.graph = None  # recorded in the first step: an answer of one token needs none

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        """As in `Decoder`."""
        if self.cache.length == self.cache.k.size(3):
            raise ValueError(f"the cache has room for {self.cache.length} positions, one more is needed")
        self.ids.copy_(ids)
        if self.ids.is_cuda:
            if self.graph is None:
                self._record()
            self.graph.replay()
        else:
            self.logits = self._static_step()
        self.static.position += 1
        self.cache.length += 1
        return self.logits

    def _static_step(self):
        model, c, cache = self.model, self.model.config, self.static
        positions = (cache.position - cache.padding)[:, None]  # (B, 1)
        x = model.embed(self.ids[:, None], positions)
        angles = {rope: rope_angles(rope, positions, lambda: positions + 1, x.dtype) for rope in set(c.ropes)}
        masks = {window: cache.mask(window) for window in set(c.windows)}
        for number, block in enumerate(model.model.layers):
            how = {"scores": c.scores(number), "mask": masks[c.windows[number]], "back": cache.back()}
            x = block(x, angles[c.ropes[number]], Attend(masked_attention, **how), cache)
        return model.logits(model.finish(x)[:, -1])

    def _record(self):
        side = torch.cuda.Stream()  # libraries allocate on their first calls, which must not be recorded
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._static_step()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self._static_step()


# -------------------------------------------------------------------------------------------------------------- CPU


class Matrix(ctypes.Structure):
    """decode_cpu.cpp's description of a weight."""

    _fields_ = [(name, ctypes.c_int64) for name in ("format", "rows", "columns")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("data", "block_scales", "values", "row_scales", "bias")]


class Attention(ctypes.Structure):
    """decode_cpu.cpp's description of the attention of a step."""

    _fields_ = [(name, ctypes.c_int64) for name in ("in_bf16", "batch", "heads", "key_heads", "d", "room", "position")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("qkv", "cos", "sin", "padding", "y")]
    _fields_ += [("eps", ctypes.c_double), ("threads", ctypes.c_int64)]


# The fields of `Config` that may have any value in decode_cpu.cpp, the others have their default.
LLAMA_FIELDS = (
    *(field.name for field in dataclasses.fields(Config) if field.default is dataclasses.MISSING),
    "family", "tie_word_embeddings", "qkv_bias", "o_bias", "mlp_bias", "qk_norm",
)  # fmt: skip
DENSE_FORMATS = {torch.float32: 0, torch.bfloat16: 1}
INT8, FOURBIT = 2, 3


def cpp() -> ctypes.CDLL | None:
    """decode_cpu.cpp as a ctypes library, None where it cannot be compiled."""
    library = compiled_library("decode_cpu")
    if library is not None:
        number, address = ctypes.c_int64, ctypes.c_void_p
        library.linear.argtypes = [*(address, number) * 3, number, number, number, number]
        library.rms_norm.argtypes = [address, number, address, ctypes.c_double, address, number, number, number]
        library.swiglu.argtypes = [address, address, number, number, number]
        library.attend.argtypes = [address, address, address, address, address, number]
    return library


class Weights:
    """Weights that share an input, for decode_cpu.cpp: `call(x, y)` gives a function that computes y from x.

    layers: linear layers, dense or quantised, without adapters. gains: for each None or a factor (out,) of its rows.
    """

    def __init__(self, layers: Sequence[nn.Module], gains: Sequence[Tensor | None] | None = None):
        self.tensors = []  # what the matrices point to
        pairs = zip(layers, gains or [None] * len(layers), strict=True)
        self.matrices = (Matrix * len(layers))(*(self._matrix(layer, gain) for layer, gain in pairs))

    def _matrix(self, layer, gain):
        scales = values = None
        if isinstance(layer, Linear):
            code, data = DENSE_FORMATS[layer.weight.dtype], layer.weight.detach()
        elif isinstance(layer, Linear8bit):
            code, data, row_scales = INT8, layer.codes, layer.scales.float() / 127
            gain = row_scales if gain is None else row_scales * gain
        else:
            code, data, scales, values = FOURBIT, layer.codes, layer.block_scales(), layer.state.code.float()
        bias = None if layer.bias is None else layer.bias.float()
        tensors = [None if t is None else t.contiguous() for t in (data, scales, values, gain, bias)]
        self.tensors += tensors
        return Matrix(code, layer.out_features, layer.in_features, *(t if t is None else t.data_ptr() for t in tensors))

    def call(self, x: Tensor, y: Tensor, add: bool = False, in_bf16: bool = False) -> Callable:
        """A function that computes y (B, sum of out) from x (B, in), both fp32 with rows that may be apart.

        add: add the result to what is in y.
        in_bf16: multiply in bf16, unless the weights are in fp32.
        """
        place = (x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0), len(x), add, in_bf16, torch.get_num_threads())
        return partial(cpp().linear, self.matrices, len(self.matrices), *place)


class Product:
    """Linear layers that share an input, with their adapters; their outputs side by side."""

    @torch.no_grad()
    def __init__(self, *layers: nn.Module):
        self.layers = layers
        self.widths = [layer.out_features for layer in layers]
        bases = [base_of(layer) for layer in layers]
        self.weights = None  # or one `Weights` for neighbours of one format, and how wide their outputs are
        if all(map(readable, layers, bases)):
            ratios = [layer.ratio() if isinstance(layer, DoRALinear) else None for layer in layers]
            runs = groupby(zip(bases, ratios, strict=True), key=lambda pair: format_of(pair[0]))
            runs = [list(zip(*run, strict=True)) for _, run in runs]
            self.weights = [(Weights(*run), sum(base.out_features for base in run[0])) for run in runs]
            self._lay_out_adapters(ratios)

    def _lay_out_adapters(self, ratios):
        self.adapted = [i for i, layer in enumerate(self.layers) if isinstance(layer, Adapter)]
        if not self.adapted:
            return
        adapters = [self.layers[i] for i in self.adapted]
        self.down = Weights([dense(adapter.lora_A) for adapter in adapters])
        self.up = []
        for i, adapter in zip(self.adapted, adapters, strict=True):
            gain = torch.full((adapter.out_features,), float(adapter.scale))
            self.up.append(Weights([dense(adapter.lora_B)], [gain if ratios[i] is None else gain * ratios[i]]))

    def calls(self, x: Tensor, y: Tensor, in_bf16: bool, add: bool = False) -> list[Callable]:
        """The functions that, called in turn, compute y (B, sum of out) from x (B, in), as `Weights.call`."""
        if self.weights is None:
            return [partial(self._by_layers, x, y, add)]
        parts = y.split([width for _, width in self.weights], dim=1)
        calls = [weights.call(x, part, add, in_bf16) for (weights, _), part in zip(self.weights, parts, strict=True)]
        if self.adapted:
            ranks = [self.layers[i].lora_A.size(0) for i in self.adapted]
            self.low = low = torch.empty(len(x), sum(ranks))  # kept here: the calls hold nothing but its address
            calls.append(self.down.call(x, low))
            parts = [y.split(self.widths, dim=1)[i] for i in self.adapted]
            for up, inner, part in zip(self.up, low.split(ranks, dim=1), parts, strict=True):
                calls.append(up.call(inner, part, add=True))
        return calls

    def _by_layers(self, x, y, add):
        """What the compiled products cannot read, each layer computes itself."""
        for layer, part in zip(self.layers, y.split(self.widths, dim=1), strict=True):
            base = base_of(layer)
            dtype = compute_dtype(base.weight.dtype, "cpu") if isinstance(base, nn.Linear) else torch.float32
            result = layer(x.to(dtype))
            part.add_(result) if add else part.copy_(result)


def dense(weight: nn.Parameter) -> Linear:
    """A linear layer over a parameter (out, in), without bias."""
    out_features, in_features = weight.shape
    layer = Linear(in_features, out_features, bias=False, device="meta")
    layer.weight = weight
    return layer


def in_decode_cpp(config: Config) -> bool:
    """Whether decode_cpu.cpp has what a model is made of: Llama's parts, and it is compiled."""
    rope = config.ropes[0]
    llama = Config(**{name: getattr(config, name) for name in LLAMA_FIELDS})
    if config.qk_norm not in (None, "head"):
        return False
    plain = rope is not None and rope.dims == config.head_dim and not (rope.interleaved or rope.query_growth)
    usual = set(config.ropes) == {rope} and set(config.scales) == {config.head_dim**-0.5}
    return llama == config and plain and usual and not rope.depends_on_length and cpp() is not None


def base_of(layer: nn.Module) -> nn.Module:
    """The linear layer under an adapter, or the layer itself where there is none."""
    return layer.base if isinstance(layer, Adapter) else layer


def format_of(base: nn.Module) -> Any:
    """What is equal for layers that decode_cpu.cpp can multiply in one call."""
    return base.weight.dtype if isinstance(base, Linear) else type(base)


def readable(layer: nn.Module, base: nn.Module) -> bool:
    """Whether decode_cpu.cpp can do the work of a layer over this base. Exact types: a new kind may do otherwise."""
    if isinstance(layer, Adapter) and not layer.standard:
        return False
    if type(base) is Linear:
        return base.weight.dtype in DENSE_FORMATS
    return type(base) is Linear8bit or (type(base) is Linear4bit and base.in_features % BLOCK == 0)


class CompiledDecoder(Decoder):
    """A step is a list of calls of decode_cpu.cpp, made once for a batch: their buffers and addresses stay.

    Activations are fp32, keys and values what the model's own pass keeps.
    """

    def __init__(self, model: Transformer):
        super().__init__(model)
        self.layers = []
        for block in model.model.layers:
            attention, mlp = block.self_attn, block.mlp
            self.layers.append(
                {
                    "qkv": Product(attention.q_proj, attention.k_proj, attention.v_proj),
                    "o": Product(attention.o_proj),
                    "gate_up": Product(mlp.gate_proj, mlp.up_proj),
                    "down": Product(mlp.down_proj),
                    "input_norm": block.input_layernorm.weight.detach().float(),
                    "post_norm": block.post_attention_layernorm.weight.detach().float(),
                    "q_norm": attention.q_norm.weight.detach().float() if model.config.qk_norm else None,
                    "k_norm": attention.k_norm.weight.detach().float() if model.config.qk_norm else None,
                }
            )
        self.norm = model.model.norm.weight.detach().float()
        self.head = Product(model.lm_head)

    def prepare(self) -> None:
        """As in `Decoder`: the buffers of a step, and the list of its calls."""
        c, cache = self.model.config, self.cache
        B, heads = cache.k.size(1), c.num_attention_heads * c.head_dim
        # As in the model's own pass; one row is read from memory faster than anything is multiplied, so it is exact.
        self.in_bf16 = B > 1 and cache.k.dtype == torch.bfloat16
        self.x, self.normed = torch.empty(B, c.hidden_size), torch.empty(B, c.hidden_size)
        self.qkv = torch.empty(B, heads + 2 * c.num_key_value_heads * c.head_dim)
        self.attended, self.gate_up = torch.empty(B, heads), torch.empty(B, 2 * c.intermediate_size)
        self.inner, self.logits = torch.empty(B, c.intermediate_size), torch.empty(B, c.vocab_size)
        self.cos, self.sin = rope_angles(c.ropes[0], torch.arange(cache.k.size(3)), None, torch.float32)[:2]
        self.padding = torch.zeros(B, dtype=torch.int64) if cache.padding is None else cache.padding
        pointers = (t.data_ptr() for t in (self.qkv, self.cos, self.sin, self.padding, self.attended))
        self.attention = Attention(
            cache.k.dtype == torch.bfloat16, B, c.num_attention_heads, c.num_key_value_heads, c.head_dim,
            cache.k.size(3), cache.length, *pointers, c.norm_eps, torch.get_num_threads(),
        )  # fmt: skip
        self.calls = [call for i, layer in enumerate(self.layers) for call in self._block(i, layer)]
        self.calls += [self._rms_norm(self.norm), *self.head.calls(self.normed, self.logits, self.in_bf16)]

    def _block(self, i, layer):
        """The calls that do what `Block` does to x (B, D), in place."""
        library, threads = cpp(), torch.get_num_threads()
        pointers = (
            None if t is None else t.data_ptr()
            for t in (self.cache.k[i], self.cache.v[i], layer["q_norm"], layer["k_norm"])
        )
        window = self.model.config.windows[i] or 0
        return [
            self._rms_norm(layer["input_norm"]),
            *layer["qkv"].calls(self.normed, self.qkv, self.in_bf16),
            partial(library.attend, ctypes.byref(self.attention), *pointers, window),
            *layer["o"].calls(self.attended, self.x, self.in_bf16, add=True),
            self._rms_norm(layer["post_norm"]),
            *layer["gate_up"].calls(self.normed, self.gate_up, self.in_bf16),
            partial(library.swiglu, self.gate_up.data_ptr(), self.inner.data_ptr(), *self.inner.shape, threads),
            *layer["down"].calls(self.inner, self.x, self.in_bf16, add=True),
        ]

    def _rms_norm(self, weight):
        x, y, eps = self.x, self.normed, self.model.config.norm_eps
        place = (x.data_ptr(), x.stride(0), weight.data_ptr(), eps, y.data_ptr(), y.stride(0), *x.shape)
        return partial(cpp().rms_norm, *place)

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        """As in `Decoder`."""
        if self.cache.length == self.cache.k.size(3):
            raise ValueError(f"the cache has room for {self.cache.length} positions, one more is needed")
        self.x.copy_(F.embedding(ids, self.model.model.embed_tokens.weight))
        self.attention.position = self.cache.length
        for call in self.calls:
            call()
        self.cache.length += 1
        return self.logits
