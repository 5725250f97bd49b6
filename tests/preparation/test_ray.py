"""--engine ray: the same bytes as the local engine, over a real Ray cluster whose processes are killed meanwhile."""

import contextlib
import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, SEED, open_terminal, pieces_from_terminal, wait_for

os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # as --engine ray has it: Ray reads it when it is imported
pytest.importorskip("ray", reason="needs requirements-ray.txt")

import ray.data

import prepare_data
from preparation import ray_workers, workers
from preparation.workers import Context
from prepare_data import Settings
from shell.cli import UserError

WORDS = [f"{a}{b}{c}" for a in "bdgklmnp" for b in "aeiou" for c in "rstz"]


@contextlib.contextmanager
def short_folder():
    """A folder for Ray's sockets, whose paths must be short."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def cluster():
    """The address of a Ray cluster of two CPUs, which is there as long as this file's tests."""
    from ray.cluster_utils import Cluster

    with short_folder() as folder:
        head = {"num_cpus": 2, "include_dashboard": False, "temp_dir": str(folder)}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        yield cluster.address
        cluster.shutdown()


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """So that a few hundred rows are many tasks of Ray's, in several rounds."""
    monkeypatch.setattr(workers, "CHUNK", 16)
    monkeypatch.setattr(ray_workers, "TASKS", 2)
    monkeypatch.setattr(ray_workers, "ROUND", 8)
    monkeypatch.setattr(ray.data.DataContext.get_current(), "execution_no_progress_timeout_s", 300)  # of 1,800


@pytest.fixture
def prepare(tmp_path, tiny_model_dir):
    """`prepare("name", data, ...)`: the files of the folder that it makes, {name: bytes}."""

    def run(name, data, **settings):
        s = Settings(data=str(data), checkpoint_dir=tiny_model_dir, out_dir=tmp_path / name, **settings)
        prepare_data.main(s)
        return {path.name: path.read_bytes() for path in s.out_dir.iterdir()}

    return run


def words(count):
    return " ".join(random.choices(WORDS, k=count))


def questions(count):
    """Rows of which some repeat a question, or nearly so."""
    rows = [{"question": f"{i} {words(random.randint(5, 30))}", "answer": words(random.randint(1, 20))}
            for i in range(count)]  # fmt: skip
    for row in random.sample(rows, count // 5):
        other = random.choice(rows)
        row["question"] = other["question"] + random.choice(["", "", " again"])
    return rows


def write_lines(path, rows):
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


def mixture_of_all(folder):
    """A mixture with every kind of file and of rows, and one row that is none. Returns settings for it."""
    rows = questions(400)
    write_lines(folder / "a.jsonl", rows[:200])
    with open(folder / "a.jsonl", "a") as file:
        file.write("no row\n")
    write_lines(folder / "b.jsonl.gz", questions(60) + rows[:20])
    (folder / "c.csv").write_text(
        "question,answer\n" + "".join(f'"{x["question"]}",{x["answer"]}\n' for x in rows[200:300])
    )
    table = pyarrow.Table.from_pylist([{"prompt": x["question"], "completion": x["answer"]} for x in rows[300:]])
    pyarrow.parquet.write_table(table, folder / "d.parquet")
    choices = [{"q": f"{words(5)}?", "a": words(1), "b": words(2), "c": words(1), "label": i % 3} for i in range(50)]
    (folder / "e.json").write_text(json.dumps(choices))
    write_lines(folder / "f.jsonl", [{"text": words(random.choice([10, 900]))} for _ in range(40)])
    leaked = [{"question": words(4) + " " + x["question"], "answer": "no"} for x in random.sample(rows, 30)]
    write_lines(folder / "test.jsonl", leaked)
    (folder / "mixture.yaml").write_text(
        "sources: [{path: a.jsonl, weight: 2, few_shot: [0, 2]}, {path: b.jsonl.gz, weight: 1, min_words: 20}, "
        "{path: c.csv, samples: 150}, {path: d.parquet, max_tokens: 60}, {path: f.jsonl}, "
        "{path: e.json, fields: {prompt: q, choices: [a, b, c], label: label}}]"
    )
    return dict(
        benchmarks=str(folder / "test.jsonl"), leak_cosine=0.0, leak_words=5, near_duplicates=0.7, val_fraction=0.1,
        max_seq_length=128, skip_bad=True, prompt_style="plain",
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------- the bytes


@pytest.mark.parametrize("seed", [SEED, SEED + 1])
def test_the_same_bytes_of_every_kind_of_data(prepare, tmp_path, cluster, seed):
    settings = mixture_of_all(tmp_path) | {"seed": seed}
    local = prepare("local", tmp_path / "mixture.yaml", workers=1, **settings)
    ray = prepare("ray", tmp_path / "mixture.yaml", engine="ray", ray_address=cluster, **settings)
    assert ray == local
    reasons = {json.loads(line)["reason"] for line in local["dropped.jsonl"].splitlines()}
    assert reasons >= {"bad", "duplicate", "near duplicate", "words of a benchmark", "too few words"}
    assert len(local["val.safetensors"]) > 5000 and b"cut into pieces" in local["data.json"]


def test_the_same_bytes_of_pairs(prepare, tmp_path, cluster):
    rows = [{"prompt": x["question"], "chosen": x["answer"], "rejected": words(4)} for x in questions(120)]
    data = write_lines(tmp_path / "pairs.jsonl", rows)
    settings = dict(near_duplicates=0.8, val_fraction=0.2, prompt_style="chatml")
    ray = prepare("ray", data, engine="ray", ray_address=cluster, workers=1, **settings)
    assert ray == prepare("local", data, workers=1, **settings)
    assert json.loads(ray["data.json"])["kind"] == "pairs"


def test_the_first_mistake_is_reported_as_by_the_local_engine(prepare, tmp_path, cluster, tiny_model_dir):
    rows = questions(300)
    rows[99]["answer"] = rows[200]["answer"] = rows[299]["answer"] = 7
    data = write_lines(tmp_path / "rows.jsonl", rows)
    said = []
    for settings in ({"workers": 1}, {"engine": "ray", "ray_address": cluster}):
        with pytest.raises(UserError) as error:
            prepare("out", data, **settings)
        said.append(str(error.value))
    assert said[0] == said[1] and "rows.jsonl:100: " in said[0]
    dialog = [{"messages": [{"role": role, "content": "x"} for role in ("system", "user", "assistant")]}]
    write_lines(data, dialog)  # found while it is rendered
    with pytest.raises(UserError, match="rows.jsonl:1: prompt style plain"):
        prepare("out", data, engine="ray", ray_address=cluster, prompt_style="plain")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


# ----------------------------------------------------------------------------------------------------- what is killed


def at_work():
    """The processes below this one in which Ray runs a task of ours."""
    below = psutil.Process().children(recursive=True)
    return [process for process in below if _title(process).startswith("ray::MapBatches(_work)")]


def _title(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has ended
        return ""


def test_workers_that_are_killed_change_nothing(prepare, tmp_path, cluster, monkeypatch):
    monkeypatch.setattr(ray_workers, "TASKS", 4)
    data = write_lines(tmp_path / "rows.jsonl", questions(1500))
    settings = dict(near_duplicates=0.8, prompt_style="plain")
    killed, ended = [], threading.Event()

    def kill():
        while not ended.is_set() and len(killed) < 3:
            if found := at_work():
                found[0].kill()
                killed.append(found[0].pid)
                ended.wait(1)
            time.sleep(0.005)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        ray = prepare("ray", data, engine="ray", ray_address=cluster, **settings)
    finally:
        ended.set()
        killer.join()
    assert killed
    assert ray == prepare("local", data, workers=1, **settings)


def test_rows_that_end_every_process_end_the_run(cluster, monkeypatch):
    monkeypatch.setattr(ray_workers, "RETRIES", 1)
    context = Context(Settings(show=1, out_dir=Path("x"), engine="ray", ray_address=cluster), [], None, None, [])

    def end(context, number):
        if number == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    results = []
    with (
        pytest.raises(UserError, match="the same rows have ended a worker process 2 times"),
        ray_workers.ray_workers(context) as parallel_map,
    ):
        results.extend(parallel_map(end, range(20)))
    assert results == list(range(len(results))) and len(results) <= 12


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_when_it_ends_its_cluster_ends_and_nothing_is_half_written(tmp_path, tiny_model_dir, kind):
    data = write_lines(tmp_path / "rows.jsonl", questions(30000))
    out = tmp_path / "out"
    command = [sys.executable, ROOT / "prepare_data.py", "--data", data, "--checkpoint_dir", tiny_model_dir]
    command += ["--out_dir", out / "x", "--engine", "ray", "--workers", "2"]
    with short_folder() as folder:
        main, end = open_terminal()  # in which there is a progress bar
        process = subprocess.Popen(command, stderr=end, env={**os.environ, "RAY_TMPDIR": str(folder)})
        os.close(end)
        pieces = pieces_from_terminal(main)
        while not re.search("reading rows: +[1-9]", next(pieces, "reading rows: 1")):
            pass
        below = psutil.Process(process.pid).children(recursive=True)
        assert any("raylet" in _title(one) for one in below)
        process.send_signal(kind)
        rest = "".join(pieces).replace("\r\n", "\n")
        assert process.wait(60) == {signal.SIGINT: 130, signal.SIGKILL: -9}[kind]
        # Ray's agents look every now and then whether the process that started them is there.
        wait_for(lambda: not any(map(_title, below)), 120)
        assert not (out / "x").exists() and "Traceback" not in rest
        if kind == signal.SIGINT:
            assert rest.endswith("interrupted\n") and list(out.iterdir()) == list(folder.iterdir()) == []


# --------------------------------------------------------------------------------------------------- without a cluster


def test_nobody_at_the_address(prepare, tmp_path):
    data = write_lines(tmp_path / "rows.jsonl", questions(3))
    with pytest.raises(UserError, match="--ray_address 127.0.0.1:1: no cluster there: .*refused"):
        prepare("out", data, engine="ray", ray_address="127.0.0.1:1")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_the_local_engine_does_not_import_ray(run_script, tmp_path, tiny_model_dir):
    data = write_lines(tmp_path / "rows.jsonl", questions(3))
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['ray'] = None\n")
    flags = ["--data", data, "--checkpoint_dir", tiny_model_dir, "--out_dir", tmp_path / "out", "--val_fraction", 0]
    code, out, err = run_script("prepare_data.py", *flags, env={"PYTHONPATH": str(tmp_path)})
    assert code == 0 and (tmp_path / "out" / "train.safetensors").is_file(), err
