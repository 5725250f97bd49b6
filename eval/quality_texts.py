"""The texts that quality.py measures on: samples of a task, and general text.

`s` is always the Settings of quality.py. A text is a list of sequences as divergence.py has them.
"""

import json

import torch

from batching import Samples, read_data_info, shift
from eval.exact_match import first_dialogs
from generate import trained_style
from model import IGNORE
from shell.cli import UserError
from text.prompts import encode_dialog
from text.tokenizer import Tokenizer
from weights.checkpoint import read_config


def read_texts(s):
    """{"task": ..., "general": ...}, texts as divergence.py has them, those that are given; and the dialogs of data."""
    tokenizer, texts = Tokenizer(s.checkpoint_dir), {}
    dialogs = first_dialogs(s.data, s.limit) if s.data else []
    style = trained_style(s.checkpoint_dir, s.adapter_dir, tokenizer, s.prompt_style)
    if s.data_dir is not None:
        if not tokenizer.fits(read_data_info(s.data_dir)):
            made_with = "was made with another tokenizer or chat template"
            raise UserError(f"--data_dir {s.data_dir} {made_with}: run prepare_data.py again")
        samples = Samples(s.data_dir / "val.safetensors")
        texts["task"] = first_positions(map(samples.inputs_and_targets, range(len(samples))), s.max_tokens)
    elif dialogs:
        texts["task"] = [sequence(*encode_dialog(tokenizer, messages, style)) for messages in dialogs]
    if s.general_text is not None:
        texts["general"] = first_positions(windows(s, tokenizer), s.max_tokens)
    flags = {"task": "data_dir" if s.data_dir else "data", "general": "general_text"}
    config = read_config(s.checkpoint_dir)
    for name, text in texts.items():
        if not any((targets != IGNORE).any() for _, targets in text):
            raise UserError(f"--{flags[name]} {getattr(s, flags[name])}: it has no token to predict")
        if max(len(tokens) for tokens, _ in text) > config.max_position_embeddings:
            raise UserError(
                f"--{flags[name]}: a sequence is longer than the context of {config.max_position_embeddings}"
            )
        if max(tokens.max().item() for tokens, _ in text) >= config.vocab_size:
            raise UserError(f"--{flags[name]}: a token is outside of the model's vocabulary: made for another model?")
    return texts, dialogs


def sequence(ids, is_target):
    """Lists of ids and of whether each is a target, as a sequence."""
    return shift(torch.tensor(ids), torch.tensor(is_target, dtype=torch.bool))


def first_positions(sequences, most):
    """Sequences with a target, from the start, until they have `most` positions; the first of them always."""
    kept, positions = [], 0
    for tokens, targets in sequences:
        if kept and positions + len(tokens) > most:
            break
        if (targets != IGNORE).any():
            kept.append((tokens, targets))
            positions += len(tokens)
    return kept


def windows(s, tokenizer):
    """Sequences of general_text, of which every token is a target; each begins with BOS where the model has one."""
    bos = [tokenizer.bos_id] if tokenizer.add_bos else []
    size = s.window + 1 - len(bos)
    for text in plain_texts(s.general_text):
        ids = tokenizer.encode(text)
        for first in range(0, len(ids), size):
            part = bos + ids[first : first + size]
            if len(part) > 1:
                yield sequence(part, [True] * len(part))


def plain_texts(path):
    """The texts in a file: all of a .txt, or "text" in each row of a .jsonl."""
    if path.suffix != ".jsonl":
        try:
            return [path.read_text(encoding="utf-8-sig")]
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text: {error}") from None
    texts = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            row = json.loads(line) if line.strip() else {"text": ""}
        except (ValueError, RecursionError):
            raise UserError(f"{path}:{number}: not valid JSON") from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise UserError(f'{path}:{number}: expected an object with "text"')
        texts.append(row["text"])
    return texts
