"""The scores of a HELM suite, one line for each run spec; kept with the run of the model that was served.

python eval/helm_results.py --suite_dir out/helm/runs/v1 --model_dir out/RUN/final
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # the project's folder in place of this one, wherever it is started from
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from shell import cli
from shell.cli import UserError


@dataclass
class Settings:
    """The command line.

    Args:
        suite_dir: The folder of a suite that helm-run wrote, such as out/helm/runs/v1.
        model_dir: Folder of the model or adapter that was served, to keep the scores with the run that made it.
    """

    suite_dir: Path
    model_dir: Path | None = None

    def __post_init__(self):
        for name in ("suite_dir", "model_dir"):
            path = getattr(self, name)
            if path is not None and not path.is_dir():
                raise UserError(f"--{name} {path}: no such folder")


if __name__ == "__main__":
    settings = cli.parse(Settings)

from tracking.results import record_result

# HELM counts many things; of these each scenario has the one or two that judge an answer.
METRICS = ("exact_match", "quasi_exact_match", "final_number_exact_match", "rouge_2", "bbq_metric_overall_accuracy")
COSTS = ("num_instances", "inference_runtime")


def main(s: Settings) -> None:
    """Print the scores, and keep them."""
    paths = sorted(s.suite_dir.glob("*/stats.json"))
    if not paths:
        raise UserError(f"--suite_dir {s.suite_dir}: no run spec has a stats.json in it")
    scores = {}
    for path in paths:
        means = read_means(path)
        found = {name: means[name] for name in METRICS if name in means}
        shown = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
        instances, seconds = (means.get(name, 0.0) for name in COSTS)
        print(f"{path.parent.name}: {shown}, {instances:.0f} instances, {seconds:.1f} s a request")
        scores |= {f"{path.parent.name}/{name}": value for name, value in found.items()}
    record_result(s.model_dir, "helm", "", scores, vars(s))


def read_means(path: Path) -> dict[str, float]:
    """The means of a run spec's statistics over its test instances as they are, by name."""
    try:
        stats = json.loads(path.read_text(encoding="utf-8"))
        names = [(stat["name"], stat.get("mean")) for stat in stats]
        unchanged = [(n["name"], mean) for n, mean in names if n.get("split") == "test" and "perturbation" not in n]
        return {name: float(mean) for name, mean in unchanged if mean is not None}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no file of HELM's statistics: {error!r}") from None


if __name__ == "__main__":
    cli.run(main, settings)
