"""The decoder: Llama, Mistral, Qwen and, by the fields of `Config`, the other families that people fine-tune.

`Config` says what a model is made of; weights/families.py reads it from a checkpoint's config.json. Parameter names are
Hugging Face's for Llama, so its safetensors files, and those of families that share its names, load with no tensor
renamed, fused or permuted; weights/names.py has the names of the others. What ops/ computes begins there with its plain
form, a line or two of torch.

To read how Llama works, pass over every line that asks for a field that has a default below.

Shapes: B batch, T tokens in this call, S keys (cached ones and these), D hidden size, H query heads, K key/value heads,
d head size, V vocabulary.
"""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import checkpoint

from experts import ExpertConfig, Experts
from ops.activation import activate, gated, plain_softcap
from ops.attention import Scores, choose_attention
from ops.chunks import in_chunks
from ops.devices import numbers_on, to_device
from ops.dtypes import compute_dtype
from ops.flex import block_mask
from ops.forks import Forks, attend_whole
from ops.linear import linear
from ops.loss import LOSS_CHUNK, each_head_loss, head_loss, plain_losses
from ops.norm import layer_norm, layer_norm_of_sum, rms_norm, rms_norm_of_sum
from ops.offload import Parking
from ops.rope import RoPE, angles, query_gain
from ops.rotation import pairs_apart, rotate

IGNORE = -100  # a target that does not count, as in torch's cross_entropy
# Positions in an MLP at one time under recompute="offload". Llama-3-8B's gate, up and activation take 0.35 GB for 4,096
# in bf16, 2.8 GB for 32,768; and that many rows fill a card, beside which dequantising the weight once more is little.
MLP_CHUNK = 4096


@dataclass(frozen=True)
class Config:
    """What a model is made of. Sizes have Hugging Face's names; a tuple has a value for each layer.

    What has a default is not in Llama.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of the MLP
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    norm_eps: float
    ropes: tuple[RoPE | None, ...]  # None: no rotation in this layer
    windows: tuple[int | None, ...]  # how many tokens a query sees, itself included; None for all
    scales: tuple[float, ...]  # of the scores of attention
    max_position_embeddings: int  # the longest sample that the model is made for
    family: str = "llama"  # whose names its files have
    tie_word_embeddings: bool = False  # the head has the embedding's weight
    # Biases
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    # Norms
    norm: str = "rms"  # or "layer"
    norm_bias: bool = False  # LayerNorm's
    norm_gain: str | None = "weight"  # what is normed is multiplied by a weight, by "1 + weight", or by nothing
    norm_places: str = "before"  # "after", "both" or "sum": see `Block`
    final_norm: bool = True
    qk_norm: str | None = None  # a norm over each query and key head before RoPE: a key of `HEAD_NORMS`
    # Block
    parallel_residual: bool = False  # attention and MLP read the same hidden states (Wang and Komatsuzaki 2021, GPT-J)
    shared_norm: bool = False  # and through the same norm
    residual_scale: float = 1.0  # of what attention and MLP add
    gated: bool = True  # the MLP's activation is of a product of two projections, not of one
    activation: str = "silu"  # a key of ops.activation.ACTIVATIONS, or "clamped_swiglu"
    experts: ExpertConfig | None = None  # of a mixture of experts
    sparse: tuple[bool, ...] = ()  # whether a layer has them in its MLP's place; empty: none has
    # Attention
    slopes: tuple[float, ...] | None = None  # ALiBi's, of each head (ops.attention.Scores)
    softcap: float | None = None  # of the scores
    sinks: bool = False
    clip_qkv: float | None = None  # the largest absolute value of queries, keys and values
    # Embedding and head
    learned_positions: int = 0  # how many positions have an embedding that is added to the token's
    position_offset: int = 0  # the row of position 0
    embedding_size: int | None = None  # of the token embedding, if it is not hidden_size (OPT-350M)
    embedding_scale: float = 1.0
    embedding_norm: bool = False
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    def scores(self, layer: int) -> Scores:
        """What this layer makes of the products of queries and keys."""
        return Scores(self.scales[layer], self.windows[layer], self.softcap, self.slopes, self.sinks)

    def kinds_of_layers(self) -> list[tuple]:
        """What is equal for layers that compute the same, of each layer."""
        return list(zip(*self._by_layer().values(), strict=True))

    def of_layers(self, numbers: Sequence[int]) -> "Config":
        """The config of a model that has only the layers with these numbers."""
        each = {name: tuple(values[number] for number in numbers) for name, values in self._by_layer().items()}
        return dataclasses.replace(self, num_hidden_layers=len(numbers), **each)

    def _by_layer(self):
        """The fields that have a value for each layer, by name."""
        return {name: values for name in PER_LAYER if (values := getattr(self, name))}


PER_LAYER = ("ropes", "windows", "scales", "sparse")


# ---------------------------------------------------------------------------------------------- norm, linear layers


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float, plus_one: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.plus_one = eps, plus_one

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) in x's dtype."""
        return rms_norm(x, self.weight, self.eps, self.plus_one)


class LayerNorm(nn.Module):
    """(x - mean) / standard deviation * weight + bias over the last dimension (Ba et al. 2016, arXiv 1607.06450)."""

    def __init__(self, size: int, eps: float, gain: str | None = "weight", bias: bool = True):
        super().__init__()
        self.weight = None if gain is None else nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None
        self.eps, self.plus_one = eps, gain == "1 + weight"

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) in x's dtype."""
        return layer_norm(x, self.weight, self.bias, self.eps, self.plus_one)


OF_SUMS = {  # of a class of norms the function for x + scale * added and the norm of that
    RMSNorm: lambda norm, *sum: rms_norm_of_sum(*sum, norm.weight, norm.eps, norm.plus_one),
    LayerNorm: lambda norm, *sum: layer_norm_of_sum(*sum, norm.weight, norm.bias, norm.eps, norm.plus_one),
}


def add_and_norm(x: Tensor, added: Tensor, scale: float, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """x + scale * added, and the norm of that: in one operation, unless the norm has hooks or was edited."""
    together = type(norm) in OF_SUMS and not has_hooks(norm) and not torch.compiler.is_compiling()
    if together and is_published(type(norm), type(norm).forward):
        return OF_SUMS[type(norm)](norm, x, added, scale)
    total = x.add(added, alpha=scale)
    return total, norm(total)


@functools.cache
def is_published(kind: type, forward: Callable) -> bool:
    """Whether `forward`, of a class of norms, computes what `OF_SUMS` has for it, tried on a few random numbers."""
    with torch.random.fork_rng([]), _disable_current_modes(), torch.no_grad(), torch.device("cpu"):
        norm, x = kind(7, 1e-5), torch.randn(3, 7)
        for parameter in norm.parameters():
            parameter.copy_(torch.rand_like(parameter))
        y, (_, expected) = forward(norm, x), OF_SUMS[kind](norm, x, torch.zeros_like(x), 1.0)
        return y.shape == expected.shape and torch.allclose(y, expected, rtol=1e-4)


class JointNorm(RMSNorm):
    """One RMSNorm over all heads together (OLMo 2)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, heads, d) in x's dtype."""
        return super().forward(x.flatten(2)).view_as(x)


class EachHeadNorm(nn.Module):
    """A LayerNorm over each head, which has its own weight (StableLM 2, Command R)."""

    def __init__(self, heads: int, d: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, d))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, heads, d) in x's dtype."""
        return layer_norm(x, None, None, self.eps) * self.weight.to(x.dtype)


def make_norm(config: Config, size: int) -> nn.Module:
    """A norm over `size` numbers of the kind that the model has."""
    if config.norm == "rms":
        return RMSNorm(size, config.norm_eps, plus_one=config.norm_gain == "1 + weight")
    return LayerNorm(size, config.norm_eps, config.norm_gain, config.norm_bias)


HEAD_NORMS = {
    None: lambda config, heads: nn.Identity(),
    "head": lambda config, heads: make_norm(config, config.head_dim),
    "each head": lambda config, heads: EachHeadNorm(heads, config.head_dim, config.norm_eps),
    "joint": lambda config, heads: JointNorm(heads * config.head_dim, config.norm_eps),
}


class Linear(nn.Linear):
    """nn.Linear that multiplies in its input's dtype, also where its weight is stored in another."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) to (..., out_features)."""
        return linear(x, self.weight, self.bias)

    def reset_parameters(self) -> None:
        """torch's random start, but for a weight without memory."""
        if not self.weight.is_meta:  # there it has no effect, and its import takes a second
            super().reset_parameters()

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight that this layer multiplies by, (out_features, in_features) of `dtype`, without gradient."""
        return self.weight.detach().to(dtype)


def has_hooks(module: nn.Module) -> bool:
    """Whether something is to run when the module does, forward or backward."""
    forward = module._forward_hooks or module._forward_pre_hooks
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)


def project(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """What each of several layers makes of one input; adapters do it together, in fewer products.

    A layer with hooks is called by itself: they would not run otherwise.
    """
    by_hand = [layer for layer in layers if hasattr(layer, "together") and layer.trains_by_hand()]
    adapted = [layer for layer in by_hand if not has_hooks(layer)]
    done = dict(zip(adapted, adapted[0].together(x, adapted), strict=True)) if adapted else {}
    return [done[layer] if layer in done else layer(x) for layer in layers]


# --------------------------------------------------------------------------------------------------------------- RoPE


class Angles(NamedTuple):
    """How far queries and keys are turned in this call. cos, sin: (T, dims/2) or (B, 1, T, dims/2).

    query_gain: (T, 1) or (B, 1, T, 1), what queries are multiplied by, or None.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False
    query_gain: Tensor | None = None

    def turn(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q (B, H, T, d) and k (B, K, T, d), turned."""
        if self.interleaved:
            q, k = (pairs_apart(x, 2 * self.cos.size(-1)) for x in (q, k))
        q, k = rotate(q, k, self.cos, self.sin)
        return q if self.query_gain is None else q * self.query_gain, k


def rope_angles(rope: RoPE | None, positions: Tensor, lengths: Callable, dtype: torch.dtype) -> Angles | None:
    """The `Angles`, in `dtype`, of tokens at `positions` (T,) or (B, T) of their texts.

    lengths: a function that returns how long these texts are, in that shape, for the few kinds that depend on it.
    """
    if rope is None:
        return None
    turned = angles(rope, positions, lengths)
    gain = query_gain(rope, positions)[..., None].to(dtype) if rope.query_growth else None
    if positions.dim() == 2:
        turned, gain = turned[:, None], None if gain is None else gain[:, None]
    cos, sin = (f(turned) if rope.gain == 1 else f(turned) * rope.gain for f in (torch.cos, torch.sin))
    return Angles(cos.to(dtype), sin.to(dtype), rope.interleaved, gain)


# ---------------------------------------------------------------------------------------------------------- attention


class Places(NamedTuple):
    """Where tokens stand in rows that may branch: a beginning, and after it ends that do not see one another.

    positions (B or 1, T) int64: in the token's own text, from 0. branches (B or 1, T) int64: 0 for the beginning, a
    number above 0 for each end. A sample in a packed row is such an end, without a beginning; padding has -1.
    """

    positions: Tensor
    branches: Tensor


@dataclass(frozen=True)
class Layout:
    """How the tokens of a call lie, which decides which see one another. By default each row is one sample.

    tokens: (B, T). cache: a `KVCache` with the tokens before them (its `padding` is at the left of its rows).
    offsets: of samples end to end in one row (B = 1): where each begins and the last one ends; or the `Forks` of those
    that share beginnings. tree: rows that branch.
    """

    tokens: Tensor
    cache: Any = None
    offsets: list[int] | Forks | None = None
    tree: Places | None = None
    block_masks: dict = dataclasses.field(default_factory=dict, init=False, repr=False)  # by window

    @functools.cached_property
    def places(self) -> Places:
        """Where all S keys stand; the last T of them are the tokens."""
        if self.tree is not None:
            return self.tree
        if isinstance(self.offsets, Forks):
            return Places(*(x[:, self.copies] for x in self.whole.places))
        device, past = self.tokens.device, 0 if self.cache is None else self.cache.length
        index = torch.arange(past + self.tokens.size(1), device=device)[None]
        if self.offsets is not None:
            starts = numbers_on(device, self.offsets)
            samples = torch.bucketize(index, starts, right=True)  # 1 is the first
            return Places(index - starts[samples - 1], samples)
        if self.cache is None or self.cache.padding is None:
            return Places(index, torch.zeros_like(index))
        positions = index - self.cache.padding[:, None]
        return Places(positions.clamp(min=0), -(positions < 0).long())

    def lengths(self) -> Tensor:
        """How long the text of each token is, as far as it is known: (B or 1, T)."""
        positions, branches = (x[:, -self.tokens.size(1) :] for x in self.places)
        if self.tree is not None:  # as long as the whole row's longest text: its beginning cannot be turned in two ways
            return (self.tree.positions.amax(dim=1, keepdim=True) + 1).expand_as(positions)
        if self.offsets is None:
            return positions[:, -1:].expand_as(positions) + 1
        ends = numbers_on(positions.device, self.offsets)
        return (ends[1:] - ends[:-1])[branches - 1]

    @property
    def whole(self) -> "Layout":
        """The layout in which each sample has its beginning to itself: this one, if no two share any."""
        return self._apart if isinstance(self.offsets, Forks) else self

    @functools.cached_property
    def _apart(self):  # never itself: a layout that keeps itself would keep its tensors until Python looks for cycles
        return Layout(self.tokens[:, self.sources], offsets=self.offsets.whole_offsets())

    @functools.cached_property
    def sources(self) -> Tensor:
        """Which position of the row each one of the whole samples is: (S,) int64. Of `Forks` alone."""
        return numbers_on(self.tokens.device, self.offsets.sources())

    @functools.cached_property
    def copies(self) -> Tensor:
        """Where each position of the row is in the whole samples: (T,) int64. Of `Forks` alone."""
        return numbers_on(self.tokens.device, self.offsets.copies())

    def attention(self, head_dim: int, dtype: torch.dtype, scores: Scores) -> Callable:
        """The fastest way to compute `plain_attention`: to change attention, put yours here."""
        attend = choose_attention(self.whole, head_dim, dtype, scores)
        return attend if self.whole is self else attend_whole(attend, self.sources, self.copies)

    @property
    def ends(self) -> list[int]:
        """Where each sample begins, and the last one ends, if all rows lie end to end."""
        B, T = self.tokens.shape
        return self.offsets or list(range(0, (B + 1) * T, T))

    def block_mask(self, window: int | None) -> Any:
        """The `ops.flex.block_mask` of all rows end to end, made once: layers whose scores differ share it."""
        if window not in self.block_masks:
            self.block_masks[window] = block_mask(self.ends, window, self.tokens.device)
        return self.block_masks[window]

    def back(self) -> Tensor:
        """From each token to each key, how many positions the key lies back: (B or 1, 1, T, S)."""
        positions = self.places.positions
        return (positions[:, -self.tokens.size(1) :, None] - positions[:, None])[:, None]

    def mask(self, window: int | None) -> Tensor:
        """Which keys each token sees: bool (B or 1, 1, T, S).

        Itself and what comes before it in its own branch and in the beginning, as far back as the window goes.
        """
        back, branches = self.back(), self.places.branches[:, None]
        own, branch = branches[:, :, -self.tokens.size(1) :, None], branches[:, :, None]
        mask = (back >= 0) & ((branch == own) | (branch == 0))
        return mask if window is None else mask & (back < window)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245) with RoPE."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        D, d = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.layer, self.head_dim, self.clip = layer, d, config.clip_qkv
        self.q_proj = Linear(D, H * d, bias=config.qkv_bias)
        self.k_proj = Linear(D, K * d, bias=config.qkv_bias)
        self.v_proj = Linear(D, K * d, bias=config.qkv_bias)
        self.o_proj = Linear(H * d, D, bias=config.o_bias)
        self.q_norm, self.k_norm = HEAD_NORMS[config.qk_norm](config, H), HEAD_NORMS[config.qk_norm](config, K)
        self.sinks = nn.Parameter(torch.zeros(H)) if config.sinks else None

    def forward(self, x: Tensor, angles: Angles | None, attention: Callable, cache: Any) -> Tensor:
        """x (B, T, D) to (B, T, D). attention: a function of q, k, v and the sinks."""
        B, T, _ = x.shape
        q, k, v = (y.view(B, T, -1, self.head_dim) for y in project(x, self.q_proj, self.k_proj, self.v_proj))
        q, k = self.q_norm(q), self.k_norm(k)
        if self.clip is not None:
            q, k, v = (y.clamp(-self.clip, self.clip) for y in (q, k, v))
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, H, T, d) and (B, K, T, d)
        if angles is not None:
            q, k = angles.turn(q, k)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, K, S, d)
        y = attention(q, k, v, self.sinks)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


# ------------------------------------------------------------------------------------------------------- MLP and block


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)), SwiGLU and its kin (Shazeer 2020, arXiv 2002.05202), or down(act(up(x)))."""

    def __init__(self, config: Config, inner: int):
        super().__init__()
        D, bias = config.hidden_size, config.mlp_bias
        self.activation = config.activation
        self.gate_proj = Linear(D, inner, bias=bias) if config.gated else None
        self.up_proj = Linear(D, inner, bias=bias)
        self.down_proj = Linear(inner, D, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) to (..., D)."""
        if self.gate_proj is None:
            return self.down_proj(activate(self.activation, self.up_proj(x), reuse=not has_hooks(self.up_proj)))
        projections = self.gate_proj, self.up_proj
        reuse = not any(map(has_hooks, projections))  # a hook may have kept what they give
        return self.down_proj(gated(self.activation, *project(x, *projections), reuse))


@functools.cache
def works_by_position(config: Config) -> bool:
    """Whether the MLP makes of each position what it makes of it alone, so that it may be run over chunks of them.

    A researcher may edit `MLP` in place, so that is tried on a small one. Then a line on standard error says so.
    """
    with torch.random.fork_rng([]), _disable_current_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        torch.manual_seed(0)
        mlp = MLP(dataclasses.replace(config, hidden_size=6), 5).to("cpu", torch.float64)
        x = torch.randn(2, 3, 6, dtype=torch.float64, device="cpu")
        for parameter in mlp.parameters():
            parameter.normal_()
        try:
            parts = torch.cat([mlp(part) for part in x.flatten(0, 1).split(2)])
            alike = torch.allclose(mlp(x).flatten(0, 1), parts)
        except (AttributeError, RuntimeError, TypeError, ValueError):  # what else an edit may lead to
            alike = False
    if not alike:
        print("note: the MLP mixes positions: all of them go through it at one time", file=sys.stderr)
    return alike


class Block(nn.Module):
    """Attention and MLP, each of which adds to the hidden states.

    With f for either of them, a family has its norms (`Config.norm_places`)
        before: x + f(norm(x)), as Llama          after: x + norm(f(x)), as OLMo 2
        both:   x + norm(f(norm(x))), as Gemma 2  sum:   norm(x + f(x)), as OPT-350M
    """

    def __init__(self, config: Config, layer: int):
        super().__init__()

        def norm(*places):
            return make_norm(config, config.hidden_size) if config.norm_places in places else nn.Identity()

        self.parallel, self.shared_norm, self.scale = (
            config.parallel_residual, config.shared_norm, config.residual_scale,
        )  # fmt: skip
        self.input_layernorm = norm("before", "both")
        self.self_attn = Attention(config, layer)
        self.attention_output_norm, self.attention_sum_norm = norm("after", "both"), norm("sum")
        self.post_attention_layernorm = nn.Identity() if config.shared_norm else norm("before", "both")
        self.sparse = bool(config.sparse) and config.sparse[layer]
        make_mlp = partial(MLP, config)
        if self.sparse:
            self.mlp = Experts(config.experts, config.hidden_size, make_mlp)
        else:
            self.mlp = make_mlp(config.intermediate_size)
        self.mlp_output_norm, self.mlp_sum_norm = norm("after", "both"), norm("sum")

    def forward(
        self,
        x: Tensor,
        angles: Angles | None,
        attention: Callable,
        cache: Any = None,
        routed: bool = False,
        chunk: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """x (B, T, D) to (B, T, D). The arguments are those of `Attention`.

        routed: return the logits (B * T, E) of the experts too, None where there are none.
        chunk: how many positions go through the MLP at one time, None for all.
        """
        normed = self.input_layernorm(x)
        attended = self.attention_output_norm(self.self_attn(normed, angles, attention, cache))
        if self.parallel:
            added, logits = self.feed_forward(normed if self.shared_norm else self.post_attention_layernorm(x), chunk)
            y = x + attended + added
        else:
            x, normed = self.add(x, attended)
            added, logits = self.feed_forward(normed, chunk)
            y = self.mlp_sum_norm(x.add(self.mlp_output_norm(added), alpha=self.scale))
        return (y, logits) if routed else y

    def add(self, x: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        """The hidden states with what attention adds to them, and what the MLP gets."""
        if isinstance(self.attention_sum_norm, nn.Identity):
            return add_and_norm(x, attended, self.scale, self.post_attention_layernorm)
        _, x = add_and_norm(x, attended, self.scale, self.attention_sum_norm)
        return x, x

    def feed_forward(self, x: Tensor, chunk: int | None = None) -> tuple[Tensor, Tensor | None]:
        """What the MLP or the mixture of experts makes of x (B, T, D), and the logits of the experts or None.

        A mixture takes all positions at one time: each of its experts has a share of them only.
        """
        return self.mlp(x) if self.sparse else (in_chunks(self.mlp, x, chunk), None)


# -------------------------------------------------------------------------------------------- the whole, and its loss


def embedding(rows: int, size: int) -> nn.Embedding:
    """An embedding that is not filled with random numbers, which takes time and is overwritten."""
    return nn.Embedding.from_pretrained(torch.empty(rows, size), freeze=False)


class Transformer(nn.Module):
    """`model(tokens)` gives logits, `model(tokens, targets)` the summed loss of the target positions."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.hidden_dtype: torch.dtype | None = None  # of the weights, where the embedding itself has another
        D, E = config.hidden_size, config.embedding_size or config.hidden_size
        self.model = nn.ModuleDict({"embed_tokens": embedding(config.vocab_size, E)})
        if E != D:
            self.model["project_in"], self.model["project_out"] = Linear(E, D, bias=False), Linear(D, E, bias=False)
        if config.learned_positions:
            self.model["embed_positions"] = embedding(config.learned_positions + config.position_offset, D)
        if config.embedding_norm:
            self.model["embed_norm"] = make_norm(config, D)
        self.model["layers"] = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.model["norm"] = make_norm(config, D) if config.final_norm else nn.Identity()
        self.lm_head = Linear(E, config.vocab_size, bias=config.head_bias)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Where the config says so, let the head share the embedding's weight (again, after either was replaced)."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        cache: Any = None,
        recompute: float | Literal["offload"] = 0.0,
        offsets: list[int] | Forks | None = None,
        each: bool = False,
        routed: list[Tensor] | None = None,
        z_loss: float = 0.0,
        noise: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, T, V) for tokens (B, T) int64; with `targets` (B, T) the sum of their losses, a scalar in fp32.

        targets: the token that should follow each position, IGNORE where none counts. They may be on the CPU, whatever
            the device of `tokens`: so nothing waits for it.
        cache: a `KVCache` to read and extend; `tokens` follow what it holds.
        recompute: the share of the blocks with activation checkpointing: only their input is kept for the backward
            pass, which computes the rest again. "offload": all blocks, their inputs kept in host memory, and an MLP run
            over chunks of positions.
        offsets: of samples end to end in one row (B = 1): where each begins and the last one ends, or the `Forks` of
            those that share beginnings. Positions restart.
        each: with `targets`, return that sum and the loss of each target, (n,) fp32 in the order of the flattened
            `targets`, without gradient.
        routed: a list to which each mixture of experts adds the logits (B * T, E) of its router, with gradient.
        z_loss: as in `ops.loss.head_loss`.
        noise: (B, T) fp32, how far from 0 the uniform noise goes that is added to each embedded token.
        """
        x = self.hidden_states(tokens, cache, recompute, offsets, routed=routed, noise=noise)
        if targets is None:
            return self.logits(x)
        loss, losses = self.target_losses(x, targets, z_loss)
        return (loss, losses) if each else loss

    def hidden_states(
        self,
        tokens: Tensor,
        cache: Any = None,
        recompute: float | Literal["offload"] = 0.0,
        offsets: list[int] | Forks | None = None,
        tree: Places | None = None,
        routed: list[Tensor] | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """The final, normed hidden states (B, T, D) of tokens (B, T).

        tree: where the tokens stand in rows with one beginning and several ends. The rest as in `forward`.
        """
        layers, layout = self.model.layers, Layout(tokens, cache, offsets, tree)
        if layout.whole is not layout and any(rope and rope.depends_on_length for rope in self.config.ropes):
            whole = layout.whole  # one beginning would have to be turned by the lengths of several samples
            noise = None if noise is None else noise[:, layout.sources]
            x = self.hidden_states(whole.tokens, None, recompute, whole.offsets, routed=routed, noise=noise)
            return x[:, layout.copies]
        x = self.embed(tokens, layout.places.positions[:, -tokens.size(1) :], noise)
        arguments = self.block_arguments(layout, x.dtype)
        offload = recompute == "offload"
        share, chunk = (1.0, self.mlp_chunk()) if offload else (recompute, None)
        own = [number for number, block in enumerate(layers) if isinstance(block, Block)]  # others do nothing
        recomputed = own[: round(share * len(own))] if torch.is_grad_enabled() else []
        with Parking() if offload else contextlib.nullcontext():
            for number, block in enumerate(layers):
                run = partial(block, chunk=chunk) if chunk else block
                if number in recomputed:
                    run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=True)
                if routed is None:
                    x = run(x, *arguments[number], cache)
                else:  # taken here, not in the block: recomputation would add them again
                    x, logits = run(x, *arguments[number], cache, True)
                    routed += [] if logits is None else [logits]
        if cache is not None:
            cache.length += tokens.size(1)
        return self.finish(x)

    def mlp_chunk(self) -> int | None:
        """How many positions may go through an MLP at one time; None for all, if something in it may mix them."""
        standard = all(getattr(module, "standard", True) for module in self.model.layers.modules())  # of adapters
        return MLP_CHUNK if standard and works_by_position(self.config) else None

    def block_arguments(self, layout: Layout, dtype: torch.dtype) -> list[tuple]:
        """What each block takes beside its hidden states of `dtype`: the `Angles`, and how to attend."""
        c, positions = self.config, layout.places.positions[:, -layout.tokens.size(1) :]
        angles = {rope: rope_angles(rope, positions, layout.lengths, dtype) for rope in set(c.ropes)}
        scores = [c.scores(layer) for layer in range(c.num_hidden_layers)]
        attention = {s: layout.attention(c.head_dim, dtype, s) for s in set(scores)}
        for attend in attention.values():
            attend.tokens = layout.tokens  # by which adapters/virtual_tokens.py knows where it has to do something
        return [(angles[rope], attention[s]) for rope, s in zip(c.ropes, scores, strict=True)]

    def block_dtype(self, device: torch.device) -> torch.dtype:
        """The dtype in which hidden states enter the first block on a device."""
        return compute_dtype(self.hidden_dtype or self.model.embed_tokens.weight.dtype, device.type)

    def embed(self, tokens: Tensor, positions: Tensor, noise: Tensor | None = None) -> Tensor:
        """The hidden states (B, T, D) before the first block, of tokens (B, T) at positions (B or 1, T).

        noise: as in `forward`.
        """
        c, parts = self.config, self.model
        weight = parts.embed_tokens.weight
        x = parts.embed_tokens(tokens).to(self.block_dtype(tokens.device))
        if noise is not None:
            x = x + torch.empty_like(x, dtype=torch.float32).uniform_(-1, 1).mul_(noise[..., None]).to(x.dtype)
        if c.embedding_scale != 1:
            scale = weight.new_full((), c.embedding_scale, dtype=self.hidden_dtype)  # rounded as the weights are
            x = x * scale
        if "project_in" in parts:
            x = parts.project_in(x)
        if c.learned_positions:
            x = x + parts.embed_positions(positions + c.position_offset).to(x.dtype)
        return parts.embed_norm(x) if c.embedding_norm else x

    def finish(self, x: Tensor) -> Tensor:
        """What the head gets, (B, T, E), of the hidden states (B, T, D) after the last block."""
        x = self.model.norm(x)
        if "project_out" in self.model:
            x = self.model.project_out(x)
        return x if self.config.logit_scale == 1 else x * self.config.logit_scale

    def logits(self, x: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., E) that `finish` has made."""
        return plain_softcap(self.lm_head(x), self.config.logit_softcap)

    def target_losses(
        self, x: Tensor, targets: Tensor, z_loss: float = 0.0, label_smoothing: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """-log p(target) at the target positions, for x (B, T, D): the sum, and each (n,) without gradient, both fp32.

        The head sees only the rows that have a target. z_loss, label_smoothing: as in `ops.loss.plain_losses`, added to
        the sum.
        """
        x, targets = self.at_targets(x, targets)
        if type(self.lm_head) is Linear and not label_smoothing:  # exactly: an adapter may compute otherwise
            bias, softcap = self.lm_head.bias, self.config.logit_softcap
            return head_loss(x, self.lm_head.weight, targets, bias, softcap, z_loss)
        how = {"z_loss": z_loss, "label_smoothing": label_smoothing}
        losses, added = self.of_logits(x, partial(plain_losses, **how), targets)
        return (losses + added).sum(), losses.detach()

    def each_target_loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """The same of each target, with gradient: (n,) fp32, for objectives in which targets do not count alike."""
        x, targets = self.at_targets(x, targets)
        trains = any(parameter.requires_grad for parameter in self.lm_head.parameters())
        if type(self.lm_head) is Linear and not trains:
            return each_head_loss(x, self.lm_head.weight, targets, self.lm_head.bias, self.config.logit_softcap)
        return self.of_logits(x, plain_losses, targets)[0]

    def at_targets(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Of x (B, T, D) and targets (B, T), which may be on the CPU, what has a target: (n, D) and (n,), with x."""
        rows = (targets.flatten() != IGNORE).nonzero().squeeze(1)
        rows, targets = (to_device(each, x.device) for each in (rows, targets.flatten()[rows]))
        return x.flatten(0, 1)[rows], targets

    def of_logits(self, x: Tensor, function: Callable, *others: Tensor) -> list[Tensor]:
        """What a function makes of the logits of x (n, D) in fp32 and of `others`, all (n, ...): its tensors, joined.

        Chunk by chunk, by autograd, which keeps no logits but computes them again: for what has no way of its own.
        """

        def of_chunk(x, *others):
            return function(self.logits(x).float(), *others)

        chunks = zip(*(each.split(LOSS_CHUNK) for each in (x, *others)), strict=True)
        results = [checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks]
        return [torch.cat(parts) for parts in zip(*results, strict=True)]
