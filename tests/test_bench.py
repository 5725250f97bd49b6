"""The comparisons in bench/ run, and their two sides do the same work. Their timings are no matter of tests."""

import json

import prepare_data


def test_finetune_against_peft(tiny_model_dir, tmp_path, run_script):
    rows = [{"prompt": f"what is {i} " * (1 + i % 4), "completion": f"it is {i}"} for i in range(40)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare_data.main(
        prepare_data.Settings(data=data, checkpoint_dir=tiny_model_dir, out_dir=tmp_path / "data", val_fraction=0)
    )
    code, out, err = run_script(
        "bench/finetune.py", "--checkpoint_dir", tiny_model_dir, "--data_dir", tmp_path / "data",
        "--steps", 4, "--runs", 1, "--global_batch_size", 8, "--out_file", tmp_path / "results.jsonl",
    )  # fmt: skip
    assert code == 0, err
    assert "ratio" in out
    ours, theirs = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert abs(ours["first_loss"] / theirs["first_loss"] - 1) < 0.01
    assert min(ours["last_grad_norm"], theirs["last_grad_norm"]) > 0
