"""Prompt styles: training and inference render a dialog through the same function.

A dialog is a list of messages {"role": "system", "user" or "assistant", "content": text}; a user's may also have an
"input", the text that the instruction is about.

To add a prompt style: a function `(tokenizer, messages) -> list[Segment]` and a line in `STYLES`; for other programs
also a Jinja template in style_templates.py.
"""

import re
from typing import NamedTuple

from shell.cli import UserError
from text.chat_template import render
from text.tokenizer import Tokenizer


class Segment(NamedTuple):
    """A stretch of a rendered dialog.

    kind: "template" (special tokens in it count), "user" (they do not), "answer" (a target; they do not), or "end" (a
    target; they do): what ends an answer.
    """

    text: str
    kind: str


def encode_dialog(tokenizer: Tokenizer, messages: list[dict], style: str) -> tuple[list[int], list[bool]]:
    """A dialog that ends with an answer, for training: (ids: list[int], is_target: list[bool]).

    Every answer and the token that ends it are targets. The sequence starts with one BOS if `tokenizer.add_bos`; a
    style's own BOS is not doubled. It stops after the last answer's end. Answers are encoded apart from the prompt, so
    no token is part of both. UserError for messages that the style cannot render.
    """
    check_dialog(messages, last="assistant")
    ids, is_target, _ = _encode_segments(tokenizer, _segments(tokenizer, messages, style))
    return ids, is_target


def encode_prompt(tokenizer: Tokenizer, messages: list[dict], style: str) -> list[int]:
    """A dialog that ends with a question, for inference: the ids that `encode_dialog` puts before the answer."""
    check_dialog(messages, last="user")
    messages = [*messages, {"role": "assistant", "content": ""}]
    ids, _, prompt_length = _encode_segments(tokenizer, _segments(tokenizer, messages, style))
    return ids[:prompt_length]


def prompt_text(tokenizer: Tokenizer, messages: list[dict], style: str) -> str:
    """A dialog that ends with a question, or with the beginning of an answer, as one text without BOS.

    For programs that take only text; there, a special token that a user writes out is a special token.
    """
    begun = isinstance(messages, list) and messages and messages[-1].get("role") == "assistant"
    check_dialog(messages, last="assistant" if begun else "user")
    messages = messages if begun else [*messages, {"role": "assistant", "content": ""}]
    segments = _segments(tokenizer, messages, style)
    last = max(i for i, segment in enumerate(segments) if segment.kind == "answer")
    return "".join(segment.text for segment in segments[: last + 1])


def stop_ids(tokenizer: Tokenizer, style: str) -> set[int]:
    """The ids that end an answer in this style: the checkpoint's EOS ids and the style's own end token."""
    dialog = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ends = [segment.text for segment in _segments(tokenizer, dialog, style) if segment.kind == "end"]
    return tokenizer.eos_ids | {part for part in tokenizer.split(ends[-1], special=True) if isinstance(part, int)}


def _segments(tokenizer, messages, style):
    if style not in STYLES:
        raise UserError(f"unknown prompt style {style!r}: choose one of {', '.join(STYLES)}")
    return STYLES[style](tokenizer, messages)


def check_dialog(messages: list[dict], last: str) -> None:
    """Raise UserError unless `messages` are a dialog whose last message is by `last`."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError("messages must be a list of objects with role and content")
    for i, message in enumerate(messages, 1):
        texts = (message.get("content"), message.get("input") or "")
        if message.get("role") not in ("system", "user", "assistant") or not all(isinstance(t, str) for t in texts):
            raise UserError(f"message {i}: needs a role (system, user or assistant) and text as content and input")
    if not messages or messages[-1]["role"] != last:
        raise UserError(f"the messages must end with one whose role is {last}")


def _encode_segments(tokenizer, segments):
    """(ids, is_target, number of ids before the last answer), cut after the last target."""
    ids, is_target, parts, start, prompt_length = [], [], [], True, 0

    def add(more, target):
        ids.extend(more)
        is_target.extend([target] * len(more))

    for text, kind in segments:
        if kind in ("template", "user"):
            parts += tokenizer.split(text, special=kind == "template")
            continue
        space = kind == "answer" and _drop_last_space(tokenizer, parts)
        more, start = tokenizer.encode_parts(parts, start)
        add(more, False)
        parts = []
        if kind == "answer":
            if tokenizer.add_bos and ids[:1] != [tokenizer.bos_id]:
                ids.insert(0, tokenizer.bos_id)
                is_target.insert(0, False)
            prompt_length = len(ids)
            # An answer's own leading space needs a dummy prefix before it, or decoding would take it for one.
            more, start = tokenizer.encode_parts(tokenizer.split(text), start or space or text[:1] == " ")
        else:
            more, start = tokenizer.encode_parts(tokenizer.split(text, special=True), start)
        add(more, True)
    return ids, is_target, prompt_length


def _drop_last_space(tokenizer, parts):
    """Whether the prompt ends in a space that the answer's dummy prefix replaces; if so, remove it."""
    found = tokenizer.has_prefix and parts and isinstance(parts[-1], str) and parts[-1].endswith(" ")
    if found:
        parts[-1] = parts[-1][:-1]
    return bool(found)


def _plain(tokenizer, messages):
    """The question, unchanged, and the answer directly after it."""
    [(question, answer)] = _turns(messages, "plain", system=False, many=False)[1]
    return [Segment(_joined(question), "user"), *_answer(tokenizer, answer)]


def _alpaca(tokenizer, messages):
    """Stanford Alpaca; a system message takes the place of its first sentences."""
    return _instruction(
        tokenizer, messages, "alpaca", "### Input:", ", paired with an input that provides further context"
    )


def _dolly(tokenizer, messages):
    """Databricks' Dolly; a system message takes the place of its first sentences."""
    return _instruction(tokenizer, messages, "dolly", "Input:", "", end="### End")


def _instruction(tokenizer, messages, style, input_title, with_input, end=None):
    system, [(question, answer)] = _turns(messages, style, many=False)
    given = question.get("input")
    intro = f"Below is an instruction that describes a task{with_input if given else ''}. "
    intro += "Write a response that appropriately completes the request."
    return [
        Segment(system or intro, "user"),
        Segment("\n\n### Instruction:\n", "template"),
        Segment(question["content"], "user"),
        *([Segment(f"\n\n{input_title}\n", "template"), Segment(given, "user")] if given else []),
        Segment("\n\n### Response:\n", "template"),
        *_answer(tokenizer, answer, end),
    ]


def _vicuna(tokenizer, messages):
    """Vicuna v1.1."""
    system, turns = _turns(messages, "vicuna")
    intro = "A chat between a curious user and an artificial intelligence assistant. "
    intro += "The assistant gives helpful, detailed, and polite answers to the user's questions."
    segments = [Segment(system or intro, "user")]
    for i, (question, answer) in enumerate(turns):
        segments += [Segment("USER: " if i else " USER: ", "template"), Segment(_joined(question), "user")]
        segments += [Segment(" ASSISTANT: ", "template"), *_answer(tokenizer, answer)]
    return segments


def _llama2_chat(tokenizer, messages):
    """Llama-2-chat as in Meta's reference code: BOS before every turn, questions stripped.

    Meta's space between answer and EOS is left out: it would be a token that no answer text contains.
    """
    system, turns = _turns(messages, "llama2-chat")
    segments = []
    for i, (question, answer) in enumerate(turns):
        text = _joined(question)
        if system is not None and i == 0:
            text = f"<<SYS>>\n{system}\n<</SYS>>\n\n{text}"
        bos = tokenizer.bos_token if i and tokenizer.add_bos else ""
        segments += [Segment(f"{bos}[INST] ", "template"), Segment(text.strip(), "user")]
        segments += [Segment(" [/INST] ", "template"), *_answer(tokenizer, answer)]
    return segments


def _mistral_instruct(tokenizer, messages):
    """Mistral-7B-Instruct v0.1; a system message goes before the first question, as in Mistral's reference code."""
    system, turns = _turns(messages, "mistral-instruct")
    segments = []
    for i, (question, answer) in enumerate(turns):
        before = f"{system}\n\n" if system and i == 0 else ""
        segments += [Segment("[INST] ", "template"), Segment(before + _joined(question), "user")]
        segments += [Segment(" [/INST] ", "template"), *_answer(tokenizer, answer)]
    return segments


def _chatml(tokenizer, messages):
    """ChatML; no system message unless one is given."""
    segments = []
    for message in messages:
        segments += [Segment(f"<|im_start|>{message['role']}\n", "template")]
        if message["role"] == "assistant":
            segments += [*_answer(tokenizer, message["content"], end="<|im_end|>"), Segment("\n", "template")]
        else:
            segments += [Segment(_joined(message), "user"), Segment("<|im_end|>\n", "template")]
    return segments


def _checkpoint(tokenizer, messages):
    """The checkpoint's own chat template, rendered with a mark in place of each content and cut at the marks.

    So a content cannot write special tokens, and need not go through the template. A template that strips contents is
    recognised by the blank that it strips from a mark. Where it ends an answer with no special token, EOS is added.
    """
    marks = [{"role": m["role"], "content": f"{_BLANK}mark{i}mark{_BLANK}"} for i, m in enumerate(messages)]
    rendered = _run_template(tokenizer, marks)
    pieces = re.split(f"({_BLANK}?)mark([0-9]+)mark({_BLANK}?)", rendered)
    if sorted(pieces[2::4], key=int) != [str(i) for i in range(len(messages))]:
        raise UserError(
            f"{tokenizer.folder}: its chat template drops, repeats or changes a message's content; choose another style"
        )
    segments = [Segment(pieces[0], "template")]
    for left, i, right, template in zip(pieces[1::4], pieces[2::4], pieces[3::4], pieces[4::4], strict=True):
        message = messages[int(i)]
        text = _joined(message)
        text = text if left else text.lstrip()
        text = text if right else text.rstrip()
        if message["role"] == "assistant":
            end, template = _cut_end(tokenizer, template)
            segments += [Segment(text, "answer"), Segment(end, "end")]
        else:
            segments.append(Segment(text, "user"))
        segments.append(Segment(template, "template"))
    return segments


STYLES = {
    "plain": _plain,
    "alpaca": _alpaca,
    "dolly": _dolly,
    "vicuna": _vicuna,
    "llama2-chat": _llama2_chat,
    "mistral-instruct": _mistral_instruct,
    "chatml": _chatml,
    "checkpoint": _checkpoint,
}

_BLANK = "\u2003"  # an em space: strip() takes it, and no template writes it


def _turns(messages, style, system=True, many=True):
    """(system text or None, [(user message, answer text), …]) for the styles that are made of such turns."""
    first = messages[0]["content"] if messages[0]["role"] == "system" else None
    rest = messages if first is None else messages[1:]
    if first is not None and not system:
        raise UserError(f"prompt style {style} has no place for a system message: leave it out or choose another style")
    roles = [message["role"] for message in rest]
    if roles != ["user", "assistant"] * (len(rest) // 2) or not rest:
        raise UserError(f"prompt style {style}: user and assistant must take turns, after at most one system message")
    if len(rest) > 2 and not many:
        raise UserError(f"prompt style {style} has one question and one answer: choose another for longer dialogs")
    return first, [(rest[i], rest[i + 1]["content"]) for i in range(0, len(rest), 2)]


def _joined(message):
    """A message's content with its input, if it has one, as a paragraph of its own."""
    return message["content"] + ("\n\n" + message["input"] if message.get("input") else "")


def _answer(tokenizer, text, end=None):
    """An answer and its end: the token `end` if it is one of the vocabulary's added tokens, otherwise EOS."""
    known = end is not None and isinstance(tokenizer.split(end, special=True)[0], int)
    return [Segment(text, "answer"), Segment(end if known else tokenizer.eos_token, "end")]


def _cut_end(tokenizer, template):
    """(what ends the answer, the rest) of the template text after an answer."""
    blank = len(template) - len(template.lstrip())
    found = tokenizer.template_pattern.match(template, blank)
    if not found or found[0].strip() == tokenizer.bos_token:
        return tokenizer.eos_token, template
    return template[: found.end()], template[found.end() :]


def _run_template(tokenizer, messages):
    """The text of the checkpoint's chat template for `messages`."""
    if not tokenizer.chat_template:
        others = ", ".join(style for style in STYLES if style != "checkpoint")
        raise UserError(f"{tokenizer.folder}: no chat template in tokenizer_config.json; choose one of {others}")
    turns = tuple((message["role"], message["content"]) for message in messages)
    text, problem = render(tokenizer.chat_template, turns, tuple(tokenizer.special_tokens.items()))
    if problem:
        raise UserError(f"{tokenizer.folder}: its chat template fails on these messages: {problem}")
    return text
