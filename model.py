"""The decoder of Llama 2 and 3, Mistral, Qwen2, Qwen3, SmolLM2 and models of the same structure, from top to bottom.

`Config` says what a model is made of; weights/families.py reads it from a checkpoint's config.json. Parameter names are
Hugging Face's, so their safetensors files load with no tensor renamed, fused or permuted. What ops/ computes begins
there with its plain form, a line or two of torch; the plain form of attention is here.

Shapes: B batch, T tokens in this call, S keys (cached ones and these), D hidden size, H query heads, K key/value heads,
d head size, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ops.activation import swiglu
from ops.attention import choose_attention
from ops.dtypes import compute_dtype
from ops.linear import linear
from ops.loss import LOSS_CHUNK, head_loss
from ops.norm import rms_norm
from ops.rotation import rotate

IGNORE = -100  # a target that does not count, as in torch's cross_entropy


@dataclass(frozen=True)
class RoPE:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864) and how it is stretched to longer contexts."""

    theta: float
    scaling: str = "default"  # or "linear" (Chen et al. 2023, arXiv 2306.15595), or "llama3" (Llama 3.1)
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192  # tokens in a sample of the pre-training


@dataclass(frozen=True)
class Config:
    """What a model is made of. Sizes have Hugging Face's names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of the MLP
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RoPE
    max_position_embeddings: int  # the longest sample that the model is made for
    windows: tuple[int | None, ...]  # of each layer: how many tokens a query sees, itself included; None for all
    tie_word_embeddings: bool = False  # the head has the embedding's weight
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # an RMSNorm over each query and key head, before RoPE


# ---------------------------------------------------------------------------------------------- norm, linear layers


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) in x's dtype."""
        return rms_norm(x, self.weight, self.eps)


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


@lru_cache
def inverse_frequencies(rope: RoPE, head_dim: int, device: torch.device) -> Tensor:
    """Radians by which each of the d/2 pairs of dimensions turns from one position to the next: (d/2,) fp32."""
    frequencies = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    if rope.scaling == "linear":
        return frequencies / rope.factor
    if rope.scaling == "llama3":  # long waves are stretched, short ones kept, those between blended
        turns = rope.original_context * frequencies / (2 * math.pi)  # within the context of pre-training
        keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        keep = keep.clamp(0, 1)
        return keep * frequencies + (1 - keep) * frequencies / rope.factor
    return frequencies


def rope_angles(config: Config, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin for `positions` (T,) or (B, T): two tensors (T, d/2) or (B, 1, T, d/2) of `dtype`."""
    angles = positions[..., None].float() * inverse_frequencies(config.rope, config.head_dim, positions.device)
    if positions.dim() == 2:
        angles = angles[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


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
    offsets: of samples end to end in one row (B = 1): where each begins and the last one ends. tree: rows that branch.
    """

    tokens: Tensor
    cache: Any = None
    offsets: list[int] | None = None
    tree: Places | None = None

    def places(self) -> Places:
        """Where all S keys stand; the last T of them are the tokens."""
        if self.tree is not None:
            return self.tree
        device, past = self.tokens.device, 0 if self.cache is None else self.cache.length
        index = torch.arange(past + self.tokens.size(1), device=device)[None]
        if self.offsets is not None:
            starts = torch.tensor(self.offsets, device=device)
            samples = torch.bucketize(index, starts, right=True)  # 1 is the first
            return Places(index - starts[samples - 1], samples)
        if self.cache is None or self.cache.padding is None:
            return Places(index, torch.zeros_like(index))
        positions = index - self.cache.padding[:, None]
        return Places(positions.clamp(min=0), -(positions < 0).long())

    def mask(self, window: int | None) -> Tensor:
        """Which keys each token sees: bool (B or 1, 1, T, S).

        Itself and what comes before it in its own branch and in the beginning, as far back as the window goes.
        """
        positions, branches = self.places()
        T = self.tokens.size(1)
        back = positions[:, -T:, None] - positions[:, None]  # from each token to each key
        own, branch = branches[:, -T:, None], branches[:, None]
        mask = (back >= 0) & ((branch == own) | (branch == 0))
        if window is not None:
            mask = mask & (back < window)
        return mask[:, None]


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Scaled dot-product attention of q (B, H, T, d) to k, v (B, K, S, d), where `mask` is true: (B, H, T, d)."""
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))  # H / K query heads share keys
    scores = q @ k.transpose(-2, -1) * q.size(-1) ** -0.5  # (B, H, T, S)
    weights = scores.float().masked_fill(~mask, -torch.inf).softmax(dim=-1)
    return weights.to(v.dtype) @ v


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245) with RoPE."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        D, d = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.layer, self.head_dim = layer, d
        self.q_proj = Linear(D, H * d, bias=config.qkv_bias)
        self.k_proj = Linear(D, K * d, bias=config.qkv_bias)
        self.v_proj = Linear(D, K * d, bias=config.qkv_bias)
        self.o_proj = Linear(H * d, D, bias=config.o_bias)
        self.q_norm = RMSNorm(d, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(d, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], attention: Callable, cache: Any) -> Tensor:
        """x (B, T, D) to (B, T, D). angles: as `rope_angles` gives them. attention: a function of q, k and v."""
        B, T, _ = x.shape
        q, k, v = (y.view(B, T, -1, self.head_dim) for y in project(x, self.q_proj, self.k_proj, self.v_proj))
        q = self.q_norm(q).transpose(1, 2)  # (B, H, T, d)
        k, v = self.k_norm(k).transpose(1, 2), v.transpose(1, 2)  # (B, K, T, d)
        q, k = rotate(q, *angles), rotate(k, *angles)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, K, S, d)
        y = attention(q, k, v)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


# ------------------------------------------------------------------------------------------------------- MLP and block


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: Config):
        super().__init__()
        D, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(D, inner, bias=bias)
        self.up_proj = Linear(D, inner, bias=bias)
        self.down_proj = Linear(inner, D, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, D) to (B, T, D)."""
        return self.down_proj(swiglu(*project(x, self.gate_proj, self.up_proj)))


class Block(nn.Module):
    """Attention and MLP, each on a normed copy of the hidden states, to which it adds."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], attention: Callable, cache: Any = None) -> Tensor:
        """x (B, T, D) to (B, T, D). The arguments are those of `Attention`."""
        x = x + self.self_attn(self.input_layernorm(x), angles, attention, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


# -------------------------------------------------------------------------------------------- the whole, and its loss


class Transformer(nn.Module):
    """`model(tokens)` gives logits, `model(tokens, targets)` the summed loss of the target positions."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        embedding = torch.empty(config.vocab_size, config.hidden_size)  # given, it is not filled with random numbers
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding.from_pretrained(embedding, freeze=False),
                "layers": nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers)),
                "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
            }
        )
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
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
        recompute: float = 0.0,
        offsets: list[int] | None = None,
        each: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, T, V) for tokens (B, T) int64; with `targets` (B, T) the sum of their losses, a scalar in fp32.

        targets: the token that should follow each position, IGNORE where none counts.
        cache: a `KVCache` to read and extend; `tokens` follow what it holds.
        recompute: the share of the blocks with activation checkpointing: only their input is kept for the backward
            pass, which computes the rest again.
        offsets: of samples end to end in one row (B = 1): where each begins and the last one ends. Positions restart.
        each: with `targets`, return that sum and the loss of each target, (n,) fp32 in the order of the flattened
            `targets`, without gradient.
        """
        x = self.hidden_states(tokens, cache, recompute, offsets)
        if targets is None:
            return self.lm_head(x)
        loss, losses = self.target_losses(x, targets)
        return (loss, losses) if each else loss

    def hidden_states(
        self,
        tokens: Tensor,
        cache: Any = None,
        recompute: float = 0.0,
        offsets: list[int] | None = None,
        tree: Places | None = None,
    ) -> Tensor:
        """The final, normed hidden states (B, T, D) of tokens (B, T).

        tree: where the tokens stand in rows with one beginning and several ends. The rest as in `forward`.
        """
        embedding, layers = self.model.embed_tokens, self.model.layers
        x = embedding(tokens).to(compute_dtype(embedding.weight.dtype, tokens.device.type))
        layout, windows = Layout(tokens, cache, offsets, tree), self.config.windows
        positions = layout.places().positions[:, -tokens.size(1) :]
        angles = rope_angles(self.config, positions, x.dtype)
        # The fastest way to compute partial(plain_attention, mask=layout.mask(w)): to change attention, put that here.
        attention = {w: choose_attention(layout, self.config.head_dim, x.dtype, w) for w in set(windows)}
        recomputed = round(recompute * len(layers))
        for number, (block, window) in enumerate(zip(layers, windows, strict=True)):
            if number < recomputed:
                x = checkpoint(block, x, angles, attention[window], use_reentrant=False, preserve_rng_state=True)
            else:
                x = block(x, angles, attention[window], cache)
        if cache is not None:
            cache.length += tokens.size(1)
        return self.model.norm(x)

    def target_losses(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """-log p(target) at the target positions, for x (B, T, D): the sum, and each (n,) without gradient, both fp32.

        The head sees only the rows that have a target.
        """
        rows = (targets.flatten() != IGNORE).nonzero().squeeze(1)
        x, targets = x.flatten(0, 1)[rows], targets.flatten()[rows]
        if type(self.lm_head) is Linear:  # exactly: another kind, such as an adapter, may compute otherwise
            return head_loss(x, self.lm_head.weight, targets)
        chunks = zip(x.split(LOSS_CHUNK), targets.split(LOSS_CHUNK), strict=True)  # the same, by autograd
        losses = torch.cat([checkpoint(self._cross_entropy, *chunk, use_reentrant=False) for chunk in chunks])
        return losses.sum(), losses.detach()

    def _cross_entropy(self, x, targets):
        return F.cross_entropy(self.lm_head(x).float(), targets, reduction="none")
