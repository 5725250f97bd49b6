"""bench/planners.py trains with two planners and tells the zig-zag of one from the other."""

import importlib.util
import json
import random
import sys

import pytest
from conftest import ROOT

import prepare_data
from shell.cli import UserError

sys.path.append(str(ROOT / "bench"))
spec = importlib.util.spec_from_file_location("bench_planners", ROOT / "bench" / "planners.py")
bench = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)


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
    code, out, err = run_script("bench/planners.py", *arguments, env={"OMP_NUM_THREADS": "1"})  # tiny tensors
    assert code == 0, err
    drawn, grouped = map(json.loads, (tmp_path / "out" / "planners.jsonl").read_text().splitlines())
    assert (drawn["planner"], grouped["planner"]) == ("sorted_in_step", "grouped")
    assert len(drawn["losses"]) == len(grouped["losses"]) == 30 and drawn["settings"] == grouped["settings"]
    assert grouped["deviation"] > 1.1 * drawn["deviation"] > 0
    assert drawn["val_loss"] > 0 and grouped["padding"] < drawn["padding"] < 1
    assert f"{grouped['deviation']:.4f} around its running mean" in out
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
        ({"planners": ["packed", "best"]}, "--planners best: expected some of packed"),
        ({"planners": ["packed", "packed"]}, "none twice"),
        ({"steps": 1}, "--steps 1"),
        ({}, "--planners packed: finetune.py failed, for the reason above"),  # which is that there are no data
    ],
)
def test_mistakes_are_one_line(tiny_model_dir, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        bench.main(bench.Settings(tiny_model_dir, tmp_path, **{"out_file": tmp_path / "x.jsonl", **changes}))
    assert not (tmp_path / "x.jsonl").exists()
