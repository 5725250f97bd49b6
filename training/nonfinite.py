"""A training step whose loss or gradient is not finite: finding its cause, keeping it in a file, replaying that file.

`bad_batch.safetensors` holds for each micro-batch k of the step `k.tokens` and `k.targets`, both (B, T) int64, for a
packed one `k.offsets` (n + 1,) int64 or, of samples that fork, `k.beginnings` (n,) and `k.ends` (n, ends);
`k.known.NAME.i`, what an objective knows of its sample i; `weights.NAME`, the trainable weights as they were; and as
JSON in its metadata the other fields of `KeptStep`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from batching import Batch
from ops.forks import Forks
from shell.cli import UserError
from shell.files import whole_file
from training import build
from training.optimizer import InBackward
from training.parallel.layout import layout_of
from training.steps import seeds_of_step
from weights.checkpoint import write_shard

if TYPE_CHECKING:
    from batching import Samples
    from training.build import Run
    from training.settings import Settings

FILE = "bad_batch.safetensors"
NAMED = 10  # samples in a message


class NotFinite(UserError):
    """A number of the step is not finite. No weight was updated with it."""

    def __init__(self, what: str, value: float):
        super().__init__(f"{what} is {value}")
        self.what = what


def check_finite(what: str, value: float) -> None:
    """Raise NotFinite if a number is not finite."""
    if not math.isfinite(value):
        raise NotFinite(what, value)


@dataclass
class KeptStep:
    """What is needed to run the step `number` (from 0) forward and backward as it was.

    batches: its micro-batches, one device's after the other's. names: for each the names of its samples. units: how
    many they have. seeds: the random seed of each device (in a pipeline: of its first stage); counts: how many
    micro-batches it has. scale: of the loss (16-mixed). message: what was not finite. moved: some weights had been
    updated before that was noticed.
    """

    number: int
    batches: list[Batch]
    names: list
    units: int
    seeds: list
    counts: list
    scale: float
    message: str
    moved: bool

    def samples(self) -> Iterator[tuple[str, Batch]]:
        """Each sample by itself: its name, and a micro-batch with no other."""
        for batch, names in zip(self.batches, self.names, strict=True):
            yield from zip(names, batch.samples(len(names)), strict=True)


# ------------------------------------------------------------------------------------------------ when it happens


@contextlib.contextmanager
def explained(run: Run, micro_batches: list[list[int]], step: int) -> Iterator[None]:
    """Around a training step: if it raises NotFinite, find the cause, keep the step in FILE, and raise a UserError.

    In a model that is divided the cause is left to --replay: on one device, where a sample can be run by itself.
    """
    try:
        yield
    except NotFinite as error:
        bad = kept_step(run, micro_batches, step, error)
        kept = keep(run, bad)
        if isinstance(run.optimizer, InBackward):
            run.optimizer.stopped = True
        cause = "" if run.divided else f"{find_cause(run, bad)}; "
        raise UserError(f"step {step + 1}: {error}; {cause}{kept}") from None


def kept_step(run: Run, micro_batches: list[list[int]], step: int, error: NotFinite) -> KeptStep:
    """The step whose loss or gradient is not finite, as it is kept."""
    s, in_backward = run.settings, isinstance(run.optimizer, InBackward)
    scaler = getattr(run.fabric.strategy.precision, "scaler", None)
    shares = run.ranks.shares(s, micro_batches, run.train)
    micro_batches = [indices for share in shares for indices in share if indices]
    return KeptStep(
        number=step,
        batches=[run.batch(run.train, indices) for indices in micro_batches],
        names=sample_names(s.data_dir, run.train, micro_batches, run.sources),
        units=sum(run.train.unit_counts[indices].sum().item() for indices in micro_batches),
        seeds=[*seeds_of_step(s, step, len(shares) * run.ranks.layout.pipeline)[: len(shares)]],
        counts=[sum(map(bool, share)) for share in shares],
        scale=scaler.get_scale() if scaler else 1.0,
        message=str(error),
        moved=in_backward and run.optimizer.early and error.what != "the loss",
    )


def keep(run: Run, step: KeptStep) -> str:
    """Write FILE. Returns how to run the step again, or why that cannot be, in words. All devices call it."""
    s = run.settings
    layout, tensors = trained_weights(run)
    kept = f"run it again with --config {s.out_dir}/config.yaml --replay {s.out_dir / FILE}"
    if run.divided:
        kept += ", on one device, to see which samples cause it"
    if run.fabric.is_global_zero:
        try:
            write_step(s.out_dir / FILE, step, layout, tensors)
        except (OSError, SafetensorError) as failure:
            kept = f"it could not be kept to be run again ({failure})"
    for _ in tensors:  # what the first device still needs of this one
        pass
    return kept


def trained_weights(run: Run) -> tuple[dict[str, tuple[torch.dtype, tuple]], Iterator[torch.Tensor | None]]:
    """dtype and shape of each weight that trains, by its name, and one after the other the whole tensors.

    Of a model that is divided the first device gets them, put together of the pieces of all, and the others None.
    """
    if run.divided:
        run.ranks.give_back(run.model)
        pieces, whole = run.divided.pieces, run.divided.whole
        layout = run.divided.shapes(lambda name: whole.get_parameter(name).requires_grad)
        return layout, pieces.gather([(name, 0) for name in layout], pieces.parameters.get, layout)
    trained = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    return {name: (p.dtype, tuple(p.shape)) for name, p in trained.items()}, iter(trained.values())


def sample_names(
    data_dir: Path, samples: Samples, micro_batches: list[list[int]], sources: list[str]
) -> list[list[str]]:
    """For each micro-batch the names of its samples: the number in the training part, the source if there are several,

    and the id of the row in `samples.jsonl`, in folders that have that file.
    """
    ids = row_ids(data_dir, {i for indices in micro_batches for i in indices})

    def name(i):
        more = [sources[samples.sources[i]]] if sources else []
        more += [str(ids[i])] if i in ids else []
        return f"{i} ({', '.join(more)})" if more else str(i)

    return [[name(i) for i in indices] for indices in micro_batches]


def row_ids(data_dir: Path, numbers: set[int]) -> dict:
    """The ids of training samples by their numbers; {} if there is no samples.jsonl, or none that can be read."""
    try:
        with open(Path(data_dir, "samples.jsonl"), encoding="utf-8") as file:
            ids = (line["id"] for line in map(json.loads, file) if line["part"] == "train")
            return {number: id for number, id in enumerate(ids) if number in numbers}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def find_cause(run: Run, step: KeptStep) -> str:
    """Which samples of a step are not finite when run alone, and in which module that begins, in words."""
    bad, first = [], None
    for name, outcome in run_samples(run, step):
        if not outcome.is_finite():
            bad.append(name)
            first = first or outcome.first
    run.model.zero_grad()
    weight = first_bad_weight(run.model)
    where = f"; {weight} holds NaN or infinity" if weight else f"; first in {first}" if first else ""
    if not bad:
        return f"no single sample causes it: the learning rate may be too high{where}"
    return f"caused by training samples {', '.join(bad[:NAMED])}{' and others' if len(bad) > NAMED else ''}{where}"


def first_bad_weight(model: nn.Module) -> str | None:
    """The name of the first weight that holds NaN or infinity, None if none does; those of 4 or 8 bits cannot."""
    return next((name for name, p in model.named_parameters() if not p.isfinite().all()), None)


# --------------------------------------------------------------------------------------------------- running it again


class Outcome(NamedTuple):
    """Of a micro-batch: its loss, as a share of the step's; the loss of each target; the gradient's norm by weight, in

    the order of the backward pass; and where the first number that is not finite appeared, in words (None: nowhere).
    """

    loss: torch.Tensor
    losses: torch.Tensor
    norms: dict
    first: str | None

    def is_finite(self) -> bool:
        """Whether all numbers were."""
        return self.first is None


def run_batch(run: Run, step: KeptStep, batch: Batch) -> Outcome:
    """Run a micro-batch forward and backward and check every module's output and every gradient.

    batch: one of the step's, or a part of one. The gradient, `step.scale` times as large, is
    left in the model. Blocks compiled by torch.compile run uncompiled here: their inside cannot be checked.
    """
    model, norms, found = run.model, {}, []

    def look(what, tensor):
        # Detached: what a recomputed block saves for its gradient must be the same each time that it is run.
        if not found and torch.is_tensor(tensor) and not tensor.detach().isfinite().all():
            found.append(what)

    def note_gradient(name, grad):
        norms[name] = torch.linalg.vector_norm(grad, dtype=torch.float32).item() / step.scale
        look(f"the gradient of {name}", grad)

    hooks = [
        module.register_forward_hook(lambda _, args, output, name=name: look(f"the output of {name}", output))
        for name, module in model.named_modules()
        if name and not isinstance(module, nn.Identity)
    ]
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hooks += [p.register_hook(lambda grad, name=name: note_gradient(name, grad)) for name, p in trainable]
    try:
        with torch.compiler.set_stance("force_eager"):
            with run.fabric.autocast():
                result = run.objective(model, batch)
            loss = result.summed / step.units
            look("the loss", loss)
            (result.trained / step.units * step.scale).backward()
    finally:
        for hook in hooks:
            hook.remove()
    return Outcome(loss.detach(), result.losses, norms, found[0] if found else None)


def run_samples(run: Run, step: KeptStep) -> Iterator[tuple[str, Outcome]]:
    """Run each sample of a step by itself: its name and its `Outcome`."""
    for name, batch in step.samples():
        run.model.zero_grad()
        torch.manual_seed(step.seeds[0])
        yield name, run_batch(run, step, batch)


def replay(s: Settings) -> None:
    """Run the step that --replay names again, from the weights in that file, on one device, and print the result:

    losses, norms of gradients, the first number that is not finite.
    """
    step, in_stages = read_step(s.replay), layout_of(s).pipeline > 1
    s.devices, s.nodes, s.parallel, s.shard = 1, 1, None, False
    fabric = build.start_fabric(s)
    model, _ = build.build_model(s, fabric.device, None)
    read_weights(s.replay, model)
    run = build.Run(s, fabric, model.train(), optimizer=None, train=None)
    print(f"step {step.number + 1}, when {step.message}: {len(step.batches)} micro-batches")
    if step.moved:
        print("note: some weights had been updated in the backward pass before: the numbers differ from that step's")
    if in_stages and s.lora_dropout:
        print("note: each stage of a pipeline draws its own dropout: the numbers differ from that step's")
    loss, first = torch.zeros((), device=fabric.device), None
    model.zero_grad()
    batches = iter(step.batches)
    for seed, count in zip(step.seeds, step.counts, strict=True):
        torch.manual_seed(seed)
        for batch in itertools.islice(batches, count):
            outcome = run_batch(run, step, batch)
            loss, first = loss + outcome.loss, first or outcome.first
    squares = Counter()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32).item() / step.scale
            squares[name.rpartition(".")[0]] += norm**2
    print(f"loss {loss.item()}, norm of the gradient {math.sqrt(squares.total())}")
    for name, outcome in run_samples(run, step):
        norm = math.hypot(*outcome.norms.values())
        loss = f"{outcome.losses.mean().item():.6g} per {run.objective.unit.split()[-1]}"
        print(f"sample {name}: loss {loss}, norm of its gradient {norm:.6g}")
    print("norm of the gradient by module:")
    for name, square in squares.items():
        print(f"  {name}: {math.sqrt(square):.6g}")
    print(f"first not finite: {first_bad_weight(model) or first or 'nothing'}")


# --------------------------------------------------------------------------------------------------------- the file


def write_step(
    path: Path, step: KeptStep, layout: dict[str, tuple[torch.dtype, tuple]], weights: Iterator[torch.Tensor]
) -> None:
    """Write a step and the weights that train (see `trained_weights`) to `path`, whole or not at all."""
    own = {f"{k}.{name}": t for k, batch in enumerate(step.batches) for name, t in batch_tensors(batch).items()}
    places = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in own.items()}
    places |= {f"weights.{name}": place for name, place in layout.items()}
    values = {field.name: getattr(step, field.name) for field in dataclasses.fields(step) if field.name != "batches"}
    with whole_file(path) as file:
        write_shard(
            file, places, lambda name: own[name] if name in own else next(weights), {"step": json.dumps(values)}
        )


def batch_tensors(batch: Batch) -> dict[str, torch.Tensor]:
    """All of a micro-batch as tensors, by the names that the page's beginning says."""
    tensors = {"tokens": batch.tokens.contiguous(), "targets": batch.targets.contiguous()}
    if isinstance(batch.offsets, Forks):
        tensors |= {name: torch.tensor(each) for name, each in batch.offsets._asdict().items()}
    elif batch.offsets:
        tensors["offsets"] = torch.tensor(batch.offsets)
    return tensors | {f"known.{name}.{i}": t for name, each in batch.known.items() for i, t in enumerate(each)}


def batch_of(tensors: dict[str, torch.Tensor], prefix: str) -> Batch:
    """The micro-batch whose `batch_tensors` stand in `tensors` under this prefix."""
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    offsets = own["offsets"].tolist() if "offsets" in own else None
    if "ends" in own:
        offsets = Forks(tuple(own["beginnings"].tolist()), tuple(map(tuple, own["ends"].tolist())))
    known = {}
    for name in sorted((n for n in own if n.startswith("known.")), key=lambda n: int(n.rpartition(".")[2])):
        known.setdefault(name.split(".")[1], []).append(own[name])
    return Batch(own["tokens"], own["targets"], offsets, known)


def read_step(path: Path) -> KeptStep:
    """The `KeptStep` in a file. Raises UserError if it is none."""
    try:
        with safe_open(path, "pt") as file:
            values, names = json.loads(file.metadata()["step"]), set(file.keys())
            tensors = {name: file.get_tensor(name) for name in names if not name.startswith("weights.")}
        batches = [batch_of(tensors, f"{k}.") for k in range(len(values["names"]))]
        return KeptStep(batches=batches, **values)
    except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"--replay {path} is missing, damaged, or no {FILE} ({error})") from None


@torch.no_grad()
def read_weights(path: Path, model: nn.Module) -> None:
    """Copy the trainable weights of a kept step into a model. Raises UserError if they are not the model's."""
    trainable = {f"weights.{name}": p for name, p in model.named_parameters() if p.requires_grad}
    with safe_open(path, "pt") as file:
        stored = {name for name in file.keys() if name.startswith("weights.")}  # noqa: SIM118 (not a dict)
        for name in sorted(stored | trainable.keys()):
            if (
                name not in stored
                or name not in trainable
                or file.get_slice(name).get_shape() != list(trainable[name].shape)
            ):
                raise UserError(f"--replay {path}: {name} is not as in this model: give the settings of its run")
        for name, parameter in trainable.items():
            parameter.copy_(file.get_tensor(name))
