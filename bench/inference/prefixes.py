"""What it gains to keep the examples of few-shot prompts (inference/prefix_cache.py): an engine with it, and without.

    python bench/inference/prefixes.py --checkpoint_dir checkpoints/SmolLM2-135M-Instruct --data gsm8k.jsonl

The first --shots rows of the file are the examples that each prompt begins with; the rows after them are the questions,
which --clients ask at a time. The two engines answer the same questions in turn, over one model; each run begins with
an empty cache. The answers are the likeliest tokens: with --dtype fp32 they are equal, in bf16 up to rounding. Results
are added to --out_file as JSON lines.
"""

import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":  # the project's folder in place of this one, wherever it is started from
    sys.path[0] = str(ROOT)

from bench.inference.sides import Ids
from bench.measuring import Comparison, alternate, describe, machine_name, print_table, summarize
from shell import cli
from shell.cli import UserError


@dataclass(kw_only=True)
class Settings(Comparison):
    """The command line.

    Args:
        data: File of questions and answers, as eval/exact_match.py reads it.
        shots: Rows that are the examples.
        questions: Rows after them that are asked.
        clients: Questions that are asked at one time.
        new_tokens: Tokens of an answer, at most.
        prefix_cache: Size of the cache.
    """

    data: Path
    shots: int = 8
    questions: int = 32
    clients: int = 4
    new_tokens: int = 32
    prefix_cache: str = "1GB"
    out_file: Path = Path("out/bench/prefixes.jsonl")

    def __post_init__(self):
        cli.check_files(self, "data")
        cli.check_numbers(self, "runs", "shots", "questions", "clients", "new_tokens", above=0)
        cli.number_of_bytes(self.prefix_cache, "prefix_cache")


if __name__ == "__main__":
    settings = cli.parse(Settings)

WITH, WITHOUT = "with the cache", "without"
COLUMNS = {
    "engine": "{side}", "answers/s": "{answers_per_second:.2f}", "from": "{spread[0]:.2f}", "to": "{spread[1]:.2f}",
    "first token, s": "{first_token_seconds:.2f}", "tokens read": "{tokens_read:.0f}",
    "of prompts": "{prompt_tokens:.0f}",
}  # fmt: skip
MEDIANS = ("answers_per_second", "first_token_seconds", "tokens_read", "prompt_tokens")


def main(s: Settings) -> None:
    """Measure both in turn and print their table."""
    from inference.serving import encode_text
    from inference.writer import Writer

    prompts = few_shot_prompts(s)
    writer = Writer(s.checkpoint_dir, None, None, {"bf16": "bf16-true", "fp32": "32-true"}[s.dtype])
    prompts = [encode_text(writer.tokenizer, prompt)[0] for prompt in prompts]
    run_side(s, writer, prompts[: s.clients], WITHOUT)  # what is compiled or allocated at first does not count
    sides, call, answers, lines = [{"side": WITH}, {"side": WITHOUT}], describe(s), {}, []

    def measure(side):
        line, answers[side] = run_side(s, writer, prompts, side)
        return line

    for line in alternate(sides, s.runs, measure, s, call):
        lines.append(line)
        print(f"{line['side']}: {line['answers_per_second']:.2f} answers/s", flush=True)
    same = sum(map(list.__eq__, answers[WITH], answers[WITHOUT]))
    rows = summarize(lines, ("side",), MEDIANS)
    print(f"{s.shots} shots, {s.clients} clients; {machine_name(call['machine'])}")
    print_table(COLUMNS, rows)
    gain = rows[0]["answers_per_second"] / rows[1]["answers_per_second"]
    print(f"{gain:.2f} times the answers; {same} of {len(prompts)} are equal. Written to {s.out_file}")


def few_shot_prompts(s: Settings) -> list[str]:
    """Each question with the examples before it."""
    from eval.exact_match import first_samples

    samples = first_samples(s.data, s.shots + s.questions)
    if len(samples) <= s.shots:
        raise UserError(f"--data {s.data}: it has {len(samples)} rows, no question is left after --shots {s.shots}")
    pairs = [(sample.prompt.messages[-1]["content"], sample.answer) for sample in samples]
    examples = "".join(f"Q: {question}\nA: {answer}\n\n" for question, answer in pairs[: s.shots])
    return [f"{examples}Q: {question}\nA:" for question, _ in pairs[s.shots :]]


def run_side(s: Settings, writer: object, prompts: list[list[int]], side: str) -> tuple[dict, list[list[int]]]:
    """Let an engine answer all prompts: the fields of its line, and the answers."""
    from inference.serving import Engine

    size = cli.number_of_bytes(s.prefix_cache, "prefix_cache") if side == WITH else 0
    engine = Engine(writer.decoder, s.clients, len(prompts), size)
    try:
        clients = [Client(engine, prompts, s.new_tokens, number, s.clients) for number in range(s.clients)]
        started = time.perf_counter()
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        seconds = time.perf_counter() - started
    finally:
        engine.close()
    first = sorted(wait for client in clients for wait in client.first)
    read = sum(map(len, prompts))
    answers = {number: ids for client in clients for number, ids in client.answers.items()}
    return {
        "answers_per_second": len(prompts) / seconds,
        "first_token_seconds": first[len(first) // 2],
        "prompt_tokens": read,
        "tokens_read": read - (engine.prefixes.reused if engine.prefixes else 0),
        "hits": engine.prefixes.hits if engine.prefixes else 0,
    }, [answers[number] for number in range(len(prompts))]


class Client(threading.Thread):
    """Asks every `step`th prompt from number `first_number` on, each when the one before it has its answer."""

    def __init__(self, engine: object, prompts: list[list[int]], new_tokens: int, first_number: int, step: int):
        super().__init__()
        self.engine, self.prompts, self.numbers = engine, prompts, range(first_number, len(prompts), step)
        self.settings = SimpleNamespace(
            max_new_tokens=new_tokens, temperature=0, top_k=0, top_p=1, min_p=0, repetition_penalty=1,
            frequency_penalty=0, presence_penalty=0,
        )  # fmt: skip
        self.first: list[float] = []
        self.answers: dict[int, list[int]] = {}

    def run(self) -> None:
        """Ask them all."""
        from inference.serving import Task

        for number in self.numbers:
            reply, ended, started, times = Ids(), threading.Event(), time.perf_counter(), []

            def note(task, times=times, ended=ended):
                times.append(time.perf_counter())
                if task.ended:
                    ended.set()

            self.engine.submit([Task(self.prompts[number], reply, self.settings, 0, notify=note)])
            ended.wait()
            self.first.append(times[0] - started)
            self.answers[number] = reply.ids


if __name__ == "__main__":
    cli.run(main, settings)
