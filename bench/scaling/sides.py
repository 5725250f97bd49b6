"""What `../scale.py` runs in each process of a side: a step of ours, and of transformers + PEFT under accelerate.

Ours is `train_step` of finetune.py. The peers are a plain loop as accelerate's guide to gradient accumulation has it
(`accumulate`, the loss over the targets of the whole step, clipping by `clip_grad_norm_`), with
DistributedDataParallel or FSDP2. accelerate 1.15 takes FSDP on accelerators alone and says nothing where it passes it
over on CPUs: so its state is told, and what it then does is its own code for FSDP2.
"""

import contextlib
import statistics
import time

from bench.measuring import cpu_times, installed_versions, others_share, peak_memory
from bench.training import peers

SKIP = 2  # steps at the start that do not count: states are made in the first, messages counted in the second


def measure_ours(job):
    """One run of our side, in each of its processes."""
    import torch

    from batching import open_samples
    from bench.training import ours
    from training import build

    count, layout = job["processes"], job["layout"]
    divided = {"parallel": f"{layout}={count}"} if layout in ("tensor", "pipeline") else {}
    flags = {"shard": True} if layout == "shard" else divided
    settings = ours.training_settings(
        job, devices=count, micro_batch_tokens=job["micro_batch"] * job["length"], planner="packed",
        global_batch_size=len(job["steps"][0]), max_grad_norm=1.0, **flags,
    )  # fmt: skip
    torch.set_num_threads(1)
    samples = open_samples(settings.data_dir, "train")
    step = ours.step_function(ours.build_run(settings, build.start_fabric(settings), samples))
    size, batch = job["micro_batch"], len(job["steps"][0])

    def numbered(number):
        own = range(number * batch, (number + 1) * batch)
        row = step(number, [[*own[i : i + size]] for i in range(0, batch, size)])
        return row["loss"], row["grad_norm"]

    return measure(job, numbered)


def measure_peer(job):
    """One run of transformers + PEFT, in each of its processes."""
    import torch

    torch.set_num_threads(1)
    count, size = job["processes"], job["micro_batch"]
    passes = len(job["steps"][0]) // size // count
    accelerator = start_accelerator(job["layout"], passes)
    model = peers.peft_model(job)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained, **peers.optimizer_options(job)))

    def step(number):
        samples = job["steps"][number]
        targets = sum(label != -100 for sample in samples for label in sample["labels"][1:])
        total = torch.zeros(())
        for start in range(size * accelerator.process_index, len(samples), size * count):
            part = samples[start : start + size]
            with accelerator.accumulate(model):
                loss = model(
                    input_ids=peers.padded(part, "ids", 0), labels=peers.padded(part, "labels", -100),
                    num_items_in_batch=targets,
                ).loss  # fmt: skip
                accelerator.backward(loss * count * passes)  # accelerate takes means over both
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            total += loss.detach()
        return accelerator.reduce(total).item(), float(norm)

    return measure(job, step)


def start_accelerator(layout, passes):
    """accelerate on CPUs, with DistributedDataParallel or FSDP2 where there are several processes."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=passes)
    if layout == "FSDP2":
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, reshard_after_forward=True, auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"], cpu_ram_efficient_loading=False,
            state_dict_type="SHARDED_STATE_DICT",
        )  # fmt: skip
        accelerator.state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    return accelerator


def measure(job, step):
    """Run all steps of the job. `step(number)` returns a step's loss and its gradient's norm, over all processes.

    Returns the fields of a line: of times the median of the steps that count, and what the first process has.
    """
    import torch

    from bench.scaling.messages import Messages

    found, ends, messages = [], [], Messages()
    for number in range(len(job["steps"])):
        with messages if number == SKIP - 1 else contextlib.nullcontext():
            found.append(step(number))
        ends.append(cpu_times())
    seconds = [after[0] - before[0] for before, after in zip(ends[SKIP - 1 :], ends[SKIP:], strict=False)]
    own = torch.tensor(
        [end[2] for end in (ends[SKIP - 1], ends[-1])], dtype=torch.float64
    )  # CPU time, of all processes
    if job["processes"] > 1:
        torch.distributed.all_reduce(own)
    start, end = ((*end[:2], used) for end, used in zip((ends[SKIP - 1], ends[-1]), own.tolist(), strict=True))
    losses, norms = zip(*found, strict=True)
    return {
        "seconds": statistics.median(seconds),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "grad_norm": min(norms),
        "messages": messages.counted(),
        "peak_gb": peak_memory() / 1e9,
        "others_cpu": others_share(start, end),
        "step_seconds": [round(duration, 4) for duration in seconds],
        "started_seconds": time.time() - job["started"],
        "versions": installed_versions(),
    }
