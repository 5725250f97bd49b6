"""The folder of a run: what it records, its checkpoints, one process at a time, disk space, what must match to resume.

`s` is always the Settings of finetune.py. A checkpoint is a folder `step-NNNNNN` that `files.new_folder` wrote.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml

from adapters.adapter import adapters
from quantize import describe_quantization
from shell.cli import ROOT, UserError
from shell.files import (
    check_manifest,
    clear_leftovers,
    hash_of_pieces,
    new_folder,
    project_version,
    read_json,
    remove_folder,
    whole_file,
    write_json,
)
from shell.process import SIGNALS, is_first, is_restarted, signals_handled
from store.cache import address_of
from store.publish import check_address, publish
from text.style_templates import save_chat_template
from tracking.record import record_session
from tracking.run_files import CONFIG, DIFF, FINAL, METRICS, SOURCE, hashes_of_data
from training.from_settings import DTYPES
from training.offload import STATE_BYTES
from training.optimizer import moment_bytes, weights_to_keep
from training.parallel import saving
from training.parallel.saving import shared_folder
from weights import peft_format
from weights.checkpoint import NOTES, read_config, save_model, save_optimizer
from weights.stored import INDEX, shard_paths

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from model import Transformer
    from training.build import Run
    from training.metrics import Metrics
    from training.settings import Settings

SETTINGS, RUN = "settings.json", "run.json"  # in a checkpoint: the command line; identity, time budget, version
HARMLESS = (  # settings that a resumed run may change; for the folders their contents are compared instead
    "resume", "save_interval", "eval_interval", "keep_last", "keep_best", "out_dir", "plan", "plan_tflops", "plan_link",
    "memory_budget", "checkpoint_dir", "data_dir", "data_cache", "logger", "log_adapter", "publish", "sweep",
    "forgetting_source", "teacher_dir", "devices", "nodes", "parallel", "shard",
)  # fmt: skip
SMALL_FILES = 20 * 10**6  # bytes: source, metrics, plot, tokenizer files
WRITTEN = ("step-*", FINAL, SOURCE, "*.csv", CONFIG, "*.json", DIFF, "loss.png")
NO_SOURCE = ("tests", "bench", "eval", "search", "publishing", "flows")  # folders of code that a run does not use


def source_files() -> list[Path]:
    """The code that a run keeps a copy of: paths relative to the project's folder."""
    files = [*ROOT.glob("*.py"), ROOT / "pyproject.toml"]
    for folder in [path.parent for path in ROOT.glob("*/__init__.py") if path.parent.name not in NO_SOURCE]:
        files += [path for path in folder.rglob("*") if path.suffix in (".py", ".cpp", ".h", ".cu", ".html", ".js")]
    return sorted(path.relative_to(ROOT) for path in files if path.is_file())


def plain(s: Settings) -> dict:
    """The settings as plain values for JSON and YAML; folders of the cache by the addresses they came from."""
    return {name: address_of(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(s).items()}


@contextlib.contextmanager
def only_process(out_dir: Path) -> Iterator[None]:
    """Lock a run folder. It is made if it is not there, and what a killed process left half-written is removed.

    Raises UserError if another process has it.
    """
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(f"--out_dir {out_dir} is a file: choose another")
    out_dir.mkdir(parents=True, exist_ok=True)
    if not is_first():
        yield
        return
    with _locked(out_dir):
        try:
            clear_leftovers(out_dir, WRITTEN)
            yield
        finally:
            with contextlib.suppress(OSError):
                out_dir.rmdir()  # if nothing was written


@contextlib.contextmanager
def _locked(folder):
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{folder} is in use by another process: wait for it, or choose another") from None
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def signals_noted() -> Iterator[list[int]]:
    """The first SIGTERM or SIGINT is only added to the list that this yields; the second ends the process at once."""
    noted = []

    def note(number, frame):
        noted.append(number)
        for each in SIGNALS:
            if signal.getsignal(each) is note:
                signal.signal(each, signal.SIG_DFL)

    with signals_handled(note):
        yield noted


# ------------------------------------------------------------------------------------------------ what a run writes


def record_run(s: Settings, newest: Path | None, identity: dict[str, str]) -> None:
    """Keep what runs: the resolved settings, which --config takes, and a copy of the code, of a run that begins.

    Of each session, as also of one that goes on from the checkpoint `newest`: when and where (tracking/record.py).
    """
    with explained_write_errors(s.out_dir):
        if not newest:
            with new_folder(s.out_dir / SOURCE) as folder:
                for path in source_files():
                    (folder / path.parent).mkdir(parents=True, exist_ok=True)
                    shutil.copy(ROOT / path, folder / path)
            with whole_file(s.out_dir / CONFIG) as file:
                file.write_bytes(yaml.safe_dump(plain(s), sort_keys=False).encode())
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        record_session(s.out_dir, identity, gpus, step_of(newest))


def save_checkpoint(run: Run, done: int, schedule_state: dict | None, metrics: Metrics) -> None:
    """Write `step-NNNNNN/` after so many steps, to resume from, and remove those that are no longer kept."""
    s = run.settings
    with written_folder(run, checkpoint_path(s, done)) as (folder, hashes):
        if folder is None:
            return
        hashes |= save_weights(run, folder)[0]
        hashes |= save_states(run, folder)
        if run.fabric.is_global_zero:
            write_json(folder / "scaler.json", run.fabric.strategy.precision.state_dict())  # {} but for 16-mixed
            write_json(folder / SETTINGS, plain(s))
            write_json(folder / RUN, {"identity": run.identity, "clock": schedule_state, "version": project_version()})
    if run.fabric.is_global_zero:
        rotate(s, *metrics.column("val_loss"))


def save_final(run: Run) -> None:
    """Write `final/`: the adapter, or the model."""
    with written_folder(run, run.settings.out_dir / FINAL) as (folder, hashes):
        if folder is None:
            return
        known, line = save_weights(run, folder)
        hashes |= known
    if line and run.fabric.is_global_zero:
        print(line)


@contextlib.contextmanager
def written_folder(run: Run, path: Path) -> Iterator[tuple[Path | None, dict[str, str]]]:
    """A new folder of the run, for the weights that it keeps, and the hashes of files that are known already.

    None for a device that has nothing to write: it has the same as the first.
    """
    hashes = {}
    if run.divided:
        run.ranks.give_back(run.model)
        folder = shared_folder(run.ranks, path, hashes)
    else:
        folder = new_folder(path, hashes) if run.fabric.is_global_zero else contextlib.nullcontext()
    with weights_to_keep(run.optimizer), explained_write_errors(run.settings.out_dir), folder as temporary:
        yield temporary, hashes


def publish_final(s: Settings) -> None:
    """Publish `final/` where --publish says. Raises UserError, which says how to do it later, if that fails."""
    final = s.out_dir / "final"
    try:
        print(f"published {publish(final, check_address(s.publish, 'publish'))}")
    except UserError as error:
        again = f"python store/models.py --push {final} --to {s.publish}"
        raise UserError(f"{final} is whole, but was not published: {error}; to publish it later: {again}") from None


def save_weights(run: Run, folder: Path) -> tuple[dict[str, str], str]:
    """Write the adapter, or all weights, and `onetune.json`: what generate.py must know to match the training.

    A whole model gets the prompt style as its chat template. Returns the SHA-256 hashes that are known already, by file
    name, and a line for the user about that template ("" for an adapter).
    """
    s = run.settings
    style = run.info["prompt_style"]
    notes = {"prompt_style": style, "template_args": run.info.get("template_args", {})}
    notes |= {"checkpoint_dir": address_of(s.checkpoint_dir), "quantize": s.quantize}
    first = run.fabric.is_global_zero
    if first:
        write_json(folder / NOTES, notes)
    if run.adapter and run.divided:
        saving.save_adapter(run.divided, run.adapter, folder, s.checkpoint_dir)
    elif run.adapter:
        peft_format.save_adapter(run.model, run.adapter, folder, s.checkpoint_dir)
    if run.adapter:
        return {}, ""
    if run.divided:
        hashes = saving.save_model(run.divided, folder, source=s.checkpoint_dir)
    else:
        hashes = save_model(run.model, folder, source=s.checkpoint_dir)
    return hashes, save_chat_template(folder, style) if first else ""


def save_states(run: Run, folder: Path) -> dict[str, str]:
    """Write the optimiser's states. Returns the SHA-256 hashes that are known already, by file name."""
    if run.divided:
        return saving.save_optimizer(run.divided, run.settings, run.optimizer, folder)
    return save_optimizer(run.optimizer, folder)


# ---------------------------------------------------------------------------------------------------- checkpoints


def checkpoint_path(s: Settings, step: int) -> Path:
    """The folder of the checkpoint after so many steps."""
    return s.out_dir / f"step-{step:06d}"


def step_of(path: Path | None) -> int:
    """How many steps were done at a checkpoint; 0 for None."""
    return int(path.name.removeprefix("step-")) if path else 0


def schedule_state(newest: Path | None) -> dict | None:
    """The state of the time budget at a checkpoint, for `Schedule`."""
    return read_json(newest / RUN)["clock"] if newest else None


def checkpoints(out_dir: Path) -> list[Path]:
    """The checkpoints of a run, the oldest first. Each was complete when it was written."""
    return sorted((path for path in out_dir.glob("step-*") if path.name[5:].isdecimal()), key=step_of)


def newest_checkpoint(s: Settings) -> Path | None:
    """The folder to resume from, checked whole; None for a new run. Raises UserError if that would overwrite one.

    If --micro_batch_tokens is auto, `s` gets the number that the checkpoint's run used.
    """
    if not (s.resume or is_restarted()):
        if (s.out_dir / METRICS).exists():
            raise UserError(
                f"{s.out_dir} holds a run already: add --resume to continue it, or choose another --out_dir"
            )
        return None
    *earlier, newest = checkpoints(s.out_dir) or [None]
    if newest is None:
        if is_first():
            print(f"--resume: {s.out_dir} has no checkpoint: the run begins at step 1")
        return None
    go_on = f"from {earlier[-1].name}" if earlier else "from the start"
    check_manifest(newest, f"delete {newest} to go on {go_on}")
    if s.micro_batch_tokens == "auto":
        s.micro_batch_tokens = read_json(newest / SETTINGS)["micro_batch_tokens"]
    return newest


def check_same(s: Settings, newest: Path, identity: dict) -> None:
    """Raise UserError if the checkpoint `newest` is of a run with other settings, data, tokenizer or base model.

    identity: what the function of that name returns for this run.
    """
    differences = differing_settings(read_json(newest / SETTINGS), plain(s))
    differences += differing_sources(read_json(newest / RUN), identity)
    if differences:
        raise UserError(f"{newest} cannot be resumed with {', '.join(differences)}")


def check_same_everywhere(fabric: Fabric, identity: dict) -> None:
    """Raise UserError if this device has found other data, or another model, than the first one. identity: its own."""
    differences = differing_sources({"identity": fabric.broadcast(identity)}, identity)
    if differences:
        raise UserError(
            f"device {fabric.global_rank + 1} has {', '.join(differences)} than the first one: give the same folders "
            "on all machines, and addresses with their version"
        )


def differing_settings(before: dict, now: dict) -> list[str]:
    """The settings that would change the result, in words. A time budget may become longer or shorter."""
    names = [name for name in now if before.get(name) != now[name] and name not in HARMLESS]
    if before.get("time_budget") and now["time_budget"]:
        names = [name for name in names if name != "time_budget"]
    shown = {name: [describe_quantization(v) for v in (now[name], before.get(name))] for name in names}
    return [f"--{name} {value} (it was {former})" for name, (value, former) in shown.items()]


def differing_sources(run: dict, identity: dict) -> list[str]:
    """What else differs, in words: data, tokenizer, base model. run: the parsed RUN file of a checkpoint."""
    before = run["identity"]
    return [f"another {name}" for name in sorted({*before, *identity}) if before.get(name) != identity.get(name)]


def rotate(s: Settings, steps: list, losses: list) -> None:
    """Remove all checkpoints but the newest `keep_last` and, with `keep_best`, the best.

    losses: validation losses at `steps`. The best is that with the lowest one among the checkpoints that are here.
    """
    here, losses = checkpoints(s.out_dir), dict(zip(steps, losses, strict=True))
    validated = [path for path in here if step_of(path) in losses]
    best = min(validated, key=lambda path: losses[step_of(path)]) if s.keep_best and validated else None
    for path in here[: -s.keep_last] if s.keep_last else []:
        if path != best:
            remove_folder(path)


# ------------------------------------------------------------------------------------------ what a run depends on


def identity(s: Settings, info: dict) -> dict[str, str]:
    """A hash of everything the result depends on beside the settings, by its name.

    Of the prepared data it is what data.json says: the shards that are read are those, or refused (samples/shards.py).
    Hashing the base model's weights would take as long as reading them, so only pieces are hashed: that finds another
    model, but not a flipped bit, unless there is a manifest (`checkpoint.load_model`).
    """
    result = {f"data ({part})": hash for part, hash in hashes_of_data(s.data_dir).items()}
    result["tokenizer"], result["prompt style"] = info["tokenizer_hash"], info["prompt_style"]
    result |= hashes_of_model(s.checkpoint_dir, "base model")
    return result | (hashes_of_model(s.teacher_dir, "teacher") if s.teacher_dir else {})


def hashes_of_model(folder: Path, called: str) -> dict[str, str]:
    """The hashes of a model folder's config and of its weights' pieces."""
    result = {f"{called} (config.json)": hashlib.sha256(repr(read_config(folder)).encode()).hexdigest()}
    for path in shard_paths(folder, INDEX, "*.safetensors"):
        result[f"{called} ({path.name})"] = hash_of_pieces(path)
    return result


# ------------------------------------------------------------------------------------------------------- disk space


def sizes(s: Settings, model: Transformer) -> tuple[int, int]:
    """Bytes of `final/` and of a checkpoint, about. model: as in training; it may be on the meta device."""
    dtype, full = DTYPES[s.precision], s.method == "full"
    named = [(name, p) for name, p in model.named_parameters() if full or p.requires_grad]
    kept = {id(t): t for adapter in adapters(model).values() for t in peft_format.own_tensors(adapter).values()}
    weights = sum(tensor.nbytes for tensor in (kept | {id(p): p.to(dtype) if full else p for _, p in named}).values())
    stepped = [(name, p.to(dtype) if full else p) for name, p in named if p.requires_grad]
    moments = moment_bytes(s, stepped, "disk")
    if s.offload:
        moments = sum(STATE_BYTES * p.numel() for _, p in stepped)
    return weights, weights + moments


def check_room(s: Settings, model: Transformer, total: int, beside: float = 0) -> float:
    """Raise UserError if the disk has no room for the files of a run of `total` steps at most, and for `beside` bytes.

    Returns how many bytes the run needs.
    """
    if not os.access(s.out_dir, os.W_OK):
        raise UserError(f"--out_dir {s.out_dir} cannot be written to: choose another")
    final, checkpoint = sizes(s, model)
    written = total // s.save_interval if s.save_interval else 0
    kept = min(written, s.keep_last + s.keep_best) if s.keep_last else written
    there = sum(path.stat().st_size for folder in checkpoints(s.out_dir) for path in folder.iterdir())
    # While a checkpoint is written, those it replaces are still there. A signal may ask for one more.
    need = (kept + 1) * checkpoint + 2 * final + SMALL_FILES - there
    free = shutil.disk_usage(s.out_dir).free
    if need + beside > free:
        raise UserError(
            f"--out_dir {s.out_dir}: the run needs {need / 1e9:.2f} GB ({kept + 1} checkpoints of "
            f"{checkpoint / 1e9:.2f} and final/ of {final / 1e9:.2f}), {free / 1e9:.2f} GB are free: make room, "
            "or lower --keep_last"
        )
    return need


@contextlib.contextmanager
def explained_write_errors(out_dir: Path) -> Iterator[None]:
    """Turn a failed write to a run folder into a UserError that says which checkpoint is left."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        left = checkpoints(out_dir) if out_dir.is_dir() else []
        then = f"{left[-1].name} is whole, --resume goes on from it" if left else "there is no checkpoint yet"
        place = Path(error.filename) if getattr(error, "filename", None) else out_dir
        raise UserError(f"{place} could not be written ({reason}): {then}") from None
