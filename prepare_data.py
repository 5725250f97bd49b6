"""Files in, tokens out: read samples, render them in a prompt style, tokenise, split, and report.

    python prepare_data.py --data my.jsonl --checkpoint_dir checkpoints/ORG/MODEL

Reads JSON (a list of objects), JSON Lines and CSV. A sample has `messages`, or a prompt and an answer under one of the
usual pairs of names (`FIELD_NAMES`) or under names given by flag. To add a format: a function and a line in `READERS`.
"""

import csv
import json
import random
import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import cli
from cli import UserError


@dataclass
class Settings:
    """The command line.

    Args:
        data: File or list of files, .json, .jsonl or .csv.
        checkpoint_dir: Model folder, for its tokenizer.
        out_dir: Folder to write; prepared/NAME for NAME.jsonl if not given.
        prompt_style: plain, alpaca, dolly, vicuna, llama2-chat, mistral-instruct, chatml or checkpoint (the model's own
            chat template); checkpoint where the model has a template, otherwise alpaca, if not given.
        max_seq_length: Tokens a sample may have. Of longer ones the prompt is cut from its start, never the answer.
        mask_prompt: Only the answers are targets.
        prompt_field: Name of the field with the prompt, if not one of the usual ones.
        input_field: Name of the field with the text that the prompt is about.
        answer_field: Name of the field with the answer.
        val_fraction: Share of the samples that is held back for validation.
        seed: Decides which.
    """

    data: list[Path] | Path
    checkpoint_dir: Path
    out_dir: Path | None = None
    prompt_style: str | None = None
    max_seq_length: int = 2048
    mask_prompt: bool = True
    prompt_field: str | None = None
    input_field: str | None = None
    answer_field: str | None = None
    val_fraction: float = 0.05
    seed: int = 1337

    def __post_init__(self):
        self.data = self.data if isinstance(self.data, list) else [self.data]
        if not self.data:
            raise UserError("--data is empty: name at least one file")
        self.out_dir = self.out_dir or Path("prepared", self.data[0].stem)
        if self.max_seq_length < 2:
            raise UserError(f"--max_seq_length {self.max_seq_length}: must be at least 2")
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"--val_fraction {self.val_fraction}: must be at least 0 and below 1")
        if (self.prompt_field is None) != (self.answer_field is None):
            raise UserError("--prompt_field and --answer_field go together: give both or none")
        for path in self.data:
            if not path.is_file():
                raise UserError(f"--data {path}: no such file")
            if path.suffix not in READERS:
                raise UserError(f"--data {path}: expected a file ending in {', '.join(READERS)}")


# -------------------------------------------------------------------------------------------------------- reading


def read_json_list(path):
    """Yield (place, object) for each object in a JSON file that holds a list of them."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a list of objects")
    for number, row in enumerate(rows, start=1):
        yield f"{path}, item {number}", row


def read_json_lines(path):
    """Yield (place, object) for each line of a JSON Lines file that is not blank."""
    with open(path, encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", json.loads(line)
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text: {error}") from None
        except ValueError as error:
            raise UserError(f"{path}:{number}: not valid JSON: {error}") from None


def read_csv(path):
    """Yield (place, row as a dict) for each row of a CSV file whose first row names the columns."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, strict=True)
        try:
            for row in rows:
                if None in row or None in row.values():
                    raise UserError(f"{path}:{rows.line_num}: not as many fields as the header has columns")
                yield f"{path}:{rows.line_num}", row
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}:{rows.line_num}: not valid CSV: {error}") from None


READERS = {".json": read_json_list, ".jsonl": read_json_lines, ".csv": read_csv}

# Names of prompt, text that it is about, and answer, tried in this order.
FIELD_NAMES = (("instruction", "input", "output"), ("prompt", None, "completion"), ("question", None, "answer"))


def to_messages(row, place, names):
    """The dialog in a row: `messages` as they are, or a prompt and an answer.

    names: (prompt, input, answer) as given by flag, or None to try the usual ones. Raises UserError naming `place`.
    """
    if not isinstance(row, dict):
        raise UserError(f"{place}: expected an object with fields")
    if names is None and "messages" in row:
        return row["messages"]
    prompt, extra, answer = names or next(
        (names for names in FIELD_NAMES if names[0] in row and names[2] in row), (None, None, None)
    )
    if prompt is None:
        raise UserError(
            f"{place}: no known fields among {', '.join(map(repr, row)) or 'none'}: "
            "name them with --prompt_field and --answer_field"
        )
    for name in filter(None, (prompt, extra, answer)):
        if name not in row and (names or name != extra):
            raise UserError(f"{place}: field {name!r} is missing")
        if not isinstance(row.get(name, ""), str):
            raise UserError(f"{place}: field {name!r} must be text")
    question = {"role": "user", "content": row[prompt]}
    if extra and row.get(extra):
        question["input"] = row[extra]
    return [question, {"role": "assistant", "content": row[answer]}]


if __name__ == "__main__":
    settings = cli.parse(Settings)

from tqdm import tqdm

from batching import SampleWriter
from files import new_folder, sha256
from prompts import STYLES, encode_dialog
from tokenizer import Tokenizer


def main(s):
    if s.out_dir.exists() and not (s.out_dir / "data.json").is_file():
        raise UserError(
            f"--out_dir {s.out_dir} exists and is no prepared folder: choose another, nothing is overwritten"
        )
    tokenizer = Tokenizer(s.checkpoint_dir)
    style = s.prompt_style or ("checkpoint" if tokenizer.chat_template else "alpaca")
    if style not in STYLES:
        raise UserError(f"--prompt_style {style}: expected one of {', '.join(STYLES)}")
    samples, sources = tokenize_files(s, tokenizer, style)
    if not samples:
        raise UserError("no sample is left: " + describe_counts(sources))
    with new_folder(s.out_dir) as folder:
        sizes = write_parts(folder, samples, s.val_fraction, s.seed)
        info = {
            "tokenizer_hash": tokenizer.file_hash(),
            "prompt_style": style,
            "max_seq_length": s.max_seq_length,
            "mask_prompt": s.mask_prompt,
            "val_fraction": s.val_fraction,
            "seed": s.seed,
            "sources": sources,
            **sizes,
        }
        (folder / "data.json").write_text(json.dumps(info, indent=2) + "\n")
        plot_lengths(samples, s.max_seq_length, folder / "lengths.png")
    report(s, style, sources, sizes, samples)


def tokenize_files(s, tokenizer, style):
    """All samples as (ids, is_target, source number), and for each file its path, hash and counts."""
    names = (s.prompt_field, s.input_field, s.answer_field) if s.prompt_field else None
    samples, sources = [], []
    for number, path in enumerate(s.data):
        counts = Counter(read=0, kept=0)
        for place, row in tqdm(READERS[path.suffix](path), desc=path.name, unit=" samples"):
            counts["read"] += 1
            messages = to_messages(row, place, names)
            try:
                ids, is_target, outcome = tokenize(tokenizer, messages, style, s.max_seq_length)
            except UserError as error:
                raise UserError(f"{place}: {error}") from None
            counts[outcome] += 1
            if ids:
                counts["kept"] += 1
                samples.append((ids, is_target if s.mask_prompt else [i > 0 for i in range(len(ids))], number))
        sources.append({"path": str(path), "sha256": sha256(path), "counts": dict(counts)})
    return samples, sources


def tokenize(tokenizer, messages, style, max_seq_length):
    """(ids, is_target, what was done): "whole", "prompt cut", or with no ids "empty answer" or "answer too long"."""
    ids, is_target = encode_dialog(tokenizer, messages, style)
    if not any(message["content"] for message in messages if message["role"] == "assistant"):
        return None, None, "empty answer"
    if len(ids) <= max_seq_length:
        return ids, is_target, "whole"
    # Cut the longest text that is not an answer from its start, by bisection on how many characters stay; where none
    # may stay, the next longest.
    places = [(m, key) for m in messages if m["role"] != "assistant" for key in ("content", "input") if m.get(key)]
    for message, key in sorted(places, key=lambda place: -len(place[0][place[1]])):
        text, fits, most, best = message[key], 0, len(message[key]), None
        while fits <= most:
            kept = (fits + most) // 2
            message[key] = text[len(text) - kept :]
            ids, is_target = encode_dialog(tokenizer, messages, style)
            if len(ids) <= max_seq_length:
                best, fits = (ids, is_target), kept + 1
            else:
                most = kept - 1
        if best:
            return *best, "prompt cut"
    return None, None, "answer too long"


def write_parts(folder, samples, val_fraction, seed):
    """Write train.safetensors and val.safetensors, a random split; returns how many samples and tokens are in each."""
    held_back = min(round(val_fraction * len(samples)), len(samples) - 1)  # one at least is there to train on
    in_val = set(random.Random(seed).sample(range(len(samples)), held_back))
    sizes = {}
    for part in ("train", "val"):
        writer = SampleWriter()
        for i, sample in enumerate(samples):
            if (i in in_val) == (part == "val"):
                writer.add(*sample)
        writer.save(folder / f"{part}.safetensors")
        sizes[part] = {"samples": len(writer), "tokens": len(writer.tokens), "targets": sum(writer.target_counts)}
    return sizes


# ------------------------------------------------------------------------------------------------------ reporting


def describe_counts(sources):
    return "; ".join(f"{x['path']}: " + ", ".join(f"{n} {what}" for what, n in x["counts"].items()) for x in sources)


def report(s, style, sources, sizes, samples):
    lengths = [len(ids) for ids, _, _ in samples]
    print(describe_counts(sources))
    print(f"prompt style {style}; tokens a sample: median {statistics.median(lengths):.0f}, longest {max(lengths)}")
    for part, size in sizes.items():
        print(f"{part}: {size['samples']:,} samples, {size['tokens']:,} tokens, {size['targets']:,} of them targets")
    print(
        f"written to {s.out_dir}; next: python finetune.py --checkpoint_dir {s.checkpoint_dir} --data_dir {s.out_dir}"
    )


def plot_lengths(samples, max_seq_length, path):
    """Histograms of the lengths of prompts and answers (all that is a target), as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    answers = [sum(is_target) for _, is_target, _ in samples]
    prompts = [len(ids) - answer for (ids, _, _), answer in zip(samples, answers, strict=True)]
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    longest = max(map(max, (prompts, answers)))
    bins = range(0, longest + 2, max(1, longest // 60))
    axes.hist([prompts, answers], bins=bins, label=["prompt", "answer"], color=["tab:gray", "tab:blue"])
    axes.set(xlabel=f"tokens (a sample may have {max_seq_length:,})", ylabel="samples", title="Lengths")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    cli.run(main, settings)
