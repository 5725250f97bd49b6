"""Make a model folder: download one, convert a foreign format, or merge an adapter into its base. Or make a GGUF file.

    python convert_hf_checkpoint.py --repo_id mistralai/Mistral-7B-v0.1
    python convert_hf_checkpoint.py --source model.Q4_K_M.gguf
    python convert_hf_checkpoint.py --source checkpoints/my --add_tokens "[<|tool|>]" --out_dir checkpoints/larger
    python convert_hf_checkpoint.py --adapter_dir out/RUN/final
    python convert_hf_checkpoint.py --adapter_dir out/RUN/final --out_file model.gguf --dtype q8_0
    python convert_hf_checkpoint.py --adapter_dir "[out/a/final,out/b/final]" --combine ties --weights "[1,1]" \\
        --density 0.5 --out_dir combined

A Hugging Face folder with safetensors is a model folder as it stands: it is only checked. pytorch_model*.bin (unpickled
as weights only), GGUF, and Meta's and Mistral's consolidated* are written as safetensors. Everything goes one tensor at
a time, so a model need not fit into memory, and a folder or file appears when it is complete or not at all.
"""

import contextlib
import dataclasses
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shell import cli
from shell.cli import UserError


@dataclass
class Settings:
    """Make a model folder: download a model, convert a file or folder, or merge an adapter into its base.

    Args:
        repo_id: To download: a model on Hugging Face's hub, such as mistralai/Mistral-7B-v0.1. A gated one needs a
            token in the environment variable HF_TOKEN.
        revision: Branch, tag or commit of repo_id, if not the newest.
        source: To convert: a folder with safetensors, pytorch_model*.bin, or consolidated* and params.json, or a .gguf
            file. With adapter_dir: the base model, if not the one that the adapter names.
        adapter_dir: To merge: a LoRA adapter, onetune's or PEFT's. With combine: a list of them.
        combine: How several adapters over one base become one, which is written to out_dir (weights/combine.py).
        weights: To combine: a weight for each adapter; one below 0 takes away what it does.
        density: With ties, dare and magnitude_prune: the share of values that is kept.
        majority_sign: With ties: whether the sum of the values decides on their sign ("total", the default) or how
            many of them have it ("frequency").
        svd_rank: With svd: the rank of the result; the largest of the adapters' if not given.
        seed: With dare: of the values that are dropped; 0 if not given.
        text: To combine: a text file, on whose beginning the result is compared with each adapter and with the base.
        quantize: How the base was quantised when the adapter was trained, if not as the adapter's onetune.json says.
        add_tokens: With source and out_dir: tokens to add to the vocabulary, such as ["<|tool|>","<|end_tool|>"].
            Embedding and head get a row for each, the mean of the old ones.
        add_special: Whether they are special tokens, which templates alone may hold; false: a user's text too.
        out_dir: Folder to write; by default checkpoints/REPO_ID, checkpoints/NAME or ADAPTER_DIR-merged.
        out_file: To write a .gguf file, which llama.cpp loads, instead of a folder: its name.
        dtype: Dtype of the weights written. "auto" is that of the source (float16 if it is quantised), and float32 for
            a merged model: rounding to 16 bits loses a part of what the adapter learnt (it is measured and printed).
            q8_0 and q4_0 (8.5 and 4.5 bits a weight) go with out_file.
    """

    repo_id: str | None = None
    revision: str | None = None
    source: Path | None = None
    adapter_dir: list[Path] | Path | None = None
    combine: Literal[cli.table_keys("weights/combine.py", "COMBINATIONS")] | None = None
    weights: list[float] | None = None
    density: float | None = None
    majority_sign: Literal["total", "frequency"] | None = None
    svd_rank: int | None = None
    seed: int | None = None
    text: Path | None = None
    quantize: Literal[*cli.table_keys("quantize.py", "QUANTIZERS"), "none"] | cli.JsonFile | None = None
    add_tokens: list[str] | None = None
    add_special: bool = True
    out_dir: Path | None = None
    out_file: Path | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16", "q8_0", "q4_0"] = "auto"

    def __post_init__(self):
        if (self.repo_id is None) == (self.source is None and self.adapter_dir is None):
            raise UserError("give one of --repo_id (to download), --source (to convert) and --adapter_dir (to merge)")
        if self.repo_id is not None and not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", self.repo_id):
            raise UserError(f"--repo_id {self.repo_id}: expected ORGANISATION/NAME; a folder or file goes to --source")
        if self.revision is not None and self.repo_id is None:
            raise UserError("--revision goes with --repo_id")
        if self.quantize is not None and self.adapter_dir is None:
            raise UserError("--quantize goes with --adapter_dir: it says how the adapter's base was quantised")
        self._check_combination()
        self._check_added()
        if self.out_file is None:
            if self.dtype in ("q8_0", "q4_0"):
                raise UserError(f"--dtype {self.dtype} goes with --out_file NAME.gguf")
            return
        if self.repo_id is not None or self.out_dir is not None:
            raise UserError("--out_file goes with --source or --adapter_dir, and without --out_dir (download first)")
        if self.out_file.suffix != ".gguf":
            raise UserError(f"--out_file {self.out_file}: the name must end in .gguf")
        cli.check_out_file(self, "out_file")
        if self.out_file.exists():
            raise UserError(f"{self.out_file} exists: remove it, or choose another --out_file")

    def _check_combination(self):
        several = isinstance(self.adapter_dir, list)
        if self.combine is None:
            if several:
                raise UserError("--adapter_dir: several adapters need --combine, which says how they become one")
            for flag in ("weights", "density", "majority_sign", "svd_rank", "seed", "text"):
                if getattr(self, flag) is not None:
                    raise UserError(f"--{flag} goes with --combine")
            return
        if not several or len(self.adapter_dir) < 2 or self.out_dir is None:
            raise UserError("--combine needs --adapter_dir with a list of adapters, such as [a,b], and --out_dir")
        if self.out_file is not None or self.dtype != "auto":
            raise UserError("--combine writes an adapter: --out_file and --dtype go with merging it, in a second step")
        cli.check_numbers(self, "density", above=0, most=1)
        cli.check_numbers(self, "svd_rank", above=0)
        cli.check_numbers(self, "seed", least=0, below=2**63)
        cli.check_files(self, "text")

    def _check_added(self):
        if self.add_tokens is None:
            if not self.add_special:
                raise UserError("--add_special goes with --add_tokens")
            return
        if self.source is None or self.out_dir is None or self.adapter_dir is not None:
            raise UserError("--add_tokens needs --source and --out_dir: it writes the model with a larger vocabulary")
        if not self.add_tokens:
            raise UserError('--add_tokens is empty: give at least one text, such as ["<|tool|>"]')


if __name__ == "__main__":
    settings = cli.parse(Settings)

import torch

from model import Config, Transformer
from quantize import describe_quantization
from shell.files import checked, flush, new_folder, read_json, whole_file, write_json
from shell.progress import bar
from store.cache import address_of
from store.fetch import fetch_folders
from text.added import add_tokens, new_ids
from text.style_templates import save_chat_template
from text.tokenizer import Tokenizer
from text.vocabulary import has_tokenizer
from weights import meta_format
from weights.bin_format import BinWeights
from weights.checkpoint import (
    LEGAL_FILES,
    NOTES,
    SIDE_FILES,
    copy_legal_files,
    copy_side_files,
    find_base,
    model_of,
    read_notes,
    shared_base,
    shared_quantization,
    trained_quantization,
    with_dtype,
    write_model_weights,
)
from weights.combine import Options, check_options
from weights.combine import combine as combine_adapters
from weights.grown import grown, grown_config, grown_shapes
from weights.merge import PROBE_LENGTH, Tuned, compare, describe_distance
from weights.peft_format import save_adapter
from weights.stored import Weights, holds_safetensors

TEXT_LENGTH = 512  # positions of a text on which a combination is compared with what it is made of


def main(s: Settings) -> None:
    """Make the folder or file that the settings ask for, and print the next command."""
    fetch_folders(s)
    if s.out_file is not None:
        write_gguf(s)
        return
    if s.combine is not None:
        print(f"next: python generate.py --adapter_dir {combine(s)}")
        return
    if s.adapter_dir is not None:
        folder = merge(s)
    elif s.repo_id is not None:
        folder = download(s)
    elif s.add_tokens:
        folder = grow(s)
    else:
        folder = convert(s.source, s.out_dir, s.dtype)
    then = "prepare_data.py --data my.jsonl" if s.adapter_dir is None else "generate.py"
    print(f"next: python {then} --checkpoint_dir {address_of(folder)}")


# --------------------------------------------------------------------------------------------------- downloading


def download(s: Settings) -> Path:
    """Download a model from the hub, check it, and convert it if it is in another format. Returns its folder.

    The files go to a hidden folder beside it, in which a download that was cut off continues, and which gets its name
    when all is there.
    """
    import huggingface_hub

    out_dir = s.out_dir or Path("checkpoints", s.repo_id)
    refuse_existing(out_dir)
    with explained_hub_errors(s.repo_id):
        info = huggingface_hub.model_info(s.repo_id, revision=s.revision, files_metadata=True)
    names = files_to_fetch(s.repo_id, {file.rfilename for file in info.siblings})
    size = sum(file.size or 0 for file in info.siblings if file.rfilename in names)
    as_it_stands = s.dtype == "auto" and names[0].startswith("model")
    folder = out_dir.with_name(f".{out_dir.name}.download")
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    print(f"downloading {s.repo_id} to {out_dir}: {len(names)} files, {size / 1e9:.2f} GB")
    with explained_hub_errors(s.repo_id):
        huggingface_hub.snapshot_download(s.repo_id, revision=info.sha, local_dir=folder, allow_patterns=names)
    try:
        convert(folder, None if as_it_stands else out_dir, s.dtype)
    except UserError as error:
        raise UserError(f"{error} (the same command takes what {folder} has: delete it to start afresh)") from None
    if as_it_stands:
        shutil.rmtree(folder / ".cache", ignore_errors=True)  # the hub's notes on how far it is
        for file in folder.iterdir():
            flush(file)
        folder.rename(out_dir)
    else:
        shutil.rmtree(folder)
    return out_dir


def files_to_fetch(repo_id: str, names: set[str]) -> list[str]:
    """Which files of a repository make up a model, weights first: safetensors, else .bin, else consolidated*."""
    for pattern in (r"model[^/]*\.safetensors(\.index\.json)?", r"pytorch_model[^/]*\.bin(\.index\.json)?"):
        weights = sorted(name for name in names if re.fullmatch(pattern, name))
        if weights:
            return weights + [name for name in (*SIDE_FILES, *LEGAL_FILES) if name in names]
    if consolidated := meta_format.files_to_fetch(names):
        return consolidated + [name for name in LEGAL_FILES if name in names]
    other = next((name for name in sorted(names) if name.endswith(".gguf")), None)
    hint = f"download one of its files, such as {other}, and give it to --source" if other else "choose another"
    raise UserError(f"{repo_id} has no model*.safetensors, pytorch_model*.bin or consolidated*: {hint}")


@contextlib.contextmanager
def explained_hub_errors(repo_id: str) -> Iterator[None]:
    """Turn the errors of a download into a UserError: one line that says what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        page = f"accept its licence on https://huggingface.co/{repo_id}"
        raise UserError(f"{repo_id} is gated: {page}, then set HF_TOKEN to a token of that account") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{repo_id} is not on the hub, or private (HF_TOKEN must hold a token that may read)") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{repo_id} has no such --revision") from None
    except Exception as error:  # each library below has its own: no network, no space, cut off
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{repo_id}: download failed ({reason}); the same command continues where it stopped") from None


# ---------------------------------------------------------------------------------------------------- converting


def convert(source: Path, out_dir: Path | None, dtype: str) -> Path:
    """Write the model in `source` to `out_dir`, or only check it where it is a model folder. Returns the folder."""
    in_place = source.is_dir() and out_dir in (None, source) and dtype == "auto" and holds_safetensors(source)
    out_dir = source if in_place else out_dir or Path("checkpoints", source.resolve().name.removesuffix(".gguf"))
    if not in_place:
        refuse_existing(out_dir)
    weights, config, model, write_side_files = open_checked(source)
    shapes = shapes_of(model)
    if in_place:
        with checked(source):
            for name in bar(shapes, "checking"):
                weights.read(name)
        print(f"{source} is a model folder as it stands: nothing to convert")
        return source
    if dtype != "auto":
        config = with_dtype(config, getattr(torch, dtype))
    layout = {name: (target_dtype(weights, name, dtype), shape) for name, shape in shapes.items()}
    hashes = {}
    with new_folder(out_dir, hashes) as folder:
        hashes |= write(folder, model.config, layout, lambda name: weights.read(name).to(layout[name][0]))
        write_side_files(folder)
        copy_legal_files(source, folder)
        write_json(folder / "config.json", config)
    print(f"wrote {out_dir}: {describe(layout)}")
    return out_dir


def grow(s: Settings) -> Path:
    """Write the model in --source with tokens added to its vocabulary. Returns its folder."""
    refuse_existing(s.out_dir)
    weights, config, model, write_side_files = open_checked(s.source)
    with tempfile.TemporaryDirectory() as place:
        write_side_files(Path(place))
        write_json(Path(place, "config.json"), config)
        ids, tokens = (
            new_ids(open_tokenizer(Path(place), s.source).folder, s.add_tokens),
            Tokenizer(Path(place)).vocab_size,
        )
    rows = max(model.config.vocab_size, tokens + len(ids))
    try:
        config = grown_config(config, rows)
    except ValueError as error:
        raise UserError(f"{s.source}: --add_tokens: {error}") from None
    config = config if s.dtype == "auto" else with_dtype(config, getattr(torch, s.dtype))
    shapes, read = grown_shapes(shapes_of(model), rows), grown(weights.read, tokens, rows)
    layout = {name: (target_dtype(weights, name, s.dtype), shape) for name, shape in shapes.items()}
    hashes, larger = {}, dataclasses.replace(model.config, vocab_size=rows)
    with new_folder(s.out_dir, hashes) as folder, checked(s.source):
        hashes |= write(folder, larger, layout, lambda name: read(name).to(layout[name][0]))
        write_side_files(folder)
        copy_legal_files(s.source, folder)
        write_json(folder / "config.json", config)
        add_tokens(folder, ids, s.add_special)
        Tokenizer(folder)  # it is read as it will be
    named = ", ".join(f"{text} {id}" for text, id in ids.items())
    print(f"wrote {s.out_dir}: {rows} rows (they were {model.config.vocab_size}), with {named}")
    return s.out_dir


def open_checked(source: Path) -> tuple[Weights, dict, Transformer, Callable[[Path], None]]:
    """What `open_source` returns, checked, with the model of `check` as third. Prints what is read."""
    weights, config, write_side_files = open_source(source)
    weights, config, model = check(weights, config, source)
    sizes = [torch.Size(shape).numel() for shape in shapes_of(model).values()]
    count = f"{sum(sizes) / 1e6:,.1f} million parameters in {len(sizes)} tensors"
    print(f"reading {source}: {config['model_type']}, {count}")
    return weights, config, model, write_side_files


def shapes_of(model: Transformer) -> dict[str, tuple]:
    """The shapes of a model's parameters, by name."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def open_source(source: Path) -> tuple[Weights, dict, Callable[[Path], None]]:
    """The weights in `source`, its config.json as a dict, and a function that writes its other files to a folder."""
    if source.is_dir():
        if not holds_safetensors(source) and not any(source.glob("pytorch_model*.bin")):
            if meta_format.find_folder(source) is not None:
                return meta_format.open_folder(source)
            beside = ", ".join(sorted(path.name for path in source.glob("*.safetensors")))
            beside = f"; {beside} is no model in this format" if beside else " (a .gguf is given as a file)"
            raise UserError(f"{source} holds neither *.safetensors nor pytorch_model*.bin{beside}")
        weights = Weights(source) if holds_safetensors(source) else BinWeights(source)
        check_tokenizer(source)
        return weights, read_json(source / "config.json"), lambda folder: copy_side_files(source, folder)
    if not source.is_file():
        raise UserError(f"--source {source} does not exist")
    if source.suffix != ".gguf":
        raise UserError(f"--source {source}: expected a folder or a .gguf file")
    from weights import gguf_format

    weights = gguf_format.GGUFWeights(source)
    return weights, gguf_format.config_json(weights), lambda folder: gguf_format.write_tokenizer(weights, folder)


def check(weights: Weights, config: dict, where: Path) -> tuple[Weights, dict, Transformer]:
    """The weights under the decoder's names, the config.json to write, and the model without memory.

    Raises UserError if the config.json is not supported or the weights differ from what it asks for.
    """
    try:
        config, model, weights = model_of(config, weights)
    except ValueError as error:
        raise UserError(f"{where}: config.json: {error}") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return weights, config, model


def check_tokenizer(folder: Path) -> None:
    """Raise UserError if the tokenizer in a folder cannot be read; a folder may have none."""
    if has_tokenizer(folder):
        Tokenizer(folder)
    else:
        files = "tokenizer.json, tokenizer.model, or vocab.json with merges.txt"
        print(f"note: {folder} has no {files}: copy the model's there before you use it")


def refuse_existing(folder: Path) -> None:
    """Raise UserError if the folder to write is there and not empty."""
    if folder.is_file() or folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} exists: remove it, or choose another --out_dir")


def target_dtype(weights: Weights, name: str, dtype: str) -> torch.dtype:
    """The dtype to write a tensor in: as --dtype says, or as it is stored."""
    return weights.dtypes[name] or torch.float32 if dtype == "auto" else getattr(torch, dtype)


def write(folder: Path, config: Config, layout: dict, read: Callable[[str], torch.Tensor]) -> dict[str, str]:
    """`write_model_weights` with a progress bar."""
    with bar(total=len(layout), what="writing") as progress:
        return write_model_weights(folder, config, layout, lambda name: progress.update() or read(name))


def describe(layout: dict[str, tuple[torch.dtype, tuple]]) -> str:
    """In words: how many tensors, of which dtypes and size."""
    size = sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in layout.values())
    dtypes = {str(dtype).removeprefix("torch.") for dtype, _ in layout.values()}
    return f"{len(layout)} tensors, {' and '.join(sorted(dtypes))}, {size / 1e9:.2f} GB"


# ------------------------------------------------------------------------------------------------------- merging


def merge(s: Settings) -> Path:
    """Write base and adapter as one model. Returns its folder."""
    notes, out_dir = read_notes(s.adapter_dir), s.out_dir or Path(f"{s.adapter_dir}-merged")
    if s.out_dir is None and address_of(s.adapter_dir) != str(s.adapter_dir):
        raise UserError(f"--adapter_dir {address_of(s.adapter_dir)} needs --out_dir: there is no folder beside it here")
    refuse_existing(out_dir)
    base, tuned, config, shapes, write_side_files = open_tuned(s)
    dtype = torch.float32 if s.dtype == "auto" else getattr(torch, s.dtype)
    config = with_dtype(config, dtype)
    layout = {name: (dtype, shape) for name, shape in shapes.items()}
    hashes = {}
    with new_folder(out_dir, hashes) as folder, checked(base):
        rounding, written = write_merged(tuned, layout, folder)
        hashes |= written
        write_side_files(folder)
        print(write_chat_template(folder, s.adapter_dir, notes.get("prompt_style")))
        write_json(folder / "config.json", config)
        if notes:
            kept = {key: value for key, value in notes.items() if key not in ("quantize", "checkpoint_dir")}
            write_json(folder / NOTES, kept)
        print(f"rounding to {config['torch_dtype']} moves weights by {rounding:.2%} of what the adapter changed")
        compare(tuned, Tuned(config, Weights(folder)))
    print(f"wrote {out_dir}: {describe(layout)}")
    return out_dir


def open_tuned(s: Settings) -> tuple[Path, Tuned, dict, dict[str, tuple], Callable[[Path], None]]:
    """The base's path, base and adapter, and of the merged model: config.json, shapes, how its side files are written.

    Those are the base's, without the chat template that goes with the adapter.
    """
    base = s.source or find_base(s.adapter_dir)
    quantize = trained_quantization(s.adapter_dir, s.quantize)
    weights, config, write_side_files = open_source(base)
    _, config, model = check(weights, config, base)
    shapes = shapes_of(model)
    tuned = Tuned(config, weights, quantize, s.adapter_dir)
    stored = f" in {describe_quantization(tuned.quantization)}" if tuned.quantization else ""
    print(f"reading {base}{stored} and {len(tuned.tensors)} adapters in {s.adapter_dir}")
    config = tuned.merged_config(config)
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    return base, tuned, config, shapes, write_side_files


def write_chat_template(folder: Path, adapter_dir: Path, style: str | None) -> str:
    """Give the merged model the chat template that goes with the adapter. Returns a line for the user.

    That is the template of the style it was trained in; of an adapter that does not say its style, its own if it has
    one. It goes to chat_template.jinja, which all programs prefer to the key in tokenizer_config.json.
    """
    if style is not None or not has_tokenizer(folder):
        return save_chat_template(folder, style)
    if not (tokenizer := Tokenizer(folder)).take_chat_template(adapter_dir):
        return save_chat_template(folder, style)
    config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    if config.pop("chat_template", None):
        write_json(folder / "tokenizer_config.json", config)
    if tokenizer.chat_template:
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
    if tokenizer.tool_template:
        (folder / "additional_chat_templates").mkdir(exist_ok=True)
        path = folder / "additional_chat_templates" / "tool_use.jinja"
        path.write_text(tokenizer.tool_template, encoding="utf-8")
    return f"chat template: that of {adapter_dir}"


@torch.no_grad()
def write_merged(tuned: Tuned, layout: dict, folder: Path) -> tuple[float, dict[str, str]]:
    """Write each weight with its adapter merged into it.

    Returns how much rounding to `layout`'s dtypes changed them, |rounded - merged| / |merged - base| over the adapted
    weights (Euclidean norms), and the hashes of the files.
    """
    changed = rounded = 0.0

    def read(name):
        nonlocal changed, rounded
        dtype, (weight, before) = layout[name][0], tuned.merged(name)
        if before is not None:
            changed += (weight - before).square().sum().item()
            rounded += (weight - weight.to(dtype).float()).square().sum().item()
        return weight.to(dtype)

    hashes = write(folder, tuned.model.config, layout, read)
    return (rounded / changed) ** 0.5 if changed else 0.0, hashes


# ------------------------------------------------------------------------------------------------------ combining


def combine(s: Settings) -> Path:
    """Write several adapters as one. Returns its folder."""
    flags = {flag: getattr(s, flag) for flag in ("density", "majority_sign", "svd_rank", "seed")}
    check_options(s.combine, s.weights, flags, len(s.adapter_dir))
    refuse_existing(s.out_dir)
    folders = {str(folder): folder for folder in s.adapter_dir}
    base = s.source or shared_base({name: find_base(folder) for name, folder in folders.items()}, "source")
    quantize = shared_quantization(folders, s.quantize)
    stored, config, _ = open_source(base)
    weights, config, model = check(stored, config, base)
    options = Options(s.density, s.majority_sign or "total", s.svd_rank, torch.Generator().manual_seed(s.seed or 0))
    print(f"reading {base} and {len(s.adapter_dir)} adapters: {', '.join(map(str, s.adapter_dir))}")
    adapter = combine_adapters(model, weights, s.adapter_dir, s.combine, s.weights, options)
    tokens = probe_tokens(s.text, base, model.config)
    with new_folder(s.out_dir) as folder, checked(base):
        save_adapter(model, adapter, folder, base)
        write_json(folder / NOTES, shared_notes(list(folders.values()), base, quantize))
        ours = Tuned(config, stored, quantize, folder).logits(tokens)
        for name in (*folders, None):
            one = Tuned(config, stored, quantize, name).logits(tokens)
            whose = f"base + {name}" if name else "the base"
            print(f"combined against {whose}, {tokens.size(1)} positions: {describe_distance(one, ours)}")
    print(f"wrote {s.out_dir}: {s.combine} of {len(s.adapter_dir)} adapters, of rank {adapter.r}")
    return s.out_dir


def shared_notes(folders: list[Path], base: Path, quantize: str | dict | None) -> dict:
    """What onetune.json says of the combination of adapters: their prompt style, if they were trained in one."""
    each = [{key: notes.get(key) for key in ("prompt_style", "template_args")} for notes in map(read_notes, folders)]
    style = {key: value for key, value in each[0].items() if value is not None}
    if any(one != each[0] for one in each):
        styles = ", ".join(str(one["prompt_style"]) for one in each)
        print(f"note: the adapters were trained in different prompt styles ({styles}): say one with --prompt_style")
        style = {}
    return style | {"checkpoint_dir": address_of(base), "quantize": quantize}


def probe_tokens(text: Path | None, base: Path, config: Config) -> torch.Tensor:
    """The tokens (1, T) on which models are compared: of a text, or spread over the vocabulary."""
    if text is None:
        return torch.linspace(0, config.vocab_size - 1, PROBE_LENGTH).long()[None]
    tokenizer = open_tokenizer(base, base)
    try:
        ids = [*tokenizer.begin_ids, *tokenizer.encode(text.read_text(encoding="utf-8"))]
    except UnicodeDecodeError as error:
        raise UserError(f"--text {text}: not UTF-8 text: {error.reason}") from None
    if not ids:
        raise UserError(f"--text {text} is empty")
    return torch.tensor([ids[: min(TEXT_LENGTH, config.max_position_embeddings)]])


# ---------------------------------------------------------------------------------------------------------- GGUF


def write_gguf(s: Settings) -> None:
    """Write a model, with the adapter merged into it if there is one, as a .gguf file."""
    from weights import gguf_format, gguf_writing

    if s.adapter_dir is None:
        base, tuned = s.source, None
        weights, config, model, write_side_files = open_checked(base)
        shapes = shapes_of(model)
        dtypes, read = {name: target_dtype(weights, name, "auto") for name in shapes}, weights.read
    else:
        base, tuned, config, shapes, write_side_files = open_tuned(s)
        dtypes, read = dict.fromkeys(shapes, torch.float32), lambda name: tuned.merged(name)[0]
    layout = gguf_writing.plan(shapes, dtypes, s.dtype, tied=bool(config.get("tie_word_embeddings")))
    s.out_file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(s.out_file) as file, checked(base), tempfile.TemporaryDirectory() as folder:
        write_side_files(Path(folder))
        write_json(Path(folder, "config.json"), config)
        if tuned:
            print(write_chat_template(Path(folder), s.adapter_dir, read_notes(s.adapter_dir).get("prompt_style")))
        tokenizer = open_tokenizer(Path(folder), base)
        with bar(total=len(layout), what="writing") as progress:
            gguf_writing.write_gguf(file, config, layout, lambda name: progress.update() or read(name), tokenizer)
        if tuned:
            written = gguf_format.GGUFWeights(file)
            compare(tuned, Tuned(gguf_format.config_json(written), written))
    print(f"wrote {s.out_file}: {gguf_writing.describe(layout)}")


def open_tokenizer(folder: Path, base: Path) -> Tokenizer:
    """The tokenizer in a folder of a model's side files. Raises UserError, which names `base`, if there is none."""
    if not has_tokenizer(folder):
        raise UserError(f"{base} has no tokenizer.json or tokenizer.model: copy the model's there")
    return Tokenizer(folder)


if __name__ == "__main__":
    cli.run(main, settings)
