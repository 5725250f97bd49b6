"""Results of evaluations, kept with the run whose model was evaluated, and sent to the trackers that follow it."""

import hashlib
import json
from pathlib import Path
from typing import Any

from shell.files import read_json, sha256, whole_file, write_json
from store.cache import address_of
from tracking.following import send_now
from tracking.run_files import RESULTS, Result, is_run, read_results

# Settings of evaluations that change no number: where things go, how many at one time, and which model, which is known.
UNIMPORTANT = {
    "out_file", "save_filepath", "out_dir", "batch_size", "batch_tokens", "micro_batch_tokens", "bootstrap_iters",
    "adapter_dir", "model_dir",
}  # fmt: skip


def record_result(
    model_dir: Path | None, kind: str, data: str, metrics: dict[str, float], settings: dict[str, Any]
) -> None:
    """Keep what an evaluation found, if the model or adapter in `model_dir` is one that a run wrote.

    It is a file in results/ of the run's folder. The same evaluation made again replaces it; one of the same name that
    was made in another way is kept beside it (see `Result`).

    kind: of evaluation, such as "exact_match". data: what it was made on, such as a file's stem, "" if the names of the
    metrics say it. settings: those of the evaluation.
    """
    if model_dir is None or not is_run(folder := model_dir.resolve().parent):
        return
    numbers = {name: float(value) for name, value in metrics.items()}
    result = Result(kind, model_dir.resolve().name, data, in_numbers(settings), numbers)
    digits = hashlib.sha256(json.dumps(result[:4], sort_keys=True).encode()).hexdigest()[:8]
    path = folder / RESULTS / f"{'-'.join(filter(None, (kind, result.model, _file_name(data), digits)))}.json"
    if path.is_file():
        result = result._replace(data=read_json(path)["data"])
    elif result.names().keys() & {name for other in read_results(folder) for name in other.names()}:
        result = result._replace(data=f"{data} {digits[:4]}".strip())
    path.parent.mkdir(exist_ok=True)
    with whole_file(path) as file:
        write_json(file, result._asdict())
    print(f"kept in {path}, as {', '.join(list(result.names())[:3])}{', …' * (len(numbers) > 3)}")
    send_now(folder)


def in_numbers(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that an evaluation's numbers depend on, as JSON holds them; of a file the hash of its content."""
    found = {name: value for name, value in settings.items() if value is not None and name not in UNIMPORTANT}
    return json.loads(json.dumps(found, default=_as_text))


def _as_text(value):
    if isinstance(value, Path) and value.is_file():
        return sha256(value)
    return address_of(value.absolute()) if isinstance(value, Path) else str(value)


def _file_name(text):
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in text)
