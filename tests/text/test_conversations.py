"""Whole conversations in chat templates of many families, row by row of conversations.yaml, against transformers.

The table says what each conversation is as a text and which stretches of it are targets; transformers says which ids it
has. After the table: no key of a message is without an effect, and nothing that stands in a file makes a traceback.
"""

import copy
import datetime
import functools
import json
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from test_tokenizer import make_byte_level, make_llama_json

from shell.cli import UserError
from text import chat_template
from text.messages import read_messages, read_tools
from text.prompts import STYLES, encode_dialog, encode_prompt
from text.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")
from transformers.utils import chat_template_utils

FOLDER = Path(__file__).parent
TABLE = yaml.load((FOLDER / "conversations.yaml").read_text(), yaml.CSafeLoader)
TEMPLATES = {path.stem: path.read_text() for path in sorted((FOLDER / "chat_templates").glob("*.jinja"))}
ROWS = [(template, row) for template, rows in TABLE["rows"].items() for row in rows]
OF_STYLES = [(style, row) for style, rows in TABLE["styles"].items() for row in rows]
TOOLS = TABLE["tools"]
NOT_OF_TOKENIZER = ("base", "like", "masks", "begins_answers")


def family(template):
    """What the table says of a template's tokenizer."""
    entry = TABLE["templates"].get(template, {"like": "chatml"})
    return TABLE["templates"].get(entry.get("like"), {}) | entry


def tokens_of(template):
    """What makes a family's tokenizer, as JSON: templates that agree in it share one."""
    return json.dumps({key: value for key, value in family(template).items() if key not in NOT_OF_TOKENIZER})


def bases_of(template):
    """The kinds of vocabulary that a template is tried with: one without dummy prefixes, and its family's own."""
    return dict.fromkeys(["bytes", family(template)["base"]])


def id_of(value):
    return value.get("case") if isinstance(value, dict) else value


def read(row):
    """(messages, tools, template_args) of a row of the table, in the form of messages.py."""
    raw = []
    for message in row["messages"]:
        (role, content), *more = message.items()
        raw.append({"role": role, "content": content, **dict(more)})
    return read_messages(raw), read_tools([TOOLS[name] for name in row.get("tools", ())]), row.get("args", {})


SHOWN = [(template, row, base) for template, row in ROWS if "text" in row for base in bases_of(template)]

# ------------------------------------------------------------------------------------------------------- the tokenizers


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """The tokenizer.json of each kind of vocabulary, without any family's added tokens."""
    root, specs = tmp_path_factory.mktemp("bases"), {}
    replace = {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}}
    for base, write in (("bytes", make_byte_level), ("sentencepiece", make_llama_json)):
        specs[base] = json.loads((write(root / base) / "tokenizer.json").read_text())
        specs[base] |= {"added_tokens": [], "post_processor": None}
    shorten(specs["sentencepiece"]["model"])
    return specs | {"sentencepiece-first": specs["sentencepiece"] | replace}


def shorten(model):
    """Leave a vocabulary of bytes, letters and the first 3000 words, which loads in a tenth of the time."""
    kept = [
        piece for piece, id in sorted(model["vocab"].items(), key=lambda item: item[1]) if id < 3000 or len(piece) < 2
    ]
    model["vocab"] = {piece: id for id, piece in enumerate(kept)}
    model["merges"] = [pair for pair in model["merges"] if {*pair, "".join(pair)} <= model["vocab"].keys()]


def puts_before(token, ids):
    """The post-processor of a tokenizer.json that puts a token before each text."""
    named, text = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    tokens = {token: {"id": token, "ids": [ids[token]], "tokens": [token]}}
    return {"type": "TemplateProcessing", "single": [named, text], "pair": [named, text], "special_tokens": tokens}


@pytest.fixture(scope="session")
def folder(bases, tmp_path_factory):
    """`folder(family, base)`: with the tokenizer of a family (as JSON), its special tokens in a kind of vocabulary."""

    @functools.cache
    def make(of_family, base):
        entry, flags = json.loads(of_family), ("single_word", "lstrip", "rstrip", "normalized")
        names = {name: entry[key] for key, name in (("bos", "bos_token"), ("eos", "eos_token")) if key in entry}
        special = [*(["<unk>", "<s>", "</s>"] if base != "bytes" else []), *names.values(), *entry["special"]]
        spec, ids, added = bases[base], dict(bases[base]["model"]["vocab"]), []
        for text in dict.fromkeys([*special, *entry.get("added", ())]):
            id = ids.setdefault(text, len(ids))
            token = {"id": id, "content": text, "special": text in special} | dict.fromkeys(flags, False)
            added.append(token | {"rstrip": text in entry.get("swallows_blanks", ())})
        path = tmp_path_factory.mktemp("tokenizer")
        spec = spec | {"added_tokens": sorted(added, key=lambda token: token["id"])}
        spec |= {"post_processor": puts_before(entry["bos"], ids) if entry.get("adds_bos") else None}
        (path / "tokenizer.json").write_text(json.dumps(spec))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": entry.get("adds_bos", False), **names}
        (path / "tokenizer_config.json").write_text(json.dumps(config))
        return path

    return make


@pytest.fixture(scope="session")
def ours(folder):
    """`ours(template, base)`: a `Tokenizer` with a template, in the family's own kind of vocabulary or another."""
    load = functools.cache(Tokenizer)

    @functools.cache
    def make(template, base=None):
        tokenizer = copy.copy(load(folder(tokens_of(template), base or family(template)["base"])))
        tokenizer.chat_template = TEMPLATES[template]
        return tokenizer

    return make


@pytest.fixture(scope="session")
def peer(folder):
    """`peer(template, base)`: transformers' tokenizer of the same folder."""
    load = functools.cache(transformers.PreTrainedTokenizerFast.from_pretrained)
    return lambda template, base: load(folder(tokens_of(template), base))


@pytest.fixture(autouse=True)
def _one_day(monkeypatch):
    """transformers has the date that our templates have."""

    class Day(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return chat_template.DAY

    monkeypatch.setattr(chat_template_utils, "datetime", Day)


@functools.cache
def added_ids(folder):
    return {token["id"] for token in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]}


def pieces(tokenizer, ids):
    """The bytes that each id stands for, without the dummy prefix of SentencePiece."""
    added, found, prefixed = added_ids(tokenizer.folder), [], tokenizer.has_prefix
    for id in ids:
        data = tokenizer.token_bytes(id)
        found.append(data.removeprefix(b" ") if prefixed and id not in added else data)
        prefixed = id in added and tokenizer.prefix == "always"
    return found


def spell(tokenizer, sequence):
    """(the text of a sequence, the texts of its targets)."""
    parts, targets, inside = pieces(tokenizer, sequence.ids), [], False
    for part, target in zip(parts, sequence.is_target, strict=True):
        if target and not inside:
            targets.append(b"")
        if target:
            targets[-1] += part
        inside = target
    return b"".join(parts).decode(), [target.decode() for target in targets]


def as_transformers_takes(message):
    made = {key: value for key, value in message.items() if key in ("role", "content", "name", "tool_call_id")}
    if "input" in message:
        made["content"] += "\n\n" + message["input"]
    if "thinking" in message:
        made["reasoning_content"] = made["thinking"] = made["reasoning"] = message["thinking"]
    if "tool_calls" in message:
        made["content"] = made["content"] or None
        made["tool_calls"] = [
            {"type": "function", "function": {key: call[key] for key in ("name", "arguments")}}
            | {key: call[key] for key in ("id",) if key in call}
            for call in message["tool_calls"]
        ]
    return made


def apply(peer, tokenizer, messages, tools, args, row, generate=False):
    """(ids, mask) of transformers. mask: None for a template without marks; row: of the table."""
    messages, sanitized = list(map(as_transformers_takes, messages)), row.get("sanitized", False)
    marked = "generation -%}" in tokenizer.chat_template and not sanitized  # it cannot do both
    how = {"add_generation_prompt": generate, "return_assistant_tokens_mask": marked, "tools": tools or None}
    how["sanitize_control_tokens"] = sanitized
    found = peer.apply_chat_template(messages, chat_template=tokenizer.chat_template, **how, **args)
    ids, mask = found["input_ids"], found.get("assistant_masks")
    more = len(tokenizer.with_begin(ids)) - len(ids)
    return tokenizer.with_begin(ids), mask and [0] * more + mask


# ------------------------------------------------------------------------------------------------------------ the table


@pytest.mark.parametrize(("template", "row", "base"), SHOWN, ids=id_of)
def test_a_conversation_is_the_tables_and_transformers(template, row, base, ours, peer):
    tokenizer, (messages, tools, args), notes = ours(template, base), read(row), Counter()
    sequences = encode_dialog(tokenizer, messages, "checkpoint", tools, args, notes)
    spelled = [spell(tokenizer, sequence) for sequence in sequences]
    assert [text for text, _ in spelled] == [*row.get("earlier", ()), row["text"]]
    assert [target for _, targets in spelled for target in targets] == row["targets"]
    for part in row.get("notes", ()):
        assert any(part in note and count for note, count in notes.items()), notes
    wholes = [messages[: i + 1] for i in reversed(trained(messages))]
    theirs = [apply(peer(template, base), tokenizer, whole, tools, args, row) for whole in wholes]
    same = [next((one for one in theirs if begins(tokenizer, sequence, one[0])), None) for sequence in sequences]
    assert (None in same) is ("unlike" in row), [tokenizer.decode(ids, False) for ids, _ in theirs]
    assert same[-1] in (None, theirs[0])
    if family(template).get("masks", True) and not any("weight" in message for message in messages):
        for sequence, (_, mask) in [pair for pair in zip(sequences, same, strict=True) if pair[1] and pair[1][1]]:
            length = len(sequence.ids)
            assert mask[:length] == list(map(int, sequence.is_target)) and not any(mask[length:])


def trained(messages):
    """The numbers of the answers that are targets."""
    return [i for i, message in enumerate(messages) if message["role"] == "assistant" and message.get("weight") != 0]


def begins(tokenizer, sequence, ids):
    """Whether a sequence is the beginning of what transformers has, and nothing visible but EOS follows."""
    rest = b"".join(pieces(tokenizer, ids[len(sequence.ids) :])).decode()
    return ids[: len(sequence.ids)] == sequence.ids and not rest.replace(tokenizer.eos_token, "").strip()


@pytest.mark.parametrize(("template", "row", "base"), SHOWN, ids=id_of)
def test_a_prompt_is_transformers_and_what_stands_before_the_answer(template, row, base, ours, peer):
    tokenizer, (messages, tools, args) = ours(template, base), read(row)
    last = trained(messages)[-1]
    if messages[last - 1]["role"] == "assistant":
        return  # which a prompt would go on with
    sequence = encode_dialog(tokenizer, messages, "checkpoint", tools, args)[-1]
    prompt = encode_prompt(tokenizer, messages[:last], "checkpoint", tools, args)
    assert sequence.ids[: len(prompt)] == prompt
    if "generation -%}" not in tokenizer.chat_template:
        assert sequence.is_target[len(prompt)] and not sequence.is_target[len(prompt) - 1]
    unlike = row.get("unlike") in ("look-alike", "no token ends an answer")
    if family(template).get("begins_answers", True) and not unlike:
        assert prompt == apply(peer(template, base), tokenizer, messages[:last], tools, args, row, True)[0]
    content = messages[last]["content"].strip()
    if {"thinking", "tool_calls"}.isdisjoint(messages[last]) and content:
        begun = [*messages[:last], {"role": "assistant", "content": content[:2]}]
        ids = encode_prompt(tokenizer, begun, "checkpoint", tools, args)
        assert ids[: len(prompt)] == prompt
        begun = b"".join(pieces(tokenizer, ids)[len(prompt) :]).decode()
        assert begun.lstrip() == content[:2].lstrip()


@pytest.mark.parametrize(("template", "row"), [r for r in ROWS if "refused" in r[1]], ids=id_of)
def test_a_conversation_that_a_template_cannot_show_is_refused(template, row, ours):
    messages, tools, args = read(row)
    with pytest.raises(UserError, match=re.escape(row["refused"])) as caught:
        encode_dialog(ours(template), messages, "checkpoint", tools, args)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(("style", "row"), OF_STYLES, ids=id_of)
def test_a_conversation_in_a_style_of_ours(style, row, ours):
    tokenizer, (messages, tools, args) = ours(row.get("in", "chatml")), read(row)
    if "refused" in row:
        with pytest.raises(UserError, match=re.escape(row["refused"])) as caught:
            encode_dialog(tokenizer, messages, style, tools, args)
        assert len(str(caught.value).splitlines()) == 1
        return
    [sequence] = encode_dialog(tokenizer, messages, style, tools, args)
    text, targets = spell(tokenizer, sequence)
    assert (text, targets) == (row["text"], row["targets"])
    last = trained(messages)[-1]
    if "name" not in messages[last]:  # which a prompt cannot know
        prompt = encode_prompt(tokenizer, messages[:last], style, tools, args)
        assert sequence.ids[: len(prompt)] == prompt and sequence.is_target[len(prompt)]


def test_the_table_is_whole():
    assert TABLE["rows"].keys() == TEMPLATES.keys() and TABLE["styles"].keys() == STYLES.keys() - {"checkpoint"}
    for rows in (ROWS, OF_STYLES):
        names = [(group, row["case"]) for group, row in rows]
        assert len(names) == len(set(names))
    assert len(ROWS) > 250
    known = {
        "case",
        "sanitized",
        "messages",
        "tools",
        "args",
        "earlier",
        "text",
        "targets",
        "refused",
        "unlike",
        "notes",
        "in",
    }
    assert not {key for _, row in ROWS + OF_STYLES for key in row} - known


# ------------------------------------------------------------------------------------------ no key is without an effect

ARGS = ({"enable_thinking": False}, {"reasoning_effort": "low"}, {"date_string": "1 Jan 2025"})
# Templates that show conversations. (What odd-json writes after the content of the last answer is cut.)
SHOWING = sorted({template for template, _, _ in SHOWN} - {"odd-json"})
ANY_STYLE = [*((name, "checkpoint") for name in SHOWING), ("chatml", "chatml"), ("chatml", "alpaca")]
ANY_STYLE += [("llama-3", "llama3"), ("mistral-v7", "mistral-instruct"), ("llama-2", "vicuna"), ("chatml", "plain")]


@st.composite
def conversations(draw):
    """(messages, tools, template_args) with some of the keys that there are, each text another one."""
    features = ["system", "name", "thinking", "calls", "ids", "tools", "input", "weight", "args"]
    chosen = draw(st.sets(st.sampled_from(features), max_size=4))
    words = (f"word{number}" for number in range(1000))

    def message(role, *keys, content=None):
        made = {"role": role, "content": next(words) if content is None else content}
        keys = [key for key in ("name", "weight", *keys) if key in chosen and draw(st.booleans())]
        return made | {key: 0 if key == "weight" else next(words) for key in keys}

    messages = [message("system")] if "system" in chosen else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append(message("user", "input"))
        if "calls" in chosen and draw(st.booleans()):
            ids = [f"{next(words):.>9}" for _ in range(draw(st.integers(1, 2)))]
            calls = [{"name": next(words), "arguments": {next(words): 1}} for _ in ids]
            content = draw(st.sampled_from(["", None]))
            messages.append({**message("assistant", "thinking", content=content), "tool_calls": calls})
            messages += [message("tool") for _ in ids]
            if "ids" in chosen:
                for call, result, id in zip(calls, messages[-len(ids) :], ids, strict=True):
                    call["id"] = result["tool_call_id"] = id
        messages.append(message("assistant", "thinking"))
    function = {"name": next(words), "description": next(words), "parameters": {"type": "object", "properties": {}}}
    tools = [{"type": "function", "function": function}] if "tools" in chosen else []
    return messages, tools, draw(st.sampled_from(ARGS)) if "args" in chosen else {}


def encode(tokenizer, style, messages, tools, args):
    """What `encode_dialog` returns, or the text of its error, which is one line."""
    try:
        return encode_dialog(tokenizer, messages, style, tools, args)
    except UserError as error:
        assert len(str(error).splitlines()) == 1
        return str(error)


def without_one_key(messages):
    """(number, key, the messages without it) for all keys that a message may lack, those of its calls too."""
    for number, message in enumerate(messages):
        for key in message.keys() - {"role", "content"}:
            kept = {k: v for k, v in message.items() if k != key}
            yield number, key, [*messages[:number], kept, *messages[number + 1 :]]
        for i, call in enumerate(message.get("tool_calls", ())):
            kept = {"name": call["name"], "arguments": {}}, {"name": "other", "arguments": call["arguments"]}
            for key, other in zip(("arguments", "call's name"), kept, strict=True):
                calls = [*message["tool_calls"][:i], other, *message["tool_calls"][i + 1 :]]
                yield number, key, [*messages[:number], {**message, "tool_calls": calls}, *messages[number + 1 :]]


def may_be_without_effect(template, messages, number, key):
    """Whether a key is for programs, is of a message that is not trained on anyhow, or stands after all that is."""
    message = messages[number]
    if number > max(trained(messages), default=-1) or (message["role"] == "tool" and key in ("name", "tool_call_id")):
        return True
    if key == "weight":
        return message["role"] != "assistant"
    # A template may leave out the thoughts of earlier turns: they have an effect where they are targets.
    return key == "thinking" and number not in trained(messages) and re.search("think|analysis", TEMPLATES[template])


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(where=st.sampled_from(ANY_STYLE), conversation=conversations())
def test_every_key_has_an_effect_or_is_refused(where, conversation, ours):
    (template, style), (messages, tools, args) = where, conversation
    tokenizer = ours(template, "bytes")
    found = encode(tokenizer, style, messages, tools, args)
    event("refused" if isinstance(found, str) else "rendered")
    if isinstance(found, str):
        return
    for number, key, fewer in without_one_key(messages):
        if encode(tokenizer, style, fewer, tools, args) == found:
            assert may_be_without_effect(template, messages, number, key), (number, key)
    if any(sequence.ids for sequence in found):
        assert not tools or encode(tokenizer, style, messages, [], args) != found
        assert not args or encode(tokenizer, style, messages, tools, {}) != found


# --------------------------------------------------------------------------------------- whatever stands in a file

TEXTS = ["", " ", "a", "\n", "<|im_end|>", "<think>", "</think>", "<think>a</think>b", "/no_think", "{{ x }}", "{%"]
TEXTS += [
    "\x00",
    "\ud800",
    "\ufdd0",
    "\ufdd1",
    "\ufdd2",
    "\ufdd3",
    "mark0content",
    "x" * 20_000,
    "user",
    "assistant",
    "é",
]
SOME_TEXT = st.sampled_from(TEXTS) | st.text(st.characters(exclude_categories=()), max_size=8)


class Deep(NamedTuple):
    """Stands for lists, objects or thoughts in each other: hypothesis could not print those."""

    depth: int
    kind: str

    def made(self):
        value = "a"
        for _ in range(self.depth):
            value = {"list": [value], "object": {"a": value}, "part": {"type": "thinking", "thinking": [value]}}[
                self.kind
            ]
        return value


def dig(value):
    """A value with the deep ones that are meant in it."""
    if isinstance(value, Deep):
        return value.made()
    if isinstance(value, dict):
        return {key: dig(part) for key, part in value.items()}
    return [dig(part) for part in value] if isinstance(value, list) else value


SCALARS = st.none() | st.booleans() | st.integers(-2, 2) | st.floats() | SOME_TEXT | st.binary(max_size=3)
DEEP = st.builds(Deep, st.sampled_from([100, 900, 3000]), st.sampled_from(["list", "object", "part"]))
JUNK = st.recursive(
    SCALARS | st.sampled_from([10**400, -(10**25)]) | DEEP,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SOME_TEXT, inner, max_size=3),
    max_leaves=6,
)
ARGUMENTS = st.dictionaries(SOME_TEXT, JUNK, max_size=2) | st.just('{"a": [1, "b"]}') | st.just('{"a": NaN}') | JUNK
FUNCTION = st.fixed_dictionaries({"name": SOME_TEXT}, optional={"arguments": ARGUMENTS, "description": JUNK})
CALL = (
    FUNCTION
    | st.fixed_dictionaries({"type": st.just("function"), "function": FUNCTION | JUNK}, optional={"id": SOME_TEXT})
    | JUNK
)
KIND = st.sampled_from(["text", "thinking", "image"])
PART = st.fixed_dictionaries({"type": KIND}, optional={"text": SOME_TEXT, "thinking": SOME_TEXT}) | JUNK
VALUES = {
    "name": SOME_TEXT,
    "thinking": SOME_TEXT,
    "reasoning_content": SOME_TEXT,
    "tool_calls": st.lists(CALL, max_size=2),
    "tool_call_id": SOME_TEXT,
    "weight": st.sampled_from([0, 1, True, 0.0, 2, "0"]),
    "input": SOME_TEXT,
    "function_call": CALL,
    "odd": JUNK,
}
MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "system", "tool", "developer", "bot", None, 3]),
        "content": SOME_TEXT | st.lists(PART, max_size=2) | JUNK,
    },
    optional={key: value | JUNK for key, value in VALUES.items()},
)
USER = st.fixed_dictionaries({"role": st.just("user"), "content": SOME_TEXT}, optional={"name": SOME_TEXT})
ANSWER = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": SOME_TEXT},
    optional={"thinking": SOME_TEXT, "tool_calls": st.lists(FUNCTION, max_size=2), "weight": st.just(0)},
)
TURNS = st.lists(USER | ANSWER | MESSAGE, max_size=3).flatmap(
    lambda first: st.tuples(USER, ANSWER).map(lambda last: [*first, *last])
)


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(where=st.sampled_from(ANY_STYLE), raw=TURNS | JUNK, raw_tools=st.lists(FUNCTION | JUNK, max_size=2) | JUNK)
def test_whatever_stands_in_a_file_ends_in_one_line_or_a_result(where, raw, raw_tools, ours):
    template, style = where
    tokenizer, tools = ours(template, "bytes"), []
    try:
        tools = read_tools(dig(raw_tools))
    except UserError as error:
        assert len(str(error).splitlines()) == 1
    try:
        messages = read_messages(dig(raw))
    except UserError as error:
        event("not read")
        assert len(str(error).splitlines()) == 1
        return
    found = encode(tokenizer, style, messages, tools if len(messages) % 2 else [], {})
    event("refused" if isinstance(found, str) else "rendered")
    for sequence in found:
        if not isinstance(sequence, str):
            assert len(sequence.ids) == len(sequence.is_target) and any(sequence.is_target[-1:]) == bool(sequence.ids)
            assert all(0 <= id < tokenizer.vocab_size for id in sequence.ids)
    try:
        encode_prompt(tokenizer, messages, style, tools)
    except UserError as error:
        assert len(str(error).splitlines()) == 1
