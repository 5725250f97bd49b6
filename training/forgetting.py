"""How far training has taken a model from its base, on text that it is not to forget: --forgetting_source.

Catastrophic forgetting shows in the KL divergence from the base on general text before it shows in benchmarks (Shenfeld
et al. 2025, arXiv 2509.04259). The base is the run's own model with its adapters switched off. Replaying such text, as
a source with a small weight in the mixture, holds the KL down.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adapters.adapter import switched_off
from batching import PLANNERS, Batch, in_order
from ops.devices import read_numbers, to_device
from ops.loss import LOSS_CHUNK
from shell.cli import UserError

if TYPE_CHECKING:
    from model import Transformer
    from training.build import Data, Run
    from training.settings import Settings

COLUMN = "forgetting"  # of metrics.csv


def check_forgetting(s: Settings, data: Data) -> None:
    """Raise UserError if --forgetting_source cannot be measured on these data, or has no base to compare with."""
    if s.forgetting_source is None:
        return
    where = f"--forgetting_source {s.forgetting_source}"
    if s.method == "full":
        raise UserError(f"{where} needs an adapter, not --method full, which leaves no base to compare with")
    if s.lora_modules_to_save or s.lora_tokens:
        raise UserError(
            f"{where} needs adapters alone: what --lora_modules_to_save and --lora_tokens train has no base"
        )
    if s.forgetting_source not in data.sources:
        known = ", ".join(data.sources) if data.sources else "just one source"
        raise UserError(f"{where}: {s.data_dir} has {known}: name one of several")
    counts = data.val.units_by_source()
    if not sum(counts[data.sources.index(s.forgetting_source) :][:1]):
        raise UserError(f"{where}: it has no validation samples in {s.data_dir}: see prepare_data.py --val_fraction")
    if not s.eval_interval:
        raise UserError(f"{where} is measured at validations: give an --eval_interval above 0")


@torch.no_grad()
def forgetting(run: Run) -> dict[str, float]:
    """KL(base | model) for each target of the validation samples of --forgetting_source, on average: {COLUMN: nats}.

    {} without that flag. Each micro-batch goes through the model twice, with its adapters and without.
    """
    s, fabric, val = run.settings, run.fabric, run.val
    if s.forgetting_source is None:
        return {}
    chosen = (val.sources[:] == run.sources.index(s.forgetting_source)).nonzero().squeeze(1)
    planner = PLANNERS[s.planner]
    micro_batches = in_order(planner, val, s.micro_batch_tokens, chosen)
    total = torch.zeros((), dtype=torch.float64, device=fabric.device)
    run.model.eval()
    for indices in run.share(micro_batches, val):
        batch = Batch(*planner.layout(val, indices or [0]))
        with fabric.autocast():
            found = divergence_from_base(run.model, batch)
        total += found if indices else 0  # without any, this device only takes part in what the others do
    run.model.train()
    ((total,),) = read_numbers(run.ranks.sum(total))
    return {COLUMN: total / val.target_counts[chosen].sum().item()}


def divergence_from_base(model: Transformer, batch: Batch) -> Tensor:
    """The sum over the targets of a micro-batch of KL(base | model): a scalar in fp64."""
    tuned, total = _at_targets(model, batch), 0.0
    with switched_off(model):
        base = _at_targets(model, batch)
    for tuned_part, base_part in zip(tuned.split(LOSS_CHUNK), base.split(LOSS_CHUNK), strict=True):
        log_q = model.logits(tuned_part).float().log_softmax(dim=-1)
        with switched_off(model):  # an adapter may be over the head, too
            log_p = model.logits(base_part).float().log_softmax(dim=-1)
        total = total + (log_p.exp() * (log_p - log_q)).sum().double()
    return total


def _at_targets(model, batch):
    """What the head gets at the targets of a micro-batch: (n, E)."""
    tokens = to_device(batch.tokens, model.model.embed_tokens.weight.device)
    return model.at_targets(model.hidden_states(tokens, offsets=batch.offsets), batch.targets)[0]
