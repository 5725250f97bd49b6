"""The trackers that `--logger` knows, and what each must do."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tracking.run_files import Result
from tracking.to_mlflow import MLflow
from tracking.to_tensorboard import TensorBoard
from tracking.to_wandb import WandB


class Tracked(NamedTuple):
    """A run, as a tracker sees it. record: the content of record.json. settings: those of finetune.py, by flag."""

    folder: Path
    record: dict[str, Any]
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """What the run is called: the last part of its folder's path."""
        return self.folder.name


class Tracker(Protocol):
    """A place that shows runs. A method that fails raises anything: it is called again later, after `open`.

    TrackerType(run, state): state is what `open` left in it the last time, or {}; it may hold what JSON can.
    late: whether what it is given arrives later, and all of it only when `close` has returned.
    """

    late: bool

    def open(self) -> int | None:
        """Begin the run there, or find it again. Returns the last step that it has, or None if that cannot be asked.

        After 0, which is also what one returns that has lost the run, it gets all files and results anew.
        """

    def log_rows(self, rows: list[dict[str, float]]) -> None:
        """Show rows of metrics.csv, each with its "step", in order."""

    def log_file(self, name: str, path: Path) -> None:
        """Show a file: a picture, a report, settings. The same name again replaces it."""

    def log_folder(self, name: str, path: Path) -> None:
        """Keep a folder: an adapter or a model."""

    def log_result(self, result: Result, step: int) -> None:
        """Show what an evaluation found of the model after so many steps."""

    def close(self, status: str) -> None:
        """Wait until all has arrived. status: how the run ended, "finished", "stopped" or "failed"."""


# By the name in --logger; csv is metrics.csv, which a run always has.
TRACKERS = {"csv": None, "tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WandB}


def followed_by(names: Iterable[str]) -> list[str]:
    """Those trackers among `names` to which something must be sent."""
    return [name for name in dict.fromkeys(names) if TRACKERS[name] is not None]
