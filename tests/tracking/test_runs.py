"""runs.py: the table, two runs side by side, and the page, which is looked at in a real browser."""

import csv
import fcntl
import io
import math
import os
import random
import re
import subprocess
import sys
import time

import pytest
import torch
import yaml
from browser import Browser
from conftest import ROOT, write_tiny_tokenizer
from test_finetune import random_samples, run, settings  # noqa: F401 (fixtures)

import runs
from batching import open_samples
from eval.between_runs import distances, trained
from model import IGNORE
from shell.cli import UserError
from shell.files import read_json, write_json
from tracking import page, run_table
from tracking.curves import running_mean, thinned
from tracking.overview import read_run, read_runs
from tracking.results import record_result
from tracking.run_files import PARTS, read_columns, read_rows
from weights.checkpoint import load_model

COLUMNS = (
    "step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "targets", "padding", "seconds",
    "tokens_per_second", "memory_gb", "val_loss", "val_perplexity",
)  # fmt: skip
HASHES = {f"data ({part})": "a" * 64 for part in PARTS} | {"base model (model.safetensors)": "b" * 64, "code": "c" * 64}


def write_run(folder, steps=20, every=5, level=1.0, finished=True, hashes=(), **flags):
    """A run's folder as finetune.py leaves it, with made-up numbers: the losses fall to `level`. Returns the folder."""
    folder.mkdir(parents=True)
    values = {"checkpoint_dir": "checkpoints/m", "data_dir": "prepared/d", "out_dir": str(folder), "lora_r": 16}
    (folder / "config.yaml").write_text(yaml.safe_dump(values | flags))
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for step in range(1, steps + 1):
            loss = level * (1 + 3 / step)
            row = {"step": step, "epoch": step / 10, "loss": loss * random.uniform(0.9, 1.1), "learning_rate": 1e-4}
            row |= {"grad_norm": 1.5, "tokens": 100, "targets": 50, "padding": 0.0, "seconds": 2.0}
            row |= {"tokens_per_second": 50.0, "memory_gb": 1.25}
            writer.writerow(row | ({"val_loss": loss, "val_perplexity": math.exp(loss)} if step % every == 0 else {}))
    record = {"id": "1", "hashes": HASHES | dict(hashes), "git": {"commit": "d" * 40, "branch": "b", "changed": False}}
    record |= {"environment": {"python": "3.11.7", "cores": 2, "packages": {"torch": "2.13.0"}}, "sessions": []}
    write_json(folder / "record.json", record)
    if finished:
        (folder / "final").mkdir()
        write_json(folder / "summary.json", {"version": "0.2.0", "steps": steps, "peak_memory_gb": 1.25})
    return folder


def show(capsys, **flags):
    """What runs.py prints: (standard output, standard error)."""
    capsys.readouterr()
    runs.main(runs.Settings(**flags))
    return capsys.readouterr()


def table_in(text):
    """The names of the runs, from top to bottom, in a printed table."""
    return re.findall(r"^(\S+) +(?:finished|stopped|running) ", text, re.MULTILINE)


@pytest.fixture
def three(tmp_path):
    """A folder with three runs, the best one deep below."""
    out = tmp_path / "out"
    write_run(out / "a", level=1.0, lora_r=16, learning_rate=2e-4)
    write_run(out / "sweep" / "deep", level=0.5, lora_r=4, learning_rate=2e-4)
    write_run(out / "c", level=2.0, lora_r=16, learning_rate=2e-4, finished=False)
    return out


# ----------------------------------------------------------------------------------------------------------- the table


def test_the_table_has_what_differs_and_the_numbers(three, capsys):
    result = {"kind": "exact_match", "model": "final", "data": "test", "how": {}, "metrics": {"exact_match": 0.75}}
    (three / "a" / "results").mkdir()
    write_json(three / "a" / "results" / "x.json", result)
    text, err = show(capsys, out_dir=three)
    assert table_in(text) == ["sweep/deep", "a", "c"] and err == ""
    heads = text.partition("sweep/deep")[0]
    assert "lora_r" in heads and "learning" not in heads and "out_dir" not in heads
    a = next(line for line in text.splitlines() if line.startswith("a "))
    assert a.split() == ["a", "finished", "16", "20", "1.1500", "1.1500", "2000", "0:00:40", "0.75"]
    assert next(line for line in text.splitlines() if line.startswith("c ")).split()[1] == "stopped"
    assert "\x1b" not in text


def test_runs_behind_links_and_beside_checkpoints_are_found(three, tmp_path, capsys):
    """Each once, however many links lead there."""
    write_run(three / "a" / "step-two", level=3.0)
    (three / "a" / "step-000020").mkdir()
    write_run(tmp_path / "elsewhere" / "d", level=4.0)
    (three / "link").symlink_to(tmp_path / "elsewhere")
    (three / "sweep" / "up").symlink_to(three)
    assert sorted(table_in(show(capsys, out_dir=three)[0])) == ["a", "a/step-two", "c", "link/d", "sweep/deep"]


def test_best_and_last_are_of_the_validations(tmp_path):
    folder = write_run(tmp_path / "a", steps=20)
    lines = (folder / "metrics.csv").read_text().splitlines()
    lines[20] = lines[20].rpartition(",")[0].rpartition(",")[0] + ",3.5,4"
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n21,2.1")  # and a line that is not finished
    numbers = read_run(folder, "a").numbers
    assert numbers["best_val_loss"] == pytest.approx(1.2) and numbers["val_loss"] == 3.5 and numbers["step"] == 20


@pytest.mark.parametrize(
    ("flags", "order"),
    [
        ({}, ["sweep/deep", "a", "c", "young"]),
        ({"descending": True}, ["c", "a", "sweep/deep", "young"]),
        ({"sort": "run"}, ["a", "c", "sweep/deep", "young"]),
        ({"sort": "lora_r"}, ["sweep/deep", "young", "a", "c"]),
        ({"sort": "peak_memory_gb"}, ["a", "sweep/deep", "c", "young"]),
        ({"sort": "step", "descending": True}, ["a", "c", "sweep/deep", "young"]),
    ],
)
def test_the_order(three, capsys, flags, order):
    """Runs without a value stand last both ways."""
    write_run(three / "young", steps=0, finished=False, lora_r=8)
    assert table_in(show(capsys, out_dir=three, **flags)[0]) == order


def test_more_columns_and_csv(three, capsys, tmp_path):
    text, _ = show(capsys, out_dir=three, columns=["peak_*", "data_dir"], csv=tmp_path / "t.csv")
    assert "prepared/d" in text
    rows = list(csv.DictReader(io.StringIO((tmp_path / "t.csv").read_text())))
    assert [row["run"] for row in rows] == ["sweep/deep", "a", "c"]
    assert float(rows[1]["best_val_loss"]) == 1.15 and rows[1]["time"] == "40.0"
    assert rows[1]["peak_memory_gb"] == "1.25" and rows[2]["peak_memory_gb"] == ""
    for flags, name in (({"columns": ["nothing"]}, "--columns nothing"), ({"sort": "nothing"}, "--sort nothing")):
        with pytest.raises(UserError, match=name):
            show(capsys, out_dir=three, **flags)


def test_a_flag_that_was_not_there_counts_as_its_default(tmp_path, capsys):
    write_run(tmp_path / "old")
    write_run(tmp_path / "same", schedule="cosine")
    assert "schedule" not in show(capsys, out_dir=tmp_path)[0]
    write_run(tmp_path / "other", schedule="linear")
    text, _ = show(capsys, out_dir=tmp_path)
    assert text.count("cosine") == 2 and text.count("linear") == 1


def test_a_run_is_running_while_a_process_has_its_lock(three, capsys):
    code = f"import fcntl, os, time; fcntl.flock(os.open({str(three / 'c')!r}, os.O_RDONLY), fcntl.LOCK_EX); print(1)"
    holder = subprocess.Popen(
        [sys.executable, "-c", f"{code}\ninput()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        holder.stdout.readline()
        assert read_run(three / "c", "c").state == "running"
    finally:
        holder.communicate("\n")
    assert read_run(three / "c", "c").state == "stopped"
    descriptor = os.open(three / "c", os.O_RDONLY)  # looking leaves no lock behind
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(descriptor)


DAMAGE = {
    "config.yaml": "{a: [", "metrics.csv": "step,loss\n1,0.5\n2,none\n", "summary.json": "{", "results/x.json": "{}",
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_run_is_named_and_the_others_are_shown(three, capsys, name):
    (three / "a" / "results").mkdir()
    (three / "a" / name).write_text(DAMAGE[name].replace("loss", "val_loss"))
    text, err = show(capsys, out_dir=three)
    assert table_in(text) == ["sweep/deep", "c"]
    assert err.startswith("left out: ") and err.count("\n") == 1 and str(three / "a" / name) in err


@pytest.mark.parametrize("content", ["", "step,loss\n1,2\n1,2,3\n", "loss\n1\n", "step,loss\nx,1\n", '"\x00'])
def test_damaged_metrics_are_found_by_the_quick_reader_too(tmp_path, content):
    path = tmp_path / "metrics.csv"
    path.write_text(content)
    with pytest.raises(UserError, match="metrics.csv is damaged"):
        read_columns(path, ["loss"])


def test_the_quick_reader_reads_what_the_other_one_reads(tmp_path):
    folder = write_run(tmp_path / "a", steps=random.randint(1, 50))
    columns = read_columns(folder / "metrics.csv", COLUMNS)
    rows = read_rows(folder / "metrics.csv")[1]
    for name in COLUMNS:
        pairs = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        assert list(zip(*columns.get(name, ([], [])), strict=True)) == pairs


def test_the_table_is_as_wide_as_the_terminal(tmp_path, run_in_terminal):
    """And without colours."""
    for number in range(3):
        flags = {f"lora_{name}": f"{name}-{number}" * 9 for name in ("targets", "init", "layers")}
        write_run(tmp_path / "out" / f"a-run-with-a-long-name-{number}", lora_r=number, **flags)
    for width in (70, 100, 300):
        code, text = run_in_terminal("runs.py", "--out_dir", tmp_path / "out", columns=width)
        assert code == 0 and "\x1b" not in text and "…" in text and len(table_in(text)) == 3
        assert max(len(line) for line in text.splitlines() if not line.startswith("left out")) <= width
        assert ("left out, to fit in 70 columns: " in text) == (width == 70)


def test_the_table_is_quick(tmp_path):
    """Neither torch nor matplotlib is imported, and 200 runs take little more than one."""
    for number in range(200):
        write_run(tmp_path / f"{number}", steps=100)
    command = [sys.executable, "-X", "importtime", ROOT / "runs.py", "--out_dir", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "yaml" in loaded and not loaded & {"torch", "matplotlib", "numpy", "lightning"}
    started = time.process_time()
    assert len(read_runs(tmp_path, pytest.fail)) == 200
    assert time.process_time() - started < 2


# -------------------------------------------------------------------------------------------------------- side by side


def test_two_runs_side_by_side(tmp_path, capsys, monkeypatch):
    a = write_run(tmp_path / "a", lora_r=16, hashes={"code": "1" * 64})
    b = write_run(tmp_path / "b", lora_r=4, hashes={"code": "2" * 64}, finished=False)
    record = read_json(b / "record.json")
    record["environment"]["packages"]["torch"] = "9.9"
    record["git"] = {"commit": "e" * 40, "branch": "b", "changed": True}
    write_json(b / "record.json", record)
    monkeypatch.chdir(tmp_path)
    text, _ = show(capsys, compare=[a, b], kl=True)
    assert "data (" not in text.partition("the same:")[0]
    rows = {line.split("  ")[1].strip(): line.split()[-2:] for line in text.splitlines() if line.startswith("  ")}
    assert rows["lora_r"] == ["16", "4"] and rows["package torch"] == ["2.13.0", "9.9"]
    assert rows["code"] == ["1" * 12, "2" * 12] and re.search(rf"commit +{'d' * 12} +{'e' * 12} and changes", text)
    assert re.search("the same: data .*base model.*python", " ".join(text.split()))
    assert re.search(r"best_val_loss +1.1500 +1.1500", text) and re.search(r"peak_memory_gb +1.25 +-", text)
    assert (tmp_path / "compare.png").read_bytes()[:4] == b"\x89PNG"
    assert "no KL between the models: " in text


def test_the_words_after_compare_are_one_list():
    joined = runs.Settings.joined
    assert joined(["--compare", "a b", "c'd", "--kl", "false"]) == ["--compare", '["a b", "c\'d"]', "--kl", "false"]
    for args in (["--compare", "[a,b]"], ["--compare"], ["--out_dir", "a"], ["--compare=[a,b]"]):
        assert joined(args) == args


def train_two(run, **others):  # noqa: F811
    """Two tiny runs over one base, with different settings."""
    samples, val = random_samples(8), random_samples(6)
    flags = dict(max_steps=2, eval_interval=1)
    return run(samples, val, "a", **flags), run(name="b", **flags, **others)


def model_of(folder, base, **how):
    return load_model(base, torch.float32, adapter_dir=folder / "final", **how)


@pytest.mark.parametrize("others", [{"lora_r": 2, "learning_rate": 0.05}, {"quantize": "bnb.nf4"}, {"method": "full"}])
def test_kl_between_two_runs_is_that_of_their_probabilities(run, tmp_path, tiny_model_dir, others):  # noqa: F811
    """Against the definition, computed from all logits of the two models."""
    folders = train_two(run, **others)
    a, b = (trained(f.name, f / "final", read_run(f, f.name).settings) for f in folders)
    count, found = distances(a, b, tmp_path / "data", 10_000, 64)
    if others.get("method") == "full":
        models = [model_of(folders[0], tiny_model_dir), load_model(folders[1] / "final", torch.float32)]
    else:
        models = [model_of(folders[0], tiny_model_dir), model_of(folders[1], tiny_model_dir, quantize=b.quantize)]
    bases = [load_model(tiny_model_dir, torch.float32, quantize=each.quantize) for each in (a, b)]
    data, logps = open_samples(tmp_path / "data", "val"), {}
    for name, model in zip(("a", "b", "base of a", "base of b"), [*models, *bases], strict=True):
        rows = []
        for i in range(len(data)):
            tokens, targets = data.inputs_and_targets(i)
            with torch.inference_mode():
                rows.append(model(tokens[None]).log_softmax(-1)[0][targets != IGNORE])
        logps[name] = torch.cat(rows)
    assert count == len(logps["a"])
    assert [(d.one, d.other) for d in found] == [("a", "b"), ("b", "a"), ("base of a", "a"), ("base of b", "b")]
    for one, other, kl, agreement in found:
        p, q = logps[one], logps[other]
        assert kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3, abs=1e-6)
        assert agreement == (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert found[0].kl > 1e-5 and found[2].kl > 1e-5


def test_compare_as_a_user_runs_it(run, run_script, tmp_path):  # noqa: F811
    a, b = train_two(run, lora_r=2)
    code, out, err = run_script("runs.py", "--compare", a, b, "--picture", tmp_path / "x.png")
    assert code == 0 and err == "", err
    assert re.search(rf"KL\({re.escape(str(a))} \|\| {re.escape(str(b))}\) +\d+\.\d{{4}} ", out) and "likeliest" in out
    assert (tmp_path / "x.png").is_file()


def test_models_of_other_tokens_are_not_compared(run, tmp_path, tiny_model_dir, capsys):  # noqa: F811
    a, b = train_two(run)
    other = tmp_path / "other"
    other.mkdir()
    for path in tiny_model_dir.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    write_tiny_tokenizer(other)
    values = read_json(other / "tokenizer.json")
    values["added_tokens"][0]["content"] = "<|another|>"
    write_json(other / "tokenizer.json", values)
    notes = read_json(b / "final" / "onetune.json") | {"checkpoint_dir": str(other)}
    write_json(b / "final" / "onetune.json", notes)
    (b / "final" / "manifest.json").unlink()
    text, _ = show(capsys, compare=[a, b], picture=tmp_path / "x.png")
    assert re.search("no KL between the models: .*different tokenizers", text)


# ------------------------------------------------------------------------------------------------------------ the page

# A run two folders deep, whose name is this.
EVIL = "</script><img src=x onerror=document.title='evil'>"


def test_the_page_in_a_browser(tmp_path, capsys):
    """Hovered, clicked, sorted at two sizes; nothing is fetched, nothing complains, and no name is run."""
    out, html = tmp_path / "out", tmp_path / "pages" / "runs.html"
    folders = [write_run(out / f"run-{level}", level=level, lora_r=level) for level in (3, 1, 2)]
    write_run(out / EVIL, level=4, lora_targets=EVIL, hashes={EVIL: EVIL})
    data = tmp_path / "data & more"
    data.mkdir()
    (data / "report.html").write_text("x")
    write_json(data / "data.json", {part: {"hash": "a" * 64} for part in PARTS})
    config = yaml.safe_load((folders[0] / "config.yaml").read_text()) | {"data_dir": str(data)}
    (folders[0] / "config.yaml").write_text(yaml.safe_dump(config))
    show(capsys, out_dir=out, html=html)
    (tmp_path / "profile").mkdir()
    with Browser(tmp_path / "profile") as browser:
        browser.open(html)
        for size in ((1280, 900), (420, 800)):
            browser.resize(*size)
            browser.frame()
            check_hover(browser)
            check_sorting(browser)
            check_legend(browser)
            assert browser.value("document.documentElement.scrollWidth <= innerWidth"), "no scrolling to the side"
        check_links(browser, data)
        assert browser.value("document.title") == "4 runs" and browser.value("document.images.length") == 0
        assert browser.requests == [html.as_uri()] and browser.messages == []
        check_policy(browser)


PLOT = "document.querySelectorAll('.plot')[1]"  # the validation loss
NAMES = "[...document.querySelectorAll('#runs tbody th')].map(cell => cell.textContent)"


def check_hover(browser):
    """At a point of a curve the tooltip has all runs at that step; away from the chart it is gone."""
    left, top, width, height = browser.box(PLOT)
    x = browser.value(f"(c => c.getBoundingClientRect().x + 2)({PLOT}.querySelectorAll('circle[data-run=\"1\"]')[2])")
    browser.move(x, top + height / 2)
    text = browser.value(f"{PLOT}.querySelector('.tooltip').innerText")
    lines = [line for line in text.split("\n") if line]
    found = dict(zip(lines[::3], zip(lines[1::3], lines[2::3], strict=True), strict=True))
    assert [found[f"run-{level}"] for level in (1, 2, 3)] == [("step 15", value) for value in ("1.2", "2.4", "3.6")]
    inside = f"(t => t.left >= 0 && t.right <= innerWidth)({PLOT}.querySelector('.tooltip').getBoundingClientRect())"
    assert len(found) == 4 and browser.value(inside)
    browser.move(left + width / 2, max(1, top - 60))
    assert browser.value(f"{PLOT}.querySelector('.tooltip').hidden")


def check_sorting(browser):
    column = browser.value("[...document.querySelectorAll('#runs thead th')].findIndex(h => h.innerText == 'lora_r')")
    head = f"document.querySelectorAll('#runs thead button')[{column}]"
    browser.value("document.querySelectorAll('#runs thead th').forEach(h => h.removeAttribute('aria-sort'))")
    for direction in ("ascending", "descending"):
        browser.click(head)
        names = [name for name in browser.value(NAMES) if name.startswith("run")]
        assert names == sorted(names, reverse=direction == "descending")
        assert browser.value(f"{head}.parentNode.getAttribute('aria-sort')") == direction


def check_legend(browser):
    """A click takes a run's curve out of every chart, the next one brings it back."""
    entry = "[...document.querySelectorAll('#legend button')].find(b => b.innerText == 'run-2')"
    entries = "[...document.querySelectorAll('#legend button:not(.all)')]"
    number = browser.value(f"{entries}.indexOf({entry})")
    count = f"document.querySelectorAll('path.curve[data-run=\"{number}\"]').length"
    assert browser.value(count) == len(page.CHARTS)
    browser.click(entry)
    assert browser.value(count) == 0 and browser.value(f"{entry}.ariaPressed") == "false"
    browser.click(entry)
    assert browser.value(count) == len(page.CHARTS)
    none, every = (f"document.querySelectorAll('#legend .all')[{i}]" for i in (1, 0))
    browser.click(none)
    assert browser.value("document.querySelectorAll('.curve').length") == 0
    browser.click(every)
    assert browser.value(count) == len(page.CHARTS)


def check_policy(browser):
    """What gets into the page all the same can neither run nor fetch."""
    for name, content in (("script", "textContent = 'document.title = 1'"), ("img", "src = 'http://127.0.0.1:9/x'")):
        done = "addEventListener('securitypolicyviolation', event => done(event.violatedDirective), {once: true})"
        script = (
            f"let x = document.createElement('{name}'); x.{content}; document.body.append(x); setTimeout(done, 5000)"
        )
        assert browser.value(f"new Promise(done => {{ {done}; {script} }})") in ("script-src-elem", "img-src")
    assert browser.value("document.title") == "4 runs"


def check_links(browser, data):
    links = browser.value("[...document.querySelectorAll('details p a')].map(a => [a.innerText, a.href])")
    assert [href for _, href in links] == [(data / "report.html").as_uri()]
    browser.click("[...document.querySelectorAll('#runs tbody a')].find(link => link.innerText == 'run-1')")
    assert browser.value("document.querySelector(location.hash).open")


def test_a_big_page_is_small(tmp_path, capsys):
    """50 runs of 20,000 steps: a few MB (a few runs stand for all of them)."""
    folder = write_run(tmp_path / "a", steps=20_000, every=100)
    one = read_run(folder, "a", page.COLUMNS)
    page.write_page(tmp_path / "x.html", [one] * 50, run_table.table_of([one] * 50, {}, []), {})
    assert 1e6 < (tmp_path / "x.html").stat().st_size < 4e6


def test_a_thinned_curve_keeps_its_spikes():
    values = [random.random() for _ in range(random.randint(2000, 5000))]
    values[random.randrange(2000)], values[random.randrange(2000)] = 9.0, -9.0
    steps = list(range(1, len(values) + 1))
    few_steps, few = thinned(steps, values, 300)
    assert len(few) <= 300 and (max(few), min(few)) == (max(values), min(values))
    assert all(values[step - 1] == value for step, value in zip(few_steps, few, strict=True))
    assert few_steps == sorted(few_steps) and (few_steps[0], few_steps[-1]) == (1, len(values))
    assert thinned(steps, values, len(values)) == (steps, values)


def test_a_running_mean_is_a_mean():
    values = [random.random() for _ in range(30)]
    means = running_mean(values, 7)
    assert means == pytest.approx([sum(values[max(0, i - 6) : i + 1]) / min(7, i + 1) for i in range(30)])
    assert running_mean([], 5) == []
    holes = [math.nan, 1.0, math.inf, 3.0, math.nan, math.nan, 5.0]
    assert running_mean(holes, 2) == pytest.approx([math.nan, 1, 1, 3, 3, math.nan, 5], nan_ok=True)


def test_a_real_run_and_its_result(run, capsys, tmp_path):  # noqa: F811
    out = run(random_samples(8), random_samples(4), "a", max_steps=3, eval_interval=1)
    record_result(out / "final", "exact_match", "test", {"exact_match": 0.25}, {})
    text, _ = show(capsys, out_dir=tmp_path, html=tmp_path / "runs.html")
    assert table_in(text) == ["a"] and re.search(r" 3 .* 0\.25$", text, re.MULTILINE)
    html = (tmp_path / "runs.html").read_text()
    record = read_json(out / "record.json")
    assert record["hashes"]["code"] in html and "exact_match" in html and record["git"]["commit"] in html
