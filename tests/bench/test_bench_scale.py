"""The comparison of several processes runs, and its table is right; so is what is calculated for clusters."""

import json

import pytest
from conftest import ROOT

from bench import scale
from bench.scaling import clusters
from shell.cli import UserError
from training.memory.layouts import Message


def line(side, layout, processes, run, seconds, **more):
    values = {"messages": [], "grad_norm": 1.0, "first_loss": 2.0, "peak_gb": 1.0, "others_cpu": 0.0}
    return {"side": side, "layout": layout, "processes": processes, "run": run, "seconds": seconds} | values | more


@pytest.mark.slow
def test_every_side_does_the_same(run_script, tmp_path):
    flags = ["--shape", "tiny", "--processes", "[2]", "--length", 8, "--steps", 3, "--runs", 1]
    code, out, err = run_script("bench/scale.py", *flags, "--out_file", tmp_path / "lines.jsonl")
    assert code == 0, err
    lines = {scale.label(one): one for one in map(json.loads, (tmp_path / "lines.jsonl").read_text().splitlines())}
    assert len(lines) == 8 and not any("unavailable" in one for one in lines.values()), lines
    for name, one in lines.items():
        assert one["grad_norm"] > 0 and one["seconds"] > 0 and len(one["step_seconds"]) == 1
        if name.startswith("onetune"):  # beside it losses, norms and numbers for the log
            assert 0 <= scale.sent_bytes(one["messages"]) - 1e6 * one["calculated_mb"] <= 100, name
    sent = {name: scale.sent_bytes(one["messages"]) for name, one in lines.items()}
    assert sent["onetune, 1"] == sent["transformers + PEFT, 1"] == 0
    assert sent["transformers + PEFT, DDP, 2"] == pytest.approx(sent["onetune, 2"], rel=0.01)
    assert sent["transformers + PEFT, FSDP2, 2"] > 2 * sent["transformers + PEFT, DDP, 2"]
    assert out.count("times the efficiency") == 4 and "efficiency at most" in out
    code, again, err = run_script("bench/scale.py", "--report", tmp_path / "lines.jsonl")
    assert code == 0 and again in out, err


def test_efficiency_is_of_each_round():
    ours = [("alone", 1, (8.0, 10.0, 6.0)), ("data", 2, (5.0, 5.0, 4.0)), ("data", 4, (4.0, 5.0, 6.0))]
    call = [line("onetune", *place, run, seconds[run]) for run in range(3) for *place, seconds in ours]
    call += [line("peft", "DDP", 2, run, 1.0) for run in range(3)] + [line("peft", "alone", 1, 0, 1.0)]
    call += [{"side": "peft", "layout": "FSDP2", "processes": 2, "unavailable": "no such thing"}]
    rows = {row["label"]: row for row in scale.rows_of(call)}
    found = {name: (row["efficiency"], row["lowest"], row["highest"]) for name, row in rows.items()}
    assert found["onetune, 1"] == (1, 1, 1) and found["onetune, 2"] == (0.8, 0.75, 1.0)
    assert found["onetune, 4"] == (0.5, 0.25, 0.5) and found["transformers + PEFT, DDP, 2"] == (0.5, 0.5, 0.5)
    assert rows["onetune, 4"]["seconds"] == 5.0 and rows["onetune, 4"]["spread"] == (4.0, 6.0)


def test_sent_bytes():
    kinds = [("sum", 4, 100, 2), ("gather", 4, 100, 1), ("share out", 2, 10, 3), ("broadcast", 2, 7, 1)]
    messages = [dict(zip(("kind", "count", "nbytes", "times"), one, strict=True)) for one in kinds]
    assert scale.sent_bytes(messages) == 300 + 75 + 15 + 7


@pytest.mark.parametrize(
    "change, words",
    [
        ({"grad_norm": 0.0}, "transformers + PEFT, DDP, 2: the gradient's norm is 0.0"),
        ({"grad_norm": float("nan")}, "transformers + PEFT, DDP, 2: the gradient's norm is nan"),
        ({"first_loss": 2.001}, "transformers + PEFT, DDP, 2: the first loss is 2.001000, onetune, 1's 2.000000"),
        ({"first_loss": float("nan")}, "the first loss is nan"),
    ],
)
def test_a_side_that_does_something_else_is_named(change, words):
    losses = {}
    scale.check(line("onetune", "alone", 1, 0, 1.0), losses)
    scale.check(line("peft", "DDP", 2, 0, 1.0, first_loss=2.0001), dict(losses))
    with pytest.raises(UserError) as error:
        scale.check(line("peft", "DDP", 2, 0, 1.0, **change), losses)
    assert words in str(error.value)


def test_seconds_of_a_message():
    def gather(count, nbytes, times=1, kind="gather"):
        return clusters.seconds(Message("weights", kind, "data", count, nbytes, times))

    large = 1e15  # where hops take nothing beside the bytes
    assert gather(8, large) == pytest.approx(7 / 8 * large / 450e9) and gather(8, large, 3) == 3 * gather(8, large)
    assert gather(16, large) == pytest.approx(15 / 16 * large / 400e9)
    assert gather(16, large, kind="sum") == pytest.approx(2 * gather(16, large))
    # Nothing to send: 14 hops within nodes and one between, or in a sum twice as many, in the quicker protocol.
    assert gather(16, 0) == pytest.approx(14e-6 + 14 * 1.9e-6 + 4e-6)
    assert gather(16, 0, kind="sum") == pytest.approx(14e-6 + 28 * 1.9e-6 + 2 * 4e-6)
    assert gather(8, 0) == pytest.approx(14e-6 + 7 * 1.9e-6)


def test_clusters(monkeypatch):
    monkeypatch.setitem(clusters.SHAPES, "Llama-2-7B", scale.SHAPES["tiny"])
    s = clusters.Settings(devices=[8, 64], samples=64, length=64)
    alone, divided = clusters.Case("Llama-2-7B"), clusters.Case("Llama-2-7B", "full", shard=True)
    few, many = (clusters.line_of(alone, count, s) for count in (8, 64))
    assert few["computing_seconds"] == pytest.approx(8 * many["computing_seconds"])
    assert few["messages"] == many["messages"] == 1 and few["sending_seconds"] < many["sending_seconds"]
    assert 1 > few["efficiency"] > many["efficiency"] and few["fits"] and clusters.cell(few).endswith("%")
    shared = clusters.line_of(divided, 8, s)
    assert shared["messages"] == 8 * (1 + 2 * 2 + 1 + 2)  # a pass gathers all else and two blocks twice, shares out all
    assert shared["efficiency"] < shared["efficiency_all_hidden"] <= 1 and " to " in clusters.cell(shared)
    assert clusters.cell(shared | {"fits": False, "peak_gb": 99.2}) == "no: 99 GB"


def test_the_table_of_the_page_is_that_of_the_results():
    rows = {}
    for text in sorted((ROOT / "bench" / "results").glob("*-clusters-calculated.jsonl"))[-1].read_text().splitlines():
        one = json.loads(text)
        rows.setdefault(one["case"], []).append(clusters.cell(one))
    page = (ROOT / "docs" / "devices.md").read_text()
    for case, cells in rows.items():
        assert f"| {case} | {' | '.join(cells)} |" in page
