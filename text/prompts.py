"""Prompt styles: training and inference render a conversation through the same function.

messages.py says what a conversation is made of. To add a prompt style: a function
`(tokenizer, dialog) -> list[Segment]` and a line in `STYLES`; a line in `FORMS` too if it shows more of a message than
its text; and for other programs a Jinja template in style_templates.py.
"""

import json
from collections import Counter

from shell.cli import UserError
from text.messages import Dialog, KeyRefused, check_last, joined
from text.segments import BROKEN, Encoded, Segment, encode_segments, joins_cleanly
from text.template_style import checkpoint_sequences
from text.tokenizer import Tokenizer


def encode_dialog(
    tokenizer: Tokenizer,
    messages: list[dict],
    style: str,
    tools: list[dict] = (),
    template_args: dict | None = None,
    notes: Counter | None = None,
) -> list[Encoded]:
    """A conversation for training: a sequence (ids, is_target), or several. UserError if the style cannot render it.

    messages, tools: in the form of messages.py. template_args: variables for the checkpoint's chat template. Several
    sequences come of a chat template that changes earlier turns: each has answers in the context in which the template
    would ask for them, the last one has the whole conversation. notes: counts what a reader of the data should know of.

    Every answer with a weight, and the token that ends it, is a target. A sequence starts with the tokenizer's
    `begin_ids` (one BOS, mostly); a style's own are not doubled. It stops after the last target. Answers are encoded
    apart from the prompt, so no token is part of both.
    """
    notes = Counter() if notes is None else notes
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    if last is None:
        raise UserError("there is no message of the assistant")
    messages = messages[: last + 1]
    sequences = _sequences(tokenizer, Dialog(messages, tools, template_args or {}), style, notes)
    if style == "checkpoint":
        different = not all(joins_cleanly(tokenizer, segments) for segments in sequences)
        notes["conversations with a token across an answer's beginning in other programs"] += different
    encoded = [encode_segments(tokenizer, segments) for segments in sequences]
    return [sequence for sequence in encoded if sequence.ids]  # none where nothing is a target


def encode_prompt(
    tokenizer: Tokenizer, messages: list[dict], style: str, tools: list[dict] = (), template_args: dict | None = None
) -> list[int]:
    """A conversation for inference: the ids that `encode_dialog` puts before the answer.

    It ends with a message of the user or a tool; or with one of the assistant, which the model is to continue.
    """
    return encode_segments(tokenizer, _open_segments(tokenizer, messages, style, tools, template_args)).ids


def prompt_text(tokenizer: Tokenizer, messages: list[dict], style: str, template_args: dict | None = None) -> str:
    """A conversation as for `encode_prompt`, as one text without BOS.

    For programs that take only text; there, a special token that a user writes out is a special token.
    """
    segments = _open_segments(tokenizer, messages, style, template_args=template_args)
    return "".join(segment.text for segment in segments).replace(BROKEN, "")


def stop_ids(tokenizer: Tokenizer, style: str) -> set[int]:
    """The ids that end an answer in this style: the checkpoint's EOS ids and the style's own end token."""
    dialog = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    [segments] = _sequences(tokenizer, Dialog(dialog), style, Counter())
    last = [segment.text for segment in segments if segment.is_answer][-1]
    ids = [part for part in tokenizer.split(last, special=True) if isinstance(part, int)]
    return tokenizer.eos_ids | set(ids[-1:])


def _open_segments(tokenizer, messages, style, tools=(), template_args=None):
    """The segments of a conversation up to where the model goes on."""
    check_last(messages, "user", "tool", "assistant")
    if messages[-1]["role"] != "assistant":
        messages = [*messages, {"role": "assistant", "content": ""}]
    [segments] = _sequences(tokenizer, Dialog(messages, tools, template_args or {}, open=True), style, Counter())
    in_thought = "thinking" in messages[-1] and not messages[-1]["content"]
    written = [i for i, segment in enumerate(segments) if segment.kind in ("answer", "mark")]
    if in_thought:  # which has not ended yet
        written = [i for i in written if segments[i].kind == "answer" and segments[i].text]
    return segments[: written[-1] + 1]


def _sequences(tokenizer, dialog, style, notes):
    """A list of segments for each sequence that a style makes of a conversation."""
    if style not in STYLES:
        raise UserError(f"unknown prompt style {style!r}: choose one of {', '.join(STYLES)}")
    if style == "checkpoint":
        if not tokenizer.chat_template:
            others = ", ".join(style for style in STYLES if style != "checkpoint")
            raise UserError(f"{tokenizer.folder}: no chat template in tokenizer_config.json; choose one of {others}")
        return checkpoint_sequences(tokenizer, dialog, notes)
    _check_forms(dialog, style)
    return [STYLES[style](tokenizer, dialog)]


def _check_forms(dialog, style):
    """Raise UserError for what a conversation has and a style has no form for."""
    if dialog.template_args:
        raise UserError(f"prompt style {style} has no variables, such as {next(iter(dialog.template_args))!r}")
    found = [("tools", "tools")] if dialog.tools else []
    for number, message in enumerate(dialog.messages, 1):
        if message["role"] == "tool":
            found.append(("tools", f"results of tools (message {number})"))
            continue
        found += [(form, f"{key} (message {number})") for key, form in FORM_OF_KEY.items() if key in message]
    for form, what in found:
        if form not in FORMS.get(style, ()):
            able = [name for name, forms in FORMS.items() if form in forms]
            key = what.partition(" (")[0]
            raise KeyRefused(f"prompt style {style} has no form for {what}: choose {' or '.join(able)}", key)


def _plain(tokenizer, dialog):
    """The question, unchanged, and the answer directly after it."""
    [(question, answer)] = _turns(dialog.messages, "plain", system=False, many=False)[1]
    return [Segment(joined(question), "user"), *_answer(tokenizer, answer)]


def _alpaca(tokenizer, dialog):
    """Stanford Alpaca; a system message takes the place of its first sentences."""
    return _instruction(
        tokenizer, dialog, "alpaca", "### Input:", ", paired with an input that provides further context"
    )


def _dolly(tokenizer, dialog):
    """Databricks' Dolly; a system message takes the place of its first sentences."""
    return _instruction(tokenizer, dialog, "dolly", "Input:", "", end="### End")


def _instruction(tokenizer, dialog, style, input_title, with_input, end=None):
    system, [(question, answer)] = _turns(dialog.messages, style, many=False)
    given = question.get("input")
    intro = f"Below is an instruction that describes a task{with_input if given else ''}. "
    intro += "Write a response that appropriately completes the request."
    return [
        Segment(system or intro, "user"),
        Segment("\n\n### Instruction:\n", "template"),
        Segment(question["content"], "user"),
        *([Segment(f"\n\n{input_title}\n", "template"), Segment(given, "user")] if given else []),
        Segment("\n\n### Response:\n", "template"),
        *_answer(tokenizer, answer, end=end),
    ]


def _vicuna(tokenizer, dialog):
    """Vicuna v1.1."""
    system, turns = _turns(dialog.messages, "vicuna")
    intro = "A chat between a curious user and an artificial intelligence assistant. "
    intro += "The assistant gives helpful, detailed, and polite answers to the user's questions."
    segments = [Segment(system or intro, "user")]
    for i, (question, answer) in enumerate(turns):
        segments += [Segment("USER: " if i else " USER: ", "template"), Segment(joined(question), "user")]
        segments += [Segment(" ASSISTANT: ", "template"), *_answer(tokenizer, answer)]
    return segments


def _llama2_chat(tokenizer, dialog):
    """Llama-2-chat as in Meta's reference code: BOS before every turn, questions stripped.

    Meta's space between answer and EOS is left out: it would be a token that no answer text contains.
    """
    system, turns = _turns(dialog.messages, "llama2-chat")
    segments = []
    for i, (question, answer) in enumerate(turns):
        text = joined(question)
        if system is not None and i == 0:
            text = f"<<SYS>>\n{system}\n<</SYS>>\n\n{text}"
        begin = tokenizer.begin_text if i else ""
        segments += [Segment(f"{begin}[INST] ", "template"), Segment(text.strip(), "user")]
        segments += [Segment(" [/INST] ", "template"), *_answer(tokenizer, answer)]
    return segments


def _mistral_instruct(tokenizer, dialog):
    """Mistral-7B-Instruct v0.1; a system message goes before the first question, as in Mistral's reference code.

    Tools, their calls and results are written as from v0.3 on, but all tools before the first question.
    """
    messages, segments = dialog.messages, []
    system, messages = _cut_system(messages)
    _check_turns(messages, "mistral-instruct")
    if dialog.tools:
        segments += [Segment("[AVAILABLE_TOOLS] ", "template"), Segment(_json(dialog.tools), "user")]
        segments.append(Segment("[/AVAILABLE_TOOLS]", "template"))
    for i, message in enumerate(messages):
        if message["role"] == "user":
            before = f"{system}\n\n" if system and i == 0 else ""
            segments += [Segment("[INST] ", "template"), Segment(before + joined(message), "user")]
            segments.append(Segment(" [/INST] ", "template"))
        elif message["role"] == "tool":
            result = {"content": message["content"]}
            result |= {"call_id": message["tool_call_id"]} if "tool_call_id" in message else {}
            segments += [Segment("[TOOL_RESULTS] ", "template"), Segment(_json(result), "user")]
            segments.append(Segment("[/TOOL_RESULTS] ", "template"))
        else:
            calls = message.get("tool_calls")
            marked = [("[TOOL_CALLS] ", "mark"), (_json(calls), "answer")] if calls else []
            segments += _answer(tokenizer, message, *marked)
    return segments


def _chatml(tokenizer, dialog):
    """ChatML; no system message unless one is given, or tools. These are written as Nous's Hermes has them."""
    segments = []
    for message in _with_tools(dialog, *TOOL_LISTS["chatml"]):
        name = f" name={message['name']}" if "name" in message else ""
        segments += [Segment(f"<|im_start|>{message['role']}", "template"), Segment(name, "user")]
        segments.append(Segment("\n", "template"))
        if message["role"] != "assistant":
            segments += [Segment(joined(message), "user"), Segment("<|im_end|>\n", "template")]
            continue
        calls = []
        for call in message.get("tool_calls", ()):
            text = _json({"name": call["name"], "arguments": call["arguments"]})
            between = "\n" if calls or message["content"] else ""
            calls += [(f"{between}<tool_call>\n", "mark"), (text, "answer"), ("\n</tool_call>", "mark")]
        segments += [*_answer(tokenizer, message, *calls, end="<|im_end|>"), Segment("\n", "template")]
    return segments


def _llama3(tokenizer, dialog):
    """Llama-3-Instruct: all but the answers stripped; calls of tools as from 3.1 on, one on a line."""
    segments, roles = [], {"tool": "ipython"}
    for message in _with_tools(dialog, *TOOL_LISTS["llama3"]):
        role = roles.get(message["role"], message["role"])
        segments.append(Segment(f"<|start_header_id|>{role}<|end_header_id|>\n\n", "template"))
        if message["role"] != "assistant":
            segments += [Segment(joined(message).strip(), "user"), Segment("<|eot_id|>", "template")]
            continue
        calls = message.get("tool_calls", ())
        lines = [_json({"name": call["name"], "parameters": call["arguments"]}) for call in calls]
        text = "\n".join([message["content"]] * bool(message["content"]) + lines)
        segments += _answer(tokenizer, {**message, "content": text}, end="<|eot_id|>")
    return segments


TOOL_LISTS = {  # of a style: the list of tools in the system message, them in the place of TOOLS; what is between two
    "chatml": (
        """These functions can be called:
<tools>
TOOLS
</tools>

A call is JSON with the name of a function and its arguments:
<tool_call>
{"name": "...", "arguments": {...}}
</tool_call>""",
        "\n",
    ),
    "llama3": (
        """These functions can be called:

TOOLS

A call is nothing but JSON with the name of a function and its parameters:
{"name": "...", "parameters": {...}}""",
        "\n\n",
    ),
}

STYLES = {
    "plain": _plain,
    "alpaca": _alpaca,
    "dolly": _dolly,
    "vicuna": _vicuna,
    "llama2-chat": _llama2_chat,
    "llama3": _llama3,
    "mistral-instruct": _mistral_instruct,
    "chatml": _chatml,
    "checkpoint": checkpoint_sequences,  # a list of segments for each sequence; it has all forms
}
FORMS = {  # what a style shows beside the texts of system, user and assistant
    "chatml": ("tools", "thinking", "name"),
    "llama3": ("tools",),
    "mistral-instruct": ("tools",),
    "checkpoint": ("tools", "thinking", "name"),
}
FORM_OF_KEY = {"tool_calls": "tools", "thinking": "thinking", "name": "name"}  # the form that a message's key needs


def _cut_system(messages):
    """(the text of a system message at the beginning, None without one; the other messages)."""
    if messages[0]["role"] == "system":
        return messages[0]["content"], messages[1:]
    return None, messages


def _turns(messages, style, system=True, many=True):
    """(system text or None, [(user message, answer), …]) for the styles that are made of such turns."""
    first, rest = _cut_system(messages)
    if first is not None and not system:
        raise UserError(f"prompt style {style} has no place for a system message: leave it out or choose another style")
    _check_turns(rest, style)
    if len(rest) > 2 and not many:
        raise UserError(f"prompt style {style} has one question and one answer: choose another for longer dialogs")
    return first, list(zip(rest[::2], rest[1::2], strict=True))


def _check_turns(messages, style):
    """Raise UserError unless user and assistant take turns, with the results of tools after an answer that calls them.

    messages: without a system message at the beginning.
    """
    follows = {"user": ("assistant",), "assistant": ("user", "tool"), "tool": ("calls", "tool")}
    before = "assistant"
    for message in [*messages, {"role": "user"}]:
        if before not in follows.get(message["role"], ()):
            raise UserError(
                f"prompt style {style}: user and assistant must take turns, after at most one system message"
            )
        before = "calls" if message.get("tool_calls") else message["role"]


def _with_tools(dialog, text, between):
    """The messages of a dialog, its tools written into the system message: in a text, in the place of TOOLS."""
    if not dialog.tools:
        return dialog.messages
    system, rest = _cut_system(dialog.messages)
    listed = text.replace("TOOLS", between.join(map(_json, dialog.tools)))
    return [{"role": "system", "content": f"{system}\n\n{listed}" if system else listed}, *rest]


def _json(value):
    """JSON as chat templates write it."""
    return json.dumps(value, ensure_ascii=False)


def _answer(tokenizer, message, *more, end=None):
    """An answer and its end: the token `end` if it is one of the vocabulary's added tokens, otherwise EOS.

    more: (text, kind) of what follows its content.
    """
    known = end is not None and isinstance(tokenizer.split(end, special=True)[0], int)
    texts = [(message["content"], "answer"), *more, (end if known else tokenizer.eos_token, "end")]
    if thinking := message.get("thinking"):
        texts = [("<think>\n", "mark"), (thinking, "answer"), ("\n</think>\n\n", "mark"), *texts]
    trained = message.get("weight") != 0
    return [Segment(text, kind, trained) for text, kind in texts if text or kind == "answer"]
