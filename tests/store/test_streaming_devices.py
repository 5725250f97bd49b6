# ruff: noqa: F811 (fixtures)
"""Streamed data on several devices: the run that one device makes of the folder, in one bounded cache for a machine.

Devices are processes here, which share a cache, or have one each as on two machines.
"""

import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from conftest import ROOT, wait_for
from devices import start_processes
from s3_server import PART, cut, environment, flip, moto, proxy, s3, through  # noqa: F401
from test_bad_input import run_here
from test_devices import weights_of
from test_finetune import random_sample, random_samples, rows, write_data
from test_streaming import NAME, SHARDS, flags, flags_in, folder, local, published, trained  # noqa: F401

from shell.files import read_json
from store import cache
from store.address import parse
from store.publish import publish
from store.streaming import Stream, without_shards

BOUND = 0.09e6 + 5000  # --data_cache, and data.json, which is not counted
SETUP = f"""
import os, runpy, sys, time
sys.path.insert(0, {str(ROOT)!r})
rank = os.environ["RANK"]
if "SEVERAL_MACHINES" in os.environ:
    os.environ["ONETUNE_STORE_CACHE"] += rank
    os.environ["AWS_ENDPOINT_URL"] = os.environ["ENDPOINT_" + rank]
import store.cache, store.remote, store.streaming
store.remote.PART_BYTES, store.remote.FIRST_WAIT = {PART}, 0.05
fetch_blob = store.streaming.fetch_blob
def note(remote, wanted, name, *rest):
    fetch_blob(remote, wanted, name, *rest)
    sizes = [path.stat().st_size for kind in ("blobs", "partial") for path in (store.cache.root() / kind).glob("*")]
    with open(os.environ["FETCHED"], "a") as file:
        file.write(f"{{rank}} {{name}} {{sum(sizes)}}\\n")
store.streaming.fetch_blob = note
sys.argv = [text.replace("RANK", rank) for text in sys.argv[1:]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def on_two(environment, tmp_path):
    """`on_two(*flags, **environment)`: finetune.py in two processes, as torchrun starts them."""
    started = []

    def start(*args, **more):
        command = [sys.executable, "-c", SETUP, ROOT / "finetune.py", *args, "--devices", 2]
        started.extend(start_processes(2, command, **environment, FETCHED=tmp_path / "fetched", **more))
        return started[-2:]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def finished(processes, seconds=120):
    """The outputs of processes, which must end by themselves."""
    end = time.monotonic() + seconds
    return [process.communicate(timeout=max(1, end - time.monotonic()))[0] for process in processes]


def well(processes):
    outputs = finished(processes)
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)


def fetched(tmp_path):
    """What was fetched: the devices and names, in their order; and the most bytes in the cache."""
    lines = [line.split() for line in (tmp_path / "fetched").read_text().splitlines()]
    return SimpleNamespace(pairs=[(line[0], line[1]) for line in lines], most=max(int(line[2]) for line in lines))


def training(pairs):
    return [name for _, name in pairs if name.startswith("train")]


def same(one, other):
    """Two runs, up to what AdamW makes of sums in another order."""
    for row, expected in zip(rows(one), rows(other), strict=True):
        assert row == pytest.approx(expected, rel=1e-4)
    ours, theirs = weights_of(one / "final"), weights_of(other / "final")
    distance = sum((ours[name] - tensor).square().sum() for name, tensor in theirs.items())
    assert (distance / sum(tensor.square().sum() for tensor in theirs.values())).sqrt() < 1e-3


def test_a_machine_fetches_each_shard_once(published, flags, on_two, local, tmp_path):
    """However many devices read it; and goes beyond --data_cache with none."""
    well(on_two(*flags("streamed", NAME)))
    same(tmp_path / "streamed", local)
    found = fetched(tmp_path)
    train = training(found.pairs)
    assert len({*train[:SHARDS]}) == SHARDS and len(train) <= SHARDS + 4, "as one device"
    assert sum(name.startswith("val") for _, name in found.pairs) == 1
    assert found.most <= BOUND


def test_the_model_is_divided_too(published, folder, flags, on_two, tmp_path):
    """Steps of nine samples, each a micro-batch: so one device has an empty one, for which it takes what is there."""
    more = dict(global_batch_size=9, micro_batch_tokens=200, max_steps=16)
    trained(*flags("local", folder, **more))
    well(on_two(*flags("streamed", NAME, **more), "--shard"))
    same(tmp_path / "streamed", tmp_path / "local")
    found = fetched(tmp_path)
    train = training(found.pairs)
    assert len({*train[:SHARDS]}) == SHARDS and len(train) <= SHARDS + 4
    assert found.most <= BOUND


def test_two_machines_have_a_cache_each(published, flags, on_two, local, moto, tmp_path):
    endpoint = f"http://127.0.0.1:{moto}"
    well(on_two(*flags("streamed", NAME), SEVERAL_MACHINES=1, ENDPOINT_0=endpoint, ENDPOINT_1=endpoint))
    same(tmp_path / "streamed", local)
    found = fetched(tmp_path)
    each = [training(pair for pair in found.pairs if pair[0] == rank) for rank in "01"]
    assert [len({*train[:SHARDS]}) for train in each] == [SHARDS, SHARDS]
    assert each[0] == each[1] and len(each[0]) <= SHARDS + 4
    assert found.most <= BOUND


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_goes_on(published, flags, on_two, local, through, tmp_path, devices):
    """While shards come slowly; on as many devices, or on one."""
    through.faults.append(lambda direction, count, chunk: time.sleep(0.01) or chunk)
    args = flags("streamed", NAME, save_interval=4)
    processes = on_two(*args)
    wait_for(lambda: (tmp_path / "streamed" / "step-000008").is_dir(), 120)
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    through.faults.clear()
    if devices == 2:
        well(on_two(*args, "--resume"))
    else:
        code, _, err = run_here("finetune.py", *args, "--resume")
        assert code == 0, err
    same(tmp_path / "streamed", local)
    assert fetched(tmp_path).most <= BOUND


@pytest.mark.slow
def test_a_run_of_one_device_goes_on_with_two(published, flags, on_two, local, tmp_path):
    """On another machine, whose cache is empty: only what comes is fetched."""
    trained(*flags("streamed", NAME, save_interval=12, keep_last=0))
    run = tmp_path / "streamed"
    shutil.rmtree(run / "final")
    shutil.rmtree(cache.root())
    well(on_two(*flags("streamed", NAME, save_interval=12, keep_last=0), "--resume"))
    same(run, local)
    train = training(fetched(tmp_path).pairs)
    assert len({*train[:2]}) == 2 and len(train) <= 2 + 6, "step 12 of 15 is in the third window"


# ---------------------------------------------------------------------------------------- one of them is slower

READER = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from store.streaming import Stream
folder, names, groups, room = eval(sys.argv[1])
stream = Stream(folder, names)
stream.follow(groups, room, "run")
for line in sys.stdin:
    print(getattr(stream, line.split()[0])(eval(line.split()[1])), flush=True)
"""


@pytest.fixture
def two_readers(folder, tmp_path, monkeypatch):
    """A `Stream` here, and a process with another one of the same run, which does what it is told: groups of two."""
    monkeypatch.setenv("ONETUNE_STORE_CACHE", str(tmp_path / "cache"))
    publish(folder, parse(tmp_path / "shelf" / "set"))
    names = [shard["file"] for shard in read_json(folder / "data.json")["train"]["shards"]]
    empty = without_shards(tmp_path / "shelf" / "set")
    stream = Stream(empty, names)
    groups, room = [(k, [2 * k, 2 * k + 1]) for k in range(3)], sum(entry.size for entry in stream.entries[:4])
    stream.follow(groups, room, "run")
    command = [sys.executable, "-c", READER, repr((str(empty), names, groups, room))]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def tell(what):
        other.stdin.write(f"{what}\n")
        other.stdin.flush()
        return other.stdout.readline().strip()

    def here():
        return {n for n, entry in enumerate(stream.entries) if (cache.root() / "blobs" / entry.sha256).exists()}

    yield SimpleNamespace(stream=stream, tell=tell, here=here, other=other)
    other.kill()
    other.communicate()
    stream.close()


def test_what_another_process_has_not_read_stays(two_readers):
    """And takes room as long as it does."""
    stream, tell, here = two_readers.stream, two_readers.tell, two_readers.here
    assert str(stream.place(1)) == tell("place 1")
    wait_for(lambda: here() == {0, 1, 2, 3})
    stream.done(1)
    time.sleep(0.5)
    assert here() == {0, 1, 2, 3}, "the other one is in the first group"
    assert tell("done 1") == "None"
    wait_for(lambda: here() == {2, 3, 4, 5})
    assert tell("place 5") == str(stream.place(5))
    assert tell("done 2") == "None"
    time.sleep(0.5)
    assert here() == {2, 3, 4, 5}
    stream.done(2)
    wait_for(lambda: here() == {4, 5})


def test_a_process_that_is_killed_holds_nothing(two_readers):
    stream, here = two_readers.stream, two_readers.here
    assert two_readers.tell("place 0") == str(stream.place(0))
    wait_for(lambda: here() == {0, 1, 2, 3})
    stream.done(1)
    time.sleep(0.3)
    assert here() == {0, 1, 2, 3}
    two_readers.other.kill()
    wait_for(lambda: here() == {2, 3, 4, 5})


# --------------------------------------------------------------------------------------------------------- faults


def ended(processes, *words):
    """All have ended by themselves, with a line each, one of which has the words."""
    outputs = finished(processes, 60)
    assert all(process.returncode in (2, 70) for process in processes), outputs
    assert "Traceback" not in "".join(outputs), outputs
    assert any(all(word in output for word in words) for output in outputs), outputs


def test_a_shard_that_is_damaged_at_the_store_ends_all(published, s3, flags, on_two):
    path = parse(NAME).blob(published.hashes[3])
    s3.system.pipe_file(path, flip(s3.system.cat_file(path)))
    ended(on_two(*flags("streamed", NAME)), "train-00004-of-00006.safetensors", "is damaged", "push the folder again")


def test_a_machine_that_loses_the_store_ends_all(published, flags, on_two, moto, through, tmp_path):
    endpoints = {"ENDPOINT_0": f"http://127.0.0.1:{moto}", "ENDPOINT_1": f"http://127.0.0.1:{through.port}"}
    processes = on_two(*flags("streamed", NAME, save_interval=1), SEVERAL_MACHINES=1, **endpoints)
    wait_for(lambda: (tmp_path / "streamed" / "step-000001").is_dir(), 120)
    through.faults.append(lambda *_: cut(None))
    ended(processes, "device 2 of 2", "has ended (s3://bucket/data/", "so device 1 ends")


def test_devices_with_other_data_are_refused(tiny_model_dir, flags, on_two, tmp_path):
    """Or each would train on its own, as after a push under the same name, and nobody would see it."""
    for rank in range(2):
        train = [random_sample(150, 50) for _ in range(20)]
        write_data(tmp_path / f"data{rank}", tiny_model_dir, train, random_samples(4))
    assert read_json(tmp_path / "data0" / "data.json")["train"] != read_json(tmp_path / "data1" / "data.json")["train"]
    ended(on_two(*flags("refused", tmp_path / "dataRANK")), "device 2 has another data (train)", "their version")
