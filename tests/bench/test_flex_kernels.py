"""FlexAttention's kernels, made for a card that is not here: Inductor writes them, Triton and ptxas take them."""

import pytest

pytest.importorskip("triton")


def test_kernels_compile_for_a_card_that_is_not_here(run_script):
    flags = ("--cards", "[90]", "--head_dims", "[16]", "--dtypes", "[bfloat16]")
    code, out, err = run_script("bench/machine/flex_kernels.py", *flags)
    assert code == 0, err
    forward, backward = (line.split() for line in out.splitlines())
    assert forward[:4] == ["90", "bfloat16", "16", "forward"] and backward[3] == "backward"
    assert all(0 < int(line[4]) < int(line[6].replace(",", "")) for line in (forward, backward))
