"""Preferences against TRL itself: DPOTrainer on the same model, adapter and pairs, and its formulas of the others."""

import random
from types import SimpleNamespace

import pytest
import torch
from test_lora import (
    VARIANTS,
    adapted,
    assert_same_gradients,
    base_of_transformers,
    by_our_names,
    peft_config,
    trainable,
)
from test_pairs import write

import objectives
from adapters.adapter import switched_off
from batching import PLANNERS, Batch, open_samples
from objectives import PREFERENCE_LOSSES, Preference, answer_logps
from training.settings import Settings

BETA, GAMMA, SMOOTHING = 0.3, 0.7, 0.15


@pytest.fixture
def pairs(tmp_path):
    """Seven pairs of random tokens, prompts and answers of 1 to 9."""
    sizes = [[random.randint(1, 9) for _ in range(3)] for _ in range(7)]
    ids = [[random.choices(range(3, 512), k=size) for size in each] for each in sizes]
    return open_samples(write(tmp_path, ids), "train")


@pytest.fixture
def trainer(tiny_model_dir, tmp_path):
    """`trainer(loss)`: TRL's, with a new LoRA over the tiny model. Its own data set is not used."""
    import datasets
    import transformers
    import trl

    def make(loss):
        args = trl.DPOConfig(
            str(tmp_path / "trl"), loss_type=[loss], beta=BETA, use_cpu=True, bf16=False, report_to=[],
            gradient_checkpointing=False,
        )  # fmt: skip
        return trl.DPOTrainer(
            base_of_transformers(tiny_model_dir), args=args, peft_config=peft_config(VARIANTS["lora"]),
            train_dataset=datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
            processing_class=transformers.AutoTokenizer.from_pretrained(tiny_model_dir),
        )  # fmt: skip

    return make


def as_trl(pairs, i):
    """Pair i as TRL's collator takes it."""
    (chosen, is_chosen), (rejected, _) = pairs.sequences(i)
    start = is_chosen.int().argmax().item()
    ids = {"prompt": chosen[:start], "chosen": chosen[start:], "rejected": rejected[start:]}
    return {f"{name}_ids": own.tolist() for name, own in ids.items()}


@pytest.mark.parametrize("planner", ["packed", "sorted_in_step"])
@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_loss_gradient_and_rewards_are_trls(loss, planner, trainer, pairs, tiny_model_dir):
    """Where prompts are shared, and in rows of their own. The reference is the base under the adapter, of both."""
    ours, theirs = adapted(tiny_model_dir, VARIANTS["lora"]), trainer(loss)
    parameters, expected = trainable(ours), by_our_names(theirs.model)
    assert parameters.keys() == expected.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            expected[name].copy_(parameter)
    theirs.model.eval()
    wanted = theirs.compute_loss(theirs.model, theirs.data_collator([as_trl(pairs, i) for i in range(len(pairs))]))
    wanted.backward()

    objective = Preference(Settings("model", "data", objective="dpo", dpo_loss=loss, dpo_beta=BETA))
    batch = Batch(*PLANNERS[planner].layout(pairs, [*range(len(pairs))]))
    with torch.no_grad(), switched_off(ours):
        x = ours.hidden_states(batch.tokens, offsets=batch.offsets)
        known = {"reference": [*answer_logps(ours, x, batch.targets, batch.target_counts())]}
    found = objective(ours, batch._replace(known=known))
    (found.trained / len(pairs)).backward()
    torch.testing.assert_close(found.trained / len(pairs), wanted, rtol=1e-5, atol=1e-5)
    assert_same_gradients(parameters, expected)
    names = {"rewards/accuracy": "rewards/accuracies", "rewards/margin": "rewards/margins"}
    for name, value in zip(objective.columns, found.measured / len(pairs), strict=True):
        (theirs_value,) = theirs._metrics["eval"][names.get(name, name)]
        assert value.item() == pytest.approx(theirs_value, rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_other_losses_are_trls(loss):
    """Of each pair, with gradients. TRL's ORPO has the chosen answer's loss as a mean over all tokens of a batch."""
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    s = Settings("model", "data", objective="dpo", dpo_loss=loss, dpo_beta=BETA, simpo_gamma=GAMMA)
    s.label_smoothing = SMOOTHING
    lengths = torch.randint(1, 9, (6, 2))
    logps = (-3 * torch.rand(6, 2) * lengths - 0.1).requires_grad_()
    losses, rewards = PREFERENCE_LOSSES[loss].loss(s, objectives.Pairs(logps, lengths, None))
    chosen, rejected = (logps / lengths).unbind(1)
    flags = {"beta": BETA, "simpo_gamma": GAMMA, "label_smoothing": SMOOTHING, "loss_type": loss, "alpha": 0.0}
    theirs = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), **flags)
    if loss == "simpo":
        expected, *their_rewards = CPOTrainer.cpo_loss(theirs, chosen, rejected)
    else:
        ratios, *their_rewards, _, _ = ORPOTrainer.odds_ratio_loss(theirs, chosen, rejected)
        expected = -chosen - ratios
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rewards, torch.stack(their_rewards, dim=1), rtol=1e-5, atol=1e-5)
    ours, wanted = (torch.autograd.grad(each.sum(), logps, retain_graph=True)[0] for each in (losses, expected))
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
