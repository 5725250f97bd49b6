"""The recipes of configs/ for several cards of 24 GB: what the plan predicts for each card, and that it fits there."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
from test_finetune import random_sample, write_data

from bench.shapes import SHAPES
from shell import cli
from training import build
from training.memory import budget, plan
from training.settings import Settings

ROOT = Path(__file__).parents[2]
CARD = 24e9
RECIPES = {  # the model, and how many tokens the longest samples may have
    "llama-2-70b-2x24gb": ("Llama-2-70B", 1024),
    "falcon-40b-2x24gb": ("Falcon-40B", 2048),
    "mpt-30b-2x24gb": ("MPT-30B", 8192),
    "llama-2-7b-4x24gb-full": ("Llama-2-7B", 4096),
}


@pytest.fixture
def flags(tmp_path, tiny_model_dir):
    """`flags("llama-2-70b-2x24gb")`: a user's, for a model folder without weights and the longest samples."""

    def make(recipe):
        name, length = RECIPES[recipe]
        model = tmp_path / "model"
        shutil.copytree(tiny_model_dir, model, ignore=shutil.ignore_patterns("*.safetensors"))
        (model / "config.json").write_text(json.dumps(SHAPES[name]))
        data = write_data(tmp_path / "data", model, [random_sample(2, length - 2) for _ in range(8)])
        return ["--config", ROOT / f"configs/{recipe}.yaml", "--checkpoint_dir", model, "--data_dir", data]

    return make


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_predicted_for_a_card_fits(recipe, flags):
    """With what CUDA takes itself, and as the recipe and the table of docs/devices.md say."""
    s = cli.parse(Settings, [*map(str, flags(recipe))])
    data = build.open_data(s)
    build.check_model(s, data)
    job, steps = budget.planned_job(s, data.train)
    predictor = plan.Predictor(dataclasses.replace(job, device="meta"))
    shape = plan.worst([shape for shapes in steps for shape in shapes])
    peak = predictor.peak(shape)
    assert s.micro_batch_tokens - shape.positions in (1, 2)  # a sample has a token more than positions
    assert peak < CARD - plan.CUDA_OVERHEAD
    assert plan.Predictor(dataclasses.replace(job, device="meta", tensor=1, shares=1)).peak(shape) > CARD
    said = re.search(
        r"^# Predicted peak of each: (\S+) GB", (ROOT / f"configs/{recipe}.yaml").read_text(), re.MULTILINE
    )
    row = re.search(rf"^\| `configs/{recipe}.yaml` \|.*\| (\S+) GB \|$", (ROOT / "docs/devices.md").read_text(), re.M)
    assert said[1] == row[1] == f"{peak / 1e9:.1f}"


def test_a_user_can_plan_a_recipe_without_weights(flags, run_script):
    code, out, err = run_script("finetune.py", *flags("llama-2-70b-2x24gb"), "--plan", "--plan_tflops", 100)
    assert code == 0, err
    assert "take the most memory" in out and "Each device sends" in out
