"""Every method and objective trains the small real model, on its 4-bit base where it has one: the loss falls."""

import json

import pytest
from conftest import ROOT
from test_finetune import rows

import finetune
import prepare_data
from bench.methods import METHODS
from lora import ADAPTERS
from objectives import OBJECTIVES
from training import metrics
from training.settings import Settings

OTHERS = {  # beside bench/methods.py's table
    "dpo": {"objective": "dpo", "learning_rate": 1e-3},
    "distill": {"objective": "distill", "learning_rate": 1e-3, "teacher_weight": 0.5},
}


@pytest.fixture(scope="module")
def data_dirs(smollm2_dir, tmp_path_factory):
    """The prepared folders of four orders, and of four pairs, of the quickstart."""
    folders = {}
    for kind, name in (("samples", "train"), ("pairs", "pairs")):
        folder = tmp_path_factory.mktemp(kind)
        lines = (ROOT / "examples" / "orders" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:4]
        (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
        how = dict(data=[str(folder / "rows.jsonl")], checkpoint_dir=smollm2_dir, prompt_style="chatml", val_fraction=0)
        folders[kind] = folder / "data"
        prepare_data.main(prepare_data.Settings(**how, out_dir=folders[kind]))
    return folders


def test_nothing_is_left_out():
    flags = [{**METHODS, **OTHERS}[name] for name in (*METHODS, *OTHERS)]
    assert {own.get("method", "lora") for own in flags} == {*ADAPTERS, "full"} - {"bitfit"}  # it has no biases
    assert {own.get("objective", "sft") for own in flags} == {*OBJECTIVES}


@pytest.mark.real
@pytest.mark.parametrize("name", [*METHODS, *OTHERS])
def test_the_loss_falls(name, smollm2_dir, data_dirs, tmp_path, monkeypatch):
    """On the same four samples in each step. MeZO, which goes along one random direction, takes many to get far."""
    monkeypatch.setattr(metrics, "plot_losses", lambda *_: None)
    flags = {"quantize": "bnb.nf4"} | {**METHODS, **OTHERS}[name]
    if flags.get("objective") == "distill":
        flags["teacher_dir"] = smollm2_dir
    steps, most = (16, 1) if flags.get("optimizer") == "mezo" else (4, 0.97)
    s = Settings(
        checkpoint_dir=smollm2_dir, data_dir=data_dirs["pairs" if name == "dpo" else "samples"],
        out_dir=tmp_path / "run", global_batch_size=4, micro_batch_tokens=1024, max_steps=steps, warmup_steps=0,
        schedule="constant", eval_interval=0, save_interval=0, **flags,
    )  # fmt: skip
    finetune.main(s)
    losses = [row["loss"] for row in rows(s.out_dir)]
    assert len(losses) == steps and losses[-1] < most * losses[0], losses
    summary = json.loads((s.out_dir / "summary.json").read_text())
    assert 0 < summary["trainable_parameters"] <= summary["trainable_parameters"] + summary["frozen_parameters"]
