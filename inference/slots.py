"""Keys and values at addresses that stay while rows join and leave: what a CUDA graph of a decoding step reads.

A row has a slot of its own, which it fills from the beginning: nothing is padded, and its number of positions is on the
device. A step computes for all slots of the layout, the free ones included, whose results nobody reads.

The memory of a layer is one flat tensor. So slots of any number and size begin at the same address, and rows can be
laid out anew without a recorded step becoming wrong. Only growing changes addresses: to what the present rows need, and
since their number and the size of a slot are rounded up to powers of two, it at least doubles nearly always.
"""

import torch
from torch import Tensor

from inference.kv_cache import KVCache
from model import Config
from ops.attention import Attend, Scores, masked_attention, sdpa_attention
from ops.devices import to_device
from ops.gpu import power_of_two

# Positions of the smallest slot. A smaller one would save little: with 256 positions of a row, a step of Llama 7B reads
# 1% more than its weights. And each size is recorded by itself.
LEAST_ROOM = 256


class Slots:
    """Keys, values and tokens of rows. `count` slots of `room` positions each are in use, of which rows have some.

    numbers: the slot of each row, in the order in which rows joined. lengths: how many positions each has. adapters:
    which adapter each has, where there are several (several.py), else 1.
    grown: how often there has been more memory, with other addresses.
    On the device: ids (n,) int64, the token that each slot is to read next; position (n,) int64, its place; live (n,)
    int64, 1 if a row has the slot; adapter (n,) int64, that of its row; order (B,) int64, `numbers`.
    """

    def __init__(self, config: Config, dtype: torch.dtype, device: torch.device):
        K, d = config.num_key_value_heads, config.head_dim
        self.context, self.device = config.max_position_embeddings, device
        self.kinds = [(1, 1, torch.int64), *[(K, d, dtype)] * (2 * config.num_hidden_layers)]  # tokens, k, v, k, v, ...
        self.flat: list[Tensor] = [torch.empty(0, dtype=dtype, device=device) for _, _, dtype in self.kinds]
        self.size = self.count = self.room = self.grown = 0  # size: positions for which there is memory
        self.numbers: list[int] = []
        self.lengths: list[int] = []
        self.adapters: list[int] = []

    def view(self, kind: int, count: int, room: int) -> Tensor:
        """One of `flat`, such as a layer's keys, in a layout: (count, heads, room, d)."""
        heads, d, _ = self.kinds[kind]
        return self.flat[kind][: count * room * heads * d].view(count, heads, room, d)

    @property
    def longest(self) -> int:
        """The most positions that a row has."""
        return max(self.lengths, default=0)

    def fit(self, rows: int, positions: int) -> None:
        """Lay out for so many rows of at most so many positions."""
        count, room = power_of_two(rows), max(power_of_two(positions), LEAST_ROOM)
        if LEAST_ROOM <= self.context < room and positions <= self.context:
            room = self.context
        if (count, room) == (self.count, self.room) and self.size:
            return
        grows = count * room > self.size
        if grows or room != self.room or max(self.numbers, default=0) >= count:
            self._move(count, room, count * room if grows else self.size)
        self.count, self.room = count, room
        if grows:
            self.grown += 1
            slots = self.size // LEAST_ROOM  # of any layout
            numbers = torch.zeros(4, slots, dtype=torch.int64, device=self.device)
            self.ids, self.position, self.live, self.adapter = numbers
        self._tell_device()

    def _move(self, count, room, size):
        """Put the rows into the first slots of another layout, each kind of memory by itself: a copy of one is made."""
        rows, self.size = self._on_device(self.numbers), 0  # if memory ends on the way, all of it is made anew
        for kind, (heads, d, _) in enumerate(self.kinds):
            held = self.view(kind, self.count, self.room)[rows, :, : self.longest] if self.numbers else None
            if size * heads * d != len(self.flat[kind]):
                self.flat[kind] = self.flat[kind].new_empty(0)  # the old memory is free before the new is asked for
                self.flat[kind] = self.flat[kind].new_zeros(size * heads * d)
            if held is not None:
                slots = self.view(kind, count, room)[: len(rows)]
                slots[:, :, : self.longest], slots[:, :, self.longest :] = held, 0
        self.size, self.numbers = size, list(range(len(self.numbers)))

    def put(self, rows: list[int], cache: KVCache) -> None:
        """Write into the slots of these rows what a cache holds, whose rows they are, without its padding.

        Behind it are zeros: a row that has ended may have left NaN there, which no mask takes out of a product.
        """
        start = torch.zeros_like(cache.tokens[:, 0]) if cache.padding is None else cache.padding
        longest = max(self.lengths[row] for row in rows)
        at = start[:, None] + torch.arange(longest, device=self.device)  # (n, longest): where the cache has them
        beyond, at = (at >= cache.length)[:, None, :, None], at.clamp(max=cache.length - 1)[:, None, :, None]
        numbers = self._on_device([self.numbers[row] for row in rows])
        sources = [cache.tokens[:, None, :, None], *(x for layer in zip(cache.k, cache.v, strict=True) for x in layer)]
        for kind, source in enumerate(sources):
            held = source.gather(2, at.expand(-1, source.size(1), -1, source.size(3))).masked_fill(beyond, 0)
            slots = self.view(kind, self.count, self.room)
            slots[numbers, :, :longest], slots[numbers, :, longest:] = held, 0

    def join(self, cache: KVCache) -> None:
        """Give the rows of a cache slots, after the rows that have some."""
        before, new = len(self.numbers), len(cache.tokens)
        padding = [0] * new if cache.padding is None else cache.padding.tolist()
        lengths = [cache.length - unused for unused in padding]
        adapters = [1] * new if cache.adapters is None else cache.adapters.tolist()
        self.fit(before + new, max(self.longest, *lengths) + 1)
        free = [slot for slot in range(self.count) if slot not in self.numbers]
        self.numbers, self.lengths = self.numbers + free[:new], self.lengths + lengths
        self.adapters = self.adapters + adapters
        self.put(list(range(before, before + new)), cache)
        self._tell_device()

    def keep(self, rows: list[int]) -> None:
        """Free the slots of all but these rows."""
        self.numbers, self.lengths, self.adapters = (
            [values[row] for row in rows] for values in (self.numbers, self.lengths, self.adapters)
        )
        self.fit(len(rows), self.longest + 1)
        self._tell_device()

    def clear(self) -> None:
        """Free all slots. What memory there is stays, unless it ended while it grew."""
        self.numbers, self.lengths, self.adapters = [], [], []
        if self.size:
            self._tell_device()
        else:
            self.flat = [flat.new_empty(0) for flat in self.flat]

    def advance(self) -> None:
        """Every row has one more position."""
        self.position += self.live
        self.lengths = [length + 1 for length in self.lengths]

    def _tell_device(self):
        self.order = self._on_device(self.numbers)
        told = (self.position, self.lengths), (self.live, [1] * len(self.numbers)), (self.adapter, self.adapters)
        for tensor, values in told:
            tensor.zero_()  # a free slot reads its first place again and again: it sees a key
            tensor[self.order] = self._on_device(values)

    def _on_device(self, numbers):
        return to_device(torch.tensor(numbers, dtype=torch.int64), self.device)


class StepCache:
    """The slots of one layout, as the cache that a block extends by the next position of each: B = `count` rows.

    Everything in it is made on the device, from what is there: it can be recorded.
    """

    def __init__(self, slots: Slots, count: int, room: int):
        self.views = [slots.view(kind, count, room) for kind in range(len(slots.flat))]
        self.ids, self.position, self.adapters = (x[:count] for x in (slots.ids, slots.position, slots.adapter))
        self.back = (self.position[:, None] - torch.arange(room, device=slots.device))[:, None, None]  # (B, 1, 1, room)
        self._append(0, self.ids[:, None, None, None])

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put k, v (B, K, 1, d) of one layer in their places; returns all that the slots have, (B, K, room, d)."""
        return self._append(1 + 2 * layer, k), self._append(2 + 2 * layer, v)

    def _append(self, kind, x):
        return self.views[kind].scatter_(2, self.position[:, None, None, None].expand_as(x), x)

    def attention(self, scores: Scores, slopes: Tensor | None) -> Attend:
        """How a layer attends: a function of q (B, H, 1, d), k, v and sinks. slopes: those of `scores`, (H,) fp32."""
        mask = self.back >= 0
        if scores.window is not None:
            mask = mask & (self.back < scores.window)
        if scores.softcap is not None or scores.sinks:
            return Attend(masked_attention, scores=scores, mask=mask, back=self.back)
        # From a mask of yes and no torch would make the same in every layer; slopes would come from the host each time.
        bias = torch.zeros(mask.shape, device=mask.device) if slopes is None else -slopes[:, None, None] * self.back
        bias = bias.masked_fill(~mask, -torch.inf).to(self.views[1].dtype)
        return Attend(biased_attention, scale=scores.scale, bias=bias)


def biased_attention(q: Tensor, k: Tensor, v: Tensor, sinks: None, scale: float, bias: Tensor) -> Tensor:
    """Attention of q (B, H, 1, d) to k, v (B, K, S, d) with `bias`, (B, 1 or H, 1, S) in q's dtype, on its scores."""
    return sdpa_attention(q, k, v, bias, scale)
