"""What trains beside adapters over linear layers: whole modules, and the embedding's rows of single tokens. In fp32.

PEFT calls them `modules_to_save` and `trainable_token_indices`, and so do the folders (replaced.py reads them). What is
trained takes the place of the base's own parameters; of the tokens' rows the base keeps the old ones.

As in PEFT, a head that is the embedding stays so if both are named, or if tokens' rows train; if one of the two is
named, it alone gets new values.
"""

import dataclasses
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora import AdapterConfig, is_named
from model import Linear, Transformer
from ops.linear import linear
from weights.names import Names, rows_in_memory
from weights.replaced import EMBEDDING, HEAD, Replaced

PARTS = ("base", "whole", "rows")  # of `Replaced`: the fields that are by parameter
ENDS = tuple(name.removesuffix(".weight") for name in (EMBEDDING, HEAD))


class TokenEmbedding(nn.Embedding):
    """The embedding `base`, of which the rows of some tokens train (n, D), beside all others, which are frozen."""

    def __init__(self, base: nn.Embedding, ids: tuple[int, ...]):
        super().__init__(*base.weight.shape, _weight=base.weight, device=base.weight.device)
        self.weight = base.weight
        self.register_buffer("ids", torch.tensor(ids, device=base.weight.device), persistent=False)  # in order
        self.rows = nn.Parameter(base.weight.detach()[self.ids].float())

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (...,) int64 to (..., D), in the dtype of all other rows."""
        places = torch.searchsorted(self.ids, tokens).clamp(max=len(self.ids) - 1)
        rows = F.embedding(places, self.rows).to(self.weight.dtype)
        return torch.where((self.ids[places] == tokens)[..., None], rows, super().forward(tokens))


class TokenHead(Linear):
    """A head that is the embedding `tokens`: its rows of the tokens that train are the same ones."""

    def __init__(self, base: Linear, tokens: TokenEmbedding):
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias, self.rows = base.weight, base.bias, tokens.rows
        self.register_buffer("ids", tokens.ids, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) to logits (..., V)."""
        own = linear(x, self.rows, None if self.bias is None else self.bias[self.ids])
        return super().forward(x).index_copy(-1, self.ids, own)


def train_beside(
    model: Transformer,
    config: AdapterConfig,
    values: Replaced | None = None,
    called: Callable[[str], str] = str,
) -> None:
    """Let the modules in `config.save`, and the rows of `config.tokens`, train, in fp32 whatever the model's dtype.

    values: where they were, if not as in the base. called: of a model that has some blocks of another alone, the names
    that its modules have there.
    """
    if not (config.save or config.tokens):
        return
    whole, rows = ({}, {}) if values is None else (values.whole, values.rows)
    embedding = model.model.embed_tokens
    model.hidden_dtype = embedding.weight.dtype
    ends = {*ENDS}.intersection(config.save)
    if len(ends) == 1 and model.config.tie_word_embeddings:
        model.config = dataclasses.replace(model.config, tie_word_embeddings=False)
    for path, module in [(path, module) for path, module in model.named_modules() if called(path) in config.save]:
        for leaf, old in [*module.named_parameters(recurse=False)]:
            new = whole.get(f"{path}.{leaf}", old.detach())
            setattr(module, leaf, nn.Parameter(new.to(old.device, torch.float32, copy=True)))
    if config.tokens:
        model.model["embed_tokens"] = tokens = TokenEmbedding(embedding, config.tokens)
        if EMBEDDING in rows:
            tokens.rows.data.copy_(rows[EMBEDDING][1])
        if model.config.tie_word_embeddings:
            model.lm_head = TokenHead(model.lm_head, tokens)
    model.tie_weights()


# ------------------------------------------------------------------------------------------------------- in the files


def family_names(model: Transformer) -> dict[str, str]:
    """The family's names, as transformers has them, of our modules that have parameters and lie there as with us."""
    names, found = Names(model.config, rows_in_memory), {}
    for path, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            piece = names.piece(f"{path}.weight")
            if piece.row.is_whole:
                found[path] = piece.theirs[0].removesuffix(".weight")
    return found


def modules_named(model: Transformer, names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Our modules with parameters whose names, or the family's for them, end in one of these, or which are in such.

    Returns their paths in the model's order, and those of `names` that are of no module.
    """
    theirs, found, used = family_names(model), [], set()
    paths = [path for path, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))]
    for path in paths:
        outer = [*_outer(path), *_outer(theirs.get(path, path))]
        fitting = {name for name in names if any(is_named(each, [name]) for each in outer)}
        used |= fitting
        found += [path] * bool(fitting)
    return found, [name for name in names if name not in used]


def _outer(path):
    """A module's name and those of the modules that it is in."""
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def tensors_beside(model: Transformer, config: AdapterConfig) -> dict[str, Tensor]:
    """What trains beside adapters, by PEFT's names (without its prefix)."""
    theirs, tensors = family_names(model), {}
    for path in config.save:
        for leaf, parameter in model.get_submodule(path).named_parameters(recurse=False):
            tensors[f"{theirs[path]}.{leaf}"] = parameter
    if config.tokens:
        embedding = model.model.embed_tokens
        rows = getattr(embedding, "rows", None)
        rows = embedding.weight[list(config.tokens)] if rows is None else rows
        tensors[f"{theirs[ENDS[0]]}.token_adapter.trainable_tokens_delta"] = rows
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def describe_beside(model: Transformer, config: AdapterConfig) -> dict:
    """What adapter_config.json says of them."""
    theirs, values = family_names(model), {}
    if config.save:
        values["modules_to_save"] = [theirs[path] for path in config.save]
    if {*ENDS} <= {*config.save} and model.config.tie_word_embeddings:
        values["modules_to_save"].remove(theirs[ENDS[1]])
        values["ensure_weight_tying"] = True
    if config.tokens:
        values["trainable_token_indices"] = {theirs[ENDS[0]]: list(config.tokens)}
    return values


def own_names(model: Transformer, values: dict) -> dict:
    """adapter_config.json's `values`, with our names where they name modules beside the adapters by the family's."""
    theirs = {name: path for path, name in family_names(model).items()}
    if all(name == path for name, path in theirs.items()):
        return values
    changed = dict(values)
    if save := values.get("modules_to_save"):
        found = [[path for name, path in theirs.items() if name.endswith(end)] or [end] for end in save]
        changed["modules_to_save"] = [path for paths in found for path in paths]
    if isinstance(ids := values.get("trainable_token_indices"), dict):
        own = {key: next((path for name, path in theirs.items() if is_named(name, [key])), key) for key in ids}
        changed["trainable_token_indices"] = {own[key]: each for key, each in ids.items()}
    return changed


def own_replaced(model: Transformer, replaced: Replaced) -> Replaced:
    """The same by our names of the parameters."""
    theirs = {name: path for path, name in family_names(model).items()}

    def ours(name):
        path, _, leaf = name.rpartition(".")
        return f"{theirs.get(path, path)}.{leaf}"

    renamed = {key: {ours(name): value for name, value in getattr(replaced, key).items()} for key in PARTS}
    return dataclasses.replace(replaced, **renamed)
