"""Generate text: for one prompt, a file of prompts, or in a chat.

    python generate.py --adapter_dir out/RUN/final --prompt "Hello"

The prompt is rendered as in training: the style stands in the `onetune.json` beside the adapter or the merged model.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from shell import cli
from shell.cli import UserError


@dataclass
class Settings:
    """The command line.

    Args:
        checkpoint_dir: Model folder; the one that the adapter was trained on if not given.
        adapter_dir: Adapter to put over it, such as out/RUN/final, ours or PEFT's.
        quantize: Keep the weights in bnb.nf4, bnb.nf4-dq, bnb.fp4, bnb.fp4-dq or bnb.int8, or each layer as in a plan's
            file; "none" for not at all. With an adapter as in its training if not given.
        precision: Dtype of the other weights and of the computation.
        prompt: One prompt, answered as it is generated. Without it and prompts_file a chat starts.
        prompts_file: File of prompts: .txt with one a line, or .jsonl with "prompt", "instruction" and "input",
            or "messages". Answers come as JSON lines, in the file's order.
        system: A system message to put before the prompt, where the style has one.
        prompt_style: How the prompt is rendered, if not as in training.
        max_new_tokens: Tokens to generate at most.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Sample among so many likeliest tokens; 0 for all.
        top_p: Sample among the likeliest tokens that together have this probability; 0 takes the likeliest.
        repetition_penalty: Divides the logits of tokens that have occurred (Keskar et al. 2019), above 1 against loops.
        stop: Texts that end an answer.
        batch_size: Prompts of a file that are answered at one time.
        seed: Of the sampling; the prompt with number i in a file uses seed + i.
    """

    checkpoint_dir: Path | None = None
    adapter_dir: Path | None = None
    quantize: str | None = None
    precision: Literal["32-true", "bf16-true", "16-true"] = "bf16-true"
    prompt: str | None = None
    prompts_file: Path | None = None
    system: str | None = None
    prompt_style: str | None = None
    max_new_tokens: int = 256
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: list[str] = field(default_factory=list)
    batch_size: int = 16
    seed: int = 1337

    def __post_init__(self):
        cli.check_model(self)
        if self.prompt is not None and self.prompts_file is not None:
            raise UserError("--prompt and --prompts_file exclude each other")
        cli.check_files(self, "prompts_file")
        cli.check_numbers(self, "max_new_tokens", "repetition_penalty", "batch_size", above=0)
        cli.check_numbers(self, "temperature", "top_k", "seed", least=0)
        cli.check_numbers(self, "top_p", least=0, most=1)
        if "" in self.stop:
            raise UserError("--stop: an empty text would end every answer at once")


if __name__ == "__main__":
    settings = cli.parse(Settings)

import torch

from inference.decode import fastest_decoder
from inference.sampling import Reply, generate, generate_all
from text.prompts import STYLES, encode_prompt, stop_ids
from text.tokenizer import Tokenizer
from weights.checkpoint import find_base, load_model, read_notes, trained_quantization

DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "16-true": torch.float16}


def main(s):
    start = [{"role": "system", "content": s.system}] if s.system else []
    dialogs = [[*start, *messages] for messages in read_prompts(s.prompts_file)] if s.prompts_file else []
    writer = Writer(s.checkpoint_dir, s.adapter_dir, s.quantize, s.precision, s.prompt_style)
    if s.prompt is not None:
        show(writer.stream([*start, {"role": "user", "content": s.prompt}], s))
    elif s.prompts_file is not None:
        for messages, reply in zip(dialogs, writer.answer_all(dialogs, s), strict=True):
            print(json.dumps({"prompt": messages[-1]["content"], "answer": reply}, ensure_ascii=False))
    else:
        chat(writer, start, s)


def chat(writer, messages, s):
    """Answer what is typed, line by line, with the whole dialog in view; an empty line starts a new one."""
    print("Type a message; an empty line forgets the dialog, Ctrl-D ends.", file=sys.stderr)
    start = list(messages)
    while True:
        try:
            text = input("> ")
        except EOFError:
            return
        if not text.strip():
            messages = list(start)
            continue
        question = {"role": "user", "content": text}
        try:
            answer = show(writer.stream([*messages, question], s))
        except UserError as error:  # a style for one question alone, or the context is full
            if messages == start:
                raise
            print(f"note: {error}. Going on without what was said before.", file=sys.stderr)
            messages = list(start)
            answer = show(writer.stream([*messages, question], s))
        messages += [question, {"role": "assistant", "content": answer}]


def show(pieces):
    """Print the pieces of a text as they come, and return it whole."""
    text = ""
    for piece in pieces:
        print(piece, end="", flush=True)
        text += piece
    print()
    return text


def read_prompts(path):
    """The dialogs in a file of prompts: lists of messages that end with the user's."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines: JSON may hold other separators
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error}") from None
    dialogs = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = {"prompt": line}
        if path.suffix == ".jsonl":
            try:
                row = json.loads(line)
            except RecursionError:
                raise UserError(f"{path}:{number}: nested too deeply") from None
            except ValueError as error:
                raise UserError(f"{path}:{number}: not valid JSON: {error}") from None
        text = row.get("prompt", row.get("instruction")) if isinstance(row, dict) else None
        if isinstance(text, str):
            dialogs.append([{"role": "user", "content": text, "input": row.get("input", "")}])
        elif isinstance(row, dict) and isinstance(row.get("messages"), list):
            dialogs.append(row["messages"])
        else:
            raise UserError(f'{path}:{number}: expected an object with "prompt", "instruction" or "messages"')
    return dialogs


def trained_style(checkpoint_dir, adapter_dir, tokenizer, style=None):
    """The prompt style that is asked for, or else that of the training, or else the checkpoint's own, or plain."""
    notes = read_notes(adapter_dir or checkpoint_dir) or read_notes(checkpoint_dir)
    style = style or notes.get("prompt_style") or ("checkpoint" if tokenizer.chat_template else "plain")
    if style not in STYLES:
        raise UserError(f"--prompt_style {style}: expected one of {', '.join(STYLES)}")
    return style


class Writer:
    """A loaded model with its tokenizer and prompt style: messages in, answers out."""

    def __init__(self, checkpoint_dir, adapter_dir, quantize, precision, style=None, model=None):
        """The arguments are those of the command line; `style` and `quantize` None mean as in training.

        model: one to take that is in memory already; then `quantize` and `precision` say nothing.
        """
        checkpoint_dir = checkpoint_dir or find_base(adapter_dir)
        quantize = trained_quantization(adapter_dir, quantize)
        self.tokenizer = Tokenizer(checkpoint_dir)
        self.style = trained_style(checkpoint_dir, adapter_dir, self.tokenizer, style)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = model or load_model(checkpoint_dir, DTYPES[precision], device, quantize, adapter_dir)
        self.decoder = fastest_decoder(self.model)
        self.stop_ids = stop_ids(self.tokenizer, self.style)

    def stream(self, messages, s):
        """Yield the answer to `messages` piece by piece; `s` has the sampling settings of `Settings`."""
        reply, shown = Reply(self.tokenizer, self.stop_ids, s.stop), 0
        for _ in generate(self.decoder, [encode_prompt(self.tokenizer, messages, self.style)], [reply], s, [s.seed]):
            yield reply.text[shown : reply.safe_length]
            shown = reply.safe_length

    def answer_all(self, dialogs, s):
        """The answers to a list of dialogs, in order; the work is done in batches of about equal lengths."""
        prompts = [encode_prompt(self.tokenizer, messages, self.style) for messages in dialogs]
        replies = [Reply(self.tokenizer, self.stop_ids, s.stop) for _ in prompts]
        generate_all(self.decoder, prompts, replies, s)
        return [reply.text for reply in replies]


if __name__ == "__main__":
    cli.run(main, settings)
