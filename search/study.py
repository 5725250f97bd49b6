"""Optuna's study in a database, which all processes share, and which trial a process takes next.

Who works on a trial is not said by the database but by a lock (flock) on a file in the trial's folder. The process of
sweep.py holds it, and so does the child that trains, which inherits it. The system takes a lock away from a process in
the moment it ends, however it ends. So:

- A trial that the database calls running and whose lock is free was left by a process that is gone, with its child.
  Whoever sees it continues it, with finetune.py --resume. Nothing has to be waited for, as with a heartbeat.
- If only sweep.py was killed, its child trains on and keeps the lock. The trial is free when that has ended, and what
  it reached is found in its folder.
- Two processes never work on one trial, and none is begun twice: a process takes a trial while it holds a second lock,
  of the whole study. There it sees all trials and all locks, and makes the folder of a new trial before the trial.

The locks are those of one file system. Processes with other folders (machines without a common disk) share the database
alone: a trial belongs to the folder it is in, and is continued only there. A folder belongs to one study, which knows
it by its mark: the trials of another have the same numbers, and would be taken for its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import optuna
import sqlalchemy
from optuna.trial import FrozenTrial, Trial, TrialState

from search.contents import contents
from search.search_file import Search
from shell.cli import UserError
from shell.files import whole_file

TIMEOUT = 60  # seconds for which SQLite waits for another process
GIVEN = "onetune search"  # the study's attribute with the file of the search, and what is in the files that it names
MARK = "study.id"  # file in a search's folder; the study has an attribute with its content
ELSEWHERE = "choose another --out_dir, and with --storage another --study_name too"


@dataclass(frozen=True)
class Claim:
    """A trial that this process works on: its folder, the descriptor of its lock, the values of the flags that are
    searched, and the steps whose validation the study has."""

    trial: Trial
    folder: Path
    lock: int
    values: dict
    reported: set[int]


@contextlib.contextmanager
def explained(storage: str) -> Iterator[None]:
    """Turn an error of the database into a UserError. storage: its URL; a password in it is not shown."""
    try:
        yield
    except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError, ImportError) as error:
        reason = getattr(error.__cause__ or error, "orig", None) or error.__cause__ or error
        try:
            shown = sqlalchemy.engine.make_url(storage).render_as_string(hide_password=True)
        except sqlalchemy.exc.ArgumentError:
            shown = "is no URL of a database, such as sqlite:///study.db"
        raise UserError(f"--storage {shown}: {' '.join(str(reason).split())[:200]}") from None


def own_database(out_dir: Path) -> str:
    """The URL of the SQLite file in a search's folder. In a URL the path's ?, # and % have other meanings."""
    url = sqlalchemy.engine.URL.create("sqlite", database=str(out_dir / "study.db"))
    return url.render_as_string(hide_password=False)


def open_study(search: Search, out_dir: Path, storage: str, name: str, new: bool) -> optuna.Study:
    """The study of a search, by its name, in the database at a URL. new: make it if it is not there.

    Raises UserError if it is not there, or is that of another search, or the folder is that of another.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    url = sqlalchemy.engine.make_url(storage)
    if not new and _absent(url):
        raise UserError(f"{url.database}: there is no search yet: start it without --report")
    named = contents(search)
    with _made(out_dir), study_locked(out_dir):
        if _absent(url):
            _check_folder(out_dir, {})  # before a database is made
        database = _database(url)
        if name not in optuna.get_all_study_names(database):
            if not new:
                raise UserError(f"--study_name {name}: there is no such search yet: start it without --report")
            _check_folder(out_dir, {})
        study = optuna.create_study(
            storage=database, study_name=name, direction=search.metric.direction, load_if_exists=True
        )
        _check_search(study, json.loads(json.dumps(search.given, default=str)), named)
        _check_folder(out_dir, study.user_attrs)
        _mark_folder(study, out_dir)
    study.pruner = _pruner(search)
    return study


def _absent(url):
    return url.drivername == "sqlite" and not Path(url.database or "").is_file()


def _database(url):
    waiting = {"connect_args": {"timeout": TIMEOUT}} if url.drivername == "sqlite" else {}
    return optuna.storages.RDBStorage(url.render_as_string(hide_password=False), engine_kwargs=waiting)


def _check_search(study, given, named):
    """Raise UserError if the study is of another search, or files that it names have changed. A new one is this one's.

    given: the file of the search. named: what `contents` returns.
    """
    before = study.user_attrs.get(GIVEN)
    if before is None and not study.get_trials(deepcopy=False):
        study.set_user_attr(GIVEN, {"file": given, "contents": named})
        return
    before = before or {}
    if changed := _differing(before.get("file", {}), given):
        raise UserError(f"the search there has other {', '.join(changed)}: only trials may change; {ELSEWHERE}")
    if changed := _differing(before["contents"], named):
        raise UserError(f"{', '.join(changed)}: changed since the search there began; {ELSEWHERE}")


def _differing(one, other):
    return [key for key in sorted({**one, **other}) if one.get(key) != other.get(key)]


def _check_folder(out_dir, attributes):
    """Raise UserError if a folder has trials of another study than the one with these attributes."""
    mark = _mark(out_dir)
    belongs = not any(out_dir.glob("trial-*")) if mark is None else mark in attributes
    if not belongs:
        raise UserError(f"--out_dir {out_dir} has the trials of another search: choose another --out_dir")


def _mark_folder(study, out_dir):
    """Keep in a folder, and in its study, that they belong together. A study may have a folder on each machine."""
    if _mark(out_dir) is None:
        mark = f"folder {uuid.uuid4().hex}"
        study.set_user_attr(mark, True)
        with whole_file(out_dir / MARK) as path:
            path.write_text(mark)


def _mark(out_dir):
    path = out_dir / MARK
    return path.read_text(errors="replace") if path.is_file() else None


@contextlib.contextmanager
def _made(folder):
    """Make a folder, and if the block fails at once remove it again."""
    there = folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if not there:
            (folder / "study.lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _pruner(search):
    if search.pruner is None:
        return optuna.pruners.NopPruner()
    first_step = search.pruner.first_rung * search.eval_interval
    return optuna.pruners.SuccessiveHalvingPruner(first_step, search.pruner.reduction_factor)


def _sampler(search, number):
    """The sampler for the trial of a number.

    Its seed depends on the number: processes that work side by side, or one after another, draw different values, and
    which of them takes a trial makes no difference.
    """
    if search.sampler == "grid":  # shuffled in the same way by all; a trial has the combination of its number
        return optuna.samplers.GridSampler({f: each.grid() for f, each in search.ranges.items()}, search.seed)
    seed = random.Random(f"{search.seed} {number}").getrandbits(32)
    if search.sampler == "random":
        return optuna.samplers.RandomSampler(seed)
    return optuna.samplers.TPESampler(seed=seed, constant_liar=True)  # which keeps away from trials that still run


# ------------------------------------------------------------------------------------------------------ taking a trial


def take_trial(study: optuna.Study, search: Search, out_dir: Path) -> tuple[Claim | None, bool]:
    """The trial that this process is to work on, one that was left before a new one; None if there is none.

    Also whether others are at work on trials in this folder, which may still be left.
    """
    with study_locked(out_dir):
        trials = study.get_trials(deepcopy=False)
        running = [trial for trial in trials if trial.state == TrialState.RUNNING]
        here = [trial for trial in running if trial_folder(out_dir, trial.number).is_dir()]
        for trial in here:
            folder = trial_folder(out_dir, trial.number)
            lock = _try_lock(folder)
            if lock is None:
                continue
            trial = study.get_trials(deepcopy=False)[trial.number]
            if trial.state == TrialState.RUNNING:  # and has not just ended: a lock is given back after that
                return _claim(study, search, trial, folder, lock), True
            os.close(lock)
        if len(trials) < search.trials:
            return _new_trial(study, search, out_dir, len(trials)), True
        return None, bool(here)


def _new_trial(study, search, out_dir, number):
    """A trial that begins. Its folder is made first: killed in between, a process leaves no trial without a folder."""
    folder = trial_folder(out_dir, number)
    lock = _new_lock(folder)
    study.sampler = _sampler(search, number)
    trial = study.ask()
    if trial.number != number:  # a machine with a folder of its own was faster
        os.close(lock)
        with contextlib.suppress(OSError):
            (folder / "sweep.lock").unlink()
            folder.rmdir()
        if trial.number >= search.trials:
            study.tell(trial, state=TrialState.FAIL)
            return None
        folder = trial_folder(out_dir, trial.number)
        lock = _new_lock(folder)
    return _claim(study, search, study.get_trials(deepcopy=False)[trial.number], folder, lock)


def _claim(study, search, frozen: FrozenTrial, folder, lock):
    """A trial with all its values. One that was killed while it was made has some of them already."""
    study.sampler = _sampler(search, frozen.number)
    trial = Trial(study, frozen._trial_id)
    values = {flag: each.suggest(trial) for flag, each in search.ranges.items()}
    study.sampler = optuna.samplers.RandomSampler()  # the grid's would end a loop of Optuna's, of which there is none
    return Claim(trial, folder, lock, values, {*frozen.intermediate_values})


def release(claim: Claim) -> None:
    """Let others have a trial, if it is not done."""
    os.close(claim.lock)


def trial_folder(out_dir: Path, number: int) -> Path:
    """The folder of a trial."""
    return out_dir / f"trial-{number:04d}"


# --------------------------------------------------------------------------------------------------------------- locks


@contextlib.contextmanager
def study_locked(out_dir: Path) -> Iterator[None]:
    """Wait until no other process that shares the folder is in this block."""
    descriptor = os.open(out_dir / "study.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _flock(descriptor, fcntl.LOCK_EX, out_dir)
        yield
    finally:
        os.close(descriptor)


def _new_lock(folder):
    folder.mkdir(exist_ok=True)
    lock = _try_lock(folder)
    if lock is None:
        raise UserError(f"{folder} is in use by a search of another --storage: choose another --out_dir")
    return lock


def _try_lock(folder):
    """The descriptor of a trial's lock, or None if another process has it. It holds until it is closed here and in the
    children that have inherited it."""
    descriptor = os.open(folder / "sweep.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, folder)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _flock(descriptor, how, folder):
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        raise
    except OSError as error:
        raise UserError(f"{folder}: its file system has no locks ({error.strerror}): choose another") from None
