"""The decoder: Llama-2 and 3, Mistral, Qwen2, Qwen3, SmolLM2 and whatever shares their structure.

One `Transformer`, told apart by the checkpoint's own `config.json`. Parameter names are Hugging Face's, so their
safetensors files load with no tensor renamed, fused or permuted.

Shapes: B batch, T tokens in this call, S keys (cached ones and these), D hidden size, H query heads, K key/value heads,
d head size, V vocabulary.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

IGNORE = -100  # a target that does not count, as in torch's cross_entropy
# On a CPU, rows up to this length attend in plain products. Forward and backward of 16 rows of 60 in bf16 took 15 ms
# against the fused kernel's 68, of 8 rows of 128 25 against 88, of 4 rows of 256 81 against 72 (one thread).
PLAIN_ATTENTION_LENGTH = 128
LOSS_CHUNK = 1024  # target positions whose logits exist at one time; 1024 x 32,000 fp32 logits are 131 MB

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
        if family not in FAMILIES:
            raise ValueError(f"model_type {family!r} is not supported, only {', '.join(FAMILIES)} are")
        if config.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act {config['hidden_act']!r} is not supported, only silu is")
        if config.get("quantization_config"):
            raise ValueError("the weights are already quantised (quantization_config): take the original ones")
        try:
            config = {**config, **FAMILIES[family]}
            for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
                if not config[key] > 0:
                    raise ValueError(f"{key} is {config[key]}, it must be above 0")
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
        if heads % result.num_key_value_heads or result.head_dim % 2:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads, and head_dim even")
        return result


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
        return F.rms_norm(x, (x.size(-1),), self.weight.to(x.dtype), self.eps)


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


def rotate(x, cos, sin):
    """Turn x (B, heads, T, d), whose dimension i pairs with i + d/2 (Hugging Face's layout, not Meta's)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def attention_mask(T, S, window, padding, device):
    """Which of the S keys each of the last T positions may see: bool (B or 1, 1, T, S).

    None where causality alone says it, so that attention can take its fast path. `padding` (B,) counts the
    positions at the left of each row that hold nothing.
    """
    if padding is None and (window is None or S <= window) and T in (1, S):  # noqa: SIM300
        return None
    query = torch.arange(S - T, S, device=device)[:, None]
    key = torch.arange(S, device=device)[None]
    mask = (key <= query)[None, None]
    if window is not None:
        mask = mask & (key > query - window)
    if padding is not None:  # a padding position sees itself: a softmax over nothing would be NaN
        mask = mask & (key >= padding[:, None, None, None]) | (key == query)
    return mask


def attend(q, k, v, mask):
    """Attention of q (B, H, T, d) to k, v (B, K, S, d), causal where `mask` is None: (B, H, T, d)."""
    B, H, T, d = q.shape
    K = k.size(1)
    if T == 1:  # the heads that share keys are the rows of one product: no key is copied
        return F.scaled_dot_product_attention(q.view(B, K, H // K, d), k, v, attn_mask=mask).view(B, H, T, d)
    if mask is None and q.device.type == "cpu" and T <= PLAIN_ATTENTION_LENGTH:
        return plain_attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=K != H)


def plain_attention(q, k, v):
    """Causal attention written out: the reference of the fused kernels, and on a CPU the faster way for short rows.

    q (B, H, T, d) and k, v (B, K, T, d) give (B, H, T, d). The heads that share keys are rows of one product.
    """
    B, H, T, d = q.shape
    K = k.size(1)
    scores = (q.reshape(B, K, H // K * T, d) @ k.transpose(-2, -1)).view(B, H, T, T).float() * d**-0.5
    later = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    weights = scores.masked_fill(later, -torch.inf).softmax(dim=-1).to(v.dtype)
    return (weights.view(B, K, H // K * T, T) @ v).view(B, H, T, d)


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


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245) with RoPE."""

    def __init__(self, config, layer):
        super().__init__()
        D, d = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.layer, self.head_dim = layer, d
        self.q_proj = nn.Linear(D, H * d, bias=config.qkv_bias)
        self.k_proj = nn.Linear(D, K * d, bias=config.qkv_bias)
        self.v_proj = nn.Linear(D, K * d, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * d, D, bias=config.o_bias)
        self.q_norm = RMSNorm(d, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(d, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, angles, mask, cache):
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, H, T, d)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, K, T, d)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k = rotate(q, *angles), rotate(k, *angles)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, K, S, d)
        y = attend(q, k, v, mask)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config):
        super().__init__()
        D, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(D, inner, bias=bias)
        self.up_proj = nn.Linear(D, inner, bias=bias)
        self.down_proj = nn.Linear(inner, D, bias=bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, angles, mask, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), angles, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """`model(tokens)` gives logits, `model(tokens, targets)` the summed loss of the target positions."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers)),
                "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
            }
        )
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self):
        """Where the config says so, let the head share the embedding's weight (again, after either was replaced)."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens, targets=None, cache=None, recompute=False):
        """Logits (B, T, V) for tokens (B, T) int64; with `targets` (B, T) the sum of their losses, a scalar in fp32.

        targets: the token that should follow each position, IGNORE where none counts.
        cache: a `KVCache` to read and extend; `tokens` follow what it holds.
        recompute: keep only the input of each block for the backward pass and compute its inside again there.
        """
        x = self.hidden_states(tokens, cache, recompute)
        return self.lm_head(x) if targets is None else self.summed_loss(x, targets)

    def hidden_states(self, tokens, cache=None, recompute=False):
        """The final, normed hidden states (B, T, D) of tokens (B, T); the rest as in `forward`."""
        start, padding = (0, None) if cache is None else (cache.length, cache.padding)
        T = tokens.size(1)
        positions = torch.arange(start, start + T, device=tokens.device)
        if padding is not None:
            positions = (positions - padding[:, None]).clamp(min=0)  # (B, T)
        x = self.model.embed_tokens(tokens)
        angles = rope_angles(self.config, positions, x.dtype)
        windows = self.config.windows
        masks = {window: attention_mask(T, start + T, window, padding, x.device) for window in set(windows)}
        for block, window in zip(self.model.layers, windows, strict=True):
            if recompute:
                x = checkpoint(block, x, angles, masks[window], use_reentrant=False, preserve_rng_state=True)
            else:
                x = block(x, angles, masks[window], cache)
        if cache is not None:
            cache.length += T
        return self.model.norm(x)

    def summed_loss(self, x, targets):
        """Sum over the target positions of -log p(target), for x (B, T, D): a scalar in fp32.

        The head sees only the rows that have a target. Their logits are as large as all other activations
        together, so with several chunks each is computed again in the backward pass instead of kept.
        """
        rows = (targets.flatten() != IGNORE).nonzero().squeeze(1)
        x, targets = x.flatten(0, 1)[rows], targets.flatten()[rows]
        if len(rows) <= LOSS_CHUNK:
            return self._cross_entropy(x, targets)
        chunks = zip(x.split(LOSS_CHUNK), targets.split(LOSS_CHUNK), strict=True)
        return sum(checkpoint(self._cross_entropy, *chunk, use_reentrant=False) for chunk in chunks)

    def _cross_entropy(self, x, targets):
        return F.cross_entropy(self.lm_head(x).float(), targets, reduction="sum")
