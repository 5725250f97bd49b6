"""What the seed decides: the validation part, the examples before a question, how often a sample is taken."""

import random

import numpy as np

from shell.cli import UserError


def draw_validation(s, records):
    """(N,) bool: which records are held back for validation, drawn from each source; one at least is left.

    Records with the same prompt, of whatever source, are on one side.
    """
    hashes, of, alive = np.array(records.hashes), np.array(records.sources, np.int32), records.alive()
    held, seen, draw = np.empty(0, hashes.dtype), np.empty(0, hashes.dtype), np.random.default_rng(s.seed)
    for source in np.unique(of):
        mine = hashes[alive & (of == source)]
        prompts, sizes = np.unique(mine[~np.isin(mine, seen)], return_counts=True)
        order = draw.permutation(len(prompts))[: max(0, len(prompts) - 1)]
        wanted = round(s.val_fraction * len(mine)) - int(np.isin(mine, held).sum())
        held = np.concatenate([held, prompts[order[sizes[order].cumsum() <= wanted]]])
        seen = np.concatenate([seen, prompts])
    return alive & np.isin(hashes, held)


def example_pools(sources, records, in_val):
    """For each source the numbers of the records that may stand before a question; None where none shall."""
    usable, of = records.alive() & ~in_val, np.array(records.sources, np.int32)
    return [np.flatnonzero(usable & (of == i)) if x.few_shot[1] else None for i, x in enumerate(sources)]


def choose_examples(s, sources, records, pools, number, copy):
    """The numbers of the records to stand before the question of one: of the same source, not itself."""
    pool, (least, most) = pools[records.sources[number]], sources[records.sources[number]].few_shot
    if pool is None:
        return []
    draw = random.Random(f"{s.seed} {number} {copy}")
    count = min(draw.randint(least, most), len(pool) - 1)
    drawn = [int(pool[i]) for i in draw.sample(range(len(pool)), max(0, count + 1))]
    return [i for i in drawn if i != number][: max(0, count)]


def redrawn(sources):
    """(sources,) bool: whether a second copy of a sample differs from the first."""
    return np.array([source.few_shot[1] > 0 for source in sources])


def how_often(s, sources, of, sizes):
    """(n,) how often each sample is taken.

    of: (n,) the number of each one's source. sizes: (n,) what weights count, 1 or its target tokens. A source with a
    weight gets its share of what all those with weights have together (or of --mix_size), one with a number of samples
    so many, any other each sample once.
    """
    times, draw = np.ones(len(of), np.int64), np.random.default_rng(s.seed)
    weights = {i: source.weight for i, source in enumerate(sources) if source.weight is not None}
    total = s.mix_size or sum(int(sizes[of == i].sum()) for i in weights)
    for i, source in enumerate(sources):
        mine = draw.permutation(np.flatnonzero(of == i))
        if i in weights:
            times[mine] = _times(sizes[mine], total * weights[i] / sum(weights.values()), source)
        elif source.samples is not None:
            times[mine] = _times(np.ones(len(mine), np.int64), source.samples, source)
    return times


def _times(sizes, wanted, source):
    """How often each of some samples, in random order, is taken, so that their sizes add up to about `wanted`."""
    if not len(sizes):
        raise UserError(f"source {source.name}: no sample is left of it, so it cannot have its share of the mixture")
    full, rest = divmod(wanted, int(sizes.sum()))
    return int(full) + (sizes.cumsum() - sizes / 2 <= rest)  # the last one if more than half of it is wanted
