"""What training minimises, against the same written out with logits of all positions."""

import pytest
import torch
import torch.nn.functional as F

from batching import IGNORE, Batch
from finetune import Settings
from objectives import PREFERENCE_LOSSES, Pairs
from ops.forks import Forks
from ops.loss import each_head_loss, plain_losses
from weights.checkpoint import load_model

BETA, SMOOTHING, GAMMA = 0.3, 0.15, 0.7


# ------------------------------------------------------------------------------------------------------ target losses


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk", [1, 5, 256])
def test_each_head_loss(chunk, softcap, way, monkeypatch):
    """Every target's loss has a gradient of its own."""
    monkeypatch.setattr("ops.loss.LOSS_CHUNK", chunk)
    x, weight, bias = torch.randn(11, 8), torch.randn(30, 8), torch.randn(30)
    targets, factors = torch.randint(30, (11,)), torch.randn(11)
    results = []
    for fast in (True, False):
        x.requires_grad_().grad = None
        if fast:
            losses = each_head_loss(x, weight, targets, bias, softcap)
        else:
            logits = F.linear(x, weight, bias)
            losses = plain_losses(logits if softcap is None else softcap * (logits / softcap).tanh(), targets)[0]
        (losses * factors).sum().backward()
        results.append((losses.detach(), x.grad.clone()))
    torch.testing.assert_close(*results, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("trains", ["head", "blocks"])
def test_the_model_gives_each_target_its_gradient(trains, tiny_model_dir):
    model = load_model(tiny_model_dir, torch.float32).requires_grad_(True)
    model.lm_head.requires_grad_(trains == "head")
    tokens, targets = torch.randint(3, 512, (2, 9)), torch.randint(3, 512, (2, 9))
    targets[0, :4] = targets[1, 7:] = IGNORE
    factors = torch.randn((targets != IGNORE).sum())
    parameters = [p for p in model.parameters() if p.requires_grad]
    losses = model.each_target_loss(model.hidden_states(tokens), targets)
    ours = torch.autograd.grad((losses * factors).sum(), parameters)
    expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="none")
    expected = expected[targets.flatten() != IGNORE]
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours, torch.autograd.grad((expected * factors).sum(), parameters), atol=1e-5, rtol=1e-5)


def test_label_smoothing_is_torchs(tiny_model_dir):
    model = load_model(tiny_model_dir, torch.float32).requires_grad_(True)
    tokens, targets = torch.randint(3, 512, (2, 9)), torch.randint(3, 512, (2, 9))
    targets[0, :4] = IGNORE
    parameters = [*model.parameters()]
    trained, losses = model.target_losses(model.hidden_states(tokens), targets, label_smoothing=0.2)
    logits = model(tokens).flatten(0, 1)
    how = dict(reduction="sum", ignore_index=IGNORE)
    expected = F.cross_entropy(logits, targets.flatten(), label_smoothing=0.2, **how)
    torch.testing.assert_close(trained, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses.sum(), F.cross_entropy(logits, targets.flatten(), **how), rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(trained, parameters)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, parameters), atol=1e-5, rtol=1e-5)


# -------------------------------------------------------------------------------------------------------- preferences


def written_out(name, chosen, rejected, chosen_reference, rejected_reference, chosen_length, rejected_length):
    """The loss of one pair, from the log-probabilities of its two answers: as the papers write it."""
    if name in ("sigmoid", "ipo"):
        chosen_ratio, rejected_ratio = chosen - chosen_reference, rejected - rejected_reference
        if name == "ipo":
            return (chosen_ratio / chosen_length - rejected_ratio / rejected_length - 1 / (2 * BETA)) ** 2
        gap = BETA * (chosen_ratio - rejected_ratio)
        return -(1 - SMOOTHING) * torch.sigmoid(gap).log() - SMOOTHING * torch.sigmoid(-gap).log()
    chosen, rejected = chosen / chosen_length, rejected / rejected_length
    if name == "simpo":
        gap = BETA * (chosen - rejected) - GAMMA
        return -(1 - SMOOTHING) * torch.sigmoid(gap).log() - SMOOTHING * torch.sigmoid(-gap).log()
    odds = [p / (1 - p) for p in (chosen.exp(), rejected.exp())]
    return -chosen - BETA * torch.sigmoid((odds[0] / odds[1]).log()).log()


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_a_preference_loss_is_as_published(name):
    s = Settings("model", "data", objective="dpo", dpo_loss=name, dpo_beta=BETA, simpo_gamma=GAMMA)
    s.label_smoothing = SMOOTHING
    logps = (-5 * torch.rand(6, 2, dtype=torch.float64) - 0.5).requires_grad_()
    reference, lengths = -5 * torch.rand(6, 2, dtype=torch.float64), torch.randint(1, 9, (6, 2))
    losses, rewards = PREFERENCE_LOSSES[name].loss(s, Pairs(logps, lengths, reference))
    expected = torch.stack([written_out(name, *logps[i], *reference[i], *lengths[i]) for i in range(6)])
    torch.testing.assert_close(losses, expected)
    ours = torch.autograd.grad(losses.sum(), logps, retain_graph=True)
    torch.testing.assert_close(ours, torch.autograd.grad(expected.sum(), logps))
    assert rewards.shape == (6, 2)


def pair_batches():
    """Three pairs, the second without a beginning, as a packed row and as padded rows."""
    forks = Forks((5, 0, 3), ((4, 6), (2, 1), (1, 3)))
    tokens = torch.randint(3, 512, (1, forks.offsets()[-1]))
    targets = torch.full_like(tokens, IGNORE)
    rows, row_targets = torch.zeros(6, 11, dtype=torch.int64), torch.full((6, 11), IGNORE)
    number = 0
    for first, start, ends in zip(forks.offsets(), *forks, strict=False):
        own = first + start
        for end in ends:
            targets[0, own : own + end] = torch.randint(3, 512, (end,))
            rows[number, : start + end] = torch.cat([tokens[0, first : first + start], tokens[0, own : own + end]])
            row_targets[number, start : start + end] = targets[0, own : own + end]
            own, number = own + end, number + 1
    return Batch(tokens, targets, forks), Batch(rows, row_targets, None)


def test_a_batch_counts_targets_and_falls_into_its_samples():
    packed, padded = pair_batches()
    assert packed.target_counts() == padded.target_counts() == [4, 6, 2, 1, 1, 3]
    known = {"reference": [*torch.arange(6.0).view(3, 2)]}
    for batch, size in ((packed, 1), (padded, 2)):
        parts = [*batch._replace(known=known).samples(3)]
        assert [part.target_counts() for part in parts] == [[4, 6], [2, 1], [1, 3]]
        assert [part.tokens.size(0) for part in parts] == [size] * 3
        assert [part.known["reference"][0].tolist() for part in parts] == [[0, 1], [2, 3], [4, 5]]
    row = Batch(torch.zeros(1, 7), torch.tensor([[IGNORE, 1, 1, IGNORE, 1, 1, 1]]), [0, 3, 7])
    assert row.target_counts() == [2, 3] and [part.offsets for part in row.samples(2)] == [[0, 3], [0, 4]]
    with pytest.raises(IndexError):
        [*row.samples(3)]
