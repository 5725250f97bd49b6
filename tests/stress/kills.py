"""SIGKILLs at random instants, most of them while saving: is every finished file intact, and does the run end the same?

    python tests/stress/kills.py --kills 100

Each way to train (methods, quantisation, dropout, recomputation, optimisers, planners), merging and converting run once
without interruption. Then again, in processes that are killed: some after a random time, most before or after a random
one of the calls of saving that the uninterrupted run made. After each kill every file under its final name must be
intact, nothing that was complete may be gone, and there may be one temporary at most. When a killed run has finished,
its files are compared with the uninterrupted one's, byte for byte except times. A process is a fork of one that has
imported everything, so that a kill takes a fraction of a second. Prints JSON; exit status 1 if anything was lost.
"""

import collections
import csv
import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from shell import cli


@dataclass
class Settings:
    """The command line.

    Args:
        kills: How many processes to kill, shared among the ways to train, merging and converting.
        steps: Of a run; a checkpoint is saved after each.
        seed: Of the instants and the data; if not given, a random one.
    """

    kills: int = 100
    steps: int = 5
    seed: int | None = None

    def __post_init__(self):
        cli.check_numbers(self, "kills", above=0)
        cli.check_numbers(self, "steps", least=2)
        cli.check_numbers(self, "seed", least=0)


if __name__ == "__main__":
    settings = cli.parse(Settings)

import lightning.fabric  # noqa: F401 (all that a run imports, before the forks)
import matplotlib.pyplot  # noqa: F401
import torch
from conftest import tiny_reference, write_tiny_tokenizer
from safetensors.torch import load_file
from test_finetune import random_samples, write_data
from torch import _dynamo  # noqa: F401

import convert_hf_checkpoint
import finetune
import quantize
from shell import files
from tracking.run_files import RECORD
from training import metrics, run_folder
from weights import checkpoint

TIMES = ("seconds", "tokens_per_second", "memory_gb")
WAYS = {
    "lora, dropout": dict(lora_dropout=0.3),
    "dora, recompute, sorted": dict(method="dora", lora_dropout=0.2, recompute=1.0, planner="sorted_in_step"),
    "nf4, recompute": dict(quantize="bnb.nf4", precision="bf16-true", lora_dropout=0.2, recompute=0.5),
    "lora, 8-bit AdamW, random": dict(optimizer="adamw-8bit", weight_decay=0.1, planner="random"),
    "full, recompute": dict(method="full", recompute=1.0),
    "full, 8-bit AdamW, grouped": dict(method="full", optimizer="adamw-8bit", planner="grouped"),
    "full, AdamW in host memory": dict(method="full", offload="optimizer", precision="bf16-true"),
    "full, step in backward": dict(method="full", optimizer_in_backward=True, max_grad_norm=0.0),
}
# Functions at whose calls a process is killed: those that save, rotate and report.
POINTS = (
    (os, "fsync"), (os, "replace"), (os, "unlink"), (os, "rmdir"), (files, "_exchange"), (files, "_seal"),
    (files, "_take_place"), (files, "sha256"), (checkpoint, "write_shard"), (metrics, "write_rows"),
    (pathlib.Path, "rename"), (pathlib.Path, "write_text"), (pathlib.Path, "mkdir"), (shutil, "copy"),
    (finetune, "train_step"), (finetune, "validate"),
)  # fmt: skip


class Job(NamedTuple):
    """Work that is killed while it makes a folder. work: called with the folder; if it is there, it continues."""

    name: str
    place: Path
    work: Callable[[Path], None]


class Reference(NamedTuple):
    """The job done without interruption: its folder, its number of calls of POINTS, and how long it took."""

    out: Path
    calls: int
    seconds: float


class Result:
    """Counts and failures so far. kills: by the name of the job."""

    def __init__(self):
        self.kills, self.failures = collections.Counter(), []
        self.loadable = self.runs = self.bit_identical = 0


def main(s: Settings) -> None:
    """Kill until there were enough kills, print the counts, and exit with status 1 if anything was lost."""
    seed = random.SystemRandom().randrange(10**6) if s.seed is None else s.seed
    random.seed(seed)
    torch.manual_seed(seed)
    started, result, references = time.monotonic(), Result(), {}
    prepare_to_fork()
    with tempfile.TemporaryDirectory() as folder:
        jobs = make_jobs(Path(folder), s.steps)
        for job in itertools.cycle(jobs):
            if job.name not in references:
                references[job.name] = make_reference(job)
            kill_and_finish(job, references[job.name], result, s.kills)
            if result.kills.total() >= s.kills:
                break
    counts = {"kills": result.kills.total(), "loadable": result.loadable, "runs": result.runs,
              "bit_identical": result.bit_identical}  # fmt: skip
    print(json.dumps({**counts, "by_way": result.kills, "seed": seed, "seconds": round(time.monotonic() - started)}))
    for failure in result.failures:
        print(failure, file=sys.stderr)
    if result.failures:
        sys.exit(1)


def prepare_to_fork() -> None:
    """Use one thread, because a fork has no other, and import the libraries that a run imports late."""
    torch.set_num_threads(1)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    quantize.bitsandbytes()


def make_jobs(folder: Path, steps: int) -> list[Job]:
    """All ways to train, in random order, and merging and converting between them."""
    model, data = folder / "model", folder / "data"
    ended, _ = child(lambda: make_inputs(model, data))
    assert ended == 0, "the inputs could not be made"
    common = dict(
        checkpoint_dir=model, data_dir=data, max_steps=steps, save_interval=1, eval_interval=2, keep_last=2,
        global_batch_size=4, micro_batch_tokens=1000, learning_rate=1e-2, warmup_steps=1, resume=True,
    )  # fmt: skip

    def train(flags):
        precision = flags.get("precision", "32-true")
        return lambda out: finetune.main(finetune.Settings(**{**common, **flags, "precision": precision}, out_dir=out))

    def convert(**flags):
        def work(out):
            if not out.exists():
                convert_hf_checkpoint.main(convert_hf_checkpoint.Settings(**flags, out_dir=out))

        return work

    adapter = folder / "adapter"
    ended, _ = child(lambda: train(WAYS["lora, dropout"])(adapter))
    assert ended == 0, "a run without interruption failed"
    works = {name: train(flags) for name, flags in WAYS.items()}
    works |= {"merging": convert(adapter_dir=adapter / "final"), "converting": convert(source=model, dtype="float16")}
    names = random.sample(sorted(works), len(works))
    return [Job(name, folder / f"job {number}", works[name]) for number, name in enumerate(names)]


def make_inputs(model: Path, data: Path) -> None:
    """A tiny random model with a tokenizer, and prepared data for it."""
    tiny_reference("llama").save_pretrained(model)
    write_tiny_tokenizer(model)
    write_data(data, model, random_samples(10), random_samples(3))


# ------------------------------------------------------------------------------------------------- children and kills


def child(work: Callable[[], None], dies_at: int | None = None, dies_after: float | None = None) -> tuple[int, int]:
    """Do `work` in a fork without output. Returns its exit code (-9: killed) and how many calls of POINTS it made.

    dies_at: the number of the call at which it is killed. dies_after: seconds after which it is killed.
    """
    counted = tempfile.TemporaryFile()  # noqa: SIM115 (shared with the child)
    pid = os.fork()
    if pid == 0:
        silence = os.open(os.devnull, os.O_WRONLY)
        if not os.environ.get("KILLS_DEBUG"):
            os.dup2(silence, 1)
            os.dup2(silence, 2)
        status = 1
        try:
            calls = die_at_call(dies_at)
            work()
            os.pwrite(counted.fileno(), str(next(calls)).encode(), 0)
            status = 0
        finally:
            os._exit(status)
    if dies_after is not None:
        time.sleep(dies_after)
        os.kill(pid, signal.SIGKILL)  # no other process can have its number before it is waited for
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), int(os.pread(counted.fileno(), 20, 0) or 0)


def die_at_call(number: int | None) -> Iterator[int]:
    """Count the calls of POINTS; be killed before or after the call with this number (None: never).

    Returns the counter.
    """
    calls, afterwards = itertools.count(), random.random() < 0.5

    def counting(function):
        def wrapped(*args, **kwargs):
            mine = next(calls) == number
            if mine and not afterwards:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            if mine:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    for owner, name in POINTS:
        setattr(owner, name, counting(getattr(owner, name)))
    return calls


# --------------------------------------------------------------------------------------------------- kill and compare


def make_reference(job: Job) -> Reference:
    """Do the job without interruption."""
    out = job.place / "reference" / "out"
    out.parent.mkdir(parents=True)
    started = time.monotonic()
    ended, calls = child(lambda: job.work(out))
    assert ended == 0, f"{job.name} failed without interruption"
    return Reference(out, calls, time.monotonic() - started)


def kill_and_finish(job: Job, reference: Reference, result: Result, most: int) -> None:
    """Kill the job up to 5 times, check what is left each time, let it finish, and compare. most: kills of all jobs."""
    out = job.place / "killed" / "out"
    shutil.rmtree(out.parent, ignore_errors=True)
    out.parent.mkdir(parents=True)
    for _ in range(random.randint(1, 5)):
        kill(job, out, reference, result)
        if result.kills.total() >= most:
            break
    ended, _ = child(lambda: job.work(out))
    result.runs += 1
    differences = [f"it could not go on ({ended})"] if ended else differing_files(reference.out, out)
    result.bit_identical += not differences
    result.failures += [f"{job.name}: {line}" for line in differences]


def kill(job: Job, out: Path, reference: Reference, result: Result) -> None:
    """Run the job, kill it at a random instant, and check what is left."""
    before = finished_names(out)
    if random.random() < 0.7:
        death = dict(dies_at=random.randrange(reference.calls))
    else:
        death = dict(dies_after=random.uniform(0, reference.seconds))
    ended, _ = child(lambda: job.work(out), **death)
    if ended not in (0, -signal.SIGKILL):
        result.failures.append(f"{job.name}: {death}: it ended with {ended} and not by the kill")
    if ended == -signal.SIGKILL:
        result.kills[job.name] += 1
        lost = what_was_lost(out, before)
        result.loadable += not lost
        result.failures += [f"{job.name}: {death}: {line}" for line in lost]


def finished_names(out: Path) -> tuple[int, bool]:
    """What is complete in a folder: the newest checkpoint's step, and whether the final result is there."""
    steps = [run_folder.step_of(path) for path in run_folder.checkpoints(out)] if out.is_dir() else []
    return max(steps, default=0), (out / "final").exists() or (out / files.MANIFEST).exists()


def what_was_lost(out: Path, before: tuple[int, bool]) -> list[str]:
    """What is wrong after a kill, in lines; before: what `finished_names` returned before it."""
    found = [path for folder in (out.parent, out) if folder.is_dir() for path in folder.iterdir()]
    hidden = [path.name for path in found if path.name.startswith(".")]
    lines = [f"more than one temporary: {hidden}"] if len(hidden) > 1 else []
    if not all(now >= then for now, then in zip(finished_names(out), before, strict=True)):
        lines.append(f"complete before: {before}, after: {finished_names(out)}")
    for path in found:
        if path.name.startswith(".") or path == out and not (out / "config.json").exists():
            continue
        try:
            check_intact(path, in_run=path.parent == out)
        except Exception as error:
            lines.append(f"{type(error).__name__}: {error}")
    return lines


def check_intact(path: Path, in_run: bool) -> None:
    """Raise some error if a finished folder, or a JSON file of the run's folder, is damaged."""
    if path.is_dir():
        files.check_manifest(path)
        for each in path.glob("*.safetensors"):
            load_file(each)
        for each in path.glob("*.json"):
            files.read_json(each)
    elif path.suffix == ".json" and in_run:
        files.read_json(path)


def record_without_times(path: Path) -> dict:
    """A run's record without its id, and without when and where it ran."""
    return {key: value for key, value in files.read_json(path).items() if key not in ("id", "sessions")}


def differing_files(reference: Path, out: Path) -> list[str]:
    """What differs between the files of two folders, in lines; times and the folder's name may differ."""
    paths = [path.relative_to(reference) for path in sorted(reference.rglob("*")) if path.is_file()]
    others = [path.relative_to(out) for path in sorted(out.rglob("*")) if path.is_file()]
    others = [path for path in others if path.name != "metrics-redone.csv"]  # rows of steps that ran twice
    different = [f"{path} is in one of the two" for path in sorted({*paths} ^ {*others})]
    for path in sorted({*paths} & {*others}):
        if path.name == "metrics.csv":
            same = metrics_without_times(reference / path) == metrics_without_times(out / path)
        elif path == Path(RECORD):
            same = record_without_times(reference / path) == record_without_times(out / path)
        elif path.name in ("summary.json", "loss.png", "config.yaml", run_folder.SETTINGS):
            continue  # times, memory, the name of the folder
        elif path.name == files.MANIFEST and path.parent.name.startswith("step-"):
            continue  # it has the hash of settings.json
        else:
            same = (reference / path).read_bytes() == (out / path).read_bytes()
        different += [] if same else [f"{path} differs"]
    return different


def metrics_without_times(path: Path) -> list[list[tuple[str, str]]]:
    """The rows of metrics.csv without the columns of time and memory."""
    with open(path, newline="") as file:
        return [[(key, value) for key, value in row.items() if key not in TIMES] for row in csv.DictReader(file)]


if __name__ == "__main__":
    cli.run(main, settings)
