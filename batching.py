"""The prepared data on disk, and which of its samples make up which micro-batch.

A prepared folder holds `train.safetensors`, `val.safetensors` and `data.json`. In the first two all samples lie end to
end, memory-mapped: `tokens` (all,) int32, `is_target` (all,) bool, `offsets` (N + 1,) int64, `target_counts` (N,) and
`sources` (N,) int32.

To add a batching idea: a function like `sorted_in_step` and a line in `PLANNERS`.
"""

from array import array
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cli import UserError
from files import read_json

IGNORE = -100  # the target of a position that does not count (model.IGNORE)


# ----------------------------------------------------------------------------------------------- samples on disk


class Samples:
    """The samples of one prepared file.

    lengths (N,) int64: the positions a sample takes in the model: one less than its tokens, since the last is only
    ever a target. target_counts (N,) int32: how many of them have a target. sources (N,) int32: which source each
    sample is from, by its place in the `sources` of data.json.
    """

    def __init__(self, path):
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            self.tokens, self.is_target, self.offsets = (tensors[n] for n in ("tokens", "is_target", "offsets"))
            self.target_counts, self.sources = tensors["target_counts"], tensors["sources"]
        except (OSError, KeyError, SafetensorError) as error:
            raise UserError(f"{path} is missing or damaged ({error}): make it again with prepare_data.py") from None
        self.lengths, ends = self.offsets.diff() - 1, [*self.offsets[:1].tolist(), *self.offsets[-1:].tolist()]
        sizes = (len(self.is_target), len(self.target_counts), len(self.sources))
        if ends != [0, len(self.tokens)] or sizes != (ends[1], *[len(self.lengths)] * 2) or (self.lengths < 1).any():
            raise UserError(f"{path} is damaged (its offsets do not fit): make it again with prepare_data.py")

    def __len__(self):
        return len(self.lengths)

    def micro_batch(self, indices):
        """The samples `indices`, padded on the right: tokens and targets, both (B, T) int64.

        targets[b, t] is the token to predict from tokens[b, :t + 1], or IGNORE.
        """
        T = max(self.lengths[i].item() for i in indices)
        tokens = torch.zeros(len(indices), T, dtype=torch.int64)
        targets = torch.full((len(indices), T), IGNORE, dtype=torch.int64)
        for row, i in enumerate(indices):
            start, end = self.offsets[i].item(), self.offsets[i + 1].item()
            sample, wanted = self.tokens[start:end].long(), self.is_target[start + 1 : end]
            tokens[row, : len(sample) - 1] = sample[:-1]
            targets[row, : len(sample) - 1] = torch.where(wanted, sample[1:], IGNORE)
        return tokens, targets


class SampleWriter:
    """Collects samples and writes them as one prepared file."""

    def __init__(self):
        self.tokens, self.is_target = array("i"), array("b")
        self.offsets, self.target_counts, self.sources = array("q", [0]), array("i"), array("i")

    def __len__(self):
        return len(self.target_counts)

    def add(self, ids, is_target, source):
        """Add one sample: token ids, for each of them whether it is a target, and the number of its source."""
        self.tokens.extend(ids)
        self.is_target.extend(is_target)
        self.offsets.append(len(self.tokens))
        self.target_counts.append(sum(is_target[1:]))  # nothing comes before the first token to predict it from
        self.sources.append(source)

    def save(self, path):
        columns = {
            "tokens": torch.tensor(self.tokens, dtype=torch.int32),
            "is_target": torch.tensor(self.is_target, dtype=torch.bool),
            "offsets": torch.tensor(self.offsets, dtype=torch.int64),
            "target_counts": torch.tensor(self.target_counts, dtype=torch.int32),
            "sources": torch.tensor(self.sources, dtype=torch.int32),
        }
        save_file(columns, path)


def read_data_info(data_dir):
    """The parsed data.json of a prepared folder. Raises UserError if it is none."""
    path = Path(data_dir, "data.json")
    if not path.is_file():
        raise UserError(f"{path} does not exist: --data_dir must be a folder made by prepare_data.py")
    info = read_json(path)
    for key in ("tokenizer_hash", "prompt_style", "sources"):
        if key not in info:
            raise UserError(f"{path}: key {key!r} is missing: make the folder again with prepare_data.py")
    return info


# ------------------------------------------------------------------------------------------------------- planning


def sorted_in_step(lengths, target_counts, global_batch_size, micro_batch_tokens, seed, epoch):
    """Each step a random draw from the whole set, sorted by length only inside the step.

    So every step sees the full mix of tasks and lengths, and the gradient of the step is the same as unsorted; but
    samples that share a micro-batch are of about one length, which leaves little padding.

    lengths, target_counts: (N,) tensors. micro_batch_tokens: how many positions a micro-batch may have, padding
    included; a sample that is longer is a micro-batch by itself.
    Returns a list of steps; a step is a list of micro-batches, the longest samples first; a micro-batch is a list of
    sample numbers. The last step of the epoch may be smaller. A pure function of its arguments.
    """
    order = torch.randperm(len(lengths), generator=generator(seed, epoch))
    steps = []
    for drawn in order.split(global_batch_size):
        drawn = drawn[lengths[drawn].argsort(descending=True, stable=True)].tolist()
        micro_batches = []
        while drawn:
            rows = max(1, micro_batch_tokens // lengths[drawn[0]].item())
            micro_batches.append(drawn[:rows])
            drawn = drawn[rows:]
        steps.append(micro_batches)
    return steps


PLANNERS = {"sorted_in_step": sorted_in_step}


def generator(seed, epoch):
    """A random generator that depends on the seed and the epoch alone."""
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


def in_order(lengths, micro_batch_tokens):
    """All samples once, the longest first, cut into micro-batches: the plan of a validation."""
    N = len(lengths)
    return sorted_in_step(lengths, None, max(N, 1), micro_batch_tokens, seed=0, epoch=0)[0] if N else []
