"""Generate text: for one prompt, for a file of prompts, or in a chat.

    python generate.py --adapter_dir out/RUN/final --prompt "Hello"

A prompt is rendered as in training: the `onetune.json` beside the adapter or the merged model names the style.
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from shell import cli
from shell.cli import UserError


@dataclass
class Settings:
    """The command line.

    Args:
        checkpoint_dir: Model folder; if not given, the one that the adapter was trained on.
        adapter_dir: Adapter to put over the model, such as out/RUN/final, ours or PEFT's.
        quantize: Keep the weights in 4 or 8 bits, or each layer as in a file written by eval/quality.py --sensitivity;
            "none" for not at all. If not given, as the adapter was trained.
        precision: Dtype of the other weights and of the computation.
        prompt: One prompt, answered as it is generated. Without it and prompts_file a chat starts.
        prompts_file: File of prompts: .txt with one a line, or .jsonl with "prompt", "instruction" and "input",
            or "messages". Answers come as JSON lines, in the file's order.
        system: A system message to put before the prompt, where the style has one.
        prompt_style: How the prompt is rendered; if not given, as in training.
        max_new_tokens: Tokens to generate at most; an answer also ends where the model's context is full.
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
    quantize: Literal[*cli.table_keys("quantize.py", "QUANTIZERS"), "none"] | cli.JsonFile | None = None
    precision: Literal["32-true", "bf16-true", "16-true"] = "bf16-true"
    prompt: str | None = None
    prompts_file: Path | None = None
    system: str | None = None
    prompt_style: Literal[cli.table_keys("text/prompts.py", "STYLES")] | None = None
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
        cli.check_numbers(self, "temperature", "top_k", least=0)
        cli.check_numbers(self, "seed", least=0, below=2**63)
        cli.check_numbers(self, "top_p", least=0, most=1)
        if "" in self.stop:
            raise UserError("--stop: an empty text would end every answer at once")


if __name__ == "__main__":
    settings = cli.parse(Settings)

from inference.writer import Writer
from preparation.reading import BadRow, format_of, read_json_lines
from preparation.records import parse_object
from text.prompts import check_dialog


def main(s: Settings) -> None:
    """Answer the prompt or the file of prompts, or chat."""
    before = [{"role": "system", "content": s.system}] if s.system else []
    prompts = read_prompts(s.prompts_file) if s.prompts_file else {}
    writer = Writer(s.checkpoint_dir, s.adapter_dir, s.quantize, s.precision, s.prompt_style)
    if s.prompt is not None:
        show(writer.stream([*before, {"role": "user", "content": s.prompt}], s))
    elif s.prompts_file is not None:
        dialogs = [[*before, *messages] for messages in prompts.values()]
        for messages, answer in zip(dialogs, writer.answer_all(dialogs, s, places=list(prompts)), strict=True):
            print(json.dumps({"prompt": messages[-1]["content"], "answer": answer}, ensure_ascii=False))
    else:
        chat(writer, before, s)


def chat(writer: Writer, messages: list[dict], s: Settings) -> None:
    """Answer each line that is typed, given the dialog so far; an empty line starts a new one.

    messages: what every dialog starts with.
    """
    print("Type a message; an empty line forgets the dialog, Ctrl-D ends.", file=sys.stderr)
    start = list(messages)
    while True:
        try:
            text = input("> ")
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise UserError(f"standard input: not {error.encoding} text: {error.reason}") from None
        if not text.strip():
            messages = list(start)
            continue
        question = {"role": "user", "content": text}
        try:
            answer = show(writer.stream([*messages, question], s))
        except UserError as error:  # the style has one question alone, or the context is full
            if messages == start:
                raise
            print(f"note: {error}. The dialog so far is forgotten.", file=sys.stderr)
            messages = list(start)
            answer = show(writer.stream([*messages, question], s))
        messages += [question, {"role": "assistant", "content": answer}]


def show(pieces: Iterable[str]) -> str:
    """Print the pieces of a text as they come, and return all of it."""
    text = ""
    for piece in pieces:
        print(piece, end="", flush=True)
        text += piece
    print()
    return text


def read_prompts(path: Path) -> dict[str, list[dict]]:
    """The dialogs in a file of prompts, {"file:line": messages}; the last message of each is the user's."""
    is_json = format_of(path) == "jsonl"
    if not is_json and path.suffix != ".txt":
        raise UserError(f"--prompts_file {path}: expected .txt with a prompt on each line, or .jsonl")
    dialogs = {}
    for number, line in read_json_lines(path, progress=lambda share: None):
        place = f"{path}:{number}"
        try:
            dialogs[place] = _dialog(parse_object(line) if is_json else {"prompt": line.decode().rstrip("\r\n")})
            check_dialog(dialogs[place], last="user")
        except UnicodeDecodeError as error:
            raise UserError(f"{place}: not UTF-8 text: byte {line[error.start]:#04x}") from None
        except (BadRow, UserError) as error:
            raise UserError(f"{place}: {error}") from None
    if not dialogs:
        raise UserError(f"--prompts_file {path} holds no prompt")
    return dialogs


def _dialog(row):
    """The messages that a row of a file of prompts stands for. Other keys, such as an expected answer, are not read."""
    if "system" in row:
        raise UserError('"system" is not read here: put it under "messages", or use --system')
    if "messages" in row:
        return row["messages"]
    text = row.get("prompt", row.get("instruction"))
    if not isinstance(text, str):
        raise UserError('expected an object with "prompt", "instruction" or "messages"')
    return [{"role": "user", "content": text, "input": row.get("input", "")}]


if __name__ == "__main__":
    cli.run(main, settings)
