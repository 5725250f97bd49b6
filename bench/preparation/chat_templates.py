"""Speed of rendering and tokenising conversations with a checkpoint's chat template, in one process.

    python bench/preparation/chat_templates.py --data gsm8k_train.jsonl --checkpoint_dir checkpoints/MODEL

A conversation is made of several samples of the data, taken at random, as its turns. Printed, and added to --out_file
as JSON lines: MB/s of their contents, for the style `checkpoint` and for `chatml`, which has no template to run. The
process that runs the template works while this one waits for it, so both count, as on one core.
"""

import functools
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # the project's folder in place of this one, wherever it is started from
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.measuring import Measurement, alternate, describe, print_table, summarize
from shell import cli
from shell.cli import UserError


@dataclass(kw_only=True)
class Settings(Measurement):
    """The command line.

    Args:
        data: Samples of one question and one answer, in any form that prepare_data.py knows.
        template: A Jinja file in place of the checkpoint's own chat template.
        conversations: How many are made.
        turns: Questions and answers of each.
        runs: Of each style; their median counts.
    """

    data: Path
    template: Path | None = None
    conversations: int = 20_000
    turns: int = 4
    runs: int = 3
    out_file: Path = Path("out/bench/chat_templates.jsonl")

    def __post_init__(self):
        cli.check_numbers(self, "conversations", "turns", "runs", above=0)
        cli.check_files(self, "data", "template")


if __name__ == "__main__":
    settings = cli.parse(Settings)

from eval.exact_match import first_samples
from text.prompts import encode_dialog
from text.tokenizer import Tokenizer

COLUMNS = {
    "style": "{style}", "runs": "{runs}", "MB": "{megabytes:.1f}", "MB/s": "{rate:.2f}", "from": "{spread[0]:.2f}",
    "to": "{spread[1]:.2f}", "sequences": "{sequences}",
}  # fmt: skip


def main(s: Settings) -> None:
    """Measure both styles and print their table."""
    tokenizer = Tokenizer(s.checkpoint_dir)
    if s.template:
        tokenizer.chat_template = s.template.read_text(encoding="utf-8")
    if not tokenizer.chat_template:
        raise UserError(f"{s.checkpoint_dir} has no chat template: give one with --template")
    conversations, call = make_conversations(s), describe(s)
    styles = [{"style": "checkpoint"}, {"style": "chatml"}]
    lines = alternate(styles, s.runs, functools.partial(measure, tokenizer, conversations), s, call)
    print_table(COLUMNS, summarize(list(lines), ("style",), ("rate", "megabytes", "sequences")))


def make_conversations(s: Settings) -> list[list[dict]]:
    """The messages of each conversation."""
    samples, chosen = first_samples(s.data, None), random.Random(0)
    return [
        [message for sample in chosen.choices(samples, k=s.turns) for message in sample.dialog.messages]
        for _ in range(s.conversations)
    ]


def measure(tokenizer: Tokenizer, conversations: list[list[dict]], style: str) -> dict:
    """One run over all conversations."""
    size = sum(len(message["content"].encode()) for messages in conversations for message in messages)
    started, notes, sequences = time.perf_counter(), Counter(), 0
    for messages in conversations:
        sequences += len(encode_dialog(tokenizer, messages, style, notes=notes))
    seconds = time.perf_counter() - started
    notes = {what: number for what, number in notes.items() if number}
    return {"seconds": seconds, "megabytes": size / 1e6, "rate": size / 1e6 / seconds, "sequences": sequences, **notes}


if __name__ == "__main__":
    cli.run(main, settings)
