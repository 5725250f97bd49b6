"""A checkpoint's chat template is a foreign program: it runs in a sandbox, in a process of its own, with limits.

Jinja's sandbox keeps a template from Python's internals, but not from endless work: nested loops, recursion or repeated
text can take all time or memory, some of them in one call that nothing can interrupt. So this file is also a script: it
reads a template on standard input, limits its own time and memory, and writes the rendered text to standard output.
"""

import datetime
import functools
import json
import re
import signal
import subprocess
import sys

# The date that `strftime_now` gives. It is fixed: otherwise the same data would be other tokens tomorrow, and prompts
# would have another date than in training. Llama 3's templates fall back to this date too.
DAY = datetime.datetime(2024, 7, 26)
SECONDS, MEMORY, LONGEST = 2, 2**29, 2**20  # of CPU time; bytes of address space; characters of a rendered dialog
PATIENCE = 60  # seconds of wall-clock time, on a busy machine


@functools.lru_cache(maxsize=4096)
def render(source: str, turns: tuple, special_tokens: tuple) -> tuple[str, None] | tuple[None, str]:
    """A dialog rendered with a chat template: (text, None) or (None, what went wrong in one line).

    source: of the template. turns: a tuple of (role, content). special_tokens: a tuple of (name such as "bos_token",
    text). Cached, since samples seldom differ in their roles (their contents `prompts` puts in later): a process takes
    0.15 s, a look-up a microsecond.
    """
    messages = [{"role": role, "content": content} for role, content in turns]
    request = json.dumps({"source": source, "messages": messages, "special_tokens": dict(special_tokens)})
    try:
        done = subprocess.run([sys.executable, __file__], input=request.encode(), capture_output=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return None, f"it took more than {PATIENCE} s"
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return None, f"it took more than {SECONDS} s of computing, or all memory"
    if done.returncode:
        return None, f"its process ended with status {done.returncode}, perhaps for want of memory"
    return tuple(json.loads(done.stdout))


def run_limited() -> None:
    """Answer the request on standard input: [text, null] or [null, what went wrong] as JSON on standard output."""
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    request = json.load(sys.stdin.buffer)
    try:
        text, problem = run(**request), None
        if len(text) > LONGEST:
            text, problem = None, f"it writes {len(text):,} characters"
    except MemoryError:
        text, problem = None, f"it needs more than {MEMORY / 2**20:.0f} MiB"
    except Exception as error:  # a template is a program: it can fail in any way
        text, problem = None, " ".join(str(error).split())[:500] or type(error).__name__
    sys.stdout.write(json.dumps([text, problem]))


def run(source: str, messages: list[dict], special_tokens: dict[str, str]) -> str:
    """Run a Jinja template in a sandbox, with what transformers offers a template."""
    import jinja2.sandbox

    def refuse(message):
        raise jinja2.TemplateError(message)

    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    sandbox.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False, **options})
    sandbox.globals["raise_exception"] = refuse
    sandbox.globals["strftime_now"] = DAY.strftime
    # transformers' {% generation %} marks the answers, which are known here anyway.
    source = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1if true\2", source)
    source = re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endif\2", source)
    values = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": False}
    return sandbox.from_string(source).render(**values, **special_tokens)


if __name__ == "__main__":
    run_limited()
