"""The file of a search: what sweep.py varies, how, and what it compares.

parameters:                                # flags of finetune.py: a value for all trials, or a range (ranges.py)
  checkpoint_dir: checkpoints/ORG/MODEL
  data_dir: prepared/my
  max_steps: 200
  learning_rate: {low: 1.0e-5, high: 1.0e-3, log: true}
  lora_r: {choices: [8, 16, 32]}
trials: 20                                 # of a grid all, unless it is given
sampler: tpe                               # or random, grid
seed: 0                                    # of the sampler
pruner: {name: asha, first_rung: 1, reduction_factor: 3}   # or none, the default
metric: val_loss                           # metric.py
"""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search.metric import Metric, read_metric
from search.ranges import Range, is_range, range_of, values_of
from shell import cli, explain, files
from shell.cli import UserError
from training import settings as finetune

KEYS = ("parameters", "trials", "sampler", "seed", "pruner", "metric")
SAMPLERS = ("tpe", "random", "grid")
OWN = (
    "out_dir",
    "resume",
    "sweep",
    "replay",
    "plan",
    "plan_tflops",
    "plan_link",
)  # flags that a trial cannot have for itself
FLAGS = finetune.Settings.__dataclass_fields__


@dataclass(frozen=True)
class Asha:
    """Asynchronous successive halving (Li et al. 2020, arXiv 1810.05934): of the trials that come to a rung, the best
    1 / reduction_factor go on. The first rung is after so many validations, each next one at reduction_factor times it.
    """

    first_rung: int = 1
    reduction_factor: int = 3


@dataclass(frozen=True)
class Search:
    """A search. fixed: flags and their values for all trials. given: the file as it was read, but for `trials`."""

    ranges: dict[str, Range]
    fixed: dict
    trials: int
    sampler: str
    seed: int
    pruner: Asha | None
    metric: Metric
    given: dict

    def paths(self, flag: str) -> list[Path]:
        """The folders or files that a flag may name: of all trials."""
        values = self.ranges[flag].ends() if flag in self.ranges else [self.fixed.get(flag)]
        return [Path(value) for value in values if isinstance(value, str)]

    @property
    def eval_interval(self) -> int:
        """Steps between validations; with a pruner it is the same for all trials."""
        return self.fixed.get("eval_interval", FLAGS["eval_interval"].default)


def read_search(path: Path) -> Search:
    """The search in a YAML file. Raises UserError, which names the file, for what is none.

    Every value that a flag may get is checked, alone and with each one of every other flag, as finetune.py checks it.
    """
    given = files.read_yaml(path)
    try:
        return _search(given)
    except UserError as error:
        raise UserError(f"--sweep {path}: {error}") from None


def _search(given):
    if not isinstance(given, dict) or not isinstance(given.get("parameters"), dict):
        raise UserError("expected the key parameters, with flags of finetune.py under it")
    for key in given:
        if key not in KEYS:
            raise UserError(f"unknown key {key!r}, there are {', '.join(KEYS)}")
    metric, pruner = read_metric(given.get("metric")), _pruner(given.get("pruner"))
    sampler = given.get("sampler", "tpe")
    if sampler not in SAMPLERS:
        raise UserError(f"sampler {sampler}: expected one of {', '.join(SAMPLERS)}")
    ranges, fixed = _parameters(given["parameters"])
    _check_validations(ranges, fixed, pruner, metric)
    trials, seed = given.get("trials"), given.get("seed", 0)
    if type(seed) is not int or seed < 0:
        raise UserError(f"seed {seed}: expected a whole number, 0 or above")
    if sampler == "grid":
        trials = _trials_of_grid(ranges, trials)
    if type(trials) is not int or trials < 1:
        raise UserError(f"trials {trials}: expected how many, a whole number above 0")
    kept = {key: value for key, value in given.items() if key != "trials"}
    search = Search(ranges, fixed, trials, sampler, seed, pruner, metric, kept)
    _check_folders(search)
    return search


def _pruner(value: Any) -> Asha | None:
    if value in (None, "none"):
        return None
    value = {"name": value} if isinstance(value, str) else value
    if not isinstance(value, dict) or value.get("name") != "asha":
        raise UserError("pruner: expected none, asha or {name: asha, first_rung: …, reduction_factor: …}")
    for key, number in value.items():
        if key not in ("name", *Asha.__dataclass_fields__):
            raise UserError(f"pruner: unknown key {key!r}, there are name, first_rung and reduction_factor")
        least = 1 + (key == "reduction_factor")
        if key != "name" and (type(number) is not int or number < least):
            raise UserError(f"pruner: {key} {number}: expected a whole number, {least} or above")
    return Asha(**{key: number for key, number in value.items() if key != "name"})


def _parameters(entries):
    """The ranges by flag, and the values of the other flags."""
    for flag in entries:
        if flag not in FLAGS:
            likely = explain.suggestions(str(flag), FLAGS)
            meant = f", did you mean {' or '.join(likely)}?" if likely else ""
            raise UserError(f"parameters: finetune.py has no flag {flag}{meant}")
        if flag == "publish":
            raise UserError(
                "parameters: publish would give all trials one name: leave it out, and publish the best one with "
                "python store/models.py --push OUT_DIR/trial-NNNN/final --to ADDRESS"
            )
        if flag in OWN:
            raise UserError(f"parameters: {flag} is not for a trial: leave it out")
    fixed = {flag: value for flag, value in entries.items() if not is_range(value)}
    values = {flag: values_of(flag, entry) for flag, entry in entries.items() if is_range(entry)}
    if not values:
        raise UserError("parameters: nothing to search: give one of them a range, {low: …, high: …} or {choices: […]}")
    typed = _typed(fixed, values)
    ranges = {flag: range_of(flag, entries[flag], typed[flag], FLAGS[flag].type) for flag in values}
    _check_together(fixed, ranges)
    return ranges, fixed


def _typed(fixed, values):
    """The values of all ranges as values of their flags' types."""
    first = fixed | {flag: each[0] for flag, each in values.items()}
    return {
        flag: [
            _plain(cli.checked_values(finetune.Settings, first | {flag: value}, "parameters")[flag]) for value in each
        ]
        for flag, each in values.items()
    }


def _plain(value):
    return str(value) if isinstance(value, Path) else value


def _check_together(fixed, ranges):
    """Raise UserError if finetune.py refuses a value of a flag, alone or with some value of another flag."""
    ends = [[(flag, value) for value in each.ends()] for flag, each in ranges.items()]
    first = cli.checked_values(finetune.Settings, fixed | {each[0][0]: each[0][1] for each in ends}, "parameters")
    pairs = itertools.combinations(ends, 2) if len(ends) > 1 else [(ends[0], ends[0])]
    for one, other in (pair for each in pairs for pair in itertools.product(*each)):
        try:
            finetune.Settings(**first | dict([one, other]))
        except UserError as error:
            which = " and ".join(dict.fromkeys(f"{flag} {value}" for flag, value in (one, other)))
            raise UserError(f"parameters: {which}: {error}") from None


def _check_folders(search):
    for flag in ("checkpoint_dir", "data_dir", "teacher_dir"):
        for folder in search.paths(flag):
            if not folder.is_dir():
                raise UserError(f"parameters: {flag} {folder}: no such folder")


def _check_validations(ranges, fixed, pruner, metric):
    """Raise UserError if a trial would not have the validations that the metric or the pruner looks at."""
    needed = pruner or metric.exact_match is None and metric.column.startswith("val_")
    what = "pruner" if pruner else f"metric {metric.name}"
    if needed and fixed.get("eval_interval") == 0:
        raise UserError(f"{what} needs validations: eval_interval must be above 0")
    if pruner and "eval_interval" in ranges:
        raise UserError("pruner needs the same eval_interval for all trials: give it one value")


def _trials_of_grid(ranges, trials):
    for flag, each in ranges.items():
        if each.grid() is None:
            raise UserError(f"parameters: {flag}: a grid needs a step or choices")
    most = math.prod(len(each.grid()) for each in ranges.values())
    if type(trials) is int and trials > most:
        raise UserError(f"trials {trials}: the grid has {most} combinations")
    return most if trials is None else trials
