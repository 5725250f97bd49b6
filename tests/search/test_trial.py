"""What becomes of a trial, with a script in the place of finetune.py that does at once what takes training long."""

import json
import os
import signal
import threading
import time

import optuna
import pytest
from optuna.trial import TrialState

import sweep
from search import children, trial
from search.children import Signals
from search.metric import as_arguments, last_error, read_column
from search.study import open_study, release, take_trial
from shell.cli import UserError
from shell.process import signals_handled

SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
flags = dict(arg[2:].split("=", 1) for arg in sys.argv[1:])
out, rate = Path(flags["out_dir"]), float(flags["learning_rate"])
assert flags["resume"] == "true"
starts = len(list(out.glob("start-*")))
(out / f"start-{starts}").touch()
def row(step, loss, val_loss=""):
    path = out / "metrics.csv"
    if not path.exists():
        path.write_text("step,loss,val_loss\\n")
    with path.open("a") as file:
        file.write(f"{step},{loss},{val_loss}\\n")
def done():
    (out / "final").mkdir()
"""
PARAMETERS = {"learning_rate": {"choices": [1e-4, 2e-4, 3e-4, 4e-4, 5e-4]}}


@pytest.fixture
def search_with(search_of, tmp_path, monkeypatch):
    """`search_with("row(1, 2.0); done()", trials=2)`: study, search and folder, for a script that does so."""
    monkeypatch.setattr(children, "ROOT", tmp_path)
    monkeypatch.setattr(trial, "POLL", 0.02)

    def make(code, **keys):
        (tmp_path / "finetune.py").write_text(SCRIPT + code)
        search = search_of(PARAMETERS, **({"trials": 1, "sampler": "grid"} | keys))
        out_dir = tmp_path / "out"
        return open_study(search, out_dir, f"sqlite:///{out_dir / 'study.db'}", "search", new=True), search, out_dir

    return make


def worked(made, signals=None):
    """Work on a search; what sweep.work returned, and the trials."""
    study, search, out_dir = made
    return sweep.work(study, search, out_dir, signals or Signals()), study.get_trials()


def test_a_trial_that_ends(search_with, capsys):
    made = search_with("row(1, 3.0); row(2, 2.5, 2.25); row(3, 2.0); row(4, 2.0, 1.5); done()")
    problem, (only,) = worked(made)
    assert problem is None and only.state == TrialState.COMPLETE and only.value == 1.5
    assert only.intermediate_values == {2: 2.25, 4: 1.5} and only.user_attrs == {"starts": 1}
    assert capsys.readouterr().out.startswith("trial 0: val_loss 1.5 (learning_rate ")


def test_another_column(search_with):
    """Its last value, which is not of a validation."""
    metric = {"column": "loss", "direction": "maximize"}
    study, search, out_dir = search_with("row(1, 3.0, 7.0); row(2, 4.0); done()", metric=metric)
    _, (only,) = worked((study, search, out_dir))
    assert only.value == 4.0 and only.intermediate_values == {1: 3.0}
    assert study.direction == optuna.study.StudyDirection.MAXIMIZE


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("row(1, 1.0); print('error: step 3: the loss is nan; no sample', file=sys.stderr); sys.exit(2)",
         "step 3: the loss is nan; no sample"),
        ("print('5/9 [00:01]\\r', file=sys.stderr); print('error: out of memory: 3 GB', file=sys.stderr); sys.exit(2)",
         "out of memory: 3 GB"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("sys.exit(7)", "ended with status 7"),
        ("row(1, 1.0); done()",
         "metric val_loss: {out}/trial-0000/metrics.csv has no value for it; its first line has the names"),
        ("row(1, 1.0, 'nan'); done()", "val_loss is nan"),
        ("sys.exit(0)", "it ended without its final/"),
    ],
)  # fmt: skip
def test_a_failure_keeps_its_reason(search_with, tmp_path, code, reason):
    problem, (only,) = worked(search_with(code))
    assert problem is None and only.state == TrialState.FAIL
    assert only.user_attrs["reason"] == reason.format(out=tmp_path / "out")


def test_a_killed_trial_is_continued_and_reports_nothing_twice(search_with, recwarn):
    """Rows after the checkpoint come again."""
    code = """
if starts == 0:
    row(1, 9.0, 5.0); row(2, 9.0, 4.0)
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGKILL)
row(2, 9.0, 4.0); row(3, 9.0, 3.0); done()
"""
    _, (only,) = worked(search_with(code))
    assert only.state == TrialState.COMPLETE and only.intermediate_values == {1: 5.0, 2: 4.0, 3: 3.0}
    assert only.user_attrs == {"starts": 2, "kills": 1} and not recwarn.list


def test_a_trial_that_is_killed_again_and_again_fails(search_with):
    problem, (only,) = worked(search_with("os.kill(os.getpid(), signal.SIGKILL)"))
    assert only.state == TrialState.FAIL and only.user_attrs["starts"] == trial.MOST_KILLS
    assert only.user_attrs["reason"] == "was killed by signal 9, 3 times: perhaps the system is out of memory"


def test_asha_ends_a_bad_trial(search_with):
    """Three trials, the later the worse: all but the first end at the first rung, by SIGTERM."""
    code = """
number = int(out.name[-4:])
def stop(*_):
    (out / "told").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
for step in (2, 4, 6):
    row(step, 1.0, 5.0 + number - step / 10)
    time.sleep(0.05 if number == 0 else 0.6)
done()
"""
    pruner = {"name": "asha", "first_rung": 2, "reduction_factor": 2}
    made = search_with(code, trials=3, pruner=pruner)
    _, trials = worked(made)
    assert [each.state for each in trials] == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.PRUNED]
    assert [each.last_step for each in trials] == [6, 4, 4]
    for each in trials[1:]:
        folder = made[2] / f"trial-{each.number:04d}"
        assert (folder / "told").exists() and not (folder / "final").exists()
        assert each.user_attrs["pruned at"] == 4 and "reason" not in each.user_attrs
    assert trials[1].value == pytest.approx(5.6)


def test_a_verdict_is_kept_when_the_search_is_killed_before_it_is_told(search_with):
    """And a run that had ended before the signal came is complete."""
    pruner = {"name": "asha", "first_rung": 1, "reduction_factor": 2}
    study, search, out_dir = search_with("row(2, 1.0, 1.0); sys.exit(5)", trials=2, pruner=pruner)
    for number in range(2):
        claim, _ = take_trial(study, search, out_dir)
        claim.trial.set_user_attr("pruned at", 2)
        claim.trial.report(3.0, 2)
        (claim.folder / "metrics.csv").write_text("step,loss,val_loss\n2,1.0,3.0\n")
        if number == 1:
            (claim.folder / "final").mkdir()
        outcome = trial.run_trial(study, search, claim, Signals())
        release(claim)
        assert outcome.state == (TrialState.PRUNED, TrialState.COMPLETE)[number]
        assert "starts" not in claim.trial.user_attrs  # nothing was trained


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_once_and_the_trial_is_left(search_with, number):
    code = """
def stop(number, _):
    with (out / "signals").open("a") as file:
        file.write(f"{number}\\n")
    sys.exit(128 + number)
for each in (signal.SIGINT, signal.SIGTERM):
    signal.signal(each, stop)
(out / "ready").touch()
time.sleep(60)
"""
    study, search, out_dir = search_with(code, trials=2)
    signals = Signals()

    def send_when_ready():
        end = time.monotonic() + 30
        while not (out_dir / "trial-0000" / "ready").exists() and time.monotonic() < end:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send_when_ready)
    sender.start()
    with signals_handled(signals.note):
        assert sweep.work(study, search, out_dir, signals) is None
    sender.join()
    assert signals.received == [number]
    assert (out_dir / "trial-0000" / "signals").read_text() == f"{number.value}\n"
    (only,) = study.get_trials()
    assert only.state == TrialState.RUNNING and only.user_attrs == {"starts": 1}
    (out_dir.parent / "finetune.py").write_text(SCRIPT + "row(1, 1.0, 1.0); done()")
    _, trials = worked((study, search, out_dir))
    assert [(each.state, each.user_attrs["starts"]) for each in trials] == [
        (TrialState.COMPLETE, 2),
        (TrialState.COMPLETE, 1),
    ]


@pytest.mark.parametrize(
    ("column", "code"),
    [("val_los", ""), ("forgetting", ""), ("val_perplexity", "row(2, 3.0, '2.5,')"), ("rate", "done(); sys.exit()")],
)
def test_a_column_that_will_never_come_ends_the_search_at_once(search_with, column, code):
    """Its name is in no first line, or a validation has no value for it."""
    metric = {"column": column, "direction": "maximize"}
    code = f"""
(out / "metrics.csv").write_text("step,loss,val_loss,val_perplexity\\n")
(out / "pid").write_text(str(os.getpid()))
row(1, 3.0, ',')
{code}
time.sleep(60)
"""
    study, search, out_dir = search_with(code, trials=2, metric=metric)
    with pytest.raises(UserError, match=f"metric {column}: .*/metrics.csv has no {column}: .*there are step, "):
        sweep.work(study, search, out_dir, Signals())
    with pytest.raises(ProcessLookupError):
        os.kill(int((out_dir / "trial-0000" / "pid").read_text()), 0)


def test_an_error_of_the_study_ends_the_child(search_with, monkeypatch):
    study, search, out_dir = search_with("(out / 'pid').write_text(str(os.getpid())); row(2, 1.0, 1.0); time.sleep(60)")

    def broken(*_):
        raise optuna.exceptions.StorageInternalError("the database is gone")

    monkeypatch.setattr(optuna.Trial, "report", broken)
    with pytest.raises(optuna.exceptions.StorageInternalError):
        sweep.work(study, search, out_dir, Signals())
    with pytest.raises(ProcessLookupError):
        os.kill(int((out_dir / "trial-0000" / "pid").read_text()), 0)
    monkeypatch.undo()
    assert take_trial(study, search, out_dir)[0].trial.number == 0


NAN = "print('error: step 3: the loss is nan', file=sys.stderr); sys.exit(2)"
GONE = "print('error: data.json does not exist', file=sys.stderr); sys.exit(2)"


@pytest.mark.parametrize(
    ("first", "then", "ended"),
    [
        ("row(1, 1.0, 1.0); done()", NAN, None),  # the values that were tried may be to blame
        ("row(1, 1.0, 1.0); done()", GONE, "data.json does not exist"),
        (NAN, NAN, "the loss is nan"),
        (GONE, NAN, "the loss is nan"),
    ],
)
def test_failures_in_a_row_end_the_search(search_with, first, then, ended):
    code = f"if out.name == 'trial-0000':\n    {first}\nelse:\n    {then}\n"
    problem, trials = worked(search_with(code, trials=5))
    if ended is None:
        assert problem is None and len(trials) == 5
    else:
        assert problem.endswith(ended) and problem.startswith("3 trials in a row have failed")
        assert len(trials) == 3 + (first != then)


# ---------------------------------------------------------------------------------------------------------- its parts


def test_rows_are_read_as_they_are_written(tmp_path):
    assert read_column(tmp_path, "loss") == []
    (tmp_path / "metrics.csv").write_text("step,loss,val_loss\n1,3.5,\n2,3.0,2.75\n3,2.")
    assert read_column(tmp_path, "loss") == [(1, 3.5), (2, 3.0)]
    assert read_column(tmp_path, "loss", validations=True) == [(2, 3.0)]


def test_arguments_are_read_by_finetune_as_they_were(tiny_model_dir, prepared):
    from shell import cli
    from training.settings import Settings

    flags = {
        "checkpoint_dir": str(tiny_model_dir), "data_dir": str(prepared), "lora_targets": ["q_proj", "v_proj"],
        "learning_rate": 1e-05, "max_steps": None, "compile": True, "lora_rank_pattern": {"down_proj": 8},
        "train": None, "optimizer": "lion", "lora_tokens": ["<|a|>", 7],
    }  # fmt: skip
    settings = cli.parse(Settings, as_arguments(flags))
    assert json.loads(json.dumps({name: getattr(settings, name) for name in flags}, default=str)) == flags


def test_the_last_error_is_found(tmp_path):
    path = tmp_path / "output.txt"
    path.write_bytes(b"error: an older one\n3/4\r4/4\rnoise\n")
    assert last_error(path, 2) == "ended with status 2" and last_error(path, 1) == "noise"
    assert last_error(path, -9) == "was killed by signal 9"


def test_a_metric_of_exact_match_that_cannot_be_measured(search_with, tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "exact_match.py").write_text(
        "import sys\nprint('error: no answer', file=sys.stderr)\nsys.exit(2)"
    )
    made = search_with("row(1, 1.0, 1.0); done()", metric={"exact_match": str(tmp_path / "rows.jsonl")})
    _, (only,) = worked(made)
    assert only.state == TrialState.FAIL and only.user_attrs["reason"] == "exact match: no answer"
    assert only.intermediate_values == {1: -1.0}  # val_loss, turned to the direction of the metric


def test_a_search_needs_locks(search_with, monkeypatch):
    def none(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", none)
    with pytest.raises(UserError, match="its file system has no locks"):
        search_with("done()")
