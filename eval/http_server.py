"""uvicorn as helm_server.py and front.py run it, and answers that are streams of events."""

import asyncio
import contextlib
import json
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Any

import uvicorn
from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from eval.http_gate import TimedProtocol
from shell.cli import UserError

BACKLOG = 1024  # connections that may wait to be accepted


def bind(host: str, port: int) -> socket.socket:
    """A socket at this address, which does not listen yet. So a port in use is found before the model is loaded.

    Raises UserError if the address cannot be used.
    """
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror or error}") from None
    return sock


def open_to_clients(sock: socket.socket, names: list[str], host: str) -> None:
    """Listen, and say on standard output where which models are served."""
    sock.listen(BACKLOG)
    host = f"[{host}]" if ":" in host else host
    print(f"serving {', '.join(names)} on http://{host}:{sock.getsockname()[1]}", flush=True)


def make_config(app: ASGIApp, s: Any) -> uvicorn.Config:
    """How uvicorn is to run: HTTP/1.1 with `TimedProtocol`, no WebSockets (they would pass by the token).

    s: helm_server.py's `Settings`.
    """
    return uvicorn.Config(
        app, http=partial(TimedProtocol, request_seconds=s.request_seconds), ws="none", lifespan="off",
        log_level="warning", timeout_graceful_shutdown=s.grace_seconds,
    )  # fmt: skip


class Server(uvicorn.Server):
    """uvicorn, which lets requests in progress end after a signal, and then exits. It would raise the signal again."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Let SIGTERM and SIGINT begin the end."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle_exit)
        yield


class EventStream(StreamingResponse):
    """A stream of events that calls `release` at its end, also if the client closes the connection before the first."""

    def __init__(self, events: AsyncIterator[str | bytes], release: Callable[[], None]):
        super().__init__(events, media_type="text/event-stream")
        self.release = release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.release()


def event(value: dict) -> str:
    """A JSON object as a server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


async def until_gone(request: Request, work: asyncio.Future) -> bool:
    """Wait for some work of a request; False if the client closes the connection before, and the work is cancelled."""
    gone = asyncio.ensure_future(disconnected(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        return work.done()
    finally:
        gone.cancel()
        work.cancel()


async def disconnected(request: Request) -> None:
    """Wait until the client closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
