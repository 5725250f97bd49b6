"""The gradient of a step whose micro-batches go through the stages of a pipeline (stages.py), by one_f_one_b.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from objectives import Forward
from training.metrics import Found, Sums
from training.steps import dropout_seed

if TYPE_CHECKING:
    from training.build import Run


def pipelined_passes(run: Run, mine: list[list[int]], step: int, units: int) -> Found:
    """As `finetune.backward_passes`, for a model whose blocks are divided among devices: the numbers of this device.

    mine: at least as many micro-batches as there are stages; empty ones only take part.
    """
    from training.parallel.one_f_one_b import Stage  # which takes a second to import

    samples, objective, fabric = run.train, run.objective, run.fabric
    torch.manual_seed(dropout_seed(run.settings, step, run.ranks))
    batches = [run.batch(samples, indices or [samples.shards.at_hand()]) for indices in mine]
    loss, sums = torch.zeros((), device=fabric.device), Sums(run)

    def hidden_states(number):
        with fabric.autocast():
            return objective.hidden_states(run.model, batches[number]).contiguous()

    def trained(x, number):
        with fabric.autocast():
            result: Forward = objective.losses(run.model, x, batches[number])
        if mine[number]:
            loss.add_(result.summed / units)
            sums.add(result, samples, mine[number])
        return result.trained / units if mine[number] else result.trained * 0

    stage = Stage(run.model, run.ranks.link, [batch.tokens.shape for batch in batches], hidden_states)
    stage.run(trained)
    run.ranks.sum_gradients(run.model)
    positions = sum(batch.tokens.numel() for batch, indices in zip(batches, mine, strict=True) if indices)
    tokens = sum(samples.lengths[indices].sum().item() for indices in mine)
    return Found(run.ranks.sum(loss), sums, positions, tokens)
