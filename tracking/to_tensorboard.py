"""TensorBoard: event files in the run's folder, in tensorboard/: that is in the name it shows."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracking.run_files import Result

if TYPE_CHECKING:
    from tracking.trackers import Tracked


class TensorBoard:
    """See `Tracker` in trackers.py. It has no place for folders and reports: of those it shows the path as text."""

    late = False

    def __init__(self, run: Tracked, state: dict[str, Any]):
        self.run, self.state = run, state
        self.folder = run.folder / "tensorboard"

    def open(self) -> int | None:
        """Begin a new event file beside those of earlier sessions. Returns the last step in these."""
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        last = self._last_step()
        self.state["where"] = f"tensorboard --logdir {self.run.folder.parent}"
        self.writer = EventFileWriter(str(self.folder))
        if last == 0:
            settings = {name: value for name, value in self.run.settings.items() if value is not None}
            self._text("settings", _table(settings))
            self._text("run", _table({**self.run.record["hashes"], **(self.run.record["git"] or {})}))
            self._text("environment", _table(self.run.record["environment"]))
            self.writer.flush()
        return last

    def _last_step(self) -> int:
        from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

        paths = sorted(self.folder.glob("events.out.tfevents.*"))
        events = [event for path in paths for event in LegacyEventFileLoader(str(path)).Load()]
        rows = [event for event in events if any(value.tag == "loss" for value in event.summary.value)]
        return max((event.step for event in rows), default=0)

    def log_rows(self, rows: list[dict[str, float]]) -> None:
        """One event for each row."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        for row in rows:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in row.items() if name != "step"]
            self._add(Summary(value=values), int(row["step"]))
        self.writer.flush()

    def log_file(self, name: str, path: Path) -> None:
        """A picture is shown; JSON and text are shown as text; of others the path."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        if path.suffix == ".png":
            image = Summary.Image(encoded_image_string=path.read_bytes())
            self._add(Summary(value=[Summary.Value(tag=name, image=image)]), 0)
        elif path.suffix in (".json", ".yaml", ".diff"):
            self._text(name, f"```\n{path.read_text(encoding='utf-8', errors='replace')}\n```")
        else:
            self._text(name, str(path))
        self.writer.flush()

    def log_folder(self, name: str, path: Path) -> None:
        """The path, as text."""
        self._text(name, str(path))
        self.writer.flush()

    def log_result(self, result: Result, step: int) -> None:
        """Each metric as a scalar at that step."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in result.names().items()]
        self._add(Summary(value=values), step)
        self.writer.flush()

    def close(self, status: str) -> None:
        """End the event file."""
        self.writer.close()

    def _add(self, summary, step):
        from tensorboard.compat.proto.event_pb2 import Event

        self.writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))

    def _text(self, tag, text):
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.text.metadata import create_summary_metadata
        from tensorboard.util.tensor_util import make_tensor_proto

        metadata = create_summary_metadata(display_name=tag, description="")
        value = Summary.Value(tag=tag, metadata=metadata, tensor=make_tensor_proto([text.encode()]))
        self._add(Summary(value=[value]), 0)


def _table(values: dict[str, Any]) -> str:
    """A table in Markdown."""
    lines = [f"| {name} | {json.dumps(value).replace('|', chr(92) + '|')} |" for name, value in values.items()]
    return "\n".join(["| | |", "|---|---|", *lines])
