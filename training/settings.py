"""The command line of finetune.py: every flag with its default, and what is refused before anything is loaded."""

import dataclasses
import math
import time
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

from shell import cli
from shell.cli import UserError
from store.publish import check_address, check_place
from training.parallel.layout import check_layout

# --beta1 and --beta2 of an optimiser where they are not AdamW's 0.9 and 0.999; None: it has no such average.
BETAS = {
    "lion": (0.9, 0.99), "lion-8bit": (0.9, 0.99), "sgd": (0.9, None), "adafactor": (None, None), "mezo": (None, None),
}  # fmt: skip
# What an optimiser needs: a flag, its value, and why.
NEEDS = {
    "schedule-free": [("schedule", "constant", "it averages the weights, and the rate does not fall")],
    "mezo": [
        ("recompute", 0, "it has no backward pass, and keeps no activations"),
        ("optimizer_in_backward", False, "it has no backward pass"),
    ],
}
Trackers = Literal[cli.table_keys("tracking/trackers.py", "TRACKERS")]


@dataclass
class Settings:
    """The command line.

    Args:
        checkpoint_dir: Model folder: config.json, *.safetensors, tokenizer files.
        data_dir: Folder made by prepare_data.py.
        out_dir: Folder for everything the run writes.
        method: The adapter to train, or "full" to train all weights.
        quantize: Keep the frozen base weights in 4 or 8 bits (QLoRA), or each layer as in a file written by
            eval/quality.py --sensitivity; the run stores the content of that file.
        precision: Dtype of the weights ("true"), or of the matrix products over fp32 weights ("mixed").
        lora_r: Rank of the adapter.
        lora_alpha: Scale of the adapter; its product is multiplied by alpha / r.
        lora_dropout: Share of the adapter's inputs set to zero in training.
        lora_targets: Projections that get an adapter; gate_proj, up_proj and down_proj are also those of every expert.
            A name of the model's family, such as query_key_value, is all projections in it. "all-linear" is all layers
            but the head, experts included; any other text is a regular expression for the whole names of layers.
            By default all projections, but in a mixture of experts attention's alone.
        lora_layers: Numbers of the blocks that get adapters, such as [0,1,5]; by default all.
        lora_rank_pattern: Other ranks for some layers, such as {down_proj: 8}; keys are ends of names, or regular
            expressions for them.
        lora_alpha_pattern: Other alphas for some layers, in the same way.
        lora_modules_to_save: Modules that train whole beside the adapters, in fp32, such as [embed_tokens,lm_head] or
            [input_layernorm]; ends of names, which may be of all that is in a module.
        lora_tokens: Tokens whose rows of the embedding train, as texts of added tokens or as ids, such as
            ["<|tool|>",32000]; a head that is the embedding follows.
        lora_rslora: Multiply by alpha / sqrt(r) instead.
        virtual_tokens: Trained tokens before every text with the methods prompt and prefix, which take room in the
            model's context; with llama-adapter and -v2 the length of the prompt that each adapted layer attends to.
        adapter_layers: With llama-adapter and -v2, how many of the last layers have a prompt; by default all but two.
        train: With "full", train only the parameters with such names, for example "layers.30.*" or "*norm*": patterns
            as in a shell, or regular expressions, for the whole name or all from one of its dots on.
        lora_init: How the adapter starts (training/initialization.py): A at random and B zero ("default", "gaussian"),
            by the base's weights, or by the activations of training batches ("eva").
        lora_init_iterations: With pissa: a fast SVD of so many iterations (16 is usual) in place of the exact one. With
            loftq: how often it quantises and decomposes (1 by default).
        lora_eva_rho: With eva: no layer gets more than this times its rank; 2 by default, at 1 all keep theirs.
        global_batch_size: Samples in an optimiser step, over all micro-batches and devices.
        micro_batch_tokens: Tokens in a micro-batch, padding included: memory against speed. Without dropout the
            gradient is the same up to rounding; fixed for a run.
            "auto" takes the most that fits in memory_budget.
        planner: How the samples of a step are cut into micro-batches (batching.py).
        shuffle_window: Shards of the data that are shuffled together; 0 for all. With fewer, a run reads a few at a
            time: for data that are streamed and larger than data_cache.
        data_cache: Disk space for the shards of data that are streamed from an address, such as 50GB.
        epochs: Passes over the data, unless max_steps is given.
        max_steps: Optimiser steps.
        time_budget: End after this wall-clock time, such as 24h, 90m or 3600s, with the schedule complete and final/
            written; earlier if epochs or max_steps are reached. Counts from the start, loading and saving included.
        optimizer: AdamW: fused, with 8-bit states, or with states paged out of GPU memory (bitsandbytes); or another
            of docs/optimizers.md, which has the rate that suits each. "mezo" needs no backward pass.
        learning_rate: The highest learning rate; for AdamW 2e-4 suits adapters, 2e-5 all weights.
        lora_plus_ratio: LoRA+: the learning rate of B (and of DoRA's magnitudes) is this times that of A.
        apollo_rank: APOLLO's moments are of a projection of the gradient to this rank.
        apollo_scale: APOLLO's updates of projected matrices are multiplied by this.
        mezo_epsilon: How far MeZO moves the weights to see what becomes of the loss.
        schedule: How the rate falls to zero after the warm-up; "constant" keeps it.
        warmup_steps: Steps over which the rate rises.
        weight_decay: Decay of matrices (not of norms and biases).
        objective: What a step minimises (objectives.py): "sft", the loss of the target tokens; "distill", that and the
            distance from what a teacher finds likely there; "dpo", preferences, of data that prepare_data.py made of
            pairs (prompt, chosen, rejected).
        teacher_dir: Of "distill", the folder of the model to learn from, with the same tokenizer. It reads the data
            once, before the first step; what it finds is kept in data_dir.
        teacher_quantize: Keep the teacher's weights in 4 or 8 bits while it reads.
        teacher_top_k: How many of its likeliest tokens are kept for each target, 8 bytes each; all others count as one.
        teacher_temperature: Both distributions are compared at this temperature.
        teacher_weight: The share of the distance from the teacher in the loss; the rest is the loss of the target.
        dpo_loss: Of "dpo": DPO's own ("sigmoid") and IPO compare with the base, whose log-probabilities are computed
            once and kept in data_dir; SimPO and ORPO do not.
        dpo_beta: How much a pair's log-probabilities count: 0.1 is usual, for SimPO 2. For IPO the inverse of twice the
            margin to reach, for ORPO the weight of its odds ratio.
        simpo_gamma: The margin that SimPO wants to reach.
        label_smoothing: Of "sft", the share of the wanted probability that all tokens have alike; of "dpo" (sigmoid,
            simpo), the share of the pairs that are taken to be the wrong way round. metrics.csv has the loss of "sft"
            without it.
        balance_loss: In a mixture of experts, train the loss plus this times how unevenly tokens go to experts
            (experts.balance_loss, over the tokens of a micro-batch up to a row's last target); 0.001 to 0.01 is usual.
            metrics.csv has the loss without it.
        z_loss: Train the loss plus this times the square of log sum exp(logits) of each target, which keeps logits near
            0 (PaLM, arXiv 2204.02311, section 5, has 1e-4). metrics.csv has the loss without it.
        neftune_alpha: In training add uniform noise to embedded tokens, of up to this over sqrt(L D), for a sample of L
            tokens and an embedding of size D (NEFTune, arXiv 2310.05914, has 5 to 15); 0 for none.
        beta1: Decay of the first moment, SGD's momentum: 0.9 where the optimiser has one.
        beta2: Decay of the second moment, 0.999, or of Lion's one, 0.99, where the optimiser has one.
        max_grad_norm: Clip the gradient to this norm; 0 for no clipping.
        recompute: Share of the blocks with activation checkpointing: less memory, at 1 a third more time.
            "offload": all blocks, and their inputs wait in host memory, for long contexts on a GPU; MLPs run over
            chunks of positions.
        compile: Let torch.compile fuse the small operations of a block; takes a while at the start of a run.
        optimizer_in_backward: With "full", update each weight as soon as its gradient is computed, and free the
            gradient: none are kept in memory, but a step must fit in one micro-batch, and there is no clipping.
        offload: With "full", keep fp32 weights and AdamW's moments in host memory ("optimizer"), where the CPU steps
            them; gradients are copied there as they come. With max_grad_norm 0 weights step in the backward pass.
        forgetting_source: A source of the data, such as general text that is replayed by its weight in the mixture: at
            each validation its validation samples tell how far the adapter has taken the model from its base
            (column "forgetting": KL(base | model) for each target, in nats).
        eval_interval: Validate every so many steps, and at the end; 0 for never.
        logger: Where the run can be watched beside metrics.csv ("csv"), one or several: "tensorboard", "mlflow",
            "wandb". A process of its own sends it there, so that a tracker can neither slow nor stop the run
            (docs/tracking.md).
        log_adapter: Send final/ to these trackers too.
        save_interval: Write a checkpoint every so many steps; 0 for only when a signal stops the run.
        keep_last: How many of the newest checkpoints to keep; 0 for all.
        keep_best: Keep the checkpoint with the lowest validation loss too.
        seed: Seed of the adapter's initial weights, the order of the data and dropout.
        deterministic: On a GPU, use only algorithms that give the same bits every time; a CPU always does.
        sweep: Train the variants that this YAML file names together over one base, each in a folder of its name in
            out_dir (training/sweep/variants.py says what the file has); micro_batch_tokens is of all of them together.
        publish: At the end publish final/ at this address of a model store, such as s3://bucket/adapters/NAME, where
            other machines find it (docs/store.md).
        resume: Continue the run in out_dir from its newest checkpoint, or start it if there is none.
        replay: Run the step stored in a bad_batch.safetensors again, and print where its numbers go wrong.
        devices: How many GPUs (or CPU processes) of each node share each step.
        nodes: How many machines, each with so many devices; started by torchrun or srun (docs/devices.md).
        parallel: How the devices are divided, such as "data=2,tensor=2": along data they have different samples, along
            tensor each has a part of every layer, along pipeline some of the layers. By default all along data.
        shard: Divide weights, gradients and the optimiser's states among the devices along data (FSDP2).
        plan: Predict memory, FLOPs and time from config.json and the data alone, print them, and stop.
        plan_tflops: The speed of a device that the plan's time assumes, in TFLOP/s; measured if not given.
        plan_link: The speed at which a device sends to others that the plan assumes, in GB/s: 25 is about PCIe 4.0 x16;
            NVLink between H100s has 450.
        memory_budget: Memory that a device may use, such as 24GB, for plan and for micro_batch_tokens auto; by default
            what is free.
    """

    checkpoint_dir: Path
    data_dir: Path
    out_dir: Path = Path("out/finetune")
    method: Literal[(*cli.table_keys("lora.py", "ADAPTERS"), "full")] = "lora"
    quantize: Literal[cli.table_keys("quantize.py", "QUANTIZERS")] | cli.JsonFile | dict[str, str] | None = None
    precision: Literal["32-true", "bf16-true", "bf16-mixed", "16-mixed"] = "bf16-true"
    lora_r: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    lora_targets: list[str] | str | None = None
    lora_layers: list[int] | None = None
    lora_rank_pattern: dict[str, int] | None = None
    lora_alpha_pattern: dict[str, float] | None = None
    lora_modules_to_save: list[str] | None = None
    lora_tokens: list[int | str] | None = None
    lora_rslora: bool = False
    lora_init: Literal[cli.table_keys("training/initialization.py", "INITIALISATIONS")] = "default"
    lora_init_iterations: int | None = None
    lora_eva_rho: float | None = None
    virtual_tokens: int = 20
    adapter_layers: int | None = None
    train: list[str] | str | None = None
    global_batch_size: int = 32
    micro_batch_tokens: int | Literal["auto"] = 2048
    planner: Literal[cli.table_keys("batching.py", "PLANNERS")] = "packed"
    shuffle_window: int = 0
    data_cache: str = "50GB"
    epochs: float = 1.0
    max_steps: int | None = None
    time_budget: str | None = None
    optimizer: Literal[cli.table_keys("training/optimizer.py", "OPTIMIZERS")] = "adamw"
    learning_rate: float = 2e-4
    lora_plus_ratio: float = 1.0
    apollo_rank: int = 256
    apollo_scale: float = 1.0
    mezo_epsilon: float = 1e-3
    schedule: Literal[cli.table_keys("training/schedule.py", "SCHEDULES")] = "cosine"
    warmup_steps: int = 10
    weight_decay: float = 0.0
    objective: Literal[cli.table_keys("objectives.py", "OBJECTIVES")] = "sft"
    teacher_dir: Path | None = None
    teacher_quantize: Literal[cli.table_keys("quantize.py", "QUANTIZERS")] | None = None
    teacher_top_k: int = 32
    teacher_temperature: float = 1.0
    teacher_weight: float = 0.5
    dpo_loss: Literal[cli.table_keys("objectives.py", "PREFERENCE_LOSSES")] = "sigmoid"
    dpo_beta: float = 0.1
    simpo_gamma: float = 0.5
    label_smoothing: float = 0.0
    balance_loss: float = 0.0
    z_loss: float = 0.0
    neftune_alpha: float = 0.0
    beta1: float | None = None
    beta2: float | None = None
    max_grad_norm: float = 1.0
    recompute: float | Literal["offload"] = 0.0
    compile: bool = False
    optimizer_in_backward: bool = False
    offload: Literal["optimizer"] | None = None
    forgetting_source: str | None = None
    eval_interval: int = 100
    logger: Trackers | list[Trackers] = "csv"
    log_adapter: bool = False
    save_interval: int = 100
    keep_last: int = 2
    keep_best: bool = False
    seed: int = 1337
    deterministic: bool = False
    sweep: Path | None = None
    publish: str | None = None
    resume: bool = False
    replay: Path | None = None
    devices: int = 1
    nodes: int = 1
    parallel: str | None = None
    shard: bool = False
    plan: bool = False
    plan_tflops: float | None = None
    plan_link: float = 25.0
    memory_budget: str | None = None

    def __post_init__(self):
        self.started = time.monotonic()  # for time_budget: before the imports, which take a while
        self._check_optimizer()
        self._check_trackers()
        self._check_ranges()
        self._check_checkpoints()
        self._check_optimizer_in_backward()
        self._check_offload()
        check_layout(self)
        if self.method == "full" and self.quantize:
            raise UserError(
                "--quantize needs --method lora or another adapter, not full: quantised weights cannot train"
            )
        if isinstance(self.train, str):
            self.train = [self.train] if self.train else []
        if self.train is not None and (self.method != "full" or not self.train):
            given = f"not {self.method}, which has parameters of its own" if self.train else "and a pattern"
            raise UserError(f"--train needs --method full, {given}")
        self._check_publish()
        if self.time_budget is not None:
            cli.number_of_seconds(self.time_budget, "time_budget")
        cli.check_numbers(self, "shuffle_window", least=0)
        cli.number_of_bytes(self.data_cache, "data_cache")
        if self.memory_budget is not None:
            cli.number_of_bytes(self.memory_budget, "memory_budget")
            if not self.plan and self.micro_batch_tokens != "auto":
                raise UserError(f"--memory_budget {self.memory_budget} needs --plan or --micro_batch_tokens auto")
        if self.plan_tflops is not None and not self.plan:
            raise UserError(f"--plan_tflops {self.plan_tflops:g} needs --plan")
        if self.plan_link != 25 and not self.plan:
            raise UserError(f"--plan_link {self.plan_link:g} needs --plan")
        if self.micro_batch_tokens == "auto" and self.devices > 1 and not (self.memory_budget or self.plan):
            raise UserError(
                "--micro_batch_tokens auto needs --memory_budget with several --devices: each would find another "
                "amount of memory free, and all must cut a step in the same way"
            )

    @property
    def usual_betas(self) -> tuple[float | None, float | None]:
        """What --beta1 and --beta2 are where they are not given; None where the optimiser has no such average."""
        return BETAS.get(self.optimizer, (0.9, 0.999))

    @property
    def betas(self) -> tuple[float | None, float | None]:
        """--beta1 and --beta2, or what is usual for the optimiser."""
        given = (self.beta1, self.beta2)
        return tuple(usual if own is None else own for own, usual in zip(given, self.usual_betas, strict=True))

    def changed(self, prefix: str) -> list[str]:
        """The flags that begin so and have another value than their default, such as --lora_r."""
        flags = [flag for flag in dataclasses.fields(self) if flag.name.startswith(prefix)]
        defaults = [flag.default if flag.default_factory is MISSING else flag.default_factory() for flag in flags]
        return [f"--{f.name}" for f, default in zip(flags, defaults, strict=True) if getattr(self, f.name) != default]

    def _check_ranges(self):
        above_zero = ("lora_r", "lora_alpha", "global_batch_size", "micro_batch_tokens", "epochs", "learning_rate")
        more = (
            "teacher_top_k",
            "teacher_temperature",
            "lora_plus_ratio",
            "apollo_rank",
            "apollo_scale",
            "mezo_epsilon",
            "devices",
            "nodes",
            "plan_tflops",
            "plan_link",
            "dpo_beta",
        )
        cli.check_numbers(self, *above_zero, *more, "virtual_tokens", "adapter_layers", above=0)
        if self.max_steps is not None and self.max_steps < 1:
            raise UserError(f"--max_steps {self.max_steps}: must be above 0, or left out to use --epochs")
        zero_or_above = ("warmup_steps", "weight_decay", "max_grad_norm", "eval_interval", "save_interval", "keep_last")
        zero_or_above += ("seed", "balance_loss", "z_loss", "simpo_gamma", "neftune_alpha")
        cli.check_numbers(self, *zero_or_above, least=0)
        cli.check_numbers(self, "lora_dropout", "beta1", "beta2", "label_smoothing", least=0, below=1)
        cli.check_numbers(self, "recompute", least=0, most=1)
        cli.check_numbers(self, "teacher_weight", above=0, most=1)
        self._check_layers()
        self._check_init()

    def _check_trackers(self):
        self.logger = self.logger if isinstance(self.logger, list) else [self.logger]
        for name in self.logger:
            if name != "csv":
                cli.check_installed(name, where=f"--logger {name}")
        if self.log_adapter and not set(self.logger) - {"csv"}:
            raise UserError("--log_adapter needs a --logger to send the adapter to, such as mlflow or wandb")

    def _check_init(self):
        cli.check_numbers(self, "lora_init_iterations", above=0)
        cli.check_numbers(self, "lora_eva_rho", least=1, below=math.inf)
        if self.lora_init_iterations is not None and self.lora_init not in ("pissa", "loftq"):
            raise UserError(f"--lora_init_iterations goes with --lora_init pissa or loftq, not {self.lora_init}")
        if self.lora_eva_rho is not None and self.lora_init != "eva":
            raise UserError(f"--lora_eva_rho goes with --lora_init eva, not {self.lora_init}")
        if self.lora_init == "loftq" and self.quantize in (None, "none"):
            raise UserError("--lora_init loftq needs --quantize: it makes up for what that loses")

    def _check_publish(self):
        if self.publish is not None:
            check_place(check_address(self.publish, "publish"), self.out_dir / "final")
            if self.sweep is not None:
                raise UserError(
                    "--publish is of one run: publish those of a --sweep with python store/models.py --push"
                )

    def _check_layers(self):
        if self.lora_targets in ([], ""):
            raise UserError("--lora_targets is empty: name at least one projection, such as [q_proj,v_proj]")
        for flag, such in (("lora_layers", "[0,1]"), ("lora_modules_to_save", "[lm_head]"), ("lora_tokens", "[3,7]")):
            if getattr(self, flag) == []:
                raise UserError(f"--{flag} is empty: give at least one, such as {such}")
        cli.check_numbers(self, "lora_layers", least=0)
        for flag in ("lora_rank_pattern", "lora_alpha_pattern"):
            for key, value in (getattr(self, flag) or {}).items():
                if not value > 0:
                    raise UserError(f"--{flag}: {key} has {value}: must be above 0")

    def _check_optimizer(self):
        """Refuse what the optimiser has no use for."""
        for name, usual in zip(("beta1", "beta2"), self.usual_betas, strict=True):
            if usual is None and getattr(self, name) is not None:
                raise UserError(f"--{name} {getattr(self, name):g}: --optimizer {self.optimizer} has no {name}")
        for optimizer in ("apollo", "mezo"):
            if self.optimizer != optimizer and (unused := self.changed(f"{optimizer}_")):
                raise UserError(f"{unused[0]} needs --optimizer {optimizer}, not {self.optimizer}")
        for name, value, why in NEEDS.get(self.optimizer, ()):
            if getattr(self, name) != value:
                raise UserError(f"--optimizer {self.optimizer} needs --{name} {str(value).lower()}: {why}")
        if self.optimizer == "schedule-free" and self.beta1 == 0:
            raise UserError("--optimizer schedule-free needs --beta1 above 0: its gradients are taken at the average")
        if self.optimizer == "mezo":
            self._check_mezo()

    def _check_mezo(self):
        if self.precision == "16-mixed":
            raise UserError("--optimizer mezo needs another --precision: 16-mixed scales gradients, and it has none")
        if self.method == "full" and self.precision == "bf16-true":
            raise UserError(
                "--optimizer mezo needs --precision bf16-mixed or 32-true with --method full: its steps, and what it "
                "moves the weights by and back, would round to nothing or to too much in bf16"
            )

    def _check_checkpoints(self):
        if self.keep_best and not (self.eval_interval and self.save_interval and self.keep_last):
            raise UserError("--keep_best needs --eval_interval, --save_interval and --keep_last above 0")
        if self.keep_best and self.save_interval % self.eval_interval:
            raise UserError(
                f"--keep_best needs a validation at each checkpoint: --save_interval {self.save_interval} is not "
                f"a multiple of --eval_interval {self.eval_interval}"
            )

    def _check_optimizer_in_backward(self):
        if not self.optimizer_in_backward:
            return
        for name, value in (("method", "full"), ("max_grad_norm", 0), ("devices", 1)):
            if getattr(self, name) != value:
                raise UserError(f"--optimizer_in_backward needs --{name} {value}, not {getattr(self, name)}")
        if self.precision == "16-mixed":
            raise UserError("--optimizer_in_backward needs another --precision: 16-mixed scales its gradients")

    def _check_offload(self):
        if self.recompute == "offload" and self.compile:
            raise UserError("--recompute offload needs --compile false: it runs a block's MLP in chunks")
        if not self.offload:
            return
        needs = (("method", "full"), ("optimizer", "adamw"), ("optimizer_in_backward", False), ("devices", 1))
        for name, value in needs:
            if getattr(self, name) != value:
                given = str(getattr(self, name))
                raise UserError(f"--offload optimizer needs --{name} {str(value).lower()}, not {given.lower()}")
        if self.precision == "16-mixed":
            raise UserError("--offload optimizer needs another --precision: 16-mixed scales its gradients")
