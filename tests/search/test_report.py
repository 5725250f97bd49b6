"""The report of a search: its table, importances and picture, of real studies whose values are made up."""

import csv
import math
import random

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from optuna.trial import TrialState

from search import picture
from search.report import describe, importances, ranked, short, write_report
from search.study import open_study, release, take_trial
from search.trial import Outcome

PARAMETERS = {
    "learning_rate": {"low": 1e-5, "high": 1e-1, "log": True},
    "lora_r": {"low": 2, "high": 64, "log": True},
    "weight_decay": {"low": 0.0, "high": 0.1},
    "lora_targets": {"choices": [["q_proj", "v_proj"], "all-linear"]},
}


@pytest.fixture
def made(search_of, tmp_path):
    """`made(trials, value)`: a study of so many trials, the search, the folder; value: of the flags' values.

    value returns the metric, or an Outcome that ended the trial at its first validation.
    """

    def make(trials, value, **keys):
        search = search_of(PARAMETERS, sampler="random", trials=max(1, trials), **keys)
        out_dir = tmp_path / "out"
        study = open_study(search, out_dir, f"sqlite:///{out_dir}/study.db", "search", new=True)
        for _ in range(trials):
            claim, _ = take_trial(study, search, out_dir)
            found = value(claim.trial.number, claim.values)
            claim.trial.report(search.metric.at_validation(5.0 + random.random()), 2)
            if isinstance(found, Outcome):
                if found.reason:
                    claim.trial.set_user_attr("reason", found.reason)
                if found.state != TrialState.RUNNING:
                    study.tell(claim.trial, found.value, found.state)
            else:
                claim.trial.report(search.metric.at_validation(found), 4)
                study.tell(claim.trial, found)
            if not isinstance(found, Outcome) or found.state != TrialState.RUNNING:
                release(claim)
        return study, search, out_dir

    return make


def of_rate(_, values):
    return 1 + (math.log10(values["learning_rate"]) + 3) ** 2 + 0.01 * random.random()


def of_every_kind(number, values):
    return [
        Outcome(TrialState.FAIL, reason="step 3: the loss is nan"),
        Outcome(TrialState.PRUNED),
        Outcome(TrialState.RUNNING),
    ][number % 6 // 2] if number % 2 else of_rate(number, values)  # fmt: skip


def test_the_flag_that_matters_is_found(made, capsys):
    study, search, out_dir = made(25, of_rate)
    shares = importances(study, search)
    assert next(iter(shares)) == "learning_rate" and shares["learning_rate"] > 0.6 and set(shares) == set(PARAMETERS)
    assert sum(shares.values()) == pytest.approx(1) and shares == importances(study, search)
    write_report(study, search, out_dir)
    out = capsys.readouterr().out
    assert f"explains (fANOVA): learning_rate {shares['learning_rate']:.0%}, " in out
    best = min(study.trials, key=lambda trial: trial.value)
    assert f"best: trial {best.number}, val_loss {best.value:.4g}, in {out_dir}/trial-{best.number:04d}/final" in out
    assert f"--learning_rate={best.params['learning_rate']}" in out


def test_the_table_has_the_best_first(made, capsys):
    study, search, out_dir = made(12, of_every_kind)
    write_report(study, search, out_dir)
    with open(out_dir / "trials.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == ["complete"] * 6 + ["pruned"] * 2 + ["running"] * 2 + ["failed"] * 2
    losses = [float(row["val_loss"]) for row in rows[:6]]
    assert losses == sorted(losses) and all(row["val_loss"] == "" for row in rows[8:])
    assert {row["reason"] for row in rows[10:]} == {"step 3: the loss is nan"} and rows[0]["reason"] == ""
    assert {row["lora_targets"] for row in rows} == {"all-linear", "['q_proj', 'v_proj']"}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["trial", "state", "val_loss", "step", *PARAMETERS] and len(lines) == 17


def test_a_higher_value_may_be_better(made):
    metric = {"column": "accuracy", "direction": "maximize"}
    study, _, _ = made(6, lambda number, _: [0.1, 0.9, 0.5, 0.2, 0.3, 0.4][number], metric=metric)
    assert [trial.value for trial in ranked(study)] == [0.9, 0.5, 0.4, 0.3, 0.2, 0.1]


def test_a_pruned_trial_has_no_exact_match(made, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    metric = {"exact_match": str(tmp_path / "rows.jsonl")}
    study, search, out_dir = made(4, lambda n, _: Outcome(TrialState.PRUNED) if n % 2 else n / 4, metric=metric)
    write_report(study, search, out_dir)
    with open(out_dir / "trials.csv", newline="") as file:
        assert [row["exact match"] for row in csv.DictReader(file)] == ["0.5", "0.0", "", ""]
    figure = Figure()
    panel = figure.subplots()
    picture.draw_curves(panel, search, ranked(study))
    found = [y for line in panel.lines for y in line.get_ydata()]
    assert min(found) >= 0, "the loss is shown, not what the pruner is told"


@pytest.mark.parametrize(
    ("trials", "value"),
    [
        (0, None),
        (1, of_rate),
        (5, lambda *_: 1.0),
        (3, lambda *_: Outcome(TrialState.FAIL, reason="out of memory")),
        (3, lambda *_: Outcome(TrialState.RUNNING)),
        (3, lambda *_: Outcome(TrialState.PRUNED)),
        (9, lambda number, _: 10.0 ** (number - 3)),
    ],
)
def test_a_report_of_anything(made, capsys, trials, value):
    study, search, out_dir = made(trials, value)
    write_report(study, search, out_dir)
    out = capsys.readouterr().out
    assert ("no trial yet" in out) == (trials == 0) == (not (out_dir / "search.png").exists())
    assert ("fANOVA" in out) == (trials == 9)
    assert trials == 0 or imread(out_dir / "search.png").std() > 0


def test_what_is_in_the_picture(made, monkeypatch):
    study, search, out_dir = made(24, of_every_kind)
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: (figures.append(figure), path.write_bytes(b"")))
    write_report(study, search, out_dir)
    trials, curves, shares, *flags = figures[0].axes[: 3 + len(PARAMETERS)]
    points = {line.get_label(): len(line.get_xdata()) for line in trials.lines}
    assert (points["complete"], points["pruned"], points["failed"]) == (12, 4, 4)
    assert list(curves.lines[0].get_xdata()) == [2] and curves.get_legend() is not None
    assert len(shares.patches) == len(PARAMETERS)
    assert [panel.get_xlabel() for panel in flags] == [*PARAMETERS]
    assert [panel.get_xscale() for panel in flags] == ["log", "log", "linear", "linear"]
    assert [label.get_text() for label in flags[3].get_xticklabels()] == ["q_proj\nv_proj", "all-linear"]


def test_the_line_of_a_trial(made):
    study, search, out_dir = made(0, None)
    claim, _ = take_trial(study, search, out_dir)
    claim.values.update(learning_rate=0.000123456, lora_targets=["q_proj", "v_proj"], lora_r=4, weight_decay=0.0)
    values = "(learning_rate 0.0001235, lora_r 4, weight_decay 0, lora_targets ['q_proj', 'v_proj']; 3 s"
    assert describe(search, claim, Outcome(TrialState.COMPLETE, 1.23456), 3.4) == f"trial 0: val_loss 1.235 {values})"
    claim.trial.set_user_attr("starts", 2)
    claim.reported.add(40)
    assert (
        describe(search, claim, Outcome(TrialState.PRUNED), 3.4) == f"trial 0: pruned at step 40 {values}, in 2 starts)"
    )
    assert describe(search, claim, Outcome(TrialState.FAIL, reason="why"), 3.4).startswith("trial 0: failed: why (")
    assert short("a" * 40) == "a" * 27 + "…"
