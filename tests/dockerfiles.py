"""Dockerfiles read as far as that goes without Docker: their instructions, and what COPY puts into the image."""

import os
import re
from fnmatch import fnmatch
from pathlib import Path

from conftest import ROOT
from test_imports import file_of, imports


def instructions(path):
    """A Dockerfile as [(instruction, its text)]: comments out, continued lines joined."""
    lines = [line for line in Path(path).read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def by_name(path):
    """A Dockerfile as {instruction: [the texts]}."""
    texts = {}
    for name, text in instructions(path):
        texts.setdefault(name, []).append(text)
    return texts


def copied(path):
    """The files that COPY puts into the image, {path in its WORKDIR: path here}."""
    files = {}
    for name, text in instructions(path):
        if name == "COPY":
            *sources, target = text.split()
            for source in sources:
                found = [*ROOT.glob(source)]
                assert found, f"COPY {source}: there is no such file"
                files |= {os.path.normpath(os.path.join(target, each.name)): each for each in found}
    return files


def check_sent(files):
    """Raise AssertionError unless .dockerignore lets Docker have these files, which must be sources and no weights."""
    ignore = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert ignore[0] == "**" and all(line[0] == "!" for line in ignore[1:])
    for path in files:
        name = str(path.relative_to(ROOT))
        assert any(fnmatch(name, line[1:]) and name.count("/") == line.count("/") for line in ignore[1:]), name
        sources = (".py", ".cpp", ".h", ".html", ".txt", ".sh", ".toml", ".yaml", ".jinja", ".js")
        assert path.suffix in sources or path.name == "LICENSE", f"{name}: no weights in the image's sources"


def check_complete(files, scripts):
    """Raise AssertionError unless the image has all that scripts import. Returns the names of these files.

    files: as `copied` returns them. scripts: paths from the project's folder.
    """
    open_, seen = [ROOT / script for script in scripts], set()
    while open_:
        path = open_.pop()
        name = str(path.relative_to(ROOT))
        assert name in files, f"{name} is imported but not copied"
        seen.add(name)
        below = {file_of(module) for module, _ in imports(path)} - {None}
        open_ += [path for path in below if str(path.relative_to(ROOT)) not in seen]
    beside = {str(path.relative_to(ROOT)) for path in ROOT.glob("ops/*") if path.suffix in (".cpp", ".h")}
    assert beside <= files.keys(), "what ops/ compiles"
    return seen
