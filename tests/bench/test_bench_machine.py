"""bench/machine/gpu.py on a CPU, in small: its parts run, its sides do the same work, and what fails is a row."""

import json
import subprocess
import time

import pytest
import torch
from conftest import ROOT

from bench.machine import gpu
from bench.shapes import SHAPES


def test_every_part_runs_in_small(tmp_path, run_script):
    sizes = {"--tokens": 64, "--sample_tokens": 32, "--prompt_tokens": 8, "--new_tokens": 5}
    code, out, err = run_script(
        "bench/machine/gpu.py", "--shape", "tiny", "--device", "cpu", "--steps", 2, "--repetitions", 1,
        *(word for size in sizes.items() for word in size), "--commit", "abc", "--out_file", tmp_path / "gpu.jsonl",
    )  # fmt: skip
    assert code == 0, err
    limits, *rows = map(json.loads, (tmp_path / "gpu.jsonl").read_text().splitlines())
    assert limits["part"] == "limits" and limits["tflops"] > 0 and limits["commit"] == "abc"
    runs = {(row["kind"], row["recompute"], row["side"]): row for row in rows if row["part"] == "training"}
    assert len(runs) == 2 * 2 * 3 + 2
    for kind, recompute, side in runs:
        row, ours = runs[kind, recompute, side], runs[kind, recompute, "onetune"]
        assert row["grad_norm"] > 0 and row["last_loss"] < row["first_loss"]
        assert abs(row["first_loss"] / ours["first_loss"] - 1) < 1e-2
        assert row["tokens_per_second"] > 0 and row["share"] > 0 and row["peak_gb"] > 0
        assert (side == "onetune") == ("predicted_gb" in row)
        assert 0 < ours["predicted_gb"] < ours["peak_gb"]  # which is the whole process'
    assert runs["qlora", False, "onetune"]["predicted_gb"] < runs["lora", False, "onetune"]["predicted_gb"]
    table = [[cell.strip() for cell in line.split("|")] for line in out.splitlines() if line.startswith("|")]
    first = dict(zip(table[0], next(cells for cells in table if cells[1] == "tiny lora: onetune"), strict=True))
    lora = runs["lora", False, "onetune"]
    assert float(first["plan"]) == pytest.approx(lora["predicted_gb"] / lora["peak_gb"], abs=6e-4)
    decoding = [row for row in rows if row["part"] == "decoding"]
    assert {(row["quantize"], row["batch"]) for row in decoding} == {(q, b) for q in (None, "bnb.nf4") for b in (1, 16)}
    (dequantizing,) = (row for row in rows if row["part"] == "dequantizing")
    names = ["dequantised", *(f"rows: {rows}" for rows in (1, 2, 4, 16))]
    names = {name + side for name in names for side in ("", ", bitsandbytes")}
    assert dequantizing["microseconds"].keys() == dequantizing["shares"].keys() == names
    assert all(row["new_tokens"] == 5 and row["tokens_per_second"] > 0 for row in decoding)
    assert all(f"{kind}{', recomputing' * recompute}: {side}" in out for kind, recompute, side in runs)


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

    monkeypatch.setattr(gpu, "measure_training", fail)
    part, s = gpu.Training("tiny", "lora", False, gpu.OURS), gpu.Settings(shape="tiny", device="cpu")
    assert gpu.attempt(part, s, {}, deadline=time.monotonic() + 1000) == row
    assert gpu.attempt(part, s, {}, deadline=time.monotonic() + part.seconds - 1) == {"skipped": "no time left"}


def test_sides_that_do_not_do_the_same_are_named():
    ours, peer = (gpu.Training("tiny", "lora", False, side) for side in gpu.SIDES[:2])
    assert gpu.differing_losses([(ours, {"first_loss": 6.0}), (peer, {"first_loss": 6.05})]) == []
    assert gpu.differing_losses([(ours, {"first_loss": 6.0}), (peer, {"first_loss": 6.07})]) == [str(peer)]
    assert gpu.differing_losses([(ours, {"skipped": "out of memory"}), (peer, {"first_loss": 6.07})]) == []


def test_the_counted_weights_are_those_of_the_published_models():
    embedding = 32000 * 4096
    norms = (2 * 32 + 1) * 4096
    assert gpu.matrix_weights(SHAPES["Llama-2-7B"]) + embedding + norms == 6_738_415_616
    assert gpu.matrix_weights(SHAPES["Mistral-7B"]) + embedding + norms == 7_241_732_096


def test_gpu_sh_finds_the_tests_that_need_a_gpu():
    script = (ROOT / "bench" / "gpu.sh").read_text()
    search = script.partition("-m gpu $(")[2].partition(")")[0]
    found = subprocess.run(["bash", "-c", search], cwd=ROOT, capture_output=True, text=True).stdout.split()
    marked = {str(p.relative_to(ROOT)) for p in ROOT.glob("tests/**/test_*.py") if "mark" + ".gpu" in p.read_text()}
    assert set(found) == marked and "tests/training/test_gpu.py" in found
