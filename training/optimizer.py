"""The optimisers of `--optimizer`, and one that updates each weight within the backward pass.

To add one: a function that makes it, one for the bytes of its states, and a row in `OPTIMIZERS`. Those that neither
torch nor bitsandbytes has are in update_rules.py; mezo.py has the one that needs no backward pass.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from quantize import bitsandbytes
from training.mezo import MeZO
from training.update_rules import Apollo, Averaging, ScheduleFreeAdamW, Together

if TYPE_CHECKING:
    from training.memory.plan import Job
    from training.settings import Settings

OUTSIDE = re.compile(r"(^|\.)(embed_tokens|embed_positions|lm_head|project_in|project_out)(\.|$)")  # of the blocks


def build_optimizer(s: Settings, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of `--optimizer` over the trainable parameters; norms and biases do not decay."""
    return OPTIMIZERS[s.optimizer].build(parameter_groups(s, model), s)


def parameter_groups(s: Settings, model: nn.Module) -> list[dict]:
    """The trainable parameters, each with its name, in groups of one weight decay and one learning rate.

    rate_ratio: the group's learning rate, as a multiple of the step's. With LoRA+ (Hayou et al. 2024, arXiv 2402.12354)
    it is --lora_plus_ratio for B and, as in PEFT, for vectors (DoRA's magnitudes).
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            vector = parameter.dim() < 2
            ratio = s.lora_plus_ratio if vector or name.endswith("lora_B") else 1.0
            groups.setdefault((vector, ratio), []).append((name, parameter))
    return [
        {"params": pairs, "weight_decay": decay(s, pairs[0][1]), "rate_ratio": ratio}
        for (_, ratio), pairs in sorted(groups.items(), key=lambda item: item[0])
    ]


def decay(s: Settings, parameter: Tensor) -> float:
    """The weight decay of a parameter: norms and biases have none."""
    return s.weight_decay if parameter.dim() >= 2 else 0.0


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is a matrix of a block: no embedding, no head, no norm, no bias. name: in model or block."""
    return parameter.dim() == 2 and not OUTSIDE.search(name)


def begin_step(optimizer: torch.optim.Optimizer | InBackward, rate: float, micro_batches: int) -> None:
    """Before the first micro-batch of a step, of which there are so many: set the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate_ratio", 1.0)
    if isinstance(optimizer, InBackward):
        optimizer.expect(micro_batches)


@contextlib.contextmanager
def weights_to_keep(optimizer: torch.optim.Optimizer | InBackward) -> Iterator[None]:
    """Inside, the model has the weights that are validated and saved: of an optimiser that averages them, the average.

    Afterwards it has those that train again, the same bits.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # in Fabric's wrapper, or in the backward pass
    if not isinstance(inner, Averaging):
        yield
        return
    inner.average()
    try:
        yield
    finally:
        inner.go_on()


def go_on(optimizer: torch.optim.Optimizer | InBackward) -> None:
    """After a checkpoint's states were loaded: give the model the weights that train, if others were saved."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if isinstance(inner, Averaging):
        inner.go_on()


# ------------------------------------------------------------------------------------------------ making each of them


def fused_adamw(groups: list[dict], s: Settings) -> torch.optim.Optimizer:
    """torch's AdamW, whose states are of the parameters' dtype."""
    # Fabric cannot clip gradients under a loss scaler for the fused one, which would unscale them itself.
    return torch.optim.AdamW(groups, lr=s.learning_rate, betas=s.betas, fused=s.precision != "16-mixed")


def bitsandbytes_optimizer(name: str) -> Callable[[list[dict], Settings], torch.optim.Optimizer]:
    """Of bitsandbytes' optimisers the one of this name."""

    def build(groups, s):
        return getattr(bitsandbytes().optim, name)(groups, lr=s.learning_rate, betas=s.betas)

    return build


def sgd(groups: list[dict], s: Settings) -> torch.optim.Optimizer:
    """torch's stochastic gradient descent, with --beta1 as its momentum. Its decay is in the gradient (L2).

    Not fused: on a CPU torch 2.13's fused step with momentum leaves bf16 weights as they are.
    """
    return torch.optim.SGD(groups, lr=s.learning_rate, momentum=s.betas[0])


def adafactor(groups: list[dict], s: Settings) -> torch.optim.Optimizer:
    """torch's Adafactor (Shazeer and Stern 2018, arXiv 1804.04235), with --learning_rate as the size of a step.

    torch multiplies the rate by the larger of a weight's root mean square and eps[1]. At 1e-3, its default, LoRA's B,
    which is zero, would hardly move; at 1 the rate is as AdamW's for all weights that are not larger than that. eps[0]
    squared is the paper's 1e-30; torch's default is the dtype's precision, more than bf16's gradients.
    """
    return torch.optim.Adafactor(groups, lr=s.learning_rate, eps=(1e-15, 1.0))


def muon(groups: list[dict], s: Settings) -> torch.optim.Optimizer:
    """torch's Muon for the blocks' matrices (LoRA's A and B too), AdamW for embeddings, head, norms and biases.

    Its steps are as large as AdamW's (Liu et al. 2025, arXiv 2502.16982), so one --learning_rate serves both.
    """
    hidden, others = split(groups, is_hidden_matrix)
    parts = [torch.optim.Muon(hidden, lr=s.learning_rate, adjust_lr_fn="match_rms_adamw")] if hidden else []
    return Together([*parts, fused_adamw(others, s)] if others else parts)


def apollo(groups: list[dict], s: Settings) -> torch.optim.Optimizer:
    """`Apollo` for the blocks' matrices that are larger than --apollo_rank both ways, AdamW for all else."""
    projected, others = split(groups, lambda name, parameter: is_projected(name, parameter, s))
    parts = [Apollo(projected, s)] if projected else []
    return Together([*parts, fused_adamw(others, s)] if others else parts)


def is_projected(name: str, parameter: Tensor, s: Settings | Job) -> bool:
    """Whether APOLLO keeps the moments of a projection of this parameter's gradient."""
    return is_hidden_matrix(name, parameter) and min(parameter.shape) > s.apollo_rank


def split(groups: list[dict], chosen: Callable[[str, Tensor], bool]) -> tuple[list[dict], list[dict]]:
    """Of groups of named parameters those with the chosen ones, and those with the others."""

    def part(wanted):
        parts = [{**g, "params": [pair for pair in g["params"] if chosen(*pair) == wanted]} for g in groups]
        return [group for group in parts if group["params"]]

    return part(True), part(False)


# ----------------------------------------------------------------------------------- bytes of the states of a parameter


def moment_bytes(s: Settings | Job, named: Iterable[tuple[str, Tensor]], device: str) -> int:
    """What the optimiser of `s` keeps for parameters, given with their names, in bytes. device: as in `Optimizer`."""
    return sum(OPTIMIZERS[s.optimizer].moment_bytes(parameter, device, name, s) for name, parameter in named)


def as_parameter(times: float) -> Callable:
    """So many numbers for each of the parameter's, in its dtype."""
    return lambda parameter, device, name, s: int(times * parameter.nbytes)


def in_fp32(times: int) -> Callable:
    """So many fp32 numbers for each of the parameter's."""
    return lambda parameter, device, name, s: 4 * times * parameter.numel()


def in_8_bits(times: int) -> Callable:
    """So many moments of a byte an element, and an fp32 scale for 256; those of small parameters are fp32."""

    def moments(parameter, device, name, s):
        n = parameter.numel()
        return times * (n + 4 * math.ceil(n / 256)) if n >= 4096 else 4 * times * n

    return moments


def paged(moments: Callable) -> Callable:
    """Moments that bitsandbytes keeps in memory that a full GPU pages out; those of small parameters stay there."""

    def on_device(parameter, device, name, s):
        pages = device not in ("cpu", "disk") and parameter.numel() >= 1e5
        return 0 if pages else moments(parameter, device, name, s)

    return on_device


def rows_and_columns(parameter: Tensor, device: str, name: str, s: Settings | Job) -> int:
    """Adafactor's: a number for each row and each column of a matrix, or for each element of a vector."""
    *rest, rows, columns = parameter.shape if parameter.dim() > 1 else (0, parameter.numel())
    return math.prod(rest) * (rows + columns) * parameter.element_size()


def muon_moments(parameter: Tensor, device: str, name: str, s: Settings | Job) -> int:
    """Muon's momentum, or AdamW's two moments."""
    return (1 if is_hidden_matrix(name, parameter) else 2) * parameter.nbytes


def apollo_moments(parameter: Tensor, device: str, name: str, s: Settings | Job) -> int:
    """Two moments of the projected gradient in fp32 and its last norm, or AdamW's."""
    if not is_projected(name, parameter, s):
        return 2 * parameter.nbytes
    return 8 * s.apollo_rank * max(parameter.shape) + 4


def schedule_free_moments(parameter: Tensor, device: str, name: str, s: Settings | Job) -> int:
    """The fast weights and a second moment; in a checkpoint, whose weights are the average, also those that train."""
    return (3 if device == "disk" else 2) * parameter.nbytes


def momentum_if_any(parameter: Tensor, device: str, name: str, s: Settings | Job) -> int:
    """SGD's momentum, which is not kept with --beta1 0."""
    return parameter.nbytes if s.betas[0] else 0


class Optimizer(NamedTuple):
    """A row of OPTIMIZERS.

    build: makes it from groups of parameters with names (as torch's optimisers take them) and the Settings.
    moment_bytes: what it keeps for a parameter, in bytes, for memory plan and disk: a function of the parameter,
        the type of its device ("cpu", "cuda", "meta" for a CUDA device that is not here; "disk" for a checkpoint), its
        name in the model or in its block, and the Settings or the plan's Job.
    gradient: the key of finetune.py's GRADIENTS: how a step's gradient is found.
    """

    build: Callable[[list[dict], Settings], torch.optim.Optimizer]
    moment_bytes: Callable[[Tensor, str, str, Settings | Job], int]
    gradient: str = "backward"


OPTIMIZERS = {
    "adamw": Optimizer(fused_adamw, as_parameter(2)),
    "adamw-8bit": Optimizer(bitsandbytes_optimizer("AdamW8bit"), in_8_bits(2)),
    "adamw-paged": Optimizer(bitsandbytes_optimizer("PagedAdamW32bit"), paged(in_fp32(2))),
    "adamw-8bit-paged": Optimizer(bitsandbytes_optimizer("PagedAdamW8bit"), paged(in_8_bits(2))),
    "lion": Optimizer(bitsandbytes_optimizer("Lion"), in_fp32(1)),
    "lion-8bit": Optimizer(bitsandbytes_optimizer("Lion8bit"), in_8_bits(1)),
    "muon": Optimizer(muon, muon_moments),
    "apollo": Optimizer(apollo, apollo_moments),
    "schedule-free": Optimizer(ScheduleFreeAdamW, schedule_free_moments),
    "adafactor": Optimizer(adafactor, rows_and_columns),
    "sgd": Optimizer(sgd, momentum_if_any),
    "mezo": Optimizer(MeZO, as_parameter(0), gradient="forward"),
}


class InBackward:
    """An optimiser that takes each weight's gradient away in the backward pass.

    After the first gradient that is not finite it is `stopped`: no weight is updated any more.
    early: whether weights may have changed before all gradients of a step are known to be finite.
    """

    stopped: bool
    early: bool

    def expect(self, micro_batches: int) -> None:
        """Before a step: it has so many micro-batches."""

    def take_norm(self) -> Tensor:
        """After the backward passes of a step: finish it. The norm of its gradients, a scalar in fp32."""
        raise NotImplementedError


class StepInBackward(InBackward):
    """Updates each weight as soon as its gradient is complete, then frees it: there is never more than one gradient.

    At that moment no other weight has a gradient, so a step of the whole optimiser is a step of that weight alone.
    """

    early = True

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer):
        self.optimizer, self.stopped, self._squares = optimizer, False, []
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._step)

    def _step(self, parameter):
        square = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32).square()  # and no copy of it in fp32
        self._squares.append(square)
        self.stopped = self.stopped or not square.isfinite()
        if not self.stopped:
            self.optimizer.step()
        parameter.grad = None

    def take_norm(self) -> Tensor:
        """The norm of the gradients of all weights since the last call, a scalar in fp32."""
        norm = torch.stack(self._squares).sum().sqrt()
        self._squares.clear()
        return norm

    @property
    def param_groups(self) -> list[dict]:
        """The optimiser's."""
        return self.optimizer.param_groups

    @property
    def state(self) -> dict:
        """The optimiser's, by parameter."""
        return self.optimizer.state
