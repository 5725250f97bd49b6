"""bench/machine/kernels.py: every Triton kernel compiles for every card, without a GPU, and takes what a card has."""

import os
from pathlib import Path

import pytest
from conftest import ROOT, kernels

from ops import gpu

CARDS = ("80", "86", "89", "90")
pytestmark = pytest.mark.skipif(not gpu.has_triton(), reason="Triton is not installed")


@pytest.fixture(scope="module")
def table(tmp_path_factory, run_script):
    """The rows of its table: what each kernel takes. Compiled anew, not taken from Triton's cache."""
    environment = {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    code, out, err = run_script("bench/machine/kernels.py", env=environment, timeout=900)
    assert code == 0, err
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line[:1] == "|"]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_every_kernel_compiles_for_every_card_without_spilling(table):
    assert {(row["kernel"], row["sm"]) for row in table} == {(name, card) for name in kernels() for card in CARDS}
    for row in table:
        assert 0 < int(row["registers"]) <= 255 and row["spilled"] == "0" and int(row["occupancy"][:-1]) > 0, row


def test_a_kernel_that_no_card_holds_is_refused(run_script, tmp_path):
    """Its rows are too wide for the registers: what is then spilled is named."""
    wide = tmp_path / "project"
    wide.mkdir()
    for entry in ROOT.iterdir():
        if entry.name not in (".git", "ops", "bench"):
            (wide / entry.name).symlink_to(entry)
    for folder in ("ops", "bench"):
        os.system(f"cp -r {ROOT / folder} {wide / folder}")
    file = wide / "ops" / "gpu.py"
    file.write_text(file.read_text().replace("min(16, max(4, rows * width // 512))", "1"))
    arguments = ("--models", "[Llama-2-7B]", "--cards", "[90]")
    code, _, err = run_script(Path(os.path.relpath(wide / "bench/machine/kernels.py", ROOT)), *arguments, timeout=600)
    assert code == 2 and "registers are spilled" in err and "norm_backward on sm_90" in err, err
