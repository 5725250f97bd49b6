"""bench/methods.py trains with two methods and asks both; bench/training/sweep.py measures both of its sides."""

import json

import pytest

import prepare_data
from bench import methods
from bench.measuring import summarize
from bench.training import sweep
from lora import ADAPTERS
from shell.cli import UserError


@pytest.fixture
def data_dir(tiny_model_dir, tmp_path):
    """A prepared folder, whose rows are in rows.jsonl beside it."""
    rows = [{"prompt": f"what is {i}?", "completion": "yes" * (i % 4)} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source, out_dir = str(tmp_path / "rows.jsonl"), tmp_path / "data"
    how = dict(data=[source], checkpoint_dir=tiny_model_dir, out_dir=out_dir, val_fraction=0.2)
    prepare_data.main(prepare_data.Settings(**how))
    return out_dir


def run(run_script, script, **flags):
    code, out, err = run_script(script, *(f"--{name}={value}" for name, value in flags.items()))
    assert code == 0, err
    lines = flags["out_file"].read_text().splitlines()
    return out, [json.loads(line) for line in lines]


def test_each_method_is_trained_and_asked(data_dir, tiny_model_dir, tmp_path, run_script):
    out, (lora, full) = run(
        run_script, "bench/methods.py", checkpoint_dir=tiny_model_dir, data_dir=data_dir, methods='[lora,full]',
        questions=tmp_path / "rows.jsonl", steps=4, global_batch_size=4, limit=3, max_new_tokens=4,
        out_file=tmp_path / "out" / "methods.jsonl",
    )  # fmt: skip
    assert (lora["method"], full["method"]) == ("lora", "full") and lora["trainable"] < full["trainable"]
    assert lora["tokens"] == full["tokens"] > 0 and lora["learning_rate"] == 2e-3
    for line in (lora, full):
        assert 0 <= line["exact_match"] <= 1 and line["val_loss"] > 0 and line["peak_gb"] > 0
    (row,) = (" ".join(line.split()) for line in out.splitlines() if line.startswith("| `full`"))
    assert f" {full['trainable']:,} | {full['peak_gb']:.2f} | {full['tokens_per_second']:.0f} |" in row
    assert (tmp_path / "out" / "methods.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_has_every_adapter_that_the_real_model_can_have():
    flags = [METHOD.get("method", "lora") for METHOD in methods.METHODS.values()]
    assert {*ADAPTERS, "full"} - {"bitfit"} == {*flags}  # SmolLM2 has no biases


def test_medians_are_over_the_runs_of_a_method():
    lines = [
        {"method": name, **dict.fromkeys(methods.MEDIANS, value)}
        for name, value in (("a", 1), ("b", 9), ("a", 2), ("a", 7))
    ]
    assert [(row["method"], row["peak_gb"]) for row in summarize(lines, ("method",), methods.MEDIANS)] == [
        ("a", 2),
        ("b", 9),
    ]


def test_a_sweep_beside_its_variants_one_by_one(data_dir, tiny_model_dir, tmp_path, run_script):
    out, lines = run(
        run_script, "bench/training/sweep.py", checkpoint_dir=tiny_model_dir, data_dir=data_dir, variants=2,
        global_batch_size="[1,3]", steps=4, runs=1, quantize="none", lora_r=2, out_file=tmp_path / "sweep.jsonl",
    )  # fmt: skip
    assert [(line["samples"], line["side"]) for line in lines] == [
        (size, side) for size in (1, 3) for side in (sweep.TOGETHER, sweep.ALONE)
    ]
    assert all(line["tokens_per_second"] > 0 and line["minutes"] > 0 for line in lines)
    assert out.count("times the tokens/s") == 2


def test_a_joint_step_counts_once():
    runs = [[{"seconds": "9", "tokens": "9"}] * 2 + [{"seconds": "2", "tokens": tokens}] for tokens in ("10", "30")]
    assert sweep.speed(runs, together=True) == 20
    assert sweep.speed(runs, together=False) == 10


def test_mistakes_are_one_line(tiny_model_dir, tmp_path):
    flags = {"checkpoint_dir": tiny_model_dir, "data_dir": tmp_path, "out_file": tmp_path / "x.jsonl"}
    with pytest.raises(UserError, match=r"--methods ia3: finetune.py failed, for the reason above"):
        methods.main(methods.Settings(**flags, methods=["ia3"]))
    assert not (tmp_path / "x.jsonl").exists()
