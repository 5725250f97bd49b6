"""Text to ids word by word, each word remembered: a library takes several times as long to encode a text."""

import itertools
import re
from collections.abc import Callable, Iterable

Encode = Callable[[str], list[int]]


class Words:
    """The ids of a text word by word, each word cached: a library takes several times as long to encode them.

    A word here is what lies between two spaces that have something visible on both sides; the space before it is its.
    encode: the library's function for a text that continues one; at_start: for one that begins a sequence. pieces: the
    vocabulary's; `space` stands for one in them.
    """

    def __init__(self, encode: Encode, at_start: Encode, pieces: Iterable[str | None], space: str):
        visible, pieces = f"[^{space}ĊčĉċČ\\s]", [piece for piece in pieces if piece]  # the letters: byte-level blanks
        split_off = not any(map(re.compile(f"[A-Za-z0-9]{_MARK}").search, pieces))
        self._inside = _WordCache(encode, "", split_off)
        self._at_start, self._later = (_WordCache(*how, split_off) for how in ((at_start, ""), (encode, " ")))
        self._at_start.after = self._later.after = self._inside.after = self._inside
        self._encode, self._space = (encode, at_start), space
        self._apart = not any(map(re.compile(visible + space).search, pieces))
        self._apart = self._apart and all(self.encode(_PROBE, start) == self._encode[start](_PROBE) for start in (0, 1))

    def encode(self, text: str, start: bool) -> list[int]:
        """What the library's function returns for the text.

        It is the words' ids, one after the other, if no piece of the vocabulary has a space after something visible
        (a line's end may have one) and no normaliser minds where a text begins, which is tried once. SentencePiece
        takes a "▁" in a text for a space: such a text is left to the library.
        """
        if not self._apart or self._space in text:
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
