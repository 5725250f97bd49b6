"""What every HTTP request passes before it reaches a path of helm_server.py: time, token, size; and it is counted.

uvicorn limits how long an idle connection is kept, but not how long a request may take to arrive. `TimedProtocol` does.
"""

import hmac
import time
from asyncio import BaseTransport
from typing import Any

import h11
from fastapi import HTTPException
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from eval import openai_api
from eval.server_metrics import Metrics

# The paths, each with the method of helm_server.py's `Service` that answers it.
GETS = {
    "/v1/models": "models", "/v1/models/{name:path}": "model", "/health": "health", "/metrics": "show_metrics",
}  # fmt: skip
POSTS = {
    "/process": "process", "/tokenize": "tokenize", "/decode": "decode", "/v1/completions": "completions",
    "/v1/chat/completions": "chat",
}  # fmt: skip


def error(
    path: str, status: int, message: str, where: str | None = None, headers: dict[str, str] | None = None
) -> JSONResponse:
    """One JSON object with the reason, in OpenAI's form for the paths below /v1."""
    body = openai_api.error(status, message, where) if path.startswith("/v1/") else {"detail": message}
    return JSONResponse(body, status, headers)


class Gate:
    """ASGI middleware: checks the token, limits the size of bodies (chunked ones, too), and counts requests.

    api_key: the value of the header Authorization that every request but /health must have; None for any. paths: those
    that the metrics count by name.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: set[str], max_body_bytes: int, api_key: bytes | None):
        self.app, self.metrics, self.paths = app, metrics, paths
        self.max_body_bytes, self.api_key = max_body_bytes, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or let the app answer it."""
        started, path, status = time.perf_counter(), scope["path"], 499

        async def noting_send(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refusal = self._refusal(scope)
            await (refusal or self.app)(scope, self._limited(receive), noting_send)
        finally:
            label = path if path in self.paths else "other"
            self.metrics.requests.labels(label, status).inc()
            self.metrics.seconds.labels(label).observe(time.perf_counter() - started)

    def _refusal(self, scope):
        """The response to a request that the app does not see, or None."""
        headers, key, path = dict(scope["headers"]), self.api_key, scope["path"]
        if key and path != "/health" and not hmac.compare_digest(headers.get(b"authorization", b""), key):
            return error(path, 401, "the token is missing or wrong (Authorization: Bearer TOKEN)")
        if int(headers.get(b"content-length", 0)) > self.max_body_bytes:
            return error(path, 413, self._too_large())
        return None

    def _limited(self, receive):
        size = 0

        async def counting_receive():
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.max_body_bytes:
                raise HTTPException(413, self._too_large())
            return message

        return counting_receive

    def _too_large(self):
        return f"the request is larger than {self.max_body_bytes} bytes"


class TimedProtocol(H11Protocol):
    """HTTP/1.1 with a limit on the time from the first byte of a request to its last.

    A request that takes longer, and a new connection on which none begins, gets status 408 (RFC 9110, 15.5.9) and is
    closed. How long the answer takes is not limited. A connection that is idle after an answer is closed by uvicorn.
    """

    def __init__(self, *args: Any, request_seconds: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.request_seconds = request_seconds
        self._timer = None

    def connection_made(self, transport: BaseTransport) -> None:
        """Start the clock for the first request."""
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._stop_timer()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Process what has arrived, then start the clock if a request has begun, or stop it if it is complete."""
        super().handle_events()
        in_header = self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]
        if in_header or self.conn.their_state is h11.SEND_BODY:
            self._start_timer()
        else:
            self._stop_timer()

    def _start_timer(self):
        if self._timer is None:
            self._timer = self.loop.call_later(self.request_seconds, self._too_slow)

    def _stop_timer(self):
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None

    def _too_slow(self):
        in_body = self.conn.their_state is h11.SEND_BODY
        if not self.transport.is_closing() and not (in_body and self.cycle.response_started):
            path = self.cycle.scope["path"] if in_body else "/"
            answer = error(path, 408, f"the request did not arrive within {self.request_seconds:g} s")
            headers = [*answer.raw_headers, (b"connection", b"close")]
            events = (h11.Response(status_code=408, headers=headers, reason=STATUS_PHRASES[408]), h11.Data(answer.body))
            for event in (*events, h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
            if in_body:
                self.cycle.disconnected = True  # the app waits for the body: it is told that the client has left
        self.transport.close()
