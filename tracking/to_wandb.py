"""Weights & Biases: a run in the project WANDB_PROJECT, or "onetune"; with WANDB_MODE=offline files in tracking/wandb/.

A run that `wandb agent` started for a sweep is the sweep's. Run as a program, this file says by its exit status whether
W&B knows who sends: 0 or 1.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracking.run_files import TRACKING, Result

if TYPE_CHECKING:
    from tracking.trackers import Tracked

FILES = "onetune"  # the folder at W&B for a run's files: W&B has a config.yaml of its own beside it

# How messages begin that its library writes into its log, and nowhere else, when it stops trying to send something.
GAVE_UP = ("filestream: fatal", "file transfer: upload: failed", "runfiles: ", "sender: failed to log artifact")

# Its client waits so many seconds for the server at the start. Whoever sends tries again itself.
ENVIRONMENT = {"WANDB_INIT_TIMEOUT": "30"}


def logged_in() -> bool:
    """Whether there is a key for W&B's server, or none is needed, as offline."""
    import wandb
    from wandb.sdk.lib import wbauth

    settings = wandb.setup().settings
    if settings.mode != "online":
        return True
    return wbauth.authenticate_session(host=settings.base_url, source="onetune", prompt=False) is not None


class WandB:
    """See `Tracker` in trackers.py. Settings are the config, with hashes, commit and environment in it."""

    late = True

    def __init__(self, run: Tracked, state: dict[str, Any]):
        self.run, self.state = run, state

    def open(self) -> int | None:
        """Begin the run, or go on with it, by its id. Returns the last step that the server has; offline None."""
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import wandb

        if wandb.setup().settings.mode == "disabled":
            raise RuntimeError("W&B is switched off: WANDB_MODE=disabled")
        id_ = self.state.get("id") or os.environ.get("WANDB_RUN_ID") or self.run.record["id"]
        project = os.environ.get("WANDB_PROJECT") or self.state.get("project") or "onetune"
        record = {key: value for key, value in self.run.record.items() if key not in ("id", "sessions")}
        begun = any((self.run.folder / TRACKING / "wandb").glob("offline-run-*"))
        self.there = wandb.init(
            project=project, id=id_, name=os.environ.get("WANDB_NAME") or self.run.name, resume="allow",
            dir=self.run.folder / TRACKING, config={**self.run.settings, **record}, allow_val_change=True,
            reinit="create_new", settings=wandb.Settings(console="off", silent=True),
        )  # fmt: skip
        self.state |= {"id": id_, "project": project}
        if self.there.offline:
            self.state["where"] = f"offline, for `wandb sync {Path(self.there.dir).parent}`"
            return None if begun else 0
        self.state["where"] = self.there.url
        return max(0, self.there.starting_step - 1)

    def log_rows(self, rows: list[dict[str, float]]) -> None:
        """A step of its history for each row."""
        for row in rows:
            values = {name: value for name, value in row.items() if name != "step"}
            self.there.log(values, step=int(row["step"]), commit=True)

    def log_file(self, name: str, path: Path) -> None:
        """A picture is shown in the summary, as the history has a step for each row and no other; all are files.

        It gets a copy. Its library would link to the file, and it has written its own config.yaml through such a link.
        """
        import wandb

        if path.suffix == ".png":
            self.there.summary[path.name] = wandb.Image(str(path))
        elif path.suffix == ".html":
            self.there.summary[name] = wandb.Html(str(path))
        copy = Path(self.there.dir) / FILES / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        self.there.save(str(copy), base_path=self.there.dir, policy="now", glob=False)

    def log_folder(self, name: str, path: Path) -> None:
        """An artifact of type model. Its files are read where they are: no copy is left in the home folder's cache."""
        import wandb

        artifact = wandb.Artifact(f"{self.there.id}-{name}", type="model")
        artifact.add_dir(str(path), skip_cache=True, policy="immutable")
        self.there.log_artifact(artifact)

    def log_result(self, result: Result, step: int) -> None:
        """In the summary."""
        self.there.summary.update(result.names())

    def close(self, status: str) -> None:
        """Wait until all is sent, and say how the run ended. Raises RuntimeError if its library gave something up."""
        self.there.finish(exit_code=0 if status == "finished" else 1)
        with open(self.there.settings.log_internal, encoding="utf-8", errors="replace") as log:
            messages = (json.loads(line)["msg"] for line in log if '"level":"ERROR' in line)
            lost = next((message for message in messages if message.startswith(GAVE_UP)), None)
        if lost is not None:
            raise RuntimeError(lost)


if __name__ == "__main__":
    sys.exit(not logged_in())
