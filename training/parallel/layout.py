"""How the devices of a run are divided: --parallel and --shard. Nothing heavy is imported here.

Devices that differ in their place along `data` have different samples; those along `tensor` have the same samples and
each a part of every layer (Shoeybi et al. 2019, arXiv 1909.08053); those along `pipeline` have the same samples and
each some of the layers (Narayanan et al. 2019, arXiv 1806.03377). --shard divides what those along `data` would all
hold alike (Rajbhandari et al. 2019, arXiv 1910.02054, stage 3).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from shell.cli import UserError

if TYPE_CHECKING:
    from training.settings import Settings

# The last one changes fastest: its devices are neighbours, with the fastest link. The first one sends least.
DIMENSIONS = ("pipeline", "data", "tensor")
LORAS = ("lora", "dora", "lora-fa")  # the adapters that can be cut as their layers are
AGENT_STORE, FRESH_STORE = "TORCHELASTIC_USE_AGENT_STORE", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"  # torchrun's
ELEMENTWISE = ("adamw", "sgd", "schedule-free")  # optimisers that treat each number by itself, on tensors of any kind
LOOKING_AT_NOTHING = ("default", "gaussian", "orthogonal")  # starts of adapters that need no weight


class Coordinates(NamedTuple):
    """The place of a device along each dimension."""

    pipeline: int = 0
    data: int = 0
    tensor: int = 0


@dataclass(frozen=True)
class Layout:
    """How many devices there are along each dimension, and whether those along `data` divide the model."""

    data: int = 1
    tensor: int = 1
    shard: bool = False
    pipeline: int = 1

    @property
    def world_size(self) -> int:
        """How many devices there are."""
        return self.pipeline * self.data * self.tensor

    @property
    def splits(self) -> bool:
        """Whether no device has the whole model."""
        return self.pipeline > 1 or self.tensor > 1 or (self.shard and self.data > 1)

    def place(self, rank: int) -> Coordinates:
        """Where a device is."""
        rest, tensor = divmod(rank, self.tensor)
        return Coordinates(*divmod(rest, self.data), tensor)

    def rank(self, pipeline: int, data: int, tensor: int) -> int:
        """The device at a place."""
        return (pipeline * self.data + data) * self.tensor + tensor


def layout_of(s: Settings) -> Layout:
    """The layout that the flags describe. Raises UserError if they do not fit together."""
    world_size, given = s.devices * s.nodes, _parse(s.parallel)
    pipeline, tensor = given.get("pipeline", 1), given.get("tensor", 1)
    if world_size % (pipeline * tensor):
        raise UserError(f"--parallel {s.parallel}: {world_size} devices cannot be divided by {pipeline * tensor}")
    layout = Layout(given.get("data", world_size // (pipeline * tensor)), tensor, s.shard, pipeline)
    if layout.world_size != world_size:
        nodes = f" on each of {s.nodes} nodes" if s.nodes > 1 else ""
        raise UserError(
            f"--parallel {s.parallel} is for {layout.world_size} devices, --devices {s.devices}{nodes} makes "
            f"{world_size}"
        )
    return layout


def _parse(text):
    """The sizes that --parallel gives, by dimension."""
    sizes = {}
    for part in filter(None, (text or "").split(",")):
        name, _, size = (each.strip() for each in part.partition("="))
        if name not in DIMENSIONS or not size.isdecimal() or int(size) < 1 or name in sizes:
            names = f"{', '.join(DIMENSIONS[:-1])} and {DIMENSIONS[-1]}"
            raise UserError(f"--parallel {text}: expected sizes of {names}, each at most once, such as data=2,tensor=2")
        sizes[name] = int(size)
    return sizes


def check_layout(s: Settings) -> None:
    """Raise UserError for flags that do not go with a model of which no device has the whole."""
    layout = layout_of(s)
    if s.shard and layout.data == 1:
        raise UserError("--shard divides the model among the devices along data, of which there is one")
    if not layout.splits:
        return
    flag = f"--parallel {s.parallel}" if layout.tensor > 1 or layout.pipeline > 1 else "--shard"
    needs = [
        (s.method == "full" or s.method in LORAS, f"--method {' or '.join((*LORAS, 'full'))}, not {s.method}"),
        (s.optimizer in ELEMENTWISE, f"--optimizer {' or '.join(ELEMENTWISE)}: {s.optimizer} needs whole tensors"),
        (s.lora_init in LOOKING_AT_NOTHING, f"--lora_init {' or '.join(LOOKING_AT_NOTHING)}, not {s.lora_init}"),
        (s.precision != "16-mixed", "another --precision: with 16-mixed devices would scale their losses differently"),
        (not s.compile, "--compile false"),
        (s.recompute != "offload", "--recompute 1 at most"),
        (not (s.lora_modules_to_save or s.lora_tokens), "no --lora_modules_to_save and no --lora_tokens"),
        (s.objective != "distill", "another --objective: a teacher is read whole by each device"),
        (not s.balance_loss or layout.pipeline == 1, "no --balance_loss: it is of the routers of all layers together"),
    ]  # fmt: skip
    for holds, what in needs:
        if not holds:
            raise UserError(f"{flag} needs {what}")


def check_launch(s: Settings) -> None:
    """Raise UserError if torchrun or Slurm started another number of processes than the flags say.

    Without either, finetune.py starts --devices processes by itself; on several --nodes somebody has to start it there.
    """
    count, environ = s.devices * s.nodes, os.environ
    started, how = None, ""
    if "TORCHELASTIC_RUN_ID" in environ:
        started, how = environ["WORLD_SIZE"], "torchrun"
        # Else torch 2.13 has one store for all starts of the processes, and a new one may find a dead one's address.
        if environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and environ.get(AGENT_STORE) == "True":
            raise UserError(f"torchrun --max-restarts needs {FRESH_STORE} in its environment: start it so again")
    elif "SLURM_STEP_NUM_TASKS" in environ:
        started, how = environ["SLURM_STEP_NUM_TASKS"], "srun"
    if started is not None and int(started) != count:
        raise UserError(
            f"{how} has started {started} processes, --devices {s.devices} and --nodes {s.nodes} are {count}"
        )
    in_job = "SLURM_NTASKS" in environ and environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")
    if count > 1 and started is None and in_job:
        raise UserError(f"--devices {s.devices}: in a Slurm job start finetune.py with srun, as {count} tasks")
    by_hand = "MASTER_ADDR" in environ and "NODE_RANK" in environ
    if s.nodes > 1 and started is None and not by_hand:
        raise UserError(f"--nodes {s.nodes}: start it on each node, with torchrun --nnodes {s.nodes} or with srun")
