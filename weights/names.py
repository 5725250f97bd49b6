"""What families whose tensors are not called and laid out like Llama's call them: one table a family, for both ways.

A row says what one of their modules is in our model: another name, or several modules whose rows lie in it together.
A mixture of experts has two tables: its files', and that of the modules in transformers' memory, which PEFT adapts.
Tensors are turned one at a time, while they are read or written (`Renamed`, `Names.join`); nothing is kept twice.

To add a family: a table in `TABLES`. A name holds {} for the number of a layer.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from model import Config


class Rows(NamedTuple):
    """How the rows of several modules lie in one: in `groups` equal groups, each with so many of every module."""

    groups: int
    sizes: tuple[int, ...]


def in_turn(c: Config) -> Rows:
    """All rows of q, then all of k, then all of v."""
    d = c.head_dim
    return Rows(1, (c.num_attention_heads * d, c.num_key_value_heads * d, c.num_key_value_heads * d))


def by_key_head(c: Config) -> Rows:
    """For each key head the query heads that share it, the key head, and its value head."""
    heads, d = c.num_key_value_heads, c.head_dim
    return Rows(heads, (c.num_attention_heads // heads * d, d, d))


def alternating(c: Config) -> Rows:
    """A row of an expert's gate, a row of its up, and so on."""
    return Rows(c.experts.size, (1, 1))


def halves(c: Config) -> Rows:
    """Gate, then up."""
    return Rows(1, (c.intermediate_size, c.intermediate_size))


def expert_halves(c: Config) -> Rows:
    """An expert's gate, then its up."""
    return Rows(1, (c.experts.size, c.experts.size))


class Row(NamedTuple):
    """A row of a table.

    theirs: a module's name, or a parameter's whole name. ours: the modules that it holds. rows: how, where there are
    several. turned: whether its weight is (in, out), as GPT-2 has it. each_head: whether theirs has a module for each
    row of ours. stacked: whether theirs is a parameter with all experts of a layer, the bias another (in GPT-OSS's
    files, and of all mixtures in transformers' memory).
    """

    theirs: str
    ours: tuple[str, ...]
    rows: Callable[[Config], Rows] | None = None
    turned: bool = False
    each_head: bool = False
    stacked: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether theirs and ours are equal."""
        return self.rows is None and not (self.turned or self.each_head or self.stacked)


LAYER = "model.layers.{}."
QKV = tuple(f"{LAYER}self_attn.{letter}_proj" for letter in "qkv")
GATE_UP = (f"{LAYER}mlp.gate_proj", f"{LAYER}mlp.up_proj")
OUT, UP, DOWN = f"{LAYER}self_attn.o_proj", f"{LAYER}mlp.up_proj", f"{LAYER}mlp.down_proj"
FIRST_NORM, SECOND_NORM = f"{LAYER}input_layernorm", f"{LAYER}post_attention_layernorm"
AFTER_ATTENTION, AFTER_MLP = f"{LAYER}attention_output_norm", f"{LAYER}mlp_output_norm"
ROUTER, EXPERT = f"{LAYER}mlp.gate", f"{LAYER}mlp.experts.{{}}."
EMBEDDING, POSITIONS, NORM, HEAD = "model.embed_tokens", "model.embed_positions", "model.norm", "lm_head"


def table(prefix: str, layers: dict, others: dict) -> tuple[Row, ...]:
    """A table from their names, in a layer with `prefix` before them, to ours or the other fields of a `Row`."""
    pairs = [(prefix + name, ours) for name, ours in layers.items()] + list(others.items())
    return tuple(Row(theirs, *((ours,),) if isinstance(ours, str) else ours) for theirs, ours in pairs)


def _bloom_like(rows):
    """BLOOM's names, which Falcon took over."""
    layers = {
        "input_layernorm": FIRST_NORM, "post_attention_layernorm": SECOND_NORM, "ln_attn": FIRST_NORM,
        "ln_mlp": SECOND_NORM, "self_attention.query_key_value": (QKV, rows), "self_attention.dense": OUT,
        "mlp.dense_h_to_4h": UP, "mlp.dense_4h_to_h": DOWN,
    }  # fmt: skip
    others = {
        "transformer.word_embeddings": EMBEDDING, "transformer.word_embeddings_layernorm": "model.embed_norm",
        "transformer.ln_f": NORM, "lm_head": HEAD,
    }  # fmt: skip
    return layers, others


def _gpt2_like(rows, turned):
    layers = {
        "ln_1": FIRST_NORM, "ln_2": SECOND_NORM, "attn.c_attn": (QKV, rows, turned),
        "attn.c_proj": ((OUT,), None, turned), "mlp.c_fc": ((UP,), None, turned), "mlp.c_proj": ((DOWN,), None, turned),
    }  # fmt: skip
    others = {
        "transformer.wte": EMBEDDING, "transformer.wpe": POSITIONS, "transformer.ln_f": NORM, "lm_head": HEAD,
    }  # fmt: skip
    return table("transformer.h.{}.", layers, others)


def _falcon(c: Config):
    two_norms = c.parallel_residual and not c.shared_norm
    layers, others = _bloom_like(by_key_head)
    for name in ("input_layernorm", "post_attention_layernorm") if two_norms else ("ln_attn", "ln_mlp"):
        del layers[name]
    return table("transformer.h.{}.", layers, others)


def _bloom(c: Config):
    layers, others = _bloom_like(by_key_head)
    return table("transformer.h.{}.", {k: v for k, v in layers.items() if not k.startswith("ln_")}, others)


def _gpt_neox(c: Config):
    layers = {
        "input_layernorm": FIRST_NORM, "post_attention_layernorm": SECOND_NORM, "mlp.dense_h_to_4h": UP,
        "mlp.dense_4h_to_h": DOWN, "attention.query_key_value": (QKV, by_key_head), "attention.dense": OUT,
    }  # fmt: skip
    others = {"gpt_neox.embed_in": EMBEDDING, "gpt_neox.final_layer_norm": NORM, "embed_out": HEAD}
    return table("gpt_neox.layers.{}.", layers, others)


def _opt(c: Config):
    before = c.norm_places == "before"
    layers = {
        "self_attn_layer_norm": FIRST_NORM if before else f"{LAYER}attention_sum_norm",
        "final_layer_norm": SECOND_NORM if before else f"{LAYER}mlp_sum_norm", "self_attn.out_proj": OUT, "fc1": UP,
        "fc2": DOWN, **{f"self_attn.{letter}_proj": name for letter, name in zip("qkv", QKV, strict=True)},
    }  # fmt: skip
    others = {
        "model.decoder.embed_tokens": EMBEDDING, "model.decoder.embed_positions": POSITIONS,
        "model.decoder.final_layer_norm": NORM, "model.decoder.project_in": "model.project_in",
        "model.decoder.project_out": "model.project_out", "lm_head": HEAD,
    }  # fmt: skip
    return table("model.decoder.layers.{}.", layers, others)


def _mpt(c: Config):
    layers = {
        "norm_1": FIRST_NORM, "norm_2": SECOND_NORM, "attn.Wqkv": (QKV, in_turn), "attn.out_proj": OUT,
        "ffn.up_proj": UP, "ffn.down_proj": DOWN,
    }  # fmt: skip
    return table("transformer.blocks.{}.", layers, {"transformer.wte": EMBEDDING, "transformer.norm_f": NORM})


# What differs from Llama's names, in families that have most of them.
HEAD_NORMS = {
    "self_attn.q_layernorm": f"{LAYER}self_attn.q_norm", "self_attn.k_layernorm": f"{LAYER}self_attn.k_norm",
}  # fmt: skip
FUSED_MLP = {"mlp.gate_up_proj": (GATE_UP, halves)}
STARCODER = {"mlp.c_fc": UP, "mlp.c_proj": DOWN}
GEMMA = {
    "post_attention_layernorm": AFTER_ATTENTION, "pre_feedforward_layernorm": SECOND_NORM,
    "post_feedforward_layernorm": AFTER_MLP,
}  # fmt: skip
OLMO = {"post_attention_layernorm": AFTER_ATTENTION, "post_feedforward_layernorm": AFTER_MLP}
GLM4 = {**FUSED_MLP, "post_self_attn_layernorm": AFTER_ATTENTION, "post_mlp_layernorm": AFTER_MLP}
PHI = {"self_attn.dense": OUT, "mlp.fc1": UP, "mlp.fc2": DOWN, **HEAD_NORMS}
PHI3 = {**FUSED_MLP, "self_attn.qkv_proj": (QKV, in_turn)}
MIXTRAL = {
    "block_sparse_moe.gate": ROUTER, "block_sparse_moe.experts.{}.w1": f"{EXPERT}gate_proj",
    "block_sparse_moe.experts.{}.w3": f"{EXPERT}up_proj", "block_sparse_moe.experts.{}.w2": f"{EXPERT}down_proj",
}  # fmt: skip
GPT_OSS = {
    "mlp.router": ROUTER,
    "mlp.experts.gate_up_proj": ((f"{EXPERT}gate_proj", f"{EXPERT}up_proj"), alternating, True, False, True),
    "mlp.experts.down_proj": ((f"{EXPERT}down_proj",), None, True, False, True),
}  # fmt: skip
STACKED_EXPERTS = {
    "mlp.experts.gate_up_proj": ((f"{EXPERT}gate_proj", f"{EXPERT}up_proj"), expert_halves, False, False, True),
    "mlp.experts.down_proj": ((f"{EXPERT}down_proj",), None, False, False, True),
}  # fmt: skip
STABLELM = {
    f"self_attn.{letter}_layernorm.norms.{{}}": ((f"{LAYER}self_attn.{letter}_norm",), None, False, True)
    for letter in "qk"
}  # fmt: skip

TABLES: dict[str, Callable[[Config], tuple[Row, ...]]] = {
    "bloom": _bloom,
    "falcon": _falcon,
    "gemma2": lambda c: table(LAYER, GEMMA, {}),
    "gemma3_text": lambda c: table(LAYER, GEMMA, {}),
    "glm": lambda c: table(LAYER, FUSED_MLP, {}),
    "glm4": lambda c: table(LAYER, GLM4, {}),
    "gpt2": lambda c: _gpt2_like(in_turn, turned=True),
    "gpt_bigcode": lambda c: _gpt2_like(in_turn if c.num_key_value_heads == 1 else by_key_head, turned=False),
    "gpt_neox": _gpt_neox,
    "gpt_oss": lambda c: table(LAYER, GPT_OSS, {}),
    "mixtral": lambda c: table(LAYER, MIXTRAL, {}),
    "mpt": _mpt,
    "olmo2": lambda c: table(LAYER, OLMO, {}),
    "olmo3": lambda c: table(LAYER, OLMO, {}),
    "opt": _opt,
    "phi": lambda c: table(LAYER, PHI, {"model.final_layernorm": NORM}),
    "phi3": lambda c: table(LAYER, PHI3, {}),
    "stablelm": lambda c: table(LAYER, STABLELM, {}),
    "starcoder2": lambda c: table(LAYER, STARCODER, {}),
}


def rows_in_files(c: Config) -> tuple[Row, ...]:
    """How the tensors in a family's files are called and laid out."""
    return TABLES[c.family](c) if c.family in TABLES else ()


def rows_in_memory(c: Config) -> tuple[Row, ...]:
    """The same for the modules of transformers 5, whose names PEFT has: there all mixtures of experts are stacked.

    Mixtral's block_sparse_moe and GPT-NeoX's embed_out, which are only its files', have Llama's names there.
    """
    rows = tuple(row for row in rows_in_files(c) if not re.search("block_sparse_moe|embed_out", row.theirs))
    if not c.experts or any(row.stacked for row in rows):
        return rows
    return *rows, *table(LAYER, STACKED_EXPERTS, {})


# How the name of a parameter with all experts ends.
STACKED = {"weight": "", "bias": "_bias"}

# Ends of the names of buffers that old files hold beside the parameters.
BUFFERS = ("rotary_emb.inv_freq", ".attention.masked_bias", ".attention.bias", ".attn.masked_bias", ".attn.bias")


class Piece(NamedTuple):
    """Where a tensor of ours is in their files: in the tensors called `theirs` (several: one for each of its rows).

    index: which of the modules it is that `row` puts together. expert: of which expert, where theirs has all.
    """

    theirs: tuple[str, ...]
    row: Row
    index: int
    expert: int | None = None


class Names:
    """The names and layout of a model's tensors in its family's files, or by another of the tables."""

    def __init__(self, config: Config, rows: Callable[[Config], tuple[Row, ...]] = rows_in_files):
        self.config, self.rows = config, rows(config)
        self._patterns = [
            (re.compile(re.escape(name).replace(r"\{\}", r"(\d+)")), row, index)
            for row in self.rows
            for index, name in enumerate(row.ours)
        ]

    def piece(self, name: str) -> Piece:
        """Where our tensor `name` is."""
        module, dot, leaf = name.rpartition(".")
        for pattern, row, index in self._patterns:
            match = pattern.fullmatch(module)
            if match and row.each_head:
                heads = self.config.num_attention_heads if ".q_" in name else self.config.num_key_value_heads
                return Piece(tuple(f"{row.theirs.format(*match.groups(), h)}.{leaf}" for h in range(heads)), row, 0)
            if match and row.stacked:
                layer, expert = match.groups()
                return Piece((row.theirs.format(layer) + STACKED[leaf],), row, index, int(expert))
            if match:
                return Piece((row.theirs.format(*match.groups()) + dot + leaf,), row, index)
        return Piece((name,), Row(name, (name,)), 0)

    def take(self, piece: Piece, tensors: list[Tensor]) -> Tensor:
        """Ours, a view if that can be, of their tensors that `piece` names; of its expert alone where they have all."""
        if piece.row.each_head:
            return torch.stack(tensors)
        tensor = tensors[0].T if piece.row.turned and tensors[0].dim() == 2 else tensors[0]
        if piece.row.rows is None:
            return tensor
        groups, sizes = piece.row.rows(self.config)
        if tensor.dim() == 0 or tensor.size(0) != groups * sum(sizes):
            raise ValueError(
                f"{piece.theirs[0]} is {tuple(tensor.shape)}: expected {groups * sum(sizes)} rows or columns"
            )
        start = sum(sizes[: piece.index])
        part = tensor.unflatten(0, (groups, sum(sizes)))[:, start : start + sizes[piece.index]]
        return part.flatten(0, 1)

    def theirs(self, ours: list[str]) -> dict[str, list[str]]:
        """The names of their tensors, in our order, and which of the tensors `ours` each holds."""
        held = {}
        for name in ours:
            for theirs in self.piece(name).theirs:
                held.setdefault(theirs, []).append(name)
        return held

    def join(self, theirs: str, ours: list[str], tensors: list[Tensor]) -> Tensor:
        """Their tensor, of ours that it holds (as `theirs` gives them)."""
        piece = self.piece(ours[0])
        if piece.row.each_head:
            return tensors[0][piece.theirs.index(theirs)]
        if piece.row.stacked:
            n = len(piece.row.ours)  # of each expert
            each = [tensors[start : start + n] for start in range(0, len(tensors), n)]
            return torch.stack([self._put_together(piece, own) for own in each])
        return self._put_together(piece, tensors)

    def spread(self, piece: Piece, tensor: Tensor) -> Tensor:
        """A part's rows at their places among those of all parts, and zeros elsewhere: what `take` takes again."""
        if piece.row.rows is None:
            return tensor
        groups, sizes = piece.row.rows(self.config)
        parts = [tensor.new_zeros(groups * size, *tensor.shape[1:]) for size in sizes]
        parts[piece.index] = tensor
        return self._put_together(piece._replace(row=piece.row._replace(turned=False)), parts)

    def _put_together(self, piece, tensors):
        tensor = tensors[0]
        if piece.row.rows is not None:
            groups, _ = piece.row.rows(self.config)
            tensor = torch.cat([tensor.unflatten(0, (groups, -1)) for tensor in tensors], dim=1).flatten(0, 1)
        return tensor.T.contiguous() if piece.row.turned and tensor.dim() == 2 else tensor
