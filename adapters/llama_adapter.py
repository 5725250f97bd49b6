"""LLaMA-Adapter (Zhang et al. 2023, arXiv 2303.16199) and its second version (Gao et al. 2023, arXiv 2304.15010)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from adapters.adapter import Adapter, linear_layers
from model import Attention, LayerNorm, RMSNorm
from shell.cli import UserError

if TYPE_CHECKING:
    from lora import AdapterConfig
    from model import Transformer


class LlamaAdapter(Adapter):
    """Over an `Attention`: queries also attend to a trained prompt, apart from the text, through a gate.

    y = o_proj(attention(q, k, v) + gate * softmax(q k_p^T / sqrt(d)) v_p): keys k_p and values v_p are what the layer's
    own projections make of adaption_prompt (1, n, D), without RoPE. The gate (1,) starts at zero, so it starts as the
    base itself. It is in the last layers alone.
    """

    unmergeable = "attention to its prompts is no weight of the base"
    flags = ("virtual_tokens", "adapter_layers")
    gates = 1

    def __init__(self, base: Attention, virtual_tokens: int, gates: int = 1):
        super().__init__(base)
        prompt = torch.empty(1, virtual_tokens, base.k_proj.in_features, device=self.device)
        self.adaption_prompt = nn.Parameter(prompt if prompt.is_meta else prompt.normal_())  # as in the authors' code
        self.adaption_gate = nn.Parameter(torch.zeros(gates, device=self.device))

    @classmethod
    def check(cls, model: Transformer, config: AdapterConfig) -> None:
        """As in `Adapter`."""
        if config.adapter_layers > model.config.num_hidden_layers:
            number = model.config.num_hidden_layers
            raise UserError(f"--adapter_layers {config.adapter_layers}: the model has {number} layers")

    @classmethod
    def places(cls, model: Transformer, config: AdapterConfig) -> list[str]:
        """The attention of the last layers."""
        L = len(model.model.layers)
        return [f"model.layers.{number}.self_attn" for number in range(L - config.adapter_layers, L)]

    @classmethod
    def over(
        cls, base: nn.Module, name: str, r: int, alpha: float, config: AdapterConfig, shared: Any = None
    ) -> Adapter:
        """As in `Adapter`."""
        return cls(base, config.virtual_tokens)

    def forward(self, x: Tensor, angles: Any, attention: Any, cache: Any) -> Tensor:
        """As in `model.Attention`."""

        def attend(q, k, v, sinks):
            y = attention(q, k, v, sinks)
            return y + self.of_prompt(q).to(y.dtype)

        return self.base(x, angles, attend, cache)

    def of_prompt(self, q: Tensor) -> Tensor:
        """What queries q (B, H, T, d) take from the prompt, times the gate: (B, H, T, d)."""
        attention, prompt = self.base, self.adaption_prompt.to(q.dtype)
        d, H = attention.head_dim, q.size(1)
        k, v = (layer(prompt).view(-1, layer.out_features // d, d) for layer in (attention.k_proj, attention.v_proj))
        k, v = attention.k_norm(k[None]), v[None]  # (1, n, K, d)
        k, v = (each.transpose(1, 2).repeat_interleave(H // each.size(2), dim=1).to(q.dtype) for each in (k, v))
        weights = (q @ k.transpose(-2, -1) * d**-0.5).softmax(dim=-1, dtype=torch.float32)
        return (self.adaption_gate[:, None, None] * weights).to(q.dtype) @ v


class LlamaAdapterV2(LlamaAdapter):
    """LLaMA-Adapter with a gate for each head; beside it a bias and a scale for each linear layer, and trained norms.

    Over an `Attention`; `over` has the other two. As in Lit-GPT's adapter_v2; the paper's part for images is left out.
    """

    unmergeable = LlamaAdapter.unmergeable
    flags = ("virtual_tokens", "adapter_layers", "lora_targets", "lora_layers")

    @classmethod
    def places(cls, model: Transformer, config: AdapterConfig) -> list[str]:
        """Covered linear layers, all norms that have a weight, and then the attention of the last layers."""
        linears = [name for name in linear_layers(model) if config.covers(name)]
        norms = [name for name, module in model.named_modules() if _has_gain(module)]
        return [*linears, *norms, *super().places(model, config)]

    @classmethod
    def over(
        cls, base: nn.Module, name: str, r: int, alpha: float, config: AdapterConfig, shared: Any = None
    ) -> Adapter:
        """As in `Adapter`."""
        if hasattr(base, "in_features"):
            return ScaledLinear(base)
        if _has_gain(base):
            return TrainedNorm(base)
        return cls(base, config.virtual_tokens, base.q_proj.out_features // base.head_dim)


class ScaledLinear(Adapter):
    """y = scale * (base(x) + bias), both (out,): one and zero at the start."""

    unmergeable = LlamaAdapter.unmergeable

    def __init__(self, base: nn.Module):
        super().__init__(base)
        self.adapter_scale = nn.Parameter(torch.ones(self.out_features, device=self.device))
        self.adapter_bias = nn.Parameter(torch.zeros(self.out_features, device=self.device))

    @property
    def bias(self) -> Tensor | None:
        """The base's own."""
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out), in x's dtype."""
        y = self.base(x)
        return self.adapter_scale.to(y.dtype) * (y + self.adapter_bias.to(y.dtype))


class TrainedNorm(Adapter):
    """A norm whose weight, and bias if it has one, are trained in fp32 in the place of its own."""

    unmergeable = LlamaAdapter.unmergeable

    def __init__(self, base: nn.Module):
        super().__init__(base)
        for name, parameter in base.named_parameters():
            setattr(self, name, nn.Parameter(parameter.detach().to(torch.float32, copy=True)))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) in x's dtype."""
        own = {name: getattr(self, name).to(p.dtype) for name, p in self.base.named_parameters()}
        return functional_call(self.base, own, (x,))


def _has_gain(module):
    """Whether a module is a norm that has a weight to train."""
    return type(module) in (RMSNorm, LayerNorm) and module.weight is not None
