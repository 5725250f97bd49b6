"""Mistakes of a user: each is answered in one line that names what is wrong, and leaves nothing half-written.

The cases are the rows of bad_inputs.yaml; a new case is a new line there.

Most cases run the real script in this process, as `python script.py …` would; some in a process of their own.
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
import yaml
from conftest import ROOT, SCRIPTS, tiny_reference, write_tiny_tokenizer
from safetensors.torch import load_file, save_file

import lora
import prepare_data
from model import Transformer
from weights import peft_format
from weights.checkpoint import load_model

ROWS = [{"instruction": f"what is {i}", "output": f"it is {i}"} for i in range(6)]


@pytest.fixture(scope="module")
def good(tmp_path_factory, tiny_model_dir):
    """Everything as it should be: a model, samples, prepared data, an adapter, and another model's of the same."""
    folder = tmp_path_factory.mktemp("good")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    prepare_data.main(prepare_data.Settings(data=data, checkpoint_dir=tiny_model_dir, out_dir=folder / "data"))
    shutil.copytree(tiny_model_dir, folder / "model")
    parameters = {"checkpoint_dir": "model", "data_dir": "data", "learning_rate": {"low": 1e-4, "high": 1e-2}}
    (folder / "search.yaml").write_text(yaml.safe_dump({"parameters": parameters, "trials": 1}))
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
        peft_format.save_adapter(model, config, folder / name, base)
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
    out, err, argv, path = io.StringIO(), io.StringIO(), sys.argv, list(sys.path)
    sys.argv = [script, *map(str, args)]
    sys.path.insert(0, str((ROOT / script).parent))
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv, sys.path[:] = argv, path
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


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def write_bytes(path, letters):
    path.write_bytes(letters.encode("latin-1"))


def repeat(path, text_and_times):
    text, times = text_and_times
    path.write_text(text * times)


def cut(path, share):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def change_json(path, changes):
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def change_tensors(path, changes):
    tensors = load_file(path)
    for part, value in changes.items():
        name = next(name for name in tensors if part in name)
        if value is None:
            tensors.pop(name)
        else:
            tensors[name].flatten()[0] = float(value) if tensors[name].is_floating_point() else value
    save_file(tensors, path, metadata={"format": "pt"})


def put_folder(path):
    path.unlink()
    path.mkdir()


SPOIL = {
    "write": write, "bytes": write_bytes, "repeat": repeat, "cut": cut, "flip": flip, "json": change_json,
    "tensor": change_tensors, "link": lambda path, target: path.symlink_to(path.parents[1] / target),
}  # fmt: skip


def spoil(place, row):
    """Do to the files what a row of the table says."""
    for name in row.get("remove", []):
        (place.root / name).unlink()
    for name in row.get("folder", []):
        put_folder(place.root / name)
    for key, function in SPOIL.items():
        for name, value in row.get(key, {}).items():
            function(place.root / name, value)


PREPARE, TRAIN, GENERATE, MATCH, CONVERT, SERVE = (
    "prepare_data.py", "finetune.py", "generate.py", "eval/exact_match.py", "convert_hf_checkpoint.py",
    "eval/helm_server.py",
)  # fmt: skip


def model_and_data(place):
    return {"checkpoint_dir": place.model, "data_dir": place.data}


GOOD_FLAGS = {
    PREPARE: lambda p: {"data": p.rows, "checkpoint_dir": p.model, "out_dir": p.out},
    TRAIN: lambda p: model_and_data(p) | {"out_dir": p.out, "max_steps": 1},
    GENERATE: lambda p: {"checkpoint_dir": p.model, "prompt": "what"},
    MATCH: lambda p: {"checkpoint_dir": p.model, "data": p.rows},
    "eval/lm_eval_harness.py": lambda p: {"checkpoint_dir": p.model, "eval_tasks": "[hellaswag]"},
    CONVERT: lambda p: {"out_dir": p.out},
    "runs.py": lambda p: {"out_dir": p.root},
    SERVE: lambda p: {"checkpoint_dir": p.model, "port": 0},
    "sweep.py": lambda p: {"sweep": p.root / "search.yaml", "out_dir": p.out},
    "eval/quality.py": lambda p: {"adapter_dir": p.adapter, "data": p.rows, "out_dir": p.out},
    "eval/helm_results.py": lambda p: {"suite_dir": p.root / "suite"},
    "tracking/upload.py": lambda p: {"run_dirs": p.root / "a_run"},
    "publishing/push_to_hub.py": lambda p: {
        "model_dir": p.adapter,
        "repo_id": "me/mine",
        "base_model": "org/base",
        "license": "mit",
        "out_dir": p.out,
    },
    "store/models.py": lambda p: {"push": p.model, "to": p.root / "shop" / "model"},
    "bench/training/accuracy.py": model_and_data,
    "bench/training/speed.py": model_and_data,
    "bench/training/fits.py": lambda p: {},
    "bench/roofline.py": lambda p: {},
    "bench/random_model.py": lambda p: {"shape": "Pythia-160M", "tokenizer_dir": p.model, "out_dir": "random"},
    "bench/training/gradients.py": lambda p: {"checkpoint_dir": p.model},
    "bench/inference/speed.py": model_and_data,
    "bench/inference/prefixes.py": lambda p: {"checkpoint_dir": p.model, "data": p.rows},
    "bench/gpu/measure.py": lambda p: {"part": "kernels", "out_dir": p.out},
    "bench/machine/flex_kernels.py": lambda p: {},
    "bench/machine/kernels.py": lambda p: {},
    "bench/machine/limits.py": lambda p: {"checkpoint_dir": p.model},
    "bench/inference/harness.py": lambda p: {"checkpoint_dir": p.model, "data": p.rows},
    "bench/machine/contention.py": model_and_data,
    "bench/training/memory.py": model_and_data,
    "bench/training/planners.py": model_and_data,
    "bench/scale.py": lambda p: {},
    "bench/scaling/clusters.py": lambda p: {},
    "bench/training/sweep.py": model_and_data,
    "bench/methods.py": model_and_data,
    "bench/training/saving.py": lambda p: {},
    "bench/training/loading.py": lambda p: {},
    "bench/preparation/speed.py": lambda p: {"checkpoint_dir": p.model, "data": p.rows},
    "bench/preparation/growth.py": lambda p: {"checkpoint_dir": p.model},
    "bench/preparation/many_samples.py": lambda p: {"checkpoint_dir": p.model},
    "bench/preparation/chat_templates.py": lambda p: {"checkpoint_dir": p.model, "data": p.rows},
}
TABLE = yaml.safe_load((ROOT / "tests" / "bad_inputs.yaml").read_text(encoding="utf-8"))
ROWS_BY_CASE = {row["case"]: (script, row) for script, rows in TABLE.items() for row in rows}


def command(place, script, flags):
    values = GOOD_FLAGS[script](place) | flags
    return [script, *(f"--{name}={value}" for name, value in values.items() if value is not None)]


def test_the_table_is_whole():
    """Each case once, none for a script that is not there, and nothing in a row that would be passed over."""
    assert len(ROWS_BY_CASE) == sum(map(len, TABLE.values())) >= 100
    assert GOOD_FLAGS.keys() == TABLE.keys()
    assert TABLE.keys() == {*map(str, SCRIPTS)}
    for _, row in ROWS_BY_CASE.values():
        assert row.keys() - {"case", "says", "flags", "remove", "folder"} <= SPOIL.keys() and row["says"]


@pytest.mark.parametrize("case", ROWS_BY_CASE)
def test_a_mistake_is_answered_in_one_line(place, case):
    script, row = ROWS_BY_CASE[case]
    spoil(place, row)
    before = state(place.root)
    result = run_here(*command(place, script, row.get("flags", {})))
    check_refusal(*result, *row["says"])
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
    script, row = ROWS_BY_CASE[case]
    spoil(place, row)
    before = state(place.root)
    flags = {key: place.root / value if key == "data" else value for key, value in row.get("flags", {}).items()}
    name, *args = command(place, script, flags)
    check_refusal(*run_script(name, *args), *row["says"])
    assert state(place.root) == before


def test_a_mistyped_flag_is_answered_before_torch_is_imported(run_script, monkeypatch):
    """In a second, not in ten."""
    for script in (PREPARE, TRAIN, GENERATE, MATCH, CONVERT, SERVE, "sweep.py"):
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
