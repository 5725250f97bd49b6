"""Rows of preference pairs: the prompt apart from the chosen and the rejected answer, whatever form they came in.

- Explicit, as TRL calls it: `prompt`, and two answers that follow it. Each is text, or a list of messages; an answer
  may be one message.
- Implicit: both answers are whole conversations, whose common beginning is the prompt (Anthropic's hh-rlhf, as
  transcripts of "Human:" and "Assistant:"; UltraFeedback's lists of messages), or whole texts. A `prompt` beside them
  says the same once more, and is checked.
"""

import re
from collections.abc import Sequence

from preparation.columns import is_template, text_of
from preparation.dialects import conversation
from preparation.reading import BadRow, Row
from preparation.shapes import SHAPES, Columns, how_to_ignore

ANSWERS = ("chosen", "rejected")
CONVERSATIONS = {parts["messages"] for parts in SHAPES.values() if "messages" in parts}
SPEAKER = re.compile(r"(?:^|\n\n)\s*(Human|Assistant):")  # hh-rlhf's
ROLES = {"Human": "user", "Assistant": "assistant"}


def take_apart(row: Row, data: dict, columns: Columns) -> tuple[dict, dict[str, str], list[str]]:
    """A row of a pair and its fields in the explicit form, and what is to be counted of it. Raises BadRow.

    data: the row's columns; those that come out have the prompt and the answers in the form that
    `records._question_and_answer` reads. columns: what they are, the fields "chosen" and "rejected" among them.
    """
    fields = columns.fields
    names = {part: fields[part] for part in ("prompt", *ANSWERS) if part in fields}
    values = {part: _value(row, data, name) for part, name in names.items()}
    prompt, answers = values.get("prompt"), [values[part] for part in ANSWERS]
    _check_repeated(row, data, columns, answers[0])
    counted = []
    if all(map(_is_transcript, answers)):
        prompt, answers = _asked(prompt) if _is_transcript(prompt) else prompt, [_turns(text) for text in answers]
        counted.append("that are transcripts")
    elif _is_transcript(prompt) and all(isinstance(answer, str) for answer in answers):
        prompt, answers = _asked(prompt), [answer.strip() for answer in answers]
        counted.append("that are transcripts")
    if all(isinstance(answer, list) for answer in answers):
        prompt, answers = _split_conversations(prompt, answers, names)
    elif prompt is None:
        prompt, answers = _split_texts(answers, names)
    elif isinstance(prompt, str) and prompt.strip() and all(str(answer).startswith(prompt) for answer in answers):
        counted.append("whose two answers begin with the prompt")
    # Under names that are columns', for messages that name them; a template is no such name.
    places = {part: part if is_template(names.get(part, "{")) else names[part] for part in ("prompt", *ANSWERS)}
    values = dict(zip(places.values(), (prompt, *answers), strict=True))
    return {**data, **values}, {**fields, **places}, counted


def common_beginning(left: Sequence, right: Sequence) -> int:
    """How many elements two sequences have in common at their start."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def _value(row, data, name):
    """The text in a column or of a template; or a list of messages, as `dialects.conversation` has it."""
    value = None if is_template(name) else data.get(name)
    if isinstance(value, dict):
        data = {name: [value]}
    return conversation(row, data, name) if isinstance(value, list | dict) else text_of(data, name)


def _check_repeated(row, data, columns, chosen):
    """Raise BadRow for a column with a conversation that is not the chosen one once more, as UltraFeedback has it."""
    for name in columns.unused:
        if name.lower() in CONVERSATIONS and _value(row, data, name) != chosen:
            raise BadRow(
                f"field {name!r} is not the conversation in {columns.fields['chosen']!r}: which of them is meant?"
                + how_to_ignore(name)
            )


def _is_transcript(value):
    return isinstance(value, str) and value.lstrip().startswith("Human:") and "\n\nAssistant:" in value


def _turns(text):
    """The messages of a transcript."""
    _, *parts = SPEAKER.split(text)
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": ROLES[speaker], "content": said.strip()} for speaker, said in pairs]


def _asked(text):
    """The messages of a transcript that is a prompt: without the answer that is to come."""
    *turns, last = _turns(text)
    return turns if last == {"role": "assistant", "content": ""} else [*turns, last]


def _split_conversations(prompt, answers, names):
    """(prompt, answers) where the answers are lists of messages that may begin with the prompt's."""
    if isinstance(prompt, list) and prompt != answers[0]:
        shared = len(prompt)
        if all(answer[:shared] == prompt and len(answer) > shared for answer in answers):
            return prompt, [answer[shared:] for answer in answers]
        return prompt, answers
    if isinstance(prompt, str):
        questions = [_first_question(answer) for answer in answers]
        if questions == [None, None]:
            return prompt, answers
        if questions != [prompt, prompt]:
            raise BadRow(
                f"field {names['prompt']!r} is not the first message of the user in {names['chosen']!r} and "
                f"{names['rejected']!r}{how_to_ignore(names['prompt'])}"
            )
    shared = min(common_beginning(*answers), *(len(answer) - 1 for answer in answers))
    if not shared:
        both = f"{names['chosen']!r} and {names['rejected']!r}"
        raise BadRow(f"fields {both} begin with no message in common, which would be the prompt")
    return answers[0][:shared], [answer[shared:] for answer in answers]


def _first_question(messages):
    """The content of the user's message before any answer; None without one."""
    for message in messages:
        if message.get("role") == "assistant":
            return None
        if message.get("role") == "user":
            return message.get("content")
    return None


def _split_texts(answers, names):
    """(prompt, answers) where both answers are whole texts: what they have in common, in whole words, is the prompt.

    The white space after it belongs to the answers, as in TRL; an answer has at least a character.
    """
    if not all(isinstance(answer, str) for answer in answers):
        raise BadRow(f"fields {names['chosen']!r} and {names['rejected']!r} must both be text, or both messages")
    shared = min(common_beginning(*answers), *(max(0, len(answer) - 1) for answer in answers))
    while shared and not all(answer[shared].isspace() for answer in answers):
        shared -= 1
    return answers[0][:shared], [answer[shared:] for answer in answers]
