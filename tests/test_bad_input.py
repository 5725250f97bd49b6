"""What a user can get wrong: each is answered in one line that names the thing, and leaves nothing half-written.

Most cases run the real script in this process, as `python script.py …` would; some are true processes.
"""

import contextlib
import io
import json
import re
import runpy
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, tiny_reference, write_tiny_tokenizer
from safetensors.torch import load_file, save_file

import lora
import prepare_data
from checkpoint import load_model
from model import Transformer

ROWS = [{"instruction": f"what is {i}", "output": f"it is {i}"} for i in range(6)]


@pytest.fixture(scope="module")
def good(tmp_path_factory, tiny_model_dir):
    """Everything as it should be: a model, samples, prepared data, an adapter, and another model's of the same."""
    folder = tmp_path_factory.mktemp("good")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    prepare_data.main(prepare_data.Settings(data=data, checkpoint_dir=tiny_model_dir, out_dir=folder / "data"))
    shutil.copytree(tiny_model_dir, folder / "model")
    other = folder / "other"
    tiny_reference("mistral").save_pretrained(other)
    write_tiny_tokenizer(other)
    settings = json.loads((other / "tokenizer_config.json").read_text())
    settings["eos_token"] = "<|endoftext|>"
    (other / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, base in (("adapter", folder / "model"), ("other_adapter", other)):
        model, config = load_model(base, torch.float32), lora.AdapterConfig(r=2)
        lora.add_lora(model, config)
        (folder / name).mkdir()
        lora.save_adapter(model, config, folder / name, base)
        (folder / name / "onetune.json").write_text(json.dumps({"prompt_style": "plain", "checkpoint_dir": str(base)}))
    return folder


@pytest.fixture
def place(good, tmp_path, monkeypatch):
    """A fresh copy of it, to be spoilt, with its parts by name: also the current folder."""
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    for notes in tmp_path.glob("*adapter/onetune.json"):
        notes.write_text(notes.read_text().replace(str(good), str(tmp_path)))
    monkeypatch.chdir(tmp_path)
    return SimpleNamespace(
        root=tmp_path, rows=tmp_path / "rows.jsonl", out=tmp_path / "result",
        **{name: tmp_path / name for name in ("model", "data", "adapter", "other", "other_adapter")},
    )  # fmt: skip


def run_here(script, *args):
    """`python script args` in this process: (exit status, standard output, standard error)."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = [script, *map(str, args)]
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = argv
    return code, out.getvalue(), err.getvalue()


def state(folder):
    """Every file and folder below, with size and time of change."""
    return {
        path.relative_to(folder): path.is_file() and (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
    }


def check_refusal(code, out, err, *words):
    """Exit status 2, no traceback, and one line of error that has all the words."""
    assert code == 2, (code, out, err)
    assert "Traceback" not in out + err, err
    assert err.endswith("\n")
    *before, last = err.removesuffix("\n").split("\n")
    assert last.startswith("error: ") and "\r" not in last, err
    assert not any("error: " in line for line in before), err
    for word in words:
        assert word in last, f"{word!r} is not in {last!r}"
    assert len(last) < 700, last


# --------------------------------------------------------------------------------------------------- how to spoil it


def truncate(path, share=0.6):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def change_json(path, **changes):
    values = json.loads(path.read_text())
    values.update(changes)
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def change_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def spoil_tensor(part, value):
    def change(tensors):
        name = next(name for name in tensors if part in name)
        tensors[name].flatten()[0] = value

    return change


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def rows(content):
    return lambda place: write(place.rows, content)


def file(name, content):
    return lambda place: write(place.root / name, content)


def config(**changes):
    return lambda place: change_json(place.model / "config.json", **changes)


# Each: the script, what is spoilt (a function of `place`), the flags added to good ones, words of the error.
# A flag of None is left out.
PREPARE, TRAIN, GENERATE, MATCH, CONVERT = (
    "prepare_data.py", "finetune.py", "generate.py", "eval/exact_match.py", "convert_hf_checkpoint.py",
)  # fmt: skip

GOOD_FLAGS = {
    PREPARE: lambda p: {"data": p.rows, "checkpoint_dir": p.model, "out_dir": p.out},
    TRAIN: lambda p: {"data_dir": p.data, "checkpoint_dir": p.model, "out_dir": p.out, "max_steps": 1},
    GENERATE: lambda p: {"checkpoint_dir": p.model, "prompt": "what"},
    MATCH: lambda p: {"checkpoint_dir": p.model, "data": p.rows},
    CONVERT: lambda p: {"out_dir": p.out},
}


def nothing(place):
    pass


LONG = " ".join(["word"] * 600)

CASES = {
    # prepare_data.py: the flags
    "no data": (PREPARE, nothing, {"data": None}, ["--data", "required"]),
    "missing data": (PREPARE, nothing, {"data": "nowhere.jsonl"}, ["nowhere.jsonl"]),
    "data of unknown format": (PREPARE, file("a.xml", "<rows/>"), {"data": "a.xml"}, ["a.xml", ".jsonl"]),
    "data is a folder": (PREPARE, nothing, {"data": "model"}, ["model"]),
    "missing model": (PREPARE, nothing, {"checkpoint_dir": "gone"}, ["gone"]),
    "model without tokenizer": (PREPARE, lambda p: (p.model / "tokenizer.json").unlink(), {}, ["tokenizer"]),
    "broken tokenizer": (PREPARE, lambda p: truncate(p.model / "tokenizer.json"), {}, ["tokenizer.json"]),
    "unknown style": (PREPARE, nothing, {"prompt_style": "alpacca"}, ["--prompt_style", "alpacca", "alpaca"]),
    "length of 0": (PREPARE, nothing, {"max_seq_length": 0}, ["--max_seq_length 0"]),
    "length of words": (PREPARE, nothing, {"max_seq_length": "long"}, ["--max_seq_length", "long", "whole number"]),
    "validate on all": (PREPARE, nothing, {"val_fraction": 1}, ["--val_fraction 1"]),
    "half of the fields": (PREPARE, nothing, {"prompt_field": "a"}, ["--prompt_field", "--answer_field"]),
    "unknown flag": (PREPARE, nothing, {"max_seq_len": 5}, ["--max_seq_len", "--max_seq_length"]),
    "out_dir is no prepared folder": (PREPARE, nothing, {"out_dir": "model"}, ["model"]),
    # prepare_data.py: the samples
    "broken JSON line": (PREPARE, rows('{"instruction": "a", "output": "b"}\n{"inst'), {}, ["rows.jsonl:2"]),
    "JSON line is a number": (PREPARE, rows("5\n"), {}, ["rows.jsonl:1"]),
    "JSON line of null messages": (PREPARE, rows('{"messages": null}\n'), {}, ["rows.jsonl:1", "messages"]),
    "messages are text": (PREPARE, rows('{"messages": ["hi", "there"]}\n'), {}, ["rows.jsonl:1", "messages"]),
    "messages end with a question": (
        PREPARE, rows('{"messages": [{"role": "user", "content": "a"}]}\n'), {}, ["rows.jsonl:1", "assistant"],
    ),
    "messages of an unknown role": (
        PREPARE, rows('{"messages": [{"role": "tool", "content": "a"}]}\n'), {}, ["rows.jsonl:1", "role"],
    ),
    "missing field": (PREPARE, rows('{"instruction": "a"}\n'), {}, ["rows.jsonl:1", "instruction"]),
    "missing named field": (
        PREPARE, nothing, {"prompt_field": "instruction", "answer_field": "reply"}, ["rows.jsonl:1", "'reply'"],
    ),
    "field of the wrong type": (
        PREPARE, rows('{"instruction": "a", "output": 42}\n'), {}, ["rows.jsonl:1", "'output'", "text"],
    ),
    "half a surrogate pair": (
        PREPARE, rows('{"instruction": "a", "output": "\\ud83d"}\n'), {}, ["rows.jsonl:1", "surrogate"],
    ),
    "empty data": (PREPARE, rows(""), {}, ["rows.jsonl", "0 read"]),
    "only empty answers": (
        PREPARE, rows('{"instruction": "a", "output": ""}\n'), {}, ["1 empty answer"],
    ),
    "not UTF-8": (PREPARE, rows(b'{"instruction": "\xe9", "output": "b"}\n'), {}, ["rows.jsonl", "UTF-8"]),
    "CSV that is not UTF-8": (
        PREPARE, file("a.csv", b"question,answer\n\xe9,b\n"), {"data": "a.csv"}, ["a.csv", "utf-8"],
    ),
    "ragged CSV": (
        PREPARE, file("a.csv", "question,answer\na,b\nc\n"), {"data": "a.csv"}, ["a.csv:3", "columns"],
    ),
    "CSV with too many fields": (
        PREPARE, file("a.csv", "question,answer\na,b,c\n"), {"data": "a.csv"}, ["a.csv:2", "columns"],
    ),
    "empty CSV": (PREPARE, file("a.csv", ""), {"data": "a.csv"}, ["a.csv"]),
    "JSON that is no list": (PREPARE, file("a.json", '{"a": 1}'), {"data": "a.json"}, ["a.json", "list"]),
    "broken JSON": (PREPARE, file("a.json", '[{"a": 1}'), {"data": "a.json"}, ["a.json"]),
    # finetune.py: the flags
    "negative learning rate": (TRAIN, nothing, {"learning_rate": -1}, ["--learning_rate -1"]),
    "learning rate is NaN": (TRAIN, nothing, {"learning_rate": "nan"}, ["--learning_rate nan"]),
    "weight decay is NaN": (TRAIN, nothing, {"weight_decay": "nan"}, ["--weight_decay nan"]),
    "rank 0": (TRAIN, nothing, {"lora_r": 0}, ["--lora_r 0"]),
    "dropout of 1": (TRAIN, nothing, {"lora_dropout": 1}, ["--lora_dropout 1"]),
    "batch of half a sample": (TRAIN, nothing, {"global_batch_size": 0.5}, ["--global_batch_size 0.5", "whole number"]),
    "no steps": (TRAIN, nothing, {"max_steps": 0}, ["--max_steps 0"]),
    "unknown method": (TRAIN, nothing, {"method": "ia3"}, ["--method", "ia3", "lora", "dora", "full"]),
    "unknown precision": (TRAIN, nothing, {"precision": "fp8"}, ["--precision", "fp8", "bf16-true"]),
    "unknown projection": (TRAIN, nothing, {"lora_targets": "[q_proj,c_attn]"}, ["--lora_targets", "c_attn", "q_proj"]),
    "no projection": (TRAIN, nothing, {"lora_targets": "[]"}, ["--lora_targets"]),
    "unknown quantizer": (TRAIN, nothing, {"quantize": "bnb.nf5"}, ["--quantize", "bnb.nf5", "bnb.nf4"]),
    "quantised full": (TRAIN, nothing, {"quantize": "bnb.nf4", "method": "full"}, ["--quantize", "full"]),
    "unknown planner": (TRAIN, nothing, {"planner": "best"}, ["--planner", "best", "sorted_in_step"]),
    "unknown flag for training": (TRAIN, nothing, {"lora_rank": 4}, ["--lora_rank", "--lora_"]),
    "missing config": (TRAIN, nothing, {"config": "gone.yaml"}, ["gone.yaml"]),
    "config with an unknown key": (
        TRAIN, file("c.yaml", "learning_rte: 1.0\n"), {"config": "c.yaml"}, ["learning_rte", "learning_rate"],
    ),
    "config with a wrong type": (
        TRAIN, file("c.yaml", "lora_r: many\n"), {"config": "c.yaml"}, ["lora_r", "many"],
    ),
    "broken config": (TRAIN, file("c.yaml", "lora_r: [1,\n"), {"config": "c.yaml"}, ["c.yaml"]),
    "config is no mapping": (TRAIN, file("c.yaml", "- 1\n- 2\n"), {"config": "c.yaml"}, ["c.yaml"]),
    # finetune.py: the model and the data
    "no such model": (TRAIN, nothing, {"checkpoint_dir": "gone"}, ["gone"]),
    "no such data": (TRAIN, nothing, {"data_dir": "gone"}, ["gone", "prepare_data.py"]),
    "data not prepared": (TRAIN, nothing, {"data_dir": "model"}, ["model", "prepare_data.py"]),
    "data of another tokenizer": (
        TRAIN, nothing, {"checkpoint_dir": "other"}, ["another tokenizer", "prepare_data.py"],
    ),
    "missing config.json": (TRAIN, lambda p: (p.model / "config.json").unlink(), {}, ["config.json"]),
    "broken config.json": (TRAIN, lambda p: truncate(p.model / "config.json"), {}, ["config.json"]),
    "unknown model_type": (TRAIN, config(model_type="gpt2"), {}, ["config.json", "gpt2"]),
    "config.json lacks a key": (TRAIN, config(hidden_size=None), {}, ["config.json", "hidden_size"]),
    "config.json has another size": (
        TRAIN, config(hidden_size=24, head_dim=8), {}, ["instead of"],
    ),
    "config.json with text for a number": (
        TRAIN, config(num_hidden_layers="three"), {}, ["config.json"],
    ),
    "truncated model": (TRAIN, lambda p: truncate(p.model / "model.safetensors"), {}, ["model.safetensors"]),
    "empty model file": (TRAIN, lambda p: truncate(p.model / "model.safetensors", 0), {}, ["model.safetensors"]),
    "no model file": (TRAIN, lambda p: (p.model / "model.safetensors").unlink(), {}, ["safetensors"]),
    "model lacks a tensor": (
        TRAIN, lambda p: change_tensors(p.model / "model.safetensors", lambda t: t.pop("model.norm.weight")), {},
        ["missing model.norm.weight"],
    ),
    "NaN in the model": (
        TRAIN, lambda p: change_tensors(p.model / "model.safetensors", spoil_tensor("up_proj.weight", torch.nan)), {},
        ["up_proj.weight", "NaN"],
    ),
    "truncated data": (TRAIN, lambda p: truncate(p.data / "train.safetensors"), {}, ["train.safetensors"]),
    "missing validation data": (TRAIN, lambda p: (p.data / "val.safetensors").unlink(), {}, ["val.safetensors"]),
    "broken data.json": (TRAIN, lambda p: truncate(p.data / "data.json"), {}, ["data.json"]),
    "data.json lacks a key": (
        TRAIN, lambda p: change_json(p.data / "data.json", prompt_style=None), {}, ["data.json", "prompt_style"],
    ),
    "a token that the model does not have": (
        TRAIN, lambda p: change_tensors(p.data / "train.safetensors", spoil_tensor("tokens", 512)), {}, ["512"],
    ),
    "sample longer than the context": (
        TRAIN, config(max_position_embeddings=8), {}, ["context is 8", "--max_seq_length"],
    ),
    "out_dir holds a run": (
        TRAIN, lambda p: (p.out.mkdir(), write(p.out / "metrics.csv", "step\n1\n")), {}, ["result", "--resume"],
    ),
    "out_dir is a file": (TRAIN, lambda p: write(p.out, "a file"), {}, ["result"]),
    # generate.py
    "no model": (GENERATE, nothing, {"checkpoint_dir": None}, ["--checkpoint_dir", "--adapter_dir"]),
    "two kinds of prompt": (GENERATE, nothing, {"prompts_file": "rows.jsonl"}, ["--prompt", "--prompts_file"]),
    "top_p of 2": (GENERATE, nothing, {"top_p": 2}, ["--top_p 2"]),
    "negative temperature": (GENERATE, nothing, {"temperature": -0.5}, ["--temperature -0.5"]),
    "temperature is NaN": (GENERATE, nothing, {"temperature": "nan"}, ["--temperature nan"]),
    "no new tokens": (GENERATE, nothing, {"max_new_tokens": 0}, ["--max_new_tokens 0"]),
    "empty stop": (GENERATE, nothing, {"stop": '[""]'}, ["--stop"]),
    "unknown style for a prompt": (GENERATE, nothing, {"prompt_style": "poem"}, ["--prompt_style", "poem"]),
    "quantizer for generation": (GENERATE, nothing, {"quantize": "gptq"}, ["--quantize", "gptq", "bnb.nf4"]),
    "adapter is no adapter": (GENERATE, nothing, {"adapter_dir": "data"}, ["adapter_config.json"]),
    "truncated adapter": (
        GENERATE, lambda p: truncate(p.adapter / "adapter_model.safetensors"), {"adapter_dir": "adapter"},
        ["adapter_model.safetensors"],
    ),
    "empty adapter": (
        GENERATE, lambda p: truncate(p.adapter / "adapter_model.safetensors", 0), {"adapter_dir": "adapter"},
        ["adapter_model.safetensors"],
    ),
    "NaN in the adapter": (
        GENERATE, lambda p: change_tensors(p.adapter / "adapter_model.safetensors", spoil_tensor("lora_B", torch.nan)),
        {"adapter_dir": "adapter"}, ["lora_B", "NaN"],
    ),
    "adapter of another model": (GENERATE, nothing, {"adapter_dir": "other_adapter"}, ["other_adapter", "q_proj"]),
    "prompt beyond the context": (GENERATE, nothing, {"prompt": LONG}, ["256", "tokens"]),
    "empty prompt": (GENERATE, nothing, {"prompt": "", "prompt_style": "plain"}, ["prompt is empty"]),
    "missing prompts": (GENERATE, nothing, {"prompt": None, "prompts_file": "gone.txt"}, ["gone.txt"]),
    "prompts that are not UTF-8": (
        GENERATE, file("p.txt", b"caf\xe9\n"), {"prompt": None, "prompts_file": "p.txt"}, ["p.txt", "UTF-8"],
    ),
    "broken JSON among the prompts": (
        GENERATE, file("p.jsonl", '{"prompt": "a"}\n{"prompt"\n'), {"prompt": None, "prompts_file": "p.jsonl"},
        ["p.jsonl:2"],
    ),
    "prompts without a prompt": (
        GENERATE, file("p.jsonl", '{"text": "a"}\n'), {"prompt": None, "prompts_file": "p.jsonl"},
        ["p.jsonl:1", '"prompt"'],
    ),
    "messages of prompts end with an answer": (
        GENERATE, file("p.jsonl", '{"messages": [{"role": "assistant", "content": "a"}]}\n'),
        {"prompt": None, "prompts_file": "p.jsonl"}, ["user"],
    ),
    "input of a prompt is a number": (
        GENERATE, file("p.jsonl", '{"prompt": "a", "input": 5}\n'),
        {"prompt": None, "prompts_file": "p.jsonl"}, ["text"],
    ),
    # eval/exact_match.py
    "exact match without a model": (MATCH, nothing, {"checkpoint_dir": None}, ["--checkpoint_dir"]),
    "exact match on nothing": (MATCH, rows(""), {}, ["rows.jsonl"]),
    "exact match on a picture": (MATCH, nothing, {"data": "data/lengths.png"}, ["lengths.png", ".jsonl"]),
    "exact match with broken rows": (MATCH, rows('{"a"\n'), {}, ["rows.jsonl:1"]),
    "exact match without answers": (
        MATCH, rows('{"messages": [{"role": "user", "content": "a"}]}\n'), {}, ["rows.jsonl:1", "answer"],
    ),
    "exact match with odd messages": (MATCH, rows('{"messages": "hi"}\n'), {}, ["rows.jsonl:1"]),
    "exact match of no sample": (MATCH, nothing, {"limit": 0}, ["--limit 0"]),
    # convert_hf_checkpoint.py
    "nothing to convert": (CONVERT, nothing, {}, ["--repo_id", "--source", "--adapter_dir"]),
    "merging a truncated adapter": (
        CONVERT, lambda p: truncate(p.adapter / "adapter_model.safetensors"), {"adapter_dir": "adapter"},
        ["adapter_model.safetensors"],
    ),
    "merging into another model": (CONVERT, nothing, {"adapter_dir": "other_adapter", "source": "model"}, ["q_proj"]),
    "converting nowhere": (CONVERT, nothing, {"source": "gone"}, ["gone"]),
}  # fmt: skip


def command(place, script, flags):
    values = GOOD_FLAGS[script](place) | flags
    return [script, *(f"--{name}={value}" for name, value in values.items() if value is not None)]


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_answered_in_one_line(place, case):
    script, spoil, flags, words = CASES[case]
    spoil(place)
    before = state(place.root)
    result = run_here(*command(place, script, flags))
    check_refusal(*result, *words)
    assert state(place.root) == before


@pytest.mark.parametrize("script", [PREPARE, TRAIN, GENERATE, MATCH])
def test_the_good_flags_are_good(place, script):
    """Or the cases above would prove nothing."""
    code, out, err = run_here(*command(place, script, {}))
    assert code == 0 and "Traceback" not in err, err
    assert out


@pytest.mark.parametrize("case", ["unknown quantizer", "truncated model", "ragged CSV", "two kinds of prompt"])
def test_a_mistake_in_a_process(place, run_script, case):
    """The same, as a user sees it."""
    script, spoil, flags, words = CASES[case]
    spoil(place)
    before = state(place.root)
    name, *args = command(place, script, {k: place.root / v if k == "data" else v for k, v in flags.items()})
    check_refusal(*run_script(name, *args, env={"OMP_NUM_THREADS": "1"}), *words)
    assert state(place.root) == before


def test_a_mistyped_flag_is_answered_before_torch_is_imported(run_script, monkeypatch):
    """In a second, not in ten."""
    for script in (PREPARE, TRAIN, GENERATE, MATCH, CONVERT):
        monkeypatch.setattr(sys, "argv", [script, "--flag", "1"])
        loaded = {name: module for name, module in sys.modules.items() if name.split(".")[0] in ("torch", "lightning")}
        assert loaded
        for name in loaded:
            monkeypatch.setitem(sys.modules, name, None)  # importing it fails now
        check_refusal(*run_here(script, "--flag", "1"), "--flag")
        monkeypatch.undo()


def test_ctrl_c_is_no_traceback(place, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Transformer, "hidden_states", interrupt)
    code, _, err = run_here(*command(place, TRAIN, {}))
    assert code == 130 and "Traceback" not in err and err.endswith("interrupted\n")
    assert not (place.out / "final").exists()
    assert re.search("config.yaml", " ".join(map(str, place.out.iterdir())))
