"""Both flows with Metaflow itself, on this machine: from rows to a registered model, with an attempt that is killed."""

import base64
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from math import nan
from types import SimpleNamespace

import psutil
import pytest
import yaml
from conftest import ROOT
from http_stub import JsonHandler, serving
from servers import MLflowServer
from test_convert import hub  # noqa: F401 (a fixture)

from flows.finetune_flow import FinetuneFlow, with_mlflow
from tracking.run_files import read_rows

CONFIG = dict(
    checkpoint_dir="checkpoints/org/tiny", precision="32-true", global_batch_size=4, learning_rate=0.01, max_steps=200,
    eval_interval=50, save_interval=5, forgetting_source="general", logger="tensorboard", out_dir="out/mine",
    data_dir="prepared/mine",
)  # fmt: skip


@pytest.fixture
def place(tmp_path):
    """A folder with rows of two sources, questions, and the flows' configs; and what Metaflow must be told."""
    lines = (ROOT / "examples/orders/train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "orders.jsonl").write_text("".join(lines[:120]))
    (tmp_path / "general.jsonl").write_text("".join(lines[200:260]))
    (tmp_path / "test.jsonl").write_text("".join(lines[300:304]))
    (tmp_path / "mixture.yaml").write_text("sources: [{path: orders.jsonl}, {path: general.jsonl}]\n")
    (tmp_path / "finetune.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


@pytest.fixture
def flow(place, monkeypatch):
    """`flow("finetune_flow.py", *words)` runs a flow: (exit status, all that it prints)."""
    settings = {"METAFLOW_USER": "tester", "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(place / "metaflow"),
                "METAFLOW_HOME": str(place / "home"), "ONETUNE_STORE_CACHE": str(place / "cache")}  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, value)

    def run(name, *words):
        command = [sys.executable, str(ROOT / "flows" / name), *map(str, words)]
        done = subprocess.run(
            command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
        )
        return done.returncode, done.stdout

    return run


def prepare_config(place, model, **flags):
    path = place / "prepare.yaml"
    path.write_text(
        yaml.safe_dump({"data": "mixture.yaml", "checkpoint_dir": str(model), "prompt_style": "chatml"} | flags)
    )
    return "--config", "prepare", path


@pytest.fixture
def listener():
    """A place that events are sent to, as that of Argo Events: `listener.events`."""

    class Handler(JsonHandler):
        def do_POST(self):
            self.server.events.append(json.loads(self.body()))
            self.answer({})

    with serving(Handler) as server:
        server.events = []
        yield server


def kill_training_once(folder, after):
    """Kill finetune.py (SIGKILL) when a run below `folder` has so many steps. Returns the thread that waits for it."""

    def wait():
        until = time.monotonic() + 200
        while time.monotonic() < until:
            rows = [len(read_rows(path)[1]) for path in folder.glob("run-*/metrics.csv")]
            if rows and rows[0] >= after:
                for process in psutil.process_iter(["cmdline"]):
                    words = process.info["cmdline"] or []
                    if str(ROOT / "finetune.py") in words and any(str(folder) in word for word in words):
                        process.kill()
                return
            time.sleep(0.01)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_from_rows_to_a_registered_model(place, flow, listener, tiny_model_dir, run_script, monkeypatch):
    """The event has what FinetuneFlow needs; the base comes from the store; a killed attempt is gone on with."""
    import mlflow

    shop = place / "shop"
    assert run_script("store/models.py", "--push", tiny_model_dir, "--to", shop / "models/org/tiny")[0] == 0
    monkeypatch.setenv("METAFLOW_ARGO_EVENTS_WEBHOOK_URL", listener.url)
    code, out = flow(
        "data_prep_flow.py", *prepare_config(place, tiny_model_dir), "run", "--store", f"file://{shop}/data"
    )
    assert code == 0, out
    ((event,),) = [listener.events]
    assert event["name"] == "onetune-data"
    data = event["payload"]["data"]
    assert re.fullmatch(rf"file://{shop}/data/flow@[0-9a-f]{{12}}", data)
    assert event["payload"]["version"] == json.loads((place / "prepared/flow/data.json").read_text())["version"]

    server = MLflowServer(place)
    server.start()
    try:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        killer = kill_training_once(place / "out" / "flows", 12)
        words = ["--config", "finetune", place / "finetune.yaml", "run", "--data", data, "--store", f"file://{shop}/models",
                 "--test_data", "test.jsonl", "--min_exact_match", 0, "--max_forgetting", 100]  # fmt: skip
        code, out = flow("finetune_flow.py", *words)
        assert code == 0, out
        killer.join(1)
        assert "finetune.py ended with status -9" in out and "Task is starting (retry)" in out, out
        assert (
            f"out_dir is {run_folder(place)}, not the config's out/mine; data_dir is {data}, not the config's " in out
        )
        assert (run_folder(place) / "tensorboard").is_dir(), "the config's tracker"
        assert [int(row["step"]) for row in read_rows(run_folder(place) / "metrics.csv")[1]] == [*range(1, 201)]
        client = mlflow.MlflowClient(server.uri)
        (version,) = client.search_model_versions("name = 'onetune'")
        assert version.tags["exact_match"] == "0.0000" and float(version.tags["forgetting"]) > 0
        tracked = client.get_run(version.run_id)
        assert tracked.info.status == "FINISHED" and "exact_match/test" in tracked.data.metrics
        merged = {each.path for each in client.list_artifacts(version.run_id, "model")}
        assert {"model/model.safetensors", "model/config.json"} <= merged
    finally:
        server.stop()
    assert cards(place, "FinetuneFlow", "tune") and "data:image/png" in cards(place, "FinetuneFlow", "register")
    assert "registered as version 1 of onetune" in cards(place, "FinetuneFlow", "register")
    assert "samples to train on" in cards(place, "DataPrepFlow", "check")


def run_folder(place):
    (run,) = place.glob("out/flows/run-*/metrics.csv")
    return run.parent


def cards(place, flow, step):
    """What a step's card shows, as the JSON in its page."""
    (path,) = place.glob(f".metaflow/mf.cards/{flow}/runs/*/steps/{step}/tasks/*/cards/*.html")
    (content,) = re.findall(r'__MF_DATA__\["[^"]+"\] = "([^"]+)"', path.read_text())
    return base64.b64decode(content).decode()


def test_data_that_are_not_good_enough_go_no_further(place, flow, tiny_model_dir):
    config = prepare_config(place, tiny_model_dir)
    code, out = flow("data_prep_flow.py", *config, "run", "--min_samples", 1000)
    assert code and "fewer than --min_samples 1000" in out and not re.search(r"/publish/\d", out), out
    code, out = flow("data_prep_flow.py", *prepare_config(place, tiny_model_dir, min_words=10**6), "run")
    assert code and "no sample is left" in out, out


def test_a_mistake_is_not_tried_again(place, flow, tiny_model_dir):
    (place / "general.jsonl").write_text("no JSON\n")
    code, out = flow("data_prep_flow.py", *prepare_config(place, tiny_model_dir), "run")
    assert code and "general.jsonl:1" in out and "(retry)" not in out, out


def test_sources_at_addresses_are_fetched(place, flow, tiny_model_dir):
    """Two of one name, and one that is here. The config is where the prepared data's own might have been, and stays."""
    for folder, name in (("a", "general"), ("b", "orders")):
        (place / folder).mkdir()
        (place / f"{name}.jsonl").rename(place / folder / "rows.jsonl")
    (place / "here.jsonl").write_text((place / "test.jsonl").read_text())
    data = [f"file://{place}/a/rows.jsonl", f"file://{place}/b/rows.jsonl", "here.jsonl"]
    config = prepare_config(place, tiny_model_dir, data=data, out_dir="prepared/mine")
    before = (place / "prepare.yaml").read_text()
    code, out = flow("data_prep_flow.py", *config, "run", "--out_dir", "prepare")
    assert code == 0 and "out_dir is prepare, not the config's prepared/mine" in out, out
    assert (place / "prepare.yaml").read_text() == before and not (place / "prepared").exists()
    sources = json.loads((place / "prepare/data.json").read_text())["sources"]
    assert [each["counts"]["read"] for each in sources] == [60, 120, 4]


@pytest.mark.parametrize("source", ["file:///nowhere/rows.jsonl", "ftpx://host/rows.jsonl"])
def test_an_address_that_is_wrong_is_not_tried_again(place, flow, tiny_model_dir, source):
    code, out = flow("data_prep_flow.py", *prepare_config(place, tiny_model_dir, data=source), "run")
    assert code and f"error: data: {source} cannot be fetched: " in out and "(retry)" not in out, out
    assert not list(place.glob("prepared/fetched/*/*"))


# ------------------------------------------------------------------------------------------------------ the base


def finder(place, monkeypatch, **values):
    monkeypatch.chdir(place)
    monkeypatch.setenv("ONETUNE_STORE_CACHE", str(place / "cache"))
    defaults = {"config": {"checkpoint_dir": "checkpoints/org/tiny"}, "store": "", "repo_id": ""}
    return lambda: FinetuneFlow.find_base(SimpleNamespace(**(defaults | values)))


def test_the_base_comes_from_the_store_before_the_hub(place, monkeypatch, hub, tiny_model_dir):  # noqa: F811
    for name, value in hub.environment.items():
        monkeypatch.setenv(name, value)
    hub.repos["org/tiny"] = tiny_model_dir
    find = finder(place, monkeypatch, store=str(place / "shop"), repo_id="org/tiny")
    assert find() == "checkpoints/org/tiny" and hub.asked  # from the hub, and the store is filled
    shutil.rmtree(place / "checkpoints")
    hub.asked.clear()
    assert find() == f"{place}/shop/org/tiny" and not hub.asked
    with pytest.raises(SystemExit):  # one of the same last name is another
        finder(place, monkeypatch, store=str(place / "shop"), config={"checkpoint_dir": "checkpoints/other/tiny"})()
    shutil.copytree(tiny_model_dir, place / "checkpoints/org/tiny")
    assert find() == "checkpoints/org/tiny"


@pytest.mark.parametrize(
    ("folder", "says"),
    [("checkpoints/org/tiny", "give --repo_id"), ("tiny", "checkpoint_dir tiny: name it checkpoints/ORG/NAME")],
)
def test_a_base_that_is_nowhere(place, monkeypatch, capfd, folder, says):
    with pytest.raises(SystemExit):
        finder(place, monkeypatch, store=str(place / "shop"), config={"checkpoint_dir": folder})()
    assert says in capfd.readouterr().out.splitlines()[-1]


# ------------------------------------------------------------------------------------------------------ the config


@pytest.mark.parametrize(
    ("flag", "value", "says"),
    [
        ("publish", "s3://bucket/a", "--registered_model"),
        ("resume", True, "has a folder of its own"),
        ("plan", True, "leaves no model"),
        ("data_dir", None, "give --data"),
    ],
)
def test_what_the_flow_does_itself_is_refused(flag, value, says, capsys):
    """`publish` would be before the gate."""
    config = {"checkpoint_dir": "checkpoints/org/tiny", "data_dir": "prepared/my", flag: value}
    with pytest.raises(SystemExit):
        FinetuneFlow.start(SimpleNamespace(config=config, out_dir="out/flows", data=""))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("error: ") and flag in line and says in line


@pytest.mark.parametrize(
    ("trackers", "all_of_them"),
    [([], ["mlflow"]), ("csv", ["csv", "mlflow"]), (["mlflow", "wandb"], ["mlflow", "wandb"])],
)
def test_mlflow_comes_beside_the_trackers_of_the_config(trackers, all_of_them):
    assert with_mlflow(trackers) == all_of_them


# ------------------------------------------------------------------------------------------------------ the gate


@pytest.mark.parametrize(
    "found, reasons",
    [
        (dict(exact_match=0.8, forgetting=0.5), []),
        (dict(exact_match=0.79, forgetting=0.5), ["exact match 79.0% is below --min_exact_match 80.0%"]),
        (dict(exact_match=0.9, forgetting=0.6), ["forgetting 0.600 is above --max_forgetting 0.5"]),
        (dict(exact_match=nan, forgetting=nan), ["exact match nan% is below --min_exact_match 80.0%",
                                                 "forgetting nan is above --max_forgetting 0.5"]),
        (dict(exact_match=None, forgetting=0.5), ["exact match was not measured: give --test_data"]),
        (dict(exact_match=0.9, forgetting=None), [("forgetting was not measured: the config needs forgetting_source "
                                                  "and eval_interval")]),
    ],
)  # fmt: skip
def test_the_gate(found, reasons):
    flow = SimpleNamespace(min_exact_match=0.8, max_forgetting=0.5, **found)
    assert FinetuneFlow.reasons_against(flow) == reasons


# ------------------------------------------------------------------------------------------------------ deployed


def test_what_is_deployed_waits_for_the_event(place, flow, monkeypatch):
    """The workflow for Argo, as Metaflow would send it to the cluster; the code goes to an S3 server."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    try:
        url = "http://{}:{}".format(*server.get_host_and_port())
        settings = {
            "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": url, "METAFLOW_S3_ENDPOINT_URL": url, "METAFLOW_DATASTORE_SYSROOT_S3": "s3://flows/mf",
            "METAFLOW_DEFAULT_DATASTORE": "s3", "METAFLOW_ARGO_EVENTS_EVENT": "events",
            "METAFLOW_ARGO_EVENTS_EVENT_SOURCE": "source", "METAFLOW_ARGO_EVENTS_SERVICE_ACCOUNT": "account",
            "METAFLOW_ARGO_EVENTS_EVENT_BUS": "bus",
        }  # fmt: skip
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="flows")
        words = ["--config", "finetune", "finetune.yaml", "--datastore", "s3"]
        words += ["argo-workflows", "create", "--only-json"]
        command = [sys.executable, str(ROOT / "flows" / "finetune_flow.py"), *words]
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    finally:
        server.stop()
    template = json.loads(done.stdout)
    assert template["kind"] == "WorkflowTemplate" and template["metadata"]["name"] == "onetune.user.tester.finetuneflow"
    annotations = template["metadata"]["annotations"]
    assert json.loads(annotations["metaflow/triggers"]) == [{"name": "onetune-data", "type": "event"}]
    assert {"data", "store", "min_exact_match"} <= json.loads(annotations["metaflow/parameters"]).keys()
    steps = {each["name"]: each for each in template["spec"]["templates"] if "container" in each}
    assert {"start", "tune", "evaluate", "merge", "register", "end"} <= steps.keys()
    assert steps["tune"]["container"]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert steps["tune"]["retryStrategy"]["limit"] == 3
