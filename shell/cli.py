"""The command line of every script: flags from a dataclass, and mistakes answered in one line.

A script declares its flags as the fields of a dataclass called `Settings`, described under "Args:" in its
docstring, and checks them in `__post_init__`, with `check_numbers` or by raising `UserError`. It parses them before its
heavy imports, so that a mistyped flag is answered at once and not after seconds of importing torch:

    if __name__ == "__main__":
        settings = cli.parse(Settings)
    import torch
    ...
    if __name__ == "__main__":
        cli.run(main, settings)
"""

import argparse
import ast
import dataclasses
import functools
import importlib.util
import itertools
import json
import operator
import os
import re
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn

from shell import requirements

requirements.explain_missing()  # before the first import that may be missing

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser
from jsonargparse.typing import register_type

from shell import process
from shell.explain import HelpFormatter, JsonFile, explain, show_values

ROOT = requirements.ROOT
_NAME = r"[A-Za-z0-9][\w.-]*"  # of an adapter, among several


class UserError(Exception):
    """A mistake that the user can mend. Its text is one line: what, where (file, line, key, tensor), what to do."""


def local_url(text: str) -> str:
    """A text as it is, but file://localhost/… as file:///…. Raises UserError for a file://HOST/… of another machine."""
    text = re.sub("^file://localhost/", "file:///", text)
    if re.match("file://[^/]", text):
        raise UserError(f"{text}: expected file:///FOLDER with three slashes, or the folder's path alone")
    return text


def _path(text):
    """What a flag of the type Path has: ~ is the home folder also where no shell has seen it."""
    if not isinstance(text, str):
        raise UserError(f"{text}: expected a path (a number in quotes)")  # YAML's 0010 is the number 8
    return Path(os.path.expanduser(local_url(text)))


register_type(Path, deserializer=_path, deserializer_exceptions=UserError, type_check=isinstance)


def parse(settings_class: type, args: list[str] | None = None) -> Any:
    """The settings given on the command line (or in the list `args`): flags over `--config` YAML over defaults.

    settings_class: a dataclass; returns one of it. Its fields' types say what a flag takes: choices are a Literal,
    which `table_keys` can fill, and a `JsonFile` is the name of such a file. Exits with status 2 and one line on
    standard error if the arguments are not good.
    """
    process.set_defaults()
    flags = {field.name: field.type for field in dataclasses.fields(settings_class)}
    args = _complete_switches(sys.argv[1:] if args is None else args, flags)
    args = _without_python(args, flags)
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, formatter_class=HelpFormatter)
    parser.add_argument("--config", action=ActionConfigFile, help="A YAML file with any of the settings below.")
    parser.add_class_arguments(settings_class, fail_untyped=True)
    show_values(parser, flags)
    try:
        _check_nesting(args)
        values = parser.parse_args(args).as_dict()
        values.pop("config")
        files = {name: str(os.path.expanduser(v)) for name, v in values.items() if isinstance(v, JsonFile)}
        return settings_class(**(values | files))
    except UnicodeDecodeError as error:
        fail(explain(f"Unexpected config: {error}", flags, args))
    except argparse.ArgumentError as error:
        fail(explain(str(error), flags, args))
    except UserError as error:
        fail(error)


def checked_values(settings_class: type, values: dict, where: str) -> dict:
    """Values for flags as if they had been given in YAML: of the types of the flags, the others at their defaults.

    Raises UserError, which names `where` the values stand, if a flag is unknown, missing or cannot have its value. What
    `__post_init__` checks is not checked.
    """
    flags = {field.name: field.type for field in dataclasses.fields(settings_class)}
    try:
        return _parser_of(settings_class).parse_object(values).as_dict()
    except argparse.ArgumentError as error:
        raise UserError(f"{where}: {explain(str(error), flags, [])}") from None


@functools.cache
def _parser_of(settings_class):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(settings_class, fail_untyped=True)
    return parser


def changed(settings: Any, values: dict, where: str) -> Any:
    """The settings with other values for some flags, checked as if they had been given in YAML.

    Raises UserError, which names `where` the values stand, if they are not good.
    """
    now = {name: str(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(settings).items()}
    checked = checked_values(type(settings), now | values, where)
    try:
        return type(settings)(**checked)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def run(main: Callable[[Any], None], settings: Any) -> None:
    """Call `main(settings)`; a `UserError` or an OSError becomes one line and exit status 2, Ctrl-C status 130."""
    try:
        main(settings)
    except UserError as error:
        fail(error)
    except BrokenPipeError:  # the reader of the output has ended, as `head` does
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (Python flushes it once more at exit)
    except OSError as error:  # no space left, no permission
        fail(f"{error.filename or 'reading or writing'}: {error.strerror or error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


# ------------------------------------------------------------------------------------------- checks for __post_init__


def check_numbers(
    settings: Any,
    *names: str,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> None:
    """Raise UserError if a setting of these names, or a number in it if it is a list, is out of the range.

    A setting that is None or no number, such as "auto", is not checked.
    """
    ends = {"above": above, "at least": least, "below": below, "at most": most}
    ends = {words: end for words, end in ends.items() if end is not None}
    holds = {"above": operator.gt, "at least": operator.ge, "below": operator.lt, "at most": operator.le}
    for name in names:
        value = getattr(settings, name)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not all(holds[words](number, end) for words, end in ends.items()):
                must = " and ".join(f"{words} {end}" for words, end in ends.items())
                raise UserError(f"--{name} {number}: must be {must}")


def check_files(settings: Any, *names: str) -> None:
    """Raise UserError if a setting of these names is neither the path of a file nor None."""
    for name in names:
        path = getattr(settings, name)
        if path is not None and not path.is_file():
            raise UserError(f"--{name} {path}: no such file")


def check_out_file(settings: Any, name: str) -> None:
    """Raise UserError unless the setting with this name is a path where a file can be written; None is."""
    path = getattr(settings, name)
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"--{name} {path} is a folder: name a file in it")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"--{name} {path}: cannot be written, because {folder} is not a folder that you can write to")


def check_model(settings: Any) -> None:
    """Raise UserError unless the settings name a model: its folder, or that of an adapter, which names its base.

    Of settings with `adapters` these stand for `adapter_dir`.
    """
    several = getattr(settings, "adapters", None)
    if several is not None and settings.adapter_dir is not None:
        raise UserError("--adapter_dir and --adapters exclude each other: name all adapters in --adapters")
    if settings.checkpoint_dir is None and settings.adapter_dir is None and several is None:
        raise UserError("--checkpoint_dir or --adapter_dir is required")


def named_folders(value: str | list[str] | None, flag: str) -> dict[str, Path]:
    """The folders, by name, that a flag such as --adapters has: "a=out/a,b=out/b", or a list of such pairs.

    Raises UserError for what is no such text, a name that comes twice or has other letters than `_NAME`, or no folder.
    """
    folders = {}
    for pair in (value.split(",") if isinstance(value, str) else value) if value is not None else ():
        name, equals, folder = pair.strip().partition("=")
        if not equals or not re.fullmatch(_NAME, name) or not folder:
            raise UserError(f"--{flag} {pair}: expected NAME=FOLDER, a name of letters, digits, dots, - and _")
        if name == "base" or name in folders:
            reason = "is the base alone" if name == "base" else "comes twice"
            raise UserError(f"--{flag}: the name {name} {reason}: choose another")
        folders[name] = _path(folder)
        if "://" not in folder and not folders[name].is_dir():  # an address is fetched later
            raise UserError(f"--{flag} {name}={folder}: no such folder")
    if value is not None and not folders:
        raise UserError(f"--{flag}: expected NAME=FOLDER, one or several with commas between them")
    return folders


def check_installed(*modules: str, where: str | None = None) -> None:
    """Raise UserError if one of these modules, which are optional requirements, is not installed.

    For an option that would import it only after long work; elsewhere the failing import itself says the same
    (shell/requirements.py). where: what needs it, such as a flag or a file, for the message.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise UserError((f"{where}: " if where else "") + requirements.how_to_install(module))


def number_of_bytes(text: str, flag: str) -> int:
    """The bytes that a text such as 24GB, 24GiB or 800MB stands for. Raises UserError, which names the flag."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([GM]i?B)", text)
    if not match or float(match[1]) == 0:
        raise UserError(f"--{flag} {text}: expected a size such as 24GB, 24GiB or 800MB")
    return int(float(match[1]) * {"GB": 10**9, "GiB": 2**30, "MB": 10**6, "MiB": 2**20}[match[2]])


def number_of_seconds(text: str, flag: str) -> float:
    """The seconds that a text such as 24h, 90m or 3600s stands for. Raises UserError, which names the flag."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([hms])", text)
    if not match or float(match[1]) == 0:
        raise UserError(f"--{flag} {text}: expected a time such as 24h, 90m or 3600s")
    return float(match[1]) * {"h": 3600, "m": 60, "s": 1}[match[2]]


# --------------------------------------------------------------------------------------------------- choices, and ends


def table_keys(file: str, table: str) -> tuple[str, ...]:
    """The keys of the dict called `table` in a file of the project, such as "lora.py", without running that file.

    So a flag's choices are the rows of the table that defines them, and --help lists them without importing torch:
    `Literal[cli.table_keys("lora.py", "ADAPTERS")]`, or with more choices `Literal[*cli.table_keys(...), "full"]`.
    Raises LookupError if the file assigns no dict to that name.
    """
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if [getattr(target, "id", None) for target in targets] == [table] and isinstance(node.value, ast.Dict):
            return tuple(ast.literal_eval(key) for key in node.value.keys)
    raise LookupError(f"{file} assigns no dict to {table}")


def fail(message: object) -> NoReturn:
    """Print one line on standard error and exit with status 2. The middle of a very long message is left out."""
    line = " ".join(str(message).split())
    print("error: " + (line if len(line) <= 1000 else f"{line[:600]} […] {line[-300:]}"), file=sys.stderr)
    sys.exit(2)


def _complete_switches(args, flags):
    """`--resume` alone means `--resume=true`, as a user expects of a flag that is true or false."""
    switches = {"--" + name for name, kind in flags.items() if kind is bool}
    values = [*args[1:], "--"]
    return [
        f"{arg}=true" if arg in switches and value.startswith("--") else arg
        for arg, value in zip(args, values, strict=False)
    ]


def _without_python(args, flags):
    """The same arguments, with values that are written as Python prints them in JSON.

    W&B's sweep agent writes None, ['q_proj', 'v_proj'] and {'down_proj': 8}. YAML would take the first for a text, and
    the backslashes of a text in the others as they stand. Only flags that take null, a list or names with values are
    looked at, and only what Python would print exactly so: all else is read as YAML, as ever.
    """
    result = []
    for before, arg in itertools.pairwise(["", *args]):
        name, equals, value = arg.partition("=") if arg.startswith("--") else (before, "", arg)
        kind = flags.get(name.removeprefix("--")) if name.startswith("--") else None
        result.append(name + equals + _as_json(value, kind) if equals else _as_json(arg, kind))
    return result


def _as_json(text, kind):
    """A value printed by Python as JSON, if a flag of this type takes such a value; any other text as it is."""
    kinds = {typing.get_origin(each) or each for each in (kind, *typing.get_args(kind))} & {list, dict, NoneType}
    if not kinds:
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
    return json.dumps(value) if type(value) in kinds and str(value) == text else text


def _check_nesting(args):
    """Raise UserError for a `--config` file nested so deeply that libyaml, which jsonargparse uses, would crash."""
    given = [b if a == "--config" else a.removeprefix("--config=") for a, b in itertools.pairwise([*args, ""])
             if a == "--config" or a.startswith("--config=")]  # fmt: skip
    for path in given:
        try:
            content = Path(os.path.expanduser(path)).read_bytes()
            yaml.compose(content, yaml.SafeLoader)  # in Python, where recursion has an end
        except RecursionError:
            raise UserError(f"--config {path} is nested too deeply: it is not a YAML file of settings") from None
        except (OSError, ValueError, yaml.YAMLError):
            pass  # the parser's message is the better one
