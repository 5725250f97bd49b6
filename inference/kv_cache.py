"""The keys and values of the positions that a model has read, so that generating a token need not compute them again.

`Transformer.forward` takes the cache and extends it.
"""

import copy

import torch
from torch import Tensor

from model import Config


class KVCache:
    """Room for the keys and values of `max_length` positions in every layer, made once and filled in place.

    `padding` (B,) says how many positions at the left of each row hold nothing, for prompts of unequal lengths.
    `adapters` (B,) int64: which adapter each row has, where there are several (several.py); None: all have the first.
    """

    def __init__(
        self,
        config: Config,
        batch_size: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device | str,
        padding: Tensor | None = None,
        adapters: Tensor | None = None,
    ):
        shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, max_length, config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.tokens = torch.zeros(batch_size, max_length, dtype=torch.int64, device=device)  # whose they are
        self.padding, self.adapters = padding, adapters
        self.length = 0  # positions filled so far

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v (B, K, T, d) of one layer; returns all of its keys and values, (B, K, length + T, d)."""
        end = self.length + k.size(2)
        if end > self.k.size(3):  # written past the end, one position would be lost without an error
            raise ValueError(f"the cache has room for {self.k.size(3)} positions, {end} are needed")
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def keep(self, rows: Tensor) -> None:
        """Forget all but these rows of the batch: indices (B',) int64."""
        self.k, self.v, self.tokens = self.k[:, rows], self.v[:, rows], self.tokens[rows]
        if self.padding is not None:
            self.padding = self.padding[rows]
        if self.adapters is not None:
            self.adapters = self.adapters[rows]


def joined(caches: list[KVCache], more: int) -> KVCache:
    """A new cache: the rows of all in turn, moved so that they end together, and room for `more` positions.

    Keys and values hold for a row wherever it begins: positions count from its padding, and ALiBi and windows from a
    row's query back. Columns that are padding in every row are left out.
    """
    parts = [(cache, 0 if cache.padding is None else int(cache.padding.min())) for cache in caches]
    length = max(cache.length - unused for cache, unused in parts)
    layers, _, K, _, d = caches[0].k.shape
    shape = (layers, sum(cache.k.size(1) for cache in caches), K, length + more, d)
    result = copy.copy(caches[0])
    result.k, result.v, result.length = result.k.new_zeros(shape), result.k.new_zeros(shape), length
    result.tokens = result.tokens.new_zeros(shape[1], shape[3])
    result.padding, first = torch.zeros(shape[1], dtype=torch.int64, device=result.k.device), 0
    for cache, unused in parts:
        rows, start = slice(first, first + cache.k.size(1)), length - (cache.length - unused)
        for old, new in ((cache.k, result.k), (cache.v, result.v)):
            new[:, rows, :, start:length] = old[:, :, :, unused : cache.length]
        result.tokens[rows, start:length] = cache.tokens[:, unused : cache.length]
        result.padding[rows] = start - unused if cache.padding is None else cache.padding + (start - unused)
        first = rows.stop
    if caches[0].adapters is not None:
        result.adapters = torch.cat([cache.adapters for cache in caches])
    return result
