"""Mixtures of experts: several MLPs in a layer, of which a router chooses a few for each token.

As in Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE and GPT-OSS. Each expert is an ordinary MLP, so what walks over linear layers
(adapters, quantisers, merging) finds every expert's projections. `plain_experts` is what a mixture computes, in a few
lines; `Experts.forward` sorts the pairs of a token and an expert by expert, so that each expert is run once, on its own
tokens.

Shapes: N tokens, D hidden size, E experts, k experts of each token.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from ops.grouping import collect, distribute, group, grouped_linear
from ops.linear import linear


@dataclass(frozen=True)
class ExpertConfig:
    """What a mixture of experts is made of."""

    count: int
    per_token: int
    size: int  # of each expert between its projections
    renormalised: bool  # whether the weights of a token's experts add up to 1
    router_bias: bool = False
    shared_size: int | None = None  # of the expert that all tokens go through beside theirs, if there is one


class Router(nn.Module):
    """Logits of the experts. No `Linear`: it is neither quantised nor adapted."""

    def __init__(self, hidden_size: int, count: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, hidden_size))
        self.bias = nn.Parameter(torch.zeros(count)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x (N, D) to (N, count), in x's dtype."""
        return linear(x, self.weight, self.bias)


class Route(NamedTuple):
    """Where tokens go: the experts of each, (N, k) int64, and their weights, (N, k) in fp32."""

    experts: Tensor
    weights: Tensor


def choose(logits: Tensor, config: ExpertConfig) -> Route:
    """The k most probable experts of each token, for logits (N, E).

    GPT-OSS's softmax over the k largest logits is the same as the softmax over all, renormalised.
    """
    weights, experts = torch.topk(F.softmax(logits.float(), dim=-1), config.per_token, dim=-1)
    return Route(experts, weights / weights.sum(dim=-1, keepdim=True) if config.renormalised else weights)


def balance_loss(logits: list[Tensor], per_token: int, counted: Tensor | None = None) -> Tensor:
    """How unevenly tokens are distributed among experts (Fedus et al. 2021, arXiv 2101.03961, eq. 4): a scalar in fp32.

    E times the sum over experts of the share of tokens that chose it times its mean probability: per_token where all
    are equal. logits: (N, E) of each layer's router, over all of which shares and means are taken. counted: (n,) int64,
    the numbers of the tokens that count (padding does not); all by default.
    """
    stacked = torch.stack(logits).float()  # (layers, N, E)
    stacked = (stacked if counted is None else stacked[:, counted]).flatten(0, 1)
    probabilities, E = F.softmax(stacked, dim=-1), stacked.size(-1)
    chosen = torch.topk(probabilities.detach(), per_token, dim=-1).indices
    ones = probabilities.new_ones(chosen.numel())  # bincount would wait for the device
    shares = probabilities.new_zeros(E).scatter_add_(0, chosen.flatten(), ones) / len(stacked)
    return E * (shares * probabilities.mean(dim=0)).sum()


def plain_experts(x: Tensor, route: Route, experts: nn.ModuleList) -> Tensor:
    """The reference: every expert's output (N, D) for all tokens, times its weight, which is 0 for most."""
    weights = torch.zeros(len(x), len(experts), device=x.device).scatter(1, *route).to(x.dtype)
    return sum(weights[:, number, None] * expert(x) for number, expert in enumerate(experts))


class Elsewhere(nn.Module):
    """In the place of an expert that another device has: what it adds is added there (training/parallel/tensor.py)."""

    def forward(self, x: Tensor) -> Tensor:
        """Zeros like x (..., D)."""
        return torch.zeros_like(x)


class Experts(nn.Module):
    """A router and its experts, and with `shared_size` an expert that all tokens go through, scaled for each."""

    def __init__(self, config: ExpertConfig, hidden_size: int, make_mlp: Callable[[int], nn.Module]):
        """make_mlp: a function that makes an MLP of an inner size."""
        super().__init__()
        self.config = config
        self.gate = Router(hidden_size, config.count, config.router_bias)
        self.experts = nn.ModuleList(make_mlp(config.size) for _ in range(config.count))
        self.linear = type(self.experts[0].down_proj)
        self.shared_expert = self.shared_expert_gate = None
        if config.shared_size is not None:
            self.shared_expert, self.shared_expert_gate = make_mlp(config.shared_size), Router(hidden_size, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, D) to (B, T, D), and the router's logits (B * T, E)."""
        flat = x.flatten(0, -2)
        logits = self.gate(flat)
        y = self.chosen(flat, choose(logits, self.config))
        if self.shared_expert is not None:
            y = y + torch.sigmoid(self.shared_expert_gate(flat)) * self.shared_expert(flat)
        return y.view_as(x), logits

    def chosen(self, x: Tensor, route: Route) -> Tensor:
        """The weighted sum (N, D) of what each token's experts make of it, for x (N, D)."""
        if x.is_cuda and not is_fake(x) and self.are_together(x.dtype):
            return self.chosen_together(x, route)
        counts = how_many(route.experts, self.config.count)
        groups = group(route.experts, counts, few_shapes(x, route.experts.numel() / self.config.count))
        rows = distribute(x, groups, self.config.per_token).split(groups.sizes)
        pairs = zip(self.experts, rows, strict=True)
        y = torch.cat([expert(own) for expert, own in pairs if len(own) or trains(expert)])
        return collect(y, groups, route.weights.to(x.dtype))

    @torch.no_grad()
    def lay_together(self) -> None:
        """Put the weights of each projection of all experts one after the other in memory, if they are dense."""
        for layers in self.projections():
            if all(isinstance(layer, nn.Linear) for layer in layers):
                for layer, weight in zip(layers, torch.stack([layer.weight for layer in layers]), strict=True):
                    layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)

    def projections(self) -> list[list[nn.Module]]:
        """The layers of all experts that are here, by projection."""
        here = [expert for expert in self.experts if not isinstance(expert, Elsewhere)]
        each = [[module for module in expert.children() if hasattr(module, "in_features")] for expert in here]
        return [list(layers) for layers in zip(*each, strict=True)]

    def are_together(self, dtype: torch.dtype) -> bool:
        """Whether `chosen_together` serves: weights in bf16 as `lay_together` left them, frozen, and nothing over them.

        It does what `Linear.forward` does, and the MLP's own forward pass: who edits the former edits it too.
        """
        here = not any(isinstance(expert, Elsewhere) for expert in self.experts)
        return here and dtype == torch.bfloat16 and all(
            type(layer) is self.linear and layer.weight.dtype == dtype and not layer.weight.requires_grad
            and layer.in_features % 8 == layer.out_features % 8 == 0  # the product wants rows of 16 bytes
            and layer.weight.data_ptr() == layers[0].weight.data_ptr() + number * layer.weight.nbytes
            and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks)
            for layers in self.projections()
            for number, layer in enumerate(layers)
        )  # fmt: skip

    def chosen_together(self, x: Tensor, route: Route) -> Tensor:
        """As `chosen`: one MLP for all rows, each of whose projections is one product with the weights of all experts.

        No number leaves the device, so nothing waits for it.
        """
        groups = group(route.experts)
        chosen = F.one_hot(route.experts.flatten(), self.config.count).sum(0)
        ends = chosen.cumsum(0, dtype=torch.int32)
        mlp = copy.copy(self.experts[0])
        mlp._modules = {name: module and self._joined(name, ends) for name, module in mlp._modules.items()}
        return collect(mlp(distribute(x, groups, self.config.per_token)), groups, route.weights.to(x.dtype))

    def _joined(self, name, ends):
        layers = [getattr(expert, name) for expert in self.experts]
        first, bias = layers[0].weight.detach(), layers[0].bias
        weight = first.as_strided((len(layers), *first.shape), (first.numel(), *first.stride()))
        return JoinedLinear(weight, None if bias is None else torch.stack([layer.bias for layer in layers]), ends)


class JoinedLinear(nn.Module):
    """A projection of all experts, for rows that are sorted by expert: `grouped_linear`."""

    def __init__(self, weight: Tensor, bias: Tensor | None, ends: Tensor):
        super().__init__()
        self.weight, self.bias, self.ends = weight, bias, ends

    def forward(self, x: Tensor) -> Tensor:
        """x (P, in) to (P, out)."""
        return grouped_linear(x, self.weight, self.bias, self.ends)


def few_shapes(x: Tensor, mean: float) -> int:
    """What an expert's number of rows is rounded up to, if experts have so many on average.

    On a CPU oneDNN compiles a product in bf16 for its very shape: 1.8 ms for rows that are new, 0.1 ms for the product
    itself, with 200 rows of Qwen3-MoE's shape in small. A power of two, at most half of the mean.
    """
    compiled = x.device.type == "cpu" and x.dtype == torch.bfloat16
    return 2 ** int(math.log2(mean / 2)) if compiled and mean > 2 else 1


def how_many(experts: Tensor, count: int) -> list[int]:
    """How many of the pairs (N, k) go to each of `count` experts; where tensors have no values, equally many."""
    if is_fake(experts) or experts.is_meta:  # the prediction of memory
        return [(number + 1) * experts.numel() // count - number * experts.numel() // count for number in range(count)]
    return torch.bincount(experts.flatten(), minlength=count).tolist()


def trains(expert: nn.Module) -> bool:
    """Whether something in an expert is trained: without a token it then still gets a gradient, of zeros.

    So an optimiser treats all experts alike, in whichever micro-batch and on whichever device their tokens are.
    """
    return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in expert.parameters())
