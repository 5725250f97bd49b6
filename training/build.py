"""From the settings to a run that is ready to train: its data, its model, its optimiser, on its devices."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

import lora
from batching import PLANNERS, Batch, Samples, Step, kind_of_samples, open_samples, read_data_info, source_names
from experts import Experts
from model import Config, Transformer
from objectives import OBJECTIVES, Objective
from ops.allocator import keep_freed_memory
from ops.attention import Attend
from ops.core_sharing import share_cores
from quantize import read_quantization
from shell.cli import UserError
from shell.files import read_json
from text.tokenizer import Tokenizer
from training import initialization
from training.forgetting import check_forgetting
from training.from_settings import (
    DTYPES,
    adapter_config,
    autocast_dtype,
    base_quantization,
    idle_flags,
    train_only,
    virtual_ids,
)
from training.offload import OffloadedAdamW
from training.optimizer import OPTIMIZERS, InBackward, StepInBackward, build_optimizer, go_on, is_projected
from training.parallel import saving
from training.parallel.layout import check_launch, layout_of
from training.parallel.loading import check_division, load_part
from training.parallel.part import check_quantized
from training.parallel.ranks import Ranks, make_ranks
from training.parallel.saving import Divided
from training.streaming import check_streaming
from training.teacher import check_teacher
from weights import peft_format
from weights.beside import train_beside
from weights.checkpoint import load_model, load_optimizer, read_config
from weights.peft_layout import outside_peft

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from training.settings import Settings


class Data(NamedTuple):
    """A prepared folder: its parsed data.json, its samples, and the names of its sources ([] if there is just one)."""

    info: dict
    train: Samples
    val: Samples
    sources: list[str]


@dataclass
class Run:
    """What the functions of the training loop work on together.

    adapter: what the adapters are like, None with --method full. identity: run_folder.identity's hashes of everything
    the result depends on beside the settings. ranks: this process among those of other devices. divided: of a model
    that no device has whole, what is known of the whole; None otherwise.
    """

    settings: Settings
    fabric: Fabric
    model: Transformer
    optimizer: torch.optim.Optimizer | InBackward
    train: Samples
    val: Samples | None = None
    sources: list[str] = field(default_factory=list)
    info: dict | None = None
    adapter: lora.AdapterConfig | None = None
    identity: dict | None = None
    ranks: Ranks = field(default_factory=Ranks)
    divided: Divided | None = None
    objective: Objective = field(init=False)

    def __post_init__(self):
        self.objective = OBJECTIVES[self.settings.objective](self.settings)

    @property
    def whole(self) -> Transformer:
        """The whole model, which may be without memory: to count its parameters."""
        return self.divided.whole if self.divided else self.model

    @property
    def gradient(self) -> str:
        """How a step finds its gradient: a key of `finetune.GRADIENTS`."""
        return "pipeline" if self.ranks.link else OPTIMIZERS[self.settings.optimizer].gradient

    def batch(self, samples: Samples, indices: list[int]) -> Batch:
        """The micro-batch of the samples with these numbers."""
        layout = PLANNERS[self.settings.planner].layout
        return Batch(*layout(samples, indices), self.objective.known(samples, indices))

    def share(self, micro_batches: Step, samples: Samples) -> Step:
        """Of the micro-batches of a step or a validation those of this device."""
        return self.ranks.share(self.settings, micro_batches, samples)


def build_run(s: Settings, fabric: Fabric, data: Data, newest: Path | None, identity: dict) -> Run:
    """The run at its start, or as it was at the checkpoint folder `newest`."""
    layout, divided = layout_of(s), None
    ranks = make_ranks(layout, s.checkpoint_dir, fabric.device)
    if layout.splits:
        model, adapter, divided = load_part(s, ranks, fabric.device, newest)
    else:
        model, adapter = build_model(s, fabric.device, newest)
    optimizer = place_optimizer(s, fabric, model)
    if s.compile:
        compile_blocks(model, fabric.device)
    if newest:
        load_states(s, optimizer, newest, divided)
        fabric.strategy.precision.load_state_dict(read_json(newest / "scaler.json"))
    parts = data.train, data.val, data.sources, data.info
    return Run(s, fabric, model.train(), optimizer, *parts, adapter, identity, ranks, divided)


def load_states(
    s: Settings, optimizer: torch.optim.Optimizer | InBackward, newest: Path, divided: Divided | None = None
) -> None:
    """Let an optimiser, and the weights that it trains, go on as they were at the checkpoint folder `newest`."""
    if divided:
        saving.load_states(divided, s, optimizer, newest)
    else:
        load_optimizer(optimizer, newest)
    go_on(optimizer)


def place_optimizer(s: Settings, fabric: Fabric, model: Transformer) -> torch.optim.Optimizer | InBackward:
    """The optimiser of the run where it steps: after the backward pass or in it, on the device or in host memory."""
    if s.offload == "optimizer":
        return OffloadedAdamW(model, s)
    optimizer = build_optimizer(s, model)
    if s.optimizer_in_backward:
        return StepInBackward(model, optimizer)
    # Fabric scales gradients and hands them to the optimiser: without one there is nothing to do.
    return fabric.setup_optimizers(optimizer) if OPTIMIZERS[s.optimizer].gradient == "backward" else optimizer


def open_data(s: Settings) -> Data:
    """The prepared folder of --data_dir. Raises UserError if it was made for another tokenizer."""
    info = read_data_info(s.data_dir)
    config = read_config(s.checkpoint_dir)
    if not Tokenizer(s.checkpoint_dir).fits(info):
        raise UserError(
            f"{s.data_dir} was made with another tokenizer or chat template: run prepare_data.py again with "
            f"--checkpoint_dir {s.checkpoint_dir}"
        )
    train, val = (open_samples(s.data_dir, part) for part in ("train", "val"))
    check_streaming(s, train, OBJECTIVES[s.objective](s))
    for samples in (train, val):
        samples.prepend(virtual_ids(s, config))
    if not len(train):
        raise UserError(f"{s.data_dir} has no training sample: see how prepare_data.py was run")
    return Data(info, train, val, source_names(info, train, val))


def check_model(s: Settings, data: Data) -> Transformer:
    """Refuse what cannot work before any weight is read. Returns the model to train, on the meta device.

    If --quantize names a file, `s` then has the content of that file, which is what the run stores.
    """
    config = read_config(s.checkpoint_dir)
    with torch.device("meta"):
        model = Transformer(config)
        s.quantize = read_quantization(s.quantize, model)
        if layout_of(s).splits:
            check_quantized(config, layout_of(s).tensor, s.quantize)
        if s.method != "full":
            adapter = adapter_config(s, config)
            initialization.check(s, model, adapter)
            lora.add_lora(model, adapter)
            check_beside(model, adapter)
            train_beside(model, adapter)
            note_outside_peft(model, s.method)
        else:
            train_only(model, s.train)
        check_trained(s, model)
    if s.balance_loss and not config.experts:
        raise UserError(f"--balance_loss {s.balance_loss:g}: the model in {s.checkpoint_dir} has no experts")
    if s.method == "full" and s.precision == "bf16-true" and not s.offload:  # which steps weights in fp32
        print(
            "note: small steps on bf16 weights round to nothing; --precision bf16-mixed trains fp32 weights",
            file=sys.stderr,
        )
    if unused := idle_flags(s):
        print(f"note: {', '.join(unused)} change nothing with --method {s.method}", file=sys.stderr)
    check_division(s, model)
    check_objective(s, data)
    check_forgetting(s, data)
    check_teacher(s, data)
    check_samples(s, config, [part for part in (data.train, data.val) if len(part)])
    if s.keep_best and not len(data.val):
        raise UserError(
            f"--keep_best needs validation samples, {s.data_dir} has none: see prepare_data.py --val_fraction"
        )
    return model


def check_objective(s: Settings, data: Data) -> None:
    """Raise UserError if the data are of another kind than the objective takes, or a flag belongs to another one."""
    chosen, kind = OBJECTIVES[s.objective], kind_of_samples(data.info)
    if chosen.data != kind:
        fitting = ", ".join(name for name, other in OBJECTIVES.items() if other.data == kind)
        raise UserError(f"--objective {s.objective}: {s.data_dir} holds {kind}, not {chosen.data}: try {fitting}")
    others = {flag for other in OBJECTIVES.values() for flag in other.flags} - {*chosen.flags}
    if foreign := [flag for prefix in sorted(others) for flag in s.changed(prefix)]:
        raise UserError(f"{', '.join(foreign)}: --objective {s.objective} has no use for it")
    chosen(s).check()
    changes_base = initialization.INITIALISATIONS[s.lora_init].weight is not None
    if changes_base and (chosen(s).references() or s.forgetting_source):
        raise UserError(
            f"--lora_init {s.lora_init} takes from the base, which the run is to be compared with: take another, or a "
            "--dpo_loss without a reference and no --forgetting_source"
        )


def check_trained(s: Settings, model: Transformer) -> None:
    """Raise UserError if the optimiser's flags are for other weights than those that train."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if s.lora_plus_ratio != 1 and not any(name.endswith("lora_B") for name, _ in trained):
        raise UserError(f"--lora_plus_ratio {s.lora_plus_ratio:g}: --method {s.method} trains no matrix B of LoRA")
    if s.optimizer == "apollo" and not any(is_projected(name, p, s) for name, p in trained):
        raise UserError(
            f"--optimizer apollo: no matrix that trains in the blocks has more than --apollo_rank {s.apollo_rank} rows "
            "and columns, so it would be AdamW: lower the rank, or take --method full"
        )


def note_outside_peft(model: Transformer, method: str) -> None:
    """Say so if the adapter will be of a kind as PEFT has it, but over layers where PEFT cannot have it."""
    found = lora.adapters(model)
    why = outside_peft(model.config, method, found) if all(adapter.standard for adapter in found.values()) else None
    if why:
        print(f"note: {why}: the adapter is for onetune alone, the merged model for all", file=sys.stderr)


def check_beside(model: Transformer, adapter: lora.AdapterConfig) -> None:
    """Raise UserError for what trains beside adapters that have no place for it in their folder, or trains twice."""
    if not (adapter.save or adapter.tokens):
        return
    found = lora.adapters(model)
    if not all(each.standard for each in found.values()) or outside_peft(model.config, adapter.kind, found):
        raise UserError(
            "--lora_modules_to_save and --lora_tokens need adapters that PEFT has: LoRA or DoRA as published"
        )
    if adapter.tokens and "model.embed_tokens" in adapter.save:
        raise UserError("--lora_tokens: the whole embedding trains already (--lora_modules_to_save)")
    if adapter.tokens and model.config.tie_word_embeddings and "lm_head" in found:
        raise UserError("--lora_tokens: the head is the embedding: leave lm_head out of --lora_targets")


def check_samples(s: Settings, config: Config, parts: list[Samples]) -> None:
    """Raise UserError if a sample is longer than the model's context, or has a token beyond its vocabulary."""
    longest, taken = max(part.longest_row() for part in parts), len(virtual_ids(s, config))
    if longest > config.max_position_embeddings:
        if taken:
            raise UserError(
                f"--virtual_tokens {taken} and {longest - taken} tokens of a sample in {s.data_dir} are more than the "
                f"model's context of {config.max_position_embeddings}: lower it, or run prepare_data.py with a smaller "
                "--max_seq_length"
            )
        raise UserError(
            f"{s.data_dir} has a sample of {longest} tokens, the model's context is {config.max_position_embeddings}: "
            "run prepare_data.py with a smaller --max_seq_length"
        )
    largest = max(part.shards.listing.largest_token for part in parts)
    if largest >= config.vocab_size:
        raise UserError(f"{s.data_dir} has the token {largest}, the model's vocabulary ends at {config.vocab_size - 1}")


def start_fabric(s: Settings) -> Fabric:
    """Lightning's Fabric on the devices of the run, with torch's seed set. Raises UserError if they are not there."""
    from lightning.fabric import Fabric

    check_launch(s)  # which says when srun is needed, so Fabric need not
    warnings.filterwarnings("ignore", "The `srun` command is available on your system")
    # The model is loaded in its dtype. Fabric's own "bf16-true" would cast the fp32 adapter too.
    precision = s.precision if autocast_dtype(s) else "32-true"
    try:
        several = "ddp" if layout_of(s).world_size > 1 else "auto"
        fabric = Fabric(devices=s.devices, num_nodes=s.nodes, precision=precision, strategy=several)
    except Exception as error:
        raise UserError(f"--devices {s.devices}: {error}") from None
    fabric.launch()
    if fabric.device.type == "cpu":
        keep_freed_memory()  # from here on the peak follows from the sizes of the tensors
        share_cores()
    if s.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA is first used
        torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(s.seed)
    return fabric


def adapt(s: Settings, model: Transformer) -> None:
    """Put the adapter that the flags describe over a loaded model, as it starts."""
    initialization.put_over(s, model, adapter_config(s, model.config))


def build_model(
    s: Settings, device: torch.device, newest: Path | None
) -> tuple[Transformer, lora.AdapterConfig | None]:
    """The model to train, from the checkpoint `newest` if there is one, and its AdapterConfig (None for "full")."""
    dtype = DTYPES[s.precision]
    if s.method == "full":
        model = load_model(newest or s.checkpoint_dir, dtype, device)
        train_only(model, s.train)
        return model, None
    config = read_config(s.checkpoint_dir)
    adapter = adapter_config(s, config)
    quantize = base_quantization(s, adapter, config)
    if not newest:
        return initialization.start(s, adapter, dtype, device, quantize)
    model = load_model(s.checkpoint_dir, dtype, device, quantize, adapter_dir=newest)
    if "lora_init" not in lora.ADAPTERS[s.method].flags:
        return model, adapter
    # Starts may have shared out the ranks, and modules and tokens beside the adapters have their values there.
    stored = peft_format.read_for(model, newest, peft_format.is_on_residual(newest))
    train_beside(model, stored.config, stored.replaced)
    return model, stored.config


def compile_blocks(model: Transformer, device: torch.device) -> None:
    """Let torch.compile fuse the small operations of a block: one graph for all blocks and all lengths."""
    compiler = "triton" if device.type == "cuda" else os.environ.get("CXX", "g++")
    if not (importlib.util.find_spec(compiler) if device.type == "cuda" else shutil.which(compiler)):
        print(f"note: --compile needs {compiler}, which is not installed: going on without", file=sys.stderr)
        return
    if not all(adapter.compiles for adapter in lora.adapters(model).values()):
        print("note: --compile: torch cannot compile blocks with these adapters: going on without", file=sys.stderr)
        return
    for eager in (Attend, Experts):  # not where they are defined: that takes a second to import
        eager.__call__ = torch.compiler.disable(eager.__call__)
    for block in model.model.layers:
        block.compile(dynamic=True)
