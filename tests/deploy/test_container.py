"""The training image: its Dockerfile as far as it can be checked without Docker, and what a container starts."""

import json
import re
import signal
import subprocess
import time

import pytest
import yaml
from clusters import DOCKERFILE, container_command, environment, start, write_project
from conftest import ROOT
from dockerfiles import by_name, check_complete, check_sent, copied, instructions
from test_docs import check_flags, commands, fences

SCRIPTS = ("finetune.py", "prepare_data.py", "generate.py", "convert_hf_checkpoint.py", "quantize.py")
EVALUATIONS = ("eval/exact_match.py", "eval/lm_eval_harness.py", "eval/quality.py")
TEXTS = by_name(DOCKERFILE)


def test_every_instruction_is_one():
    names = [name for name, _ in instructions(DOCKERFILE)]
    assert names[:2] == ["ARG", "FROM"] and names.count("FROM") == names.count("ENTRYPOINT") == names.count("CMD") == 1
    assert set(names) <= {"ARG", "FROM", "RUN", "ENV", "WORKDIR", "COPY", "USER", "STOPSIGNAL", "ENTRYPOINT", "CMD"}


def test_the_base_and_all_packages_are_pinned():
    assert TEXTS["FROM"] == ["${BASE}"]
    assert re.fullmatch(r"BASE=nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu24\.04", TEXTS["ARG"][0])
    assert "@sha256:" in DOCKERFILE.read_text(), "how to pin the base by its digest"
    (pip,) = [text for text in TEXTS["RUN"] if "pip install" in text]
    files = re.findall(r"-r (\S+)", pip)
    assert "requirements.txt" in files and "install " + " ".join(f"-r {file}" for file in files) in pip.replace(
        "--no-cache-dir ", ""
    ), "packages come from the pinned files alone"
    for file in files:
        assert file in copied(DOCKERFILE)
        lines = [line for line in (ROOT / file).read_text().splitlines() if line and line[0] != "#"]
        assert lines and all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), file


def test_the_image_has_all_that_the_scripts_import():
    seen = check_complete(copied(DOCKERFILE), [*SCRIPTS, *EVALUATIONS])
    assert {"training/sweep/loop.py", "training/memory/plan.py", "preparation/records.py"} <= seen


def test_the_image_has_sources_and_no_weights():
    files = copied(DOCKERFILE)
    check_sent(files.values())
    assert {"preparation/report.html", "pyproject.toml", "configs/dev.yaml", "deploy/entrypoint.sh"} <= files.keys()
    assert not [name for name in files if name.startswith(("checkpoints", "prepared", "out", "tests", "bench"))]


def test_it_runs_as_an_ordinary_user_with_a_fixed_id_who_can_write_where_he_has_to():
    assert TEXTS["USER"] == ["1000:1000"]
    (users,) = [text for text in TEXTS["RUN"] if "useradd" in text]
    assert "--uid 1000" in users
    made, owned = re.search(r"mkdir (.*?) &&", users)[1].split(), re.search(r"chown 1000:1000 (.*)", users)[1].split()
    assert made == owned == ["/cache", "checkpoints", "prepared", "out"]
    caches = dict(word.split("=") for text in TEXTS["ENV"] for word in text.split() if "cache" in word)
    assert len(caches) >= 5 and all(f"{value}/".startswith("/cache/") for value in caches.values())


def test_there_is_a_compiler_and_what_it_needs():
    (apt,) = [text for text in TEXTS["RUN"] if "apt-get install" in text]
    python = re.search(r"(python3\.\d+) -m venv", " ".join(TEXTS["RUN"]))[1]
    assert {"g++", "tini", python, f"{python}-dev", f"{python}-venv"} <= set(apt.split())
    oldest = re.search(r'requires-python = ">=3\.(\d+)"', (ROOT / "pyproject.toml").read_text())[1]
    assert int(python.removeprefix("python3.")) >= int(oldest)


def test_every_file_of_the_folder_is_in_the_page():
    """deploy/ has no Python, and so no __init__.py: its map is in docs/clusters.md."""
    text = (ROOT / "docs" / "clusters.md").read_text()
    files = [str(path.relative_to(ROOT)) for path in (ROOT / "deploy").rglob("*") if path.is_file()]
    assert len(files) >= 10 and [file for file in files if f"`{file}`" not in text] == []


def test_signals_reach_the_process():
    """ENTRYPOINT and CMD are lists of words: of text Docker would make a shell, which keeps signals to itself."""
    assert json.loads(TEXTS["ENTRYPOINT"][0])[:2] == ["tini", "--"]
    assert json.loads(TEXTS["CMD"][0]) == ["finetune.py", "--help"]
    assert TEXTS["STOPSIGNAL"] == ["SIGTERM"]


# ----------------------------------------------------------------------------------------------------------- the start


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_model_dir):
    """A folder as /onetune is in the container. Tests may write to out/."""
    folder = tmp_path_factory.mktemp("container") / "onetune"
    write_project(folder, tiny_model_dir)
    return folder


def run(folder, *args):
    command = container_command(folder, args)
    return subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("python", [["python"], []], ids=["python finetune.py", "finetune.py"])
def test_a_script_is_run_with_or_without_python_before_it(project, python):
    done = run(project, *python, "finetune.py", "--config", "configs/dev.yaml", "--print_config")
    assert done.returncode == 0 and yaml.safe_load(done.stdout)["out_dir"] == "out/dev", done.stderr


def test_any_other_command_is_run_as_it_is(project):
    done = run(project, "sh", "-c", "echo $0 $1; exit 3", "a b", "c")
    assert (done.returncode, done.stdout) == (3, "a b c\n")


def test_a_mistake_is_one_line_and_status_2(project):
    done = run(project, "finetune.py", "--config", "configs/dev.yaml", "--data_dir", "prepared/none", "--resume")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "prepared/none" in done.stderr


def test_the_shell_of_the_start_is_gone(project):
    """A signal to what the container started reaches the command itself: it takes the shell's place."""
    (project / "ready").unlink(missing_ok=True)
    code = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))"
    code += "; open('ready', 'w').close(); time.sleep(60)"
    process = start(project, container_command(project, ["python", "-c", code]))
    try:
        end = time.monotonic() + 60
        while not (project / "ready").exists() and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 7
    finally:
        process.kill()
        process.wait()


def page_commands(*beginning):
    """The commands in docs/clusters.md that begin with these words."""
    text = (ROOT / "docs" / "clusters.md").read_text()
    found = [command for language, block in fences(text) if language == "bash" for command in commands(block)]
    return [command for command in found if command[: len(beginning)] == [*beginning]]


def test_commands_of_the_page_that_run_in_the_container_can_be_given():
    """The page's own test (test_docs.py) knows python, but not what stands after the image's name."""
    found = page_commands("docker", "run")
    assert len(found) >= 2
    for command in found:
        (i,) = [i for i, word in enumerate(command) if word.endswith(".py")]
        check_flags(ROOT / command[i], command[i + 1 :])


def test_commands_of_the_page_that_slurm_runs_can_be_given():
    found = page_commands("sbatch")
    assert len(found) >= 2
    for command in found:
        script = command.index("deploy/slurm/train.sbatch")
        assert all(word.startswith("--") and "=" in word for word in command[1:script]), "options of sbatch"
        check_flags(ROOT / "finetune.py", [*command[script + 1 :], "--resume"])
