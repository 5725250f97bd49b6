"""Adding tokens to the tokenizer's files of a model folder."""

from pathlib import Path

from shell.cli import UserError
from shell.files import read_json, write_json
from text.tokenizer import Tokenizer


def new_ids(folder: Path, tokens: list[str]) -> dict[str, int]:
    """The ids that new tokens get after those of the tokenizer in `folder`, by their texts.

    Raises UserError for a text that is a token already, that is empty or blank, or that is given twice.
    """
    tokenizer = Tokenizer(folder)
    for number, text in enumerate(tokens):
        if not text.strip() or text in tokens[:number]:
            raise UserError(f"--add_tokens: {text!r} is {'blank' if not text.strip() else 'given twice'}")
        if tokenizer.id_of(text) is not None:
            raise UserError(f"--add_tokens: {text!r} is the token {tokenizer.id_of(text)} already: leave it out")
    return {text: tokenizer.vocab_size + number for number, text in enumerate(tokens)}


def add_tokens(folder: Path, ids: dict[str, int], special: bool) -> None:
    """Write new tokens into the tokenizer's files in `folder`. special: a user's text never becomes one (Tokenizer).

    tokenizer.json lists them in `added_tokens`. A folder without it (SentencePiece, vocab.json with merges.txt), or
    whose tokenizer_config.json lists its added tokens, has them there in `added_tokens_decoder`, as transformers does.
    """
    how = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": special}
    whole, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if whole.is_file():
        values = read_json(whole)
        values["added_tokens"] = [*values["added_tokens"], *({"id": id, "content": t, **how} for t, id in ids.items())]
        write_json(whole, values)
    config = read_json(settings) if settings.is_file() else {}
    if not whole.is_file() or "added_tokens_decoder" in config:
        before = config.get("added_tokens_decoder") or listed(folder)
        config["added_tokens_decoder"] = before | {str(id): {"content": text, **how} for text, id in ids.items()}
        write_json(settings, config)


def listed(folder: Path) -> dict[str, dict]:
    """The added tokens that a tokenizer has, as `added_tokens_decoder` lists them: it must list all if it is there."""
    keys = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    tokens = sorted(Tokenizer(folder).added_tokens.values(), key=lambda token: token["id"])
    return {str(token["id"]): {key: token.get(key, False) for key in keys} for token in tokens}
