"""Text from a model: against a plain loop over the full forward pass, and every way of choosing a token by hand."""

import json
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import SEED, write_tiny_tokenizer

import generate
import lora
from checkpoint import load_model
from cli import UserError
from generate import Reply, Settings, Writer, choose, penalize, read_prompts
from prompts import encode_prompt

FAMILIES = pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])


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


class Ids:
    """A reply that keeps ids and never ends by itself."""

    def __init__(self):
        self.ids, self.done = [], False

    @property
    def length(self):
        return len(self.ids)

    def push(self, id):
        self.ids.append(id)

    def finish(self):
        self.done = True


def settings(**flags):
    return Settings(checkpoint_dir="any", **{"temperature": 0, "max_new_tokens": 12, **flags})


def new_ids(model, prompts, s, seeds=None):
    replies = [Ids() for _ in prompts]
    for _ in generate.generate(model, prompts, replies, s, seeds or [s.seed] * len(prompts)):
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


# ---------------------------------------------------------------------------------------------------------- sampling


def draw(logits, temperature=1.0, top_k=0, top_p=1.0, n=1, seed=None):
    """n draws from logits (V,): ids (n,)."""
    generator = torch.Generator().manual_seed(SEED if seed is None else seed)
    return choose(logits.expand(n, -1), temperature, top_k, top_p, [generator] * n)


def frequencies(ids, V):
    return torch.bincount(ids, minlength=V) / len(ids)


def chi_square(ids, probabilities):
    expected = probabilities * len(ids)
    seen = torch.bincount(ids, minlength=len(probabilities))
    assert seen[expected == 0].sum() == 0
    return ((seen - expected).square() / expected)[expected > 0].sum().item()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax(temperature):
    """Chi-square with 7 degrees of freedom: above 35 once in 90,000 draws; the wrong temperature is far above."""
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
    one = choose(many, 1.0, 1, 1.0, [torch.Generator().manual_seed(0)] * 50)
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
        greedy = choose(many, 1.0, 0, top_p, [torch.Generator().manual_seed(0)] * 50)
        assert torch.equal(greedy, many.argmax(dim=1))


def test_top_k_and_top_p_together():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    ids = draw(logits, top_k=2, top_p=0.5, n=500, seed=6)  # of 4/7 and 3/7 the first is enough
    assert set(ids.tolist()) == {0}


def test_a_low_temperature_is_nearly_greedy():
    many = torch.randn(50, 40)
    for temperature in (1e-3, 1e-7):
        ids = choose(many * 10, temperature, 0, 1.0, [torch.Generator().manual_seed(0)] * 50)
        assert torch.equal(ids, many.argmax(dim=1))


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_damaged_logits_are_an_error(temperature, value):
    logits = torch.randn(2, 9)
    logits[1, 4] = value
    with pytest.raises(UserError, match="logits"):
        choose(logits, temperature, 0, 1.0, [torch.Generator()] * 2)


def test_repetition_penalty_by_hand():
    logits = torch.tensor([[2.0, -2.0, 1.0, -1.0], [4.0, 3.0, 0.0, -8.0]])
    seen = torch.tensor([[True, True, False, False], [False, True, True, True]])
    expected = torch.tensor([[1.0, -4.0, 1.0, -1.0], [4.0, 1.5, 0.0, -16.0]])
    assert torch.equal(penalize(logits, seen, 2.0), expected)
    assert torch.equal(penalize(logits, seen, 1.0), logits)


def test_what_was_generated_counts_as_seen(model_of):
    """With a penalty without mercy no token comes twice, nor one of the prompt."""
    prompt = random_prompt(6)
    (ids,) = new_ids(model_of("llama"), [prompt], settings(repetition_penalty=1e9, max_new_tokens=40))
    positive_only = len(set(ids)) == 40 and not set(ids) & set(prompt)
    assert positive_only
    (free,) = new_ids(model_of("llama"), [prompt], settings(max_new_tokens=40))
    assert free != ids


def test_a_seed_gives_the_same_text_in_every_batch(writer):
    dialogs = [[{"role": "user", "content": "the answer " * random.randint(1, 9)}] for _ in range(7)]
    options = dict(temperature=1.5, top_k=0, max_new_tokens=15, seed=random.randrange(10**6))
    answers = [writer.answer_all(dialogs, settings(**options, batch_size=size)) for size in (1, 3, 16)]
    assert answers[0] == answers[1] == answers[2]
    assert writer.answer_all(dialogs, settings(**options | {"seed": 10**7})) != answers[0]
    same = [dialogs[0]] * 5
    assert len(set(writer.answer_all(same, settings(**options)))) > 1  # each prompt has its own numbers


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

    def scripted(model, prompts, replies, s, seeds):
        for id in ids:
            replies[0].push(id)
            yield
        replies[0].finish()
        yield

    monkeypatch.setattr(generate, "generate", scripted)
    s = settings(stop=["Question:"])
    pieces = list(writer.stream([{"role": "user", "content": "a"}], s))
    assert "".join(pieces) == text and len(pieces) == len(ids) + 1
    ids = ids[: ids.index(writer.tokenizer.encode("Zürich —")[-1])]
    assert "".join(writer.stream([{"role": "user", "content": "a"}], s)).startswith("Zürich ")


def test_stream_and_batch_agree(writer):
    for stop in ([], ["a"], ["e", "ba"]):
        s = settings(temperature=1.2, max_new_tokens=30, stop=stop)
        dialog = [{"role": "user", "content": "the question"}]
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
    assert read_prompts(path) == [
        [{"role": "user", "content": "a\u2028b", "input": ""}],
        [{"role": "user", "content": "c", "input": "d"}],
        lines[2]["messages"],
    ]


def test_a_system_message_goes_before_every_prompt(tiny_model_dir, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Writer, "answer_all", lambda self, dialogs, s: seen.extend(dialogs) or ["x"] * len(dialogs))
    monkeypatch.setattr(Writer, "stream", lambda self, messages, s: seen.append(messages) or iter("x"))
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    flags = dict(checkpoint_dir=tiny_model_dir, precision="32-true", system="be kind")
    generate.main(Settings(**flags, prompts_file=tmp_path / "p.txt"))
    generate.main(Settings(**flags, prompt="three"))
    assert [[message["content"] for message in messages] for messages in seen] == [
        ["be kind", "one"], ["be kind", "two"], ["be kind", "three"],
    ]  # fmt: skip


@pytest.fixture(scope="session")
def tiny_adapter(tiny_model_dir, tmp_path_factory):
    """A LoRA adapter over the tiny model, trained as it were on its NF4 version in the plain style."""
    folder = tmp_path_factory.mktemp("adapter")
    model, config = load_model(tiny_model_dir, torch.float32), lora.AdapterConfig(r=4, alpha=8)
    lora.add_lora(model, config)
    torch.manual_seed(SEED)
    for adapter in lora.adapters(model).values():
        adapter.lora_B.data.normal_(std=0.2)
    lora.save_adapter(model, config, folder, tiny_model_dir)
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
    assert writer.model.lm_head.weight.dtype == generate.DTYPES[precision]
    answers = writer.answer_all([[{"role": "user", "content": "what " * n}] for n in (1, 5)], settings())
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

    def stream(messages, s):
        encode_prompt(writer.tokenizer, messages, writer.style)  # the styles have their rules
        asked.append([message["content"] for message in messages])
        yield f"a{len(asked)}"

    monkeypatch.setattr("builtins.input", typed)
    generate.chat(SimpleNamespace(stream=stream), list(start), settings())
    return asked


def test_a_chat_remembers_until_an_empty_line(writer, monkeypatch, capsys):
    writer.style = "chatml"
    start = [{"role": "system", "content": "s"}]
    asked = chat(writer, ["one", "two", "", "three", "four"], monkeypatch, start)
    assert asked == [
        ["s", "one"], ["s", "one", "a1", "two"], ["s", "three"], ["s", "three", "a3", "four"],
    ]  # fmt: skip
    assert capsys.readouterr().out.split() == ["a1", "a2", "a3", "a4"]


def test_a_chat_in_a_style_for_one_question_goes_on(writer, monkeypatch, capsys):
    """Alpaca has no second turn: it is said, and the new question answered by itself."""
    writer.style = "alpaca"
    assert chat(writer, ["one", "two", "three"], monkeypatch) == [["one"], ["two"], ["three"]]
    assert capsys.readouterr().err.count("note: prompt style alpaca") == 2


def test_chat_from_a_pipe(run_script, tiny_model_dir):
    """As a user runs it: the same question after an empty line has the same answer."""
    code, out, err = run_script(
        "generate.py", "--checkpoint_dir", tiny_model_dir, "--temperature", 0, "--max_new_tokens", 6,
        "--precision", "32-true", stdin="the answer\nand what\n\nthe answer\n", env={"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert code == 0, err
    assert "Traceback" not in err and "Ctrl-D" in err
    dialog = [{"role": "user", "content": "the answer"}]
    s = settings(max_new_tokens=6)
    (answer,) = Writer(tiny_model_dir, None, None, "32-true").answer_all([dialog], s)
    assert out.startswith(f"> {answer}\n> ") and out.endswith(f"\n> > {answer}\n> ")
