"""The prompt style `checkpoint`: a conversation rendered whole by the checkpoint's own chat template.

A template looks into the contents: it may strip them, leave out earlier thinking, add an empty thought. So it gets the
real conversation, once for each answer with what comes before it (the prompt, with what begins an answer) and once with
the answer too. What the second has beyond the first is the answer, a target up to the token that ends it; a template
that marks its answers itself, with {% generation %}, is believed.

If the prompts and answers are all beginnings of the whole conversation's text, that is one sequence. Where a template
changes earlier turns, they are not. Then the answers that agree with the last one's text are in its sequence, and of
the others each group in one of its own: every answer is trained in the context in which the template would ask for it.

Thinking models such as DeepSeek-R1 have templates that drop the thought of every answer. There the thought is put back
where the model would write it (`continue_prompt`).
"""

import bisect
import contextlib
import functools
import json
import re
from collections import Counter
from typing import NamedTuple

from shell.cli import UserError
from text.chat_template import Render, Rendered, render
from text.messages import NO_CHARACTER, THINKING, Dialog, KeyRefused, change_texts, check_json, joined, target_numbers
from text.segments import Segment, break_special
from text.tokenizer import Tokenizer

OURS = ("messages", "tools", "add_generation_prompt")  # variables of a template that follow from the conversation
BEGUN = "\ufdd3"  # the content of an answer that is only to show where an answer begins
SWITCHES = re.compile("/(no_)?think")  # in a message: instructions to some templates, which take them out


def checkpoint_sequences(tokenizer: Tokenizer, dialog: Dialog, notes: Counter) -> list[list[Segment]]:
    """The sequences of a conversation, the one with the last answer last. UserError where the template drops anything.

    notes: counts what the template does to answers that a reader of the data should know of.
    """
    if dialog.open:
        return [_Template(tokenizer, dialog).prompt()]
    sequences = foreseen_sequences(tokenizer, dialog, notes) or rendered_sequences(tokenizer, dialog, notes)
    return [_segments(tokenizer, text, answers) for text, answers, _ in sequences]


class Answer(NamedTuple):
    """An answer as a template writes it. text: of the prompt and the answer, up to its end.

    spans: (start, stop, kind) of the stretches of the text that the model is to write. adds_end: no token ends it, so
    EOS is added. trained: whether it is a target.
    """

    text: str
    spans: list[tuple[int, int, str]]
    adds_end: bool
    trained: bool = False


class Sequence(NamedTuple):
    """A conversation's text up to one of its answers (number `last` of its messages), and the answers in it."""

    text: str
    answers: list[Answer]
    last: int


def rendered_sequences(tokenizer: Tokenizer, dialog: Dialog, notes: Counter) -> list[Sequence]:
    """The sequences of a conversation, found by rendering each prompt and each answer."""
    template, sequences = _Template(tokenizer, dialog), []
    left = target_numbers(dialog.messages)
    before = dialog.messages[: max(left, default=0)]
    others = [i for i, message in enumerate(before) if message["role"] == "assistant" and i not in left]
    answers = dict(zip(left, template.answers(left, notes), strict=True))
    answers = dict(sorted((answers | template.context(others)).items()))
    while left:
        last, text = left[-1], answers[left[-1]].text
        inside = {number: answer for number, answer in answers.items() if text.startswith(answer.text)}
        members = [answer._replace(trained=number in left) for number, answer in inside.items()]
        sequences.append(Sequence(text, members, last))
        left = [number for number in left if number not in inside]
    notes["conversations in parts, since the template changes earlier turns"] += len(sequences) > 1
    return sequences[::-1]


def foreseen_sequences(tokenizer: Tokenizer, dialog: Dialog, notes: Counter) -> list[Sequence] | None:
    """`rendered_sequences` of plain messages in half the time or less; None where it cannot be had so.

    Where a template treats all contents alike, its text for one conversation follows from that for another with as many
    messages. So the sequences are found once, with marks for contents. Then only the text of each is rendered, and is
    taken if it is as foreseen, so it is always the template's.
    """
    messages = dialog.messages
    if not all(
        message.keys() <= {"role", "content", "weight"} and _is_plain(message["content"]) for message in messages
    ):
        return None
    shape = tuple((message["role"], message.get("weight")) for message in messages)
    values = json.dumps([dialog.tools, dialog.template_args])
    outline = _outline(tokenizer, tokenizer.chat_template, tokenizer.tool_template, values, shape)
    if not outline:
        return None
    outlines, counted = outline
    template = _Template(tokenizer, dialog)
    texts = template.render([Render(one.last + 1) for one in outlines])
    sequences = []
    for one, rendered in zip(outlines, texts, strict=True):
        text, ends = one.text[0], [0]
        for message, literal in zip(template.messages, one.text[1:], strict=False):
            ends.append(len(text) + len(message["content"]))
            text += message["content"] + literal
        if not rendered.text.startswith(text):
            return None
        places = [[(ends[i] + a, ends[j] + b, kind) for (i, a), (j, b), kind in answer.spans] for answer in one.answers]
        answers = [answer._replace(spans=spans) for answer, spans in zip(one.answers, places, strict=True)]
        sequences.append(Sequence(text, answers, one.last))
    notes.update(counted)
    return sequences


def _is_plain(content):
    """Whether templates have no reason to treat a content otherwise than another."""
    return bool(content) and content == content.strip() and not _SPECIAL_CONTENT.search(content)


_SPECIAL_CONTENT = re.compile("think>|/(?:no_)?think|<tool|mark[0-9]+content")


@functools.lru_cache(4096)
def _outline(tokenizer, chat_template, tool_template, values, shape):
    """(the sequences of any plain conversation of this shape, what is to be noted); None if there is no such rule.

    The text of each is the list of what stands between contents. A place in it is (content before it, characters after
    that). chat_template, tool_template: the tokenizer's now.
    """
    messages = [{"role": role, "content": f"mark{i}content", "weight": w} for i, (role, w) in enumerate(shape)]
    tools, template_args = json.loads(values)
    notes, outlines = Counter(), []
    try:
        sequences = rendered_sequences(tokenizer, Dialog(messages, tools, template_args), notes)
    except UserError:
        return None
    for text, answers, last in sequences:
        marks = list(re.finditer("mark([0-9]+)content", text))
        if [int(mark[1]) for mark in marks] != list(range(last + 1)):
            return None
        ends = [0, *(mark.end() for mark in marks)]

        def place(position, ends=ends):
            number = bisect.bisect_right(ends, position) - 1
            return number, position - ends[number]

        spans = [[(place(a), place(b), kind) for a, b, kind in answer.spans] for answer in answers]
        relative = [answer._replace(text="", spans=one) for answer, one in zip(answers, spans, strict=True)]
        outlines.append(Sequence(re.split("mark[0-9]+content", text), relative, last))
    return outlines, notes


def _segments(tokenizer, text, answers):
    """The segments of a text up to the end of the last of these answers."""
    segments, place = [], 0
    for answer in answers:
        for start, stop, kind in answer.spans:
            segments += [Segment(text[place:start], "template"), Segment(text[start:stop], kind, answer.trained)]
            place = stop
        if answer.adds_end:
            segments.append(Segment(tokenizer.eos_token, "end", answer.trained))
    return segments


class _Template:
    """A conversation and the template that renders it."""

    def __init__(self, tokenizer, dialog):
        self.tokenizer, self.begun = tokenizer, None
        self.source = (dialog.tools and tokenizer.tool_template) or tokenizer.chat_template
        self.where = f"{tokenizer.folder}: its chat template"
        messages, tools = change_texts([dialog.messages, dialog.tools], functools.partial(_safe, tokenizer))
        if dialog.open and messages[-1]["role"] == "assistant":
            *messages, self.begun = messages
        self.messages, self.values = _as_templates_take(messages), {**dialog.template_args, "tools": tools or None}
        check_json(dialog.template_args, "the variables of the chat template")
        for name in dialog.template_args:
            if name in OURS or name in tokenizer.special_tokens:
                raise UserError(
                    f"the chat template's variable {name!r} follows from the conversation: it cannot be set"
                )
            if not name or not re.search(rf"\b{re.escape(name)}\b", self.source):
                raise UserError(f"{self.where} has no variable {name!r}")
        for number, message in enumerate(self.messages):
            if "tool_calls" in message and "tool_calls" not in self.source:
                raise self.drops("tool_calls", number)

    def render(self, wanted):
        """A `Rendered` for each of the wanted parts of the conversation."""
        texts, problem = render(self.source, self.messages, wanted, self.tokenizer.special_tokens, **self.values)
        if problem:
            raise UserError(f"{self.where} fails on these messages: {problem}")
        return texts

    def wanted_prompt(self, count):
        """What to render for a prompt of the first `count` messages, with what begins an answer."""
        if "add_generation_prompt" in self.source:
            return Render(count, generate=True)
        return Render(count, one_more={"role": "assistant", "content": BEGUN})

    def cut_prompt(self, rendered, count):
        """The prompt in what was rendered for one: all, or in a template that begins no answers what is before one.

        A blank that the template writes between the two is the answer's, as tokens have it.
        """
        if "add_generation_prompt" in self.source:
            return rendered
        head, found, _ = rendered.text.partition(BEGUN)
        if not found:
            raise UserError(f"{self.where} drops or changes the answers; choose another style")
        if count and not head.endswith(self.messages[count - 1].get("content") or " "):
            head = head.rstrip(" ")
        return Rendered(head, [span for span in rendered.generated if span[1] <= len(head)])

    def prompt(self):
        """The segments of a conversation whose last answer is still to be written, or to be continued."""
        count = len(self.messages)
        [rendered] = self.render([self.wanted_prompt(count)])
        text = self.cut_prompt(rendered, count).text
        self.check_shown(text, count)
        numbers = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        earlier = [answer for answer in self.context(numbers).values() if text.startswith(answer.text)]
        segments = _segments(self.tokenizer, text, earlier)
        rest = text[len(earlier[-1].text) if earlier else 0 :]
        return [*segments, Segment(rest, "template"), Segment(self.begun_text(text), "answer")]

    def begun_text(self, prompt):
        """The text of the answer that is to be continued, "" if none has begun."""
        message = self.begun or {"content": ""}
        if message.get("tool_calls"):
            raise UserError("the last message, which is to be continued, cannot have tool_calls")
        thinking, content = message.get("thinking"), message["content"]
        if not thinking:
            return content
        return _opening(prompt) + thinking + (f"\n</think>\n\n{content}" if content else "")

    def context(self, numbers):
        """By its number each answer of these, none of them a target, that can be told from the text around it.

        Like targets they are segments of their own, with an end where the template writes none: so a conversation has
        the same tokens in training and generating. What a template drops of them is not refused.
        """
        found = {}
        for number in numbers:
            with contextlib.suppress(UserError):
                [found[number]] = self.answers([number])
        return found

    def answers(self, numbers, notes=None):
        """An `Answer` for each message with one of these numbers. notes: given where they are to be targets."""
        if not numbers:
            return []
        rendered = self.render([*map(self.wanted_prompt, numbers), *(Render(number + 1) for number in numbers)])
        prompts, wholes = map(self.cut_prompt, rendered, numbers), rendered[len(numbers) :]
        answers = [self.answer(*one, notes) for one in zip(numbers, prompts, wholes, strict=True)]
        if notes is not None:
            self.check_shown(answers[-1].text, numbers[-1] + 1)
            self.check_thinking(numbers[-1])
            notes["answers beside the targets that the template leaves out or changes"] += sum(
                not all(_is_in(part, answers[-1].text) for part in _thought(message))
                for number, message in enumerate(self.messages[: numbers[-1]])
                if message["role"] == "assistant" and number not in numbers
            )
        return answers

    def answer(self, number, prompt, whole, notes):
        """The `Answer` that message `number` is. whole: the conversation up to it."""
        message, start = self.messages[number], len(prompt.text)
        text, changed = self.continue_prompt(number, prompt.text, whole.text)
        notes = Counter() if notes is None else self.check_answer(number, text[start:]) or notes
        notes[f"answers {changed}"] += bool(changed)
        if spans := () if changed else whole.generated[len(prompt.generated) :]:
            stop = spans[-1][1]
            notes["answers whose end is not among the template's marks"] += not self.find_end(message, text[:stop])
            return Answer(text[:stop], [(*span, "mark") for span in spans], False)
        if end := self.find_end(message, text[start:]):
            begin, stop = start + end[0], start + end[1]
            return Answer(text[:stop], [(start, begin, "mark"), (begin, stop, "end")], False)
        notes["answers to which an end token was added"] += 1
        stop = start + self.length_without_end(message, text[start:])
        return Answer(text[:stop], [(start, stop, "mark")], True)

    @staticmethod
    def length_without_end(message, text):
        """The characters of an answer's text, which no token ends, up to where the template goes on."""
        if message.keys() & {"tool_calls", *THINKING}:
            return len(text.rstrip())
        content = next((c for c in (message["content"], message["content"].strip()) if c in text), text.rstrip())
        return text.index(content) + len(content) if content else 0

    def find_end(self, message, text):
        """(start, stop) of the token that ends an answer's text, with the blanks that it swallows; None without one.

        Of several at the end, as where the whole conversation has an end of its own, it is the one after the content.
        """
        stripped, content, ends = text.rstrip(), message.get("content", "").strip(), self.tokenizer.end_texts
        if not stripped.endswith(ends) or (content and stripped.endswith(content)):
            return None
        start = len(stripped) - max(len(end) for end in ends if stripped.endswith(end))
        if content and "tool_calls" not in message and (place := text.rfind(content, 0, start)) >= 0:
            after = place + len(content)
            after += len(text[after:]) - len(text[after:].lstrip())
            start = after if text.startswith(ends, after) else start
        return start, self.tokenizer.template_pattern.match(text, start).end()

    def continue_prompt(self, number, prompt, whole):
        """(the text of the prompt and the answer after it, what is not as the template writes it, "" for nothing).

        A template may begin answers otherwise than it writes them: with blanks; with "<think>" where its answers have
        no thought, or it drops their thoughts; after earlier turns that it changes when the answer is there (GPT-OSS
        drops the thoughts before it). There the answer follows the prompt, thought and all.
        """
        message = self.messages[number]
        common = prompt if whole.startswith(prompt) else _common_start(prompt, whole)
        opened, own = prompt[len(common) :], whole[len(common) :]
        thought, rest = _thought(message)
        dropped = bool(thought) and thought not in own
        if dropped and prompt.rstrip().endswith("</think>"):  # its variables turn thinking off
            raise self.drops("thinking", number)
        if opened.strip() == "<think>" or (dropped and not opened.strip() and "</think>" in self.source):
            text = prompt + _opening(prompt) + (thought if dropped else "") + "\n</think>\n\n" + own.lstrip()
            return text, "with a thought that the template leaves out"
        if not opened:
            return whole, ""
        if not opened.strip() and own.lstrip().startswith(rest or thought or "<"):
            return prompt + own.lstrip(), "that follow other blanks than in the template"
        [before] = self.render([Render(number)])
        begin = prompt[len(before.text) :] if prompt.startswith(before.text) else ""
        places = [found.end() for found in re.finditer(re.escape(begin), whole)] if begin.strip() else []
        if not places:
            raise UserError(f"{self.where} begins an answer in another way than it writes one; choose another style")
        # Of several the one before which the text is most like the history.
        place = max(places, key=lambda end: _same_end(whole[: end - len(begin)], before.text))
        return prompt + whole[place:], "after which the template changes earlier turns"

    # -------------------------------------------------------------------------------------------- is anything dropped?

    def check_shown(self, text, count):
        """Raise UserError unless a text has all of the first `count` messages that the template must show."""
        messages = self.messages[:count]
        values = json.dumps({**self.values, "tools": bool(self.values["tools"])})
        special_tokens = tuple(self.tokenizer.special_tokens.items())
        missing = _missing(self.source, special_tokens, values, tuple(map(_shape, messages)))
        for number, key in sorted(missing):
            if number >= 0:
                raise self.drops(key, number)
            raise KeyRefused(f"{self.where} has no place for tools; choose another style", "tools")
        for number, message in enumerate(messages):
            if message["role"] != "assistant" and not _is_in(message["content"], text):
                raise self.drops("content", number)

    def check_answer(self, number, text):
        """Raise UserError unless an answer's text has the message's content and calls."""
        message = self.messages[number]
        for part, key in zip(_thought(message), ("thinking", "content"), strict=True):
            if not _is_in(part, text):
                raise self.drops(key, number)
        for call in message.get("tool_calls", ()):
            if call["function"]["name"] not in text:
                raise self.drops("tool_calls", number)

    def check_thinking(self, count):
        """Raise UserError if there is thinking in the first `count` messages, and the template knows of none."""
        for number, message in enumerate(self.messages[:count]):
            if "thinking" in message and not any(name in self.source for name in ("</think>", *THINKING)):
                raise self.drops("thinking", number)

    def drops(self, key, number):
        """The error where the template does not show a key of a message."""
        role = self.messages[number]["role"]
        message = f"{self.where} drops or changes the {key} of message {number + 1} ({role}); choose another style"
        return UserError(message) if key == "content" else KeyRefused(message, key)


def _safe(tokenizer, text):
    """A text that has no special tokens, and none of the codes that stand for something here."""
    if not text.isascii() and (found := NO_CHARACTER.search(text)):
        raise UserError(f"the text holds {found[0]!a}, which is no character")
    return break_special(tokenizer, text)


def _as_templates_take(messages):
    """Messages as Hugging Face's templates expect them: calls in OpenAI's form, thinking under each of its names."""
    return [_as_template_takes(message) for message in messages]


def _as_template_takes(message):
    made = {key: value for key, value in message.items() if key not in ("input", "weight", "thinking", "tool_calls")}
    made["content"] = joined(message)
    if thinking := message.get("thinking"):
        made |= dict.fromkeys(THINKING, thinking)
    if calls := message.get("tool_calls"):
        if not made["content"]:  # transformers gives templates no key without a value
            del made["content"]
        made["tool_calls"] = [
            {"type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}
            | ({"id": call["id"]} if "id" in call else {})
            for call in calls
        ]
    return made


def _thought(message):
    """(thought, the rest) of an answer, without the blanks around them. It may be in the content: <think>…</think>."""
    content = message.get("content", "")
    if message.get("thinking"):
        return message["thinking"].strip(), content.strip()
    head, found, rest = content.rpartition("</think>")
    return (head.partition("<think>")[2] or head).strip() if found else "", rest.strip()


def _opening(prompt):
    """What opens a thought after a prompt: nothing, if the prompt has opened it."""
    return "" if prompt.rstrip().endswith("<think>") else "<think>\n"


def _common_start(one, other):
    same = next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
    return one[:same] if same is not None else min(one, other, key=len)


def _same_end(one, other):
    """The number of characters at the end in which two texts agree."""
    return len(_common_start(one[::-1], other[::-1]))


def _is_in(part, text):
    """Whether a text has a part: as it is, as JSON writes it, or without what switches thinking on and off."""
    part = (part or "").strip()
    if part in text:
        return True
    ways = (json.dumps(part)[1:-1], json.dumps(part, ensure_ascii=False)[1:-1], SWITCHES.sub("", part).strip())
    return any(way in text for way in ways)


def _shape(message):
    """What there is in a message, whatever it says: its role, the kind of content, its other keys."""
    content = message.get("content") and "text"
    return message["role"], content, *(key for key in ("name", "tool_call_id", "tool_calls") if key in message)


@functools.lru_cache(4096)
def _missing(source, special_tokens, values, shapes):
    """What a template leaves out of messages of such shapes, found by marks in the place of their texts.

    A set of (number of the message, key).
    values: its variables, as JSON; if there are tools among them, and it leaves them out, (-1, "tools"). Empty if it
    fails on such messages: then only the conversation itself shows what is dropped.
    """
    values, messages = json.loads(values), [_marked(number, shape) for number, shape in enumerate(shapes)]
    function = {"name": "mark-1tools", "description": "", "parameters": {"type": "object", "properties": {}}}
    values["tools"] = [{"type": "function", "function": function}] if values["tools"] else None
    wanted = [Render(len(messages))]
    if messages[-1]["role"] == "assistant":  # then what is missing in its prompt counts
        wanted.append(Render(len(messages) - 1, generate=True))
    results, problem = render(source, messages, wanted, dict(special_tokens), **values)
    if problem:
        return frozenset()
    mark = re.compile("mark(-?[0-9]+)(content|name|tool_calls|tools)")
    found = mark.findall(" ".join(result.text for result in results))
    missing = {*mark.findall(json.dumps([messages, values]))} - {*found}
    # A tool's name beside its result is for programs. The content of an answer that calls tools is looked at where the
    # answer is a target: a template may leave it out of what comes before.
    exempt = {"tool": "name", "assistant": "content"}
    missing = {(int(number), key) for number, key in missing}
    return frozenset((n, key) for n, key in missing if n < 0 or exempt.get(messages[n]["role"]) != key)


def _marked(number, shape):
    """A message of a shape, with marks such as "mark4name" for its texts."""
    role, content, *keys = shape
    call = {"type": "function", "id": f"{number:09d}", "function": {"name": f"mark{number}tool_calls", "arguments": {}}}
    values = {"name": f"mark{number}name", "tool_call_id": f"{number:09d}", "tool_calls": [call]}
    content = {} if content is None else {"content": f"mark{number}content" if content else ""}
    return {"role": role, **content, **{key: values[key] for key in keys}}
