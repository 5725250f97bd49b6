"""A step that is not finite in a model that is divided: it is kept, and runs again on one device."""

import re
import sys

import pytest
import yaml
from conftest import ROOT
from devices import start_processes
from test_bad_input import run_here
from test_devices import SIZES
from test_finetune import random_samples, settings

from training import run_folder
from training.nonfinite import FILE

__all__ = ["settings"]

STOP = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from shell import cli
from training.settings import Settings
settings = cli.parse(Settings)
import finetune
from training.nonfinite import NotFinite
check, norms = finetune.check_finite, []
def find_fault(what, value):
    check(what, value)
    norms.extend([value] * (what == "the gradient's norm"))
    if len(norms) == 3:
        raise NotFinite(what, value)
finetune.check_finite = find_fault
cli.run(finetune.main, settings)
"""


@pytest.mark.parametrize(
    "flags",
    [
        dict(parallel="tensor=2", method="dora", quantize="bnb.nf4"),
        dict(shard=True, method="full", learning_rate=0.01),
        dict(parallel="pipeline=2"),
    ],
    ids=["tensor", "shard", "pipeline"],
)
def test_the_replay_shows_the_same_numbers(settings, model_dirs, tmp_path, flags):
    """A sound run stops at the end of its third step, as if that were not finite."""
    folder = model_dirs("llama", **SIZES, num_attention_heads=6, num_key_value_heads=3)
    s = settings(
        random_samples(14), checkpoint_dir=folder, devices=2, max_steps=5, global_batch_size=5, micro_batch_tokens=20,
        max_grad_norm=0, **flags,
    )  # fmt: skip
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(run_folder.plain(s)))
    processes = start_processes(2, [sys.executable, "-c", STOP, "--config", config])
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], outputs
    told = re.search(r"step 3: the gradient's norm is (\S+); run it again with --config (\S+) ", outputs[0])
    assert told and f"--replay {s.out_dir / FILE}, on one device, to see which samples" in outputs[0], outputs[0]
    code, out, err = run_here("finetune.py", "--config", told[2], "--replay", s.out_dir / FILE)
    assert code == 0, err
    assert out.startswith(f"step 3, when the gradient's norm is {told[1]}: "), out
    norm = float(re.search(r"^loss \S+, norm of the gradient (\S+)$", out, re.MULTILINE)[1])
    assert norm == pytest.approx(float(told[1]), rel=1e-4)
    assert len(re.findall(r"^sample \d+: loss", out, re.MULTILINE)) == 14 - 2 * 5
    assert out.endswith("first not finite: nothing\n")
