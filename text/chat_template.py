"""A checkpoint's chat template is a foreign program: it runs in a sandbox, in a process of its own, with limits.

Jinja's sandbox keeps a template from Python's internals, but not from endless work: nested loops, recursion or repeated
text can take all time or memory, some of them in one call that nothing can interrupt. So this file is also a script: it
reads requests on standard input, limits its own time and memory for each, and writes the rendered texts to standard
output. One process serves a whole run, and compiles a template once; where a template breaks a limit, the process ends,
and the next request starts another.
"""

import atexit
import contextlib
import ctypes
import datetime
import functools
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from typing import Any, NamedTuple

# The date that `strftime_now` gives. It is fixed: otherwise the same data would be other tokens tomorrow, and prompts
# would have another date than in training. Llama 3's templates fall back to this date too.
DAY = datetime.datetime(2024, 7, 26)
SECONDS, MEMORY, LONGEST = 2, 2**29, 2**20  # of CPU time; bytes of address space; characters beyond the request's own
PATIENCE = 60  # seconds of wall-clock time, on a busy machine
OPENS, CLOSES = "\ufdd0", "\ufdd1"  # around what a template marks as generated; no character of any text


class Render(NamedTuple):
    """What a template is to render: the first `count` messages, one more perhaps, and perhaps what begins an answer."""

    count: int
    generate: bool = False
    one_more: dict | None = None


class Rendered(NamedTuple):
    """What a template wrote. generated: the spans (start, end) of the text that it marks by {% generation %}."""

    text: str
    generated: list[tuple[int, int]]


def render(
    source: str, messages: list[dict], wanted: list[Render], special_tokens: dict[str, str], /, **values: Any
) -> tuple[list[Rendered], None] | tuple[None, str]:
    """Parts of a conversation rendered with a chat template: (a `Rendered` for each wanted, None), or (None, why not).

    source: of the template. messages: as transformers gives them to a template. special_tokens: names such as
    "bos_token", with their texts. values: more variables, such as `tools`.
    """
    request = {"messages": messages, "wanted": wanted, "values": {**values, **special_tokens}}
    results, problem = _process().ask(source, request)
    return (None, problem) if problem else ([_cut_marks(text) for text in results], None)


def _cut_marks(text):
    """A `Rendered` of a text with `OPENS` and `CLOSES` in it."""
    if OPENS not in text:
        return Rendered(text, [])
    pieces, spans, starts, length = re.split(f"([{OPENS}{CLOSES}])", text), [], [], 0
    for i, piece in enumerate(pieces):
        if i % 2 == 0:
            length += len(piece)
        elif piece == OPENS:
            starts.append(length)
        elif starts and (start := starts.pop()) < length and not starts:  # of nested marks the outer ones
            spans.append((start, length))
    return Rendered("".join(pieces[::2]), spans)


# ---------------------------------------------------------------------------------------------- the side of the caller


_C = ctypes.CDLL(None) if sys.platform == "linux" else None


class TemplateProcess:
    """The process that runs templates, started with the first request. One request is answered at a time."""

    def __init__(self):
        self._process, self._known, self._lock, self._core = None, set(), threading.Lock(), None

    def ask(self, source: str, request: dict) -> tuple[list[str], None] | tuple[None, str]:
        """The texts for a request, or what went wrong in one line."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._known = set()
                self._process = subprocess.Popen(
                    [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
                )
                atexit.register(self._end, self._process)
                self._core = None
            self._share_core()
            key = hash(source)
            request = {"key": key, "source": None if key in self._known else source, **request}
            answer, problem = self._exchange(json.dumps(request).encode())
            texts, problem, spent = answer or (None, problem, True)
            if spent:
                self._end(self._process)
            elif not problem:
                self._known.add(key)
            return texts, problem

    def _share_core(self):
        """Let the process run on the caller's core. One of the two waits while the other works.

        To wake a process on another core takes longer than to render: 0.6 MB/s of conversations instead of 1.2.
        """
        with contextlib.suppress(AttributeError, OSError):  # on other systems than Linux
            core = _C.sched_getcpu()
            if core != self._core and core >= 0:
                os.sched_setaffinity(self._process.pid, {core})
                self._core = core

    def _exchange(self, data):
        """(the parsed answer, None), or (None, what went wrong)."""
        process, deadline, received = self._process, time.monotonic() + PATIENCE, []
        readable = select.poll()
        readable.register(process.stdout, select.POLLIN)
        try:
            process.stdin.write(data + b"\n")
            process.stdin.flush()
            while not (received and received[-1].endswith(b"\n")):
                if not readable.poll(1000 * max(0, deadline - time.monotonic())):
                    return None, f"it took more than {PATIENCE} s"
                received.append(os.read(process.stdout.fileno(), 2**20))
                if not received[-1]:
                    return None, self._why_ended()
        except BrokenPipeError:
            return None, self._why_ended()
        return json.loads(b"".join(received)), None

    def _why_ended(self):
        status = self._process.wait()
        if status in (-signal.SIGXCPU, -signal.SIGKILL):
            return f"it took more than {SECONDS} s of computing, or all memory"
        return f"its process ended with status {status}, perhaps for want of memory"

    @staticmethod
    def _end(process):
        with process:  # which closes its pipes
            process.kill()


def _process():
    return _process_of(os.getpid())  # a forked process must not share its parent's


@functools.cache
def _process_of(pid):
    return TemplateProcess()


# ----------------------------------------------------------------------------------------------- the side of templates


def run_limited() -> None:
    """Answer each request on standard input, a line of JSON, with another: [texts, what went wrong, out of memory?]."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller, whose end also ends this
    templates = {}
    for line in sys.stdin.buffer:
        limit = round(time.process_time()) + SECONDS  # the system counts whole seconds of all that the process has used
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        try:
            answer = [run(json.loads(line), templates, LONGEST + 4 * len(line)), None, False]
        except MemoryError:
            answer = [None, f"it needs more than {MEMORY / 2**20:.0f} MiB", True]
        except Exception as error:  # a template is a program: it can fail in any way
            answer = [None, " ".join(str(error).split())[:500] or type(error).__name__, False]
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def run(request: dict, templates: dict, longest: int) -> list[str]:
    """The texts for a request. templates: those compiled before, by key. Raises whatever a template raises."""
    if request["source"] is not None:
        templates[request["key"]] = environment().from_string(request["source"])
    template, texts = templates[request["key"]], []
    for count, generate, one_more in request["wanted"]:
        messages = request["messages"][:count] + ([one_more] if one_more else [])
        values = {"tools": None, "documents": None, **request["values"], "add_generation_prompt": generate}
        texts.append(template.render(messages=messages, **values))
        longest -= len(texts[-1])
        if longest < 0:
            raise ValueError(f"it writes {len(texts[-1]):,} characters")
    return texts


@functools.cache
def environment() -> Any:
    """Jinja's sandbox, with what transformers offers a template."""
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %} … {% endgeneration %}: the text between them is the model's."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            """The block as a call of `mark` with its content."""
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

        def mark(self, caller: Any) -> str:
            """The content with a mark at both ends."""
            return OPENS + caller() + CLOSES

    class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
        """Jinja's, but that it looks for `message.role` among a dict's items first: that is what messages are."""

        def getattr(self, value: Any, name: str) -> Any:
            """What Jinja's returns, which would try the dict's own attributes before."""
            if type(value) is dict and name in value and not hasattr(dict, name):
                return value[name]
            return super().getattr(value, name)

    def refuse(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation])
    sandbox.filters["tojson"] = tojson
    sandbox.globals["raise_exception"] = refuse
    sandbox.globals["strftime_now"] = DAY.strftime
    return sandbox


if __name__ == "__main__":
    run_limited()
