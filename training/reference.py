"""What the base alone makes of preference pairs: log-probabilities of their answers, as DPO compares with.

The base is the run's own model with its adapters switched off: there is no second one. They are computed once, before
the first step, and kept beside the prepared data in `reference-HASH.safetensors`: `train` and `val`, (N, 2) fp32, of
the pairs in their order, chosen first. The hash is of the base, the data and how the base is stored: with another base
they are computed again.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from adapters.adapter import switched_off
from batching import PLANNERS, Batch, Samples, in_order
from objectives import answer_logps
from ops.devices import to_device
from shell.cli import UserError
from shell.files import whole_file
from shell.progress import bar
from weights.safetensors_format import read_tensors

if TYPE_CHECKING:
    from training.build import Run


def prepare(run: Run, step: int = 0) -> None:
    """Give the run's samples their `reference` (N, 2), if its objective needs it. step: how many steps were done.

    Raises UserError if all weights train, some steps were done, and the file is gone: the base is no longer there.
    """
    if not run.objective.references():
        return
    path, parts = kept_at(run), {"train": run.train, "val": run.val}
    kept = read_kept(path, parts)
    if kept is None:
        if step and (run.adapter is None or run.adapter.save or run.adapter.tokens):  # the base's own are not kept
            raise UserError(
                f"{path} is gone, and the base is no longer as it was: start the run again without --resume"
            )
        kept = {part: logps_by_base(run, samples) for part, samples in parts.items() if len(samples)}
        if run.fabric.is_global_zero:
            keep(path, kept)
    for part, samples in parts.items():
        samples.reference = kept.get(part)


def kept_at(run: Run) -> Path:
    """Where the log-probabilities of this run's data by its base are kept."""
    s = run.settings
    depends = {**run.identity, "precision": s.precision, "quantize": s.quantize}
    return s.data_dir / f"reference-{hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:16]}.safetensors"


def read_kept(path: Path, parts: dict[str, Samples]) -> dict[str, Tensor] | None:
    """The kept log-probabilities of each part; None if there are none. Raises UserError if they do not fit."""
    if not path.is_file():
        return None
    again = f"delete {path}, and they are computed again"
    tensors = read_tensors(path, again)
    for part, samples in parts.items():
        found = tensors.get(part)
        if len(samples) and (found is None or found.shape != (len(samples), 2) or not found.isfinite().all()):
            raise UserError(f"{path} is damaged (its log-probabilities of {part} do not fit the data): {again}")
    return tensors


def keep(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write the log-probabilities, whole or not at all. Where the folder cannot be written to, a note says so."""
    try:
        with whole_file(path) as file:
            save_file(tensors, file)
    except OSError as error:
        print(f"note: {path} cannot be written ({error.strerror}): a resumed run computes it again", file=sys.stderr)


@torch.no_grad()
def logps_by_base(run: Run, samples: Samples) -> Tensor:
    """log p of both answers of each pair by the base: (N, 2) fp32, on the CPU."""
    s, fabric = run.settings, run.fabric
    planner = PLANNERS[s.planner]
    result = torch.zeros(len(samples), 2, device=fabric.device)
    micro_batches = in_order(planner, samples, s.micro_batch_tokens)
    mine = run.share(micro_batches, samples)
    run.model.eval()
    with switched_off(run.model), fabric.autocast():
        for indices in bar(mine, "log-probabilities by the base", shown=fabric.is_global_zero, stays=False):
            batch = Batch(*planner.layout(samples, indices or [0]))
            x = run.model.hidden_states(to_device(batch.tokens, fabric.device), offsets=batch.offsets)
            if indices:  # else this device only takes part in what the others do
                result[indices] = answer_logps(run.model, x, batch.targets, batch.target_counts())
    run.model.train()
    run.ranks.give_back(run.model)
    return run.ranks.sum(result).cpu()
