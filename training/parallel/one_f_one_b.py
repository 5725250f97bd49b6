"""Micro-batches through the stages of a pipeline in the order of 1F1B, by torch's `Schedule1F1B`.

As soon as all stages are busy, each takes one micro-batch forward and one backward in turn (Narayanan et al. 2019,
arXiv 1806.03377). So stage k of S (from 0) keeps the activations of S - k micro-batches at most, and of the n + S - 1
turns that n micro-batches take it is idle in S - 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from model import Transformer
from training.parallel.stages import Link


class Stage(PipelineStage):
    """This device's stage for the micro-batches of one step, whose sizes differ.

    torch's own stage has room for as many equal tensors as there are micro-batches, all the time. This one makes room
    for the hidden states of a micro-batch before they arrive, and gives it back when they have gone backward.
    """

    def __init__(
        self, model: Transformer, link: Link, shapes: list[torch.Size], hidden_states: Callable[[int], Tensor]
    ):
        """shapes: (B, T) of each micro-batch. hidden_states: of its number, what this stage makes of `link.arrived`."""
        device = model.model.embed_tokens.weight.device
        self.link, self.shapes, self.width = link, shapes, model.config.hidden_size
        self.dtype = model.block_dtype(device)
        nothing = torch.empty(0, dtype=self.dtype, device=device, requires_grad=True)
        super().__init__(
            _Passes(link, hidden_states), link.stage, link.stages, device,
            input_args=(nothing,) if link.stage else (), output_args=(nothing,), group=link.group,
        )  # fmt: skip

    def run(self, loss: Callable[[Tensor, int], Tensor]) -> None:
        """All micro-batches, forward and backward. loss: of what the head gets and their number, what is minimised."""

        def numbered(x, number):
            return loss(x, int(number))

        count = len(self.shapes)
        schedule = Schedule1F1B(self, count, numbered, scale_grads=False)
        numbers = torch.arange(count)
        self.link.by_itself = False
        try:
            schedule.step(number=numbers, target=numbers, return_outputs=False)
        except RuntimeError as error:  # in which torch wraps what a forward pass raises, such as a lack of memory
            raise error.__cause__ or error from None
        finally:
            self.link.by_itself = True

    def _validate_stage_tensors(self, *_):
        """Nothing: with TORCH_DISTRIBUTED_DEBUG torch would compare sizes, which differ, with those it was told."""

    def _warmup_forward_vote(self, *_: Any, **__: Any) -> Tensor:
        """1, as at every stage: sizes are known. torch would ask all stages before each step, and the host would wait.

        So it would open NCCL's connections; `ranks.make_ranks` does that once.
        """
        return torch.ones(())

    _warmup_backward_result = _warmup_forward_vote

    def _room(self, number):
        return torch.empty(*self.shapes[number], self.width, dtype=self.dtype, device=self.device)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list:
        """Make room for what the stage before sends, and say so."""
        for info in () if self.is_first else self.args_recv_info[fwd_chunk_id]:
            info.buffer = self._room(fwd_chunk_id)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list:
        """Make room for the gradient that the next stage sends, and say so."""
        for info in () if self.is_last else self.grad_recv_info[bwd_chunk_id]:
            info.buffer = self._room(bwd_chunk_id)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def backward_one_chunk(self, bwd_chunk_id: int, *arguments: Any, **more: Any) -> None:
        """A backward pass, after which nothing of the micro-batch is kept."""
        super().backward_one_chunk(bwd_chunk_id, *arguments, **more)
        for info in (*self.args_recv_info[bwd_chunk_id], *self.grad_recv_info.get(bwd_chunk_id, ())):
            info.buffer = None


class _Passes(nn.Module):
    """What `PipelineStage` calls: the hidden states that have arrived, and the number of their micro-batch."""

    def __init__(self, link, hidden_states):
        super().__init__()
        self.link, self.hidden_states = link, hidden_states

    def forward(self, arrived: Tensor | None = None, *, number: Tensor) -> Tensor:
        self.link.arrived = arrived
        try:
            return self.hidden_states(int(number))
        finally:
            self.link.arrived = None
