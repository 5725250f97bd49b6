"""What became of the data: `report.html` for a prepared folder, and single samples on the terminal.

The page is one file: style and pictures are inline, nothing is loaded and nothing runs. All text from the data is
escaped by the template (`report.html`), and characters that would act instead of being seen are spelled out.
"""

import difflib
import itertools
import math
import random
import re
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup, escape

from text.tokenizer import StreamDecoder

WHOLE_PROMPT, WHOLE_ANSWER = 900, 3600  # characters; of a longer one the middle is folded
WHOLE_MATCH = 320  # characters; where two duplicates agree for longer, the middle is left out
COMPARED = 2000  # characters of a text that are compared: the time of a comparison grows with their square

# What a browser or a terminal would obey or hide: control characters less tab and newline, marks of writing direction,
# blanks of no width (the two joiners excepted, which emoji and Indian scripts need), halves of surrogate pairs.
_ACTING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
# A blank is plain to see between two words, but not in a run, beside a line's end, or where a stretch starts or ends.
_UNSEEN = re.compile(
    rf"(?P<newline>\n)|(?P<tab>\t)|(?P<space> {{2,}}|^ | $)|(?P<acting>{_ACTING.pattern})", re.MULTILINE
)
# Words with the blank after them; in scripts that have no blanks, single characters.
_WORDS = re.compile("[\u2e80-\U0010ffff]\\s*|[^\\s\u2e80-\U0010ffff]+\\s*|\\s+")


def harmless(text):
    """`text` with what would act spelled out: the escape character as ⟨U+001B⟩."""
    return _ACTING.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text)


# --------------------------------------------------------------------------------------------- samples on the terminal


def segments(tokenizer, ids, is_target):
    """The text of a sample in stretches of one kind: a list of (text, whether its tokens are targets).

    Special tokens are written out. The texts joined equal `tokenizer.decode(ids, skip_special=False)`: a character
    whose tokens are of both kinds goes to the one that completes it.
    """
    decoder, found = StreamDecoder(tokenizer, skip_special=False), []

    def add(text, target):
        if text and found and found[-1][1] == target:
            found[-1] = (found[-1][0] + text, target)
        elif text:
            found.append((text, target))

    for id, target in zip(ids, is_target, strict=True):
        add(decoder.push(id), bool(target))
    add(decoder.flush(), found[-1][1] if found else False)
    return found


def show(tokenizer, samples, info, count, seed, color):
    """Print `count` random samples of a prepared file, targets in green and the rest dim, or targets between ⟦ and ⟧.

    samples: a `batching.Samples`. info: the folder's data.json. color: whether the terminal understands ANSI codes.
    """
    for i in random.Random(seed).sample(range(len(samples)), min(count, len(samples))):
        start, end = samples.offsets[i].item(), samples.offsets[i + 1].item()
        source, targets = info["sources"][samples.sources[i].item()], samples.target_counts[i].item()
        name = " ".join(harmless(source.get("name") or source.get("path", "")).split())  # the latter in older folders
        print(f"--- sample {i} of {len(samples):,} · {name} · {end - start:,} tokens, {targets:,} targets ---")
        parts = segments(tokenizer, samples.tokens[start:end].tolist(), samples.is_target[start:end].tolist())
        print("".join(_painted(harmless(text), target, color) for text, target in parts), end="\n\n")


def _painted(text, target, color):
    if not color:
        return f"⟦{text}⟧" if target else text
    code = "\x1b[32m" if target else "\x1b[2m"  # green, dim
    # Each line by itself: a pager forgets the colour at a line's end.
    return "\n".join(f"{code}{line}\x1b[0m" if line else "" for line in text.split("\n"))


# ------------------------------------------------------------------------------------------------------------ the page


def write_report(path, info, details):
    """Write report.html: counts, mix, lengths, padding, close pairs, samples, settings, hashes. Same input, same bytes.

    info: the content of data.json. details: what the page shows beyond it,
    - "lengths": for each source two integer arrays (n,): the tokens of each sample's prompt and of its answer;
    - "padding": for each planner and budget a dict of "planner", "micro_batch_tokens", "padding" (share of the
      positions), "filled" (share of the budget) and "micro_batches" (in a step);
    - "pairs": the near-duplicates nearest to the threshold, dicts of "step", "score", "threshold", "dropped", and the
      "kept" and the "other" sample as {"id", "text"};
    - "examples": samples as dicts of "id", "source", "tokens" and "segments", as `segments` returns them.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: harmless(value) if type(value) is str else value,
    )
    environment.filters |= {"count": "{:,}".format, "decimal": "{:,.1f}".format}
    environment.filters |= {"breakable": breakable, "percent": percent, "short": short}
    page = environment.get_template("report.html").render(
        info=info,
        cleaning=cleaning_table(info["sources"]),
        mix=mix_table(info["sources"]),
        panels=draw_lengths([source["name"] for source in info["sources"]], details["lengths"]),
        padding=padding_table(details["padding"]),
        pairs=[
            pair | {"texts": mark_differences(pair["kept"]["text"], pair["other"]["text"])} for pair in details["pairs"]
        ],
        examples=[example | {"parts": fold_parts(example["segments"])} for example in details["examples"]],
    )
    Path(path).write_text(page, encoding="utf-8", newline="\n")


def percent(share):
    """0.5 as 50.0%; with one digit more where that would look like none or all."""
    digits = 2 if 0 < share < 0.001 or 0.999 < share < 1 else 1
    return f"{100 * share:.{digits}f}%"


def short(number):
    """12000 as 12k, 1500000 as 1.5M, for the labels of an axis."""
    return f"{number / 1e6:g}M" if number >= 1e6 else f"{number / 1e3:g}k" if number >= 1e4 else f"{number:,}"


# -------------------------------------------------------------------------------------------------------------- tables


def cleaning_table(sources):
    """{"steps": the steps that dropped anything, "rows": a row for each source, the total last}.

    A row: name, read, for each step (dropped, left), kept.
    """
    names = dict.fromkeys(step for source in sources for step in source["counts"])
    every = [step for step in names if step not in ("read", "kept", "mixed")]
    steps = [step for step in every if any(source["counts"].get(step) for source in sources)]
    totals = {name: sum(source["counts"].get(name, 0) for source in sources) for name in names}
    rows = []
    for name, counts in [*((source["name"], source["counts"]) for source in sources), ("all sources", totals)]:
        dropped = [counts.get(step, 0) for step in steps]
        left = [counts["read"] - gone for gone in itertools.accumulate(dropped)]
        cells = list(zip(dropped, left, strict=True))
        rows.append({"name": name, "read": counts["read"], "steps": cells, "kept": counts["kept"]})
    return {"steps": steps, "rows": rows}


def mix_table(sources):
    """A row for each source, the total last: what was asked for, and its samples, tokens and targets in the mix."""
    rows = []
    for source in sources:
        weight, samples, kept = source.get("weight"), source.get("samples"), source["counts"]["kept"]
        asked = f"weight {weight:g}" if weight is not None else f"{samples:,} samples" if samples is not None else "all"
        rows.append(
            {
                "name": source["name"],
                "style": source["prompt_style"],
                "asked": asked,
                "kept": kept,
                "train": kept - source.get("held_back", 0),
            }
            | {"mixed": source["counts"].get("mixed", kept), "tokens": source["tokens"], "targets": source["targets"]}
        )
    total = {key: sum(row[key] for row in rows) for key in ("kept", "train", "mixed", "tokens", "targets")}
    return [*rows, {"name": "all sources", "style": "", "asked": ""} | total]


def padding_table(entries):
    """{"budgets": [...], "rows": [(planner, a cell for each budget)]}; the best cell of each budget has "best" true."""
    rows = {}  # {planner: {budget: cell}}
    for entry in sorted(entries, key=lambda entry: entry["micro_batch_tokens"]):
        rows.setdefault(entry["planner"], {})[entry["micro_batch_tokens"]] = entry | {"best": False}
    budgets = sorted({entry["micro_batch_tokens"] for entry in entries})
    for budget in budgets:
        best = min((row[budget] for row in rows.values()), key=lambda cell: (cell["padding"], -cell["filled"]))
        best["best"] = True
    return {"budgets": budgets, "rows": [(planner, list(row.values())) for planner, row in rows.items()]}


# ---------------------------------------------------------------------------------------------------------- histograms


def draw_lengths(names, lengths):
    """A histogram for each source, as the geometry that the template draws. All have the same horizontal axis.

    lengths: as `details["lengths"]`.
    """
    every = [array for pair in lengths for array in pair if len(array)]
    if not every:
        return []
    longest, shortest = max(int(array.max()) for array in every), min(int(np.percentile(array, 5)) for array in every)
    wide = longest > 20 * (1 + shortest)
    # One source has the page's width, up to four stand in twos, more in threes.
    width, height = (1120, 300) if len(names) == 1 else (548, 240) if len(names) <= 4 else (357, 200)
    frame = {"width": width, "height": height, "left": 52, "right": width - 16, "top": 10, "bottom": height - 38}
    edges = _edges(longest, wide, bins=min(64, width // 10))

    def x(value):
        # A length of 0 has a place on log(1 + length) too.
        share = math.log1p(value) / math.log1p(edges[-1]) if wide else value / edges[-1]
        return frame["left"] + (frame["right"] - frame["left"]) * share

    ticks = _ticks_log(longest, x) if wide else _ticks(longest, count=width // 60)
    x_ticks = [(round(x(tick + 0.5), 1), tick) for tick in ticks]  # below the middle of a bin of one length
    return [
        frame | {"name": name, "log": wide, "x_ticks": x_ticks} | _draw_panel(frame, edges, x, pair)
        for name, pair in zip(names, lengths, strict=True)
    ]


def _draw_panel(frame, edges, x, pair):
    """What one histogram has for itself: curves, vertical axis, and the figures of its caption."""
    counts = [np.histogram(array, edges)[0] for array in pair]
    most = max(1, *(int(count.max()) for count in counts))

    def y(value):
        return frame["bottom"] - (frame["bottom"] - frame["top"]) * value / most

    return {
        "samples": len(pair[0]),
        "curves": [_outline(count, edges, x, y) for count in counts],
        "medians": [float(np.median(array)) if len(array) else 0 for array in pair],
        "longest": [int(array.max(initial=0)) for array in pair],
        "y_ticks": [(round(y(tick), 1), tick) for tick in _ticks(most, count=6)],
    }


def _edges(longest, wide, bins):
    """Edges between whole numbers, evenly spaced or evenly on log(1 + length)."""
    last = math.log1p(longest + 1) if wide else longest + 1
    even = np.expm1(np.linspace(0, last, bins + 1)) if wide else np.linspace(0, last, bins + 1)
    return np.unique(np.ceil(even - 1e-9).astype(np.int64))


def _outline(counts, edges, x, y):
    """An SVG path: the steps of a histogram, each stretch of bins that are not empty from the ground to the ground."""
    path, bins = [], zip(counts.tolist(), edges[:-1], edges[1:], strict=True)
    for filled, stretch in itertools.groupby(bins, lambda bin: bin[0] > 0):
        if filled:
            stretch = list(stretch)
            steps = "".join(f"V{y(count):.1f}H{x(right):.1f}" for count, _, right in stretch)
            path.append(f"M{x(stretch[0][1]):.1f} {y(0):.1f}{steps}V{y(0):.1f}")
    return "".join(path)


def _ticks(last, count):
    """Round numbers from 0 up to `last`, at most about `count` of them."""
    rough = max(1, last / count)
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return list(range(0, last + 1, step))


def _ticks_log(last, x):
    """0, 1, 2, 5, 10, … up to `last`, or coarser where their labels would touch. x: length to pixels."""
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [0, *(f * 10**p for p in range(len(str(last))) for f in factors if f * 10**p <= last)]
        # A digit is 7.6 pixels wide; half of each of two neighbours' labels lies between their ticks.
        letters = [(len(short(a)) + len(short(b))) / 2 for a, b in itertools.pairwise(ticks)]
        gaps = [x(b + 0.5) - x(a + 0.5) for a, b in itertools.pairwise(ticks)]
        if all(gap > 7.6 * n + 3 for gap, n in zip(gaps, letters, strict=True)):
            break
    return ticks


# ---------------------------------------------------------------------------------------------------------------- text


def visible(text):
    """`text` as markup in which newlines, tabs, and what the eye would miss can be seen."""
    parts, last = [], 0
    for match in _UNSEEN.finditer(text):
        # The page's style draws the sign for a newline, so that what is copied from it is the text.
        mark = '<i class="{}"></i>\n' if match["newline"] else '<i class="{}">{}</i>'
        parts += [escape(text[last : match.start()]), Markup(mark).format(match.lastgroup, harmless(match[0]))]
        last = match.end()
    return Markup("").join([*parts, escape(text[last:])])


def breakable(name):
    """A name as markup that a narrow column breaks at its signs rather than inside a word."""
    return Markup(re.sub("([-_/.:])", r"\1<wbr>", str(escape(harmless(name)))))


def fold_parts(parts):
    """What `segments` returns with each text as `fold` returns it."""
    return [(fold(text, WHOLE_ANSWER if target else WHOLE_PROMPT), target) for text, target in parts]


def fold(text, limit):
    """{"start", "middle", "end"} as markup and "hidden", the characters of the middle: 0 for a text up to `limit`."""
    first, last = len(text), len(text)
    if len(text) > limit:
        first, last = _word_start(text, limit // 2), _word_start(text, len(text) - limit // 3)
    pieces = {"start": text[:first], "middle": text[first:last], "end": text[last:]}
    return {name: visible(piece) for name, piece in pieces.items()} | {"hidden": last - first}


def _word_start(text, place):
    """Where the word at `place` begins, or `place` if that is far off, as in scripts without blanks."""
    near = text[max(0, place - 40) : place]
    blank = max(near.rfind(" "), near.rfind("\n"))
    return place - len(near) + blank + 1 if blank >= 0 else place


def mark_differences(left, right):
    """Two texts as markup, the words that differ marked, long stretches that agree cut short in the middle."""
    words = [_WORDS.findall(text[:COMPARED]) for text in (left, right)]
    blocks = difflib.SequenceMatcher(None, *words, autojunk=False).get_opcodes()
    marked = []
    for side, text in enumerate((left, right)):
        parts = []
        for kind, *ends in blocks:
            start, end = ends[2 * side : 2 * side + 2]
            stretch = "".join(words[side][start:end])
            parts.append(_shortened(stretch) if kind == "equal" else _marked(stretch))
        if len(text) > COMPARED:
            parts.append(_left_out(len(text) - COMPARED, "more characters"))
        marked.append(Markup("").join(parts))
    return marked


def _marked(stretch):
    body = stretch.rstrip() or stretch
    return Markup("<mark>{}</mark>{}").format(harmless(body), harmless(stretch[len(body) :])) if stretch else ""


def _shortened(stretch):
    if len(stretch) <= WHOLE_MATCH:
        return escape(harmless(stretch))
    head, tail = stretch[: WHOLE_MATCH // 3], stretch[-WHOLE_MATCH // 3 :]
    hidden = _left_out(len(stretch) - len(head) - len(tail), "characters alike")
    return escape(harmless(head)) + hidden + escape(harmless(tail))


def _left_out(count, what):
    return Markup('<span class="out">… {} {} …</span>').format(f"{count:,}", what)
