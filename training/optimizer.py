"""AdamW as the command line asks for it, its learning rate, by steps or by time, and its step in the backward pass."""

import contextlib
import math
import time
from collections import Counter

import torch

from quantize import bitsandbytes


def build_optimizer(s, model):
    """AdamW over the trainable parameters; norms and biases do not decay."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": s.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    options = {"lr": s.learning_rate, "betas": (s.beta1, s.beta2)}
    if s.optimizer == "adamw":
        # Fabric cannot clip gradients under a loss scaler for the fused one, which would unscale them itself.
        return torch.optim.AdamW(groups, **options, fused=s.precision != "16-mixed")
    optim = bitsandbytes().optim
    kinds = {
        "adamw-8bit": optim.AdamW8bit,
        "adamw-paged": optim.PagedAdamW32bit,
        "adamw-8bit-paged": optim.PagedAdamW8bit,
    }
    return kinds[s.optimizer](groups, **options)


def learning_rate(s, step, total):
    """The rate of a step (from 0): a linear warm-up that starts above zero, then the schedule down to zero."""
    return rate_at(s, step, (step - s.warmup_steps) / max(1, total - s.warmup_steps))


def rate_at(s, step, progress):
    """The same, where what is done of the schedule after the warm-up, from 0 to 1, is known instead of the total."""
    if step < s.warmup_steps:
        return s.learning_rate * (step + 1) / (s.warmup_steps + 1)
    course = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}
    return s.learning_rate * course[s.schedule]


RECENT = {"step": 50, "validation": 4, "save": 4}  # so many of the last ones count the most in a mean
REPORT_SECONDS = 5  # that the prediction, the plot and the summary take at the end of a run, about


class TimeBudget:
    """How far a run is through its wall-clock time: its place on the schedule, and whether another step fits.

    How many steps there will be is not known beforehand. After each, those still to come are estimated: the time that
    is left, less the last validation and the saving of `final/`, over what a step takes with its share of the periodic
    validations and saves. The progress moves by a step's share of what it has left: evenly when steps take as long as
    they did, never backwards, and to the end with the last one. `mean` has the measured seconds of a "step", a
    "validation" and a "save".

    seconds: of the whole run; infinite for one that has no budget. started: time.monotonic() when this session began.
    state: what `state` was at the checkpoint that is resumed. The time after it, in a session that was killed, is not
    counted.
    """

    def __init__(self, seconds, started, state=None):
        self.seconds, self.started = seconds, started
        state = state or {"spent": 0.0, "progress": 0.0, "mean": {}, "count": {}}
        self._earlier, self.progress = state["spent"], state["progress"]
        self.mean, self._count = dict(state["mean"]), Counter(state["count"])

    def state(self):
        return {"spent": self.spent(), "progress": self.progress, "mean": self.mean, "count": dict(self._count)}

    def spent(self):
        return self._earlier + time.monotonic() - self.started

    @contextlib.contextmanager
    def measuring(self, what):
        """Time the block. The first one, which is slow, leaves no trace in the mean."""
        before = time.monotonic()
        yield
        seconds = time.monotonic() - before
        weight = max(1 / max(1, self._count[what]), 1 / RECENT[what])
        self.mean[what] = weight * seconds + (1 - weight) * self.mean.get(what, 0.0)
        self._count[what] += 1

    def guess(self, what, seconds):
        """What to reckon with until it is measured."""
        if not self._count[what]:
            self.mean[what] = seconds

    def _left(self):
        """Seconds for steps."""
        last = 1.25 * (self.mean.get("validation", 0.0) + self.mean.get("save", 0.0))
        return self.seconds - self.spent() - last - REPORT_SECONDS

    def another_fits(self, due=()):
        """Whether there is time for another step after what is "due" before it."""
        return self._left() >= self.mean["step"] + sum(self.mean.get(what, 0.0) for what in due)

    def advance(self, most, intervals):
        """Move the progress past a step. most: steps still to come at most. intervals: of what is due at times."""
        each = self.mean["step"] + sum(self.mean.get(what, 0.0) / n for what, n in intervals.items() if n)
        still = min(most, max(0.0, self._left() / each))
        self.progress += (1 - self.progress) / (still + 1)


class StepInBackward:
    """Lets each weight step when its gradient is complete, and frees it: there is never more than one gradient.

    At such a moment no other weight has a gradient, so a step of the whole optimiser is the step of that weight.
    From the first gradient that is not finite on no weight steps any more: it is `stopped`.
    """

    def __init__(self, model, optimizer):
        self.optimizer, self.stopped, self._squares = optimizer, False, []
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(self._step)

    def _step(self, parameter):
        square = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32).square()  # and no copy of it in fp32
        self._squares.append(square)
        self.stopped = self.stopped or not square.isfinite()
        if not self.stopped:
            self.optimizer.step()
        parameter.grad = None

    def take_norm(self):
        """The norm of the gradient of all weights that have come since the last call."""
        norm = torch.stack(self._squares).sum().sqrt()
        self._squares.clear()
        return norm

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    @property
    def state(self):
        return self.optimizer.state
