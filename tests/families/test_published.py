"""How many parameters models have by their configurations alone, against what papers and model cards say."""

import pytest
import torch

from model import Transformer
from weights.families import config_from_json

# Keys of config.json that set the shape; the family's defaults are those of these models.
PUBLISHED = {
    # model: its config.json; in billions, or exactly where that is published
    "Pythia-6.9B": (
        dict(
            model_type="gpt_neox", vocab_size=50432, hidden_size=4096, intermediate_size=16384, num_hidden_layers=32,
            num_attention_heads=32, rotary_pct=0.25, max_position_embeddings=2048,
        ),
        6_857_302_016,  # Biderman et al. 2023, arXiv 2304.01373, table of the model card
    ),
    "Falcon-7B": (
        dict(
            model_type="falcon", vocab_size=65024, hidden_size=4544, num_hidden_layers=32, num_attention_heads=71,
            multi_query=True, new_decoder_architecture=False, parallel_attn=True, bias=False, alibi=False,
        ),
        6_921_720_704,  # "7B" on the card; PEFT prints 6,926,439,296 with LoRA of rank 16 on query_key_value, 4,718,592
    ),
    "Falcon-40B": (
        dict(
            model_type="falcon", vocab_size=65024, hidden_size=8192, num_hidden_layers=60, num_attention_heads=128,
            num_kv_heads=8, new_decoder_architecture=True, parallel_attn=True, bias=False, alibi=False,
        ),
        60 * (9216 * 8192 + 9 * 8192**2 + 4 * 8192) + 65024 * 8192 + 2 * 8192,  # "40B" on the card: counted by hand
    ),
    "MPT-30B": (
        dict(
            model_type="mpt", vocab_size=50432, d_model=7168, n_layers=48, n_heads=64, expansion_ratio=4,
            max_seq_len=8192, no_bias=True, attn_config={"alibi": True},
        ),
        "29.95",
    ),
    "BLOOM-7b1": (
        dict(model_type="bloom", vocab_size=250880, hidden_size=4096, n_layer=30, n_head=32),
        7_069_016_064,
    ),
    "OPT-350M": (
        dict(
            model_type="opt", vocab_size=50272, hidden_size=1024, word_embed_proj_dim=512, ffn_dim=4096,
            num_hidden_layers=24, num_attention_heads=16, do_layer_norm_before=False, max_position_embeddings=2048,
        ),
        331_196_416,
    ),
    "Gemma-2-9B": (
        dict(
            model_type="gemma2", vocab_size=256000, hidden_size=3584, intermediate_size=14336, num_hidden_layers=42,
            num_attention_heads=16, num_key_value_heads=8, head_dim=256, query_pre_attn_scalar=256,
        ),
        256000 * 3584 + 8_324_201_984,  # arXiv 2408.00118, table 2, whose embedding has 128 unused rows more
    ),
    "Mixtral-8x7B": (
        dict(
            model_type="mixtral", vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2,
        ),
        "46.7",
    ),
    "Qwen3-30B-A3B": (
        dict(
            model_type="qwen3_moe", vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=48,
            num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
            moe_intermediate_size=768, norm_topk_prob=True, tie_word_embeddings=False,
        ),
        "30.5",
    ),
}  # fmt: skip
ACTIVE = {"Mixtral-8x7B": "12.9", "Qwen3-30B-A3B": "3.3"}  # billions of parameters that a token uses


def model_of(name):
    with torch.device("meta"):
        return Transformer(config_from_json(PUBLISHED[name][0]))


def is_published(count, published):
    """Whether a count is the exact one, or, in billions, the one that was rounded or cut off."""
    if isinstance(published, int):
        return count == published
    return abs(count / 1e9 - float(published)) < 10 ** -len(published.partition(".")[2])


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters(name):
    assert is_published(sum(parameter.numel() for parameter in model_of(name).parameters()), PUBLISHED[name][1])


@pytest.mark.parametrize("name", ACTIVE)
def test_active_parameters(name):
    model = model_of(name)
    experts = model.config.experts
    used = sum(
        parameter.numel() * (experts.per_token / experts.count if ".mlp.experts." in name else 1)
        for name, parameter in model.named_parameters()
    )
    assert is_published(used, ACTIVE[name])
