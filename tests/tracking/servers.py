"""Servers that the tests of trackers start: a real MLflow server, and one that takes requests and never answers."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import urllib.request

from conftest import free_port, wait_for


class MLflowServer:
    """`mlflow server` with SQLite and a folder of artifacts; it can be stopped and started again."""

    def __init__(self, folder):
        self.folder, self.port, self.process = folder, free_port(), None
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self):
        command = [
            sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db",
            "--artifacts-destination", str(self.folder / "artifacts"), "--port", str(self.port), "--workers", "1",
        ]  # fmt: skip
        with open(self.folder / "server.txt", "a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, start_new_session=True)
        wait_for(self.answers, 120)

    def answers(self):
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"{self.uri}/health", timeout=5).status == 200

    def stop(self):
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@contextlib.contextmanager
def silent_server():
    """The address of a server that takes every connection and says nothing."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen(100)
        yield f"http://127.0.0.1:{s.getsockname()[1]}"
