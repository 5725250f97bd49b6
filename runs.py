"""Look at runs of finetune.py without a tracker: all of them in a table or on a page, or two side by side.

    python runs.py --out_dir out                             # a table of all runs in the folder and below it
    python runs.py --out_dir out --html runs.html            # the same with curves, as one file for a browser
    python runs.py --compare out/a out/b                     # what differs, both losses in one picture, KL

Everything is read from the runs' folders; docs/runs.md has examples. The parts are in tracking/.
"""

import json
import shutil
import sys
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path

from shell import cli
from shell.cli import UserError

OF_COMPARISON = ("picture", "kl", "max_tokens", "micro_batch_tokens")
OF_TABLE = ("out_dir", "columns", "sort", "descending", "csv", "html")
PICTURE = Path("compare.png")


@dataclass
class Settings:
    """The command line.

    Args:
        out_dir: Folder in and below which runs are looked for; by default out.
        columns: More columns of the table: numbers of summary.json, results or settings, by name, or patterns as in a
            shell. Results of exact match are there without.
        sort: The column by which the table is sorted; runs without a value come last.
        descending: The highest values first.
        csv: CSV file to write the table to too, with numbers as they are and times in seconds.
        html: File for a page with the table, curves and all settings.
        compare: Two folders of runs, to be put side by side.
        picture: To compare: PNG file for both runs' losses; by default compare.png.
        kl: To compare: measure how far the two final models are from each other.
        max_tokens: To compare: positions of the first run's validation samples on which KL is measured.
        micro_batch_tokens: To compare: positions in the model at one time.
    """

    out_dir: Path | None = None
    columns: list[str] = field(default_factory=list)
    sort: str = "best_val_loss"
    descending: bool = False
    csv: Path | None = None
    html: Path | None = None
    compare: list[Path] | None = None
    picture: Path | None = None
    kl: bool = True
    max_tokens: int = 8192
    micro_batch_tokens: int = 1024

    @staticmethod
    def joined(args: list[str]) -> list[str]:
        """The words of a command line with those after --compare as one list, as the parser takes it."""
        if "--compare" not in args:
            return args
        first = args.index("--compare") + 1
        end = next((i for i in range(first, len(args)) if args[i].startswith("--")), len(args))
        return [*args[:first], json.dumps(args[first:end]), *args[end:]] if end - first > 1 else args

    def __post_init__(self):
        refused, reason = (OF_COMPARISON, "needs") if self.compare is None else (OF_TABLE, "is not for")
        for flag in fields(self):
            default = flag.default if flag.default_factory is MISSING else flag.default_factory()
            if flag.name in refused and getattr(self, flag.name) != default:
                raise UserError(f"--{flag.name} {reason} --compare")
        cli.check_numbers(self, "max_tokens", "micro_batch_tokens", above=0)
        for name in ("csv", "html", "picture"):
            cli.check_out_file(self, name)
        self.out_dir, self.picture = self.out_dir or Path("out"), self.picture or PICTURE
        if self.compare is None:
            if not self.out_dir.is_dir():
                raise UserError(f"--out_dir {self.out_dir}: no such folder")
        elif len({folder.resolve() for folder in self.compare}) != 2 or len(self.compare) != 2:
            raise UserError("--compare needs two runs, such as --compare out/a out/b")


if __name__ == "__main__":
    settings = cli.parse(Settings, Settings.joined(sys.argv[1:]))

from shell.files import whole_file
from tracking import comparison, run_table
from tracking.overview import read_run, read_runs
from tracking.page import COLUMNS, write_page
from tracking.run_files import FINAL, data_of_run, is_run
from training.settings import Settings as Training


def main(s: Settings) -> None:
    """Print the table, and write it as CSV and as a page where that is asked for; or compare two runs."""
    if s.compare:
        compare(s)
        return
    runs = read_runs(s.out_dir, lambda error: print(f"left out: {error}", file=sys.stderr), COLUMNS if s.html else ())
    if not runs:
        raise UserError(f"--out_dir {s.out_dir}: no run of finetune.py is in it or below it that can be read")
    runs = run_table.in_order(runs, s.sort, s.descending, defaults())
    table = run_table.table_of(runs, defaults(), s.columns)
    if s.csv:
        s.csv.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(s.csv) as file:
            file.write_text(run_table.as_csv(table), encoding="utf-8")
    if s.html:
        write_page(s.html, runs, table, defaults())
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print("\n".join(run_table.as_lines(table, width)))
    for path in filter(None, (s.csv, s.html)):
        print(f"written: {path}")


def defaults() -> dict:
    """The default of each flag of finetune.py, which a run has that was started before there was that flag."""
    required = {"checkpoint_dir": Path(), "data_dir": Path()}
    values = {name: value for name, value in asdict(Training(**required)).items() if name not in required}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def compare(s: Settings) -> None:
    """Print what differs between two runs, draw their losses, and measure how far their models are apart."""
    for folder in s.compare:
        if not is_run(folder):
            raise UserError(f"--compare {folder}: no run of finetune.py: it has no config.yaml and metrics.csv")
    runs = [read_run(folder, str(folder), comparison.COMPARED) for folder in s.compare]
    print("\n".join(comparison.compared(*runs, defaults())))
    comparison.draw_losses(runs, s.picture)
    print(f"\nboth losses: {s.picture}")
    if s.kl:
        print()
        try:
            print_distances(s, runs)
        except UserError as error:
            print(f"no KL between the models: {error}")


def print_distances(s: Settings, runs: list) -> None:
    """Print how far the final models are from each other and from their bases. Raises UserError for unlike ones."""
    from eval.between_runs import distances, trained  # imports torch, which the table does without

    models = [trained(run.name, run.folder / FINAL, run.settings) for run in runs]
    data_dir = data_of_run(runs[0].folder)
    if data_dir is None:
        where = runs[0].settings["data_dir"]
        raise UserError(f"{where} are not, or no longer, the data that {runs[0].name} was trained on")
    targets, found = distances(*models, data_dir, s.max_tokens, s.micro_batch_tokens)
    print(f"on {targets:,} targets of {data_dir}'s validation samples, nats a target")
    rows = [(f"KL({one} || {other})", f"{kl:.4f}", f"{same:.1%}") for one, other, kl, same in found]
    width = max(len(name) for name, _, _ in rows)
    for name, kl, same in rows:
        print(f"  {name.ljust(width)}  {kl:>8}  the same likeliest token: {same}")


if __name__ == "__main__":
    cli.run(main, settings)
