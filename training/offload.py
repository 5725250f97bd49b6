"""AdamW whose fp32 weights and moments are in host memory, stepped there by the CPU (`--offload optimizer`)."""

from __future__ import annotations

import queue
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ops.offload import CopyStream, has_streams, host_bytes, host_tensor, laid_in
from training.optimizer import InBackward, decay, fused_adamw

if TYPE_CHECKING:
    from collections.abc import Iterable

    from training.settings import Settings

STAGED = 2  # gradients on their way, each in a pinned buffer: while one is added or stepped, the next one is copied
STATE_BYTES, GRADIENT_BYTES = 12, 4  # of an element in host memory: weight and two moments, and its gradient, in fp32


def buffer_bytes(parameters: Iterable[Tensor], pinned: bool) -> int:
    """Bytes of the buffers between host and device for weights like these."""
    return STAGED * host_bytes(max(parameter.nbytes for parameter in parameters), pinned)


class HostWeight:
    """A weight in host memory with its own AdamW, and the gradient of the step so far (None: none yet).

    Its state has torch's keys, and the fp32 weight as "weight": of bf16 weights it cannot be had from the model.
    """

    def __init__(self, parameter: nn.Parameter, s: Settings):
        self.parameter, self.gradient, self.norm, self.arrived = parameter, None, None, 0
        self.master = nn.Parameter(parameter.detach().to("cpu", torch.float32, copy=True))
        self.optimizer = fused_adamw([{"params": [self.master], "weight_decay": decay(s, parameter)}], s)
        state = {"exp_avg": torch.zeros_like(self.master), "exp_avg_sq": torch.zeros_like(self.master)}
        self.optimizer.state[self.master] = {"step": torch.zeros(()), **state, "weight": self.master.detach()}

    def add(self, gradient: Tensor) -> None:
        """A micro-batch's gradient, of the parameter's shape and dtype."""
        if self.gradient is None:
            self.gradient = gradient.to(torch.float32, copy=True)
        else:
            self.gradient += gradient
        self.arrived += 1

    def measure(self) -> Tensor:
        """The norm of the step's gradient, a scalar in fp32."""
        self.norm = torch.linalg.vector_norm(self.gradient)
        return self.norm

    def step(self, factor: Tensor | None) -> None:
        """Let AdamW step with the gradient, times `factor`, which is freed."""
        self.master.grad, self.gradient = self.gradient if factor is None else self.gradient.mul_(factor), None
        self.optimizer.step()
        self.master.grad = None

    def forget(self) -> None:
        """Be ready for the next step."""
        self.gradient, self.norm, self.arrived = None, None, 0


class OffloadedAdamW(InBackward):
    """AdamW in host memory: ZeRO-Offload on one device (Ren et al. 2021, arXiv 2101.06840).

    When a weight's gradient is complete it is copied to host memory and freed on the device, while the backward pass
    goes on; a thread adds it to those of the step's earlier micro-batches. If nothing is clipped, the thread lets AdamW
    step as soon as the step's last gradient of a weight has come, and copies the weight back. Else the norm of all
    gradients comes first, so that weights step after the backward pass.
    """

    def __init__(self, model: nn.Module, s: Settings):
        self.stopped, self.most, self.expected = False, s.max_grad_norm, 0
        # In the order of `build_optimizer`, matrices first: so the norm's sum is rounded in the same way.
        trainable = sorted((p for p in model.parameters() if p.requires_grad), key=lambda p: p.dim() < 2)
        self.weights = {parameter: HostWeight(parameter, s) for parameter in trainable}
        on_cuda = has_streams(trainable[0])
        self.down, self.up = CopyStream(on_cuda), CopyStream(on_cuda)
        self.buffers = queue.SimpleQueue()
        for _ in range(STAGED):
            self.buffers.put(host_tensor(max(p.nbytes for p in trainable), pinned=on_cuda))
        self.thread, self.jobs = ThreadPoolExecutor(1, "optimizer"), []
        for parameter in self.weights:
            parameter.register_post_accumulate_grad_hook(self._leave)

    @property
    def early(self) -> bool:
        """Whether weights step before the norm of all gradients is known."""
        return not self.most

    def expect(self, micro_batches: int) -> None:
        """So many gradients of each weight make up a step from now on."""
        self.expected = micro_batches

    def _leave(self, parameter):
        """Send a gradient to host memory: called by the backward pass, which waits here while all buffers are taken."""
        buffer, held = self.buffers.get(), [parameter.grad]
        parameter.grad = None
        copied = self.down.copy(laid_in(buffer, held[0]), held[0])
        self.jobs.append(self.thread.submit(self._receive, self.weights[parameter], buffer, held, copied))

    @torch.no_grad()
    def _receive(self, weight, buffer, held, copied):
        """Add a gradient that is copied into a buffer to its weight's; on the thread. held: the one on the device."""
        try:
            if copied is not None:
                copied.synchronize()
            held.clear()
            weight.add(laid_in(buffer, weight.parameter))
            if weight.arrived == self.expected:
                self._complete(weight, buffer)
        finally:
            self.buffers.put(buffer)

    def _complete(self, weight, buffer):
        finite = weight.measure().isfinite()
        if self.early:
            self.stopped = self.stopped or not finite
            if self.stopped:
                weight.gradient = None
            else:
                self._step(weight, buffer)

    def _step(self, weight, buffer, factor=None):
        """Step a weight in host memory, and copy it to the device through a buffer."""
        weight.step(factor)
        staged = laid_in(buffer, weight.parameter)
        staged.copy_(weight.master)
        sent = self.up.copy(weight.parameter, staged, computed=False)  # its last use was before its gradient
        if sent is not None:
            sent.synchronize()

    @torch.no_grad()
    def take_norm(self) -> Tensor:
        """Finish the step; the norm of its gradients before clipping, a scalar in fp32.

        If that is not finite, no weight steps any more.
        """
        for job in self.jobs:
            job.result()  # or its error
        self.jobs.clear()
        waiting = [weight for weight in self.weights.values() if weight.gradient is not None]
        for weight in waiting:
            if weight.norm is None:  # a micro-batch had no gradient for it
                weight.measure()
        norm = torch.linalg.vector_norm(torch.stack([w.norm for w in self.weights.values() if w.norm is not None]))
        if norm.isfinite() and not self.stopped:
            self._step_all(waiting, None if self.early else (self.most / (norm + 1e-6)).clamp(max=1.0))
        for weight in self.weights.values():
            weight.forget()
        return norm.to(next(iter(self.weights)).device)

    def _step_all(self, weights, factor):
        buffer = self.buffers.get()
        for weight in weights:
            self._step(weight, buffer, factor)
        self.buffers.put(buffer)

    @property
    def param_groups(self) -> list[dict]:
        """Those of every weight's AdamW, over the weights in host memory."""
        return [group for weight in self.weights.values() for group in weight.optimizer.param_groups]

    @property
    def state(self) -> dict:
        """AdamW's, by weight in host memory."""
        return {weight.master: weight.optimizer.state[weight.master] for weight in self.weights.values()}
