"""How far fp32 gradients of LoRA are from exact ones: onetune's, and those of transformers + PEFT.

    python bench/training/gradients.py --checkpoint_dir checkpoints/SmolLM2-135M-Instruct

Both compute the same loss of the same tokens with the same weights in fp32. The exact gradients are those of a plain
decoder in fp64, written out here, with RoPE's cosines and sines rounded to fp32 as both sides have them. The distance
of a tensor is the largest difference of an element, divided by the largest element of the exact gradient.

Needs requirements-dev.txt.
"""

import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # the project's folder in place of this one, wherever it is started from
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.measuring import OURS, print_table
from shell import cli
from shell.cli import UserError


@dataclass
class Settings:
    """The command line.

    Args:
        checkpoint_dir: Model folder.
        rows: Samples in the micro-batch.
        tokens: Random tokens in a sample.
        seeds: Number of micro-batches to try.
    """

    checkpoint_dir: Path
    rows: int = 2
    tokens: int = 96
    seeds: int = 3

    def __post_init__(self):
        cli.check_numbers(self, "rows", "tokens", "seeds", above=0)


if __name__ == "__main__":
    settings = cli.parse(Settings)

import torch
import torch.nn.functional as F

import lora
from model import Transformer, rope_angles
from weights import peft_format
from weights.checkpoint import load_model

COLUMNS = {
    "seed": "{seed}", "side": "{side}", "median": "{median:.1e}", "largest": "{largest:.1e}", "tensor": "{tensor}",
}  # fmt: skip
CONFIG = lora.AdapterConfig(r=8, alpha=16, targets=("q_proj", "v_proj"))


def main(s: Settings) -> None:
    """Print a row for each micro-batch and each side."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    ours = load_model(s.checkpoint_dir, torch.float32)
    extra = [name for name, _ in ours.named_parameters() if name.endswith(("bias", "q_norm.weight"))]
    extra += ["a sliding window"] * any(ours.config.windows)
    if extra:
        raise UserError(f"{s.checkpoint_dir} has {extra[0]}, which the plain decoder of this script lacks")
    lora.add_lora(ours, CONFIG)
    for name, parameter in ours.named_parameters():
        if name.endswith("lora_B"):  # as after some training; zeros would leave A without a gradient
            torch.nn.init.normal_(parameter, std=0.02)
    with tempfile.TemporaryDirectory() as folder:
        peft_format.save_adapter(ours, CONFIG, Path(folder), s.checkpoint_dir)
        base = AutoModelForCausalLM.from_pretrained(s.checkpoint_dir, dtype=torch.float32)
        theirs = PeftModel.from_pretrained(base, folder, is_trainable=True)
    exact = {name: parameter.detach().double() for name, parameter in ours.named_parameters()}
    rows = []
    for seed in range(s.seeds):
        torch.manual_seed(seed)
        tokens = torch.randint(ours.config.vocab_size, (s.rows, s.tokens + 1))
        tokens, targets = tokens[:, :-1], tokens[:, 1:]
        wanted = gradients(exact_loss(ours, exact, tokens, targets), exact)
        sides = {
            OURS: gradients(ours(tokens, targets), dict(ours.named_parameters())),
            "PEFT": gradients(peft_loss(theirs, tokens, targets), peft_parameters(theirs)),
        }
        distances = {
            side: {name: distance(found[name], wanted[name]) for name in wanted} for side, found in sides.items()
        }
        distances["between the two"] = {name: distance(sides[OURS][name], sides["PEFT"][name]) for name in wanted}
        rows += [{"seed": seed, "side": side, **summary(found)} for side, found in distances.items()]
        nearer = sum(distances[OURS][name] < distances["PEFT"][name] for name in wanted)
        print(f"seed {seed}: onetune is nearer to the exact gradient in {nearer} of {len(wanted)} tensors")
    print_table(COLUMNS, rows)


def summary(distances: dict[str, float]) -> dict:
    """The median and the largest distance of the tensors, and the tensor that has it."""
    worst = max(distances, key=distances.get)
    median = statistics.median(distances.values())
    return {"median": median, "largest": distances[worst], "tensor": worst.removeprefix("model.layers.")}


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """max |found - wanted| / max |wanted|."""
    return ((found.double() - wanted.double()).abs().max() / wanted.abs().max()).item()


def gradients(loss: torch.Tensor, parameters: dict) -> dict[str, torch.Tensor]:
    """The gradient of each LoRA matrix by its name in onetune."""
    adapters = {name: parameter for name, parameter in parameters.items() if "lora_" in name}
    return dict(zip(adapters, torch.autograd.grad(loss, [*adapters.values()]), strict=True))


def peft_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """PEFT's parameters under onetune's names."""
    strip = lambda name: name.removeprefix("base_model.model.").removesuffix(".default.weight")  # noqa: E731
    return {strip(name): parameter for name, parameter in model.named_parameters() if "lora_" in name}


def peft_loss(model: torch.nn.Module, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The summed loss by transformers and PEFT."""
    logits = model(tokens, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def exact_loss(model: Transformer, weights: dict, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The summed loss in fp64, from a Llama's `weights` by name (no biases), of which those of LoRA get gradients."""
    c, (B, T) = model.config, tokens.shape
    cos, sin = (x.double() for x in rope_angles(c.ropes[0], torch.arange(T), None, torch.float32)[:2])
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    for name, tensor in weights.items():
        tensor.requires_grad_("lora_" in name)

    def norm(x, name):
        return x * (x.square().mean(-1, keepdim=True) + c.norm_eps).rsqrt() * weights[f"{name}.weight"]

    def linear(x, name):
        if f"{name}.weight" in weights:
            return x @ weights[f"{name}.weight"].T
        a, b = weights[f"{name}.lora_A"], weights[f"{name}.lora_B"]
        return x @ weights[f"{name}.base.weight"].T + x @ a.T @ b.T * CONFIG.alpha / CONFIG.r

    def heads(x, rotated):
        x = x.view(B, T, -1, c.head_dim).transpose(1, 2)
        if rotated:
            one, other = x.chunk(2, dim=-1)
            x = torch.cat((one * cos - other * sin, other * cos + one * sin), dim=-1)
        return x.repeat_interleave(c.num_attention_heads // x.size(1), dim=1)

    x = weights["model.embed_tokens.weight"][tokens]
    for layer in (f"model.layers.{number}" for number in range(c.num_hidden_layers)):
        h, at = norm(x, f"{layer}.input_layernorm"), f"{layer}.self_attn"
        q, k, v = (heads(linear(h, f"{at}.{name}_proj"), name != "v") for name in "qkv")
        shares = (q @ k.mT / c.head_dim**0.5).masked_fill(future, -torch.inf).softmax(-1)
        x = x + linear((shares @ v).transpose(1, 2).flatten(2), f"{at}.o_proj")
        h = norm(x, f"{layer}.post_attention_layernorm")
        gated = F.silu(linear(h, f"{layer}.mlp.gate_proj")) * linear(h, f"{layer}.mlp.up_proj")
        x = x + linear(gated, f"{layer}.mlp.down_proj")
    head = weights["model.embed_tokens.weight" if c.tie_word_embeddings else "lm_head.weight"]
    logits = norm(x, "model.norm") @ head.T
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


if __name__ == "__main__":
    cli.run(main, settings)
