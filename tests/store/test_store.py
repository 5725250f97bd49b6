# ruff: noqa: F811 (fixtures)
"""Folders to a real S3 server and back: versions, parts, cut connections, spoilt bytes, two processes at once."""

import errno
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.request import Request, urlopen

import pytest
from conftest import SEED, wait_for
from s3_server import PART, Fault, cut, environment, flip, forget_connections, moto, proxy, s3, start, through  # noqa: F401
from test_bad_input import check_refusal, run_here

import store.remote
from shell.cli import UserError
from shell.files import check_manifest, new_folder
from store import cache, publish, version
from store.address import Address, parse, parse_place, published
from store.fetch import fetch, fetch_folders, local, pull, verify

NAME = "s3://bucket/models/llama"


def write_folder(folder, sizes, seed=0):
    """A folder of random files. sizes: bytes by name."""
    numbers = random.Random(f"{SEED} {seed}")
    for name, size in sizes.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(numbers.randbytes(size))
    return folder


def contents(folder):
    """The bytes of each file below, but for the manifest."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture
def small(tmp_path):
    return write_folder(
        tmp_path / "small", {"config.json": 200, "model.safetensors": 70_000, "original/params.json": 0}
    )


@pytest.fixture
def large(tmp_path):
    """With a file of three parts, the last of them short."""
    return write_folder(tmp_path / "large", {"config.json": 300, "model.safetensors": 2 * PART + 1_000_001})


def push(folder, to=NAME):
    return publish.publish(folder, parse(to))


def blobs(s3):
    return {path for path in s3.objects() if "/blobs/" in path}


def finish(process, seconds=60):
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def command(*args):
    """store/models.py in this process: (exit status, standard output, standard error)."""
    return run_here("store/models.py", *args)


def refused(*args, says):
    check_refusal(*command(*args), *says)


# --------------------------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("s3://bucket/a", Address("s3", "bucket", "a")),
        ("s3://bucket/x/y/a@0123456789ab", Address("s3", "bucket/x/y", "a", "0123456789ab")),
        (Path("s3://bucket/x/a"), Address("s3", "bucket/x", "a")),
        (Path("gs://bucket/a@b"), Address("gs", "bucket", "a@b")),
        ("file:///x/a/", Address("file", "/x", "a")),
        ("file:///x//a", Address("file", "/x", "a")),
        ("file://localhost/x/a", Address("file", "/x", "a")),
        ("file:///x%20y/a%25b", Address("file", "/x y", "a%b")),
        ("s3://bucket/x%20y/a%b", Address("s3", "bucket/x%20y", "a%b")),
        ("~/x/a", Address("file", str(Path.home() / "x"), "a")),
        ("/x/a@0123456789ab", Address("file", "/x", "a", "0123456789ab")),
    ],
)
def test_an_address(text, address):
    assert parse(text) == address
    assert parse(str(address)) == address
    assert parse(Path(str(address))) == address


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("s3://bucket", "names no model"),
        ("gs://", "BUCKET/NAME"),
        ("s3://bucket/../a", "BUCKET/NAME"),
        ("s3://bucket//a", "BUCKET/NAME"),
        ("s3://bucket/blobs", "the store's own"),
        ("https://host/a", "s3://, gs:// or file://"),
        ("file://x/a", "file://x/a: expected file:///FOLDER"),
        ("file:///x/../a", "file:///x/../a: expected file:///FOLDER/NAME"),
        ("file:///x/%2e%2e/a", "file:///FOLDER/NAME"),
    ],
)
def test_what_is_no_address(text, word):
    with pytest.raises(UserError, match=word):
        parse(text)


def test_a_folder_is_named_by_where_it_came_from(monkeypatch, tmp_path):
    monkeypatch.setenv("ONETUNE_STORE_CACHE", str(tmp_path))
    for text in ("s3://b/x/a@0123456789ab", "gs://b/a@0123456789ab", "file:///x%25/a@0123456789ab"):
        assert cache.address_of(cache.folder_of(parse(text))) == text
    for folder in ("models/a", tmp_path / "a", "/x"):
        assert cache.address_of(folder) == str(folder)


# ------------------------------------------------------------------------------------------------------ there and back


@pytest.mark.parametrize("kind", ["s3", "file", "folder"])
def test_there_and_back(s3, small, tmp_path, kind):
    to = {"s3": NAME, "file": f"file://{tmp_path}/shop/llama", "folder": str(tmp_path / "shop" / "llama")}[kind]
    address = push(small, to)
    folder = local(Path(to))
    assert contents(folder) == contents(small) and folder == local(Path(str(address)))
    assert cache.address_of(folder) == str(address) == str(parse(to).at(address.version))
    assert check_manifest(folder).keys() == contents(small).keys()
    assert pull(parse(to), tmp_path / "copy") == address
    assert contents(tmp_path / "copy") == contents(small)
    with open(
        tmp_path / "copy" / "config.json", "ab"
    ) as file:  # a copy may be changed, the cache's file is another one
        file.write(b"x")
    check_manifest(folder)
    assert push(folder, to) == address, "a folder that was pulled is the same version"
    assert verify(parse(to))[0] == address


@pytest.mark.parametrize(
    ("to", "says"),
    [
        ("small", "is, holds or lies in"),
        ("small/inner", "is, holds or lies in"),
        (".", "is, holds or lies in"),
        ("link", "is, holds or lies in"),
        ("other", "files of its own, such as config.json"),
        ("other/config.json", "Not a directory"),
    ],
)
def test_a_name_does_not_come_among_other_files(small, tmp_path, to, says):
    write_folder(tmp_path / "other", {"config.json": 10, "latest.json": 10})
    (tmp_path / "link").symlink_to(small)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=f"{says}.*: publish under a name that is not there yet"):
        push(small, tmp_path / to)
    assert contents(tmp_path) == before and published(tmp_path / to) is None


def test_what_a_killed_push_left_is_no_file_of_its_own(small, tmp_path):
    write_folder(tmp_path / "shop" / "llama", {"versions/0123456789ab.json": 3, "latest.json.7-7.tmp": 3})
    push(small, tmp_path / "shop" / "llama")
    assert contents(local(tmp_path / "shop" / "llama")) == contents(small)


def test_a_folder_with_a_space_and_a_percent_sign(small, tmp_path):
    place = tmp_path / "fl ow" / "100%25"
    code, out, err = command("--push", small, "--to", place.as_uri())
    assert code == 0 and contents(local(out.split("published ")[1].strip())) == contents(small), err
    assert published(place), "as_uri writes %20 and %25"
    code, out, err = command("--list", place)
    assert code == 0 and local(out.split("  ")[0]) == local(place), err
    code, out, err = command("--list", place.parent)
    assert code == 0 and local(out.strip()) == local(place), err


def test_files_of_the_cache_are_links_and_read_only(s3, small):
    push(small)
    for path in fetch(parse(NAME)).rglob("*.*"):
        if path.is_file() and path.name != "manifest.json":
            assert path.stat().st_nlink == 2 and path.stat().st_mode & 0o222 == 0


def test_without_hard_links_files_are_copied(s3, small, monkeypatch):
    push(small)

    def refuse(*_):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    assert contents(fetch(parse(NAME))) == contents(small)


def test_a_name_can_be_published_again(s3, small):
    first = push(small)
    old = contents(small)
    (small / "config.json").write_text("{}")
    before = blobs(s3)
    second = push(small)
    assert len(blobs(s3) - before) == 1, "only the changed file is sent"
    assert contents(fetch(parse(NAME))) == contents(small) and contents(fetch(first)) == old
    shutil.rmtree(cache.root())
    assert contents(fetch(first)) == old and contents(fetch(second)) == contents(small)
    assert push(small, "s3://bucket/models/other").version == second.version
    assert len(blobs(s3) - before) == 1


def test_the_same_again_writes_nothing(s3, small):
    push(small)
    before = {path: s3.system.info(path)["LastModified"] for path in s3.objects()}
    time.sleep(1.1)  # the server's clock has seconds
    push(small)
    assert {path: s3.system.info(path)["LastModified"] for path in s3.objects()} == before


def test_a_version_in_the_cache_needs_no_server(s3, small, monkeypatch):
    address = push(small)
    fetch(parse(NAME))
    monkeypatch.setitem(store.remote.OPTIONS["s3"], "config_kwargs", {"retries": {"max_attempts": 0}})
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert contents(fetch(address)) == contents(small)
    with pytest.raises(UserError, match=f"127.0.0.1:1.*in the cache there is {address}"):
        fetch(parse(NAME))


def test_a_large_file_goes_in_parts(s3, large, monkeypatch):
    calls = []
    one = store.remote.Remote.read_part
    monkeypatch.setattr(store.remote.Remote, "read_part", lambda self, *args: calls.append(args) or one(self, *args))
    push(large)
    digest = hashlib.sha256((large / "model.safetensors").read_bytes()).hexdigest()
    assert s3.system.info(f"bucket/models/blobs/sha256/{digest}")["ETag"].strip('"').endswith("-3"), "three parts"
    assert contents(fetch(parse(NAME))) == contents(large)
    assert len(calls) == 3 + 1


def test_the_settings_of_a_script(s3, small, tmp_path):
    folder = tmp_path / "plain"
    folder.mkdir()
    push(small)
    path = Path(NAME)
    flags = {"checkpoint_dir": path, "adapter_dir": [folder, path], "adapters": {"a": path}, "source": None}
    settings = SimpleNamespace(**flags, data_dir=path)
    fetch_folders(settings)
    fetched = settings.checkpoint_dir
    assert contents(fetched) == contents(small)
    assert settings.adapter_dir == [folder, fetched] and settings.adapters == {"a": fetched}
    assert settings.source is None and settings.data_dir == path


def test_a_plain_folder_is_used_as_it_is(tmp_path):
    plain = write_folder(tmp_path / "model@0123456789ab", {"config.json": 5})
    assert local(plain) == plain and published(plain) is None
    assert local(f"file://{plain}") == plain and local(Path("nowhere/at/all")) == Path("nowhere/at/all")


# ------------------------------------------------------------------------------------------------- cut and spoilt


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("after", [1, PART // 2])
def test_a_connection_that_is_cut(s3, large, through, direction, after):
    fault = Fault(direction, after, 3, cut)
    if direction == "up":
        through.faults.append(fault)
        push(large)
    else:
        push(large)
        through.faults.append(fault)
    assert contents(fetch(parse(NAME))) == contents(large)
    assert fault.happened >= (3 if after == 1 or direction == "up" else 1)


def test_a_connection_that_is_always_cut(s3, large, through):
    push(large)
    through.faults.append(Fault("down", PART // 2, -1, cut))
    with pytest.raises(UserError, match=r"s3://bucket/models/blobs/sha256/\w{64}: "):
        fetch(parse(NAME))
    assert not list(cache.root().glob("folders/**/*.json"))
    through.faults.clear()
    assert contents(fetch(parse(NAME))) == contents(large)


def test_a_connection_that_stalls(s3, large, through, monkeypatch):
    monkeypatch.setitem(
        store.remote.OPTIONS["s3"], "config_kwargs", {"read_timeout": 1, "retries": {"max_attempts": 1}}
    )
    push(large)

    def stall(chunk):
        time.sleep(4)
        return

    fault = Fault("down", PART // 2, 2, stall)
    through.faults.append(fault)
    assert contents(fetch(parse(NAME))) == contents(large) and fault.happened == 2


def test_a_byte_that_is_flipped_on_the_way_down(s3, large, through):
    push(large)
    fault = Fault("down", PART // 2, 1, flip)
    through.faults.append(fault)
    assert contents(fetch(parse(NAME))) == contents(large) and fault.happened == 1


def test_bytes_that_are_always_flipped(s3, large, through):
    address = push(large)
    fault = Fault("down", PART // 2, -1, flip)
    through.faults.append(fault)
    with pytest.raises(UserError, match=rf"{address}: model.safetensors is damaged .*push the folder again"):
        fetch(parse(NAME))
    assert fault.happened >= 4, "it was fetched twice"
    assert not any(path.stat().st_size > PART for path in cache.root().rglob("*") if path.is_file())
    through.faults.clear()
    assert contents(fetch(parse(NAME))) == contents(large)


@pytest.mark.parametrize("how", ["changed", "cut", "gone"])
def test_a_blob_that_is_damaged_at_the_store(s3, small, how):
    address = push(small)
    path = parse(NAME).blob(hashlib.sha256((small / "model.safetensors").read_bytes()).hexdigest())
    content = s3.system.cat_file(path)
    if how == "gone":
        s3.system.rm_file(path)
    else:
        s3.system.pipe_file(path, content[:-1] if how == "cut" else flip(content))
    word = {"changed": "is damaged", "cut": "has 69999 bytes of 70000", "gone": "is missing"}[how]
    with pytest.raises(UserError, match=rf"{address}: model.safetensors {word}.*{path}"):
        fetch(parse(NAME))
    assert not list(cache.root().glob("folders/**/config.json")), "no part of it is there"
    with pytest.raises(UserError, match=rf"missing or damaged: model.safetensors \(s3://{path}\)"):
        verify(parse(NAME))
    if how != "gone":
        s3.system.rm_file(path)
    push(small)
    assert contents(fetch(parse(NAME))) == contents(small) and verify(parse(NAME))[0] == address


def test_a_blob_that_is_damaged_in_the_cache_is_fetched_again(s3, small):
    push(small)
    folder = fetch(parse(NAME))
    spoilt = folder / "model.safetensors"
    spoilt.chmod(0o644)
    spoilt.write_bytes(flip(spoilt.read_bytes()))
    with pytest.raises(UserError, match="model.safetensors has changed.*delete"):
        pull(parse(NAME), folder.parent / "copy")
    shutil.rmtree(folder)
    assert contents(fetch(parse(NAME))) == contents(small)


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("latest.json", b"{}", "does not say which version"),
        ("latest.json", b"\xff", "does not say which version"),
        ("versions/{}.json", b"{}", "has changed since it was written"),
    ],
)
def test_lists_that_are_damaged(s3, small, file, content, says):
    address = push(small)
    s3.system.pipe_file(f"bucket/models/llama/{file.format(address.version)}", content)
    with pytest.raises(UserError, match=says):
        fetch(parse(NAME))


@pytest.mark.parametrize("name", ["../../x", "/x", "a/../../b", ""])
def test_a_list_cannot_name_files_elsewhere(name):
    content = version.write({name: version.Entry("0" * 64, 1)})
    with pytest.raises(UserError, match="cannot be the name"):
        version.read(content, version.digits(content), "a list")


# --------------------------------------------------------------------------------------------------- several processes


def test_two_processes_publish_at_once(s3, tmp_path, start):
    sizes = {"config.json": 100, "model.safetensors": PART}
    folders = [write_folder(tmp_path / f"{i}", sizes, seed=i % 2) for i in range(4)]  # two pairs of the same
    for folder in folders:
        (folder / "shared.bin").write_bytes(b"x" * 100_000)
    processes = [start("--push", folder, "--to", NAME) for folder in folders]
    lines = [finish(process) for process in processes]
    assert all(code == 0 for code, _, _ in lines), lines
    addresses = [parse(out.split()[-1]) for _, out, _ in lines]
    assert addresses[0] == addresses[2] != addresses[1] == addresses[3]
    for address, folder in zip(addresses, folders, strict=True):
        assert contents(fetch(address)) == contents(folder)
        verify(address)
    assert local(NAME) in [fetch(address) for address in addresses]


def test_two_processes_fetch_at_once(s3, large, through, start):
    push(large)
    through.passed["down"] = 0
    processes = [start("--pull", NAME) for _ in range(3)]
    folders = {finish(process) for process in processes}
    assert len(folders) == 1 and folders.pop() == (0, f"{fetch(parse(NAME))}\n", "")
    assert contents(fetch(parse(NAME))) == contents(large)
    assert through.passed["down"] < 2 * PART * 2, "it came once"


def slow_up(direction, count, chunk):
    """A fault: a large upload takes its time."""
    if direction == "up" and count > PART // 2:
        time.sleep(0.02)
    return chunk


def test_a_push_that_is_killed(s3, large, through, start):
    through.faults.append(
        lambda direction, count, chunk: time.sleep(0.02 * (direction == "up" and count > PART)) or chunk
    )
    process = start("--push", large, "--to", NAME)
    wait_for(lambda: through.passed["up"] > PART)
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    with pytest.raises(UserError, match="there is no such model|holds files"):
        fetch(parse(NAME))
    through.faults.clear()
    push(large)
    assert contents(fetch(parse(NAME))) == contents(large)


def test_a_second_push_that_is_killed_leaves_the_first(s3, small, large, through, start):
    first = push(small)
    through.faults.append(
        lambda direction, count, chunk: time.sleep(0.02 * (direction == "up" and count > PART)) or chunk
    )
    process = start("--push", large, "--to", NAME)
    wait_for(lambda: through.passed["up"] > PART)
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    assert cache.address_of(fetch(parse(NAME))) == str(first)


def test_a_pull_that_is_killed_goes_on(s3, tmp_path, through, start):
    folder = write_folder(tmp_path / "four", {"a.bin": 30_000, "z.bin": 9 * PART})
    push(folder)
    slow = []
    through.faults.append(lambda direction, count, chunk: slow and time.sleep(0.004) or chunk)
    process = start("--pull", NAME)
    begun = cache.root() / "partial"
    wait_for(lambda: any(path.stat().st_size >= 4 * PART for path in begun.glob("*")))
    slow.append(True)
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    (partial,) = begun.glob("*")
    kept = partial.stat().st_size
    assert 4 * PART <= kept < 9 * PART and not list(cache.root().glob("folders/**/a.bin"))[1:]
    slow.clear()
    through.passed["down"] = 0
    assert contents(fetch(parse(NAME))) == contents(folder)
    assert through.passed["down"] < 9 * PART - kept + PART, "what was there is not fetched again"
    assert not list(begun.glob("*")) and not list(cache.root().rglob("*.tmp"))


# --------------------------------------------------------------------------------------------------------- the cache


@pytest.fixture
def three(s3, tmp_path):
    """Three models of 1 MB, published and fetched, the first one used last. Their addresses."""
    addresses = []
    for i in range(3):
        folder = write_folder(tmp_path / f"model{i}", {"model.safetensors": 10**6, "config.json": 10}, seed=i)
        addresses.append(push(folder, f"s3://bucket/models/m{i}"))
    return addresses


def fetch_elsewhere(start, address):
    """As a process that has ended."""
    code, out, err = finish(start("--pull", address))
    assert code == 0, err
    return Path(out.strip())


def test_the_cache_has_a_limit(three, start, monkeypatch):
    folders = [fetch_elsewhere(start, address) for address in three[:2]]
    os.utime(cache._lock_of(folders[0]), (0, 0))
    fetch_elsewhere(start, three[0])  # now it was used after the other
    monkeypatch.setenv("ONETUNE_STORE_LIMIT", "2.5MB")
    fetch(three[2])
    assert folders[0].is_dir() and not folders[1].exists()
    assert cache.size() <= 2.5 * 10**6


def test_what_is_in_use_stays(three, start, monkeypatch, tmp_path):
    mine = fetch(three[0])
    theirs = fetch_elsewhere(start, three[1])
    assert cache.trim(1) == [theirs] and mine.is_dir() and contents(mine)
    monkeypatch.setenv("ONETUNE_STORE_LIMIT", "1.5MB")
    with pytest.raises(UserError, match="in use.*raise ONETUNE_STORE_LIMIT"):
        fetch(three[1])
    assert mine.is_dir()


def test_trimming_from_the_command_line(three, start):
    folder = fetch(three[0])
    code, out, err = finish(start("--trim", "1MB"))
    assert code == 0 and str(three[0]) not in out, err
    fetch_elsewhere(start, three[1])
    code, out, err = finish(start("--trim", "1MB"))
    assert (code, err) == (0, "") and f"removed {three[1]}\n" in out and folder.is_dir()


def test_a_model_above_the_limit(s3, large, monkeypatch):
    push(large)
    monkeypatch.setenv("ONETUNE_STORE_LIMIT", "2MB")
    with pytest.raises(UserError, match=r"llama@\w{12} has 0.01 GB, the cache may have 0.00: raise"):
        fetch(parse(NAME))
    monkeypatch.setenv("ONETUNE_STORE_LIMIT", "much")
    with pytest.raises(UserError, match="ONETUNE_STORE_LIMIT=much: expected a size"):
        fetch(parse(NAME))


def test_too_little_room_on_the_disk(s3, large, monkeypatch):
    push(large)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=PART))
    with pytest.raises(UserError, match="GB are free in .*ONETUNE_STORE_CACHE"):
        fetch(parse(NAME))


def test_a_disk_that_fills_up(s3, large, start):
    """A limit on the size of files is what a process can be given without a disk of its own."""
    push(large)
    process = start("--pull", NAME)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (PART, PART))
    check_refusal(*finish(process), "partial/", "could not be written", "ONETUNE_STORE_CACHE")
    assert not list((cache.root() / "partial").glob("*"))


# --------------------------------------------------------------------------------------------------- what goes wrong


def test_a_folder_that_is_damaged_is_not_published(s3, tmp_path):
    with new_folder(tmp_path / "made") as folder:
        (folder / "a").write_text("x")
    push(tmp_path / "made")
    (tmp_path / "made" / "a").write_text("y")
    before = s3.objects()
    with pytest.raises(UserError, match="a has changed since it was written: make it again before"):
        push(tmp_path / "made")
    assert s3.objects() == before


def test_a_folder_that_changes_while_it_is_published(s3, small, monkeypatch):
    one = store.remote.Remote.upload

    def upload(self, file, path):
        one(self, file, path)
        (small / "config.json").write_text("changed")

    monkeypatch.setattr(store.remote.Remote, "upload", upload)
    with pytest.raises(UserError, match="config.json changed while|has 7 bytes of 200"):
        push(small)
    with pytest.raises(UserError, match="not published|no such model|holds files"):
        fetch(parse(NAME))


def test_what_cannot_be_published(tmp_path, small):
    (small / ".git").mkdir()
    (small / ".git" / "config").write_text("x")
    with pytest.raises(UserError, match="no files"):
        publish.files_in(tmp_path / "small" / ".git" / ".." / "original" / "..") and publish.files_in(empty(tmp_path))
    (small / "gone").symlink_to("nowhere")
    with pytest.raises(UserError, match="gone is neither a file nor a folder"):
        publish.files_in(small)
    with pytest.raises(UserError, match="does not exist"):
        publish.files_in(tmp_path / "nowhere")


def empty(tmp_path):
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


def test_hidden_files_are_named(small, capsys):
    (small / ".cache").mkdir()
    (small / ".cache" / "x").write_text("x")
    assert publish.files_in(small).keys() == {"config.json", "model.safetensors", "original/params.json"}
    assert capsys.readouterr().out == f"left out of {small}: .cache\n"


def test_mistakes_are_one_line(s3, small):
    push(small)
    s3.system.pipe_file("bucket/raw/config.json", b"{}")
    refused("--pull", "s3://bucket/models/lama", says=["s3://bucket/models/lama: there is no such model", "--list"])
    refused("--pull", NAME + "@0123456789ab", says=["@0123456789ab: there is no such version", f"--list {NAME}"])
    refused("--pull", "s3://bucket/raw", says=["was not published", "--push FOLDER --to s3://bucket/raw"])
    refused("--pull", "s3://nobucket/a", says=["s3://nobucket/a", "there is no such bucket"])
    refused("--push", small, "--to", "s3://nobucket/a", says=["there is no such bucket"])
    refused("--list", "s3://nobucket", says=["there is no such bucket"])
    refused("--list", "s3://bucket/nothing", says=["nothing is there"])
    refused("--pull", NAME, "--out_dir", small, says=[str(small), "exists"])


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:1", "nonsense"])
def test_an_endpoint_that_is_not_there(s3, small, monkeypatch, endpoint):
    monkeypatch.setitem(store.remote.OPTIONS["s3"], "config_kwargs", {"retries": {"max_attempts": 0}})
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    refused("--pull", NAME, says=[NAME, endpoint])
    refused("--push", small, "--to", NAME, says=[NAME, endpoint])


def test_no_credentials(s3, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    forget_connections()
    refused("--pull", NAME, says=[NAME, "no credentials were found", "AWS_PROFILE"])


def test_no_permission(s3, small, moto):
    push(small)

    def calls_without_permission(number):
        """Of moto: from the call after so many on, each one needs a permission, and this user has none."""
        url, header = f"http://127.0.0.1:{moto}/moto-api/reset-auth", {"Content-Type": "text/plain"}
        with urlopen(Request(url, str(number).encode(), header)) as reply:
            assert reply.status == 200

    calls_without_permission(0)
    try:
        refused("--pull", NAME, says=["s3://bucket/models/llama/latest.json: no permission"])
        refused("--push", small, "--to", NAME, says=["no permission"])
    finally:
        calls_without_permission("Infinity")


def test_a_store_in_a_folder_that_cannot_be_written(small, tmp_path):
    (tmp_path / "file").write_text("x")
    refused("--push", small, "--to", tmp_path / "file" / "name", says=["file/name"])
    (tmp_path / "blobs").write_text("x")
    refused("--push", small, "--to", tmp_path / "name", says=[str(tmp_path / "blobs")])


def test_listing(s3, small):
    first = push(small)
    (small / "config.json").write_text("{}")
    second = push(small)
    s3.system.pipe_file("bucket/models/readme.txt", b"x")
    s3.system.pipe_file("bucket/models/deeper/x/latest.json", b"x")
    code, out, err = command("--list", "s3://bucket/models")
    assert (code, err) == (0, "")
    assert out == f"s3://bucket/models/deeper/\n{NAME}\nand 1 files that are in no store, such as readme.txt\n"
    code, out, err = command("--list", NAME)
    assert code == 0 and {line.split()[0] for line in out.splitlines()} == {str(first), str(second)}
    (newest,) = [line for line in out.splitlines() if line.endswith("the latest")]
    assert newest.startswith(f"{second}  2") and "3 files" in newest


def test_what_others_publish_is_seen_at_once(s3, small, start):
    push(small)
    assert command("--list", "s3://bucket/models")[1] == f"{NAME}\n"
    assert finish(start("--push", small, "--to", "s3://bucket/models/new"))[0] == 0
    assert command("--list", "s3://bucket/models")[1] == f"{NAME}\ns3://bucket/models/new\n"


def test_a_library_that_is_not_installed(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match="s3://: s3fs is not installed: .*requirements-store.txt"):
        push(small)


def test_the_plain_path_does_not_import_the_libraries(start, tmp_path):
    code = (
        "import sys; from store.fetch import local; from store import publish, cache; local('docs'); "
        "print([name for name in ('fsspec', 's3fs', 'gcsfs', 'botocore', 'tqdm') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_a_place():
    assert parse_place("s3://bucket") == ("s3", "bucket") and parse_place("x") == ("file", os.path.abspath("x"))
    assert json.loads(version.pointer("0" * 12))["version"] == "0" * 12
