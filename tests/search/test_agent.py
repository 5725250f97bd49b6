"""W&B's sweep agent starts finetune.py: the command lines that wandb itself makes are read as they were meant."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT
from http_stub import JsonHandler, serving

from shell import cli
from training.settings import Settings

sweeps = pytest.importorskip("wandb.sdk.launch.sweeps.utils")

VALUES = {
    "learning_rate": 1e-05, "lora_r": 8, "lora_alpha": 16.0, "compile": True, "lora_rslora": False, "max_steps": None,
    "optimizer": "lion", "lora_targets": ["q_proj", "v_proj"], "lora_layers": [0, 2], "time_budget": None,
    "lora_rank_pattern": {"down_proj": 8, r"layers\.\d+\.q_proj": 4}, "forgetting_source": None, "teacher_dir": None,
    "lora_tokens": ["<|it's|>", 7],
}  # fmt: skip


def arguments(macro, values):
    """The arguments that wandb puts in the place of a macro."""
    return sweeps.create_sweep_command_args({"args": {name: {"value": value} for name, value in values.items()}})[macro]


def read(args):
    return cli.parse(Settings, ["--checkpoint_dir=a", "--data_dir=b", *args])


def plain(settings, names):
    return {name: getattr(settings, name) for name in names}


@pytest.mark.parametrize("macro", ["args", "args_no_equals", "args_no_boolean_flags"])
def test_arguments(macro):
    assert plain(read(arguments(macro, VALUES)), VALUES) == VALUES


def test_a_list_of_expressions():
    """Python doubles their backslashes, YAML takes them as they stand."""
    values = {"method": "full", "train": [r"layers\.\d+\.mlp\..*", 'a"b']}
    assert plain(read(arguments("args", values)), values) == values
    assert arguments("args", values)[1] == "--train=['layers\\\\.\\\\d+\\\\.mlp\\\\..*', 'a\"b']"


def test_json(tmp_path):
    (text,) = arguments("args_json", VALUES)
    assert plain(read(["--config", text]), VALUES) == VALUES
    (tmp_path / "config.json").write_text(text)
    assert plain(read(["--config", str(tmp_path / "config.json")]), VALUES) == VALUES


@pytest.mark.parametrize("macro", ["args_no_hyphens", "args_append_hydra"])
def test_what_is_for_hydra_is_refused(macro, capsys):
    with pytest.raises(SystemExit):
        read(arguments(macro, {"lora_r": 8}))
    assert "lora_r" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "text", "value"),
    [
        ("lora_targets", "[q_proj,v_proj]", ["q_proj", "v_proj"]),
        ("lora_targets", "['q''s']", ["q's"]),  # YAML, not Python, which would not print it so
        ("lora_targets", "all-linear", "all-linear"),
        ("lora_targets", "null", None),
        ("lora_rank_pattern", "{down_proj: 8}", {"down_proj": 8}),
        ("lora_tokens", '["\\u00e9",7]', ["é", 7]),
        ("max_steps", "7", 7),
    ],
)
def test_yaml_is_read_as_ever(flag, text, value):
    for args in ([f"--{flag}={text}"], [f"--{flag}", text]):
        assert getattr(read(args), flag) == value


def test_a_text_that_looks_like_python_stays_a_text():
    """Where a flag takes neither a list nor null."""

    @dataclasses.dataclass
    class Texts:
        """The command line.

        Args:
            prompt: A text.
            other: Another.
        """

        prompt: str = ""
        other: str | None = None

    assert cli.parse(Texts, ["--prompt=None", "--other=['a', 'b']"]) == Texts("None", "['a', 'b']")
    assert cli.parse(Texts, ["--other", "None"]) == Texts(other=None)


# ------------------------------------------------------------------------------------------------------- the real agent


class Server(JsonHandler):
    """As much of W&B's GraphQL as an agent needs: it hands out `runs`, one at a time, and then ends the agent."""

    runs, sweep = [], {}

    def do_POST(self):
        try:
            query = json.loads(self.body())
        except ValueError:  # what it counts for its makers
            return self.answer({})
        return self.answer({"data": self.data(query["query"], query.get("variables") or {})})

    def data(self, query, variables):
        if "agentHeartbeat" in query:
            busy = json.loads(variables["runState"])
            command = [] if busy else [self.runs.pop(0) if self.runs else {"type": "exit"}]
            return {"agentHeartbeat": {"agent": {"id": "agent"}, "commands": json.dumps(command)}}
        if "createAgent" in query:
            return {"createAgent": {"agent": {"id": "agent"}}}
        if "sweep(" in query:
            sweep = {"id": "s", "name": "s", "state": "RUNNING", "method": "random", "runs": {"edges": []}}
            return {"project": {"sweep": sweep | {"config": yaml.safe_dump(self.sweep)}}}
        return {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}


@pytest.fixture
def agent(tmp_path):
    """`agent(sweep, runs)`: let wandb's agent do these runs (id, values) of a sweep; what it printed."""

    def run(sweep, runs):
        Server.sweep = sweep
        Server.runs = [
            {"type": "run", "run_id": name, "program": str(ROOT / "finetune.py"),
             "args": {flag: {"value": value} for flag, value in values.items()}}
            for name, values in runs
        ]  # fmt: skip
        environment = {
            **os.environ, "WANDB_BASE_URL": server.url, "WANDB_API_KEY": "a" * 40,
            "WANDB_ERROR_REPORTING": "false", "HOME": str(tmp_path), "WANDB_DIR": str(tmp_path),
            "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
        }  # fmt: skip
        command = [sys.executable, "-m", "wandb", "agent", "-e", "me", "-p", "project", "sweep"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        return done.stdout + done.stderr

    with serving(Server) as server:
        yield run


def test_the_agent_trains_each_run_in_a_folder_of_its_own(agent, tiny_model_dir, prepared, tmp_path):
    page = (ROOT / "docs" / "sweeps.md").read_text()
    (sweep,) = [yaml.safe_load(block.removeprefix("yaml")) for block in page.split("```") if "program:" in block]
    fixed = {"checkpoint_dir": str(tiny_model_dir), "data_dir": str(prepared), "max_steps": 2, "precision": "32-true"}
    values = {"one": {"lora_targets": ["q_proj", "v_proj"], "time_budget": None}, "two": {"lora_targets": "all-linear"}}
    out = agent(sweep, [(name, fixed | own) for name, own in values.items()])
    for name, own in values.items():
        assert (tmp_path / "out" / name / "final").is_dir(), out
        config = yaml.safe_load((tmp_path / "out" / name / "config.yaml").read_text())
        assert {flag: config[flag] for flag in own} == own
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"one", "two"}


def test_the_macro_for_environment_variables_does_not_know_the_run(agent, tmp_path):
    """The reason why docs/sweeps.md has a shell in the command. If this fails, wandb has mended it."""
    (tmp_path / "show.py").write_text("import sys\nprint('GIVEN', *sys.argv[1:], flush=True)\n")
    command = ["${interpreter}", "show.py", "--out_dir=out/${envvar:WANDB_RUN_ID}"]
    out = agent({"command": command}, [("one", {"lora_r": 8}), ("two", {"lora_r": 8})])
    given = [line for line in out.splitlines() if line.startswith("GIVEN")]
    assert given == ["GIVEN --out_dir=out/WANDB_RUN_ID"] * 2, out
