"""Objectives: what a step of training minimises. `--objective` names one.

To add an objective: a class like `CrossEntropy` and a line in `OBJECTIVES`. Its `losses` takes the model, its final
hidden states and a micro-batch, and returns a `Forward`. The mean that a step minimises is one over units: target
tokens, or whole samples (`batching.Samples.unit_counts`). So an objective gives sums over the units of a micro-batch;
`finetune.train_step` divides them by the step's number of units, which is known from the plan, and the gradient does
not depend on how a step is cut.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from batching import IGNORE, Batch, Samples
from experts import balance_loss
from model import Transformer
from ops.devices import numbers_on, to_device
from ops.noise import neftune_sizes
from shell.cli import UserError

if TYPE_CHECKING:
    from training.settings import Settings


class Forward(NamedTuple):
    """Of a micro-batch: the scalar whose gradient is taken, the loss of each unit (n,), and its number of positions.

    trained: the sum of the losses, and what is trained beside it but shown nowhere (--z_loss, --balance_loss).
    measured: sums over the units of what `Objective.columns` names, None where it names nothing.
    """

    trained: Tensor
    losses: Tensor
    positions: int
    measured: Tensor | None = None

    @property
    def summed(self) -> Tensor:
        """The sum of the losses, without gradient."""
        return self.losses.sum()

    def uncounted(self) -> Forward:
        """The same with a gradient of zeros, and nothing else to count."""
        return Forward(self.trained * 0, self.losses[:0], 0)


class Objective:
    """What a step minimises. The page's beginning says what to add.

    data: the kind of prepared folder that it takes (data.json's "kind"). unit: what its loss is a mean over, in words.
    is_likelihood: whether that loss is -log p of a token, which has a perplexity.
    columns: names of more columns of metrics.csv, each a mean over a step's units. flags: the beginnings of the flags
    of finetune.py that belong to it, and to no other unless that names them too.
    """

    data = "samples"
    unit = "target token"
    is_likelihood = True
    columns: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()

    def __init__(self, s: Settings):
        self.s = s

    def check(self) -> None:
        """Raise UserError if its flags do not go with one another."""

    def known(self, samples: Samples, indices: list[int]) -> dict[str, list[Tensor]]:
        """What is known of these samples beside their tokens: by its name, a tensor for each of them."""
        return {}

    def references(self) -> bool:
        """Whether `known` needs log-probabilities of the base: training/reference.py computes them before step 0."""
        return False

    def __call__(self, model: Transformer, batch: Batch) -> Forward:
        """The losses of a micro-batch, and --balance_loss times its balance loss, times its number of units.

        So a step, whose sum is divided by all its units, has each micro-batch's balance loss with its share of them.
        """
        routed = [] if self.s.balance_loss and model.training else None
        x = self.hidden_states(model, batch, routed)
        result = self.losses(model, x, batch)
        if not routed:
            return result
        balance = self.s.balance_loss * len(result.losses) * unevenness(model, batch, routed)
        return result._replace(trained=result.trained + balance)

    def hidden_states(self, model: Transformer, batch: Batch, routed: list[Tensor] | None = None) -> Tensor:
        """What the head gets, (B, T, E). routed: as in `Transformer.forward`."""
        tokens = to_device(batch.tokens, model.model.embed_tokens.weight.device)
        how = {"recompute": self.s.recompute, "offsets": batch.offsets, "noise": self.noise(model, batch)}
        return model.hidden_states(tokens, routed=routed, **how)

    def noise(self, model: Transformer, batch: Batch) -> Tensor | None:
        """--neftune_alpha: the size of the noise on each embedded token (B, T) in training, else None."""
        alpha, c, embedding = self.s.neftune_alpha, model.config, model.model.embed_tokens
        if not alpha or not model.training:
            return None
        counted = batch.tokens < c.vocab_size  # virtual tokens are beyond it
        if batch.offsets is None:
            counted &= up_to_last_target(batch.targets)
        sizes = neftune_sizes(alpha, c.embedding_size or c.hidden_size, counted, batch.offsets)
        return to_device(sizes, embedding.weight.device)

    def losses(self, model: Transformer, x: Tensor, batch: Batch) -> Forward:
        """What the objective makes of what the head gets, x (B, T, E)."""
        raise NotImplementedError

    def traced_loss(self, model: Transformer, x: Tensor, targets: Tensor) -> Tensor:
        """A scalar that takes the memory of `losses`, for --plan: on fake tensors, where nothing is known of samples.

        By default the loss of each target.
        """
        return model.each_target_loss(x, targets).sum()


def unevenness(model: Transformer, batch: Batch, routed: list[Tensor]) -> Tensor:
    """The balance loss of a micro-batch. routed: router logits (B * T, E) of each mixture.

    In padded rows (no offsets) tokens up to the last target of a row count.
    """
    counted = None
    if batch.offsets is None:
        rows = up_to_last_target(batch.targets).flatten().nonzero().squeeze(1)
        counted = to_device(rows, routed[0].device)
    return balance_loss(routed, model.config.experts.per_token, counted)


def up_to_last_target(targets: Tensor) -> Tensor:
    """Which positions of padded rows, targets (B, T), are a sample's: bool (B, T)."""
    return (targets != IGNORE).flip(1).cummax(1).values.flip(1)


class CrossEntropy(Objective):
    """-log p of each target token: supervised fine-tuning."""

    flags = ("label_smoothing", "z_loss")

    def losses(self, model: Transformer, x: Tensor, batch: Batch) -> Forward:
        """The losses of a micro-batch: a unit is a target."""
        trained, losses = model.target_losses(x, batch.targets, self.s.z_loss, self.s.label_smoothing)
        return Forward(trained, losses, batch.tokens.numel())

    def traced_loss(self, model: Transformer, x: Tensor, targets: Tensor) -> Tensor:
        """The sum of the losses of all targets."""
        return model.target_losses(x, targets, self.s.z_loss, self.s.label_smoothing)[0]


# ------------------------------------------------------------------------------------------------------- distillation


class Distillation(Objective):
    """Learn what a teacher finds likely at each target, beside the target (Hinton et al. 2015, arXiv 1503.02531).

    The loss of a target is (1 - w) times -log p of it, and w T^2 times KL(teacher | model) at the temperature T.
    training/teacher.py has the teacher's side computed before the first step.
    """

    is_likelihood = False
    columns = ("cross_entropy", "teacher_kl", "teacher_agreement")
    flags = ("teacher_",)

    def check(self) -> None:
        """Raise UserError without a teacher."""
        if self.s.teacher_dir is None:
            raise UserError("--objective distill needs --teacher_dir, the model to learn from")

    def known(self, samples: Samples, indices: list[int]) -> dict[str, list[Tensor]]:
        """The teacher's likeliest tokens for each target, and their log-probabilities."""
        found = [samples.teacher.of_sample(i) for i in indices]
        return {"teacher_ids": [ids for ids, _ in found], "teacher_logps": [logps for _, logps in found]}

    def losses(self, model: Transformer, x: Tensor, batch: Batch) -> Forward:
        """The losses of a micro-batch: a unit is a target."""
        known = [to_device(torch.cat(batch.known[name]), x.device) for name in ("teacher_ids", "teacher_logps")]
        cross_entropy, kl, agrees = self.beside_teacher(model, x, batch.targets, *known)
        losses = self.combined(cross_entropy, kl)
        with torch.no_grad():
            measured = torch.stack([cross_entropy.sum(), kl.sum(), agrees.sum()]).double()
        return Forward(losses.sum(), losses.detach(), batch.tokens.numel(), measured)

    def traced_loss(self, model: Transformer, x: Tensor, targets: Tensor) -> Tensor:
        """The sum of the losses of all targets, with a teacher that knows nothing."""
        size = model.at_targets(x, targets)[1].size(0), min(self.s.teacher_top_k, model.config.vocab_size)
        ids = torch.zeros(size, dtype=torch.int32, device=x.device)
        logps = torch.zeros(size[0], size[1] + (size[1] < model.config.vocab_size), device=x.device)
        return self.combined(*self.beside_teacher(model, x, targets, ids, logps)[:2]).sum()

    def beside_teacher(
        self, model: Transformer, x: Tensor, targets: Tensor, ids: Tensor, logps: Tensor
    ) -> list[Tensor]:
        """What `distances_from_teacher` finds at the targets, for what the head gets, x (B, T, E)."""
        of_logits = partial(distances_from_teacher, temperature=self.s.teacher_temperature)
        x, targets = model.at_targets(x, targets)
        return model.of_logits(x, of_logits, targets, ids, logps)

    def combined(self, cross_entropy: Tensor, kl: Tensor) -> Tensor:
        """The loss of each target. T^2 keeps the gradient of the KL as large as at a temperature of 1."""
        w, temperature = self.s.teacher_weight, self.s.teacher_temperature
        return (1 - w) * cross_entropy + w * temperature**2 * kl


def logps_of(logits: Tensor, ids: Tensor, others: bool) -> Tensor:
    """Log-probabilities of tokens ids (n, k) int64 by logits (n, V), and of all others as one: (n, k + 1 or k)."""
    found = logits.gather(1, ids)
    if others:
        rest = logits.scatter(1, ids, -torch.inf).logsumexp(dim=-1, keepdim=True)
        found = torch.cat([found, rest], dim=1)
    return found - logits.logsumexp(dim=-1, keepdim=True)


def distances_from_teacher(
    logits: Tensor, targets: Tensor, ids: Tensor, logps: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of logits (n, V): -log p of each target, KL(teacher | model), whether both find one token likeliest: all (n,).

    ids (n, k): the teacher's likeliest tokens, from the likeliest on. logps (n, k + 1) fp32: their log-probabilities at
    this temperature, and that of all other tokens together, which count as one; (n, k) if there are no others. So the
    KL is one of whole distributions, and at most that over all tokens one by one.
    """
    ids = ids.long()
    log_q = logps_of(logits / temperature, ids, others=logps.size(1) > ids.size(1))
    kl = (logps.exp() * (logps - log_q)).sum(dim=-1)
    return F.cross_entropy(logits, targets, reduction="none"), kl, logits.argmax(dim=-1) == ids[:, 0]


# ------------------------------------------------------------------------------------------------------- preferences


class Pairs(NamedTuple):
    """Of n pairs, what the model makes of the chosen and the rejected answer: each (n, 2) fp32, chosen first.

    logps: log p of all tokens of an answer. lengths: how many tokens that is. reference: the same logps by the base
    alone, None if the loss has none.
    """

    logps: Tensor
    lengths: Tensor
    reference: Tensor | None

    def ratios(self) -> Tensor:
        """log p / p of the base."""
        return self.logps - self.reference

    def means(self) -> Tensor:
        """log p for each token of an answer, on average. An answer has a token at least, its end."""
        return self.logps / self.lengths


def margin(answers: Tensor) -> Tensor:
    """What the chosen answers have above the rejected ones: (n,) of (n, 2)."""
    return answers[:, 0] - answers[:, 1]


def smoothed_sigmoid(x: Tensor, smoothing: float) -> Tensor:
    """-log sigmoid(x), with `smoothing` for that share of pairs being the wrong way round (cDPO, Mitchell 2023)."""
    return -(1 - smoothing) * F.logsigmoid(x) - smoothing * F.logsigmoid(-x)


def sigmoid_loss(s: Settings, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """DPO (Rafailov et al. 2023, arXiv 2305.18290, equation 7)."""
    ratios = pairs.ratios()
    return smoothed_sigmoid(s.dpo_beta * margin(ratios), s.label_smoothing), s.dpo_beta * ratios


def ipo_loss(s: Settings, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """IPO (Azar et al. 2023, arXiv 2310.12036, equation 17), of log-ratios for each token, as its authors train it."""
    ratios = pairs.ratios()
    return (margin(ratios / pairs.lengths) - 1 / (2 * s.dpo_beta)).square(), s.dpo_beta * ratios


def simpo_loss(s: Settings, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """SimPO (Meng et al. 2024, arXiv 2405.14734, equation 6): no reference, and a margin of simpo_gamma to reach."""
    rewards = s.dpo_beta * pairs.means()
    return smoothed_sigmoid(margin(rewards) - s.simpo_gamma, s.label_smoothing), rewards


def orpo_loss(s: Settings, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """ORPO (Hong et al. 2024, arXiv 2403.07691, equations 6 and 7): the loss of the chosen answer and an odds ratio.

    Both for each token of an answer, so every pair counts alike, however long its answers are.
    """
    means = pairs.means()
    log_odds = means - (-torch.expm1(means.clamp(max=-1e-7))).log()  # of p = 1 they would be infinite
    return -means[:, 0] - s.dpo_beta * F.logsigmoid(margin(log_odds)), s.dpo_beta * means


class PreferenceLoss(NamedTuple):
    """A row of PREFERENCE_LOSSES.

    loss: a function of the Settings and `Pairs` that returns the loss of each pair (n,) and the rewards (n, 2).
    reference: whether it compares with the base. smooths: whether it takes --label_smoothing.
    """

    loss: Callable[[Settings, Pairs], tuple[Tensor, Tensor]]
    reference: bool
    smooths: bool


# --dpo_loss. To add one: a function like `sigmoid_loss` and a line.
PREFERENCE_LOSSES = {
    "sigmoid": PreferenceLoss(sigmoid_loss, reference=True, smooths=True),
    "ipo": PreferenceLoss(ipo_loss, reference=True, smooths=False),
    "simpo": PreferenceLoss(simpo_loss, reference=False, smooths=True),
    "orpo": PreferenceLoss(orpo_loss, reference=False, smooths=False),
}


class Preference(Objective):
    """Prefer the chosen answer of a pair to the rejected one, by --dpo_loss.

    rewards: beta times log p / p of the base, or of SimPO and ORPO times log p for each token.
    """

    data = "pairs"
    unit = "pair"
    is_likelihood = False
    columns = (
        "rewards/chosen", "rewards/rejected", "rewards/accuracy", "rewards/margin", "logps/chosen", "logps/rejected",
    )  # fmt: skip
    flags = ("dpo_", "simpo_", "label_smoothing")

    def __init__(self, s: Settings):
        super().__init__(s)
        self.row = PREFERENCE_LOSSES[s.dpo_loss]

    def check(self) -> None:
        """Raise UserError for a flag that --dpo_loss has no use for."""
        unused = [] if self.s.dpo_loss == "simpo" else self.s.changed("simpo_")
        unused += [] if self.row.smooths else self.s.changed("label_smoothing")
        if unused:
            raise UserError(f"{', '.join(unused)}: --dpo_loss {self.s.dpo_loss} has no use for it")

    def references(self) -> bool:
        """As of `--dpo_loss`."""
        return self.row.reference

    def known(self, samples: Samples, indices: list[int]) -> dict[str, list[Tensor]]:
        """The log-probabilities (2,) of both answers by the base."""
        return {"reference": [samples.reference[i] for i in indices]} if self.row.reference else {}

    def losses(self, model: Transformer, x: Tensor, batch: Batch) -> Forward:
        """The losses of a micro-batch: a unit is a pair."""
        counts = batch.target_counts()
        logps = answer_logps(model, x, batch.targets, counts)
        reference = to_device(torch.stack(batch.known["reference"]), x.device) if self.row.reference else None
        lengths = numbers_on(x.device, counts, torch.float32).view(-1, 2)
        losses, rewards = self.row.loss(self.s, Pairs(logps, lengths, reference))
        with torch.no_grad():
            better = margin(rewards)
            measured = torch.stack([*rewards.sum(0), (better > 0).sum(), better.sum(), *logps.sum(0)]).double()
        return Forward(losses.sum(), losses.detach(), batch.tokens.numel(), measured)


def answer_logps(model: Transformer, x: Tensor, targets: Tensor, counts: list[int]) -> Tensor:
    """log p of the answers of pairs, (n, 2) fp32 with gradient, chosen first.

    x (B, T, E): what the head gets. counts: how many targets each answer has, in the order of their rows.
    """
    sums = [part.sum() for part in model.each_target_loss(x, targets).split(counts)]
    return -torch.stack(sums).view(-1, 2)


OBJECTIVES = {"sft": CrossEntropy, "distill": Distillation, "dpo": Preference}
