"""Samples of a prepared folder on the terminal, targets in colour."""

import contextlib
import os
import random
import sys
from pathlib import Path
from typing import Any

from preparation.markup import harmless
from shell.cli import UserError
from store.fetch import local
from text.tokenizer import StreamDecoder, Tokenizer


def show_folder(out_dir: Path, checkpoint_dir: Path | None, count: int, seed: int) -> None:
    """Print `count` random training samples of a prepared folder.

    checkpoint_dir: the model folder whose tokenizer it was made with, if not the one that data.json names.
    """
    from batching import open_samples, read_data_info  # here, since preparing does without torch

    if not (out_dir / "data.json").is_file():
        raise UserError(
            f"{out_dir / 'data.json'} does not exist: --show needs a folder made by prepare_data.py as --out_dir"
        )
    info = read_data_info(out_dir)
    folder = checkpoint_dir or info.get("checkpoint_dir")
    folder = None if folder is None else local(folder)
    if folder is None or not folder.is_dir():
        raise UserError(f"--show needs the model folder whose tokenizer {out_dir} was made with: give --checkpoint_dir")
    tokenizer = Tokenizer(folder)
    if not tokenizer.fits(info):
        raise UserError(
            f"{out_dir} was made with another tokenizer or chat template than {folder}'s: see --checkpoint_dir"
        )
    with contextlib.suppress(AttributeError):  # where the output is no terminal or file
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows a question mark
    color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    show(tokenizer, open_samples(out_dir, "train"), info, count, seed, color)


def segments(tokenizer: Tokenizer, ids: list[int], is_target: list[bool]) -> list[tuple[str, bool]]:
    """The text of a sample in stretches of one kind: a list of (text, whether its tokens are targets).

    Special tokens are written out. The texts joined equal `tokenizer.decode(ids, skip_special=False)`: a character
    whose tokens are of both kinds goes to the one that completes it.
    """
    decoder, found = StreamDecoder(tokenizer, skip_special=False), []

    def add(text, target):
        if text and found and found[-1][1] == target:
            found[-1] = (found[-1][0] + text, target)
        elif text:
            found.append((text, target))

    for id, target in zip(ids, is_target, strict=True):
        add(decoder.push(id), bool(target))
    add(decoder.flush(), found[-1][1] if found else False)
    return found


def show(tokenizer: Tokenizer, samples: Any, info: dict, count: int, seed: int, color: bool) -> None:
    """Print `count` random samples of a prepared file, targets in green and the rest dim, or targets between ⟦ and ⟧.

    Of a pair the rejected answer follows, without the prompt. samples: a `batching.Samples`. info: the folder's
    data.json. color: whether the terminal understands ANSI codes.
    """
    for i in random.Random(seed).sample(range(len(samples)), min(count, len(samples))):
        sequences = [(ids.tolist(), is_target.tolist()) for ids, is_target in samples.sequences(i)]
        source, targets = info["sources"][samples.sources[i].item()], samples.target_counts[i].item()
        name = " ".join(harmless(source.get("name") or source.get("path", "")).split())  # the latter in older folders
        tokens = " and ".join(f"{len(ids):,}" for ids, _ in sequences)
        print(f"--- sample {i} of {len(samples):,} · {name} · {tokens} tokens, {targets:,} targets ---")
        first, *rejected = [segments(tokenizer, *sequence) for sequence in sequences]
        print("".join(_painted(harmless(text), target, color) for text, target in first), end="\n\n")
        for parts in rejected:
            print("rejected:")
            parts = without_beginning(parts, first)
            print("".join(_painted(harmless(text), target, color) for text, target in parts), end="\n\n")


def without_beginning(parts: list[tuple[str, bool]], others: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """What `segments` returned of a pair's rejected sequence, without the context that it shares with the chosen one.

    All of it where the two answers follow different contexts.
    """
    return parts[1:] if parts[0] == others[0] and not parts[0][1] else parts


def _painted(text, target, color):
    if not color:
        return f"⟦{text}⟧" if target else text
    code = "\x1b[32m" if target else "\x1b[2m"  # green, dim
    # Each line by itself: a pager forgets the colour at a line's end.
    return "\n".join(f"{code}{line}\x1b[0m" if line else "" for line in text.split("\n"))
