"""Steps of training on several devices: processes that each run all of a list of cases, for tests of training/parallel.

    python tests/training/devices.py CASES FOLDER

CASES: a JSON file with a list of settings of finetune.py. Each process runs a step of each case, without changing a
weight, and the first one writes the gradient of the whole model to FOLDER/N.safetensors, with loss and norm. It is
started by `gradients_on`, with the environment that torchrun gives.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


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
            command, cwd=ROOT, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(count)
    ]  # fmt: skip


def gradients_on(count, cases, folder):
    """Of each case, a dict of settings, the gradient by name on so many devices, with "loss" and "norm"."""
    from safetensors.torch import load_file

    folder.mkdir(exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases, default=str))
    processes = start_processes(count, [sys.executable, __file__, folder / "cases.json", folder])
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(outputs)
    return [load_file(folder / f"{number}.safetensors") for number in range(len(cases))]


def gradient_of(s):
    """The gradient of the first step of a run with these settings, of the whole model by name, at the first device."""
    import torch

    import finetune
    from training import build
    from training.parallel.saving import Divided
    from training.steps import planned_steps, total_steps

    data = build.open_data(s)
    build.check_model(s, data)
    fabric = build.start_fabric(s)
    run = build.build_run(s, fabric, data, None, {})
    _, micro_batches = next(iter(planned_steps(s, data.train, 0, total_steps(s, data.train))))
    units = data.train.unit_counts[[i for indices in micro_batches for i in indices]].sum().item()
    found = finetune.backward_passes(run, run.share(micro_batches, data.train), 0, units)
    gradients = {name: p.grad for name, p in run.model.named_parameters() if p.requires_grad}
    if run.divided:
        divided: Divided = run.divided
        layout = divided.shapes(lambda name: divided.whole.get_parameter(name).requires_grad)
        gathered = divided.pieces.gather([(name, 0) for name in layout], gradients.get, layout)
        gradients = dict(zip(layout, gathered, strict=True))
    norm = finetune.gradient_norm(run)
    more = {"loss": found.loss.detach().clone(), "norm": norm.detach().clone()}
    return {name: grad.detach().clone() for name, grad in {**gradients, **more}.items() if grad is not None}


def main(cases, folder):
    import torch
    import torch.distributed as dist
    from safetensors.torch import save_file

    from training.settings import Settings

    torch.set_num_threads(1)
    for number, flags in enumerate(json.loads(Path(cases).read_text())):
        paths = {name: Path(flags[name]) for name in ("checkpoint_dir", "data_dir", "out_dir")}
        gradient = gradient_of(Settings(**(flags | paths)))
        if dist.get_rank() == 0:
            save_file(gradient, Path(folder, f"{number}.safetensors"))
        dist.barrier()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main(*sys.argv[1:])
