"""What one GPU does, one part at a time: training, decoding, kernels, resuming. bench/gpu.sh runs all of them.

    python bench/gpu/measure.py --part training --out_dir out/gpu
    python bench/gpu/measure.py --part training --out_dir out/gpu --shape tiny --device cpu   # in small, to try it

Weights are random and made on the device, nothing is downloaded. Every measurement is a line of JSON in gpu.jsonl, the
most important ones first; gpu.png shows all lines so far. When the time runs out the rest are lines that say so; one
that runs out of memory or fails is a line, too. The exit status is 2 if something failed.
"""

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

if __name__ == "__main__":  # the project's folder in place of this one, wherever it is started from
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from shell import cli
from shell.cli import UserError


@dataclass(kw_only=True)
class Settings:
    """The command line.

    Args:
        part: What to measure.
        out_dir: Folder for gpu.jsonl, gpu.png and what a part writes beside them.
        shape: "7b" for Llama-2-7B and Mistral-7B, "tiny" for a model that a CPU runs in no time.
        device: Where to measure.
        tokens: Positions of a micro-batch in training; a step has two.
        sample_tokens: Positions of a sample.
        steps: Measured steps of a training run, after two that are not.
        repetitions: Runs of each side; the sides alternate, and the medians count.
        prompt_tokens: Length of a prompt in decoding.
        new_tokens: Tokens decoded.
        seconds: No measurement is started that may not end in this time.
        commit: Commit of the code, for the results, where there is no git to ask.
    """

    part: Literal["training", "decoding", "kernels", "resume"]
    out_dir: Path
    shape: Literal["7b", "tiny"] = "7b"
    device: Literal["cuda", "cpu"] = "cuda"
    tokens: int = 2048
    sample_tokens: int = 512
    steps: int = 4
    repetitions: int = 3
    prompt_tokens: int = 128
    new_tokens: int = 128
    seconds: int = 480
    commit: str | None = None

    def __post_init__(self):
        self.deadline = time.monotonic() + self.seconds  # from before the imports, which take a while
        numbers = ("tokens", "sample_tokens", "steps", "repetitions", "prompt_tokens", "new_tokens")
        cli.check_numbers(self, *numbers, above=0)
        if self.tokens % self.sample_tokens:
            raise UserError(f"--tokens {self.tokens} must be a multiple of --sample_tokens {self.sample_tokens}")


if __name__ == "__main__":
    settings = cli.parse(Settings)
    if settings.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # finetune.py takes a GPU where it sees one

import torch

from bench.gpu import decoding, kernels, picture, resume, training
from bench.gpu.device import measure_limits, nominal_tflops
from bench.measuring import add_line, describe, machine_name


class Part(NamedTuple):
    """measurements(settings): objects with a name (str), `seconds` that one may take, `about()` for its line, and
    `measure(settings, limits)`, the rest of the line. problems(rows): what their rows, each with its measurement,
    should not say."""

    measurements: Callable
    problems: Callable = lambda rows: []


PARTS = {
    "training": Part(training.measurements, training.differing_losses),
    "decoding": Part(decoding.measurements),
    "kernels": Part(kernels.measurements),
    "resume": Part(resume.measurements),
}


def main(s):
    """Measure a part, the most important first, print its table, and make the picture of all lines so far."""
    if s.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device")
    part, lines = PARTS[s.part], s.out_dir / "gpu.jsonl"
    about = about_call(s)
    limits = measure_limits(torch.device(s.device)) | {"nominal_tflops": about["nominal_tflops"]}
    add_line(lines, about | {"part": "limits", **limits})
    rows = []
    for measurement in part.measurements(s):
        row = attempt(measurement, s, limits)
        rows.append((measurement, row))
        line = {"part": s.part, "name": str(measurement), **measurement.about(), **row}
        print(json.dumps(line), flush=True)
        add_line(lines, about | line)
    picture.draw(picture.read_lines(lines), s.out_dir / "gpu.png")
    picture.print_rows(picture.of_part(picture.read_lines(lines), s.part))
    wrong = [f"{measurement}: {row['failed']}" for measurement, row in rows if "failed" in row] + part.problems(rows)
    if wrong:
        raise UserError("; ".join(wrong))


def attempt(measurement, s, limits):
    """The row of a measurement; one that says why if there is none."""
    if time.monotonic() + measurement.seconds > s.deadline:
        return {"skipped": "no time left"}
    print(measurement, file=sys.stderr, flush=True)
    gc.collect()
    if s.device == "cuda":
        torch.cuda.empty_cache()
    try:
        return measurement.measure(s, limits)
    except torch.OutOfMemoryError:
        return {"skipped": "out of memory"}
    except Exception as error:  # the machine is rented by the minute: the other measurements still count
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}"}


def about_call(s):
    """What all lines share."""
    call = describe(s)
    call["commit"] = s.commit or call["commit"]
    return call | {"nominal_tflops": nominal_tflops(machine_name(call["machine"]))}


if __name__ == "__main__":
    cli.run(main, settings)
