"""The codebases that bench/training/speed.py measures, each run under an interpreter that has it installed.

Imports nothing of the project but bench/measuring.py, and each peer only in its own function. A job says what to train
on what, token ids included, so that no side tokenises. A function `train_...` trains as the peer's own users do and
returns the loss of every step; a `Clock` measures from inside the optimiser, alike for every side.

To add a peer: a function like `train_peft` and a line in `PEERS`.
"""

import contextlib
import json
import math
import statistics
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

from bench.measuring import Unavailable, cpu_times, device_name, installed_versions, others_share, peak_memory

SKIP = 2  # steps of a run that do not count: caches, allocators and kernels warm up
SEED = 1337

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
LORA_QV = {"r": 8, "alpha": 16, "targets": ["q_proj", "v_proj"]}
LORA_ALL = {"r": 16, "alpha": 32, "targets": list(ALL)}

# What is trained: the adapter (None for all weights), whether over a base in NF4, and AdamW's learning rate.
Mode = namedtuple("Mode", "lora quantize learning_rate")
MODES = {
    "lora-qv": Mode(LORA_QV, False, 2e-4),
    "lora-all": Mode(LORA_ALL, False, 2e-4),
    "qlora-qv": Mode(LORA_QV, True, 2e-4),
    "qlora-all": Mode(LORA_ALL, True, 2e-4),
    "full": Mode(None, False, 2e-5),
}


# ------------------------------------------------------------------------------------------------------ measuring


class Done(Exception):
    """Raised out of a peer's training loop after the last step: what it would save or validate then is not measured."""


class Clock:
    """Measures at each optimiser step: the gradient's norm before it; time, CPU use and memory after it.

    stop: raise `Done` after so many steps, for a peer that would not end by itself.
    """

    def __init__(self):
        from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

        self.times, self.norms, self.peak, self.stop = [], [], 0, math.inf
        register_optimizer_step_pre_hook(self.before_step)
        register_optimizer_step_post_hook(self.after_step)

    def before_step(self, optimizer, *_) -> None:
        """Record the norm of the gradient. In the first steps only: it takes time, and they do not count."""
        import torch

        if len(self.times) < SKIP:
            grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            self.norms.append(torch.nn.utils.get_total_norm(grads).item())

    def after_step(self, *_) -> None:
        """Record time and memory when the step has been computed."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(cpu_times())
        self.peak = peak_memory()
        if len(self.times) == self.stop:
            raise Done


def measure(job: dict, train: Callable[[dict, Clock], list[float]]) -> dict:
    """Run `train(job, clock)`, which returns the loss of each step, and describe the run for its JSON line.

    Tokens are positions that predict a next one: a sample has one less than it has ids, and padding has none.
    """
    clock = Clock()
    losses = train(job, clock)
    tokens = [sum(len(sample["ids"]) - 1 for sample in step) for step in job["steps"]]
    if not len(clock.times) == len(losses) == len(tokens):
        raise RuntimeError(f"{len(tokens)} steps were asked for, {len(clock.times)} done, {len(losses)} losses logged")
    ends = [times[0] for times in clock.times]
    seconds = [end - start for start, end in zip(ends, ends[1:], strict=False)]  # of every step but the first
    rates = [count / duration for count, duration in zip(tokens[1:], seconds, strict=True)]
    return {
        "tokens_per_second": statistics.median(rates[SKIP - 1 :]),
        "peak_gb": clock.peak / 1e9,
        "first_step_seconds": ends[0] - job["started"],
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "grad_norm": clock.norms[0],
        "others_cpu": others_share(clock.times[SKIP - 1], clock.times[-1]),
        "step_seconds": [round(duration, 4) for duration in seconds],
        "step_tokens": tokens,
        "versions": installed_versions(),
    }


def measure_peer(job: dict) -> dict:
    """One run of the peer job["side"], in its own process."""
    return measure(job, PEERS[job["side"]].train)


# ---------------------------------------------------------------------------------------- what the peers share


def torch_dtype(job: dict):
    """The torch.dtype of the weights."""
    import torch

    return {"bf16": torch.bfloat16, "fp32": torch.float32}[job["dtype"]]


def all_samples(job: dict) -> list[dict]:
    """The samples of all steps, in order."""
    return [sample for step in job["steps"] for sample in step]


def optimizer_options(job: dict) -> dict:
    """AdamW's options, for every side."""
    return {"lr": job["learning_rate"], "betas": (0.9, 0.999), "weight_decay": 0.0, "fused": True}


def transformers_model(job: dict):
    """transformers' model of job["checkpoint_dir"] in job["dtype"], its base in NF4 if job["quantize"]."""
    from transformers import AutoModelForCausalLM

    options = {"dtype": torch_dtype(job), "device_map": device_name()}
    if job["quantize"]:
        options["quantization_config"] = nf4_config(job)
    return AutoModelForCausalLM.from_pretrained(job["checkpoint_dir"], **options)


def nf4_config(job: dict):
    """transformers' options for NF4 layers that compute in the dtype of the weights."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch_dtype(job))


def peft_config(lora: dict):
    """PEFT's LoraConfig of an entry of `MODES`."""
    from peft import LoraConfig

    return LoraConfig(
        r=lora["r"], lora_alpha=lora["alpha"], lora_dropout=0.0, target_modules=lora["targets"], task_type="CAUSAL_LM"
    )


# ------------------------------------------------------------------------------------------ transformers and PEFT


def peft_model(job: dict):
    """The model in training mode: all its weights trainable, or an adapter of PEFT's over it.

    `prepare_model_for_kbit_training` is left out: it would make embedding, head and norms fp32, which costs PEFT both
    speed and memory.
    """
    import torch
    from peft import get_peft_model

    model = transformers_model(job)
    torch.manual_seed(SEED)
    if job["lora"]:
        model = get_peft_model(model, peft_config(job["lora"]))
    return model.train()


def padded(samples: list[dict], key: str, fill: int):
    """One field of the samples as a tensor (B, T), padded on the right."""
    import torch

    rows = [torch.tensor(sample[key]) for sample in samples]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill).to(device_name())


def train_peft(job: dict, clock: Clock) -> list[float]:
    """A plain loop over transformers' model and loss."""
    import torch

    model = peft_model(job)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, **optimizer_options(job))
    losses, size = [], job["micro_batch"]
    for samples in job["steps"]:
        targets = sum(label != -100 for sample in samples for label in sample["labels"])
        total = torch.zeros((), device=device_name())
        for micro_batch in (samples[i : i + size] for i in range(0, len(samples), size)):
            loss = model(
                input_ids=padded(micro_batch, "ids", 0),
                attention_mask=padded([{"mask": [1] * len(sample["ids"])} for sample in micro_batch], "mask", 0),
                labels=padded(micro_batch, "labels", -100),
                num_items_in_batch=targets,
            ).loss
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
    return losses


def train_trl(job: dict, clock: Clock) -> list[float]:
    """TRL's SFTTrainer. Its own defaults but for gradient checkpointing, which nobody uses here."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model_options = {"dtype": torch_dtype(job)}
    if job["quantize"]:
        model_options["quantization_config"] = nf4_config(job)
    config = SFTConfig(
        output_dir=job["work_dir"],
        model_init_kwargs=model_options,
        use_cpu=device_name() == "cpu",
        bf16=job["dtype"] == "bf16",
        max_length=None,
        max_steps=len(job["steps"]),
        per_device_train_batch_size=job["micro_batch"],
        gradient_accumulation_steps=len(job["steps"][0]) // job["micro_batch"],
        train_sampling_strategy="sequential",
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=0.0,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=SEED,
    )
    rows = [{"input_ids": sample["ids"], "labels": sample["labels"]} for sample in all_samples(job)]
    trainer = SFTTrainer(
        job["checkpoint_dir"],
        args=config,
        train_dataset=Dataset.from_list(rows),
        peft_config=peft_config(job["lora"]) if job["lora"] else None,
    )
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


# --------------------------------------------------------------------------------------------------------- LitGPT


def litgpt_checkpoint(job: dict) -> Path:
    """LitGPT's version of the model folder, made on first use by its own conversion. Its name must be one it knows."""
    source = Path(job["checkpoint_dir"])
    folder = Path(job["cache_dir"], "litgpt-checkpoints", source.name)
    if not (folder / "lit_model.pth").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        for file in source.iterdir():
            if not (folder / file.name).exists():
                (folder / file.name).symlink_to(file.resolve())
        command = [sys.executable, "-m", "litgpt", "convert_to_litgpt", str(folder), "--model_name", source.name]
        if subprocess.run(command).returncode:
            raise Unavailable(f"it could not convert a model called {source.name}")
    return folder


def litgpt_data(job: dict):
    """The samples as one of LitGPT's data modules: in order, with its own padding."""
    import torch
    from litgpt.data import DataModule, get_sft_collate_fn
    from torch.utils.data import DataLoader

    def row(sample):
        counts = {"raw": len(sample["ids"]), "raw_plus_prompt_template": len(sample["ids"])}
        ids, labels = torch.tensor(sample["ids"]), torch.tensor(sample["labels"])
        return {"input_ids": ids, "labels": labels, "token_counts": counts}

    class Prepared(DataModule):
        def connect(self, tokenizer=None, batch_size=1, max_seq_length=None):
            pass

        def loader(self, samples):
            return DataLoader([row(s) for s in samples], job["micro_batch"], collate_fn=get_sft_collate_fn())

        def train_dataloader(self):
            return self.loader(all_samples(job))

        def val_dataloader(self):  # one sample, for the check that LitGPT does before it trains
            return self.loader(all_samples(job)[:1])

    return Prepared()


def train_litgpt(job: dict, clock: Clock) -> list[float]:
    """The functions behind `litgpt finetune_lora` and `litgpt finetune_full`."""
    from litgpt.args import EvalArgs, TrainArgs
    from torch.optim.lr_scheduler import LambdaLR

    lora = job["lora"]
    if lora:
        from litgpt.finetune import lora as recipe
    else:
        from litgpt.finetune import full as recipe
    recipe.get_lr_scheduler = lambda optimizer, **_: LambdaLR(optimizer, lambda step: 1.0)  # its own starts at zero
    losses = record_losses(recipe)
    options = {}
    if lora:
        parts = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "projection": "o_proj", "mlp": "up_proj"}
        options = {f"lora_{part}": target in lora["targets"] for part, target in parts.items()}
        options |= {"lora_r": lora["r"], "lora_alpha": lora["alpha"], "lora_dropout": 0.0}
    if job["quantize"]:
        options["quantize"] = "bnb.nf4"
    steps, clock.stop = len(job["steps"]), len(job["steps"])
    started = time.time()
    checkpoint_dir = litgpt_checkpoint(job)
    job["started"] += time.time() - started  # converted once, so it is no part of a run
    train = TrainArgs(
        save_interval=None, global_batch_size=len(job["steps"][0]), micro_batch_size=job["micro_batch"],
        lr_warmup_steps=0, epochs=2, max_steps=steps,
    )  # fmt: skip
    with contextlib.suppress(Done):
        recipe.setup(
            checkpoint_dir, out_dir=Path(job["work_dir"], "out"), devices=1, seed=SEED,
            precision={"bf16": "bf16-true", "fp32": "32-true"}[job["dtype"]],
            data=litgpt_data(job), train=train, eval=EvalArgs(interval=10**6, max_new_tokens=1, final_validation=False),
            optimizer={"class_path": "torch.optim.AdamW", "init_args": optimizer_options(job)}, **options,
        )  # fmt: skip
    per_step = len(losses) // steps
    parts = [losses[i : i + per_step] for i in range(0, len(losses), per_step)]
    return [(sum(total for total, _ in part) / sum(count for _, count in part)).item() for part in parts]


def record_losses(recipe) -> list:
    """A list that fills with (summed loss, target tokens) of each micro-batch: LitGPT itself logs a mean of means."""
    import torch

    losses, original = [], recipe.chunked_cross_entropy

    def recording(logits, targets, **options):
        loss = original(logits, targets, **options)
        if torch.is_grad_enabled():
            count = (targets != -100).sum()
            losses.append((loss.detach() * count, count))
        return loss

    recipe.chunked_cross_entropy = recording
    return losses


# ------------------------------------------------------------------------------------------------------ torchtune


class TorchtuneSamples:
    """The samples in torchtune's form. It finds this class and the two below by their names in its configuration."""

    def __init__(self, tokenizer, path):
        self.samples = all_samples(json.loads(Path(path).read_text()))

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return {"tokens": self.samples[index]["ids"], "labels": self.samples[index]["labels"]}


class TorchtuneTokenizer:
    """Stands for a tokenizer: torchtune needs no more of one if the samples are token ids."""

    pad_id = 0


class TorchtuneLog:
    """A metric logger that keeps the losses and ends the run after the last one."""

    losses = []

    def __init__(self, steps):
        self.steps = steps

    def log_config(self, config) -> None:
        """Keep nothing of it."""

    def log_dict(self, payload: dict, step: int) -> None:
        """Keep the loss of a step."""
        self.losses.append(float(payload["loss"]))
        if len(self.losses) == self.steps:
            raise Done


def torchtune_model(job: dict) -> dict:
    """The part of torchtune's configuration that describes the model: a Llama with the sizes in config.json."""
    config = json.loads(Path(job["checkpoint_dir"], "config.json").read_text())
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if config["model_type"] != "llama" or rope.get("rope_type", "default") != "default":
        raise NotImplementedError("written for Llamas with plain RoPE only")
    model = {
        "vocab_size": config["vocab_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "num_kv_heads": config["num_key_value_heads"],
        "embed_dim": config["hidden_size"],
        "intermediate_dim": config["intermediate_size"],
        "max_seq_len": config["max_position_embeddings"],
        "norm_eps": config["rms_norm_eps"],
        "rope_base": int(rope.get("rope_theta", config.get("rope_theta", 10000))),
    }
    # Of torchtune's Llamas only 3.2 ties its embeddings; scale_factor 1 makes its scaled RoPE the plain one.
    family = "llama3_2" if config.get("tie_word_embeddings") else "llama3"
    if family == "llama3_2":
        model["scale_factor"] = 1
    lora = job["lora"]
    if not lora:
        return {"_component_": f"torchtune.models.{family}.{family}", **model}
    names = {"o_proj": "output_proj"}
    return {
        "_component_": f"torchtune.models.{family}.lora_{family}",
        **model,
        "lora_attn_modules": [names.get(target, target) for target in lora["targets"] if target in ATTENTION],
        "apply_lora_to_mlp": "up_proj" in lora["targets"],
        "lora_rank": lora["r"],
        "lora_alpha": lora["alpha"],
        "lora_dropout": 0.0,
        "quantize_base": job["quantize"],
    }


def torchtune_config(job: dict, samples_path: Path) -> dict:
    """The configuration of a recipe run. samples_path: a JSON file with the job's steps."""
    checkpointer = {
        "_component_": "torchtune.training.FullModelHFCheckpointer",
        "checkpoint_dir": job["checkpoint_dir"],
        "checkpoint_files": sorted(file.name for file in Path(job["checkpoint_dir"]).glob("*.safetensors")),
        "output_dir": job["work_dir"],
        "model_type": "LLAMA3",
    }
    options = optimizer_options(job)
    return {
        "output_dir": job["work_dir"],
        "model": torchtune_model(job),
        "checkpointer": checkpointer,
        "resume_from_checkpoint": False,
        "tokenizer": {"_component_": f"{__name__}.TorchtuneTokenizer"},
        "dataset": {"_component_": f"{__name__}.TorchtuneSamples", "path": str(samples_path)},
        "seed": SEED,
        "shuffle": False,
        "batch_size": job["micro_batch"],
        "epochs": 1,
        "max_steps_per_epoch": len(job["steps"]),
        "gradient_accumulation_steps": len(job["steps"][0]) // job["micro_batch"],
        "optimizer": {"_component_": "torch.optim.AdamW", **options, "betas": list(options["betas"])},
        "optimizer_in_bwd": False,
        "lr_scheduler": {  # no cycles of the cosine: constant
            "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
            "num_warmup_steps": 0,
            "num_cycles": 0,
        },
        "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
        "metric_logger": {"_component_": f"{__name__}.TorchtuneLog", "steps": len(job["steps"])},
        "log_every_n_steps": 1,
        "device": device_name(),
        "dtype": job["dtype"],
        "enable_activation_checkpointing": False,
        "enable_activation_offloading": False,
        "compile": False,
        "clip_grad_norm": None,
    }


def train_torchtune(job: dict, clock: Clock) -> list[float]:
    """`tune run` with its own recipes for one device."""
    from omegaconf import OmegaConf
    from torchtune._cli.tune import main

    path, samples = Path(job["work_dir"], "config.yaml"), Path(job["work_dir"], "samples.json")
    samples.write_text(json.dumps({"steps": job["steps"]}))
    OmegaConf.save(OmegaConf.create(torchtune_config(job, samples)), path)
    recipe = "lora_finetune_single_device" if job["lora"] else "full_finetune_single_device"
    sys.argv = ["tune", "run", recipe, "--config", str(path)]
    with contextlib.suppress(Done):
        main()
    return TorchtuneLog.losses


# -------------------------------------------------------------------------------------------------------- the table

Peer = namedtuple("Peer", "title requirements train")
TORCH = "torch==2.13.0"
PEERS = {
    "peft": Peer(
        "transformers + PEFT",
        (TORCH, "transformers==5.23.0", "peft==0.21.2", "accelerate==1.15.0", "bitsandbytes==0.50.2"),
        train_peft,
    ),
    "trl": Peer(
        "TRL",
        (TORCH, "trl==1.16.0", "transformers==5.23.0", "peft==0.21.2", "accelerate==1.15.0", "bitsandbytes==0.50.2"),
        train_trl,
    ),
    "litgpt": Peer(
        "LitGPT",
        (
            TORCH,
            "litgpt==0.5.13",
            "lightning==2.6.6",
            "pytorch-lightning==2.6.6",
            "bitsandbytes==0.49.2",
            "requests==2.32.5",
        ),
        train_litgpt,
    ),
    "torchtune": Peer("torchtune", (TORCH, "torchtune==0.6.1", "torchao==0.10.0"), train_torchtune),
}
