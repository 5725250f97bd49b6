"""What a script tells about its flags: their values in --help, and a mistake in one line that names the flag."""

import difflib
import re
import types
import typing

from jsonargparse import ArgumentParser, DefaultHelpFormatter
from jsonargparse.typing import restricted_string_type

# The type of a flag that takes the name of such a file. A choice beside one: Literal["a", "b"] | JsonFile.
JsonFile = restricted_string_type("JsonFile", r".+\.json$")

METAVARS = {
    int: "INT", float: "FLOAT", bool: "{true,false}", str: "TEXT", dict: "{NAME: VALUE,...}", JsonFile: "FILE.json",
}  # fmt: skip
WORDS = {
    int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "names and values",
    type(None): "null", JsonFile: "a file NAME.json",
}  # fmt: skip


class HelpFormatter(DefaultHelpFormatter):
    """jsonargparse's --help without the types as Python writes them: each flag shows what it takes (`show_values`)."""

    def _get_type_str(self, action):
        return None


def show_values(parser: ArgumentParser, flags: dict[str, type]) -> None:
    """Let the usage of a parser be short, and --help show the choices and kinds of value of its flags, name to type."""
    required = []
    for action in parser._actions:
        if action.dest in flags:
            action.metavar = _metavar(flags[action.dest])
            if action.required:
                required.append(f"--{action.dest} {action.metavar} ")
    parser.usage = f"%(prog)s {''.join(required)}[--FLAG VALUE ...]"


def explain(message: str, flags: dict[str, type], args: list[str]) -> str:
    """jsonargparse's message, some of which are a screen long, as one line that names the flag and the choices.

    flags: name to type. args: the command line.
    """
    unknown = re.search(r"unrecognized arguments: (?:--?)?([\w-]+)", message, re.IGNORECASE)
    unknown = unknown or re.search(r"(?:Key|Option) '(\w+)' is not (?:accepted|expected)", message)
    if unknown:
        likely = _or([f"--{flag}" for flag in suggestions(unknown[1], [*flags, "config"])])
        return f"unknown flag --{unknown[1]}" + (f", did you mean {likely}?" if likely else "; --help lists them all")
    key = re.search(r'Parser key "(\w+)"', message)
    value = re.search(r"(?:Got value|Given value|value): (.*)", message)
    if key and value and key[1] in flags:
        of_host = re.match(r"\[?file://[^/]", value[1])  # cli.py refuses it
        return f"--{key[1]} {value[1]}: expected {'file:///FOLDER' if of_host else _describe(flags[key[1]])}"
    required = re.search(r'Key "(\w+)" is required|arguments are required: (.+)', message)
    if required:
        names = ["--" + name for name in (required[1] or required[2]).split(", ")]
        return f"{_or(names, 'and')} {'are' if len(names) > 1 else 'is'} required"
    broken = re.match("(?:Problems parsing|Unexpected) config: *(.*)", message, re.DOTALL)
    if broken:
        files = " or ".join(re.findall(r"--config[= ](.+?)(?= --|$)", " ".join(args)))
        why = broken[1].replace('in "<unicode string>", ', "at ")
        return f"--config {files} is not a YAML file of settings: {why or 'it is empty'}"
    return re.sub(r'Parser key "(\w+)"(?::\s+Not of type Path:)?', r"--\1", message)


# ----------------------------------------------------------------------------------------------- flags that are unknown


def suggestions(name: str, flags: typing.Iterable[str]) -> list[str]:
    """Up to three flags that a user may have meant by an unknown one; none if no flag is like it.

    The first of these that finds any: flags that it abbreviates (lr, batch_size for global_batch_size), after one that
    is nearly the same (lora_rank for lora_r); one that is spelt almost the same; those that share most of their words
    with it (num_train_epochs for epochs).
    """
    flags, words = list(flags), name.replace("-", "_").split("_")
    abbreviated = [flag for flag in flags if _abbreviates(words, flag.split("_"))]
    if 1 <= len(abbreviated) <= 3:
        return list(dict.fromkeys([*difflib.get_close_matches(name, flags, n=1, cutoff=0.8), *abbreviated]))[:3]
    close = difflib.get_close_matches(name, flags, n=1)
    shared = {flag: _shared_words(words, flag.split("_")) for flag in flags}
    most = max(shared.values(), default=0)
    return close or [flag for flag in flags if shared[flag] == most >= 0.5][:3]


def _abbreviates(words, flag_words):
    """Whether words are the initials of a flag's (lr), or each begins one of the flag's, in their order (max_len)."""
    if words == ["".join(word[0] for word in flag_words)]:
        return True
    left = iter(flag_words)
    return all(any(word and whole.startswith(word) for whole in left) for word in words)


def _shared_words(words, flag_words):
    """The share of a flag's words that also occur, or begin one that occurs, among others (schedule in scheduler).

    A single letter, as in z_loss, begins too many.
    """
    return sum(
        any(word == whole or (len(whole) > 1 and word.startswith(whole)) for word in words) for whole in flag_words
    ) / len(flag_words)


# ------------------------------------------------------------------------------------------------------ types, in words


def _describe(annotation):
    """A type in words: `Literal["a", "b"] | None` is "one of a, b or null"."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_describe, args))
    if origin is list:
        return f"a list such as [a,b] of {_describe(args[0])}"
    return WORDS.get(origin or annotation, "a path")


def _metavar(annotation):
    """A type as --help shows it after the flag: `int | Literal["a", "b"] | None` is "INT|{a,b}".

    What is unusual on a command line is left out: null, and names and values, which come from a --config file.
    """
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return "{" + ",".join(map(str, args)) + "}" if len(args) > 1 else str(args[0])
    if origin in (typing.Union, types.UnionType):
        usual = [arg for arg in args if arg is not type(None) and typing.get_origin(arg) is not dict]
        return "|".join(map(_metavar, usual))
    if origin is list:
        return f"[{_metavar(args[0])},...]"
    return METAVARS.get(origin or annotation, "PATH")


def _or(items, word="or"):
    """A list in words: "a, b or c"."""
    return f" {word} ".join(filter(None, [", ".join(items[:-1]), *items[-1:]]))
