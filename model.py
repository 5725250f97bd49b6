"""The decoder: Llama-2 and 3, Mistral, Qwen2, Qwen3, SmolLM2 and whatever shares their structure.

One `Transformer`, told apart by the checkpoint's own `config.json`. Parameter names are Hugging Face's, so their
safetensors files load with no tensor renamed, fused or permuted.

Shapes: B batch, T tokens in this call, S keys (cached ones and these), D hidden size, H query heads, K key/value heads,
d head size, V vocabulary.
"""

import copy
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ops.activation import swiglu
from ops.attention import choose_attention
from ops.dtypes import compute_dtype
from ops.linear import linear
from ops.loss import LOSS_CHUNK, head_loss
from ops.norm import rms_norm
from ops.rotation import rotate

IGNORE = -100  # a target that does not count, as in torch's cross_entropy

# What the families that share this structure leave unsaid in config.json. Biases: q, k, v and o as `attention_bias`
# says, unless fixed here; the norm on each query and key head before RoPE is Qwen3's.
FAMILIES = {
    "llama": {},
    "mistral": {"attention_bias": False},
    "qwen2": {"qkv_bias": True, "o_bias": False},
    "qwen3": {"qk_norm": True},
}


@dataclass(frozen=True)
class RoPE:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864) and how it is stretched to longer contexts."""

    theta: float
    scaling: str = "default"  # or "linear" (Chen et al. 2023, arXiv 2306.15595), or "llama3" (Llama 3.1)
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    @classmethod
    def from_dict(cls, config):
        """Read it from the keys of a config.json, of transformers 5 (`rope_parameters`) or before it."""
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
        scaling = rope.get("rope_type", rope.get("type", "default"))
        if scaling not in ("default", "linear", "llama3"):
            raise ValueError(f"rope type {scaling!r} is not supported, only default, linear and llama3 are")
        if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
            raise ValueError("partial_rotary_factor is not supported")
        if scaling == "default":
            return cls(theta)
        if scaling == "linear":
            return cls(theta, scaling, rope["factor"])
        keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        return cls(theta, scaling, *(rope[key] for key in keys))


@dataclass(frozen=True)
class Config:
    """The architecture: what `Transformer` needs from a config.json, under Hugging Face's names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RoPE
    max_position_embeddings: int
    windows: tuple  # for each layer how many positions back a query sees, itself included, or None for all
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @classmethod
    def from_dict(cls, config):
        """Read a parsed config.json. Raises ValueError where the model would not be the one it describes."""
        family = config.get("model_type")
        if not isinstance(family, str) or family not in FAMILIES:
            raise ValueError(f"model_type {family!r} is not supported, only {', '.join(FAMILIES)} are")
        if config.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act {config['hidden_act']!r} is not supported, only silu is")
        if config.get("quantization_config"):
            raise ValueError("the weights are already quantised (quantization_config): take the original ones")
        try:
            config = {**config, **FAMILIES[family]}
            _check_sizes(config)
            heads = config["num_attention_heads"]
            attention_bias = config.get("attention_bias", False)
            result = cls(
                vocab_size=config["vocab_size"],
                hidden_size=config["hidden_size"],
                intermediate_size=config["intermediate_size"],
                num_hidden_layers=config["num_hidden_layers"],
                num_attention_heads=heads,
                num_key_value_heads=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or config["hidden_size"] // heads,
                rms_norm_eps=config["rms_norm_eps"],
                rope=RoPE.from_dict(config),
                max_position_embeddings=config["max_position_embeddings"],
                windows=_windows(config),
                tie_word_embeddings=config.get("tie_word_embeddings", False),
                qkv_bias=config.get("qkv_bias", attention_bias),
                o_bias=config.get("o_bias", attention_bias),
                mlp_bias=config.get("mlp_bias", False),
                qk_norm=config.get("qk_norm", False),
            )
        except KeyError as error:
            raise ValueError(f"key {error} is missing") from None
        except (AttributeError, IndexError, TypeError) as error:
            raise ValueError(f"a value is of the wrong kind ({error})") from None
        if heads % result.num_key_value_heads or result.head_dim % 2:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads, and head_dim even")
        _check_values(result)
        return result


LARGEST = 2**24  # of any size, and 1,000 layers: what a damaged file can ask for must not take time or memory


def _check_sizes(config):
    """Raise ValueError unless the sizes in a config.json are whole numbers within reason."""
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for key in (*needed, "num_key_value_heads", "head_dim", "max_position_embeddings"):
        value = config[key] if key in needed else config.get(key)
        most = 1000 if key == "num_hidden_layers" else LARGEST
        if value is not None and not (type(value) is int and 0 < value <= most) or value is None and key in needed:
            raise ValueError(f"{key} is {value!r}, it must be a whole number above 0 and up to {most:,}")


def _check_values(config):
    """Raise ValueError for what else a `Config` cannot mean."""
    rope = config.rope
    positive = {name: getattr(rope, name) for name in ("theta", "factor", "low_freq_factor", "high_freq_factor")}
    for name, value in {**positive, "rms_norm_eps": config.rms_norm_eps}.items():
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f"{name} is {value!r}, it must be a number above 0")
    windows = {window for window in config.windows if window is not None}
    if not all(type(size) is int and size > 0 for size in {rope.original_context, *windows}):
        raise ValueError("original_max_position_embeddings and sliding_window must be whole numbers above 0")
    if len(config.windows) != config.num_hidden_layers:
        raise ValueError(
            f"layer_types names {len(config.windows)} layers, num_hidden_layers {config.num_hidden_layers}"
        )
    for name in ("tie_word_embeddings", "qkv_bias", "o_bias", "mlp_bias"):
        if type(getattr(config, name)) is not bool:
            raise ValueError(f"{name} is {getattr(config, name)!r}, it must be true or false")
    if config.num_attention_heads * config.head_dim > LARGEST:
        raise ValueError(f"num_attention_heads times head_dim is above {LARGEST:,}")


def _windows(config):
    """The sliding window of each layer, from `layer_types` or, before transformers 5, from the family's own keys."""
    layers, window = config["num_hidden_layers"], config.get("sliding_window")
    if config.get("layer_types"):
        return tuple(window if kind == "sliding_attention" else None for kind in config["layer_types"])
    if config["model_type"] == "mistral":
        return (window,) * layers
    if config["model_type"] in ("qwen2", "qwen3") and config.get("use_sliding_window"):
        first = config["max_window_layers"]
        return tuple(window if layer >= first else None for layer in range(layers))
    return (None,) * layers


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


class Linear(nn.Linear):
    """nn.Linear that multiplies in its input's dtype, whatever its weight is stored in."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)

    def reset_parameters(self):
        if not self.weight.is_meta:  # there it would do nothing, and take a second to import what it needs for that
            super().reset_parameters()

    def dequantize(self, dtype):
        """The weight that this layer multiplies by, (out_features, in_features) of `dtype`, without gradient."""
        return self.weight.detach().to(dtype)


def project(x, *layers):
    """What each of several layers makes of one input; adapters do it together, in fewer products."""
    adapted = [layer for layer in layers if hasattr(layer, "together") and layer.trains_by_hand()]
    done = dict(zip(adapted, adapted[0].together(x, adapted), strict=True)) if adapted else {}
    return [done[layer] if layer in done else layer(x) for layer in layers]


@lru_cache
def inverse_frequencies(rope, head_dim, device):
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


def rope_angles(config, positions, dtype):
    """cos and sin for `positions` (T,) or (B, T): two tensors (T, d/2) or (B, 1, T, d/2) of `dtype`."""
    angles = positions[..., None].float() * inverse_frequencies(config.rope, config.head_dim, positions.device)
    if positions.dim() == 2:
        angles = angles[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def positions_of(tokens, cache, offsets):
    """Each token's place in its sample, from 0: (T,), or (B, T) if the rows of the cache are padded."""
    T, device = tokens.size(1), tokens.device
    if offsets is not None:
        starts = torch.tensor(offsets, device=device)
        # The size is known: asked for it, a CUDA device would be waited for, and one that is not there has no answer.
        return torch.arange(T, device=device) - starts[:-1].repeat_interleave(starts.diff(), output_size=T)
    if cache is None:
        return torch.arange(T, device=device)
    positions = torch.arange(cache.length, cache.length + T, device=device)
    return positions if cache.padding is None else (positions - cache.padding[:, None]).clamp(min=0)


class KVCache:
    """Room for the keys and values of `max_length` positions in every layer, made once and filled in place.

    `padding` (B,) says how many positions at the left of each row hold nothing, for prompts of unequal lengths.
    """

    def __init__(self, config, batch_size, max_length, dtype, device, padding=None):
        shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, max_length, config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.padding = padding
        self.length = 0  # positions filled so far

    def update(self, layer, k, v):
        """Append k, v (B, K, T, d) of one layer; returns all of its keys and values, (B, K, length + T, d)."""
        end = self.length + k.size(2)
        if end > self.k.size(3):  # written past the end, one position would be lost without an error
            raise ValueError(f"the cache has room for {self.k.size(3)} positions, {end} are needed")
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def keep(self, rows):
        """Forget all but these rows of the batch: indices (B',) int64."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]
        if self.padding is not None:
            self.padding = self.padding[rows]

    def joined(self, other, more):
        """A new cache: this one's rows, then those of `other`, moved so that all end together, and room for `more`.

        Keys and values hold for a row wherever it begins: RoPE counts from its padding. Columns that are padding in
        every row are left out.
        """
        parts = [(cache, 0 if cache.padding is None else int(cache.padding.min())) for cache in (self, other)]
        length = max(cache.length - unused for cache, unused in parts)
        layers, _, K, _, d = self.k.shape
        shape = (layers, self.k.size(1) + other.k.size(1), K, length + more, d)
        result = copy.copy(self)
        result.k, result.v, result.length = self.k.new_zeros(shape), self.v.new_zeros(shape), length
        result.padding, first = torch.zeros(shape[1], dtype=torch.int64, device=self.k.device), 0
        for cache, unused in parts:
            rows, start = slice(first, first + cache.k.size(1)), length - (cache.length - unused)
            for old, new in ((cache.k, result.k), (cache.v, result.v)):
                new[:, rows, :, start:length] = old[:, :, :, unused : cache.length]
            result.padding[rows] = start - unused if cache.padding is None else cache.padding + (start - unused)
            first = rows.stop
        return result


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245) with RoPE."""

    def __init__(self, config, layer):
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

    def forward(self, x, angles, attention, cache):
        B, T, _ = x.shape
        q, k, v = (y.view(B, T, -1, self.head_dim) for y in project(x, self.q_proj, self.k_proj, self.v_proj))
        q = self.q_norm(q).transpose(1, 2)  # (B, H, T, d)
        k, v = self.k_norm(k).transpose(1, 2), v.transpose(1, 2)  # (B, K, T, d)
        q, k = rotate(q, *angles), rotate(k, *angles)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, K, S, d)
        y = attention(q, k, v)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config):
        super().__init__()
        D, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(D, inner, bias=bias)
        self.up_proj = Linear(D, inner, bias=bias)
        self.down_proj = Linear(inner, D, bias=bias)

    def forward(self, x):
        return self.down_proj(swiglu(*project(x, self.gate_proj, self.up_proj)))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, angles, attention, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), angles, attention, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """`model(tokens)` gives logits, `model(tokens, targets)` the summed loss of the target positions."""

    def __init__(self, config):
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

    def tie_weights(self):
        """Where the config says so, let the head share the embedding's weight (again, after either was replaced)."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens, targets=None, cache=None, recompute=0.0, offsets=None, each=False):
        """Logits (B, T, V) for tokens (B, T) int64; with `targets` (B, T) the sum of their losses, a scalar in fp32.

        targets: the token that should follow each position, IGNORE where none counts.
        cache: a `KVCache` to read and extend; `tokens` follow what it holds.
        recompute: the share of the blocks of which only the input is kept for the backward pass, which computes the
            inside again.
        offsets: of samples end to end in one row (B = 1): where each begins and the last one ends. Positions restart.
        each: with `targets`, return that sum and the loss of each target, (n,) fp32 in the order of the flattened
            `targets`, without gradient.
        """
        x = self.hidden_states(tokens, cache, recompute, offsets)
        if targets is None:
            return self.lm_head(x)
        loss, losses = self.target_losses(x, targets)
        return (loss, losses) if each else loss

    def hidden_states(self, tokens, cache=None, recompute=0.0, offsets=None, tree=None):
        """The final, normed hidden states (B, T, D) of tokens (B, T).

        tree: an `attention.Tree`, if rows have one beginning and several ends. The rest as in `forward`.
        """
        embedding, layers = self.model.embed_tokens, self.model.layers
        x = embedding(tokens).to(compute_dtype(embedding.weight.dtype, tokens.device.type))
        positions = positions_of(tokens, cache, offsets) if tree is None else tree.positions
        angles = rope_angles(self.config, positions, x.dtype)
        windows = self.config.windows
        attention = {w: choose_attention(self.config, tokens, x.dtype, cache, w, offsets, tree) for w in set(windows)}
        recomputed = round(recompute * len(layers))
        for number, (block, window) in enumerate(zip(layers, windows, strict=True)):
            if number < recomputed:
                x = checkpoint(block, x, angles, attention[window], use_reentrant=False, preserve_rng_state=True)
            else:
                x = block(x, angles, attention[window], cache)
        if cache is not None:
            cache.length += tokens.size(1)
        return self.model.norm(x)

    def target_losses(self, x, targets):
        """-log p(target) at the target positions, for x (B, T, D): the sum, and each (n,) without gradient, both fp32.

        The head sees only the rows that have a target.
        """
        rows = (targets.flatten() != IGNORE).nonzero().squeeze(1)
        x, targets = x.flatten(0, 1)[rows], targets.flatten()[rows]
        if type(self.lm_head) is Linear:  # exactly: another kind may compute otherwise
            return head_loss(x, self.lm_head.weight, targets)
        chunks = zip(x.split(LOSS_CHUNK), targets.split(LOSS_CHUNK), strict=True)  # such as an adapter on the head
        losses = torch.cat([checkpoint(self._cross_entropy, *chunk, use_reentrant=False) for chunk in chunks])
        return losses.sum(), losses.detach()

    def _cross_entropy(self, x, targets):
        return F.cross_entropy(self.lm_head(x).float(), targets, reduction="none")
