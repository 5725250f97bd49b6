"""What is uploaded to the hub: whole, with a card that says what is true, and nothing of this machine in it."""

import base64
import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from http_stub import JsonHandler, serving
from safetensors import safe_open
from test_finetune import random_samples, run, settings, write_data  # noqa: F401 (fixtures)

import convert_hf_checkpoint
from publishing import push_to_hub
from publishing.model_card import base_name, is_place, licence_of
from publishing.model_files import copy_model
from shell.cli import UserError
from shell.files import check_manifest
from tracking.results import record_result
from weights.peft_format import METADATA
from weights.safetensors_format import write_tensors


@pytest.fixture
def trained(run, tiny_model_dir):  # noqa: F811
    """`trained(**flags)`: the folder of a short run whose base has a licence, and two results."""

    def make(**flags):
        out = run(random_samples(8, sources=2), random_samples(3), max_steps=2, eval_interval=2, **flags)
        record_result(out / "final", "exact_match", "te|st", {"exact_match": 0.75}, {})
        record_result(out / "step-000002", "exact_match", "test", {"exact_match": 0.5}, {})
        return out

    return make


def push(out, **flags):
    given = dict(model_dir=out / "final", repo_id="me/tiny-orders", base_model="org/base", license="apache-2.0")
    push_to_hub.main(push_to_hub.Settings(**(given | flags)))


def head_and_text(folder):
    _, head, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), text


def test_what_is_uploaded_of_an_adapter(trained, tmp_path):
    out, up = trained(), tmp_path / "up"
    (out / "loss.png").write_bytes(b"a picture")  # the fixture leaves it out
    push(out, out_dir=up)
    head, text = head_and_text(up)
    assert head["base_model"] == "org/base" and head["license"] == "apache-2.0" and head["library_name"] == "peft"
    assert head["base_model_relation"] == "adapter" and "onetune" in head["tags"]
    (result,) = head["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "exact_match", "value": 0.75}] and result["dataset"]["name"] == "te|st"
    summary = json.loads((out / "summary.json").read_text())
    for part in (
        "| exact_match | te\\|st | 0.75 |", "2 optimiser steps", f"{summary['val_loss']:.4f}", "![Losses",
        "| `lora_r` | 16 |", "style `plain`", json.loads((out / "record.json").read_text())["hashes"]["code"],
    ):  # fmt: skip
        assert part in text, part
    assert json.loads((up / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"
    assert json.loads((up / "onetune.json").read_text())["checkpoint_dir"] == "org/base"
    assert (up / "adapter_model.safetensors").read_bytes() == (out / "final/adapter_model.safetensors").read_bytes()
    assert {*check_manifest(up)} == {path.name for path in up.iterdir()} - {"manifest.json"}
    for path in up.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), f"{path.name} names a folder of this machine"


def test_what_is_uploaded_of_a_merged_model(trained, tmp_path, tiny_model_dir):
    up, base = tmp_path / "up", tmp_path / "checkpoints" / "org" / "base"
    base.parent.mkdir(parents=True)
    base.symlink_to(tiny_model_dir)
    out = trained(checkpoint_dir=base)
    merged = tmp_path / "merged"
    convert_hf_checkpoint.main(convert_hf_checkpoint.Settings(source=base, adapter_dir=out / "final", out_dir=merged))
    push(out, model_dir=merged, run_dir=out, base_model=None, out_dir=up)
    head, text = head_and_text(up)
    assert head["base_model_relation"] == "finetune" and head["library_name"] == "transformers"
    assert "AutoModelForCausalLM.from_pretrained" in text and "PEFT" not in text
    assert "model-index" not in head, "the hub would take the adapter's results for the model's"
    assert "No evaluation was made." not in text
    assert re.search(r"Of the adapter, before it was merged:\n\n.*\n.*\n\| exact_match \| te\\\|st \| 0.75 \|", text)
    assert (up / "model.safetensors").read_bytes() == (merged / "model.safetensors").read_bytes()


def test_only_what_belongs_to_the_model(trained, tmp_path, capsys):
    out, secret = trained(save_interval=2), tmp_path / "secret"
    step = out / "step-000002"
    secret.write_text("a secret")
    for name in (".env", "private_notes.txt", "README.md"):
        (step / name).write_text("a secret")
    (step / "link.json").symlink_to(secret)
    (step / "sub").mkdir()
    (step / "sub" / "x.txt").write_text("a secret")
    (step / "tokenizer_config.json").write_text('{"name_or_path": "/home/me/base", "eos_token": "x"}')
    (step / "manifest.json").unlink()
    push(out, model_dir=step, out_dir=tmp_path / "up")
    ours = {"adapter_config.json", "adapter_model.safetensors", "onetune.json", "tokenizer_config.json"}
    assert {path.name for path in (tmp_path / "up").iterdir()} == ours | {"README.md", "manifest.json"}
    assert "a secret" not in (tmp_path / "up" / "README.md").read_text()
    assert json.loads((tmp_path / "up" / "tokenizer_config.json").read_text()) == {"eos_token": "x"}
    assert (
        f"left out of {step}: .env, README.md, link.json, optimizer.json, optimizer.safetensors, private_notes.txt, "
        "run.json, scaler.json, settings.json, sub/\n" in capsys.readouterr().out
    )


def test_the_tensors_of_a_stacked_adapter_name_no_path(tmp_path):
    source, up = tmp_path / "stacked", tmp_path / "up"
    for folder in (source, up):
        folder.mkdir()
    (source / "adapter_config.json").write_text("{}")
    tensors, own = {"a": torch.rand(3), "b": torch.rand(2)}, {"base_model_name_or_path": "/home/me/base", "r": 2}
    write_tensors(source / "adapter_model.safetensors", tensors, {"format": "pt", METADATA: json.dumps(own)})
    copy_model(source, up, "org/base")
    with safe_open(up / "adapter_model.safetensors", "pt") as file:
        assert json.loads(file.metadata()[METADATA]) == {"base_model_name_or_path": "org/base", "r": 2}
        assert file.metadata()["format"] == "pt" and all(file.get_tensor(k).equal(v) for k, v in tensors.items())


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("lora_targets", ["q_proj"], True),
        ("lora_tokens", ["<tool>", "</tool>"], True),
        ("forgetting_source", "general", True),
        ("publish", "shop", False),
        ("replay", "here", False),
        ("of a later version", "~/a", False),
        ("of a later version", ["a", "b/c"], False),
        ("of a later version", {"a": "s3://bucket/a"}, False),
    ],
)
def test_no_setting_that_is_a_path_is_shown(name, value, shown):
    assert is_place(name, value) is not shown


def test_the_data_are_those_of_the_run(trained, tmp_path, tiny_model_dir, capsys):
    out, data = trained(publish=str(tmp_path / "shop" / "x")), tmp_path / "data"
    push(out, out_dir=tmp_path / "one")
    text = head_and_text(tmp_path / "one")[1]
    assert "| gsm8k |" in text and str(tmp_path) not in text
    assert "other data now" not in capsys.readouterr().out
    shutil.rmtree(data)
    write_data(data, tiny_model_dir, random_samples(9, sources=2))
    push(out, out_dir=tmp_path / "two")
    text = head_and_text(tmp_path / "two")[1]
    assert "| gsm8k |" not in text and "not at hand" in text
    assert json.loads((out / "record.json").read_text())["hashes"]["data (train)"] in text
    assert f"{data} is not there, or has other data now" in capsys.readouterr().out


def test_an_adapter_that_no_run_of_ours_made(trained, tmp_path):
    out = trained()
    alone = (out / "final").rename(tmp_path / "alone")
    push(out, model_dir=alone, out_dir=tmp_path / "up")
    head, text = head_and_text(tmp_path / "up")
    assert "model-index" not in head and "The run that made it is not known." in text and "No evaluation" in text


class Hub(JsonHandler):
    """The parts of the hub's HTTP API that an upload asks for. server.files: what was committed; .refuses: a status."""

    def do_POST(self):
        body, server = self.body(), self.server
        server.asked.append(self.path)
        if self.headers.get("Authorization") != "Bearer hf_right":
            return self.answer({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            server.created = json.loads(body)
            return self.answer({"url": f"{server.url}/me/tiny-orders", "name": "me/tiny-orders"})
        if "/branch/" in self.path:
            return self.answer({})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                      "shouldIgnore": False} for f in files]  # fmt: skip
            return self.answer({"files": modes})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{server.url}/put/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if self.path == "/api/validate-yaml":
            server.head = yaml.safe_load(json.loads(body)["content"].split("---")[1])
            return self.answer({"errors": [], "warnings": []})
        assert "/commit/" in self.path, self.path
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                server.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                server.files[value["path"]] = server.blobs[value["oid"]]
            else:
                server.summary = value["summary"]
        return self.answer(
            {"commitUrl": f"{server.url}/me/tiny-orders/commit/{'1' * 40}", "commitOid": "1" * 40, "success": True}
        )

    def do_PUT(self):
        body = self.body()
        assert hashlib.sha256(body).hexdigest() == self.path.rpartition("/")[2]
        self.server.blobs[self.path.rpartition("/")[2]] = body
        self.answer({})

    def do_GET(self):
        self.server.asked.append(self.path)
        self.answer({"id": "me/tiny-orders", "sha": "0" * 40, "siblings": []})


@pytest.fixture
def hub(tmp_path):
    with serving(Hub) as server:
        server.files, server.blobs, server.asked = {}, {}, []
        server.environment = {
            "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "", "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "HF_TOKEN": "hf_right",
        }  # fmt: skip
        yield server


def flags(out):
    return ("--model_dir", out / "final", "--repo_id", "me/tiny-orders", "--base_model", "org/base")


def test_an_upload(trained, hub, tmp_path, run_script):
    out = trained()
    push(out, out_dir=tmp_path / "up")
    code, printed, err = run_script(
        "publishing/push_to_hub.py", *flags(out), "--license", "apache-2.0", "--private", env=hub.environment
    )
    assert code == 0 and f"uploaded to {hub.url}/me/tiny-orders/commit/1" in printed, err
    assert hub.created["visibility"] == "private" and hub.head["base_model"] == "org/base"
    assert hub.summary == "Upload from onetune"
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "up").iterdir()}


def test_a_token_that_may_not(trained, hub, run_script):
    out, environment = trained(), hub.environment | {"HF_TOKEN": "hf_wrong"}
    command = ("publishing/push_to_hub.py", *flags(out), "--license", "apache-2.0")
    code, _, err = run_script(*command, env=environment)
    assert code == 2 and err.splitlines()[-1].startswith("error: --repo_id me/tiny-orders: refused: set HF_TOKEN"), err
    code, _, err = run_script(*command, env=environment | {"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert code == 2 and "not uploaded" in err and "Traceback" not in err, err
    assert not hub.files


def test_what_a_base_is_called():
    assert base_name("checkpoints/org/base") == base_name("/a/checkpoints/org/base") == "org/base"
    paths = (
        "/somewhere/base",
        "checkpoints/base",
        "./base",
        "models/llama",
        "s3://b/checkpoints/o/b@0123456789ab",
        None,
    )
    assert [*map(base_name, paths)] == [None] * len(paths)


def test_an_adapter_that_was_uploaded_names_its_base(trained, tmp_path):
    push(trained(), out_dir=tmp_path / "up")
    push(tmp_path, model_dir=tmp_path / "up", base_model=None, out_dir=tmp_path / "again")
    assert head_and_text(tmp_path / "again")[0]["base_model"] == "org/base"


@pytest.mark.parametrize(
    "text, licence",
    [
        ("---\nlicense: apache-2.0\n---\n# A", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: llama-x\n---\n", "llama-x"),
        ("# A model\n", None),
        ("---\nlicense: [\n---\n", None),
        ("---\ntags: [a]\n---\n", None),
        ("---\n", None),
    ],
)
def test_the_licence_of_a_base(tmp_path, text, licence):
    (tmp_path / "README.md").write_text(text)
    assert licence_of(tmp_path) == licence


def test_the_licence_and_what_must_go_with_it(trained, tmp_path, monkeypatch):
    out = trained()
    with pytest.raises(UserError, match="--license: the folder of org/base has no model card"):
        push(out, license=None, out_dir=tmp_path / "up")
    base = Path(json.loads((out / "final/onetune.json").read_text())["checkpoint_dir"])
    own = tmp_path / "own"
    own.mkdir()
    for name, text in (("README.md", "---\nlicense: llama2\n---\n"), ("LICENSE.txt", "You may."), ("NOTICE", "Of X.")):
        (own / name).write_text(text)
    monkeypatch.setattr(push_to_hub, "base_folder", lambda *_: own)
    push(out, license=None, out_dir=tmp_path / "up")
    head, text = head_and_text(tmp_path / "up")
    assert head["license"] == "llama2" and re.search(r"## Licence\n\nThe base's: llama2", text)
    assert (tmp_path / "up/LICENSE.txt").read_text() == "You may." and (tmp_path / "up/NOTICE").is_file()
    assert base.is_dir()
