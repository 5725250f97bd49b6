"""DataPrepFlow: sources in, prepared data out, in the model store too; then an event that starts FinetuneFlow.

    python flows/data_prep_flow.py --config prepare prepare.yaml run
    python flows/data_prep_flow.py --config prepare prepare.yaml run --store s3://bucket/data --min_samples 1000
    python flows/data_prep_flow.py --config prepare prepare.yaml argo-workflows create

prepare.yaml is what prepare_data.py takes with --config: data, checkpoint_dir, prompt_style, benchmarks, …
"""

import os
import sys
import tempfile
from pathlib import Path

# In a container Metaflow puts this file elsewhere; the project is where the image has it.
sys.path.insert(0, os.environ.get("ONETUNE_ROOT", str(Path(__file__).resolve().parents[1])))

from metaflow import Config, FlowSpec, Parameter, card, current, project, retry, step
from metaflow.integrations import ArgoEvent
from metaflow.metaflow_config import ARGO_EVENTS_WEBHOOK_URL

from flows.scripts import EVENT, PROJECT, NotGoodEnough, fetch_source, run_script, say_replaced, settings_file
from shell.files import read_json


@project(name=PROJECT)
class DataPrepFlow(FlowSpec):
    """Fetch, prepare, check and publish data."""

    prepare_config = Config("prepare", parser="yaml.safe_load", required=True, help="YAML of prepare_data.py.")
    out_dir = Parameter("out_dir", default="prepared/flow", help="Folder for the prepared data.")
    store = Parameter("store", default="", help="Place in a model store to publish them at, such as s3://bucket/data.")
    min_samples = Parameter("min_samples", default=1, help="Samples to train on that there must be.")
    max_dropped = Parameter("max_dropped", default=0.5, help="Share of the rows read that may be dropped.")

    @retry(times=2)
    @step
    def start(self) -> None:
        """Fetch: copy sources at addresses such as s3://… or https://… to this machine."""
        say_replaced(self.prepare_config, {"out_dir": self.out_dir})
        data = self.prepare_config["data"]
        folder = Path(self.out_dir).with_name("fetched")
        self.sources = [fetch_source(each, folder) for each in ([data] if isinstance(data, str) else data)]
        self.next(self.prepare)

    @retry(times=2)
    @step
    def prepare(self) -> None:
        """Validate, clean, render and tokenise. What is prepared already in the same way is used as it is."""
        out_dir = Path(self.out_dir)
        with tempfile.TemporaryDirectory() as folder:  # beside out_dir there may be a file of the user's
            config = settings_file(self.prepare_config.to_dict(), Path(folder, "prepare.yaml"))
            run_script("prepare_data.py", config=config, data=self.sources, out_dir=out_dir)
        self.info = read_json(out_dir / "data.json")
        self.next(self.check)

    @card
    @step
    def check(self) -> None:
        """Stop here if too little is left, or too much was dropped."""
        from flows.cards import show_table

        counts = [source["counts"] for source in self.info["sources"]]
        read, kept = (sum(each.get(name, 0) for each in counts) for name in ("read", "kept"))
        samples, dropped = self.info["train"]["samples"], 1 - kept / max(1, read)
        facts = {"rows read": read, "kept": kept, "dropped": dropped, "samples to train on": samples}
        show_table("Prepared data", {**facts, "version": self.info["version"], "folder": self.out_dir})
        for source, each in zip(self.info["sources"], counts, strict=True):
            show_table(source["name"], each)
        if samples < self.min_samples:
            raise NotGoodEnough(f"{samples} samples to train on, fewer than --min_samples {self.min_samples}")
        if dropped > self.max_dropped:
            raise NotGoodEnough(f"{dropped:.0%} of the rows were dropped, more than --max_dropped {self.max_dropped:g}")
        self.next(self.publish)

    @retry(times=2)
    @step
    def publish(self) -> None:
        """Publish the folder, and tell those who wait for it."""
        self.address = str(Path(self.out_dir).absolute())
        if self.store:
            printed = run_script("store/models.py", push=self.out_dir, to=f"{self.store}/{Path(self.out_dir).name}")
            self.address = printed.split("published ")[-1].strip()
        event = ArgoEvent(EVENT, payload={"data": self.address, "version": self.info["version"]})
        if ARGO_EVENTS_WEBHOOK_URL:  # on Argo Workflows it is set; elsewhere there may be nobody to be told
            event.publish(ignore_errors=False)
        self.next(self.end)

    @step
    def end(self) -> None:
        """Say where the data are."""
        print(f"{current.flow_name}: prepared data, version {self.info['version'][:12]}, are at {self.address}")


if __name__ == "__main__":
    DataPrepFlow()
