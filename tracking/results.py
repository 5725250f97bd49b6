"""Results of evaluations, kept with the run whose model was evaluated, and sent to the trackers that follow it."""

from pathlib import Path

from shell.files import whole_file, write_json
from tracking.following import send_now
from tracking.run_files import RESULTS, Result, is_run


def record_result(model_dir: Path | None, kind: str, data: str, metrics: dict[str, float]) -> None:
    """Keep what an evaluation found, if the model or adapter in `model_dir` is one that a run wrote.

    It is a file in results/ of the run's folder; the same evaluation made again replaces it.

    kind: of evaluation, such as "exact_match". data: what it was made on, such as a file's stem, "" if the names of the
    metrics say it.
    """
    if model_dir is None or not is_run(folder := model_dir.resolve().parent):
        return
    result = Result(kind, model_dir.resolve().name, data, {name: float(value) for name, value in metrics.items()})
    path = folder / RESULTS / f"{'-'.join(part for part in (kind, result.model, _file_name(data)) if part)}.json"
    path.parent.mkdir(exist_ok=True)
    with whole_file(path) as file:
        write_json(file, result._asdict())
    print(f"kept in {path}")
    send_now(folder)


def _file_name(text):
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in text)
