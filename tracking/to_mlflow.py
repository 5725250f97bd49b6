"""MLflow: a run in an experiment of a tracking server, or of a local database.

The server is MLFLOW_TRACKING_URI, the experiment MLFLOW_EXPERIMENT_NAME or "onetune".
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tracking.run_files import Result

if TYPE_CHECKING:
    from tracking.trackers import Tracked

TAG = "onetune.id"  # of a run of MLflow: the id of ours
PER_REQUEST, PARAMS_PER_REQUEST, LONGEST_PARAM = 1000, 100, 6000  # MLflow's limits: metrics, parameters, characters
LONGEST_NAME = 250
STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
# Its client tries a request again for minutes, without a word. Whoever sends tries again itself.
ENVIRONMENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}


class MLflow:
    """See `Tracker` in trackers.py. Settings are parameters; hashes and the commit are tags; files are artifacts."""

    late = False

    def __init__(self, run: Tracked, state: dict[str, Any]):
        self.run, self.state = run, state
        self.began = datetime.fromisoformat(run.record["sessions"][0]["began"]).timestamp()

    def open(self) -> int | None:
        """Begin the run, or find it by its id. Returns the last step that the server has."""
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import mlflow

        uri = os.environ.get("MLFLOW_TRACKING_URI") or self.state.get("uri") or mlflow.get_tracking_uri()
        self.state["uri"] = _without_password(_absolute(uri))  # also if it is down: for those who try it later
        self.client = mlflow.MlflowClient(uri)
        experiment = self._experiment()
        self.id = self._known(experiment) or self._begin(experiment)
        self.ended = self.client.get_run(self.id).info.end_time  # None if it has not ended
        self.client.update_run(self.id, status="RUNNING")
        self.state["run"] = self.id
        self.state["where"] = f"{self.state['uri']}, experiment {experiment}, run {self.id}"
        if uri.startswith("http"):
            self.state["where"] = f"{self.state['uri'].rstrip('/')}/#/experiments/{experiment}/runs/{self.id}"
        return max((metric.step for metric in self.client.get_metric_history(self.id, "loss")), default=0)

    def _experiment(self):
        from mlflow.exceptions import MlflowException

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or self.state.setdefault("experiment", "onetune")
        self.state["experiment"] = name
        if found := self.client.get_experiment_by_name(name):
            return found.experiment_id
        try:
            return self.client.create_experiment(name)
        except MlflowException:  # another run has just made it
            if found := self.client.get_experiment_by_name(name):
                return found.experiment_id
            raise

    def _known(self, experiment):
        """The run's id there, if it has been begun: even where the answer to that did not arrive."""
        found = self.client.search_runs([experiment], f"tags.`{TAG}` = '{self.run.record['id']}'", max_results=1)
        return found[0].info.run_id if found else None

    def _begin(self, experiment):
        from mlflow.entities import Param

        record = self.run.record
        tags = {TAG: record["id"], "mlflow.source.name": "finetune.py"}
        tags |= {f"sha256.{_name(name)}": value for name, value in record["hashes"].items()}
        if record["git"]:
            tags |= {"mlflow.source.git.commit": record["git"]["commit"], "git.branch": record["git"]["branch"]}
            tags["git.changed"] = str(record["git"]["changed"]).lower()
        around = {**record["environment"], **record["environment"]["packages"]}
        tags |= {f"environment.{_name(name)}": str(value) for name, value in around.items() if name != "packages"}
        began = round(1000 * self.began)
        id_ = self.client.create_run(experiment, start_time=began, tags=tags, run_name=self.run.name).info.run_id
        params = [Param(_name(name), str(value)[:LONGEST_PARAM]) for name, value in self.run.settings.items()]
        for first in range(0, len(params), PARAMS_PER_REQUEST):
            self.client.log_batch(id_, params=params[first : first + PARAMS_PER_REQUEST])
        return id_

    def log_rows(self, rows: list[dict[str, float]]) -> None:
        """Whole rows in each request, which the server takes whole or not at all."""
        from mlflow.entities import Metric

        self.ended, request = None, []
        for row in rows:
            now = round(1000 * time.time())
            metrics = [Metric(_name(key), value, now, int(row["step"])) for key, value in row.items() if key != "step"]
            if request and len(request) + len(metrics) > PER_REQUEST:
                self.client.log_batch(self.id, metrics=request)
                request = []
            request += metrics
        if request:
            self.client.log_batch(self.id, metrics=request)

    def log_file(self, name: str, path: Path) -> None:
        """An artifact."""
        self.client.log_artifact(self.id, str(path), Path(name).parent.as_posix().removeprefix(".") or None)

    def log_folder(self, name: str, path: Path) -> None:
        """Its files, as artifacts in a folder."""
        self.client.log_artifacts(self.id, str(path), name)

    def log_result(self, result: Result, step: int) -> None:
        """Each metric at that step."""
        from mlflow.entities import Metric

        now = round(1000 * time.time())
        self.client.log_batch(self.id, [Metric(_name(key), value, now, step) for key, value in result.names().items()])

    def close(self, status: str) -> None:
        """Say how the run ended; when, is as before if only files or results came later."""
        self.client.set_terminated(self.id, STATUS[status], self.ended)


def _name(text: str) -> str:
    """A name with the letters that MLflow allows. One with others ends in a piece of its hash, so that no two agree."""
    allowed = re.sub(r"[^\w\-. :/]", "_", text, flags=re.ASCII)[:LONGEST_NAME]
    if allowed == text:
        return text
    return f"{allowed[: LONGEST_NAME - 5]}-{hashlib.sha256(text.encode()).hexdigest()[:4]}"


def _absolute(uri: str) -> str:
    """The address of a database in a file, for a process in another folder."""
    path = re.fullmatch(r"sqlite:///([^/].*)", uri)
    return f"sqlite:///{Path(path[1]).absolute()}" if path else uri


def _without_password(uri: str) -> str:
    who, at, _ = urlsplit(uri).netloc.rpartition("@")
    return uri.replace(who + at, "", 1) if at else uri  # urlunsplit would drop slashes of sqlite:////path
