"""One token after another in every family: each decoder against passes over whole texts, and text against transformers.

Every row of rows.py, in every decoder; texts grow past each window of the rows, and past the length at which longrope
and dynamic RoPE change.
"""

import copy
import dataclasses
import random
from functools import cache, partial

import pytest
import torch
from conftest import Ids
from families.replay import Recording, ReplayedDecoder
from families.rows import ROWS
from families.tiny import distance, usual_distance

import lora
from generate import Settings
from inference import sampling
from inference.decode import CompiledDecoder, Decoder, StaticDecoder, fastest_decoder
from inference.sampling import Batch, Row
from model import MLP, Transformer
from ops.cpp import compiled_library

needs_compiler = pytest.mark.skipif(not compiled_library("decode_cpu"), reason="no C++ compiler")
DECODERS = pytest.mark.parametrize(
    "kind", [Decoder, StaticDecoder, pytest.param(CompiledDecoder, marks=needs_compiler)]
)
EACH_ROW = pytest.mark.parametrize(
    ("family", "number"), [(family, number) for family, rows in ROWS.items() for number in range(len(rows))]
)
TOLERANCE = 2e-5  # of logits in fp32, |difference| / |logits|


def randomise(parameters):
    with torch.no_grad():
        for name, parameter in parameters:
            is_gain = name.endswith("weight") and ("norm" in name or "ln_" in name)
            parameter.normal_(mean=float(is_gain), std=0.2)


@pytest.fixture(scope="session")
def pair(tiny_models):
    """`pair("gemma2", 0)`: a row's random model in transformers and ours, in fp32. Not to be changed."""

    @cache
    def make(family, number):
        tiny = tiny_models((family, number))
        return tiny.reference, tiny.load().eval()

    return make


def random_ids(length):
    return [random.randrange(3, 160) for _ in range(length)]


def scaling_of(model):
    """The name of the model's RoPE scaling, if a text's length decides what it does."""
    return next((rope.scaling for rope in model.config.ropes if rope is not None and rope.depends_on_length), None)


@torch.inference_mode()
def whole_texts(reference, model, ids, first):
    """The logits after each of `ids` from `first` on, by passes over whole texts: (n, V).

    One pass has them all, but with longrope a text's length decides how its beginning is read. In dynamic RoPE keys
    stay as they were first turned, which only a cache has: transformers' own.
    """
    if scaling_of(model) == "longrope":
        return torch.stack([model(torch.tensor([ids[: end + 1]]))[0, -1] for end in range(first, len(ids))])
    if scaling_of(model) is None:
        return model(torch.tensor([ids]))[0, first:]
    reference, cache, logits = copy.deepcopy(reference), None, []  # its frequencies stay after a long text
    for start, end in zip([0, *range(first + 1, len(ids))], range(first + 1, len(ids) + 1), strict=True):
        out = reference(torch.tensor([ids[start:end]]), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits[0, -1])
    return torch.stack(logits)


def padded(prompts):
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    return tokens, torch.tensor([longest - len(prompt) for prompt in prompts])


class Texts:
    """Rows in a decoder, which come, go on with random tokens, and leave: their ids, and all logits of each."""

    def __init__(self, decoder):
        self.decoder, self.rows, self.all = decoder, [], []

    def add(self, lengths, room=30):
        self.take(self.begin(lengths).finish(), room)

    def begin(self, lengths):
        """Prompts that are to be read in chunks: `advance` them, and `take` them when they are done."""
        self.prompts = [random_ids(length) for length in lengths]
        return self.decoder.read(*padded(self.prompts), max(lengths))

    def take(self, reading, room=40):
        read = self.decoder.take(reading, room)
        rows = [(prompt, len(prompt), [logits.clone()]) for prompt, logits in zip(self.prompts, read, strict=True)]
        self.rows += rows
        self.all += rows

    def step(self, times):
        for _ in range(times):
            ids = random_ids(len(self.rows))
            for (row, _, seen), id, logits in zip(self.rows, ids, self.decoder.step(torch.tensor(ids)), strict=True):
                row.append(id)
                seen.append(logits.clone())

    def keep(self, *numbers):
        self.decoder.keep(torch.tensor(numbers))
        self.rows = [self.rows[number] for number in numbers]

    def worst(self, reference, model):
        """How far the logits are from those of passes over whole texts: of all steps of all rows the most."""
        return max(
            distance(found, right)
            for row, length, logits in self.all
            for found, right in zip(logits, whole_texts(reference, model, row, length - 1), strict=True)
        )


@EACH_ROW
@DECODERS
def test_every_step_is_the_pass_over_the_whole_text(pair, family, number, kind):
    """For one row; and for rows of unequal lengths, of which some join between two steps, and some leave."""
    reference, model = pair(family, number)
    alone = Texts(kind(model))
    alone.add([3])
    alone.step(20)
    assert alone.worst(reference, model) < TOLERANCE
    texts = Texts(kind(model))
    texts.add([2, 9])
    texts.step(4)
    texts.add([14, 1, 5])
    texts.step(3)
    texts.keep(1, 2, 4)
    texts.step(2)
    texts.add([1])
    texts.step(9)
    assert texts.worst(reference, model) < TOLERANCE


@EACH_ROW
@DECODERS
def test_rows_that_come_and_go_at_random(pair, family, number, kind, monkeypatch):
    """Their prompts in chunks of random sizes between the steps. Slots are small, so that the layout changes often."""
    monkeypatch.setattr("inference.slots.LEAST_ROOM", 4)
    reference, model = pair(family, number)
    if kind is StaticDecoder and not model.config.experts:  # their rows are chosen on the host: see `fastest_decoder`
        kind = ReplayedDecoder
    texts = Texts(kind(model))
    for _ in range(4):
        reading = texts.begin([random.choice((1, 3, 8, 20)) for _ in range(random.randint(1, 3))])
        while not reading.done:
            texts.step(random.randint(0, 2) if texts.rows else 0)
            reading.advance(random.randint(1, 30))
        texts.take(reading)
        texts.step(random.randint(0, 4))
        if random.random() < 0.7:
            kept = random.sample(range(len(texts.rows)), random.randint(1, len(texts.rows)))
            texts.keep(*sorted(kept))
    texts.step(5)
    assert texts.worst(reference, model) < TOLERANCE


@EACH_ROW
def test_a_prompt_is_scored_in_chunks(pair, family, number):
    """Logits at every position, in order, and those after the last token, are those of one pass over the prompt."""
    _, model = pair(family, number)
    prompts, seen = [random_ids(length) for length in (1, 23, 9, 17)], {row: [] for row in (0, 1, 3)}
    tokens, padding = padded(prompts)

    def score(row, position, logits):
        assert position == sum(map(len, seen[row]))
        seen[row].append(logits.clone())

    with torch.inference_mode():
        reading = Decoder(model).read(tokens, padding, 23, {row: partial(score, row) for row in seen})
        while not reading.done:
            reading.advance(random.randint(1, 30))
        for row, prompt in enumerate(prompts):
            right = model(torch.tensor([prompt]))[0]
            assert distance(reading.logits[row], right[-1]) < TOLERANCE
            assert row not in seen or distance(torch.cat(seen[row]), right) < TOLERANCE


@pytest.mark.parametrize("wrong", [lambda x: x + x.sum().item(), lambda x: x * torch.tensor(2.0), lambda x: x[x > 0]])
def test_a_step_that_waits_for_the_host_is_noticed(wrong):
    with pytest.raises(AssertionError, match="host"), Recording():
        wrong(torch.randn(3))


@EACH_ROW
@needs_compiler
def test_bf16_is_no_further_from_fp32_than_the_models_own_pass(pair, family, number):
    """Both round keys, values and the prompt's hidden states to bf16; the compiled step rounds less of its own.

    In many rows, since in a mixture of experts rounding that chooses another expert changes all that follows in a row.
    """
    _, model = pair(family, number)
    model = copy.deepcopy(model).bfloat16()
    exact, prompts = copy.deepcopy(model).float(), [random_ids(length) for length in (6, 1, 4, 2, 5, 3, 8, 7)]
    forced = torch.tensor([random_ids(len(prompts)) for _ in range(16)])

    def logits(decoder):
        tokens, padding = padded(prompts)
        read = [decoder.start(tokens, padding, 30).clone()]
        return torch.stack(read + [decoder.step(ids).clone() for ids in forced])

    right = logits(Decoder(exact))
    rounded, compiled = (usual_distance(logits(kind(model)), right) for kind in (Decoder, CompiledDecoder))
    assert compiled < max(1.3 * rounded, 1e-4)


@EACH_ROW
@needs_compiler
def test_every_family_is_decoded_in_cpp(pair, family, number, capsys):
    _, model = pair(family, number)
    capsys.readouterr()  # transformers says that it saves a model
    assert type(fastest_decoder(model)) is CompiledDecoder
    assert capsys.readouterr().err == ""


def test_what_is_not_in_cpp_is_decoded_by_the_model(pair, capsys):
    """Without a word: nobody has edited anything. A kind of MLP that decode_cpu.cpp does not have, as experts are."""

    class Other(MLP):
        def forward(self, x):
            return 2 * super().forward(x)

    model = copy.deepcopy(pair("llama", 0)[1])
    model.model.layers[1].mlp.__class__ = Other
    capsys.readouterr()
    assert type(fastest_decoder(model)) is Decoder
    assert capsys.readouterr().err == ""


@EACH_ROW
def test_greedy_text_is_that_of_transformers(pair, family, number):
    """Three prompts at one time, against each alone; token by token, up to a tie that rounding decides."""
    reference, model = pair(family, number)
    prompts, decoder = [random_ids(length) for length in (1, 9, 14)], fastest_decoder(model)
    replies, s = [Ids() for _ in prompts], Settings(checkpoint_dir="any", temperature=0, max_new_tokens=20)
    for _ in sampling.generate(decoder, prompts, replies, s, [0] * 3):
        pass
    for prompt, reply in zip(prompts, replies, strict=True):
        assert len(reply.ids) == min(20, model.config.max_position_embeddings - len(prompt))
        theirs = transformers_text(reference, prompt, len(reply.ids))
        for place, (id, logits) in enumerate(zip(reply.ids, theirs, strict=True)):
            if id != logits.argmax():
                assert logits.max() - logits[id] < 1e-4 * logits.norm(), f"token {place} differs"
                break


def transformers_text(reference, prompt, tokens):
    """The logits (n, V) whose likeliest ids transformers continues a prompt with."""
    reference = copy.deepcopy(reference)  # the frequencies of dynamic RoPE stay after a long text
    reference.generation_config.eos_token_id = None
    ids = torch.tensor([prompt])
    cached = getattr(reference.config, "sliding_window", None) != 1  # its cache for a window of 1 keeps all keys
    out = reference.generate(
        ids, use_cache=cached, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens,
        pad_token_id=0, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return torch.cat(out.logits)


@pytest.mark.parametrize("family", ["gpt2", "gpt_bigcode", "opt"])
def test_a_row_that_has_ended_needs_no_position_that_is_not_there(pair, family):
    """64 positions are learned. A row that has used the last one would need another, if it stayed in the batch."""
    model = pair(family, 0)[1]
    s = Settings(checkpoint_dir="any", temperature=0, max_new_tokens=12)
    rows, batch = [Row(random_ids(length), Ids(), s, 0) for length in (60, 3, 5)], Batch(fastest_decoder(model))
    batch.add(rows)
    while batch.going:
        batch.step()
    assert [len(row.reply.ids) for row in rows] == [4, 12, 12]


@DECODERS
def test_attention_sinks(pair, kind):
    config = dataclasses.replace(pair("mistral", 0)[1].config, sinks=True)
    model = Transformer(config).requires_grad_(False).eval()
    randomise(model.named_parameters())
    texts = Texts(kind(model))
    texts.add([4, 1, 9])
    texts.step(12)
    assert texts.worst(None, model) < TOLERANCE


@DECODERS
@pytest.mark.parametrize("family", ["gpt_neox", "opt", "gemma2"])
def test_an_adapter_in_other_families(pair, kind, family):
    """Beside biases, in an MLP without a gate, and before a norm of what it makes."""
    model = copy.deepcopy(pair(family, 0)[1])
    targets = [name for name in lora.PROJECTIONS if name != "gate_proj" or model.config.gated]
    lora.add_lora(model, lora.AdapterConfig(r=5, alpha=8, targets=tuple(targets)))
    for adapter in lora.adapters(model).values():
        adapter.lora_B.data.normal_(std=0.2)
    texts = Texts(kind(model.eval()))
    texts.add([4, 1, 9])
    texts.step(12)
    assert texts.worst(None, model) < TOLERANCE
