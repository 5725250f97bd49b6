"""A trial: finetune.py in a child process, followed as it validates, pruned, and continued where it was killed.

What became of a trial is read from its folder, so that it does not matter who was killed when:

- final/ is there: the run has ended. Its value is measured, and the trial is complete.
- the attribute "pruned at" is there: the pruner's verdict, kept before the child is told to end.
- the child was killed by a signal that was not ours: it is started again, with --resume. The MOST_KILLS-th time the
  trial has failed, for the system kills what takes too much memory, and would again.
- anything else: the trial has failed, for the reason that finetune.py gave.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
from typing import NamedTuple

import optuna
from optuna.trial import TrialState

from search.children import Signals, child
from search.metric import as_arguments, final_value, last_error, read_column
from search.search_file import Search
from search.study import Claim
from shell.cli import UserError

POLL = 0.5  # seconds between two looks at metrics.csv
MOST_KILLS = 3
PRUNED_AT, KILLS, STARTS, REASON = "pruned at", "kills", "starts", "reason"  # attributes of a trial
OUT_OF_MEMORY, NOT_FINITE = re.compile("out of memory", re.IGNORECASE), re.compile(r"\bis -?(nan|inf)\b")


class Outcome(NamedTuple):
    """How a trial ended. value: if it is complete. reason: if it failed, in one line."""

    state: TrialState
    value: float | None = None
    reason: str = ""

    @property
    def kind(self) -> str:
        """The kind of a failure, the same for failures that have the same cause."""
        if NOT_FINITE.search(self.reason):
            return "not finite"
        return "out of memory" if OUT_OF_MEMORY.search(self.reason) else "other"


def run_trial(study: optuna.Study, search: Search, claim: Claim, signals: Signals) -> Outcome | None:
    """Train a trial to its end and tell the study what became of it; None if a signal ended that, and it is left.

    Raises whatever goes wrong with the study itself; the child has ended then, and the trial can be continued.
    """
    outcome = None
    while outcome is None and not signals.received:
        outcome = _ended(search, claim, signals) or _train(search, claim, signals)
    if outcome is None:
        return None
    if outcome.reason:
        claim.trial.set_user_attr(REASON, outcome.reason)
    study.tell(claim.trial, outcome.value, outcome.state)
    return outcome


def _ended(search, claim, signals):
    """What became of a trial by its folder, or None if it is still to be trained."""
    if not (claim.folder / "final").is_dir():
        return Outcome(TrialState.PRUNED) if PRUNED_AT in claim.trial.user_attrs else None
    _report(search, claim)
    try:
        value = final_value(search.metric, claim.folder, claim.lock, signals)
    except UserError as error:
        return Outcome(TrialState.FAIL, reason=str(error))
    return None if value is None else Outcome(TrialState.COMPLETE, value)


def _train(search, claim, signals):
    """Let finetune.py train, from the start or from where it was; None if what became of it is in the folder."""
    _count(claim, STARTS)
    command = ["finetune.py", *as_arguments(trial_flags(search, claim))]
    with child(command, claim.folder / "output.txt", claim.lock, signals) as process:
        while process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(POLL)
            if _report(search, claim) and process.poll() is None:
                process.terminate()
                process.wait()
    status = process.returncode
    if signals.received or PRUNED_AT in claim.trial.user_attrs or (claim.folder / "final").is_dir():
        return None
    if (status < 0 or status > 128) and _count(claim, KILLS) < MOST_KILLS:
        return None
    reason = last_error(claim.folder / "output.txt", status) if status else "it ended without its final/"
    if status < 0:
        reason += f", {MOST_KILLS} times: perhaps the system is out of memory"
    return Outcome(TrialState.FAIL, reason=reason)


def trial_flags(search: Search, claim: Claim) -> dict:
    """The flags of finetune.py for a trial: begun if there is nothing in its folder, else continued."""
    return search.fixed | claim.values | {"out_dir": str(claim.folder), "resume": True}


def _report(search, claim):
    """Report the validations that were not before; those of a continued run are made again, with the same result.

    Returns whether the pruner wants the trial to end, which it is asked at each: it keeps the values at its rungs.
    """
    for step, value in read_column(claim.folder, search.metric.column, validations=True):
        if step in claim.reported or PRUNED_AT in claim.trial.user_attrs:
            continue
        claim.reported.add(step)
        claim.trial.report(search.metric.at_validation(value), step)
        if claim.trial.should_prune():
            claim.trial.set_user_attr(PRUNED_AT, step)
            return True
    return False


def _count(claim, attribute):
    """Count up an attribute of a trial, and return the new count."""
    count = claim.trial.user_attrs.get(attribute, 0) + 1
    claim.trial.set_user_attr(attribute, count)
    return count
