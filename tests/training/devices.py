"""Steps of training on several devices: processes that each run all of a list of cases, for tests of training/parallel.

    python tests/training/devices.py KIND CASES FOLDER

KIND: a key of `KINDS`. CASES: a JSON file with a list of settings of finetune.py. Of each case the first process writes
the gradient of the whole model to FOLDER/N.safetensors. `gradients_on` starts them with the environment that torchrun
gives.
"""

import faulthandler
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
VOCABULARY = 160  # of the families' tiny models


def start_processes(count, command, **environment):
    """Start a command in so many processes, as torchrun does; `environment` is for all of them."""
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        number = port.getsockname()[1]
    shared = {
        "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": number,
        "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": 0, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": 1, **environment,
    }  # fmt: skip
    shared = os.environ | {name: str(value) for name, value in shared.items()}
    return [
        subprocess.Popen(
            [*map(str, command)], cwd=ROOT, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(count)
    ]  # fmt: skip


def gradients_on(count, kind, cases, folder):
    """Of each case, a `Settings`, what the function `KINDS[kind]` finds on so many devices: tensors by name."""
    from safetensors.torch import load_file

    folder.mkdir(exist_ok=True)
    values = [{name: value for name, value in vars(s).items() if name != "started"} for s in cases]
    (folder / "cases.json").write_text(json.dumps(values, default=str))
    processes = start_processes(count, [sys.executable, __file__, kind, folder / "cases.json", folder])
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(outputs)
    return [load_file(folder / f"{number}.safetensors") for number in range(len(cases))]


def gradient_of_step(s):
    """Of the first step of a run with these settings: the gradient by name, with "loss" and "norm"."""
    import finetune
    from training import build
    from training.steps import planned_steps, total_steps

    data = build.open_data(s)
    build.check_model(s, data)
    fabric = build.start_fabric(s)
    run = build.build_run(s, fabric, data, None, {})
    _, micro_batches = next(iter(planned_steps(s, data.train, 0, total_steps(s, data.train))))
    units = data.train.unit_counts[[i for indices in micro_batches for i in indices]].sum().item()
    found = finetune.GRADIENTS[run.gradient](run, run.share(micro_batches, data.train), 0, units)
    gradients = whole_gradient(run.model, run.divided)
    return gradients | {"loss": found.loss.detach().clone(), "norm": finetune.gradient_norm(run).clone()}


def gradient_of_model(s):
    """Of the sum of the losses of four random samples on the model of these settings: the gradient by name."""
    import torch

    from batching import shift
    from model import Transformer
    from training import build
    from training.parallel.layout import layout_of
    from training.parallel.loading import load_part
    from training.parallel.one_f_one_b import Stage
    from training.parallel.ranks import make_ranks

    fabric, layout, divided = build.start_fabric(s), layout_of(s), None
    ranks = make_ranks(layout, s.checkpoint_dir, fabric.device)
    if layout.splits:
        model, _, divided = load_part(s, ranks, fabric.device, None)
    else:
        model, _ = build.build_model(s, fabric.device, None)
    model: Transformer = model.train()
    generator = torch.Generator().manual_seed(1)
    samples = [torch.randint(3, VOCABULARY, (size,), generator=generator) for size in (9, 14, 5, 2)]
    samples = [shift(ids, torch.arange(len(ids)) > 1) for ids in samples[ranks.data_rank :: layout.data]]

    def hidden_states(number):
        tokens, _ = samples[number]
        return model.hidden_states(tokens[None], offsets=[0, len(tokens)])

    def loss(x, number):
        return model.target_losses(x, samples[number][1][None])[0]

    if ranks.link:
        Stage(model, ranks.link, [tokens[None].shape for tokens, _ in samples], hidden_states).run(loss)
    else:
        for number, _ in enumerate(samples):
            loss(hidden_states(number), number).backward()
    ranks.sum_gradients(model)
    return whole_gradient(model, divided)


def whole_gradient(model, divided):
    """The gradient of a model by name: of a model that is divided at the first device."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    if divided:
        layout = divided.shapes(lambda name: divided.whole.get_parameter(name).requires_grad)
        gathered = divided.pieces.gather([(name, 0) for name in layout], gradients.get, layout)
        gradients = dict(zip(layout, gathered, strict=True))
    return {name: gradient.clone() for name, gradient in gradients.items() if gradient is not None}


def messages_of_step(s):
    """What the first step of a run hands to torch.distributed until it has its gradient, the loss left out.

    Bytes of each message at the first device of each stage, by "STAGE: KIND over DIMENSION", "kv" being those along
    tensor that have the same keys and values.
    """
    import torch
    import torch.distributed as dist

    import finetune
    from bench.scaling.messages import Messages
    from training import build
    from training.parallel.layout import DIMENSIONS
    from training.steps import planned_steps, total_steps

    data = build.open_data(s)
    run = build.build_run(s, build.start_fabric(s), data, None, {})
    _, micro_batches = next(iter(planned_steps(s, data.train, 0, total_steps(s, data.train))))
    units = data.train.unit_counts[[i for indices in micro_batches for i in indices]].sum().item()
    with Messages() as messages:
        finetune.GRADIENTS[run.gradient](run, run.share(micro_batches, data.train), 0, units)
    ranks = run.ranks
    groups = {name: ranks.group(name) for name in DIMENSIONS if getattr(ranks.layout, name) > 1}
    groups |= {"kv": ranks.kv_group} if ranks.kv_group else {}
    groups |= {"ends": ranks.ends_group} if ranks.ends_group else {}
    names = {group.group_name: name for name, group in groups.items()}
    found, every = {}, [None] * dist.get_world_size()
    for message in [each for each in messages.found if each.nbytes > 4 or each.kind != "sum"]:
        assert message.count == groups[names[message.group]].size()
        name = f"{ranks.stage}: {message.kind} over {names[message.group]}"
        found.setdefault(name, []).append(message.nbytes)
    dist.all_gather_object(every, found)
    firsts = [every[ranks.layout.rank(stage, 0, 0)] for stage in range(ranks.layout.pipeline)]
    return {name: torch.tensor(sizes) for first in firsts for name, sizes in first.items()}


def largest_number(s):
    """The largest of the devices' numbers, which are their ranks."""
    import torch

    from training import build
    from training.metrics import largest_of_devices

    fabric = build.start_fabric(s)
    return {"largest": torch.tensor(largest_of_devices(fabric, fabric.global_rank))}


def sums_of_tensors(s):
    """What `add_up` makes of random tensors of several sizes and dtypes, one not contiguous, and their true sums."""
    import torch
    import torch.distributed as dist

    from training import build
    from training.parallel import ranks

    fabric, ranks.BUCKET = build.start_fabric(s), 400

    def tensors_of(rank):
        generator = torch.Generator().manual_seed(rank)
        sizes = [(5,), (150,), (7, 3), (20, 30), (1,), (30, 20), (50,), (50,), (51,)]
        tensors = [torch.randn(*size, generator=generator) for size in sizes]
        tensors[5] = tensors[5].t()
        return [tensor.double() if number in (3, 4) else tensor for number, tensor in enumerate(tensors)]

    every = [tensors_of(rank) for rank in range(fabric.world_size)]
    named = {f"sum {number}": sum(each).contiguous() for number, each in enumerate(zip(*every, strict=True))}
    found = every[fabric.global_rank]
    ranks.add_up(found, dist.group.WORLD)
    return named | {f"found {number}": tensor.contiguous() for number, tensor in enumerate(found)}


def memory_of_loading(s):
    """Of loading a part of the model, for each device: bytes that it then has, had at the most, and read of files."""
    import torch
    import torch.distributed as dist
    from storages import Storages

    from training import build
    from training.parallel.layout import layout_of
    from training.parallel.loading import load_part
    from training.parallel.ranks import local, make_ranks

    fabric = build.start_fabric(s)
    ranks = make_ranks(layout_of(s), s.checkpoint_dir, fabric.device)
    with Storages() as storages:
        model, *_ = load_part(s, ranks, fabric.device, None)
    held = {id(tensor): local(tensor).nbytes for tensor in (*model.parameters(), *model.buffers())}
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, (sum(held.values()), storages.peak, storages.read))
    return {name: torch.tensor([each[i] for each in every]) for i, name in enumerate(("held", "peak", "read"))}


def train(s):
    """A whole run, which leaves its folder."""
    import finetune

    finetune.main(s)
    return {}


def stored_bytes(s):
    """Of a model that is divided: what this device keeps of its frozen weights, of those that are quantised, too."""
    import torch

    from quantize import quantized_layers
    from training import build
    from training.parallel.layout import layout_of
    from training.parallel.loading import load_part
    from training.parallel.ranks import local, make_ranks

    fabric = build.start_fabric(s)
    model, _, _ = load_part(s, make_ranks(layout_of(s), s.checkpoint_dir, fabric.device), fabric.device, None)
    total = sum(local(p).untyped_storage().nbytes() for p in model.parameters() if not p.requires_grad)
    total += sum(buffer.nbytes for buffer in model.buffers())
    total += sum(layer.nested.absmax.nbytes for layer in quantized_layers(model) if getattr(layer, "nested", None))
    return {"bytes": torch.tensor(total)}


KINDS = {
    "step": gradient_of_step, "messages": messages_of_step, "model": gradient_of_model, "loading": memory_of_loading,
    "stored": stored_bytes, "run": train, "largest": largest_number, "sums": sums_of_tensors,
}  # fmt: skip


def main(kind, cases, folder):
    import torch
    import torch.distributed as dist
    from safetensors.torch import save_file

    from training.settings import Settings

    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(250, exit=True)
    for number, flags in enumerate(json.loads(Path(cases).read_text())):
        paths = {name: Path(flags[name]) for name in ("checkpoint_dir", "data_dir", "out_dir")}
        gradient = KINDS[kind](Settings(**(flags | paths)))
        if dist.get_rank() == 0:
            save_file(gradient, Path(folder, f"{number}.safetensors"))
        dist.barrier()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main(*sys.argv[1:])
