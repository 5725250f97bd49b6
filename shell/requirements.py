"""A missing requirement, answered in one line with the command that installs it.

Without this, a new terminal in which the project's environment is not active gets a traceback that ends in
"No module named 'jsonargparse'", and so do the parts whose requirements are optional. The requirements files say which
packages are ours to ask for; any other missing module is a fault in the code, and keeps its traceback.
"""

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = tuple(
    f"requirements{part}.txt"
    for part in ("", "-eval", "-data", "-ray", "-tracking", "-sweep", "-store", "-flows", "-dev")
)
MODULES = {
    "PyYAML": "yaml",
    "pytest-xdist": "xdist",
    "scikit-learn": "sklearn",
}  # of the other packages, a-b is imported as a_b


def how_to_install(module: str) -> str | None:
    """What to do where a module is missing, in one line. None if no requirements file names its package.

    module: as it was imported, such as "lm_eval" or "lm_eval.tasks".
    """
    name = module.partition(".")[0]
    for file in FILES:
        if name in _modules(ROOT / file):
            install = f"pip install -r {os.path.relpath(ROOT / file)}"
            environment = ROOT / ".venv"
            if not (environment / "bin" / "activate").is_file() or Path(sys.prefix).resolve() == environment.resolve():
                return f"{name} is not installed: {install}"
            activate = f"source {os.path.relpath(environment)}/bin/activate"
            return f"{name} is not installed: activate the project's environment ({activate}), or {install}"
    return None


def explain_missing() -> None:
    """From now on end the program with one line and status 2, not with a traceback, where a requirement is missing."""
    usual = sys.excepthook

    def hook(kind, error, traceback):
        how = how_to_install(error.name or "") if isinstance(error, ModuleNotFoundError) else None
        if how is None:
            usual(kind, error, traceback)
        else:
            print(f"error: {how}", file=sys.stderr)
            sys.exit(2)

    sys.excepthook = hook


def _modules(path):
    """The names under which the packages of a requirements file are imported; none if there is no such file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    packages = [re.split(r"==|\[", line)[0].strip() for line in lines if line and line[0] != "#"]
    return {MODULES.get(package, package.lower().replace("-", "_")) for package in packages}
