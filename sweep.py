"""Search for the best flags of finetune.py with Optuna: each trial is a run of finetune.py in a process of its own.

    python sweep.py --sweep examples/search.yaml --out_dir out/search
    python sweep.py --sweep examples/search.yaml --out_dir out/search --report     # what it has found so far

search/search_file.py says what the file has. The same command again goes on where the search was stopped or killed; the
same command twice at the same time shares the work. Each trial leaves a run's folder, `trial-0007/`; the search leaves
`study.db`, `trials.csv` and `search.png`.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from shell import cli
from shell.cli import UserError


@dataclass
class Settings:
    """The command line.

    Args:
        sweep: YAML file: the flags of finetune.py with their values and ranges, the sampler, the pruner, the metric.
        out_dir: Folder for the trials and the report, of this search alone.
        storage: Optuna's URL of the database that the processes of a search share, such as
            postgresql://user@host/name; by default a SQLite file, study.db in out_dir.
        study_name: Name of the search in that database.
        report: Write the report of the trials so far, and start none.
    """

    sweep: Path
    out_dir: Path = Path("out/search")
    storage: str | None = None
    study_name: str = "search"
    report: bool = False

    def __post_init__(self):
        cli.check_files(self, "sweep")
        if self.out_dir.exists() and not self.out_dir.is_dir():
            raise UserError(f"--out_dir {self.out_dir} is a file: choose another")


if __name__ == "__main__":
    settings = cli.parse(Settings)

import optuna
from optuna.trial import TrialState

from search.children import Signals
from search.report import describe, write_report
from search.search_file import Search, read_search
from search.study import explained, open_study, own_database, release, take_trial
from search.trial import Outcome, run_trial
from shell.process import signals_handled

MOST_FAILURES = 3  # in a row, of one kind
WAIT = 1.0  # seconds between two looks at the trials of others


def main(s: Settings) -> None:
    """Work on trials until all are done, or a signal comes; then write the report."""
    cli.check_installed("sklearn", "matplotlib")
    search = read_search(s.sweep)
    storage = own_database(s.out_dir) if s.storage is None else s.storage
    with explained(storage):
        study = open_study(search, s.out_dir, storage, s.study_name, new=not s.report)
        signals, problem = Signals(), None
        if not s.report:
            with signals_handled(signals.note):
                problem = work(study, search, s.out_dir, signals)
        write_report(study, search, s.out_dir)
    if problem:
        raise UserError(problem)
    if signals.received:
        print("stopped: the same command goes on")
        sys.exit(128 + signals.received[0])


def work(study: optuna.Study, search: Search, out_dir: Path, signals: Signals) -> str | None:
    """Train one trial after the other until all in this folder are done. Returns why no more make sense, if so."""
    outcomes = []
    while not signals.received:
        claim, others = take_trial(study, search, out_dir)
        if claim:
            started = time.monotonic()
            try:
                outcome = run_trial(study, search, claim, signals)
            finally:
                release(claim)
            if outcome:
                print(describe(search, claim, outcome, time.monotonic() - started), flush=True)
                outcomes.append(outcome)
        elif others:
            time.sleep(WAIT)  # one that works on a trial may be killed, and leave it to this one
        else:
            return None
        if problem := hopeless(outcomes, study):
            return problem
    return None


def hopeless(outcomes: list[Outcome], study: optuna.Study) -> str | None:
    """Why no more trials make sense: this process has seen MOST_FAILURES of one kind in a row.

    Numbers that are not finite, or too little memory, may come from the values that were tried: they count as long as
    no trial of the study has gone well.
    """
    last = outcomes[-MOST_FAILURES:]
    kinds = {outcome.kind for outcome in last if outcome.state == TrialState.FAIL}
    if len(last) < MOST_FAILURES or len(kinds) != 1 or any(each.state != TrialState.FAIL for each in last):
        return None
    if kinds != {"other"} and study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)):
        return None
    return f"{MOST_FAILURES} trials in a row have failed, so the search ends; the last one: {last[-1].reason}"


if __name__ == "__main__":
    cli.run(main, settings)
