"""What a folder of PEFT's changes beside its adapters: whole parameters, rows of tokens, LoRA on the embedding.

These are not adapters over linear layers: when a model is loaded or merged, the base's own parameters get other values,
and nothing is left to compute. What of them trains here is in beside.py.
"""

import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lora import AdapterConfig, match_pattern
from model import Linear, Transformer
from shell.cli import UserError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Replaced:
    """New values of a base's parameters, by the parameters' names.

    base: what the adapter's folder says that the base itself has: PEFT saves embedding and head if they are adapted.
    whole: those that were trained themselves: `modules_to_save`, biases, an embedding that had grown.
    rows: (ids, the rows (n, D) of these tokens), from `trainable_token_indices`.
    low_rank: the tensors of LoRA or DoRA on the embedding, by PEFT's names; config: with its rank and scale.
    """

    config: AdapterConfig
    base: dict[str, Tensor] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, tuple[list[int], Tensor]] = field(default_factory=dict)
    low_rank: dict[str, Tensor] = field(default_factory=dict)

    def names(self) -> set[str]:
        """The parameters that may have other values than in the base."""
        return {*self.base, *self.whole, *self.rows, *([EMBEDDING] if self.low_rank else [])}

    def keeps_tie(self) -> bool:
        """Whether head and embedding are still one tensor, if they are one in the base.

        As in PEFT: new values for one of the two leave the other as it was, but for single tokens of the embedding,
        which the head follows.
        """
        if HEAD in self.whole and EMBEDDING in self.whole:
            head, embedding = self.whole[HEAD], self.whole[EMBEDDING]
            return head.dtype == embedding.dtype and torch.equal(head, embedding)
        return not ({HEAD, EMBEDDING} & self.whole.keys() or HEAD in self.rows or self.low_rank)

    def for_tied_base(self) -> "Replaced":
        """The same for a base in which head and embedding are one tensor: what is said of one is said of both."""
        stored = [self.base[name] for name in (EMBEDDING, HEAD) if name in self.base][:1]
        return dataclasses.replace(self, base=dict.fromkeys((EMBEDDING, HEAD), *stored) if stored else {})

    def value(self, name: str, weight: Tensor) -> Tensor:
        """What the parameter `name` becomes, which is `weight` in the base: on its device, in any dtype."""
        weight = self.whole.get(name, self.base.get(name, weight)).to(weight.device)
        if name in self.rows:
            ids, rows = self.rows[name]
            weight = weight.index_copy(0, torch.tensor(ids, device=weight.device), rows.to(weight))
        return self._adapted_embedding(weight.float()) if name == EMBEDDING and self.low_rank else weight

    def _adapted_embedding(self, weight):
        """W + scale * (B A)^T for W (V, D); with DoRA the columns of that have the length m, a magnitude for each."""
        A, B = (self.low_rank[f"lora_embedding_{letter}"].to(weight) for letter in "AB")  # (r, V) and (D, r)
        name = EMBEDDING.removesuffix(".weight")
        r = match_pattern(self.config.rank_pattern, name, self.config.r)
        alpha = match_pattern(self.config.alpha_pattern, name, self.config.alpha)
        weight = weight.addmm(A.T, B.T, alpha=alpha / (math.sqrt(r) if self.config.rslora else r))
        if "lora_magnitude_vector" in self.low_rank:
            weight *= self.low_rank["lora_magnitude_vector"].to(weight) / weight.norm(dim=0).clamp(min=1e-38)
        return weight


@torch.no_grad()
def replace(model: Transformer, replaced: Replaced, where: str) -> None:
    """Give a model's parameters their new values, in its dtype, and untie its head where they untie it.

    A linear layer that is replaced whole is no longer quantised. Raises UserError, naming `where`, for values that the
    model has no place for, or that are not finite.
    """
    check(model, replaced, where)
    names = replaced.names()
    if model.config.tie_word_embeddings:
        replaced = replaced.for_tied_base()
        names = replaced.names()
        if replaced.keeps_tie():
            names -= {HEAD}
        else:
            model.config = dataclasses.replace(model.config, tie_word_embeddings=False)
    before = {name: getattr(model.get_submodule(_path(name)), _leaf(name), None) for name in names}
    for name, old in before.items():
        if old is None:
            _put_dense(model, _path(name), replaced.whole[name])
        else:
            new = torch.empty_like(old) if old.is_meta else replaced.value(name, old).to(old.dtype)
            if old.is_meta or not torch.equal(new, old):
                setattr(model.get_submodule(_path(name)), _leaf(name), nn.Parameter(new, requires_grad=False))
    model.tie_weights()


def _put_dense(model, path, weight):
    """Put a dense linear layer with this weight in the place of a quantised one; it has the same bias."""
    layer, embedding = model.get_submodule(path), model.model.embed_tokens.weight
    linear = Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.to(embedding.device, embedding.dtype), requires_grad=False)
    linear.bias = layer.bias
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, linear)


def check(model: Transformer, replaced: Replaced, where: str) -> None:
    """Raise UserError, naming `where`, unless all values are numbers and have the shapes of the model's parameters."""
    for name, tensor in (*replaced.base.items(), *replaced.whole.items()):
        _check_tensor(f"{where}: {name}", tensor, _shape(model, name))
    for name, (ids, rows) in replaced.rows.items():
        _check_tensor(f"{where}: the tokens' rows of {name}", rows, (len(ids), model.config.hidden_size))
        if not all(0 <= id < model.config.vocab_size for id in ids):
            last = model.config.vocab_size - 1
            raise UserError(f"{where}: trainable_token_indices has {max(ids)}, the model's last token is {last}")
    if replaced.low_rank:
        _check_low_rank(model.config, replaced, f"{where}: {EMBEDDING.removesuffix('.weight')}")


def _check_low_rank(config, replaced, where):
    r = match_pattern(replaced.config.rank_pattern, EMBEDDING.removesuffix(".weight"), replaced.config.r)
    shapes = {"lora_embedding_A": (r, config.vocab_size), "lora_embedding_B": (config.hidden_size, r)}
    if replaced.config.kind == "dora":
        shapes["lora_magnitude_vector"] = (config.hidden_size,)
    if shapes.keys() != replaced.low_rank.keys():
        raise UserError(
            f"{where}: it should have the tensors {', '.join(shapes)}, it has {', '.join(replaced.low_rank)}"
        )
    for key, shape in shapes.items():
        _check_tensor(f"{where}.{key}", replaced.low_rank[key], shape)


def _check_tensor(where, tensor, shape):
    if shape is None:
        raise UserError(f"{where}: the base model has no such parameter")
    if tuple(tensor.shape) != shape:
        grown = where.endswith((EMBEDDING, HEAD)) and tensor.shape[1:] == shape[1:]
        remedy = (
            "its vocabulary was resized: resize the base in the same way (transformers: resize_token_embeddings)"
            if grown
            else "it belongs to another base model"
        )
        raise UserError(f"{where} is {tuple(tensor.shape)} where the model needs {shape}: {remedy}")
    if tensor.dtype not in FLOATS:
        raise UserError(f"{where} is {tensor.dtype}: expected float32, bfloat16 or float16")
    if not tensor.isfinite().all():
        raise UserError(f"{where} holds NaN or infinity: the run that made it had failed")


def _shape(model, name):
    """The shape of a parameter, of a quantised weight that of the dense one; None if there is none of that name."""
    module = dict(model.named_modules()).get(_path(name))
    if _leaf(name) == "weight" and hasattr(module, "in_features"):
        return module.out_features, module.in_features
    parameter = getattr(module, _leaf(name), None)
    return tuple(parameter.shape) if torch.is_tensor(parameter) else None


def parameters_of(model: nn.Module, ends: Collection[str]) -> set[str]:
    """The names of all parameters in the modules whose names end in one of these, as `modules_to_save` says them."""
    modules = dict(model.named_modules())
    found = [path for path in modules if path.endswith(tuple(ends))]
    names = set()
    for path, module in modules.items():
        if any(path == whole or path.startswith(f"{whole}.") for whole in found):
            names |= {f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)}
            names |= {f"{path}.weight"} if hasattr(module, "in_features") else set()  # it may be quantised
    return names


def biases(model: nn.Module, modules: Collection[str] | None = None) -> set[str]:
    """The names of the biases of all linear layers, or of those in `modules`."""
    layers = {path: module for path, module in model.named_modules() if hasattr(module, "in_features")}
    return {f"{path}.bias" for path, m in layers.items() if m.bias is not None and (modules is None or path in modules)}


def _path(name):
    return name.rpartition(".")[0]


def _leaf(name):
    return name.rpartition(".")[2]
