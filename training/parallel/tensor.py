"""Tensor parallelism (Shoeybi et al. 2019, arXiv 1909.08053): each device has a part of every layer.

A device's model is a smaller one of the same kind: fewer heads, a narrower MLP, fewer of the experts. So adapters,
quantisers, kernels and the memory plan meet nothing new. Attention's outputs, and the MLP's, are then parts of a sum:
`connect` adds them up where they leave, and the gradients of their inputs where those entered. Embedding, norms and
head are the same on all devices.

    q, k, v, gate, up    rows are divided: by heads (of keys and values, with their queries), by the MLP's inner numbers
    o, down              columns are divided in the same way; a bias is added by the first device alone
    experts              whole ones, E / n for each device; the router is everywhere, as every device has all tokens

`Part.place` says the same of each parameter by its name: one function for all families, as they share these names.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_reduce

from adapters.adapter import place as place_of
from experts import Elsewhere
from model import Config, JointNorm, Transformer
from ops.dequantize import BLOCK
from quantize import Cut, check_divisible
from shell.cli import UserError

ROWS = {"q_proj": "q", "k_proj": "kv", "v_proj": "kv", "gate_proj": "inner", "up_proj": "inner"}
COLUMNS = {"o_proj": "q", "down_proj": "inner"}


class Place(NamedTuple):
    """Where a device's part of a parameter lies in the whole: from `start` to before `stop` along `dim`.

    dim: None if the device has all of it. summed: over whom its gradient is to be added up, as each device finds only
    what its part of the layer adds to it: over all along tensor, or over those that have the same keys and values.
    """

    dim: int | None = None
    start: int = 0
    stop: int = 0
    summed: Literal["tensor", "kv"] | None = None


@dataclasses.dataclass(frozen=True)
class Part:
    """Device `rank` of `count` along tensor, of a model with this `Config`. With one device it is the whole model."""

    config: Config
    rank: int = 0
    count: int = 1

    def __post_init__(self):
        c, flag = self.config, f"--parallel tensor={self.count}"
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
        c = self.config
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
        for block in model.model.layers if self.count > 1 else ():
            if block.sparse:
                for number in set(range(self.config.experts.count)) - set(self.experts()):
                    block.mlp.experts[number] = Elsewhere()
            if self.rank:
                for layer in (block.self_attn.o_proj, getattr(block.mlp, "down_proj", None), _shared_down(block.mlp)):
                    if layer is not None:
                        layer.bias = None
        return model


def check_quantized(config: Config, count: int, quantization: str | dict | None) -> None:
    """Raise UserError if what `count` devices along tensor have of layers cannot be quantised, or divided by --shard.

    quantization: as `quantize.read_quantization` returns it.
    """
    for rank in range(count) if quantization else ():
        with torch.device("meta"):
            check_divisible(quantization, Part(config, rank, count).model())


def _share(total, rank, count):
    """The range of a device of several, whose sizes differ by one at most."""
    return total * rank // count, total * (rank + 1) // count


def _unit(size):
    """An MLP is cut between blocks of weights that share a scale in 4 bits, if they fit in its rows."""
    return BLOCK if size % BLOCK == 0 else 1


def _shared_down(mlp):
    return getattr(getattr(mlp, "shared_expert", None), "down_proj", None)


# ----------------------------------------------------------------------------------------- where parts are added up


class _Enter(torch.autograd.Function):
    """The same going forward; backward the sum of what the devices' parts find for the gradient."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Leave(torch.autograd.Function):
    """The sum of the devices' parts going forward; backward each part has the gradient of the sum."""

    @staticmethod
    def forward(ctx, y, group):
        y = y.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(y, group=group)
        return y

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _Divide(torch.autograd.Function):
    """The same going forward; backward a device's share of the gradient, where all find the same one."""

    @staticmethod
    def forward(ctx, x, count):
        ctx.count = count
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad / ctx.count, None


class JointNormPart(JointNorm):
    """`JointNorm` over heads of which this device has some."""

    @classmethod
    def of(cls, norm: JointNorm, group: Any, whole: int, copies: int) -> JointNormPart:
        """Of this device's norm. whole: of how many numbers the mean is taken. copies: how often each head is there."""
        part = cls.__new__(cls)
        part.__dict__ = norm.__dict__
        part.group, part.whole, part.copies = group, whole, copies
        return part

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, heads, d) in x's dtype."""
        squares = x.float().square().sum((-2, -1), keepdim=True) / self.copies
        mean = all_reduce(squares, group=self.group) / self.whole
        normed = x.float() * (mean + self.eps).rsqrt()
        weight = self.weight.view(x.shape[-2:])
        return normed.to(x.dtype) * (1 + weight if self.plus_one else weight).to(x.dtype)


def connect(model: Transformer, part: Part, group: Any) -> None:
    """Let the parts of several devices along tensor, who are the process group, work together as one model."""

    def enter(module, args):
        return (_Enter.apply(args[0], group), *args[1:])

    def leave(module, args, result):
        if not isinstance(result, tuple):
            return _Leave.apply(result, group)
        return _Leave.apply(result[0], group), _Divide.apply(result[1], part.count)

    c = part.config
    for block in model.model.layers:
        for module in (block.self_attn, block.mlp):
            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave)
        if c.qk_norm == "joint":
            attention, d = block.self_attn, c.head_dim
            attention.q_norm = JointNormPart.of(attention.q_norm, group, c.num_attention_heads * d, 1)
            attention.k_norm = JointNormPart.of(attention.k_norm, group, c.num_key_value_heads * d, part.sharers)


def connect_adapters(model: Transformer, group: Any) -> None:
    """Let DoRA's row norms be of whole rows, where a device has some of a layer's columns."""
    for name, module in model.named_modules():
        if hasattr(module, "over_columns") and name.rpartition(".")[2] in COLUMNS and ".experts." not in name:
            module.over_columns = lambda norms: norms_of_whole_rows(norms, group)


def norms_of_whole_rows(norms: Tensor, group: Any) -> Tensor:
    """Row norms (out,) of a weight, from those of the columns that each device of a process group has."""
    squares = norms.square()
    dist.all_reduce(squares, group=group)
    return squares.sqrt()
