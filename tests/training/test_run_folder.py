"""What a run survives: signals, kills, full disks, damaged files, another base or other data; and a budget of time."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_finetune import (  # noqa: F401 (fixtures)
    column,
    final_weights,
    random_samples,
    rows,
    run,
    run_and_kill,
    settings,
    write_data,
)

import convert_hf_checkpoint
import finetune
from batching import open_samples
from shell import files
from shell.cli import UserError
from shell.files import MANIFEST, check_manifest, clear_leftovers, new_folder
from shell.process import SIGNALS
from training import build, metrics, run_folder, schedule
from training.run_folder import checkpoints, step_of
from training.schedule import TimeBudget
from training.steps import planned_steps
from weights.checkpoint import load_model
from weights.safetensors_format import read_header

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def before_step(monkeypatch, number, act):
    """Let `act` happen when the step `number` (from 0) is about to begin."""
    train_step = finetune.train_step

    def step(the_run, micro_batches, step, rate):
        if step == number:
            act()
        return train_step(the_run, micro_batches, step, rate)

    monkeypatch.setattr(finetune, "train_step", step)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    path.write_bytes(content)


# ----------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_and_saves(run, settings, monkeypatch, number, status):  # noqa: F811
    train, flags = random_samples(10), dict(max_steps=5, eval_interval=2, lora_dropout=0.2)
    whole = run(train, random_samples(3), name="whole", **flags)
    s, handlers = settings(name="stopped", **flags), [signal.getsignal(each) for each in SIGNALS]
    with monkeypatch.context() as patch:
        before_step(patch, 2, lambda: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as caught:
            finetune.main(s)
    assert caught.value.code == status
    assert column(s.out_dir, "step") == [1, 2, 3] and "step-000003" in names(s.out_dir)
    assert not (s.out_dir / "final").exists()
    assert [signal.getsignal(each) for each in SIGNALS] == handlers
    resumed = run(name="stopped", resume=True, **flags)
    assert final_weights(resumed).read_bytes() == final_weights(whole).read_bytes()
    assert rows(resumed) == rows(whole)


def test_a_signal_in_the_last_step_lets_the_run_finish(run, monkeypatch):  # noqa: F811
    before_step(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert (run(random_samples(4), max_steps=2) / "final" / MANIFEST).is_file()


def test_a_second_signal_ends_the_process_at_once():
    pid = os.fork()
    if pid == 0:
        with run_folder.signals_noted() as noted:
            os.kill(os.getpid(), signal.SIGTERM)
            if noted == [signal.SIGTERM]:  # and still here
                os.kill(os.getpid(), signal.SIGINT)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGINT


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup and a shell's & leave it
    try:
        with run_folder.signals_noted() as noted:
            os.kill(os.getpid(), signal.SIGINT)
        assert noted == []
    finally:
        signal.signal(signal.SIGINT, before)


# ------------------------------------------------------------------------------------------------------- time budget


@pytest.fixture
def clock(monkeypatch):
    """A clock for the time budget that a test moves: `clock.now`, in seconds."""
    result = SimpleNamespace(now=100.0)
    monkeypatch.setattr(schedule, "time", SimpleNamespace(monotonic=lambda: result.now))
    return result


@pytest.mark.parametrize("drift", [0.0, 0.5, -0.4])
def test_the_schedule_ends_with_the_budget(clock, drift):
    """Steps of 2 s, that become longer or shorter on the way, validations of 30 s, saves of 10 s; an hour in all."""
    budget, rng = TimeBudget(3600, clock.now), random.Random(random.random())
    seconds, intervals = {"step": 2.0, "validation": 30.0, "save": 10.0}, {"validation": 100, "save": 50}
    course, done, last = [], 0, False

    def take(what):
        with budget.measuring(what):
            clock.now += seconds[what] * rng.uniform(0.9, 1.1) * (1 + drift * budget.spent() / 3600)

    while not last:
        course.append((budget.spent(), budget.progress))
        take("step")
        done += 1
        due = {what for what, n in intervals.items() if done % n == 0}
        budget.advance(10**9, intervals)
        last = not budget.another_fits(due)
        for what in due | ({"validation"} if last else set()):
            take(what)
    take("save")
    assert 3450 < budget.spent() <= 3600  # a validation for which there is no time, of up to 50 s, ends it earlier
    progress = [value for _, value in course]
    assert progress == sorted(progress) and progress[0] == 0 and 0.95 < progress[-1] < 1
    if not drift:
        assert all(abs(value - spent / 3560) < 0.06 for spent, value in course)


def test_a_budget_that_is_not_the_limit_gives_the_usual_schedule(clock, settings):  # noqa: F811
    """When the steps end long before the time, the rates are those by steps."""
    s, budget = settings(learning_rate=1.0, warmup_steps=3), TimeBudget(10**6, clock.now)
    rates = []
    for step in range(20):
        rates.append(schedule.rate_at(s, step, budget.progress))
        with budget.measuring("step"):
            clock.now += 1
        if step + 1 > s.warmup_steps:
            budget.advance(20 - step - 1, {})
    assert rates == pytest.approx([schedule.learning_rate(s, step, 20) for step in range(20)])


def test_a_run_ends_at_its_budget(run, settings, monkeypatch, clock):  # noqa: F811
    """Steps of 10 s in 300: about 29 of 1,000 are made, validated at the end, saved; killed and resumed on the way."""
    train_step = finetune.train_step

    def slow_step(*args, **kwargs):
        clock.now += 10
        return train_step(*args, **kwargs)

    monkeypatch.setattr(finetune, "train_step", slow_step)
    flags = dict(max_steps=1000, time_budget="5m", eval_interval=50, save_interval=5)
    s = settings(random_samples(12), random_samples(3), **flags)
    s.started = clock.now
    run_and_kill(s, monkeypatch, 12)
    clock.now += 10**5  # away
    s = settings(resume=True, **flags)
    s.started = clock.now
    finetune.main(s)
    steps, rates = column(s.out_dir, "step"), column(s.out_dir, "learning_rate")
    assert steps == list(range(1, len(steps) + 1)) and 26 <= len(steps) <= 29
    assert rates == sorted(rates, reverse=True) and rates[0] == 1e-2 and rates[-1] < 1e-3
    assert "val_loss" in rows(s.out_dir)[-1] and (s.out_dir / "final" / MANIFEST).is_file()
    with pytest.raises(UserError, match="--time_budget None"):
        finetune.main(settings(resume=True, **{**flags, "time_budget": None}))
    more = settings(resume=True, **{**flags, "time_budget": "6m"})
    more.started = clock.now
    finetune.main(more)
    assert len(column(s.out_dir, "step")) > len(steps)


# -------------------------------------------------------------------------------------------------------- bit-exact


@pytest.mark.parametrize(
    "flags",
    [
        dict(planner="sorted_in_step", recompute=1.0, lora_dropout=0.2, micro_batch_tokens=40),
        dict(planner="random", quantize="bnb.nf4", recompute=0.5, lora_dropout=0.2, optimizer="adamw-8bit"),
        dict(planner="grouped", method="full", optimizer="adamw-8bit", recompute=1.0),
        dict(method="full", optimizer_in_backward=True, max_grad_norm=0.0, micro_batch_tokens=1000),
        dict(method="full", optimizer="adamw-8bit-paged", precision="bf16-true"),
        dict(method="full", offload="optimizer", precision="bf16-true", recompute="offload", micro_batch_tokens=40),
        dict(method="full", offload="optimizer", max_grad_norm=0.0, micro_batch_tokens=1000, weight_decay=0.1),
        dict(method="dora", optimizer="adamw-paged", quantize="bnb.int8", deterministic=True),
    ],
    ids=lambda flags: " ".join(map(str, flags.values())),
)
def test_every_planner_and_optimizer_resumes_to_the_same_bytes(run, settings, monkeypatch, request, flags):  # noqa: F811
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    options = dict(max_steps=6, save_interval=2, eval_interval=3, **flags)
    whole = run(random_samples(10), random_samples(3), name="whole", **options)
    s = settings(name="killed", **options)
    run_and_kill(s, monkeypatch, 5)
    resumed = run(name="killed", resume=True, **options)
    assert final_weights(resumed).read_bytes() == final_weights(whole).read_bytes()
    assert rows(resumed) == rows(whole)
    for name in ("optimizer.safetensors", "optimizer.json"):
        assert (resumed / "step-000006" / name).read_bytes() == (whole / "step-000006" / name).read_bytes()


# ----------------------------------------------------------------------------------------------------------- metrics


def test_rows_of_steps_that_are_made_again_are_kept(run, settings, monkeypatch):  # noqa: F811
    flags = dict(max_steps=6, save_interval=2, eval_interval=0)
    s = settings(random_samples(8), **flags)
    run_and_kill(s, monkeypatch, 5)
    path = s.out_dir / "metrics.csv"
    with open(path, "a") as file:
        file.write("6,1.5,0.1")  # the row that was being written
    before = metrics.read_rows(path)[1]
    run(resume=True, **flags)
    assert column(s.out_dir, "step") == [1, 2, 3, 4, 5, 6]
    assert metrics.read_rows(s.out_dir / "metrics-redone.csv")[1] == before[4:]
    assert metrics.read_rows(path)[1][:4] == before[:4]


def test_a_number_cut_short_is_not_taken_for_a_row(tmp_path):
    """Of "12,…" the first character would be the row of step 1."""
    path = tmp_path / "metrics.csv"
    written = metrics.Metrics(path, 0, {}, True)
    written.add({"step": 11, "loss": 1.0})
    with open(path, "a") as file:
        file.write("1")
    resumed = metrics.Metrics(path, 11, {}, True)
    assert [row["step"] for row in resumed.rows] == [11]


@pytest.mark.parametrize("line", ["abc,1\r\n", "\r\n7\r\n", "1" + "," * 40 + "\r\n"])
def test_a_damaged_metrics_file_is_named(tmp_path, line):
    path = tmp_path / "metrics.csv"
    metrics.Metrics(path, 0, {}, True).add({"step": 1, "loss": 1.0})
    with open(path, "a", newline="") as file:
        file.write(line)
    with pytest.raises(UserError, match=r"metrics\.csv is damaged"):
        metrics.Metrics(path, 1, {}, True)


# --------------------------------------------------------------------------------------------------------------- disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 48 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder, leave):
    """Take all of a file system but `leave` bytes."""
    with open(folder / "filler", "wb") as file:
        file.write(bytes(shutil.disk_usage(folder).free - leave))


@pytest.mark.parametrize("method, leave", [("lora", 0), ("lora", 200_000), ("full", 300_000)])
def test_a_full_disk_stops_the_run_and_leaves_the_checkpoint(run, settings, monkeypatch, small_disk, method, leave):  # noqa: F811
    flags = dict(max_steps=4, save_interval=1, method=method, eval_interval=0)
    whole = run(random_samples(8), name="whole", **flags)
    s = settings(**flags, out_dir=small_disk / "run")
    with monkeypatch.context() as patch:
        before_step(patch, 2, lambda: fill(small_disk, leave))
        with pytest.raises(
            UserError, match="could not be written .*[Nn]o space left.*step-00000[23] is whole, --resume"
        ):
            finetune.main(s)
    assert not [name for name in names(s.out_dir) if name.startswith(".")]
    for path in run_folder.checkpoints(s.out_dir):
        check_manifest(path)
    (small_disk / "filler").unlink()
    finetune.main(settings(**flags, out_dir=small_disk / "run", resume=True))
    assert final_weights(s.out_dir).read_bytes() == final_weights(whole).read_bytes()
    assert rows(s.out_dir) == rows(whole)


def test_a_run_that_the_disk_cannot_hold_never_starts(settings, small_disk):  # noqa: F811
    fill(small_disk, 10**6)
    s = settings(random_samples(8), out_dir=small_disk / "run")
    with pytest.raises(UserError, match="needs 0.02 GB .* are free: make room, or lower --keep_last"):
        finetune.main(s)
    assert not s.out_dir.exists()


def test_a_read_only_folder_is_refused(settings, small_disk):  # noqa: F811
    (small_disk / "run").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(UserError, match="cannot be written to"):
        finetune.main(settings(random_samples(8), out_dir=small_disk / "run"))


def test_a_limit_on_the_size_of_files_is_one_line(settings, run_script, tmp_path):  # noqa: F811
    """As `ulimit -f` sets it: the optimiser's file is larger than 64 KB."""
    s = settings(random_samples(8), max_steps=3, save_interval=2, eval_interval=0)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(run_folder.plain(s)))
    command = f"ulimit -f 64; exec {sys.executable} {ROOT / 'finetune.py'} --config {tmp_path / 'c.yaml'}"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ") and "File too large" in line and "there is no checkpoint yet" in line
    assert not [name for name in names(s.out_dir) if "step" in name or name == "final"]


def test_a_folder_that_vanishes_stops_the_run(settings, monkeypatch):  # noqa: F811
    s = settings(random_samples(8), max_steps=4, save_interval=1)
    before_step(monkeypatch, 2, lambda: shutil.rmtree(s.out_dir))
    with pytest.raises(UserError, match="is gone"):
        finetune.main(s)
    assert not s.out_dir.exists()


@pytest.mark.parametrize("flags", [{}, dict(method="full"), dict(method="full", optimizer="adamw-8bit")], ids=str)
def test_the_room_that_a_run_needs_is_known_beforehand(run, settings, flags):  # noqa: F811
    flags = dict(max_steps=2, save_interval=1, eval_interval=0, **flags)
    out_dir = run(random_samples(8), **flags)
    s = settings(**flags)
    predicted = run_folder.sizes(s, build.check_model(s, build.open_data(s)))
    tables = 2048 * 40 if "optimizer" in flags else 0  # of values, two for each tensor: nothing in a large model
    for folder, size in zip(("final", "step-000002"), predicted, strict=True):
        weights = sum(path.stat().st_size for path in (out_dir / folder).glob("*.safetensors"))
        assert 0 < weights - size < 0.1 * size + 20_000 + tables  # and the headers


# ----------------------------------------------------------------------------------------------------------- rotation


def test_the_newest_and_the_best_checkpoints_stay(run, monkeypatch):  # noqa: F811
    losses = iter([3.0, 1.0, 2.0, 4.0, 5.0, 6.0])
    monkeypatch.setattr(finetune, "validate", lambda *_: {"val_loss": next(losses), "val_perplexity": 1.0})
    flags = dict(max_steps=6, save_interval=1, eval_interval=1)
    out_dir = run(random_samples(8), random_samples(2), keep_best=True, keep_last=2, **flags)
    assert [path.name for path in run_folder.checkpoints(out_dir)] == ["step-000002", "step-000005", "step-000006"]
    out_dir = run(name="all", keep_last=0, max_steps=4, save_interval=1, eval_interval=0)
    assert len(run_folder.checkpoints(out_dir)) == 4
    out_dir = run(name="default", max_steps=4, save_interval=1, eval_interval=0)
    assert [path.name for path in run_folder.checkpoints(out_dir)] == ["step-000003", "step-000004"]


@pytest.mark.parametrize(
    "flags, words",
    [
        (dict(keep_best=True, save_interval=3, eval_interval=2), "not a multiple"),
        (dict(keep_best=True, eval_interval=0), "needs --eval_interval"),
        (dict(keep_last=-1), "--keep_last -1"),
        (dict(time_budget="1 day"), "--time_budget 1 day: expected a time such as 24h"),
        (dict(time_budget="0h"), "--time_budget 0h"),
    ],
)
def test_flags_that_cannot_be(settings, flags, words):  # noqa: F811
    with pytest.raises(UserError, match=words):
        settings(**flags)


def test_leftovers_go_and_what_is_not_ours_stays(tmp_path):
    for name in (".step-000001.tmp", ".final.tmp", ".final.old", ".mine.tmp", "step-000002"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").touch()
    (tmp_path / ".metrics.csv.tmp").touch()
    clear_leftovers(tmp_path, run_folder.WRITTEN)
    assert names(tmp_path) == [".mine.tmp", "final", "step-000002"]  # the old final/ has its name again


def test_one_process_at_a_time(tmp_path):
    with run_folder.only_process(tmp_path / "run"):
        with pytest.raises(UserError, match="in use by another process"), run_folder.only_process(tmp_path / "run"):
            pass
        assert (tmp_path / "run").is_dir()
    assert not (tmp_path / "run").exists()  # nothing was written
    with run_folder.only_process(tmp_path / "run"):
        (tmp_path / "run" / "a").touch()
    assert (tmp_path / "run" / "a").exists()


# ------------------------------------------------------------------------------------------------------- every byte


def test_a_flipped_bit_in_any_file_of_a_checkpoint_is_found_and_named(run, settings):  # noqa: F811
    flags = dict(max_steps=2, save_interval=1, eval_interval=0)
    out_dir = run(random_samples(8), **flags)
    for path in sorted((out_dir / "step-000002").iterdir()):
        content = path.read_bytes()
        flip_a_bit(path)
        with pytest.raises(UserError) as caught:
            finetune.main(settings(resume=True, **flags))
        assert str(path) in str(caught.value) or path.name == MANIFEST and "step-000002" in str(caught.value)
        assert "delete" in str(caught.value) and "from step-000001" in str(caught.value)
        path.write_bytes(content)
    shutil.rmtree(out_dir / "step-000002")
    finetune.main(settings(resume=True, **flags))


def test_a_checkpoint_without_its_manifest_is_named(run, settings):  # noqa: F811
    flags = dict(max_steps=2, save_interval=1, eval_interval=0)
    out_dir = run(random_samples(8), **flags)
    (out_dir / "step-000002" / MANIFEST).unlink()
    with pytest.raises(UserError, match=r"step-000002/manifest\.json does not exist: delete"):
        finetune.main(settings(resume=True, **flags))


def test_a_flipped_bit_in_an_adapter_a_model_or_data_is_found(run, settings, tiny_model_dir, tmp_path):  # noqa: F811
    out_dir = run(random_samples(8), max_steps=1, eval_interval=0)
    weights = final_weights(out_dir)
    values = load_file(weights)
    name = next(iter(values))
    values[name].view(-1)[3] *= 1.5  # a value like others: only the hash can tell
    save_file(values, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"adapter_model\.safetensors has changed since it was written"):
        load_model(tiny_model_dir, torch.float32, adapter_dir=out_dir / "final")
    merge = convert_hf_checkpoint.Settings(adapter_dir=out_dir / "final", out_dir=tmp_path / "merged")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors has changed"):
        convert_hf_checkpoint.main(merge)
    assert not merge.out_dir.exists()
    model = tmp_path / "model"
    with new_folder(model) as folder:
        shutil.copytree(tiny_model_dir, folder, dirs_exist_ok=True)
    config = model / "config.json"
    config.write_text(config.read_text().replace('"use_cache": true', '"use_cache":true '))
    with pytest.raises(UserError, match=r"config\.json has changed"):
        load_model(model, torch.float32)


@pytest.mark.parametrize("name", ["tokens", "is_target", "sources", "target_counts", "offsets"])
def test_a_damaged_sample_is_not_trained_on(settings, name):  # noqa: F811
    """A flipped bit is found when the step comes that reads it, and the checkpoint before is there to go on from."""
    s = settings(random_samples(40, sources=3), global_batch_size=1, save_interval=1, keep_last=0, eval_interval=0)
    samples = open_samples(s.data_dir, "train")
    bad, step = next((step[0][0], k) for k, step in planned_steps(s, samples, 7, 9))
    path = s.data_dir / "train.safetensors"
    start, header = read_header(path, "")
    place = bad if name not in ("tokens", "is_target") else samples.shards.open(0).columns["offsets"][bad].item() + 1
    width = {"I32": 4, "BOOL": 1, "I64": 8}[header[name]["dtype"]]
    data = bytearray(path.read_bytes())
    data[start + header[name]["data_offsets"][0] + place * width] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"train\.safetensors is damaged .its sample \d+ .*make it again with"):
        finetune.main(s)
    done = step_of(checkpoints(s.out_dir)[-1])
    assert done == step or name == "offsets" and done <= step  # which belongs to two samples


def test_the_manifest_is_the_last_and_holds_every_file(tmp_path):
    hashes = {}
    with new_folder(tmp_path / "a", hashes) as folder:
        (folder / "one").write_bytes(os.urandom(100))
        (folder / "two").write_bytes(os.urandom(100))
        hashes["two"] = files.sha256(folder / "two")
        assert names(folder) == ["one", "two"]
    assert json.loads((tmp_path / "a" / MANIFEST).read_text()).keys() == {"one", "two", MANIFEST}
    hashes = {"one": "0" * 64}  # what the writer hashed is not what is there
    with new_folder(tmp_path / "b", hashes) as folder:
        (folder / "one").write_bytes(b"x")
    with pytest.raises(UserError, match="one has changed"):
        check_manifest(tmp_path / "b")


# --------------------------------------------------------------------------------------------- what must be the same


def test_another_base_or_other_data_are_refused_by_name(run, settings, tiny_model_dir, tmp_path):  # noqa: F811
    train, flags = random_samples(8), dict(max_steps=2, save_interval=1, eval_interval=0)
    s = settings(train, out_dir=run(train, **flags), resume=True, **flags)
    other = tmp_path / "other"
    shutil.copytree(tiny_model_dir, other)
    finetune.main(settings(resume=True, **{**flags, "checkpoint_dir": other}))  # the same one in another place
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 1e-3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"cannot be resumed with another base model \(model\.safetensors\)$"):
        finetune.main(settings(resume=True, **{**flags, "checkpoint_dir": other}))
    moved = s.data_dir.rename(tmp_path / "moved")
    finetune.main(settings(resume=True, **{**flags, "data_dir": moved}))
    more = write_data(tmp_path / "more", tiny_model_dir, random_samples(9))
    with pytest.raises(UserError, match=r"with --lora_r 3 \(it was 16\), another data \(train\)$"):
        finetune.main(settings(resume=True, **{**flags, "data_dir": more, "lora_r": 3}))


def test_pieces_tell_one_file_from_another(tmp_path):
    content = bytearray(os.urandom(files.PIECES * files.PIECE_BYTES + 10**6))
    path = tmp_path / "a"
    path.write_bytes(content)
    before = files.hash_of_pieces(path)
    assert files.hash_of_pieces(path) == before
    for place in (0, len(content) - 1):
        content[place] ^= 1
        path.write_bytes(content)
        assert files.hash_of_pieces(path) != before
        content[place] ^= 1
    path.write_bytes(content[:-1])
    assert files.hash_of_pieces(path) != before


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_of_all_weights_says_once_which_chat_template_its_model_has(run, method, capsys):  # noqa: F811
    run(random_samples(8), method=method, max_steps=2, save_interval=1, eval_interval=0)
    says = [line for line in capsys.readouterr().out.splitlines() if line.startswith("chat template")]
    assert says == (["chat template: prompt style plain, in which it was trained"] if method == "full" else [])


# -------------------------------------------------------------------------------------------------------------- kills


def test_ten_kills(run_script):
    code, out, err = run_script("tests/stress/kills.py", "--kills", 10, "--steps", 3, timeout=600)
    assert code == 0, out + err
    result = json.loads(out.splitlines()[-1])
    assert result["kills"] == result["loadable"] == 10 and result["runs"] == result["bit_identical"] > 0
