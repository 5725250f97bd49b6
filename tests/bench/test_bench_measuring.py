"""What the scripts of bench/ share: alternating runs, jobs in processes, medians, tables and charts."""

import json
import random
import shutil
import statistics
from types import SimpleNamespace

import pytest
from conftest import ROOT

from bench import measuring
from bench.inference import sides
from bench.measuring import Unavailable, alternate, print_table, run_job, summarize
from shell.cli import UserError


def test_sides_alternate(tmp_path):
    """A side that cannot be measured is one line and left out; every line is in the file before the next run."""
    settings, measured = SimpleNamespace(out_file=tmp_path / "new" / "lines.jsonl"), []

    def measure(side, size):
        measured.append((side, size))
        if side == "peft":
            raise Unavailable("no such thing")
        return {"speed": len(measured), "versions": {"torch": side}}

    names = [{"side": "onetune", "size": 1}, {"side": "peft", "size": 2}, {"side": "trl", "size": 3}]
    found = alternate(names, 2, measure, settings, {"call": "now", "versions": {}})
    first = next(found)
    (written,) = settings.out_file.read_text().splitlines()
    assert json.loads(written) == {"call": "now", **first}
    lines = [first, *found]
    assert [(line["side"], line["run"]) for line in lines] == [
        ("onetune", 0), ("peft", 0), ("trl", 0), ("onetune", 1), ("trl", 1)
    ]  # fmt: skip
    assert lines[1]["unavailable"] == "no such thing" and lines[4]["versions"] == {"torch": "trl"}
    assert len(names) == 3 and len(settings.out_file.read_text().splitlines()) == 5


def test_without_our_side_there_is_nothing_to_compare(tmp_path):
    def measure(**side):
        raise Unavailable("no such thing")

    settings = SimpleNamespace(out_file=tmp_path / "lines.jsonl")
    with pytest.raises(UserError, match="onetune 64: no such thing"):
        list(alternate([{"side": "onetune", "micro_batch": 64}], 1, measure, settings, {}))
    assert not settings.out_file.exists()


def test_a_job_runs_in_a_process_of_its_own(tmp_path):
    """What it raises comes back: Unavailable as itself, any other error as the last line of its output."""
    prompts = [[1], [2]]
    with pytest.raises(Unavailable, match="its batches need prompts of one length"):
        run_job(sides.measure, {"side": "litgpt", "prompts": prompts}, tmp_path / "logs" / "a.log")
    with pytest.raises(Unavailable, match=r"KeyError: 'nobody' \(exit status 1, .*b.log\)"):
        run_job(sides.measure, {"side": "nobody"}, tmp_path / "b.log")
    assert "Traceback" in (tmp_path / "b.log").read_text()


def test_a_job_of_another_checkout(tmp_path):
    """Its own file of that name is called, and what it does not have is the error of that side."""
    there = tmp_path / "there"
    (there / "bench" / "inference").mkdir(parents=True)
    shutil.copytree(ROOT / "shell", there / "shell")
    shutil.copy(measuring.__file__, there / "bench")
    (there / "bench" / "inference" / "sides.py").write_text("def measure(job):\n    return {'asked': job['side']}\n")
    measuring.check_checkout(there)
    found = run_job(sides.measure, {"side": "any"}, tmp_path / "a.log", root=there)
    assert found == {"asked": "any"}
    (there / "bench" / "inference" / "sides.py").write_text("")
    with pytest.raises(Unavailable, match="no attribute 'measure'"):
        run_job(sides.measure, {"side": "any"}, tmp_path / "a.log", root=there)
    with pytest.raises(UserError, match="--before_dir .*empty: not a checkout"):
        measuring.check_checkout(tmp_path / "empty")


def test_medians_and_spread():
    values = {side: [random.random() for _ in range(random.choice((3, 4, 5)))] for side in "abc"}
    lines = [{"side": side, "size": 1, "x": x, "y": 2 * x} for side, numbers in values.items() for x in numbers]
    random.shuffle(lines)
    rows = summarize([*lines, {"side": "d", "unavailable": "no such thing"}], ("side", "size"), ("x", "y"))
    assert [row["side"] for row in rows] == list(dict.fromkeys(line["side"] for line in lines))
    for row in rows:
        numbers = values[row["side"]]
        assert (row["x"], row["y"]) == (statistics.median(numbers), statistics.median(2 * x for x in numbers))
        assert row["runs"] == len(numbers) and row["spread"] == (min(numbers), max(numbers)) and row["size"] == 1


def test_a_table_lines_up_and_is_markdown(capsys):
    print_table({"side": "{side}", "tokens/s": "{x:,.1f}"}, [{"side": "onetune", "x": 1234.56}, {"side": "b", "x": -2}])
    assert capsys.readouterr().out.splitlines() == [
        "| side    | tokens/s |", "| ------- | -------: |", "| onetune |  1,234.6 |", "| b       |     -2.0 |"
    ]  # fmt: skip


def test_a_chart_has_bars_for_every_table(tmp_path):
    rows = [{"side": "onetune", "label": "ours", "x": 2.0}, {"side": "peft", "label": "theirs", "x": 1.0}]
    measuring.draw_bars([("one", rows), ("one", rows[:1])], {"x": ("tokens/s", "{:.1f}")}, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_line_names_the_machine_and_hides_folders(tmp_path):
    line = measuring.describe(measuring.Comparison(checkpoint_dir=tmp_path / "tiny", out_file=tmp_path / "x.jsonl"))
    assert line["settings"] == {"checkpoint": "tiny", "dtype": "bf16", "runs": 3}
    assert line["machine"]["cores"] > 0 and line["versions"]["torch"] and str(tmp_path) not in json.dumps(line)


@pytest.mark.parametrize("folder", ["", "training", "inference", "preparation", "machine"])
def test_a_folder_begins_with_its_map(folder):
    text = (ROOT / "bench" / folder / "__init__.py").read_text()
    for path in (ROOT / "bench" / folder).iterdir():
        if path.name[0] not in "_." and (path.is_dir() or path.suffix in (".py", ".sh")):
            assert path.name in text, f"{path} is not on the map"
