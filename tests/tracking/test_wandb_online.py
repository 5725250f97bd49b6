"""W&B online, by its own library against a stub of its server: all arrives, once, whatever happens between."""

import json
import os
import signal
from pathlib import Path

import pytest
import yaml
from conftest import wait_for
from PIL import Image
from test_finetune import random_samples, run, settings  # noqa: F401 (fixtures)
from test_run_folder import before_step
from test_trackers import in_csv, not_sending
from wandb_server import KEY, WandBServer

import finetune
from tracking import following
from tracking.results import record_result
from tracking.sending import state_path
from training import metrics

KINDS = ("FILE_STREAM", "FILE_TRANSFER", "GRAPHQL")
# Seconds from one attempt to the next: two to sixty, if nothing is said.
WAITS = {f"{kind}_RETRY_WAIT_{end}_SECONDS": seconds for kind in KINDS for end, seconds in (("MIN", 0.1), ("MAX", 0.5))}


@pytest.fixture(autouse=True)
def server(monkeypatch, tmp_path):
    """The server of W&B, as its library believes. Whatever it was asked and does not know fails the test."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    one = WandBServer()
    values = {"MODE": "online", "BASE_URL": one.uri, "API_KEY": KEY, "ERROR_REPORTING": "false"}
    values["_DISABLE_STATS"] = "true"  # numbers of the machine would be sent beside the rows
    values |= {f"{kind}_DIR": str(tmp_path / "wandb" / kind) for kind in ("CACHE", "CONFIG", "DATA")}
    values |= {f"_{name}": str(value) for name, value in WAITS.items()}
    for name, value in values.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    one.start()
    yield one
    one.stop()
    assert one.faults == []


@pytest.fixture
def followers(monkeypatch):
    """The processes that send, in the order in which they were started."""
    found, start = [], following._start
    monkeypatch.setattr(following, "_start", lambda *args: found.append(start(*args)) or found[-1])
    return found


def in_history(one):
    """(step, value) of each column, as in_csv has them."""
    found = {}
    for row in one.history:
        for name, value in row.items():
            if not name.startswith("_"):
                found.setdefault(name, []).append((row["_step"], value))
    return found


def the_run(server, out_dir):
    """The one run that the server has, which is that of the folder."""
    ((id, one),) = server.runs.items()
    assert id == json.loads((out_dir / "record.json").read_text())["id"] and one.name == out_dir.name
    return one


def state_of(out_dir):
    return json.loads(state_path(out_dir, "wandb").read_text())


def stop_at(monkeypatch, s, step):
    """Train until a signal stops the run in the step `step` (from 0)."""
    with monkeypatch.context() as patch:
        before_step(patch, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            finetune.main(s)
    wait_for(lambda: not_sending(s.out_dir))


def kill(follower):
    """As LONGEST_SENDING does, with the library's own process."""
    follower.send_signal(signal.SIGALRM)
    follower.wait()


def upload(run_script, out):
    """What upload.py prints when it sends what is missing."""
    code, printed, err = run_script("tracking/upload.py", "--run_dirs", out)
    assert code == 0, err
    return printed


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def draw(_, path):
    """A small picture instead of the losses."""
    Image.new("RGB", (3, 2)).save(path)


def test_all_arrives(run, settings, server, monkeypatch, tmp_path, capsys):  # noqa: F811
    monkeypatch.setattr(metrics, "plot_losses", draw)
    settings(random_samples(12, sources=3), random_samples(6, sources=3))
    data = (tmp_path / "data").rename(tmp_path / "my data")
    flags = dict(data_dir=data, max_steps=7, eval_interval=3, log_adapter=True, lora_r=3, logger="wandb")
    out = run(name="run [1]", **flags)
    one = the_run(server, out)
    assert {"loss", "val_loss", "seconds", "memory_gb", "epoch"} < in_csv(out).keys()
    assert in_history(one) == in_csv(out) and one.ends == [0]
    record = json.loads((out / "record.json").read_text())
    config = {name: each["value"] for name, each in one.config.items()}
    assert config.items() >= yaml.safe_load((out / "config.yaml").read_text()).items()
    assert config["hashes"] == record["hashes"] and config["lora_r"] == 3
    sent = {name: out / name for name in ("config.yaml", "record.json", "summary.json", "loss.png")}
    for name, path in {**sent, "data/data.json": data / "data.json"}.items():
        assert one.files[f"onetune/{name}"] == path.read_bytes()
    picture = one.summary["loss.png"]
    assert one.files[picture["path"]] == (out / "loss.png").read_bytes() and picture["_type"] == "image-file"
    (artifact,) = server.artifacts.values()
    assert artifact.committed and artifact.files == bytes_of(out / "final")
    assert artifact.asked["artifactTypeName"] == "model"
    assert f"wandb: {server.uri}/me/onetune/runs/{record['id']}\n" in capsys.readouterr().out


def test_its_library_leaves_our_files_alone(run, settings, server, tmp_path):  # noqa: F811
    """It writes a config.yaml of its own among the files that it sends, and keeps copies of what is in an artifact."""
    flags = dict(max_steps=3, log_adapter=True, logger="wandb")
    out = run(random_samples(8), **flags)
    assert yaml.safe_load((out / "config.yaml").read_text()) == finetune.run_folder.plain(settings(**flags))
    assert the_run(server, out).files["config.yaml"].startswith(b"_wandb:") and len(server.artifacts) == 1
    copies = [path for kind in ("CACHE", "DATA") for path in (tmp_path / "wandb" / kind / "artifacts").rglob("*")]
    assert not [path for path in copies if path.is_file()]


def test_a_stopped_and_a_resumed_run_are_one(run, settings, server, monkeypatch):  # noqa: F811
    flags = dict(max_steps=8, eval_interval=2, save_interval=3, logger="wandb")
    s = settings(random_samples(20), random_samples(3), **flags)
    stop_at(monkeypatch, s, 4)
    assert in_history(the_run(server, s.out_dir)) == in_csv(s.out_dir)
    out = run(resume=True, **flags)
    one = the_run(server, out)
    assert in_history(one) == in_csv(out) and len(one.history) == 8
    assert one.ends == [1, 0] and one.summary["loss"] == in_csv(out)["loss"][-1][1]
    assert one.files["onetune/record.json"] == (out / "record.json").read_bytes()


def test_an_answer_that_was_lost_doubles_nothing(run, server, run_script):  # noqa: F811
    """The server has rows that the state does not know of."""
    out = run(random_samples(12), max_steps=6, logger="wandb")
    state_path(out, "wandb").write_text(json.dumps(state_of(out) | {"rows": 2}))
    assert "6 steps are at wandb" in upload(run_script, out)
    one = the_run(server, out)
    assert in_history(one) == in_csv(out) and one.ends == [0, 0]


def test_what_was_lost_with_its_process_is_sent_again(run, settings, server, monkeypatch, followers, run_script):  # noqa: F811
    """The state says that the library has it, and the library's process was killed while the server was away."""
    flags = dict(max_steps=9, eval_interval=2, save_interval=3, logger="wandb", log_adapter=True)
    s = settings(random_samples(30), random_samples(3), **flags)
    stop_at(monkeypatch, s, 3)
    monkeypatch.setattr(following, "WAIT", 1.0)
    before_step(monkeypatch, 5, lambda: wait_for(lambda: the_run(server, s.out_dir).begun == 2) and server.stop())
    out = run(resume=True, **flags)
    wait_for(lambda: state_of(out)["rows"] == 9 and "summary.json" in state_of(out)["files"])
    kill(followers[-1])
    one = the_run(server, out)
    assert len(one.history) < 9 and "onetune/summary.json" not in one.files
    server.start()
    assert "9 steps are at wandb" in upload(run_script, out)
    assert in_history(one) == in_csv(out) and one.ends == [1, 0]
    assert one.files["onetune/summary.json"] == (out / "summary.json").read_bytes()
    (artifact,) = server.artifacts.values()
    assert artifact.committed and artifact.files == bytes_of(out / "final")


def test_a_server_that_is_away_for_a_while(run, server, monkeypatch, followers, capsys, run_script):  # noqa: F811
    """It goes in the middle of the run and comes back after its end, when sending has failed."""
    monkeypatch.setattr(following, "WAIT", 1.0)
    before_step(monkeypatch, 4, lambda: wait_for(lambda: server.runs) and server.stop())
    out = run(random_samples(30), random_samples(3), max_steps=9, eval_interval=4, logger="wandb")
    assert "wandb: still sending" in capsys.readouterr().err
    (log,) = out.glob("tracking/wandb/run-*/logs/debug-internal.log")
    wait_for(lambda: "connection refused" in log.read_text())
    one = the_run(server, out)
    assert len(one.history) < 9 and not one.ends
    server.start()
    assert followers[0].wait(60) == 0
    assert in_history(one) == in_csv(out) and one.ends == [0]
    assert "9 steps are at wandb" in upload(run_script, out) and in_history(one) == in_csv(out)


def test_its_library_is_killed(run, server, monkeypatch, tmp_path, followers, capsys, run_script):  # noqa: F811
    """As when memory is short. The run goes on, says what is missing, and upload.py sends that."""

    def kill_library():
        wait_for(lambda: state_path(tmp_path / "run", "wandb").is_file() and state_of(tmp_path / "run")["rows"] > 1)
        (library,) = Path(f"/proc/{followers[0].pid}/task/{followers[0].pid}/children").read_text().split()
        os.kill(int(library), signal.SIGKILL)

    before_step(monkeypatch, 4, kill_library)
    out = run(random_samples(30), max_steps=9, logger="wandb")
    assert "wandb: not all of" in capsys.readouterr().err and not the_run(server, out).ends
    upload(run_script, out)
    one = the_run(server, out)
    assert in_history(one) == in_csv(out) and one.ends == [0]
    assert one.files["onetune/config.yaml"] == (out / "config.yaml").read_bytes()


REFUSED = ("file_stream", 400), ("run", 400), ("CreateRunFiles", 400), ("CreateArtifact", 400), ("file_stream", 503)


@pytest.mark.parametrize("what, status", REFUSED)
def test_what_its_library_gives_up_is_sent_again(run, server, what, status, capsys):  # noqa: F811
    """Of a 400 it tells nobody, and a second session sends all. After a 503 it tries again itself."""
    server.failing = {what: status}
    out = run(random_samples(8), max_steps=3, logger="wandb", log_adapter=True)
    one = the_run(server, out)
    assert in_history(one) == in_csv(out) and one.ends[-1] == 0 and not server.failing
    assert one.begun == (2 if status == 400 else 1)
    for name in ("config.yaml", "record.json", "summary.json"):
        assert one.files[f"onetune/{name}"] == (out / name).read_bytes()
    assert [each.files for each in server.artifacts.values() if each.committed] == [bytes_of(out / "final")]
    assert "not all of" not in capsys.readouterr().err


def test_a_result_comes_onto_the_same_run(run, server, capsys):  # noqa: F811
    out = run(random_samples(8), max_steps=4, logger="wandb")
    one = the_run(server, out)
    lines, ended = list(one.history), one.summary
    record_result(out / "final", "exact_match", "test", {"exact_match": 0.25}, {})
    assert the_run(server, out).history == lines and one.ends == [0, 0]
    assert one.summary["exact_match/test"] == 0.25 and one.summary.items() >= {"loss": ended["loss"]}.items()
    (path,) = (out / "results").iterdir()
    assert one.files[f"onetune/results/{path.name}"] == path.read_bytes()
    assert capsys.readouterr().out.endswith(f"wandb: {server.uri}/me/onetune/runs/{state_of(out)['own']['id']}\n")
