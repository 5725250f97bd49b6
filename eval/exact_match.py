"""Exact match: the share of prompts whose greedy answer is the expected one, character for character.

python eval/exact_match.py --checkpoint_dir checkpoints/ORG/MODEL --adapter_dir out/RUN/final --data test.jsonl
"""

import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # the project's folder in place of this one, wherever it is started from
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval.exact_match_settings import Settings
from shell import cli
from shell.cli import UserError

if __name__ == "__main__":
    settings = cli.parse(Settings)

import generate
from inference.writer import Writer
from preparation.mixture import Source, find_sources
from preparation.reading import BadRow, read_rows
from preparation.records import to_record
from shell import files
from store.fetch import fetch_folders
from text.messages import Dialog
from tracking.results import record_result


class Sample(NamedTuple):
    """A dialog that ends with an answer, and what comes before it. place: where it was read, for error messages."""

    place: str
    dialog: Dialog

    @property
    def prompt(self) -> Dialog:
        """The dialog without its last answer."""
        return self.dialog._replace(messages=self.dialog.messages[:-1])

    @property
    def answer(self) -> str:
        """The text of its last answer."""
        return self.dialog.messages[-1]["content"]


def main(s: Settings) -> None:
    """Answer the questions, print the share of exact matches, and write the answers to --out_file."""
    fetch_folders(s)
    samples = first_samples(s.data, s.limit)
    writer = Writer(s.checkpoint_dir, s.adapter_dir, s.quantize, s.precision, s.prompt_style)
    started = time.perf_counter()
    answers, right = match_answers(writer, samples, s)
    seconds = time.perf_counter() - started
    share = sum(right) / len(right)
    print(f"exact match {sum(right)}/{len(right)} = {share:.1%} in {seconds:.0f} s")
    if s.out_file:
        rows = []
        for sample, answer, ok in zip(samples, answers, right, strict=True):
            question = sample.prompt.messages[-1]["content"]
            rows.append({"prompt": question, "answer": answer, "expected": sample.answer, "right": ok})
        result = {"exact_match": share, "samples": len(right), "seconds": seconds, "answers": rows}
        s.out_file.parent.mkdir(parents=True, exist_ok=True)
        with files.whole_file(s.out_file) as temporary:
            temporary.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    data = s.data.stem if s.limit is None else f"{s.data.stem} first {s.limit}"
    record_result(s.adapter_dir or s.checkpoint_dir, "exact_match", data, {"exact_match": share}, vars(s))


def match_answers(writer: Writer, samples: list[Sample], s: Settings) -> tuple[list[str], list[bool]]:
    """The greedy answers to samples, and for each whether it is the expected one (but for spaces at both ends).

    s: has checkpoint_dir, adapter_dir, max_new_tokens and batch_size, like the settings above.
    """
    greedy = generate.Settings(
        checkpoint_dir=s.checkpoint_dir,
        adapter_dir=s.adapter_dir,
        max_new_tokens=s.max_new_tokens,
        batch_size=s.batch_size,
        temperature=0,
    )
    prompts, places = [sample.prompt for sample in samples], [sample.place for sample in samples]
    answers = writer.answer_all(prompts, greedy, places)
    expected = [sample.answer for sample in samples]
    return answers, [answer.strip() == text.strip() for answer, text in zip(answers, expected, strict=True)]


def first_samples(data: Path, limit: int | None) -> list[Sample]:
    """The first samples of a file or mixture; all of them without a limit."""
    return list(itertools.islice(read_samples(find_sources([str(data)])), limit))


def read_samples(sources: list[Source]) -> Iterator[Sample]:
    """Yield each sample of some sources. Raises UserError for one that does not end with a question and its answer."""
    for source in sources:
        for row in read_rows(source, progress=lambda share: None):
            try:
                record = to_record(source, row, seed=0)
            except BadRow as error:
                raise UserError(f"{row.place}: {error}") from None
            if "rejected" in record:
                raise UserError(f"{row.place}: a preference pair has no one right answer")
            *before, last = record["messages"]
            if not before or before[-1]["role"] == "system" or "tool_calls" in last:
                raise UserError(f"{row.place}: the messages must end with a question and an answer in words")
            tools, args = record.get("tools", []), record.get("template_args", {})
            yield Sample(row.place, Dialog(record["messages"], tools, args))


if __name__ == "__main__":
    cli.run(main, settings)
