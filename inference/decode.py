"""One token after another, fast: the same model, laid out for reading every weight once in a step.

`fastest_decoder(model)` chooses by what the machine has, and all of them compute the same:

- `CompiledDecoder`: on a CPU. The products read the weights as they are stored, 16, 8 or 4 bits, and compute in fp32;
  they and what lies between them are decode_cpu.cpp.
- `StaticDecoder`: on CUDA, where a step is some hundred launches of small kernels. Rows have slots (slots.py) whose
  shapes and addresses stay when rows join and leave, so a step is recorded once as a CUDA graph and replayed.
- `Decoder`: the model's blocks with its `KVCache`. What is left without a compiler, and for what `in_decode_cpp` says.
- `PlainDecoder`: `Transformer.forward` and nothing else. The reference.

The fast ones repeat what model.py says, and model.py is there to be edited. So `fastest_decoder` lets each read a few
tokens first, and takes the fastest that computes what the model's own forward pass does. What an edit changes only
after more than PROBE_LENGTH positions, or by less than PROBE_TOLERANCE (10% in bf16), is not noticed.
"""

import ctypes
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.adapter import Adapter, adapters
from adapters.virtual_tokens import virtual_ids
from experts import Experts, choose
from inference.kv_cache import KVCache, joined
from inference.prefix_cache import PrefixCache, Text, fill, length_of
from inference.several import SeveralLinear, choice_of, recordable, use
from inference.slots import Slots, StepCache
from lora import DoRALinear
from model import (
    MLP,
    Angles,
    Block,
    Config,
    EachHeadNorm,
    JointNorm,
    LayerNorm,
    Linear,
    RMSNorm,
    Transformer,
    rope_angles,
)
from ops.activation import IN_KERNELS, plain_gated, plain_softcap
from ops.cpp import compiled_library
from ops.dtypes import compute_dtype
from ops.loss import LOSS_CHUNK
from quantize import BLOCK, Linear4bit, Linear8bit

# Positions of prompts that are read in one pass, those of all rows together. They bound its memory: masks and, with
# soft caps or sinks, scores have so many rows, each of all keys. Many fewer, and a GPU would read the weights, or
# unpack them from 4 bits, for longer than it multiplies by them.
CHUNK = 2048
NO_ROOM = "the cache has room for {} positions, one more is needed"
Scorers = Mapping[int, Callable[[int, Tensor], None]]  # by the number of a row: see `Decoder.read`

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
    if weight.is_cuda and not model.config.experts and recordable(model):  # a graph cannot follow tokens to experts
        kinds = [StaticDecoder, Decoder]
    elif weight.device.type == "cpu" and weight.dtype in DENSE_FORMATS and in_decode_cpp(model):
        kinds = [CompiledDecoder, Decoder]
    length = min(PROBE_LENGTH, model.config.max_position_embeddings)
    tokens = torch.linspace(0, model.config.vocab_size - 1, length, device=weight.device).long()[None]
    tokens, adapters = for_each_adapter(model, tokens)
    with torch.inference_mode():
        use(model, adapters)
        read = put_before(virtual_ids(model), tokens, torch.zeros_like(tokens[:, 0]))
        expected = model(read)[:, -2:].float()
    for kind in kinds:
        difference = probe(kind, model, tokens, expected)
        if isinstance(difference, Decoder):
            return difference
        print(f"note: {kind.__name__} is not taken: {difference}; decoding is slower", file=sys.stderr)
    return PlainDecoder(model)


def for_each_adapter(model: Transformer, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
    """Tokens (1, T) as a row for each adapter of a model with several, and for the base; and which each row has."""
    if (choice := choice_of(model)) is None:
        return tokens, None
    return tokens.expand(len(choice.every), -1), choice.every


def probe(kind: type["Decoder"], model: Transformer, tokens: Tensor, expected: Tensor) -> "Decoder | str":
    """A decoder of the class `kind` if it computes what the model does, else why it is not taken.

    tokens: (B, T), as `for_each_adapter` has them. expected: the model's own logits after the last two of them,
    (B, 2, V) fp32.
    """
    B, T = tokens.shape
    try:
        decoder = kind(model)
        nothing = torch.zeros(B, dtype=torch.int64, device=tokens.device)
        start = decoder.start(tokens[:, :-1], nothing, T, adapters=for_each_adapter(model, tokens[:1])[1])
        logits = torch.stack([start.float(), decoder.step(tokens[:, -1]).float()], dim=1)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever an edit of model.py leads to, such as a layer that is not there any more
        return f"it does not work with this model.py ({type(error).__name__}: {error})"
    difference = ((logits - expected).norm() / expected.norm()).item()
    if expected.isfinite().all() and not difference <= PROBE_TOLERANCE[model.model.embed_tokens.weight.dtype]:
        return f"it computes something else than this model.py (logits differ by {difference:.1%})"
    decoder.forget()
    return decoder


class Decoder:
    """`start` reads B prompts, `step` takes one token for each: both give the logits of the next, (B, V).

    Rows join in two steps: `read` begins to read their prompts, which `Reading.advance` does a chunk at a time, between
    steps of the rows that are there; `take` adds them to the batch.
    """

    keeps_cheaply = False  # whether `keep` copies no cache, so that rows had best leave as soon as they end

    def __init__(self, model: Transformer):
        self.model, self.cache, self.virtual = model, None, virtual_ids(model)

    @torch.inference_mode()
    def start(
        self,
        tokens: Tensor,
        padding: Tensor,
        room: int,
        scores: Scorers | None = None,
        adapters: Tensor | None = None,
    ) -> Tensor:
        """Forget all rows, and read prompts at once: `read` and `take`. room: positions of a row, T included."""
        self.forget()
        return self.take(self.read(tokens, padding, room, scores, adapters).finish(), room - tokens.size(1))

    @torch.inference_mode()
    def read(
        self,
        tokens: Tensor,
        padding: Tensor,
        room: int,
        scores: Scorers | None = None,
        adapters: Tensor | None = None,
    ) -> "Reading":
        """Begin to read prompts. tokens (B, T) int64, of which the first `padding` (B,) of each row are none.

        If the model's adapter has virtual tokens, they are put before each prompt: `room` and `scores` do not count
        them.
        room: positions to make room for now, T at least. scores: for rows whose prompts are to be scored, a function
        that is called with (position, logits (n, V)) for each stretch of the prompt in turn: what the model predicts
        after the tokens from that position of the prompt on, the last one included.
        adapters: which one each row has, (B,) int64, where there are several; None: the first.
        """
        tokens = put_before(self.virtual, tokens, padding)
        room += len(self.virtual)
        return Reading(self, tokens, self._new_cache(tokens, padding, room, adapters), scores or {})

    @torch.inference_mode()
    def take(self, reading: "Reading", more: int) -> Tensor:
        """Make the rows of a reading that is done the last ones of the batch; returns its logits (B, V).

        more: positions that any row of the batch may still need after its tokens so far.
        """
        if self.cache is None and reading.cache.length + more <= reading.cache.k.size(3):
            self.cache = reading.cache
        else:
            self.cache = joined([cache for cache in (self.cache, reading.cache) if cache is not None], more)
        self._rows_changed()
        return reading.logits

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        """Read the next token of each row: ids (B,) int64. The logits (B, V) are good until the next step."""
        cache = self.cache
        if cache.length == cache.k.size(3):
            raise ValueError(NO_ROOM.format(cache.length))
        cache.tokens[:, cache.length] = ids
        use(self.model, cache.adapters)
        if cache.length not in self.outgrown:
            return self._step(ids)
        tokens, cache.length = cache.tokens[:, : cache.length + 1], 0
        logits = Reading(self, tokens, cache, {}).finish().logits
        self.prepare()
        return logits

    @torch.inference_mode()
    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone: indices (B',) int64, one at least."""
        self.cache.keep(rows)
        self._rows_changed()

    def forget(self) -> None:
        """Go on without rows."""
        self.cache = None

    def text(self, ids: list[int], adapter: int) -> Text:
        """A prompt, virtual tokens included, and what its keys and values depend on beside its tokens."""
        return Text((adapter, *turned_by(self.model.config, len(ids))), ids)

    def prepare(self) -> None:
        """Make what a step needs, for the cache as it now is."""

    def _rows_changed(self):
        """Prepare, and find the places at which a row becomes too long for the keys that it has: they are read again.

        That is where longrope's other factors begin. (In dynamic RoPE old keys stay as they are, as in transformers.)
        """
        padding = [0] if self.cache.padding is None else self.cache.padding.tolist()
        self.outgrown = {length + unused for length in longrope_contexts(self.model.config) for unused in padding}
        self.prepare()

    def _step(self, ids):
        return self.extend(ids[:, None], self.cache)

    def _new_cache(self, tokens, padding, room, adapters):
        weight = self.model.model.embed_tokens.weight
        dtype = compute_dtype(weight.dtype, weight.device.type)
        padding = padding if padding.any() else None
        if adapters is None and (choice := choice_of(self.model)) is not None:
            adapters = choice.default.expand(len(tokens))
        cache = KVCache(self.model.config, len(tokens), room, dtype, weight.device, padding, adapters)
        cache.tokens[:, : tokens.size(1)] = tokens
        return cache

    def extend(self, tokens: Tensor, cache: KVCache, scores: Scorers | None = None) -> Tensor:
        """Read tokens (B, T) that extend the cache: logits (B, V) after the last; `scores` get those before, too."""
        start = cache.length
        use(self.model, cache.adapters)
        hidden = self.model.hidden_states(tokens, cache)
        logits = self.model.logits(hidden[:, -1])
        score_stretches(scores or {}, cache, start, hidden, self._row_logits, len(self.virtual))
        return logits

    def _row_logits(self, hidden, cache, row):
        """The logits (n, V) after hidden states (n, D) of one row."""
        use(self.model, None if cache.adapters is None else cache.adapters[row : row + 1])
        return self.model.logits(hidden)


class Reading:
    """Prompts that are being read for a decoder, a chunk of their columns at a time, into a cache of their own."""

    def __init__(self, decoder: Decoder, tokens: Tensor, cache: KVCache, scores: Scorers):
        """tokens (B, T), to be read into the cache, which has nothing yet. scores: as in `Decoder.read`."""
        self.decoder, self.tokens, self.cache, self.scores = decoder, tokens, cache, scores
        self.begun_at = 0  # the first column that is read
        self.logits: Tensor | None = None  # (B, V), after the last tokens, once it is done

    @property
    def done(self) -> bool:
        """Whether the prompts have been read."""
        return self.cache.length == self.tokens.size(1)

    @torch.inference_mode()
    def advance(self, positions: int = CHUNK) -> None:
        """Read the next chunk: at most so many positions, those of all rows together, but at least one of each."""
        start = self.cache.length
        end = start + max(1, positions // len(self.tokens))
        if start == self.begun_at:
            end = max(end, self._first_end())
        self.logits = self.decoder.extend(self.tokens[:, start:end], self.cache, self.scores)

    @torch.inference_mode()
    def reuse(self, prefixes: PrefixCache) -> None:
        """Take from a cache what it holds of all prompts, before any of them is read, and begin behind it.

        All rows are read from one column on, that of the row with most to read. A row that is scored is read whole.
        """
        texts, cache, T = self._texts(), self.cache, self.tokens.size(1)
        found = [[] if row in self.scores else prefixes.find(text) for row, text in enumerate(texts)]
        unread = [len(text.ids) - length_of(blocks) for text, blocks in zip(texts, found, strict=True)]
        self.begun_at = cache.length = T - max(unread)
        for row, (text, blocks) in enumerate(zip(texts, found, strict=True)):
            first, reused = T - len(text.ids), max(0, cache.length - (T - len(text.ids)))
            if reused:
                columns = slice(first, first + reused)
                fill(cache.k[:, row, :, columns], cache.v[:, row, :, columns], blocks)
            prefixes.count(len(text.ids), reused)

    @torch.inference_mode()
    def hold(self, prefixes: PrefixCache) -> None:
        """Let a cache hold the prompts, which have been read."""
        for row, text in enumerate(self._texts()):
            columns = slice(self.cache.length - len(text.ids), self.cache.length)
            prefixes.add(text, self.cache.k[:, row, :, columns], self.cache.v[:, row, :, columns])

    def _texts(self):
        padding, adapters = (
            [none] * len(self.tokens) if numbers is None else numbers.tolist()
            for none, numbers in ((0, self.cache.padding), (1, self.cache.adapters))
        )
        rows = zip(self.tokens.tolist(), padding, adapters, strict=True)
        return [self.decoder.text(row[unused:], adapter) for row, unused, adapter in rows]

    def finish(self) -> "Reading":
        """Read what is left."""
        while not self.done:
            self.advance()
        return self

    @torch.inference_mode()
    def keep(self, rows: list[int]) -> None:
        """Go on with these rows alone, one at least."""
        kept = torch.tensor(rows, device=self.tokens.device)
        self.tokens = self.tokens[kept]
        self.cache.keep(kept)
        self.scores = {new: self.scores[old] for new, old in enumerate(rows) if old in self.scores}

    def _first_end(self):
        """The least column at which the first chunk may end.

        Where the length of a text decides how its beginning is turned, the first chunk has to show it. longrope asks
        only whether the text is longer than the context of pre-training; dynamic RoPE needs its whole length.
        """
        T, config = self.tokens.size(1), self.decoder.model.config
        padding = [0] if self.cache.padding is None else self.cache.padding.tolist()
        enough = [length + unused + 1 for length in longrope_contexts(config) for unused in padding]
        dynamic = [rope.original_context for rope in config.ropes if rope is not None and rope.scaling == "dynamic"]
        return max([end for end in enough if end <= T] + [T for length in dynamic if T - min(padding) > length] + [0])


def longrope_contexts(config: Config) -> set[int]:
    """The lengths beyond which a text's positions are turned by longrope's other factors."""
    return {rope.original_context for rope in config.ropes if rope is not None and rope.scaling == "longrope"}


def turned_by(config: Config, length: int) -> list[int | bool]:
    """What the length of a prompt decides about how its positions are turned: equal lists, equally turned."""
    dynamic = [rope.original_context for rope in config.ropes if rope is not None and rope.scaling == "dynamic"]
    longer = [length > context for context in sorted(longrope_contexts(config))]
    return [*longer, length if any(length > context for context in dynamic) else 0]


def score_stretches(
    scores: Scorers, cache: KVCache, start: int, hidden: Tensor, logits: Callable, virtual: int = 0
) -> None:
    """Call `scores` (`Decoder.read`) for the columns from `start` on, with what `logits` makes of hidden (B, T, D).

    logits: a function of the hidden states (n, D) of a row, the cache, and the number of the row in it. virtual: how
    many virtual tokens each row begins with; what is predicted after them is not asked for.
    """
    for row, score in scores.items():
        unused = virtual + (0 if cache.padding is None else int(cache.padding[row]))
        for column in range(max(start, unused), start + hidden.size(1), LOSS_CHUNK):
            part = hidden[row, column - start : column - start + LOSS_CHUNK]
            score(column - unused, logits(part, cache, row))


def put_before(virtual: list[int], tokens: Tensor, padding: Tensor) -> Tensor:
    """Rows (B, T), padded at the left, with the ids `virtual` before the text of each: (B, T + n)."""
    if not virtual:
        return tokens
    ids = torch.tensor(virtual, device=tokens.device).expand(len(tokens), -1)
    places = padding[:, None] + torch.arange(len(virtual), device=tokens.device)
    return F.pad(tokens, (len(virtual), 0)).scatter(1, places, ids)


class PlainDecoder(Decoder):
    """`Transformer.forward` alone, which makes logits for every position of a prompt, needed or not."""

    def extend(self, tokens: Tensor, cache: KVCache, scores: Scorers | None = None) -> Tensor:
        """As in `Decoder`."""
        start = cache.length
        use(self.model, cache.adapters)
        logits = self.model(tokens, cache=cache)
        score_stretches(scores or {}, cache, start, logits, lambda part, *_: part, len(self.virtual))
        return logits[:, -1]


# ------------------------------------------------------------------------------------------------------------- CUDA


class StaticDecoder(Decoder):
    """A step of fixed shapes and addresses, on CUDA recorded as a graph. On a CPU it runs as it is, to be tested.

    Each number of slots and size of a slot is recorded once, and replayed whichever rows are in them.
    """

    keeps_cheaply = True

    def __init__(self, model: Transformer):
        super().__init__(model)
        c, weight = model.config, model.model.embed_tokens.weight
        whole = dataclasses.replace(c, max_position_embeddings=c.max_position_embeddings + len(self.virtual))
        self.slots = Slots(whole, compute_dtype(weight.dtype, weight.device.type), weight.device)
        self.slopes = None if c.slopes is None else torch.tensor(c.slopes, device=weight.device)
        self.outgrown = longrope_contexts(c)
        self.angles: dict[int, dict] = {}  # of all positions of a slot, by its size
        self.left = 0  # steps that may still be taken
        self._forget_recorded()

    @torch.inference_mode()
    def take(self, reading: Reading, more: int) -> Tensor:
        """As in `Decoder`."""
        self.slots.join(reading.cache)
        self.left = more
        return reading.logits

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        """As in `Decoder`."""
        slots = self.slots
        if not self.left:
            raise ValueError(NO_ROOM.format(slots.longest))
        slots.fit(len(slots.numbers), slots.longest + 1)
        slots.ids.index_copy_(0, slots.order, ids)
        logits = self._recorded_step()().index_select(0, slots.order)
        slots.advance()
        self.left -= 1
        for row, length in enumerate(slots.lengths):
            if length - 1 in self.outgrown:
                logits[row] = self._read_again(row)
        return logits

    @torch.inference_mode()
    def keep(self, rows: Tensor) -> None:
        """As in `Decoder`."""
        self.slots.keep(rows.tolist())

    @torch.inference_mode()
    def forget(self) -> None:
        """As in `Decoder`. Memory and recorded steps stay, for the next rows."""
        self.slots.clear()

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """A function that does on the device what `run` does, and returns the same tensor each time: a CUDA graph."""
        if not self.slots.ids.is_cuda:
            return run
        side = torch.cuda.Stream()  # libraries allocate on their first calls, which must not be recorded
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            logits = run()

        def replay():
            graph.replay()
            return logits

        return replay

    def _recorded_step(self):
        """The step for the layout of the slots, recorded when it is first taken: an answer of one token needs none."""
        if self.slots.grown != self.recorded_after:
            self._forget_recorded()
        layout = self.slots.count, self.slots.room
        if layout not in self.recorded:
            self._make_angles(self.slots.room)
            self.recorded[layout] = self.record(partial(self._static_step, *layout))
        return self.recorded[layout]

    def _forget_recorded(self):
        """What was recorded has addresses that hold no more. Graphs share memory: only one is replayed at a time."""
        self.recorded: dict[tuple[int, int], Callable[[], Tensor]] = {}
        self.recorded_after = self.slots.grown
        self.pool = torch.cuda.graph_pool_handle() if self.slots.device.type == "cuda" else None

    def _make_angles(self, room):
        """Of each position when it is the newest. Made before recording: longrope's factors come from the host."""
        if room not in self.angles:
            positions = torch.arange(room, device=self.slots.device)
            new, dtype = partial(torch.add, positions, 1), self.slots.flat[1].dtype
            ropes = set(self.model.config.ropes)
            self.angles[room] = {rope: rope_angles(rope, positions, new, dtype) for rope in ropes}

    def _static_step(self, count, room):
        """The logits (count, V) after the next token of each slot."""
        model, c, cache = self.model, self.model.config, StepCache(self.slots, count, room)
        use(model, cache.adapters)
        x = model.embed(cache.ids[:, None], cache.position[:, None])
        angles = {rope: angles and angles_at(angles, cache.position) for rope, angles in self.angles[room].items()}
        scores = [c.scores(number) for number in range(c.num_hidden_layers)]
        attention = {kind: cache.attention(kind, self.slopes) for kind in set(scores)}
        for number, block in enumerate(model.model.layers):
            x = block(x, angles[c.ropes[number]], attention[scores[number]], cache)
        return model.logits(model.finish(x)[:, -1])

    def _read_again(self, row):
        """The logits (V,) after a row whose keys have to be turned anew; its slot gets them."""
        slots = self.slots
        length = slots.lengths[row]
        tokens = slots.view(0, slots.count, slots.room)[slots.numbers[row], :, :length, 0]  # (1, length)
        cache = self._new_cache(tokens, torch.zeros_like(tokens[:, 0]), length, slots.adapter[slots.numbers[row]][None])
        reading = Reading(self, tokens, cache, {}).finish()
        slots.put([row], reading.cache)
        return reading.logits[0]

    def _new_cache(self, tokens, padding, room, adapters):
        return super()._new_cache(tokens, padding, tokens.size(1), adapters)  # the slots have the room


def angles_at(angles: Angles, positions: Tensor) -> Angles:
    """Of the `angles` of all positions those of `positions` (B,): (B, 1, 1, dims/2)."""
    cos, sin, gain = (
        None if table is None else table.index_select(0, positions)[:, None, None]
        for table in (angles.cos, angles.sin, angles.query_gain)
    )
    return Angles(cos, sin, angles.interleaved, gain)


# -------------------------------------------------------------------------------------------------------------- CPU


class Matrix(ctypes.Structure):
    """decode_cpu.cpp's description of a weight."""

    _fields_ = [(name, ctypes.c_int64) for name in ("format", "rows", "columns")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("data", "block_scales", "values", "row_scales", "bias")]


class CNorm(ctypes.Structure):
    """decode_cpu.cpp's description of a norm."""

    _fields_ = [(name, ctypes.c_int64) for name in ("groups", "size", "centered")]
    _fields_ += [("gain", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("each", ctypes.c_int64)]
    _fields_ += [("eps", ctypes.c_double)]


class Layer(ctypes.Structure):
    """decode_cpu.cpp's description of the attention of a layer."""

    _fields_ = [("dims", ctypes.c_int64), ("interleaved", ctypes.c_int64)]
    _fields_ += [(name, ctypes.c_void_p) for name in ("cos", "sin", "query_gain")]
    _fields_ += [("window", ctypes.c_int64), ("scale", ctypes.c_double), ("softcap", ctypes.c_double)]
    _fields_ += [("slopes", ctypes.c_void_p), ("sinks", ctypes.c_void_p)]


class Attention(ctypes.Structure):
    """decode_cpu.cpp's description of the attention of a step."""

    _fields_ = [(name, ctypes.c_int64) for name in ("in_bf16", "batch", "heads", "key_heads", "d", "room", "position")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("qkv", "padding", "y")]
    _fields_ += [("threads", ctypes.c_int64)]


DENSE_FORMATS = {torch.float32: 0, torch.bfloat16: 1}
INT8, FOURBIT = 2, 3


def cpp() -> ctypes.CDLL | None:
    """decode_cpu.cpp as a ctypes library, None where it cannot be compiled."""
    library = compiled_library("decode_cpu")
    if library is not None:
        number, address = ctypes.c_int64, ctypes.c_void_p
        library.linear.argtypes = [*(address, number) * 3, number, number, number, number]
        library.norm.argtypes = [address, address, number, address, number, number]
        library.activate.argtypes = [address, address, number, number, number, number, number]
        library.attend.argtypes = [address, address, address, address]
    return library


def in_decode_cpp(model: Transformer) -> bool:
    """Whether decode_cpu.cpp has what a model is made of, and is compiled.

    Adapters in the place of other modules than linear layers it has not, unless they do nothing in a step.
    """
    adapted = all(hasattr(adapter, "in_features") or not adapter.in_steps for adapter in adapters(model).values())
    return adapted and all(type(block.mlp) in (MLP, Experts) for block in model.model.layers) and cpp() is not None


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor's numbers begin, or None."""
    return None if tensor is None else tensor.data_ptr()


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
            code, data, scales, values = FOURBIT, layer.codes, layer.block_scales(), layer.values.float()
        bias = None if layer.bias is None else layer.bias.float()
        tensors = [None if t is None else t.contiguous() for t in (data, scales, values, gain, bias)]
        self.tensors += tensors
        return Matrix(code, layer.out_features, layer.in_features, *map(address, tensors))

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
        parts = [low_rank_of(self.layers[i], ratios[i]) for i in self.adapted]
        self.down = Weights([dense(A) for A, _, _, _ in parts], [scales for _, scales, _, _ in parts])
        self.up = [Weights([dense(B)], [gain]) for _, _, B, gain in parts]
        self.ranks = [len(A) for A, _, _, _ in parts]
        self.several = [self.layers[i] for i in self.adapted if isinstance(self.layers[i], SeveralLinear)]
        self.gained = any(layer.gains is not None for layer in self.several)

    def calls(self, x: Tensor, y: Tensor, in_bf16: bool, add: bool = False) -> list[Callable]:
        """The functions that, called in turn, compute y (B, sum of out) from x (B, in), as `Weights.call`."""
        if self.weights is None:
            return [partial(self._by_layers, x, y, add)]
        if self.adapted and self.gained:
            return self._gained_calls(x, y, in_bf16, add)
        return self._calls(x, y, in_bf16, add)

    def _calls(self, x, y, in_bf16, add):
        parts = y.split([width for _, width in self.weights], dim=1)
        calls = [weights.call(x, part, add, in_bf16) for (weights, _), part in zip(self.weights, parts, strict=True)]
        if self.adapted:
            low = torch.empty(len(x), sum(self.ranks))
            calls.append(self.down.call(x, low))
            calls[-1].low = low  # kept with the call, which holds nothing but its address
            if self.several:  # each row was multiplied by the A of all its layer's adapters
                others = torch.cat([layer.not_own(layer.choice.index) for layer in self.several], dim=1)
                calls.append(partial(low.masked_fill_, others, 0))
            parts = [y.split(self.widths, dim=1)[i] for i in self.adapted]
            for up, inner, part in zip(self.up, low.split(self.ranks, dim=1), parts, strict=True):
                calls.append(up.call(inner, part, add=True))
        return calls

    def _gained_calls(self, x, y, in_bf16, add):
        """As `_calls`, where some rows have an adapter with DoRA: what is beside the bias has a gain by row."""
        product = torch.empty(len(x), sum(self.widths))
        gains, shift = torch.ones_like(product), torch.zeros_like(product)
        columns = zip(self.layers, *(each.split(self.widths, dim=1) for each in (gains, shift)), strict=True)
        for layer, own, back in columns:
            if isinstance(layer, SeveralLinear) and layer.gains is not None:
                own.copy_(layer.gains[layer.choice.index])
                if layer.base.bias is not None:
                    back.copy_(layer.base.bias.float() * (1 - own))
        own = [partial(product.mul_, gains), partial(product.add_, shift), partial(y.add_ if add else y.copy_, product)]
        return self._calls(x, product, in_bf16, add=False) + own

    def _by_layers(self, x, y, add):
        """What the compiled products cannot read, each layer computes itself."""
        for layer, part in zip(self.layers, y.split(self.widths, dim=1), strict=True):
            base = base_of(layer)
            dtype = compute_dtype(base.weight.dtype, "cpu") if isinstance(base, nn.Linear) else torch.float32
            result = layer(x.to(dtype))
            part.add_(result) if add else part.copy_(result)


def low_rank_of(adapter: Adapter, ratio: Tensor | None) -> tuple:
    """What decode_cpu.cpp reads of an adapter: A (R, in) and gains of its rows, B (out, R) and gains of its rows.

    ratio: (out,) of one that is DoRA.
    """
    if isinstance(adapter, SeveralLinear):
        A, B = (nn.Parameter(matrix, requires_grad=False) for matrix in adapter.matrices(torch.float32))
        return A, adapter.scales, B, None
    gain = torch.full((adapter.out_features,), float(adapter.scale))
    return adapter.lora_A, None, adapter.lora_B, gain if ratio is None else gain * ratio


def dense(weight: nn.Parameter, bias: nn.Parameter | None = None) -> Linear:
    """A linear layer over parameters (out, in) and (out,)."""
    out_features, in_features = weight.shape
    layer = Linear(in_features, out_features, bias=False, device="meta")
    layer.weight, layer.bias = weight, bias
    return layer


def base_of(layer: nn.Module) -> nn.Module:
    """The module under an adapter, or the module itself where there is none."""
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


class Norm:
    """A norm of model.py; nn.Identity, which takes no call, is one too. heads: if it is over heads, how many."""

    def __init__(self, module: nn.Module, heads: int = 1):
        self.is_identity = type(module) is nn.Identity
        if self.is_identity:
            return
        centered = {RMSNorm: False, JointNorm: False, LayerNorm: True, EachHeadNorm: True}[type(module)]
        gain, bias = (getattr(module, name, None) for name in ("weight", "bias"))
        gain = None if gain is None else gain.detach().float() + getattr(module, "plus_one", False)
        self.tensors = [None if t is None else t.detach().float().contiguous() for t in (gain, bias)]
        groups = 1 if type(module) is JointNorm else heads
        each = type(module) is EachHeadNorm
        self.norm = CNorm(groups, 0, centered, *map(address, self.tensors), each, module.eps)

    def calls(self, x: Tensor, y: Tensor) -> list[Callable]:
        """The functions that compute y (B, D) from x (B, D), which may be the same."""
        if self.is_identity:
            return []
        self.norm.size = x.size(1) // self.norm.groups
        place = (x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0), len(x))
        return [partial(cpp().norm, ctypes.byref(self.norm), *place)]


class MLPParts:
    """What decode_cpu.cpp reads of an `MLP`."""

    def __init__(self, mlp: MLP):
        self.activation, self.gated = mlp.activation, mlp.gate_proj is not None
        self.up = Product(*([mlp.gate_proj] if self.gated else []), mlp.up_proj)
        self.down, self.inner = Product(mlp.down_proj), mlp.down_proj.in_features


class ExpertsParts:
    """What it reads of `Experts`."""

    def __init__(self, mixture: Experts):
        self.config, self.router = mixture.config, Product(dense(mixture.gate.weight, mixture.gate.bias))
        self.experts = [MLPParts(expert) for expert in mixture.experts]
        self.shared = self.shared_gate = None
        if mixture.shared_expert is not None:
            self.shared = MLPParts(mixture.shared_expert)
            self.shared_gate = Product(dense(mixture.shared_expert_gate.weight))


class Parts:
    """What it reads of a `Block`."""

    def __init__(self, block: Block):
        attention = base_of(block.self_attn)
        self.parallel, self.shared_norm, self.scale = block.parallel, block.shared_norm, block.scale
        self.clip, self.mlp = attention.clip, (ExpertsParts if block.sparse else MLPParts)(block.mlp)
        self.qkv = Product(attention.q_proj, attention.k_proj, attention.v_proj)
        self.o = Product(attention.o_proj)
        self.heads, self.key_heads = (
            p.out_features // attention.head_dim for p in (attention.q_proj, attention.k_proj)
        )
        self.q_norm, self.k_norm = Norm(attention.q_norm, self.heads), Norm(attention.k_norm, self.key_heads)
        self.sinks = None if attention.sinks is None else attention.sinks.detach().float()
        self.attention_norms, self.mlp_norms = (
            [Norm(getattr(block, name)) for name in names]  # of the input, of the output and of the sum
            for names in (
                ("input_layernorm", "attention_output_norm", "attention_sum_norm"),
                ("post_attention_layernorm", "mlp_output_norm", "mlp_sum_norm"),
            )
        )


def _activate_rare(name, up, inner):
    """An activation that decode_cpu.cpp has not."""
    inner.copy_(plain_gated(name, *up.chunk(2, dim=1)))


class CompiledDecoder(Decoder):
    """A step is a list of calls, most of decode_cpu.cpp, made once for a batch: their buffers and addresses stay.

    Activations are fp32, keys and values what the model's own pass keeps.
    """

    def __init__(self, model: Transformer):
        super().__init__(model)
        self.blocks = [Parts(block) for block in model.model.layers]
        self.norm, self.head = Norm(model.model.norm), Product(model.lm_head)
        self.project_out = Product(model.model["project_out"]) if "project_out" in model.model else None

    def prepare(self) -> None:
        """As in `Decoder`: the buffers of a step, and the list of its calls."""
        c, cache = self.model.config, self.cache
        use(self.model, cache.adapters)
        B, heads, key_heads = cache.k.size(1), *(n * c.head_dim for n in (c.num_attention_heads, c.num_key_value_heads))
        # As in the model's own pass; one row is read from memory faster than anything is multiplied, so it is exact.
        self.in_bf16 = B > 1 and cache.k.dtype == torch.bfloat16
        self.x, self.normed, self.branch = (torch.empty(B, c.hidden_size) for _ in range(3))
        self.qkv, self.attended = torch.empty(B, heads + 2 * key_heads), torch.empty(B, heads)
        self.buffers = {}
        self.padding = torch.zeros(B, dtype=torch.int64) if cache.padding is None else cache.padding
        self.attention = Attention(
            cache.k.dtype == torch.bfloat16, B, c.num_attention_heads, c.num_key_value_heads, c.head_dim,
            cache.k.size(3), cache.length, *map(address, (self.qkv, self.padding, self.attended)),
            torch.get_num_threads(),
        )  # fmt: skip
        positions = torch.arange(cache.k.size(3))
        new = partial(torch.add, positions, 1)  # the text's length when each position is the newest
        self.angles = {rope: rope_angles(rope, positions, new, torch.float32) for rope in set(c.ropes)}
        self.slopes = None if c.slopes is None else torch.tensor(c.slopes)
        self.calls = [call for layer, parts in enumerate(self.blocks) for call in self._block(layer, parts)]
        self.calls += self._finish()

    def _block(self, layer, parts):
        """The calls that do what `Block` does to x (B, D), in place."""
        attention_norm, *attention_norms = parts.attention_norms
        mlp_norm, *mlp_norms = parts.mlp_norms
        normed, read = self._normed(attention_norm)
        read += parts.qkv.calls(normed, self.qkv, self.in_bf16)
        product = partial(parts.o.calls, self.attended, in_bf16=self.in_bf16)
        attend = self._attend(layer, parts) + self._add(product, *attention_norms, parts.scale)
        normed, feed = (normed, []) if parts.parallel and parts.shared_norm else self._normed(mlp_norm)
        feed += self._add(partial(self._feed_forward, parts.mlp, normed), *mlp_norms, parts.scale)
        # What attention needs of x is in qkv by then.
        return read + feed + attend if parts.parallel else read + attend + feed

    def _normed(self, norm):
        """Where the norm of x is, and the calls that make it."""
        return (self.x, []) if norm.is_identity else (self.normed, norm.calls(self.x, self.normed))

    def _add(self, calls_of, output_norm, sum_norm, scale):
        """The calls that add to x what those of `calls_of(y, add=...)` put into y, through its norm if it has one."""
        if output_norm.is_identity and scale == 1:
            calls = calls_of(self.x, add=True)
        else:
            calls = calls_of(self.branch, add=False) + output_norm.calls(self.branch, self.branch)
            calls.append(partial(self.x.add_, self.branch, alpha=scale))
        return calls + sum_norm.calls(self.x, self.x)

    def _attend(self, number, parts):
        """The calls from queries, keys and values to what each head gives."""
        c, cache, angles = self.model.config, self.cache, self.angles[self.model.config.ropes[number]]
        d, scores = c.head_dim, c.scores(number)
        q, k, _ = self.qkv.split([parts.heads * d, parts.key_heads * d, parts.key_heads * d], dim=1)
        calls = parts.q_norm.calls(q, q) + parts.k_norm.calls(k, k)
        if parts.clip is not None:
            calls.append(partial(self.qkv.clamp_, -parts.clip, parts.clip))
        turned = (0, False, None, None, None)
        if angles is not None:
            cos, sin, gain = map(address, (angles.cos, angles.sin, angles.query_gain))
            turned = (2 * angles.cos.size(-1), angles.interleaved, cos, sin, gain)
        ends = map(address, (self.slopes, parts.sinks))
        layer = Layer(*turned, scores.window or 0, scores.scale, scores.softcap or 0, *ends)
        where = (cache.k[number].data_ptr(), cache.v[number].data_ptr())
        return [*calls, partial(cpp().attend, ctypes.byref(self.attention), ctypes.byref(layer), *where)]

    def _feed_forward(self, parts, x, y, add):
        """The calls that put into y, or add to it, what an MLP or a mixture of experts makes of x."""
        return (self._mixture if isinstance(parts, ExpertsParts) else self._mlp)(parts, x, y, add)

    def _mlp(self, parts, x, y, add=False):
        up = self._buffer("up", len(x), (1 + parts.gated) * parts.inner)
        inner = self._buffer("inner", len(x), parts.inner)
        if parts.activation in IN_KERNELS:  # decode_cpu.cpp's `Activation` has their order
            kind = (IN_KERNELS.index(parts.activation), parts.gated, torch.get_num_threads())
            activate = partial(cpp().activate, up.data_ptr(), inner.data_ptr(), *inner.shape, *kind)
        else:
            activate = partial(_activate_rare, parts.activation, up, inner)
        products = (parts.up.calls(x, up, self.in_bf16), parts.down.calls(inner, y, self.in_bf16, add))
        return [*products[0], activate, *products[1]]

    def _mixture(self, parts, x, y, add):
        logits = self._buffer("router", len(x), parts.config.count)
        chosen = partial(self._chosen, parts, {}, x, logits, y, add)
        calls = [*parts.router.calls(x, logits, in_bf16=False), chosen]
        if parts.shared is not None:
            gate, out = self._buffer("gate", len(x), 1), self._buffer("shared", *x.shape)
            calls += parts.shared_gate.calls(x, gate, in_bf16=False) + self._mlp(parts.shared, x, out)
            calls += [gate.sigmoid_, partial(y.addcmul_, out, gate)]
        return calls

    def _chosen(self, parts, known, x, logits, y, add):
        """Put into y what each row's experts make of x. known: their calls, by expert and number of rows."""
        experts, weights = choose(logits, parts.config)
        if not add:
            y.zero_()
        for expert in experts.unique().tolist():
            rows, places = (experts == expert).nonzero(as_tuple=True)
            of_rows, out = (self._buffer(name, len(rows), x.size(1)) for name in ("rows", "of expert"))
            torch.index_select(x, 0, rows, out=of_rows)
            if (expert, len(rows)) not in known:
                known[expert, len(rows)] = self._mlp(parts.experts[expert], of_rows, out)
            for call in known[expert, len(rows)]:
                call()
            y.index_add_(0, rows, out.mul_(weights[rows, places, None]))

    def _buffer(self, name, *shape):
        """A tensor of this name and shape, which all layers use in turn."""
        if (name, *shape) not in self.buffers:
            self.buffers[name, *shape] = torch.empty(shape)
        return self.buffers[name, *shape]

    def _finish(self):
        """The calls that do what `Transformer.finish` does, and the head."""
        c, B = self.model.config, len(self.x)
        x, calls = self._normed(self.norm)
        if self.project_out is not None:
            self.projected = torch.empty(B, c.embedding_size)
            calls += self.project_out.calls(x, self.projected, self.in_bf16)
            x = self.projected
        if c.logit_scale != 1:
            calls.append(partial(x.mul_, c.logit_scale))
        self.logits = torch.empty(B, c.vocab_size)
        return calls + self.head.calls(x, self.logits, self.in_bf16)

    def _step(self, ids):
        positions = (self.cache.length - self.padding)[:, None]
        self.x.copy_(self.model.embed(ids[:, None], positions)[:, 0])
        self.attention.position = self.cache.length
        for call in self.calls:
            call()
        self.cache.length += 1
        return plain_softcap(self.logits, self.model.config.logit_softcap)
