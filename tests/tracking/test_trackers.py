"""What trackers get to see of a run, read back with their own readers: all of it, once, whatever happens between."""

import base64
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, wait_for
from servers import MLflowServer, silent_server
from test_finetune import random_samples, run, run_on_cpus, settings, write_data  # noqa: F401 (fixtures)
from test_run_folder import before_step

import finetune
from shell.cli import UserError
from tracking import following, sending
from tracking.results import record_result
from tracking.run_files import read_rows
from tracking.sending import state_path
from tracking.to_mlflow import _name, _without_password


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    one = MLflowServer(tmp_path_factory.mktemp("mlflow"))
    one.start()
    yield one
    one.stop()


@pytest.fixture(autouse=True)
def places(monkeypatch, server, request):
    """Where the trackers send to in these tests."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", request.node.name[:60])
    monkeypatch.setenv("WANDB_MODE", "offline")
    if server.process is None:
        server.start()


def in_csv(out_dir):
    """(step, value) of each column of metrics.csv that has any values."""
    rows = read_rows(out_dir / "metrics.csv")[1]
    names = dict.fromkeys(name for row in rows for name, value in row.items() if value != "" and name != "step")
    return {name: [(int(row["step"]), float(row[name])) for row in rows if row[name] != ""] for name in names}


def client(server):
    import mlflow

    return mlflow.MlflowClient(server.uri)


def mlflow_experiment(server, request):
    """The id of the test's experiment."""
    return client(server).get_experiment_by_name(request.node.name[:60]).experiment_id


def mlflow_run(server, request):
    """The one run in the test's experiment."""
    (one,) = client(server).search_runs([mlflow_experiment(server, request)])
    return one


def in_mlflow(server, one, names):
    c = client(server)
    return {
        name: sorted((m.step, m.value) for m in c.get_metric_history(one.info.run_id, _name(name))) for name in names
    }


def mlflow_files(server, one, folder=None):
    c, found = client(server), set()
    for each in c.list_artifacts(one.info.run_id, folder):
        found |= mlflow_files(server, one, each.path) if each.is_dir else {each.path}
    return found


def wandb_records(out_dir, kind):
    """The records of a kind in all of a run's offline files, in order, by W&B's own reader."""
    for path in sorted(out_dir.glob("tracking/wandb/offline-run-*")):
        command = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", path]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        yield from (record[kind] for record in map(json.loads, lines) if record["type"] == kind)


def in_wandb(out_dir):
    found = {}
    for record in wandb_records(out_dir, "history"):
        for name, value in record["item"].items():
            if not name.startswith("_"):
                found.setdefault(name, []).append((record["item"]["_step"], value))
    return found


def wandb_summary(out_dir):
    return {key: value for each in wandb_records(out_dir, "summary") for key, value in each.get("update", {}).items()}


def md5(path):
    return base64.b64encode(hashlib.md5(path.read_bytes()).digest()).decode()


def in_tensorboard(out_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return events, {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_each_tracker_has_every_column_once(run, server, request, capsys):  # noqa: F811
    flags = dict(
        max_steps=7, eval_interval=3, log_adapter=True, lora_r=3, logger=["csv", "tensorboard", "mlflow", "wandb"]
    )
    out = run(random_samples(12, sources=3), random_samples(6, sources=3), **flags)
    expected = in_csv(out)
    assert {"loss", "val_loss", "seconds", "memory_gb", "epoch"} < expected.keys()

    events, scalars = in_tensorboard(out)
    assert {name: [(s, pytest.approx(v, rel=1e-6)) for s, v in values] for name, values in expected.items()} == scalars
    assert {"settings", "run", "environment", "config.yaml", "data/data.json"} <= {*events.Tags()["tensors"]}

    one = mlflow_run(server, request)
    assert in_mlflow(server, one, expected) == expected
    assert one.info.status == "FINISHED" and one.info.run_name == "run"
    assert one.data.params["lora_r"] == "3" and one.data.params["learning_rate"] == "0.01"
    record = json.loads((out / "record.json").read_text())
    assert {f"sha256.{_name(name)}": value for name, value in record["hashes"].items()}.items() <= one.data.tags.items()
    assert "code" in record["hashes"] and any(name.startswith("data") for name in record["hashes"])
    assert any(name.startswith("base model") for name in record["hashes"])
    assert record["environment"]["packages"]["torch"] == one.data.tags["environment.torch"]
    final = {f"final/{path.name}" for path in (out / "final").iterdir()}
    assert mlflow_files(server, one) >= {"config.yaml", "record.json", "summary.json", "data/data.json"} | final

    assert in_wandb(out) == expected
    config = next(wandb_records(out, "run"))["config"]["update"]
    assert config["lora_r"] == 3 and config["hashes"] == record["hashes"]
    assert wandb_summary(out)["loss"] == expected["loss"][-1][1]
    (artifact,) = wandb_records(out, "artifact")
    digests = {each["path"]: each["digest"] for each in artifact["manifest"]["contents"]}
    assert digests == {path.name: md5(path) for path in (out / "final").iterdir()} and artifact["type"] == "model"
    printed = capsys.readouterr().out
    assert f"mlflow: {server.uri}/#/experiments/" in printed and "wandb: offline" in printed


@pytest.mark.parametrize(
    ("uri", "kept"),
    [
        ("https://me:secret@host:5000/a@b", "https://host:5000/a@b"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("postgresql://me:se@cret@host/db", "postgresql://host/db"),
        ("sqlite:////folder/mlflow.db", "sqlite:////folder/mlflow.db"),
        ("sqlite:///mlflow.db", "sqlite:///mlflow.db"),
        ("/folder/mlruns", "/folder/mlruns"),
    ],
)
def test_a_password_is_not_kept(uri, kept):
    assert _without_password(uri) == kept


def test_a_run_in_a_database_of_its_own_is_found_again(run, settings, monkeypatch, tmp_path, capsys):  # noqa: F811
    """Without a server MLflow keeps a database in the current folder; from another folder the run is still that one."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    s = settings(random_samples(12), max_steps=4, logger="mlflow")
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        finetune.main(s)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    record_result(s.out_dir / "final", "exact_match", "test", {"exact_match": 0.5}, {})
    assert "not all" not in capsys.readouterr().err
    state = json.loads(state_path(s.out_dir, "mlflow").read_text())
    assert state["error"] is None and state["own"]["uri"] == f"sqlite:///{tmp_path}/mlflow.db"

    import mlflow

    one = mlflow.MlflowClient(state["own"]["uri"]).get_run(state["own"]["run"])
    assert one.info.status == "FINISHED" and one.data.metrics["exact_match/test"] == 0.5 and "loss" in one.data.metrics


def test_without_a_tracker_no_process_is_started(run, monkeypatch):  # noqa: F811
    monkeypatch.setattr(following, "_start", None)
    out = run(random_samples(4), max_steps=1)
    assert not (out / "tracking").exists() and (out / "record.json").is_file()


def test_of_several_devices_the_first_is_followed(monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr(following, "_start", lambda *args: started.append(args) or 1 / 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with following.following([tmp_path], ["tensorboard"], False):
        pass
    assert not started
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ZeroDivisionError), following.following([tmp_path], ["tensorboard"], False):
        pass
    assert len(started) == 1


def test_two_devices_are_one_tracked_run(settings, run_script, server, request, tmp_path):  # noqa: F811
    """And its adapter is published once."""
    place = tmp_path / "shop" / "adapter"
    s = settings(
        random_samples(8), random_samples(3), devices=2, max_steps=3, eval_interval=3, logger=["mlflow", "tensorboard"],
        publish=str(place),
    )  # fmt: skip
    out = run_on_cpus(run_script, s)
    expected, one = in_csv(s.out_dir), mlflow_run(server, request)
    assert in_mlflow(server, one, expected) == expected and one.info.status == "FINISHED"
    assert {name: len(values) for name, values in in_tensorboard(s.out_dir)[1].items()} == {
        name: len(values) for name, values in expected.items()
    }
    assert len([*place.glob("versions/*")]) == out.count("published ") == out.count("mlflow: http") == 1


def test_a_server_that_is_restarted_in_the_middle(run, server, request, monkeypatch):  # noqa: F811
    def has_rows():
        runs = client(server).search_experiments(filter_string=f"name = '{request.node.name[:60]}'")
        return runs and any(r.data.metrics for r in client(server).search_runs([runs[0].experiment_id]))

    before_step(monkeypatch, 2, lambda: wait_for(has_rows))
    before_step(monkeypatch, 4, server.stop)
    before_step(monkeypatch, 6, server.start)
    out = run(random_samples(30), random_samples(3), max_steps=9, eval_interval=4, logger="mlflow")
    one = mlflow_run(server, request)
    assert in_mlflow(server, one, in_csv(out)) == in_csv(out)
    assert one.info.status == "FINISHED"


def test_a_server_that_is_down_until_later(run, server, request, monkeypatch, capsys, run_script):  # noqa: F811
    monkeypatch.setattr(following, "WAIT", 30.0)
    server.stop()
    out = run(random_samples(12), max_steps=5, logger=["mlflow", "tensorboard"])
    err = capsys.readouterr().err
    assert "mlflow: not all of" in err and f"upload.py --run_dirs {out}" in err and "Traceback" not in err
    assert len(in_csv(out)["loss"]) == 5 and (out / "final").is_dir()
    assert in_tensorboard(out)[1].keys() == in_csv(out).keys()
    code, _, err = run_script("tracking/upload.py", "--run_dirs", out)
    assert code == 2 and err.count("\n") == 1 and "could not be sent to mlflow" in err, err
    server.start()
    for _ in range(2):  # the second time there is nothing left to do
        code, printed, err = run_script("tracking/upload.py", "--run_dirs", out)
        assert code == 0, err
        one = mlflow_run(server, request)
        assert in_mlflow(server, one, in_csv(out)) == in_csv(out)
    assert "5 steps are at mlflow" in printed and one.info.status == "FINISHED"


def test_a_server_that_never_answers_does_not_hold_up_the_run(run, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(following, "WAIT", 3.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    with silent_server() as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        out = run(random_samples(8), max_steps=3, logger="mlflow")
        assert len(in_csv(out)["loss"]) == 3 and "mlflow: still sending" in capsys.readouterr().err
        wait_for(lambda: json.loads(state_path(out, "mlflow").read_text())["error"])


def test_wandb_without_its_server(run, settings, monkeypatch, capsys):  # noqa: F811
    """Nobody is logged in: the run does not begin. The server is down: it is as if there was no tracker."""
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("HOME", "/nonexistent")  # where netrc is
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    s = settings(random_samples(8), max_steps=3, logger="wandb", name="nobody")
    with pytest.raises(UserError, match="wandb login"):
        finetune.main(s)
    assert not s.out_dir.exists()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    out = run(random_samples(8), max_steps=3, logger="wandb")
    assert "wandb: not all of" in capsys.readouterr().err and len(in_csv(out)["loss"]) == 3
    monkeypatch.setenv("WANDB_MODE", "offline")
    sending.Sender(out, "wandb", False).send("finished")
    assert in_wandb(out) == in_csv(out)


def test_wandb_that_is_switched_off(run, monkeypatch, capsys):  # noqa: F811
    """Nothing is sent, and nothing counts as sent."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    out = run(random_samples(8), max_steps=2, logger="wandb")
    assert "W&B is switched off: WANDB_MODE=disabled" in capsys.readouterr().err
    monkeypatch.setenv("WANDB_MODE", "offline")
    sending.Sender(out, "wandb", False).send("finished")
    assert in_wandb(out) == in_csv(out)


def test_a_stopped_and_a_resumed_run_are_one(run, settings, server, request, monkeypatch):  # noqa: F811
    train, val = random_samples(20), random_samples(3)
    flags = dict(max_steps=8, eval_interval=2, save_interval=3, logger=["mlflow", "wandb", "tensorboard"])
    s = settings(train, val, **flags)
    with monkeypatch.context() as patch:
        before_step(patch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            finetune.main(s)
    wait_for(lambda: not_sending(s.out_dir))
    assert mlflow_run(server, request).info.status == "KILLED"
    out = run(resume=True, **flags)
    expected, one = in_csv(out), mlflow_run(server, request)
    assert in_mlflow(server, one, ["loss", "val_loss"]) == {name: expected[name] for name in ("loss", "val_loss")}
    assert one.info.status == "FINISHED"
    assert in_wandb(out) == expected
    assert {name: len(values) for name, values in in_tensorboard(out)[1].items()} == {
        name: len(values) for name, values in expected.items()
    }
    assert [each["after_step"] for each in json.loads((out / "record.json").read_text())["sessions"]] == [0, 5]


def not_sending(out_dir):
    """Whether no process sends the run any more: their locks are free."""
    import fcntl

    for path in out_dir.glob("tracking/*.lock"):
        with open(path) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
    return True


def test_a_killed_run_is_sent_to_its_end_and_goes_on_as_one(settings, server, request):  # noqa: F811
    flags = dict(max_steps=40, save_interval=10, logger=["mlflow", "wandb"])
    s = settings(random_samples(200), **flags)
    config = s.out_dir.with_name("config.yaml")
    config.write_text(yaml.safe_dump(finetune.run_folder.plain(s)))
    command = [sys.executable, str(ROOT / "finetune.py"), "--config", str(config)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: len(read_rows(s.out_dir / "metrics.csv")[1]) >= 12, 120)
    process.kill()
    process.wait()
    rows = read_rows(s.out_dir / "metrics.csv")[1]
    wait_for(lambda: sent(s.out_dir, "mlflow") >= len(rows) and sent(s.out_dir, "wandb") >= len(rows))
    wait_for(lambda: not_sending(s.out_dir))
    assert mlflow_run(server, request).info.status == ("FAILED" if len(rows) < 40 else "FINISHED")
    subprocess.run([*command, "--resume"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    expected, one = in_csv(s.out_dir), mlflow_run(server, request)
    assert len(expected["loss"]) == 40 and one.info.status == "FINISHED"
    assert in_mlflow(server, one, ["loss"])["loss"] == expected["loss"]
    assert in_wandb(s.out_dir)["loss"] == expected["loss"]


def sent(out_dir, name):
    path = state_path(out_dir, name)
    return json.loads(path.read_text())["rows"] if path.is_file() else 0


def test_a_tracker_that_has_lost_the_run_gets_all_of_it(run, server, request, monkeypatch):  # noqa: F811
    """And so does another one, and an experiment of another name."""
    out = run(random_samples(12), max_steps=3, logger=["mlflow", "tensorboard", "wandb"], log_adapter=True)
    record_result(out / "final", "exact_match", "test", {"exact_match": 0.5}, {})
    first = mlflow_files(server, mlflow_run(server, request))
    client(server).delete_run(mlflow_run(server, request).info.run_id)
    for folder in (out / "tensorboard", out / "tracking" / "wandb"):
        shutil.rmtree(folder)
    for name in ("mlflow", "tensorboard", "wandb"):
        sending.Sender(out, name, False).send("finished")
    one = mlflow_run(server, request)
    assert in_mlflow(server, one, in_csv(out)) == in_csv(out) == in_wandb(out)
    assert mlflow_files(server, one) == first and one.data.metrics["exact_match/test"] == 0.5
    events, scalars = in_tensorboard(out)
    assert scalars["exact_match/test"] == [(3, 0.5)] and "config.yaml" in events.Tags()["tensors"]
    assert wandb_summary(out)["exact_match/test"] == 0.5


def test_data_that_were_made_again_are_not_shown(run, settings, server, request):  # noqa: F811
    s = settings(random_samples(12), max_steps=1, logger="mlflow")
    finetune.main(s)
    shutil.rmtree(s.data_dir)
    write_data(s.data_dir, s.checkpoint_dir, random_samples(5))
    state_path(s.out_dir, "mlflow").unlink()
    client(server).delete_run(mlflow_run(server, request).info.run_id)
    sending.Sender(s.out_dir, "mlflow", False).send("finished")
    names = mlflow_files(server, mlflow_run(server, request))
    assert "config.yaml" in names and not [name for name in names if name.startswith("data/")]


def test_the_copy_of_a_run_is_another_one(run, settings, server, request, monkeypatch, tmp_path, capsys):  # noqa: F811
    """If it is resumed while the original is there. A run that was moved stays the same."""
    flags = dict(max_steps=6, save_interval=2, logger="mlflow")
    s = settings(random_samples(20), **flags)
    with monkeypatch.context() as patch:
        before_step(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            finetune.main(s)
    wait_for(lambda: not_sending(s.out_dir))
    shutil.copytree(s.out_dir, tmp_path / "copy")
    run(name="copy", resume=True, **flags)
    assert f"{tmp_path / 'copy'} is a copy of {s.out_dir}" in capsys.readouterr().out
    s.out_dir.rename(tmp_path / "moved")
    run(name="moved", resume=True, **flags)
    assert "is a copy" not in capsys.readouterr().out
    runs = client(server).search_runs([mlflow_experiment(server, request)])
    assert {one.info.run_name: one.info.status for one in runs} == {"run": "FINISHED", "copy": "FINISHED"}
    for one, folder in ((runs[0], "copy"), (runs[1], "moved")):  # the newest comes first
        assert in_mlflow(server, one, ["loss"])["loss"] == in_csv(tmp_path / folder)["loss"]


def test_a_run_that_is_being_trained_sends_itself(run, run_script, monkeypatch, tmp_path, capsys):  # noqa: F811
    """Not upload.py, which would end it there; what is found of its checkpoints is sent by the run."""
    found, out = [], tmp_path / "run"

    def look():
        record_result(out / "step-000001", "exact_match", "test", {"exact_match": 0.5}, {})
        found.append(run_script("tracking/upload.py", "--run_dirs", out))

    before_step(monkeypatch, 2, look)
    run(random_samples(8), max_steps=3, save_interval=1, logger="tensorboard")
    ((code, _, err),) = found
    assert (
        code == 2
        and err == f"error: --run_dirs {out}: it is being trained: its own --logger sends it, or this at its end\n"
    )
    assert in_tensorboard(out)[1]["step-000001/exact_match/test"] == [(1, 0.5)]
    assert "not all" not in capsys.readouterr().err


def test_an_answer_that_was_lost_doubles_nothing(run, server, request):  # noqa: F811
    """The server has rows that the state in the folder does not know of: as when it is killed before it answers."""
    out = run(random_samples(12), max_steps=6, logger=["mlflow", "tensorboard"])
    for name in ("mlflow", "tensorboard"):
        state = json.loads(state_path(out, name).read_text())
        state_path(out, name).write_text(json.dumps(state | {"rows": 2}))
        sending.Sender(out, name, False).send("finished")
    one = mlflow_run(server, request)
    assert in_mlflow(server, one, in_csv(out)) == in_csv(out)
    assert [step for step, _ in in_tensorboard(out)[1]["loss"]] == [1, 2, 3, 4, 5, 6]


def test_results_go_onto_the_same_run(run, server, request, tmp_path, capsys):  # noqa: F811
    from eval import exact_match

    out = run(random_samples(8), max_steps=4, save_interval=2, logger=["mlflow", "tensorboard", "wandb"])
    ended = mlflow_run(server, request).info.end_time
    data = tmp_path / "test.jsonl"
    data.write_text("".join(json.dumps({"question": f"Is it {i}?", "answer": f"{i}"}) + "\n" for i in range(3)))
    exact_match.main(exact_match.Settings(data=data, adapter_dir=out / "final", max_new_tokens=3, limit=2))
    record_result(out / "step-000002", "helm", "", {"gsm:model=neurips,local/quasi_exact_match": 0.25}, {})
    assert "kept in" in capsys.readouterr().out
    one = mlflow_run(server, request)
    assert (one.info.status, one.info.end_time) == ("FINISHED", ended)
    name = "step-000002/gsm:model=neurips,local/quasi_exact_match"
    found = in_mlflow(server, one, ["exact_match/test first 2", name])
    assert [*found.values()] == [[(4, 0.0)], [(2, 0.25)]]
    assert in_tensorboard(out)[1][name] == [(2, 0.25)]
    assert wandb_summary(out)[name] == 0.25
    record_result(tmp_path, "exact_match", "test", {"exact_match": 1.0}, {})  # of no run: kept nowhere
    assert not (tmp_path.parent / "results").exists()


def test_each_variant_of_a_sweep_is_a_run(settings, tmp_path):  # noqa: F811
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("grid: {learning_rate: [0.001, 0.01]}\n")
    s = settings(random_samples(8), random_samples(3), sweep=sweep, max_steps=3, eval_interval=1, logger="tensorboard")
    finetune.main(s)
    folders = sorted(path.parent for path in s.out_dir.glob("*/metrics.csv"))
    assert len(folders) == 2
    for out in folders:
        assert in_tensorboard(out)[1].keys() == in_csv(out).keys()


def test_names_that_mlflow_does_not_take_stay_different():
    names = ["loss/a+b", "loss/a*b", "loss/ä", "x" * 300, "x" * 299 + "y", "plain/name"]
    taken = [_name(name) for name in names]
    assert len({*taken}) == len(names) and all(len(name) <= 250 for name in taken) and taken[-1] == "plain/name"


def test_a_run_without_a_tracker_can_be_sent_later(run, run_script, monkeypatch):  # noqa: F811
    out = run(random_samples(8), max_steps=3)
    code, _, err = run_script("tracking/upload.py", "--run_dirs", out)
    assert code == 2 and "--trackers [mlflow]" in err
    code, printed, err = run_script("tracking/upload.py", "--run_dirs", f"[{out}]", "--trackers", "[tensorboard]")
    assert code == 0 and "3 steps are at tensorboard" in printed, err
    assert in_tensorboard(out)[1].keys() == in_csv(out).keys()
