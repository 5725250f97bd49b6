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
import difflib
import itertools
import operator
import os
import re
import sys
import types
import typing
from pathlib import Path

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser

ROOT = Path(__file__).resolve().parents[1]


class UserError(Exception):
    """A mistake that the user can mend. Its text is one line: what, where (file, line, key, tensor), what to do."""


def parse(settings_class, args=None):
    """The settings given on the command line (or in the list `args`): flags over `--config` YAML over defaults.

    Exits with status 2 and one line on standard error if they are not good.
    """
    args = _complete_switches(sys.argv[1:] if args is None else args, settings_class)
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action=ActionConfigFile, help="A YAML file with any of the settings below.")
    parser.add_class_arguments(settings_class, fail_untyped=True)
    try:
        _check_nesting(args)
        values = parser.parse_args(args).as_dict()
        values.pop("config")
        return settings_class(**values)
    except UnicodeDecodeError as error:
        fail(_explain(f"Unexpected config: {error}", settings_class, args))
    except argparse.ArgumentError as error:
        fail(_explain(str(error), settings_class, args))
    except UserError as error:
        fail(error)


def run(main, settings):
    """Call `main(settings)`; a `UserError` or the system's no becomes one line and exit status 2, Ctrl-C status 130."""
    try:
        main(settings)
    except UserError as error:
        fail(error)
    except BrokenPipeError:  # whoever read the output has seen enough, as `head` has
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (Python flushes it once more at exit)
    except OSError as error:  # no space left, no permission
        fail(f"{error.filename or 'reading or writing'}: {error.strerror or error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def check_numbers(settings, *names, above=None, least=None, below=None, most=None):
    """Raise UserError unless the settings with these names, or each number of a list, are in the range; None is."""
    ends = {"above": above, "at least": least, "below": below, "at most": most}
    ends = {words: end for words, end in ends.items() if end is not None}
    holds = {"above": operator.gt, "at least": operator.ge, "below": operator.lt, "at most": operator.le}
    for name in names:
        value = getattr(settings, name)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not all(holds[words](number, end) for words, end in ends.items()):
                must = " and ".join(f"{words} {end}" for words, end in ends.items())
                raise UserError(f"--{name} {number}: must be {must}")


def check_files(settings, *names):
    """Raise UserError unless the settings with these names are files; None is."""
    for name in names:
        path = getattr(settings, name)
        if path is not None and not path.is_file():
            raise UserError(f"--{name} {path}: no such file")


def table_keys(file: str, table: str) -> tuple[str, ...]:
    """The keys of the dict called `table` in a file of the project, such as "lora.py", without running that file.

    So a flag's choices are the rows of the table that defines them, and --help lists them without importing torch.
    """
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [table]:
            return tuple(ast.literal_eval(key) for key in node.value.keys)
    raise LookupError(f"{file} assigns no dict to {table}")


def check_out_file(settings: object, name: str) -> None:
    """Raise UserError unless the setting with this name is a path where a file can be written; None is."""
    path = getattr(settings, name)
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"--{name} {path} is a folder: name a file in it")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"--{name} {path}: cannot be written, because {folder} is not a folder that you can write to")


def check_model(settings):
    """Raise UserError unless the settings name a model: its folder, or that of an adapter, which knows its base."""
    if settings.checkpoint_dir is None and settings.adapter_dir is None:
        raise UserError("--checkpoint_dir or --adapter_dir is required")


def number_of_bytes(text, flag):
    """The bytes that a text such as 24GB, 24GiB or 800MB stands for. Raises UserError that names the flag."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([GM]i?B)", text)
    if not match or float(match[1]) == 0:
        raise UserError(f"--{flag} {text}: expected a size such as 24GB, 24GiB or 800MB")
    return int(float(match[1]) * {"GB": 10**9, "GiB": 2**30, "MB": 10**6, "MiB": 2**20}[match[2]])


def number_of_seconds(text, flag):
    """The seconds that a text such as 24h, 90m or 3600s stands for. Raises UserError that names the flag."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([hms])", text)
    if not match or float(match[1]) == 0:
        raise UserError(f"--{flag} {text}: expected a time such as 24h, 90m or 3600s")
    return float(match[1]) * {"h": 3600, "m": 60, "s": 1}[match[2]]


def fail(message):
    """Print one line on standard error and exit with status 2. What a damaged file fills with noise is left out."""
    line = " ".join(str(message).split())
    print("error: " + (line if len(line) <= 1000 else f"{line[:600]} […] {line[-300:]}"), file=sys.stderr)
    sys.exit(2)


def _complete_switches(args, settings_class):
    """`--resume` alone means `--resume=true`, as a user expects of a flag that is true or false."""
    switches = {"--" + field.name for field in dataclasses.fields(settings_class) if field.type is bool}
    values = [*args[1:], "--"]
    return [
        f"{arg}=true" if arg in switches and value.startswith("--") else arg
        for arg, value in zip(args, values, strict=False)
    ]


def _check_nesting(args):
    """Raise UserError for a `--config` file nested so deeply that libyaml, which jsonargparse uses, would crash."""
    given = [b if a == "--config" else a.removeprefix("--config=") for a, b in itertools.pairwise([*args, ""])
             if a == "--config" or a.startswith("--config=")]  # fmt: skip
    for path in given:
        try:
            yaml.compose(Path(path).read_bytes(), yaml.SafeLoader)  # in Python, where recursion has an end
        except RecursionError:
            raise UserError(f"--config {path} is nested too deeply: it is not a YAML file of settings") from None
        except (OSError, ValueError, yaml.YAMLError):
            pass  # the parser says it better


def _explain(message, settings_class, args):
    """jsonargparse's message, some of which are a screen long, as one line that names the flag and the choices."""
    flags = {field.name: field.type for field in dataclasses.fields(settings_class)}
    unknown = re.search(r"unrecognized arguments: (--?)?([\w-]+)", message, re.IGNORECASE)
    unknown = unknown or re.search(r"(Key|Option) ()'(\w+)' is not (accepted|expected)", message)
    if unknown:
        name = unknown[unknown.lastindex if "unrecognized" in message.lower() else 3]
        close = difflib.get_close_matches(name, flags, n=1)
        return f"unknown flag --{name}" + (f", did you mean --{close[0]}?" if close else "; --help lists them all")
    key = re.search(r'Parser key "(\w+)"', message)
    value = re.search(r"(?:Got value|Given value|value): (.*)", message)
    if key and value and key[1] in flags:
        return f"--{key[1]} {value[1]}: expected {_describe(flags[key[1]])}"
    required = re.search(r'Key "(\w+)" is required|arguments are required: (.+)', message)
    if required:
        return f"--{(required[1] or required[2]).replace(', ', ', --')} is required"
    broken = re.match("(?:Problems parsing|Unexpected) config: *(.*)", message, re.DOTALL)
    if broken:
        files = " or ".join(re.findall(r"--config[= ](.+?)(?= --|$)", " ".join(args)))
        why = broken[1].replace('in "<unicode string>", ', "at ")
        return f"--config {files} is not a YAML file of settings: {why or 'it is empty'}"
    return re.sub(r'Parser key "(\w+)"', r"--\1", message)


def _describe(annotation):
    """A type in words: `Literal["a", "b"] | None` is "one of a, b, null"."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(arg) for arg in args)
    if origin is dict:
        return "names and values"
    if origin is list:
        return f"a list such as [a,b] of {_describe(args[0])}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return names.get(annotation, "a path")
