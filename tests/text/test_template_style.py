"""The style `checkpoint`: its fast way against the slow one, the process that runs templates, and what is refused."""

import os
import random
import threading
from collections import Counter
from pathlib import Path

import pytest
from test_tokenizer import CHATML, assistant, folders, loaded, peers, system, user  # noqa: F401 (fixtures)

from shell.cli import UserError
from text import chat_template
from text.chat_template import Render, TemplateProcess, render
from text.messages import Dialog, KeyRefused
from text.prompts import encode_dialog, encode_prompt
from text.template_style import _outline, _segments, foreseen_sequences, rendered_sequences
from text.tokenizer import Tokenizer

TEMPLATES = sorted(Path(__file__).with_name("chat_templates").glob("*.jinja"))
THINKS = Path(__file__).with_name("chat_templates") / "qwen3.jinja"
WORDS = ["Hello", "two words", "a\n\nb", "日本", "{{ x }}", "<|im_end|>", "é <b>", "1. 2.", "mark", "</s>", "<s>x"]


@pytest.fixture
def use(loaded, monkeypatch):  # noqa: F811
    """A byte-level tokenizer with another chat template."""

    def use(template, kind="byte-level"):
        monkeypatch.setattr(loaded[kind], "chat_template", template)
        return loaded[kind]

    return use


def some_text():
    return " ".join(random.choices(WORDS, k=random.randint(1, 4)))


def plain_conversation():
    messages = [system(some_text())] if random.random() < 0.4 else []
    for _ in range(random.randint(1, 4)):
        messages += [user(some_text()), {**assistant(some_text()), **({"weight": 0} if random.random() < 0.2 else {})}]
    return messages


# -------------------------------------------------------------------------------------------- the fast and the slow way


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_what_is_foreseen_is_what_is_rendered(path, use):
    tokenizer = use(path.read_text())
    for _ in range(8):
        dialog, results = Dialog(plain_conversation()), []
        for way in (foreseen_sequences, rendered_sequences):
            notes = Counter()
            try:
                sequences = way(tokenizer, dialog, notes)
            except UserError:
                sequences = None
            results.append(sequences and ([_segments(tokenizer, one.text, one.answers) for one in sequences], +notes))
        assert results[0] in (None, [], results[1]), dialog.messages


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_the_last_answer_alone_is_trained_after_the_prompt_that_generating_gives(path, kind, use):
    """Also where an end is added to the answers before it, which are no targets."""
    tokenizer = use(path.read_text(), kind)
    for thinking in ({}, {"thinking": "hm"}):
        first = {**assistant(some_text()), **thinking}
        messages = [user(some_text()), {**first, "weight": 0}, user(some_text()), assistant("Yes.")]
        prompt_messages = [messages[0], first, messages[2]]
        try:
            [(ids, is_target)] = encode_dialog(tokenizer, messages, "checkpoint")
        except UserError:  # this template has no place for some of it
            continue
        prompt = encode_prompt(tokenizer, prompt_messages, "checkpoint")
        assert ids[: len(prompt)] == prompt
        assert is_target.index(True) <= len(prompt)  # SmolLM3's marks have the answer's beginning too


def test_an_answer_that_is_no_target_has_the_end_that_is_added(use):
    tokenizer = use("{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}")
    messages = [user("a"), assistant("b"), user("c"), assistant("d")]
    [both], [last] = (
        encode_dialog(tokenizer, [messages[0], {**messages[1], **weight}, *messages[2:]], "checkpoint")
        for weight in ({}, {"weight": 0})
    )
    assert both.ids == last.ids and both.ids.count(tokenizer.eos_id) == 2
    assert sum(both.is_target) == 2 * sum(last.is_target)


def test_a_thought_that_a_template_leaves_out_of_the_history_does_not_hinder_generating(use):
    tokenizer = use(THINKS.read_text())
    messages = [user("a"), {**assistant("b"), "thinking": "hm"}, user("c")]
    without = [user("a"), assistant("b"), user("c")]
    prompts = [
        encode_prompt(tokenizer, one, "checkpoint", template_args={"enable_thinking": False})
        for one in (messages, without)
    ]
    assert prompts[0] == prompts[1]


def test_most_templates_can_be_foreseen(use):
    """Else the test above would compare nothing."""
    able = 0
    for path in TEMPLATES:
        shape = (
            ("user", None),
            ("assistant", None),
            ("user", None),
            ("assistant", 0),
            ("user", None),
            ("assistant", None),
        )
        able += _outline(use(path.read_text()), path.read_text(), None, "[[], {}]", shape) is not None
    assert able >= 0.6 * len(TEMPLATES)


@pytest.mark.parametrize("text", ["<think>\nhm\n</think>\n\nyes", "/no_think", " blank", "mark0content"])
def test_contents_that_templates_look_into_are_rendered(text, use):
    tokenizer = use(THINKS.read_text())
    messages = [user("a"), assistant("b"), user(text), assistant("c"), user("d"), assistant(text)]
    assert foreseen_sequences(tokenizer, Dialog(messages), Counter()) is None
    assert len(encode_dialog(tokenizer, messages, "checkpoint")) == 3


def test_a_text_that_is_not_as_foreseen_is_rendered(use):
    """A template may look into any content: here it counts letters."""
    tokenizer = use(CHATML.replace("message['content'] +", "message['content'] + (message['content']|length)|string +"))
    messages = [user("12345"), assistant("b")]
    assert foreseen_sequences(tokenizer, Dialog(messages), Counter()) is None
    assert "123455" in tokenizer.decode(encode_dialog(tokenizer, messages, "checkpoint")[0].ids)


# ------------------------------------------------------------------------------------------------------ thinking models


def targets_of(tokenizer, messages, **more):
    """For each sequence the text of its targets."""
    sequences = encode_dialog(tokenizer, messages, "checkpoint", **more)
    found = [[id for id, target in zip(*one, strict=True) if target] for one in sequences]
    return [tokenizer.decode(ids, skip_special=False) for ids in found]


def test_each_answer_of_a_thinking_model_is_trained_as_it_will_be_asked_for(use):
    tokenizer = use(THINKS.read_text())
    messages = [user("a"), {**assistant("b"), "thinking": "hm"}, user("c"), assistant("d")]
    assert targets_of(tokenizer, messages) == [
        "<think>\nhm\n</think>\n\nb<|im_end|>", "<think>\n\n</think>\n\nd<|im_end|>"
    ]  # fmt: skip
    without = [message if "thinking" not in message else assistant("b") for message in messages]
    assert targets_of(tokenizer, without, template_args={"enable_thinking": False}) == ["b<|im_end|>", "d<|im_end|>"]
    for number in (1, 3):
        ids, is_target = encode_dialog(tokenizer, messages, "checkpoint")[number // 2]
        assert ids[: is_target.index(True)] == encode_prompt(tokenizer, messages[:number], "checkpoint")


def test_calls_and_thoughts_after_one_question_are_one_sequence(use):
    tokenizer = use(THINKS.read_text())
    call = {**assistant(""), "thinking": "look", "tool_calls": [{"name": "f", "arguments": {"a": 1}}]}
    messages = [user("a"), assistant("b"), user("c"), call, {"role": "tool", "content": "42"}, assistant("d")]
    first, second = targets_of(tokenizer, messages)
    assert first == "<think>\n\n</think>\n\nb<|im_end|>"
    assert second.startswith('<think>\nlook\n</think>\n\n<tool_call>\n{"name": "f"') and second.endswith("d<|im_end|>")
    assert second.count("<|im_end|>") == 2 and "42" not in second


def test_a_variable_that_the_template_has_not_is_refused(use):
    with pytest.raises(UserError, match="no variable 'enable_thinkin'"):
        encode_prompt(use(THINKS.read_text()), [user("a")], "checkpoint", template_args={"enable_thinkin": False})


@pytest.mark.parametrize(
    ("message", "key"),
    [
        ({"role": "user", "content": "a", "name": "eve"}, "name"),
        ({**assistant("b"), "thinking": "hm"}, "thinking"),
        ({**assistant("b"), "tool_calls": [{"name": "f", "arguments": {}}]}, "tool_calls"),
    ],
)
def test_what_a_template_drops_is_named(message, key, use):
    messages = [message, assistant("x")] if message["role"] == "user" else [user("a"), message]
    with pytest.raises(KeyRefused, match=f"changes the {key} of message") as found:
        encode_dialog(use(CHATML), messages, "checkpoint")
    assert found.value.key == key


def test_tools_that_a_template_drops_are_named(use):
    with pytest.raises(UserError, match="no place for tools"):
        encode_dialog(
            use(CHATML), [user("a"), assistant("b")], "checkpoint", [{"type": "function", "function": {"name": "f"}}]
        )


def test_the_template_for_tools_is_taken_for_tools(folders):  # noqa: F811
    tokenizer = Tokenizer(folders["byte-level"])
    tokenizer.chat_template = CHATML
    tokenizer.tool_template = "{{ tools | tojson }}" + CHATML
    tools = [{"type": "function", "function": {"name": "f"}}]
    with_tools, without = (encode_prompt(tokenizer, [user("a")], "checkpoint", more) for more in (tools, ()))
    assert tokenizer.decode(with_tools, skip_special=False).startswith('[{"type"') and with_tools != without


# --------------------------------------------------------------------------------------------- a prompt to be continued


@pytest.mark.parametrize("style", ["chatml", "checkpoint"])
def test_the_beginning_of_an_answer_is_continued(style, use):
    tokenizer = use(CHATML)
    question = encode_prompt(tokenizer, [user("a")], style)
    assert encode_prompt(tokenizer, [user("a"), assistant("So <|im_end|>")], style) == question + tokenizer.encode(
        "So <|im_end|>"
    )
    assert encode_prompt(tokenizer, [user("a"), assistant("")], style) == question
    begun = {**assistant(""), "thinking": "hm"}
    assert encode_prompt(tokenizer, [user("a"), begun], style) == question + tokenizer.encode("<think>\nhm")


# ---------------------------------------------------------------------------------------------------------- the process


def ask(process, source, **values):
    return process.ask(source, {"messages": [], "wanted": [Render(0)], "values": values})


def test_one_process_serves_many_requests_and_a_new_one_follows_a_failure():
    process = TemplateProcess()
    assert ask(process, "{{ a }}", a="é") == (["é"], None)
    first = process._process.pid
    assert ask(process, "{{ a }}{{ a }}", a="b") == (["bb"], None) and process._process.pid == first
    assert "2 s" in ask(process, "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")[1]
    assert ask(process, "{{ a }}", a="c") == (["c"], None) and process._process.pid != first
    process._process.kill()
    process._process.wait()
    assert ask(process, "{{ a }}", a="d") == (["d"], None)
    assert "MiB" in ask(process, "{{ 'a' * 10**9 }}")[1]
    process._end(process._process)


def test_a_text_may_be_as_long_as_its_contents_but_not_endless(monkeypatch):
    process = TemplateProcess()
    text = "x" * (2 * chat_template.LONGEST)
    assert ask(process, "{{ a }}", a=text) == ([text], None)
    assert "characters" in ask(process, "{{ a * 2000 }}", a="x" * 2000)[1]


def test_threads_and_forks_get_their_own_answers():
    texts = [None] * 8

    def work(number):
        texts[number] = render("{{ a }}", [], [Render(0)], {}, a=str(number))[0][0].text

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [str(number) for number in range(8)]
    child = os.fork()
    if child == 0:
        work(3)
        os._exit(texts[3] != "3" or chat_template._process_of.cache_info().currsize != 2)
    assert os.waitpid(child, 0)[1] == 0
    work(5)
    assert texts[5] == "5"


def test_marks_of_generation_are_cut_out():
    source = (
        "a{% generation %}b{% generation %}c{% endgeneration %}{% endgeneration %}d{% generation %}{% endgeneration %}"
    )
    [[rendered], _] = render(source, [], [Render(0)], {})
    assert rendered == ("abcd", [(1, 3)])
