"""Generate text: for one prompt, for a file of prompts, or in a chat.

    python generate.py --adapter_dir out/RUN/final --prompt "Hello"
    python generate.py --adapters poet=out/poet/final,cook=out/cook/final --prompts_file prompts.jsonl

A prompt is rendered as in training: the `onetune.json` beside the adapter or the merged model names the style.
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from shell import cli
from shell.cli import UserError


@dataclass
class Settings:
    """The command line.

    Args:
        checkpoint_dir: Model folder; if not given, the one that the adapter was trained on.
        adapter_dir: Adapter to put over the model, such as out/RUN/final, ours or PEFT's.
        adapters: Several adapters over one base, NAME=FOLDER with commas between them. In a prompts_file "adapter" says
            which answers a prompt: a name, or "base" for the base alone.
        adapter: Which of them answers where a prompt does not say it; the first if not given.
        ensemble: Names of adapters, with commas between them, that answer together: the mean of their probabilities.
        quantize: Keep the weights in 4 or 8 bits, or each layer as in a file written by eval/quality.py --sensitivity;
            "none" for not at all. If not given, as the adapter was trained.
        precision: Dtype of the other weights and of the computation.
        prompt: One prompt, answered as it is generated. Without it and prompts_file a chat starts.
        prompts_file: File of prompts: .txt with one a line, or .jsonl with "prompt", "instruction" and "input",
            or "messages" and perhaps "tools". Answers come as JSON lines, in the file's order.
        system: A system message to put before the prompt, where the style has one.
        tools: JSON file with a list of the tools that the model may call, for prompts that bring none of their own.
        prompt_style: How the prompt is rendered; if not given, as in training.
        template_args: Variables for the model's own chat template, such as {enable_thinking: false}.
        max_new_tokens: Tokens to generate at most; an answer also ends where the model's context is full.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Sample among so many likeliest tokens; 0 for all.
        top_p: Sample among the likeliest tokens that together have this probability; 0 takes the likeliest.
        min_p: Sample among the tokens that have this share of the likeliest one's probability; 0 for all.
        repetition_penalty: Divides the logits of tokens that have occurred (Keskar et al. 2019), above 1 against loops.
        frequency_penalty: Is subtracted from a token's logit for each time that it was generated.
        presence_penalty: Is subtracted once from the logit of a token that was generated.
        stop: Texts that end an answer.
        batch_size: Prompts of a file that are answered at one time.
        seed: Of the sampling; the prompt with number i in a file uses seed + i.
    """

    checkpoint_dir: Path | None = None
    adapter_dir: Path | None = None
    adapters: list[str] | str | None = None
    adapter: str | None = None
    ensemble: list[str] | str | None = None
    quantize: Literal[*cli.table_keys("quantize.py", "QUANTIZERS"), "none"] | cli.JsonFile | None = None
    precision: Literal["32-true", "bf16-true", "16-true"] = "bf16-true"
    prompt: str | None = None
    prompts_file: Path | None = None
    system: str | None = None
    tools: Path | None = None
    prompt_style: Literal[cli.table_keys("text/prompts.py", "STYLES")] | None = None
    template_args: dict[str, Any] = field(default_factory=dict)
    max_new_tokens: int = 256
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    stop: list[str] = field(default_factory=list)
    batch_size: int = 16
    seed: int = 1337

    def __post_init__(self):
        cli.check_model(self)
        self._check_adapters()
        if self.prompt is not None and self.prompts_file is not None:
            raise UserError("--prompt and --prompts_file exclude each other")
        cli.check_files(self, "prompts_file", "tools")
        cli.check_numbers(self, "max_new_tokens", "repetition_penalty", "batch_size", above=0)
        cli.check_numbers(self, "temperature", "top_k", least=0)
        cli.check_numbers(self, "seed", least=0, below=2**63)
        cli.check_numbers(self, "top_p", "min_p", least=0, most=1)
        cli.check_numbers(self, "frequency_penalty", "presence_penalty", least=-2, most=2)
        if "" in self.stop:
            raise UserError("--stop: an empty text would end every answer at once")

    def _check_adapters(self):
        self.adapters = cli.named_folders(self.adapters, "adapters") or None
        if self.adapter is not None and self.ensemble is not None:
            raise UserError("--adapter and --ensemble exclude each other")
        names = self.ensemble.split(",") if isinstance(self.ensemble, str) else self.ensemble
        for flag, chosen in (("adapter", [self.adapter]), ("ensemble", [name.strip() for name in names or []])):
            if getattr(self, flag) is None:
                continue
            if self.adapters is None:
                raise UserError(f"--{flag} goes with --adapters: it chooses among them")
            for name in chosen:
                if name not in ("base", *self.adapters):
                    raise UserError(f"--{flag} {name}: --adapters names {', '.join(self.adapters)}, and there is base")
            if flag == "ensemble":
                self.adapter = "ensemble:" + "+".join(chosen)


if __name__ == "__main__":
    settings = cli.parse(Settings)

from inference.writer import Writer
from preparation.reading import BadRow, format_of, read_json_lines
from preparation.records import parse_object
from store.fetch import fetch_folders
from text.messages import Dialog, check_last, read_messages, read_tools


def main(s: Settings) -> None:
    """Answer the prompt or the file of prompts, or chat."""
    fetch_folders(s)
    before = [{"role": "system", "content": s.system}] if s.system else []
    start = Dialog(before, read_tools_file(s.tools) if s.tools else [], s.template_args, adapter=s.adapter)
    prompts = read_prompts(s.prompts_file) if s.prompts_file else {}
    named = [place for place, prompt in prompts.items() if prompt.adapter is not None]
    if named and s.adapters is None:
        raise UserError(f'{named[0]}: "adapter" names one of several: give them to --adapters')
    writer = Writer(s.checkpoint_dir, s.adapter_dir, s.quantize, s.precision, s.prompt_style, adapters=s.adapters)
    if s.prompt is not None:
        show(writer.stream(start._replace(messages=[*before, {"role": "user", "content": s.prompt}]), s))
    elif s.prompts_file is not None:
        dialogs = [
            start._replace(
                messages=[*before, *prompt.messages],
                tools=prompt.tools or start.tools,
                adapter=prompt.adapter or start.adapter,
            )
            for prompt in prompts.values()
        ]
        for dialog, answer in zip(dialogs, writer.answer_all(dialogs, s, places=list(prompts)), strict=True):
            named = {"adapter": dialog.adapter or next(iter(s.adapters))} if s.adapters else {}
            row = {"prompt": dialog.messages[-1]["content"], **named, "answer": answer}
            print(json.dumps(row, ensure_ascii=False))
    else:
        chat(writer, start, s)


def chat(writer: Writer, start: Dialog, s: Settings) -> None:
    """Answer each line that is typed, given the dialog so far; an empty line starts a new one, like `start`."""
    print("Type a message; an empty line forgets the dialog, Ctrl-D ends.", file=sys.stderr)
    messages = list(start.messages)
    while True:
        try:
            text = input("> ")
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise UserError(f"standard input: not {error.encoding} text: {error.reason}") from None
        if not text.strip():
            messages = list(start.messages)
            continue
        question = {"role": "user", "content": text}
        try:
            answer = show(writer.stream(start._replace(messages=[*messages, question]), s))
        except UserError as error:  # the style has one question alone, or the context is full
            if messages == start.messages:
                raise
            print(f"note: {error}. The dialog so far is forgotten.", file=sys.stderr)
            messages = list(start.messages)
            answer = show(writer.stream(start._replace(messages=[*messages, question]), s))
        messages += [question, {"role": "assistant", "content": answer}]


def show(pieces: Iterable[str]) -> str:
    """Print the pieces of a text as they come, and return all of it."""
    text = ""
    for piece in pieces:
        print(piece, end="", flush=True)
        text += piece
    print()
    return text


def read_tools_file(path: Path) -> list[dict]:
    """The tools in a JSON file."""
    try:
        return read_tools(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"--tools {path}: not UTF-8 text: {error.reason}") from None
    except UserError as error:
        raise UserError(f"--tools {path}: {error}") from None


def read_prompts(path: Path) -> dict[str, Dialog]:
    """The dialogs in a file of prompts, {"file:line": dialog}; each ends with a question or an answer's beginning."""
    is_json = format_of(path) == "jsonl"
    if not is_json and path.suffix != ".txt":
        raise UserError(f"--prompts_file {path}: expected .txt with a prompt on each line, or .jsonl")
    dialogs = {}
    for number, line in read_json_lines(path, progress=lambda share: None):
        place = f"{path}:{number}"
        try:
            dialogs[place] = _dialog(parse_object(line) if is_json else {"prompt": line.decode().rstrip("\r\n")})
        except UnicodeDecodeError as error:
            raise UserError(f"{place}: not UTF-8 text: byte {line[error.start]:#04x}") from None
        except (BadRow, UserError) as error:
            raise UserError(f"{place}: {error}") from None
    if not dialogs:
        raise UserError(f"--prompts_file {path} holds no prompt")
    return dialogs


def _dialog(row):
    """What a row of a file of prompts stands for. Other keys, such as an expected answer, are not read."""
    if "system" in row:
        raise UserError('"system" is not read here: put it under "messages", or use --system')
    text = row.get("prompt", row.get("instruction"))
    if "messages" not in row and not isinstance(text, str):
        raise UserError('expected an object with "prompt", "instruction" or "messages"')
    question = [{"role": "user", "content": text, "input": row.get("input", "")}]
    messages = read_messages(row.get("messages", question))
    check_last(messages, "user", "tool", "assistant")
    adapter = row.get("adapter")
    if not isinstance(adapter, str | None):
        raise UserError(f'"adapter" must be a name, it is {adapter!r}')
    return Dialog(messages, read_tools(row.get("tools")), adapter=adapter)


if __name__ == "__main__":
    cli.run(main, settings)
