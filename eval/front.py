"""Several engines behind one port: a process that takes requests, chooses an engine for each, and passes answers on.

What helm_server.py checks of every request (http_gate.py) is checked here, for all engines together, and so is how many
answers may wait. An engine that ends is started again. Its requests to which nothing has been said yet are asked once
more at another engine: that is the same as if they had come later. Without another engine they get status 503 with
Retry-After; a stream that has begun ends with an error event.
"""

import asyncio
import collections
import json
import socket
import sys
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any, NamedTuple

import aiohttp
import prometheus_client
from fastapi import HTTPException, Request, Response
from starlette.applications import Starlette
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.routing import Route
from yarl import URL

from eval import openai_api
from eval.engines import EngineProcess, StartFailed, environments, how, note
from eval.http_gate import GETS, POSTS, Gate, error
from eval.http_server import EventStream, Server, event, make_config, open_to_clients, until_gone
from eval.server_metrics import FrontMetrics
from shell.cli import UserError

PASSED_ON = ("content-type", "host")  # of a request's headers; the second is in the address of a redirection
PASSED_BACK = ("content-type", "retry-after", "allow", "location")  # of an answer's
STEP = 256  # characters: how finely prompts are compared
STEPS_KEPT = 2**16  # of each engine: prompts of 16 million characters
SECONDS_FOR_NEWS = 5  # that an engine has to say how it is
TRIES = 2  # engines that are asked, one after the other
ENDED = (aiohttp.ClientError, OSError)  # what is raised where an engine ends


def serve(sock: socket.socket, s: Any, run: Callable) -> None:
    """Start the engines, and answer requests until a signal. s: helm_server.py's `Settings`. run: see EngineProcess."""
    asyncio.run(_serve(sock, s, run))


async def _serve(sock, s, run):
    front = Front(s, run)
    try:
        await front.start()
        open_to_clients(sock, front.engines[0].names, s.host)
        await Server(make_config(front.app, s)).serve(sockets=[sock])
    finally:
        await front.close()


class Asked(NamedTuple):
    """What a front has to know of a request: how many answers it wants, and its prompt.

    steps: hashes of what it begins with, after every STEP characters.
    """

    answers: int
    steps: list[int]


class Front:
    """All engines, and the app that passes requests on to them."""

    def __init__(self, s: Any, run: Callable):
        parts = environments(s.engines)
        self.engines = [EngineProcess(number, run, s, part) for number, part in enumerate(parts)]
        self.metrics = FrontMetrics(s.engines)
        self.max_batch_size, self.max_queue = s.max_batch_size, s.max_queue
        self.held = [Held() for _ in self.engines]
        self.answers = [0] * s.engines  # that each engine was asked for, and has not given
        self.key, self.session, self._keepers = s.bearer(), None, []
        self.token = {"Authorization": self.key.decode()} if self.key else {}  # `Gate` has seen it in every request
        self.app = make_app(self, s.max_body_bytes)

    async def start(self) -> None:
        """Start the first engine, then the others: what is wrong is then said once.

        Raises what an engine says that it cannot start for. Exits if one has ended with a traceback.
        """
        self.session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=None), auto_decompress=False, skip_auto_headers=("Content-Type",),
            # A connection for each request: one that is kept may be closed by the engine just when it is used again.
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
        )  # fmt: skip
        first, *others = self.engines
        try:
            await first.start()
            await asyncio.gather(*(engine.start() for engine in others))
        except StartFailed as failure:
            if failure.status > 0:
                sys.exit(failure.status)
            raise UserError(f"--engines {len(self.engines)}: an engine {failure}") from None
        for engine in self.engines:
            self._begun(engine)
        self._keepers = [asyncio.create_task(self._keep(engine)) for engine in self.engines]

    async def close(self) -> None:
        """End all engines."""
        for keeper in self._keepers:
            keeper.cancel()
        for engine in self.engines:
            engine.kill()
        await self.session.close()

    def _begun(self, engine):
        self.metrics.up[engine.number].set(1)
        self.metrics.starts[engine.number].inc()

    async def _keep(self, engine):
        """Start an engine again whenever it ends."""
        while True:
            status = await engine.ended()
            self.metrics.up[engine.number].set(0)
            self.metrics.end(engine.number)
            self.held[engine.number] = Held()
            note(f"engine {engine.number}: {how(status)}; it is started again")
            await engine.start_again()
            self._begun(engine)

    # ------------------------------------------------------------------------------------------- a request's way

    async def forward(self, request: Request) -> Response:
        """Any path but those below: what an engine answers."""
        body = await request.body()
        asked = read(body) if request.method == "POST" else Asked(0, [])
        self.check_queue(asked)
        tried = set()
        while len(tried) < TRIES and (engine := self.choose(asked, tried)) is not None:
            tried.add(engine)
            try:
                return await self.ask(engine, asked, request, body)
            except ENDED:
                continue
        seconds = min(engine.retry_after for engine in self.engines)
        raise HTTPException(503, f"no engine is there: try again in {seconds} s", {"Retry-After": str(seconds)})

    def check_queue(self, asked: Asked) -> None:
        """Raise HTTPException if the answers would wait, and there is no room for them.

        An engine generates max_batch_size answers at a time; what it was asked for beyond them waits. What no queue
        can ever take is not refused here but by the engine, which says so.
        """
        waiting = sum(max(0, answers - self.max_batch_size) for answers in self.answers)
        if asked.answers and asked.answers <= self.max_queue < waiting + asked.answers:
            raise HTTPException(429, "too many requests: try again in a moment", {"Retry-After": "1"})

    def choose(self, asked: Asked, tried: set[EngineProcess]) -> EngineProcess | None:
        """The engine with the fewest answers to give; of several the one that has read most of the prompt before."""
        there = [engine for engine in self.engines if engine.up and engine not in tried]
        return min(there, key=lambda e: (self.answers[e.number], -self.held[e.number].of(asked.steps)), default=None)

    async def ask(self, engine: EngineProcess, asked: Asked, request: Request, body: bytes) -> Response:
        """What an engine answers to a request. Raises one of ENDED if it ends before anything was said."""
        self.held[engine.number].add(asked.steps)
        self._owe(engine, asked.answers)
        streams = False
        try:
            reply = asyncio.ensure_future(self._reply(engine, request, body))
            if not await until_gone(request, reply):
                raise HTTPException(499, "the client closed the connection")
            upstream, content = reply.result()
            streams = upstream.content_type == "text/event-stream"
            if streams:
                return EventStream(events(upstream, content), partial(self._release, engine, asked, upstream))
            headers = {name: upstream.headers[name] for name in PASSED_BACK if name in upstream.headers}
            return Response(content, upstream.status, headers)
        finally:
            if not streams:
                self._owe(engine, -asked.answers)

    async def _reply(self, engine, request, body):
        """The beginning of an engine's answer: (the response, its content); of a stream only what comes first."""
        path, query = (request.scope[name].decode("latin-1") for name in ("raw_path", "query_string"))
        url = URL(f"http://127.0.0.1:{engine.port}{path}" + (f"?{query}" if query else ""), encoded=True)
        headers = self.token | {name: request.headers[name] for name in PASSED_ON if name in request.headers}
        upstream = await self.session.request(request.method, url, data=body, headers=headers, allow_redirects=False)
        try:
            stream = upstream.content_type == "text/event-stream"
            return upstream, await (upstream.content.readany() if stream else upstream.read())
        except BaseException:
            upstream.close()
            raise

    def _release(self, engine, asked, upstream):
        upstream.close()
        self._owe(engine, -asked.answers)

    def _owe(self, engine, answers):
        self.answers[engine.number] += answers
        self.metrics.answers[engine.number].set(self.answers[engine.number])

    # ----------------------------------------------------------------------------------------- the paths of its own

    async def health(self, request: Request) -> Response:
        """GET /health: status 200 while an engine takes requests, else 503; and how each of them is."""
        states = await asyncio.gather(*(self._health_of(engine) for engine in self.engines))
        each = [{"engine": engine.number, "status": state} for engine, state in zip(self.engines, states, strict=True)]
        fine = "ok" in states
        said = {"status": "ok" if fine else "no engine is there", "engines": each}
        return Response(json.dumps(said), 200 if fine else 503, media_type="application/json")

    async def _health_of(self, engine):
        if not engine.up:
            return "starting"
        said = await self._news(engine, "/health")
        return json.loads(said)["status"] if said else "no answer"

    async def show_metrics(self, request: Request) -> Response:
        """GET /metrics: for Prometheus, of all engines."""
        there = [engine for engine in self.engines if engine.up]
        texts = await asyncio.gather(*(self._news(engine, "/metrics") for engine in there))
        for engine, text in zip(there, texts, strict=True):
            if text and engine.up:
                self.metrics.take(engine.number, text)
        return Response(self.metrics.text(), media_type=prometheus_client.CONTENT_TYPE_LATEST)

    async def _news(self, engine, path):
        """What an engine says of itself; None if it does not answer, or is not well."""
        limit = aiohttp.ClientTimeout(total=SECONDS_FOR_NEWS)
        try:
            url = f"http://127.0.0.1:{engine.port}{path}"
            async with self.session.get(url, headers=self.token, timeout=limit) as response:
                return await response.text() if response.status == 200 else None
        except (*ENDED, TimeoutError):
            return None


async def events(upstream: aiohttp.ClientResponse, first: bytes) -> AsyncIterator[bytes | str]:
    """The events of an engine's stream, each whole; if the engine ends before the stream does, an error event."""
    held = first
    try:
        while True:
            whole, mark, held = held.rpartition(b"\n\n")
            if mark:
                yield whole + mark
            more = await upstream.content.readany()
            if not more:
                return
            held += more
    except ENDED:
        yield event(openai_api.error(503, "the engine ended before the answer did: ask again"))


# ------------------------------------------------------------------------------------------------- what is in a request


class Held:
    """The beginnings of the prompts that an engine has been asked for: what it need not read again, as a rule."""

    def __init__(self):
        self.steps: collections.OrderedDict[int, None] = collections.OrderedDict()

    def of(self, steps: list[int]) -> int:
        """How many of a prompt's steps are among them."""
        return next((number for number, step in enumerate(steps) if step not in self.steps), len(steps))

    def add(self, steps: list[int]) -> None:
        """Add a prompt. Those that were asked for longest ago are forgotten."""
        for step in reversed(steps):
            self.steps[step] = None
            self.steps.move_to_end(step)
        while len(self.steps) > STEPS_KEPT:
            self.steps.popitem(last=False)


def read(body: bytes) -> Asked:
    """What there is to know of the body of a request. Whether it is right, the engine decides."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict) or not fields.keys() & {"prompt", "messages"}:
        return Asked(0, [])
    prompt = fields.get("messages", fields.get("prompt"))
    several = "messages" not in fields and isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    asked = [fields.get(name) for name in ("n", "num_samples", "num_return_sequences")]
    number = next((n for n in asked if type(n) is int and n > 0), 1)
    text = json.dumps([fields.get("model", fields.get("adapter")), prompt])
    steps, before = [], 0
    for start in range(0, len(text) - STEP + 1, STEP):
        before = hash((before, text[start : start + STEP]))
        steps.append(before)
    return Asked(number * (len(prompt) if several else 1), steps)


def make_app(front: Front, max_body_bytes: int) -> Starlette:
    """The ASGI app."""
    routes = [Route("/health", front.health), Route("/metrics", front.show_metrics)]
    app = Starlette(routes=routes)
    app.router.default = passing(front.forward)
    app.add_middleware(
        Gate, metrics=front.metrics, paths={*GETS, *POSTS}, max_body_bytes=max_body_bytes, api_key=front.key
    )
    app.add_exception_handler(
        AnyHTTPException, lambda request, e: error(request.url.path, e.status_code, e.detail, headers=e.headers)
    )
    app.add_exception_handler(
        Exception, lambda request, e: error(request.url.path, 500, f"a fault in the server: {e!r}")
    )
    return app


def passing(answer: Callable) -> Callable:
    """An ASGI app of a function from a request to its answer."""

    async def app(scope, receive, send):
        response = await answer(Request(scope, receive, send))
        await response(scope, receive, send)

    return app
