"""Folders to a server with the interface of Google Cloud Storage and back, where an emulator of it is installed."""

import shutil
import subprocess

import pytest
from conftest import free_port, wait_for
from s3_server import answers
from test_bad_input import check_refusal
from test_store import contents, write_folder

EMULATOR = "gcp-storage-emulator"  # of the package of that name
NAME = "gs://bucket/models/llama"


@pytest.fixture
def google(tmp_path):
    """The variables of a user of a server with an empty bucket, and a cache of the test's own."""
    if not shutil.which(EMULATOR):
        pytest.skip(f"{EMULATOR} is not installed")
    port = free_port()
    environment = {
        "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}",
        "FSSPEC_GS": '{"token": "anon"}',
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # gRPC, which the emulator has not
        "ONETUNE_STORE_CACHE": str(tmp_path / "cache"),
    }
    start = [EMULATOR, "start", "--host=127.0.0.1", f"--port={port}", "--in-memory", "--default-bucket=bucket"]
    process = subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: answers(port))
        yield environment
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture
def command(google, run_script):
    """`command("--list", NAME)`: store/models.py as that user."""
    return lambda *args: run_script("store/models.py", *args, env=google, timeout=120)


def test_there_and_back(command, tmp_path):
    folder = write_folder(tmp_path / "large", {"config.json": 100, "model.safetensors": 17 * 2**20})  # in two parts
    code, out, err = command("--push", folder, "--to", NAME)
    assert code == 0 and out.startswith(f"published {NAME}@"), err
    first = out.split()[1]
    before = contents(folder)
    (folder / "config.json").write_text("{}")
    code, out, err = command("--push", folder, "--to", NAME)
    assert code == 0 and out.split()[1] != first, err
    for address, content in ((NAME, contents(folder)), (first, before)):
        code, out, err = command("--pull", address, "--out_dir", tmp_path / address[-4:])
        assert code == 0 and contents(tmp_path / address[-4:]) == content, err
    code, out, err = command("--list", NAME)
    assert code == 0 and out.count(NAME) == 2 and first in out and out.count("the latest") == 1, err
    assert command("--list", "gs://bucket/models")[1] == f"{NAME}\n"
    check_refusal(*command("--pull", "gs://bucket/models/lama"), "gs://bucket/models/lama: there is no such model")
    check_refusal(*command("--pull", f"{NAME}@0123456789ab"), "there is no such version")
