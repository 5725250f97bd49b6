"""What a search has found: a line for each trial, the table of all as trials.csv, the best one, which flags matter."""

from __future__ import annotations

import csv
import shlex
import warnings
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState

from search.metric import as_arguments
from search.picture import draw_search
from search.search_file import Search
from search.study import Claim, study_locked, trial_folder
from search.trial import REASON, STARTS, Outcome
from shell.files import whole_file

LEAST = 4  # complete trials, from which on importances are given
WORDS = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
    TrialState.FAIL: "failed",
}
SHOWN = 30  # trials on the screen
WIDTH = 28  # letters of a value in the table


def describe(search: Search, claim: Claim, outcome: Outcome, seconds: float) -> str:
    """The line of a trial that has just ended."""
    if outcome.state == TrialState.FAIL:
        what = f"failed: {outcome.reason}"
    elif outcome.state == TrialState.PRUNED:
        what = f"pruned at step {max(claim.reported)}"
    else:
        what = f"{search.metric.name} {outcome.value:.4g}"
    starts = claim.trial.user_attrs.get(STARTS, 0)
    again = f", in {starts} starts" if starts > 1 else ""
    values = ", ".join(f"{flag} {short(value)}" for flag, value in claim.values.items())
    return f"trial {claim.trial.number}: {what} ({values}; {seconds:.0f} s{again})"


def write_report(study: optuna.Study, search: Search, out_dir: Path) -> None:
    """Print the table of all trials, the best one and the importances; write `trials.csv` and `search.png`."""
    trials = ranked(study)
    found = importances(study, search)
    with study_locked(out_dir):  # for two processes that end at the same time
        write_table(trials, search, out_dir)
        if trials:
            draw_search(search, trials, found, out_dir / "search.png")
    if not trials:
        print("no trial yet")
        return
    print_table(trials, search)
    if found:
        shown = ", ".join(f"{flag} {share:.0%}" for flag, share in found.items())
        print(f"share of the differences in {search.metric.name} that a flag explains (fANOVA): {shown}")
    best = trials[0]
    if best.state == TrialState.COMPLETE:
        final = trial_folder(out_dir, best.number) / "final"
        print(f"best: trial {best.number}, {search.metric.name} {best.value:.4g}, in {final}; to train it again:")
        print(shlex.join(["python", "finetune.py", *as_arguments(search.fixed | values_of(search, best))]))
    print(f"written to {out_dir}: trials.csv, search.png")


def ranked(study: optuna.Study) -> list[FrozenTrial]:
    """All trials, the best first: the complete ones, then those that were pruned, the last first; then all others."""
    sign = 1 if study.direction == optuna.study.StudyDirection.MINIMIZE else -1
    order = list(WORDS)

    def key(trial):
        late = -(trial.last_step or 0) if trial.state == TrialState.PRUNED else 0
        value = trial.value if trial.value is not None else 0
        return order.index(trial.state), late, sign * value, trial.number

    return sorted(study.get_trials(deepcopy=False), key=key)


def values_of(search: Search, trial: FrozenTrial) -> dict:
    """The values of the flags that were searched, as finetune.py takes them. A trial may lack some, if it was killed
    while it was made."""
    return {flag: each.value(trial.params[flag]) for flag, each in search.ranges.items() if flag in trial.params}


def importances(study: optuna.Study, search: Search) -> dict[str, float]:
    """The share of each flag in the variance of the metric over the whole ranges, the largest first; {} if unknown.

    fANOVA (Hutter et al. 2014) on a random forest, which needs scikit-learn. Of complete trials only; from few trials
    the shares are rough.
    """
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(trials) < LEAST or len({trial.value for trial in trials}) == 1:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=search.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return optuna.importance.get_param_importances(study, evaluator=evaluator)


# ----------------------------------------------------------------------------------------------------------- the table


def rows_of(trials: list[FrozenTrial], search: Search, out_dir: Path) -> list[dict]:
    """The rows of trials.csv: values as they are, "" where there is none."""
    rows = []
    for trial in trials:
        is_value = trial.state == TrialState.COMPLETE or search.metric.exact_match is None
        row = {"trial": trial.number, "state": WORDS[trial.state]}
        row[search.metric.name] = trial.value if trial.value is not None and is_value else ""
        row["step"] = trial.last_step if trial.last_step is not None else ""
        values = values_of(search, trial)
        row |= {flag: values.get(flag, "") for flag in search.ranges}
        row |= {"starts": trial.user_attrs.get(STARTS, 0), "folder": str(trial_folder(out_dir, trial.number))}
        rows.append(row | {"reason": trial.user_attrs.get(REASON, "")})
    return rows


def write_table(trials: list[FrozenTrial], search: Search, out_dir: Path) -> None:
    """Write trials.csv."""
    rows = rows_of(trials, search, out_dir)
    with whole_file(out_dir / "trials.csv") as path, open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0] if rows else ["trial"])
        writer.writeheader()
        writer.writerows(rows)


def print_table(trials: list[FrozenTrial], search: Search) -> None:
    """Print the best SHOWN trials."""
    names = ["trial", "state", search.metric.name, "step", *search.ranges]
    rows = [[short(row[name]) for name in names] for row in rows_of(trials[:SHOWN], search, Path())]
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    for row in (names, *rows):
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)))
    if len(trials) > SHOWN:
        print(f"and {len(trials) - SHOWN} more in trials.csv")


def short(value: object) -> str:
    """A value as a cell of the table."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= WIDTH else text[: WIDTH - 1] + "…"
