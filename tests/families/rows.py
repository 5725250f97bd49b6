"""The table of families: for each a few tiny random models, as changes to its class's config in transformers.

Adding a family is adding rows here; test_rows.py runs every check for each of them. Sizes are odd on purpose: 3 key
heads, a head size that is not hidden_size / heads where the family allows it, layers of every kind.
"""

SIZES = dict(vocab_size=160, hidden_size=48, intermediate_size=56, num_hidden_layers=3, num_attention_heads=6,
             max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip
GROUPED = dict(SIZES, num_key_value_heads=3)
GPT2 = dict(vocab_size=160, n_embd=48, n_layer=3, n_head=6, n_positions=64, bos_token_id=1, eos_token_id=2)
MPT = dict(vocab_size=160, d_model=48, n_layers=3, n_heads=6, max_seq_len=64)
BLOOM = dict(vocab_size=160, hidden_size=48, n_layer=3, n_head=6, bos_token_id=1, eos_token_id=2)
OPT = dict(
    {key: value for key, value in SIZES.items() if key != "intermediate_size"}, ffn_dim=56, word_embed_proj_dim=48
)
FALCON = dict({key: value for key, value in SIZES.items() if key != "intermediate_size"}, ffn_hidden_size=56)
QWEN_MOE = dict(GROUPED, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=20,
                shared_expert_intermediate_size=28)  # fmt: skip
SLIDING, FULL = "sliding_attention", "full_attention"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 300.0}
LONG = {
    "rope_type": "longrope", "rope_theta": 300.0, "original_max_position_embeddings": 16,
    "short_factor": [1.0, 1.1, 1.3, 1.5], "long_factor": [1.0, 2.0, 3.0, 4.0],
}  # fmt: skip

ROWS = {
    "llama": [dict(GROUPED, head_dim=10), dict(GROUPED, hidden_act="gelu", attention_bias=True, mlp_bias=True),
              dict(GROUPED, tie_word_embeddings=True, rope_parameters=YARN),
              dict(GROUPED, rope_parameters={"rope_type": "dynamic", "factor": 3.0, "rope_theta": 300.0},
                   max_position_embeddings=16)],
    "mistral": [dict(GROUPED, sliding_window=5), dict(GROUPED, sliding_window=None, head_dim=6),
                dict(GROUPED, tie_word_embeddings=True, sliding_window=1)],
    "ministral": [dict(GROUPED, sliding_window=5, head_dim=8), dict(GROUPED, sliding_window=6, head_dim=12,
                  layer_types=[SLIDING, FULL, SLIDING]), dict(GROUPED, sliding_window=1, head_dim=10,
                  layer_types=[FULL, FULL, SLIDING], tie_word_embeddings=True)],
    "ministral3": [dict(GROUPED, head_dim=8), dict(GROUPED, head_dim=12, sliding_window=6),
                   dict(GROUPED, head_dim=8, tie_word_embeddings=True, rope_parameters={
                       **YARN, "rope_theta": 77.0, "original_max_position_embeddings": 8, "mscale": 1.0,
                       "mscale_all_dim": 0.5, "llama_4_scaling_beta": 0.3})],
    "qwen2": [dict(GROUPED), dict(GROUPED, use_sliding_window=True, sliding_window=6, max_window_layers=1),
              dict(GROUPED, tie_word_embeddings=True, rope_parameters={**YARN, "beta_fast": 16.0, "truncate": False})],
    "qwen3": [dict(GROUPED, head_dim=10), dict(GROUPED, head_dim=8, attention_bias=True, tie_word_embeddings=True),
              dict(GROUPED, head_dim=12, use_sliding_window=True, sliding_window=6, max_window_layers=0)],
    "seed_oss": [dict(GROUPED, head_dim=10), dict(GROUPED, head_dim=8, attention_bias=False, attention_out_bias=True),
                 dict(GROUPED, head_dim=12, mlp_bias=True, tie_word_embeddings=True)],
    "smollm3": [dict(GROUPED, no_rope_layer_interval=2),
                dict(GROUPED, no_rope_layers=[0, 1, 1], tie_word_embeddings=False),
                dict(GROUPED, use_sliding_window=True, sliding_window=5, no_rope_layer_interval=3,
                     attention_bias=True)],
    "granite": [dict(GROUPED, embedding_multiplier=3.0, logits_scaling=5.0, residual_multiplier=0.3,
                     attention_multiplier=0.2), dict(GROUPED, attention_bias=True, mlp_bias=True),
                dict(GROUPED, tie_word_embeddings=True, attention_multiplier=0.1, residual_multiplier=1.7)],
    "gemma": [dict(GROUPED, head_dim=10), dict(GROUPED, head_dim=8, hidden_act="gelu"),
              dict(GROUPED, head_dim=12, tie_word_embeddings=False)],
    "gemma2": [dict(GROUPED, head_dim=10, sliding_window=6, query_pre_attn_scalar=20, attn_logit_softcapping=1.5,
                    final_logit_softcapping=2.0),
               dict(GROUPED, head_dim=8, sliding_window=4, attn_logit_softcapping=None),
               dict(GROUPED, head_dim=8, sliding_window=5, layer_types=[FULL, SLIDING, FULL], attention_bias=True,
                    final_logit_softcapping=None, tie_word_embeddings=False)],
    "gemma3_text": [dict(GROUPED, head_dim=10, sliding_window=6, sliding_window_pattern=2),
                    dict(GROUPED, head_dim=8, sliding_window=4, final_logit_softcapping=3.0, hidden_activation="gelu"),
                    dict(GROUPED, head_dim=12, sliding_window=5, layer_types=[FULL, SLIDING, FULL],
                         rope_parameters={SLIDING: {"rope_type": "default", "rope_theta": 50.0},
                                          FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 900.0}})],
    "phi": [dict(GROUPED), dict(GROUPED, qk_layernorm=True, tie_word_embeddings=True),
            dict(GROUPED, partial_rotary_factor=1.0, hidden_act="relu")],
    "phi3": [dict(GROUPED, partial_rotary_factor=0.75), dict(GROUPED, sliding_window=5),
             dict(GROUPED, original_max_position_embeddings=16, rope_parameters=LONG, tie_word_embeddings=True)],
    "olmo": [dict(GROUPED), dict(GROUPED, clip_qkv=0.2, attention_bias=True), dict(GROUPED, tie_word_embeddings=True)],
    "olmo2": [dict(GROUPED), dict(GROUPED, attention_bias=True), dict(GROUPED, tie_word_embeddings=True)],
    "olmo3": [dict(GROUPED, sliding_window=5), dict(GROUPED, sliding_window=6, layer_types=[SLIDING, FULL, SLIDING]),
              dict(GROUPED, sliding_window=4, layer_types=[FULL, SLIDING, FULL], tie_word_embeddings=True,
                   rope_parameters={SLIDING: {"rope_type": "default", "rope_theta": 50.0}, FULL: YARN})],
    "cohere": [dict(GROUPED), dict(GROUPED, use_qk_norm=True, attention_bias=True),
               dict(GROUPED, tie_word_embeddings=False, logit_scale=0.7)],
    "cohere2": [dict(GROUPED, sliding_window=5, sliding_window_pattern=2), dict(GROUPED, sliding_window=4),
                dict(GROUPED, sliding_window=6, layer_types=[FULL, SLIDING, FULL], attention_bias=True)],
    "glm": [dict(GROUPED, head_dim=8), dict(GROUPED, head_dim=12, attention_bias=False),
            dict(GROUPED, head_dim=8, partial_rotary_factor=1.0, tie_word_embeddings=True)],
    "glm4": [dict(GROUPED, head_dim=8), dict(GROUPED, head_dim=12, attention_bias=False),
             dict(GROUPED, head_dim=8, partial_rotary_factor=1.0, tie_word_embeddings=True)],
    "nemotron": [dict(GROUPED, head_dim=8), dict(GROUPED, head_dim=12, attention_bias=True, mlp_bias=True),
                 dict(GROUPED, head_dim=8, partial_rotary_factor=1.0, hidden_act="gelu", tie_word_embeddings=True)],
    "starcoder2": [dict(GROUPED), dict(GROUPED, use_bias=False, tie_word_embeddings=False),
                   dict(GROUPED, sliding_window=5)],
    "stablelm": [dict(GROUPED), dict(GROUPED, use_qkv_bias=True, qk_layernorm=True),
                 dict(GROUPED, use_parallel_residual=True, partial_rotary_factor=0.5, tie_word_embeddings=True)],
    "gpt_neox": [dict(SIZES), dict(SIZES, use_parallel_residual=False, attention_bias=False),
                 dict(SIZES, tie_word_embeddings=True, rope_parameters={"rope_type": "linear", "factor": 2.0,
                      "partial_rotary_factor": 1.0, "rope_theta": 300.0})],
    "falcon": [dict(FALCON), dict(FALCON, new_decoder_architecture=True, num_kv_heads=3, bias=True),
               dict(FALCON, alibi=True, parallel_attn=False, multi_query=False, bias=True, tie_word_embeddings=False),
               dict(FALCON, new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1)],
    "opt": [dict(OPT), dict(OPT, do_layer_norm_before=False, word_embed_proj_dim=20, tie_word_embeddings=True),
            dict(OPT, enable_bias=False, layer_norm_elementwise_affine=False, tie_word_embeddings=False)],
    "mpt": [dict(MPT), dict(MPT, attn_config={"clip_qkv": 0.2, "softmax_scale": 0.5}),
            dict(MPT, n_heads=8, tie_word_embeddings=False)],
    "bloom": [dict(BLOOM), dict(BLOOM, n_head=8), dict(BLOOM, tie_word_embeddings=False)],
    "gpt2": [dict(GPT2), dict(GPT2, scale_attn_weights=False, n_inner=40),
             dict(GPT2, scale_attn_by_inverse_layer_idx=True, activation_function="relu", tie_word_embeddings=False)],
    "mixtral": [dict(GROUPED, num_local_experts=5),
                dict(GROUPED, head_dim=10, num_local_experts=4, num_experts_per_tok=3, sliding_window=6),
                dict(GROUPED, tie_word_embeddings=True, num_local_experts=3, num_experts_per_tok=1)],
    "qwen2_moe": [dict(QWEN_MOE), dict(QWEN_MOE, decoder_sparse_step=2, qkv_bias=False, norm_topk_prob=True),
                  dict(QWEN_MOE, mlp_only_layers=[1], tie_word_embeddings=True, use_sliding_window=True,
                       sliding_window=5, shared_expert_intermediate_size=12)],
    "qwen3_moe": [dict(QWEN_MOE, head_dim=10), dict(QWEN_MOE, head_dim=8, norm_topk_prob=True, mlp_only_layers=[0, 2]),
                  dict(QWEN_MOE, head_dim=12, decoder_sparse_step=3, tie_word_embeddings=True, attention_bias=True,
                       use_sliding_window=True, sliding_window=6)],
    "olmoe": [dict(GROUPED, num_experts=6, num_experts_per_tok=2), dict(GROUPED, num_experts=5, num_experts_per_tok=5,
              norm_topk_prob=True, attention_bias=True), dict(GROUPED, num_experts=7, num_experts_per_tok=3,
              clip_qkv=0.7, tie_word_embeddings=True)],
    "gpt_oss": [dict(GROUPED, head_dim=8, num_local_experts=5, sliding_window=4),
                dict(GROUPED, head_dim=12, num_local_experts=4, num_experts_per_tok=2, sliding_window=6,
                     attention_bias=False, layer_types=[FULL, SLIDING, FULL]),
                dict(GROUPED, head_dim=8, num_local_experts=6, num_experts_per_tok=1, sliding_window=3,
                     tie_word_embeddings=True, rope_parameters={**YARN, "truncate": False})],
    "gpt_bigcode": [dict(GPT2), dict(GPT2, multi_query=False, n_inner=40), dict(GPT2, tie_word_embeddings=False)],
}  # fmt: skip


def each_row():
    """(family, number of the row) of every row, as parameters of a test."""
    return [(family, number) for family, rows in ROWS.items() for number in range(len(rows))]
