"""The scripts as a user runs them: from a file of samples to a tuned, measured, merged model, each as a process."""

import contextlib
import io
import json
import re
import runpy
import sys

import pytest
import yaml
from conftest import ROOT

from quantize import QUANTIZERS
from shell import cli

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
SAMPLES = [
    {"instruction": f"What colour is the {thing}?", "output": colour}
    for thing, colour in (
        ("sky", "blue"), ("grass", "green, mostly"), ("snow", "white"), ("coal", "black"), ("rose", "red — or not"),
    )
]  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory, tiny_model_dir, run_script):
    """The whole path, once: what each script printed, by name, and the folder it happened in."""
    folder = tmp_path_factory.mktemp("path")
    data = folder / "colours.jsonl"
    data.write_text("".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in SAMPLES), encoding="utf-8")
    printed = {}

    def script(name, *args):
        key = name if name not in printed else f"{name} again"
        code, out, err = run_script(name, *args, env=NO_GPU)
        assert code == 0 and "Traceback" not in err, f"{name}: {code}\n{out}\n{err}"
        printed[key] = out

    model = ("--checkpoint_dir", tiny_model_dir)
    script("prepare_data.py", "--data", data, *model, "--out_dir", folder / "data", "--val_fraction", 0)
    script(
        "finetune.py", *model, "--data_dir", folder / "data", "--out_dir", folder / "run", "--quantize", "bnb.nf4",
        "--precision", "32-true", "--max_steps", 80, "--learning_rate", 0.01, "--warmup_steps", 2, "--lora_r", 8,
    )  # fmt: skip
    adapter = ("--adapter_dir", folder / "run" / "final")
    greedy = ("--prompt", SAMPLES[4]["instruction"], "--temperature", 0, "--precision", "32-true")
    script("generate.py", *adapter, "--quantize", "bnb.nf4", *greedy)
    script(
        "eval/exact_match.py", *adapter, "--quantize", "bnb.nf4", "--precision", "32-true", "--data", data,
        "--out_file", folder / "result.json",
    )  # fmt: skip
    script("convert_hf_checkpoint.py", *adapter, "--out_dir", folder / "merged")
    script("generate.py", "--checkpoint_dir", folder / "merged", *greedy)
    return folder, printed


def test_the_data(path):
    folder, printed = path
    info = json.loads((folder / "data" / "data.json").read_text())
    assert info["train"]["samples"] == len(SAMPLES) and info["prompt_style"] == "checkpoint"
    assert f"{len(SAMPLES)} read, {len(SAMPLES)} kept" in printed["prepare_data.py"]


def test_the_next_command_that_a_script_prints_can_be_run(path):
    folder, printed = path
    (command,) = re.findall("next: python (.*)", printed["prepare_data.py"])
    script, *args = command.split()
    assert (ROOT / script).is_file()
    settings = runpy.run_path(str(ROOT / script))["Settings"]
    assert cli.parse(settings, args).data_dir == folder / "data"


def test_the_training_learnt(path):
    folder, printed = path
    summary = json.loads((folder / "run" / "summary.json").read_text())
    # Not zero: logits of a frozen, random head over 48 dimensions cannot be as large as certainty needs.
    assert summary["steps"] == 80 and summary["loss_last"] < 1 < 4 < summary["loss_first"]
    assert "trainable parameters" in printed["finetune.py"]


def test_the_answer_is_the_one_trained(path):
    """Without --prompt_style: it must be that of the training, or the answer would differ."""
    _, printed = path
    assert printed["generate.py"] == SAMPLES[4]["output"] + "\n"


def test_exact_match(path):
    folder, printed = path
    assert f"exact match {len(SAMPLES)}/{len(SAMPLES)} = 100.0%" in printed["eval/exact_match.py"]
    result = json.loads((folder / "result.json").read_text())
    assert result["exact_match"] == 1 and result["samples"] == len(SAMPLES)
    assert [row["answer"] for row in result["answers"]] == [sample["output"] for sample in SAMPLES]
    assert [row["prompt"] for row in result["answers"]] == [sample["instruction"] for sample in SAMPLES]


def test_the_merged_model_answers_as_the_adapter(path):
    folder, printed = path
    assert printed["generate.py again"] == printed["generate.py"]
    assert (folder / "merged" / "config.json").is_file() and list((folder / "merged").glob("*.safetensors"))


# ------------------------------------------------------------------------------------------------- flags and recipes

FLAGS = {
    "prepare_data.py": "data checkpoint_dir out_dir prompt_style max_seq_length val_fraction seed",
    "finetune.py": "checkpoint_dir data_dir out_dir method quantize precision lora_r lora_alpha lora_dropout "
    "lora_targets global_batch_size micro_batch_tokens max_steps epochs learning_rate save_interval eval_interval seed "
    "resume devices config",
    "generate.py": "checkpoint_dir adapter_dir quantize precision prompt max_new_tokens temperature top_k top_p seed",
    "convert_hf_checkpoint.py": "repo_id source adapter_dir out_dir",
    "eval/exact_match.py": "data checkpoint_dir adapter_dir",
    "eval/lm_eval_harness.py": "checkpoint_dir adapter_dir quantize precision eval_tasks save_filepath num_fewshot "
    "limit bootstrap_iters include_path",
    "eval/helm_server.py": "checkpoint_dir adapter_dir quantize precision host port",
    "sweep.py": "sweep out_dir storage study_name report",
    "eval/quality.py": "data data_dir general_text adapter_dir variants sensitivity budget_bytes out_dir",
}


@pytest.mark.parametrize("script", FLAGS)
def test_help(script, monkeypatch):
    """Each flag that others rely on by name is there, and every flag has a word of explanation."""
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert caught.value.code == 0
    for flag in FLAGS[script].split():
        assert re.search(rf"--{flag}\b", out.getvalue()), flag
    settings = runpy.run_path(str(ROOT / script))["Settings"]
    for flag in settings.__dataclass_fields__:
        assert re.search(rf"^ +{flag}: .*\w", settings.__doc__, re.MULTILINE), f"{flag} is not explained"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_recipes_parse(path):
    finetune = runpy.run_path(str(ROOT / "finetune.py"))
    settings = cli.parse(finetune["Settings"], ["--config", str(path)])
    assert settings.quantize in (None, *QUANTIZERS) and settings.planner in finetune["PLANNERS"]
    assert str(settings.out_dir).endswith(path.stem)


def test_the_recipe_to_try_things_with_has_the_keys_of_the_one_at_full_size():
    small, full = (yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text()) for name in ("dev", "a100"))
    assert list(small) == list(full)
    assert small["precision"] == "16-mixed" and full["precision"] == "bf16-true", "a T4 has no bf16"


def test_there_are_recipes():
    assert list((ROOT / "configs").glob("*.yaml"))
