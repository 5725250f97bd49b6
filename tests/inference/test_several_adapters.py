"""Several adapters over one base: each row is what a model with its adapter alone makes of it, in every decoder."""

import json
import random

import pytest
import torch
from conftest import SEED, Ids
from families.replay import ReplayedDecoder
from torch import nn

import generate
import lora
from generate import Settings
from inference import sampling, scoring, several
from inference.decode import CompiledDecoder, Decoder, PlainDecoder, StaticDecoder, fastest_decoder
from inference.sampling import Batch, Row
from inference.several import SeveralLinear, put_adapters, use
from inference.writer import Writer
from ops.cpp import compiled_library
from shell.cli import UserError
from text.messages import Dialog
from weights import peft_format
from weights.checkpoint import load_model, shared_quantization

needs_compiler = pytest.mark.skipif(not compiled_library("decode_cpu"), reason="no C++ compiler")
COMPILED = pytest.param(CompiledDecoder, marks=needs_compiler)
DECODERS = pytest.mark.parametrize("kind", [PlainDecoder, Decoder, ReplayedDecoder, COMPILED])
CONFIGS = {
    "small": lora.AdapterConfig(r=2, alpha=4, targets=("q_proj", "v_proj")),
    "large": lora.AdapterConfig(r=7, alpha=5, rslora=True),
    "dora": lora.AdapterConfig(kind="dora", r=3, alpha=6, targets=("q_proj", "up_proj", "down_proj")),
    "head": lora.AdapterConfig(r=4, alpha=8, targets=("lm_head", "o_proj")),
}


class Scaling(lora.Adapter):
    """Of no kind that is known: each output has a factor."""

    def __init__(self, base, r, alpha, dropout=0.0, rslora=False):
        super().__init__(base)
        self.factors = nn.Parameter(torch.ones(self.out_features, device=self.device))

    def forward(self, x):
        return self.base(x) * self.factors.to(x.dtype)


def make_adapter(folder, base, config, quantize=None, **notes):
    """An adapter folder with random numbers."""
    model = load_model(base, torch.float32, quantize=quantize)
    lora.add_lora(model, config)
    for adapter in lora.adapters(model).values():
        for name, parameter in adapter.named_parameters(recurse=False):
            size = parameter.detach().abs().mean() if name == "lora_magnitude_vector" else 1
            near = name in ("lora_magnitude_vector", "factors")
            parameter.data = size * (near + torch.randn_like(parameter) * 0.3)
    folder.mkdir(parents=True)
    peft_format.save_adapter(model, config, folder, base)
    said = {"prompt_style": "plain", "checkpoint_dir": str(base), "quantize": quantize, **notes}
    (folder / "onetune.json").write_text(json.dumps(said))
    return folder


@pytest.fixture(scope="module")
def base(tiny_model_dir):
    return tiny_model_dir


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    """Adapters of all kinds, by name."""
    torch.manual_seed(SEED)
    top = tmp_path_factory.mktemp("adapters")
    return {name: make_adapter(top / name, base, config) for name, config in CONFIGS.items()}


def load_several(base, folders, dtype=torch.float32, quantize=None):
    model = load_model(base, dtype, quantize=quantize)
    put_adapters(model, folders)
    return model


def load_each(base, folders, dtype=torch.float32, quantize=None):
    """The base alone, and with each adapter alone: what `several.py` numbers 0, 1, ..."""
    each = [None, *folders.values()]
    return [load_model(base, dtype, quantize=quantize, adapter_dir=folder) for folder in each]


@pytest.fixture(scope="module")
def model(base, folders):
    return load_several(base, folders)


@pytest.fixture(scope="module")
def each(base, folders):
    return load_each(base, folders)


def settings(**flags):
    return Settings(checkpoint_dir="any", **{"temperature": 0, "max_new_tokens": 9, **flags})


def random_prompt(length):
    return [random.randrange(3, 512) for _ in range(length)]


def run(decoder, rows):
    for _ in sampling.generate_rows(decoder, rows):
        pass
    return [row.reply.ids for row in rows]


def alone(each, row):
    """What a row's text is in a model with its adapter alone."""
    copy = Row(row.prompt, Ids(), row.settings, row.seed, row.top, row.score_prompt)
    run(Decoder(each[row.adapter]), [copy])
    return copy


# -------------------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 48), (6, 5, 48), (6, 1, 48)])
def test_all_rows_together_is_each_adapter_on_its_rows(base, folders, shape, dtype):
    model = load_several(base, folders, dtype)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, SeveralLinear)}
    assert len(layers) == 7 * 3 + 1
    for layer in layers.values():
        index = torch.randint(len(CONFIGS) + 1, shape[:1])
        x = torch.randn(*shape[:-1], layer.in_features, dtype=dtype)
        use(model, index)
        assert layer.standard and layer.owner is not None
        tolerance = 1e-5 if dtype == torch.float32 else 0.03
        with torch.no_grad():
            y, right = layer(x), layer.plain(x)
            assert y.dtype == right.dtype == dtype
            assert (y - right).norm() <= tolerance * right.norm()
            use(model, index[2:3])
            assert (layer(x) - layer.plain(x)).norm() <= tolerance * right.norm()


def test_what_an_adapter_of_another_row_overflows_to_stays_there(base, folders):
    """In 16 bits a product may be infinite: it is taken out, not multiplied by zero."""
    model = load_several(base, folders)
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    x = torch.randn(2, 48)
    use(model, torch.tensor([0, 1]))
    right = layer(x)
    layer.A[torch.float32][layer.owner == 2] = torch.inf
    assert torch.equal(layer(x), right)


def test_the_base_is_there_once(base, folders):
    model, before = load_several(base, folders), load_model(base, torch.float32)
    stored = {t.data_ptr() for t in model.state_dict().values()}
    assert len(stored) == len({t.data_ptr() for t in before.state_dict().values()})
    for layer in model.modules():
        if isinstance(layer, SeveralLinear):
            assert all(adapter.base is layer.base for adapter in layer.own.values())
            for number, adapter in layer.own.items():
                own = layer.owner == number
                assert adapter.lora_A.data_ptr() == layer.A[torch.float32][own.nonzero()[0] :].data_ptr()


# ------------------------------------------------------------------------------------------------------------ decoding


@DECODERS
def test_rows_of_different_adapters_in_one_batch(model, each, kind):
    rows = [
        Row(random_prompt(random.choice([1, 2, 9, 20])), Ids(), settings(), 0, adapter=number)
        for number in [*range(len(each)), 0, 2, 3]
    ]
    random.shuffle(rows)
    found = run(kind(model), rows)
    assert found == [alone(each, row).reply.ids for row in rows]
    same = [Row(rows[0].prompt, Ids(), settings(), 0, adapter=number) for number in range(len(each))]
    assert len({tuple(ids) for ids in run(kind(model), same)}) > 2  # the adapters say something of their own


@DECODERS
def test_sampled_with_the_seed_of_a_request(model, each, kind):
    s = settings(temperature=1.0, top_k=20, top_p=0.9, max_new_tokens=7)
    rows = [Row(random_prompt(5), Ids(), s, random.randrange(1000), adapter=n) for n in (4, 0, 2, 1, 3, 2)]
    assert run(kind(model), rows) == [alone(each, row).reply.ids for row in rows]


@DECODERS
def test_rows_join_and_leave(model, each, kind):
    """Rows of other adapters than those that are there, while prompts are read in chunks; memory grows on the way."""
    batch, rows = Batch(kind(model)), []
    for new in ((2, 3), (1,), (0, 4), (3, 1, 2)):
        lengths = [random.choice([1, 6, 30]) for _ in new]
        joining = [
            Row(random_prompt(n), Ids(), settings(max_new_tokens=random.choice([3, 8, 14])), 0, 2, True, adapter=number)
            for n, number in zip(lengths, new, strict=True)
        ]
        rows += joining
        batch.begin(joining)
        while batch.joining:
            if batch.going:
                batch.step()
            batch.read(7)
        batch.step()
    while batch.going:
        batch.step()
    for row in rows:
        right = alone(each, row)
        assert row.reply.ids == right.reply.ids
        for got, expected in ((row.scores, right.scores), (row.prompt_scores[1:], right.prompt_scores[1:])):
            assert [score.logprob for score in got] == pytest.approx([score.logprob for score in expected], abs=1e-3)


@pytest.mark.parametrize("quantize", ["bnb.nf4", "bnb.int8"])
@DECODERS
def test_over_a_quantised_base(base, tmp_path, kind, quantize):
    folders = {name: make_adapter(tmp_path / name, base, CONFIGS[name], quantize) for name in ("small", "dora")}
    model, each = load_several(base, folders, quantize=quantize), load_each(base, folders, quantize=quantize)
    rows = [Row(random_prompt(4), Ids(), settings(), 0, adapter=number) for number in (2, 0, 1, 2)]
    assert run(kind(model), rows) == [alone(each, row).reply.ids for row in rows]


@needs_compiler
def test_the_compiled_steps_read_the_adapters(model):
    """They step aside from none of these products."""
    decoder = CompiledDecoder(model)
    products = [product for part in decoder.blocks for product in (part.qkv, part.o, part.mlp.up, part.mlp.down)]
    assert all(product.weights is not None and product.several for product in products)
    assert any(product.gained for product in products) and not all(product.gained for product in products)
    assert type(fastest_decoder(model)) is CompiledDecoder


@needs_compiler
def test_a_decoder_that_takes_all_for_one_adapter_is_found_out(model, monkeypatch, capsys):
    """The decoders are tried with every adapter."""
    before = CompiledDecoder.prepare

    def prepare(self):
        self.cache.adapters = torch.full_like(self.cache.adapters, 2)
        before(self)

    monkeypatch.setattr(CompiledDecoder, "prepare", prepare)
    assert type(fastest_decoder(model)) is Decoder
    assert "CompiledDecoder is not taken: it computes something else" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [PlainDecoder, Decoder, StaticDecoder, COMPILED])
def test_another_kind_goes_through_its_own_forward(base, folders, tmp_path, monkeypatch, kind):
    monkeypatch.setitem(lora.ADAPTERS, "scaling", Scaling)
    config = lora.AdapterConfig(kind="scaling", targets=("q_proj", "down_proj"))
    folders = {"own": make_adapter(tmp_path / "own", base, config), **folders}
    model, each = load_several(base, folders), load_each(base, folders)
    assert not several.recordable(model)
    rows = [Row(random_prompt(3), Ids(), settings(), 0, adapter=number) for number in (0, 1, 2, 1, 4)]
    assert run(kind(model), rows) == [alone(each, row).reply.ids for row in rows]


def test_adapters_on_experts(tmp_path):
    """A position's row is not known inside of a mixture: rows of an adapter go through it together."""
    import transformers

    torch.manual_seed(SEED)
    config = transformers.Qwen3MoeConfig(
        vocab_size=512, hidden_size=48, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=3, head_dim=8, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    reference = transformers.Qwen3MoeForCausalLM(config)
    for parameter in reference.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=parameter.size(-1) ** -0.5)
    reference.save_pretrained(tmp_path / "base")
    targets = {"experts": ("gate_proj", "down_proj"), "attention": ("q_proj",)}
    folders = {
        name: make_adapter(tmp_path / name, tmp_path / "base", lora.AdapterConfig(r=3, alpha=6, targets=layers))
        for name, layers in targets.items()
    }
    model, each = (load(tmp_path / "base", folders) for load in (load_several, load_each))
    pairs = ((1, 4), (0, 1), (2, 9), (1, 3))
    rows = [Row(random_prompt(length), Ids(), settings(), 0, adapter=number) for number, length in pairs]
    assert run(fastest_decoder(model), rows) == [alone(each, row).reply.ids for row in rows]


def test_scoring(model, each):
    """Requests with one context share a row only where they have one adapter."""
    contexts = [random_prompt(6), random_prompt(3)]
    requests = [(random.choice(contexts), random_prompt(random.choice([0, 1, 4]))) for _ in range(24)]
    adapters = [random.randrange(len(each)) for _ in requests]
    found = scoring.score(model, requests, 64, adapters=adapters)
    for one, request, adapter in zip(found, requests, adapters, strict=True):
        if request[1]:
            right = scoring.plain_score(each[adapter], *request)
            assert one.logprob == pytest.approx(right.logprob, abs=1e-3) and one.greedy == right.greedy


# ----------------------------------------------------------------------------------------------------------- ensembles


def plain_ensemble(models, prompts, n, choose_from=lambda p: p.argmax()):
    """The likeliest token by the mean of all models' probabilities, again and again: a loop over the models."""
    prompts, new = [list(prompt) for prompt in prompts], []
    with torch.no_grad():
        for _ in range(n):
            pairs = zip(models, prompts, strict=True)
            p = torch.stack([m(torch.tensor([ids]))[0, -1].double().softmax(-1) for m, ids in pairs]).mean(0)
            new.append(int(choose_from(p)))
            for ids in prompts:
                ids.append(new[-1])
    return new


@DECODERS
def test_an_ensemble_is_a_loop_over_its_models(model, each, kind):
    """Beside rows that are none; its members may have prompts of their own."""
    prompts = [random_prompt(length) for length in (4, 9, 1)]
    together = Row(prompts[0], Ids(), settings(), 0, adapter=2)
    together.follow(prompts[1], 3)
    together.follow(prompts[2], 0)
    rows = [Row(random_prompt(3), Ids(), settings(), 0, adapter=1), together, Row([5], Ids(), settings(), 0, adapter=3)]
    found = run(kind(model), rows)
    assert found[1] == plain_ensemble([each[2], each[3], each[0]], prompts, 9)
    assert [found[0], found[2]] == [alone(each, row).reply.ids for row in (rows[0], rows[2])]


def test_an_ensembles_probabilities_are_the_mean(model, each):
    prompt = random_prompt(5)
    row = Row(prompt, Ids(), settings(max_new_tokens=1), 0, top=4, adapter=1)
    row.follow(prompt, 2)
    run(Decoder(model), [row])
    with torch.no_grad():
        p = torch.stack([each[n](torch.tensor([prompt]))[0, -1].softmax(-1) for n in (1, 2)]).mean(0)
    assert dict(row.scores[0].top) == pytest.approx({i.item(): p[i].log().item() for i in p.topk(4).indices}, abs=1e-4)


def test_an_ensemble_of_one_adapter_twice_is_that_adapter(model, each):
    s = settings(temperature=1.0, repetition_penalty=1.3, top_k=30)
    row = Row(random_prompt(5), Ids(), s, 7, adapter=2)
    row.follow(row.prompt, 2)
    (found,) = run(Decoder(model), [row])
    assert found == alone(each, Row(row.prompt, Ids(), s, 7, adapter=2)).reply.ids


# -------------------------------------------------------------------------------------------------------------- writer


def asking(text, adapter=None):
    return Dialog([{"role": "user", "content": text}], adapter=adapter)


def test_each_request_is_asked_in_its_adapters_style(base, tmp_path):
    styles = {"a": "alpaca", "b": "chatml", "c": "plain"}
    small = CONFIGS["small"]
    folders = {name: make_adapter(tmp_path / name, base, small, prompt_style=style) for name, style in styles.items()}
    both = Writer(None, None, None, "32-true", adapters=folders)
    assert (both.style, [voice.style for voice in both.named.values()]) == ("alpaca", [*styles.values(), "checkpoint"])
    s = settings(max_new_tokens=12)
    dialogs = [asking("what is it", name) for name in ("b", None, "base", "c", "a")]
    expected = [
        Writer(base, folders.get(name), None, "32-true").answer_all([asking("what is it")], s)[0]
        for name in ("b", "a", "base", "c", "a")
    ]
    assert both.answer_all(dialogs, s) == expected
    assert "".join(both.stream(dialogs[3], s)) == expected[3]
    mixed = asking("what is it", "ensemble:a+c")
    prompts = [both.named[name].encode(mixed) for name in "ac"]
    models = [load_model(base, torch.float32, adapter_dir=folders[name]) for name in "ac"]
    (answer,) = both.answer_all([mixed], settings(max_new_tokens=5))
    ids = plain_ensemble(models, prompts, 5)
    ends = [i for i, id in enumerate(ids) if id in both.named["a"].stop_ids | both.named["c"].stop_ids]
    assert answer == both.tokenizer.decode(ids[: ends[0]] if ends else ids)


def test_adapters_must_agree_on_their_base(base, tmp_path, tiny_checkpoint):
    one = make_adapter(tmp_path / "one", base, CONFIGS["small"])
    other = make_adapter(tmp_path / "other", tiny_checkpoint("llama"), CONFIGS["small"])
    with pytest.raises(UserError, match="a was trained on .*, b on .*--checkpoint_dir"):
        Writer(None, None, None, "32-true", adapters={"a": one, "b": other})
    assert Writer(base, None, None, "32-true", adapters={"a": one, "b": other}).named.keys() == {"a", "b", "base"}
    fine = make_adapter(tmp_path / "fine", base, CONFIGS["small"], "bnb.nf4")
    with pytest.raises(UserError, match="a was trained with the base in none, b in bnb.nf4: .*--quantize"):
        Writer(None, None, None, "32-true", adapters={"a": one, "b": fine})
    assert shared_quantization({"a": one, "b": fine}, "bnb.int8") == "bnb.int8"
    assert shared_quantization({"a": fine, "b": fine}, None) == "bnb.nf4"


def test_an_adapter_that_changes_the_base_is_refused(base, tmp_path, folders):
    """What PEFT saves of the base beside an adapter on it is the base's own: that is no change."""
    path = make_adapter(tmp_path / "whole", base, CONFIGS["small"])
    tensors = peft_format.read_tensors(path / "adapter_model.safetensors", "")
    embedding = load_model(base, torch.float32).model.embed_tokens.weight
    for name, value, refused in (
        ("model.embed_tokens.base_layer.weight", embedding, False),
        ("model.embed_tokens.base_layer.weight", embedding + 1, True),
        ("model.embed_tokens.weight", embedding + 1, True),
    ):
        added = tensors | {f"base_model.model.{name}": value.detach().clone()}
        peft_format.write_tensors(path / "adapter_model.safetensors", added, {"format": "pt"})
        if not refused:
            load_several(base, {"a": folders["small"], "b": path})
            continue
        with pytest.raises(UserError, match="whole changes model.embed_tokens.weight, which all adapters share"):
            load_several(base, {"a": folders["small"], "b": path})


def test_names_that_are_not_there(base, folders):
    both = Writer(None, None, None, "32-true", adapters=folders)
    for name, wrong in (("larg", "larg"), ("ensemble:small+x", "x"), ("ensemble:", "")):
        with pytest.raises(UserError, match=f"no adapter '{wrong}': there are small, large, dora, head, base"):
            both.voices(name)
    with pytest.raises(UserError, match="with --adapters"):
        Writer(base, None, None, "32-true").voices("small")


def test_both_forms_of_the_flags(folders):
    assert Settings(adapters=",".join(f"{k}={v}" for k, v in folders.items())).adapters == folders
    assert Settings(adapters=[f"{k}={v}" for k, v in folders.items()], ensemble="small, base").adapter == (
        "ensemble:small+base"
    )


# ------------------------------------------------------------------------------------------------------------- scripts


def test_a_file_of_prompts_names_adapters(base, folders, tmp_path, capsys):
    """As a user calls it: answers in order, each with who gave it, in batches that mix adapters."""
    lines = [{"prompt": f"what is {i}", "adapter": name} for i, name in enumerate([*folders, "base", None] * 2)]
    lines = [{key: value for key, value in line.items() if value} for line in lines]
    lines.append({"prompt": "what", "adapter": "ensemble:large+base"})
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = dict(precision="32-true", temperature=0.9, max_new_tokens=6, batch_size=5)
    adapters = [f"{name}={folder}" for name, folder in folders.items()]
    generate.main(Settings(adapters=adapters, adapter="dora", prompts_file=tmp_path / "p.jsonl", **flags))
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["adapter"] for row in rows] == [line.get("adapter", "dora") for line in lines]
    alone = {name: Writer(base, folders.get(name), None, "32-true") for name in (*folders, "base")}
    for number, (line, row) in enumerate(zip(lines[:-1], rows, strict=False)):
        one, s = alone[line.get("adapter", "dora")], settings(**flags, seed=1337 + number)
        assert row["answer"] == one.answer_all([asking(line["prompt"])], s)[0]


def test_a_prompt_to_an_ensemble(folders, capsys):
    """With the flags of the README; twice the same is that adapter."""
    flags = dict(adapters=f"a={folders['large']},b={folders['small']}", precision="32-true", max_new_tokens=7)
    said = []
    for chosen in ({"ensemble": "b,b"}, {"adapter": "b"}, {}):
        generate.main(Settings(**flags, **chosen, prompt="the answer"))
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]
