"""The comparison under lm-eval in bench/ runs, and its sides agree. Timings are no matter of tests."""

import json

import pytest

pytest.importorskip("lm_eval")

ROWS = [
    {"context": f"We met {name} there. " * n, "question": "Who was late?", "ans0": name, "ans1": "the bus", "ans2": "I"}
    for n, name in enumerate(("Ann", "Bo", "Cy", "Di", "Ed"), start=1)
]


def test_against_hf(tiny_model_dir, tmp_path, run_script):
    data, out_file = tmp_path / "rows.jsonl", tmp_path / "results.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    code, out, err = run_script(
        "bench/inference/harness.py", "--checkpoint_dir", tiny_model_dir, "--data", data, "--questions", 4,
        "--batch_tokens", 200, "--runs", 1, "--out_file", out_file,
    )  # fmt: skip
    assert code == 0, err
    lines = [json.loads(line) for line in out_file.read_text().splitlines()]
    assert [line["side"] for line in lines] == ["onetune", "hf"]
    assert all(line["seconds"] > 0 and "scores" not in line for line in lines)
    assert "times as fast as hf; log-likelihoods within" in out


@pytest.mark.parametrize(("text", "says"), [('{"context": "a"}\n', "no column ans0"), ("", "no column")])
def test_other_data(tiny_model_dir, tmp_path, run_script, text, says):
    (tmp_path / "rows.jsonl").write_text(text)
    code, _, err = run_script(
        "bench/inference/harness.py", "--checkpoint_dir", tiny_model_dir, "--data", tmp_path / "rows.jsonl"
    )
    assert code == 2 and says in err and "Traceback" not in err
