"""Files in, tokens out: what becomes of every sample of every format, and that nothing is lost without a count."""

import csv
import json
import random

import pytest
from safetensors.torch import load_file

import prepare_data
from batching import Samples
from cli import UserError
from files import check_manifest, sha256
from prepare_data import Settings
from prompts import encode_dialog
from tokenizer import Tokenizer

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
    return {"instruction": text(random.randint(1, 12)), "output": text(random.randint(1, 9))}


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
def prepare(tmp_path, tiny_model_dir, monkeypatch):
    """`prepare(rows, ".jsonl", val_fraction=0.1)`: the prepared folder; if not said, all is train, the style plain."""
    plot_lengths = prepare_data.plot_lengths

    def run(rows, suffix=".jsonl", name="rows", plot=False, **settings):
        monkeypatch.setattr(prepare_data, "plot_lengths", plot_lengths if plot else lambda *_: None)  # takes a second
        path = rows if isinstance(rows, list) and hasattr(rows[0], "suffix") else None
        path = path or write_rows(tmp_path / f"{name}{suffix}", rows)
        defaults = dict(out_dir=tmp_path / "prepared", prompt_style="plain", val_fraction=0.0)
        s = Settings(data=path, checkpoint_dir=tiny_model_dir, **(defaults | settings))
        prepare_data.main(s)
        return s.out_dir

    return run


@pytest.fixture(scope="session")
def tokenizer(tiny_model_dir):
    return Tokenizer(tiny_model_dir)


def stored(folder, part="train"):
    """The samples of a part as lists of (ids, is_target)."""
    samples = Samples(folder / f"{part}.safetensors")
    cuts = list(zip(samples.offsets.tolist(), samples.offsets.tolist()[1:], strict=False))
    return [(samples.tokens[a:b].tolist(), samples.is_target[a:b].tolist()) for a, b in cuts]


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


def counts(folder):
    return info(folder)["sources"][0]["counts"]


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
    folder = prepare(rows, prompt_field="ask", answer_field="say")
    assert texts(folder, tokenizer) == [("one? two<|im_end|>", "two<|im_end|>")]
    folder = prepare(rows, prompt_field="ask", input_field="about", answer_field="say")
    assert texts(folder, tokenizer) == [("one? \n\nthistwo<|im_end|>", "two<|im_end|>")]


def test_an_empty_input_is_no_input(prepare, tokenizer):
    rows = [{"instruction": "a", "input": "", "output": "b"}, {"instruction": "a", "output": "b"}]
    (with_empty, _), (without, _) = texts(prepare(rows, prompt_style="alpaca"), tokenizer)
    assert with_empty == without and "### Input" not in without


def test_several_files_keep_their_order_and_their_source(prepare, tmp_path, tokenizer):
    rows = [question_and_answer() for _ in range(9)]
    paths = [write_rows(tmp_path / "a.csv", rows[:2]), write_rows(tmp_path / "b.json", rows[2:])]
    folder = prepare(paths)
    assert [answer for _, answer in texts(folder, tokenizer)] == [row["output"] + "<|im_end|>" for row in rows]
    assert Samples(folder / "train.safetensors").sources.tolist() == [0] * 2 + [1] * 7
    assert [(x["path"], x["sha256"], x["counts"]["read"]) for x in info(folder)["sources"]] == [
        (str(paths[0]), sha256(paths[0]), 2), (str(paths[1]), sha256(paths[1]), 7),
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
    assert stored(folder) == [encode_dialog(tokenizer, messages, style)]


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
    s = Settings(data=tmp_path / "rows.jsonl", checkpoint_dir=bare, out_dir=tmp_path / "bare", val_fraction=0.0)
    prepare_data.main(s)
    assert info(s.out_dir)["prompt_style"] == "alpaca"
    assert "### Response:" in texts(s.out_dir, tokenizer)[0][0]


# ------------------------------------------------------------------------------------------------ cut and dropped


def test_of_a_long_sample_the_prompt_is_cut_from_its_start(prepare, tokenizer, capsys):
    long = {"instruction": " ".join(f"w{i}" for i in range(300)), "output": text(8)}
    short = {"instruction": "s", "output": "t"}
    for style in ("plain", "alpaca", "checkpoint"):
        folder = prepare([long, short], prompt_style=style, max_seq_length=150)
        assert counts(folder) == {"read": 2, "kept": 2, "prompt cut": 1, "whole": 1}
        (whole, targets), _ = texts(folder, tokenizer)
        assert targets == long["output"] + "<|im_end|>"
        assert "w299" in whole and "w0 " not in whole
        assert 140 <= len(stored(folder)[0][0]) <= 150  # no more is cut than must be
        assert "1 prompt cut" in capsys.readouterr().out


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
    assert counts(folder) == {"read": 1, "kept": 1, "prompt cut": 1}
    assert texts(folder, tokenizer)[0][1] == "first<|im_end|>second<|im_end|>"
    assert 90 <= len(stored(folder)[0][0]) <= 100


def test_a_sample_of_just_the_limit_is_whole(prepare):
    rows = [{"question": "some words here", "answer": "and some there"}]
    length = len(stored(prepare(rows))[0][0])
    assert counts(prepare(rows, max_seq_length=length)) == {"read": 1, "kept": 1, "whole": 1}
    assert counts(prepare(rows, max_seq_length=length - 1)) == {"read": 1, "kept": 1, "prompt cut": 1}
    assert len(stored(prepare(rows, max_seq_length=length - 1))[0][0]) == length - 1


def test_too_long_answers_are_dropped_and_counted(prepare, tokenizer, capsys):
    rows = [
        {"instruction": "a", "output": "very long " * 100},
        {"instruction": "b", "output": "fine"},
        {"instruction": "", "output": "without a question " * 100},
        {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "very long " * 100}]},
    ]
    folder = prepare(rows, max_seq_length=50)
    assert counts(folder) == {"read": 4, "kept": 1, "answer too long": 3, "whole": 1}
    assert texts(folder, tokenizer) == [("bfine<|im_end|>", "fine<|im_end|>")]
    assert "3 answer too long" in capsys.readouterr().out


def test_empty_answers_are_dropped_and_counted(prepare, tokenizer, capsys):
    rows = [{"question": "a", "answer": ""}, {"question": "b", "answer": "c"}, {"question": "d", "answer": ""}]
    folder = prepare(rows)
    assert counts(folder) == {"read": 3, "kept": 1, "empty answer": 2, "whole": 1}
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
    for name in ("train.safetensors", "val.safetensors", "data.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


# ----------------------------------------------------------------------------------------------------- the folder


def test_what_the_folder_says_about_itself(prepare, tokenizer, tmp_path, capsys):
    rows = [question_and_answer() for _ in range(20)]
    folder = prepare(rows, val_fraction=0.25, max_seq_length=200, prompt_style="alpaca", seed=5)
    notes = info(folder)
    sizes = {name: notes.pop(name) for name in ("train", "val")}
    assert notes == {
        "tokenizer_hash": tokenizer.file_hash(),
        "prompt_style": "alpaca",
        "max_seq_length": 200,
        "mask_prompt": True,
        "val_fraction": 0.25,
        "seed": 5,
        "sources": [
            {
                "path": str(tmp_path / "rows.jsonl"),
                "sha256": sha256(tmp_path / "rows.jsonl"),
                "counts": {"read": 20, "kept": 20, "whole": 20},
            }
        ],
    }
    printed = capsys.readouterr().out
    for part, size in sizes.items():
        tensors = load_file(folder / f"{part}.safetensors")
        assert size == {
            "samples": len(tensors["target_counts"]),
            "tokens": len(tensors["tokens"]),
            "targets": tensors["is_target"].sum().item(),
        }
        assert f"{part}: {size['samples']} samples, {size['tokens']:,} tokens" in printed
    assert "20 read, 20 kept" in printed and "finetune.py" in printed
    check_manifest(folder)


def test_the_picture_of_the_lengths(prepare):
    from PIL import Image

    with Image.open(prepare([question_and_answer() for _ in range(20)], plot=True) / "lengths.png") as image:
        assert image.size[0] > 300 and len(image.convert("RGB").getcolors(10**6)) > 10


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
    s = Settings(data=path, checkpoint_dir=tmp_path)
    assert s.data == [path] and str(s.out_dir) == "prepared/my"
