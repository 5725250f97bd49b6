# ruff: noqa: F811 (fixtures)
"""Prepared data streamed from a real S3 server: the same run as from a folder, in a bounded cache, through faults."""

import hashlib
import json
import os
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
from conftest import wait_for
from s3_server import Fault, cut, environment, flip, moto, proxy, s3, start, through  # noqa: F401
from test_bad_input import check_refusal, run_here
from test_finetune import final_weights, random_sample, random_samples, rows, write_data

import store.remote
import store.streaming
from shell.files import read_json, write_json
from store import cache
from store.address import parse
from store.publish import publish

NAME = "s3://bucket/data/set"
SHARDS, PER_SHARD, TOKENS = 6, 20, 200  # 21 KB each
STEP = 8  # samples: a window of two shards has five steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model_dir):
    """Prepared data of six shards of equal size, and one of validation samples."""
    train = [random_sample(150, 50) for _ in range(SHARDS * PER_SHARD)]
    path = tmp_path_factory.mktemp("streamed") / "data"
    write_data(path, tiny_model_dir, train, random_samples(4), shard_tokens=PER_SHARD * TOKENS)
    assert len(read_json(path / "data.json")["train"]["shards"]) == SHARDS
    return path


@pytest.fixture
def published(s3, folder):
    """The address with its version; and how the shards are called in the store."""
    address = publish(folder, parse(NAME))
    files = [folder / shard["file"] for shard in read_json(folder / "data.json")["train"]["shards"]]
    return SimpleNamespace(address=address, hashes=[hashlib.sha256(path.read_bytes()).hexdigest() for path in files])


@pytest.fixture
def flags(tiny_model_dir, tmp_path):
    """`flags("run", data_dir, ...)`: of a run of an epoch and a half, in windows of two shards."""
    return flags_in(tmp_path, tiny_model_dir)


def flags_in(place, model_dir):
    """`flags` of runs in a folder."""

    def make(name, data_dir, **more):
        defaults = dict(
            checkpoint_dir=model_dir, data_dir=data_dir, out_dir=place / name, precision="32-true",
            global_batch_size=STEP, micro_batch_tokens=1600, max_steps=23, learning_rate=1e-2, lora_r=2,
            lora_targets="[v_proj]", lora_layers="[0]", shuffle_window=2, data_cache="0.09MB", eval_interval=10,
            save_interval=0,
        )  # fmt: skip
        return [text for name, value in (defaults | more).items() for text in (f"--{name}", str(value))]

    return make


@pytest.fixture
def fetched(monkeypatch):
    """The names of the files that are fetched from the store, in their order; and the most bytes of blobs at a time."""
    found = SimpleNamespace(names=[], most=0)
    fetch_blob = store.streaming.fetch_blob

    def note(remote, wanted, name, *rest):
        fetch_blob(remote, wanted, name, *rest)
        found.names.append(name)
        sizes = [path.stat().st_size for path in (cache.root() / "blobs").iterdir() if path.exists()]
        found.most = max(found.most, sum(sizes))

    monkeypatch.setattr(store.streaming, "fetch_blob", note)
    return found


def trained(*args):
    code, _, err = run_here("finetune.py", *args)
    assert code == 0, err


def same(one, other):
    assert final_weights(one).read_bytes() == final_weights(other).read_bytes()
    assert rows(one) == rows(other)


@pytest.fixture(scope="module")
def local(folder, tiny_model_dir):
    """A run over the folder itself."""
    trained(*flags_in(folder.parent, tiny_model_dir)("local", folder))
    return folder.parent / "local"


# ------------------------------------------------------------------------------------------------ the same run


def test_a_streamed_run_is_that_of_the_folder(published, folder, flags, fetched, local, tmp_path):
    """With a cache of four shards for six: each is fetched when its window comes, and makes room for others."""
    trained(*flags("streamed", NAME))
    same(tmp_path / "streamed", local)
    train = [name for name in fetched.names if name.startswith("train")]
    assert sorted(train[:SHARDS]) == sorted({*train}), "each once in the first epoch"
    assert SHARDS <= len(train) <= SHARDS + 4, "and in the second those of two windows that are not here"
    assert fetched.most <= 0.09e6 + 5000  # data.json is not counted
    assert sum(name.startswith("val") for name in fetched.names) == 1
    record = read_json(tmp_path / "streamed" / "record.json")
    assert record["hashes"] == read_json(local / "record.json")["hashes"]
    assert f"data_dir: {published.address}" in (tmp_path / "streamed" / "config.yaml").read_text()


def test_what_fits_is_fetched_once_and_shuffled_over_all(published, folder, flags, fetched, tmp_path):
    for name, data in (("local", folder), ("streamed", NAME)):
        trained(*flags(name, data, shuffle_window=0, data_cache="50GB"))
    same(tmp_path / "streamed", tmp_path / "local")
    assert sorted(fetched.names) == sorted(path.name for path in folder.glob("*.safetensors"))


def test_a_store_in_a_folder_is_streamed_too(folder, flags, local, tmp_path, monkeypatch):
    monkeypatch.setenv("ONETUNE_STORE_CACHE", str(tmp_path / "cache"))
    publish(folder, parse(tmp_path / "shelf" / "set"))
    trained(*flags("streamed", tmp_path / "shelf" / "set"))
    same(tmp_path / "streamed", local)


def test_a_resumed_run_needs_only_what_comes(published, folder, flags, fetched, local, tmp_path):
    """On another machine, whose cache is empty: the shards of the first windows do not come again in this epoch."""
    trained(*flags("streamed", NAME, max_steps=23, save_interval=12, keep_last=0))
    first = [name for name in fetched.names if name.startswith("train")][:SHARDS]
    run = tmp_path / "streamed"
    shutil.rmtree(run / "final")
    lines = (run / "metrics.csv").read_text().splitlines(keepends=True)
    (run / "metrics.csv").write_text("".join(lines[:13]))
    shutil.rmtree(cache.root())
    fetched.names.clear()
    trained(*flags("streamed", NAME, save_interval=12, keep_last=0), "--resume")
    same(run, local)
    train = [name for name in fetched.names if name.startswith("train")]
    assert train[:2] == first[4:], "step 12 of 15 is in the third window"


def test_a_run_that_is_killed_goes_on(published, folder, flags, local, start, tmp_path, through):
    """While shards come slowly, at any moment."""
    through.faults.append(lambda direction, count, chunk: time.sleep(0.01) or chunk)
    process = start(*flags("streamed", NAME, save_interval=4), script="finetune.py")
    wait_for(lambda: (tmp_path / "streamed" / "step-000008").is_dir(), 120)
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    through.faults.clear()
    code, _, err = run_here("finetune.py", *flags("streamed", NAME, save_interval=4), "--resume")
    assert code == 0, err
    same(tmp_path / "streamed", local)


# --------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("action", [cut, flip])
def test_faults_on_the_way_change_nothing(published, flags, through, fetched, local, tmp_path, action):
    """A connection that is cut, a bit that is flipped, now and then: a shard is used only if its hash is right."""
    fault = Fault("down", 12_000, 3 if action is cut else 1, action)  # twice wrong is refused
    through.faults.append(fault)
    trained(*flags("streamed", NAME))
    same(tmp_path / "streamed", local)
    assert fault.happened >= 1


def test_a_connection_that_stalls(published, flags, through, local, tmp_path, monkeypatch):
    monkeypatch.setitem(
        store.remote.OPTIONS["s3"], "config_kwargs", {"read_timeout": 1, "retries": {"max_attempts": 1}}
    )
    fault = Fault("down", 12_000, 2, lambda chunk: time.sleep(3))
    through.faults.append(fault)
    trained(*flags("streamed", NAME))
    same(tmp_path / "streamed", local)
    assert fault.happened == 2


@pytest.mark.parametrize("how", ["flipped", "gone"])
def test_a_shard_that_is_damaged_at_the_store_ends_the_run(published, s3, flags, tmp_path, how):
    """With a line that names it, and a checkpoint to go on from."""
    path = parse(NAME).blob(published.hashes[3])
    content = s3.system.cat_file(path)
    s3.system.rm_file(path) if how == "gone" else s3.system.pipe_file(path, flip(content))
    refusal = run_here("finetune.py", *flags("streamed", NAME, save_interval=1))
    word = "is missing" if how == "gone" else "is damaged"
    check_refusal(*refusal, "train-00004-of-00006.safetensors", word, "push the folder again")
    s3.system.pipe_file(path, content)
    trained(*flags("streamed", NAME, save_interval=1), "--resume")


def test_a_shard_that_is_damaged_in_the_cache_is_fetched_again(published, flags, fetched, local, tmp_path):
    """The hash of what is there already is compared, too."""
    trained(*flags("first", NAME, data_cache="50GB", shuffle_window=0, max_steps=1))  # which needs all of them
    blob = cache.root() / "blobs" / published.hashes[2]
    blob.chmod(0o644)
    blob.write_bytes(flip(blob.read_bytes()))
    fetched.names.clear()
    trained(*flags("streamed", NAME, data_cache="50GB"))
    same(tmp_path / "streamed", local)
    assert "train-00003-of-00006.safetensors" in fetched.names


def test_a_shard_that_another_process_removes_comes_again(published, flags, fetched, local, tmp_path):
    """Whoever makes room in the cache may remove what is in no folder."""
    removed, fetch = [], store.streaming.Stream.place

    def place(stream, number):
        path = fetch(stream, number)
        if not removed:
            removed.append(path)
            path.unlink()
            path = fetch(stream, number)
        return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store.streaming.Stream, "place", place)
        trained(*flags("streamed", NAME))
    same(tmp_path / "streamed", local)
    assert len(removed) == 1


# ------------------------------------------------------------------------------------------------- what is refused


def refused(flags, *says, **more):
    check_refusal(*run_here("finetune.py", *flags("refused", NAME, **more)), *says)


def test_data_larger_than_the_cache_need_a_window(published, flags):
    refused(flags, "--data_cache 0.09MB has room for fewer", "--shuffle_window 2 or less", shuffle_window=0)
    refused(flags, "--shuffle_window 2 or less", shuffle_window=3)
    refused(flags, "--data_cache 0.03MB is too small for two of them", "--shard_tokens", data_cache="0.03MB")
    refused(flags, "--shuffle_window 1", "20 samples, less than the 21", shuffle_window=1, global_batch_size=21)


def test_what_reads_everything_first_is_refused(published, flags, tiny_model_dir):
    refused(flags, "--planner grouped", "store/models.py --pull", planner="grouped")
    refused(flags, "--objective distill", "--pull", objective="distill", teacher_dir=tiny_model_dir)


def test_a_folder_without_one_of_its_shards_is_refused(s3, folder, flags, tmp_path):
    part = tmp_path / "part"
    shutil.copytree(folder, part)
    (part / "train-00002-of-00006.safetensors").unlink()
    publish(part, parse(NAME))
    refused(flags, "has no train-00002-of-00006.safetensors", "publish the folder again")


def test_a_resumed_run_keeps_its_window(published, flags):
    trained(*flags("refused", NAME, max_steps=1, save_interval=1))
    code, out, err = run_here("finetune.py", *flags("refused", NAME, max_steps=1, shuffle_window=1), "--resume")
    check_refusal(code, out, err, "--shuffle_window 1 (it was 2)")


def test_the_plan_of_streamed_data(published, flags):
    code, out, err = run_here("finetune.py", *flags("plan", NAME), "--plan", "--plan_tflops", "1")
    assert code == 0 and "23 steps" in out, err


def test_what_the_cache_keeps_of_a_streamed_folder(published, flags, folder, monkeypatch):
    """Its small files: they go when there is no room, as others do."""
    trained(*flags("run", NAME, max_steps=1))
    (kept,) = (path for path in (cache.root() / "streamed").rglob("set@*") if path.is_dir())
    assert {path.name for path in kept.iterdir()} == {"data.json", "elsewhere.json", "manifest.json"}
    assert json.loads((kept / "elsewhere.json").read_text())["address"] == str(published.address)
    assert cache.address_of(kept) == str(published.address)
    assert os.path.samefile(kept, store.streaming.without_shards(published.address))
    write_json(kept / "data.json", read_json(kept / "data.json") | {"version": "other"})
    refused(flags, "data.json has changed since it was written")
