"""Preference pairs: every form of row gives the same two sequences, and each step of the preparation sees both."""

import html
import itertools
import json
import random
import re
import shutil

import pytest
from conftest import ROOT
from safetensors.torch import load_file
from test_prepare_data import counts, dropped, info, lines, prepare, text, write_rows  # noqa: F401 (a fixture)

import prepare_data
from batching import Pairs, open_samples, read_data_info, source_names
from eval.exact_match import first_samples
from preparation.mixture import Source
from preparation.reading import Row
from preparation.records import to_record
from shell.cli import UserError
from text.prompts import encode_prompt
from text.tokenizer import Tokenizer

END = "<|im_end|>"


@pytest.fixture(scope="session")
def tokenizer(tiny_model_dir):
    return Tokenizer(tiny_model_dir)


def said(role, content, **more):
    return {"role": role, "content": content, **more}


def talk(*texts, system=None):
    """Messages of the user and the assistant in turn."""
    turns = [said(("user", "assistant")[i % 2], one) for i, one in enumerate(texts)]
    return [said("system", system), *turns] if system else turns


def words(count):
    """A text of so many words, which does not begin or end with a blank."""
    return " ".join(random.choices(["bala", "mon,", "deli?", "Zürich", "—", "日本", "two\tlines"], k=count)) + "."


def answers():
    """Two that differ."""
    return (same := words(random.randint(0, 4))) + f" yes {words(3)}", same + f" no {words(random.randint(1, 9))}"


def record(row, **source):
    return to_record(Source("test", [], **source), Row("rows", 1, json.dumps(row).encode(), "line"), seed=1)


def stored(folder, part="train"):
    """For each pair its two sequences, (ids, is_target) each."""
    samples = open_samples(folder, part)
    assert isinstance(samples, Pairs)
    return [[(ids.tolist(), mask.tolist()) for ids, mask in samples.sequences(i)] for i in range(len(samples))]


def targets(tokenizer, sequence):
    ids, is_target = sequence
    return tokenizer.decode([i for i, wanted in zip(ids, is_target, strict=True) if wanted], skip_special=False)


# ------------------------------------------------------------------------------------------------------ forms of rows


def conversation(question="q?", system=None):
    """A prompt of three messages, with a system message if given."""
    return talk("hello", "what is it?", question, system=system)


def forms(prompt, chosen, rejected):
    """One pair of a single question in every form, by name."""
    whole = [[*talk(prompt), said("assistant", answer)] for answer in (chosen, rejected)]
    one = [said("assistant", answer) for answer in (chosen, rejected)]
    gpt = [{"from": "gpt", "value": answer} for answer in (chosen, rejected)]
    both = lambda pair: dict(zip(("chosen", "rejected"), pair, strict=True))  # noqa: E731
    return {
        "TRL, texts": {"prompt": prompt, "chosen": chosen, "rejected": rejected},
        "TRL, messages": {"prompt": talk(prompt), **both([[m] for m in one])},
        "TRL, messages, the prompt implicit": both(whole),
        "UltraFeedback": {"prompt": prompt, "messages": whole[0], **both(whole), "score_chosen": 8.5},
        "messages and both": {"messages": whole[0], **both(whole)},
        "the prompt once more": {"prompt": talk(prompt), **both(whole)},
        "half": {"prompt": prompt, **both([[m] for m in one])},
        "LLaMA-Factory, Alpaca": {"instruction": prompt, "chosen": chosen, "rejected": rejected},
        "LLaMA-Factory, ShareGPT": {"conversations": [{"from": "human", "value": prompt}], **both(gpt)},
        "LLaMA-Factory, OpenAI": {"messages": talk(prompt), **both(one)},
        "Orca": {"system": "", "question": prompt, "chosen": chosen, "rejected": rejected},
        "hh-rlhf": both([f"\n\nHuman: {prompt}\n\nAssistant: {answer}" for answer in (chosen, rejected)]),
        "hh-rlhf with a prompt": {"prompt": f"\n\nHuman: {prompt}\n\nAssistant:", "response": chosen,
                                  **both([f" {answer}" for answer in (chosen, rejected)])},
        "hh-rlhf with a prompt and all": {
            "prompt": f"\n\nHuman: {prompt}\n\nAssistant:",
            **both([f"\n\nHuman: {prompt}\n\nAssistant: {answer}" for answer in (chosen, rejected)])},
    }  # fmt: skip


def test_every_form_gives_the_same_tokens(prepare, tokenizer, tmp_path):  # noqa: F811
    prompt, (chosen, rejected) = words(5), answers()
    found = {}
    for number, (name, row) in enumerate(forms(prompt, chosen, rejected).items()):
        found[name] = stored(prepare([row], out_dir=tmp_path / f"out{number}", prompt_style="chatml"))
    asked = encode_prompt(tokenizer, talk(prompt), "chatml")
    for name, pairs in found.items():
        [(good, bad)] = pairs
        assert (good, bad) == tuple(found["TRL, texts"][0]), name
        for sequence, answer in ((good, chosen), (bad, rejected)):
            assert sequence[0][: len(asked)] == asked and sequence[1] == [
                i >= len(asked) for i in range(len(sequence[0]))
            ]
            assert targets(tokenizer, sequence) == answer + END


def test_conversations_as_trl_splits_them():
    """TRL's extract_prompt: what both lists begin with is the prompt, the rest of each its answer."""
    for system in (None, "Be brief."):
        prompt = conversation(words(4), system)
        good, bad = ([said("assistant", answer)] for answer in answers())
        explicit = record({"prompt": prompt, "chosen": good, "rejected": bad})
        implicit = record({"chosen": prompt + good, "rejected": prompt + bad})
        column = {"prompt": prompt[1:], "chosen": good, "rejected": bad, "system": system} if system else {}
        by_column = record(column) if system else explicit
        weighed = [m | {"weight": 0} if m["role"] == "assistant" else m for m in prompt]
        for got in (explicit, implicit, by_column):
            assert (got["messages"], got["rejected"]) == (weighed + good, weighed + bad)
            assert got["key"] == "\n".join(m["content"] for m in prompt)


@pytest.mark.parametrize(
    "chosen, rejected, prompt",
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),  # TRL's example
        ("The sky is bluish.", "The sky is blue.", "The sky is"),  # whole words: TRL would cut one
        ("one two", "one two three", "one"),  # an answer has at least a character
        ("Q: a?\nA: yes", "Q: a?\nA: no", "Q: a?\nA:"),
        ("yes", "no", ""),
        ("", "no", ""),
    ],
)
def test_whole_texts_are_split_after_what_they_have_in_common(chosen, rejected, prompt):
    got = record({"chosen": chosen, "rejected": rejected})
    assert got["messages"] == talk(prompt, chosen[len(prompt) :])
    assert got["rejected"] == talk(prompt, rejected[len(prompt) :])


def test_a_transcript_has_turns():
    first = "\n\nHuman: a: b\n\nAssistant: c\n\nd\n\nHuman: e\n\nAssistant:"
    got = record({"chosen": first + " good\n\nHuman: and more", "rejected": first})
    asked = [*talk("a: b"), said("assistant", "c\n\nd", weight=0), said("user", "e")]
    assert got["messages"] == [*asked, said("assistant", "good")]
    assert got["rejected"] == [*asked, said("assistant", "")]  # an empty answer
    assert got["facts"]["samples", "that are transcripts"] == 1
    assert got["facts"]["samples", "that go on after their last answer"] == 1


def test_own_fields_and_beside_them():
    row = {"question": "q", "good": "a", "bad": "b", "context": "c", "who": "s", "prompt": "no", "chosen": "no"}
    fields = {"prompt": "{question}?", "chosen": "good", "rejected": "{bad}!", "input": "context", "system": "who"}
    got = record(row, fields=fields, ignore=("chosen",))
    asked = [said("system", "s"), said("user", "q?", input="c")]
    assert got["messages"] == [*asked, said("assistant", "a")] and got["rejected"] == [*asked, said("assistant", "b!")]
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    calls = [said("assistant", "", tool_calls=[{"name": "look", "arguments": {"at": at}}]) for at in "ab"]
    got = record({"prompt": "q", "chosen": calls[:1], "rejected": calls[1:], "tools": [tool], "history": [["x", "y"]]})
    asked = [said("user", "x"), said("assistant", "y", weight=0), said("user", "q")]
    assert (got["messages"], got["rejected"]) == ([*asked, calls[0]], [*asked, calls[1]]) and got["tools"] == [tool]
    got = record({"chosen": "a b", "rejected": "a c", "prompt": "never read"}, ignore=("prompt",))
    assert got["messages"] == talk("a", " b")


def test_conversations_that_part_before_their_last_answers(prepare, tokenizer):  # noqa: F811
    """Only the last answer of each is a target; what differs before is in its end, as context."""
    row = {"chosen": talk("q", "a", "more", "b"), "rejected": talk("q", "c", "else", "d")}
    folder = prepare([row], prompt_style="chatml")
    samples, [(good, bad)] = open_samples(folder, "train"), stored(folder)
    assert [targets(tokenizer, sequence) for sequence in (good, bad)] == [f"b{END}", f"d{END}"]
    common = encode_prompt(tokenizer, talk("q"), "chatml")
    assert samples.stored(0)[2][0] == len(common) - 1
    assert info(folder)["sources"][0]["contents"]["rendering"] == {"pairs whose answers follow different contexts": 1}


@pytest.mark.parametrize("style", ["plain", "alpaca", "dolly", "vicuna", "llama2-chat", "llama3", "mistral-instruct"])
def test_prompt_styles(prepare, tokenizer, style):  # noqa: F811
    rows = [dict(zip(("prompt", "chosen", "rejected"), (words(4), *answers()), strict=True)) for _ in range(5)]
    for row, pair in zip(rows, stored(prepare(rows, prompt_style=style)), strict=True):
        asked = encode_prompt(tokenizer, talk(row["prompt"]), style)
        for sequence, answer in zip(pair, (row["chosen"], row["rejected"]), strict=True):
            assert sequence[0][: len(asked)] == asked and sum(sequence[1]) == len(sequence[0]) - len(asked)
            assert targets(tokenizer, sequence).startswith(answer)
            assert targets(tokenizer, sequence)[len(answer) :] in (END, "<|endoftext|>")


def test_the_models_own_template(tiny_model_dir, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    own = Tokenizer(folder)
    rows = [{"prompt": conversation(words(3)), "chosen": good, "rejected": bad} for good, bad in (answers(), ("", "x"))]
    data = str(write_rows(tmp_path / "rows.jsonl", rows))
    prepare_data.main(prepare_data.Settings(data, folder, out_dir=tmp_path / "out", val_fraction=0))
    assert info(tmp_path / "out")["prompt_style"] == "checkpoint"
    pairs = stored(tmp_path / "out")
    for row, pair in zip(rows, pairs, strict=True):
        asked = encode_prompt(own, row["prompt"], "checkpoint")
        for sequence, answer in zip(pair, (row["chosen"], row["rejected"]), strict=True):
            assert sequence[0][: len(asked)] == asked and targets(own, sequence) == answer + END


# -------------------------------------------------------------------------------------------------------------- steps


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_what_is_dropped_and_counted(prepare, tokenizer):  # noqa: F811
    rows = [
        pair("a", "same", "same"), pair("b", "", " \n"), pair("c", "", "said"), pair("d", "one", "two"),
        pair("d", "one", "two"), pair("d", "one", "three"), pair("d", "two", "one"),
        pair("e", [said("assistant", "x", weight=0)], "y"), pair("f", "x", "y\r\n"), pair("g", "é", "e\u0301"),
    ]  # fmt: skip
    folder = prepare(rows, prompt_style="chatml")
    assert sorted(dropped(folder)) == [
        (1, "both answers the same", None), (2, "empty answer", None), (5, "duplicate", 4),
        (8, "no answer to train on", None),
    ]  # fmt: skip
    assert counts(folder) == {
        "read": 10, "both answers the same": 1, "empty answer": 1, "duplicate": 1, "no answer to train on": 1,
        "kept": 6, "mixed": 6,
    }  # fmt: skip
    assert [targets(tokenizer, one) for one in stored(folder)[0]] == [END, f"said{END}"]
    assert [line["id"].rpartition(":")[2] for line in lines(folder / "samples.jsonl")] == [
        "3",
        "4",
        "6",
        "7",
        "9",
        "10",
    ]
    notes = info(folder)
    assert notes["kind"] == "pairs" == read_data_info(folder)["kind"]
    assert notes["sources"][0]["contents"]["answers"] == {
        "to train on": 16, "empty": 2, "empty, the other of the pair is not": 1, "masked (weight 0)": 1,
    }  # fmt: skip


def test_answers_that_become_the_same_tokens_are_dropped(prepare):  # noqa: F811
    """llama3 writes a call of a tool as text: then both answers are the same, though the messages differ."""
    call = {"name": "look", "arguments": {"at": 1}}
    written = '{"name": "look", "parameters": {"at": 1}}'
    rows = [pair("a", [said("assistant", "", tool_calls=[call])], written), pair("b", "c", "d")]
    folder = prepare(rows, prompt_style="llama3")
    assert dropped(folder) == [(1, "both answers the same", None)]


def test_without_a_prompt_an_empty_answer_cannot_be_predicted(prepare, tokenizer):  # noqa: F811
    """The tiny tokenizer has no BOS: in style plain nothing stands before the end token."""
    folder = prepare([pair("", "", "b c"), pair("", "d e", "b c"), pair("q", "", "b")])
    assert dropped(folder) == [(1, "empty answer", None)]
    samples = open_samples(folder, "train")
    first, second = stored(folder)
    assert samples.stored(0)[2][0] == 0 and samples.target_counts[0] == sum(len(s[0]) - 1 for s in first)
    assert targets(tokenizer, second[0]) == END


@pytest.mark.parametrize("room", range(4))
def test_the_prompt_is_cut_so_that_the_longer_answer_fits(prepare, tokenizer, room):  # noqa: F811
    prompt, good, bad = words(60), words(random.randint(1, 5)), words(random.randint(6, 12))
    good, bad = random.sample([good, bad], 2)
    alone = max(len(tokenizer.encode(answer)) + 1 for answer in (good, bad))
    longest = alone + len(encode_prompt(tokenizer, talk(""), "chatml")) + room
    folder = prepare([pair(prompt, good, bad), pair("other", "x", "y")], max_seq_length=longest, prompt_style="chatml")
    assert info(folder)["sources"][0]["prompts_cut"] == 1
    (first, second), _ = stored(folder)
    sizes = [len(first[0]), len(second[0])]
    assert max(sizes) <= longest and max(sizes) >= longest - 4  # a character may take several tokens
    asked = [sequence[0][: sequence[1].index(True)] for sequence in (first, second)]
    assert asked[0] == asked[1]
    kept = re.search(r"user\n(.*)<\|im_end\|>\n", tokenizer.decode(asked[0], skip_special=False), re.S)[1]
    assert prompt.endswith(kept) and len(kept) < len(prompt)
    assert [targets(tokenizer, one) for one in (first, second)] == [good + END, bad + END]
    folder = prepare([pair(prompt, good, bad), pair("other", "x", "y")], max_seq_length=longest - room - 1,
                     prompt_style="chatml")  # fmt: skip
    assert dropped(folder) == [(1, "answer too long", None)]


def test_every_message_of_the_prompt_may_be_cut(prepare, tokenizer):  # noqa: F811
    """A longer text first; the context that the two conversations do not share is cut as well."""
    row = {"chosen": talk(words(40), "a", words(9), "b"), "rejected": talk("x", "c", words(50), "d")}
    row["rejected"][0] = row["chosen"][0]
    folder = prepare([row], max_seq_length=60, prompt_style="chatml")
    [(first, second)] = stored(folder)
    assert max(len(first[0]), len(second[0])) <= 60
    assert [targets(tokenizer, one) for one in (first, second)] == [f"b{END}", f"d{END}"]


def test_filters_see_both_answers(prepare, tmp_path):  # noqa: F811
    benchmark = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    write_rows(tmp_path / "bench.jsonl", [{"question": benchmark, "answer": "x"}])
    rows = [
        pair("a", "fine", f"so {benchmark} ends"), pair("b", f"so {benchmark} ends", "fine"),
        pair(f"{benchmark}?", "c", "d"), pair("e", "is it", "again and again and again and again and again and again"),
        pair("f", "", "g"), pair("h", "it is " * 2, "it is"), pair("kept", "one of them", "two of them"),
    ]  # fmt: skip
    folder = prepare(rows, benchmarks=[str(tmp_path / "bench.jsonl")], leak_cosine=0, max_repetition=0.3, min_words=3)
    assert sorted(dropped(folder)) == [
        (1, "words of a benchmark", 1), (2, "words of a benchmark", 1), (3, "words of a benchmark", 1),
        (4, "repetitive", None), (5, "too few words", None),
    ]  # fmt: skip
    write_rows(tmp_path / "bench.jsonl", [pair("asked", "good", benchmark)])
    folder = prepare(rows[:1] + rows[-1:], benchmarks=[str(tmp_path / "bench.jsonl")], leak_cosine=0)
    assert dropped(folder) == [(1, "words of a benchmark", 1)]
    assert prepare(rows[-2:], max_tokens=12, prompt_style="plain")


def test_near_duplicates_are_of_the_prompt_alone(prepare):  # noqa: F811
    asked = " ".join(f"word{i}" for i in range(40))
    folder = prepare(
        [pair(asked, "a", "b"), pair(f"{asked} more", "c", "d"), pair("x y z", "e", "f")], near_duplicates=0.7
    )
    assert dropped(folder) == [(2, "near duplicate", 1)]


def test_a_prompt_is_on_one_side_of_the_split_and_a_mixture_repeats_pairs(prepare, tmp_path):  # noqa: F811
    rows = [pair(f"prompt {i // 3}", f"good {i}", f"bad {i}") for i in range(60)]
    write_rows(tmp_path / "a.jsonl", rows)
    write_rows(tmp_path / "b.jsonl", [pair(f"other {i}", "x", "y") for i in range(10)])
    (tmp_path / "m.yaml").write_text(
        "sources:\n- {path: a.jsonl, weight: 1}\n- {path: b.jsonl, weight: 1}\n", encoding="utf-8"
    )
    folder = prepare([tmp_path / "m.yaml"], val_fraction=0.2, mix_by=random.choice(["samples", "targets"]))
    sides = {part: set() for part in ("train", "val")}
    for line in lines(folder / "samples.jsonl"):
        if line["source"] == "a":
            sides[line["part"]].add((int(line["id"].rpartition(":")[2]) - 1) // 3)
    assert sides["val"] and not sides["train"] & sides["val"]
    train, val = (open_samples(folder, part) for part in ("train", "val"))
    assert train.sources[:].bincount()[1] > 10 and source_names(read_data_info(folder), train, val) == ["a", "b"]


def test_pairs_and_samples_of_one_answer_do_not_mix(prepare, tmp_path):  # noqa: F811
    for name, row in (("a", pair("a", "b", "c")), ("b", {"question": "a", "answer": "b"})):
        write_rows(tmp_path / f"{name}.jsonl", [row])
    for first, second in itertools.permutations("ab"):
        with pytest.raises(UserError, match=r"a.jsonl:1 \(source a\) is a preference pair, .*b.jsonl:1 \(source b\)"):
            prepare([tmp_path / f"{first}.jsonl", tmp_path / f"{second}.jsonl"])
    with pytest.raises(UserError, match=r"rows.jsonl:2 \(source rows\) is a preference pair, .*rows.jsonl:1"):
        prepare([{"prompt": "a", "completion": "b"}, pair("a", "b", "c")])


def test_what_has_no_meaning_for_pairs_is_refused(prepare, tmp_path, tiny_model_dir):  # noqa: F811
    with pytest.raises(UserError, match="--mask_prompt false: of preference pairs"):
        prepare([pair("a", "b", "c")], mask_prompt=False)
    write_rows(tmp_path / "a.jsonl", [pair("a", "b", "c")])
    (tmp_path / "m.yaml").write_text("sources: [{path: a.jsonl, few_shot: 2}]\n", encoding="utf-8")
    with pytest.raises(UserError, match="few_shot needs samples of one question and one answer"):
        prepare([tmp_path / "m.yaml"])
    with pytest.raises(UserError, match="a.jsonl:1: a preference pair has no one right answer"):
        first_samples(tmp_path / "a.jsonl", None)


def test_the_same_bytes_on_any_number_of_cores(prepare, tmp_path):  # noqa: F811
    rows = [pair(f"{i} {words(3)}", *answers()) for i in range(300)]
    folders = [prepare(rows, out_dir=tmp_path / f"w{n}", workers=n, val_fraction=0.1) for n in (1, 2)]
    for name in ("train.safetensors", "val.safetensors", "samples.jsonl", "data.json", "report.html"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


# ------------------------------------------------------------------------------------------------------- what is shown


def test_show_and_report_have_both_answers(prepare, tmp_path, capsys):  # noqa: F811
    folder = prepare([pair(f"asked {i}", f"good {i}", f"bad {i} <b>") for i in range(4)], prompt_style="chatml")
    capsys.readouterr()
    prepare_data.main(prepare_data.Settings(out_dir=folder, show=2))
    out = capsys.readouterr().out
    assert len(re.findall(r"--- sample \d of 4 · rows · \d+ and \d+ tokens, \d+ targets ---", out)) == 2
    for number in re.findall(r"asked (\d)", out):
        assert f"assistant\n⟦good {number}<|im_end|>⟧\n\nrejected:\n⟦bad {number} <b><|im_end|>⟧\n" in out
    assert out.count("asked") == 2  # the prompt stands once
    page = html.unescape((folder / "report.html").read_text())
    for number in range(4):
        assert f"good {number}<|im_end|>" in page and f"bad {number} <b><|im_end|>" in page
    assert page.count(">rejected</p>") == 4 and "<b><|im" not in (folder / "report.html").read_text()
    assert "chosen answer median" in page and "rejected answer median" in page
    (_, good), (_, bad) = stored(folder)[0]
    assert f"; chosen answer median {sum(good)}, longest {sum(good)}; rejected answer median {sum(bad)}, " in page
    assert f"prompt median {len(good) - sum(good)}, " in page


def test_the_orders_of_the_examples(prepare, tokenizer, tmp_path):  # noqa: F811
    folder = prepare([ROOT / "examples" / "orders" / "pairs.jsonl"], prompt_style="chatml", val_fraction=0.05)
    rows = lines(ROOT / "examples" / "orders" / "pairs.jsonl")
    got = {tuple(targets(tokenizer, one) for one in both) for part in ("train", "val") for both in stored(folder, part)}
    assert counts(folder)["kept"] == 800 == len(rows)
    assert got == {(row["chosen"] + END, row["rejected"] + END) for row in rows}
    right = {row["prompt"] for part in ("train", "test") for row in lines(ROOT / f"examples/orders/{part}.jsonl")}
    assert not right & {row["prompt"] for row in rows}


def test_the_tensors_are_as_batching_says(prepare):  # noqa: F811
    folder = prepare([pair("ab", "cd", "ce"), pair("ab", "", "x")])
    tensors = load_file(folder / "train.safetensors")
    assert {name: str(tensor.dtype) for name, tensor in tensors.items()} == {
        "tokens": "torch.int32", "is_target": "torch.bool", "offsets": "torch.int64", "target_counts": "torch.int32",
        "sources": "torch.int32", "checksums": "torch.int32", "beginnings": "torch.int32", "first_ends": "torch.int32",
    }  # fmt: skip
    for number, (first, second) in enumerate(stored(folder)):
        start, end = tensors["offsets"][number], tensors["offsets"][number + 1]
        fork = min(first[1].index(True), second[1].index(True)) - 1
        assert tensors["beginnings"][number] == fork and tensors["first_ends"][number] == len(first[0]) - fork
        assert tensors["tokens"][start:end].tolist() == [*first[0], *second[0][fork:]]
        assert tensors["target_counts"][number] == sum(first[1]) + sum(second[1])
