"""What the flows' cards show: pictures and tables."""

from pathlib import Path
from typing import Any

from metaflow import current
from metaflow.cards import Image, Markdown, Table


def show_picture(title: str, path: Path) -> None:
    """Add a PNG to the card of this step, if the file is there."""
    if path.is_file():
        current.card.append(Markdown(f"## {title}"))
        current.card.append(Image(path.read_bytes()))


def show_table(title: str, values: dict[str, Any]) -> None:
    """Add a table of names and values to the card of this step."""
    current.card.append(Markdown(f"## {title}"))
    current.card.append(Table([[name, f"{v:.4g}" if isinstance(v, float) else str(v)] for name, v in values.items()]))
