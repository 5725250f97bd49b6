"""A loaded model that answers: messages in, texts out, rendered as in training. What generate.py and eval/ share."""

import copy
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from inference.decode import fastest_decoder
from inference.sampling import GenerationSettings, Reply, Row, generate_rows, room_for, run_all
from inference.several import BASE, put_adapters
from model import Transformer
from ops.core_sharing import share_cores
from shell.cli import UserError
from shell.progress import bar
from text.messages import Dialog
from text.prompts import STYLES, encode_prompt, stop_ids
from text.tokenizer import Tokenizer
from text.tool_calls import mark_tokens
from weights.checkpoint import (
    find_base,
    load_model,
    read_notes,
    shared_base,
    shared_quantization,
    trained_quantization,
)
from weights.stored import note_once

ENSEMBLE = "ensemble:"  # before the names of an ensemble's adapters, joined by +
DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "16-true": torch.float16}  # by --precision


def find_model(checkpoint_dir: Path | None, adapter_dir: Path | None) -> Path:
    """The model's folder: the one that is given, or else the adapter's base."""
    for flag, folder in (("checkpoint_dir", checkpoint_dir), ("adapter_dir", adapter_dir)):
        if folder is not None and Path(folder).is_file():
            raise UserError(f"--{flag} {folder} is a file: name the folder that it is in")
    folder = checkpoint_dir or find_base(adapter_dir)
    if Path(folder, "adapter_config.json").is_file() and not Path(folder, "config.json").exists():
        raise UserError(f"--checkpoint_dir {folder} is an adapter: name it with --adapter_dir")
    return folder


def trained_style(
    checkpoint_dir: Path, adapter_dir: Path | None, tokenizer: Tokenizer, style: str | None = None
) -> str:
    """The prompt style: `style` if given, else that of the training, else the checkpoint's own template, else plain.

    An adapter that does not say its style, but brings a chat template, was trained with that: the tokenizer gets it,
    and a line on standard error says so.
    """
    adapters_notes = read_notes(adapter_dir) if adapter_dir else {}
    notes = adapters_notes or read_notes(checkpoint_dir)
    where = "--prompt_style" if style else f"{adapter_dir or checkpoint_dir}: prompt_style"
    style = style or notes.get("prompt_style")
    own = adapter_dir is not None and "prompt_style" not in adapters_notes and style in (None, "checkpoint")
    if own and tokenizer.take_chat_template(adapter_dir):
        note_once(f"the chat template is that of {adapter_dir}, not that of {checkpoint_dir}")
    style = style or ("checkpoint" if tokenizer.chat_template else "plain")
    if style not in STYLES:
        raise UserError(f"{where} {style}: expected one of {', '.join(STYLES)}")
    return style


def trained_template_args(checkpoint_dir: Path, adapter_dir: Path | None, style: str) -> dict:
    """The variables that the chat template had in the training, where its style is that template."""
    notes = read_notes(adapter_dir or checkpoint_dir) or read_notes(checkpoint_dir)
    return notes.get("template_args", {}) if style == "checkpoint" else {}


def find_shared(checkpoint_dir: Path | None, adapters: dict[str, Path]) -> Path:
    """The folder of the model that several adapters are over. Raises UserError if they were trained on several."""
    return shared_base(
        {name: find_model(checkpoint_dir, folder) for name, folder in adapters.items()}, "checkpoint_dir"
    )


class Voice:
    """How one adapter, or the base alone, is asked: its prompt style, and the tokens that end its answers.

    number: the adapter's in `several.py`, where there are several; style: as --prompt_style, None for that of the
    training.
    """

    def __init__(
        self, checkpoint_dir: Path, adapter_dir: Path | None, tokenizer: Tokenizer, style: str | None, number: int = 1
    ):
        self.number, self.tokenizer = number, copy.copy(tokenizer)  # an adapter may bring another chat template
        self.style = trained_style(checkpoint_dir, adapter_dir, self.tokenizer, style)
        self.template_args = trained_template_args(checkpoint_dir, adapter_dir, self.style)
        self.stop_ids = stop_ids(self.tokenizer, self.style)

    def encode(self, dialog: Dialog) -> list[int]:
        """The ids of a prompt: of a dialog that ends with a question, a tool's result, or an answer's beginning."""
        template_args = {**self.template_args, **dialog.template_args}
        return encode_prompt(self.tokenizer, dialog.messages, self.style, dialog.tools, template_args)


class Writer:
    """A loaded model with its tokenizer and prompt style: messages in, answers out.

    With several adapters a request says by name which one answers, or an ensemble of some (`voices`).
    """

    def __init__(
        self,
        checkpoint_dir: Path | None,
        adapter_dir: Path | None,
        quantize: str | None,
        precision: str,
        style: str | None = None,
        model: Transformer | None = None,
        adapters: dict[str, Path] | None = None,
    ):
        """The arguments are those of the command line; `style` and `quantize` None mean as in training.

        model: one that is in memory already; then `quantize` and `precision` are not used.
        adapters: folders by name, in the place of `adapter_dir`; the first answers where a request names none.
        """
        share_cores()
        folders = adapters or {}
        checkpoint_dir = find_shared(checkpoint_dir, folders) if folders else find_model(checkpoint_dir, adapter_dir)
        quantize = shared_quantization(folders, quantize) if folders else trained_quantization(adapter_dir, quantize)
        tokenizer = Tokenizer(checkpoint_dir)
        self.named: dict[str, Voice] = {}
        for number, (name, folder) in enumerate(folders.items(), start=1):
            self.named[name] = Voice(checkpoint_dir, folder, tokenizer, style, number)
        if folders:
            self.named[BASE] = Voice(checkpoint_dir, None, tokenizer, style, 0)
        self.default = next(iter(self.named.values()), None) or Voice(checkpoint_dir, adapter_dir, tokenizer, style)
        self.tokenizer, self.style = self.default.tokenizer, self.default.style
        self.template_args, self.stop_ids = self.default.template_args, self.default.stop_ids
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = model or load_model(checkpoint_dir, DTYPES[precision], device, quantize, adapter_dir)
        if folders:
            put_adapters(self.model, folders)
        self.decoder = fastest_decoder(self.model)
        self.context = self.model.config.max_position_embeddings

    def voices(self, name: str | None) -> list[Voice]:
        """Who answers to a name: an adapter or "base", several of an ensemble ("ensemble:a+b"), by default the first.

        Raises UserError for a name that is not there.
        """
        if name is None:
            return [self.default]
        names = name.removeprefix(ENSEMBLE).split("+") if name.startswith(ENSEMBLE) else [name]
        for one in names:
            if one not in self.named:
                there = f"there are {', '.join(self.named)}" if self.named else "adapters have names with --adapters"
                raise UserError(f"there is no adapter {one!r}: {there}")
        return [self.named[one] for one in names]

    def encode(self, dialog: Dialog) -> list[int]:
        """The ids of a prompt for the adapter that it names: see `Voice.encode`."""
        return self.voices(dialog.adapter)[0].encode(dialog)

    def reply_options(self, dialog: Dialog) -> dict:
        """How `Reply` is to take the answer: whether it begins a text, and with the marks of calls if there are tools.

        The last message may be an answer's beginning; then the model continues it.
        """
        last = dialog.messages[-1]
        begun = last["role"] == "assistant" and (last["content"] or "thinking" in last)
        return {"start": not begun, "shown": mark_tokens(self.tokenizer) if dialog.tools else {}}

    def row(self, dialog: Dialog, s: GenerationSettings, seed: int) -> Row:
        """A row that answers a dialog, in the voice of the adapter or ensemble that it names."""
        first, *others = self.voices(dialog.adapter)
        ends = first.stop_ids.union(*(voice.stop_ids for voice in others))
        reply = Reply(self.tokenizer, ends, s.stop, **self.reply_options(dialog))
        row = Row(first.encode(dialog), reply, s, seed, adapter=first.number)
        for voice in others:
            row.follow(voice.encode(dialog), voice.number)
        for one in (row, *row.members):
            room_for(one.prompt, s.max_new_tokens, self.context)
        return row

    def stream(self, dialog: Dialog, s: GenerationSettings) -> Iterator[str]:
        """Yield the answer to a dialog piece by piece; `s` has the sampling settings."""
        row, shown = self.row(dialog, s, s.seed), 0
        for _ in generate_rows(self.decoder, [row]):
            yield row.reply.text[shown : row.reply.safe_length]
            shown = row.reply.safe_length
        self._note_full_context([row])

    def answer_all(self, dialogs: list[Dialog], s: GenerationSettings, places: list[str] | None = None) -> list[str]:
        """The answers to a list of dialogs, in order, generated in batches of prompts of about equal length.

        places: where each dialog comes from, for error messages.
        """
        rows = []
        for place, dialog in zip(places or [""] * len(dialogs), dialogs, strict=True):
            try:
                rows.append(self.row(dialog, s, (s.seed + len(rows)) % 2**63))
            except UserError as error:
                raise UserError(f"{place}: {error}" if place else str(error)) from None
        with bar(total=len(rows), what="answering", unit=" answers") as progress:
            run_all(self.decoder, rows, s.batch_size, progress.update)
        self._note_full_context(rows)
        return [row.reply.text for row in rows]

    def _note_full_context(self, rows):
        """Say how many answers ended because the context was full, before `max_new_tokens`."""
        full = sum(
            row.reply.length == self.context - max(len(one.prompt) for one in (row, *row.members))
            < row.settings.max_new_tokens and not row.reply.stopped
            for row in rows
        )  # fmt: skip
        if full:
            print(f"note: answers that end early because the model's context of {self.context} tokens is full: "
                  f"{full} of {len(rows)}", file=sys.stderr)  # fmt: skip
