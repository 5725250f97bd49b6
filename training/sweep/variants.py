"""The file of a sweep: the variants of a run that are trained together, each as the settings of a run of its own.

    variants:                                   # by name: the flags that differ from the command line's
      low: {learning_rate: 1.0e-4}
      wide: {learning_rate: 3.0e-4, lora_r: 32, lora_targets: [q_proj, v_proj]}
    grid: {learning_rate: [1.0e-4, 3.0e-4], seed: [1, 2]}   # and every combination of these values
    halving: {every: 50, keep: 0.5}             # after every 50 steps the better half goes on (halving.py)

Each variant has the folder of its name in --out_dir, which is what a run of its own would have written.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shell import cli
from shell.cli import UserError
from shell.files import read_yaml
from training.initialization import INITIALISATIONS

if TYPE_CHECKING:
    from training.settings import Settings

KEYS = ("variants", "grid", "halving")
SHARED = (  # what all variants have alike: the base, how it is run, and when all are looked at
    "checkpoint_dir", "quantize", "precision", "planner", "micro_batch_tokens", "recompute", "compile", "devices",
    "nodes", "parallel", "shard", "objective", "eval_interval", "out_dir", "resume", "replay", "plan", "plan_tflops",
    "plan_link", "memory_budget", "time_budget", "deterministic", "sweep", "logger", "log_adapter", "teacher_dir",
    "teacher_quantize", "teacher_top_k", "teacher_temperature",
)  # fmt: skip
NAME = re.compile(r"[\w][\w.+=-]{0,99}")


@dataclass(frozen=True)
class Halving:
    """Successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943): after every so many steps the share `keep` of
    the variants goes on, those with the lowest validation loss."""

    every: int
    keep: float = 0.5


@dataclass(frozen=True)
class Sweep:
    """The variants of a sweep, by name, and its halving, if it has any."""

    variants: dict[str, Settings]
    halving: Halving | None


def read_sweep(s: Settings) -> Sweep:
    """The sweep that --sweep names. Raises UserError if it is none, or has what cannot be trained together."""
    values = _read(s.sweep)
    for key in values:
        if key not in KEYS:
            raise UserError(f"--sweep {s.sweep}: unknown key {key!r}, there are {', '.join(KEYS)}")
    changes = _named(values.get("variants") or {}, s.sweep) | _combinations(values.get("grid") or {}, s.sweep)
    if not changes:
        raise UserError(f"--sweep {s.sweep} names no variant: give it `variants` or a `grid`")
    variants = {name: _settings(s, name, change) for name, change in changes.items()}
    return Sweep(variants, _halving(values.get("halving"), s))


def _read(path):
    try:
        values = read_yaml(path)
    except UserError as error:
        raise UserError(f"--sweep {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"--sweep {path} is not a YAML file of variants: see training/sweep/variants.py")
    return values


def _named(variants, path):
    """The changes of each variant by its name, as given."""
    if not isinstance(variants, dict):
        raise UserError(f"--sweep {path}: `variants` must be names, each with its flags")
    for name, change in variants.items():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise UserError(
                f"--sweep {path}: {name!r} cannot be the name of a variant's folder: use letters and digits"
            )
        if not isinstance(change, dict):
            raise UserError(f"--sweep {path}: the variant {name} must have flags and their values, such as lora_r: 8")
    return variants


def _combinations(grid, path):
    """The changes of each combination of the grid's values, by a name made of them."""
    if not isinstance(grid, dict) or not all(isinstance(each, list) and each for each in grid.values()):
        raise UserError(f"--sweep {path}: `grid` must be flags, each with a list of values")
    names = [[f"{flag}={_short(value)}" for value in values] for flag, values in grid.items()]
    found = ["+".join(parts) for parts in itertools.product(*names)] if grid else []
    changes = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())] if grid else []
    if len({*found}) < len(found):
        raise UserError(f"--sweep {path}: two combinations of `grid` have the same values")
    return dict(zip(found, changes, strict=True))


def _short(value: Any) -> str:
    """A value as a part of a folder's name."""
    text = (
        "-".join(map(str, value))
        if isinstance(value, list)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )
    return re.sub(r"[^\w.-]+", "-", text)[:40]


def _settings(s, name, change):
    """The settings of one variant: what a run of its own would be started with."""
    where = f"--sweep {s.sweep}: {name}"
    for flag in change:
        if flag in SHARED:
            raise UserError(f"{where}: {flag} is the same for all variants: give it on the command line")
    own = cli.changed(dataclasses.replace(s, sweep=None), change, where)
    own.out_dir = s.out_dir / name
    refused = {
        "method": (own.method == "full", "changes the base, which all variants share: take an adapter"),
        "lora_init": (looks_at_base(own), "looks at the base, which all variants share: leave it out"),
        "neftune_alpha": (own.neftune_alpha > 0, "would not draw the noise of a run of its own: leave it at 0"),
        "lora_dropout": (own.lora_dropout > 0, "would not draw the numbers of a run of its own: leave it at 0"),
        "optimizer": (own.optimizer == "mezo", "has passes of its own, which nothing shares: take another"),
    }
    for flag, (is_so, why) in refused.items():
        if is_so:
            raise UserError(f"{where}: --{flag} {getattr(own, flag)} {why}")
    return own


def looks_at_base(s: Settings) -> bool:
    """Whether the adapter's start depends on the base's weights or on what it computes."""
    start = INITIALISATIONS[s.lora_init]
    return start.weight is not None or start.activations is not None


def _halving(values, s):
    """The halving that the file asks for, or None."""
    if values is None:
        return None
    where = f"--sweep {s.sweep}: halving"
    if not isinstance(values, dict) or not {*values} <= {"every", "keep"} or "every" not in values:
        raise UserError(f"{where} must be {{every: STEPS, keep: SHARE}}")
    every, keep = values["every"], values.get("keep", 0.5)
    if type(every) is not int or every < 1 or type(keep) not in (int, float) or not 0 < keep < 1:
        raise UserError(f"{where}: every must be a number of steps above 0, keep a share between 0 and 1")
    if not s.eval_interval or every % s.eval_interval:
        raise UserError(f"{where}: every {every} steps must be a multiple of --eval_interval {s.eval_interval}")
    return Halving(every, keep)


def check_together(s: Settings) -> None:
    """Raise UserError for a flag of the command line with which variants cannot be trained together."""
    needs = (
        ("planner", "packed"), ("devices", 1), ("optimizer_in_backward", False), ("offload", None), ("replay", None),
        ("balance_loss", 0.0), ("time_budget", None),
    )  # fmt: skip
    for name, value in needs:
        if getattr(s, name) != value:
            raise UserError(f"--sweep needs --{name} {str(value).lower()}, not {getattr(s, name)}")
    if s.precision == "16-mixed":
        raise UserError("--sweep needs another --precision: 16-mixed has one loss scale for all variants")
    if s.micro_batch_tokens == "auto":
        raise UserError("--sweep needs a number for --micro_batch_tokens: the positions of all variants together")
