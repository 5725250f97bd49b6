"""A device that dies at any moment: the others end with a line that names it, and the run goes on from there."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from devices import start_processes
from test_finetune import random_samples, settings

from shell.files import check_manifest
from training import run_folder

__all__ = ["settings"]

ENDS = 60  # seconds, in which all others have ended
STEPS = 12


def command_of(s):
    """finetune.py with these settings, which --resume may follow."""
    path = s.out_dir.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(run_folder.plain(s)))
    return [sys.executable, "finetune.py", "--config", path]


def wait_for(condition, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def files_of(folder):
    """The bytes of all that the end of a run leaves."""
    return {path.name: path.read_bytes() for path in sorted((folder / "final").iterdir())}


@pytest.fixture
def of_devices(settings):
    """`of_devices(2, "name", parallel=...)`: settings of a run on so many devices, with a checkpoint at every step."""

    def make(devices, name, **layout):
        train = None if (settings(name="x").data_dir).exists() else random_samples(30)
        return settings(
            train, name=name, devices=devices, max_steps=STEPS, save_interval=1, keep_last=3, micro_batch_tokens=40,
            eval_interval=0, method="full", **layout,
        )  # fmt: skip

    return make


def until_the_end(s, count):
    """Run to the end on so many devices, without a death. Returns the bytes of final/."""
    for process in start_processes(count, command_of(s)):
        process.communicate(timeout=200)
        assert process.returncode == 0
    return files_of(s.out_dir)


def newest_step(s):
    return run_folder.step_of([None, *run_folder.checkpoints(s.out_dir)][-1])


def kill_one(s, count, resume, least):
    """Run, and kill a random device at a random instant after `least` steps are saved. Whether the run had ended."""
    before = newest_step(s)  # one more shows that all are there: until then they are their launcher's to watch
    processes = start_processes(count, [*command_of(s), *(["--resume"] if resume else [])])
    wait_for(lambda: newest_step(s) >= max(least, before + 1))
    time.sleep(random.uniform(0, 1.0))
    victim = random.randrange(count)
    processes[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    texts = [process.communicate(timeout=ENDS + 30)[0] for process in processes]
    if processes[victim].returncode == 0:
        return True
    assert time.monotonic() - killed < ENDS
    for rank, process in enumerate(processes):
        if rank != victim and process.returncode:  # those that had ended already need say nothing
            assert re.search(rf"device {victim + 1} of {count} \(.*, process \d+\) has died", texts[rank]), texts[rank]
    check_manifest(run_folder.checkpoints(s.out_dir)[-1])
    return False


def test_a_death_ends_the_others_and_nothing_else(of_devices):
    expected = until_the_end(of_devices(2, "alone", parallel="tensor=2"), 2)
    s = of_devices(2, "killed", parallel="tensor=2")
    kill_one(s, 2, resume=False, least=3)
    for process in start_processes(2, [*command_of(s), "--resume"]):
        assert process.communicate(timeout=200) and process.returncode == 0
    assert files_of(s.out_dir) == expected


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"parallel": "tensor=2", "shard": True}, {"parallel": "pipeline=2,tensor=2"}])
def test_ten_deaths_among_four(of_devices, layout):
    expected = until_the_end(of_devices(4, "alone", **layout), 4)
    deaths = 0
    while deaths < 10:
        s = of_devices(4, f"killed-{deaths}", **layout)
        for least in (1, 3, 5, 7, 9):
            if kill_one(s, 4, resume=least > 1, least=least):
                break
            deaths += 1
        for process in start_processes(4, [*command_of(s), "--resume"]):
            assert process.communicate(timeout=200) and process.returncode == 0
        assert files_of(s.out_dir) == expected


def children_of(pid):
    """The processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_torchrun_goes_on_by_itself(of_devices, tmp_path):
    expected = until_the_end(of_devices(2, "alone", parallel="pipeline=2"), 2)
    s = of_devices(2, "restarted", parallel="pipeline=2")
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "2",
        "--standalone",
    ]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    refused = subprocess.run([*start, *map(str, command_of(s)[1:])], env=environment, capture_output=True, text=True)
    assert "needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment" in refused.stderr
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen([*start, *map(str, command_of(s)[1:])], env=environment, stdout=log, stderr=log)
    wait_for(lambda: len(run_folder.checkpoints(s.out_dir)) >= 2)
    os.kill(random.choice(children_of(process.pid)), signal.SIGKILL)
    assert process.wait(timeout=200) == 0, (tmp_path / "log").read_text()
    assert files_of(s.out_dir) == expected
    sessions = yaml.safe_load((s.out_dir / "record.json").read_text())["sessions"]
    assert len(sessions) == 2
