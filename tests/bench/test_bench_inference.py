"""The comparison of generation in bench/ runs, and its sides give the same tokens. Timings are no matter of tests."""

import json

import pytest
from conftest import ROOT

import prepare_data


@pytest.fixture(scope="module")
def tiny_data(tiny_model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    rows = [{"prompt": f"what is {i} " * 5, "completion": f"it is {i}"} for i in range(20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare_data.main(
        prepare_data.Settings(
            data=folder / "rows.jsonl", checkpoint_dir=tiny_model_dir, out_dir=folder / "data", val_fraction=0
        )
    )
    return folder / "data"


def test_generation_against_transformers(tiny_model_dir, tiny_data, tmp_path, run_script):
    out_file = tmp_path / "results.jsonl"
    code, out, err = run_script(
        "bench/inference/speed.py", "--checkpoint_dir", tiny_model_dir, "--data_dir", tiny_data, "--dtype", "fp32",
        "--sides", "[onetune,transformers,transformers-static]", "--batches", "[1,3]", "--prompt_tokens", 12,
        "--new_tokens", 6, "--runs", 1, "--repeats", 1, "--venvs_dir", tmp_path, "--out_file", out_file,
        "--before_dir", ROOT,
    )  # fmt: skip
    assert code == 0, err
    lines = [json.loads(line) for line in out_file.read_text().splitlines()]
    sides = ("onetune", "transformers", "transformers-static", "onetune before")
    assert [(line["side"], line["batch"]) for line in lines] == [(side, batch) for batch in (1, 3) for side in sides]
    for batch in (1, 3):
        ours, *theirs = [line["outputs"] for line in lines if line["batch"] == batch]
        assert len(ours) == batch and all(len(row) == 6 for row in ours)
        assert theirs == [ours, ours, ours]
    layers = 2 * (4 * 48 * 48 - 2 * 48 * 24 + 3 * 48 * 80) // 2 * 3 + 512 * 48  # the tiny model's, and its head
    assert lines[0]["bytes_per_step"] == 4 * layers
    assert all(line["decode_tokens_per_second"] > 0 and line["read_bytes_per_second"] > 0 for line in lines)
    assert "times the fastest peer" in out and "times the decoding before" in out
    assert out_file.with_suffix(".png").stat().st_size > 1000


def test_examples_that_are_read_once(tiny_model_dir, tmp_path, run_script):
    """The longer beginnings are, the fewer tokens are read; and the answers are the same."""
    rows = [{"question": f"what is the answer {number}", "answer": f"it is {number}"} for number in range(14)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = run_script(
        "bench/inference/prefixes.py", "--checkpoint_dir", tiny_model_dir, "--data", tmp_path / "rows.jsonl",
        "--dtype", "fp32", "--shots", 8, "--clients", 2, "--new_tokens", 4, "--runs", 2,
        "--out_file", tmp_path / "out.jsonl",
    )  # fmt: skip
    assert code == 0, err
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["side"] for line in lines] == ["with the cache", "without"] * 2
    assert [line["hits"] for line in lines if line["side"] == "without"] == [0, 0]
    for line in lines[::2]:
        assert line["hits"] >= 4 and line["tokens_read"] < 0.5 * line["prompt_tokens"]
    assert "6 of 6 are equal" in out


def test_a_side_that_fails_is_reported_in_one_line(tiny_model_dir, tiny_data, tmp_path, run_script):
    """LitGPT does not know the tiny model; here its place is taken by an environment without it."""
    code, out, err = run_script(
        "bench/inference/speed.py", "--checkpoint_dir", tiny_model_dir, "--data_dir", tiny_data, "--sides", "[litgpt]",
        "--batches", "[1]", "--prompt_tokens", 12, "--new_tokens", 6, "--runs", 1, "--repeats", 1,
        "--venvs_dir", tmp_path, "--out_file", tmp_path / "results.jsonl",
        env={"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""},
    )  # fmt: skip
    assert code == 0, err
    assert "litgpt, 1 prompt: not measured: cannot be installed" in out
