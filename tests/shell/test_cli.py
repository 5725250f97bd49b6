"""The command line: what is accepted, and that every mistake is answered in one line that names it."""

import dataclasses
import re
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import yaml
from conftest import ROOT, SCRIPTS

import finetune
from shell import cli, explain
from shell.cli import UserError


@dataclass
class Settings:
    """The command line.

    Args:
        data_dir: Folder of the data, alpha help.
        learning_rate: The step, beta help.
        steps: How many, gamma help.
        precision: Dtype, delta help.
        quantize: Keep it in 4 bits, epsilon help.
        targets: Projections, zeta help.
        planner: Order, kappa help.
        plan: Of the quantisation, lambda help.
        resume: Continue, eta help.
        seed: A number or null, theta help.
        out_dir: Where it goes, iota help.
    """

    data_dir: Path
    learning_rate: float = 2e-4
    steps: int = 10
    precision: Literal["32-true", "bf16-true"] = "bf16-true"
    quantize: Literal["bnb.nf4", "bnb.int8"] | None = None
    targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    planner: Literal["packed", "random"] = "packed"
    plan: Literal["bnb.nf4", "none"] | cli.JsonFile | dict[str, str] | None = None
    resume: bool = False
    seed: int | None = None
    out_dir: Path = Path("out")

    def __post_init__(self):
        cli.check_numbers(self, "steps", above=0)


@pytest.fixture
def refused(capsys):
    """Parses arguments that are wrong; gives the one line of the answer."""

    def parse(*args):
        with pytest.raises(SystemExit) as exit:
            cli.parse(Settings, list(args))
        out, err = capsys.readouterr()
        assert exit.value.code == 2 and out == ""
        assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1
        assert len(err) < 300 and "Traceback" not in err
        return err

    return parse


def parse(*args):
    return cli.parse(Settings, list(args))


# ------------------------------------------------------------------------------------------------------ accepted


def test_defaults_and_types():
    settings = parse("--data_dir", "some/folder")
    assert settings == Settings(Path("some/folder"))
    assert isinstance(settings, Settings) and isinstance(settings.data_dir, Path) and isinstance(settings.out_dir, Path)


@pytest.mark.parametrize(
    "args, name, value",
    [
        (["--learning_rate", "1e-3"], "learning_rate", 1e-3),
        (["--learning_rate=3"], "learning_rate", 3.0),
        (["--steps", "7"], "steps", 7),
        (["--steps=7"], "steps", 7),
        (["--precision", "32-true"], "precision", "32-true"),
        (["--quantize", "bnb.nf4"], "quantize", "bnb.nf4"),
        (["--quantize", "null"], "quantize", None),
        (["--targets", "[k_proj,lm_head]"], "targets", ["k_proj", "lm_head"]),
        (["--targets", '["k_proj"]'], "targets", ["k_proj"]),
        (["--plan", "bnb.nf4"], "plan", "bnb.nf4"),
        (["--plan", "some/plan.json"], "plan", "some/plan.json"),
        (["--plan", "{a: b}"], "plan", {"a": "b"}),
        (["--plan", "null"], "plan", None),
        (["--plan=~/plan.json"], "plan", str(Path.home() / "plan.json")),
        (["--resume", "true"], "resume", True),
        (["--resume"], "resume", True),
        (["--resume", "--steps", "3"], "resume", True),
        (["--steps", "3", "--resume"], "resume", True),
        (["--resume=false"], "resume", False),
        (["--seed", "5"], "seed", 5),
        (["--out_dir", "a b/c"], "out_dir", Path("a b/c")),
        (["--out_dir=~/a"], "out_dir", Path.home() / "a"),
        (["--out_dir=file://localhost/a"], "out_dir", Path("file:///a")),
    ],
)
def test_flags(args, name, value):
    result = getattr(parse("--data_dir", "d", *args), name)
    assert result == value and type(result) is type(value)


def test_config_file_and_flags_over_it(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("learning_rate: 1.0e-3\nsteps: 7\ntargets: [k_proj]\nquantize: bnb.int8\ndata_dir: there\n")
    settings = parse("--config", str(path))
    assert settings == Settings(Path("there"), 1e-3, 7, quantize="bnb.int8", targets=["k_proj"])
    settings = parse("--config", str(path), "--steps", "9", "--quantize=null", "--data_dir", "here")
    assert settings == Settings(Path("here"), 1e-3, 9, targets=["k_proj"])


def test_the_home_folder_where_no_shell_has_seen_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "recipe.yaml").write_text("data_dir: ~/there\n")
    assert parse("--config=~/recipe.yaml").data_dir == tmp_path / "there"
    assert cli.checked_values(Settings, {"data_dir": "~/there"}, "x")["data_dir"] == tmp_path / "there"
    (tmp_path / "a").mkdir()
    assert cli.named_folders("a=~/a", "adapters") == {"a": tmp_path / "a"}


def test_print_config_can_be_given_back(capsys, tmp_path):
    with pytest.raises(SystemExit) as exit:
        parse("--data_dir", "d", "--steps", "3", "--targets", "[a,b]", "--print_config")
    assert exit.value.code in (0, None)
    out, err = capsys.readouterr()
    assert err == ""
    values = yaml.safe_load(out)
    assert values.keys() == {field.name for field in dataclasses.fields(Settings)}
    assert values["steps"] == 3 and values["quantize"] is None
    (tmp_path / "again.yaml").write_text(out)
    assert parse("--config", str(tmp_path / "again.yaml")) == Settings(Path("d"), steps=3, targets=["a", "b"])


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as exit:
        parse("--help")
    assert exit.value.code in (0, None)
    out, err = capsys.readouterr()
    assert err == ""
    for setting in dataclasses.fields(Settings):
        assert f"--{setting.name}" in out
    for word in ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda"):
        assert f"{word} help" in " ".join(out.split()), word
    assert "0.0002" in out and "--config" in out


def test_help_shows_what_each_flag_takes(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    out = capsys.readouterr().out
    for flag in (
        "--data_dir PATH", "--learning_rate FLOAT", "--steps INT", "--precision {32-true,bf16-true}",
        "--quantize {bnb.nf4,bnb.int8}", "--targets [TEXT,...]", "--planner {packed,random}",
        "--plan {bnb.nf4,none}|FILE.json", "--resume {true,false}", "--seed INT",
    ):  # fmt: skip
        assert re.search(rf"^  {re.escape(flag)}( |,|$)", out, re.MULTILINE), flag
    assert "type:" not in out and "Literal" not in out
    assert out.splitlines()[0].endswith(" --data_dir PATH [--FLAG VALUE ...]")


# ------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    "args, words",
    [
        (["--learnin_rate", "1"], ["--learnin_rate", "did you mean --learning_rate?"]),
        (["--dataset", "x"], ["--dataset"]),
        (["--zzz=1"], ["unknown flag --zzz", "--help"]),
        (["--resum"], ["--resum", "did you mean --resume?"]),
        (["--steps", "many"], ["--steps many", "a whole number"]),
        (["--steps", "1.5"], ["--steps 1.5", "a whole number"]),
        (["--steps", ""], ["--steps", "a whole number"]),
        (["--steps"], ["--steps"]),
        (["--learning_rate", "fast"], ["--learning_rate fast", "a number"]),
        (["--precision", "fp8"], ["--precision fp8", "32-true, bf16-true"]),
        (["--plan", "nf4"], ["--plan nf4", "one of bnb.nf4, none or a file NAME.json"]),
        (["--planner", "pakced"], ["--planner pakced", "packed, random"]),
        (["--lr", "1"], ["unknown flag --lr", "did you mean --learning_rate?"]),
        (["--confg", "x"], ["unknown flag --confg", "did you mean --config?"]),
        (["--quantize", "nf4"], ["--quantize nf4", "bnb.nf4, bnb.int8", "null"]),
        (["--resume", "perhaps"], ["--resume perhaps", "true or false"]),
        (["--seed", "x"], ["--seed x", "a whole number", "null"]),
        (["--targets", "q_proj"], ["--targets q_proj", "a list such as [a,b]"]),
        (["--out_dir", "file://shared/a"], ["--out_dir file://shared/a: expected file:///FOLDER"]),
        (["--steps", "0"], ["--steps 0: must be above 0"]),
        (["stray"], ["stray"]),
    ],
)
def test_a_mistake_is_named(refused, args, words):
    answer = refused("--data_dir", "d", *args)
    for word in words:
        assert word in answer, answer


def test_missing_required(refused):
    assert "--data_dir is required" in refused("--steps", "3")
    assert "--data_dir is required" in refused()
    assert "--config" in refused("--config")


def test_several_missing_flags(capsys):
    @dataclass
    class Three:
        """The command line.

        Args:
            one: First.
            two: Second.
            three: Third.
        """

        one: Path
        two: int
        three: str

    for args, answer in (
        ([], "--one, --two and --three are required"),
        (["--two", "2"], "--one and --three are required"),
        (["--two", "2", "--one", "x"], "--three is required"),
    ):
        with pytest.raises(SystemExit):
            cli.parse(Three, args)
        assert capsys.readouterr().err == f"error: {answer}\n"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("learning_rat", ["learning_rate"]),
        ("global_batch_sise", ["global_batch_size"]),
        ("batch_size", ["global_batch_size"]),
        ("batch-size", ["global_batch_size"]),
        ("lora_rank", ["lora_r", "lora_rank_pattern"]),
        ("alpha", ["lora_alpha", "lora_alpha_pattern", "neftune_alpha"]),
        ("dropout", ["lora_dropout"]),
        ("wd", ["weight_decay"]),
        ("num_train_epochs", ["train", "epochs"]),
        ("max_train_steps", ["max_steps"]),
        ("lr_scheduler", ["schedule"]),
        ("checkpoint", ["checkpoint_dir"]),
        ("steps", ["max_steps", "warmup_steps"]),
        ("zzz", []),
        ("", []),
        ("_", []),
    ],
)
def test_suggestions_for_the_flags_of_finetune(name, expected):
    flags = [field.name for field in dataclasses.fields(finetune.Settings)]
    assert explain.suggestions(name, flags) == expected


def test_lr_is_the_learning_rate_in_every_script_that_has_one():
    assert "learning_rate" in explain.suggestions("lr", [field.name for field in dataclasses.fields(finetune.Settings)])


@pytest.mark.parametrize("script", ["finetune.py", "generate.py", "eval/helm_server.py"])
def test_help_is_quick_and_imports_little(script):
    """2 s at most, 0.7 s on an idle machine: the processor time of the child is measured, not the wall clock's."""
    command = [sys.executable, "-X", "importtime", str(ROOT / script), "--help"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert not loaded & {"torch", "numpy", "fastapi", "pydantic", "transformers"}


@pytest.mark.parametrize(
    "text, words",
    [
        ("learning_rat: 1.0\n", ["learning_rat", "did you mean --learning_rate?"]),
        ("zzz: 1\n", ["zzz"]),
        ("steps: many\n", ["--steps many", "a whole number"]),
        ("precision: fp8\n", ["--precision fp8", "32-true"]),
        ("steps: 0\n", ["--steps 0"]),
        ("out_dir: 0010\n", ["--out_dir 8: expected a path"]),
        ("steps: [1\n", ["recipe.yaml"]),
        ("steps: 1\n\tprecision: 32-true\n", ["recipe.yaml"]),
        ("just a text", ["recipe.yaml"]),
        ("- 1\n- 2\n", ["recipe.yaml"]),
        ("", ["recipe.yaml"]),
        ("\0\1", ["recipe.yaml"]),
        (b"\xff\xfe\x81", ["recipe.yaml"]),
        (None, ["recipe.yaml"]),
    ],
)
def test_a_mistake_in_a_config_file_is_named(refused, tmp_path, text, words):
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    answer = refused("--config", str(path), "--data_dir", "d")
    for word in words:
        assert word in answer, answer


# --------------------------------------------------------------------------------------------------- while running


def test_run_answers_a_user_error_in_one_line(capsys):
    def main(settings):
        raise UserError("the file\nis broken")

    with pytest.raises(SystemExit) as exit:
        cli.run(main, None)
    assert exit.value.code == 2
    assert capsys.readouterr() == ("", "error: the file is broken\n")


def test_run_passes_the_settings_and_other_errors_on():
    seen = []
    cli.run(seen.append, 5)
    assert seen == [5]
    with pytest.raises(ZeroDivisionError):  # a mistake of ours keeps its traceback
        cli.run(lambda settings: 1 / 0, None)


def test_run_answers_an_interrupt_with_130(capsys):
    def main(settings):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit:
        cli.run(main, None)
    assert exit.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_table_keys_are_those_of_the_dict():
    from lora import ADAPTERS
    from quantize import QUANTIZERS

    assert cli.table_keys("lora.py", "ADAPTERS") == tuple(ADAPTERS)
    assert cli.table_keys("quantize.py", "QUANTIZERS") == tuple(QUANTIZERS)
    with pytest.raises(LookupError, match="no dict to NONE"):
        cli.table_keys("lora.py", "NONE")


def test_table_keys_of_a_dict_with_a_type_hint(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    (tmp_path / "table.py").write_text("KINDS: dict[str, int] = {'a': 1, 'b': nonsense}\nOTHER = KINDS\nx.y = {}\n")
    assert cli.table_keys("table.py", "KINDS") == ("a", "b")
    with pytest.raises(LookupError, match="no dict to OTHER"):
        cli.table_keys("table.py", "OTHER")


# -------------------------------------------------------------------------------------------------------- scripts


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_every_script_answers_an_unknown_flag_at_once(run_script, script):
    started = time.monotonic()
    code, out, err = run_script(script, "--no_such_flag", "1")
    assert (code, out) == (2, "") and err.count("\n") == 1 and "--no_such_flag" in err, out + err
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_every_script_explains_every_flag(run_script, script):
    code, out, err = run_script(script, "--help")
    assert (code, err) == (0, "")
    flags = [line.split()[0] for line in out.splitlines() if line.startswith("  --")]
    assert len(flags) > 2
    options = out[out.index("--config CONFIG") :]
    for paragraph in options.split("\n  --")[1:]:
        if not paragraph.startswith(("config", "print_config")):
            text = paragraph.partition("(")[0].split(maxsplit=2)
            assert len(text) == 3, f"--{text[0]} is not explained"


def test_an_error_is_one_line_of_bearable_length(capsys):
    with pytest.raises(SystemExit):
        cli.fail("where: " + "a\n" * 10**5 + "what to do")
    err = capsys.readouterr().err
    assert err.startswith("error: where: a a") and err.endswith("what to do\n") and len(err) < 1100
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("values", "limits", "says"),
    [
        ({"a": 0}, {"above": 0}, "--a 0: must be above 0"),
        ({"a": -1e-9}, {"least": 0, "below": 1}, "--a -1e-09: must be at least 0 and below 1"),
        ({"a": 1}, {"least": 0, "below": 1}, "--a 1: must be at least 0 and below 1"),
        ({"a": 1.5}, {"least": 0, "most": 1}, "--a 1.5: must be at least 0 and at most 1"),
        ({"a": float("nan")}, {"above": 0}, "--a nan: must be above 0"),
        ({"a": [3, 0]}, {"above": 0}, "--a 0: must be above 0"),
        ({"b": 2, "a": 0}, {"above": 0}, "--a 0: must be above 0"),
    ],
)
def test_numbers_out_of_range(values, limits, says):
    with pytest.raises(UserError, match=f"^{re.escape(says)}$"):
        cli.check_numbers(SimpleNamespace(**values), *values, **limits)


@pytest.mark.parametrize("value", [None, "auto", 0, 1, 0.5, [], [0, 1]])
def test_numbers_in_range(value):
    cli.check_numbers(SimpleNamespace(a=value), "a", least=0, most=1)
