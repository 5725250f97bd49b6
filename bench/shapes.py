"""The shapes of published models: what their config.json says, as far as it differs from their family's defaults."""

SHAPES = {
    "Llama-2-7B": dict(
        model_type="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, rms_norm_eps=1e-5, max_position_embeddings=4096,
        tie_word_embeddings=False,
    ),
    "Llama-2-70B": dict(
        model_type="llama", vocab_size=32000, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8, rms_norm_eps=1e-5, max_position_embeddings=4096,
        tie_word_embeddings=False,
    ),
    "Llama-3.1-8B": dict(
        model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, rms_norm_eps=1e-5, max_position_embeddings=131072,
        rope_theta=500000.0, tie_word_embeddings=False,
        rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                      "original_max_position_embeddings": 8192},
    ),
    "Mistral-7B": dict(
        model_type="mistral", vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, rms_norm_eps=1e-5, max_position_embeddings=32768,
        sliding_window=4096, tie_word_embeddings=False,
    ),
    "Llama-3-8B": dict(
        model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, rms_norm_eps=1e-5, max_position_embeddings=8192,
        rope_theta=500000.0, tie_word_embeddings=False,
    ),
    "Pythia-160M": dict(
        model_type="gpt_neox", vocab_size=50304, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
        intermediate_size=3072, max_position_embeddings=2048, rotary_pct=0.25, tie_word_embeddings=False,
    ),
    "Pythia-6.9B": dict(
        model_type="gpt_neox", vocab_size=50432, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
        intermediate_size=16384, max_position_embeddings=2048, rotary_pct=0.25, tie_word_embeddings=False,
    ),
    "Falcon-7B": dict(
        model_type="falcon", vocab_size=65024, hidden_size=4544, num_hidden_layers=32, num_attention_heads=71,
        multi_query=True, new_decoder_architecture=False, parallel_attn=True, bias=False, alibi=False,
    ),
    "Falcon-40B": dict(
        model_type="falcon", vocab_size=65024, hidden_size=8192, num_hidden_layers=60, num_attention_heads=128,
        num_kv_heads=8, new_decoder_architecture=True, parallel_attn=True, bias=False, alibi=False,
    ),
    "MPT-30B": dict(
        model_type="mpt", vocab_size=50432, d_model=7168, n_layers=48, n_heads=64, expansion_ratio=4, max_seq_len=8192,
        no_bias=True, attn_config={"alibi": True},
    ),
    "BLOOM-7b1": dict(model_type="bloom", vocab_size=250880, hidden_size=4096, n_layer=30, n_head=32),
    "OPT-350M": dict(
        model_type="opt", vocab_size=50272, hidden_size=1024, word_embed_proj_dim=512, ffn_dim=4096,
        num_hidden_layers=24, num_attention_heads=16, do_layer_norm_before=False, max_position_embeddings=2048,
    ),
    "Gemma-2-9B": dict(
        model_type="gemma2", vocab_size=256000, hidden_size=3584, intermediate_size=14336, num_hidden_layers=42,
        num_attention_heads=16, num_key_value_heads=8, head_dim=256, query_pre_attn_scalar=256,
    ),
    "Gemma-3-270M": dict(
        model_type="gemma3_text", vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18,
        num_attention_heads=4, num_key_value_heads=1, head_dim=256, sliding_window=512, query_pre_attn_scalar=256,
        max_position_embeddings=32768, tie_word_embeddings=True,
    ),
    "Mixtral-8x7B": dict(
        model_type="mixtral", vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2,
    ),
    "Qwen3-30B-A3B": dict(
        model_type="qwen3_moe", vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=48,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
        moe_intermediate_size=768, norm_topk_prob=True, tie_word_embeddings=False,
    ),
    # No published one: Qwen3-30B-A3B with a quarter of its width, half of its experts and an eighth of its layers.
    "Qwen3-MoE-small": dict(
        model_type="qwen3_moe", vocab_size=50304, hidden_size=512, intermediate_size=1536, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=2, head_dim=64, num_experts=64, num_experts_per_tok=8,
        moe_intermediate_size=192, norm_topk_prob=True, max_position_embeddings=2048, tie_word_embeddings=True,
    ),
}  # fmt: skip
