"""How adapters start (`--lora_init`), where that is not at random and with B = 0.

A start looks at nothing, at the base's weight, or at the activations of training batches:

- `adapter`: fills the matrices of an adapter that is there.
- `weight`: of a dense weight, as it is read and before it is quantised, it makes A and B, and says what is taken from
  the weight for them, so that base and adapter together begin as the base was. One layer is in memory at a time; beside
  it an SVD takes about three times its size in fp32, for as long as it lasts.
- `activations`: of the model without adapters and training batches it makes each A, and may share out the ranks.

To add one: a function like `orthogonal`, `pissa` or `eva` (eva.py), and a row in `INITIALISATIONS`. An adapter's folder
knows what was taken from the base (weights/residual.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

import lora
from batching import PLANNERS, open_samples
from lora import AdapterConfig, LoRALinear
from model import Transformer
from quantize import BLOCKS, quantizer_of
from shell.cli import UserError
from training.eva import EVA_RHO, eva
from training.steps import planned_steps
from weights.beside import train_beside
from weights.checkpoint import load_model
from weights.residual import rest

if TYPE_CHECKING:
    from training.settings import Settings


class Start(NamedTuple):
    """Of one layer: A (r, in) and B (out, r), and what is taken from the base's weight: such a pair too, or None."""

    A: Tensor
    B: Tensor
    taken: tuple[Tensor, Tensor] | None


class Layer(NamedTuple):
    """What a start by the weight may ask of a layer: its name, rank, scale, its quantiser or None; the iterations."""

    name: str
    r: int
    scale: float
    quantizer: Callable | None
    iterations: int | None


# ------------------------------------------------------------------------------------------------ looking at nothing


def gaussian(adapter: LoRALinear) -> None:
    """A normal with a deviation of 1 / r, as diffusers has it."""
    nn.init.normal_(adapter.lora_A, std=1 / len(adapter.lora_A))


def orthogonal(adapter: LoRALinear) -> None:
    """A and B of orthogonal subspaces, so that B A = 0 though neither is (datta0.github.io/posts/rethink-lora-init).

    The rows of a random orthogonal matrix (r, r) are shared out: the even ones to A, the odd ones to B.
    """
    r, device = len(adapter.lora_A), adapter.device
    Q, _ = torch.linalg.qr(torch.randn(r, r))
    A = torch.randn(adapter.in_features, r // 2).mm(Q[0::2]).T / 10
    B = torch.randn(r // 2, adapter.out_features).T.mm(Q[1::2]) / 10
    adapter.lora_A.copy_(A.to(device))
    adapter.lora_B.copy_(B.to(device))


# --------------------------------------------------------------------------------------------- looking at the weight


def pissa(weight: Tensor, layer: Layer) -> Start:
    """The r largest singular values and their vectors train, the rest is the frozen base (Meng et al. 2024,

    arXiv 2404.02948). A = sqrt(S) V^T and B = U sqrt(S), of S / scale. With --lora_init_iterations by subspace
    iterations (Halko et al. 2011, arXiv 0909.4061), which are much faster than an exact SVD.
    """
    return _taking(*largest(weight, layer.r, layer.scale, layer.iterations))


def olora(weight: Tensor, layer: Layer) -> Start:
    """The first r columns of Q and rows of R, of a QR decomposition (Büyükakyüz 2024, arXiv 2406.01775)."""
    Q, R = torch.linalg.qr(weight)
    return _taking(R[: layer.r].contiguous(), Q[:, : layer.r].contiguous())


def loftq(weight: Tensor, layer: Layer) -> Start | None:
    """A and B make up for what quantising loses (Li et al. 2023, arXiv 2310.08659, algorithm 1).

    Q_t = q(W - s B_{t-1} A_{t-1}), and A_t and B_t of an SVD of W - Q_t: the paper has five iterations, PEFT one by
    default, after which the base is q(W) as without. None for a layer that is not quantised: it loses nothing.
    """
    if layer.quantizer is None:
        return None
    pair = None
    for _ in range(layer.iterations or 1):
        taken = pair
        left = weight if taken is None else rest(weight, *taken, layer.scale)
        pair = largest(weight - layer.quantizer(left, None).dequantize(torch.float32), layer.r, layer.scale)
    return Start(*pair, taken)


def largest(weight: Tensor, r: int, scale: float, iterations: int | None = None) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r), such that scale * B A is the nearest matrix of rank r to the weight (out, in).

    iterations: of subspace iteration; None for an exact SVD.
    """
    if iterations is None:
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        U, S, Vh = U[:, :r], S[:r], Vh[:r]
    else:
        U, S, V = torch.svd_lowrank(weight, r, niter=iterations)
        Vh = V.T
    root = (S / scale).sqrt()
    return (root[:, None] * Vh).contiguous(), (U * root).contiguous()


def _taking(A, B):
    return Start(A, B, (A, B))


# -------------------------------------------------------------------------------------------------------- the table


class Initialization(NamedTuple):
    """A row of INITIALISATIONS: the one function that makes the start, by what it looks at.

    takes: whether a start by the weight takes from it, with so many iterations.
    """

    adapter: Callable[[LoRALinear], None] | None = None
    weight: Callable[[Tensor, Layer], Start | None] | None = None
    activations: Callable | None = None
    takes: Callable[[int | None], bool] = lambda iterations: False


INITIALISATIONS = {
    "default": Initialization(),
    "gaussian": Initialization(adapter=gaussian),
    "orthogonal": Initialization(adapter=orthogonal),
    "pissa": Initialization(weight=pissa, takes=lambda iterations: True),
    "olora": Initialization(weight=olora, takes=lambda iterations: True),
    "loftq": Initialization(weight=loftq, takes=lambda iterations: (iterations or 1) > 1),
    "eva": Initialization(activations=eva),
}


def takes_from_base(s: Settings) -> bool:
    """Whether the base is to lack what the adapters start with: `AdapterConfig.residual`."""
    return INITIALISATIONS[s.lora_init].takes(s.lora_init_iterations)


def check(s: Settings, model: Transformer, config: AdapterConfig) -> None:
    """Raise UserError if the adapters of this method, over these layers of a model without values, cannot start so."""
    init, adapter, say = INITIALISATIONS[s.lora_init], lora.ADAPTERS[s.method], f"--lora_init {s.lora_init}"
    if s.lora_init == "default":
        return
    if not issubclass(adapter, LoRALinear):
        raise UserError(f"{say} needs --method lora, or another with LoRA's matrices, not {s.method}")
    if init.weight and not (adapter is LoRALinear and adapter.is_standard()):
        raise UserError(f"{say} needs --method lora as published, not {s.method}: it is a start for that formula")
    covered = {name: layer for name, layer in lora.linear_layers(model).items() if config.covers(name)}
    for name, layer in covered.items():
        r, size = config.rank(name), min(layer.in_features, layer.out_features)
        if (init.weight or init.activations) and r > size:
            raise UserError(f"{say}: a rank of {r} is more than {name} has, {size}: lower it (--lora_rank_pattern)")
        if s.lora_init == "orthogonal" and r % 2:
            raise UserError(f"{say} needs an even rank, {name} has {r}")
        if init.activations and ".experts." in name:
            raise UserError(f"{say}: an expert sees few of the tokens: leave {name} out of --lora_targets")
    if init.takes(s.lora_init_iterations) and model.config.tie_word_embeddings and "lm_head" in covered:
        raise UserError(f"{say}: the head's weight is the embedding's too: leave lm_head out of --lora_targets")


# --------------------------------------------------------------------------------------------------------- all of it


@torch.no_grad()
def start(
    s: Settings, config: AdapterConfig, dtype: torch.dtype, device: torch.device, quantize: str | dict | None
) -> tuple[Transformer, AdapterConfig]:
    """The model with adapters at their start, and their config: with --lora_init eva the ranks may be others.

    quantize: of the base, as `from_settings.base_quantization` has it.
    """
    init, starts = INITIALISATIONS[s.lora_init], {}
    change = by_weight(s, config, starts) if init.weight else None
    model = load_model(s.checkpoint_dir, dtype, device, quantize, change=change)
    if init.activations:
        rho = EVA_RHO if s.lora_eva_rho is None else s.lora_eva_rho
        config, As = init.activations(model, config, training_batches(s), rho)
        starts = {name: Start(A, A.new_zeros(()), None) for name, A in As.items()}
    put_over(s, model, config)
    for name, adapter in lora.adapters(model).items():
        if starts.get(name) is not None:
            fill(adapter, starts[name])
    train_beside(model, config)
    return model, config


@torch.no_grad()
def put_over(s: Settings, model: Transformer, config: AdapterConfig) -> None:
    """Put adapters over a model, at a start that looks at neither its weights nor activations."""
    lora.add_lora(model, config)
    if at_random := INITIALISATIONS[s.lora_init].adapter:
        for adapter in lora.adapters(model).values():
            at_random(adapter)


def by_weight(s: Settings, config: AdapterConfig, starts: dict[str, Start]) -> Callable[[str, Tensor], Tensor]:
    """What becomes of each weight as it is read (`checkpoint.fill_model`); the adapters' starts are put in `starts`."""

    def change(name, weight):
        path = name.removesuffix(".weight")
        if path == name or not config.covers(path):
            return weight
        quantizer = quantizer_of(s.quantize, path) if path.startswith(BLOCKS) else None
        layer = Layer(path, config.rank(path), config.scale(path), quantizer, s.lora_init_iterations)
        starts[path] = made = INITIALISATIONS[s.lora_init].weight(weight.float(), layer)
        return weight if made is None or made.taken is None else rest(weight, *made.taken, layer.scale)

    return change


def fill(adapter: LoRALinear, made: Start) -> None:
    """Put a start into an adapter."""
    adapter.lora_A.copy_(made.A)
    adapter.lora_B.copy_(made.B)
    if made.taken is not None:
        adapter.start_A.copy_(made.taken[0])
        adapter.start_B.copy_(made.taken[1])


def training_batches(s: Settings) -> Iterable[tuple]:
    """The micro-batches of the run in its order, over and over: tokens, targets, offsets."""
    samples = open_samples(s.data_dir, "train")
    for _, micro_batches in planned_steps(s, samples, 0, sys.maxsize):
        for indices in micro_batches:
            yield PLANNERS[s.planner].layout(samples, indices)
