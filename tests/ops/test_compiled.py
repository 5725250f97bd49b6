"""The C++ on processors that lack what this one has, and the cache of compiled files, damaged, foreign or missing."""

import hashlib
import multiprocessing
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ops import cpp

TESTS = Path(__file__).parents[1]
COMPILER = shutil.which("g++")


@pytest.mark.skipif(platform.machine() != "x86_64" or not COMPILER, reason="no g++ for x86_64")
@pytest.mark.parametrize("without", ["", "-mno-avx512bf16", "-mno-avx512f", "-mno-avx2"])  # and all without AMX
def test_fewer_instructions_give_the_same(without, tmp_path):
    wrapper = tmp_path / "g++"
    wrapper.write_text(f'#!/bin/sh\nexec {COMPILER} "$@" -mno-amx-tile -mno-amx-bf16 {without}\n')
    wrapper.chmod(0o755)
    names = "rms_norm swiglu rotate loss cpp_attention quantised several_rows gated activate norm_is_the_plain turned"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", f"({' or '.join(names.split())}) and not Triton"]
    files = ("kernels", "attention", "activations", "norms", "scores", "capped_loss")
    command += [TESTS / "test_generate.py", *(TESTS / f"ops/test_{name}.py" for name in files)]
    environment = {**os.environ, "CXX": str(wrapper), "XDG_CACHE_HOME": str(tmp_path)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=TESTS.parent)
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout
    assert {path.name.split("-")[0] for path in (tmp_path / "onetune").iterdir()} == {"decode_cpu", "kernels_cpu"}


# ------------------------------------------------------------------------------------------ the cache of compiled files

needs_compiler = pytest.mark.skipif(not COMPILER, reason="no g++")
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
OTHER_USER = 54321  # without an entry in /etc/passwd


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a small source, where cpp.py looks for it, a g++ that counts its calls, and an empty cache."""
    for folder in (tmp_path, *tmp_path.parents):  # for the tests that become another user
        if folder.name.startswith(("pytest-", "popen-")) or folder == tmp_path:
            folder.chmod(0o755)
    (tmp_path / "tiny.cpp").write_text('extern "C" int answer() { return 42; }\n')
    (tmp_path / "calls").touch(mode=0o666)
    (tmp_path / "calls").chmod(0o666)
    wrapper = tmp_path / "g++"
    wrapper.write_text(f'#!/bin/sh\necho x >> {tmp_path}/calls\nexec {COMPILER} "$@"\n')
    wrapper.chmod(0o755)
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp").chmod(0o777)
    monkeypatch.setattr(cpp, "__file__", str(tmp_path / "cpp.py"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("CXX", str(wrapper))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def compilations(place):
    """Load the library and call it: how often that ran the compiler."""
    before = (place / "calls").read_text().count("x")
    assert cpp.compiled_library.__wrapped__("tiny").answer() == 42
    return (place / "calls").read_text().count("x") - before


def kept(place):
    """The one file in the cache folder: nothing else stays there, nor in the temporary folder."""
    assert [*(place / "tmp").iterdir()] == []
    (path,) = (place / "cache" / "onetune").iterdir()
    return path


def as_other_user(place):
    """`compilations`, by a user who has no entry in /etc/passwd."""
    return in_child(compilations, place, user=OTHER_USER)


def in_child(function, *args, user=None):
    """The result of a function called in a child process, which forgets what libraries it has loaded."""

    def child(sender):
        if user:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
        sender.send(function(*args))

    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=child, args=(sender,))
    process.start()
    sender.close()
    result = receiver.recv()
    process.join()
    return result


@needs_compiler
def test_it_is_compiled_once(place, capfd):
    assert [compilations(place) for _ in range(3)] == [1, 0, 0]
    assert kept(place).stat().st_mode & 0o077 == kept(place).parent.stat().st_mode & 0o077 == 0
    assert capfd.readouterr().err == ""


def flip_a_bit(content):
    place = random.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << random.randrange(8)]) + content[place + 1 :]


DAMAGES = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: random.randrange(len(content))],
    "cut by a byte": lambda content: content[:-1],
    "a changed bit": flip_a_bit,
    "no library": lambda content: b"abc" + hashlib.sha256(b"abc").digest(),  # as one for another system
}


@needs_compiler
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_compiled_again_once(place, capfd, damage):
    in_child(compilations, place)
    path = kept(place)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert [in_child(compilations, place) for _ in range(2)] == [1, 0]
    assert kept(place) == path and capfd.readouterr().err == ""


@needs_compiler
def test_a_file_that_others_can_write_is_compiled_again(place, capfd):
    compilations(place)
    kept(place).chmod(0o666)
    assert [compilations(place) for _ in range(2)] == [1, 0]
    assert kept(place).stat().st_mode & 0o022 == 0 and capfd.readouterr().err == ""


@needs_compiler
@needs_root
def test_without_a_home_folder_it_is_compiled_into_a_temporary_one(place, capfd, monkeypatch):
    """As in `docker run --user 54321`."""
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert as_other_user(place) == as_other_user(place) == 1
    err = capfd.readouterr().err
    assert err.count("\n") == err.count("no home folder") == 2 and "tiny.cpp is compiled again at each start" in err, (
        err
    )
    assert [*(place / "tmp").iterdir()] == []


@needs_compiler
@needs_root
def test_a_cache_that_cannot_be_written_costs_a_note(place, capfd):
    (place / "cache").mkdir()
    assert as_other_user(place) == 1
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and f"{place}/cache/onetune" in err and "compiled again at each start" in err, err
    assert [*(place / "tmp").iterdir()] == [*(place / "cache").iterdir()] == []


@needs_compiler
@needs_root
@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_another_user_can_have_written_is_not_run(place, capfd, what):
    compilations(place)
    path = kept(place)
    os.chown(path.parent if what == "folder" else path, OTHER_USER, OTHER_USER)
    assert compilations(place) == 1
    err = capfd.readouterr().err
    if what == "folder":
        assert err.count("\n") == 1 and f"{path.parent} can be changed by other users" in err, err
        assert compilations(place) == 1
    else:
        assert err == "" and kept(place).stat().st_uid == 0
        assert compilations(place) == 0


@needs_compiler
@pytest.mark.parametrize("mode", [0o770, 0o777, 0o702])
def test_a_folder_of_ours_that_others_may_write_is_closed_to_them(place, capfd, mode):
    compilations(place)
    kept(place).parent.chmod(mode)
    assert compilations(place) == 0
    assert kept(place).parent.stat().st_mode & 0o022 == 0 and capfd.readouterr().err == ""


@needs_compiler
def test_equal_process_ids_do_not_meet(place, capfd, monkeypatch):
    """Containers that share a cache folder, all with process id 7, and compile at the same time."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    with ThreadPoolExecutor(4) as pool:
        assert all(count >= 1 for count in pool.map(lambda _: compilations(place), range(4)))
    assert compilations(place) == 0
    assert kept(place).is_file() and capfd.readouterr().err == ""


@needs_compiler
def test_a_compiler_that_fails_is_named_with_its_reason(place, capfd):
    (place / "tiny.cpp").write_text("int answer() { return nonsense; }\n")
    assert cpp.compiled_library.__wrapped__("tiny") is None
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "tiny.cpp:1" in err and "nonsense" in err and "going on without tiny.cpp" in err, (
        err
    )
    assert not (place / "cache").exists() or [*(place / "cache" / "onetune").iterdir()] == []
