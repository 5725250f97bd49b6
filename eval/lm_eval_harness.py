"""lm-eval's tasks (EleutherAI's Evaluation Harness) on a model, quantised or not, with an adapter or without.

    python eval/lm_eval_harness.py --adapter_dir out/RUN/final --eval_tasks "[truthfulqa_mc2,hellaswag]"

Needs requirements-eval.txt. Log-likelihoods and texts come from inference/; prompts, expected answers and metrics are
lm-eval's own. Where all tasks and their data are local files (`--include_path`), the network is not used.
"""

import difflib
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":  # the project's folder in place of this one, wherever it is started from
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from shell import cli
from shell.cli import UserError

import yaml  # isort: skip (after cli, which explains a missing one)

FILE_FORMATS = ("arrow", "csv", "json", "pandas", "parquet", "text")  # `dataset_path`s that stand for local files


@dataclass
class Settings:
    """The command line.

    Args:
        eval_tasks: Names of tasks, groups or tags, or patterns such as mmlu_*.
        checkpoint_dir: Model folder; if not given, the one that the adapter was trained on.
        adapter_dir: Adapter to put over the model.
        quantize: Keep the weights in 4 or 8 bits, or each layer as in a file written by eval/quality.py --sensitivity;
            "none" for not at all. If not given, as the adapter was trained.
        precision: Dtype of the other weights and of the computation.
        save_filepath: JSON file for the results.
        num_fewshot: Examples before each question; if not given, as many as the task says.
        limit: Measure on so many samples of each task.
        include_path: Folder with more tasks, YAML files in lm-eval's format.
        batch_tokens: Positions in the model at one time where continuations are scored.
        batch_size: Prompts that are answered at one time.
        bootstrap_iters: Resamplings for the standard error of metrics that have no formula for it; 0 for no errors.
        apply_chat_template: Render questions in the prompt style of the training, or the checkpoint's own.
        prompt_style: With apply_chat_template, the style to render questions in instead.
        seed: Of the sampling, where a task samples.
    """

    eval_tasks: list[str]
    checkpoint_dir: Path | None = None
    adapter_dir: Path | None = None
    quantize: Literal[*cli.table_keys("quantize.py", "QUANTIZERS"), "none"] | cli.JsonFile | None = None
    precision: Literal["32-true", "bf16-true", "16-true"] = "bf16-true"
    save_filepath: Path | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    include_path: Path | None = None
    batch_tokens: int = 2048
    batch_size: int = 16
    bootstrap_iters: int = 100_000
    apply_chat_template: bool = False
    prompt_style: Literal[cli.table_keys("text/prompts.py", "STYLES")] | None = None
    seed: int = 1337

    def __post_init__(self):
        cli.check_model(self)
        if not self.eval_tasks:
            raise UserError("--eval_tasks: name at least one")
        if self.include_path is not None and not self.include_path.is_dir():
            raise UserError(f"--include_path {self.include_path}: no such folder")
        cli.check_out_file(self, "save_filepath")
        if self.prompt_style is not None and not self.apply_chat_template:
            raise UserError("--prompt_style has no effect without --apply_chat_template")
        cli.check_numbers(self, "batch_tokens", "batch_size", "limit", above=0)
        cli.check_numbers(self, "num_fewshot", "bootstrap_iters", least=0)
        cli.check_numbers(self, "seed", least=0, below=2**63)
        cli.check_installed("lm_eval")


def only_local(s: Settings) -> bool:
    """Whether every task is one of the YAML files under --include_path and its data are local files, too."""
    names = set()
    for path in sorted(s.include_path.rglob("*.yaml")) if s.include_path else ():
        keys, _ = read_task_file(path)
        dataset = keys.get("dataset_path", FILE_FORMATS[0])
        if (dataset not in FILE_FORMATS and not Path(dataset).exists()) or "://" in path.read_text("utf-8", "replace"):
            return False
        names.add(keys.get("task"))
    return names.issuperset(s.eval_tasks)


def read_task_file(path: Path) -> tuple[dict[str, str], str | None]:
    """The plain values at the top level of a task's YAML file, and what is wrong with the file, None if nothing is.

    No `!function` tag in it is run.
    """
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    except (OSError, RecursionError, ValueError, yaml.YAMLError) as error:
        return {}, " ".join(str(error).split())
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return {key.value: value.value for key, value in pairs if isinstance(value, yaml.ScalarNode)}, None


if __name__ == "__main__":
    settings = cli.parse(Settings)
    if only_local(settings):  # set before the libraries are imported that read these variables
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    if not sys.stderr.isatty():  # lm-eval's own bars
        os.environ.setdefault("TQDM_DISABLE", "1")

import jinja2
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table

import generate
from inference import sampling
from inference.scoring import rolling, score
from inference.writer import Writer
from shell import files
from shell.progress import bar
from store.cache import address_of
from store.fetch import fetch_folders
from text.messages import read_messages
from text.prompts import prompt_text
from tracking.results import record_result


def main(s: Settings) -> None:
    """Run the tasks, print lm-eval's tables, and write its results to --save_filepath."""
    fetch_folders(s)
    manager, tasks = find_tasks(s)
    writer = Writer(s.checkpoint_dir, s.adapter_dir, s.quantize, s.precision, s.prompt_style)
    model = OnetuneLM(writer, s.batch_tokens, s.batch_size, s.seed, chat=s.apply_chat_template)
    results = evaluate(s, model, manager, tasks)
    given = {name: address_of(value) if isinstance(value, Path) else value for name, value in asdict(s).items()}
    results["config"] |= given
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    if s.save_filepath:
        s.save_filepath.parent.mkdir(parents=True, exist_ok=True)
        with files.whole_file(s.save_filepath) as temporary:
            text = json.dumps(results, indent=2, ensure_ascii=False, default=handle_non_serializable)
            temporary.write_text(text + "\n", encoding="utf-8")
    record_result(s.adapter_dir or s.checkpoint_dir, "lm_eval", "", metrics_of(results), vars(s))


def metrics_of(results: dict) -> dict[str, float]:
    """The metrics of all tasks and groups by names such as gsm8k/exact_match, with the filter if it has a name."""
    found = {}
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            name, _, filtered = key.partition(",")
            if isinstance(value, int | float) and "," in key and not name.endswith("_stderr"):
                found[f"{task}/{name}" + (f"/{filtered}" if filtered != "none" else "")] = value
    return found


def evaluate(s: Settings, model: "OnetuneLM", manager: TaskManager, tasks: list) -> dict:
    """lm-eval's results, as a dict."""
    try:
        return simple_evaluate(
            model,
            tasks=tasks,
            task_manager=manager,
            num_fewshot=s.num_fewshot,
            limit=s.limit,
            bootstrap_iters=s.bootstrap_iters,
            apply_chat_template=s.apply_chat_template,
            log_samples=False,
        )
    except jinja2.TemplateError as error:  # on a later sample: the first one was tried when the task was loaded
        raise UserError(f"--eval_tasks: a template of the task fails on one of its samples: {error}") from error


# --------------------------------------------------------------------------------------------------------------- tasks


def find_tasks(s: Settings) -> tuple[TaskManager, list]:
    """lm-eval's `TaskManager`, and the tasks and groups of --eval_tasks, loaded with their data."""
    local = only_local(s)
    if not local:
        print("reading the index of lm-eval's tasks", file=sys.stderr)
    manager = TaskManager(include_path=s.include_path, include_defaults=not local)
    tasks = []
    for wanted in s.eval_tasks:
        names = manager.match_tasks([wanted])
        if not names:
            raise UserError(_unknown(wanted, manager.all_tasks, s.include_path))
        for name in names:
            loaded = _load(manager, name)
            tasks += [loaded["groups"][name]] if name in loaded["groups"] else loaded["tasks"].values()
    for name, task in _load(manager, tasks)["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            what = "runs the code that a model writes" if getattr(task, "UNSAFE_CODE", False) else "needs images"
            raise UserError(f"--eval_tasks {name}: it {what}, which is not supported")
    return manager, tasks


def _load(manager, wanted):
    try:
        return manager.load(wanted)
    except Exception as error:  # missing data, a template that fails, the network: errors of any type
        name = f" {wanted}" if isinstance(wanted, str) else ""
        raise UserError(f"--eval_tasks{name} cannot be loaded: {type(error).__name__}: {error}") from error


def _unknown(wanted, names, include_path):
    """One line on a name that no task has: names that are spelt like it, and task files that could not be read."""
    close = difflib.get_close_matches(wanted, names, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "python -m lm_eval ls tasks lists all"
    for path in sorted(include_path.rglob("*.yaml")) if include_path else ():
        _, wrong = read_task_file(path)
        hint += f"; {path} cannot be read: {wrong}" if wrong else ""
    return f"--eval_tasks {wanted}: no task, group or tag of this name, {hint}"


# --------------------------------------------------------------------------------------------------------------- model


class OnetuneLM(TemplateLM):
    """lm-eval's interface to a model, for the model of a `Writer`.

    Texts are encoded as by lm-eval's `hf` model, so that results can be compared: special tokens written out in a text
    become special tokens.
    batch_tokens, batch_size, seed: as in `Settings`. chat: prompts are rendered by `apply_chat_template`.
    """

    max_gen_toks = 256  # where a task names no number; as in lm-eval's other models

    def __init__(
        self, writer: Writer, batch_tokens: int = 2048, batch_size: int = 16, seed: int = 1337, chat: bool = False
    ):
        super().__init__()
        self.writer, self.batch_tokens, self.batch_size, self.seed = writer, batch_tokens, batch_size, seed
        self.chat, self._tokenizer = chat, writer.tokenizer
        self.max_length = writer.model.config.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The id that is put before a text without a context."""
        return self._tokenizer.eos_id if self._tokenizer.bos_id is None else self._tokenizer.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text, after BOS if the tokenizer adds it, unless `add_special_tokens` is False."""
        # A space that the text begins with takes the place of SentencePiece's dummy prefix, as in transformers 5.
        ids = self._tokenizer.encode(string, special=True, start=not string.startswith(" "))
        return ids if add_special_tokens is False else self._tokenizer.with_begin(ids)

    @property
    def tokenizer_name(self) -> str:
        """For the keys of lm-eval's caches."""
        return f"{self._tokenizer.folder} {self.writer.style}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The name of the prompt style, for lm-eval's records."""
        return self.writer.style if chat_template else None

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        """A dialog as one text, up to where the answer begins."""
        messages = read_messages(chat_history)
        return prompt_text(self._tokenizer, messages, self.writer.style, self.writer.template_args)

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **_):
        pairs = [(context or [self.prefix_token_id], continuation) for _, context, continuation in requests]
        with _bar("scoring", len(pairs), disable_tqdm) as bar:
            return [tuple(result) for result in score(self.writer.model, pairs, self.batch_tokens, bar.update)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of the whole text of each request."""
        texts = [self.tok_encode(request.args[0]) for request in requests]
        windows = sum(-(-len(text) // self.max_length) for text in texts)
        with _bar("reading", windows, disable_tqdm) as bar:
            return rolling(
                self.writer.model, texts, self.prefix_token_id, batch_tokens=self.batch_tokens, progress=bar.update
            )

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text generated for each request; those with the same settings are generated together."""
        texts, groups = [""] * len(requests), {}  # groups: {settings as JSON: numbers of requests}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        with _bar("answering", len(requests), disable_tqdm) as bar:
            for numbers in groups.values():
                settings, stop_ids = self._sampling(requests[numbers[0]].args[1])
                room = self.max_length - settings.max_new_tokens
                prompts = [self._prompt(requests[number].args[0])[-room:] for number in numbers]
                replies = [sampling.Reply(self._tokenizer, stop_ids, settings.stop) for _ in numbers]
                sampling.generate_all(self.writer.decoder, prompts, replies, settings, bar.update)
                for number, reply in zip(numbers, replies, strict=True):
                    texts[number] = reply.text
        return texts

    def _prompt(self, context):
        if self.chat and self._tokenizer.has_prefix:  # the answer's first token has this space in it, as in training
            context = context.removesuffix(" ")
        return self.tok_encode(context) or [self.prefix_token_id]

    def _sampling(self, gen_kwargs):
        """`generate.Settings` for lm-eval's generation kwargs, and the ids that end an answer."""
        given = normalize_gen_kwargs(gen_kwargs, self.max_gen_toks)
        until, tokens = [text for text in given.pop("until") if text], given.pop("max_gen_toks")
        temperature = given.pop("temperature", 0.0)
        options = {"temperature": temperature if given.pop("do_sample") else 0.0}
        options |= {name: given.pop(name) for name in ("top_k", "top_p", "repetition_penalty") if name in given}
        if given.pop("num_beams", 1) != 1 or given:
            raise UserError(
                f"generation_kwargs {gen_kwargs}: of these {', '.join(given) or 'num_beams'} is not supported"
            )
        if not 0 < tokens < self.max_length:
            raise UserError(
                f"max_gen_toks {tokens}: must be above 0 and below the model's context of {self.max_length}; "
                "set it under generation_kwargs in the task's file"
            )
        settings = generate.Settings(
            checkpoint_dir=self._tokenizer.folder, max_new_tokens=tokens, stop=until, batch_size=self.batch_size,
            seed=self.seed, **options,
        )  # fmt: skip
        ends = [self._tokenizer.split(text, special=True) for text in until]
        special = {
            parts[0] for parts in ends if len(parts) == 1 and isinstance(parts[0], int)
        }  # no text is made of them
        return settings, special | (self.writer.stop_ids if self.chat else self._tokenizer.eos_ids)


def _bar(name, total, disable):
    """A progress bar, if standard error is a terminal."""
    return bar(total=total, what=name, shown=not disable)


if __name__ == "__main__":
    cli.run(main, settings)
