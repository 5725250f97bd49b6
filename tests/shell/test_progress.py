"""Progress bars: there with the time left in a terminal, not there in a log or a pipe."""

import io
import re
import sys

import pytest
import torch
from conftest import ROOT
from test_finetune import random_samples, write_data

from shell import progress
from weights.checkpoint import load_model

TIME_LEFT = r"\[\d\d:\d\d<[\d:?]+"
CODE = "import time; from shell.progress import bar\nfor _ in bar(range(3), 'waiting'): time.sleep(0.2)\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(f"import sys; sys.path[0] = {str(ROOT)!r}\n{CODE}")
    return path


def test_a_bar_is_for_terminals(script, run_in_terminal, run_script):
    code, text = run_in_terminal(script)
    assert code == 0 and re.search(rf"waiting: +\d+%.* 1/3 {TIME_LEFT}", text), text
    assert run_script(script) == (0, "", "")


@pytest.fixture
def inputs(tmp_path, tiny_model_dir):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "what", "answer": "that"}\n' * 5)
    write_data(tmp_path / "data", tiny_model_dir, random_samples(8), random_samples(2))
    model = ["--checkpoint_dir", tiny_model_dir]
    train = [*model, "--data_dir", tmp_path / "data", "--max_steps", 2, "--logger", "csv"]
    return {
        "prepare_data.py": [*model, "--data", rows, "--out_dir", tmp_path / "prepared", "--drop_duplicates", "false"],
        "convert_hf_checkpoint.py": ["--source", tiny_model_dir, "--out_dir", tmp_path / "c", "--dtype", "bfloat16"],
        "eval/exact_match.py": [*model, "--data", rows, "--max_new_tokens", 2, "--batch_size", 1],
        "finetune.py": [*train, "--out_dir", tmp_path / "run"],
    }


SHOWN = {  # what is there in a terminal
    "prepare_data.py": [
        r"reading rows: 5 samples \[",
        "tokenising: .* 5/5 " + TIME_LEFT,
    ],  # how many there are is not known
    "convert_hf_checkpoint.py": [r"writing: .* (\d+)/\1 " + TIME_LEFT],
    "eval/exact_match.py": ["answering: .* 5/5 " + TIME_LEFT],
    "finetune.py": ["2/2 " + TIME_LEFT],
}


@pytest.mark.parametrize("name", SHOWN)
def test_scripts_are_quiet_without_a_terminal(inputs, run_script, name):
    code, out, err = run_script(name, *inputs[name])
    assert (code, err) == (0, ""), err


@pytest.mark.parametrize("name", SHOWN)
def test_scripts_tell_the_time_left_in_a_terminal(inputs, run_in_terminal, name):
    code, text = run_in_terminal(name, *inputs[name])
    assert code == 0, text
    for what in SHOWN[name]:
        assert re.search(what, text), text


@pytest.mark.parametrize(("quantize", "what"), [(None, "loading"), ("bnb.nf4", "quantising")])
def test_loading_is_shown_if_it_takes_a_while(tiny_model_dir, monkeypatch, quantize, what):
    for moment, shown in ((0.0, True), (60.0, False)):
        monkeypatch.setattr(sys, "stderr", Terminal())
        monkeypatch.setattr(progress, "MOMENT", moment)
        load_model(tiny_model_dir, torch.bfloat16, quantize=quantize)
        assert bool(re.search(rf"{what}: +\d+%.*{TIME_LEFT}", sys.stderr.getvalue())) == shown
        assert sys.stderr.getvalue().rpartition("\r")[2].strip() == ""  # nothing stays


def test_only_the_first_process_shows_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(progress.bar(range(3), "x", shown=False)) == [0, 1, 2] and sys.stderr.getvalue() == ""


@pytest.mark.parametrize(("seconds", "lines"), [(0.0, 5), (60.0, 0)])
def test_a_long_run_has_a_line_now_and_then_in_a_log(monkeypatch, seconds, lines):
    """With an interval of nothing each step is one; a run that is shorter than the interval has none."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    for name in ("LINE_SECONDS", "MOMENT"):
        monkeypatch.setattr(progress, name, seconds)
    with progress.bar_of_run(3, 8) as bar:
        for _ in range(5):
            bar.update()
    text = sys.stderr.getvalue()
    assert "\r" not in text and len(re.findall(rf"^.*[4-8]/8 {TIME_LEFT}", text, re.MULTILINE)) >= lines
    assert text.count("\n") <= lines + 2 and (text == "") == (lines == 0)


def test_a_long_run_in_a_terminal_is_one_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress.bar_of_run(0, 3) as bar:
        bar.update(3)
    assert sys.stderr.getvalue().count("\n") == 1 and "\r" in sys.stderr.getvalue()
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress.bar_of_run(0, 3, shown=False) as bar:
        bar.update(3)
    assert sys.stderr.getvalue() == ""
