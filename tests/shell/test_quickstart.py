"""The end of quickstart.sh: how to activate the environment, and commands to try next whose flags exist."""

import dataclasses
import re
import runpy
import subprocess

from conftest import ROOT

TEXT = (ROOT / "quickstart.sh").read_text()


def test_it_is_bash():
    assert subprocess.run(["bash", "-n", str(ROOT / "quickstart.sh")]).returncode == 0


def test_it_ends_with_the_way_on():
    end = TEXT.rpartition("cat <<EOF")[2]
    assert "source .venv/bin/activate" in end
    assert len(re.findall(r"^  python ", end, re.MULTILINE)) == 3


def test_every_flag_exists():
    commands = re.findall(r"(?:show|^ ) python ((?:eval/)?\w+\.py)((?:[^\n\\]|\\\n)*)", TEXT, re.MULTILINE)
    assert len(commands) >= 10
    for script, rest in commands:
        flags = {field.name for field in dataclasses.fields(runpy.run_path(str(ROOT / script))["Settings"])}
        assert set(re.findall(r"--(\w+)", rest)) <= flags, script
