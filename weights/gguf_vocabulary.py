"""A tokenizer's files as metadata of a .gguf file, so that llama.cpp and gguf_format.py make the same ids of a text.

Byte-level BPE is llama.cpp's "gpt2": tokens, merges, and the name of how a text is cut into words. SentencePiece's kind
is its "llama": tokens with scores, from a tokenizer.model, or from the order of the merges in a tokenizer.json. What
these two do not have is refused by name.
"""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import gguf

from shell.cli import UserError
from shell.files import read_json
from weights.gguf_format import (
    BYTE,
    CONTROL,
    ENDS,
    GPT2,
    NORMAL,
    PRE_TOKENIZERS,
    QWEN2,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    WHOLE_WORDS_FIRST,
    read_fields,
)

LOWEST = -1e9  # the score of tokens that no merge makes
# What a BPE model of the tokenizers library may say, and the values that change nothing.
HARMLESS = {
    "type": (None, "BPE"), "dropout": (None, 0, 0.0), "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
}  # fmt: skip
ADDED_HOW = ("single_word", "lstrip", "rstrip")  # ways to match an added token that a .gguf file cannot say


class Entry(NamedTuple):
    """A token: its text, its type (as `NORMAL`), and its score, which only SentencePiece's kind has."""

    text: str
    type: int
    score: float = LOWEST


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any, config: dict) -> None:
    """Add a tokenizer to a file's metadata: the inverse of `gguf_format.write_tokenizer`.

    tokenizer: a `text.tokenizer.Tokenizer`. config: the model's parsed config.json. Raises UserError for a tokenizer
    that llama.cpp does not have.
    """
    path, sentencepiece = tokenizer.folder / "tokenizer.json", tokenizer.folder / "tokenizer.model"
    if tokenizer.begin_ids not in ((), (tokenizer.bos_id,)):
        raise UserError(f"no GGUF can be written: a text begins with {tokenizer.begin_text!r}, llama.cpp has BOS alone")
    if not path.is_file() and not sentencepiece.is_file():
        raise UserError(f"{tokenizer.folder} has neither {path.name} nor {sentencepiece.name}: a .gguf file needs one")
    if not path.is_file():
        entries = _add_sentencepiece(writer, sentencepiece)
    else:
        spec = read_json(path)
        _check_bpe(path, spec["model"])
        decoders = {part["type"] for part in _parts(spec.get("decoder"))}
        if "ByteLevel" in decoders:
            entries = _add_byte_level(writer, path, spec)
        else:
            entries = _add_sentencepiece_json(writer, path, spec, tokenizer.special_tokens.get("unk_token"))
    if tokenizer.prefix == "first":
        print("note: llama.cpp puts a space before a text after a special token too, this tokenizer only at the start")
    entries = _with_added_tokens(entries, tokenizer)
    entries = _one_for_each_row(entries, config["vocab_size"])
    writer.add_token_list([entry.text for entry in entries])
    writer.add_token_types([entry.type for entry in entries])
    if any(entry.score != LOWEST for entry in entries):
        writer.add_token_scores([entry.score for entry in entries])
    _add_special_ids(writer, tokenizer, config)
    _add_chat_templates(writer, tokenizer)


def _refused(path, what):
    return UserError(f"no GGUF can be written with this {path.name}: {what}, which llama.cpp does not have")


# ------------------------------------------------------------------------------------------------ byte-level BPE


def _add_byte_level(writer, path, spec):
    """Metadata of a byte-level BPE vocabulary. Returns its tokens, {id: Entry}."""
    model = spec["model"]
    name = _pre_tokenizer_name(path, spec)
    merges = _merges(model)
    if any(" " in part for merge in merges for part in merge) or not merges:
        raise _refused(path, "its merges are missing, or have blanks in them")
    if model.get("unk_token") is not None and not model["vocab"].keys() >= _byte_letters():
        raise _refused(path, f"its vocabulary lacks single bytes and has {model['unk_token']!r} for them")
    if bool(model.get("ignore_merges")) != (name in WHOLE_WORDS_FIRST):
        added = {token["content"] for token in spec["added_tokens"]}
        _check_every_token_is_merged(path, model, merges, added)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_merges([" ".join(merge) for merge in merges])
    return {id: Entry(text, NORMAL) for text, id in model["vocab"].items()}


def _pre_tokenizer_name(path, spec):
    """llama.cpp's name of how a tokenizer.json cuts a text into words (`PRE_TOKENIZERS`)."""
    patterns = []
    for part in _parts(spec.get("pre_tokenizer")):
        if (found := _patterns(part)) is None:
            raise _refused(path, f"its pre-tokeniser has a part {part['type']} with other settings")
        patterns += found
    name = next((name for name, known in PRE_TOKENIZERS.items() if known == patterns), None)
    if name is None:
        raise _refused(path, f"its pre-tokeniser is none of {', '.join(PRE_TOKENIZERS)}")
    normalizers = [part["type"] for part in _parts(spec.get("normalizer"))]
    if normalizers not in ([], ["NFC"]) or normalizers and patterns != [QWEN2]:
        raise _refused(path, f"its normaliser is {' and '.join(normalizers)}")
    if normalizers:
        print("note: llama.cpp does not normalise texts (NFC), as this tokenizer does")
    elif patterns == [QWEN2]:
        print(
            "note: a .gguf file cannot say that the tokenizer does not normalise texts (NFC): we read it as if it did"
        )
    return name


def _patterns(part):
    """The regexes by which a part of a pre-tokeniser cuts, as in `PRE_TOKENIZERS`; None if it does anything else."""
    if part["type"] == "Digits" and part.get("individual_digits"):
        return [r"\p{N}"]
    if part["type"] == "ByteLevel" and not part.get("add_prefix_space", True):
        return [GPT2] if part.get("use_regex", True) else []
    regex = part.get("pattern", {}).get("Regex")
    if part["type"] == "Split" and part["behavior"] == "Isolated" and not part.get("invert") and regex:
        return [regex]
    return None


def _check_every_token_is_merged(path, model, merges, added):
    """Raise UserError unless the merges make each token that is not `added` of its own letters.

    Then it makes no difference whether a word that is in the vocabulary is looked up first (ignore_merges).
    """
    from tokenizers import models

    library = models.BPE(model["vocab"], merges)
    for text in model["vocab"].keys() - added:
        if len(library.tokenize(text)) > 1:
            raise _refused(path, f"ignore_merges is {model.get('ignore_merges', False)}, and no merges make {text!r}")


def _byte_letters():
    from tokenizers import pre_tokenizers

    return set(pre_tokenizers.ByteLevel.alphabet())


# ----------------------------------------------------------------------------------------------------- SentencePiece


def _add_sentencepiece(writer, path):
    """Metadata of a tokenizer.model. Returns its tokens, {id: Entry}."""
    pieces, trainer, normalizer = [], {}, {}
    for number, value in read_fields(path.read_bytes()):
        if number == 1:
            piece = dict(read_fields(value))
            pieces.append(Entry(piece[1].decode(), piece.get(3, NORMAL), piece.get(2, 0.0)))
        elif number == 2:
            trainer |= dict(read_fields(value))
        elif number == 3:
            normalizer |= dict(read_fields(value))
    # The numbers of the fields, and what a field that is left out means, are those of sentencepiece_model.proto.
    if trainer.get(3, 1) != 2:
        raise _refused(path, "it is no BPE model")
    if normalizer.get(2) or not normalizer.get(5, 1) or trainer.get(24):
        raise _refused(path, f"its normaliser {normalizer.get(1, b'').decode()!r} changes texts")
    _add_sentencepiece_flags(writer, bool(normalizer.get(3, 1)), bool(normalizer.get(4, 1)))
    return dict(enumerate(pieces))


def _add_sentencepiece_json(writer, path, spec, unknown):
    """Metadata of a tokenizer.json of SentencePiece's kind. Returns its tokens, {id: Entry}.

    unknown: the text of <unk>, which a file whose bytes all have tokens need not name.
    """
    model, prefix = spec["model"], False
    for part in [*_parts(spec.get("normalizer")), *_parts(spec.get("pre_tokenizer"))]:
        if part["type"] == "Metaspace" and part.get("replacement") == "▁" and not part.get("split", True):
            prefix = prefix or part.get("add_prefix_space", part.get("prepend_scheme", "always") != "never")
        elif part["type"] == "Prepend" and part["prepend"] == "▁":
            prefix = True
        elif part["type"] != "Replace" or (part["pattern"], part["content"]) != ({"String": " "}, "▁"):
            raise _refused(path, f"its normaliser or pre-tokeniser has a part {part['type']} with other settings")
    unknown = model.get("unk_token") or unknown
    bytes_ = {f"<0x{byte:02X}>" for byte in range(256)}
    if not model.get("byte_fallback") or model.get("ignore_merges") or not model["vocab"].keys() >= {unknown, *bytes_}:
        raise _refused(path, "it has no byte_fallback, a byte or unk_token without a token, or ignore_merges")
    added = {token["content"] for token in spec["added_tokens"]}
    special = dict.fromkeys(added, CONTROL) | dict.fromkeys(bytes_, BYTE) | {unknown: UNKNOWN}
    scores = _scores(path, {text for text in model["vocab"] if text not in special}, _merges(model))
    _add_sentencepiece_flags(writer, prefix, False)
    return {
        id: Entry(text, special.get(text, NORMAL), scores.get(text, LOWEST if text not in special else 0.0))
        for text, id in model["vocab"].items()
    }


def _scores(path, pieces, merges):
    """Scores by piece with which SentencePiece merges in the order of `merges`, the first one highest.

    SentencePiece joins any two pieces that make a piece: those that make the one with the highest score, of equal ones
    the leftmost. That is the same if the merges are all pairs there are, and those that make one piece stand together.
    Runs of one letter (blanks, in Mistral's) may stand among each other: they have one score, and grow from the left.
    """
    merges = [merge for merge in merges if "".join(merge) in pieces and pieces.issuperset(merge)]
    pairs = {
        (piece[:place], piece[place:])
        for piece in pieces
        for place in range(1, len(piece))
        if piece[:place] in pieces and piece[place:] in pieces
    }
    made = [piece for piece, _ in itertools.groupby(map("".join, merges))]
    times = Counter(made)
    mixed = [place for place, piece in enumerate(made) if times[piece] > 1]
    first, last = (mixed[0], mixed[-1]) if mixed else (0, -1)
    if set(merges) != pairs or not all(len(set(piece)) == 1 for piece in made[first : last + 1]):
        raise _refused(path, "its merges are not in an order that SentencePiece's scores could give")
    return {piece: -float(first if first <= place <= last else place) for place, piece in enumerate(made)}


def _add_sentencepiece_flags(writer, prefix, remove_blanks):
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_add_space_prefix(prefix)
    writer.add_remove_extra_whitespaces(remove_blanks)


# --------------------------------------------------------------------------------------------------------- all kinds


def _parts(node):
    """The parts of a normaliser, pre-tokeniser or decoder of tokenizer.json, sequences opened."""
    if node is None or node["type"] != "Sequence":
        return [node] if node else []
    inner = next(value for value in node.values() if isinstance(value, list))
    return [part for child in inner for part in _parts(child)]


def _check_bpe(path, model):
    """Raise UserError for settings of a tokenizer.json's model that llama.cpp does not have."""
    for key, harmless in HARMLESS.items():
        if model.get(key) not in harmless:
            raise _refused(path, f"its model has {key} {model[key]!r}")


def _merges(model):
    """The merges of a tokenizer.json, as pairs; older files write a pair as one text."""
    return [tuple(merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in model["merges"]]


def _with_added_tokens(entries, tokenizer):
    """The tokens {id: Entry} with the added ones, whose texts may be no words of the vocabulary, in their place."""
    entries = dict(entries)
    for text, token in tokenizer.added_tokens.items():
        how = [name for name in ADDED_HOW if token.get(name)]
        if how:
            raise _refused(Path("tokenizer"), f"the added token {text!r} has {' and '.join(how)}")
        before = entries.get(token["id"], Entry(text, NORMAL, LOWEST))
        if before.type != UNKNOWN:
            entries[token["id"]] = before._replace(text=text, type=CONTROL if token.get("special") else USER_DEFINED)
    return entries


def _one_for_each_row(entries, rows):
    """The tokens as a list with one for each row of the embedding; an id without a token becomes an unused one."""
    beyond = {id: entry for id, entry in entries.items() if id >= rows}
    if beyond:
        names = ", ".join(f"{entry.text!r} ({id})" for id, entry in sorted(beyond.items())[:3])
        print(f"note: {len(beyond)} tokens are left out, for which the model has no row: {names}")
    return [entries.get(id, Entry(f"[PAD{id}]", UNUSED)) for id in range(rows)]


def _add_special_ids(writer, tokenizer, config):
    """BOS, EOS and other special ids, and which of them start and end a text."""

    def id_of(name):
        token = tokenizer.added_tokens.get(tokenizer.special_tokens.get(f"{name}_token"))
        return config.get(f"{name}_token_id") if token is None else token["id"]

    rows = config["vocab_size"]
    ends = [tokenizer.eos_id, *sorted(tokenizer.eos_ids - {tokenizer.eos_id})]
    if len(ends) > len(ENDS):
        print(f"note: tokens {ends[len(ENDS) :]} end a text too, for which a GGUF file has no key")
    ids = {name: id_of(name) for name in ("bos", "unk", "pad")} | dict(zip(ENDS, ends, strict=False))
    for name, id in ids.items():
        if type(id) is int and id < rows:
            getattr(writer, f"add_{name}_token_id")(id)
    writer.add_add_bos_token(tokenizer.begin_ids == (tokenizer.bos_id,))
    settings = Path(tokenizer.folder, "tokenizer_config.json")
    adds_eos = settings.is_file() and read_json(settings).get("add_eos_token")
    writer.add_add_eos_token(bool(adds_eos))


def _add_chat_templates(writer, tokenizer):
    named = {"default": tokenizer.chat_template, "tool_use": tokenizer.tool_template}
    templates = [{"name": name, "template": text} for name, text in named.items() if text]
    if templates:
        writer.add_chat_template(templates)
