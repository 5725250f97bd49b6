"""What a tokenizer's files hold, run by the library for it: a vocabulary without its added tokens and dummy prefix.

`Tokenizer` adds those two. `read_vocabulary` takes the first that a folder has of `tokenizer.json` (the `tokenizers`
library), `tokenizer.model` (SentencePiece), and `vocab.json` with `merges.txt` (GPT-2's byte-level BPE).

Each class has: paths, the files that it was read from; size; byte_level; piece(id) and piece_to_id(text), None for what
is not there; added, the added tokens as tokenizer.json writes them; names, the special tokens by names such as
"bos_token"; prefix ("always": a text after a special token gets a dummy prefix too, "first": only a sequence's first
text, or "never"); begins, the ids that the file puts before each sequence, or None if it does not say; adds_bos,
whether it is BOS then, unless tokenizer_config.json says otherwise.
"""

import functools
import itertools
import json
from pathlib import Path

from shell.cli import UserError
from shell.files import read_json
from text.word_cache import Words

DROPS_TEXT = ("BertPreTokenizer", "Whitespace", "WhitespaceSplit", "CharDelimiterSplit")  # the blanks between words
MODELS = ("BPE", "Unigram")
GPT2_CLASSES = ("GPT2Tokenizer", "CodeGenTokenizer")
GPT2_MODELS = ("gpt2", "gpt_neo", "gptj", "gpt_bigcode", "opt", "codegen", "phi")  # model_type in config.json
WRITE_ONE = "have transformers write one (AutoTokenizer.from_pretrained, then save_pretrained)"
GPT2_END = "<|endoftext|>"


def has_tokenizer(folder: Path) -> bool:
    """Whether there are files in a folder that `read_vocabulary` reads, or refuses."""
    kinds = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
    return any(all(Path(folder, name).is_file() for name in names) for names in kinds)


def read_vocabulary(folder: Path, config: dict, model_type: str | None) -> "TokenizerJson | SentencePiece":
    """The vocabulary in a folder. UserError if there is none, or one that would not give a text's ids or lose text.

    config: what tokenizer_config.json says. model_type: what config.json says of the model, None if nothing.
    """
    if (folder / "tokenizer.json").is_file():
        return TokenizerJson(folder / "tokenizer.json")
    if (folder / "tokenizer.model").is_file():
        return SentencePiece(folder / "tokenizer.model", config)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _read_gpt2(folder, config, model_type)
    raise UserError(
        f"{folder}: no tokenizer.json, tokenizer.model, or vocab.json with merges.txt; copy the model's, or {WRITE_ONE}"
    )


class TokenizerJson:
    """A tokenizer.json, byte-level BPE or SentencePiece's kind.

    spec: what stands in for the file's content, of which the keys are tokenizer.json's; paths are the files then.
    """

    names, adds_bos = {}, False

    def __init__(self, *paths: Path, spec: dict | None = None):
        import tokenizers

        self.paths, spec = paths, spec or read_json(paths[0])
        where = " and ".join(map(str, paths))
        try:
            self.added, spec["added_tokens"] = spec["added_tokens"], []
            before = _parts(spec["normalizer"]) + _parts(spec["pre_tokenizer"])
            self.prefix = _take_prefix(before)
            decoders = {part["type"] for part in _parts(spec["decoder"])}
            _check_kind(where, spec["model"], before, decoders)
            self._library = tokenizers.Tokenizer.from_str(json.dumps(spec))
        except UserError:
            raise
        except BaseException as error:  # the library raises no more specific class, and its panics are no Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise UserError(f"{where}: the tokenizers library cannot read it ({error!r})") from error
        self.byte_level = "ByteLevel" in decoders
        self._library.no_truncation()  # a file may bring a limit, which would cut samples silently
        self._library.no_padding()
        self.piece, self.piece_to_id = self._library.id_to_token, self._library.token_to_id
        self.size, self.begins = self._library.get_vocab_size(), self._find_begins()

    def encode(self, text: str, start: bool) -> list[int]:
        """The ids of a text; start: it begins a sequence, and has a dummy prefix if there is one."""
        return self.words.encode(" " + text if start and self.prefix != "never" else text, False)

    @functools.cached_property
    def words(self) -> Words:
        """The library, with words remembered."""

        def encode(text):
            return self._library.encode(text, add_special_tokens=False).ids

        return Words(encode, encode, self._library.get_vocab(), "Ġ" if self.byte_level else "▁")

    def _find_begins(self):
        """What the file's post-processor puts before a text."""
        marked = self._library.encode("a")
        pairs = itertools.takewhile(lambda pair: pair[1], zip(marked.ids, marked.special_tokens_mask, strict=True))
        return [id for id, _ in pairs]


class SentencePiece:
    """A SentencePiece tokenizer.model.

    config: in tokenizer_config.json, "legacy" means a dummy prefix after special tokens too, and "add_prefix_space":
    false that there is none.
    """

    byte_level, begins, adds_bos = False, None, True

    def __init__(self, path: Path, config: dict):
        import sentencepiece

        self.paths, proto = (path,), path.read_bytes()
        try:
            model = sentencepiece.SentencePieceProcessor(model_proto=proto)
            # Protobufs written one after the other merge: these bytes are normalizer_spec.add_dummy_prefix = false.
            self._inside = sentencepiece.SentencePieceProcessor(model_proto=proto + b"\x1a\x02\x18\x00")
        except RuntimeError as error:
            raise UserError(f"{path}: not a SentencePiece model; put the model's tokenizer.json beside it") from error
        self.size = model.get_piece_size()
        self.prefix = "always" if config.get("legacy") else "first"
        if model.encode("a") == self._inside.encode("a") or config.get("add_prefix_space") is False:
            self.prefix, model = "never", self._inside
        self._at_start = model
        ids = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "unk_token": model.unk_id()}
        self.names = {name: self.piece(id) for name, id in ids.items() if id >= 0}
        control = filter(model.is_control, range(self.size))
        self.added = [{"id": id, "content": self.piece(id), "special": True} for id in control]

    def piece(self, id: int) -> str | None:
        """The text of a token in the vocabulary's own writing."""
        return self._at_start.id_to_piece(id) if 0 <= id < self.size else None

    def piece_to_id(self, text: str) -> int | None:
        """The token with this text in the vocabulary's own writing."""
        id = self._at_start.piece_to_id(text)
        return id if self.piece(id) == text else None  # an unknown piece has the id of <unk>

    def encode(self, text: str, start: bool) -> list[int]:
        """The ids of a text; start: it begins a sequence, and has a dummy prefix if there is one."""
        return self.words.encode(text, start)

    @functools.cached_property
    def words(self) -> Words:
        """The library, with words remembered."""
        return Words(self._inside.encode, self._at_start.encode, map(self.piece, range(self.size)), "▁")


def _read_gpt2(folder, config, model_type):
    """GPT-2's byte-level BPE from vocab.json and merges.txt: the model and OPT have no tokenizer.json, and old folders.

    Other tokenizers have files of these names and cut a text in another way, so a class that is not known is refused.
    """
    name = config.get("tokenizer_class")
    if name is None and model_type not in GPT2_MODELS or name and name.removesuffix("Fast") not in GPT2_CLASSES:
        raise UserError(
            f"{folder}: how vocab.json and merges.txt are used is known for {' and '.join(GPT2_CLASSES)}, not for "
            f"{name or model_type or 'a model without'} (tokenizer_class in tokenizer_config.json, or model_type in "
            f"config.json): copy the model's tokenizer.json, or {WRITE_ONE}"
        )
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    prefix = bool(config.get("add_prefix_space"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [line for line in lines[lines[0].startswith("#version") :] if line]
    model = {"type": "BPE", "vocab": read_json(folder / "vocab.json"), "merges": merges}
    parts = {"normalizer": None, "pre_tokenizer": {**byte_level, "add_prefix_space": prefix}, "post_processor": None}
    spec = {"added_tokens": [], **parts, "decoder": {**byte_level, "add_prefix_space": False}, "model": model}
    vocabulary = TokenizerJson(folder / "vocab.json", folder / "merges.txt", spec=spec)
    vocabulary.begins = None
    vocabulary.names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), GPT2_END)
    return vocabulary


def _check_kind(where, model, before, decoders):
    """Raise UserError for a tokenizer.json from whose ids a text cannot be made again.

    model: its part of this name. before: what is done to a text before. decoders: the types of what undoes it.
    """
    if (kind := model.get("type", "BPE")) not in MODELS:
        raise UserError(f"{where}: a {kind} vocabulary, which loses some of a text; only {' and '.join(MODELS)} do not")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):  # the library panics at some
        raise UserError(f"{where}: continuing_subword_prefix and end_of_word_suffix, as in CLIP's, are not supported")
    if not decoders & {"ByteLevel", "ByteFallback", "Metaspace"}:
        raise UserError(f"{where}: neither byte-level BPE nor SentencePiece's kind (decoder {sorted(decoders)})")
    for part in before:
        if part["type"] in DROPS_TEXT or part.get("behavior") == "Removed":
            raise UserError(f"{where}: its pre-tokeniser {part['type']} drops a text's blanks, as T5's and BERT's do")


def _take_prefix(parts):
    """Switch off the parts of a tokenizer.json that add a leading space. Returns when they add it."""
    scheme = "never"
    for part in parts:
        if part["type"] == "Prepend" and part["prepend"] == "▁":
            scheme, part["prepend"] = "always", ""
        elif part["type"] == "Metaspace":
            old = "always" if part.pop("add_prefix_space", False) else "never"  # the field of older files
            scheme, part["prepend_scheme"] = part.get("prepend_scheme", old), "never"
        elif part["type"] == "ByteLevel" and part.get("add_prefix_space"):
            scheme, part["add_prefix_space"] = "always", False
    return scheme


def _parts(node):
    """The parts of a normaliser, pre-tokeniser or decoder of tokenizer.json, sequences opened."""
    if node is None or node["type"] != "Sequence":
        return [node] if node else []
    inner = next(value for value in node.values() if isinstance(value, list))
    return [part for child in inner for part in _parts(child)]
