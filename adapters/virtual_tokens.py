"""Prompt tuning and prefix tuning: trained tokens before every text, which attend and are attended to like others.

Their ids follow the vocabulary: V, V + 1 and so on. In training `batching.Samples.prepend` puts them before every
sample, in decoding `Decoder.read` before every prompt. So all other code sees a few more tokens, at the positions from
0 on, which the model reads and never predicts. A sliding window moves past them as past other tokens (as in PEFT).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.adapter import Adapter

if TYPE_CHECKING:
    from lora import AdapterConfig
    from model import Transformer

EMBEDDING = "model.embed_tokens"
PREFIX_STD = 0.02  # of a prefix's first keys and values
MULTIPLIES_LATER = ("granite",)  # families whose model in transformers scales whatever embeddings it gets


def virtual_ids(model: Transformer) -> list[int]:
    """The ids to put before every text for this model; [] if it has no virtual tokens."""
    number = getattr(model.model.embed_tokens, "virtual_tokens", 0)
    return [model.config.vocab_size + i for i in range(number)]


def take_rows(virtual: Tensor, rows: Tensor, others: Tensor) -> Tensor:
    """rows (n, ...), cast, at the places of virtual tokens and `others` elsewhere: (B, T, ...) like `others`.

    virtual: (B, T) int64, the number of a place's virtual token, below 0 if it has none. Nothing here waits for the
    device, as picking the places out would.
    """
    taken = F.embedding(virtual.clamp(min=0), rows.flatten(1)).view(*virtual.shape, *rows.shape[1:])
    is_virtual = (virtual >= 0).view(*virtual.shape, *[1] * (rows.dim() - 1))
    return torch.where(is_virtual, taken.to(others.dtype), others)


class VirtualEmbedding(Adapter):
    """The token embedding, which is given the ids of virtual tokens too. These have the last token's row."""

    unmergeable = "a model folder has no virtual tokens"
    in_steps = False
    flags = ("virtual_tokens",)

    def __init__(self, base: nn.Embedding, virtual_tokens: int):
        super().__init__(base)
        self.virtual_tokens, self.num_embeddings = virtual_tokens, base.num_embeddings

    @classmethod
    def number_of_virtual_tokens(cls, config: AdapterConfig) -> int:
        """As in `Adapter`."""
        return config.virtual_tokens

    @property
    def weight(self) -> Tensor:
        """The base's, (V, D)."""
        return self.base.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) int64 to (B, T, D)."""
        return self.base(tokens.clamp(max=self.num_embeddings - 1))


class PromptTuning(VirtualEmbedding):
    """Each virtual token has a trained embedding (Lester et al. 2021, arXiv 2104.08691).

    They start as those of tokens drawn from the vocabulary, as section 3.2 of the paper advises. scale: by what the
    model multiplies embeddings afterwards, but for PEFT not the trained ones.
    """

    def __init__(self, base: nn.Embedding, virtual_tokens: int, scale: float = 1.0):
        super().__init__(base, virtual_tokens)
        self.scale = scale
        start = torch.empty(virtual_tokens, base.embedding_dim, device=self.device)
        if not start.is_meta:
            drawn = torch.randint(base.num_embeddings, (virtual_tokens,), device=self.device)
            start.copy_(base.weight.detach()[drawn].float() * scale)
        self.prompt_embeddings = nn.Parameter(start)

    @classmethod
    def places(cls, model: Transformer, config: AdapterConfig) -> list[str]:
        """The token embedding."""
        return [EMBEDDING]

    @classmethod
    def shared(cls, model: Transformer, config: AdapterConfig, names: list[str], device: torch.device | str) -> float:
        """By what the model multiplies embeddings, if that is no part of reading the table in transformers."""
        return 1.0 if model.config.family in MULTIPLIES_LATER else model.config.embedding_scale

    @classmethod
    def over(
        cls, base: nn.Module, name: str, r: int, alpha: float, config: AdapterConfig, shared: float
    ) -> PromptTuning:
        """As in `Adapter`."""
        return cls(base, config.virtual_tokens, shared)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) int64, those from V on virtual, to (B, T, D)."""
        others, rows = super().forward(tokens), self.prompt_embeddings
        return take_rows(tokens - self.num_embeddings, rows if self.scale == 1 else rows / self.scale, others)


class PrefixTuning(Adapter):
    """In every layer each virtual token has a trained key and value (Li and Liang 2021, arXiv 2101.00190).

    Over an `Attention`. Keys are as they are after RoPE, so they know no position, as in PEFT. The virtual tokens' own
    hidden states are computed like others and read by nobody.
    """

    unmergeable = VirtualEmbedding.unmergeable
    in_steps = False
    compiles = False  # torch 2.13 fails on a residual sum whose parts have lengths of other names ("s52" not defined)
    flags = ("virtual_tokens",)

    def __init__(self, base: nn.Module, virtual_tokens: int, vocab_size: int):
        super().__init__(base)
        self.vocab_size = vocab_size
        heads = base.k_proj.out_features // base.head_dim
        for name in ("prefix_keys", "prefix_values"):
            start = torch.empty(virtual_tokens, heads, base.head_dim, device=self.device)
            setattr(self, name, nn.Parameter(start if start.is_meta else start.normal_(std=PREFIX_STD)))

    @classmethod
    def places(cls, model: Transformer, config: AdapterConfig) -> list[str]:
        """The token embedding, which has to take virtual tokens, and every attention."""
        return [EMBEDDING, *attentions(model)]

    @classmethod
    def shared(cls, model: Transformer, config: AdapterConfig, names: list[str], device: torch.device | str) -> int:
        """The vocabulary's size."""
        return model.config.vocab_size

    @classmethod
    def over(cls, base: nn.Module, name: str, r: int, alpha: float, config: AdapterConfig, shared: int) -> Adapter:
        """As in `Adapter`."""
        if isinstance(base, nn.Embedding):
            return VirtualEmbedding(base, config.virtual_tokens)
        return cls(base, config.virtual_tokens, shared)

    @classmethod
    def number_of_virtual_tokens(cls, config: AdapterConfig) -> int:
        """As in `Adapter`."""
        return config.virtual_tokens

    def forward(self, x: Tensor, angles: Any, attention: Any, cache: Any) -> Tensor:
        """As in `model.Attention`. Without `attention.tokens`, as in a step of a decoder, no token is virtual."""
        tokens = getattr(attention, "tokens", None)
        return self.base(x, angles, attention, cache if tokens is None else WithPrefix(self, tokens, cache))


class WithPrefix:
    """A cache, or None, that gets and gives a prefix's keys and values in the place of virtual tokens'.

    tokens: (B, T), whose keys and values come next.
    """

    def __init__(self, prefix: PrefixTuning, tokens: Tensor, cache: Any):
        self.prefix, self.cache, self.virtual = prefix, cache, tokens - prefix.vocab_size

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As `KVCache.update`; without a cache, k and v (B, K, T, d) of these tokens alone."""
        rows = self.prefix.prefix_keys, self.prefix.prefix_values
        k, v = (
            take_rows(self.virtual, own, x.transpose(1, 2)).transpose(1, 2) for own, x in zip(rows, (k, v), strict=True)
        )
        return (k, v) if self.cache is None else self.cache.update(layer, k, v)


def attentions(model: nn.Module) -> list[str]:
    """The names of the attention of each block, in order."""
    return [f"model.layers.{number}.self_attn" for number in range(len(model.model.layers))]
