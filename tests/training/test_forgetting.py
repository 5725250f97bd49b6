"""How far a run takes the model from its base: against the whole distributions of two models."""

import pytest
import torch
from test_finetune import SOURCES, column, random_samples, rows, run, settings  # noqa: F401 (fixtures)

from batching import open_samples
from shell.cli import UserError
from weights.checkpoint import load_model

KEEP = SOURCES[1]["name"]


def kl_of(base, tuned, samples, source):
    """KL(base | tuned) for each target of the samples of a source, from all logits."""
    total, count = 0.0, 0
    for i in (samples.sources[:] == source).nonzero().flatten().tolist():
        tokens, targets = samples.inputs_and_targets(i)
        log_p, log_q = (model(tokens[None])[0].log_softmax(-1)[targets != -100] for model in (base, tuned))
        total, count = total + (log_p.exp() * (log_p - log_q)).sum().item(), count + len(log_p)
    return total / count


@pytest.mark.parametrize("flags", [{}, {"lora_targets": ["lm_head", "q_proj"]}, {"planner": "random"}])
def test_it_is_the_kl_of_the_two_models(flags, run, tiny_model_dir, tmp_path):  # noqa: F811
    out = run(
        random_samples(9, sources=2), random_samples(7, sources=2), forgetting_source=KEEP, max_steps=3,
        eval_interval=1, micro_batch_tokens=40, **flags,
    )  # fmt: skip
    found = column(out, "forgetting")
    assert len(found) == 3 and 0 < found[0] < found[-1]
    base = load_model(tiny_model_dir, torch.float32)
    tuned = load_model(tiny_model_dir, torch.float32, adapter_dir=out / "final")
    with torch.no_grad():
        expected = kl_of(base, tuned, open_samples(tmp_path / "data", "val"), 1)
    assert found[-1] == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_measuring_changes_nothing(run):  # noqa: F811
    data = random_samples(9, sources=2), random_samples(7, sources=2)
    how = dict(max_steps=2, eval_interval=1, lora_dropout=0.2)
    measured = rows(run(*data, name="measured", forgetting_source=KEEP, **how))
    plain = rows(run(name="plain", **how))
    assert [{k: v for k, v in row.items() if k != "forgetting"} for row in measured] == plain


@pytest.mark.parametrize("flags, message", [
    ({"method": "full"}, "needs an adapter"),
    ({"lora_init": "pissa"}, "--lora_init pissa takes from the base"),
    ({"lora_modules_to_save": ["lm_head"]}, "needs adapters alone"),
    ({"forgetting_source": "nothing"}, "nothing: .* has gsm8k"),
    ({"eval_interval": 0}, "--eval_interval"),
])  # fmt: skip
def test_what_cannot_be_measured(flags, message, run):  # noqa: F811
    data = random_samples(9, sources=2), random_samples(7, sources=2)
    with pytest.raises(UserError, match=message):
        run(*data, **({"forgetting_source": KEEP} | flags))
