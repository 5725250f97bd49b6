"""Byte-level BPE as a tokenizer.json, also from formats without merges: tiktoken's ranks and Mistral's tekken.json.

In those a token's rank says when it is merged: of all neighbours that make up a token, the pair whose token has the
lowest rank goes first, the leftmost of equal ones.
"""

import base64
import binascii
import itertools
import re
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from shell.cli import UserError
from shell.files import read_json, write_json

# How a text is cut into words before it is merged; each pattern of a list cuts what the one before it has left.
# From the models' own tokenizer.json files.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2, LLAMA3 = GPT4.replace("DIGITS", ""), GPT4.replace("DIGITS", "{1,3}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SEED = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
FALCON = [r"[\p{P}$+<=>^~|`]+", GPT2, r"[0-9][0-9][0-9]"]


def make_tokenizer(
    vocabulary: dict[str, int],
    merges: list[tuple[str, str]],
    patterns: list[str],
    added: dict[str, bool],
    bos: str | None,
    whole_words_first: bool,
    composed: bool = False,
) -> Tokenizer:
    """A byte-level BPE tokenizer of the `tokenizers` library, ready to be saved as tokenizer.json.

    vocabulary: ids by token, in the library's letters for bytes. merges: the first goes first. patterns: how a text is
    cut into words. added: {token: whether it is special} of those looked for in a text as they are. bos: the token that
    begins a sequence, None: none does. whole_words_first: a word in the vocabulary is its token, and the merges are not
    asked. composed: texts are put in Unicode's composed form (NFC) first. Raises ValueError if vocabulary and merges do
    not fit.
    """
    try:
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=whole_words_first))
    except Exception as error:  # the library raises no more specific class
        raise ValueError(str(error)) from None
    if composed:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    to_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_letters])
    tokenizer.decoder = decoders.ByteLevel()
    for token, special in added.items():
        tokenizer.add_tokens([AddedToken(token, special=special, normalized=False)])
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, vocabulary[bos])]
        )
    return tokenizer


# --------------------------------------------------------------------------------------------------------- by rank


class RankedVocabulary(NamedTuple):
    """A vocabulary without merges.

    tokens: the bytes of each ordinary token, by rank. special: the special tokens, in the order of their ids.
    special_first: whether their ids come before those of the ordinary ones. pattern: how a text is cut into words. bos:
    the special token that begins a sequence. ends: those that end a text, the tokenizer's own first.
    """

    tokens: list[bytes]
    special: list[str]
    special_first: bool
    pattern: str
    bos: str
    ends: list[str]

    @property
    def size(self) -> int:
        """How many ids there are."""
        return len(self.tokens) + len(self.special)

    def special_ids(self) -> tuple[int, ...]:
        """The id of BOS, then those that end a text."""
        first = 0 if self.special_first else len(self.tokens)
        return tuple(first + self.special.index(token) for token in (self.bos, *self.ends))

    def ids(self) -> dict[str, int]:
        """The ids by token, in letters for bytes. Raises ValueError if two tokens are one."""
        ordinary = list(map(_in_letters, self.tokens))
        listed = [*self.special, *ordinary] if self.special_first else [*ordinary, *self.special]
        ids = {token: id for id, token in enumerate(listed)}
        if len(ids) < len(listed):
            raise ValueError("two tokens are one")
        return ids

    def write(self, folder: Path) -> None:
        """Write tokenizer.json, and tokenizer_config.json that names BOS and EOS."""
        merges = [(_in_letters(first), _in_letters(second)) for first, second in merges_by_rank(self.tokens)]
        added = dict.fromkeys(self.special, True)
        make_tokenizer(self.ids(), merges, [self.pattern], added, self.bos, True).save(str(folder / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, "bos_token": self.bos,
            "eos_token": self.ends[0], "clean_up_tokenization_spaces": False,
        }  # fmt: skip
        write_json(folder / "tokenizer_config.json", settings)


def merges_by_rank(tokens: list[bytes]) -> list[tuple[bytes, bytes]]:
    """The merges that do what the ranks say: for each token the pair that it is made of, the lowest rank first.

    One pair for each token is enough. Where a token arises in a text, no merge before has crossed its ends, and those
    within were the same, in the same order, as in the token alone. A token that its own bytes do not lead to arises
    nowhere: it is only a whole word's.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return [tuple(parts) for token in tokens if len(parts := _last_pair(token, ranks)) == 2]


def _last_pair(token, ranks):
    """The parts of a token before its last merge."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
        lowest = min(joined)
        if lowest == len(ranks):
            break
        place = joined.index(lowest)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def _letters():
    """The letter for each byte: Latin-1 where it is visible, the library's other letters in order for the rest."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = {ord(letter): letter for letter in alphabet if ord(letter) < 256}
    hidden = (byte for byte in range(256) if byte not in letters)
    return letters | dict(zip(hidden, alphabet[len(letters) :], strict=True))


LETTERS = _letters()


def _in_letters(token):
    """Bytes in the letters of a tokenizer.json."""
    return "".join(map(LETTERS.__getitem__, token))


def _by_rank(path, pairs: list[tuple[str, int]]):
    """Tokens from (base64, rank) pairs, ordered by rank. Raises UserError unless each rank and byte is there once."""
    try:
        ranks = {rank: base64.b64decode(text, validate=True) for text, rank in pairs}
        tokens = [ranks[rank] for rank in range(len(pairs))]
    except (binascii.Error, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error!r}): download it again") from None
    if len(set(tokens)) < len(tokens) or not {bytes([byte]) for byte in range(256)} <= set(tokens):
        raise UserError(f"{path} is damaged (a token is there twice, or a byte has none): download it again")
    return tokens


# ------------------------------------------------------------------------------------------------- Llama 3's files

RESERVED = "<|reserved_special_token_{}|>"
HEADER = ["<|start_header_id|>", "<|end_header_id|>"]
LLAMA3_SPECIAL = [
    "<|begin_of_text|>", "<|end_of_text|>", *map(RESERVED.format, range(4)), *HEADER, RESERVED.format(4), "<|eot_id|>",
    *map(RESERVED.format, range(5, 251)),
]  # fmt: skip
LLAMA3_1_SPECIAL = [
    "<|begin_of_text|>", "<|end_of_text|>", *map(RESERVED.format, range(2)), "<|finetune_right_pad_id|>",
    RESERVED.format(2), *HEADER, "<|eom_id|>", "<|eot_id|>", "<|python_tag|>", *map(RESERVED.format, range(3, 248)),
]  # fmt: skip
RANK_LINE = re.compile(rb"([A-Za-z0-9+/]+=*) (\d{1,9})")


def is_tiktoken(path: Path) -> bool:
    """Whether a file is tiktoken's: lines of a token in base64 and its rank. (SentencePiece's is binary.)"""
    with open(path, "rb") as file:
        return RANK_LINE.fullmatch(file.readline(10_000).rstrip()) is not None


def read_tiktoken(path: Path, since_3_1: bool) -> RankedVocabulary:
    """The vocabulary in Llama 3's tokenizer.model, whose special tokens are Llama 3.1's or those before.

    The file does not have them: they are in Meta's code and, with the names of Llama 3.1, in the models on the hub.
    Raises UserError if the file is damaged.
    """
    lines = path.read_bytes().splitlines()
    found = [RANK_LINE.fullmatch(line) for line in lines]
    if None in found:
        raise UserError(f"{path}:{found.index(None) + 1} is damaged (no token and rank): download it again")
    tokens = _by_rank(path, [(match[1].decode(), int(match[2])) for match in found])
    special = LLAMA3_1_SPECIAL if since_3_1 else LLAMA3_SPECIAL
    ends = ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]  # Meta's stop_tokens
    ends = [token for token in ends if token in special]
    return RankedVocabulary(tokens, special, False, LLAMA3, special[0], ends)


# ---------------------------------------------------------------------------------------------------- tekken.json

# The special tokens of files that do not name them (versions up to v7).
TEKKEN_SPECIAL = [
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
]  # fmt: skip
VERSIONS_WITHOUT_SPECIAL = ("v1", "v2", "v3", "v7")


def read_tekken(path: Path) -> RankedVocabulary:
    """The vocabulary in Mistral's tekken.json: of its tokens as many as the model has. Raises UserError if damaged."""
    values = read_json(path)
    try:
        config = values["config"]
        pattern, reserved = config["pattern"], config["default_num_special_tokens"]
        count = config["default_vocab_size"] - reserved
        special = _tekken_special(values.get("special_tokens"), config.get("version"), reserved)
        pairs = [(entry["token_bytes"], entry["rank"]) for entry in values["vocab"][:count]]
        if len(pairs) != count:
            raise ValueError(f"{len(pairs)} tokens instead of {count}")
        Regex(pattern)
    except Exception as error:  # a damaged file makes any, and the library no more specific one
        raise UserError(f"{path} is damaged or of another version ({error!r})") from None
    return RankedVocabulary(_by_rank(path, pairs), special, True, pattern, "<s>", ["</s>"])


def _tekken_special(entries, version, reserved):
    """The special tokens by id, `reserved` of them: those without a name are called as Mistral's own code does."""
    if entries is None and version in VERSIONS_WITHOUT_SPECIAL:
        entries = [{"token_str": token, "rank": rank} for rank, token in enumerate(TEKKEN_SPECIAL)]
    names = {entry["rank"]: entry["token_str"] for entry in entries}
    special = [names.pop(id, f"<SPECIAL_{id}>") for id in range(reserved)]
    if names or len(set(special)) < reserved or not {"<s>", "</s>"} <= set(special):
        raise ValueError(f"{len(entries)} special tokens, of {reserved}, do not fit or lack <s> or </s>")
    return special
