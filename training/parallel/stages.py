"""The stages of a pipeline: what stands in the place of what other stages have, and how hidden states go through.

A stage is a `Transformer` whose `embed` gives what has arrived from the stage before. Other stages' blocks do nothing.
So what calls a model need not know: it finds hidden states and losses of the right shapes on each device. They are the
true ones at the last stage alone, and `Ranks.sum` takes those. With gradients pipeline.py runs the stages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from model import Transformer


class BlockElsewhere(nn.Module):
    """In the place of a block that another stage has."""

    def forward(self, x: Tensor, angles: Any, attention: Any, cache: Any = None, routed: bool = False) -> Any:
        """x as it is, and no experts' logits."""
        return (x, None) if routed else x


class EmbeddingElsewhere(nn.Module):
    """In the place of an embedding that the first stage has: nothing but its width and its device."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.register_buffer("weight", weight.detach().new_empty(0, weight.size(1)), persistent=False)


class HeadElsewhere(nn.Module):
    """In the place of the head, which the last stage has: its logits are zeros, whose losses nobody counts."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.vocab_size = vocab_size

    def forward(self, x: Tensor) -> Tensor:
        """Zeros (..., V), without gradient."""
        return x.new_zeros(()).expand(*x.shape[:-1], self.vocab_size)


class Link:
    """What connects a stage with the one before it and the one after it, both in one process group.

    arrived: the hidden states to go on from, if they are there already; otherwise they are received when they are asked
    for, and what this stage makes of them is sent on: for passes without gradient.
    """

    def __init__(self, stage: int, stages: int, group: Any):
        self.stage, self.stages, self.group = stage, stages, group
        self.arrived: Tensor | None = None
        self.by_itself = True
        self.sending: list[tuple[Any, Tensor]] = []

    def connect(self, model: Transformer) -> None:
        """Let a model, `Part.model`, be this stage."""
        embed, finish, width = model.embed, model.finish, model.config.hidden_size

        def arriving(tokens, positions, noise=None):
            if self.stage == 0:
                return embed(tokens, positions, noise)
            return self.receive(tokens, model.block_dtype(tokens.device), width) if self.by_itself else self.arrived

        def leaving(x):
            if self.stage == self.stages - 1:
                return finish(x)
            x = x.to(model.block_dtype(x.device))  # for which the next stage has room: autocast may have left another
            if self.by_itself:
                self.send(x)
            return x

        model.embed, model.finish = arriving, leaving

    def receive(self, tokens: Tensor, dtype: torch.dtype, width: int) -> Tensor:
        """Wait for the hidden states (B, T, D) of tokens (B, T) from the stage before."""
        x = torch.empty(*tokens.shape, width, dtype=dtype, device=tokens.device)
        dist.recv(x, group=self.group, group_src=self.stage - 1)
        return x

    def send(self, x: Tensor) -> None:
        """Begin to send hidden states to the next stage, after those before have left."""
        self.flush()
        x = x.detach().contiguous()
        self.sending.append((dist.isend(x, group=self.group, group_dst=self.stage + 1), x))

    def flush(self) -> None:
        """Wait until all has left."""
        for request, _ in self.sending:
            request.wait()
        self.sending.clear()
