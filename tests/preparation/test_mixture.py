"""From --data and from a mixture's YAML to sources, and a line for everything that can be wrong with them."""

from pathlib import Path

import pytest

from preparation.mixture import Source, find_sources, read_mixture
from shell.cli import UserError


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A folder with files of every kind and a mixture's folder in it; the current one."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.csv", "c.json.gz", "data/2.jsonl", "data/1.jsonl", "data/10.jsonl", "data/deep/3.jsonl",
                 "mix/a.jsonl", "mix/only.tsv", "other.txt", "odd[1].jsonl", "folder/x.parquet"):  # fmt: skip
        Path(name).parent.mkdir(exist_ok=True, parents=True)
        Path(name).write_text("x")
    return tmp_path


def paths(*names):
    return [Path(name) for name in names]


def mixture(text):
    Path("mix/m.yaml").write_text(text, encoding="utf-8")
    return read_mixture("mix/m.yaml")


# ---------------------------------------------------------------------------------------------------- command line


def test_files_are_a_source_each():
    fields = {"prompt": "q", "answer": "{a}"}
    assert find_sources(["b.csv", "a.jsonl", "c.json.gz", "mix/a.jsonl"], fields) == [
        Source("b", paths("b.csv"), fields=fields), Source("a", paths("a.jsonl"), fields=fields),
        Source("c", paths("c.json.gz"), fields=fields), Source("a-2", paths("mix/a.jsonl"), fields=fields),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text, name, files",
    [
        ("data/*.jsonl", "data", ["data/1.jsonl", "data/10.jsonl", "data/2.jsonl"]),
        ("data/1*", "1", ["data/1.jsonl", "data/10.jsonl"]),
        ("data/**/*.jsonl", "data", ["data/1.jsonl", "data/10.jsonl", "data/2.jsonl", "data/deep/3.jsonl"]),
        ("*.json.gz", "data", ["c.json.gz"]),
        ("odd[1].jsonl", "odd", ["odd[1].jsonl"]),  # a name first, a glob second
        ("[ab].*", "data", ["a.jsonl", "b.csv"]),
    ],
)
def test_a_glob_is_a_source_of_its_files_sorted(text, name, files):
    assert find_sources([text]) == [Source(name, paths(*files))]


def test_datasets_by_name_and_folder():
    assert find_sources(["openai/gsm8k", "org/name/config", "org/name:test", "org/na.me-2/con_f:va", "folder",
                         "folder:test"]) == [
        Source("gsm8k", "openai/gsm8k"), Source("name", "org/name", config="config"),
        Source("name-2", "org/name", split="test"), Source("na.me-2", "org/na.me-2", config="con_f", split="va"),
        Source("folder", "folder"), Source("folder-2", "folder", split="test"),
    ]  # fmt: skip


def test_a_mixture_by_its_ending():
    mixture("sources: [{path: a.jsonl}]")
    assert find_sources(["mix/m.yaml"]) == [Source("a", paths("mix/a.jsonl"))]


# Each: what --data is, the fields, the whole complaint or its start.
BAD_DATA = [
    ([], None, "--data is empty"),
    (["gone.jsonl"], None, "--data gone.jsonl: no such file"),
    (["folder/gone.jsonl.gz"], None, "--data folder/gone.jsonl.gz: no such file"),
    (["gone"], None, "--data gone: no such file"),
    (["/gone/away"], None, "--data /gone/away: no such file"),
    ([""], None, "--data : no such file"),
    (["gone*.jsonl"], None, "--data gone*.jsonl: no file matches"),
    (["other.txt"], None, "--data other.txt: expected a file ending in .jsonl, .json, .csv, .tsv, .parquet"),
    (["*.*"], None, "--data other.txt: expected a file ending in"),
    (["a.jsonl", "b.csv", "./a.jsonl"], None, "--data a.jsonl: is given twice"),
    (["data/*.jsonl", "data/1.jsonl"], None, "--data data/1.jsonl: is given twice"),
    (["org/name", "org/name:train"], None, "--data org/name: is given twice"),
    (["a.jsonl", "m.yaml"], None, "--data m.yaml: a mixture cannot be given with other data"),
    (["m.yml"], {"prompt": "a", "answer": "b"}, "--data m.yml: a mixture names its fields itself"),
    (["gone.yaml"], None, "gone.yaml does not exist"),
    (["a.jsonl"], {"prompt": "{a", "answer": "b"},
     "--fields: prompt: template '{a': a brace is left open"),
    (["a.jsonl"], {"prompt": "a"},
     "--fields: answer: is missing, prompt and answer go together"),
    (["a.jsonl"], {"promt": "a"}, "--fields: promt: unknown key, did you mean prompt?"),
]  # fmt: skip


@pytest.mark.parametrize("data, fields, expected", BAD_DATA, ids=[" ".join(row[0]) for row in BAD_DATA])
def test_data_that_cannot_be(data, fields, expected):
    with pytest.raises(UserError) as caught:
        find_sources(data, fields)
    assert str(caught.value).startswith(expected)


def test_parquet_is_not_packed_twice(place):
    (place / "c.parquet.gz").touch()
    with pytest.raises(UserError, match="c.parquet.gz: expected a file ending in .* but for parquet"):
        find_sources(["c.parquet.gz"])


# --------------------------------------------------------------------------------------------------------- mixtures


def test_a_mixture_with_everything():
    text = """
    sources:
      - path: a.jsonl
        weight: 0.5
        prompt_style: alpaca
      - name: many   # a comment
        path: ["../data/*.jsonl", only.tsv]
        fields: {prompt: "{context} {question}", choices: [ans0, ans1], label: label, answer: "{letter}"}
        few_shot: [0, 5]
        samples: 1000
        shuffle_choices: false
      - {path: ../other.txt, format: jsonl, few_shot: 3, min_words: 0, max_tokens: 100, max_repetition: 0.25}
      - {path: openai/gsm8k, config: main, split: test}
      - {path: a.jsonl, name: again, fields: {messages: dialog}}
    """
    fields = {"prompt": "{context} {question}", "choices": ["ans0", "ans1"], "label": "label", "answer": "{letter}"}
    many = [*paths(*(f"mix/../data/{i}.jsonl" for i in (1, 10, 2))), Path("mix/only.tsv")]
    assert mixture(text) == [
        Source("a", paths("mix/a.jsonl"), weight=0.5, prompt_style="alpaca"),
        Source("many", many, fields=fields, few_shot=(0, 5), samples=1000, shuffle_choices=False),
        Source("other.txt", paths("mix/../other.txt"), format="jsonl", few_shot=(3, 3), min_words=0, max_tokens=100,
               max_repetition=0.25),
        Source("gsm8k", "openai/gsm8k", config="main", split="test"),
        Source("again", paths("mix/a.jsonl"), fields={"messages": "dialog"}),
    ]  # fmt: skip


def test_a_path_is_seen_from_the_mixtures_folder_and_then_from_the_current_one(place):
    got = mixture(f"sources: [{{path: a.jsonl}}, {{path: b.csv}}, {{path: {place}/c.json.gz}}, {{path: data/*}}]")
    assert [source.path for source in got] == [
        paths("mix/a.jsonl"), paths("b.csv"), paths(f"{place}/c.json.gz"),
        paths("data/1.jsonl", "data/10.jsonl", "data/2.jsonl"),
    ]  # fmt: skip


def test_names_made_up_leave_room_for_names_given():
    text = "sources: [{path: a.jsonl}, {path: b.csv, name: a}, {path: ../a.jsonl}, {path: only.tsv, name: a-3}]"
    assert [source.name for source in mixture(text)] == ["a-2", "a", "a-4", "a-3"]


SOURCE = "sources: [{name: x, path: a.jsonl, %s}]"
# Each: the YAML, the complaint after the file's name (its start).
BAD_MIXTURE = [
    ("", ": expected the key sources with a list under it"),
    ("- a.jsonl", ": expected the key sources with a list under it"),
    ("sources:", ": sources must be a list of at least one source"),
    ("sources: []", ": sources must be a list of at least one source"),
    ("sources: [a.jsonl]", ": sources must be a list of at least one source, each with keys such as path"),
    ("sources: [{path: a.jsonl}]\nsuorces: 1", ": suorces: unknown key, did you mean sources?"),
    ("sources: [{path: a.jsonl}\n", ":2: not valid YAML: "),
    ("sources:\n  - path: a.jsonl\n\tname: x", ":3: not valid YAML: "),
    ("sources:\n  - path: a.jsonl\n    path: b.csv", ":3: not valid YAML: key 'path' comes twice"),
    ("sources: [{name: x}]", ": source x: path: is missing"),
    ("sources: [{path: a.jsonl}, {weight: 1}]", ": source 2: path: is missing"),
    (SOURCE % "weigth: 1", ": source x: weigth: unknown key, did you mean weight?"),
    (SOURCE % "Samples: 1", ": source x: Samples: unknown key, did you mean samples?"),
    (SOURCE % "zzz: 1", ": source x: zzz: unknown key, known are name, path,"),
    (SOURCE % "5: 1", ": source x: 5: unknown key, known are"),
    ("sources: [{name: 5, path: a.jsonl}]", ": source 5: name: expected text, not 5"),
    ("sources: [{name: ' ', path: a.jsonl}]", ": source  : name: expected text, not ' '"),
    ("sources: [{name: x, path: a.jsonl}, {name: x, path: b.csv}]", ": source x: name: another source has the same"),
    ("sources: [{name: x, path: a.jsonl}, {name: y, path: a.jsonl}]", ": source y: mix/a.jsonl: is given twice"),
    ("sources: [{name: x, path: [a.jsonl, ../mix/a.jsonl]}]", ": source x: mix/../mix/a.jsonl: is given twice"),
    ("sources: [{name: x, path: 5}]", ": source x: path: expected text or a list of texts, not 5"),
    ("sources: [{name: x, path: []}]", ": source x: path: expected text or a list of texts, not []"),
    ("sources: [{name: x, path: }]", ": source x: path: expected text or a list of texts, not None"),
    ("sources: [{name: x, path: gone.csv}]", ": source x: gone.csv: no such file"),
    ("sources: [{name: x, path: [a.jsonl, 'g*.csv']}]", ": source x: g*.csv: no file matches"),
    ("sources: [{name: x, path: [a.jsonl, org/name]}]", ": source x: org/name: no such file"),
    ("sources: [{name: x, path: ../other.txt}]", ": source x: mix/../other.txt: expected a file ending in"),
    ("sources: [{name: x, path: org/name, format: csv}]", ": source x: format: is for files, and org/name is none"),
    ("sources: [{name: x, path: 'org/name:test', split: train}]", ": source x: split: is given in the path too"),
    (SOURCE % "split: test", ": source x: split: is for datasets, and a.jsonl is none"),
    (SOURCE % "config: main", ": source x: config: is for datasets, and a.jsonl is none"),
    (SOURCE % "format: xml", ": source x: format: expected one of jsonl, json, csv, tsv, parquet, not 'xml'"),
    (SOURCE % "format: [csv]", ": source x: format: expected one of"),
    (SOURCE % "weight: 1, samples: 5", ": source x: weight and samples: one of the two"),
    *[(SOURCE % f"weight: {value}", f": source x: weight: expected a number above 0, not {shown}")
      for value, shown in ((0, "0"), (-1, "-1"), (".nan", "nan"), (".inf", "inf"), ("true", "True"), ("'1'", "'1'"))],
    *[(SOURCE % f"samples: {value}", ": source x: samples: expected a whole number above 0, not")
      for value in (0, -5, 1.5, "many", "true")],
    *[(SOURCE % f"few_shot: {value}", ": source x: few_shot: expected a whole number, or two as in [0, 5], not")
      for value in (-1, 1.5, "[5, 0]", "[1]", "[1, 2, 3]", "[-1, 2]", "'3'", "true")],
    (SOURCE % "min_words: -1", ": source x: min_words: expected a whole number, at least 0, not -1"),
    (SOURCE % "max_tokens: 0", ": source x: max_tokens: expected a whole number, at least 2, not 0"),
    *[(SOURCE % f"max_repetition: {value}", ": source x: max_repetition: expected a number from 0 to 1, not")
      for value in (-0.1, 1.1, ".nan", "half")],
    (SOURCE % "shuffle_choices: 1", ": source x: shuffle_choices: expected true or false, not 1"),
    (SOURCE % "prompt_style: [a]", ": source x: prompt_style: expected text, not ['a']"),
    (SOURCE % "fields: question", ": source x: fields: expected keys such as prompt and answer, not 'question'"),
    (SOURCE % "fields: {}", ": source x: fields: prompt: is missing, prompt and answer go together"),
    (SOURCE % "fields: {prompt: a}", ": source x: fields: answer: is missing, prompt and answer go together"),
    (SOURCE % "fields: {promt: a, answer: b}", ": source x: fields: promt: unknown key, did you mean prompt?"),
    (SOURCE % "fields: {prompt: a, choices: b}", ": source x: fields: label: is missing, prompt and choices and label"),
    (SOURCE % "fields: {prompt: a, answer: b, label: c}", ": source x: fields: choices: is missing"),
    (SOURCE % "fields: {messages: a, prompt: b}", ": source x: fields: prompt: has no place beside messages"),
    (SOURCE % "fields: {text: a, system: b}", ": source x: fields: system: has no place beside text"),
    (SOURCE % "fields: {messages: a, thinking: b}", ": source x: fields: thinking: has no place beside messages"),
    (SOURCE % "fields: {messages: '{a}'}", ": source x: fields: messages: expected a column, and '{a}' is a template"),
    (SOURCE % "fields: {messages: a, tools: '{b}'}", ": source x: fields: tools: expected a column, and '{b}' is a"),
    (SOURCE % "ignore: name", ": source x: ignore: expected a list of names such as [name, images], not 'name'"),
    (SOURCE % "ignore: []", ": source x: ignore: expected a list of names"),
    (SOURCE % "encoding: latin-7x", ": source x: encoding: latin-7x: no text encoding of that name"),
    (SOURCE % "encoding: base64", ": source x: encoding: base64: no text encoding of that name"),
    ("sources: [{name: x, path: folder/x.parquet, encoding: cp1252}]",
     ": source x: encoding: is for files of text, and folder/x.parquet is none"),
    (SOURCE % "fields: {prompt: a, answer: 5}", ": source x: fields: answer: expected a column or a template, not 5"),
    (SOURCE % "fields: {prompt: [a, b], answer: c}", ": source x: fields: prompt: expected a column or a template"),
    (SOURCE % "fields: {prompt: a, choices: [b], label: c}", ": source x: fields: choices: expected a column with a l"),
    (SOURCE % "fields: {prompt: a, choices: [b, '{'], label: c}", ": source x: fields: choices: template '{': a brace"),
    (SOURCE % "fields: {prompt: '{a} {b', answer: c}", ": source x: fields: prompt: template '{a} {b': a brace"),
]  # fmt: skip


@pytest.mark.parametrize("text, expected", BAD_MIXTURE)
def test_a_mixture_that_cannot_be(text, expected):
    with pytest.raises(UserError) as caught:
        mixture(text)
    assert str(caught.value).startswith("mix/m.yaml" + expected)
    assert "\n" not in str(caught.value)


def test_a_mixture_that_is_no_text(place):
    (place / "m.yaml").write_bytes(b"sources: \xff")
    (place / "n.yaml").write_bytes(b"sources: \0")
    (place / "o.yaml").mkdir()
    for name in ("m.yaml", "n.yaml", "o.yaml"):
        with pytest.raises(UserError, match=f"{name}.*"):
            read_mixture(name)
