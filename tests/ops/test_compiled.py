"""The C++ on processors that lack what this one has: the same tests with fewer instructions."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
COMPILER = shutil.which("g++")


@pytest.mark.skipif(platform.machine() != "x86_64" or not COMPILER, reason="no g++ for x86_64")
@pytest.mark.parametrize("without", ["", "-mno-avx512bf16", "-mno-avx512f", "-mno-avx2"])  # and all without AMX
def test_fewer_instructions_give_the_same(without, tmp_path):
    wrapper = tmp_path / "g++"
    wrapper.write_text(f'#!/bin/sh\nexec {COMPILER} "$@" -mno-amx-tile -mno-amx-bf16 {without}\n')
    wrapper.chmod(0o755)
    what = "rms_norm or swiglu or rotate or loss or compiled_attention or quantised or several_rows"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", what]
    command += [TESTS / name for name in ("ops/test_kernels.py", "ops/test_attention.py", "test_generate.py")]
    environment = {**os.environ, "CXX": str(wrapper), "XDG_CACHE_HOME": str(tmp_path)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=TESTS.parent)
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout
    assert {path.name.split("-")[0] for path in (tmp_path / "onetune").iterdir()} == {"decode_cpu", "kernels_cpu"}
