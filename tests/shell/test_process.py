"""Environment variables that have to be there before torch is imported, and a user's own that win."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from shell import process

# Runs a script up to where it imports torch, and prints the variables as they are then.
UNTIL_TORCH = """
import json, os, runpy, sys
keys, path, *sys.argv[1:] = sys.argv[1:]
class Watch:
    def find_spec(self, name, *_):
        if name == "torch":
            print(json.dumps({key: os.environ.get(key) for key in json.loads(keys)}), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Watch())
sys.path.insert(0, os.path.dirname(path))
runpy.run_path(path, run_name="__main__")
"""
SCRIPTS = {
    "finetune.py": ("--checkpoint_dir", "x", "--data_dir", "y"),
    "generate.py": ("--checkpoint_dir", "x", "--prompt", "y"),
    "eval/helm_server.py": ("--checkpoint_dir", "x"),
    "eval/exact_match.py": ("--checkpoint_dir", "x", "--data", str(ROOT / "README.md")),
}


def environment_at_torch(script, given):
    """The variables of DEFAULTS when a script, started with `given` in its environment, imports torch."""
    keys = json.dumps([*process.DEFAULTS])
    clean = {key: value for key, value in os.environ.items() if key not in {*process.DEFAULTS, "OMP_WAIT_POLICY"}}
    command = [sys.executable, "-c", UNTIL_TORCH, keys, str(ROOT / script), *SCRIPTS[script]]
    done = subprocess.run(command, env=clean | given, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout, done.stderr[-1000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_sets_them_before_torch_is_imported(script):
    assert environment_at_torch(script, {}) == {key: value for key, (value, *_) in process.DEFAULTS.items()}


def test_what_the_user_set_wins():
    found = environment_at_torch("finetune.py", {"GOMP_SPINCOUNT": "9", "LRU_CACHE_CAPACITY": "3"})
    assert (found["GOMP_SPINCOUNT"], found["LRU_CACHE_CAPACITY"]) == ("9", "3")
    assert environment_at_torch("finetune.py", {"OMP_WAIT_POLICY": "active"})["GOMP_SPINCOUNT"] is None


@pytest.mark.parametrize("variable", process.DEFAULTS)
def test_a_default_is_set_unless_the_user_decided(variable, monkeypatch):
    value, *alternatives = process.DEFAULTS[variable]
    for name in (variable, *alternatives):
        monkeypatch.delenv(name, raising=False)
    process.set_defaults()
    assert os.environ[variable] == value
    for name in (variable, *alternatives):
        monkeypatch.delenv(variable)
        monkeypatch.setenv(name, "7")
        process.set_defaults()
        assert os.environ.get(variable) == ("7" if name == variable else None)
        monkeypatch.delenv(name)
        monkeypatch.setenv(variable, value)
