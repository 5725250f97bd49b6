"""What part of a model a device has, of several that divide it along tensor and pipeline.

A device's model is a smaller one of the same kind: fewer blocks, fewer heads, a narrower MLP, fewer of the experts. So
adapters, quantisers, kernels and the memory plan meet nothing new. What is elsewhere has something that does nothing in
its place, so all names are those of the whole model. Along tensor (tensor.py):

    q, k, v, gate, up    rows are divided: by heads (of keys and values, with their queries), by the MLP's inner numbers
    o, down              columns are divided in the same way; a bias is added by the first device alone
    experts              whole ones, E / n for each device; the router is everywhere, as every device has all tokens
    what else there is   is the same on all of them

Along pipeline (stages.py) each device has some of the blocks, whole; the first one has the embedding too, the last one
the final norm and the head. Where the head is the embedding, both have it.

`Part.place` says the same of each parameter by its name: one function for all families, as they share these names.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import torch
from torch import nn

from adapters.adapter import place as place_of
from experts import Elsewhere
from model import Config, Transformer
from ops.dequantize import BLOCK
from quantize import Cut, check_divisible
from shell.cli import UserError
from training.parallel.stages import BlockElsewhere, EmbeddingElsewhere, HeadElsewhere

ROWS = {"q_proj": "q", "k_proj": "kv", "v_proj": "kv", "gate_proj": "inner", "up_proj": "inner"}
COLUMNS = {"o_proj": "q", "down_proj": "inner"}
FIRST = ("embed_tokens", "project_in", "embed_positions", "embed_norm")  # what comes before the blocks
LAST = ("norm", "project_out", "lm_head")


class Place(NamedTuple):
    """Where a device's part of a parameter lies in the whole: from `start` to before `stop` along `dim`.

    dim: None if the device has all of it. summed: over whom its gradient is to be added up, as each device finds only
    what its part of the layer adds to it: over all along tensor, or over those that have the same keys and values; or
    over the first and the last stage of a pipeline, where both use an embedding that is the head.
    """

    dim: int | None = None
    start: int = 0
    stop: int = 0
    summed: Literal["tensor", "kv", "ends"] | None = None


@dataclasses.dataclass(frozen=True)
class Part:
    """Device `rank` of `count` along tensor in stage `stage` of `stages`, of a model with this `Config`.

    With one device and one stage it is the whole model.
    """

    config: Config
    rank: int = 0
    count: int = 1
    stage: int = 0
    stages: int = 1

    def __post_init__(self):
        c, flag = self.config, f"--parallel tensor={self.count}"
        if self.stages > c.num_hidden_layers:
            raise UserError(f"--parallel pipeline={self.stages}: the model has only {c.num_hidden_layers} layers")
        H, K = c.num_attention_heads, c.num_key_value_heads
        if self.count > K and self.count % K or self.count > H:
            raise UserError(f"{flag}: {H} heads with {K} of keys and values cannot be divided among {self.count}")
        if c.experts and self.count > c.experts.count:
            raise UserError(f"{flag}: there are {c.experts.count} experts, so some devices would have none")
        for inner in self._inner_sizes():
            if self.count > inner // _unit(inner):
                raise UserError(f"{flag}: an MLP of {inner} numbers cannot be divided among {self.count}")

    def _inner_sizes(self):
        c = self.config
        dense = not (c.experts and all(c.sparse))
        shared = [c.experts.shared_size] if c.experts and c.experts.shared_size else []
        return [c.intermediate_size] * dense + shared

    @property
    def layers(self) -> range:
        """The numbers of this device's blocks. The last stage, which has the head too, never has more than others."""
        L = self.config.num_hidden_layers
        return range(-(-L * self.stage // self.stages), -(-L * (self.stage + 1) // self.stages))

    @property
    def is_first(self) -> bool:
        """Whether this device has what comes before the blocks."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether this device has what comes after the blocks, and finds the losses."""
        return self.stage == self.stages - 1

    @property
    def ties(self) -> bool:
        """Whether this device has an embedding that another stage has too."""
        return self.config.tie_word_embeddings and self.stages > 1 and (self.is_first or self.is_last)

    @property
    def sharers(self) -> int:
        """How many devices have the same keys and values."""
        return max(1, self.count // self.config.num_key_value_heads)

    def heads(self, of: str) -> tuple[int, int]:
        """This device's heads of queries ("q") or of keys and values ("kv"): from, to before."""
        H, K = self.config.num_attention_heads, self.config.num_key_value_heads
        group = H // K
        if self.sharers == 1:
            start, stop = _share(K, self.rank, self.count)
            return (start, stop) if of == "kv" else (start * group, stop * group)
        head, place = divmod(self.rank, self.sharers)
        start, stop = _share(group, place, self.sharers)
        return (head, head + 1) if of == "kv" else (head * group + start, head * group + stop)

    def inner(self, size: int) -> tuple[int, int]:
        """Of the inner numbers of an MLP of this size those of this device."""
        unit = _unit(size)
        start, stop = _share(size // unit, self.rank, self.count)
        return start * unit, stop * unit

    def experts(self) -> range:
        """The numbers of this device's experts."""
        return range(*_share(self.config.experts.count, self.rank, self.count))

    def local_config(self) -> Config:
        """The `Config` of this device's model."""
        c = self.config if self.is_last else without_head(self.config)
        if self.count == 1:
            return c
        (q, q_end), (k, k_end), (inner, inner_end) = self.heads("q"), self.heads("kv"), self.inner(c.intermediate_size)
        experts = c.experts
        if experts and experts.shared_size:
            start, stop = self.inner(experts.shared_size)
            experts = dataclasses.replace(experts, shared_size=stop - start)
        return dataclasses.replace(
            c,
            num_attention_heads=q_end - q,
            num_key_value_heads=k_end - k,
            intermediate_size=inner_end - inner,
            slopes=c.slopes and c.slopes[q:q_end],
            experts=experts,
        )

    def place(self, name: str) -> Place | None:
        """Where this device's part of a parameter lies, by its name in the model; None if it has no part of it."""
        *path, module, leaf = place_of(name).split(".")
        if not self.has(name):
            return None
        if self.ties and module == "embed_tokens":
            return Place(summed="ends")
        if self.count == 1 or not {"self_attn", "mlp"}.intersection(path[-4:] + [module]):
            return Place()
        if "experts" in path:
            return Place() if int(path[path.index("experts") + 1]) in self.experts() else None
        if module in ROWS:
            return self._of_rows(ROWS[module], leaf, path)
        if module in COLUMNS:
            return self._of_columns(COLUMNS[module], leaf, path)
        if leaf == "sinks" or (module in ("q_norm", "k_norm") and self.config.qk_norm in ("joint", "each head")):
            of = "kv" if module == "k_norm" else "q"
            scale = self.config.head_dim if self.config.qk_norm == "joint" and leaf != "sinks" else 1
            start, stop = self.heads(of)
            return Place(0, start * scale, stop * scale, self._summed(of))
        return Place(summed="tensor")  # a norm of each head, a router

    def has(self, name: str) -> bool:
        """Whether a parameter is in this device's stage."""
        if self.stages == 1:
            return True
        outer, inner, *rest = name.split(".")
        if inner == "layers":
            return int(rest[0]) in self.layers
        part = outer if outer == "lm_head" else inner
        return (self.is_first if part in FIRST else self.is_last) or (self.ties and part == "embed_tokens")

    def _of_rows(self, of, leaf, path):
        if leaf == "lora_A":
            return Place(summed="tensor")
        return Place(0, *self._range(of, path), self._summed(of))

    def _of_columns(self, of, leaf, path):
        if leaf == "bias":
            return Place() if self.rank == 0 else None
        if leaf in ("lora_B", "lora_magnitude_vector"):
            return Place(summed="tensor")
        return Place(1, *self._range(of, path))

    def _range(self, of, path):
        if of == "inner":
            shared = "shared_expert" in path
            return self.inner(self.config.experts.shared_size if shared else self.config.intermediate_size)
        return tuple(number * self.config.head_dim for number in self.heads(of))

    def _summed(self, of):
        return "kv" if of == "kv" and self.sharers > 1 else None

    def cut(self, name: str, shape: tuple[int, int]) -> Cut:
        """Which part of a linear layer's weight this device has. name: of the layer. shape: of the whole weight."""
        where = self.place(f"{name}.weight")
        return Cut(tuple(shape), *((where.start, 0), (0, where.start))[where.dim == 1])

    def model(self) -> Transformer:
        """This device's model, where torch makes tensors now: on "meta" without memory."""
        model = Transformer(self.local_config())
        for number in set(range(self.config.num_hidden_layers)) - set(self.layers):
            model.model.layers[number] = BlockElsewhere()
        self.leave_out_ends(model)
        for number in self.layers if self.count > 1 else ():
            block = model.model.layers[number]
            if block.sparse:
                for expert in set(range(self.config.experts.count)) - set(self.experts()):
                    block.mlp.experts[expert] = Elsewhere()
            if self.rank:
                for layer in (block.self_attn.o_proj, getattr(block.mlp, "down_proj", None), _shared_down(block.mlp)):
                    if layer is not None:
                        layer.bias = None
        return model

    def leave_out_ends(self, model: Transformer) -> None:
        """Let a model of `local_config` have neither embedding nor head, if other stages have these."""
        parts, weight = model.model, model.model.embed_tokens.weight
        if not self.is_last:
            parts["norm"], model.lm_head = nn.Identity(), HeadElsewhere(self.config.vocab_size)
            _remove(parts, "project_out")
        if not self.is_first:
            if not self.ties:
                parts["embed_tokens"] = EmbeddingElsewhere(weight)
            _remove(parts, *FIRST[1:])


def _remove(parts, *names):
    for name in set(names).intersection(parts):
        del parts[name]


def check_quantized(config: Config, count: int, quantization: str | dict | None) -> None:
    """Raise UserError if what `count` devices along tensor have of layers cannot be quantised, or divided by --shard.

    quantization: as `quantize.read_quantization` returns it.
    """
    for rank in range(count) if quantization else ():
        with torch.device("meta"):
            check_divisible(quantization, Part(config, rank, count).model())


def without_head(c: Config) -> Config:
    """The `Config` of a stage that is not the last."""
    return dataclasses.replace(c, tie_word_embeddings=False, logit_scale=1.0, logit_softcap=None)


def _share(total, rank, count):
    """The range of a device of several, whose sizes differ by one at most."""
    return total * rank // count, total * (rank + 1) // count


def _unit(size):
    """An MLP is cut between blocks of weights that share a scale in 4 bits, if they fit in its rows."""
    return BLOCK if size % BLOCK == 0 else 1


def _shared_down(mlp):
    return getattr(getattr(mlp, "shared_expert", None), "down_proj", None)
