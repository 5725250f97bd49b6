"""GGUF files of every architecture: tiny models, written as llama.cpp's converter would, are read back as the same.

The files are written by the `gguf` package, with the names in its tables and what llama.cpp's converter does to each
tensor, told anew here. Where transformers reads an architecture, what it reads of the same file is a second witness.
"""

import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from families.rows import FULL, ROWS, SLIDING, YARN
from families.tiny import Tiny, distance, random_tokens
from safetensors.torch import load_file
from tokenizers import Regex, pre_tokenizers

import convert_hf_checkpoint as script
from shell.cli import UserError
from text.tokenizer import Tokenizer
from weights import mxfp4
from weights.checkpoint import load_model
from weights.gguf_architectures import CLASSES, LAYOUTS
from weights.gguf_format import PRE_TOKENIZERS, GGUFWeights

ARCHITECTURES = {
    "cohere": "command-r", "gemma3_text": "gemma3", "glm": "chatglm", "gpt_bigcode": "starcoder", "gpt_neox": "gptneox",
    "gpt_oss": "gpt-oss", "ministral3": "mistral3", "mistral": "llama", "mixtral": "llama", "olmo3": "olmo2",
    "phi": "phi2", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe",
}  # fmt: skip
KINDS = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
# Settings that llama.cpp has no place for, or only one value.
EDITS = {
    "cohere": {"tie_word_embeddings": True},
    "cohere2": {"sliding_window_pattern": 4, "layer_types": None, "num_hidden_layers": 5},
    "falcon": {"ffn_hidden_size": 192, "tie_word_embeddings": True},
    "gemma": {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True},
    "gemma2": {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0, "layer_types": None,
               "tie_word_embeddings": True},
    "gemma3_text": {"sliding_window_pattern": 6, "layer_types": None, "num_hidden_layers": 7,
                    "hidden_activation": "gelu_pytorch_tanh"},
    "gpt2": {"n_inner": None, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
             "activation_function": "gelu_new"},
    "gpt_bigcode": {"n_inner": None, "multi_query": True},
    "gpt_oss": {"layer_types": None},
    "llama": {"hidden_act": "silu"},
    "ministral3": {"sliding_window": None},
    "mixtral": {"sliding_window": None},
    "nemotron": {"hidden_act": "relu2"},
    "olmo": {"attention_bias": False},
    "olmoe": {"norm_topk_prob": False, "clip_qkv": None},
    "phi": {"intermediate_size": 192, "num_key_value_heads": 6, "qk_layernorm": False, "hidden_act": "gelu_new"},
    "qwen2": {"use_sliding_window": False},
    "qwen2_moe": {"use_sliding_window": False, "decoder_sparse_step": 1, "mlp_only_layers": [],
                  "norm_topk_prob": False},
    "qwen3": {"use_sliding_window": False},
    "qwen3_moe": {"use_sliding_window": False, "decoder_sparse_step": 1, "mlp_only_layers": [],
                  "norm_topk_prob": True},
    "smollm3": {"no_rope_layers": None, "no_rope_layer_interval": 4, "use_sliding_window": False,
                "num_hidden_layers": 5, "sliding_window": None},
    "starcoder2": {"sliding_window": None},
}  # fmt: skip
EDITS_OF_ROWS = {
    ("gpt_neox", 2): {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}},
    ("mpt", 1): {"attn_config": {"clip_qkv": 0.2}},
    ("olmo3", 2): {"rope_parameters": {SLIDING: {"rope_type": "default", "rope_theta": 300.0}, FULL: YARN}},
    ("qwen2", 2): {"rope_parameters": {**YARN, "beta_fast": 16.0}},
}
NOT_IN_LLAMA_CPP = [("falcon", 2), ("llama", 3)]  # ALiBi, dynamic scaling
ROWS_READ = [
    (family, number)
    for family in ROWS
    for number in range(len(ROWS[family]))
    if family in CLASSES and (family, number) not in NOT_IN_LLAMA_CPP
]
SCALED_BY_HEAD = ("gemma2", "gemma3_text")  # query_pre_attn_scalar is the head's size
PLUS_ONE = ("gemma", "gemma2", "gemma3_text", "nemotron")
PERMUTED = ("granite", "llama", "ministral3", "mistral", "mixtral", "olmo", "smollm3")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A function from a row to its `Tiny` and the path of its .gguf file."""
    models = {}

    def make(row):
        if row not in models:
            edits = {**EDITS.get(row[0], {}), **EDITS_OF_ROWS.get(row, {})}
            if row[0] in SCALED_BY_HEAD:
                edits["query_pre_attn_scalar"] = ROWS[row[0]][row[1]]["head_dim"]
            folder = tmp_path_factory.mktemp(row[0])
            tiny = Tiny(row, folder / "reference", edits)
            models[row] = tiny, write(folder / "model.gguf", tiny)
            if row[0] in PLUS_ONE:  # a sum in fp32, of which 1 is taken again, is a little less exact
                with torch.no_grad():
                    for name, parameter in tiny.reference.named_parameters():
                        if name.endswith("norm.weight"):
                            parameter.copy_(parameter + 1 - 1)
        return models[row]

    return make


# ------------------------------------------------------------------------------------------------------- the writer


def write(path, tiny, edit=lambda writer: None, kind=None, vocabulary=None):
    """The file of a `Tiny`, as llama.cpp's converter writes it; with a `kind`, matrices in that type."""
    architecture = ARCHITECTURES.get(tiny.family, tiny.family)
    writer = gguf.GGUFWriter(path, architecture)
    config = tiny.reference.config
    add_sizes(writer, tiny.family, config)
    OWN_METADATA.get(tiny.family, lambda writer, config: None)(writer, config)
    (vocabulary or add_vocabulary)(writer)
    edit(writer)
    for name, tensor in gguf_tensors(tiny, architecture, config).items():
        values = np.ascontiguousarray(tensor.squeeze().float().numpy())
        encode = kind is not None and values.ndim > 1
        writer.add_tensor(
            name, gguf.quants.quantize(values, kind) if encode else values, raw_dtype=kind if encode else None
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def first(config, *names):
    return next((getattr(config, name) for name in names if getattr(config, name, None) is not None), None)


def add_sizes(writer, family, config):
    hidden = config.hidden_size
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(first(config, "max_position_embeddings", "max_seq_len", "n_positions") or hidden)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(first(config, "intermediate_size", "ffn_hidden_size") or 4 * hidden)
    writer.add_head_count(config.num_attention_heads)
    if family not in ("falcon", "gpt2", "gpt_bigcode", "gpt_neox", "mpt"):
        writer.add_head_count_kv(first(config, "num_key_value_heads") or config.num_attention_heads)
    if epsilon := first(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(epsilon)
    if epsilon := first(config, "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"):
        writer.add_layer_norm_eps(epsilon)
    if head_dim := first(config, "head_dim"):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if family not in ("bloom", "falcon", "gpt2", "gpt_bigcode", "gpt_neox", "mpt"):
        add_rope(writer, config.rope_parameters)
    experts, chosen = first(config, "num_local_experts", "num_experts"), first(config, "num_experts_per_tok")
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(chosen)


def add_rope(writer, rope):
    if local := rope.get(SLIDING):
        writer.add_rope_freq_base_swa(local["rope_theta"])
    rope = rope.get(FULL, rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for name in ("beta_fast", "beta_slow"):
            if name in rope:
                getattr(writer, f"add_rope_scaling_yarn_{name}")(rope[name])


def add_rope_dimensions(writer, config, factor=None):
    head_dim = first(config, "head_dim") or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(int(head_dim * (factor or config.rope_parameters.get("partial_rotary_factor", 1))))


def add_vocabulary(writer):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:156]
    tokens = ["<unk>", "<s>", "</s>", *letters, "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 157)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def llama(writer, config):
    writer.add_vocab_size(config.vocab_size)
    add_rope_dimensions(writer, config)
    if first(config, "sliding_window"):
        writer.add_sliding_window(config.sliding_window)


def ministral3(writer, config):
    llama(writer, config)
    writer.add_rope_scaling_yarn_log_mul(config.rope_parameters["mscale_all_dim"])
    writer.add_attn_temperature_scale(config.rope_parameters["llama_4_scaling_beta"])


def granite(writer, config):
    llama(writer, config)
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)


def gemma2(writer, config):
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_sliding_window(config.sliding_window)


def gemma3(writer, config):
    writer.add_sliding_window(config.sliding_window)
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def cohere(writer, config):
    writer.add_logit_scale(config.logit_scale)
    writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)


def cohere2(writer, config):
    cohere(writer, config)
    writer.add_sliding_window(config.sliding_window)
    add_rope_dimensions(writer, config)


def falcon(writer, config):
    writer.add_tensor_data_layout("jploski")
    writer.add_head_count_kv(config.num_kv_heads if config.new_decoder_architecture else 1)


def gpt_neox(writer, config):
    add_rope_dimensions(writer, config)
    writer.add_parallel_residual(config.use_parallel_residual)


def gpt_oss(writer, config):
    writer.add_sliding_window(config.sliding_window)
    writer.add_expert_feed_forward_length(config.intermediate_size)


def mpt(writer, config):
    writer.add_max_alibi_bias(config.attn_config.alibi_bias_max)
    if config.attn_config.clip_qkv is not None:
        writer.add_clamp_kqv(config.attn_config.clip_qkv)


def nemotron(writer, config):
    add_rope_dimensions(writer, config)
    writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)


def olmo(writer, config):
    writer.add_layer_norm_eps(1e-5)
    if config.clip_qkv is not None:
        writer.add_clamp_kqv(config.clip_qkv)


def olmo3(writer, config):
    writer.add_sliding_window(config.sliding_window)
    writer.add_sliding_window_pattern([kind == SLIDING for kind in config.layer_types])


def phi3(writer, config):
    add_rope_dimensions(writer, config)
    rope, context = config.rope_parameters, config.original_max_position_embeddings
    writer.add_rope_scaling_orig_ctx_len(context)
    writer.add_sliding_window(config.sliding_window or 0)
    if rope["rope_type"] == "longrope":
        scale = config.max_position_embeddings / context
        writer.add_rope_scaling_attn_factors((1 + np.log(scale) / np.log(context)) ** 0.5)
        for length in ("long", "short"):
            writer.add_tensor(f"rope_factors_{length}.weight", np.array(rope[f"{length}_factor"], np.float32))


def qwen2_moe(writer, config):
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


def stablelm(writer, config):
    add_rope_dimensions(writer, config)
    writer.add_parallel_residual(config.use_parallel_residual)


OWN_METADATA = {
    "cohere": cohere, "cohere2": cohere2, "falcon": falcon, "gemma2": gemma2, "gemma3_text": gemma3,
    "glm": add_rope_dimensions, "glm4": add_rope_dimensions, "gpt_bigcode": lambda w, c: w.add_head_count_kv(1),
    "gpt_neox": gpt_neox, "gpt_oss": gpt_oss, "granite": granite, "llama": llama, "ministral3": ministral3,
    "mistral": llama, "mixtral": llama, "mpt": mpt, "nemotron": nemotron, "olmo": olmo, "olmo3": olmo3,
    "phi": add_rope_dimensions, "phi3": phi3, "qwen2_moe": qwen2_moe,
    "qwen3_moe": lambda w, c: w.add_expert_feed_forward_length(c.moe_intermediate_size), "smollm3": llama,
    "stablelm": stablelm,
}  # fmt: skip


def gguf_tensors(tiny, architecture, config):
    """The tensors by their names in a GGUF file, as the converter changes them."""
    names = gguf.get_tensor_name_map(KINDS[architecture], config.num_hidden_layers)
    saved = load_file(tiny.folder / "model.safetensors")
    if config.tie_word_embeddings:
        saved.pop("lm_head.weight", None)
    found = {}
    for name, tensor in stack(saved, config).items():
        for own, values in changed(tiny.family, config, name, tensor):
            own = own.removeprefix("transformer.") if tiny.family == "bloom" else own
            found[names.get_name(own, (".weight", ".bias"))] = values
    assert None not in found
    return found


def stack(saved, config):
    """The experts of a layer, and StableLM's norms of each head, in one tensor."""
    together = {}
    for name, tensor in sorted(saved.items()):
        part = re.fullmatch(r"(.*\.)(experts|norms)\.(\d+)(.*)", name)
        if part is None:
            together[name] = tensor
            continue
        whole = part[1] + (part[2] if part[2] == "experts" else "") + part[4]
        whole = re.sub(r".*layers\.(\d+)\.block_sparse_moe\.experts", r"layers.\1.feed_forward.experts", whole)
        together.setdefault(whole.replace("..", "."), {})[int(part[3])] = tensor
    return {
        name: torch.stack([each[i] for i in range(len(each))]) if isinstance(each, dict) else each
        for name, each in together.items()
    }


def changed(family, config, name, tensor):
    """(name, values) pairs of a tensor as the converter changes it, under a name that its table knows."""
    heads, key_heads = config.num_attention_heads, first(config, "num_key_value_heads")
    if family in PERMUTED and (part := re.search(r"\.([qk])_proj\.", name)):
        n = heads if part[1] == "q" else key_heads
        tensor = tensor.reshape(n, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
    if family in PLUS_ONE and name.endswith("norm.weight"):
        tensor = tensor + 1
    if family in ("bloom", "gpt_neox") and "query_key_value" in name:
        tensor = tensor.reshape(heads, 3, -1, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)
    if family == "falcon" and "query_key_value" in name:
        groups = config.num_kv_heads if config.new_decoder_architecture else 1
        rows = tensor.reshape(groups, heads // groups + 2, -1, *tensor.shape[1:])
        tensor = torch.cat([rows[:, :-2].flatten(0, 1), rows[:, -2], rows[:, -1]]).reshape(tensor.shape)
    if family == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
        tensor = tensor.T
    if family == "gpt_oss":
        return gpt_oss_tensors(name, tensor)
    return [(name, tensor)]


def gpt_oss_tensors(name, tensor):
    if name.endswith("sinks"):
        return [(f"{name}.weight", tensor)]
    if "experts" not in name:
        return [(name, tensor)]
    leaf = "bias" if name.endswith("_bias") else "weight"
    module, rows = name.removesuffix("_bias"), tensor if leaf == "bias" else tensor.transpose(-1, -2)
    if "gate_up" not in name:
        return [(f"{module}.{leaf}", rows)]
    return [(module.replace("gate_up", part) + f".{leaf}", rows[:, i::2]) for i, part in enumerate(("gate", "up"))]


# ------------------------------------------------------------------------------------------------------------ tests


def test_every_architecture_is_written_here():
    """The rows above reach all of the table."""
    families = {family for family, _ in ROWS_READ}
    assert {ARCHITECTURES.get(family, family) for family in families} == set(LAYOUTS)
    assert families == set(CLASSES)


@pytest.mark.parametrize("row", ROWS_READ, ids=[f"{family}-{number}" for family, number in ROWS_READ])
def test_logits(made, tmp_path, row):
    """Ours, and those of transformers with the folder that we write."""
    tiny, path = made(row)
    out, tokens = tmp_path / "out", random_tokens(2, 24)
    script.main(script.Settings(source=path, out_dir=out))
    with torch.no_grad():
        expected = tiny.reference(tokens).logits
        assert distance(load_model(out, torch.float32)(tokens), expected) < 1e-5
        assert distance(tiny.loaded_by_transformers(out)(tokens).logits, expected) < 1e-5


# What transformers' own reader of GGUF knows. It leaves the rows of a Falcon with groups of heads, StableLM's norms of
# each head, and GPT-OSS's experts as the converter stores them.
WITNESSED = (
    "bloom", "falcon", "gemma2", "gemma3_text", "gpt2", "llama", "nemotron", "phi3", "qwen2", "qwen2_moe", "qwen3",
    "qwen3_moe", "stablelm", "starcoder2",
)  # fmt: skip
NOT_WITNESSED = [("falcon", 1), ("falcon", 3), ("stablelm", 1)]
ROWS_WITNESSED = [row for row in ROWS_READ if row[0] in WITNESSED and row not in NOT_WITNESSED]


@pytest.mark.parametrize("row", ROWS_WITNESSED, ids=[f"{family}-{number}" for family, number in ROWS_WITNESSED])
def test_transformers_reads_the_same(made, row):
    """The tensors of the file by transformers' own reader make the same logits: the layout is as it knows it.

    Its settings are the reference's: of the file's metadata that reader leaves out more than a few.
    """
    tiny, path = made(row)
    how = {"config": tiny.reference.config, "attn_implementation": tiny.attention, "dtype": torch.float32}
    theirs = type(tiny.reference).from_pretrained(path.parent, gguf_file=path.name, **how).eval()
    tokens = random_tokens(2, 24)
    with torch.no_grad():
        assert distance(theirs(tokens).logits, tiny.reference(tokens).logits) < 1e-5


SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
QUANTISED = {  # experts; q with k and v; gate with up
    "mixtral": ("Q8_0", SIZES),
    "bloom": ("Q4_0", {"hidden_size": 64, "n_head": 4}),
    "phi3": ("Q5_0", SIZES),
}


@pytest.mark.parametrize("family", QUANTISED)
def test_parts_of_quantised_tensors(tmp_path, family):
    """One expert, one of q, k and v, or one of gate and up is read out of a quantised tensor of several."""
    name, sizes = QUANTISED[family]
    tiny, kind = Tiny((family, 0), tmp_path / "reference", sizes), gguf.GGMLQuantizationType[name]
    stored, readable = (write(tmp_path / name, tiny, kind=each) for name, each in (("q.gguf", kind), ("f.gguf", None)))
    weights, exact = GGUFWeights(stored), GGUFWeights(readable)
    assert weights.shapes == exact.shapes
    for name, shape in weights.shapes.items():
        expected = exact.read(name)
        if len(shape) > 1:  # rows are quantised each by itself, so a part is the part of the whole
            expected = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(expected.numpy(), kind), kind))
        assert torch.equal(weights.read(name), expected), name


def test_mxfp4(tmp_path):
    """GPT-OSS's experts in llama.cpp's MXFP4 are those in its own: other order of bytes, equal numbers."""
    experts, rows, columns = 3, 8, 64
    blocks = torch.randint(256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
    scales = torch.randint(110, 135, (experts, rows, columns // 32), dtype=torch.uint8)
    codes = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)  # in the order of the weights
    packed = codes[..., :16] | codes[..., 16:] << 4  # llama.cpp has the second half of a block in the upper bits
    stored = torch.cat((scales[..., None], packed), dim=-1).flatten(-2).numpy()
    path = write_tensors(tmp_path / "a.gguf", "gpt-oss", {"blk.0.ffn_up_exps.weight": stored}, "MXFP4")
    weights = GGUFWeights(path)
    for expert in range(experts):
        name = f"model.layers.0.mlp.experts.{expert}.up_proj.weight"
        assert torch.equal(weights.read(name), mxfp4.dequantize(blocks[expert], scales[expert]).float())
        assert weights.dtypes[name] == torch.bfloat16


def write_tensors(path, architecture, tensors, kind=None):
    writer = gguf.GGUFWriter(path, architecture)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor, raw_dtype=gguf.GGMLQuantizationType[kind] if kind else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


REFUSED = [
    ("gemma2", lambda w: w.add_logit_scale(2.0), "logit_scale"),
    ("falcon", lambda w: w.add_float32("falcon.rope.frequency_trick", 2.0), "rope.frequency_trick"),
    ("qwen3_moe", lambda w: w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID), "expert_gating_func"),
    ("qwen2_moe", lambda w: w.add_expert_weights_scale(2.5), "expert_weights_scale"),
    ("glm4", lambda w: w.add_nextn_predict_layers(1), "nextn_predict_layers"),
    ("gpt2", lambda w: w.add_causal_attention(False), "causal"),
    ("gpt2", lambda w: w.add_head_count_kv(2), "attn_qkv.bias has 144 rows"),
    ("olmo2", lambda w: w.add_rope_dimension_count(4), "part of the head"),
    ("phi3", lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), "longrope"),
    ("gemma3_text", lambda w: w.add_block_count(2**31), "block_count"),
    ("gemma3_text", lambda w: w.add_sliding_window_pattern([True, False]), "sliding_window_pattern"),
    ("bloom", lambda w: w.add_tensor("blk.0.attn_gate.weight", np.ones(4, np.float32)), "blk.0.attn_gate.weight"),
    ("starcoder", lambda w: w.add_tensor("blk.9.attn_qkv.bias", np.ones(7, np.float32)), "attn_qkv.bias has 7 rows"),
]


@pytest.mark.parametrize("family, edit, message", REFUSED, ids=[f"{f}-{m.split()[0]}" for f, _, m in REFUSED])
def test_what_is_not_understood_is_refused(tmp_path, family, edit, message):
    family = {"starcoder": "gpt_bigcode"}.get(family, family)
    tiny = Tiny((family, 0), tmp_path / "reference", EDITS.get(family))
    path = write(tmp_path / "model.gguf", tiny, edit)
    with pytest.raises(UserError, match=message) as found:
        script.main(script.Settings(source=path, out_dir=tmp_path / "out"))
    assert "\n" not in str(found.value) and not (tmp_path / "out").exists()


def test_other_architectures_are_refused_by_name(tmp_path):
    path = write_tensors(tmp_path / "a.gguf", "mamba", {"token_embd.weight": np.ones((4, 4), np.float32)})
    with pytest.raises(UserError, match="architecture 'mamba' is not supported, only bloom, chatglm"):
        GGUFWeights(path)


# ------------------------------------------------------------------------------------------------------- tokenizers

TEXTS = [
    "Hello  world! 123", "don't 'S I'LL", "a\n\n\nb\t\tc 12345 67.89", "7 x   7", "日本語 テスト",
    "über Straße, HTMLParser (x|y)", "foo_bar(baz)=[1,2];//#", "  lead", "trail  ", "\r\n\r\n  y", "$5+2<3>^~`",
]  # fmt: skip


def pieces(pre_tokenizer, text):
    return [text[start:end] for _, (start, end) in pre_tokenizer.pre_tokenize_str(text)]


def by_patterns(patterns):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns])


def test_patterns_are_those_of_transformers():
    """Where its own reader of GGUF cuts by one regex."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as theirs

    shared = PRE_TOKENIZERS.keys() & theirs.keys()
    assert shared == {"dbrx", "deepseek-r1-qwen", "gpt-4o", "llama-bpe", "qwen2", "tekken"}
    assert {name: PRE_TOKENIZERS[name] for name in shared} == {name: [theirs[name]] for name in shared}


@pytest.mark.parametrize("text", TEXTS)
def test_patterns_cut_as_the_libraries_parts(text):
    """Those of a model's tokenizer.json. Falcon's cuts a blank from a number too, and bytes whose letters are numbers;
    it does so in training as well, so that no merge joins them."""
    parts = pre_tokenizers
    single = parts.Sequence([parts.Digits(individual_digits=True), parts.ByteLevel(add_prefix_space=False)])
    for name in ("command-r", "refact", "starcoder"):
        assert pieces(by_patterns(PRE_TOKENIZERS[name]), text) == pieces(single, text)
    plain = parts.ByteLevel(add_prefix_space=False)
    for name in ("mpt", "olmo", "phi-2"):
        assert pieces(by_patterns(PRE_TOKENIZERS[name]), text) == pieces(plain, text)
    three = parts.Split(Regex("[0-9][0-9][0-9]"), "isolated")
    digits = parts.Digits(individual_digits=False)
    falcon = parts.Sequence([parts.Punctuation("contiguous"), plain, digits, three])
    ours = parts.Sequence([by_patterns(PRE_TOKENIZERS["falcon"]), digits, three])
    assert pieces(ours, text) == pieces(falcon, text) or not text.isascii()
    bloom = parts.Split(Regex(r" ?[^(\s|[.,!?…。，、।۔،])]+"), "isolated")
    assert pieces(by_patterns(PRE_TOKENIZERS["bloom"]), text) == pieces(bloom, text)


def test_sentencepiece_without_a_prefix(tmp_path):
    """Gemma's: no blank before a text, and user-defined tokens of blanks and line ends."""
    mistral_common, sentencepiece = pytest.importorskip("mistral_common"), pytest.importorskip("sentencepiece")
    real = sentencepiece.SentencePieceProcessor(
        str(Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1")
    )
    ids = range(real.get_piece_size())
    own = {ids[-1]: "\n\n", ids[-2]: "    "}  # in the place of two signs
    kinds = {0: gguf.TokenType.UNKNOWN, 1: gguf.TokenType.CONTROL, 2: gguf.TokenType.CONTROL}
    kinds |= {id: gguf.TokenType.BYTE for id in ids if real.is_byte(id)} | dict.fromkeys(
        own, gguf.TokenType.USER_DEFINED
    )

    def add(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_list([own.get(id, real.id_to_piece(id)) for id in ids])
        writer.add_token_scores([real.get_score(id) for id in ids])
        writer.add_token_types([kinds.get(id, gguf.TokenType.NORMAL) for id in ids])
        writer.add_add_space_prefix(False)

    sizes = {"vocab_size": len(ids), "num_hidden_layers": 1}
    tiny = Tiny(("gemma", 0), tmp_path / "reference", sizes)
    path = write(tmp_path / "model.gguf", tiny, vocabulary=add)
    script.main(script.Settings(source=path, out_dir=tmp_path / "out"))
    ours = Tokenizer(tmp_path / "out")
    assert ours.encode("one\n\ntwo")[1] == ids[-1] and ours.encode("one    two")[1] == ids[-2]
    assert ours.decode(ours.encode("one\n\ntwo    x")) == "one\n\ntwo    x"
    assert ours.encode("▁of")[0] == ours.encode(" of")[0] == real.piece_to_id("▁of") == real.encode("of")[0]
    assert ours.encode("of") == [real.piece_to_id("of")]
