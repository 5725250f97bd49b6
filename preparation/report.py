"""report.html, the page of a prepared folder: counts, mix, lengths, padding, close pairs, samples, settings, hashes.

The page is one file: style and pictures are inline, nothing is loaded and nothing runs. All text from the data is
escaped by the template beside this file, and control characters are spelled out (markup.py).
"""

import itertools
import random
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from preparation.histogram import histograms, short
from preparation.markup import breakable, fold_parts, harmless, mark_differences
from preparation.prepared_folder import Prepared
from preparation.show import segments

GROUPS = (  # of what is counted in the rows, in the report's order
    "rows", "columns not used", "left out by --ignore", "messages", "answers", "tools", "samples", "rendering",
)  # fmt: skip
EXAMPLES = 10  # samples that the report shows
REPORTED_BATCH, REPORTED_BUDGETS, REPORTED_STEPS = 128, (1024, 2048, 4096, 8192), 20  # of the padding's table


def report_details(prepared: Prepared, close_pairs: list[dict], seed: int) -> dict[str, Any]:
    """What the report shows beside data.json: see `write_report`. close_pairs: its "pairs"."""
    samples, train = prepared.samples, prepared.train
    targets, source_of = samples.target_counts()[train], samples.sources()[train]
    lengths = samples.lengths()[train]
    shown = sorted(random.Random(seed).sample(range(len(train)), min(EXAMPLES, len(train))))
    return {
        "lengths": [
            ((lengths - targets)[source_of == i], targets[source_of == i]) for i in range(len(prepared.sources))
        ],
        "padding": _padding(lengths, seed),
        "pairs": close_pairs,
        "examples": [_example(prepared, train[i]) for i in shown],
    }


def _example(prepared, number):
    """A sample as `write_report` takes it."""
    records, samples = prepared.records, prepared.samples
    ids, is_target = samples.writer.read(number)
    return {
        "id": records[samples.record(number)]["id"],
        "source": records.names[samples.writer.sources[number]],
        "tokens": len(ids),
        "segments": segments(prepared.tokenizer, ids.tolist(), is_target.tolist()),
    }


def _padding(lengths, seed):
    """What each planner leaves unused in steps of samples taken at random, for several budgets."""
    import torch  # here, since the passes before do without it

    from batching import PLANNERS, Samples

    sampled = np.random.default_rng(seed).permutation(lengths)[: REPORTED_BATCH * REPORTED_STEPS]
    lengths, rows = torch.from_numpy(sampled - 1), []  # the last token is only ever a target
    for name, planner in PLANNERS.items():
        for budget in REPORTED_BUDGETS:
            steps = planner.plan(lengths, None, REPORTED_BATCH, budget, seed, 0)
            sizes = [lengths[micro_batch] for step in steps for micro_batch in step]
            tokens = sum(int(x.sum()) for x in sizes)
            padded = planner.layout is Samples.padded
            positions = sum(len(x) * int(x.max()) for x in sizes) if padded else tokens
            row = {"planner": name, "micro_batch_tokens": budget, "padding": 1 - tokens / positions}
            rows.append({**row, "filled": tokens / (budget * len(sizes)), "micro_batches": len(sizes) / len(steps)})
    return rows


def write_report(path: Path, info: dict, details: dict[str, Any]) -> None:
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
        contents=contents_table(info["sources"]),
        mix=mix_table(info["sources"]),
        panels=histograms([source["name"] for source in info["sources"]], details["lengths"]),
        padding=padding_table(details["padding"]),
        pairs=[
            pair | {"texts": mark_differences(pair["kept"]["text"], pair["other"]["text"])} for pair in details["pairs"]
        ],
        examples=[example | {"parts": fold_parts(example["segments"])} for example in details["examples"]],
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
