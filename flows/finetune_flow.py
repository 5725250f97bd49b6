"""FinetuneFlow: from prepared data to a registered model. An event of DataPrepFlow starts it where it is deployed.

    python flows/finetune_flow.py --config finetune configs/dev.yaml run --data prepared/flow --test_data test.jsonl
    python flows/finetune_flow.py --config finetune configs/dev.yaml argo-workflows create

The config is what finetune.py takes with --config.
"""

import os
import sys
from pathlib import Path

# In a container Metaflow puts this file elsewhere; the project is where the image has it.
sys.path.insert(0, os.environ.get("ONETUNE_ROOT", str(Path(__file__).resolve().parents[1])))

from metaflow import Config, FlowSpec, Parameter, card, current, project, resources, retry, step, trigger

from flows.scripts import EVENT, PROJECT, ScriptError, refuse, run_script, say_replaced, settings_file
from shell.cli import ROOT
from shell.files import read_json
from tracking.run_files import read_columns

NOT_HERE = {  # flags of finetune.py that a config cannot have here, and why
    "publish": "what passes the gate is registered as --registered_model",
    "resume": "a run of the flow has a folder of its own, and each attempt goes on from the last",
    "sweep": "it leaves several models",
    "replay": "it leaves no model",
    "plan": "it leaves no model",
}


@trigger(event={"name": EVENT, "parameters": {"data": "data"}})
@project(name=PROJECT)
class FinetuneFlow(FlowSpec):
    """Get the base, tune, evaluate, merge, and register what passes the gate."""

    config = Config("finetune", default=str(ROOT / "configs" / "dev.yaml"), parser="yaml.safe_load",
                    help="YAML of finetune.py.")  # fmt: skip
    data = Parameter("data", default="", help="Prepared data: a folder, or an address of the model store; by default "
                     "the config's data_dir.")  # fmt: skip
    store = Parameter("store", default="", help="Place in a model store with base models, such as s3://bucket/models.")
    repo_id = Parameter("repo_id", default="", help="The base on Hugging Face's hub, if it is nowhere else.")
    out_dir = Parameter("out_dir", default="out/flows", help="Folder in which each run of the flow has its own.")
    test_data = Parameter("test_data", default="", help="File of questions for exact match.")
    min_exact_match = Parameter("min_exact_match", default=0.8, help="Exact match that a model must reach.")
    max_forgetting = Parameter("max_forgetting", default=1.0, help="KL to the base, in nats a target, that it may have "
                               "on the config's forgetting_source.")  # fmt: skip
    registered_model = Parameter("registered_model", default=PROJECT, help="Name in MLflow's model registry.")

    @retry(times=2)
    @step
    def start(self) -> None:
        """Get the data and the base: from this machine, from the model store, or from the hub."""
        for flag, why in NOT_HERE.items():
            if self.config.get(flag):
                refuse(f"config: {flag} is not for the flow: {why}; leave it out")
        self.run_dir = str(Path(self.out_dir).absolute() / f"run-{current.run_id}")
        self.data_dir = self.data or self.config.get("data_dir")
        if not self.data_dir:
            refuse("no data: give --data, or the config a data_dir")
        say_replaced(self.config, {"out_dir": self.run_dir, "data_dir": self.data_dir})
        if "://" in self.data_dir:
            folder = Path(self.run_dir).with_name(f"data-{current.run_id}")
            if not folder.is_dir():
                run_script("store/models.py", pull=self.data_dir, out_dir=folder)
            self.data_dir = str(folder)
        self.base = self.find_base()
        self.next(self.tune)

    def find_base(self) -> str:
        """The base's folder, or its address in the store, which is filled from the hub if it has not got it."""
        folder = self.config["checkpoint_dir"]
        if "://" in folder or Path(folder).is_dir():
            return folder
        address = f"{self.store}/{name_of(folder)}" if self.store else None
        if address:
            try:
                run_script("store/models.py", may_refuse=True, pull=address)
                return address
            except ScriptError as error:
                print(f"not in the store: {error}")
        if not self.repo_id:
            refuse(f"{folder} is not here, nor in --store: give --repo_id to fetch it from the hub")
        run_script("convert_hf_checkpoint.py", repo_id=self.repo_id, out_dir=folder)
        if address:
            run_script("store/models.py", push=folder, to=address)
        return folder

    @retry(times=3, minutes_between_retries=0)
    @resources(gpu=1, cpu=4, memory=16000)
    @card
    @step
    def tune(self) -> None:
        """Train. An attempt that died is gone on with: the run's folder is the same for all."""
        from flows.cards import show_picture, show_table

        run_dir = Path(self.run_dir)
        values = {"checkpoint_dir": self.base, "data_dir": self.data_dir, "out_dir": self.run_dir}
        values = self.config.to_dict() | values | {"logger": with_mlflow(self.config.get("logger", []))}
        config = settings_file(values, run_dir.with_name(f"{run_dir.name}.yaml"))
        run_script("finetune.py", "--resume", config=config)
        self.attempts = current.retry_count + 1
        self.summary = read_json(run_dir / "summary.json")
        show_picture("Losses", run_dir / "loss.png")
        show_table("The run", {k: v for k, v in self.summary.items() if not isinstance(v, dict)})
        self.next(self.evaluate)

    @retry(times=2)
    @resources(gpu=1, cpu=4, memory=16000)
    @step
    def evaluate(self) -> None:
        """Measure exact match and, by the run's last validation, how much was forgotten."""
        run_dir = Path(self.run_dir)
        adapter = (run_dir / "final" / "adapter_config.json").is_file()
        model = {"adapter_dir" if adapter else "checkpoint_dir": run_dir / "final"}
        self.exact_match = None
        if self.test_data:
            answers = run_dir / "exact_match.json"
            run_script("eval/exact_match.py", data=self.test_data, out_file=answers, **model)
            self.exact_match = read_json(answers)["exact_match"]
        _, forgotten = read_columns(run_dir / "metrics.csv", ["forgetting"]).get("forgetting", ([], []))
        self.forgetting = forgotten[-1] if forgotten else None
        self.next(self.merge)

    @retry(times=2)
    @step
    def merge(self) -> None:
        """Make one model of base and adapter, as other programs load it."""
        final, merged = Path(self.run_dir, "final"), Path(self.run_dir, "merged")
        self.model_dir = str(merged if (final / "adapter_config.json").is_file() else final)
        if self.model_dir == str(merged) and not merged.is_dir():
            run_script("convert_hf_checkpoint.py", adapter_dir=final, out_dir=merged)
        self.next(self.register)

    @card
    @step
    def register(self) -> None:
        """Register the model if it passes the gate: what was not measured does not pass."""
        from flows.cards import show_picture, show_table
        from flows.registry import register

        self.refused = self.reasons_against()
        self.version = None
        if not self.refused:
            tags = {"exact_match": f"{self.exact_match:.4f}", "forgetting": str(self.forgetting), "data": self.data_dir}
            self.version = register(Path(self.run_dir), Path(self.model_dir), self.registered_model, tags)
        show_picture("Losses", Path(self.run_dir, "loss.png"))
        verdict = "; ".join(self.refused) or f"registered as version {self.version} of {self.registered_model}"
        show_table("Gate", {"exact match": self.exact_match, "forgetting": self.forgetting, "verdict": verdict})
        print(verdict)
        self.next(self.end)

    def reasons_against(self) -> list[str]:
        """Why the model is not registered, in words; nothing if it passes."""
        reasons = []
        if self.exact_match is None:
            reasons.append("exact match was not measured: give --test_data")
        elif not self.exact_match >= self.min_exact_match:  # nor is what is no number
            reasons.append(f"exact match {self.exact_match:.1%} is below --min_exact_match {self.min_exact_match:.1%}")
        if self.forgetting is None:
            reasons.append("forgetting was not measured: the config needs forgetting_source and eval_interval")
        elif not self.forgetting <= self.max_forgetting:
            reasons.append(f"forgetting {self.forgetting:.3f} is above --max_forgetting {self.max_forgetting:g}")
        return reasons

    @step
    def end(self) -> None:
        """Say where everything is."""
        print(f"{current.flow_name}: the run is {self.run_dir}, the model {self.model_dir}, version {self.version}")


def name_of(folder: str) -> str:
    """The name of a base in the store: ORG/NAME of checkpoints/ORG/NAME. Two bases may have one last name."""
    _, below, name = f"/{Path(folder).as_posix()}".rpartition("/checkpoints/")
    if not below:
        refuse(f"checkpoint_dir {folder}: name it checkpoints/ORG/NAME to find ORG/NAME in --store, or by its address")
    return name


def with_mlflow(trackers: str | list[str]) -> list[str]:
    """The config's trackers, and MLflow, which the registry needs."""
    trackers = [trackers] if isinstance(trackers, str) else [*trackers]
    return trackers + ["mlflow"] * ("mlflow" not in trackers)


if __name__ == "__main__":
    FinetuneFlow()
