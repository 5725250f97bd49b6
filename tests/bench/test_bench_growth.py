"""How data preparation grows: the rows that are made, what is watched, and what is calculated from it."""

import json
import random

import pytest
from conftest import ROOT

from bench.preparation import growth


def test_a_run_is_measured(run_script, tiny_model_dir, tmp_path):
    flags = ["--checkpoint_dir", tiny_model_dir, "--sizes", "[100]", "--engines", "[local]"]
    code, out, err = run_script("bench/preparation/growth.py", *flags, "--out_file", tmp_path / "lines.jsonl")
    assert code == 0, err
    (line,) = map(json.loads, (tmp_path / "lines.jsonl").read_text().splitlines())
    assert line["counts"]["read"] == 100 and line["counts"]["kept"] == 87
    assert (line["counts"]["duplicate"], line["counts"]["near duplicate"]) == (2, 10)
    assert line["counts"]["words of a benchmark"] == 1
    assert line["driver_seconds"] > 0 and line["total_mb"] >= line["driver_mb"] > 20 and line["worker_mb"] > 1
    assert "calculated" not in out and "| local  |  100 |" in out


def test_what_is_calculated_is_a_straight_line():
    names = ("seconds", "driver_seconds", "worker_seconds", "driver_mb", "worker_mb", "total_mb")
    slopes = {name: random.uniform(0, 5) for name in names}
    lines = [
        {"engine": engine, "rows": rows, **{name: 7 + sign * slope * rows for name, slope in slopes.items()}}
        for rows in (10, 40)
        for engine, sign in (("local", 1), ("ray", -1))
    ]
    predicted = growth.predict(lines, "local", 1000)
    assert predicted["rows"] == 1000 and predicted["engine"] == "local"
    for name, slope in slopes.items():
        assert predicted[name] == pytest.approx(7 + slope * 1000)


def test_workers_are_told_from_rays_own_processes():
    class Process:
        def __init__(self, *command):
            self.command = list(command)

        def cmdline(self):
            return self.command

    command = ["python", str(ROOT / "prepare_data.py"), "--data=x"]
    for found in (Process(*command), Process("ray::IDLE"), Process("ray::MapBatches(_work)")):
        assert growth.is_worker(found, command)
    for other in (Process("raylet"), Process("ray::_StatsActor"), Process("python", "-c", "x"), Process()):
        assert not growth.is_worker(other, command)
