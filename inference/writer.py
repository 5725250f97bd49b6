"""A loaded model that answers: messages in, texts out, rendered as in training. What generate.py and eval/ share."""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from inference.decode import fastest_decoder
from inference.sampling import GenerationSettings, Reply, generate, generate_all, room_for
from model import Transformer
from ops.core_sharing import share_cores
from shell.cli import UserError
from text.messages import Dialog
from text.prompts import STYLES, encode_prompt, stop_ids
from text.tokenizer import Tokenizer
from text.tool_calls import mark_tokens
from weights.checkpoint import find_base, load_model, read_notes, trained_quantization
from weights.stored import note_once

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


class Writer:
    """A loaded model with its tokenizer and prompt style: messages in, answers out."""

    def __init__(
        self,
        checkpoint_dir: Path | None,
        adapter_dir: Path | None,
        quantize: str | None,
        precision: str,
        style: str | None = None,
        model: Transformer | None = None,
    ):
        """The arguments are those of the command line; `style` and `quantize` None mean as in training.

        model: one that is in memory already; then `quantize` and `precision` are not used.
        """
        share_cores()
        checkpoint_dir = find_model(checkpoint_dir, adapter_dir)
        quantize = trained_quantization(adapter_dir, quantize)
        self.tokenizer = Tokenizer(checkpoint_dir)
        self.style = trained_style(checkpoint_dir, adapter_dir, self.tokenizer, style)
        self.template_args = trained_template_args(checkpoint_dir, adapter_dir, self.style)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = model or load_model(checkpoint_dir, DTYPES[precision], device, quantize, adapter_dir)
        self.decoder = fastest_decoder(self.model)
        self.stop_ids = stop_ids(self.tokenizer, self.style)
        self.context = self.model.config.max_position_embeddings

    def encode(self, dialog: Dialog) -> list[int]:
        """The ids of a prompt: of a dialog that ends with a question, a tool's result, or an answer's beginning."""
        template_args = {**self.template_args, **dialog.template_args}
        return encode_prompt(self.tokenizer, dialog.messages, self.style, dialog.tools, template_args)

    def reply_options(self, dialog: Dialog) -> dict:
        """How `Reply` is to take the answer: whether it begins a text, and with the marks of calls if there are tools.

        The last message may be an answer's beginning; then the model continues it.
        """
        last = dialog.messages[-1]
        begun = last["role"] == "assistant" and (last["content"] or "thinking" in last)
        return {"start": not begun, "shown": mark_tokens(self.tokenizer) if dialog.tools else {}}

    def stream(self, dialog: Dialog, s: GenerationSettings) -> Iterator[str]:
        """Yield the answer to a dialog piece by piece; `s` has the sampling settings."""
        prompt = self.encode(dialog)
        reply, shown = Reply(self.tokenizer, self.stop_ids, s.stop, **self.reply_options(dialog)), 0
        for _ in generate(self.decoder, [prompt], [reply], s, [s.seed]):
            yield reply.text[shown : reply.safe_length]
            shown = reply.safe_length
        self._note_full_context([prompt], [reply], s)

    def answer_all(self, dialogs: list[Dialog], s: GenerationSettings, places: list[str] | None = None) -> list[str]:
        """The answers to a list of dialogs, in order, generated in batches of prompts of about equal length.

        places: where each dialog comes from, for error messages.
        """
        prompts = []
        for place, dialog in zip(places or [""] * len(dialogs), dialogs, strict=True):
            try:
                prompts.append(self.encode(dialog))
                room_for(prompts[-1], s.max_new_tokens, self.context)
            except UserError as error:
                raise UserError(f"{place}: {error}" if place else str(error)) from None
        replies = [Reply(self.tokenizer, self.stop_ids, s.stop, **self.reply_options(dialog)) for dialog in dialogs]
        generate_all(self.decoder, prompts, replies, s)
        self._note_full_context(prompts, replies, s)
        return [reply.text for reply in replies]

    def _note_full_context(self, prompts, replies, s):
        """Say how many answers ended because the context was full, before `s.max_new_tokens`."""
        full = sum(
            reply.length == self.context - len(prompt) < s.max_new_tokens and not reply.stopped
            for prompt, reply in zip(prompts, replies, strict=True)
        )
        if full:
            print(f"note: answers that end early because the model's context of {self.context} tokens is full: "
                  f"{full} of {len(replies)}", file=sys.stderr)  # fmt: skip
