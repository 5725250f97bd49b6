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
    clean = {key: value for key, value in os.environ.items() if key not in process.DEFAULTS}
    command = [sys.executable, "-c", UNTIL_TORCH, json.dumps([*process.DEFAULTS]), str(ROOT / script), *SCRIPTS[script]]
    done = subprocess.run(command, env=clean | given, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout, done.stderr[-1000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_sets_them_before_torch_is_imported(script):
    assert environment_at_torch(script, {}) == process.DEFAULTS


def test_what_the_user_set_wins():
    found = environment_at_torch("finetune.py", {"LRU_CACHE_CAPACITY": "3"})
    assert found == process.DEFAULTS | {"LRU_CACHE_CAPACITY": "3"}


def test_a_program_that_is_not_ours_gets_the_users_environment_back(monkeypatch):
    monkeypatch.setattr(process, "_set_here", set())
    ours, theirs = process.DEFAULTS
    monkeypatch.delenv(ours, raising=False)
    monkeypatch.setenv(theirs, process.DEFAULTS[theirs])  # the very value that we would set
    process.set_defaults()
    assert os.environ[ours] == process.DEFAULTS[ours]
    clean = process.environment_without_defaults()
    assert ours not in clean and clean[theirs] == process.DEFAULTS[theirs]
