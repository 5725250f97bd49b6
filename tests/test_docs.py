"""The pages are right: every command, flag, link, file and symbol that they name is there. Nothing is executed.

A command in a page, in a script's docstring or at the head of a recipe is parsed as the script would parse it: by the
script's own `Settings`, which is read without the heavy imports that follow it.
"""

import argparse
import ast
import functools
import itertools
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from jsonargparse import ArgumentParser
from test_imports import LAYERS

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")])
CODE = sorted(
    path
    for folder in (".", *(init.parent.name for init in ROOT.glob("*/__init__.py")), "bench", "examples", "tests/stress")
    for path in (ROOT.glob("*.py") if folder == "." else (ROOT / folder).rglob("*.py"))
)
HEADS = sorted([*ROOT.glob("configs/*.yaml"), *ROOT.glob("*.sh"), *ROOT.glob("eval/*.sh"), *ROOT.glob("bench/*.sh")])
OTHERS = {
    "cd",
    "curl",
    "docker",
    "exit",
    "export",
    "git",
    "helm-run",
    "kubectl",
    "mlflow",
    "pip",
    "pre-commit",
    "ruff",
    "sbatch",
    "scancel",
    "scontrol",
    "sky",
    "source",
    "srun",
    "tensorboard",
    "test",
    "torchrun",
    "vllm",
    "wandb",
}  # programs that are not ours
EVERYWHERE = {"help", "config", "print_config"}  # flags of every script
# Of pip, docker, MLflow, Metaflow, vLLM, torchrun and Slurm.
FOREIGN_FLAGS = {
    "index-url", "build-arg", "backend-store-uri", "artifacts-destination", "production", "enable-lora", "lora-modules",
    "max-lora-rank", "max-loras", "chat-template", "ntasks-per-node", "gres", "max-restarts", "requeue",
}  # fmt: skip
OURS = r"[\w./-]+\.(py|sh|cpp|h|md|toml|cff|conf)|requirements[\w-]*\.txt|(bench/results|configs)/\S+"  # files
MADE = (  # folders that scripts make
    r"(final|source|results|tracking|tensorboard|\.metaflow|tracking/wandb|step-NNNNNN|((checkpoints|prepared|out)(/\w+)*))/"
)


def name(path):
    return str(path.relative_to(ROOT))


# --------------------------------------------------------------------------------------------------- reading a page


def fences(text):
    """(language, content) of each fenced block of a page."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def prose(text):
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def spans(text):
    """The inline code of a page."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(text))]


def slug(heading):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(path):
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", prose(path.read_text()), re.MULTILINE)}


def links(text):
    return re.findall(r"\]\(([^)\s]+)\)", prose(text))


def commands(script):
    """The words of each simple command in lines of shell, without redirections and variables set before it."""
    for line in script.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        command = []
        for word in [*words, "&&"]:
            if word not in ("&&", "||", "|", ";"):
                command.append(word)
                continue
            while command and re.fullmatch(r"[A-Z_]+=.*", command[0]):
                del command[0]
            if ">" in command:
                del command[command.index(">") :]
            if command:
                yield command
            command = []


def examples(text, mark=" "):
    """The commands in lines that begin with python or bash and a file: indented in a docstring, or in # comments."""
    lines = re.findall(rf"^{mark} *((?:python|bash) [\w/]+\.(?:py|sh)(?: (?:.*\\\n)*.*)?)$", text, re.MULTILINE)
    return [command for line in lines for command in commands(re.sub(r"\\\n[# ]*", " ", line))]


# ------------------------------------------------------------------------------------------------ checking a command


def defines_settings(node):
    imported = isinstance(node, ast.ImportFrom) and any(alias.name == "Settings" for alias in node.names)
    return imported or isinstance(node, ast.ClassDef) and node.name == "Settings"


@functools.cache
def settings_of(path):
    """The class `Settings` of a script, or None: what stands before it is run, its heavy imports come later."""
    body = ast.parse(path.read_text()).body
    ends = [i for i, node in enumerate(body) if defines_settings(node)]
    if not ends:
        return None
    light = [node for node in body[: ends[0] + 1] if not isinstance(node, ast.If)]  # `if __name__ == "__main__"`
    namespace = {"__name__": f"settings_of_{path.stem}", "__file__": str(path)}
    sys.path.insert(0, str(path.parent))  # as Python does for a script
    try:
        exec(compile(ast.Module(light, []), str(path), "exec"), namespace)
    finally:
        sys.path.remove(str(path.parent))
    return namespace["Settings"]


def parameters_of(path):
    """The flags of a flow for Metaflow (flows/): its parameters, and --config, which is Metaflow's own."""
    found = re.findall(r'= (Parameter|Config)\(\s*"(\w+)"', path.read_text())
    return {name for kind, name in found if kind == "Parameter"} | ({"config"} if found else set())


@functools.cache
def all_flags():
    classes = [found for found in map(settings_of, CODE) if found]
    flows = {flag for path in CODE for flag in parameters_of(path)}
    return {flag for found in classes for flag in found.__dataclass_fields__} | EVERYWHERE | flows


def check_flags(path, args):
    """Raise AssertionError unless the script at `path` takes the arguments."""
    settings, where = settings_of(path), f"{name(path)} {shlex.join(args)}"
    if settings is None:
        known = {*re.findall(r'add_argument\("--(\w+)"', path.read_text())} | parameters_of(path)
        wrong = [arg for arg in args if arg.startswith("--") and arg[2:].partition("=")[0] not in known]
        assert not wrong and (known or not args or "sys.argv[1" in path.read_text()), f"{where}: no such flag"
        return
    args = getattr(settings, "joined", list)(args)  # runs.py takes two words after --compare
    flags = [arg[2:].partition("=")[0] for arg in args if arg.startswith("--")]
    unknown = set(flags) - settings.__dataclass_fields__.keys() - EVERYWHERE
    assert not unknown, f"{where}: no flag {unknown}"
    if "…" in args or set(flags) & EVERYWHERE:
        return  # not the whole command
    switches = {"--" + key for key, field in settings.__dataclass_fields__.items() if field.type is bool}
    args = [f"{a}=true" if a in switches and b[:2] == "--" else a for a, b in itertools.pairwise([*args, "--"])]
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_class_arguments(settings, fail_untyped=True)
    try:
        parser.parse_args(args)
    except argparse.ArgumentError as error:
        pytest.fail(f"{where}: {error}")


def check_command(words):
    """Raise AssertionError unless a command names programs, files and flags that are there."""
    program, *args = words
    if program in ("python", "python3") and args[0] == "-m":
        assert args[1] in ("pip", "pytest", "venv"), words
        missing = [arg for arg in args[2:] if arg.endswith(".py") and not (ROOT / arg).is_file()]
        assert not missing, f"{missing}: no such file"
    elif program in ("python", "python3", "bash"):
        path = ROOT / args[0]
        assert path.is_file(), f"{args[0]}: no such file"
        if program != "bash":
            check_flags(path, args[1:])
    else:
        assert program in OTHERS or (ROOT / program).is_file(), f"{shlex.join(words)}: no such program"
        files = [value for flag, value in zip(args, args[1:], strict=False) if flag in ("-r", "-f")]
        assert all((ROOT / file).is_file() for file in files), f"{shlex.join(words)}: no such file"


# ------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_command_in_a_page_can_be_given(page):
    text = page.read_text()
    found = [command for language, block in fences(text) if language == "bash" for command in commands(block)]
    for span in spans(text):
        if re.match(r"(python|bash|pip|docker) ", span):
            found += commands(span)
    for command in found:
        check_command(command)


@pytest.mark.parametrize("path", [*CODE, *HEADS], ids=name)
def test_every_command_at_the_head_of_a_file_can_be_given(path):
    text = path.read_text()
    docstring = ast.get_docstring(ast.parse(text), clean=False) or "" if path in CODE else None
    for command in examples(text, "#") if docstring is None else examples(docstring):
        check_command(command)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_flag_in_a_page_is_one_of_a_script(page):
    for span in spans(page.read_text()):
        for flag in re.findall(r"(?<!\S)--([a-z][\w-]*)", span):
            assert flag in all_flags() | FOREIGN_FLAGS, f"`{span}`: no script has --{flag}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_leads_somewhere(page):
    for link in links(page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: no such file"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in ("LOG.md", "CHANGELOG.md")], ids=name)
def test_every_file_in_a_page_is_there(page):
    """Files of the project by their path from its folder (LOG.md and CHANGELOG.md may tell of files that are gone)."""
    for span in spans(page.read_text()):
        for word in span.split():
            if re.fullmatch(OURS, word) and word != "__init__.py":
                assert any((folder / word).is_file() for folder in (ROOT, page.parent)), f"`{word}`: no such file"
            if re.fullmatch(r"[\w.-]+(/[\w.-]+)*/", word) and not re.fullmatch(MADE, word):
                assert any((folder / word).is_dir() for folder in (ROOT, page.parent)), f"`{word}`: no such folder"


def test_every_page_is_linked():
    """Whoever starts at the README reaches every page."""
    reached, open_ = set(), [ROOT / "README.md"]
    while open_:
        page = open_.pop()
        if page.suffix == ".md" and page not in reached:
            reached.add(page)
            open_ += [(page.parent / link.partition("#")[0]).resolve() for link in links(page.read_text())]
    assert set(PAGES) <= reached, f"nothing links to {set(PAGES) - reached}"


def test_the_readme_is_short_and_begins_with_commands():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 200
    assert any(line.startswith(("bash ", "python ")) for line in lines[:20])


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_pages_are_plain(page):
    text = page.read_text()
    assert not re.search("[\u2600-\u27bf\U0001f000-\U0001faff]", text), "no emoji"
    assert "shields.io" not in text and "<img" not in text, "no badges"


# --------------------------------------------------------------------------------- what the README says of the code


def table(page, heading):
    """The cells of each row of the first table under a heading, without its head."""
    section = re.search(rf"^#+ {heading}$(.*?)(?=^#+ |\Z)", page.read_text(), re.MULTILINE | re.DOTALL)[1]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return rows[2:]


def defined(path):
    """What a file defines: names at its top, and Class.method."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
            names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if hasattr(node, "target") else []
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


RESEARCH = table(ROOT / "README.md", "Where a researcher goes")


@pytest.mark.parametrize("row", RESEARCH, ids=lambda row: row[0])
def test_where_a_researcher_goes_is_there(row):
    what, files, how = row
    names = {symbol for file in spans(files) for symbol in defined(ROOT / file)}
    assert spans(files) and spans(how), what
    for symbol in spans(how):
        assert symbol in names, f"{files} does not define {symbol}"


def test_a_researcher_finds_what_people_change():
    kinds = "adapter planner family quantiser style format cleaning objective step norm operation optimiser schedule"
    rows = " ".join(row[0] for row in RESEARCH)
    assert [kind for kind in kinds.split() if kind not in rows] == []


def test_the_map_names_every_file_and_folder_at_the_top():
    named = {span.rstrip("/") for row in table(ROOT / "README.md", "What is where") for span in spans(row[0])}
    ours = {path.name for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert ours <= named


def test_the_picture_of_the_layers_is_what_the_imports_are_held_to():
    text = (ROOT / "docs" / "architecture.md").read_text()
    picture = fences(text[text.index("## Layers") :])[0][1]
    rows = [re.findall(r"(?<!\S)(\w+)(?:/|\.py)(?!\S)", line) for line in picture.splitlines()]
    assert [set(row) for row in rows if row][::-1] == [set(layer) for layer in LAYERS]


def test_the_version_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## ([\d.]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert project["name"] == "onetune" == citation["title"]
    assert project["version"] == citation["version"] == newest


def test_the_citation_has_what_the_format_asks_for():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["license"] == "Apache-2.0"
    assert citation["message"] and all(author.keys() == {"name"} for author in citation["authors"])


# ------------------------------------------------------------------------------------------- these tests find mistakes


@pytest.mark.parametrize(
    "line",
    [
        "python finetine.py",
        "python finetune.py checkpoints/x",
        "python finetune.py --checkpoint_dir c --data_dir d --learning_rat 1",
        "python finetune.py --checkpoint_dir c --data_dir d --epochs many",
        "python finetune.py --checkpoint_dir c",
        "python examples/make_orders.py --seed 1",
        "python tests/stress/mutations.py --number 3",
        "bash quickstrat.sh",
        "pip install -r requirements-none.txt",
        "make test",
    ],
)
def test_a_wrong_command_is_found(line):
    (words,) = commands(line)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check_command(words)


def test_shell_is_read_as_a_shell_reads_it():
    text = "A=1 python a.py --x 'b c' \\\n  --y > out  # note\npython3 -m venv v && source v/bin/activate\n"
    assert list(commands(text)) == [
        ["python", "a.py", "--x", "b c", "--y"],
        ["python3", "-m", "venv", "v"],
        ["source", "v/bin/activate"],
    ]
    assert examples("Text.\n\n    python a.py --b c \\\n        --d\n    bash x.sh\n\nMore.") == [
        ["python", "a.py", "--b", "c", "--d"],
        ["bash", "x.sh"],
    ]


def test_anchors_are_those_of_github():
    assert slug("A loss, or `gradient`: not finite") == "a-loss-or-gradient-not-finite"
    assert Path(ROOT, "README.md") in PAGES
