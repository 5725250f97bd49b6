"""What a flag may be in a search: a range of numbers, or choices.

In the file of a search a mapping with one of these keys is a range; any other value is fixed, the same for all trials:

    learning_rate: {low: 1.0e-5, high: 1.0e-3, log: true}
    lora_alpha: {low: 8, high: 64, step: 8}
    lora_targets: {choices: [[q_proj, v_proj], all-linear]}
"""

from __future__ import annotations

import json
import typing
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from shell.cli import UserError

if TYPE_CHECKING:
    from optuna import Trial

KEYS = ("low", "high", "log", "step", "choices")


@dataclass(frozen=True)
class Numbers:
    """Numbers from `low` to `high`, both of them included: evenly, by their logarithm, or in steps. whole: integers."""

    flag: str
    low: float
    high: float
    log: bool
    step: float | None
    whole: bool

    def suggest(self, trial: Trial) -> float:
        """A value that Optuna's sampler takes for a trial, or took before."""
        if self.whole:
            return trial.suggest_int(self.flag, self.low, self.high, step=self.step or 1, log=self.log)
        return trial.suggest_float(self.flag, self.low, self.high, step=self.step, log=self.log)

    def value(self, label: Any) -> float:
        """The value of the flag that Optuna names so."""
        return label

    def ends(self) -> list:
        """The values that are checked before the first trial."""
        return [self.low, self.high]

    def grid(self) -> list | None:
        """All values, as Optuna names them, or None if they are too many."""
        if self.step is None:
            return None
        low, step = Decimal(str(self.low)), Decimal(str(self.step))
        count = int((Decimal(str(self.high)) - low) / step) + 1
        return [(int if self.whole else float)(low + i * step) for i in range(count)]


@dataclass(frozen=True)
class Choices:
    """Some values of any kind."""

    flag: str
    values: list

    def suggest(self, trial: Trial) -> Any:
        """The value that Optuna's sampler takes for a trial, or took before."""
        return self.value(trial.suggest_categorical(self.flag, self.grid()))

    def value(self, label: Any) -> Any:
        """The value of the flag that Optuna names so."""
        return self.values[self.grid().index(label)]

    def ends(self) -> list:
        """The values that are checked before the first trial."""
        return self.values

    def grid(self) -> list:
        """All values, as Optuna names them: it knows no lists."""
        return [json.dumps(value) if isinstance(value, list | dict) else value for value in self.values]


Range = Numbers | Choices


def is_range(value: Any) -> bool:
    """Whether a value in the file of a search is a range, and not a value of the flag."""
    return isinstance(value, dict) and any(key in value for key in KEYS)


def values_of(flag: str, entry: dict) -> list:
    """The values in the entry of a range, which must be values of its flag. Raises UserError if it is no range."""
    for key in entry:
        if key not in KEYS:
            raise UserError(f"{flag}: unknown key {key!r}, there are {', '.join(KEYS)}")
    if "choices" not in entry:
        missing = [key for key in ("low", "high") if key not in entry]
        if missing:
            raise UserError(f"{flag}: {missing[0]} is missing: a range is {{low: …, high: …}} or {{choices: […]}}")
        return [entry["low"], entry["high"]]
    if len(entry) > 1:
        raise UserError(f"{flag}: choices cannot have other keys beside them, there are {', '.join(entry)}")
    values = entry["choices"]
    if not isinstance(values, list) or len(values) < 2:
        raise UserError(f"{flag}: choices must be a list of at least two values")
    if any(value in values[:i] for i, value in enumerate(values)):
        raise UserError(f"{flag}: one of its choices comes twice")
    return values


def range_of(flag: str, entry: dict, values: list, kind: Any) -> Range:
    """The range of a flag. values: those that `values_of` gave, of the flag's type, which is `kind`.

    Raises UserError if it has no number in it, or its numbers do not fit together.
    """
    if "choices" in entry:
        return Choices(flag, values)
    low, high = values
    log, step = entry.get("log", False), entry.get("step")
    kinds = {kind, *typing.get_args(kind)}
    if not {int, float} & kinds or any(type(value) not in (int, float) for value in values):
        raise UserError(f"{flag} is not a number: give it choices in place of low and high")
    if type(log) is not bool:
        raise UserError(f"{flag}: log must be true or false, not {log}")
    if not low < high < float("inf"):
        raise UserError(f"{flag}: low {low} must be below high {high}")
    if log and low <= 0:
        raise UserError(f"{flag}: low {low} must be above 0 with log: true")
    whole = float not in kinds
    return Numbers(flag, low, high, log, _step(flag, step, values, log, whole), whole)


def _step(flag, step, values, log, whole):
    """The step of a range, checked. Text such as 1e-5 is a number that YAML does not know as one."""
    if step is None:
        return None
    if log:
        raise UserError(f"{flag}: step and log: true exclude each other")
    try:
        exact = Decimal(str(step)) if type(step) is not bool else None
        distance = Decimal(str(values[1])) - Decimal(str(values[0]))
        fits = exact is not None and exact > 0 and distance % exact == 0 and (not whole or exact % 1 == 0)
    except ArithmeticError:
        fits = False
    if not fits:
        raise UserError(f"{flag}: step {step} must be above 0 and lead from low to high" + " in whole numbers" * whole)
    return int(exact) if whole else float(exact)
