"""sweep.py as a user runs it: real trainings of the tiny model in child processes."""

import csv
import hashlib
import os
import re
import shlex
import signal
import subprocess
import sys

import optuna
import psutil
import pytest
import yaml
from conftest import ROOT, wait_for
from matplotlib.image import imread

from search.metric import read_column
from search.study import own_database

RATES = {"learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}}


def start(path, out_dir, *args):
    """A process of sweep.py."""
    command = [sys.executable, ROOT / "sweep.py", "--sweep", path, "--out_dir", out_dir, *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process, status=0, timeout=300):
    """What a process printed; it must end with that status, and no word of an error but for that."""
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == status, out + err
    assert status == 2 or err == "", err
    return out if status != 2 else err


def table(out_dir):
    with open(out_dir / "trials.csv", newline="") as file:
        return list(csv.DictReader(file))


def study_of(out_dir):
    return optuna.load_study(study_name="search", storage=own_database(out_dir))


def test_two_processes_share_a_search(write_search, tmp_path):
    """Each trial is started once; both write the same report, and it can be made again."""
    out_dir = tmp_path / "out"
    parameters = RATES | {
        "lora_r": {"choices": [2, 4]},
        "lora_targets": {"choices": [["q_proj", "v_proj"], "all-linear"]},
    }
    path = write_search(parameters, trials=4)
    printed = [ended(process) for process in [start(path, out_dir) for _ in range(2)]]
    lines = [[line for line in text.splitlines() if line.startswith("trial ")] for text in printed]
    assert sorted(line.split(":")[0] for line in sum(lines, []) if ":" in line) == [f"trial {i}" for i in range(4)]
    assert all(any(":" in line for line in each) for each in lines), "one process has done everything"
    rows = table(out_dir)
    assert sorted(int(row["trial"]) for row in rows) == [*range(4)]
    assert [(row["state"], row["starts"], row["step"]) for row in rows] == [("complete", "1", "6")] * 4
    losses = [float(row["val_loss"]) for row in rows]
    assert losses == sorted(losses)
    for row in rows:
        folder = out_dir / f"trial-{int(row['trial']):04d}"
        assert read_column(folder, "val_loss")[-1] == (6, float(row["val_loss"]))
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert [str(config[flag]) for flag in parameters] == [row[flag] for flag in parameters]
        assert (folder / "final" / "adapter_model.safetensors").is_file()
        assert re.search(r"^steps +6$", (folder / "output.txt").read_text(), re.MULTILINE)
    for text in printed:
        assert f"best: trial {rows[0]['trial']}, val_loss" in text and "python finetune.py --checkpoint_dir=" in text
        assert "explains (fANOVA): " in text
    assert imread(out_dir / "search.png").std() > 0
    before = (out_dir / "trials.csv").read_bytes()
    assert ended(start(path, out_dir, "--report")).splitlines()[-3:] == printed[0].splitlines()[-3:]
    assert (out_dir / "trials.csv").read_bytes() == before
    assert "needs more" not in printed[0]
    refused = write_search(parameters, trials=4, sampler="random")
    assert "has other sampler: only trials may change" in ended(start(refused, out_dir), status=2)


def test_what_is_killed_goes_on_and_ends_with_the_same_bytes(write_search, tmp_path, run_script):
    """Ctrl-C, then kill -9 of both processes, then of sweep.py alone: one trial, and as if nothing had happened."""
    out_dir = tmp_path / "out"
    folder = out_dir / "trial-0000"
    path = write_search(RATES | {"max_steps": 400, "save_interval": 25, "eval_interval": 25}, trials=1)

    def steps():
        return len(read_column(folder, "loss"))

    def started():
        """sweep.py and its child, 40 steps later."""
        process, before = start(path, out_dir), steps()
        wait_for(lambda: steps() > before + 40 or process.poll() is not None, 240)
        assert process.poll() is None, process.communicate()
        return process, psutil.Process(process.pid).children()[0]

    process, _ = started()
    process.send_signal(signal.SIGINT)
    assert "stopped: the same command goes on" in ended(process, status=130)
    reached = [int(each.name[5:]) for each in folder.glob("step-*")]
    assert max(reached) == steps()  # the signal was passed on, and the trial has saved what it had

    process, child = started()
    process.kill()
    child.kill()
    assert process.wait() == -9
    wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, 240)

    process, child = started()
    process.kill()
    process.wait()
    printed = ended(start(path, out_dir))  # waits for the run that trains on
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE

    (trial,) = study_of(out_dir).trials
    assert trial.state == optuna.trial.TrialState.COMPLETE and trial.user_attrs["starts"] == 3
    assert sorted(trial.intermediate_values) == [*range(25, 401, 25)]
    (command,) = [line for line in printed.splitlines() if line.startswith("python finetune.py ")]
    code, out, err = run_script(*shlex.split(command)[1:], "--out_dir", tmp_path / "never_killed")
    assert code == 0, out + err
    assert hashes(folder / "final") == hashes(tmp_path / "never_killed" / "final")
    assert trial.value == read_column(tmp_path / "never_killed", "val_loss")[-1][1]
    assert dict(read_column(tmp_path / "never_killed", "val_loss")) == trial.intermediate_values


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_a_grid_with_a_bad_trial_and_one_that_fails(write_search, tmp_path):
    """A rate of next to nothing is pruned, one that is far too high has a loss that is no number."""
    rates = [1e-2, 1e-9, 1e30]
    pruner = {"name": "asha", "first_rung": 1, "reduction_factor": 2}
    keys = {"sampler": "grid", "pruner": pruner, "seed": seed_with_order(rates)}
    parameters = {"learning_rate": {"choices": rates}, "max_steps": 200, "eval_interval": 10, "warmup_steps": 0}
    out = ended(start(write_search(parameters, **keys), tmp_path / "out"))
    good, pruned, failed = table(tmp_path / "out")
    assert [float(row["learning_rate"]) for row in (good, pruned, failed)] == rates
    assert (good["state"], good["step"], pruned["state"], failed["state"]) == ("complete", "200", "pruned", "failed")
    assert int(pruned["step"]) < 200 and float(pruned["val_loss"]) > float(good["val_loss"])
    folder = tmp_path / "out" / f"trial-{int(pruned['trial']):04d}"
    assert not (folder / "final").exists() and list(folder.glob("step-*")), (
        "it was ended with a checkpoint, and is kept"
    )
    assert " is nan" in failed["reason"] or " is inf" in failed["reason"]
    assert f"trial {pruned['trial']}: pruned at step " in out and f"trial {failed['trial']}: failed: step " in out


def seed_with_order(rates):
    """A seed with which the grid begins with its first value."""
    for seed in range(100):
        sampler = optuna.samplers.GridSampler({"learning_rate": rates}, seed)
        if [value for (value,) in sampler._all_grids] == rates:
            return seed
    raise AssertionError


def test_exact_match(write_search, prepared, tmp_path):
    out_dir = tmp_path / "which?%20"  # in a URL it would be another
    metric = {"exact_match": str(prepared.parent / "rows.jsonl"), "limit": 4, "max_new_tokens": 8}
    path = write_search(RATES | {"method": "full"}, trials=1, metric=metric)
    out = ended(start(path, out_dir))
    (row,) = table(out_dir)
    assert row["state"] == "complete" and 0 <= float(row["exact match"]) <= 1 and "trial 0: exact match " in out
    assert (out_dir / "trial-0000" / "exact_match.json").is_file()
    study = study_of(out_dir)
    assert study.direction == optuna.study.StudyDirection.MAXIMIZE
    assert all(value < 0 for value in study.trials[0].intermediate_values.values())


def test_a_signal_before_the_first_trial(write_search, tmp_path):
    """While another process holds the study's lock."""
    import fcntl

    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / "study.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = start(write_search(RATES, trials=1), tmp_path / "out")
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=4)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
    assert "Traceback" not in process.communicate()[1] and os.listdir(tmp_path / "out") == ["study.lock"]
