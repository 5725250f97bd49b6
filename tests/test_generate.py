"""Text from a model: against a plain loop over the full forward pass, and every way of choosing a token by hand."""

import copy
import json
import random
import shutil
from functools import partial
from types import SimpleNamespace

import conftest
import pytest
import torch
from conftest import SEED, Ids, write_tiny_tokenizer

import generate
import lora
import model as model_file
from generate import Settings, read_prompts
from inference import sampling
from inference import writer as writer_module
from inference.decode import CompiledDecoder, Decoder, PlainDecoder, StaticDecoder, Weights, dense, fastest_decoder
from inference.kv_cache import KVCache
from inference.sampling import Batch, Reply, Row, choose, keep_min_p, penalize_generated, penalize_seen
from inference.writer import DTYPES, Writer
from model import Linear, Transformer
from ops.cpp import compiled_library
from quantize import QUANTIZERS, QuantizedLinear
from shell import cli
from shell.cli import UserError
from text.messages import Dialog
from text.prompts import encode_prompt
from weights import peft_format
from weights.checkpoint import load_model
from weights.families import config_from_json

FAMILIES = pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
needs_compiler = pytest.mark.skipif(not compiled_library("decode_cpu"), reason="no C++ compiler")


@pytest.fixture(scope="session")
def model_of(tiny_checkpoint):
    """`model_of("mistral")`: a tiny model in fp32. Not to be changed."""
    models = {}

    def load(family):
        if family not in models:
            models[family] = load_model(tiny_checkpoint(family), torch.float32)
        return models[family]

    return load


@pytest.fixture
def writer(tiny_model_dir):
    return Writer(tiny_model_dir, None, None, "32-true", "plain")


def settings(**flags):
    return Settings(checkpoint_dir="any", **{"temperature": 0, "max_new_tokens": 12, **flags})


def asking(text, *before, **more):
    """The dialog of a user's question, after other messages."""
    return Dialog([*before, {"role": "user", "content": text}], **more)


def new_ids(model, prompts, s, seeds=None):
    replies = [Ids() for _ in prompts]
    decoder = Decoder(model) if isinstance(model, Transformer) else model
    for _ in sampling.generate(decoder, prompts, replies, s, seeds or [s.seed] * len(prompts)):
        pass
    return [reply.ids for reply in replies]


def random_prompt(length):
    return [random.randrange(3, 512) for _ in range(length)]


def plain_greedy(model, prompt, tokens):
    """The likeliest token, again and again, by the whole forward pass: no cache, no padding."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(tokens):
            ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    return ids[len(prompt) :]


# ------------------------------------------------------------------------------------------------------------ greedy


@FAMILIES
def test_temperature_0_is_the_plain_loop(model_of, family):
    """Past mistral's window of 7, too."""
    model = model_of(family)
    for length in (1, 2, 6, 7, 8, 20):
        prompt = random_prompt(length)
        assert new_ids(model, [prompt], settings()) == [plain_greedy(model, prompt, 12)]


@FAMILIES
def test_a_batch_gives_what_each_prompt_gives_alone(model_of, family):
    model = model_of(family)
    prompts = [random_prompt(length) for length in (1, 3, 7, 8, 30, 2, 1, 15)]
    s = settings(max_new_tokens=20)
    assert new_ids(model, prompts, s) == [new_ids(model, [prompt], s)[0] for prompt in prompts]


@FAMILIES
def test_a_batch_gives_what_each_prompt_gives_alone_under_a_penalty(model_of, family):
    """Nothing of the padding counts as having occurred."""
    model = model_of(family)
    prompts = [random_prompt(length) for length in (1, 9, 4)]
    s = settings(repetition_penalty=1.5)
    assert new_ids(model, prompts, s) == [new_ids(model, [prompt], s)[0] for prompt in prompts]


def test_as_many_tokens_as_asked_for(model_of):
    model = model_of("llama")
    for n in (1, 2, 9):
        assert len(new_ids(model, [random_prompt(3)], settings(max_new_tokens=n))[0]) == n


def test_the_context_is_the_end(model_of):
    """256 positions. A prompt that fills them is refused; one that is a token shorter gets its one token."""
    model = model_of("llama")
    for length in (256, 300):
        with pytest.raises(UserError, match=f"{length} tokens.*256"):
            new_ids(model, [random_prompt(5), random_prompt(length)], settings())
    assert len(new_ids(model, [random_prompt(255)], settings())[0]) == 1
    assert len(new_ids(model, [random_prompt(250)], settings())[0]) == 6


def test_a_long_prompt_does_not_shorten_the_answers_beside_it(model_of):
    model = model_of("llama")
    prompts = [random_prompt(4), random_prompt(250)]
    assert new_ids(model, prompts, settings()) == [new_ids(model, [prompt], settings())[0] for prompt in prompts]


def test_an_empty_prompt_is_refused(model_of):
    with pytest.raises(UserError, match="empty"):
        new_ids(model_of("llama"), [[]], settings())


# ---------------------------------------------------------------------------------------------------------- decoders

DECODERS = pytest.mark.parametrize(
    "kind",
    [
        pytest.param(
            CompiledDecoder, marks=pytest.mark.skipif(not compiled_library("decode_cpu"), reason="no C++ compiler")
        ),
        StaticDecoder,
    ],
)
LENGTHS = {1: [9], 3: [1, 12, 5], 8: [3] * 8, 19: list(range(1, 20))}  # one row, one vector, two, and more


def decoded_logits(decoder, prompts, forced, keep=()):
    """Logits (B, V) after the prompts and after each id of `forced` (steps, B); `keep` {step: rows to go on with}."""
    longest = max(map(len, prompts))
    padding = torch.tensor([longest - len(prompt) for prompt in prompts])
    tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    logits, rows = [decoder.start(tokens, padding, longest + len(forced)).clone()], torch.arange(len(prompts))
    for step, ids in enumerate(forced):
        if step in dict(keep):
            decoder.keep(dict(keep)[step])
            rows = rows[dict(keep)[step]]
        logits.append(decoder.step(ids[rows]).clone())
    return logits


def assert_same_logits(kind, model, batch=3, keep=(), tolerance=1e-5):
    prompts = [random_prompt(length) for length in LENGTHS[batch]]
    forced = torch.randint(3, 512, (14, batch))
    expected, got = (decoded_logits(decoder(model), prompts, forced, keep) for decoder in (Decoder, kind))
    for right, fast in zip(expected, got, strict=True):
        torch.testing.assert_close(
            fast.float(), right.float(), rtol=tolerance, atol=tolerance * right.abs().max().item()
        )


@DECODERS
@pytest.mark.parametrize("family", conftest.FAMILIES)
def test_a_decoder_computes_what_the_model_does(model_of, kind, family):
    """Biases, norms on heads, scaled RoPE, windows, tied heads, and every family beyond its window."""
    assert_same_logits(kind, model_of(family))


@DECODERS
@pytest.mark.parametrize("batch", LENGTHS)
def test_a_decoder_for_every_size_of_batch(model_of, kind, batch):
    assert_same_logits(kind, model_of("mistral"), batch)


@DECODERS
def test_rows_can_leave_the_batch(model_of, kind):
    keep = {4: torch.tensor([0, 2, 3, 7, 18]), 9: torch.tensor([3])}
    assert_same_logits(kind, model_of("mistral"), 19, keep.items())


@DECODERS
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_rows_can_join_the_batch(model_of, kind, family):
    """Shorter and longer than those that are there, padded and not, after some have left: each as if it were alone."""
    model = model_of(family)
    groups = [[random_prompt(n) for n in lengths] for lengths in ([5], [9, 2], [1], [30, 4])]
    forced = torch.randint(3, 512, (20, 6))
    decoder, logits, expected = kind(model), [], []
    row_of = []  # each row of the batch: (its prompt, the ids that followed)
    for step, ids in enumerate(forced):
        if step % 4 == 0 and groups:
            if step == 8:
                decoder.keep(torch.tensor([0, 2]))
                row_of = [row_of[0], row_of[2]]
            prompts = groups.pop(0)
            longest = max(map(len, prompts))
            padding = torch.tensor([longest - len(prompt) for prompt in prompts])
            tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
            read = decoder.take(decoder.read(tokens, padding, longest).finish(), 20)
            row_of += [list(prompt) for prompt in prompts]
            logits += read.clone()
            expected += [model(torch.tensor([prompt]))[0, -1] for prompt in prompts]
        ids = ids[: len(row_of)]
        logits += decoder.step(ids).clone()
        for row, id in zip(row_of, ids.tolist(), strict=True):
            row.append(id)
            expected.append(model(torch.tensor([row]))[0, -1])
    torch.testing.assert_close(torch.stack(logits), torch.stack(expected), rtol=1e-5, atol=3e-5)


@DECODERS
def test_a_prompt_is_scored_while_it_is_read(model_of, kind, monkeypatch):
    """In chunks of positions, of the rows that are asked for, beside others, at the start and when joining."""
    monkeypatch.setattr("inference.decode.LOSS_CHUNK", 128)  # the tiny model's context is one whole chunk
    model, prompts = model_of("mistral"), [random_prompt(n) for n in (1, 3, 128, 129, 200)]
    tokens = torch.tensor([[0] * (200 - len(prompt)) + prompt for prompt in prompts])
    padding = torch.tensor([200 - len(prompt) for prompt in prompts])
    decoder, got = kind(model), {}

    def score(row, position, logits):
        assert len(logits) <= 128 and position == sum(map(len, got.setdefault(row, [])))
        got[row].append(logits.clone())

    last = decoder.start(tokens, padding, 201, {row: partial(score, row) for row in (0, 2, 3, 4)})
    for row, prompt in enumerate(prompts):
        expected = model(torch.tensor([prompt]))[0]
        torch.testing.assert_close(last[row], expected[-1], rtol=1e-5, atol=3e-5)
        if row != 1:
            torch.testing.assert_close(torch.cat(got[row]), expected, rtol=1e-5, atol=3e-5)
    assert {row: len(chunks) for row, chunks in got.items()} == {0: 1, 2: 1, 3: 2, 4: 2}
    got.clear()
    decoder.read(tokens[1:2, 197:], torch.zeros(1, dtype=torch.int64), 3, {0: partial(score, 0)}).finish()
    torch.testing.assert_close(torch.cat(got[0]), model(torch.tensor([prompts[1]]))[0], rtol=1e-5, atol=3e-5)


@DECODERS
def test_a_decoder_with_more_than_one_thread(model_of, kind):
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert_same_logits(kind, wide_model(), 8)
    finally:
        torch.set_num_threads(threads)


def wide_model(quantize=None, dtype=torch.float32, device="cpu"):
    """Rows of whole blocks of 64 weights, as in real models, and enough of them for several threads."""
    config = config_from_json(
        dict(
            model_type="qwen2", vocab_size=512, hidden_size=128, intermediate_size=192, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5,
        )
    )  # fmt: skip
    model = Transformer(config).to(device)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.1)
    for block in model.model.layers if quantize else ():
        for part in (block.self_attn, block.mlp):
            for name, layer in list(part.named_children()):
                if isinstance(layer, torch.nn.Linear):
                    setattr(part, name, QUANTIZERS[quantize](layer.weight.detach(), layer.bias))
    return model.to(dtype).requires_grad_(False).eval()


@DECODERS
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("quantize", QUANTIZERS)
def test_a_decoder_over_quantised_layers(kind, quantize, batch):
    assert_same_logits(kind, wide_model(quantize), batch)


@DECODERS
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind_of_adapter", ["lora", "dora", "lora-fa"])
@pytest.mark.parametrize("quantize", [None, "bnb.nf4", "bnb.int8"])
@pytest.mark.parametrize("targets", [lora.PROJECTIONS, ("q_proj", "v_proj", "down_proj", "lm_head")])
def test_a_decoder_under_an_adapter(kind, kind_of_adapter, quantize, targets, batch):
    """Not merged: base and adapter are computed side by side, as in training."""
    model = wide_model(quantize)
    lora.add_lora(model, lora.AdapterConfig(kind_of_adapter, r=5, alpha=8, targets=targets))
    for adapter in lora.adapters(model).values():
        adapter.lora_B.data.normal_(std=0.2)
    assert_same_logits(kind, model.eval(), batch)


@DECODERS
def test_a_decoder_with_a_kind_of_adapter_that_it_does_not_know(model_of, kind, monkeypatch):
    class Louder(lora.LoRALinear):
        def forward(self, x):
            return 2 * self.base(x)

    monkeypatch.setitem(lora.ADAPTERS, "louder", Louder)
    model = wide_model()
    lora.add_lora(model, lora.AdapterConfig("louder", targets=("k_proj", "o_proj")))
    assert_same_logits(kind, model.eval())


@DECODERS
def test_layers_of_many_formats_in_a_block(kind):
    """q_proj in NF4 beside a dense k_proj, and rows of 4-bit weights that are no whole blocks."""
    model, attention = wide_model(), None
    attention = model.model.layers[0].self_attn
    attention.q_proj = QUANTIZERS["bnb.nf4"](attention.q_proj.weight.detach(), attention.q_proj.bias)
    assert_same_logits(kind, model)


@DECODERS
@pytest.mark.parametrize("quantize", ["bnb.nf4", "bnb.int8"])
def test_a_decoder_over_rows_that_are_no_whole_blocks(tiny_checkpoint, kind, quantize):
    assert_same_logits(kind, load_model(tiny_checkpoint("llama"), torch.float32, quantize=quantize))


@needs_compiler
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("quantize", [None, "bnb.nf4"])
def test_bf16_weights_are_multiplied_in_fp32(quantize, batch):
    """The compiled step over bf16 weights is the fp32 model with those weights, not what bf16 sums would give.

    That is where the processor does not multiply bf16, so that the cache is in fp32, and everywhere for one row.
    """
    model = wide_model(quantize, torch.bfloat16)
    exact = copy.deepcopy(model).float()
    prompts, forced = [random_prompt(5) for _ in range(batch)], torch.randint(3, 512, (6, batch))
    right = decoded_logits(Decoder(exact), prompts, forced)
    fast = CompiledDecoder(model)
    decoded_logits(fast, prompts, forced[:0])  # the prompt's keys and values come from the model's own pass
    fast.cache = KVCache(model.config, batch, 20, torch.float32, "cpu")
    padding = torch.zeros(batch, dtype=torch.int64)
    exact_cache = Decoder(exact)
    exact_cache.start(torch.tensor(prompts), padding, 20)
    fast.cache = exact_cache.cache
    fast.prepare()
    for ids, expected in zip(forced, right[1:], strict=True):
        torch.testing.assert_close(fast.step(ids), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@needs_compiler
@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("quantize", [None, *QUANTIZERS])
def test_several_rows_where_the_processor_multiplies_bf16(quantize, batch, monkeypatch):
    """There several rows are rounded to bf16, as in the model's own pass; one row is not."""
    for room in ("inference.decode", "model"):
        monkeypatch.setattr(f"{room}.compute_dtype", lambda dtype, device: dtype)
    assert_same_logits(CompiledDecoder, wide_model(quantize, torch.bfloat16), batch, tolerance=3e-2)


@needs_compiler
@pytest.mark.parametrize("count", [2, 16, 17, 40])
@pytest.mark.parametrize("shape", [(7, 12), (48, 64), (70, 96), (64, 30), (1, 4), (5, 7)])  # 7 is odd: in fp32
def test_a_product_of_several_rows_in_bf16(count, shape):
    layers = [dense(torch.nn.Parameter(torch.randn(out, shape[1]).bfloat16())) for out in (shape[0], 5)]
    x, y = torch.randn(count, shape[1]), torch.randn(count, shape[0] + 5)
    weight, before = torch.cat([layer.weight.detach() for layer in layers]).float(), y.clone()
    Weights(layers).call(x, y, add=True, in_bf16=True)()
    rounded = x if shape[1] % 2 else x.bfloat16().float()
    torch.testing.assert_close(y, before + rounded @ weight.T, rtol=1e-4, atol=1e-4)


@DECODERS
def test_a_decoder_does_not_write_past_its_room(model_of, kind):
    decoder = kind(model_of("llama"))
    with pytest.raises(ValueError, match="room for 4"):
        decoder.start(torch.tensor([[5, 6, 7]]), torch.zeros(1, dtype=torch.int64), 4)
        for _ in range(2):
            decoder.step(torch.tensor([9]))


@DECODERS
@FAMILIES
def test_greedy_text_is_the_plain_loop_in_every_decoder(model_of, kind, family):
    model = model_of(family)
    prompts = [random_prompt(length) for length in (1, 6, 20)]
    expected = [plain_greedy(model, prompt, 12) for prompt in prompts]
    assert new_ids(kind(model), prompts, settings()) == expected
    assert [new_ids(kind(model), [prompt], settings())[0] for prompt in prompts] == expected


@DECODERS
def test_rows_that_have_ended_leave_and_the_others_do_not_notice(model_of, kind):
    """Answers of 1, 3, 7, 12 and 20 tokens: the batch shrinks on the way."""

    class Ending(Ids):
        def __init__(self, length):
            super().__init__()
            self.most = length

        def push(self, id):
            super().push(id)
            self.done = len(self.ids) == self.most

    model, s = model_of("mistral"), settings(max_new_tokens=20, temperature=1.0, top_k=0)
    prompts, lengths = [random_prompt(n) for n in (3, 9, 1, 7, 5)], [1, 12, 3, 20, 7]
    seen, decoder = [], kind(model)
    step = decoder.step
    decoder.step = lambda ids: seen.append(len(ids)) or step(ids)
    replies = [Ending(length) for length in lengths]
    for _ in sampling.generate(decoder, prompts, replies, s, [1, 2, 3, 4, 5]):
        pass
    assert [len(reply.ids) for reply in replies] == lengths
    sizes = [4] * 2 + [3] * 4 + [2] * 5 + [1] * 8  # or, to copy the cache less often, when half have ended
    assert seen == (sizes if decoder.keeps_cheaply else [5] * 6 + [2] * 5 + [1] * 8)
    for prompt, reply, seed in zip(prompts, replies, [1, 2, 3, 4, 5], strict=True):
        alone = new_ids(model, [prompt], s, [seed])[0]
        assert alone[: len(reply.ids)] == reply.ids


def test_the_fastest_decoder_is_what_the_machine_has(model_of, monkeypatch, capsys):
    assert type(fastest_decoder(model_of("llama"))) is (CompiledDecoder if compiled_library("decode_cpu") else Decoder)
    assert type(fastest_decoder(wide_model(dtype=torch.float16))) is Decoder
    for compiler in ("no-such-compiler", "false"):
        monkeypatch.setenv("CXX", compiler)
        monkeypatch.setenv("XDG_CACHE_HOME", "/nonexistent" if compiler == "false" else "")
        compiled_library.cache_clear()
        assert type(fastest_decoder(model_of("llama"))) is Decoder
        err = capsys.readouterr().err
        assert err.count("without decode_cpu.cpp") == 1 and "not taken" not in err
    compiled_library.cache_clear()


def louder_norm(monkeypatch):
    norm = model_file.RMSNorm.forward
    monkeypatch.setattr(model_file.RMSNorm, "forward", lambda self, x: 1.1 * norm(self, x))


def other_activation(monkeypatch):
    monkeypatch.setattr(model_file, "gated", lambda name, gate, up, reuse: torch.nn.functional.gelu(gate) * up)


def other_residual(monkeypatch):
    block = model_file.Block.forward
    monkeypatch.setattr(model_file.Block, "forward", lambda self, x, *rest: 0.9 * x + 0.1 * block(self, x, *rest))


def other_rotation(monkeypatch):
    monkeypatch.setattr(model_file, "rotate", lambda q, k, cos, sin: (q, k))


def no_gate(monkeypatch):
    def change(self, *sizes):
        mlp(self, *sizes)
        del self.gate_proj

    mlp = model_file.MLP.__init__
    monkeypatch.setattr(model_file.MLP, "__init__", change)
    monkeypatch.setattr(model_file.MLP, "forward", lambda self, x: self.down_proj(self.up_proj(x).relu()))


@needs_compiler
@pytest.mark.parametrize("edit", [louder_norm, other_activation, other_residual, other_rotation, no_gate])
def test_a_model_that_was_edited_is_not_decoded_as_it_was(monkeypatch, capsys, edit):
    """decode_cpu.cpp says the same as model.py once more, and knows nothing of a researcher's edit."""
    assert type(fastest_decoder(wide_model())) is CompiledDecoder
    assert capsys.readouterr().err == ""
    edit(monkeypatch)
    model = wide_model()
    decoder = fastest_decoder(model)
    assert type(decoder) is Decoder
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith("note: CompiledDecoder is not taken: it ")
    prompt = random_prompt(7)
    assert new_ids(decoder, [prompt], settings()) == [plain_greedy(model, prompt, 12)]


@needs_compiler
def test_what_is_done_to_the_logits_is_done_in_decoding(monkeypatch, capsys):
    """Such as Gemma 2's soft cap (arXiv 2408.00118): only `Transformer.forward` has it."""
    forward = Transformer.forward
    monkeypatch.setattr(Transformer, "forward", lambda self, *a, **b: 2 * (forward(self, *a, **b) / 2).tanh())
    model = wide_model()
    decoder = fastest_decoder(model)
    assert type(decoder) is PlainDecoder and capsys.readouterr().err.count("is not taken") == 2
    prompts = [random_prompt(5), random_prompt(130)]
    tokens = torch.tensor([[0] * 125 + prompts[0], prompts[1]])
    scores = {0: [], 1: []}
    scorers = {row: lambda at, part, kept=kept: kept.append(part) for row, kept in scores.items()}
    logits = decoder.start(tokens, torch.tensor([125, 0]), 140, scorers)
    for row, prompt in enumerate(prompts):
        expected = model(torch.tensor([prompt]))[0]
        torch.testing.assert_close(torch.cat(scores[row]), expected, rtol=1e-5, atol=3e-5)
        torch.testing.assert_close(logits[row], expected[-1], rtol=1e-5, atol=3e-5)
    assert new_ids(decoder, prompts, settings()) == [plain_greedy(model, prompt, 12) for prompt in prompts]


@DECODERS
def test_a_decoder_over_a_quantiser_and_a_layer_that_it_does_not_know(kind):
    class Coarse(QuantizedLinear):
        def __init__(self, weight, bias):
            super().__init__(weight, bias)
            self.values = weight.mul(8).round()

        def dequantize(self, dtype):
            return (self.values / 8).to(dtype)

    class Halved(Linear):
        def forward(self, x):
            return super().forward(x) / 2

    model, attention = wide_model(), None
    attention = model.model.layers[0].self_attn
    attention.k_proj = Coarse(attention.k_proj.weight.detach(), attention.k_proj.bias)
    attention.o_proj.__class__ = Halved
    model.lm_head.__class__ = Halved
    lora.add_lora(model, lora.AdapterConfig(r=3, targets=("k_proj", "v_proj")))
    for adapter in lora.adapters(model).values():
        adapter.lora_B.data.normal_(std=0.2)
    assert_same_logits(kind, model.eval())
    tokens = torch.randint(3, 512, (1, 9))
    losses = torch.nn.functional.cross_entropy(model(tokens)[0], tokens[0], reduction="sum")
    assert model(tokens, tokens).item() == pytest.approx(losses.item(), rel=1e-5)  # the fused loss has no such head


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("quantize", [None, "bnb.nf4"])
def test_a_recorded_step_is_the_plain_one(quantize):
    model = wide_model(quantize, device="cuda")
    prompts = [random_prompt(n) for n in (3, 9)]
    assert new_ids(StaticDecoder(model), prompts, settings()) == new_ids(Decoder(model), prompts, settings())


# ---------------------------------------------------------------------------------------------------------- sampling


def draw(logits, temperature=1.0, top_k=0, top_p=1.0, n=1, seed=None):
    """n tokens sampled from logits (V,): ids (n,)."""
    generator = torch.Generator().manual_seed(SEED if seed is None else seed)
    return choose_all(logits.expand(n, -1), temperature, top_k, top_p, [generator] * n)


def choose_all(logits, temperature, top_k, top_p, generators):
    """`choose` with the same settings for all rows."""
    s = settings(temperature=temperature, top_k=top_k, top_p=top_p)
    return choose(logits, [s] * len(logits), generators)


def frequencies(ids, V):
    return torch.bincount(ids, minlength=V) / len(ids)


def chi_square(ids, probabilities):
    expected = probabilities * len(ids)
    seen = torch.bincount(ids, minlength=len(probabilities))
    assert seen[expected == 0].sum() == 0
    return ((seen - expected).square() / expected)[expected > 0].sum().item()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax(temperature):
    """Chi-square with 7 degrees of freedom: above 35 once in 90,000 times; the wrong temperature is far above."""
    logits = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5])
    ids = draw(logits, temperature, n=4000, seed=1)
    assert chi_square(ids, (logits / temperature).softmax(0)) < 35
    assert chi_square(ids, (logits / temperature * 1.5).softmax(0)) > 100


def test_top_k():
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0, -1.0])
    expected = torch.tensor([0.0, 3.0, 0.0, 2.0, 0.0]).exp() * torch.tensor([0, 1, 0, 1, 0])
    assert chi_square(draw(logits, top_k=2, n=2000, seed=2), expected / expected.sum()) < 25
    for all_of_them in (0, 5, 6, 10**6):  # as many as the vocabulary has, or more
        assert chi_square(draw(logits, top_k=all_of_them, n=2000, seed=3), logits.softmax(0)) < 30
    many = torch.randn(50, 40)
    one = choose_all(many, 1.0, 1, 1.0, [torch.Generator().manual_seed(0)] * 50)
    assert torch.equal(one, many.argmax(dim=1))


def test_top_p():
    """Of 0.5, 0.3, 0.15, 0.05 the likeliest that reach p together, the one that reaches it included."""
    probabilities = torch.tensor([0.15, 0.5, 0.05, 0.3])
    logits = probabilities.log()
    for top_p, kept in ((0.4, [1]), (0.6, [1, 3]), (0.79, [1, 3]), (0.9, [0, 1, 3]), (0.97, [0, 1, 2, 3])):
        expected = torch.zeros(4).index_fill(0, torch.tensor(kept), 1) * probabilities
        assert chi_square(draw(logits, top_p=top_p, n=2000, seed=4), expected / expected.sum()) < 30, top_p
    assert chi_square(draw(logits, top_p=1.0, n=2000, seed=5), probabilities) < 30
    many = torch.randn(50, 40)
    for top_p in (0.0, 1e-6):
        greedy = choose_all(many, 1.0, 0, top_p, [torch.Generator().manual_seed(0)] * 50)
        assert torch.equal(greedy, many.argmax(dim=1))


def test_top_k_and_top_p_together():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    ids = draw(logits, top_k=2, top_p=0.5, n=500, seed=6)  # of 4/7 and 3/7 the first is enough
    assert set(ids.tolist()) == {0}


def test_a_low_temperature_is_nearly_greedy():
    many = torch.rand(50, 40).argsort(dim=1).float()  # no two of a row nearer than 1
    for temperature in (1e-3, 1e-7, 1e-40):
        ids = choose_all(many, temperature, 0, 1.0, [torch.Generator().manual_seed(0)] * 50)
        assert torch.equal(ids, many.argmax(dim=1))


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_damaged_logits_are_an_error(temperature, value):
    logits = torch.randn(2, 9)
    logits[1, 4] = value
    with pytest.raises(UserError, match="logits"):
        choose_all(logits, temperature, 0, 1.0, [torch.Generator()] * 2)


def test_repetition_penalty_by_hand():
    logits = torch.tensor([[2.0, -2.0, 1.0, -1.0], [4.0, 3.0, 0.0, -8.0]])
    seen = torch.tensor([[True, True, False, False], [False, True, True, True]])
    expected = torch.tensor([[1.0, -4.0, 1.0, -1.0], [4.0, 1.5, 0.0, -16.0]])
    twice, not_at_all = settings(repetition_penalty=2.0), settings()
    assert torch.equal(penalize_seen(logits, seen, [twice, twice]), expected)
    assert torch.equal(penalize_seen(logits, seen, [not_at_all, not_at_all]), logits)
    assert torch.equal(penalize_seen(logits, seen, [not_at_all, twice]), torch.stack([logits[0], expected[1]]))


def test_frequency_and_presence_penalty_by_hand():
    """OpenAI's formula, token by token; each row has its own."""
    logits, counts = torch.randn(5, 20), torch.randint(0, 4, (5, 20), dtype=torch.int32)
    penalties = [(0, 0), (0.5, 0), (0, -1.5), (-2, 2), (1.25, 0.75)]
    s = [settings(frequency_penalty=frequency, presence_penalty=presence) for frequency, presence in penalties]
    got = penalize_generated(logits, counts, s)
    for row, (frequency, presence) in enumerate(penalties):
        for token in range(20):
            count = counts[row, token].item()
            expected = logits[row, token].item() - count * frequency - (count > 0) * presence
            assert got[row, token].item() == pytest.approx(expected, abs=1e-5)
    assert penalize_generated(logits, counts, s[:1] * 5) is logits


def test_min_p_by_hand():
    """Tokens of at least that share of the likeliest one's probability, after the temperature; each row has its own."""
    logits, shares = 3 * torch.randn(6, 30), [0.0, 0.05, 0.3, 0.9, 1.0, 1e-4]
    got = keep_min_p(logits, shares)
    probabilities = logits.softmax(-1)
    for row, share in enumerate(shares):
        kept = probabilities[row] >= share * probabilities[row].max() * (1 - 1e-6)
        assert torch.equal(got[row].isfinite(), kept) and torch.equal(got[row][kept], logits[row][kept])
    assert got[0].isfinite().all() and got[4].isfinite().sum() == 1
    probabilities = torch.tensor([0.15, 0.5, 0.05, 0.3])
    generator = [torch.Generator().manual_seed(SEED)] * 2000
    for temperature, kept in ((1.0, [1, 3]), (3.0, [0, 1, 3])):  # 0.15 is 0.3 of 0.5, and 0.67 at the temperature of 3
        s = settings(temperature=temperature, top_k=0, min_p=0.5)
        ids = choose(probabilities.log().expand(2000, -1), [s] * 2000, generator)
        assert set(ids.tolist()) == set(kept)


def plain_penalised(model, prompt, s):
    """The likeliest token, again and again, with every penalty by its formula: the generated tokens are a list."""
    made = []
    for _ in range(s.max_new_tokens):
        logits = model(torch.tensor([prompt + made]))[0, -1].tolist()
        for id in {*prompt, *made}:
            logits[id] = logits[id] / s.repetition_penalty if logits[id] > 0 else logits[id] * s.repetition_penalty
        for id in set(made):
            logits[id] -= s.frequency_penalty * made.count(id) + s.presence_penalty
        made.append(max(range(len(logits)), key=logits.__getitem__))
    return made


@torch.no_grad()
def test_rows_with_penalties_of_their_own_join_and_leave(model_of):
    """Only what was generated counts for two of them, never the prompt; rows that come and go change nothing."""
    model = model_of("llama")
    kinds = [
        dict(frequency_penalty=2.0), dict(presence_penalty=2.0), dict(frequency_penalty=-2.0, presence_penalty=1.0), {},
        dict(frequency_penalty=0.5, presence_penalty=0.5, repetition_penalty=1.2), dict(presence_penalty=-2.0),
    ]  # fmt: skip
    kinds = [settings(**kind, max_new_tokens=4 + 5 * i) for i, kind in enumerate(kinds)]
    rows = [Row(random_prompt(3 + i), Ids(), s, i) for i, s in enumerate(kinds)]
    waiting, batch = list(rows), Batch(fastest_decoder(model))
    while waiting or batch.going:
        if waiting:
            batch.add([waiting.pop()])
        if batch.going:
            batch.step()
    for row in rows:
        assert row.reply.ids == plain_penalised(model, row.prompt, row.settings)
    plain = [plain_greedy(model, row.prompt, row.settings.max_new_tokens) for row in rows]
    assert [row.reply.ids for row in rows] != plain


def test_what_was_generated_counts_as_seen(model_of):
    """With a penalty without mercy no token comes twice, nor one of the prompt."""
    prompt = random_prompt(6)
    (ids,) = new_ids(model_of("llama"), [prompt], settings(repetition_penalty=1e9, max_new_tokens=40))
    positive_only = len(set(ids)) == 40 and not set(ids) & set(prompt)
    assert positive_only
    (free,) = new_ids(model_of("llama"), [prompt], settings(max_new_tokens=40))
    assert free != ids


def test_a_seed_gives_the_same_text_in_every_batch(writer):
    dialogs = [asking("the answer " * random.randint(1, 9)) for _ in range(7)]
    options = dict(temperature=1.5, top_k=0, max_new_tokens=15, seed=random.randrange(10**6))
    answers = [writer.answer_all(dialogs, settings(**options, batch_size=size)) for size in (1, 3, 16)]
    assert answers[0] == answers[1] == answers[2]
    assert writer.answer_all(dialogs, settings(**options | {"seed": 10**7})) != answers[0]
    same = [dialogs[0]] * 5
    assert len(set(writer.answer_all(same, settings(**options)))) > 1  # each prompt has its own numbers


def test_every_row_has_its_own_settings(model_of):
    """Beside others, which join and leave, it samples the same tokens as alone, with the same log-probabilities."""
    model = model_of("llama")
    kinds = [
        dict(temperature=0), dict(temperature=0.7, top_k=3), dict(temperature=1.4, top_p=0.8, top_k=100),
        dict(temperature=1.0, top_k=0, repetition_penalty=1.3), dict(temperature=1.0, top_p=0.0),
        dict(temperature=0, repetition_penalty=1e9), dict(temperature=3.0, top_k=0), dict(temperature=1e-6),
        dict(temperature=2.0, min_p=0.2), dict(temperature=1.5, frequency_penalty=1.5, presence_penalty=-0.5),
    ]  # fmt: skip
    kinds = [settings(**kind, max_new_tokens=random.randint(1, 15)) for kind in kinds]
    prompts = [random_prompt(random.randint(1, 12)) for _ in kinds]

    def rows():
        made = zip(prompts, kinds, strict=True)
        return [Row(prompt, Ids(), s, 7 + i, i % 3, i % 2 == 0) for i, (prompt, s) in enumerate(made)]

    alone, together, batch = rows(), rows(), Batch(fastest_decoder(model))
    for row in alone:
        single = Batch(Decoder(model))
        single.add([row])
        while single.going:
            single.step()
    waiting = list(together)
    while waiting or batch.going:
        if waiting:
            batch.add([waiting.pop() for _ in range(min(len(waiting), random.randint(1, 3)))])
        for _ in range(random.randint(0, 4)):
            if batch.going:
                batch.step()
    for one, other in zip(alone, together, strict=True):
        assert one.reply.ids == other.reply.ids and len(one.reply.ids) == one.settings.max_new_tokens
        assert [score is None for score in one.prompt_scores] == [
            True,
            *[False] * len(one.prompt[1:]),
        ] * one.score_prompt
        scores = [row.scores + row.prompt_scores[1:] for row in (one, other)]
        for mine, theirs in zip(*scores, strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert [id for id, _ in mine.top] == [id for id, _ in theirs.top] and len(mine.top) == one.top


def test_log_probabilities_are_those_of_the_plain_model(model_of):
    """Before temperature, penalty and top_k; a prompt's of each token by those before it."""
    model, prompt = model_of("mistral"), random_prompt(150)
    s = settings(temperature=2.0, top_k=5, repetition_penalty=1.5, max_new_tokens=9)
    row = Row(prompt, Ids(), s, SEED, top=4, score_prompt=True)
    batch = Batch(fastest_decoder(model))
    batch.add([row])
    while batch.going:
        batch.step()
    ids = prompt + row.reply.ids
    logprobs = model(torch.tensor([ids]))[0].log_softmax(-1)
    scores = row.prompt_scores[1:] + row.scores
    assert row.prompt_scores[0] is None and len(scores) == len(ids) - 1
    for place, score in enumerate(scores):
        best = logprobs[place].topk(4)
        assert score.logprob == pytest.approx(logprobs[place, ids[place + 1]].item(), abs=1e-4)
        assert [id for id, _ in score.top] == best.indices.tolist()
        assert [value for _, value in score.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_a_row_of_no_tokens_is_only_read(model_of):
    """It may fill the whole context; and a row that nobody wants any more leaves."""
    batch, none = Batch(Decoder(model_of("llama"))), settings()
    none.max_new_tokens = 0  # generate.py has no use for it
    full = Row(random_prompt(256), Ids(), none, 1, top=0, score_prompt=True)
    batch.add([full])
    assert full.reply.done and not batch.going and len(full.prompt_scores) == 256 and not full.scores
    with pytest.raises(UserError, match="256"):
        batch.add([Row(random_prompt(257), Ids(), none, 1)])
    rows = [Row(random_prompt(3), Ids(), settings(), i) for i in range(3)]
    batch.add(rows)
    rows[1].dropped = rows[2].dropped = True
    batch.step()
    assert batch.rows == [rows[0]] and len(rows[0].reply.ids) == 2 and len(rows[1].reply.ids) == 1


# -------------------------------------------------------------------------------------------------------- stop texts


def grow(tokenizer, text, stop, stop_ids=()):
    """(the answer, what had been shown after each token) of a reply that is given the tokens of `text` one by one."""
    reply, shown, steps = Reply(tokenizer, set(stop_ids), stop), "", []
    for id in tokenizer.encode(text):
        if reply.done:
            break
        reply.push(id)
        shown += reply.text[len(shown) : reply.safe_length]
        steps.append(shown)
    reply.finish()
    return reply.text, steps, shown + reply.text[len(shown) :]


@pytest.mark.parametrize(
    "text, stop, answer",
    [
        ("one two\n\nthree", ["\n\n"], "one two"),
        ("the answer is 42 Question: what", ["Question:"], "the answer is 42 "),
        ("a first b second a", ["second", "first"], "a "),
        ("no stop in here", ["nowhere"], "no stop in here"),
        ("ends in half a stop: Ques", ["Question:"], "ends in half a stop: Ques"),
        ("stop", ["stop"], ""),
        ("aaab", ["aab"], "a"),  # the text that began as a stop was none, the one inside it is
        ("Zürich — 日本!", ["日"], "Zürich — "),
    ],
)
def test_stop_texts(writer, text, stop, answer):
    """They span several tokens, and nothing of one is ever shown."""
    got, steps, shown = grow(writer.tokenizer, text, stop)
    assert got == shown == answer
    assert all(answer.startswith(step) for step in steps)
    assert len(writer.tokenizer.encode(stop[0])) > 1 or stop[0] in (" ", "\n")


def test_pieces_of_an_answer_are_its_text(writer):
    """A token each, those after the stop text left out; a character in parts is the piece of its last part."""
    for text, stop in (("Zürich — 日本! on it goes", ["on it"]), ("a\n\nb", ["\n"]), ("日本", []), ("x", ["x"])):
        reply, ids = Reply(writer.tokenizer, set(), stop), writer.tokenizer.encode(text)
        for id in ids:
            if not reply.done:
                reply.push(id)
        assert reply.stopped == bool(stop)
        reply.finish()
        assert "".join(reply.pieces) == reply.text and len(reply.pieces) <= reply.length <= len(ids)
        assert reply.stopped == bool(stop)
    reply = Reply(writer.tokenizer, set())
    reply.push(writer.tokenizer.encode("日")[0])
    reply.finish()
    assert reply.pieces == [reply.text] == ["\ufffd"]


def test_a_text_without_stop_is_shown_as_it_comes(writer):
    text = "the answer to the question is 42"
    _, steps, _ = grow(writer.tokenizer, text, ["zzz"])
    assert len(set(steps)) == len(steps) > 3 and steps[-1] == text


def test_a_stop_id_ends_an_answer_and_is_not_shown(writer):
    end = writer.tokenizer.eos_id
    reply = Reply(writer.tokenizer, writer.stop_ids)
    for id in [*writer.tokenizer.encode("fine"), end]:
        assert not reply.done
        reply.push(id)
    assert reply.done and reply.text == "fine"


def test_a_stream_is_the_answer(writer, monkeypatch):
    """Also where the answer ends in what might have become a stop text, or in half a character."""
    text = "Zürich — 日本! Questio"
    ids = writer.tokenizer.encode(text)

    def scripted(decoder, rows):
        for id in ids:
            rows[0].reply.push(id)
            yield
        rows[0].reply.finish()
        yield

    monkeypatch.setattr(writer_module, "generate_rows", scripted)
    s = settings(stop=["Question:"])
    pieces = list(writer.stream(asking("a"), s))
    assert "".join(pieces) == text and len(pieces) == len(ids) + 1
    ids = ids[: ids.index(writer.tokenizer.encode("Zürich —")[-1])]
    assert "".join(writer.stream(asking("a"), s)).startswith("Zürich ")


def test_stream_and_batch_agree(writer):
    for stop in ([], ["a"], ["e", "ba"]):
        s = settings(temperature=1.2, max_new_tokens=30, stop=stop)
        dialog = asking("the question")
        assert "".join(writer.stream(dialog, s)) == writer.answer_all([dialog], s)[0]


# ------------------------------------------------------------------------------------------------- prompts and models


def test_a_file_of_prompts_is_answered_in_its_order(tiny_model_dir, tmp_path, capsys):
    prompts = [f"question {'what ' * random.randint(0, 9)}{i}" for i in range(7)]
    (tmp_path / "p.txt").write_text("\n".join(prompts) + "\n\n", encoding="utf-8")
    flags = dict(checkpoint_dir=tiny_model_dir, precision="32-true", temperature=0, max_new_tokens=5, batch_size=3)
    generate.main(Settings(**flags, prompts_file=tmp_path / "p.txt", prompt_style="plain"))
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == prompts
    for row in rows:
        generate.main(Settings(**flags, prompt=row["prompt"], prompt_style="plain"))
        assert capsys.readouterr().out == row["answer"] + "\n"


def test_a_jsonl_of_prompts(tmp_path):
    lines = [
        {"prompt": "a\u2028b"},  # a line separator to some, ordinary text to JSON
        {"instruction": "c", "input": "d"},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "e"}]},
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("\ufeff" + "\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    assert list(read_prompts(path).items()) == [
        (f"{path}:1", asking("a\u2028b")),
        (f"{path}:2", Dialog([{"role": "user", "content": "c", "input": "d"}])),
        (f"{path}:3", Dialog(lines[2]["messages"])),
    ]


WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
CALL = {"id": "c1", "function": {"name": "weather", "arguments": "{}"}}
CALLED = [
    {"role": "user", "content": "how is it?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "wet"},
]


@pytest.fixture
def rendered(monkeypatch):
    """The texts of the prompts that would have been answered, however long."""
    texts = []

    def note(self, dialogs, s, places=None):
        texts.extend(self.tokenizer.decode(self.encode(dialog), skip_special=False) for dialog in dialogs)
        return ["x"] * len(dialogs)

    monkeypatch.setattr(Writer, "answer_all", note)
    monkeypatch.setattr(Writer, "stream", lambda self, dialog, s: note(self, [dialog], s))
    return texts


def test_prompts_with_tools_and_begun_answers(tiny_model_dir, tmp_path, capsys, rendered):
    """Tools are the row's own, or those of --tools; a last message of the assistant is continued."""
    begun = [{"role": "user", "content": "count"}, {"role": "assistant", "content": "one, two,"}]
    rows = [{"messages": CALLED, "tools": [WEATHER]}, {"messages": begun}, {"prompt": "hello"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tools.json").write_text(json.dumps([{"type": "function", "function": {"name": "clock"}}]))
    flags = dict(checkpoint_dir=tiny_model_dir, tools=tmp_path / "tools.json", prompt_style="chatml")
    generate.main(Settings(**flags, prompts_file=tmp_path / "p.jsonl"))
    assert '"name": "weather"' in rendered[0] and "clock" not in rendered[0] and "wet" in rendered[0]
    assert '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call><|im_end|>' in rendered[0]
    assert "clock" in rendered[1] and rendered[1].endswith("<|im_start|>assistant\none, two,")
    assert "clock" in rendered[2] and rendered[2].endswith("hello<|im_end|>\n<|im_start|>assistant\n")
    assert [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()] == [
        "wet",
        "one, two,",
        "hello",
    ]
    generate.main(Settings(**flags, prompt="hello"))
    assert rendered[3] == rendered[2]


def test_variables_for_the_template(tiny_model_dir, tmp_path, rendered):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    names = json.loads((folder / "tokenizer_config.json").read_text())
    names["chat_template"] += "{% if enable_thinking is false %}<think></think>{% endif %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    for args in ([], ["--template_args", "{enable_thinking: false}"]):
        generate.main(cli.parse(Settings, ["--checkpoint_dir", str(folder), "--prompt", "hello", *args]))
    assert rendered[1] == rendered[0] + "<think></think>"
    with pytest.raises(UserError, match="no variable 'speed'"):
        generate.main(Settings(checkpoint_dir=folder, prompt="hello", template_args={"speed": 5}))
    with pytest.raises(UserError, match="style plain has no variables"):
        generate.main(Settings(checkpoint_dir=folder, prompt="a", prompt_style="plain", template_args={"speed": 5}))


def test_marks_of_calls_are_text_where_there_are_tools(tiny_model_dir, tmp_path):
    """Else they are left out, like every special token; half a character before one does not swallow it."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    names = json.loads((folder / "tokenizer_config.json").read_text())
    added = {"510": {"content": "[TOOL_CALLS]", "special": True}, "511": {"content": "[INST]", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"added_tokens_decoder": added}))
    writer = Writer(folder, None, None, "32-true", "mistral-instruct")
    half = writer.tokenizer.encode("é")[:1]
    for tools, text in (([WEATHER], "a\ufffd[TOOL_CALLS] b"), ([], "a b")):
        reply = Reply(writer.tokenizer, set(), **writer.reply_options(asking("hello", tools=tools)))
        for id in [*writer.tokenizer.encode("a"), *half * bool(tools), 510, 511, *writer.tokenizer.encode(" b")]:
            reply.push(id)
        assert reply.text == "".join(reply.pieces) == text


def test_a_full_context_is_noted(writer, capsys):
    """Once for a list, with the number of answers; not where --max_new_tokens, or a stop text, ended the answer."""
    dialogs = [asking("what " * n) for n in (1, 60, 3)]
    answers = writer.answer_all(dialogs, settings(max_new_tokens=210))
    prompts = [len(encode_prompt(writer.tokenizer, dialog.messages, writer.style)) for dialog in dialogs]
    full = sum(256 - length < 210 for length in prompts)
    err = capsys.readouterr().err
    assert 0 < full < 3 and f"because the model's context of 256 tokens is full: {full} of 3\n" in err
    assert "".join(writer.stream(dialogs[1], settings(max_new_tokens=210))) == answers[1]
    assert "is full: 1 of 1" in capsys.readouterr().err
    writer.answer_all(dialogs, settings(max_new_tokens=5))
    writer.answer_all(dialogs[1:2], settings(max_new_tokens=210, stop=[answers[1][1]]))
    assert not capsys.readouterr().err


def test_no_seed_is_too_large(writer):
    """Prompt i has seed + i, which begins again at 0 after the largest that torch takes."""
    dialogs = [asking("what")] * 3
    s = settings(temperature=2, max_new_tokens=20, seed=2**63 - 2)
    wrapped = writer.answer_all(dialogs, s)[2]
    assert wrapped == writer.answer_all(dialogs[:1], settings(temperature=2, max_new_tokens=20, seed=0))[0]
    with pytest.raises(UserError, match="--seed 9223372036854775808"):
        settings(seed=2**63)


def test_a_system_message_goes_before_every_prompt(tiny_model_dir, tmp_path, monkeypatch):
    seen = []

    def answer_all(self, dialogs, s, places):
        seen.extend(dialogs)
        return ["x"] * len(dialogs)

    monkeypatch.setattr(Writer, "answer_all", answer_all)
    monkeypatch.setattr(Writer, "stream", lambda self, dialog, s: seen.append(dialog) or iter("x"))
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    flags = dict(checkpoint_dir=tiny_model_dir, precision="32-true", system="be kind")
    generate.main(Settings(**flags, prompts_file=tmp_path / "p.txt"))
    generate.main(Settings(**flags, prompt="three"))
    assert [[message["content"] for message in dialog.messages] for dialog in seen] == [
        ["be kind", "one"], ["be kind", "two"], ["be kind", "three"],
    ]  # fmt: skip


@pytest.fixture(scope="session")
def tiny_adapter(tiny_model_dir, tmp_path_factory):
    """A LoRA adapter for the tiny model, as if trained on its NF4 version in the plain style."""
    folder = tmp_path_factory.mktemp("adapter")
    model, config = load_model(tiny_model_dir, torch.float32), lora.AdapterConfig(r=4, alpha=8)
    lora.add_lora(model, config)
    torch.manual_seed(SEED)
    for adapter in lora.adapters(model).values():
        adapter.lora_B.data.normal_(std=0.2)
    peft_format.save_adapter(model, config, folder, tiny_model_dir)
    notes = {"prompt_style": "plain", "checkpoint_dir": str(tiny_model_dir), "quantize": "bnb.nf4"}
    (folder / "onetune.json").write_text(json.dumps(notes))
    return folder


@pytest.mark.parametrize("flag, quantize", [(None, "bnb.nf4"), ("none", None), ("bnb.int8", "bnb.int8")])
def test_base_adapter_and_quantised(tiny_model_dir, tiny_adapter, flag, quantize):
    """The adapter's notes stand for --checkpoint_dir, --prompt_style and --quantize (it was trained in bnb.nf4)."""
    base = Writer(tiny_model_dir, None, quantize, "32-true")
    both = Writer(None, tiny_adapter, flag, "32-true")
    assert (base.style, both.style) == ("checkpoint", "plain")
    prompt = encode_prompt(both.tokenizer, [{"role": "user", "content": "the answer"}], "plain")
    for writer, adapter in ((base, None), (both, tiny_adapter)):
        model = load_model(tiny_model_dir, torch.float32, quantize=quantize, adapter_dir=adapter)
        assert new_ids(writer.model, [prompt], settings()) == [plain_greedy(model, prompt, 12)]
    with torch.no_grad():
        difference = base.model(torch.tensor([prompt])) - both.model(torch.tensor([prompt]))
    assert difference.abs().max() > 0.1


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "16-true"])
def test_every_precision(tiny_model_dir, tiny_adapter, precision):
    writer = Writer(None, tiny_adapter, None, precision)
    assert writer.model.lm_head.weight.dtype == DTYPES[precision]
    answers = writer.answer_all([asking("what " * n) for n in (1, 5)], settings())
    assert len(answers) == 2


def test_the_style_given_wins_over_the_notes(tiny_adapter):
    assert Writer(None, tiny_adapter, None, "32-true", "alpaca").style == "alpaca"
    with pytest.raises(UserError, match="alpacca"):
        Writer(None, tiny_adapter, None, "32-true", "alpacca")


def test_without_a_template_the_style_is_plain(tiny_checkpoint, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint("llama"), folder)
    write_tiny_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    assert Writer(folder, None, None, "32-true").style == "plain"


# --------------------------------------------------------------------------------------------------------------- chat


def chat(writer, lines, monkeypatch, start=()):
    """What a chat asks the model, message by message; the model answers a1, a2, ..."""
    asked, lines = [], iter(lines)

    def typed(_):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    def stream(dialog, s):
        writer.encode(dialog)  # the styles have their rules
        asked.append([message["content"] for message in dialog.messages])
        yield f"a{len(asked)}"

    monkeypatch.setattr("builtins.input", typed)
    generate.chat(SimpleNamespace(stream=stream), Dialog(list(start)), settings())
    return asked


def test_a_chat_remembers_until_an_empty_line(writer, monkeypatch, capsys):
    writer.default.style = "chatml"
    start = [{"role": "system", "content": "s"}]
    asked = chat(writer, ["one", "two", "", "three", "four"], monkeypatch, start)
    assert asked == [
        ["s", "one"], ["s", "one", "a1", "two"], ["s", "three"], ["s", "three", "a3", "four"],
    ]  # fmt: skip
    assert capsys.readouterr().out.split() == ["a1", "a2", "a3", "a4"]


def test_a_chat_in_a_style_for_one_question_goes_on(writer, monkeypatch, capsys):
    """Alpaca has no second turn: it is said, and the new question answered by itself."""
    writer.default.style = "alpaca"
    assert chat(writer, ["one", "two", "three"], monkeypatch) == [["one"], ["two"], ["three"]]
    assert capsys.readouterr().err.count("note: prompt style alpaca") == 2


def test_chat_from_a_pipe(run_script, tiny_model_dir):
    """As a user runs it: the same question after an empty line has the same answer."""
    code, out, err = run_script(
        "generate.py", "--checkpoint_dir", tiny_model_dir, "--temperature", 0, "--max_new_tokens", 6,
        "--precision", "32-true", stdin="the answer\nand what\n\nthe answer\n",
    )  # fmt: skip
    assert code == 0, err
    assert "Traceback" not in err and "Ctrl-D" in err
    s = settings(max_new_tokens=6)
    (answer,) = Writer(tiny_model_dir, None, None, "32-true").answer_all([asking("the answer")], s)
    answer = answer.replace("\r", "\n")  # as a process's output is read
    assert out.startswith(f"> {answer}\n> ") and out.endswith(f"\n> > {answer}\n> ")
