"""EVA: adapters that start with their layers' main directions of input (Paischer et al. 2024, arXiv 2410.07170)."""

import dataclasses
import itertools
import math
import sys
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

import lora
from batching import IGNORE
from lora import AdapterConfig
from model import Transformer
from ops.devices import to_device
from ops.forks import Forks
from shell.cli import UserError
from weights.peft_layout import ends, patterns

EVA_RHO = 2.0  # PEFT's
SIMILARITY = 0.99  # cosine of a direction before and after a batch, from which on it has converged (PEFT's tau)
BATCHES = 500  # after which it ends in any case
SEED = 42  # of the random start of the fast SVD: PEFT's, so that the numbers are the same


class PrincipalComponents:
    """The n main directions of rows that come in batches (Ross et al. 2008, incremental PCA), in fp32.

    components: (n, D), orthonormal. shares: (n,), of the rows' variance that lies in each. converged: (n,) bool,
    whether each was about the same before the last batch.
    """

    def __init__(self, n: int):
        self.n, self.count, self.components = n, 0, None
        self.converged = torch.zeros(n, dtype=torch.bool)

    def update(self, x: Tensor) -> None:
        """Take a batch (N, D) into account; one of fewer rows than directions is left out."""
        N = len(x)
        if self.n > N:
            return
        x, mean = x.float(), x.double().mean(0)
        spread, rows = (x - mean).square().sum(), (x - mean).float()
        if self.components is None:
            self.mean, self.spread = mean, spread
        else:
            apart, weight = self.mean - mean, self.count * N / (self.count + N)
            self.spread = self.spread + spread + weight * apart.square().sum()
            rows = torch.cat([self.values[:, None] * self.components, rows, math.sqrt(weight) * apart.float()[None]])
            self.mean = (self.count * self.mean + N * mean) / (self.count + N)
        self.count += N
        before, self.components, self.values = self.components, *self._decomposed(rows)
        self.shares = self.values.square() / self.spread
        if before is not None:
            self.converged = torch.cosine_similarity(self.components, before).cpu() >= SIMILARITY

    def has_converged(self, r: int) -> bool:
        """Whether the first r directions have."""
        return bool(self.converged[:r].all())

    def _decomposed(self, rows):
        with torch.random.fork_rng([rows.device] if rows.is_cuda else []):
            torch.manual_seed(SEED)
            _, S, V = torch.svd_lowrank(rows, q=min(2 * self.n, *rows.shape), niter=4)
        components, n = V.T, self.n
        largest = components.gather(1, components.abs().argmax(1, keepdim=True))
        return (components * largest.sign())[:n], S[:n]  # of either sign the one whose largest element is above 0


def eva(
    model: Transformer, config: AdapterConfig, batches: Iterable[tuple], rho: float
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """A's rows are the main directions of a layer's inputs at positions with a target; B is zero.

    The ranks of all layers together stay as they are, but go to the directions that explain most of their layer's
    variance: no layer gets more than rho times its rank, some may get none. The scales stay too. batches: tokens,
    targets and offsets; as many are taken as it needs to converge. Returns the config with these ranks, and A by layer.
    """
    layers = {name: layer for name, layer in lora.linear_layers(model).items() if config.covers(name)}
    most = {name: round(config.rank(name) * rho) for name in layers}
    batches = iter(batches)
    one = next(batches)
    first = same_inputs(model, layers, one)
    inputs = {
        leader: PrincipalComponents(max(most[name] for name in first if first[name] == leader))
        for leader in dict.fromkeys(first.values())
    }
    ranks = {name: inputs[leader].n for name, leader in first.items()}
    for number, batch in enumerate(itertools.islice(itertools.chain([one], batches), BATCHES)):
        moving = {leader for name, leader in first.items() if not inputs[leader].has_converged(ranks[name])}
        if not moving:
            print(f"--lora_init eva: the directions are clear after {number} micro-batches", file=sys.stderr)
            break
        watch(model, {leader: layers[leader] for leader in moving}, batch, lambda name, x: inputs[name].update(x))
        if all(part.components is not None for part in inputs.values()):
            ranks = shared_out({name: inputs[leader].shares[: most[name]] for name, leader in first.items()}, config)
    _check_seen(inputs, sum(not inputs[leader].has_converged(ranks[name]) for name, leader in first.items()))
    As = {name: inputs[first[name]].components[:r] for name, r in ranks.items() if r}
    return with_ranks(config, ranks, [*lora.linear_layers(model)]), As


def same_inputs(model: Transformer, layers: dict[str, nn.Module], batch: tuple) -> dict[str, str]:
    """Of each layer the first one that gets the very same input: of queries, keys and values, queries."""
    found, last = {}, [None, None]

    def look(name, x):
        if x is not last[0]:
            last[:] = x, name
        found[name] = last[1]

    watch(model, layers, batch, look, of_targets=False)
    return {name: found[name] for name in layers if name in found}


def watch(
    model: Transformer,
    layers: dict[str, nn.Module],
    batch: tuple,
    look: Callable[[str, Tensor], None],
    of_targets: bool = True,
) -> None:
    """Run the model over a batch, and let `look(name, x)` see each layer's input, at positions with a target (n, D)."""
    tokens, targets, offsets = batch
    if isinstance(offsets, Forks):  # layers may see whole samples then (`Transformer.hidden_states`)
        sources, offsets = offsets.sources(), offsets.whole_offsets()
        tokens, targets = tokens[:, sources], targets[:, sources]
    device = model.model.embed_tokens.weight.device
    rows = to_device((targets.flatten() != IGNORE).nonzero().squeeze(1), device)

    def hook(name):
        return lambda _, args: look(name, args[0].flatten(0, -2)[rows] if of_targets else args[0])

    hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        x = model.hidden_states(to_device(tokens, device), offsets=offsets)
        if "lm_head" in layers:
            model.lm_head(x)
    finally:
        for each in hooks:
            each.remove()


def shared_out(shares: dict[str, Tensor], config: AdapterConfig) -> dict[str, int]:
    """How many directions each layer keeps, of `shares` (n,) of each: the largest of all, as many as ranks in all."""
    budget = sum(config.rank(name) for name in shares)
    order = torch.cat([*shares.values()]).argsort(descending=True, stable=True)[:budget]
    owners = torch.cat([torch.full((len(each),), i) for i, each in enumerate(shares.values())])
    counts = owners[order.cpu()].bincount(minlength=len(shares)).tolist()
    return dict(zip(shares, counts, strict=True))


def with_ranks(config: AdapterConfig, ranks: dict[str, int], linears: list[str]) -> AdapterConfig:
    """`config` with these ranks of its layers, and the scales that they had. linears: the model's linear layers."""
    kept = [name for name, r in ranks.items() if r]
    power = 0.5 if config.rslora else 1  # by which the scale falls with the rank
    alphas = {name: config.alpha_of(name) * (ranks[name] / config.rank(name)) ** power for name in kept}
    if len(kept) < len(ranks):
        config = dataclasses.replace(config, targets=tuple(ends(kept, linears)), layers=None)
    ranks = patterns({name: ranks[name] for name in kept}, config.r)
    return dataclasses.replace(config, rank_pattern=ranks, alpha_pattern=patterns(alphas, config.alpha))


def _check_seen(inputs, moving):
    """Raise UserError if a layer has seen too few targets for its directions; say so if some layers' still move."""
    if any(part.components is None for part in inputs.values()):
        least = max(part.n for part in inputs.values())
        raise UserError(
            f"--lora_init eva: no micro-batch has {least} targets: raise --micro_batch_tokens, or lower --lora_r"
        )
    if moving:
        print(f"note: --lora_init eva: after {BATCHES} micro-batches {moving} layers still change", file=sys.stderr)
