"""The file of a search: what is read from it. What is refused is in tests/bad_inputs.yaml."""

import dataclasses

import pytest
from conftest import ROOT

from search.metric import Metric
from search.ranges import Choices, Numbers
from search.search_file import Asha, read_search
from shell.cli import UserError

RATE = {"low": 1e-4, "high": 1e-2, "log": True}


def test_the_example_is_a_search(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("checkpoints/SmolLM2-135M-Instruct", "prepared/orders"):
        (tmp_path / folder).mkdir(parents=True)
    search = read_search(ROOT / "examples" / "search.yaml")
    assert list(search.ranges) == ["learning_rate", "lora_r", "lora_targets", "schedule"]
    assert search.trials == 16 and search.pruner == Asha(2, 3) and search.metric == Metric()
    assert search.fixed["max_steps"] == 60 and search.eval_interval == 10


def test_ranges_are_of_their_flags_types(search_of):
    search = search_of(
        {
            "learning_rate": {"low": "1e-5", "high": 1, "log": True},  # YAML takes 1e-5 for a text
            "lora_alpha": {"low": 8, "high": 32, "step": 8},
            "lora_r": {"low": 4, "high": 16},
            "lora_targets": {"choices": [["q_proj", "v_proj"], "all-linear"]},
            "max_grad_norm": {"choices": [0, 1]},
            "lora_rank_pattern": {"down_proj": 8},  # a value, no range
        },
        trials=3,
    )
    assert search.ranges == {
        "learning_rate": Numbers("learning_rate", 1e-5, 1.0, True, None, whole=False),
        "lora_alpha": Numbers("lora_alpha", 8.0, 32.0, False, 8.0, whole=False),
        "lora_r": Numbers("lora_r", 4, 16, False, None, whole=True),
        "lora_targets": Choices("lora_targets", [["q_proj", "v_proj"], "all-linear"]),
        "max_grad_norm": Choices("max_grad_norm", [0.0, 1.0]),
    }
    assert type(search.ranges["learning_rate"].high) is float and type(search.ranges["lora_r"].low) is int
    assert search.fixed["lora_rank_pattern"] == {"down_proj": 8}
    assert (search.sampler, search.seed, search.pruner) == ("tpe", 0, None)


def test_a_grid_has_all_combinations(search_of):
    entry = {"low": 0.1, "high": 0.4, "step": 0.1}
    search = search_of({"weight_decay": entry, "lora_r": {"low": 2, "high": 6, "step": 2}}, sampler="grid")
    assert search.ranges["weight_decay"].grid() == [0.1, 0.2, 0.3, 0.4]  # 0.1 + 2 * 0.1 is not 0.3
    assert search.ranges["lora_r"].grid() == [2, 4, 6] and search.trials == 12
    fewer = search_of({"weight_decay": entry}, sampler="grid", trials=3)
    assert fewer.trials == 3


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        *((column, Metric(column)) for column in ("loss", "val_loss/orders", "val_teacher_kl", "forgetting")),
        ({"column": "accuracy", "direction": "maximize"}, Metric("accuracy", "maximize")),
        (
            {"exact_match": "rows.jsonl", "limit": 5},
            Metric(direction="maximize", exact_match={"data": "rows.jsonl", "limit": 5}),
        ),
    ],
)
def test_metrics(search_of, tmp_path, monkeypatch, metric, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    assert search_of({"learning_rate": RATE}, trials=1, metric=metric).metric == expected
    # What the pruner is told is better in the direction of the metric.
    assert expected.at_validation(2.0) == (-2.0 if expected.exact_match else 2.0)


@pytest.mark.parametrize("pruner", ["asha", {"name": "asha"}, {"name": "asha", "first_rung": 1}])
def test_pruners(search_of, pruner):
    assert search_of({"learning_rate": RATE}, trials=1, pruner=pruner).pruner == Asha()
    assert search_of({"learning_rate": RATE}, trials=1, pruner="none").pruner is None


def test_a_flag_that_goes_with_no_value_of_another_is_refused_by_both(search_of):
    """Each is good with the first value of the other."""
    parameters = {"method": {"choices": ["lora", "full"]}, "quantize": {"choices": [None, "bnb.nf4"]}}
    with pytest.raises(UserError, match="method full and quantize bnb.nf4: --quantize needs --method lora"):
        search_of(parameters, trials=1)


def test_an_optimiser_gets_its_own_averages(search_of):
    """Values are checked from the flags alone, not from settings that have filled in AdamW's betas."""
    search_of({"optimizer": {"choices": ["adamw", "adafactor", "lion"]}}, trials=1)


def test_only_trials_may_be_told_from_what_is_kept(search_of):
    one, more = (search_of({"learning_rate": RATE}, trials=trials) for trials in (1, 5))
    assert one.given == more.given and dataclasses.replace(one, trials=5) == more
