"""Each prompt style as a chat template: transformers and our own renderer give the ids that training had."""

import json
import random

import pytest
from conftest import write_tiny_tokenizer
from test_tokenizer import LOOK_ALIKES, ORDINARY, assistant, folders, loaded, peers, system, user  # noqa: F401 (fixtures)

from shell.cli import UserError
from text.prompts import STYLES, encode_dialog, encode_prompt
from text.style_templates import TEMPLATES, chat_template, save_chat_template
from text.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

KINDS = ["byte-level", "byte-level-bos", "llama-json", "llama-chatml", "llama-first"]
SINGLE = ("plain", "alpaca", "dolly")  # styles of one question and one answer
SPACE_BEFORE_ANSWER = ("vicuna", "llama2-chat", "mistral-instruct")

FRAGMENTS = [
    *(text for text in ORDINARY if len(text) < 100),
    "{{ 7 * 7 }}",
    "{% raw %}",
    "'",
    '"',
    "\\n",
    "\\",
    " ",
    "  ",
]
FRAGMENTS += ["### Response:\n", "USER: ", "ASSISTANT:", "<<SYS>>", "<</SYS>>", "Ünï", "x", "A", "9", ",", "\n\n"]


def some_text(fragments=FRAGMENTS):
    return "".join(random.choices(fragments, k=random.randint(0, 6)))


def conversation(style, kind):
    """A random one that the style can render and whose answers begin with something visible."""
    messages = [system(some_text())] if style != "plain" and random.random() < 0.5 else []
    for _ in range(1 if style in SINGLE else random.randint(1, 3)):
        messages += [user(some_text()), assistant(random.choice("Aé9日(") + some_text())]
    if "llama" in kind and style in (*SINGLE, "vicuna"):
        # transformers' Llama tokenizer drops a space that begins a sequence (test_tokenizer.LEADING_SPACE)
        messages[0]["content"] = messages[0]["content"].lstrip(" ") or "Q"
    return messages


TOOLS = [
    {"type": "function", "function": {"name": "add", "description": "of '<é>'", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "now"}},
]


def conversation_with_tools(style):
    """A random one in the form of messages.py, with calls of tools and their results, names and thinking."""
    calls = [{"name": "add", "arguments": {"a": random.choice([1, "é<", None, [2.5]])}, "id": "123456789"}]
    calls += [{"name": "now", "arguments": {}}] * random.randint(0, 1)
    messages = [system(random.choice(["", "Be kind."]))] if random.random() < 0.5 else []
    messages += [user(some_text()), {**assistant(random.choice(["", "I call."])), "tool_calls": calls}]
    messages += [{"role": "tool", "content": some_text(), "tool_call_id": "123456789"}, assistant("A" + some_text())]
    messages += [user(some_text()), assistant("B" + some_text())]
    if style == "chatml":
        messages[-1]["thinking"] = "hm" + some_text()
        messages[-2]["name"] = "eve"
    return messages


def in_openais_form(message):
    """A message as transformers' templates expect it."""
    message = {("reasoning_content" if key == "thinking" else key): value for key, value in message.items()}
    calls = [
        {"type": "function", "id": call.pop("id", None), "function": call}
        for call in map(dict, message.pop("tool_calls", []))
    ]
    return message | ({"tool_calls": calls, "content": message["content"] or None} if calls else {})


@pytest.mark.parametrize("kind", ["byte-level", "llama-chatml"])
@pytest.mark.parametrize("style", ["chatml", "llama3", "mistral-instruct"])
def test_tools_are_the_same_in_transformers(kind, style, loaded, peers):  # noqa: F811
    tokenizer, template = Tokenizer(loaded[kind].folder), chat_template(loaded[kind], style)
    tokenizer.chat_template = template
    for _ in range(10):
        messages, tools = conversation_with_tools(style), random.choice([TOOLS, []])
        found = peers[kind].apply_chat_template(
            list(map(in_openais_form, messages)), tools=tools or None, chat_template=template, return_dict=False
        )
        [expected] = encode_dialog(tokenizer, messages, style, tools)
        assert tokenizer.decode(found, skip_special=False) == tokenizer.decode(expected.ids, skip_special=False)
        assert found == expected.ids or style == "mistral-instruct" and not tokenizer.has_prefix
        assert encode_dialog(tokenizer, messages, "checkpoint", tools) == [expected]
        for end in (1, 2):
            prompt = messages[: -2 * end + 1]
            assert encode_prompt(tokenizer, prompt, "checkpoint", tools) == encode_prompt(
                tokenizer, prompt, style, tools
            )


def theirs(peer, template, messages, generate):
    return peer.apply_chat_template(messages, chat_template=template, add_generation_prompt=generate, return_dict=False)


def boundary_is_kept(tokenizer, style, question):
    """Whether nothing of a question and the answer after it can be one token in a text that is encoded whole."""
    if style == "plain":
        one_space = question[-1:] == " " != question[-2:-1] and question.strip()
        return question.endswith("\n") or tokenizer.has_prefix and one_space
    return tokenizer.has_prefix or style not in SPACE_BEFORE_ANSWER


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("style", TEMPLATES)
def test_ids_equal_ours_in_transformers(kind, style, loaded, peers):  # noqa: F811
    tokenizer, template, compared = loaded[kind], chat_template(loaded[kind], style), 0
    for _ in range(10):
        messages = conversation(style, kind)
        kept = boundary_is_kept(tokenizer, style, messages[-2]["content"])
        prompt = messages[:-1] if kept or style in SINGLE else messages[: 1 + (messages[0]["role"] == "system")]
        assert theirs(peers[kind], template, prompt, True) == encode_prompt(tokenizer, prompt, style), prompt
        if kept:
            expected = encode_dialog(tokenizer, messages, style)[0].ids
            assert theirs(peers[kind], template, messages, False) == expected, messages
        compared += bool(kept)
    assert compared == 10 or style == "plain" or not tokenizer.has_prefix and style in SPACE_BEFORE_ANSWER


@pytest.mark.parametrize("style", TEMPLATES)
def test_the_text_is_the_same_where_a_token_is_not(style, loaded, peers):  # noqa: F811
    """Byte-level BPE, an answer after a space: other tokens, as the module says, of the same text."""
    tokenizer, messages = loaded["byte-level"], [user("one\n"), assistant("two"), user("three\n"), assistant("four")]
    messages = messages[:2] if style in SINGLE else messages
    expected, found = (
        encode_dialog(tokenizer, messages, style)[0].ids,
        theirs(peers["byte-level"], chat_template(tokenizer, style), messages, False),
    )
    assert tokenizer.decode(found, skip_special=False) == tokenizer.decode(expected, skip_special=False)
    assert (found == expected) is (style not in SPACE_BEFORE_ANSWER)


@pytest.mark.parametrize("kind", ["byte-level-bos", "sentencepiece", "llama-first"])
@pytest.mark.parametrize("style", TEMPLATES)
def test_our_own_renderer_reads_the_template(kind, style, loaded):  # noqa: F811
    """Style `checkpoint` with the saved template: any text at all, written-out special tokens too, any answer."""
    tokenizer = Tokenizer(loaded[kind].folder)
    tokenizer.chat_template = chat_template(tokenizer, style)
    for _ in range(10):
        fragments = [*FRAGMENTS, *LOOK_ALIKES]
        count = 1 if style in SINGLE else 2
        messages = [m for _ in range(count) for m in (user(some_text(fragments)), assistant(some_text(fragments)))]
        for message in messages[1::2] if tokenizer.has_prefix else []:  # there the styles encode an answer's own first
            message["content"] = message["content"].lstrip(" ")  # space apart, which the template's text joins
        if style != "plain":
            messages = [system("Be kind." + some_text(fragments)), *messages]
        if style == "llama2-chat" and not messages[1]["content"].strip():
            messages[1]["content"] = "q"  # it strips the system message's line ends along with a blank question
        assert encode_dialog(tokenizer, messages, "checkpoint") == encode_dialog(tokenizer, messages, style), messages


def test_every_style_has_a_template():
    assert {*TEMPLATES, "checkpoint"} == {*STYLES}


@pytest.mark.parametrize("style", TEMPLATES)
def test_a_conversation_that_the_style_cannot_render_is_refused(style, loaded, peers):  # noqa: F811
    template = chat_template(loaded["llama-json"], style)
    wrong = [[user("a"), user("b")], [assistant("a")]] if style not in ("chatml", "llama3") else []
    wrong += [[user("a"), assistant("b"), user("c")]] if style in SINGLE else []
    wrong += [[system("s"), user("a")]] if style == "plain" else []
    for messages in wrong:
        with pytest.raises(Exception, match="take turns|one question|no place"):
            theirs(peers["llama-json"], template, messages, True)


# ------------------------------------------------------------------------------------------------ in a model folder


@pytest.fixture
def folder(tmp_path):
    write_tiny_tokenizer(tmp_path)
    return tmp_path


def dialog_ids(folder, style):
    messages = [system("Be brief."), user("one?"), assistant("yes")]
    return encode_dialog(Tokenizer(folder), messages, style)[0].ids


@pytest.mark.parametrize("has_file", [False, True])
def test_the_template_goes_where_the_folder_has_one(folder, has_file):
    before = json.loads((folder / "tokenizer_config.json").read_text())
    if has_file:
        (folder / "chat_template.jinja").write_text("of the base")
    line = save_chat_template(folder, "alpaca")
    assert line == "chat template: prompt style alpaca, in which it was trained"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    template = config.pop("chat_template", None)
    before.pop("chat_template")
    assert config == before and (folder / "chat_template.jinja").exists() is has_file
    assert template == (None if has_file else chat_template(Tokenizer(folder), "alpaca"))
    peer = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [system("Be brief."), user("one?"), assistant("yes")]
    assert peer.apply_chat_template(messages, return_dict=False) == dialog_ids(folder, "alpaca")
    assert dialog_ids(folder, "checkpoint") == dialog_ids(folder, "alpaca")


def test_a_folder_without_settings_of_its_tokenizer(folder):
    (folder / "tokenizer_config.json").unlink()
    (folder / "config.json").write_text('{"eos_token_id": 2}')
    save_chat_template(folder, "vicuna")
    assert not (folder / "tokenizer_config.json").exists()
    assert dialog_ids(folder, "checkpoint") == dialog_ids(folder, "vicuna")


@pytest.mark.parametrize(
    "style, words",
    [(None, "does not say"), ("checkpoint", "the base model's, in which"), ("of a fork", "NOT prompt style of a fork")],
)
def test_the_base_models_template_stays_and_the_line_says_why(folder, style, words):
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert words in save_chat_template(folder, style)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


def test_a_folder_without_a_tokenizer(tmp_path):
    assert "no tokenizer" in save_chat_template(tmp_path, "alpaca") and not list(tmp_path.iterdir())


def test_tokens_of_any_text_are_written_so_that_jinja_reads_them(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    odd = random.choice(["<'\"\\\n>", "<｜end▁of▁sentence｜>", "<🙂>", "{{ x }}"])
    config |= {"eos_token": odd, "added_tokens_decoder": {"511": {"content": odd, "special": True}}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    expected = dialog_ids(folder, "alpaca")
    save_chat_template(folder, "alpaca")
    assert dialog_ids(folder, "checkpoint") == expected and expected[-1] == 511


def test_the_same_data_fits_whatever_the_template(folder):
    """A merged model goes on with the data that its base was trained on."""
    before = Tokenizer(folder).file_hash()
    save_chat_template(folder, "dolly")
    assert Tokenizer(folder).file_hash() == before
    (folder / "chat_template.jinja").write_text("z")
    assert Tokenizer(folder).file_hash() == before


def test_an_unknown_style_is_named(loaded):  # noqa: F811
    with pytest.raises(UserError, match="unknown prompt style 'x'"):
        encode_dialog(loaded["byte-level"], [user("a"), assistant("b")], "x")
