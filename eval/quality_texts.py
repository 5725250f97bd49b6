"""The texts that quality.py measures on: samples of a task, and general text.

`s` is always the Settings of quality.py. A text is a list of sequences as in divergence.py.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from batching import open_samples, read_data_info, shift
from eval.divergence import Text
from eval.exact_match import Sample, first_samples
from inference.writer import trained_style, trained_template_args
from model import IGNORE, Config
from preparation.reading import BadRow, format_of, read_json_lines
from preparation.records import parse_object
from shell.cli import UserError
from text.prompts import encode_dialog
from text.segments import Encoded
from text.tokenizer import Tokenizer
from weights.checkpoint import read_config

Sequence = tuple[Tensor, Tensor]  # tokens and targets, both (T,) int64


def read_texts(s: Any) -> tuple[dict[str, Text], list[Sample]]:
    """The texts that are given, by name, "task" and "general"; and the samples of --data."""
    tokenizer, texts = Tokenizer(s.checkpoint_dir), {}
    samples = first_samples(s.data, s.limit) if s.data else []
    style = trained_style(s.checkpoint_dir, s.adapter_dir, tokenizer, s.prompt_style)
    if s.data_dir is not None:
        texts["task"] = validation_text(s, tokenizer)
    elif samples:
        args = trained_template_args(s.checkpoint_dir, s.adapter_dir, style)
        encoded = (one for sample in samples for one in encode_sample(tokenizer, sample, style, args))
        texts["task"] = [sequence(*one) for one in encoded]
    if s.general_text is not None:
        texts["general"] = first_positions(windows(s, tokenizer), s.max_tokens)
    flags = {"task": "data_dir" if s.data_dir else "data", "general": "general_text"}
    for name, text in texts.items():
        check_text(text, read_config(s.checkpoint_dir), f"--{flags[name]} {getattr(s, flags[name])}")
    return texts, samples


def validation_text(s: Any, tokenizer: Tokenizer) -> Text:
    """The first validation samples of --data_dir."""
    if not tokenizer.fits(read_data_info(s.data_dir)):
        made_with = "was made with another tokenizer or chat template"
        raise UserError(f"--data_dir {s.data_dir} {made_with}: run prepare_data.py again")
    samples = open_samples(s.data_dir, "val")
    if not len(samples):
        raise UserError(f"--data_dir {s.data_dir} has no validation samples: prepare it with --val_fraction above 0")
    return first_positions(map(samples.inputs_and_targets, range(len(samples))), s.max_tokens)


def encode_sample(tokenizer: Tokenizer, sample: Sample, style: str, args: dict) -> list[Encoded]:
    """`encode_dialog` of a sample; an error names the sample's place. args: variables of the chat template."""
    try:
        dialog = sample.dialog
        return encode_dialog(tokenizer, dialog.messages, style, dialog.tools, {**args, **dialog.template_args})
    except UserError as error:
        raise UserError(f"{sample.place}: {error}") from None


def check_text(text: Text, config: Config, where: str) -> None:
    """Raise UserError for a text that the model of `config` cannot read, or that has no target."""
    if not any((targets != IGNORE).any() for _, targets in text):
        raise UserError(f"{where}: it has no token to predict")
    longest = max(len(tokens) for tokens, _ in text)
    if longest > config.max_position_embeddings:
        raise UserError(f"{where}: a sequence has {longest} tokens, the model's context is "
                        f"{config.max_position_embeddings}")  # fmt: skip
    if max(tokens.max().item() for tokens, _ in text) >= config.vocab_size:
        raise UserError(f"{where}: a token is not in the model's vocabulary: was it made for another model?")


def sequence(ids: list[int], is_target: list[bool]) -> Sequence:
    """The sequence of a list of ids; is_target: whether each of them is one."""
    return shift(torch.tensor(ids), torch.tensor(is_target, dtype=torch.bool))


def first_positions(sequences: Iterable[Sequence], most: int) -> Text:
    """The first sequences with a target that together have up to `most` positions, and at least one of them."""
    kept, positions = [], 0
    for tokens, targets in sequences:
        if kept and positions + len(tokens) > most:
            break
        if (targets != IGNORE).any():
            kept.append((tokens, targets))
            positions += len(tokens)
    return kept


def windows(s: Any, tokenizer: Tokenizer) -> Iterator[Sequence]:
    """Yield --general_text in sequences, every token a target; each begins as the tokenizer's sequences do."""
    begin = list(tokenizer.begin_ids)
    size = s.window + 1 - len(begin)
    for text in plain_texts(s.general_text):
        ids = tokenizer.encode(text)
        for first in range(0, len(ids), size):
            part = begin + ids[first : first + size]
            if len(part) > 1:
                yield sequence(part, [True] * len(part))


def plain_texts(path: Path) -> Iterator[str]:
    """Yield the texts in a file: "text" of each row of a .jsonl, or all of a file of plain text."""
    if format_of(path) not in (None, "jsonl"):
        raise UserError(f'--general_text {path}: expected plain text, or .jsonl with "text"')
    if format_of(path) is None:
        try:
            yield path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text: {error}") from None
        return
    for number, line in read_json_lines(path, progress=lambda share: None):
        try:
            text = parse_object(line).get("text")
        except BadRow as error:
            raise UserError(f"{path}:{number}: {error}") from None
        if not isinstance(text, str):
            raise UserError(f'{path}:{number}: expected an object with "text"')
        yield text
