"""Text to token ids and back.

A tokenizer is what the checkpoint's own files say (vocabulary.py). Two things are done here, because the libraries do
not promise them:

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
import sys
from pathlib import Path

from shell.cli import UserError
from shell.files import check_listed, read_json
from text.vocabulary import read_vocabulary

TOKENIZER_FILES = (
    "*token*.json", "tokenizer.model", "vocab.json", "merges.txt", "config.json", "generation_config.json",
    "chat_template.jinja",
)  # fmt: skip


class Tokenizer:
    """The tokenizer of a Hugging Face model folder; UserError if the folder has none or one that cannot be read.

    vocab_size: the largest id + 1. bos_id, bos_token: BOS and its text, or None. eos_id, eos_token: EOS and its text.
    eos_ids: all ids that end a text, by the tokenizer's files, config.json and generation_config.json.
    begin_ids, begin_text: what this checkpoint's sequences start with, and its text: BOS, nothing, or tokens of its own
    (GLM-4's are two). chat_template: the checkpoint's Jinja source, or None;
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
        config = _read_config(folder)
        self._model = read_vocabulary(folder, config, _read_json(folder / "config.json").get("model_type"))
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
        self._find_bos_and_eos()
        self._find_begin(config)
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

    def _find_bos_and_eos(self):
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

    def _find_begin(self, config):
        """Find what each sequence begins with. As in transformers 5, tokenizer.json counts more than its settings."""
        bos = [self.bos_id] if self.bos_id is not None else []
        says, begins = config.get("add_bos_token"), self._model.begins
        if begins is None:
            begins = bos if says or says is None and self._model.adds_bos else []
        elif says is not None and bos and (self.bos_id in begins) is not bool(says):
            _note(
                f"{self.folder}: add_bos_token in tokenizer_config.json is {says}, but tokenizer.json puts "
                f"{'BOS' if self.bos_id in begins else 'none'} before a text: so it is done, as by transformers"
            )
        self.begin_ids = tuple(begins)
        self.begin_text = b"".join(map(self.token_bytes, begins)).decode("utf-8", "replace")

    def with_begin(self, ids: list[int]) -> list[int]:
        """The ids of a sequence: these after `begin_ids`, which are not doubled if they are there already."""
        count = len(self.begin_ids)
        return ids if tuple(ids[:count]) == self.begin_ids else [*self.begin_ids, *ids]

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
        sequence would: EOS, and what it begins with. (An embedding with more rows than tokens is merely padded.)
        """
        rows = _read_json(self.folder / "config.json").get("vocab_size")
        self._rows = rows if type(rows) is int else self.vocab_size
        self._without_row = frozenset(range(self._rows, self.vocab_size))
        self._refuse_without_row([self.eos_id, *self.begin_ids])

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
        return self.encode_parts(self.cut(text, special), start)[0]

    def split(self, text: str, special: bool = False) -> list[str | int]:
        """`text` cut at its added tokens (special: as in `encode`): a list of ordinary texts (str) and ids (int)."""
        return self._split(text, self.template_pattern if special else self._user_pattern)

    def cut(self, text: str, special: bool = False) -> list[str | int]:
        """`text` cut at its special tokens (special: as in `encode`), for `encode_parts`.

        Added tokens that are not special stay in the texts, since one may stand across a template's end and a user's
        beginning, such as Gemma's for two line ends.
        """
        if not text.isascii() and (surrogate := re.search("[\ud800-\udfff]", text)):
            raise UserError(f"text with {surrogate[0]!r}, half a surrogate pair: it is not Unicode; correct its source")
        return self._split(text, self.special_pattern) if special else [text] * bool(text)

    def _split(self, text, pattern):
        pieces = pattern.split(text) if pattern.groups else [text]  # no group: there are no such tokens to look for
        # Every second piece is an added token, perhaps with blanks that it swallows.
        added = self.added_tokens
        return [added.get(p, added.get(p.strip()))["id"] if i % 2 else p for i, p in enumerate(pieces) if p]

    def encode_parts(self, parts: list[str | int], start: bool = True) -> tuple[list[int], bool]:
        """The ids of what `cut` returned, and whether a text that follows them would get a dummy prefix.

        Neighbouring texts are encoded as one, so that it makes no difference where a template ends and a user begins.
        """
        ids = []
        for is_text, group in itertools.groupby(parts, key=lambda part: isinstance(part, str)):
            for part in self.split("".join(group)) if is_text else group:
                ids += self._encode_text(part, start) if isinstance(part, str) else [part]
                start = not isinstance(part, str) and self._model.prefix == "always"
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
        piece = self._model.piece(id) or ""
        if id in self._by_id:
            content = self._by_id[id]["content"]
            if id in self._special_ids or self._model.byte_level or content != piece:  # else such as Gemma's "▁▁"
                return b"" if skip_special and id in self._special_ids else content.encode()
        if self._model.byte_level:
            return b"".join(_BYTE_OF.get(letter) or letter.encode() for letter in piece)
        if re.fullmatch("<0x[0-9A-F]{2}>", piece):  # SentencePiece's byte fallback
            return bytes([int(piece[3:5], 16)])
        return piece.replace("▁", " ").encode()

    def id_of(self, text: str) -> int | None:
        """The id of the added token with this text, or of the vocabulary's piece that is written so; None for none."""
        return self.added_tokens[text]["id"] if text in self.added_tokens else self._model.piece_to_id(text)

    def file_hash(self) -> str:
        """SHA-256 (hex) of the files that decide the ids of a text: all but the chat template.

        Prepared data carries it, to refuse another tokenizer (see `fits`).
        """
        digest = hashlib.sha256()
        names = [path.name for path in self._model.paths]
        for name in sorted((*names, "special_tokens_map.json", "added_tokens.json")):
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


_BLANKS = r"[^\S\x1c-\x1f]*"  # white space as Unicode and the tokenizers library have it, less than Python's


def _pattern(tokens):
    """A regex that finds any of the added tokens, the longest first, as a group with the blanks that they swallow.

    With no tokens, one without a group that finds nothing.
    """

    def one(token):
        text = re.escape(token["content"])
        text = rf"(?<!\w){text}(?!\w)" if token.get("single_word") else text
        return _BLANKS * token.get("lstrip", False) + text + _BLANKS * token.get("rstrip", False)

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


@functools.cache
def _note(text):
    """Tell a user, once."""
    print(f"note: {text}", file=sys.stderr)


def _read_config(folder):
    """tokenizer_config.json, with the special tokens of older folders' special_tokens_map.json.

    As in transformers 5 these come first where they contradict, unless the former lists its added tokens.
    """
    named, config = _read_json(folder / "special_tokens_map.json"), _read_json(folder / "tokenizer_config.json")
    return named | config if "added_tokens_decoder" in config else config | named


def _read_json(path):
    """The object in a JSON file, {} without the file."""
    return read_json(path) if path.exists() else {}
