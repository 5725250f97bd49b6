"""Base and adapter as one model, computed in fp32, a module at a time, so that a model need not fit into memory.

The adapter is merged into the base that it was trained on: if that was quantised, into its dequantised values.
"""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora
from model import Linear, Transformer
from quantize import quantizer_of, read_quantization
from shell.cli import UserError
from shell.progress import bar
from weights import peft_format
from weights.checkpoint import model_of
from weights.replaced import EMBEDDING, HEAD, Replaced
from weights.stored import Weights

PROBE_LENGTH = 32  # positions on which a merged model is compared with base and adapter


class Tuned:
    """A model, with an adapter or without, of which one module at a time is in memory (in fp32).

    config: a parsed config.json. weights: the model's `Weights`. The rest as in `load_model`.
    """

    def __init__(
        self, config: dict, weights: Weights, quantize: str | dict | None = None, adapter_dir: str | Path | None = None
    ):
        self.adapter, self.tensors, self.change = None, {}, None
        self.replaced = Replaced(lora.AdapterConfig())  # nothing
        _, self.model, self.weights = model_of(config, weights)
        self.quantization = read_quantization(quantize, self.model)
        if adapter_dir is not None:
            residual = peft_format.is_on_residual(adapter_dir)
            peft_format.load_adapter(copy.deepcopy(self.model), adapter_dir, residual)  # into no memory, for its checks
            stored = peft_format.read_for(self.model, adapter_dir, residual)
            self.change = peft_format.without_start(self.model, adapter_dir) if residual else None
            self.adapter, self.tensors, self.replaced = stored.config, stored.tensors, stored.replaced
            check_mergeable(self.adapter, adapter_dir)
        self.base_is_tied = self.model.config.tie_word_embeddings
        if self.base_is_tied:
            self.replaced = self.replaced.for_tied_base()
        self.linears = lora.linear_layers(self.model)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.tensors:
            kind, shared = lora.ADAPTERS[self.adapter.kind], self.tensors.pop("", {})
            self.shared = kind.shared(self.model, self.adapter, [*self.tensors], self.device)
            self.tensors = {name: own | shared for name, own in self.tensors.items()}

    def _stored(self, name):
        """The tensor `name` of the base, in fp32; a tied head has the embedding's."""
        tied = name == HEAD and self.base_is_tied
        return self.weights.read(EMBEDDING if tied else name).to(self.device, torch.float32)

    def read(self, name: str) -> Tensor:
        """The tensor `name` in fp32, or what the adapter's folder puts in its place."""
        if name == HEAD and self.base_is_tied and self.replaced.keeps_tie():
            name = EMBEDDING
        return self.replaced.value(name, self._stored(name)).float()

    def linear(self, name: str) -> nn.Module:
        """The linear layer `name`: quantised and adapted as in training."""
        weight, bias = self.read(f"{name}.weight"), None
        weight = self.change(f"{name}.weight", weight) if self.change else weight
        if self.linears[name].bias is not None:
            bias = nn.Parameter(self.read(f"{name}.bias"), requires_grad=False)
        dense = name == "lm_head" or f"{name}.weight" in self.replaced.whole
        quantizer = None if dense else quantizer_of(self.quantization, name)
        if quantizer:
            layer = quantizer(weight, bias)
        else:
            layer = Linear(*weight.T.shape, device="meta")
            layer.weight, layer.bias = nn.Parameter(weight, requires_grad=False), bias
        return self._adapted(layer, name)

    def _adapted(self, module, name):
        """The module `name` with its adapter, if it has one."""
        if name not in self.tensors:
            return module
        adapter = self.adapter.adapt(module, name, self.shared)
        peft_format.fill_adapter(adapter, self.tensors[name], name)
        return adapter

    @torch.no_grad()
    def merged(self, name: str) -> tuple[Tensor, Tensor | None]:
        """The tensor `name` with the adapter merged into it, and without; both fp32.

        The second is None where the adapter changes nothing.
        """
        (path, _, leaf), before = name.rpartition("."), None
        if name in self.replaced.names():
            before = self._stored(name)
        if leaf == "bias" and path in self.tensors:
            adapter = self.module(path)
            return adapter.merged_bias(), adapter.base.bias.float()
        if path not in self.linears or leaf != "weight":
            return self.read(name), before
        layer = self.linear(path)
        if path not in self.tensors:
            return layer.dequantize(torch.float32), before
        return layer.merged_weight(), self._stored(name) if self.change else layer.base.dequantize(torch.float32)

    def merged_config(self, config: dict) -> dict:
        """config.json's values for the merged model: its head may be no longer the embedding."""
        tied = self.base_is_tied and self.replaced.keeps_tie() and "lm_head" not in self.tensors
        return config | {"tie_word_embeddings": tied}

    def module(self, name: str) -> nn.Module:
        """The module `name`, a block, a norm or a linear layer, with all that is in it."""
        if name in self.linears:
            return self.linear(name)
        module = copy.deepcopy(self.model.get_submodule(name))
        for path in [path for path, _ in module.named_parameters()]:
            inner, _, leaf = path.rpartition(".")
            if f"{name}.{inner}" not in self.linears:
                setattr(module.get_submodule(inner), leaf, nn.Parameter(self.read(f"{name}.{path}")))
        for path in lora.linear_layers(module):
            inner, _, leaf = path.rpartition(".")
            setattr(module.get_submodule(inner), leaf, self.linear(f"{name}.{path}"))
        for whole in [whole for whole in self.tensors if whole.startswith(f"{name}.") and whole not in self.linears]:
            inner, _, leaf = whole.removeprefix(f"{name}.").rpartition(".")
            parent = module.get_submodule(inner)
            setattr(parent, leaf, self._adapted(getattr(parent, leaf), whole))
        return self._adapted(module, name)

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Logits (1, T, V) for tokens (1, T): the model's own forward pass, with one block at a time in memory."""
        with torch.device("meta"):
            model = Transformer(self.model.config).eval()
        number_of_blocks = len(model.model["layers"])
        progress = bar(total=number_of_blocks, what="comparing")

        def block(number):
            progress.update()
            return self.module(f"model.layers.{number}")

        for name in [name for name in model.model if name != "layers"]:
            model.model[name] = self.module(f"model.{name}")
        model.model["layers"] = nn.ModuleList(ReadWhenRun(partial(block, n)) for n in range(number_of_blocks))
        model.lm_head = ReadWhenRun(partial(self.linear, "lm_head"))
        with progress:
            return model(tokens.to(self.device))


def check_mergeable(config: lora.AdapterConfig, adapter_dir: str | Path) -> None:
    """Raise UserError if adapters of this kind are no weights of the base."""
    if why := lora.ADAPTERS[config.kind].unmergeable:
        raise UserError(f"{adapter_dir}: a {config.kind} adapter cannot be merged, {why}: use it with --adapter_dir")


class ReadWhenRun(nn.Module):
    """Stands for a module that is in memory only while it runs. read: returns it."""

    def __init__(self, read: Callable[[], nn.Module]):
        super().__init__()
        self.read = read

    def forward(self, *args: Any) -> Any:
        """What the module makes of `args`."""
        return self.read()(*args)


def compare(tuned: Tuned, merged: Tuned) -> None:
    """Print how far the logits of a merged model are from those of base and adapter, on tokens from the vocabulary."""
    tokens = torch.linspace(0, tuned.model.config.vocab_size - 1, PROBE_LENGTH).long()[None]
    one, other = tuned.logits(tokens), merged.logits(tokens)
    print(f"merged against base + adapter, {PROBE_LENGTH} positions: {describe_distance(one, other)}")


def describe_distance(one: Tensor, other: Tensor) -> str:
    """How far the logits `other` (1, T, V) are from `one`, in words: KL(one || other) in nats a position."""
    one, other = one.double(), other.double()
    difference = (one - other).abs().max().item()
    divergence = F.kl_div(other.log_softmax(-1), one.log_softmax(-1), log_target=True, reduction="sum") / one.size(1)
    agree = (one.argmax(-1) == other.argmax(-1)).float().mean().item()
    distance = f"logits differ by at most {difference:.1e}, mean KL {divergence.item():.1e}"
    return f"{distance}, same likeliest token in {agree:.0%}"
