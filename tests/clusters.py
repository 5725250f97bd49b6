"""What runs on a cluster, run here: the files of the training image, a tiny model, and runs that are interrupted."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml
from conftest import ROOT
from dockerfiles import by_name, copied
from test_finetune import random_samples, write_data

DOCKERFILE = ROOT / "deploy" / "Dockerfile"
KUBERNETES = ROOT / "deploy" / "kubernetes"
SIGNAL_AFTER = 4  # steps of a process, until it is interrupted: 24 are a run, and 5 a checkpoint
# Of configs/dev.yaml, what has to be other with a tiny model on a CPU; steps long enough for a signal to land in one.
TINY = {"precision": "32-true", "global_batch_size": 200, "save_interval": 5, "eval_interval": 10}


def write_project(folder, model_dir):
    """A folder as /onetune is in the container: the image's files, and what is mounted, with a tiny model."""
    for name, path in copied(DOCKERFILE).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(path.read_bytes())
    config = yaml.safe_load((folder / "configs" / "dev.yaml").read_text())
    (folder / "configs" / "dev.yaml").write_text(yaml.safe_dump(config | TINY))
    model = folder / config["checkpoint_dir"]
    model.parent.mkdir(parents=True)
    model.symlink_to(model_dir)
    write_data(folder / "prepared" / "my", model_dir, random_samples(1600), random_samples(20))
    (folder / "out").mkdir()


def documents(path):
    """The objects of a YAML file."""
    return [*yaml.safe_load_all(path.read_text())]


def containers(kubernetes_object):
    """The containers of a Job or a Pod, {name: container}."""
    spec = kubernetes_object["spec"]
    spec = spec.get("template", {}).get("spec", spec)
    return {each["name"]: each for each in (*spec.get("initContainers", []), *spec["containers"])}


def container_command(folder, args):
    """What the image runs for the arguments, in `folder` in place of /onetune; tini, process 1, need not be here."""
    (text,) = by_name(DOCKERFILE)["ENTRYPOINT"]
    first, dashes, *entrypoint = json.loads(text)
    assert (first, dashes) == ("tini", "--")
    return [*(word.replace("/onetune", str(folder)) for word in entrypoint), *args]


def environment(folder, **values):
    """The variables of a process in the project's folder: this Python is the first in PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": "", **values}


def start(folder, command, **values):
    """A process in the folder. What it prints goes to `log` there."""
    with open(folder / "log", "a") as log:
        return subprocess.Popen(command, cwd=folder, env=environment(folder, **values), stdout=log, stderr=log)


def steps_done(folder):
    """The number of the last step in the metrics of the run out/dev; 0 if there is none."""
    path = folder / "out" / "dev" / "metrics.csv"
    rows = [*csv.DictReader(path.read_text().splitlines())] if path.exists() else []
    return int(rows[-1]["step"]) if rows else 0


def checkpoint_steps(folder):
    """The steps of the checkpoints of the run out/dev, the oldest first."""
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "out" / "dev").glob("step-*"))


def wait_for_steps(folder, process, before, seconds=120):
    """Wait until a process has done SIGNAL_AFTER steps more than `before`."""
    end = time.monotonic() + seconds
    while steps_done(folder) < before + SIGNAL_AFTER:
        assert process.poll() is None, f"it ended by itself:\n{(folder / 'log').read_text()[-2000:]}"
        assert time.monotonic() < end, f"no step after {seconds} s:\n{(folder / 'log').read_text()[-2000:]}"
        time.sleep(0.01)


def interrupt(folder, command, number=signal.SIGTERM, grace=60, **values):
    """Start a process and send it a signal in the middle of a step. Returns its exit status, as a shell counts it."""
    before = steps_done(folder)
    process = start(folder, command, **values)
    try:
        wait_for_steps(folder, process, before)
        process.send_signal(number)
        status = process.wait(grace)
    finally:
        process.kill()
        process.wait()
    return 128 - status if status < 0 else status


def finish(folder, command, **values):
    """Run a process to its end: its exit status."""
    process = start(folder, command, **values)
    try:
        return process.wait(120)
    finally:
        process.kill()
        process.wait()


def final_files(folder):
    """The bytes of everything in final/ of the run out/dev, by name."""
    final = folder / "out" / "dev" / "final"
    return {str(path.relative_to(final)): path.read_bytes() for path in sorted(final.rglob("*")) if path.is_file()}
