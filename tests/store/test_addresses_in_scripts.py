# ruff: noqa: F811 (fixtures)
"""Scripts with addresses where they take folders, end to end on the tiny model, over a real S3 server."""

import ast
import json
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from s3_server import environment, moto, s3  # noqa: F401
from test_bad_input import check_refusal, run_here
from test_docs import settings_of
from test_store import contents

from store.address import parse
from store.fetch import FLAGS, fetch
from store.publish import publish

BASE, ADAPTER = "s3://bucket/models/tiny", "s3://bucket/adapters/orders"


@pytest.fixture
def base(s3, tiny_model_dir):
    """The tiny model, published. Its address with the version."""
    return str(publish(tiny_model_dir, parse(BASE)))


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": f"what is {i}", "answer": f"it is {i}"}) + "\n" for i in range(6)))
    return path


@pytest.fixture
def data(base, rows, tmp_path):
    """Prepared data for that model, with its address."""
    flags = ["--data", rows, "--checkpoint_dir", BASE, "--out_dir", tmp_path / "data"]
    code, out, err = run_here("prepare_data.py", *flags)
    assert code == 0 and f"finetune.py --checkpoint_dir {base} " in " ".join(out.split()), err
    return tmp_path / "data"


@pytest.fixture
def train(data, tmp_path):
    """`train(...)`: a run of two steps over the published base, in this process."""

    def run(*more):
        flags = ["--checkpoint_dir", BASE, "--data_dir", data, "--out_dir", tmp_path / "out", "--max_steps", 2]
        return run_here("finetune.py", *flags, *more)

    return run


def test_from_the_base_to_an_adapter_and_back(base, data, run_script, environment, tiny_model_dir, tmp_path):
    out_dir, final = tmp_path / "out", tmp_path / "out" / "final"
    flags = ["--data_dir", data, "--out_dir", out_dir, "--max_steps", 2, "--save_interval", 1]
    code, out, err = run_script("finetune.py", "--checkpoint_dir", BASE, *flags, "--publish", ADAPTER, env=environment)
    assert code == 0, err
    address = parse(out.strip().splitlines()[-1].removeprefix("published "))
    assert str(address.at(None)) == ADAPTER and contents(fetch(address)) == contents(final)

    # What was noted is the address, with the version.
    assert json.loads((data / "data.json").read_text())["checkpoint_dir"] == base
    assert yaml.safe_load((out_dir / "config.yaml").read_text())["checkpoint_dir"] == base
    assert json.loads((final / "onetune.json").read_text())["checkpoint_dir"] == base
    assert json.loads((final / "adapter_config.json").read_text())["base_model_name_or_path"] == base

    # A run goes on with what it noted, and from a folder with the same content.
    code, out, err = run_script("finetune.py", "--config", out_dir / "config.yaml", "--resume", env=environment)
    assert code == 0 and f"published {ADAPTER}@" in out, err
    again = ["--checkpoint_dir", tiny_model_dir, *flags, "--resume"]
    assert run_here("finetune.py", *again)[0] == 0
    weights = (final / "adapter_model.safetensors").read_bytes()
    assert weights == (fetch(address) / "adapter_model.safetensors").read_bytes()

    # Another machine knows the adapter's address alone, and the base may have been published anew.
    other = tmp_path / "other"
    shutil.copytree(tiny_model_dir, other)
    (other / "readme.txt").write_text("changed")
    publish(other, parse(BASE))
    elsewhere = {**environment, "ONETUNE_STORE_CACHE": str(tmp_path / "elsewhere")}
    asked = ["--prompt", "what is 3", "--temperature", 0, "--max_new_tokens", 8]
    code, answer, err = run_script("generate.py", "--adapter_dir", ADAPTER, *asked, env=elsewhere)
    assert code == 0, err
    here = run_here("generate.py", "--adapter_dir", final, "--checkpoint_dir", tiny_model_dir, *asked)
    assert (0, answer) == here[:2] and answer.strip()
    kept = tmp_path / "elsewhere" / "folders" / "s3" / "bucket" / "models"
    assert [path.name for path in kept.iterdir() if path.is_dir()] == [base.rpartition("/")[2]]


def test_measuring_by_address(base, rows, tiny_model_dir, tmp_path):
    flags = ["--data", rows, "--max_new_tokens", 4, "--out_file"]
    assert run_here("eval/exact_match.py", "--checkpoint_dir", BASE, *flags, tmp_path / "a.json")[0] == 0
    assert run_here("eval/exact_match.py", "--checkpoint_dir", tiny_model_dir, *flags, tmp_path / "b.json")[0] == 0
    a, b = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert a["answers"] == b["answers"] and len(a["answers"]) == 6


def test_adapters_by_address(train, base, tmp_path):
    assert train("--publish", ADAPTER)[0] == 0
    shutil.rmtree(tmp_path / "cache")
    asked = ["--prompt", "what", "--max_new_tokens", 4, "--temperature", 0, "--adapter"]
    several = ["--adapters", f"a={ADAPTER},b={tmp_path / 'out' / 'final'}"]
    answers = [run_here("generate.py", *several, *asked, name) for name in "ab"]
    assert answers[0][0] == 0 and answers[0][1] == answers[1][1], answers

    code, out, err = run_here("convert_hf_checkpoint.py", "--adapter_dir", ADAPTER, "--out_dir", tmp_path / "merged")
    assert code == 0 and (tmp_path / "merged" / "model.safetensors").is_file(), err
    check_refusal(*run_here("convert_hf_checkpoint.py", "--adapter_dir", ADAPTER), ADAPTER, "needs --out_dir")
    code, out, err = run_here(
        "convert_hf_checkpoint.py", "--adapter_dir", f"[{ADAPTER},{tmp_path / 'out' / 'final'}]", "--combine", "cat",
        "--weights", "[1,1]", "--out_dir", tmp_path / "both",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads((tmp_path / "both" / "onetune.json").read_text())["checkpoint_dir"] == base


def test_publishing_to_a_folder(train, tmp_path):
    shop = tmp_path / "shop" / "orders"
    code, out, err = train("--publish", shop)
    assert code == 0 and f"published file://{shop}@" in out, err
    code, out, err = run_here("generate.py", "--adapter_dir", shop, "--prompt", "what", "--max_new_tokens", 2)
    assert code == 0, err


def test_publishing_that_fails_at_the_end(train, run_script, tmp_path):
    shop, final = tmp_path / "shop", tmp_path / "out" / "final"
    shop.mkdir()
    (shop / "blobs").write_text("this should be a folder")
    check_refusal(
        *train("--publish", shop / "orders"), f"{final} is whole, but was not published: ", "blobs",
        f"python store/models.py --push {final} --to {shop / 'orders'}",
    )  # fmt: skip
    assert final.is_dir() and (tmp_path / "out" / "summary.json").is_file() and not (shop / "orders").exists()
    (shop / "blobs").unlink()
    code, out, err = run_script("store/models.py", "--push", final, "--to", shop / "orders")
    assert code == 0 and contents(fetch(parse(out.split()[-1]))) == contents(final), err


def test_publishing_that_cannot_work_is_refused_before_the_first_step(train, tmp_path):
    check_refusal(*train("--publish", "s3://nobucket/orders"), "s3://nobucket/orders", "no such bucket")
    check_refusal(*train("--publish", tmp_path / "data"), f"file://{tmp_path}/data is a folder with files", "data.json")
    check_refusal(*train("--publish", tmp_path / "out"), "is, holds or lies in", f"{tmp_path}/out/final")
    check_refusal(*train("--publish", "file://shop/orders"), "--publish file://shop/orders: expected file:///FOLDER")
    assert not (tmp_path / "out").exists()


def takes_folders(path):
    text = path.read_text()
    settings = settings_of(path) if "cli.run(main" in text else None
    return settings is not None and bool(settings.__dataclass_fields__.keys() & set(FLAGS))


SCRIPTS = [path for folder in ("", "eval/") for path in sorted(ROOT.glob(f"{folder}*.py")) if takes_folders(path)]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_script_fetches_its_folders_first(path: Path):
    (main,) = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef) and n.name == "main"]
    assert ast.unparse(main.body[1]) == "fetch_folders(s)"


def test_the_scripts_that_take_folders():
    names = {path.name for path in SCRIPTS}
    assert names >= {"finetune.py", "generate.py", "prepare_data.py", "convert_hf_checkpoint.py", "exact_match.py"}
    assert names >= {"lm_eval_harness.py", "quality.py", "helm_server.py"}
