"""bench/gpu.sh on a CPU, in small: its parts run, its sides do the same; what fails or hangs costs itself alone."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, kernels

from bench.gpu import kernels as kernels_part
from bench.gpu import measure, profiling, resume, training
from bench.measuring import OURS
from bench.roofline import matrix_weights
from bench.shapes import SHAPES
from ops import gpu
from weights.families import config_from_json

SIZES = {"--tokens": 64, "--sample_tokens": 32, "--prompt_tokens": 8, "--new_tokens": 5, "--steps": 2}
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # so that python3 is this one
DECODED = {(quantize, batch) for quantize in (None, "bnb.nf4") for batch in (1, 16)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of gpu.sh, its output, and its lines by part."""
    out = tmp_path_factory.mktemp("gpu") / "out"
    command = ["bash", "bench/gpu.sh", "--shape", "tiny", "--device", "cpu", "--repetitions", 1]
    command += [word for size in SIZES.items() for word in size]
    done = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env={**os.environ, "PATH": PATH, "OUT": str(out)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr + "".join(path.read_text() for path in out.glob("*.txt"))
    parts = {}
    for line in map(json.loads, (out / "gpu.jsonl").read_text().splitlines()):
        parts.setdefault(line["part"], []).append(line)
    return out, done.stdout, parts


def settings(**values):
    """Those of a tiny run."""
    values = {"part": "training", "out_dir": Path("nowhere"), "shape": "tiny", "device": "cpu"} | values
    return measure.Settings(**values)


def test_all_parts_end_well_in_their_order(run):
    out, _, parts = run
    names = ["gpu-tests", "training", "decoding", "kernels", "resume"]
    assert [(line["name"], line["status"]) for line in parts["ended"]] == [(name, 0) for name in names]
    assert len(parts["limits"]) == 4 and all(line["tflops"] > 0 and line["commit"] for line in parts["limits"])
    assert (out / "gpu.png").read_bytes().startswith(b"\x89PNG")


def test_every_side_trains_and_does_the_same(run):
    _, text, parts = run
    rows = {(row["kind"], row["recompute"], row["side"]): row for row in parts["training"] if "side" in row}
    assert len(rows) == 4 * 4 + 3 + 1
    trained = {key: row for key, row in rows.items() if "skipped" not in row}
    assert {key[2] for key in rows.keys() - trained.keys()} <= {training.FLASH}
    for (kind, recompute, side), row in trained.items():
        ours = rows[kind, recompute, OURS]
        assert row["grad_norm"] > 0 and row["last_loss"] < row["first_loss"]
        assert abs(row["first_loss"] / ours["first_loss"] - 1) < 1e-2
        assert row["tokens_per_second"] > 0 and row["share"] > 0 and row["peak_gb"] > 0 and row["mfu"] is None
        assert (side == OURS) == ("predicted_gb" in row)
        assert ours["plan"] == pytest.approx(ours["predicted_gb"] / ours["peak_gb"])
        assert 0 < ours["plan"] < 1  # of the whole process' memory
        assert row["name"] in text
    assert rows["qlora", False, OURS]["predicted_gb"] < rows["lora", False, OURS]["predicted_gb"]


def test_a_step_is_profiled_by_kernel(run):
    out, _, parts = run
    rows = [row for row in parts["training"] if "kernels" in row]
    assert [row["kind"] for row in rows] == ["lora", "qlora", "full"]
    for row in rows:
        table = (out / row["file"]).read_text()
        times = [kernel["ms"] for kernel in row["kernels"]]
        assert times == sorted(times, reverse=True) and 0 < row["busy"] <= 1.05
        assert all(kernel["kernel"] in table and kernel["launches"] > 0 for kernel in row["kernels"])
        assert any("mm" in kernel["kernel"] for kernel in row["kernels"])  # the products


def test_a_profile_without_a_kernel_is_a_failure():
    with pytest.raises(RuntimeError, match="no kernel"):
        profiling.by_kernel([], torch.device("cpu"))


def test_decoding_and_kernels_have_their_lines(run):
    _, _, parts = run
    assert {(row["quantize"], row["batch"]) for row in parts["decoding"]} == DECODED
    assert all(row["new_tokens"] == 5 and row["tokens_per_second"] > 0 for row in parts["decoding"])
    *rows, dequantizing = parts["kernels"]
    known = {row["kernel"] for row in rows}
    forward = {"norm", "rotate", "activate", "loss_", "low_rank_"}
    assert forward | {"norm_backward", "activate_backward", "low_rank_backward_"} <= known
    assert all(row["microseconds"] > 0 and row["share"] > 0 and row["bytes"] > 0 for row in rows)
    names = ["dequantised", *(f"rows: {rows}" for rows in (1, 2, 4, 16))]
    names = {name + side for name in names for side in ("", ", bitsandbytes")}
    assert dequantizing["microseconds"].keys() == dequantizing["shares"].keys() == names


def test_the_kernels_of_a_gpu_are_all_of_ours():
    launched = set()

    def note(name, *_):
        launched.add(name)

    gpu.observers.append(note)
    try:
        operators = list(kernels_part.launched(settings(device="cuda", tokens=64, sample_tokens=32), "tiny"))
    finally:
        gpu.observers.remove(note)
    assert launched == kernels()
    assert len({kernels_part.looks(each.operation) for each in operators}) == len(operators)


def test_a_killed_run_ends_with_the_same_bytes(run):
    (row,) = run[2]["resume"]
    assert row["quantize"] == "bnb.nf4" and 0 < row["killed_after_step"] < row["steps"]
    assert "adapter_model.safetensors" in row["sha256"] and row["equal_files"] == len(row["sha256"])


def test_other_bytes_of_a_resumed_run_are_found(tmp_path, monkeypatch):
    """The processes are replaced: the resumed one leaves one file that differs, and one too few."""
    files = {"whole": {"a": "1", "b": "2", "c": "3"}, "killed": {"a": "1", "b": "9"}}
    process = subprocess.Popen(["true"])
    for name, value in {"make_inputs": 0, "start": process, "kill_after_checkpoint": 3, "finish": 0}.items():
        monkeypatch.setattr(resume, name, lambda *_, value=value, **__: value)
    monkeypatch.setattr(resume, "hashes", lambda folder: files[folder.parent.name])
    with pytest.raises(AssertionError, match="differ: b, c"):
        resume.killed_and_resumed(tmp_path, {}, None)


def test_a_kill_that_comes_too_late_is_a_failure(tmp_path):
    (tmp_path / "killed.log").write_text("error: no such thing\n")
    ended = subprocess.Popen(["false"])
    ended.wait()
    with pytest.raises(RuntimeError, match="before the kill: error: no such thing"):
        resume.kill_after_checkpoint(tmp_path / "killed", ended)


@pytest.mark.parametrize(
    "error, row",
    [
        (torch.OutOfMemoryError("CUDA out of memory"), {"skipped": "out of memory"}),
        (ValueError("no such thing"), {"failed": "ValueError: no such thing"}),
    ],
)
def test_what_goes_wrong_is_a_row(error, row, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(training, "measure_training", fail)
    one = training.Training("tiny", "lora", False, OURS)
    assert measure.attempt(one, settings(seconds=1000), {}) == row
    assert measure.attempt(one, settings(seconds=one.seconds - 1), {}) == {"skipped": "no time left"}


def test_sides_that_do_not_do_the_same_are_named():
    ours, peer = (training.Training("tiny", "lora", False, side) for side in training.SIDES[:2])
    problems = training.differing_losses
    assert problems([(ours, {"first_loss": 6.0}), (peer, {"first_loss": 6.05})]) == []
    assert problems([(ours, {"first_loss": 6.0}), (peer, {"first_loss": 6.07})]) == [
        f"{peer}: its first loss is not ours"
    ]
    assert problems([(ours, {"skipped": "out of memory"}), (peer, {"first_loss": 6.07})]) == []


def test_the_share_counts_products_alone():
    """mfu: 4 operations for a weight and token of an adapter, 6 of all weights; share: 2 more with recomputing."""
    weights = matrix_weights(config_from_json(training.SHAPES["tiny"]["tiny"]))
    limits = {"tflops": 2.0, "nominal_tflops": 4.0}
    for kind, recompute, useful in (("lora", True, 4), ("full", False, 6)):
        run = training.Training("tiny", kind, recompute, OURS)
        row = training.measure_training(settings(tokens=64, sample_tokens=32, steps=1), run, limits)
        rate = row["tokens_per_second"] * weights / 1e12
        assert row["mfu"] == pytest.approx(useful * rate / 4)
        assert row["share"] == pytest.approx((useful + 2 * recompute) * rate / 2)


def test_the_counted_weights_are_those_of_the_published_models():
    embedding, norms = 32000 * 4096, (2 * 32 + 1) * 4096
    for name, known in (("Llama-2-7B", 6_738_415_616), ("Mistral-7B", 7_241_732_096)):
        assert matrix_weights(config_from_json(SHAPES[name])) + embedding + norms == known


# ------------------------------------------------------------------------------------------------------- the shell


def test_gpu_sh_finds_the_tests_that_need_a_gpu():
    script = (ROOT / "bench" / "gpu.sh").read_text()
    search = script.partition("-m gpu $(")[2].partition(")")[0]
    found = subprocess.run(["bash", "-c", search], cwd=ROOT, capture_output=True, text=True).stdout.split()
    marked = {str(p.relative_to(ROOT)) for p in ROOT.glob("tests/**/test_*.py") if "mark" + ".gpu" in p.read_text()}
    assert set(found) == marked and "tests/training/test_gpu.py" in found


PART = """
import pathlib, signal, subprocess, sys, time
part, out = (sys.argv[sys.argv.index(flag) + 1] for flag in ("--part", "--out_dir"))
with open(pathlib.Path(out, "gpu.jsonl"), "a") as lines:
    lines.write('{"part": "%s"}\\n' % part)
if part == "decoding":  # it hangs, with a child, and does not listen
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen(["sleep", "300"])
    pathlib.Path(out, "child").write_text(str(child.pid))
    time.sleep(300)
sys.exit(part == "kernels")
"""


@pytest.fixture
def project(tmp_path):
    """A project whose gpu.sh is ours, without tests, and whose parts do nothing, fail or hang."""
    (tmp_path / "bench" / "gpu").mkdir(parents=True)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(
        f"import pytest\n@pytest.{'mark'}.gpu\ndef test_it(): pass\n"  # so that the name is not in this file
    )
    shutil.copy(ROOT / "bench" / "gpu.sh", tmp_path / "bench")
    (tmp_path / "bench" / "gpu" / "measure.py").write_text(PART)
    return tmp_path


def run_project(project, **environment):
    command = ["bash", "bench/gpu.sh", "--shape", "tiny"]
    environment = {**os.environ, "PATH": PATH, "OUT": str(project / "out"), **environment}
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=120)


def is_running(pid):
    """Whether there is a process of this number that has not ended."""
    try:
        return Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_no_part_starts_when_the_time_is_up(project):
    done = run_project(project, BUDGET="4")  # which is kept to kill what hangs
    assert done.returncode == 1 and "failed: gpu-tests training decoding kernels resume" in done.stderr
    ended = [json.loads(line) for line in (project / "out" / "gpu.jsonl").read_text().splitlines()]
    assert [(line["part"], line["status"]) for line in ended] == [("ended", 124)] * 5


def test_a_part_that_hangs_or_fails_costs_only_its_own_time(project):
    started = time.monotonic()
    done = run_project(project, BUDGET="96")
    assert done.returncode == 1 and "failed: decoding kernels" in done.stderr, done.stdout + done.stderr
    assert time.monotonic() - started < 96
    lines = [json.loads(line) for line in (project / "out" / "gpu.jsonl").read_text().splitlines()]
    assert [line["part"] for line in lines if line["part"] != "ended"] == ["training", "decoding", "kernels", "resume"]
    ended = {line["name"]: line["status"] for line in lines if line["part"] == "ended"}
    assert ended == {"gpu-tests": 0, "training": 0, "decoding": 137, "kernels": 1, "resume": 0}
    assert not is_running((project / "out" / "child").read_text())


def test_results_are_not_mixed_with_earlier_ones(project):
    (project / "out").mkdir()
    (project / "out" / "gpu.jsonl").write_text("{}\n")
    done = run_project(project)
    assert done.returncode == 2 and "has results" in done.stderr
    assert (project / "out" / "gpu.jsonl").read_text() == "{}\n"
