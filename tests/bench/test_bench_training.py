"""The comparisons in bench/ run, and their sides do the same work. Their timings are no matter of tests."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SMALL

import prepare_data
from batching import Order
from bench import measuring
from bench.machine import limits
from bench.training import gradients, peers
from bench.training import speed as bench
from shell.cli import UserError


@pytest.fixture(scope="module")
def tiny_data(tiny_model_dir, tmp_path_factory):
    """A prepared folder of 64 samples, 16 of them for validation."""
    folder = tmp_path_factory.mktemp("bench")
    rows = [{"prompt": f"what is {i} " * (1 + i % 4), "completion": f"it is {i}"} for i in range(64)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare_data.main(
        prepare_data.Settings(
            data=folder / "rows.jsonl", checkpoint_dir=tiny_model_dir, out_dir=folder / "data", val_fraction=0.25
        )
    )
    return folder / "data"


@pytest.fixture(scope="module")
def compared(tiny_model_dir, tiny_data, run_script, tmp_path_factory):
    """A whole comparison with transformers + PEFT and with this checkout: what it printed, the file it added to."""
    out_file = tmp_path_factory.mktemp("out") / "results.jsonl"
    code, out, err = run_script(
        "bench/training/speed.py", "--checkpoint_dir", tiny_model_dir, "--data_dir", tiny_data, "--dtype", "fp32",
        "--peers", "[peft]", "--peer_micro_batch", "[3]", "--micro_batch_tokens", "[64]", "--mode", "lora-all",
        "--steps", 4, "--runs", 1, "--global_batch_size", 12, "--out_file", out_file,
        "--venvs_dir", out_file.parent / "venvs", "--before_dir", ROOT,
    )  # fmt: skip
    assert code == 0, err
    return out, out_file


def test_all_sides_do_the_same(compared):
    lines = ours, before, theirs = list(map(json.loads, compared[1].read_text().splitlines()))
    found = [(line["side"], line["micro_batch"]) for line in lines]
    assert found == [("onetune", 64), ("onetune before", 64), ("peft", 3)]
    assert all(before[key] == ours[key] for key in ("first_loss", "last_loss", "grad_norm", "commit"))
    assert theirs["step_tokens"] == ours["step_tokens"]
    assert theirs["first_loss"] == pytest.approx(ours["first_loss"], rel=1e-5)  # B is zero: the base model's
    assert theirs["last_loss"] == pytest.approx(ours["last_loss"], rel=0.01)  # A was drawn otherwise
    assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=0.5)


def test_lines_tell_what_was_measured_and_where(compared):
    for line in map(json.loads, compared[1].read_text().splitlines()):
        assert len(line["step_seconds"]) == 3 and min(line["step_seconds"]) > 0  # of all steps but the first
        rates = [n / t for n, t in zip(line["step_tokens"][2:], line["step_seconds"][1:], strict=True)]
        assert line["tokens_per_second"] == pytest.approx(sum(rates) / 2, rel=0.05)  # a median of two; rounded times
        assert 0.1 < line["peak_gb"] < 10 and line["first_step_seconds"] > sum(line["step_seconds"])
        assert 0 <= line["others_cpu"] <= 1
        assert line["machine"] == measuring.machine() and line["versions"]["torch"] == torch.__version__
        assert line["settings"]["mode"] == "lora-all" and line["settings"]["dtype"] == "fp32"


def test_share_of_the_limit(compared, tiny_data):
    (call,) = bench.calls(bench.read_lines(compared[1]))
    D, inner, d = SMALL["hidden_size"], SMALL["intermediate_size"], SMALL["hidden_size"] // 6
    blocks = SMALL["num_hidden_layers"] * (2 * D * D + 2 * D * 3 * d + 3 * D * inner)
    samples = bench.samples_of(tiny_data, mask_prompt=True)
    run = Order(len(samples), 1, 0)[2 * 12 : 4 * 12]  # of the steps that count
    share = samples.target_counts[run].sum().item() / samples.lengths[run].sum().item()
    assert 0.05 < share < 0.95
    rows = {row["side"]: row for row in bench.table_rows(call)}
    for line in call:
        row = rows.pop(line["side"])
        flops = line["tokens_per_second"] * 4 * (blocks + share * SMALL["vocab_size"] * D)
        assert row["limit"] == pytest.approx(flops / line["matrix_flops_per_second"]["fp32"])
    assert not rows


def test_table_and_chart_come_from_the_file_alone(compared, run_script):
    out, path = compared
    chart = path.with_suffix(".png")
    assert chart.read_bytes().startswith(b"\x89PNG")
    chart.unlink()
    code, again, err = run_script("bench/training/speed.py", "--report", path)
    assert code == 0, err
    assert again in out and chart.is_file()
    rows = [line for line in again.splitlines() if line.startswith("|") and " * " in line]
    assert sorted(row[2:16] for row in rows) == ["onetune before", "onetune, 64 to", "transformers +"]
    assert again.count("times the speed") == 2


def test_report_of_several_runs():
    """Medians, the best setting of a side, and a peer that could not be measured; on lines made by hand."""
    common = {
        "call": "now", "commit": "abc", "flops_per_token": 1e6, "matrix_flops_per_second": {"fp32": 1e9, "bf16": 5e8},
        "first_step_seconds": 1.0, "first_loss": 2.0, "last_loss": 1.0, "grad_norm": 0.5, "others_cpu": 0.0,
    }  # fmt: skip
    speeds = {("onetune", 64): (90, 300, 100), ("peft", 4): (40, 50, 60), ("peft", 1): (70, 80, 10)}
    call = [
        {**common, "side": side, "micro_batch": size, "tokens_per_second": speed, "peak_gb": speed / 10}
        for (side, size), values in speeds.items()
        for speed in values
    ]
    call.append({**common, "side": "trl", "micro_batch": 4, "unavailable": "no such thing"})
    rows = {(row["side"], row["micro_batch"]): row for row in bench.table_rows(call)}
    found = [(*side, row["tokens_per_second"], row["mark"]) for side, row in rows.items()]
    assert found == [("onetune", 64, 100, " *"), ("peft", 1, 70, " *"), ("peft", 4, 50, "")]
    assert rows["onetune", 64]["spread"] == (90, 300) and rows["onetune", 64]["limit"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"grad_norm": 0.0}, "transformers + PEFT, micro-batch 4: the gradient's norm is 0.0"),
        ({"grad_norm": float("nan")}, "transformers + PEFT, micro-batch 4: the gradient's norm is nan"),
        ({"first_loss": 2.1}, "onetune, micro-batch 64: the first loss is 2.0000, transformers + PEFT's 2.1000"),
        ({"side": "trl", "first_loss": 2.1}, "TRL, micro-batch 4: the first loss is 2.1000, onetune's 2.0000"),
    ],
)
def test_a_side_that_does_something_else_is_named(change, words):
    losses, good = {}, {"grad_norm": 1.0, "first_loss": 2.0}
    bench.check({**good, "side": "onetune", "micro_batch": 64}, losses)
    bench.check({**good, "first_loss": 2.01, "side": "peft", "micro_batch": 4}, dict(losses))
    with pytest.raises(UserError) as error:
        bench.check({**good, "side": "peft", "micro_batch": 4, **change}, losses)
    assert words in str(error.value)


def test_a_peer_that_cannot_be_measured_is_one_line(tiny_model_dir, tiny_data, tmp_path, monkeypatch, capsys):
    """It is not tried again, and the others are measured all the same; without ours there is nothing to compare."""

    def run_side(s, job, side, micro_batch):
        if side == refuses:
            raise measuring.Unavailable("no such thing")
        return {"tokens_per_second": 1.0, "peak_gb": 1.0, "first_loss": 1.0, "last_loss": 1.0, "grad_norm": 1.0}

    monkeypatch.setattr(bench, "run_side", run_side)
    monkeypatch.setattr(limits, "SECONDS", 0.0)
    s = bench.Settings(
        checkpoint_dir=tiny_model_dir, data_dir=tiny_data, peers=["litgpt", "peft"], steps=3, runs=2,
        global_batch_size=4, out_file=tmp_path / "results.jsonl",
    )  # fmt: skip
    refuses = "litgpt"
    bench.compare(s)
    assert [line["side"] for line in bench.read_lines(s.out_file)] == ["onetune", "litgpt", "peft", "onetune", "peft"]
    assert "LitGPT, 4 samples: not measured: no such thing\n" in capsys.readouterr().out
    refuses = "onetune"
    with pytest.raises(UserError, match="onetune 2048: no such thing"):
        bench.compare(s)


def test_what_pip_cannot_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(measuring.Unavailable, match="cannot be installed: .*(litgpt|torch)"):
        measuring.environment(tmp_path, "litgpt", peers.PEERS["litgpt"].requirements, tmp_path / "litgpt.log")
    assert not (tmp_path / "litgpt" / "requirements.txt").exists()
    requirements = peers.PEERS["peft"].requirements
    assert measuring.environment(tmp_path, "peft", requirements, tmp_path / "peft.log") == sys.executable  # all is here


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(checkpoint_dir=None), "--checkpoint_dir and --data_dir are required"),
        (dict(steps=2), "--steps 2: must be above 2"),
        (dict(peer_micro_batch=[3]), "--peer_micro_batch 3: must divide --global_batch_size 16"),
        (dict(micro_batch_tokens=[]), "--micro_batch_tokens must name"),
        (dict(steps=9), "48 samples, --steps 9 of 16 need more"),
    ],
)
def test_mistakes(changes, words, tiny_model_dir, tiny_data):
    with pytest.raises(UserError) as error:
        bench.compare(bench.Settings(**{"checkpoint_dir": tiny_model_dir, "data_dir": tiny_data, **changes}))
    assert words in str(error.value)


def test_report_of_nothing(run_script, tmp_path):
    code, out, err = run_script("bench/training/speed.py", "--report", tmp_path / "nothing.jsonl")
    assert code == 2 and err.count("\n") == 1 and "nothing.jsonl cannot be read" in err
    (tmp_path / "other.jsonl").write_text('{"side": "onetune"}\n')
    with pytest.raises(UserError, match="holds no results"):
        bench.read_lines(tmp_path / "other.jsonl")


def test_samples_for_peers(tiny_data):
    """Ids as they are, labels -100 for prompts, or for nothing but the first token."""
    samples = bench.samples_of(tiny_data, mask_prompt=True)
    for i in (0, 5):
        sample = bench.as_lists(samples, i)
        tokens, targets, _ = samples.padded([i])
        assert sample["ids"][:-1] == tokens[0].tolist() and sample["labels"][1:] == targets[0].tolist()
        assert sum(label != -100 for label in sample["labels"]) == samples.target_counts[i] < samples.lengths[i]
    everything = bench.samples_of(tiny_data, mask_prompt=False)
    sample = bench.as_lists(everything, 5)
    assert sample["labels"] == [-100, *sample["ids"][1:]] and everything.target_counts[5] == everything.lengths[5]


def test_peak_memory_is_the_process_own():
    """A child of a large process is small: getrusage would start at the parent's peak."""
    code = "import sys; sys.path.append(sys.argv[1]); from bench import measuring; print(measuring.peak_memory())"
    ballast = torch.ones(2**28)  # 1 GiB
    out = subprocess.run([sys.executable, "-c", code, ROOT], capture_output=True, text=True, check=True)
    assert 50e6 < int(out.stdout) < ballast.nbytes


def test_peers_stand_on_their_own():
    """They run where the project's requirements are not installed, and so does what starts them."""
    code = "import bench.training.peers, bench.inference.sides; print(*(set(sys.modules) - before))"
    code = f"import sys; before = set(sys.modules); sys.path.append({str(ROOT)!r}); {code}"
    out = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    loaded = set(out.stdout.split())
    assert {name for name in loaded if name.startswith("bench.")} == {
        "bench.measuring", "bench.training", "bench.training.peers", "bench.inference", "bench.inference.sides"
    }  # fmt: skip
    ours = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert {"model", "shell"} < ours and not loaded & (ours - {"bench"} | {"torch", "numpy", "jsonargparse", "yaml"})


def test_limits(tiny_model_dir, monkeypatch):
    shapes = limits.matrix_shapes(tiny_model_dir)
    D, layers = SMALL["hidden_size"], SMALL["num_hidden_layers"]
    assert shapes[D, D] == 2 * layers and shapes[SMALL["vocab_size"], D] == 1
    assert sum(shapes.values()) == 7 * layers + 1
    monkeypatch.setattr(limits, "SECONDS", 0.0)
    assert limits.matrix_rate(shapes, 64, "fp32", "cpu") > 1e7
    assert limits.copy_rate(4, "cpu") > 1e7 and limits.read_rate(4, "cpu") > 1e7


def test_accuracy(tiny_model_dir, tiny_data, run_script, tmp_path):
    code, out, err = run_script(
        "bench/training/accuracy.py", "--checkpoint_dir", tiny_model_dir, "--data_dir", tiny_data, "--steps", 8,
        "--mode", "lora-all", "--global_batch_size", 4, "--micro_batch_tokens", 40, "--out_file", tmp_path / "a.jsonl",
    )  # fmt: skip
    assert code == 0, err
    (line,) = map(json.loads, (tmp_path / "a.jsonl").read_text().splitlines())
    assert f"{line['relative_difference']:+.3%}" in out
    assert abs(line["relative_difference"]) < 1e-5  # fp32, the same adapter, the same steps
    for key in ("val_loss_before", "val_loss", "first_loss", "last_loss"):
        assert line["onetune"][key] == pytest.approx(line["peft"][key], rel=1e-5)
    assert line["onetune"]["val_loss"] < line["onetune"]["val_loss_before"] * 0.999  # it did train


def test_gradients_against_exact_ones(tiny_checkpoint, run_script):
    """Both sides are near to fp64 on a tiny model, so the plain decoder written out there is the same model."""
    code, out, err = run_script(
        "bench/training/gradients.py", "--checkpoint_dir", tiny_checkpoint("llama-tied"), "--tokens", 12, "--seeds", 2
    )
    assert code == 0, err
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")][2:]
    sides = ("onetune", "PEFT", "between the two")
    assert [row[:2] for row in rows] == [[str(seed), side] for seed in range(2) for side in sides]
    assert all(0 < float(median) <= float(largest) < 1e-4 for _, _, median, largest, _ in rows)
    assert out.count(f"of {2 * 2 * SMALL['num_hidden_layers']} tensors") == 2


@pytest.mark.parametrize("family, says", [("llama", "bias"), ("mistral", "a sliding window"), ("qwen3", "q_norm")])
def test_gradients_of_what_the_plain_decoder_lacks(tiny_checkpoint, family, says):
    with pytest.raises(UserError, match=f"has .*{says}"):
        gradients.main(gradients.Settings(tiny_checkpoint(family)))


def test_predicted_against_measured_memory(tiny_model_dir, tiny_data, tmp_path, run_script):
    code, out, err = run_script(
        "bench/training/memory.py", "--checkpoint_dir", tiny_model_dir, "--data_dir", tiny_data, "--methods", "[lora]",
        "--bases", "[bnb.nf4]", "--recompute", "[0,1]", "--micro_batch_tokens", "[128]", "--steps", 1,
        "--out_file", tmp_path / "results.jsonl",
    )  # fmt: skip
    assert code == 0, err
    plain, recomputed = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert 0 < recomputed["predicted_gb"] < plain["predicted_gb"]
    assert plain["ratio"] == pytest.approx(plain["predicted_gb"] / plain["measured_gb"], rel=1e-3)
    assert plain["ratio"] > 0
    assert 64 < plain["positions"] <= 128 and f"| lora | bnb.nf4 | 1 | {plain['positions']} |" in " ".join(out.split())


def test_what_fits_on_a_card(run_script):
    code, out, err = run_script(
        "bench/training/fits.py",
        "--models",
        "[Mistral-7B]",
        "--lengths",
        "[64]",
        "--cards",
        "[6,24,80]",
        "--most_tokens",
        64,
    )
    assert code == 0, err
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "| Mistral-7B | LoRA | 64 | no | 64 | 64 |" in lines  # 14.5 GB in bf16
    (in_nf4,) = (line for line in lines if line.startswith("| Mistral-7B | LoRA, `--quantize bnb.nf4` |"))
    assert in_nf4.endswith("| 64 | 64 |") and " no " not in in_nf4  # 4.5 GB
    assert "| Mistral-7B | `--method full --optimizer adamw-8bit` | 64 | no | no | 64 |" in lines


def test_what_saving_costs(tiny_model_dir, run_script, tmp_path):
    places = ("--folder", tmp_path / "disk", "--out_file", tmp_path / "saving.jsonl")
    code, out, err = run_script("bench/training/saving.py", "--gigabytes", 0.03, "--repeats", 1, *places)
    assert code == 0, err
    line = json.loads(out)
    assert line["ratio"] == pytest.approx(line["save"] / line["write"]) and line["write"] > 0
    code, out, err = run_script(
        "bench/training/saving.py", "--checkpoint_dir", tiny_model_dir, "--steps", 16, "--tokens", 8, *places
    )
    assert code == 0, err
    line = json.loads(out)
    assert line["saves"] == 2 and line["ratio"] == pytest.approx(line["after"] / line["others"]) and line["others"] > 0
    assert not list((tmp_path / "disk").iterdir())
    saved, written, steps = map(json.loads, (tmp_path / "saving.jsonl").read_text().splitlines())
    assert (saved["way"], written["way"], steps["saves"]) == ("save", "write", 2)
    assert steps["settings"]["checkpoint"] == tiny_model_dir.name
