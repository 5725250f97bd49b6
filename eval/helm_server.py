"""A server for HELM, with the API of the LLM Efficiency Challenge, and for OpenAI's clients.

    python eval/helm_server.py --adapter_dir out/RUN/final
    python eval/helm_server.py --adapters poet=out/poet/final,cook=out/cook/final

The challenge's paths: POST /process, /tokenize, /decode (challenge_api.py). OpenAI's: POST /v1/completions and
/v1/chat/completions, GET /v1/models and /v1/models/ID (openai_api.py). GET /health, /metrics (Prometheus) and
/openapi.json, which describes them all. Requests are answered together as they come (inference/serving.py). With a
token set, every path but /health asks for it; size and time of a request are limited (http_gate.py). With --engines
there are several processes that do this, behind another one that passes requests on to them (front.py).

There is no page at /docs: FastAPI's loads its scripts from a foreign host.
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
        adapters: Several adapters over one base, NAME=FOLDER with commas between them. A request names one as its
            model, or base, or an ensemble such as ensemble:NAME+NAME; the first answers where it names none.
        quantize: Keep the weights in this format, or each layer in the one that a plan's file says; "none" for 16 or 32
            bits. With an adapter as in its training if not given.
        precision: Dtype of the other weights and of the computation.
        prompt_style: How the messages of a chat are rendered, if not as in training. Other prompts stay as they are.
        host: Address to listen on; 0.0.0.0 for all of the machine's.
        port: Port to listen on, 0 for any that is free.
        engines: Processes with a model each, behind one port. Each has a GPU of its own; on a CPU they share its cores.
        max_batch_size: Answers that are generated at one time, by each engine.
        max_queue: Answers that may wait for that, of all engines together; a request beyond it gets status 429.
        prefix_cache: Memory for what prompts begin with, such as a benchmark's examples, so that it is not read again:
            a size such as 2GB or 800MB for each engine, where its model is; "none" for none.
        max_body_bytes: Size of a request's body at most; a larger one gets status 413.
        request_seconds: Time in which a request must arrive, header and body; a slower one gets status 408.
        api_key: Token that every request but /health must have ("Authorization: Bearer TOKEN").
        api_key_env: Environment variable with this token; other users of the machine cannot read it there.
        grace_seconds: Time that requests in progress have to end after SIGTERM.
    """

    checkpoint_dir: Path | None = None
    adapter_dir: Path | None = None
    adapters: list[str] | str | None = None
    quantize: Literal[*cli.table_keys("quantize.py", "QUANTIZERS"), "none"] | cli.JsonFile | None = None
    precision: Literal["32-true", "bf16-true", "16-true"] = "bf16-true"
    prompt_style: str | None = None
    host: str = "127.0.0.1"
    port: int = 8080
    engines: int = 1
    max_batch_size: int = 16
    max_queue: int = 256
    prefix_cache: str = "1GB"
    max_body_bytes: int = 2**20
    request_seconds: float = 60
    api_key: str | None = None
    api_key_env: str | None = None
    grace_seconds: int = 60

    def __post_init__(self):
        cli.check_model(self)
        self.adapters = cli.named_folders(self.adapters, "adapters") or None
        cli.check_numbers(self, "port", least=0, below=2**16)
        above_zero = ("engines", "max_batch_size", "max_queue", "max_body_bytes", "request_seconds", "grace_seconds")
        cli.check_numbers(self, *above_zero, above=0)
        self.prefix_bytes()
        if self.api_key is not None and self.api_key_env is not None:
            raise UserError("--api_key and --api_key_env exclude each other")
        if self.api_key_env is not None and not os.environ.get(self.api_key_env):
            raise UserError(f"--api_key_env {self.api_key_env}: no such environment variable, or it is empty")
        if self.api_key == "":
            raise UserError("--api_key: an empty token protects nothing; leave it out for none")

    def prefix_bytes(self) -> int:
        """The size of the prefix cache, 0 for none. Raises UserError if it is no size."""
        return 0 if self.prefix_cache == "none" else cli.number_of_bytes(self.prefix_cache, "prefix_cache")

    def bearer(self) -> bytes | None:
        """What the header Authorization of a request must be; None for anything."""
        key = self.api_key or os.environ.get(self.api_key_env or "")
        return f"Bearer {key}".encode() if key else None


if __name__ == "__main__":
    settings = cli.parse(Settings)

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Callable
from multiprocessing.connection import Connection
from typing import Any

import prometheus_client
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as AnyHTTPException

from eval import front, openai_api
from eval.challenge_api import DecodeRequest, ProcessRequest, TokenizeRequest, process_answer
from eval.engines import begin_in_process
from eval.http_gate import GETS, POSTS, Gate, error
from eval.http_server import BACKLOG, EventStream, Server, bind, event, make_config, open_to_clients, until_gone
from eval.openai_api import Answer, ChatRequest, CompletionRequest, Stream
from eval.server_metrics import EngineMetrics
from inference.serving import Engine, QueueFull, Task, check_ids, encode_text, make_tasks
from inference.writer import Voice, Writer
from store.cache import address_of
from store.fetch import fetch_folders


def main(s: Settings) -> None:
    """Load the model and answer requests until a signal; or let engines do it."""
    fetch_folders(s)
    sock = bind(s.host, s.port)
    if s.engines > 1:
        front.serve(sock, s, run_engine)
        return
    service = Service(s)
    open_to_clients(sock, service.names, s.host)
    answer_until_signal(service, sock, s)


def run_engine(s: Settings, ready: Connection) -> None:
    """One of several engines, in a process of its own: as `main`, at a port of this machine that `ready` is told.

    It is told of a mistake of the user, too, which the front then says.
    """
    begin_in_process()
    try:
        sock, service = bind("127.0.0.1", 0), Service(s)
    except (UserError, OSError) as mistake:
        ready.send(mistake)
        return
    sock.listen(BACKLOG)
    ready.send((sock.getsockname()[1], service.names))
    answer_until_signal(service, sock, s)


def answer_until_signal(service: "Service", sock: socket.socket, s: Settings) -> None:
    """Answer requests at a socket that listens."""
    Server(make_config(make_app(service), s)).run(sockets=[sock])
    service.engine.close()


# --------------------------------------------------------------------------------------------------------- the service


class Service:
    """What the paths do: a method each. Loads the model."""

    def __init__(self, s: Settings):
        model = s.checkpoint_dir, s.adapter_dir, s.quantize, s.precision, s.prompt_style
        self.writer = Writer(*model, adapters=s.adapters)
        self.tokenizer = self.writer.tokenizer
        self.names = list(self.writer.named) or [address_of(s.adapter_dir or s.checkpoint_dir)]
        self.name, self.started = self.names[0], int(time.time())  # name: of what answers where a request names none
        self.engine = Engine(self.writer.decoder, s.max_batch_size, s.max_queue, s.prefix_bytes())
        self.metrics = EngineMetrics(self.engine)
        self.max_body_bytes, self.api_key = s.max_body_bytes, s.bearer()

    async def process(self, body: ProcessRequest, request: Request) -> dict:
        """POST /process: continue a prompt."""
        started = time.perf_counter()
        ids, added = await run_in_threadpool(encode_text, self.tokenizer, body.prompt)
        voices = self.voices(body.adapter)
        self.check_number(body.n)
        tasks = make_tasks(self.writer, ids, body, body.n, body.top_k_per_token, echo=body.echo, voices=voices)
        await self.finish(tasks, request)
        answer = process_answer(self.tokenizer, body, tasks, added)
        return answer | {"request_time": time.perf_counter() - started}

    def tokenize(self, body: TokenizeRequest) -> dict:
        """POST /tokenize: ids, with BOS if the model's texts begin with it: what a prompt takes of the context."""
        started = time.perf_counter()
        ids, _ = encode_text(self.tokenizer, body.text)
        ids = ids[: body.max_length] if body.truncation else ids
        return {"tokens": ids, "request_time": time.perf_counter() - started}

    def decode(self, body: DecodeRequest) -> dict:
        """POST /decode: text, without special tokens such as BOS."""
        started = time.perf_counter()
        check_ids(self.writer, body.tokens)
        text = self.tokenizer.decode(body.tokens)
        return {"text": text, "request_time": time.perf_counter() - started}

    async def completions(self, body: CompletionRequest, request: Request) -> Any:
        """POST /v1/completions: continue one or several prompts."""
        voices = self.voices(body.model)
        prompts = await run_in_threadpool(self.encode_prompts, body.prompts())
        self.check_number(len(prompts) * body.n)
        tasks = []
        for ids, _ in prompts:
            tasks += make_tasks(self.writer, ids, body, body.n, body.logprobs, body.echo, voices=voices)
        added, name = [number for _, number in prompts], body.model or self.name
        return await self.answer(openai_api.Completions(name, body, self.tokenizer, tasks, added), body, request)

    async def chat(self, body: ChatRequest, request: Request) -> Any:
        """POST /v1/chat/completions: answer the messages of a chat, rendered as in training."""
        voices, dialog = self.voices(body.model), body.dialog
        ids = await run_in_threadpool(lambda: [voice.encode(dialog) for voice in voices])
        self.check_number(body.n)
        options = self.writer.reply_options(dialog)
        tasks = make_tasks(self.writer, ids, body, body.n, body.top, **options, voices=voices)
        name = body.model or self.name
        return await self.answer(openai_api.Chat(name, body, self.tokenizer, tasks), body, request)

    def models(self) -> dict:
        """GET /v1/models: the one that is served, or all adapters and the base."""
        return {"object": "list", "data": [self.model(name) for name in self.names]}

    def model(self, name: str) -> dict:
        """GET /v1/models/ID: one that is served."""
        self.voices(name)
        return {"id": name, "object": "model", "created": self.started, "owned_by": "onetune"}

    def health(self) -> dict:
        """GET /health: status 200 while the model's thread runs, else 503."""
        if not self.engine.alive:
            raise HTTPException(503, "the model's thread has ended")
        return {"status": "ok"}

    def show_metrics(self) -> Response:
        """GET /metrics: for Prometheus."""
        return Response(self.metrics.text(), media_type=prometheus_client.CONTENT_TYPE_LATEST)

    # ------------------------------------------------------------------------------------------- from request to answer

    def encode_prompts(self, prompts: list[str | list[int]]) -> list[tuple[list[int], int]]:
        """For each prompt, a text or ids: its ids, and how many of them were added before it (a BOS)."""
        for one in prompts:
            if not isinstance(one, str):
                check_ids(self.writer, one)
        return [encode_text(self.tokenizer, one) if isinstance(one, str) else (one, 0) for one in prompts]

    def voices(self, name: str | None) -> list[Voice]:
        """Who answers a request that names this model, or none. Raises HTTPException if it is not served."""
        if not self.writer.named and name == self.name:
            return self.writer.voices(None)
        try:
            voices = self.writer.voices(name)
        except UserError:
            served = f"only {self.name!r} is" if len(self.names) == 1 else f"{', '.join(self.names)} are"
            raise HTTPException(404, f"the model {name!r} is not served here, {served}") from None
        if len(voices) > self.engine.max_batch_size:
            most = self.engine.max_batch_size
            raise HTTPException(400, f"the ensemble has {len(voices)} adapters, at most {most} rows are in a batch")
        return voices

    def check_number(self, n: int) -> None:
        """Raise HTTPException if a request asks for more answers than the queue can ever take."""
        if n > self.engine.max_queue:
            raise HTTPException(400, f"{n} answers are asked for, at most {self.engine.max_queue} are made at a time")

    def submit(self, tasks: list[Task], report: Callable[[Task], Any]) -> asyncio.Queue:
        """Queue tasks for the model. Raises HTTPException if the queue is full.

        report: called by the model's thread after each token of a task. What it returns, unless None, is put into the
        asyncio.Queue that this returns.
        """
        loop, reports = asyncio.get_running_loop(), asyncio.Queue()

        def notify(task):  # in the model's thread
            result = report(task)
            if result is not None:
                with contextlib.suppress(RuntimeError):  # the server has just been stopped
                    loop.call_soon_threadsafe(reports.put_nowait, result)

        for task in tasks:
            task.notify = notify
        try:
            self.engine.submit(tasks)
        except QueueFull:
            raise HTTPException(429, "too many requests: try again in a moment", {"Retry-After": "1"}) from None
        self.metrics.tokens_in.inc(sum(len(task.prompt) for task in tasks))
        return reports

    def release(self, tasks: list[Task]) -> None:
        """Stop tasks that have not ended, and count the tokens of all."""
        self.engine.cancel(tasks)
        self.metrics.tokens_out.inc(sum(task.reply.length for task in tasks))

    async def finish(self, tasks: list[Task], request: Request) -> None:
        """Wait until all tasks have ended. If the client closes the connection before, they are stopped.

        Raises HTTPException then, and if the model failed.
        """
        reports = self.submit(tasks, lambda task: task if task.ended else None)
        ended = asyncio.ensure_future(all_ended(reports, len(tasks)))
        try:
            if not await until_gone(request, ended):
                raise HTTPException(499, "the client closed the connection")
            if ended.result():
                raise HTTPException(500, ended.result())
        finally:
            self.release(tasks)

    async def answer(self, answer: Answer, body: CompletionRequest | ChatRequest, request: Request) -> Any:
        """OpenAI's answer, complete or as a stream."""
        tasks = answer.tasks
        if not body.stream:
            await self.finish(tasks, request)
            return answer.complete()
        streams = {task: Stream(answer, i) for i, task in enumerate(tasks)}
        reports = self.submit(tasks, lambda task: streams[task].next_delta())
        return EventStream(self.events(answer, reports), lambda: self.release(tasks))

    async def events(self, answer: Answer, reports: asyncio.Queue) -> AsyncIterator[str]:
        """Server-sent events: JSON objects, and [DONE] after the last."""
        for chunk in answer.first():
            yield event(chunk)
        left = len(answer.tasks)
        while left:
            delta = await reports.get()
            if delta.error:
                yield event(openai_api.error(500, delta.error))
                return
            yield event(answer.chunk(delta))
            left -= delta.reason is not None
        for chunk in answer.last():
            yield event(chunk)
        yield "data: [DONE]\n\n"


async def all_ended(reports: asyncio.Queue, number: int) -> str | None:
    """Wait until so many tasks have been reported; why the model failed, as soon as one says so."""
    for _ in range(number):
        task = await reports.get()
        if task.error:
            return task.error
    return None


# ----------------------------------------------------------------------------------------------------- paths and errors


def make_app(service: Service) -> FastAPI:
    """The ASGI app: a path for each method of the service, and a JSON object for each error."""
    app = FastAPI(title="onetune", docs_url=None, redoc_url=None)
    for method, paths in (("GET", GETS), ("POST", POSTS)):
        for path, name in paths.items():
            app.add_api_route(path, getattr(service, name), methods=[method], response_model=None)
    app.add_middleware(
        Gate, metrics=service.metrics, paths={*GETS, *POSTS}, max_body_bytes=service.max_body_bytes,
        api_key=service.api_key,
    )  # fmt: skip
    app.add_exception_handler(UserError, lambda request, e: error(request.url.path, 400, str(e)))
    app.add_exception_handler(
        AnyHTTPException, lambda request, e: error(request.url.path, e.status_code, e.detail, headers=e.headers)
    )
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(
        Exception, lambda request, e: error(request.url.path, 500, f"a fault in the server: {e!r}")
    )
    return app


def invalid(request: Request, mistake: RequestValidationError) -> JSONResponse:
    """The response to a body that is not valid: the first thing that is wrong."""
    first, path = mistake.errors()[0], request.url.path
    where = ".".join(map(str, first["loc"][1:])) or first.get("ctx", {}).get("field", "")
    where = where.encode("ascii", "backslashreplace").decode()[:100]  # the client chose the names: they may be anything
    message = f"{where}: {first['msg']}" if where else f"the body must be application/json, an object: {first['msg']}"
    message = first["msg"] if first["type"] == "mistake" else message  # openai_api.py's own words
    return error(path, 400 if path.startswith("/v1/") else 422, message, where or None)


if __name__ == "__main__":
    cli.run(main, settings)
