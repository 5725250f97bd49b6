"""The decoder against transformers, and each of its ways of computing the same thing against the plain one."""

import json
import subprocess
import sys
from functools import lru_cache, partial

import pytest
import torch
import torch.nn.functional as F
from conftest import FAMILIES
from safetensors.torch import load_file

import lora
import model as model_module
from inference.kv_cache import KVCache
from model import IGNORE, Layout, Places, Transformer
from ops import dtypes
from ops.attention import plain_attention, sdpa_attention
from ops.rope import inverse_frequencies
from weights.families import config_from_json

family = pytest.mark.parametrize("family", FAMILIES)


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


def build(folder, dtype=torch.float32):
    model = Transformer(config_from_json(read_config(folder)))
    missing, surplus = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert set(missing) <= ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
    assert not surplus
    return model.to(dtype).eval()


@lru_cache
def reference(folder, dtype=torch.float32):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=dtype).eval()


def random_tokens(*shape, vocab_size=512):
    return torch.randint(vocab_size, shape)


def random_targets(*shape):
    """Targets of which about half count; where there are several rows, none in the first."""
    targets = random_tokens(*shape).masked_fill(torch.rand(shape) < 0.5, IGNORE)
    targets[-1, -1] = 7
    if len(targets) > 1:
        targets[0] = IGNORE
    return targets


def distance(a, b):
    """|a - b| / |b|"""
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12)).item()


def gradients(model):
    result = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return result


def assert_same_gradients(ours, theirs, within):
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert distance(ours[name], theirs[name]) < within, name


# ----------------------------------------------------------------------------------------------- against transformers


@family
@pytest.mark.parametrize("shape", [(3, 20), (2, 1), (1, 7)])
def test_logits_loss_and_every_gradient(tiny_checkpoint, family, shape):
    ours, theirs = build(tiny_checkpoint(family)), reference(tiny_checkpoint(family))
    tokens, targets = random_tokens(*shape), random_targets(*shape)
    logits = theirs(tokens, use_cache=False).logits
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=IGNORE)
    expected.backward()
    assert distance(ours(tokens), logits) < 1e-5
    loss = ours(tokens, targets)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    theirs_gradients = gradients(theirs)
    assert any(gradient.norm() > 1e-3 for gradient in theirs_gradients.values())
    if shape[1] == 1:  # one key: the softmax is constant, so what remains of these gradients is rounding
        for name in [name for name in theirs_gradients if any(key in name for key in ("q_", "k_"))]:
            assert theirs_gradients.pop(name).norm() < 1e-5
    ours_gradients = {name: gradient for name, gradient in gradients(ours).items() if name in theirs_gradients}
    assert_same_gradients(ours_gradients, theirs_gradients, 1e-5)


@family
def test_no_target_at_all_is_zero_and_not_nan(tiny_checkpoint, family):
    ours = build(tiny_checkpoint(family))
    loss = ours(random_tokens(2, 9), torch.full((2, 9), IGNORE))
    loss.backward()
    assert loss.item() == 0
    assert all(gradient.count_nonzero() == 0 for gradient in gradients(ours).values())


@family
def test_bf16_is_as_close_to_fp32_as_transformers(tiny_checkpoint, family):
    folder, tokens = tiny_checkpoint(family), random_tokens(4, 30)
    with torch.no_grad():
        exact = reference(folder)(tokens).logits
        theirs = reference(folder, torch.bfloat16)(tokens).logits
        ours = build(folder, torch.bfloat16)(tokens)
    assert ours.dtype == dtypes.compute_dtype(torch.bfloat16, "cpu")
    assert distance(ours, exact) < 1.3 * distance(theirs, exact) < 0.05


def test_the_window_matters_in_the_comparison(tiny_checkpoint):
    """The tiny Mistral would differ without its window, so the parity above has seen it."""
    windowed = build(tiny_checkpoint("mistral"))
    values = {**read_config(tiny_checkpoint("mistral")), "sliding_window": None}
    full = Transformer(config_from_json(values)).eval()
    full.load_state_dict(windowed.state_dict())
    tokens = random_tokens(1, 20)
    near, far = windowed(tokens), full(tokens)
    assert distance(near[:, :7], far[:, :7]) < 1e-5
    assert distance(near[:, 19:], far[:, 19:]) > 1e-2


# ----------------------------------------------------------------------------------- one result by different ways


@family
@pytest.mark.parametrize("chunk", [1, 5])
def test_loss_in_chunks_is_the_loss_in_one(tiny_checkpoint, family, chunk, monkeypatch):
    model = build(tiny_checkpoint(family))
    tokens, targets = random_tokens(3, 9), random_targets(3, 9)
    whole = model(tokens, targets)
    whole.backward()
    expected = gradients(model)
    monkeypatch.setattr("ops.loss.LOSS_CHUNK", chunk)
    loss = model(tokens, targets)
    loss.backward()
    assert loss.item() == pytest.approx(whole.item(), rel=1e-5)
    assert_same_gradients(gradients(model), expected, 1e-5)


@family
def test_a_packed_sample_has_the_loss_and_gradient_that_it_has_alone(tiny_checkpoint, family):
    """Positions restart, attention stays inside each sample: also beyond the window, and for a sample of length 1."""
    model = build(tiny_checkpoint(family))
    lengths = (5, 1, 30, 12)
    samples = [(random_tokens(1, length), random_targets(1, length)) for length in lengths]
    alone = [model(*sample) for sample in samples]
    sum(alone).backward()
    expected = gradients(model)
    tokens, targets = (torch.cat(parts, dim=1) for parts in zip(*samples, strict=True))
    offsets = [0, 5, 6, 36, 48]
    loss = model(tokens, targets, offsets=offsets)
    loss.backward()
    assert loss.item() == pytest.approx(sum(alone).item(), rel=1e-5)
    assert_same_gradients(gradients(model), expected, 1e-5)
    for i, (start, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
        only = torch.full_like(targets, IGNORE)
        only[:, start:end] = targets[:, start:end]
        assert model(tokens, only, offsets=offsets).item() == pytest.approx(alone[i].item(), rel=1e-5)


@family
def test_the_blocks_of_bf16_attend_alike(tiny_checkpoint, family, monkeypatch):
    """A CPU with bf16 instructions takes blocks of queries; tried here in fp32."""
    model = build(tiny_checkpoint(family))
    tokens, offsets = random_tokens(1, 30), [0, 9, 10, 30]
    one_by_one = model(tokens, offsets=offsets)
    choose = model_module.choose_attention

    def as_in_bf16(layout, head_dim, dtype, scores):
        return choose(layout, head_dim, torch.bfloat16, scores)

    monkeypatch.setattr(model_module, "choose_attention", as_in_bf16)
    assert distance(model(tokens, offsets=offsets), one_by_one) < 1e-5
    rows = random_tokens(3, 20)
    in_blocks = model(rows)
    monkeypatch.undo()
    assert distance(in_blocks, model(rows)) < 1e-5


def with_plain_attention(monkeypatch):
    """Replace the one line in `hidden_states` that chooses the device's way, as its comment says."""
    monkeypatch.setattr(
        model_module,
        "choose_attention",
        lambda layout, head_dim, dtype, scores: partial(
            plain_attention, scores=scores, mask=layout.mask(scores.window), back=layout.back()
        ),
    )


@family
@torch.no_grad()
def test_plain_attention_does_whatever_the_devices_way_does(tiny_checkpoint, family, monkeypatch):
    """Rows, packed rows, a cache with and without padding, rows that branch."""
    model = build(tiny_checkpoint(family))
    rows, packed = random_tokens(3, 20), random_tokens(1, 48)
    positions = torch.tensor([[*range(12), *range(12, 15), *range(12, 17)]])
    tree = Places(positions.expand(3, -1), torch.tensor([[0] * 12 + [1] * 3 + [2] * 5]).expand(3, -1))
    ways = {
        "rows": lambda: model(rows),
        "packed": lambda: model(packed, offsets=[0, 5, 6, 36, 48]),
        "cache": lambda: cached(model, rows, [9, 5, 1, 1, 4]),
        "padding": lambda: cached(model, rows, [12, 1, 7], torch.tensor([0, 3, 11])),
        "tree": lambda: model.hidden_states(rows, tree=tree),
    }
    by_device = {name: way() for name, way in ways.items()}
    with_plain_attention(monkeypatch)
    for name, way in ways.items():
        plain, devices = way(), by_device[name]
        if name == "padding":  # what stands in the padding itself means nothing
            shown = torch.arange(20) >= torch.tensor([0, 3, 11])[:, None]
            plain, devices = plain[shown], devices[shown]
        assert distance(devices, plain) < 1e-5, name


@family
def test_plain_attention_gives_the_same_gradients(tiny_checkpoint, family, monkeypatch):
    model = build(tiny_checkpoint(family))
    tokens, targets, offsets = random_tokens(1, 48), random_targets(1, 48), [0, 5, 6, 36, 48]
    model(tokens, targets, offsets=offsets).backward()
    by_device = gradients(model)
    with_plain_attention(monkeypatch)
    model(tokens, targets, offsets=offsets).backward()
    assert_same_gradients(by_device, gradients(model), 1e-5)


def test_positions_of_packed_samples_and_of_padded_rows():
    tokens = torch.zeros(1, 10, dtype=torch.int64)
    places = Layout(tokens, offsets=[0, 4, 5, 10]).places
    assert places.positions.tolist() == [[0, 1, 2, 3, 0, 0, 1, 2, 3, 4]]
    assert places.branches.tolist() == [[1, 1, 1, 1, 2, 3, 3, 3, 3, 3]]
    config = config_from_json({**LLAMA_2_7B, "num_hidden_layers": 1, "hidden_size": 64})
    cache = KVCache(config, 2, 8, torch.float32, "cpu", torch.tensor([0, 3]))
    cache.length = 4
    places = Layout(torch.zeros(2, 2, dtype=torch.int64), cache).places
    assert places.positions.tolist() == [[0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 1, 2]]
    assert places.branches.tolist() == [[0] * 6, [-1] * 3 + [0] * 3]


@family
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_recompute_changes_nothing(tiny_checkpoint, family, share):
    model = build(tiny_checkpoint(family))
    tokens, targets = random_tokens(2, 12), random_targets(2, 12)
    plain = model(tokens, targets)
    plain.backward()
    expected = gradients(model)
    loss = model(tokens, targets, recompute=share)
    loss.backward()
    assert loss.item() == plain.item()
    assert_same_gradients(gradients(model), expected, 1e-6)


def test_recompute_repeats_the_dropout(tiny_checkpoint):
    model = build(tiny_checkpoint("llama"))
    lora.add_lora(model, lora.AdapterConfig(r=4, dropout=0.5))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter)
    model.train()
    tokens, targets = random_tokens(2, 12), random_targets(2, 12)
    losses, results = [], []
    for recompute in (False, True):
        torch.manual_seed(3)
        loss = model(tokens, targets, recompute=recompute)
        loss.backward()
        losses.append(loss.item())
        results.append(gradients(model))
    assert losses[0] == losses[1] != model.eval()(tokens, targets).item()
    assert_same_gradients(results[1], results[0], 1e-6)


def test_recompute_keeps_less(tiny_checkpoint):
    """Bytes kept for the backward pass: of each block only its input."""
    model = build(tiny_checkpoint("llama"))
    tokens, targets = random_tokens(2, 64), random_targets(2, 64)
    weights = {parameter.data_ptr() for parameter in model.parameters()}

    def kept(recompute):
        sizes = {}

        def pack(tensor):
            if tensor.data_ptr() not in weights:
                sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(tokens, targets, recompute=recompute)
        return sum(sizes.values())

    assert kept(True) < 0.5 * kept(False)


def test_logits_of_a_call_in_inference_mode_do_not_spoil_training(tiny_checkpoint):
    model = build(tiny_checkpoint("llama-linear"))
    inverse_frequencies.cache_clear()
    tokens, targets = random_tokens(2, 6), random_targets(2, 6)
    with torch.inference_mode():
        model(tokens)
    model(tokens, targets).backward()


# --------------------------------------------------------------------------------------------------------- the cache


def cached(model, tokens, cuts, padding=None):
    """Logits of `tokens` (B, T) through one cache, the tokens given in pieces of the sizes `cuts`."""
    B, T = tokens.shape
    dtype = model.lm_head.weight.dtype
    cache = KVCache(model.config, B, T, dtype, tokens.device, padding)
    storage, shape = cache.k.data_ptr(), cache.k.shape
    pieces = []
    for piece in tokens.split(cuts, dim=1):
        pieces.append(model(piece, cache=cache))
        assert cache.length == sum(p.size(1) for p in pieces)
    assert cache.k.data_ptr() == storage and cache.k.shape == cache.v.shape == shape
    return torch.cat(pieces, dim=1)


@family
@pytest.mark.parametrize("cuts", [[20], [9, 5, 1, 1, 4], [1] * 20, [1, 19], [3, 8, 9]])
@torch.no_grad()
def test_cache_equals_full_forward(tiny_checkpoint, family, cuts):
    model = build(tiny_checkpoint(family))
    tokens = random_tokens(2, 20)
    assert distance(cached(model, tokens, cuts), model(tokens)) < 1e-5


@family
@pytest.mark.parametrize("cuts", [[22], [12, 1, 1, 1, 7], [1] * 22])
@torch.no_grad()
def test_left_padded_batch_equals_each_row_alone(tiny_checkpoint, family, cuts):
    model = build(tiny_checkpoint(family))
    tokens, padding = random_tokens(4, 22), torch.tensor([0, 3, 11, 21])
    logits = cached(model, tokens, cuts, padding)
    assert logits.isfinite().all()
    for row, empty in enumerate(padding.tolist()):
        assert distance(logits[row, empty:], model(tokens[row : row + 1, empty:])[0]) < 1e-5


@torch.no_grad()
def test_one_row_can_be_filled_with_anything_left_of_its_start(tiny_checkpoint):
    model, padding = build(tiny_checkpoint("mistral")), torch.tensor([5])
    tokens = random_tokens(1, 16)
    other = tokens.clone()
    other[0, :5] = random_tokens(5)
    assert torch.equal(
        cached(model, tokens, [12, 1, 3], padding)[:, 5:], cached(model, other, [12, 1, 3], padding)[:, 5:]
    )


@torch.no_grad()
def test_cache_is_limited_to_its_length(tiny_checkpoint):
    model = build(tiny_checkpoint("llama"))
    cache = KVCache(model.config, 1, 4, torch.float32, "cpu")
    model(random_tokens(1, 4), cache=cache)
    for more in (1, 2):
        with pytest.raises(ValueError, match="room for 4"):
            model(random_tokens(1, more), cache=cache)


def test_grouped_decoding_copies_no_key():
    B, K, H, S, d = 1, 2, 12, 4096, 64
    q, k, v = torch.randn(B, H, 1, d), torch.randn(B, K, S, d), torch.randn(B, K, S, d)

    def allocated(function):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            result = function()
        return result, sum(max(0, event.self_cpu_memory_usage) for event in profile.events())

    def copying():
        repeated = [x.repeat_interleave(H // K, dim=1) for x in (k, v)]
        return F.scaled_dot_product_attention(q, *repeated)

    expected, much = allocated(copying)
    y, little = allocated(lambda: sdpa_attention(q, k, v, None, 64**-0.5))
    assert distance(y, expected) < 1e-5
    assert much > 2 * k.nbytes  # the meter does see a copy
    assert little < k.nbytes / 2


# -------------------------------------------------------------------------------------------------------- the whole

LLAMA_2_7B = dict(
    model_type="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=32, rms_norm_eps=1e-5, max_position_embeddings=4096,
)  # fmt: skip
LLAMA_2_13B = {**LLAMA_2_7B, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40}
LLAMA_2_13B.update(num_attention_heads=40, num_key_value_heads=40)
OPEN_LLAMA_7B = {key: value for key, value in LLAMA_2_7B.items() if key != "num_key_value_heads"}
MISTRAL_7B = {**LLAMA_2_7B, "model_type": "mistral", "intermediate_size": 14336, "num_key_value_heads": 8}
MISTRAL_7B.update(sliding_window=4096, max_position_embeddings=32768, rope_theta=10000.0)
MLP = ("gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    "values, r, targets, trainable, frozen",
    [
        (OPEN_LLAMA_7B, 8, ("q_proj", "v_proj"), 4_194_304, 6_738_415_616),
        (MISTRAL_7B, 16, MLP, 28_311_552, 7_270_043_648 - 28_311_552),
        (LLAMA_2_13B, 16, MLP, 36_372_480, 13_052_236_800 - 36_372_480),
    ],
    ids=["open_llama_7b", "mistral_7b", "llama_2_13b"],
)
def test_published_parameter_counts(values, r, targets, trainable, frozen):
    with torch.device("meta"):
        model = Transformer(config_from_json(values))
    lora.add_lora(model, lora.AdapterConfig(r=r, targets=targets))
    counts = {True: 0, False: 0}
    for parameter in model.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    assert counts == {True: trainable, False: frozen}


def test_model_imports_only_torch():
    """A decoder that can be lifted out: no library but torch, and the files that compute for it."""
    imports = "import sys, torch, torch.utils.flop_counter"  # the latter imports Triton, where that is installed
    code = f"{imports}; before = set(sys.modules); import model; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=model_module.__file__.rpartition("/")[0], capture_output=True, text=True
    )
    loaded = [name for name in done.stdout.split() if name.partition(".")[0] not in ("torch", *sys.stdlib_module_names)]
    assert {name.partition(".")[0] for name in loaded} == {"model", "experts", "ops"}, done.stderr


# -------------------------------------------------------------------------------------------------- the real model

PARAGRAPH = (
    "The lighthouse keeper climbed the stairs every evening at six, trimmed the wick, and wrote the height of the tide "
    "in a ledger bound in green cloth. In 37 years he missed two nights; on both of them, he said, the sea was flat."
)


@pytest.fixture(scope="module")
def smollm2(smollm2_dir):
    """Ours and transformers' in fp32, and the ids of PARAGRAPH."""
    from tokenizers import Tokenizer

    from weights import checkpoint

    ids = Tokenizer.from_file(str(smollm2_dir / "tokenizer.json")).encode(PARAGRAPH).ids
    return checkpoint.load_model(smollm2_dir, torch.float32), reference(smollm2_dir), torch.tensor([ids])


@pytest.mark.real
@torch.no_grad()
def test_real_logits(smollm2):
    ours, theirs, tokens = smollm2
    expected = theirs(tokens).logits
    assert (ours(tokens) - expected).abs().max() < 1e-3
    loss = F.cross_entropy(expected[0, :-1], tokens[0, 1:])
    assert loss < 5  # it predicts English: a wrong layout of the weights would not


@pytest.mark.real
@torch.no_grad()
def test_real_greedy_text(smollm2):
    ours, theirs, tokens = smollm2
    expected = theirs.generate(tokens, max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)
    cache = KVCache(ours.config, 1, tokens.size(1) + 30, torch.float32, "cpu")
    given, result = tokens, tokens
    for _ in range(30):
        given = ours(given, cache=cache)[:, -1:].argmax(-1)
        result = torch.cat((result, given), dim=1)
    assert result.tolist() == expected.tolist()
