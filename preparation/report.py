"""report.html, the page of a prepared folder: counts, mix, lengths, padding, close pairs, samples, settings, hashes.

The page is one file: style and pictures are inline, nothing is loaded and nothing runs. All text from the data is
escaped by the template beside this file, and control characters are spelled out (markup.py).
"""

import itertools
import math
import random
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from preparation.histogram import histograms, short
from preparation.markup import breakable, fold_parts, harmless, mark_differences
from preparation.prepared_folder import Prepared
from preparation.show import segments, without_beginning

GROUPS = (  # of what is counted in the rows, in the report's order
    "rows", "columns not used", "left out by --ignore", "messages", "answers", "tools", "samples", "rendering",
)  # fmt: skip
PARTS = {  # of a sample, whose lengths are shown, by the kind of samples: classes of the page, and names
    "samples": (("prompt", "prompt"), ("answer", "answer")),
    "pairs": (("prompt", "prompt"), ("answer", "chosen answer"), ("rejected", "rejected answer")),
}
EXAMPLES = 10  # samples that the report shows
REPORTED_BATCH, REPORTED_BUDGETS, REPORTED_STEPS = 128, (1024, 2048, 4096, 8192), 20  # of the padding's table


def report_details(prepared: Prepared, close_pairs: list[dict], seed: int) -> dict[str, Any]:
    """What the report shows beside data.json: see `write_report`. close_pairs: its "pairs"."""
    samples, train = prepared.samples, prepared.train
    source_of, lengths = samples.sources()[train], _lengths(samples, train)
    shown = sorted(random.Random(seed).sample(range(len(train)), min(EXAMPLES, len(train))))
    return {
        "lengths": [tuple(part[source_of == i] for part in lengths) for i in range(len(prepared.sources))],
        "padding": _padding(samples, train, seed),
        "pairs": close_pairs,
        "examples": [_example(prepared, train[i]) for i in shown],
    }


def _lengths(samples, numbers):
    """The tokens of each sample's prompt and of its answer, an array (n,) each; of a pair's prompt and two answers."""
    lengths, targets = samples.lengths()[numbers], samples.target_counts()[numbers]
    if not samples.are_pairs:
        return lengths - targets, targets
    beginnings, first_ends = (column[numbers] for column in samples.cuts())
    return beginnings + 1, first_ends - 1, lengths - beginnings - first_ends - 1  # each end has the prompt's last token


def _example(prepared, number):
    """A sample as `write_report` takes it."""
    records, samples = prepared.records, prepared.samples
    sequences = [(ids.tolist(), is_target.tolist()) for ids, is_target in samples.writer.read(number)]
    first, *rejected = [segments(prepared.tokenizer, *sequence) for sequence in sequences]
    return {
        "id": records[samples.record(number)]["id"],
        "source": records.names[samples.writer.sources[number]],
        "tokens": " and ".join(f"{len(ids):,}" for ids, _ in sequences),
        "segments": first,
        "rejected": without_beginning(*rejected, first) if rejected else [],
    }


def _padding(samples, numbers, seed):
    """What each planner leaves unused in steps of samples taken at random, for several budgets."""
    import torch  # here, since the passes before do without it

    from batching import PLANNERS, Order, Samples

    sampled, rows = np.random.default_rng(seed).permutation(numbers)[: REPORTED_BATCH * REPORTED_STEPS], []
    for name, planner in PLANNERS.items():
        padded = planner.layout is Samples.padded
        used, lengths = map(torch.from_numpy, _positions(samples, sampled, padded))
        for budget in REPORTED_BUDGETS:
            draw = planner.draw(Order(len(sampled), seed, 0), lengths, REPORTED_BATCH)
            steps = [draw(place) for place in range(math.ceil(len(sampled) / REPORTED_BATCH))]
            micro_batches = [
                step[micro_batch] for step in steps for micro_batch in planner.cut(lengths[step], None, budget)
            ]
            tokens = int(used.sum())
            positions = sum(len(x) * int(lengths[x].max()) for x in micro_batches) if padded else tokens
            row = {"planner": name, "micro_batch_tokens": budget, "padding": 1 - tokens / positions}
            filled, count = tokens / (budget * len(micro_batches)), len(micro_batches) / len(steps)
            rows.append({**row, "filled": filled, "micro_batches": count})
    return rows


def _positions(samples, numbers, padded):
    """(positions that hold a token, the length by which it is planned) of each sample, (n,) int64 each."""
    lengths = samples.lengths()[numbers] - 1  # the last token is only ever a target
    if not samples.are_pairs:
        return lengths, lengths
    beginnings, first_ends = (column[numbers] for column in samples.cuts())
    if not padded:
        return lengths - 1, lengths - 1
    second_ends = lengths + 1 - beginnings - first_ends
    return lengths - 1 + beginnings, 2 * (beginnings + np.maximum(first_ends, second_ends) - 1)


def write_report(path: Path, info: dict, details: dict[str, Any]) -> None:
    """Write report.html: counts, mix, lengths, padding, close pairs, samples, settings, hashes. Same input, same bytes.

    info: the content of data.json. details: what the page shows beyond it,
    - "lengths": for each source integer arrays (n,), the tokens of each sample's prompt and of its answer; of pairs
      those of the shared prompt, the chosen and the rejected answer;
    - "padding": for each planner and budget a dict of "planner", "micro_batch_tokens", "padding" (share of the
      positions), "filled" (share of the budget) and "micro_batches" (in a step);
    - "pairs": the near-duplicates nearest to the threshold, dicts of "step", "score", "threshold", "dropped", and the
      "kept" and the "other" sample as {"id", "text"};
    - "examples": samples as dicts of "id", "source", "tokens" (as text) and "segments", as `segments` returns them; of
      pairs "rejected" too, the same of the rejected answer.
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
        contents=contents_table(info["sources"]),
        mix=mix_table(info["sources"]),
        panels=histograms([source["name"] for source in info["sources"]], details["lengths"]),
        padding=padding_table(details["padding"]),
        pairs=[
            pair | {"texts": mark_differences(pair["kept"]["text"], pair["other"]["text"])} for pair in details["pairs"]
        ],
        parts=PARTS[info.get("kind", "samples")],
        examples=[
            example | {"answers": [fold_parts(example[part]) for part in ("segments", "rejected") if example.get(part)]}
            for example in details["examples"]
        ],
    )
    Path(path).write_text(page, encoding="utf-8", newline="\n")


def percent(share: float) -> str:
    """0.5 as 50.0%; with one digit more where that would look like none or all."""
    digits = 2 if 0 < share < 0.001 or 0.999 < share < 1 else 1
    return f"{100 * share:.{digits}f}%"


# ------------------------------------------------------------------------------------------------------------ tables


def cleaning_table(sources: list[dict]) -> dict:
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


def contents_table(sources: list[dict]) -> list[dict]:
    """A row for each thing that was counted in the rows of any source: group, name, times in each source.

    Rows of a group are together; those of what matters most to a reader come first.
    """
    found = {}  # {(group, name): times in each source}
    for number, source in enumerate(sources):
        for group, counts in source["contents"].items():
            for name, times in counts.items():
                found.setdefault((group, name), [0] * len(sources))[number] = times
    rank = {group: i for i, group in enumerate(GROUPS)}
    order = sorted(found, key=lambda key: (rank.get(key[0], len(rank)), key))
    rows = [{"group": group, "name": name, "times": found[group, name]} for group, name in order]
    for before, row in zip([None, *rows], rows, strict=False):
        row["first"] = before is None or before["group"] != row["group"]
    return rows


def mix_table(sources: list[dict]) -> list[dict]:
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


def padding_table(entries: list[dict]) -> dict:
    """{"budgets": [...], "rows": [(planner, a cell for each budget)]}; the best cell of each budget has "best" true."""
    rows = {}  # {planner: {budget: cell}}
    for entry in sorted(entries, key=lambda entry: entry["micro_batch_tokens"]):
        rows.setdefault(entry["planner"], {})[entry["micro_batch_tokens"]] = entry | {"best": False}
    budgets = sorted({entry["micro_batch_tokens"] for entry in entries})
    for budget in budgets:
        best = min((row[budget] for row in rows.values()), key=lambda cell: (cell["padding"], -cell["filled"]))
        best["best"] = True
    return {"budgets": budgets, "rows": [(planner, list(row.values())) for planner, row in rows.items()]}
