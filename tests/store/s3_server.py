"""A real S3 server in a process of its own, and a proxy before it that cuts, stalls and spoils what passes."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace
from urllib.request import urlopen

import pytest
from conftest import ROOT, free_port, wait_for

import store.fetch
import store.remote

BUCKET = "bucket"
PART = 5 * 2**20  # S3's smallest


def answers(port):
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False


@pytest.fixture(scope="session")
def moto():
    """The port of an S3 server (moto's) that runs as long as the session."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: answers(port))
        yield port
    finally:
        process.terminate()
        process.wait(10)


class Proxy:
    """Passes TCP on to a server. What it does to the bytes of a direction, "up" or "down", can be set at any time.

    faults: functions of (direction, bytes so far in this connection, chunk) that return the chunk to pass on, or None
    to cut the connection. passed: bytes by direction. A fault may sleep, to stall.
    """

    def __init__(self, target):
        self.target, self.faults, self.passed = target, [], {"up": 0, "down": 0}
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.sockets = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return  # closed
            try:
                server = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                client.close()
                continue
            self.sockets += [client, server]
            for source, sink, direction in ((client, server, "up"), (server, client, "down")):
                threading.Thread(target=self._pump, args=(source, sink, direction), daemon=True).start()

    def _pump(self, source, sink, direction):
        count = 0
        try:
            while chunk := source.recv(2**16):
                count += len(chunk)
                for fault in list(self.faults):
                    chunk = fault(direction, count, chunk)
                    if chunk is None:
                        return
                sink.sendall(chunk)
                self.passed[direction] += len(chunk)
        except OSError:
            pass
        finally:
            for each in (source, sink):
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def close(self):
        self.listener.close()
        for each in self.sockets:
            each.close()


class Fault:
    """Happens so many times, each in the first chunk after so many bytes of a connection in one direction."""

    def __init__(self, direction, after, times, action):
        self.direction, self.after, self.left, self.action = direction, after, times, action
        self.lock, self.happened = threading.Lock(), 0

    def __call__(self, direction, count, chunk):
        if direction != self.direction or count < self.after:
            return chunk
        with self.lock:
            if not self.left:
                return chunk
            self.left -= 1
            self.happened += 1
        return self.action(chunk)


def cut(chunk):
    return None


def flip(chunk):
    """One bit in the middle of a chunk: of the content, where the chunk is large."""
    middle = len(chunk) // 2
    return chunk[:middle] + bytes([chunk[middle] ^ 1]) + chunk[middle + 1 :]


@pytest.fixture
def proxy(moto):
    proxy = Proxy(moto)
    yield proxy
    proxy.close()


@pytest.fixture
def environment(tmp_path, moto):
    """The variables of a user of the server, with a cache of the test's own."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{moto}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "ONETUNE_STORE_CACHE": str(tmp_path / "cache"),
    }


def forget_connections():
    """After the environment has changed: fsspec has one file system for all calls with the same options."""
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()


@pytest.fixture
def s3(moto, environment, monkeypatch):
    """An empty bucket at a server, for this process: put the variables into the environment, and wait for nobody."""
    with urlopen(f"http://127.0.0.1:{moto}/moto-api/reset", data=b"") as reply:
        assert reply.status == 200
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    forget_connections()
    monkeypatch.setattr(store.remote, "FIRST_WAIT", 0.01)
    for module in (store.remote, store.fetch):
        monkeypatch.setattr(module, "PART_BYTES", PART)
    system = store.remote.Remote("s3").system
    system.mkdir(BUCKET)

    def objects():
        return {path: entry["size"] for path, entry in system.find(BUCKET, detail=True).items()}

    return SimpleNamespace(system=system, objects=objects)


@pytest.fixture
def through(proxy, monkeypatch, environment):
    """The proxy, with this process and its children's `environment` sent through it."""
    environment["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{proxy.port}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", environment["AWS_ENDPOINT_URL"])
    forget_connections()
    return proxy


@pytest.fixture
def start(environment):
    """`start("--pull", address)`: store/models.py in a process of its own, with small parts. The Popen."""
    processes = []

    def begin(*args, script="store/models.py", **more):
        code = (
            f"import sys, runpy; sys.path.insert(0, {str(ROOT)!r}); import store.remote as r; r.PART_BYTES = {PART}; "
            f"r.FIRST_WAIT = 0.05; sys.argv = {[str(ROOT / script), *map(str, args)]!r}; "
            f"runpy.run_path(sys.argv[0], run_name='__main__')"
        )
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", code], env={**os.environ, **environment, **more}, cwd=ROOT, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
        )  # fmt: skip
        return processes[-1]

    yield begin
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()
