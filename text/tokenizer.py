"""Text to token ids and back.

A tokenizer is what the checkpoint's own files say: a `tokenizer.json` (run by the `tokenizers` library) or else a
SentencePiece `tokenizer.model`. Two things are done here, because the libraries do not promise them:

- A user's text never becomes a special token: "</s>" or "<|im_end|>" in it stays ordinary text. Special tokens are
  looked for in template text alone.
- SentencePiece puts a space before a text (the dummy prefix) and takes it away when decoding. Here `start` says whether
  it does, so a text can also be continued, and a text's own leading spaces survive the round trip.
"""

import codecs
import functools
import hashlib
import itertools
import json
import re
from pathlib import Path

from shell.cli import UserError
from shell.files import check_listed, read_json

TOKENIZER_FILES = (
    "*token*.json", "tokenizer.model", "config.json", "generation_config.json", "chat_template.jinja",
)  # fmt: skip


class Tokenizer:
    """The tokenizer of a Hugging Face model folder; UserError if the folder has none or one that cannot be read.

    vocab_size: the largest id + 1. bos_id, bos_token: BOS and its text, or None. eos_id, eos_token: EOS and its text.
    eos_ids: all ids that end a text, by the tokenizer's files, config.json and generation_config.json.
    add_bos: whether this checkpoint's sequences start with BOS. chat_template: the checkpoint's Jinja source, or None;
    tool_template: its other one, for conversations with tools.
    special_tokens: {name such as "bos_token": text}. prefix: which texts get a dummy prefix: "always" (those after a
    special token too), "first" (only a sequence's first text) or "never"; has_prefix: whether any does.
    added_tokens: {text: {"id", "content", "special" and how it is matched}}, as in tokenizer.json.
    template_pattern: a compiled regex, the added tokens that template text is searched for; special_pattern: those of
    them that a user's text never becomes. end_texts: the texts of all added tokens but BOS, any of which may end an
    answer.
    """

    def __init__(self, checkpoint_dir: Path):
        self.folder = Path(checkpoint_dir)
        check_listed(self.folder, TOKENIZER_FILES, "download or convert it again")
        try:
            self._read_files(self.folder)
        except (AttributeError, LookupError, OverflowError, RecursionError, TypeError, ValueError) as error:
            raise UserError(f"{self.folder}: its tokenizer files are damaged ({error!r}): get them again") from None

    def _read_files(self, folder):
        config = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
        if (folder / "tokenizer.json").is_file():
            self._model = _TokenizerJson(folder / "tokenizer.json")
        elif (folder / "tokenizer.model").is_file():
            self._model = _SentencePiece(folder / "tokenizer.model", legacy=config.get("legacy"))
        else:
            raise UserError(
                f"{folder}: no tokenizer.json or tokenizer.model; copy the model's, or have transformers write one "
                "(AutoTokenizer.from_pretrained, then save_pretrained)"
            )
        names = self._model.names | {key: config[key] for key in config if key.endswith("_token")}
        self.special_tokens = {key: _content(token) for key, token in names.items() if isinstance(token, str | dict)}
        self.added_tokens = self._collect_added_tokens(config)
        self._by_id = {token["id"]: token for token in self.added_tokens.values()}
        self._special_ids = {id for id, token in self._by_id.items() if token.get("special")}
        tokens = self.added_tokens.values()
        self.template_pattern = _pattern(tokens)
        self._user_pattern = _pattern(token for token in tokens if token["id"] not in self._special_ids)
        self.special_pattern = _pattern(token for token in tokens if token["id"] in self._special_ids)
        self.vocab_size = max(self._model.size, *(id + 1 for id in self._by_id), 0)
        self.prefix = self._model.prefix
        self.has_prefix = self.prefix != "never"
        self._find_bos_and_eos(config)
        begins = self.bos_token if self.bos_id not in self.eos_ids else None  # some models have one token for both
        self.end_texts = tuple(text for text in self.added_tokens if text and text != begins)
        self.chat_template, self.tool_template = _find_chat_templates(folder)
        self._find_tokens_without_row()

    def _collect_added_tokens(self, config):
        """{text: {"id", "content", how it is matched}}: the model's own, then what the other files add or change."""
        added = {token["content"]: token for token in self._model.added}
        for text, id in _read_json(self.folder / "added_tokens.json").items():
            added.setdefault(text, {"id": id, "content": text})
        for id, token in config.get("added_tokens_decoder", {}).items():
            added[token["content"]] = token | {"id": int(id)}
        special = list(self.special_tokens.values())
        for key in ("additional_special_tokens", "extra_special_tokens"):
            more = config.get(key) or []
            special += map(_content, more.values() if isinstance(more, dict) else more)
        for text in special:
            token = added.get(text, {"id": self._model.piece_to_id(text), "content": text})
            if token["id"] is not None:
                added[text] = token | {"special": True}
        for text, token in added.items():
            if type(token["id"]) is not int or not 0 <= token["id"] < 2**31 or not isinstance(text, str):
                raise ValueError(f"added token {text!r} has the id {token['id']!r}")
        return added

    def _find_bos_and_eos(self, config):
        def id_of(text):
            return self.added_tokens[text]["id"] if text in self.added_tokens else None

        self.bos_token, self.eos_token = self.special_tokens.get("bos_token"), self.special_tokens.get("eos_token")
        self.bos_id = id_of(self.bos_token)
        ids = [id_of(self.eos_token)]
        for name in ("config.json", "generation_config.json"):
            more = _read_json(self.folder / name).get("eos_token_id")
            ids += more if isinstance(more, list) else [more]
        ids = [id for id in ids if id is not None]
        if not all(type(id) is int for id in ids):
            raise ValueError(f"eos_token_id is {ids}")
        if not ids:
            raise UserError(f"{self.folder}: no end-of-sequence token; set eos_token in tokenizer_config.json")
        self.eos_id, self.eos_ids = ids[0], set(ids)
        self.eos_token = self.token_bytes(self.eos_id).decode("utf-8", "replace")
        says = config.get("add_bos_token")
        self.add_bos = self.bos_id is not None and (self._model.adds(self.bos_id) if says is None else bool(says))

    def take_chat_template(self, folder: Path) -> bool:
        """Take the chat template of another folder, if it has one that differs. Returns whether that is so."""
        try:
            templates = _find_chat_templates(Path(folder))
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"{folder}: its chat template is damaged ({error!r}): get it again") from None
        if templates == (None, None) or templates == (self.chat_template, self.tool_template):
            return False
        self.chat_template, self.tool_template = templates
        return True

    def _find_tokens_without_row(self):
        """Look for ids beyond the rows of the model's embedding, where the folder has its config.json.

        Many folders have a few such tokens that nothing uses, such as a padding token at 32000 in models made from
        Llama 2. They do no harm, so a token is only refused where a text has it (`encode_parts`), and here if each
        sequence would: EOS, and BOS where there is one. (An embedding with more rows than tokens is merely padded.)
        """
        rows = _read_json(self.folder / "config.json").get("vocab_size")
        self._rows = rows if type(rows) is int else self.vocab_size
        self._without_row = frozenset(range(self._rows, self.vocab_size))
        self._refuse_without_row([self.eos_id, *([self.bos_id] if self.add_bos else [])])

    def _refuse_without_row(self, ids):
        """Raise UserError if one of these ids is beyond the rows of the model's embedding."""
        found = dict.fromkeys(id for id in ids if id in self._without_row)
        if found:
            names = ", ".join(f"{self.token_bytes(id).decode('utf-8', 'replace')!r} ({id})" for id in [*found][:3])
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise UserError(
                f"{self.folder}: the model has {self._rows} rows (vocab_size in config.json), none for {names}{more}: "
                "add them in transformers (model.resize_token_embeddings(len(tokenizer)), then save_pretrained), or "
                "take these tokens out of the tokenizer's files"
            )

    def encode(self, text: str, special: bool = False, start: bool = True) -> list[int]:
        """`text` as ids, without BOS or EOS.

        special: the text is a template's: special tokens written out in it become their ids. Otherwise it is a user's,
        and they stay ordinary text. start: the text begins a sequence, so the dummy prefix goes before it; False: it
        continues one. (Byte-level vocabularies have no dummy prefix; there `start` changes nothing.)

        Raises UserError for a token for which the model of the folder's config.json has no row.
        """
        return self.encode_parts(self.split(text, special), start)[0]

    def split(self, text: str, special: bool = False) -> list[str | int]:
        """`text` cut at its added tokens (special: as in `encode`): a list of ordinary texts (str) and ids (int)."""
        if not text.isascii() and (surrogate := re.search("[\ud800-\udfff]", text)):
            raise UserError(f"text with {surrogate[0]!r}, half a surrogate pair: it is not Unicode; correct its source")
        pattern = self.template_pattern if special else self._user_pattern
        pieces = pattern.split(text) if pattern.groups else [text]  # no group: there are no such tokens to look for
        # Every second piece is an added token, perhaps with blanks that it swallows.
        added = self.added_tokens
        return [added.get(p, added.get(p.strip()))["id"] if i % 2 else p for i, p in enumerate(pieces) if p]

    def encode_parts(self, parts: list[str | int], start: bool = True) -> tuple[list[int], bool]:
        """The ids of what `split` returned, and whether a text that follows them would get a dummy prefix.

        Neighbouring texts are encoded as one, so that it makes no difference where a template ends and a user begins.
        """
        ids = []
        for is_text, group in itertools.groupby(parts, key=lambda part: isinstance(part, str)):
            if is_text:
                ids += self._encode_text("".join(group), start)
                start = False
            else:
                ids += group
                start = self._model.prefix == "always"
        if self._without_row and not self._without_row.isdisjoint(ids):
            self._refuse_without_row(ids)
        return ids, start

    def _encode_text(self, text, start):
        ids = self._model.encode(text, start)
        if self._special_ids.isdisjoint(ids):
            return ids
        # The vocabulary itself spells a special token (a mere <unk> also leads here): cut it after its first letter.
        cuts = [0, *(match.start() + 1 for match in self.special_pattern.finditer(text)), len(text)]
        pieces = [text[a:b] for a, b in itertools.pairwise(cuts)]
        return [id for i, piece in enumerate(pieces) for id in self._model.encode(piece, start and i == 0)]

    def decode(self, ids: list[int], skip_special: bool = True, start: bool = True) -> str:
        """The text of a list of ids. start=False keeps the dummy prefix: the ids continue a text."""
        decoder = StreamDecoder(self, skip_special, start)
        return "".join(map(decoder.push, ids)) + decoder.flush()

    def token_bytes(self, id: int, skip_special: bool = False) -> bytes:
        """The text of a token as UTF-8 bytes (perhaps part of a character); empty for an id without a token."""
        if id in self._by_id:
            return b"" if skip_special and id in self._special_ids else self._by_id[id]["content"].encode()
        piece = self._model.piece(id) or ""
        if self._model.byte_level:
            return b"".join(_BYTE_OF.get(letter) or letter.encode() for letter in piece)
        if re.fullmatch("<0x[0-9A-F]{2}>", piece):  # SentencePiece's byte fallback
            return bytes([int(piece[3:5], 16)])
        return piece.replace("▁", " ").encode()

    def file_hash(self) -> str:
        """SHA-256 (hex) of the files that decide the ids of a text: all but the chat template.

        Prepared data carries it, to refuse another tokenizer (see `fits`).
        """
        digest = hashlib.sha256()
        for name in sorted((self._model.path.name, "special_tokens_map.json", "added_tokens.json")):
            path = self.folder / name
            if path.is_file():
                digest.update(f"{name} {path.stat().st_size}\n".encode() + path.read_bytes())
        config = _read_json(self.folder / "tokenizer_config.json")
        config.pop("chat_template", None)
        digest.update(json.dumps(config, sort_keys=True).encode())
        digest.update(repr((self.bos_id, self.eos_id)).encode())  # EOS may come from config.json
        return digest.hexdigest()

    def template_hash(self) -> str | None:
        """SHA-256 (hex) of the chat template (and of that for tools, if it is another), None if there is none."""
        text = self.chat_template and self.chat_template + (self.tool_template or "")
        return text and hashlib.sha256(text.encode()).hexdigest()

    def fits(self, info: dict) -> bool:
        """Whether a prepared folder was made with this tokenizer, and with this chat template if it was rendered in it.

        info: its data.json. A merged model has another chat template than its base (style_templates.py), and may go on
        with data that are rendered in a style of ours.
        """
        template = info.get("chat_template_hash")
        return info["tokenizer_hash"] == self.file_hash() and template in (None, self.template_hash())


class StreamDecoder:
    """Ids to text one by one. The pieces joined equal `tokenizer.decode(ids)`; none holds half a character."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True, start: bool = True):
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._at_prefix = start and tokenizer.has_prefix
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The text that this id completes; "" if it is a special token or leaves a character unfinished."""
        data = self._tokenizer.token_bytes(id, self._skip_special)
        if data and self._at_prefix:
            data, self._at_prefix = data.removeprefix(b" "), False
        return self._utf8.decode(data)

    def flush(self) -> str:
        """The end of the text: a replacement character if it stops in mid-character, otherwise ""."""
        return self._utf8.decode(b"", final=True)


class _TokenizerJson:
    """A tokenizer.json, byte-level BPE or SentencePiece's kind, less its added tokens and its dummy prefix.

    `Tokenizer` and `encode` add those two. prefix: "always" (a text after a special token gets one too),
    "first" (only a sequence's first text) or "never".
    """

    names = {}

    def __init__(self, path):
        import tokenizers

        self.path, spec = path, _read_json(path)
        try:
            self.added, spec["added_tokens"] = spec["added_tokens"], []
            self.prefix = _take_prefix(_parts(spec["normalizer"]) + _parts(spec["pre_tokenizer"]))
            decoders = {part["type"] for part in _parts(spec["decoder"])}
            if spec["model"].get("continuing_subword_prefix"):  # nor has byte-level BPE, and the library panics at some
                raise ValueError("continuing_subword_prefix is not supported")
            self._library = tokenizers.Tokenizer.from_str(json.dumps(spec))
        except BaseException as error:  # the library raises no more specific class, and its panics are no Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise UserError(f"{path}: not a tokenizer.json that the tokenizers library reads ({error!r})") from error
        if not decoders & {"ByteLevel", "ByteFallback", "Metaspace"}:
            raise UserError(f"{path}: neither byte-level BPE nor SentencePiece's kind (decoder {sorted(decoders)})")
        self.byte_level = "ByteLevel" in decoders
        self._library.no_truncation()  # a file may bring a limit, which would cut samples silently
        self._library.no_padding()
        self.piece, self.piece_to_id = self._library.id_to_token, self._library.token_to_id
        self.size = self._library.get_vocab_size()

    def encode(self, text, start):
        return self._words.encode(" " + text if start and self.prefix != "never" else text, False)

    @functools.cached_property
    def _words(self):
        def encode(text):
            return self._library.encode(text, add_special_tokens=False).ids

        return _Words(encode, encode, self._library.get_vocab(), "Ġ" if self.byte_level else "▁")

    def adds(self, bos_id):
        """Whether the file's post-processor starts a sequence with this id."""
        return self._library.encode("").ids[:1] == [bos_id]


class _SentencePiece:
    """A SentencePiece tokenizer.model. legacy (in tokenizer_config.json): a dummy prefix after special tokens too."""

    byte_level = False

    def __init__(self, path, legacy):
        import sentencepiece

        self.path, proto = path, path.read_bytes()
        try:
            model = self._at_start = sentencepiece.SentencePieceProcessor(model_proto=proto)
            # Protobufs written one after the other merge: these bytes are normalizer_spec.add_dummy_prefix = false.
            self._inside = sentencepiece.SentencePieceProcessor(model_proto=proto + b"\x1a\x02\x18\x00")
        except RuntimeError as error:
            raise UserError(f"{path}: not a SentencePiece model; put the model's tokenizer.json beside it") from error
        self.size = model.get_piece_size()
        self.prefix = "always" if legacy else "first"
        if model.encode("a") == self._inside.encode("a"):
            self.prefix = "never"
        ids = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "unk_token": model.unk_id()}
        self.names = {name: self.piece(id) for name, id in ids.items() if id >= 0}
        control = filter(model.is_control, range(self.size))
        self.added = [{"id": id, "content": self.piece(id), "special": True} for id in control]

    def piece(self, id):
        return self._at_start.id_to_piece(id) if 0 <= id < self.size else None

    def piece_to_id(self, text):
        id = self._at_start.piece_to_id(text)
        return id if self.piece(id) == text else None  # an unknown piece has the id of <unk>

    def encode(self, text, start):
        return self._words.encode(text, start)

    @functools.cached_property
    def _words(self):
        return _Words(self._inside.encode, self._at_start.encode, map(self.piece, range(self.size)), "▁")

    def adds(self, bos_id):
        return True


class _Words:
    """The ids of a text word by word, each word cached: a library takes several times as long to encode them.

    A word here is what lies between two spaces that have something visible on both sides; the space before it is its.
    encode: the library's function for a text that continues one; at_start: for one that begins a sequence. pieces: the
    vocabulary's; `space` stands for one in them.
    """

    def __init__(self, encode, at_start, pieces, space):
        visible, pieces = f"[^{space}ĊčĉċČ\\s]", [piece for piece in pieces if piece]  # the letters: byte-level blanks
        split_off = not any(map(re.compile(f"[A-Za-z0-9]{_MARK}").search, pieces))
        self._inside = _WordCache(encode, "", split_off)
        self._at_start, self._later = (_WordCache(*how, split_off) for how in ((at_start, ""), (encode, " ")))
        self._at_start.after = self._later.after = self._inside.after = self._inside
        self._encode = encode, at_start
        self._apart = not any(map(re.compile(visible + space).search, pieces))
        self._apart = self._apart and all(self.encode(_PROBE, start) == self._encode[start](_PROBE) for start in (0, 1))

    def encode(self, text, start):
        """What the library's function returns for the text.

        It is the words' ids, one after the other, if no piece of the vocabulary has a space after something visible
        (a line's end may have one) and no normaliser minds where a text begins, which is tried once.
        """
        if not self._apart:
            return self._encode[start](text)
        odd = _ODD_SPACE.search(text) or " " in (text[:1], text[-1:])
        first, *later = BETWEEN_WORDS.split(text) if odd else text.split(" ")
        first = (self._at_start if start else self._inside)[first]
        return [*first, *itertools.chain.from_iterable(map(self._later.__getitem__, later))]


class _WordCache(dict):
    """The ids of `before` + a word, by the word: a cache.

    split_off: a punctuation mark and what follows it are looked up apart, in `after`. So they may be if no piece of the
    vocabulary has such a mark after a letter or digit.
    """

    def __init__(self, encode, before, split_off):
        self._encode, self._before, self._split_off = encode, before, split_off

    def __missing__(self, word):
        mark = self._split_off and _BEFORE_MARK.search(word)
        ids = self[word[: mark.end()]] + self.after[word[mark.end() :]] if mark else self._encode(self._before + word)
        if len(word) <= LONGEST_WORD:
            if len(self) >= MOST_WORDS:
                self.clear()
            self[word] = ids
        return ids


BETWEEN_WORDS = re.compile(r" (?<=\S )(?=\S)")  # a pattern that begins with a letter is searched for faster
_ODD_SPACE = re.compile(r" (?:\s|(?<=\s ))")
_MARK = r"[,.?!;:)\"]"
_BEFORE_MARK = re.compile(f"[A-Za-z0-9](?={_MARK})")
LONGEST_WORD, MOST_WORDS = 40, 2**17  # characters; about 30 MB
_PROBE = 'a b  c\n d. "e" 12 3,456.7 it\'s\t f   \n\ng? 日本 語 — é ½ ﬁ (h) U.S. <s> x'


def _take_prefix(parts):
    """Switch off the parts of a tokenizer.json that add a leading space. Returns when they add it: see `Tokenizer`."""
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


def _pattern(tokens):
    """A regex that finds any of the added tokens, the longest first, as a group with the blanks that they swallow.

    With no tokens, one without a group that finds nothing.
    """

    def one(token):
        text = re.escape(token["content"])
        text = rf"(?<!\w){text}(?!\w)" if token.get("single_word") else text
        return r"\s*" * token.get("lstrip", False) + text + r"\s*" * token.get("rstrip", False)

    found = [one(token) for token in sorted(tokens, key=lambda token: -len(token["content"])) if token["content"]]
    return re.compile("(" + "|".join(found) + ")" if found else "(?!)")


def _find_chat_templates(folder):
    """(the chat template, that for conversations with tools if it is another): as transformers names them."""
    template = _read_json(folder / "tokenizer_config.json").get("chat_template")
    named = {entry["name"]: entry["template"] for entry in template} if isinstance(template, list) else {}
    template, with_tools = named.get("default") if named else template, named.get("tool_use")
    if (path := folder / "chat_template.jinja").is_file():
        template = path.read_text(encoding="utf-8")
    if (path := folder / "additional_chat_templates" / "tool_use.jinja").is_file():
        with_tools = path.read_text(encoding="utf-8")
    if not isinstance(template, str | None) or not isinstance(with_tools, str | None):
        raise ValueError("chat_template is no text")
    return template, with_tools


def _content(token):
    return token if isinstance(token, str) else token["content"]


def _byte_alphabet():
    """The letters for which byte-level BPE writes bytes: Latin-1 where it is visible, U+0100 onwards for the rest."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(256)) - set(visible))
    letters = {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
    return {letter: bytes([byte]) for letter, byte in letters.items()}


_BYTE_OF = _byte_alphabet()


def _read_json(path):
    """The object in a JSON file, {} without the file."""
    return read_json(path) if path.exists() else {}
