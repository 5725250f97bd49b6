"""The model card of an adapter or a merged model: README.md, filled from its run. The hub reads its head."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple, get_args

import yaml

from publishing.model_files import is_adapter
from shell.cli import ROOT
from shell.files import read_json
from store.address import is_url
from tracking.run_files import FINAL, RECORD, SUMMARY, data_of_run, read_results, read_settings
from training import settings as run_settings

PICTURE = "loss.png"
NOT_SHOWN = ("publish", "resume", "plan", "logger")  # beside those whose type is Path
PATH = re.compile(r"(^|[\s'\"\[{])[/~]|[\w.:]/")  # in a setting, which may be a list; </tag> is none
TEMPLATE = ROOT / "publishing" / "model_card.jinja"


class Card(NamedTuple):
    """What a card is made of. base: its name on the hub. notes: the model's onetune.json. run_dir, base_dir: None if

    they are not known.
    """

    repo_id: str
    base: str
    licence: str
    adapter: bool
    notes: dict[str, Any]
    run_dir: Path | None
    model_dir: Path
    base_dir: Path | None


def base_name(noted: str | None) -> str | None:
    """The name on the hub of a base that was in checkpoints/ORG/NAME; None for another path."""
    if noted is None or is_url(noted):
        return None
    parts = Path(noted).parts
    if "checkpoints" not in parts:
        return None
    below = parts[len(parts) - parts[::-1].index("checkpoints") :]
    return "/".join(below) if len(below) == 2 else None


def licence_of(folder: Path | None) -> str | None:
    """The licence that the model card in a model's folder names, as the hub calls it; None if there is none."""
    path = folder / "README.md" if folder is not None else None
    if path is None or not path.is_file():
        return None
    text = path.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---"):
        return None
    try:
        head = yaml.safe_load(text.split("---", 2)[1])
    except (yaml.YAMLError, IndexError):
        return None
    if not isinstance(head, dict):
        return None
    licence = head.get("license_name") if head.get("license") == "other" else head.get("license")
    return licence if isinstance(licence, str) else None


def write_card(card: Card, folder: Path) -> None:
    """Write README.md into a folder, and beside it the picture of the losses."""
    import jinja2
    from huggingface_hub import EvalResult, ModelCardData

    results = results_of(card)
    evaluations = [
        EvalResult("text-generation", "custom", data or "see the metric", metric, v) for metric, data, v in results
    ]
    head = ModelCardData(
        base_model=card.base,
        license=card.licence,
        library_name="peft" if card.adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["onetune"],
        model_name=card.repo_id.rpartition("/")[2] if evaluations else None,
        eval_results=evaluations or None,
        base_model_relation="adapter" if card.adapter else "finetune",
    )
    picture = card.run_dir is not None and (card.run_dir / PICTURE).is_file()
    if picture:
        shutil.copy(card.run_dir / PICTURE, folder / PICTURE)
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    name = card.repo_id.rpartition("/")[2]
    text = page.render(
        card=card, name=name, picture=picture, results=results, adapter_results=results_of_merged(card), cell=cell,
        **of_run(card.run_dir),
    )  # fmt: skip
    (folder / "README.md").write_text(f"---\n{head.to_yaml()}\n---\n{text}", encoding="utf-8")


def results_of(card: Card) -> list[tuple[str, str, float]]:
    """What evaluations found of the model: metric, what it was measured on ("" if the metric says it), value."""
    return _results(card.run_dir, card.model_dir.name) if card.run_dir else []


def results_of_merged(card: Card) -> list[tuple[str, str, float]]:
    """What evaluations found of the run's adapter that was merged into the model: that of STEP-merged, or final/."""
    if card.run_dir is None or card.adapter:
        return []
    names = card.model_dir.name.removesuffix("-merged"), FINAL
    merged = next((name for name in names if is_adapter(card.run_dir / name)), None)
    return _results(card.run_dir, merged) if merged else []


def _results(run_dir, model):
    of_model = [each for each in read_results(run_dir) if each.model == model]
    return [(metric, each.data, value) for each in of_model for metric, value in each.metrics.items()]


def of_run(folder: Path | None) -> dict[str, Any]:
    """What the page says of a run: its settings without places of this machine, summary, data, hashes.

    The sources are those of the data that the run was trained on: if these are not there, a line is printed.
    """
    if folder is None:
        return {"settings": {}, "summary": None, "data": [], "hashes": {}}
    settings, data_dir = read_settings(folder), data_of_run(folder)
    if data_dir is None:
        print(f"{settings['data_dir']} is not there, or has other data now: the card has only the hashes of the run's")
    record = read_json(folder / RECORD) if (folder / RECORD).is_file() else {"hashes": {}, "git": None}
    git = record["git"]
    commit = {"commit of onetune": git["commit"] + (", changed" if git["changed"] else "")} if git else {}
    return {
        "settings": {k: v for k, v in settings.items() if v is not None and not is_place(k, v)},
        "summary": read_json(folder / SUMMARY) if (folder / SUMMARY).is_file() else None,
        "data": sources_of(data_dir / "data.json") if data_dir else [],
        "hashes": commit | record["hashes"],
    }


def is_place(name: str, value: Any) -> bool:
    """Whether a setting of a run is, or may be, a path or an address; or says nothing of the model."""
    flags = dataclasses.fields(run_settings.Settings)
    paths = {flag.name for flag in flags if Path in (flag.type, *get_args(flag.type))}
    return name in paths or name in NOT_SHOWN or PATH.search(str(value)) is not None


def sources_of(path: Path) -> list[dict[str, Any]]:
    """The sources of prepared data: name, hashes of their files, samples that were trained on."""
    sources = read_json(path).get("sources", []) if path.is_file() else []
    return [source if isinstance(source, dict) else {"name": source} for source in sources]


def cell(value: Any) -> str:
    """A value as it can stand in a cell of a table."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("`", "'")
