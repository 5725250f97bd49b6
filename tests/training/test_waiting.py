"""In a step the host waits for the device once, at its end.

Here the device is "meta", on which every attempt to read a number is an error; on a GPU, torch warns of each wait.
"""

import contextlib
import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL
from prepared_parts import write_part
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import finetune
import lora
from batching import open_samples
from model import Transformer
from ops import devices
from quantize import QUANTIZERS
from training import build
from training.steps import planned_steps
from weights.families import config_from_json

LLAMA = {"model_type": "llama", **SMALL}
WINDOW = {"model_type": "mistral", **SMALL, "sliding_window": 7}
DYNAMIC = {**LLAMA, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
LONGROPE = {
    **SMALL, "model_type": "phi3", "pad_token_id": 0, "original_max_position_embeddings": 16,
    "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16,
                        "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
}  # fmt: skip
ALIBI = {"model_type": "bloom", "vocab_size": 512, "hidden_size": 48, "n_layer": 2, "n_head": 6}


class Copies(TorchDispatchMode):
    """Counts the operations in which a tensor of the CPU, but a single number, meets the device: blocking copies."""

    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        results = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        mixed = any(x.device.type == "cpu" and x.dim() for x in given) and any(x.is_meta for x in (*given, *results))
        self.found += mixed
        return out


class Fabric:
    """As much of Lightning's as a step takes, on device "meta"."""

    device, world_size, global_rank = torch.device("meta"), 1, 0
    strategy = SimpleNamespace(precision=SimpleNamespace())
    autocast = staticmethod(contextlib.nullcontext)

    def backward(self, loss):
        loss.backward()

    def clip_gradients(self, model, optimizer, max_norm, error_if_nonfinite):
        parameters = [p for p in model.parameters() if p.requires_grad]
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm, error_if_nonfinite=error_if_nonfinite)


@pytest.fixture(autouse=True)
def _autocast_without_meta(monkeypatch):
    """It knows nothing of that device, and says so with an error."""
    enabled = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind != "meta" and enabled(kind))


def samples_of(folder, sources):
    written = []
    for number, length in enumerate((9, 30, 17, 24)):
        ids = torch.randint(3, 500, (length,)).tolist()
        written.append((ids, [False] * 4 + [True] * (length - 4), number % sources))
    return open_samples(write_part(folder, written), "train")


def make_run(config, folder, sources=2, **flags):
    """A run of a model without memory, and its first step's micro-batches."""
    options = dict(global_batch_size=4, micro_batch_tokens=50, max_steps=1, method="full") | flags
    settings = finetune.Settings(Path("none"), Path("none"), **options)
    with torch.device("meta"):
        model = Transformer(config_from_json(config)).bfloat16()
        if settings.quantize:
            from weights.checkpoint import fill_model

            shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
            empty = lambda name: torch.empty(shapes[name], device="meta")  # noqa: E731
            fill_model(model, empty, torch.bfloat16, "meta", settings.quantize)
        if settings.method != "full":
            lora.add_lora(model, lora.AdapterConfig(settings.method, r=4, dropout=settings.lora_dropout))
    samples = samples_of(folder, sources)
    names = [f"source {number}" for number in range(sources)] if sources > 1 else []
    # torch's fused AdamW does not know this device. On a GPU it waits for nothing, as the test there shows.
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], foreach=False)
    run = build.Run(settings, Fabric(), model.train(), optimizer, samples, sources=names)
    return run, next(planned_steps(settings, samples, 0, 1))[1]


WAYS = {
    "all weights": (LLAMA, {}),
    "lora, dropout": (LLAMA, dict(method="lora", lora_dropout=0.1)),
    "dora": (LLAMA, dict(method="dora")),
    "recomputing": (LLAMA, dict(method="lora", recompute=1.0)),
    "a window": (WINDOW, {}),
    "rope that depends on lengths": (DYNAMIC, {}),
    "two kinds of rope": (LONGROPE, {}),
    "alibi": (ALIBI, {}),
    "z-loss": (LLAMA, dict(z_loss=1e-4)),
    "no clipping": (LLAMA, dict(max_grad_norm=0)),
    "padded rows": (LLAMA, dict(planner="sorted_in_step")),
    # bitsandbytes reads a number when it quantises scales as well.
    **{name: (LLAMA, dict(method="lora", quantize=name)) for name in QUANTIZERS if not name.endswith("dq")},
}


@pytest.mark.parametrize("way", WAYS)
def test_the_host_waits_once(way, tmp_path, monkeypatch):
    config, flags = WAYS[way]
    run, micro_batches = make_run(config, tmp_path, **flags)
    assert len(micro_batches) > 1
    reads = []

    def read(*tensors):
        """The one read of a step, whose numbers are made up."""
        assert all(x.is_meta for x in tensors)
        reads.append([x.numel() for x in tensors])
        return [[1.5] * x.numel() for x in tensors]

    def to_device(x, device):
        """A copy that nobody waits for."""
        with torch.utils._python_dispatch._disable_current_modes():
            return x.to("meta")

    def numbers_on(device, numbers, dtype=None):
        return to_device(tensor(numbers, dtype=dtype), device)

    tensor, from_lists = torch.tensor, []

    def counted(*arguments, **how):
        """torch.tensor, which on a GPU copies and waits."""
        from_lists.append(how)
        return tensor(*arguments, **how)

    for file in ("objectives", "model", "training.metrics", "ops.attention", "ops.flex", "ops.grouping"):
        module = importlib.import_module(file)
        for function in (to_device, numbers_on):
            if hasattr(module, function.__name__):
                monkeypatch.setattr(module, function.__name__, function)
    monkeypatch.setattr(finetune, "read_numbers", read)
    finetune.train_step(run, micro_batches, 0, 1e-3)  # what is made once is made now
    reads.clear()
    monkeypatch.setattr(torch, "tensor", counted)
    with Copies() as copies:
        row = finetune.train_step(run, micro_batches, 1, 1e-3)
    assert reads == [[1, 1, 2, 0]] and copies.found == 0
    assert not [how for how in from_lists if how.get("device") is not None]
    assert row["loss"] == row["grad_norm"] == 1.5


def test_a_read_would_be_found(tmp_path, monkeypatch):
    """A `.item()` in the loss, and a copy that blocks."""
    run, micro_batches = make_run(LLAMA, tmp_path)
    monkeypatch.setattr(finetune.Sums, "add", lambda self, result, *_: result.losses.sum().item())
    with pytest.raises((RuntimeError, NotImplementedError)):
        finetune.train_step(run, micro_batches, 0, 1e-3)
    with Copies() as copies:
        torch.arange(3).to("meta")
    assert copies.found == 1


def test_numbers_are_read_as_they_are():
    assert devices.read_numbers(torch.tensor(1.5), torch.tensor([], dtype=torch.float64), torch.tensor([2, 3])) == [
        [1.5], [], [2.0, 3.0],
    ]  # fmt: skip
    assert torch.equal(devices.to_device(torch.arange(3), "cpu"), torch.arange(3))
