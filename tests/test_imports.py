"""Imports point one way, product code stands on its own feet, and scripts are quick to answer a mistake."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

# What each file may import of ours, beside cli.py and files.py. A new file has to find its place here.
ROOMS = {"model", "quantize", "lora", "checkpoint"}
DATA = {"drawing", "reading", "records", "mixture", "cleaning", "rendering", "spool", "data_report"}
ALLOWED = {
    "cli": set(),
    "files": set(),
    "compiled": set(),
    "kernels": {"compiled"},
    "attention": {"compiled", "kernels"},
    "safetensors_format": set(),
    "model": {"kernels", "attention"},
    "quantize": {"kernels", "model"},
    "merge": {"attention", "model", "quantize", "lora"},
    "divergence": {"model"},
    "sensitivity": {"divergence", "attention", "kernels", "model", "lora", "quantize"},
    "lora": {"kernels", "model", "safetensors_format"},
    "checkpoint": {"model", "quantize", "lora", "safetensors_format"},
    "chat_template": set(),
    "prompts": {"chat_template"},
    "tokenizer": {"prompts"},
    "batching": {"safetensors_format"},
    "metrics": set(),
    "gguf_format": {"model", "checkpoint"},
    "convert_hf_checkpoint": {*ROOMS, "merge", "gguf_format", "tokenizer", "prompts"},
    "reading": set(),
    "records": {"reading"},
    "mixture": {"reading", "records"},
    "cleaning": set(),
    "drawing": set(),
    "rendering": {"cleaning", "prompts", "reading", "records"},
    "spool": {"cleaning", "safetensors_format"},
    "data_report": {"batching", "tokenizer", "prompts"},
    "prepare_data": {*DATA, "tokenizer", "prompts", "batching"},
    "tracker": {"metrics"},
    "plan": {"kernels", "attention", "model", "quantize", "lora", "tracker"},
    "budget": {*ROOMS, "kernels", "batching", "metrics", "plan"},
    "optimizer": {"quantize"},
    "runs": {"checkpoint", "budget", "plan", "quantize"},
    "bad_numbers": {"batching", "budget", "optimizer"},
    "finetune": {
        *ROOMS,
        "runs",
        "attention",
        "tokenizer",
        "prompts",
        "batching",
        "metrics",
        "budget",
        "optimizer",
        "bad_numbers",
    },
    "decode": {"attention", "compiled", "kernels", "model", "quantize", "lora"},
    "scoring": {"attention", "kernels"},
    "sampling": {"tokenizer"},
    "generate": {*ROOMS, "decode", "sampling", "tokenizer", "prompts"},
    "serving": {"sampling", "tokenizer"},
}
BELOW_CLI = {"cli": set(), "files": {"cli"}}
EVERYONE = {"cli", "files"}
FOREIGN = {"transformers", "peft", "litgpt", "lit_gpt", "torchtune", "trl", "accelerate", "unsloth"}
HEAVY = ("torch", "lightning", "bitsandbytes", "transformers")

FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("eval/*.py")])
OURS = {path.stem for path in ROOT.glob("*.py")}


def imports(path):
    """The modules that a file imports anywhere in it, by their first name, with the line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: a relative import; the folder is flat"
            yield node.module.partition(".")[0], node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "importlib.import_module"):
            pytest.fail(f"{path.name}:{node.lineno}: an import that cannot be read off the code")


def allowed(path):
    if path.parent.name == "eval":
        return ALLOWED.keys() - {"convert_hf_checkpoint", "finetune"}  # prepare_data for its readers of files
    assert path.stem in ALLOWED, f"{path.name} is new: give it its place among the imports in {__file__}"
    return BELOW_CLI.get(path.stem, ALLOWED[path.stem] | EVERYONE)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    for name, line in imports(path):
        assert name not in FOREIGN, f"{path.name}:{line}: {name} is a reference in tests, no part of the product"
        assert name not in OURS or name in allowed(path), f"{path.name}:{line}: must not import {name}"


def test_the_allowed_imports_have_no_circle():
    graph = {**{name: below | EVERYONE for name, below in ALLOWED.items()}, **BELOW_CLI}
    for name in graph:
        seen, open_ = set(), [name]
        while open_:
            for below in graph[open_.pop()] - seen:
                seen.add(below)
                open_.append(below)
        assert name not in seen


def test_an_arrow_back_would_be_found(tmp_path):
    path = tmp_path / "model.py"
    path.write_text("def f():\n    from finetune import main\n")
    with pytest.raises(AssertionError, match="model.py:2: must not import finetune"):
        test_imports_point_one_way(path)


def parses_first(path):
    return "cli.parse(" in path.read_text() and path.name != "cli.py"


@pytest.mark.parametrize("path", [*filter(parses_first, FILES)], ids=lambda path: str(path.relative_to(ROOT)))
def test_a_mistyped_flag_is_answered_before_the_heavy_imports(path):
    command = [sys.executable, "-X", "importtime", str(path), "--no_such_flag"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr[-2000:]
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "jsonargparse" in loaded
    assert not loaded & set(HEAVY)
