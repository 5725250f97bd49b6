"""What lies in a run's folder, and how to read it: one place for the names of its files."""

import csv
import fcntl
import io
import os
from collections.abc import Iterable
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from shell.cli import UserError
from shell.files import read_json

CONFIG, METRICS, SUMMARY, RECORD, DIFF = "config.yaml", "metrics.csv", "summary.json", "record.json", "git.diff"
FINAL, SOURCE, RESULTS, TRACKING = "final", "source", "results", "tracking"  # folders
OF_DATA = ("report.html", "data.json")  # of the prepared data: what is worth keeping with a run
PARTS = ("train", "val")  # of the prepared data: record.json has their hashes
SHORT = 10_000  # characters of YAML, in which nothing can be nested too deeply for libyaml's recursion


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run of finetune.py."""
    return (folder / CONFIG).is_file() and (folder / METRICS).is_file()


def is_locked(folder: Path) -> bool:
    """Whether a living process trains in a folder: it holds a lock on it (training/run_folder.py)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # some network file systems have no locks
        return False
    finally:
        os.close(descriptor)
    return False


def read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Column names and rows (texts by name) of metrics.csv, without a last line that was not finished; or [], []."""
    if not path.exists():
        return [], []
    try:
        text = path.read_text(encoding="utf-8")
        reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
        rows, names = list(reader), reader.fieldnames or []
        for row in rows:
            int(row["step"])
            [float(value) for value in row.values() if value != ""]  # None where there are too few, a list if too many
    except (KeyError, ValueError, TypeError, csv.Error):
        raise UserError(f"{path} is damaged: move it away to go on without its rows") from None
    return names, rows


def read_columns(path: Path, wanted: Iterable[str]) -> dict[str, tuple[list[int], list[float]]]:
    """Of some columns of metrics.csv, those that have any values: the steps that have one, and the values.

    As `read_rows`, but many times as quick, since other columns are only counted. Raises UserError for a damaged file.
    """
    found = {}
    try:
        text = path.read_text(encoding="utf-8")
        names, *rows = csv.reader(io.StringIO(text[: text.rfind("\n") + 1]))
        columns = dict(zip(names, zip(*rows, strict=True), strict=True)) if rows else dict.fromkeys(names, ())
        steps = [*map(int, columns["step"])]
        for name in wanted:
            texts = columns.get(name, ())
            if any(texts):
                have = [*map(bool, texts)]
                found[name] = [*compress(steps, have)], [*map(float, compress(texts, have))]
    except (KeyError, ValueError, csv.Error):
        raise UserError(f"{path} is damaged: move it away to go on without its rows") from None
    return found


def numbers(row: dict[str, str]) -> dict[str, float]:
    """The numbers of a row of metrics.csv by their column; the step is a whole number, empty fields are left out."""
    return {name: int(value) if name == "step" else float(value) for name, value in row.items() if value != ""}


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of a run, by the names of finetune.py's flags. Raises UserError if they cannot be read."""
    path = folder / CONFIG
    try:
        text = path.read_text(encoding="utf-8")
        quick = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        values = yaml.load(text, quick if len(text) < SHORT else yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{path} cannot be read: {reason}") from None
    if not isinstance(values, dict):
        raise UserError(f"{folder / CONFIG} must hold the settings of a run")
    return values


class Result(NamedTuple):
    """What an evaluation found of a run's model. model: its folder's name, such as "final". metrics: by name.

    how: the settings of the evaluation that its numbers depend on. If an earlier one had the same names but was made
    in another way, `data` ends with four digits, so that both are there.
    """

    kind: str
    model: str
    data: str
    how: dict[str, Any]
    metrics: dict[str, float]

    def names(self) -> dict[str, float]:
        """The metrics by names that say everything, such as exact_match/test, or step-000100/exact_match/test."""
        of_model = "" if self.model == FINAL else f"{self.model}/"
        of_data = f"/{self.data}" if self.data else ""
        return {f"{of_model}{name}{of_data}": value for name, value in self.metrics.items()}


def read_results(folder: Path) -> list[Result]:
    """All results of evaluations of a run's models."""
    found = []
    for path in sorted((folder / RESULTS).glob("*.json")):
        values = read_json(path)
        try:
            result = Result(*(values[name] for name in Result._fields))
            found.append(result._replace(metrics={name: float(value) for name, value in result.metrics.items()}))
        except KeyError as error:
            raise UserError(f"{path} has no {error}: it is not a result of an evaluation") from None
        except (AttributeError, TypeError, ValueError):
            raise UserError(
                f"{path}: its metrics are no numbers by name: it is not a result of an evaluation"
            ) from None
    return found


def data_of_run(folder: Path) -> Path | None:
    """The prepared data that a run was trained on; None if they are not there, or their folder now has others.

    record.json has the hashes of both parts. They are compared with those in the folder's data.json.
    """
    data_dir, record = read_settings(folder).get("data_dir"), folder / RECORD
    if not isinstance(data_dir, str) or not record.is_file():
        return None
    hashes = read_json(record).get("hashes", {})
    try:
        now = hashes_of_data(Path(data_dir))
    except UserError:
        return None
    same = all(now[part] == hashes.get(f"data ({part})") for part in PARTS)
    return Path(data_dir) if same else None


def hashes_of_data(data_dir: Path) -> dict[str, str]:
    """The hash of each part of prepared data, as data.json has it. Raises UserError if it has none."""
    path = data_dir / "data.json"
    info = read_json(path)
    try:
        return {part: info[part]["hash"] for part in PARTS}
    except (KeyError, TypeError):
        raise UserError(f"{path} has no hashes of its samples: make it again with prepare_data.py") from None


def files_to_show(folder: Path, data_dir: Path | None) -> dict[str, Path]:
    """The files of a run that a tracker gets, by the names that they get there.

    They are few and small: checkpoints and final/ are not among them. data_dir: the prepared data, if they are there.
    """
    of_run = [folder / name for name in (CONFIG, RECORD, DIFF, SUMMARY)] + sorted(folder.glob("*.png"))
    named = {path.name: path for path in of_run}
    named |= {f"{RESULTS}/{path.name}": path for path in sorted((folder / RESULTS).glob("*.json"))}
    named |= {f"data/{name}": data_dir / name for name in OF_DATA} if data_dir else {}
    return {name: path for name, path in named.items() if path.is_file()}
