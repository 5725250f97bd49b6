"""What makes the challenge's submission: the Dockerfile as far as it can be checked without Docker, and its start."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from fnmatch import fnmatch
from pathlib import Path

import pytest
from conftest import ROOT
from test_imports import file_of, imports

import convert_hf_checkpoint
from eval import helm_server

DOCKERFILE = ROOT / "eval" / "Dockerfile"
INSTRUCTIONS = {
    "FROM", "RUN", "WORKDIR", "COPY", "USER", "ARG", "ENV", "EXPOSE", "HEALTHCHECK", "STOPSIGNAL", "CMD",
}  # fmt: skip


def instructions():
    """The Dockerfile as [(instruction, its text)]: comments out, continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def copied():
    """The files that COPY puts into the image, {path in the image: path here}."""
    files = {}
    for name, text in instructions():
        if name == "COPY":
            *sources, target = text.split()
            for source in sources:
                found = [*ROOT.glob(source)]
                assert found, f"COPY {source}: there is no such file"
                files |= {os.path.normpath(os.path.join(target, path.name)): path for path in found}
    return files


def test_every_instruction_is_one():
    names = [name for name, _ in instructions()]
    assert names[0] == "FROM" and names.count("FROM") == names.count("CMD") == names.count("HEALTHCHECK") == 1
    assert set(names) <= INSTRUCTIONS


def test_what_is_copied_is_there_and_not_ignored():
    ignore = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert ignore[0] == "**" and all(line[0] == "!" for line in ignore[1:])
    for path in copied().values():
        name = str(path.relative_to(ROOT))
        assert any(fnmatch(name, line[1:]) and name.count("/") == line.count("/") for line in ignore[1:]), name
        assert path.suffix in (".py", ".cpp", ".h", ".txt", ".sh"), f"{name}: no weights in the image's sources"


def test_the_image_has_all_that_the_server_imports():
    files, open_, seen = copied(), [ROOT / "eval" / "helm_server.py", ROOT / "convert_hf_checkpoint.py"], set()
    while open_:
        path = open_.pop()
        name = str(path.relative_to(ROOT))
        assert name in files, f"{name} is imported but not copied"
        seen.add(name)
        below = {file_of(module) for module, _ in imports(path)} - {None}
        open_ += [path for path in below if str(path.relative_to(ROOT)) not in seen]
    assert {f"ops/{name}" for name in ("decode_cpu.cpp", "kernels_cpu.cpp", "vectors.h", "matrix_tiles.h")} <= set(
        files
    )
    assert "inference/serving.py" in seen and "eval/openai_api.py" in seen


def test_requirements_are_pinned():
    for name in ("requirements.txt", "requirements-eval.txt", "eval/requirements-helm.txt"):
        lines = [line for line in (ROOT / name).read_text().splitlines() if line and line[0] != "#"]
        assert lines and all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), name
    installed = " ".join(text for name, text in instructions() if name == "RUN" and "pip install" in text)
    assert "-r requirements.txt -r requirements-eval.txt" in installed


def test_it_listens_on_port_80_of_all_addresses_as_an_ordinary_user():
    by_name = {}
    for name, text in instructions():
        by_name.setdefault(name, []).append(text)
    assert by_name["EXPOSE"] == ["80"] and by_name["USER"] == ["onetune"]
    assert "HOST=0.0.0.0" in " ".join(by_name["ENV"]) and "PORT=80" in " ".join(by_name["ENV"])
    command = json.loads(by_name["CMD"][0])  # the form that a signal reaches
    assert command[0] == "bash" and command[1] in copied()
    (check,) = by_name["HEALTHCHECK"]
    code = re.search(r'CMD python -c "(.*)"$', check)[1].replace('\\"', '"')
    compile(code, "HEALTHCHECK", "exec")
    assert "/health" in code


def test_the_flags_of_the_start_exist():
    text = (ROOT / "eval" / "submission.sh").read_text().replace("\\\n", " ")
    server, convert = (re.search(rf"python {script} .*", text)[0] for script in ("eval/helm_server.py", "convert_.*py"))
    for line, module in ((server, helm_server), (convert, convert_hf_checkpoint)):
        flags = set(re.findall(r"--(\w+)", line))
        assert flags and flags <= module.Settings.__dataclass_fields__.keys(), flags


@pytest.mark.parametrize("script", ["submission.sh", "run_helm.sh"])
def test_scripts_are_bash(script):
    assert subprocess.run(["bash", "-n", str(ROOT / "eval" / script)]).returncode == 0


# ----------------------------------------------------------------------------------------------------------- the start


def environment(**values):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    kept = {
        key: value for key, value in os.environ.items() if key not in ("MODEL", "ADAPTER", "API_KEY", "HOST", "PORT")
    }
    return {**kept, "PATH": path, "OMP_NUM_THREADS": "1", **{key: str(value) for key, value in values.items()}}


def test_the_start_serves_a_folder(tiny_model_dir):
    """As the container's command does, and answers what the organisers' health check asks; SIGTERM ends it with 0."""
    (command,) = [json.loads(text) for name, text in instructions() if name == "CMD"]
    env = environment(MODEL=tiny_model_dir, PORT=0, PRECISION="32-true")
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        match = re.fullmatch(r"serving .* on (http://127\.0\.0\.1:\d+)\n", line)
        assert match, line + process.stderr.read()
        body = json.dumps({"prompt": "The capital of France is "}).encode()
        request = urllib.request.Request(match[1] + "/process", body, {"Content-Type": "application/json"})
        answer = json.load(urllib.request.urlopen(request, timeout=60))
        assert answer["text"].startswith("The capital of France is ") and answer["tokens"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, process.stderr.read()
    finally:
        process.kill()
        process.communicate()


def test_the_start_without_a_model():
    done = subprocess.run(
        ["bash", str(ROOT / "eval" / "submission.sh"), "fetch"], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "MODEL" in done.stderr


def test_fetching_what_is_a_folder_does_nothing(tiny_model_dir):
    done = subprocess.run(
        ["bash", str(ROOT / "eval" / "submission.sh"), "fetch"],
        env=environment(MODEL=tiny_model_dir), capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_model_that_is_no_repository_is_one_line():
    done = subprocess.run(
        ["bash", str(ROOT / "eval" / "submission.sh"), "fetch"],
        env=environment(MODEL="no/such/place"), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "--repo_id no/such/place" in done.stderr and "Traceback" not in done.stderr


# ----------------------------------------------------------------------------------------------------------------- HELM


def test_run_specs_are_the_challenges():
    """Each names the client that talks to a server; the scenarios are those that the organisers published."""
    entries = re.findall(
        r'\{description: "([a-z_]+):([^"]*)", priority: 1\}', (ROOT / "eval" / "helm.conf").read_text()
    )
    assert {name for name, _ in entries} == {"mmlu", "truthful_qa", "summarization_cnndm", "gsm", "bbq", "big_bench"}
    assert all("model=neurips/local" in rest for _, rest in entries)
    assert len(set(entries)) == len(entries) == 30


def test_helm_without_a_server_is_one_line():
    command = ["bash", str(ROOT / "eval" / "run_helm.sh"), "http://127.0.0.1:9"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "http://127.0.0.1:9/health" in done.stderr
