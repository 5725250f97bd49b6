"""What is random in a prepared folder: the validation split, few-shot examples, how often a mixture takes each sample.

All of it follows from --seed.
"""

import random
from typing import Any

import numpy as np

from preparation.mixture import Source
from preparation.record_store import Records
from shell.cli import UserError


def sample_validation(records: Records, val_fraction: float, seed: int) -> np.ndarray:
    """(N,) bool: which records are held back for validation, sampled from each source. At least one of each is left.

    Records with the same prompt are all held back or all trained on, across sources too.
    """
    hashes, source_of, kept = np.array(records.hashes), np.array(records.sources, np.int32), records.kept()
    held, seen, generator = np.empty(0, hashes.dtype), np.empty(0, hashes.dtype), np.random.default_rng(seed)
    for source in np.unique(source_of):
        mine = hashes[kept & (source_of == source)]
        prompts, sizes = np.unique(mine[~np.isin(mine, seen)], return_counts=True)
        order = generator.permutation(len(prompts))[: max(0, len(prompts) - 1)]
        wanted = round(val_fraction * len(mine)) - int(np.isin(mine, held).sum())
        held = np.concatenate([held, prompts[order[sizes[order].cumsum() <= wanted]]])
        seen = np.concatenate([seen, prompts])
    return kept & np.isin(hashes, held)


def example_pools(sources: list[Source], records: Records, in_val: np.ndarray) -> list[np.ndarray | None]:
    """For each source the numbers of the records that may stand before a question; None if it asks for no examples."""
    usable, source_of = records.kept() & ~in_val, np.array(records.sources, np.int32)
    return [np.flatnonzero(usable & (source_of == i)) if x.few_shot[1] else None for i, x in enumerate(sources)]


def sample_examples(source: Source, pool: np.ndarray | None, seed: int, number: int, copy: int) -> list[int]:
    """The numbers of the records to stand before the question of record `number`: from the pool, not itself.

    copy: counts the times that the mixture takes the record; each has examples of its own.
    """
    if pool is None:
        return []
    generator = random.Random(f"{seed} {number} {copy}")
    count = min(generator.randint(*source.few_shot), len(pool) - 1)
    sampled = [int(pool[i]) for i in generator.sample(range(len(pool)), max(0, count + 1))]
    return [i for i in sampled if i != number][: max(0, count)]


def resampled_sources(sources: list[Source]) -> np.ndarray:
    """(sources,) bool: whether each copy of a sample differs, since its examples are sampled again."""
    return np.array([source.few_shot[1] > 0 for source in sources])


def copies_of_samples(s: Any, sources: list[Source], source_of: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(n,) int64: how many copies of each sample the mixture has.

    s: the Settings of prepare_data.py. source_of: (n,) the number of each sample's source. sizes: (n,) what weights
    count, 1 or its target tokens. A source with a weight gets its share of what all those with weights have together
    (or of --mix_size), one with a number of samples so many, any other each sample once.
    """
    copies, generator = np.ones(len(source_of), np.int64), np.random.default_rng(s.seed)
    weights = {i: source.weight for i, source in enumerate(sources) if source.weight is not None}
    total = s.mix_size or sum(int(sizes[source_of == i].sum()) for i in weights)
    for i, source in enumerate(sources):
        mine = generator.permutation(np.flatnonzero(source_of == i))
        if i in weights:
            copies[mine] = _copies_up_to(sizes[mine], total * weights[i] / sum(weights.values()), source)
        elif source.samples is not None:
            copies[mine] = _copies_up_to(np.ones(len(mine), np.int64), source.samples, source)
    return copies


def _copies_up_to(sizes, wanted, source):
    """How many copies of each of some samples, in random order, have together a size of about `wanted`."""
    if not len(sizes):
        raise UserError(f"source {source.name}: no sample is left of it, so it cannot have its share of the mixture")
    full, rest = divmod(wanted, int(sizes.sum()))
    return int(full) + (sizes.cumsum() - sizes / 2 <= rest)  # the last one if more than half of it is wanted
