"""Keys and values of beginnings that prompts share, such as the examples of a benchmark, kept from request to request.

A text is cut into blocks of BLOCK tokens. A block is found by the block before it and its own tokens, so it stands for
the whole text up to its end, and texts that begin alike share blocks. Where a text begins, its `kind` stands in the
place of a block before: what else decides about keys and values, such as the adapter.

When there is no room, the block goes that was used longest ago. A block is used whenever one behind it is, and counts
as used after it: so the oldest is always one that nothing follows.

(Blocks by their tokens, the oldest end first: vLLM's automatic prefix caching.)
"""

import collections
from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 16  # tokens: of what two prompts share at most so many, less one, are read again


class Text(NamedTuple):
    """The tokens (ids) of a prompt, and what else its keys and values depend on. Texts of two kinds share nothing."""

    kind: Hashable
    ids: list[int]


class Block:
    """Keys and values of BLOCK positions in all layers: k, v (layers, K, BLOCK, d)."""

    def __init__(self, k: Tensor, v: Tensor):
        self.k, self.v = k, v

    @property
    def size(self) -> int:
        """Bytes."""
        return self.k.nbytes + self.v.nbytes


class PrefixCache:
    """Blocks in at most `room` bytes, on the device that the keys and values are on. For one thread.

    What other threads may read: prompts, hits: how many were looked up, and of how many some was held. tokens, reused:
    those of these prompts, and of them those that were not read. size: bytes that are held.
    """

    def __init__(self, room: int):
        self.room, self.size = room, 0
        self.prompts = self.hits = self.tokens = self.reused = 0
        self._blocks: collections.OrderedDict[tuple, Block] = collections.OrderedDict()  # that used longest ago first

    def find(self, text: Text) -> list[Block]:
        """The blocks that a text begins with, as far as they are held, but never all of it: one token is to be read."""
        found = self._path(text, (len(text.ids) - 1) // BLOCK)
        return list(found.values())

    def held(self, text: Text) -> int:
        """How many of a text's tokens `find` finds."""
        return length_of(self.find(text))

    def add(self, text: Text, k: Tensor, v: Tensor) -> None:
        """Hold the whole blocks of a text, whose keys and values these are: (layers, K, tokens, d). They are copied."""
        path = self._path(text, len(text.ids) // BLOCK)
        before = next(reversed(path.values()), text.kind)
        for start in range(BLOCK * len(path), len(text.ids) - BLOCK + 1, BLOCK):
            part = slice(start, start + BLOCK)
            key, block = (before, tuple(text.ids[part])), Block(k[:, :, part].clone(), v[:, :, part].clone())
            self._blocks[key] = path[key] = before = block
            self.size += block.size
        for key in reversed(path):
            self._blocks.move_to_end(key)
        while self.size > self.room:
            _, oldest = self._blocks.popitem(last=False)
            self.size -= oldest.size

    def count(self, tokens: int, reused: int) -> None:
        """Note a prompt of so many tokens, of which so many were not read."""
        self.prompts += 1
        self.hits += reused > 0
        self.tokens += tokens
        self.reused += reused

    def _path(self, text, most):
        """The blocks that a text begins with, by their keys in `_blocks`, at most so many."""
        found, before = {}, text.kind
        while len(found) < most:
            key = (before, tuple(text.ids[BLOCK * len(found) : BLOCK * (len(found) + 1)]))
            if key not in self._blocks:
                break
            found[key] = before = self._blocks[key]
        return found


def length_of(blocks: list[Block]) -> int:
    """How many tokens these blocks have together."""
    return BLOCK * len(blocks)


def fill(k: Tensor, v: Tensor, blocks: list[Block]) -> None:
    """Write the first positions of blocks into k and v, (layers, K, T, d): as many as these have."""
    for x, parts in ((k, [block.k for block in blocks]), (v, [block.v for block in blocks])):
        x.copy_(torch.cat(parts, dim=2)[:, :, : x.size(2)])
