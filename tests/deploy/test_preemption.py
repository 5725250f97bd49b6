"""A run that is preempted, requeued and killed on a cluster ends with the same bytes as one that was left alone.

The commands are those of the files in deploy/, run as processes on a tiny model. Of Kubernetes the test plays the Job
controller, and of Slurm its programs srun, scancel and scontrol, which a run is started and stopped with.
"""

import json
import shlex
import signal
import subprocess
import time

import pytest
import yaml
from clusters import (
    KUBERNETES,
    checkpoint_steps,
    container_command,
    containers,
    documents,
    environment,
    final_files,
    finish,
    interrupt,
    start,
    steps_done,
    wait_for_steps,
    write_project,
)
from conftest import ROOT, SEED

SBATCH = ROOT / "deploy" / "slurm" / "train.sbatch"
SKYPILOT = ROOT / "deploy" / "skypilot" / "train.yaml"
(JOB,) = documents(KUBERNETES / "train-job.yaml")
(CONTAINER,) = containers(JOB).values()
GRACE = JOB["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
STEPS = 24
FLAGS = ["--config", "configs/dev.yaml", "--data_dir", "prepared/my"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_model_dir):
    """The files of the image and what is mounted, before any run."""
    folder = tmp_path_factory.mktemp("inputs") / "onetune"
    write_project(folder, tiny_model_dir)
    return folder


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """The project after a run that nothing disturbed."""
    folder = copy_of(inputs, tmp_path_factory.mktemp("undisturbed"))
    assert finish(folder, container_command(folder, CONTAINER["args"])) == 0, (folder / "log").read_text()
    assert steps_done(folder) == STEPS
    return folder


@pytest.fixture
def undisturbed(finished):
    """The bytes of its final/."""
    return final_files(finished)


@pytest.fixture
def project(inputs, tmp_path):
    """A fresh copy of the inputs, for a run."""
    return copy_of(inputs, tmp_path)


def copy_of(inputs, place):
    subprocess.run(["cp", "-a", str(inputs), str(place)], check=True)
    return place / inputs.name


# -------------------------------------------------------------------------------------------------------- Kubernetes


def decision(status, disrupted=False):
    """What the Job's podFailurePolicy does about a container that ended with a status: the first rule that fits."""
    for rule in JOB["spec"]["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes")
        if disrupted if codes is None else codes["operator"] == "In" and status in codes["values"]:
            return rule["action"]
    return "Count"


def test_what_the_job_makes_of_an_end():
    assert decision(143) == decision(143, disrupted=True) == decision(137, disrupted=True) == "Ignore"
    assert decision(2) == "FailJob"
    assert decision(1) == decision(137) == "Count", "a fault, or out of memory: backoffLimit times"


def test_a_job_that_is_preempted_three_times(project, undisturbed):
    """SIGTERM, as of an eviction; SIGKILL, as of a lost node or after the grace period; SIGTERM; then it may end."""
    command = container_command(project, CONTAINER["args"])
    saved = []
    for number, status in ((signal.SIGTERM, 143), (signal.SIGKILL, 137), (signal.SIGTERM, 143)):
        assert interrupt(project, command, number, GRACE) == status, (project / "log").read_text()
        assert decision(status, disrupted=True) == "Ignore" and not (project / "out" / "dev" / "final").exists()
        saved.append(checkpoint_steps(project)[-1])
        if number == signal.SIGTERM:
            assert saved[-1] == steps_done(project), "no step is lost"
    assert 0 < saved[0] <= saved[1] < saved[2] < STEPS
    assert finish(project, command) == 0, (project / "log").read_text()
    assert final_files(project) == undisturbed
    # A pod that is started once more, because the node was lost before the Job heard of the end: nothing changes.
    assert finish(project, command) == 0
    assert final_files(project) == undisturbed and steps_done(project) == STEPS


def test_a_signal_while_the_model_is_loading_ends_the_process_with_the_same_status(project):
    process = start(project, container_command(project, CONTAINER["args"]))
    try:
        time.sleep(random_delay())
        process.send_signal(signal.SIGTERM)
        assert process.wait(GRACE) in (-signal.SIGTERM, 143)  # tini makes 143 of both
    finally:
        process.kill()
        process.wait()


def random_delay():
    """Less than a start takes."""
    return 0.05 + SEED % 100 / 100


def test_the_evaluation_measures_what_was_trained(finished):
    """Its first container, that of exact match; lm-eval downloads its tasks."""
    (job,) = documents(KUBERNETES / "evaluate-job.yaml")
    rows = [{"instruction": f"what is {i}", "output": f"it is {i}"} for i in range(3)]
    (finished / "prepared" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = container_command(finished, containers(job)["exact-match"]["args"])
    assert finish(finished, command) == 0, (finished / "log").read_text()
    result = json.loads((finished / "out" / "dev" / "exact_match.json").read_text())
    assert result["samples"] == 3 and 0 <= result["exact_match"] <= 1


# ------------------------------------------------------------------------------------------------------------- Slurm

STUBS = {
    # Runs the task. SIGTERM to srun itself kills it, as Slurm's does.
    "srun": 'trap "kill -KILL $task" TERM\n"$@" &\ntask=$!\necho "$task" >task\nwait "$task"\n',
    "scancel": 'echo "scancel $*" >>calls\nkill -TERM "$(cat task)"\n',
    "scontrol": 'echo "scontrol $*" >>calls\n',
}


@pytest.fixture
def slurm(project):
    """The project as Slurm sees it, and the variables of a job's script: `programs/` stands in for Slurm's own."""
    programs = project / "programs"
    programs.mkdir()
    for name, body in STUBS.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{body}")
        (programs / name).chmod(0o755)
    activate = project / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text('PATH="$PWD/programs:$PATH"\n')
    return project, {"SLURM_JOB_ID": "17", "SLURM_SUBMIT_DIR": str(project)}


def calls(folder):
    """The calls of scancel and scontrol so far, in order."""
    path = folder / "calls"
    return path.read_text().splitlines() if path.exists() else []


def directives():
    """The #SBATCH lines, {option: value}."""
    lines = [line.removeprefix("#SBATCH --") for line in SBATCH.read_text().splitlines() if line.startswith("#SBATCH")]
    return dict(line.partition("=")[::2] for line in lines)


def test_what_the_script_asks_of_slurm():
    options = directives()
    assert options["gres"] == "gpu:1" and options["ntasks"] == "1"
    assert "requeue" in options and options["open-mode"] == "append"
    assert options["signal"].startswith("B:USR1@") and int(options["signal"].partition("@")[2]) >= 120


def test_a_slurm_job_that_runs_out_of_time(slurm, undisturbed):
    """Its script is warned with USR1, and queues the job again; the next start goes on, and its node is lost."""
    folder, variables = slurm
    command = ["bash", str(SBATCH), *FLAGS]
    assert interrupt(folder, command, signal.SIGUSR1, GRACE, **variables) == 143, (folder / "log").read_text()
    assert calls(folder) == ["scancel --signal=TERM 17", "scontrol requeue 17"]
    assert checkpoint_steps(folder)[-1] == steps_done(folder) < STEPS
    lose_node(folder, command, variables)
    assert len(calls(folder)) == 2, "what is killed makes no call"
    assert interrupt(folder, command, signal.SIGUSR1, GRACE, **variables) == 143
    assert finish(folder, command, **variables) == 0, (folder / "log").read_text()
    assert calls(folder) == ["scancel --signal=TERM 17", "scontrol requeue 17"] * 2, (
        "a finished run is not queued again"
    )
    assert final_files(folder) == undisturbed


def lose_node(folder, command, variables):
    """SIGKILL to all processes of a job, in the middle of a step."""
    before = steps_done(folder)
    with open(folder / "log", "a") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment(folder, **variables), stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_for_steps(folder, process, before)
    finally:
        subprocess.run(["kill", "-KILL", "--", f"-{process.pid}"], check=True)
        process.wait()


def test_a_task_that_slurm_stops_itself_is_queued_again(slurm):
    """A job that is preempted has SIGTERM sent to its tasks, not to its script."""
    folder, variables = slurm
    process = start(folder, ["bash", str(SBATCH), *FLAGS], **variables)
    try:
        wait_for_steps(folder, process, 0)
        subprocess.run(["bash", str(folder / "programs" / "scancel"), "by Slurm"], cwd=folder, check=True)
        assert process.wait(GRACE) == 143
    finally:
        process.kill()
        process.wait()
    assert calls(folder) == ["scancel by Slurm", "scontrol requeue 17"]


def test_a_mistake_is_not_queued_again(slurm):
    folder, variables = slurm
    assert finish(folder, ["bash", str(SBATCH), "--config", "configs/dev.yaml", "--epochs", "0"], **variables) == 2
    assert "--epochs 0" in (folder / "log").read_text() and calls(folder) == []


@pytest.mark.parametrize("path", [SBATCH, ROOT / "deploy" / "entrypoint.sh"], ids=lambda path: path.name)
def test_scripts_are_bash(path):
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    assert path.read_text().startswith("#!/usr/bin/env bash\n")


# ---------------------------------------------------------------------------------------------------------- SkyPilot


def test_a_spot_machine_that_is_lost(project, undisturbed):
    """SkyPilot's `run`, its mounted folders put here: SIGKILL, as where a machine is taken away, then to the end."""
    task = yaml.safe_load(SKYPILOT.read_text())
    script = task["run"].replace("source .venv/bin/activate\n", "")
    for mounted, here in (("/checkpoints", "checkpoints"), ("/prepared", "prepared"), ("/out", "out")):
        assert mounted in {**task["file_mounts"], **task["volumes"]} and f" {mounted}/" in script
        script = script.replace(f" {mounted}/", f" {here}/")
    assert task["resources"]["use_spot"] and task["resources"]["job_recovery"]["recover_on_exit_codes"] == [143]
    (command,) = [shlex.split(line) for line in script.replace("\\\n", " ").splitlines() if line]
    assert interrupt(project, command, signal.SIGKILL) == 137
    assert finish(project, command) == 0, (project / "log").read_text()
    assert final_files(project) == undisturbed
