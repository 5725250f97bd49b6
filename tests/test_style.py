"""Manners that ruff does not know: hints on what is public, and names that shadow nothing."""

import ast
import importlib.metadata
import subprocess
import sys

import pytest
from conftest import ROOT
from test_imports import FILES

# --------------------------------------------------------------------------------------------------------- type hints


def public_functions(tree):
    """(name, node) of each public function, and of each public method of a public class, of a module."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name[0] != "_":
            yield node.name, node
        elif isinstance(node, ast.ClassDef) and node.name[0] != "_":
            yield from ((f"{node.name}.{name}", method) for name, method in public_functions(node))


def without_hint(function):
    """The parameters of a function, except self and cls, without a type hint; and "return" if the result has none."""
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    missing = [arg.arg for arg in every if arg and arg.annotation is None and arg.arg not in ("self", "cls")]
    return missing + ["return"] * (function.returns is None)


@pytest.mark.parametrize(
    "path", [path for path in FILES if not path.stem.endswith("_gpu")], ids=lambda path: str(path.relative_to(ROOT))
)
def test_public_functions_have_type_hints(path):  # those in Triton's language cannot
    functions = public_functions(ast.parse(path.read_text()))
    missing = {f"{name}, line {node.lineno}": without for name, node in functions if (without := without_hint(node))}
    assert not missing


def test_a_missing_hint_would_be_found():
    code = "class A:\n    def f(self, x, y: int): ...\n    def _g(self, x): ...\ndef h(*args: int) -> int: ...\n"
    found = {name: without_hint(node) for name, node in public_functions(ast.parse(code))}
    assert found == {"A.f": ["x", "return"], "h": []}


# -------------------------------------------------------------------------------------------------------------- names

# Scripts are run from this folder, so a name at its top comes before any package of that name. Once a file of ours was
# called kernels: bitsandbytes and transformers, which look whether a package of that name is there, found ours.
NAMES = sorted({path.stem for path in ROOT.glob("*.py")} | {path.name for path in ROOT.glob("[a-z]*/")})
SEARCHED = (
    "accelerate", "bitsandbytes", "datasets", "huggingface_hub", "lightning", "lightning_fabric", "lm_eval", "peft",
    "pytorch_lightning", "safetensors", "tokenizers", "torch", "transformers",
)  # fmt: skip


def looked_for(names):
    """The lines in which an installed package of SEARCHED imports a module of these names, or asks if it is there."""
    site = importlib.metadata.distribution("torch").locate_file("")
    one = "|".join(names)
    asked = rf"(find_spec|_available|import_module|RequirementCache|optional_import)\( *[\"']({one})[\"'.]"
    pattern = rf"{asked}|^ *(from|import) ({one})( |\.|$)"
    folders = [str(site / package) for package in SEARCHED if (site / package).is_dir()]
    command = ["grep", "-rnE", "--include=*.py", pattern, *folders]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()


def test_no_name_of_ours_is_one_of_python_or_of_an_installed_package():
    taken = importlib.metadata.packages_distributions()
    assert [(name, taken.get(name)) for name in NAMES if name in taken or name in sys.stdlib_module_names] == []


def test_no_name_of_ours_is_one_that_packages_look_for():
    assert {"model", "ops", "eval"} <= set(NAMES)
    lines = looked_for([*NAMES, "kernels"])
    assert any("kernels" in line for line in lines), "the search finds what is known to be there"
    assert [line for line in lines if "kernels" not in line.partition(":")[2]] == []
