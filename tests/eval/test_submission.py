"""What makes the challenge's submission: the Dockerfile as far as it can be checked without Docker, and its start."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT
from dockerfiles import by_name, check_complete, check_sent, copied, instructions

import convert_hf_checkpoint
from eval import helm_server

DOCKERFILE = ROOT / "eval" / "Dockerfile"
INSTRUCTIONS = {
    "FROM", "RUN", "WORKDIR", "COPY", "USER", "ARG", "ENV", "EXPOSE", "HEALTHCHECK", "STOPSIGNAL", "CMD",
}  # fmt: skip


def test_every_instruction_is_one():
    names = [name for name, _ in instructions(DOCKERFILE)]
    assert names[0] == "FROM" and names.count("FROM") == names.count("CMD") == names.count("HEALTHCHECK") == 1
    assert set(names) <= INSTRUCTIONS


def test_what_is_copied_is_there_and_not_ignored():
    check_sent(copied(DOCKERFILE).values())


def test_the_image_has_all_that_the_server_imports():
    seen = check_complete(copied(DOCKERFILE), ["eval/helm_server.py", "convert_hf_checkpoint.py"])
    assert {"inference/serving.py", "eval/openai_api.py"} <= seen


def test_requirements_are_pinned():
    for name in ("requirements.txt", "requirements-eval.txt", "eval/requirements-helm.txt"):
        lines = [line for line in (ROOT / name).read_text().splitlines() if line and line[0] != "#"]
        assert lines and all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), name
    installed = " ".join(text for name, text in instructions(DOCKERFILE) if name == "RUN" and "pip install" in text)
    assert "-r requirements.txt -r requirements-eval.txt" in installed


def test_it_listens_on_port_80_of_all_addresses_as_an_ordinary_user():
    texts = by_name(DOCKERFILE)
    assert texts["EXPOSE"] == ["80"] and texts["USER"] == ["onetune"]
    assert "HOST=0.0.0.0" in " ".join(texts["ENV"]) and "PORT=80" in " ".join(texts["ENV"])
    command = json.loads(texts["CMD"][0])  # the form that a signal reaches
    assert command[0] == "bash" and command[1] in copied(DOCKERFILE)
    (check,) = texts["HEALTHCHECK"]
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
    (command,) = [json.loads(text) for name, text in instructions(DOCKERFILE) if name == "CMD"]
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
