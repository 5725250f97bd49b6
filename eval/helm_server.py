"""A server for HELM, with the API of the LLM Efficiency Challenge, and for OpenAI's clients.

    python eval/helm_server.py --adapter_dir out/RUN/final

The challenge's paths: POST /process, /tokenize, /decode (challenge_api.py). OpenAI's: POST /v1/completions and
/v1/chat/completions, GET /v1/models (openai_api.py). GET /health and /metrics (Prometheus). Requests are answered
together as they come (serving.py).
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if __name__ == "__main__":  # the project's folder in place of this one, wherever it is started from
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from shell import cli
from shell.cli import UserError


@dataclass
class Settings:
    """The command line.

    Args:
        checkpoint_dir: Model folder; the one that the adapter was trained on if not given.
        adapter_dir: Adapter to put over it.
        quantize: Keep the weights in bnb.nf4, bnb.nf4-dq, bnb.fp4, bnb.fp4-dq or bnb.int8; "none" for not at all. With
            an adapter as in its training if not given.
        precision: Dtype of the other weights and of the computation.
        prompt_style: How the messages of a chat are rendered, if not as in training. Other prompts stay as they are.
        host: Address to listen on; 0.0.0.0 for all of the machine's.
        port: Port to listen on, 0 for any that is free.
        max_batch_size: Answers that are generated at one time.
        max_queue: Answers that may wait for it; a request beyond that gets status 429.
        max_body_bytes: Size of a request at most.
        api_key: Token that every request but /health must carry ("Authorization: Bearer TOKEN").
        api_key_env: Environment variable that holds this token, which other users of the machine cannot read there.
        grace_seconds: After SIGTERM, how long requests in progress may take to end.
    """

    checkpoint_dir: Path | None = None
    adapter_dir: Path | None = None
    quantize: str | None = None
    precision: Literal["32-true", "bf16-true", "16-true"] = "bf16-true"
    prompt_style: str | None = None
    host: str = "127.0.0.1"
    port: int = 8080
    max_batch_size: int = 16
    max_queue: int = 256
    max_body_bytes: int = 2**20
    api_key: str | None = None
    api_key_env: str | None = None
    grace_seconds: int = 60

    def __post_init__(self):
        cli.check_model(self)
        cli.check_numbers(self, "port", least=0, below=2**16)
        cli.check_numbers(self, "max_batch_size", "max_queue", "max_body_bytes", "grace_seconds", above=0)
        if self.api_key is not None and self.api_key_env is not None:
            raise UserError("--api_key and --api_key_env exclude each other")
        if self.api_key_env is not None and not os.environ.get(self.api_key_env):
            raise UserError(f"--api_key_env {self.api_key_env}: no such environment variable, or it is empty")
        if self.api_key == "":
            raise UserError("--api_key: an empty token protects nothing; leave it out for none")


if __name__ == "__main__":
    settings = cli.parse(Settings)

import asyncio
import contextlib
import hmac
import json
import signal
import socket
import time

import prometheus_client
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException as AnyHTTPException

from eval import openai_api
from eval.challenge_api import DecodeRequest, ProcessRequest, TokenizeRequest, process_answer
from eval.openai_api import ChatRequest, CompletionRequest, Stream
from generate import Writer
from inference.serving import Engine, Full, check_ids, encode_text, make_tasks
from text.prompts import encode_prompt


def main(s):
    sock = bind(s.host, s.port)
    service = Service(s)
    sock.listen(1024)
    host = f"[{s.host}]" if ":" in s.host else s.host
    print(f"serving {service.name} on http://{host}:{sock.getsockname()[1]}", flush=True)
    config = uvicorn.Config(
        make_app(service), log_level="warning", lifespan="off", timeout_graceful_shutdown=s.grace_seconds
    )
    Server(config).run(sockets=[sock])
    service.engine.close()


def bind(host, port):
    """A socket at this address, which does not listen yet: the port is known to be free before a model is loaded."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror or error}") from None
    return sock


class Server(uvicorn.Server):
    """uvicorn, which ends what is in progress at a signal. It would then raise the signal again instead of exiting."""

    @contextlib.contextmanager
    def capture_signals(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle_exit)
        yield


# --------------------------------------------------------------------------------------------------------- the service


class Service:
    """What the paths do."""

    def __init__(self, s):
        self.writer = Writer(s.checkpoint_dir, s.adapter_dir, s.quantize, s.precision, s.prompt_style)
        self.tokenizer = self.writer.tokenizer
        self.name, self.started = str(s.adapter_dir or s.checkpoint_dir), int(time.time())
        self.engine = Engine(self.writer.decoder, s.max_batch_size, s.max_queue)
        self.metrics = Metrics(self.engine)
        self.max_body_bytes, key = s.max_body_bytes, s.api_key or os.environ.get(s.api_key_env or "")
        self.api_key = key and f"Bearer {key}".encode()

    async def process(self, body: ProcessRequest, request: Request):
        started = time.perf_counter()
        ids, added = await run_in_threadpool(encode_text, self.tokenizer, body.prompt)
        self.check_number(body.n)
        tasks = make_tasks(self.writer, ids, body, body.n, body.top_k_per_token, echo=body.echo)
        await self.finish(tasks, request)
        answer = process_answer(self.tokenizer, body, tasks, added)
        return answer | {"request_time": time.perf_counter() - started}

    def tokenize(self, body: TokenizeRequest):
        """With BOS, where the model's texts begin with it: as many tokens as a prompt takes of the context."""
        started = time.perf_counter()
        ids, _ = encode_text(self.tokenizer, body.text)
        ids = ids[: body.max_length] if body.truncation else ids
        return {"tokens": ids, "request_time": time.perf_counter() - started}

    def decode(self, body: DecodeRequest):
        """Special tokens such as BOS are left out."""
        started = time.perf_counter()
        check_ids(self.writer, body.tokens)
        text = self.tokenizer.decode(body.tokens)
        return {"text": text, "request_time": time.perf_counter() - started}

    async def completions(self, body: CompletionRequest, request: Request):
        self.check_model(body.model)
        prompts = await run_in_threadpool(self.encode_prompts, body.prompts())
        self.check_number(len(prompts) * body.n)
        tasks = []
        for ids, _ in prompts:
            tasks += make_tasks(self.writer, ids, body, body.n, body.logprobs, body.echo)
        added = [number for _, number in prompts]
        return await self.answer(openai_api.Completions(self.name, body, self.tokenizer, tasks, added), body, request)

    async def chat(self, body: ChatRequest, request: Request):
        self.check_model(body.model)
        ids = await run_in_threadpool(encode_prompt, self.tokenizer, body.dialog(), self.writer.style)
        self.check_number(body.n)
        tasks = make_tasks(self.writer, ids, body, body.n, body.top, start=True)
        return await self.answer(openai_api.Chat(self.name, body, self.tokenizer, tasks), body, request)

    def models(self):
        model = {"id": self.name, "object": "model", "created": self.started, "owned_by": "onetune"}
        return {"object": "list", "data": [model]}

    def health(self):
        if not self.engine.alive:
            raise HTTPException(503, "the model's thread has ended")
        return {"status": "ok"}

    def show_metrics(self):
        text = prometheus_client.generate_latest(self.metrics.registry)
        return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    # ------------------------------------------------------------------------------------------- from asked to answered

    def encode_prompts(self, prompts):
        """(ids, how many of them were added) of texts and lists of ids."""
        for one in prompts:
            if not isinstance(one, str):
                check_ids(self.writer, one)
        return [encode_text(self.tokenizer, one) if isinstance(one, str) else (one, 0) for one in prompts]

    def check_model(self, name):
        if name not in (None, self.name):
            raise HTTPException(404, f"the model {name!r} is not served here, only {self.name!r} is")

    def check_number(self, n):
        if n > self.engine.max_queue:
            raise HTTPException(400, f"{n} answers are asked for, at most {self.engine.max_queue} are made at a time")

    def submit(self, tasks, report):
        """Queue tasks; returns an asyncio.Queue of what `report(task)`, called after each token, returns but None."""
        loop, reports = asyncio.get_running_loop(), asyncio.Queue()

        def tell(task):  # in the model's thread
            result = report(task)
            if result is not None:
                with contextlib.suppress(RuntimeError):  # the server has just been stopped
                    loop.call_soon_threadsafe(reports.put_nowait, result)

        for task in tasks:
            task.tell = tell
        try:
            self.engine.submit(tasks)
        except Full:
            raise HTTPException(429, "too many requests: come again in a moment", {"Retry-After": "1"}) from None
        self.metrics.tokens_in.inc(sum(len(task.prompt) for task in tasks))
        return reports

    def release(self, tasks):
        self.engine.cancel(tasks)
        self.metrics.tokens_out.inc(sum(task.reply.length for task in tasks))

    async def finish(self, tasks, request):
        """Wait until all tasks have ended. If the client hangs up before, they are given up."""
        reports = self.submit(tasks, lambda task: task if task.ended else None)
        gone = asyncio.ensure_future(hang_up(request))
        try:
            for _ in tasks:
                report = asyncio.ensure_future(reports.get())
                await asyncio.wait({report, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not report.done():
                    report.cancel()
                    raise HTTPException(499, "the client hung up")
                if report.result().error:
                    raise HTTPException(500, report.result().error)
        finally:
            gone.cancel()
            self.release(tasks)

    async def answer(self, answer, body, request):
        """OpenAI's answer, whole or as a stream."""
        tasks = answer.tasks
        if not body.stream:
            await self.finish(tasks, request)
            return answer.whole()
        streams = {task: Stream(self.tokenizer, task, i) for i, task in enumerate(tasks)}
        reports = self.submit(tasks, lambda task: streams[task].news())
        return EventStream(self.events(answer, reports), lambda: self.release(tasks))

    async def events(self, answer, reports):
        """Server-sent events: a JSON object each, and [DONE]."""
        for chunk in answer.first():
            yield event(chunk)
        left = len(answer.tasks)
        while left:
            news = await reports.get()
            if news.error:
                yield event(openai_api.error(500, news.error))
                return
            yield event(answer.chunk(news))
            left -= news.reason is not None
        for chunk in answer.last():
            yield event(chunk)
        yield "data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """A stream that releases its tasks at the end, also when the client hangs up, be it before the first event."""

    def __init__(self, events, release):
        super().__init__(events, media_type="text/event-stream")
        self.release = release

    async def __call__(self, scope, receive, send):
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.release()


def event(value):
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


async def hang_up(request):
    while (await request.receive())["type"] != "http.disconnect":
        pass


# ----------------------------------------------------------------------------------------------------- around all paths


class Metrics:
    """What /metrics shows."""

    def __init__(self, engine):
        self.registry = registry = prometheus_client.CollectorRegistry()
        new = {"namespace": "onetune", "registry": registry}
        self.requests = prometheus_client.Counter("requests", "Requests.", ["path", "status"], **new)
        self.seconds = prometheus_client.Histogram("request_seconds", "From request to answer.", ["path"], **new)
        self.tokens_in = prometheus_client.Counter("prompt_tokens", "Tokens of prompts.", **new)
        self.tokens_out = prometheus_client.Counter("generated_tokens", "Tokens generated.", **new)
        queue = prometheus_client.Gauge("queue_length", "Answers that wait.", **new)
        queue.set_function(lambda: len(engine.waiting))
        batch = prometheus_client.Gauge("batch_size", "Answers that are being generated.", **new)
        batch.set_function(lambda: engine.running)


class Gate:
    """ASGI middleware: asks for the token, limits the size of bodies (chunked ones, too), and counts requests."""

    def __init__(self, app, service, paths):
        self.app, self.service, self.paths = app, service, paths

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, path, status = time.perf_counter(), scope["path"], 499

        async def noting_send(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refusal = self.refusal(scope)
            await (refusal or self.app)(scope, self.limited(receive), noting_send)
        finally:
            label = path if path in self.paths else "other"
            self.service.metrics.requests.labels(label, status).inc()
            self.service.metrics.seconds.labels(label).observe(time.perf_counter() - started)

    def refusal(self, scope):
        """The response to a request that is not looked at, or None."""
        headers, key = dict(scope["headers"]), self.service.api_key
        if key and scope["path"] != "/health" and not hmac.compare_digest(headers.get(b"authorization", b""), key):
            return error(scope["path"], 401, "the token is missing or wrong (Authorization: Bearer TOKEN)")
        if int(headers.get(b"content-length", 0)) > self.service.max_body_bytes:
            return error(scope["path"], 413, self.too_large())
        return None

    def limited(self, receive):
        size = 0

        async def counting_receive():
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.service.max_body_bytes:
                raise HTTPException(413, self.too_large())
            return message

        return counting_receive

    def too_large(self):
        return f"the request is larger than {self.service.max_body_bytes} bytes"


def make_app(service):
    app = FastAPI(title="onetune")
    gets = {
        "/v1/models": service.models, "/health": service.health, "/metrics": service.show_metrics,
    }  # fmt: skip
    posts = {
        "/process": service.process, "/tokenize": service.tokenize, "/decode": service.decode,
        "/v1/completions": service.completions, "/v1/chat/completions": service.chat,
    }  # fmt: skip
    for method, paths in (("GET", gets), ("POST", posts)):
        for path, function in paths.items():
            app.add_api_route(path, function, methods=[method], response_model=None)
    app.add_middleware(Gate, service=service, paths={*gets, *posts})
    app.add_exception_handler(UserError, lambda request, e: error(request.url.path, 400, str(e)))
    app.add_exception_handler(
        AnyHTTPException, lambda request, e: error(request.url.path, e.status_code, e.detail, headers=e.headers)
    )
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, lambda request, e: error(request.url.path, 500, f"a mistake here: {e!r}"))
    return app


def invalid(request, mistake):
    """The response to a body that is not as it should be: the first thing that is wrong."""
    first, path = mistake.errors()[0], request.url.path
    where = ".".join(str(part) for part in first["loc"][1:])  # a field of any name may be the client's
    where = where.encode("ascii", "backslashreplace").decode()[:100]
    message = f"{where}: {first['msg']}" if where else f"the body must be application/json, an object: {first['msg']}"
    return error(path, 400 if path.startswith("/v1/") else 422, message, where or None)


def error(path, status, message, where=None, headers=None):
    """One JSON object that says why: in OpenAI's shape below /v1."""
    body = openai_api.error(status, message, where) if path.startswith("/v1/") else {"detail": message}
    return JSONResponse(body, status, headers)


if __name__ == "__main__":
    cli.run(main, settings)
