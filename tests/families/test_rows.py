"""Every family against transformers, and each way of computing the same against the others, for every row."""

import copy
import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from families.rows import ROWS
from families.tiny import VOCABULARY, distance, random_tokens, usual_distance

from inference.kv_cache import KVCache
from model import IGNORE
from ops.forks import Forks
from quantize import QUANTIZERS, quantized_layers
from weights.checkpoint import model_of, save_model
from weights.families import FAMILIES
from weights.names import TABLES, Names, rows_in_memory
from weights.stored import Weights

T = 24  # beyond every window and every context of pre-training in the table


def test_every_family_has_three_rows():
    assert ROWS.keys() == FAMILIES.keys() and all(len(rows) >= 3 for rows in ROWS.values())


@torch.no_grad()
def test_logits(tiny):
    tokens = random_tokens(2, T)
    assert distance(tiny.load()(tokens), tiny.reference(tokens, use_cache=False).logits) < 1e-5


def test_loss_and_gradients(tiny, tmp_path):
    """Of every parameter, under the names that the family's files have."""
    tokens, targets = random_tokens(2, T), random_tokens(2, T)
    targets[0, :5] = targets[1, -2:] = IGNORE
    model = tiny.load().requires_grad_(True)
    loss = model(tokens, targets)
    loss.backward()
    logits = tiny.reference(tokens, use_cache=False).logits
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=IGNORE)
    assert abs(loss.item() - expected.item()) < 1e-5 * expected.item()
    tiny.reference.zero_grad()
    expected.backward()
    theirs = gradients_by_stored_name(tiny.reference, tmp_path)
    names, ours = Names(model.config), {name: p.grad for name, p in model.named_parameters()}
    held = names.theirs(list(ours))
    assert held.keys() == theirs.keys()
    for name, own in held.items():
        joined = names.join(name, own, [ours[part] for part in own])
        assert (joined - theirs[name]).norm() <= 1e-5 * theirs[name].norm() + 1e-5, name
    assert sum(gradient.norm() > 0 for gradient in theirs.values()) > len(theirs) / 2


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_the_same_in_triton(family, tiny_models, request):
    """A packed row through the GPU's kernels, interpreted, and through the CPU's: of every parameter."""
    tiny, results = tiny_models((family, 0)), []
    tokens, targets = random_tokens(1, T), random_tokens(1, T)
    for way in ("C++", "Triton"):
        if way == "Triton":
            request.getfixturevalue("interpreted")
        model = tiny.load().requires_grad_(True)
        loss = model(tokens, targets, offsets=[0, 5, T], z_loss=1e-3)
        loss.backward()
        results.append(
            {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}
        )
    assert results[0].keys() == results[1].keys() and len(results[0]) > 10
    for name, expected in results[0].items():
        # Without RoPE a key's bias moves all scores of a query alike: of what cancels in its gradient rounding is left.
        least = 1e-5 if name.endswith("k_proj.bias") else 1e-6
        assert (results[1][name] - expected).norm() <= 1e-5 * expected.norm() + least, name


def test_samples_that_share_their_beginning(tiny):
    """In a packed row, against each with a beginning of its own: hidden states, and the gradients of all weights."""
    forks = Forks((9, 0, 3), ((12, 2), (1, 5, 3), (1, 8)))
    model, tokens = tiny.load().requires_grad_(True), random_tokens(1, forks.offsets()[-1])
    weights = torch.randn(1, tokens.size(1), model.config.embedding_size or model.config.hidden_size)
    sources, copies = torch.tensor(forks.sources()), torch.tensor(forks.copies())
    assert sources[copies].tolist() == [*range(tokens.size(1))]
    shared = model.hidden_states(tokens, offsets=forks)
    ours = torch.autograd.grad((shared * weights).sum(), [*model.parameters()], allow_unused=True)
    wholes = [tokens[:, sources[a:b]] for a, b in itertools.pairwise(forks.whole_offsets())]
    apart = torch.cat([model.hidden_states(whole) for whole in wholes], dim=1)
    usually = usual_distance if model.config.experts else distance
    assert usually(shared, apart[:, copies]) < 1e-5  # of the beginnings those of the first samples that have them
    expected = torch.autograd.grad((apart[:, copies] * weights).sum(), [*model.parameters()], allow_unused=True)
    if model.config.experts:
        return
    for (name, _), own, other in zip(model.named_parameters(), ours, expected, strict=True):
        if other is not None:
            assert (own - other).norm() <= 2e-5 * other.norm() + 1e-5, name


@torch.no_grad()
def gradients_by_stored_name(reference, folder):
    """transformers' gradients under the names of the tensors in its files: saved as the weights of a model."""
    model = copy.deepcopy(reference)
    for parameter, own in zip(model.parameters(), reference.parameters(), strict=True):
        parameter.copy_(torch.zeros_like(own) if own.grad is None else own.grad)
    model.save_pretrained(folder)
    stored = Weights(folder)
    return {name: stored.read(name) for name in stored.shapes}


def test_the_table_of_names_turns_forth_and_back(tiny):
    if tiny.family not in TABLES:
        pytest.skip("has Llama's names")
    stored = Weights(tiny.folder)
    _, model, ours = model_of(json.loads((tiny.folder / "config.json").read_text()), stored)
    names, expected = Names(model.config), [name for name, _ in model.named_parameters()]
    held = names.theirs(expected)
    assert held.keys() == stored.shapes.keys() - ({"lm_head.weight", "embed_out.weight"} - held.keys())
    for name, own in held.items():
        assert torch.equal(names.join(name, own, [ours.read(part) for part in own]), stored.read(name))


def test_the_names_in_memory_are_transformers(tiny):
    """PEFT has these."""
    names = Names(tiny.load().config, rows_in_memory)
    parameters = {name for name, _ in tiny.reference.named_parameters()}
    assert names.theirs([name for name, _ in tiny.load().named_parameters()]).keys() == parameters


@torch.no_grad()
def test_packed_rows_are_single_samples(tiny):
    model, lengths = tiny.load(), (7, 1, T, 12)
    samples = [random_tokens(1, length) for length in lengths]
    offsets = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    packed = model(torch.cat(samples, dim=1), offsets=offsets)
    alone = torch.cat([model(sample) for sample in samples], dim=1)
    assert distance(packed, alone) < 1e-5


@torch.no_grad()
def test_a_cache_and_padding_at_the_left(tiny):
    """Rows of unequal lengths, in pieces, past every window: as each row alone and whole."""
    model, lengths = tiny.load(), (T, T - 9)
    if any(rope is not None and rope.depends_on_length for rope in model.config.ropes):
        lengths = (12, 5)  # beyond the context of pre-training, what was read before is turned in another way
    rows, longest = [random_tokens(1, length) for length in lengths], max(lengths)
    tokens = torch.cat([F.pad(row, (longest - row.size(1), 0)) for row in rows])
    padding = torch.tensor([longest - length for length in lengths])
    cache = KVCache(model.config, 2, longest, torch.float32, "cpu", padding)
    pieces = torch.cat([model(piece, cache=cache) for piece in tokens.split([longest - 3, 1, 2], dim=1)], dim=1)
    for row, got, skipped in zip(rows, pieces, padding.tolist(), strict=True):
        assert distance(got[skipped:], model(row)[0]) < 1e-5


@pytest.mark.parametrize("quantizer", ["bnb.nf4", "bnb.int8"])
@torch.no_grad()
def test_quantised(tiny, quantizer):
    """What a quantised model computes is what a dense one does whose weights are the dequantised ones."""
    tokens, model = random_tokens(1, T), tiny.load(quantize=quantizer)
    dense = tiny.load()
    for name, layer in model.named_modules():
        if isinstance(layer, type(quantized_layers(model)[0])):
            dense.get_submodule(name).weight.copy_(layer.dequantize(torch.float32))
    assert QUANTIZERS and len(quantized_layers(model)) >= 5 * model.config.num_hidden_layers
    assert distance(model(tokens), dense(tokens)) < 1e-5


def test_recomputation_changes_nothing(tiny):
    tokens, targets, gradients = random_tokens(1, T), random_tokens(1, T), []
    for recompute in (0.0, 0.5, 1.0):
        model = tiny.load().requires_grad_(True)
        model(tokens, targets, recompute=recompute).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for other in gradients[1:] for a, b in zip(gradients[0], other, strict=True))


@torch.no_grad()
def test_a_saved_model_is_transformers(tiny, tmp_path):
    """A fully tuned model: a folder of the family that transformers loads, with equal logits."""
    model = tiny.load()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    save_model(model, tmp_path, tiny.folder)
    tokens = random_tokens(2, T)
    theirs = tiny.loaded_by_transformers(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == tiny.family
    assert distance(theirs(tokens, use_cache=False).logits, model(tokens)) < 1e-5


@torch.no_grad()
def test_bf16(tiny):
    """No further from the exact logits than transformers in bf16 is, but for chance."""
    tokens = random_tokens(8, T)
    exact = tiny.reference(tokens, use_cache=False).logits
    theirs = tiny.loaded_by_transformers(tiny.folder).bfloat16()(tokens, use_cache=False).logits
    ours = tiny.load(torch.bfloat16)(tokens)
    assert ours.shape == (8, T, VOCABULARY)
    assert usual_distance(ours.float(), exact) < 1.5 * usual_distance(theirs.float(), exact) + 0.01
