"""Who works on which trial: real Optuna over a real SQLite file, by this process and by others that are killed."""

import csv
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from conftest import ROOT, SEED, wait_for
from optuna.trial import TrialState

from search import study as studies
from search.children import Signals, child
from search.study import explained, open_study, own_database, release, take_trial, trial_folder
from shell.cli import UserError
from shell.files import read_json, write_json

PARAMETERS = {
    "learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
    "lora_targets": {"choices": [["q_proj", "v_proj"], "all-linear"]},
    "lora_r": {"choices": [2, 4, 8]},
}


def opened(search, out_dir):
    return open_study(search, out_dir, own_database(out_dir), "search", new=True)


def all_trials(search, out_dir, processes=1):
    """Take and tell all trials of a search by turns from several studies, as processes would; their values in order."""
    found, several = {}, [opened(search, out_dir) for _ in range(processes)]
    for turn in range(search.trials):
        study = several[turn % processes]
        claim, others = take_trial(study, search, out_dir)
        assert claim and others
        found[claim.trial.number] = claim.values
        study.tell(claim.trial, float(turn))
        release(claim)
    assert all(take_trial(study, search, out_dir) == (None, False) for study in several)
    return [found[number] for number in sorted(found)]


@pytest.mark.parametrize("sampler", ["random", "grid"])
def test_which_process_takes_a_trial_makes_no_difference(search_of, tmp_path, sampler):
    parameters = PARAMETERS if sampler == "random" else {k: v for k, v in PARAMETERS.items() if "choices" in v}
    search = search_of(parameters, sampler=sampler, trials=6, seed=SEED)
    one, three = all_trials(search, tmp_path / "one"), all_trials(search, tmp_path / "three", processes=3)
    assert one == three and len({str(values) for values in one}) == 6
    other = search_of(parameters, sampler=sampler, trials=6, seed=SEED + 1)
    assert sampler == "grid" or all_trials(other, tmp_path / "other") != one


def test_tpe_learns(search_of, tmp_path):
    """The later half of the trials is nearer to the best learning rate, 1e-3, than the random ones."""
    search = search_of({"learning_rate": {"low": 1e-6, "high": 1.0, "log": True}}, trials=30, seed=SEED % 7)
    study, far = opened(search, tmp_path / "out"), []
    for _ in range(30):
        claim, _ = take_trial(study, search, tmp_path / "out")
        far.append(abs(math.log10(claim.values["learning_rate"]) + 3))
        study.tell(claim.trial, far[-1])
        release(claim)
    assert sum(far[20:]) / 10 < sum(far[:10]) / 10


def test_a_trial_that_was_left_is_taken_before_a_new_one(search_of, tmp_path):
    search, out_dir = search_of(PARAMETERS, trials=2), tmp_path / "out"
    study = opened(search, out_dir)
    first, _ = take_trial(study, search, out_dir)
    first.trial.report(3.0, 2)
    second, _ = take_trial(study, search, out_dir)  # the first is locked
    assert (first.trial.number, second.trial.number) == (0, 1)
    assert take_trial(study, search, out_dir) == (None, True)
    release(first)
    again, _ = take_trial(opened(search, out_dir), search, out_dir)
    assert again.trial.number == 0 and again.values == first.values and again.folder == first.folder
    assert again.reported == {2} and first.reported == set()
    study.tell(again.trial, 1.0)
    for claim in (again, second):
        release(claim)


def test_a_trial_that_ends_while_another_process_looks_is_not_taken(search_of, tmp_path, monkeypatch):
    search, out_dir = search_of(PARAMETERS, trials=1), tmp_path / "out"
    study, lock = opened(search, out_dir), studies._try_lock
    claim, _ = take_trial(study, search, out_dir)

    def ends_now(folder):
        study.tell(claim.trial, 1.0)
        release(claim)
        return lock(folder)

    monkeypatch.setattr(studies, "_try_lock", ends_now)
    assert take_trial(opened(search, out_dir), search, out_dir)[0] is None


def test_a_trial_that_was_killed_while_it_was_made_gets_the_rest_of_its_values(search_of, tmp_path):
    search, out_dir = search_of(PARAMETERS, sampler="random", trials=1), tmp_path / "out"
    study = opened(search, out_dir)
    study.sampler = studies._sampler(search, 0)
    trial_folder(out_dir, 0).mkdir()
    half = study.ask()
    rate = search.ranges["learning_rate"].suggest(half)
    claim, _ = take_trial(study, search, out_dir)
    assert (
        claim.trial.number == 0 and claim.values["learning_rate"] == rate and claim.values.keys() == PARAMETERS.keys()
    )
    release(claim)
    whole = all_trials(search_of(PARAMETERS, sampler="random", trials=1), tmp_path / "whole")
    assert whole[0]["learning_rate"] == rate


def test_a_folder_without_a_trial_is_used(search_of, tmp_path):
    """The process was killed between making the one and the other."""
    search, out_dir = search_of(PARAMETERS, trials=1), tmp_path / "out"
    study = opened(search, out_dir)
    trial_folder(out_dir, 0).mkdir()
    claim, _ = take_trial(study, search, out_dir)
    assert claim.trial.number == 0
    release(claim)


def test_machines_with_folders_of_their_own(search_of, tmp_path):
    """They share the database alone: no number twice, none too many, and each continues what is in its folder."""
    search, url = search_of(PARAMETERS, trials=3), f"sqlite:///{tmp_path / 'shared.db'}"
    folders = tmp_path / "a", tmp_path / "b"
    a, b = (open_study(search, folder, url, "search", new=True) for folder in folders)
    first, _ = take_trial(a, search, folders[0])
    second, _ = take_trial(b, search, folders[1])
    assert (first.trial.number, second.trial.number) == (0, 1)
    release(first)
    assert take_trial(b, search, folders[1])[0].trial.number == 2
    assert take_trial(a, search, folders[0])[0].trial.number == 0
    search = search_of(PARAMETERS, trials=4)
    assert take_trial(b, search, folders[1])[0].trial.number == 3
    # The first machine has looked before that one was made.
    assert studies._new_trial(a, search, folders[0], 3) is None
    assert b.get_trials()[4].state == TrialState.FAIL and not trial_folder(folders[0], 3).exists()
    search = search_of(PARAMETERS, trials=6)
    claim = studies._new_trial(a, search, folders[0], 4)
    assert claim.trial.number == 5 and claim.folder == trial_folder(folders[0], 5)


def test_the_lock_is_the_childs_too(search_of, tmp_path):
    """As long as the trial trains on, nobody takes it, though its sweep.py is gone."""
    search, out_dir = search_of(PARAMETERS, trials=1), tmp_path / "out"
    study = opened(search, out_dir)
    claim, _ = take_trial(study, search, out_dir)
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    orphan = subprocess.Popen(sleeper, pass_fds=[claim.lock])
    release(claim)
    assert take_trial(study, search, out_dir) == (None, True)
    orphan.kill()
    orphan.wait()
    again, _ = take_trial(study, search, out_dir)
    assert again.trial.number == 0
    release(again)


def test_a_child_inherits_the_lock(search_of, tmp_path, monkeypatch):
    """children.child gives it to finetune.py."""
    search, out_dir = search_of(PARAMETERS, trials=1), tmp_path / "out"
    study = opened(search, out_dir)
    claim, _ = take_trial(study, search, out_dir)
    (tmp_path / "finetune.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr("search.children.ROOT", tmp_path)
    with child(["finetune.py"], tmp_path / "output.txt", claim.lock, Signals()) as process:
        release(claim)
        assert take_trial(study, search, out_dir) == (None, True)
        process.kill()
        process.wait()
        assert take_trial(study, search, out_dir)[0].trial.number == 0


# ------------------------------------------------------------------------------------------------ what is not continued


def test_another_search_is_refused(search_of, tmp_path):
    out_dir = tmp_path / "out"
    opened(search_of(PARAMETERS, trials=1), out_dir)
    opened(search_of(PARAMETERS, trials=5), out_dir)
    with pytest.raises(UserError, match="has other metric, seed: only trials may change"):
        opened(search_of(PARAMETERS, trials=1, seed=3, metric="loss"), out_dir)


OTHERS = {  # a database and a study's name, for a folder that has trials
    "name": lambda out: (own_database(out), "other"),
    "storage": lambda out: (f"sqlite:///{out.parent}/other.db", "search"),
    "database that was deleted": lambda out: ((out / "study.db").unlink(), (own_database(out), "search"))[1],
    "mark that was deleted": lambda out: ((out / "study.id").unlink(), (own_database(out), "search"))[1],
    "mark of another": lambda out: ((out / "study.id").write_text("folder 1"), (own_database(out), "search"))[1],
}


@pytest.mark.parametrize("what", OTHERS)
@pytest.mark.parametrize("new", [True, False])
def test_a_folder_belongs_to_one_search(search_of, tmp_path, what, new):
    """The trials of two studies have the same numbers, and those in the folder would count for other values."""
    search, out_dir = search_of(PARAMETERS, trials=1), tmp_path / "out"
    all_trials(search, out_dir)
    other = search if "mark" in what else search_of(PARAMETERS, trials=1, seed=SEED + 1)
    url, name = OTHERS[what](out_dir)
    before = sorted(out_dir.iterdir()), studies_in(out_dir)
    says = "has the trials of another search" if new or "mark" in what else "has the trials|is no such|is no search"
    with pytest.raises(UserError, match=says):
        open_study(other, out_dir, url, name, new=new)
    assert (sorted(out_dir.iterdir()), studies_in(out_dir)) == before and not (tmp_path / "other.db").is_file()
    open_study(other, tmp_path / "else", own_database(tmp_path / "else"), "search", new=True)  # as the line says


def studies_in(out_dir):
    return (out_dir / "study.db").is_file() and optuna.get_all_study_names(own_database(out_dir))


def test_a_folder_that_was_moved_goes_on(search_of, tmp_path):
    search, moved = search_of(PARAMETERS, trials=2), tmp_path / "moved"
    release(take_trial(opened(search, tmp_path / "out"), search, tmp_path / "out")[0])
    (tmp_path / "out").rename(moved)
    again, _ = take_trial(opened(search, moved), search, moved)
    assert again.trial.number == 0 and again.folder == trial_folder(moved, 0)


@pytest.mark.parametrize("name", ["a?b", "a%20b", "a#b", "a{b}", "a b", "x@y:z"])
def test_the_database_is_in_the_folder_whatever_it_is_called(search_of, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    opened(search_of(PARAMETERS, trials=1), Path(name))
    assert [*tmp_path.glob("**/*.db")] == [tmp_path / name / "study.db"]


@pytest.mark.parametrize("changed", ["data/data.json", "model/config.json", "teacher/model.safetensors",
                                     "layers.json", "rows.jsonl"])  # fmt: skip
def test_a_search_over_files_that_have_changed_is_refused(search_of, tiny_model_dir, prepared, tmp_path, changed):
    model, teacher, data = (
        shutil.copytree(folder, tmp_path / name)
        for name, folder in {"model": tiny_model_dir, "teacher": tiny_model_dir, "data": prepared}.items()
    )
    for name in ("layers.json", "rows.jsonl"):
        (tmp_path / name).write_text("{}\n")
    folders = {"checkpoint_dir": str(model), "teacher_dir": str(teacher), "objective": "distill"}
    folders["data_dir"] = {"choices": [str(data), str(prepared)]}
    folders["quantize"] = {"choices": [None, str(tmp_path / "layers.json")]}
    search = search_of(PARAMETERS | folders, trials=1, metric={"exact_match": str(tmp_path / "rows.jsonl")})
    opened(search, tmp_path / "out")
    opened(search, tmp_path / "out")
    if changed == "data/data.json":
        info = read_json(tmp_path / changed)
        write_json(tmp_path / changed, info | {"train": info["train"] | {"hash": "0" * 64}})
    else:
        with open(tmp_path / changed, "a") as file:
            file.write(" \n")
    path = tmp_path / changed if "." in changed.split("/")[0] else (tmp_path / changed).parent
    with pytest.raises(UserError, match=f"^{path}: changed since the search there began; choose another --out_dir"):
        opened(search, tmp_path / "out")


def test_a_study_of_another_program_is_refused(search_of, tmp_path):
    (tmp_path / "out").mkdir()
    url = f"sqlite:///{tmp_path}/out/study.db"
    optuna.create_study(storage=url, study_name="search").optimize(lambda trial: 1.0, n_trials=1)
    with pytest.raises(UserError, match="has other parameters, trials|has other parameters"):
        opened(search_of(PARAMETERS, trials=1), tmp_path / "out")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("nonsense", "--storage is no URL of a database, such as sqlite:///study.db"),
        ("nonsense://x", "nonsense://x"),
        ("sqlite:///{folder}/rows.txt", "not a database"),
        ("sqlite:///{folder}/gone/study.db", "unable to open database file"),
        ("postgresql://me:secret@127.0.0.1:1/x", r"--storage postgresql://me:\*\*\*@127.0.0.1:1/x: "),
    ],
)
def test_databases_that_are_none(search_of, tmp_path, url, says):
    (tmp_path / "rows.txt").write_text("no database\n" * 100)
    url = url.format(folder=tmp_path)
    with pytest.raises(UserError, match=says) as caught, explained(url):
        open_study(search_of(PARAMETERS, trials=1), tmp_path / "out", url, "search", new=True)
    assert "secret" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_report_makes_no_database(search_of, tmp_path):
    search = search_of(PARAMETERS, trials=1)
    with pytest.raises(UserError, match="there is no search yet"):
        open_study(search, tmp_path / "out", f"sqlite:///{tmp_path}/out/study.db", "search", new=False)
    assert not (tmp_path / "out").exists()
    opened(search, tmp_path / "out")
    with pytest.raises(UserError, match="--study_name other: there is no such search yet"):
        open_study(search, tmp_path / "out", f"sqlite:///{tmp_path}/out/study.db", "other", new=False)


# -------------------------------------------------------------------------------------------- processes that are killed

WORKER = """
import random, sys, time
from pathlib import Path
from optuna.trial import TrialState
from search.search_file import read_search
from search.study import explained, open_study, release, take_trial
path, out_dir, log = map(Path, sys.argv[1:4])
url, search, numbers = f"sqlite:///{out_dir / 'study.db'}", read_search(path), random.Random(sys.argv[4])
with explained(url), open(log, "a") as file:
    study = open_study(search, out_dir, url, "search", new=True)
    while True:
        claim, others = take_trial(study, search, out_dir)
        if claim is None and not others:
            break
        if claim is None:
            time.sleep(0.05)
            continue
        pruned = False
        for step in range(2, 14, 2):
            if step in claim.reported:
                continue
            claim.trial.report(numbers.random(), step)
            claim.trial.set_user_attr("step", step)
            pruned = claim.trial.should_prune()
            if pruned:
                break
        study.tell(claim.trial, None if pruned else numbers.random(), TrialState.PRUNED if pruned else None)
        file.write(f"{claim.trial.number},{pruned}\\n")
        file.flush()
        release(claim)
"""


def test_processes_share_a_study_and_are_killed(write_search, tmp_path):
    """Four write to one SQLite file as fast as they can, two of them are killed: each trial ends once."""
    pruner = {"name": "asha", "first_rung": 1, "reduction_factor": 2}
    path = write_search(PARAMETERS, trials=30, pruner=pruner)
    (tmp_path / "worker.py").write_text(WORKER)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    files = [tmp_path / f"{number}.csv" for number in range(4)]
    commands = [[sys.executable, tmp_path / "worker.py", path, tmp_path / "out", file, f"{SEED}"] for file in files]
    workers = [subprocess.Popen(each, env=environment, stderr=subprocess.PIPE, text=True) for each in commands]
    wait_for(lambda: sum(map(len, rows(tmp_path))) > 5)
    for worker in workers[:2]:
        time.sleep(random.random() / 10)
        worker.send_signal(signal.SIGKILL)
    errors = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers[2:]] == [0, 0] and errors == [""] * 4, errors
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path}/out/study.db")
    assert {trial.state for trial in study.trials} == {TrialState.COMPLETE, TrialState.PRUNED}
    assert [trial.number for trial in study.trials] == [*range(30)]
    told = sorted(int(row[0]) for each in rows(tmp_path) for row in each)
    assert len(set(told)) == len(told) >= 28  # a killed one may not have written its last line


def rows(folder):
    return [list(csv.reader(path.open())) for path in folder.glob("[0-3].csv")]
