"""bench/training/planners.py trains with two planners and tells the zig-zag of one from the other."""

import json
import random

import pytest

import prepare_data
from bench.training import planners as bench
from shell.cli import UserError


def test_the_zigzag_of_grouped_shows(tiny_model_dir, tmp_path, run_script):
    """Two tasks: short answers always the same, long ones of random words. A grouped step has one of them only."""
    with open(tmp_path / "rows.jsonl", "w") as file:
        for i in range(96):
            words = "yes" if i % 2 else " ".join(random.choices(("bade", "logan", "fimu", "toran", "sepi"), k=30))
            file.write(json.dumps({"prompt": f"what is {i}?", "completion": words}) + "\n")
    prepare_data.main(
        prepare_data.Settings(data=tmp_path / "rows.jsonl", checkpoint_dir=tiny_model_dir, out_dir=tmp_path / "data")
    )
    flags = {
        "checkpoint_dir": tiny_model_dir, "data_dir": tmp_path / "data", "planners": "[sorted_in_step,grouped]",
        "steps": 30, "global_batch_size": 8, "micro_batch_tokens": 500, "learning_rate": 0.01, "precision": "32-true",
        "out_file": tmp_path / "out" / "planners.jsonl",
    }  # fmt: skip
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    code, out, err = run_script("bench/training/planners.py", *arguments)
    assert code == 0, err
    sampled, grouped = map(json.loads, (tmp_path / "out" / "planners.jsonl").read_text().splitlines())
    assert (sampled["planner"], grouped["planner"]) == ("sorted_in_step", "grouped")
    assert len(sampled["losses"]) == len(grouped["losses"]) == 30 and sampled["settings"] == grouped["settings"]
    assert grouped["deviation"] > 1.1 * sampled["deviation"] > 0
    assert sampled["val_loss"] > 0 and grouped["padding"] < sampled["padding"] < 1
    (row,) = (line for line in out.splitlines() if line.startswith("| grouped "))
    assert f" {grouped['deviation']:.4f} | {grouped['val_loss']:.4f} |" in " ".join(row.split())
    assert (tmp_path / "out" / "planners.png").read_bytes().startswith(b"\x89PNG")


def test_deviation_is_around_the_running_mean(monkeypatch):
    monkeypatch.setattr(bench, "SPAN", 3)
    assert bench.running_mean([1, 4, 1, 4]) == [2.5, 2, 3, 2.5]
    straight = [5 - 0.1 * i for i in range(50)]
    assert (
        bench.deviation(straight) < 0.02 < 0.3 < bench.deviation([loss + (-1) ** i for i, loss in enumerate(straight)])
    )


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"planners": ["packed", "packed"]}, "none twice"),
        ({"steps": 1}, "--steps 1"),
        ({}, "--planners packed: finetune.py failed, for the reason above"),  # which is that there are no data
    ],
)
def test_mistakes_are_one_line(tiny_model_dir, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        flags = {"checkpoint_dir": tiny_model_dir, "data_dir": tmp_path, "out_file": tmp_path / "x.jsonl"}
        bench.main(bench.Settings(**flags, **changes))
    assert not (tmp_path / "x.jsonl").exists()
