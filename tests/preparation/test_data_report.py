"""The report shows what is there, whatever the data holds; samples on the terminal are told apart and do no harm."""

import copy
import html
import itertools
import random
import re
import unicodedata
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import SEED, write_tiny_tokenizer
from prepared_parts import write_part

from batching import open_samples
from preparation import histogram, markup, report, show
from text.prompts import encode_dialog
from text.tokenizer import Tokenizer

HOSTILE = (
    "a</style><script>alert(1)</script>{{ 7 * 7 }}\"'><img src=x onerror=y>&lt;\x1b[2J\x00\r\u202e\u2028\ud800\x9b"
)
ANSI = re.compile(r"\x1b\[(?:2|32|0)m")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tiny_tokenizer(folder)
    return Tokenizer(folder)


def random_text(words=30):
    alphabet = [
        "tree",
        "to",
        "be",
        "🎉",
        "👨‍👩‍👧",
        "日本語",
        "é",
        "\n",
        "\n\n",
        "\t",
        "  ",
        " ",
        "<b>",
        "&amp;",
        "\x1b[31m",
        "\r\n",
    ]
    return "".join(random.choice(alphabet) + random.choice(["", " "]) for _ in range(words))


# ------------------------------------------------------------------------------------------------------------ segments


def test_segments_are_the_decoded_ids_in_stretches_of_one_kind(tokenizer):
    for _ in range(50):
        ids = tokenizer.encode(random_text()) + [tokenizer.eos_id]
        is_target = [random.random() < 0.3 for _ in ids]
        found = show.segments(tokenizer, ids, is_target)
        assert "".join(text for text, _ in found) == tokenizer.decode(ids, skip_special=False)
        assert all(a[1] != b[1] for a, b in itertools.pairwise(found)) and all(text for text, _ in found)


def test_target_segments_are_answer_and_end(tokenizer):
    answer = "tree 🎉\n"
    [(ids, is_target)] = encode_dialog(
        tokenizer, [{"role": "user", "content": "to be"}, {"role": "assistant", "content": answer}], "chatml"
    )
    found = show.segments(tokenizer, ids, is_target)
    assert found[-1] == (answer + "<|im_end|>", True)
    assert "to be" in found[0][0] and not found[0][1]


def test_a_split_character_shows_once_and_half_a_one_as_one_sign(tokenizer):
    ids = tokenizer.encode("🎉")
    assert len(ids) > 1, "the character must be of several tokens for this test"
    assert show.segments(tokenizer, ids, [False] * (len(ids) - 1) + [True]) == [("🎉", True)]
    assert show.segments(tokenizer, ids[:-1], [False] + [True] * (len(ids) - 2)) in (
        [("�", False)],
        [("�", True)],
    )
    assert show.segments(tokenizer, [], []) == []


# ---------------------------------------------------------------------------------------------------------------- show


def prepared(tokenizer, folder, dialogs):
    samples = []
    for number, (question, answer) in enumerate(dialogs):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        [(ids, is_target)] = encode_dialog(tokenizer, messages, "chatml")
        samples.append((ids, is_target, number % 2))
    return open_samples(write_part(folder, samples), "train"), {
        "sources": [{"name": "first"}, {"name": "sec\x1b[2Jond\n"}]
    }


@pytest.mark.parametrize("color", [True, False])
def test_show_tells_targets_apart_and_the_data_cannot_reach_the_terminal(tokenizer, tmp_path, capsys, color):
    samples, info = prepared(tokenizer, tmp_path, [(f"to \x1b[32m\x07\x9b\nbe {i}", f"tree {i}\nto") for i in range(6)])
    show.show(tokenizer, samples, info, count=4, seed=SEED, color=color)
    out = capsys.readouterr().out
    plain = ANSI.sub("", out) if color else out
    assert not [c for c in plain if unicodedata.category(c) == "Cc" and c != "\n"]
    numbers = re.findall(
        r"^--- sample (\d) of 6 · (first|sec⟨U\+001B⟩\[2Jond) · (\d+) tokens, (\d+) targets ---$", plain, re.M
    )
    assert len({i for i, *_ in numbers}) == 4
    for i, name, tokens, targets in numbers:
        assert (int(tokens), int(targets)) == (samples.lengths[int(i)] + 1, samples.target_counts[int(i)])
        assert name.startswith("first" if int(i) % 2 == 0 else "sec")
        if color:
            assert f"\x1b[32mtree {i}\x1b[0m\n\x1b[32mto<|im_end|>\x1b[0m" in out
            assert f"\x1b[2mto ⟨U+001B⟩[32m⟨U+0007⟩⟨U+009B⟩\x1b[0m\n\x1b[2mbe {i}<|im_end|>\x1b[0m" in out
        else:
            assert f"\nbe {i}<|im_end|>\n<|im_start|>assistant\n⟦tree {i}\nto<|im_end|>⟧" in out


def test_show_draws_by_seed_and_shows_what_there_is(tokenizer, tmp_path, capsys):
    samples, info = prepared(tokenizer, tmp_path, [(f"to be {i}", "tree") for i in range(40)])
    outs = []
    for count, seed in ((5, 1), (5, 1), (5, 2), (100, 1)):
        show.show(tokenizer, samples, info, count, seed, color=False)
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1] != outs[2]
    assert outs[3].count("--- sample") == 40


# ---------------------------------------------------------------------------------------------------------------- page


def make_input(sources=3, pairs=2, name="source {}"):
    """What `write_report` takes, of random figures: (info, details)."""
    steps = ("bad", "empty", "too few words", "exact duplicate", "near duplicate", "leak")
    info = {
        "tokenizer_hash": f"{random.getrandbits(256):064x}", "checkpoint_dir": "checkpoints/tiny",
        "prompt_style": "chatml", "max_seq_length": 2048, "mask_prompt": True, "val_fraction": 0.05, "seed": 7,
        "mix_by": None,
        "cleaning": {"near_duplicates": 0.8, "min_words": 2}, "sources": [],
        "train": {"samples": 90, "tokens": 9000, "targets": 900},
        "val": {"samples": 10, "tokens": 1000, "targets": 100},
        "benchmarks": [{"path": "test.jsonl", "sha256": "b" * 64, "leaks": 3}],
    }  # fmt: skip
    lengths = []
    for i in range(sources):
        counts = {step: random.randint(1, 3000) if step != "too few words" else 0 for step in steps}
        kept = random.randint(1, 10**5)
        counts = {"read": kept + sum(counts.values()), **counts, "kept": kept, "mixed": kept // 2}
        asked = {"weight": None, "samples": None} | [{}, {"weight": 0.5}, {"samples": 5000}][i % 3]
        files = {"paths": [f"data/{i}.jsonl"], "sha256": [f"{i:064x}"]}
        contents = {
            "rows": {"question and answer": kept}, "messages": {"user": kept + i}, "columns not used": {f"id {i}": kept}
        } | ({"rendering": {"documents cut into pieces": i}} if i else {})  # fmt: skip
        figures = {
            "counts": counts,
            "contents": contents,
            "tokens": random.randint(100, 10**7),
            "targets": random.randint(1, 100),
        }
        info["sources"].append({"name": name.format(i), **files, "prompt_style": "chatml", **asked, **figures})
        lengths.append([np.random.default_rng(SEED + i).integers(0, 400, 50) for _ in range(2)])
    padding = [
        {"planner": planner, "micro_batch_tokens": budget, "padding": random.random(), "filled": 0.9}
        | {"micro_batches": 8}
        for planner in ("sorted", "packed") for budget in (4096, 1024)
    ]  # fmt: skip
    pair = {"step": "similar", "score": 0.71, "threshold": 0.7, "dropped": True}
    pair |= {"kept": {"id": "a.jsonl:1", "text": "one two three"}, "other": {"id": "a.jsonl:2", "text": "one 2 three"}}
    example = {
        "id": "a.jsonl:3",
        "source": "source 0",
        "tokens": 12,
        "segments": [("a question", False), ("reply", True)],
    }
    return info, {"lengths": lengths, "padding": padding, "pairs": [pair] * pairs, "examples": [example] * 10}


class Page(HTMLParser):
    """The elements of a page as (tag, attributes), its text, and its tables' rows; fails if tags do not match."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self.rows, self.open = [], "", [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "wbr", "br"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
            if "td" in self.open or "th" in self.open:
                self.rows[-1][-1] += data if "small" not in self.open else f" {data}"


def write(tmp_path, info, details):
    report.write_report(tmp_path / "report.html", info, details)
    return (tmp_path / "report.html").read_bytes().decode()


def poisoned(value):
    """All texts in `value`, keys of settings included, with what must not act put after them."""
    if isinstance(value, str):
        return value + HOSTILE
    if isinstance(value, dict):
        return {key: poisoned(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(poisoned(part) for part in value)
    return value


def test_hostile_data_is_only_text(tmp_path):
    info, details = make_input()
    info, details = poisoned(info), poisoned(details)
    info["cleaning"][HOSTILE] = HOSTILE
    for source in info["sources"]:
        source["counts"][HOSTILE] = 1
        source["contents"][HOSTILE] = {HOSTILE: 1}
    text = write(tmp_path, info, details)
    page, clean = Page(text), Page(write(tmp_path, *make_input()))
    assert {tag for tag, _ in page.elements} == {tag for tag, _ in clean.elements}
    assert [tag for tag, _ in page.elements].count("style") == 1
    for tag, attributes in page.elements:
        names = attributes.keys() - {"class", "id", "style", "width", "height", "d", "viewbox", "x", "y", "text-anchor"}
        assert names <= {"role", "aria-label", "scope", "lang", "charset", "http-equiv", "content", "name", "href"}, tag
    assert not [c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in "\n\t"]
    shown = "<script>alert(1)</script>{{ 7 * 7 }}\"'><img src=x onerror=y>&lt;"
    shown += "⟨U+001B⟩[2J⟨U+0000⟩⟨U+000D⟩⟨U+202E⟩⟨U+2028⟩⟨U+D800⟩⟨U+009B⟩"
    assert page.text.count(shown) > 50


def test_the_page_stands_alone_and_the_same_input_gives_the_same_bytes(tmp_path):
    info, details = make_input()
    text = write(tmp_path, info, details)
    assert text == write(tmp_path, copy.deepcopy(info), copy.deepcopy(details))
    assert not re.search(r"https?:|url\(|@import|src=|<script|<link", text)
    assert all(a["href"][1:] in text for tag, a in Page(text).elements if tag == "a" and a["href"].startswith("#"))


@pytest.mark.parametrize("sources", [1, 4, 12])
def test_every_source_has_its_rows_and_its_histogram(tmp_path, sources):
    info, details = make_input(sources, pairs=0, name="a/long_name-of.source_{}_" + "x" * 60)
    page = Page(write(tmp_path, info, details))
    assert sum(tag == "figure" for tag, _ in page.elements) == sources
    for source in info["sources"]:
        counts = source["counts"]
        (row,) = [row for row in page.rows if row[0] == source["name"] and f"{counts['read']:,}" in row]
        left, cells = counts["read"], []
        for step in ("bad", "empty", "exact duplicate", "near duplicate", "leak"):
            left -= counts[step]
            cells.append(f"−{counts[step]:,} {left:,}")
        assert row[2:-1] == [*cells, f"{counts['kept']:,}"] and left == counts["kept"]
        assert row[-1] == report.percent(counts["kept"] / counts["read"])
        assert [source["name"], source["paths"][0], source["sha256"][0]] in page.rows
    assert "too few words" not in page.text  # a step that dropped none
    totals = [row for row in page.rows if row[0] == "all sources"]
    assert len(totals) == (2 if sources > 1 else 0)
    if sources > 1:
        assert totals[0][1] == f"{sum(source['counts']['read'] for source in info['sources']):,}"
        assert totals[1][4] == f"{sum(source['counts']['mixed'] for source in info['sources']):,}"
        assert totals[1][6] == f"{sum(source['tokens'] for source in info['sources']):,}"
    assert (
        info["tokenizer_hash"] in page.text
        and "b" * 64 in page.text
        and "No near-duplicate pairs were found" in page.text
    )


def test_what_was_found_in_the_rows_has_a_table(tmp_path):
    info, details = make_input(3)
    kept = [source["counts"]["kept"] for source in info["sources"]]
    rows = Page(write(tmp_path, info, details)).rows
    first = rows.index(["", "", "source 0", "source 1", "source 2", "all sources"])

    def row(group, name, times):
        return [group, name, *(f"{count:,}" for count in [*times, sum(times)])]

    assert rows[first + 1 : first + 7] == [
        row("rows", "question and answer", kept),
        row("columns not used", "id 0", [kept[0], 0, 0]),
        row("", "id 1", [0, kept[1], 0]),
        row("", "id 2", [0, 0, kept[2]]),
        row("messages", "user", [count + i for i, count in enumerate(kept)]),
        row("rendering", "documents cut into pieces", [0, 1, 2]),
    ]
    rows = Page(write(tmp_path, *make_input(1))).rows
    assert ["", "", "source 0"] in rows


def test_an_empty_mixture_is_a_page_too(tmp_path):
    info, details = make_input(2, pairs=0)
    for source in info["sources"]:
        source["counts"], source["contents"] = {"read": 0, "kept": 0, "mixed": 0}, {}
        source["tokens"] = source["targets"] = 0
    info["train"] = info["val"] = {"samples": 0, "tokens": 0, "targets": 0}
    details |= {"lengths": [[np.zeros(0, np.int64)] * 2] * 2, "padding": [], "examples": []}
    assert "No sample is left" in Page(write(tmp_path, info, details)).text


def test_the_best_planner_of_each_budget_has_the_star(tmp_path):
    info, details = make_input()
    figures = {("a", 512): (0.1, 0.8), ("b", 512): (0.2, 0.9), ("a", 64): (0, 0.7), ("b", 64): (0, 0.9)}
    details["padding"] = [
        {"planner": planner, "micro_batch_tokens": budget, "padding": padding, "filled": filled, "micro_batches": 3.25}
        for (planner, budget), (padding, filled) in figures.items()
    ]
    text = write(tmp_path, info, details)
    rows = re.findall(r'<th scope="row"><code>(.)</code></th><td(.*?)>(.*?)</?small.*?<td(.*?)>(.*?)</?small', text)
    best = ' class="best"'
    assert rows == [("a", "", "0.0%", best, "10.0%"), ("b", best, "0.0%", "", "20.0%")]
    assert "90.0% full" in text and "3.2 a step" in text


# ---------------------------------------------------------------------------------------------------------- histograms


@pytest.mark.parametrize("longest", [1, 9, 60, 350, 5000, 10**6])
@pytest.mark.parametrize("sources", [1, 4, 12])
def test_a_histogram_holds_every_sample_once_within_its_frame(sources, longest):
    numbers = np.random.default_rng(SEED)
    lengths = [
        [(longest ** numbers.random(numbers.integers(1, 200))).astype(np.int64) - (i == 0) for _ in range(2)]
        for i in range(sources)
    ]
    lengths[-1][1][0] = longest
    for panel, pair in zip(histogram.histograms(["name"] * sources, lengths), lengths, strict=True):
        unit = panel["y_ticks"][0][0] - panel["y_ticks"][1][0]  # pixels between two ticks
        unit /= panel["y_ticks"][1][1]
        for curve, array in zip(panel["curves"], pair, strict=True):
            steps = re.findall(r"V([\d.]+)H([\d.]+)", curve)
            assert sum((panel["bottom"] - float(y)) / unit for y, _ in steps) == pytest.approx(len(array), abs=2)
            assert all(panel["top"] <= float(y) <= panel["bottom"] for y, _ in steps)
            assert all(panel["left"] <= float(x) <= panel["right"] for _, x in steps)
        places = [x for x, _ in panel["x_ticks"]]
        assert panel["left"] <= places[0] and places[-1] <= panel["right"]
        widths = [7.6 * len(histogram.short(tick)) for _, tick in panel["x_ticks"]]
        ends = [(place - width / 2, place + width / 2) for place, width in zip(places, widths, strict=True)]
        assert all(a[1] + 2 < b[0] for a, b in itertools.pairwise(ends)), "labels touch"
        assert panel["longest"] == [array.max() for array in pair]


# ---------------------------------------------------------------------------------------------------------------- text


def text_of(markup):
    return html.unescape(re.sub("<[^>]*>", "", str(markup)))


def test_what_acts_is_spelled_out_and_all_else_stays():
    every = [chr(code) for code in [*range(0x3000), *random.sample(range(0x3000, 0x110000), 3000)]]
    for letter in every:
        shown = markup.harmless(letter)
        if unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") and letter not in "\n\t":
            assert shown == f"⟨U+{ord(letter):04X}⟩"
        elif unicodedata.category(letter) != "Cf" or letter in "\u200c\u200d":
            assert shown == letter or unicodedata.category(letter) == "Cn"


def test_a_folded_text_is_whole_and_its_blanks_are_visible():
    for _ in range(50):
        text, limit = random_text(random.randint(1, 100)), random.randint(20, 200)
        folded = markup.fold(text, limit)
        joined = "".join(text_of(folded[part]) for part in ("start", "middle", "end"))
        assert joined == markup.harmless(text)
        assert folded["hidden"] == 0 or len(text) > limit
        assert folded["hidden"] > 0 or len(text) <= 2 * limit + 80  # cut where words begin, so it may come to nothing
        assert len(text_of(folded["middle"])) >= folded["hidden"]
    shown = markup.visible(" a b  c\t\n<")
    assert shown == (
        '<i class="space"> </i>a b<i class="space">  </i>c<i class="tab">\t</i><i class="newline"></i>\n&lt;'
    )


def test_words_that_differ_are_marked():
    words = [f"w{i}<&" for i in range(40)]
    for _ in range(20):
        changed = random.sample(range(40), random.randint(0, 5))
        other = [f"x{i}" if i in changed else word for i, word in enumerate(words)]
        left, right = markup.mark_differences(" ".join(words), " ".join(other))
        assert (text_of(left), text_of(right)) == (" ".join(words), " ".join(other))
        for side, text in ((words, left), (other, right)):
            marked = " ".join(text_of(mark) for mark in re.findall("<mark>(.*?)</mark>", text))
            assert marked == " ".join(side[i] for i in sorted(changed))


def test_long_texts_are_compared_in_part_and_say_so():
    same = "word " * 300
    left, right = markup.mark_differences("first " + same, "second " + same)
    shown = text_of(left)
    assert shown.startswith("first word word") and re.findall("<mark>(.*?)</mark>", right) == ["second"]
    hidden = int(re.search(r"… ([\d,]+) characters alike …", shown)[1].replace(",", ""))
    assert len(re.sub("… .* …", "", shown)) + hidden == len("first " + same)
    assert "98,000 more characters" in text_of(markup.mark_differences("a" * 100_000, "日" * 100_000)[0])
    assert markup.mark_differences("", "a") == ["", "<mark>a</mark>"]
