"""The folder of a run: its checkpoints, who may write to it, whether there is room for it, what must match to go on.

`s` is always the Settings of finetune.py. A checkpoint is a folder `step-NNNNNN` that `files.new_folder` wrote.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import shutil
import signal
from pathlib import Path

from quantize import describe_quantization
from shell.cli import UserError
from shell.files import MANIFEST, check_manifest, clear_leftovers, read_json, remove_folder, sha256
from training.memory.budget import DTYPES
from training.memory.plan import moment_bytes
from weights.checkpoint import INDEX, read_config, shard_paths

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SETTINGS, RUN = "settings.json", "run.json"  # in a checkpoint: the command line; what it was made from, and its time
HARMLESS = (  # settings that may change for a resumed run; the folders because what is in them is compared instead
    "resume", "save_interval", "eval_interval", "keep_last", "keep_best", "out_dir", "plan", "plan_tflops",
    "memory_budget", "checkpoint_dir", "data_dir",
)  # fmt: skip
PIECES, PIECE_BYTES = 256, 2**16  # of a file of weights, that tell it from another
SMALL_FILES = 20 * 10**6  # bytes: source, metrics, plot, tokenizer files
WRITTEN = ("step-*", "final", "source", "*.csv", "config.yaml", "summary.json", "loss.png")


ROOT = Path(__file__).resolve().parents[1]
SOURCE_FOLDERS = ("shell", "ops", "weights", "text", "inference", "preparation", "training")


def source_files():
    """The code that a run keeps a copy of: paths relative to the project's folder."""
    files = [*ROOT.glob("*.py")]
    for folder in SOURCE_FOLDERS:
        files += [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".cpp", ".h")]
    return sorted(path.relative_to(ROOT) for path in files)


def plain(s):
    """The settings as plain values for JSON and YAML."""
    return {name: str(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(s).items()}


@contextlib.contextmanager
def only_process(out_dir):
    """Hold a run folder, made if it is not there, and cleared of what a killed process left half-written.

    Raises UserError if another process has it.
    """
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(f"--out_dir {out_dir} is a file: choose another")
    if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) != "0":  # of several devices the first writes
        yield
        return
    out_dir.mkdir(parents=True, exist_ok=True)
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
def signals_noted():
    """SIGTERM and SIGINT go into the list that this yields, and do no more; the second one ends the process at once."""
    noted = []

    def note(number, frame):
        noted.append(number)
        for each in before:
            signal.signal(each, signal.SIG_DFL)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    # Under nohup, and in the background of a script, the second one is to be ignored.
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------- checkpoints


def checkpoint_path(s, step):
    return s.out_dir / f"step-{step:06d}"


def step_of(path):
    return int(path.name.removeprefix("step-"))


def checkpoints(out_dir):
    """The checkpoints of a run, the oldest first. One that is here was complete once."""
    return sorted((path for path in out_dir.glob("step-*") if path.name[5:].isdecimal()), key=step_of)


def newest_checkpoint(s):
    """The folder to resume from, checked whole; None for a new run. Raises UserError if that would overwrite one.

    Of it `s` takes the number that `--micro_batch_tokens auto` stood for.
    """
    if not s.resume:
        if (s.out_dir / "metrics.csv").exists():
            raise UserError(
                f"{s.out_dir} holds a run already: add --resume to continue it, or choose another --out_dir"
            )
        return None
    *earlier, newest = checkpoints(s.out_dir) or [None]
    if newest is None:
        return None
    go_on = f"from {earlier[-1].name}" if earlier else "from the start"
    check_manifest(newest, f"delete {newest} to go on {go_on}")
    if s.micro_batch_tokens == "auto":
        s.micro_batch_tokens = read_json(newest / SETTINGS)["micro_batch_tokens"]
    return newest


def check_same(s, newest, identity):
    """Raise UserError if a run with other settings or made from other things would go on from `newest`.

    identity: of what this run is made from, as the function of that name has it.
    """
    differences = differing_settings(read_json(newest / SETTINGS), plain(s))
    differences += differing_sources(read_json(newest / RUN), identity)
    if differences:
        raise UserError(f"{newest} cannot be resumed with {', '.join(differences)}")


def differing_settings(before, now):
    """The settings that would change the result, in words. A time budget may become longer or shorter."""
    names = [name for name in now if before.get(name) != now[name] and name not in HARMLESS]
    if before.get("time_budget") and now["time_budget"]:
        names = [name for name in names if name != "time_budget"]
    shown = {name: [describe_quantization(v) for v in (now[name], before.get(name))] for name in names}
    return [f"--{name} {value} (it was {former})" for name, (value, former) in shown.items()]


def differing_sources(run, identity):
    before = run["identity"]
    return [f"another {name}" for name in sorted({*before, *identity}) if before.get(name) != identity.get(name)]


def rotate(s, steps, losses):
    """Remove all checkpoints but the newest `keep_last` and, with `keep_best`, the best.

    losses: validation losses at `steps`. The best is that with the lowest one among the checkpoints that are here.
    """
    here, losses = checkpoints(s.out_dir), dict(zip(steps, losses, strict=True))
    validated = [path for path in here if step_of(path) in losses]
    best = min(validated, key=lambda path: losses[step_of(path)]) if s.keep_best and validated else None
    for path in here[: -s.keep_last] if s.keep_last else []:
        if path != best:
            remove_folder(path)


# ------------------------------------------------------------------------------------------ what a run is made from


def identity(s, info):
    """A hash of each thing that decides the result beside the settings, by what it is.

    The prepared data are hashed whole, and checked if they have a manifest. Of the base model's weights that would take
    as long as reading them: they are told apart by pieces. So another model is found, but not a flipped bit, unless
    there is a manifest (`checkpoint.load_model`).
    """
    parts = [f"{part}.safetensors" for part in ("train", "val")]
    if (s.data_dir / MANIFEST).is_file():
        hashes = check_manifest(s.data_dir, f"make {s.data_dir} again with prepare_data.py")
    else:
        hashes = {name: sha256(s.data_dir / name) for name in parts}
    result = {f"data ({name})": hashes[name] for name in parts}
    result["tokenizer"], result["prompt style"] = info["tokenizer_hash"], info["prompt_style"]
    result["base model (config.json)"] = hashlib.sha256(repr(read_config(s.checkpoint_dir)).encode()).hexdigest()
    for path in shard_paths(s.checkpoint_dir, INDEX, "*.safetensors"):
        result[f"base model ({path.name})"] = hash_of_pieces(path)
    return result


def hash_of_pieces(path):
    """SHA-256 (hex) of a file's size and of PIECES pieces, evenly spread from its first to its last byte."""
    size = path.stat().st_size
    digest = hashlib.sha256(f"{size}".encode())
    if size <= PIECES * PIECE_BYTES:
        digest.update(path.read_bytes())
        return digest.hexdigest()
    with open(path, "rb") as file:
        for number in range(PIECES):
            file.seek((size - PIECE_BYTES) * number // (PIECES - 1))
            digest.update(file.read(PIECE_BYTES))
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------- room


def sizes(s, model):
    """Bytes of `final/` and of a checkpoint, about. model: as in training, its tensors may be without memory."""
    dtype, full = DTYPES[s.precision], s.method == "full"
    trained = [p.to(dtype) if full else p for p in model.parameters() if full or p.requires_grad]
    weights = sum(p.nbytes for p in trained)
    moments = sum(moment_bytes(p, s.optimizer, "cpu") for p in trained)  # on the disk paged ones are as large as others
    return weights, weights + moments


def check_room(s, model, total):
    """Refuse a run for whose files the disk has no room, before its first step. total: how many steps it may have."""
    if not os.access(s.out_dir, os.W_OK):
        raise UserError(f"--out_dir {s.out_dir} cannot be written to: choose another")
    final, checkpoint = sizes(s, model)
    written = total // s.save_interval if s.save_interval else 0
    kept = min(written, s.keep_last + s.keep_best) if s.keep_last else written
    there = sum(path.stat().st_size for folder in checkpoints(s.out_dir) for path in folder.iterdir())
    # When one is written those that it replaces are still there. A signal may ask for one more than save_interval.
    need = (kept + 1) * checkpoint + 2 * final + SMALL_FILES - there
    free = shutil.disk_usage(s.out_dir).free
    if need > free:
        raise UserError(
            f"--out_dir {s.out_dir}: the run needs {need / 1e9:.2f} GB ({kept + 1} checkpoints of "
            f"{checkpoint / 1e9:.2f} and final/ of {final / 1e9:.2f}), {free / 1e9:.2f} GB are free: make room, "
            "or lower --keep_last"
        )


@contextlib.contextmanager
def explained_write_errors(out_dir):
    """Say in one line that a run folder could not be written to, and what is left."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        left = checkpoints(out_dir) if out_dir.is_dir() else []
        then = f"{left[-1].name} is whole, --resume goes on from it" if left else "there is no checkpoint yet"
        place = Path(error.filename) if getattr(error, "filename", None) else out_dir
        raise UserError(f"{place} could not be written ({reason}): {then}") from None
