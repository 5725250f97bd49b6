"""Tensor parallelism (Shoeybi et al. 2019, arXiv 1909.08053): each device has a part of every layer.

Which part, says part.py. Attention's outputs, and the MLP's, are then parts of a sum: `connect` adds them up where they
leave, and the gradients of their inputs where those entered. Embedding, norms and head are the same on all devices.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_reduce

from model import JointNorm, Transformer
from training.parallel.part import COLUMNS, Part


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
    for block in (model.model.layers[number] for number in part.layers):
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
