"""What a row becomes: fields by name and by template, multiple choice whose letter follows, and the key."""

import json
import pickle
import random
import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preparation.columns import parse_template
from preparation.mixture import Source
from preparation.reading import BadRow, Row
from preparation.records import to_record

CHOICES = {"prompt": "question", "choices": ["a", "b", "c"], "label": "right"}


def record(data, fields=None, seed=1, number=1, **settings):
    source = Source("test", [], fields=fields, **settings)
    from_json = to_record(source, Row("folder/rows.jsonl", number, json.dumps(data).encode()), seed)
    assert from_json == to_record(source, Row("rows.jsonl", number, data), seed)  # as bytes, as a dict
    del from_json["facts"]
    return from_json


def question(data, fields, **settings):
    return record(data, fields, **settings)["messages"][0]["content"]


def test_the_usual_names():
    for prompt, answer in (("instruction", "output"), ("prompt", "completion"), ("question", "answer")):
        assert record({prompt: "a", answer: "b", "other": 5}) == {
            "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "key": "a",
        }  # fmt: skip
    with_input = record({"instruction": "a", "input": "b", "output": "c"})
    assert with_input["messages"][0] == {"role": "user", "content": "a", "input": "b"} and with_input["key"] == "a\nb"
    assert record({"instruction": "a", "input": "", "output": "c"}) == record({"instruction": "a", "output": "c"})


def test_a_dialog_is_taken_as_it_is():
    turns = [("system", "s"), ("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]
    messages = [{"role": role, "content": text} for role, text in turns]
    messages[1]["input"] = "i1"
    assert record({"messages": messages, "question": "x"}) == {"messages": messages, "key": "s\nq1\ni1\na1\nq2"}
    assert record({"talk": messages}, {"messages": "talk"})["messages"] == messages
    assert record({"messages": messages[:4]}) == {"messages": messages[:3], "key": "s\nq1\ni1"}


def test_fields_by_name_and_by_template():
    data = {"a": "A", "b": "B", "n": 3, "x": 0.5, "odd name: x.y!": "odd", "": "?"}
    fields = {"prompt": "{a} {{{b}}} {n}/{x} {odd name: x.y!}", "input": "b", "answer": "{a}"}
    assert record(data, fields)["messages"] == [
        {"role": "user", "content": "A {B} 3/0.5 odd", "input": "B"}, {"role": "assistant", "content": "A"},
    ]  # fmt: skip
    assert "input" not in record({"a": "", "b": "b"}, {"prompt": "b", "input": "{a}", "answer": "b"})["messages"][0]


@given(st.lists(st.tuples(st.text("ab{}"), st.sampled_from(["col", "x y", "{"])), max_size=6))
def test_a_template_says_back_what_was_escaped(parts):
    values = {"col": "1", "x y": "2", "{": "3"}
    parts = [(text, column) for text, column in parts if column != "{"]
    template = "".join(text.replace("{", "{{").replace("}", "}}") + f"{{{column}}}" for text, column in parts)
    expected = "".join(text + values[column] for text, column in parts)
    assert "".join(values[c] if c else text for text, c in parse_template(template)) == expected


@pytest.mark.parametrize("template", ["{", "}", "a{b", "a}b", "{}", "{a{b}", "{a}}", "{{a}"])
def test_a_broken_template_is_refused(template):
    with pytest.raises(ValueError, match="brace"):
        parse_template(template)


# Each: the row, the fields, the complaint.
BAD = [
    ({"a": "b"}, {"prompt": "q", "answer": "a"}, "field 'q' is missing"),
    ({"a": "b"}, {"prompt": "{a} {q}", "answer": "a"}, "field 'q' is missing"),
    ({"a": "b"}, {"prompt": "a", "input": "i", "answer": "a"}, "field 'i' is missing"),
    ({"a": "b"}, {"messages": "m"}, "field 'm' is missing"),
    ({"a": 1}, {"prompt": "a", "answer": "a"}, "field 'a' must be text, it is a number"),
    ({"a": True}, {"prompt": "{a}", "answer": "a"}, "field 'a' must be text or a number, it is true or false"),
    ({"a": None}, {"prompt": "{a}", "answer": "a"}, "field 'a' must be text or a number, it is null"),
    ({"a": ["x"]}, {"prompt": "{a}", "answer": "a"}, "field 'a' must be text or a number, it is a list"),
    ({"a": 1e999}, {"prompt": "{a}", "answer": "a"}, "field 'a' must be text or a number, it is Infinity"),
    ({"q": "", "c": "x, y", "l": 0}, {"prompt": "q", "choices": "c", "label": "l"}, "'c' must be a list of choices"),
    ({"q": "", "c": ["x", 5], "l": 0}, {"prompt": "q", "choices": "c", "label": "l"}, "'c' must hold texts"),
    ({"q": "", "c": ["x"], "l": 0}, {"prompt": "q", "choices": "c", "label": "l"}, "1 choice: there must be from 2"),
    ({"q": "", "c": ["x"] * 27, "l": 0}, {"prompt": "q", "choices": "c", "label": "l"}, "27 choices: there must"),
    ({"question": "", "a": "x", "b": "y", "right": 0}, CHOICES, "field 'c' is missing"),
    *[({"question": "", "a": "x", "b": "y", "c": 5, "right": 0}, CHOICES, "field 'c' must be text")],
    *[({"question": "", "a": "x", "b": "y", "c": "z", "right": right}, CHOICES, f"field 'right': {right!r} is none")
      for right in (3, -1, "3", "D", "w", "", "-1", "²", "a", "1.0")],
    *[({"question": "", "a": "x", "b": "y", "c": "z", "right": right}, CHOICES, "field 'right' must be the right")
      for right in (None, True, 1.0, ["x"])],
    ({"question": "", "a": "1", "b": "0", "c": "2", "right": "1"}, CHOICES, "field 'right': '1' may mean several"),
    ({"question": "", "a": "x", "b": "A", "c": "y", "right": "A"}, CHOICES, "field 'right': 'A' may mean several"),
    ({"question": "", "a": "x", "b": "x", "c": "y", "right": "x"}, CHOICES, "field 'right': 'x' may mean several"),
]  # fmt: skip


@pytest.mark.parametrize("data, fields, expected", BAD)
def test_a_row_that_does_not_fit_its_fields(data, fields, expected):
    with pytest.raises(BadRow, match=re.escape(expected)):
        to_record(Source("test", [], fields=fields), Row("rows", 1, data), 1)


def test_a_bad_row_is_raised_as_it_was_read_in_another_process_too():
    row = pickle.loads(pickle.dumps(Row("rows", 1, BadRow("what was wrong"), "item")))
    with pytest.raises(BadRow, match="^what was wrong$"):
        to_record(Source("test", []), row, 1)
    assert row.place == "rows, item 1"


def test_long_names_do_not_fill_the_screen():
    data = {f"{'long' * 100}{i}": 1 for i in range(100)}
    with pytest.raises(BadRow) as caught:
        record(data)
    assert len(str(caught.value)) < 400


# ------------------------------------------------------------------------------------------------ multiple choice


def parse_choices(text):
    """The choices that a prompt lists, by letter."""
    return dict(re.findall(r"^([A-Z])\. (.*)$", text, re.MULTILINE))


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("by", ["index", "digits", "letter", "text"])
def test_the_letter_follows_the_shuffled_choices(listed, by):
    orders = set()
    for number in range(60):
        choices = [f"choice {random.random()}" for _ in range(random.randint(3, 6))]
        right = random.randrange(len(choices))
        label = {"index": right, "digits": str(right), "letter": string.ascii_uppercase[right], "text": choices[right]}
        data = {"question": "which?", "right": label[by]}
        data |= {"all": choices} if listed else {f"c{i}": choice for i, choice in enumerate(choices)}
        names = "all" if listed else [f"c{i}" for i in range(len(choices))]
        fields = {"prompt": "question", "choices": names, "label": "right"}
        got = record(data, fields, number=number)
        asked, answered = (message["content"] for message in got["messages"])
        shown = parse_choices(asked)
        assert asked.startswith("which?\nA. ") and sorted(shown.values()) == sorted(choices)
        assert list(shown) == list(string.ascii_uppercase[: len(choices)])
        assert shown[answered] == choices[right]
        assert list(parse_choices(got["key"]).values()) == choices  # in their original order
        orders.add(tuple(choices.index(choice) for choice in shown.values()))
        fixed = record(data, fields, number=number, shuffle_choices=False)
        assert fixed["messages"][0]["content"] == fixed["key"] == got["key"]
        assert fixed["messages"][1]["content"] == string.ascii_uppercase[right]
    assert len(orders) > 10


def test_the_order_is_the_seeds_the_sources_and_the_rows():
    data = {"question": "which?", "all": [str(i) for i in range(9)], "right": 4}
    fields = {"prompt": "question", "choices": "all", "label": "right"}

    def order(seed=1, name="x", file="a/rows.jsonl", number=1):
        return to_record(Source(name, [], fields=fields), Row(file, number, data), seed)["messages"][0]["content"]

    assert order() == order(file="b/rows.jsonl")  # the folder is no part of it
    assert len({order(), order(seed=2), order(name="y"), order(file="other.jsonl"), order(number=2)}) == 5
    assert parse_choices(order()) == {
        "A": "3", "B": "8", "C": "2", "D": "6", "E": "1", "F": "4", "G": "7", "H": "5", "I": "0",
    }  # the same on every machine, in every release  # fmt: skip


def test_where_the_choices_and_the_answer_go():
    data = {"question": "which?", "a": "x", "b": "y", "c": "z", "right": "y"}
    same = dict(shuffle_choices=False)
    listed = "A. x\nB. y\nC. z"
    assert question(data, CHOICES, **same) == f"which?\n{listed}"
    assert (
        question(data, CHOICES | {"prompt": "{question} one of\n{choices}\n?"}, **same) == f"which? one of\n{listed}\n?"
    )
    with_input = record(data, CHOICES | {"input": "{choices}"}, **same)["messages"][0]
    assert with_input == {"role": "user", "content": "which?", "input": listed}
    for answer, expected in (("{letter}. {choice}", "B. y"), ("choice", "y"), ("{choice}: {question}", "y: which?")):
        assert record(data, CHOICES | {"answer": answer}, **same)["messages"][1]["content"] == expected
    for _ in range(20):
        got = record(data, CHOICES | {"answer": "{letter}. {choice}"}, seed=random.random())
        assert got["messages"][1]["content"] in got["messages"][0]["content"].splitlines()
        assert got["messages"][1]["content"].endswith(". y")
