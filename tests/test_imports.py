"""Imports point one way, by folder; product code stands on its own feet; scripts are quick to answer a mistake."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

# From the ground up: a folder or top-level file may import those above it in this list, and itself.
# docs/architecture.md draws it. Folders in one row know nothing of each other.
LAYERS = [
    ["shell"],
    ["store"],
    ["ops", "tracking"],
    ["experts"],
    ["model"],
    ["quantize"],
    ["adapters"],
    ["lora"],
    ["weights", "text"],
    ["samples"],
    ["batching"],
    ["objectives"],
    ["inference", "preparation", "training"],
    ["generate", "prepare_data", "convert_hf_checkpoint", "finetune", "publishing", "flows"],
    ["eval"],
    ["search", "runs"],
    ["sweep"],
]
RANK = {folder: rank for rank, names in enumerate(LAYERS) for folder in names}
FOREIGN = {"transformers", "peft", "litgpt", "lit_gpt", "torchtune", "trl", "accelerate", "unsloth", "schedulefree"}
HEAVY = ("torch", "lightning", "bitsandbytes", "transformers")
OURS = RANK.keys() | {"examples", "bench", "tests"}
FILES = sorted(path for folder in RANK for path in (*ROOT.glob(f"{folder}.py"), *ROOT.glob(f"{folder}/**/*.py")))


def folder_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path):
    """The modules that a file imports anywhere in it, with dots, and the line; not those for type hints alone."""
    tree = ast.parse(path.read_text())
    for_hints = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    left_out = {id(below) for node in for_hints for below in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in left_out:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: a relative import; imports are absolute"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "importlib.import_module"):
            pytest.fail(f"{path.name}:{node.lineno}: an import that cannot be read off the code")


def file_of(module):
    """The file of ours that an import such as "ops.norm.rms_norm" or "ops.norm" means, or None."""
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:end]).with_suffix(".py")
        if path in FILES:
            return path
    return None


def check(path, folder):
    for module, line in imports(path):
        name = module.partition(".")[0]
        assert name not in FOREIGN, f"{path.name}:{line}: {name} is a reference in tests, no part of the product"
        allowed = name not in OURS or name == folder or name in RANK and RANK[name] < RANK[folder]
        assert allowed, f"{path.name}:{line}: {folder} must not import {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    check(path, folder_of(path))


def test_every_python_file_at_the_top_has_its_place():
    assert {folder_of(path) for path in ROOT.glob("*.py")} <= RANK.keys()


def test_no_file_imports_itself_through_others():
    graph = {path: {file_of(module) for module, _ in imports(path)} - {None} for path in FILES}
    for path in FILES:
        seen, open_ = set(), [path]
        while open_:
            for below in graph[open_.pop()] - seen:
                seen.add(below)
                open_.append(below)
        assert path not in seen, f"{path} is part of a circle"


@pytest.mark.parametrize("folder", [folder for folder in RANK if (ROOT / folder).is_dir()])
def test_a_folder_begins_with_its_map(folder):
    """`__init__.py` is a docstring that names every file of the folder, and nothing else."""
    for init in (ROOT / folder).rglob("__init__.py"):
        (docstring,) = ast.parse(init.read_text()).body
        for path in init.parent.iterdir():
            if path.name[0] not in "_." and path.suffix in (".py", ".cpp", ".h", ".sh"):
                assert path.name in docstring.value.value, f"{init}: {path.name} is not on the map"


def test_an_arrow_back_would_be_found(tmp_path):
    path = tmp_path / "model.py"
    path.write_text("def f():\n    from training.optimizer import learning_rate\n")
    with pytest.raises(AssertionError, match="model.py:2: model must not import training.optimizer"):
        check(path, "model")


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
