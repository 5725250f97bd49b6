"""Log-likelihoods by shared rows and batches, held against one forward pass for each text."""

import itertools
import math
import random

import conftest
import pytest
import torch

import lora
from inference import scoring
from inference.scoring import Score, cut_batches, plain_score, rolling, score, share_contexts, windows
from model import Layout, Places
from quantize import QUANTIZERS
from shell.cli import UserError
from weights.checkpoint import load_model

FAMILIES = pytest.mark.parametrize("family", conftest.FAMILIES)
CONTEXT = conftest.SMALL["max_position_embeddings"]


@pytest.fixture(scope="module")
def model_of(tiny_checkpoint):
    """`model_of("mistral", "bnb.nf4")`: a tiny model in fp32. Not to be changed."""
    models = {}

    def load(family, quantize=None):
        if (family, quantize) not in models:
            models[family, quantize] = load_model(tiny_checkpoint(family), torch.float32, "cpu", quantize)
        return models[family, quantize]

    return load


def ids(length):
    return [random.randrange(3, 512) for _ in range(length)]


def questions():
    """Contexts with several continuations each, of one token and of many, in no order; some come twice."""
    requests = []
    for length, ends in ((1, (1, 1)), (2, (9, 1, 4)), (7, (3,)), (20, (1, 1, 1, 1)), (33, (8, 0, 2, 5)), (5, (30, 25))):
        context = ids(length)
        requests += [(context, ids(end)) for end in ends]
    requests.append(requests[3])
    random.shuffle(requests)
    return requests


def assert_same(got, expected, tolerance=1e-4):
    assert len(got) == len(expected)
    for ours, right in zip(got, expected, strict=True):
        assert ours.logprob == pytest.approx(right.logprob, abs=tolerance)
        assert ours.greedy == right.greedy


# ------------------------------------------------------------------------------------------------- the same, but faster


@FAMILIES
@pytest.mark.parametrize("batch_tokens", [1, 40, 2048])
def test_a_score_is_that_of_the_text_alone(model_of, family, batch_tokens):
    """Biases, norms on heads, scaled RoPE, and contexts and ends beyond the windows of 6 and 7."""
    model, requests = model_of(family), questions()
    assert_same(score(model, requests, batch_tokens), [plain_score(model, *request) for request in requests])


@FAMILIES
def test_greedy_is_what_the_model_would_say(model_of, family):
    """One end that the model continues with by itself, and the same with another last token."""
    model, context = model_of(family), ids(11)
    text = list(context)
    for _ in range(5):
        with torch.no_grad():
            text.append(model(torch.tensor([text]))[0, -1].argmax().item())
    end = text[11:]
    other = [*end[:-1], (end[-1] + 1) % 512]
    assert [result.greedy for result in score(model, [(context, end), (context, other), (context, end[:1])])] == [
        True, False, True,
    ]  # fmt: skip


@pytest.mark.parametrize("quantize", sorted(QUANTIZERS))
def test_quantised_weights(model_of, quantize):
    model, requests = model_of("llama", quantize), questions()
    assert_same(score(model, requests), [plain_score(model, *request) for request in requests], 1e-3)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_also_on_the_head(tiny_checkpoint, kind):
    model = load_model(tiny_checkpoint("llama"), torch.float32)
    lora.add_lora(model, lora.AdapterConfig(r=2, targets=("q_proj", "down_proj", "lm_head"), kind=kind))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    requests = questions()
    assert_same(score(model, requests), [plain_score(model, *request) for request in requests])


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_bf16(tiny_checkpoint, family):
    model, requests = load_model(tiny_checkpoint(family), torch.bfloat16), questions()
    for got, right in zip(score(model, requests), (plain_score(model, *r) for r in requests), strict=True):
        assert got.logprob == pytest.approx(right.logprob, abs=0.05, rel=0.03)


def test_nothing_is_asked_nothing_is_answered(model_of):
    assert score(model_of("llama"), []) == []
    assert score(model_of("llama"), [(ids(3), []), (ids(1), [])]) == [Score(0.0, True)] * 2


def test_progress_adds_up(model_of):
    requests, seen = questions(), []
    score(model_of("llama"), requests, 30, seen.append)
    assert sum(seen) == len(requests) and len(seen) > 3


# ---------------------------------------------------------------------------------------------------- the context's end


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_what_is_too_long_loses_its_beginning(model_of, family):
    model, context = model_of(family), ids(CONTEXT + 9)
    for cut, end in itertools.product((CONTEXT - 3, CONTEXT, CONTEXT + 9), (1, 2, 4, CONTEXT)):
        request = (context[:cut], ids(end))
        text = (request[0] + request[1])[-(CONTEXT + 1) :]  # lm-eval's rule
        with torch.no_grad():
            logprobs = model(torch.tensor([text[:-1]]))[0].log_softmax(-1)
        right = sum(logprobs[i - 1, text[i]].item() for i in range(len(text) - end, len(text)))
        assert score(model, [request])[0].logprob == pytest.approx(right, abs=1e-3)
        assert plain_score(model, *request).logprob == pytest.approx(right, abs=1e-3)


def test_an_end_longer_than_the_context_is_refused(model_of):
    with pytest.raises(UserError, match=f"{CONTEXT + 1} tokens.*{CONTEXT}"):
        score(model_of("llama"), [(ids(3), ids(CONTEXT + 1))])


def test_an_empty_context_is_refused(model_of):
    for function in (lambda model: score(model, [([], ids(2))]), lambda model: plain_score(model, [], ids(2))):
        with pytest.raises(ValueError, match="context is empty"):
            function(model_of("llama"))


def test_damaged_weights_are_told(tiny_checkpoint):
    model = load_model(tiny_checkpoint("llama"), torch.float32)
    with torch.no_grad():
        model.model.norm.weight[5] = torch.nan
    with pytest.raises(UserError, match="NaN"):
        score(model, [(ids(3), ids(2))])


# ------------------------------------------------------------------------------------------------------- rows, batches


def test_a_context_is_computed_once(model_of, monkeypatch):
    model, context = model_of("llama"), ids(50)
    positions, run = [], model.hidden_states
    monkeypatch.setattr(model, "hidden_states", lambda x, **known: positions.append(x.numel()) or run(x, **known))
    score(model, [(context, ids(4)) for _ in range(6)])
    assert positions == [50 + 6 * 3]


def test_every_request_is_in_one_row():
    requests = questions()
    rows = share_contexts(requests, 6 * 48, 60)
    ends = [(number, row.context, end) for row in rows for number, end in row.ends]
    assert sorted(ends) == [(i, *request) for i, request in enumerate(requests) if request[1]]
    assert all(row.length == len(row.context) + sum(len(end) - 1 for _, end in row.ends) for row in rows)
    assert all(row.length <= 60 or len(row.ends) == 1 for row in rows)


def test_long_ends_of_a_short_context_share_no_row():
    """Most of what they would attend to were masked: a row of 2,000 positions for one that is saved."""
    requests = [([1], ids(200)) for _ in range(10)]
    assert len(share_contexts(requests, 6 * 48, 10**6)) == 10
    assert len(share_contexts([(ids(1) * 200, ids(3))] * 10, 6 * 48, 10**6)) == 1


def test_batches_stay_in_their_budget():
    rows = share_contexts([(ids(random.randint(1, 50)), ids(random.randint(1, 50))) for _ in range(40)], 288, 10**6)
    batches = list(cut_batches(rows, 120))
    assert sorted(id(row) for batch in batches for row in batch) == sorted(map(id, rows))
    assert all(len(batch) * max(row.length for row in batch) <= 120 or len(batch) == 1 for batch in batches)
    longest = [max(row.length for row in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)


def test_the_mask_of_a_tree():
    """Against a definition position by position; padding, branch -1, need only see anything at all."""
    branches = torch.tensor([[0, 0, 0, 1, 1, 2, 3, 3, 3, -1], [0, 1, 2, 2, 2, 2, 3, -1, -1, -1]])
    positions = torch.tensor([[0, 1, 2, 3, 4, 3, 3, 4, 5, 0], [0, 1, 1, 2, 3, 4, 1, 0, 0, 0]])
    for window in (None, 1, 2, 4):
        mask = Layout(branches, tree=Places(positions, branches)).mask(window)
        assert mask.shape == (2, 1, 10, 10) and mask.any(-1).all()
        for b, q, k in itertools.product(range(2), range(10), range(10)):
            if branches[b, q] < 0:
                continue
            near = window is None or 0 <= positions[b, q] - positions[b, k] < window
            own = branches[b, k] in (0, branches[b, q])
            assert mask[b, 0, q, k] == (k <= q and own and near)


# -------------------------------------------------------------------------------------------------------- whole texts


@pytest.mark.parametrize("total", [0, 1, 6, 7, 8, 14, 15, 50])
@pytest.mark.parametrize("length", [1, 2, 7, 100])
def test_windows_are_those_of_lm_eval(total, length):
    utils = pytest.importorskip("lm_eval.utils")
    text = list(range(total))
    theirs = map(utils.make_disjoint_window, utils.get_rolling_token_windows(text, -1, length, 1))
    assert list(windows(text, -1, length)) == list(theirs)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_whole_text(model_of, family):
    model, texts = model_of(family), [ids(n) for n in (1, 0, 30, 9, 10, 300)]
    got = rolling(model, texts, 2, length=10)
    assert len(got) == len(texts) and got[1] == 0
    for text, logprob in zip(texts, got, strict=True):
        right = sum(plain_score(model, *window).logprob for window in windows(text, 2, 10))
        assert logprob == pytest.approx(right, abs=1e-3)
    whole = plain_score(model, [2], texts[2]).logprob
    assert rolling(model, texts[2:3], 2) == [pytest.approx(whole, abs=1e-3)]
    assert math.isfinite(rolling(model, texts[-1:], 2)[0])  # longer than the model's context


def test_the_head_is_cut(model_of):
    """The logits of a few positions exist at one time, whatever the batch."""
    model, sizes, chunk = model_of("llama"), [], scoring.LOSS_CHUNK
    hook = model.lm_head.register_forward_hook(lambda layer, x, y: sizes.append(len(y)))
    rolling(model, [ids(600)], 2)
    hook.remove()
    assert max(sizes) <= chunk and sum(sizes) == 600
