"""convert_hf_checkpoint.py: whatever goes in, transformers must compute the same with what comes out."""

import json
import os
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from conftest import FAMILIES, SMALL, tiny_reference, write_tiny_tokenizer
from http_stub import JsonHandler, serving
from safetensors.torch import load_file, save_file
from torch import nn

import convert_hf_checkpoint as script
import lora
from shell.cli import UserError
from shell.files import check_manifest
from text.prompts import encode_prompt
from text.tokenizer import Tokenizer
from weights import gguf_format, peft_format
from weights.checkpoint import load_model

TOKENS = torch.arange(3, 43)[None] * 7 % 512
NASTY = [
    "", " ", "Hello world! 123", "  multiple   spaces", " lead", "trail  ", "Café déjà vu.", "naïve e\u0301 \u200d",
    "a\n\n\nb\t\tc 12345 67.89 ½ ² Ⅷ", "7 x   7", "日本語 テスト 😀👩‍👩‍👧", "'s 'S don't DON'T I'LL",
    "x" * 50 + " " * 20, "\r\n\r\n  y", "\u00a0\u3000z ~~ !!??", "foo_bar(baz)=[1,2];//#", "[INST] <<SYS>>",
    "über Straße ĠĊ ▁ a",
]  # fmt: skip


def convert(**settings):
    """Run the script in this process. Returns the folder it wrote."""
    settings = script.Settings(**settings)
    script.main(settings)
    return settings.out_dir


def reference_logits(folder, tokens=TOKENS):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    assert model.dtype == torch.float32
    with torch.no_grad():
        return model(tokens).logits


@torch.no_grad()
def our_logits(folder, tokens=TOKENS, **options):
    return load_model(folder, torch.float32, **options)(tokens)


# ------------------------------------------------------------------------------------------------- Hugging Face's


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_safetensors_folder_is_checked_and_left_alone(tiny_checkpoint, tmp_path, family, capsys):
    source = tmp_path / "model"
    shutil.copytree(tiny_checkpoint(family), source)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    script.main(script.Settings(source=source))
    assert before == {path.name: path.read_bytes() for path in source.iterdir()}
    assert "nothing to convert" in capsys.readouterr().out


def test_safetensors_folder_can_be_written_in_another_dtype(tiny_checkpoint, tmp_path):
    out = convert(source=tiny_checkpoint("llama"), out_dir=tmp_path / "out", dtype="bfloat16")
    one, other = load_file(tiny_checkpoint("llama") / "model.safetensors"), load_file(out / "model.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name].bfloat16(), other[name]) for name in one)
    assert transformers.AutoConfig.from_pretrained(out).dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["llama", "llama-tied", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("shards", [1, 3])
def test_bin_files(tiny_checkpoint, tmp_path, family, shards):
    source = bin_folder(tiny_checkpoint(family), tmp_path / "bin", shards)
    out = convert(source=source, out_dir=tmp_path / "out")
    names = load_file(out / "model.safetensors").keys()
    assert not any("inv_freq" in name for name in names)
    assert ("lm_head.weight" in names) == (family not in ("llama-tied", "qwen3"))
    expected = reference_logits(tiny_checkpoint(family))
    torch.testing.assert_close(reference_logits(out), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(our_logits(out), expected, atol=1e-5, rtol=1e-5)


def bin_folder(source, folder, shards=1):
    """A model folder as pytorch_model*.bin, tied head and rotary frequencies included, as old ones are."""
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    tensors = load_file(source / "model.safetensors")
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    weight_map = {name: f"pytorch_model-{i % shards:05d}.bin" for i, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        torch.save({name: tensors[name] for name in tensors if weight_map[name] == shard}, folder / shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def with_own_head(source, folder, format="safetensors"):
    """A model folder whose config.json ties the head to the embedding, while its weights have another head."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn_like(tensors["model.embed_tokens.weight"]) / 7
    if format == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_a_head_that_config_json_forgets_is_written_and_named(tiny_checkpoint, tmp_path, format, capsys):
    source = with_own_head(tiny_checkpoint("llama-tied"), tmp_path / "model", format)
    out = convert(source=source, out_dir=tmp_path / "out", dtype="float32")
    assert "lm_head.weight that differs" in capsys.readouterr().err
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    expected = reference_logits(source)
    assert (expected - reference_logits(tiny_checkpoint("llama-tied"))).abs().max() > 0.1
    torch.testing.assert_close(reference_logits(out), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(our_logits(out), expected, atol=1e-5, rtol=1e-5)
    assert capsys.readouterr().err.count("note: ") == 0  # the new folder says what it is


def test_merging_keeps_a_head_that_config_json_forgets(tiny_checkpoint, tmp_path):
    base = with_own_head(tiny_checkpoint("qwen3"), tmp_path / "model")
    adapter = tuned_adapter(tmp_path / "adapter", base)
    out = convert(adapter_dir=adapter, out_dir=tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    expected = our_logits(base, adapter_dir=adapter)
    torch.testing.assert_close(reference_logits(out), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(our_logits(out), expected, atol=1e-4, rtol=1e-4)


def test_bin_files_beside_safetensors_of_another_kind(tiny_checkpoint, tmp_path, capsys):
    """An adapter and Mistral's own file are no model: transformers takes the .bin file then."""
    source = bin_folder(tiny_checkpoint("llama"), tmp_path / "bin")
    for name in ("consolidated.safetensors", "adapter_model.safetensors"):
        save_file({"a": torch.ones(1)}, source / name)
    out = convert(source=source, out_dir=tmp_path / "out")
    torch.testing.assert_close(our_logits(out), reference_logits(tiny_checkpoint("llama")), atol=1e-5, rtol=1e-5)


def test_bin_file_of_the_old_format(tiny_checkpoint, tmp_path):
    source = bin_folder(tiny_checkpoint("llama"), tmp_path / "bin")
    tensors = torch.load(source / "pytorch_model.bin")
    torch.save(tensors, source / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    out = convert(source=source, out_dir=tmp_path / "out")
    assert torch.equal(load_file(out / "model.safetensors")["lm_head.weight"], tensors["lm_head.weight"])


# ----------------------------------------------------------------------------------------------------------- GGUF


def write_gguf(path, model, encode=lambda name, x: (x, None), edit=lambda writer: None, vocabulary=None):
    """A transformers model as llama.cpp's converter would write it, names from the gguf package's own table.

    encode: (name, fp32 array) -> (array, type). edit: adds metadata. vocabulary: adds the tokenizer.
    """
    c, rope = model.config, model.config.rope_parameters
    arch = {"mistral": "llama"}.get(c.model_type, c.model_type)
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "llama3":
        plain = rope["rope_theta"] ** (-torch.arange(0, head_dim, 2) / head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / model.model.rotary_emb.inv_freq).numpy())
    if c.model_type == "mistral":
        writer.add_sliding_window(c.sliding_window)
    (vocabulary or bpe_vocabulary)(writer)
    edit(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], c.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        array = tensor.float().numpy()
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = c.num_attention_heads if "q_proj" in name else c.num_key_value_heads
            array = array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        array, kind = encode(name, array)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


TINY_TOKENIZER = {}


def bpe_vocabulary(writer, pre="gpt-2"):
    """The tiny tokenizer's vocabulary, as the GGUF keys of a byte-level BPE."""
    model = TINY_TOKENIZER["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    special = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([special[id >= 3] for id in range(len(tokens))])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages }}")


@pytest.fixture(scope="module", autouse=True)
def tiny_tokenizer(tmp_path_factory):
    """The folder of a tiny tokenizer, its tokenizer.json parsed in TINY_TOKENIZER."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tiny_tokenizer(folder)
    TINY_TOKENIZER.update(json.loads((folder / "tokenizer.json").read_text()))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_gguf_logits(tmp_path, family):
    model = tiny_reference(family)
    if family == "qwen2":  # GGUF cannot say that only some layers have a window
        model.config.layer_types, model.config.use_sliding_window = ["full_attention"] * 3, False
        model.save_pretrained(tmp_path / "reference")
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "reference", attn_implementation="eager")
    out = convert(source=write_gguf(tmp_path / "model.gguf", model), out_dir=tmp_path / "out")
    with torch.no_grad():
        expected = model(TOKENS).logits
    torch.testing.assert_close(reference_logits(out), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(our_logits(out), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_gguf_quantised_weights(tmp_path, kind):
    config = {**SMALL, "hidden_size": 96, "intermediate_size": 160}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    quantisation = gguf.GGMLQuantizationType[kind]

    def encode(name, array):
        if array.ndim == 1:
            return array, None
        return gguf.quants.quantize(array, quantisation), quantisation

    path = write_gguf(tmp_path / "model.gguf", model, encode)
    tensors = load_file(convert(source=path, out_dir=tmp_path / "exact", dtype="float32") / "model.safetensors")
    error = {"F16": 1e-3, "BF16": 1e-2, "Q8_0": 2e-2, "Q5_0": 0.08, "Q5_1": 0.08}.get(kind, 0.15)
    for name, tensor in model.state_dict().items():
        assert (tensors[name] - tensor).norm() <= error * tensor.norm(), name
        if tensor.dim() == 2 and not name.endswith(("q_proj.weight", "k_proj.weight")):
            encoded, _ = encode(name, tensor.numpy())
            assert torch.equal(tensors[name], torch.from_numpy(gguf.quants.dequantize(encoded, quantisation)))
    auto = load_file(convert(source=path, out_dir=tmp_path / "auto") / "model.safetensors")
    assert auto["lm_head.weight"].dtype == (torch.bfloat16 if kind == "BF16" else torch.float16)
    assert auto["model.norm.weight"].dtype == torch.float32


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"])
def test_gguf_k_quants(tmp_path, kind):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, "intermediate_size": 256}))
    quantisation = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[quantisation]
    # Bytes below 0x3c: whichever of them make up an fp16 scale, it is below 1.
    data = np.random.default_rng(0).integers(0, 0x3C, (SMALL["hidden_size"], 256 // block * size), dtype=np.uint8)

    def encode(name, array):
        return (data, quantisation) if name.endswith("down_proj.weight") else (array, None)

    path = write_gguf(tmp_path / "model.gguf", model, encode)
    tensors = load_file(convert(source=path, out_dir=tmp_path / "out", dtype="float32") / "model.safetensors")
    expected = torch.from_numpy(gguf.quants.dequantize(data, quantisation))
    assert torch.equal(tensors["model.layers.1.mlp.down_proj.weight"], expected) and expected.std() > 0


def gguf_tokenizer(tmp_path, vocabulary, size=SMALL["vocab_size"]):
    """The tokenizer files made from a GGUF file with that vocabulary: their folder."""
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**SMALL, "vocab_size": size, "hidden_size": 12, "num_hidden_layers": 1})
    )
    path = write_gguf(tmp_path / "model.gguf", model, vocabulary=vocabulary)
    return convert(source=path, out_dir=tmp_path / "out")


def test_gguf_bpe_tokenizer(tmp_path, tiny_tokenizer):
    out = gguf_tokenizer(tmp_path, bpe_vocabulary)
    expected, ours = transformers.AutoTokenizer.from_pretrained(tiny_tokenizer), Tokenizer(out)
    found = transformers.AutoTokenizer.from_pretrained(out)
    for text in [*NASTY, "<|im_start|>user\nhi<|im_end|>"]:
        assert found(text).input_ids == expected(text).input_ids == ours.encode(text, special=True), text
        assert found.decode(found(text).input_ids) == text
    assert (found.bos_token_id, found.eos_token_id, found.chat_template) == (0, 2, "{{ messages }}")
    assert (ours.bos_id, ours.eos_ids, ours.begin_ids) == (0, {2}, ())
    assert ours.encode("<|im_end|>") != [2]


def test_gguf_bpe_tokenizer_that_adds_bos(tmp_path):
    out = gguf_tokenizer(tmp_path, lambda writer: bpe_vocabulary(writer, "llama-bpe"))
    assert transformers.AutoTokenizer.from_pretrained(out)("a1").input_ids[:2] != [0, 0]
    assert transformers.AutoTokenizer.from_pretrained(out)("a1").input_ids[0] == 0
    assert Tokenizer(out).begin_ids


def test_gguf_qwen2_tokenizer(tmp_path):
    out = gguf_tokenizer(tmp_path, lambda writer: bpe_vocabulary(writer, "qwen2"))
    merges = list(map(tuple, TINY_TOKENIZER["model"]["merges"]))
    expected = transformers.Qwen2Tokenizer(vocab=TINY_TOKENIZER["model"]["vocab"], merges=merges)
    found = transformers.AutoTokenizer.from_pretrained(out)
    for text in NASTY:
        assert found(text).input_ids == expected(text).input_ids, text


def test_pre_tokeniser_patterns():
    """Against the patterns that other packages carry."""
    mistral_common = pytest.importorskip("mistral_common")
    tekken = json.loads((Path(mistral_common.__file__).parent / "data" / "tekken_240911.json").read_text())
    assert tekken["config"]["pattern"] == gguf_format.TEKKEN
    from transformers.convert_slow_tokenizer import TikTokenConverter
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    assert TikTokenConverter().pattern == gguf_format.LLAMA3
    assert PRETOKENIZE_REGEX == gguf_format.QWEN2


def test_gguf_sentencepiece_tokenizer(tmp_path):
    mistral_common, sentencepiece = pytest.importorskip("mistral_common"), pytest.importorskip("sentencepiece")
    real_path = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    real = sentencepiece.SentencePieceProcessor(str(real_path))
    ids = range(real.get_piece_size())

    def vocabulary(writer):
        kinds = gguf.TokenType
        types = {0: kinds.UNKNOWN, 1: kinds.CONTROL, 2: kinds.CONTROL}
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([real.id_to_piece(id) for id in ids])
        writer.add_token_scores([real.get_score(id) for id in ids])
        writer.add_token_types([types.get(id, kinds.BYTE if real.is_byte(id) else kinds.NORMAL) for id in ids])

    out = gguf_tokenizer(tmp_path, vocabulary, len(ids))
    found = sentencepiece.SentencePieceProcessor(str(out / "tokenizer.model"))
    for text in [*NASTY, "<s>a</s>"]:
        assert found.encode(text) == real.encode(text), text
        assert found.decode(found.encode(text)) == real.decode(real.encode(text)), text
    assert [found.bos_id(), found.eos_id(), found.unk_id(), found.pad_id()] == [1, 2, 0, -1]
    ours = Tokenizer(out)
    assert (ours.bos_token, ours.eos_token, ours.begin_ids) == ("<s>", "</s>", (1,))
    if transformers.utils.is_protobuf_available():
        shutil.copytree(out, tmp_path / "real")
        shutil.copy(real_path, tmp_path / "real" / "tokenizer.model")
        one, other = map(transformers.AutoTokenizer.from_pretrained, (out, tmp_path / "real"))
        assert all(one(text).input_ids == other(text).input_ids for text in NASTY)
        assert one("a").input_ids[0] == 1


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda w: w.add_expert_count(8), "expert_used_count"),
        (lambda w: w.add_logit_scale(8.0), "logit_scale"),
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), "rope.scaling.factor"),
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), "longrope"),
        (lambda w: w.add_rope_dimension_count(4), "part of the head"),
        (lambda w: w.add_tensor("rope_freqs.weight", np.linspace(1, 9, 4, dtype=np.float32)), "rope_freqs"),
        (lambda w: w.add_tensor("blk.0.attn_gate.weight", np.ones(4, np.float32)), "blk.0.attn_gate.weight"),
        (lambda w: w.add_tensor("blk.9.attn_q.weight", np.ones(4, np.float32)), "surplus"),
    ],
)
def test_gguf_of_another_model_is_refused(tmp_path, edit, message):
    config = transformers.LlamaConfig(**SMALL)
    path = write_gguf(tmp_path / "model.gguf", transformers.LlamaForCausalLM(config), edit=edit)
    with pytest.raises(UserError, match=message):
        convert(source=path, out_dir=tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == [path]


def test_gguf_cut_anywhere_is_refused(tmp_path):
    """Cut at many places, and with random bytes changed: a UserError or a model, nothing else, nothing half-written."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, "num_hidden_layers": 1}))
    path = write_gguf(tmp_path / "model.gguf", model)
    whole, random = path.read_bytes(), np.random.default_rng()
    for trial in range(40):
        data = bytearray(whole)
        if trial % 2:
            data = data[: random.integers(len(data) - 1)]
        else:
            for place in random.integers(0, 2000, 3):
                data[place] = random.integers(256)
        path.write_bytes(data)
        try:
            convert(source=path, out_dir=tmp_path / "out")
            shutil.rmtree(tmp_path / "out")
            assert trial % 2 == 0
        except UserError as error:
            assert len(str(error)) < 600
        assert sorted(tmp_path.iterdir()) == [path]


# -------------------------------------------------------------------------------------------------------- merging


def tuned_adapter(folder, checkpoint_dir, quantize=None, **settings):
    """An adapter with random matrices, as a training over a base quantised so would leave it."""
    model = load_model(checkpoint_dir, torch.float32, quantize=quantize)
    config = lora.AdapterConfig(**{"r": 4, "alpha": 8, **settings})
    lora.add_lora(model, config)
    for adapter in lora.adapters(model).values():
        nn.init.normal_(adapter.lora_B, std=0.1)
        if config.kind == "dora":
            adapter.lora_magnitude_vector.data *= torch.rand_like(adapter.lora_magnitude_vector) + 0.5
    folder.mkdir(parents=True)
    peft_format.save_adapter(model, config, folder, checkpoint_dir)
    notes = {"prompt_style": "alpaca", "checkpoint_dir": str(checkpoint_dir), "quantize": quantize}
    (folder / "onetune.json").write_text(json.dumps(notes))
    return folder


@pytest.mark.parametrize("style", ["alpaca", "checkpoint", None])
def test_a_merged_models_chat_template_is_the_style_it_was_trained_in(tiny_model_dir, tmp_path, style, capsys):
    adapter = tuned_adapter(tmp_path / "run" / "final", tiny_model_dir)
    if style is None:
        (adapter / "onetune.json").unlink()
    else:
        notes = {"prompt_style": style, "checkpoint_dir": str(tiny_model_dir), "quantize": None}
        (adapter / "onetune.json").write_text(json.dumps(notes))
    script.main(script.Settings(adapter_dir=adapter))
    out = tmp_path / "run" / "final-merged"
    line = "prompt style alpaca, in which" if style == "alpaca" else "the base model's"
    assert f"chat template: {line}" in capsys.readouterr().out
    question = [{"role": "user", "content": "what is it?"}]
    peer = transformers.AutoTokenizer.from_pretrained(out)
    found = peer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    assert found == encode_prompt(Tokenizer(tiny_model_dir), question, style or "checkpoint")
    check_manifest(out)


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
@pytest.mark.parametrize("base_has_one", [True, False])
def test_a_merged_model_has_the_template_that_the_adapter_brings(tiny_model_dir, tmp_path, place, base_has_one, capsys):
    """As an adapter of another program does: it says no prompt style of ours."""
    base, adapter = tmp_path / "base", tuned_adapter(tmp_path / "adapter", tiny_model_dir)
    shutil.copytree(tiny_model_dir, base)
    (adapter / "onetune.json").unlink()
    if not base_has_one:
        edit_json(base / "tokenizer_config.json", chat_template=None)
    template = "{% for m in messages %}<|im_start|>{{ m.role[0] }}: {{ m.content }}<|im_end|>{% endfor %}A:"
    is_json = place.endswith(".json")
    (adapter / place).write_text(json.dumps({"chat_template": template}) if is_json else template)
    out = convert(adapter_dir=adapter, source=base, out_dir=tmp_path / "out")
    assert f"chat template: that of {adapter}" in capsys.readouterr().out
    question = [{"role": "user", "content": "what is it?"}]
    peer = transformers.AutoTokenizer.from_pretrained(out)
    text = peer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>u: what is it?<|im_end|>A:" and Tokenizer(out).chat_template == template


@pytest.mark.parametrize("settings", [{}, {"rslora": True, "targets": ("q_proj", "down_proj")}, {"kind": "dora"}])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_merging_into_a_dense_base(tiny_checkpoint, tmp_path, settings, family, capsys):
    base = tiny_checkpoint(family)
    adapter = tuned_adapter(tmp_path / "run" / "final", base, **settings)
    script.main(script.Settings(adapter_dir=adapter))
    out = tmp_path / "run" / "final-merged"
    expected = our_logits(base, adapter_dir=adapter)
    assert (expected - our_logits(base)).abs().max() > 0.1
    torch.testing.assert_close(reference_logits(out), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(our_logits(out), expected, atol=1e-4, rtol=1e-4)
    assert json.loads((out / "onetune.json").read_text()) == {"prompt_style": "alpaca"}
    report = capsys.readouterr().out
    assert "by 0.00% of what the adapter changed" in report and "same likeliest token in 100%" in report

    from peft import PeftModel

    merged = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), adapter)
    theirs, ours = merged.merge_and_unload().state_dict(), load_file(out / "model.safetensors")
    assert all(torch.allclose(theirs[name], ours[name], atol=1e-5) for name in ours)


@pytest.mark.parametrize("quantize", ["bnb.nf4", "bnb.int8"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_merging_into_the_quantised_base_of_the_training(tiny_checkpoint, tmp_path, quantize, kind):
    base = tiny_checkpoint("llama")
    adapter = tuned_adapter(tmp_path / "adapter", base, quantize, kind=kind, targets=("q_proj", "up_proj"))
    out = convert(adapter_dir=adapter, source=base, out_dir=tmp_path / "out")
    expected = our_logits(base, quantize=quantize, adapter_dir=adapter)
    torch.testing.assert_close(reference_logits(out), expected, atol=1e-4, rtol=1e-4)
    dense = convert(adapter_dir=adapter, source=base, out_dir=tmp_path / "dense", quantize="none")
    torch.testing.assert_close(reference_logits(dense), our_logits(base, adapter_dir=adapter), atol=1e-4, rtol=1e-4)
    assert (reference_logits(dense) - expected).abs().max() > 1e-3


def test_merging_an_adapter_of_peft_with_patterns(tiny_checkpoint, tmp_path):
    import peft

    base = tiny_checkpoint("mistral")
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], rank_pattern={"layers.1.self_attn.q_proj": 2},
        alpha_pattern={"v_proj": 3}, init_lora_weights=False, task_type="CAUSAL_LM",
    )  # fmt: skip
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(tmp_path / "adapter")
    out = convert(adapter_dir=tmp_path / "adapter", source=base, out_dir=tmp_path / "out")
    with torch.no_grad():
        expected = model.eval()(TOKENS).logits
    torch.testing.assert_close(reference_logits(out), expected, atol=1e-4, rtol=1e-4)


def test_merging_into_a_tied_head_unties_it(tiny_checkpoint, tmp_path):
    base = tiny_checkpoint("llama-tied")
    adapter = tuned_adapter(tmp_path / "adapter", base, targets=("lm_head", "q_proj"))
    out = convert(adapter_dir=adapter, out_dir=tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    torch.testing.assert_close(reference_logits(out), our_logits(base, adapter_dir=adapter), atol=1e-4, rtol=1e-4)


def test_merging_into_16_bits_says_what_is_lost(tiny_checkpoint, tmp_path, capsys):
    adapter = tuned_adapter(tmp_path / "adapter", tiny_checkpoint("llama"))
    out = convert(adapter_dir=adapter, out_dir=tmp_path / "out", dtype="bfloat16")
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("rounding to bfloat16"))
    assert 0 < float(line.split("by ")[1].split("%")[0]) < 50


def test_merging_what_does_not_fit(tiny_checkpoint, tmp_path):
    adapter = tuned_adapter(tmp_path / "adapter", tiny_checkpoint("llama"))
    for source, message in ((tiny_checkpoint("qwen3"), "belongs to another base"), (tmp_path / "no", "does not exist")):
        with pytest.raises(UserError, match=message):
            convert(adapter_dir=adapter, source=source, out_dir=tmp_path / "out")
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name.replace("layers.0", "layers.7"): t for name, t in tensors.items()}, adapter / "adapter_model.safetensors"
    )
    with pytest.raises(UserError, match="layers.7.* does not have"):
        convert(adapter_dir=adapter, out_dir=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


# ------------------------------------------------------------------------------------------------------- mistakes


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def truncate(path, share=0.6):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def bad_cases():
    """name -> a function from (a copy of a good model folder, a temporary folder) to arguments of the script."""

    def bad(name, function):
        return pytest.param(function, id=name)

    def with_bin(data):
        def case(model, tmp):
            (model / "model.safetensors").unlink()
            torch.save(data, model / "pytorch_model.bin")
            return "--source", model

        return case

    def index(model, tmp):
        weight_map = {"model.norm.weight": "../model/model.safetensors"}
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        (model / "model.safetensors").unlink()
        return "--source", model

    def after(action):
        def case(model, tmp):
            action(model)
            return "--source", model

        return case

    def gguf_file(model, tmp):
        (tmp / "a.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + b"\x01" * 100)
        return "--source", tmp / "a.gguf"

    return [
        bad("no flags", lambda model, tmp: ()),
        bad("two flags", lambda model, tmp: ("--source", model, "--repo_id", "a/b")),
        bad("bad repo id", lambda model, tmp: ("--repo_id", "../../etc")),
        bad("unknown flag", lambda model, tmp: ("--sorce", model)),
        bad("missing folder", lambda model, tmp: ("--source", tmp / "nowhere")),
        bad("existing folder", lambda model, tmp: ("--source", model, "--out_dir", tmp, "--dtype", "float16")),
        bad(
            "no room for it", lambda model, tmp: ("--source", tmp / "good", "--out_dir", model / "config.json" / "out")
        ),
        bad("empty folder", after(lambda model: (model / "model.safetensors").unlink())),
        bad("truncated safetensors", after(lambda model: truncate(model / "model.safetensors"))),
        bad("unknown model", after(lambda model: edit_json(model / "config.json", model_type="mamba"))),
        bad("nonsense size", after(lambda model: edit_json(model / "config.json", hidden_size=-5))),
        bad("other size", after(lambda model: edit_json(model / "config.json", vocab_size=99))),
        bad("broken tokenizer", after(lambda model: truncate(model / "tokenizer.json"))),
        bad("path in an index", index),
        bad("malicious pickle", with_bin({"model.norm.weight": Evil()})),
        bad("no tensors in bin", with_bin([1, 2])),
        bad("truncated gguf", gguf_file),
        bad("no network", lambda model, tmp: ("--repo_id", "a/b")),
    ]


@pytest.mark.parametrize("case", bad_cases())
def test_mistakes_get_one_line(tiny_model_dir, tmp_path, run_script, case):
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(tiny_model_dir, model)
    shutil.copytree(model, tmp_path / "good", ignore=shutil.ignore_patterns("manifest.json"))
    arguments = case(model, tmp_path)
    arguments += () if "--out_dir" in arguments else ("--out_dir", out)
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": ""}  # the port for nothing
    code, _, err = run_script("convert_hf_checkpoint.py", *arguments, env=environment)
    assert code == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1 and len(err) < 500, err
    assert not out.exists() and not Path("pwned").exists()


# -------------------------------------------------------------------------------------------------------- the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A small Hugging Face hub on this machine: fill `hub.repos[repo_id]` with a folder, or with an error code."""
    repos, sha, asked = {}, "0" * 40, []

    class Handler(JsonHandler):
        def do_GET(self):
            asked.append(self.path)
            api = self.path.startswith("/api/models/")
            repo = "/".join(self.path.removeprefix("/api/models").split("?")[0].split("/")[1:3])
            folder = repos.get(repo, "RepoNotFound")
            if isinstance(folder, str):
                return self.answer(b"", 403 if folder == "GatedRepo" else 404, {"X-Error-Code": folder})
            sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
            if not api:
                path = folder / self.path.rpartition("/")[2]
                return self.answer(path.read_bytes(), headers={"ETag": f'"{path.name}"', "X-Repo-Commit": sha})
            if "/tree/" in self.path:
                return self.answer(
                    [{"type": "file", "path": name, "size": size, "oid": name} for name, size in sizes.items()]
                )
            siblings = [{"rfilename": name, "size": size} for name, size in sizes.items()]
            return self.answer({"id": repo, "sha": sha, "siblings": siblings})

        do_HEAD = do_GET

    with serving(Handler) as server:
        server.repos, server.asked = repos, asked
        server.environment = {
            "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "", "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1",
        }  # fmt: skip
        yield server


def test_download_of_safetensors(hub, tiny_model_dir, tmp_path, run_script):
    folder = hub.repos["org/model"] = tmp_path / "repo"
    shutil.copytree(tiny_model_dir, folder)
    unwanted = (
        "consolidated.safetensors",
        "model.gguf",
        "model.onnx",
        "pytorch_model.bin",
        "adapter_model.safetensors",
    )
    for name in unwanted:
        (folder / name).write_bytes(b"unwanted")
    out = tmp_path / "checkpoints" / "model"
    code, text, err = run_script(
        "convert_hf_checkpoint.py", "--repo_id", "org/model", "--out_dir", out, env=hub.environment
    )
    assert code == 0, err
    assert not any((out / name).exists() for name in unwanted)
    assert f"prepare_data.py --data my.jsonl --checkpoint_dir {out}" in text.splitlines()[-1]
    torch.testing.assert_close(our_logits(out), our_logits(tiny_model_dir), atol=0, rtol=0)
    assert Tokenizer(out).encode("Hello") == Tokenizer(tiny_model_dir).encode("Hello")


def test_a_download_appears_whole(hub, tiny_model_dir, tmp_path, run_script):
    """Damaged or cut off, it is not there under its name; the same command goes on, and leaves nothing else behind."""
    folder = hub.repos["org/model"] = tmp_path / "repo"
    shutil.copytree(tiny_model_dir, folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    out = tmp_path / "checkpoints" / "model"
    command = ("convert_hf_checkpoint.py", "--repo_id", "org/model", "--out_dir", out)
    code, _, err = run_script(*command, env=hub.environment)
    assert code == 2 and "damaged" in err and f"{out.parent / '.model.download'} has: delete it" in err, err
    assert [path.name for path in out.parent.iterdir()] == [".model.download"]
    (out.parent / ".model.download" / "model.safetensors").unlink()  # as if it had been cut off before this file
    (folder / "model.safetensors").write_bytes(whole)
    code, _, err = run_script(*command, env=hub.environment)
    assert code == 0, err
    assert [path.name for path in out.parent.iterdir()] == ["model"] and not (out / ".cache").exists()
    assert (out / "model.safetensors").read_bytes() == whole
    code, _, err = run_script(*command, env=hub.environment)
    assert code == 2 and f"{out} exists" in err


def test_files_of_a_repository_stay_in_its_folder():
    names = {"config.json", "model/../../evil.safetensors", "model.safetensors", "../tokenizer.json"}
    assert script.files_to_fetch("a/b", names) == ["model.safetensors", "config.json"]


def test_download_of_bin(hub, tiny_checkpoint, tmp_path, run_script):
    hub.repos["org/old"] = bin_folder(tiny_checkpoint("llama"), tmp_path / "repo", shards=2)
    out = tmp_path / "out"
    code, _, err = run_script("convert_hf_checkpoint.py", "--repo_id", "org/old", "--out_dir", out, env=hub.environment)
    assert code == 0, err
    torch.testing.assert_close(our_logits(out), our_logits(tiny_checkpoint("llama")), atol=0, rtol=0)


@pytest.mark.parametrize(
    "repo, message",
    [("org/gated", "accept its licence"), ("org/none", "is not on the hub"), ("org/gguf", "give it to --source")],
)
def test_repositories_that_cannot_be_had(hub, tmp_path, run_script, repo, message):
    hub.repos["org/gated"] = "GatedRepo"
    hub.repos["org/gguf"] = tmp_path / "gguf"
    hub.repos["org/gguf"].mkdir()
    (hub.repos["org/gguf"] / "model.Q4.gguf").write_bytes(b"")
    out = tmp_path / "out"
    code, _, err = run_script("convert_hf_checkpoint.py", "--repo_id", repo, "--out_dir", out, env=hub.environment)
    assert code == 2 and err.startswith(f"error: {repo}") and message in err and err.count("\n") == 1, err
    assert not out.exists()


# --------------------------------------------------------------------------------------------- the real small model


@pytest.mark.real
def test_real_gguf_equals_transformers(smollm2_gguf, tmp_path):
    out = convert(source=smollm2_gguf, out_dir=tmp_path / "out", dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ours = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    tokens = tokenizer("The capital of France is Paris, and that of Italy is Rome.", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = theirs(tokens).logits
        torch.testing.assert_close(ours(tokens).logits, expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(our_logits(out, tokens), expected, atol=1e-3, rtol=0)
    options = dict(max_new_tokens=16, do_sample=False, pad_token_id=2)
    assert torch.equal(ours.generate(tokens, **options), theirs.generate(tokens, **options))


@pytest.mark.real
def test_real_gguf_tokenizer(smollm2_dir, smollm2_gguf):
    """Against transformers' reading of the same file, but where it does not know that SmolLM2 splits off each digit."""
    ours, found = Tokenizer(smollm2_dir), transformers.AutoTokenizer.from_pretrained(smollm2_dir)
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    for text in [*NASTY, "<|im_start|>user\nhi<|im_end|>\n"]:
        ids = found(text).input_ids
        assert ids == ours.encode(text, special=True), text
        assert found.decode(ids) == text
        if not any(character.isnumeric() for character in text):
            assert ids == theirs(text).input_ids, text
    known = {
        "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
        "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
        "  multiple   spaces": [216, 2701, 256, 5600],
    }
    assert {text: found(text).input_ids for text in known} == known
    assert (ours.bos_id, ours.eos_ids, ours.begin_ids) == (1, {2}, ())


@pytest.mark.parametrize("change", [dict(dtype="bfloat16"), dict(add_tokens=["<more>"])])
def test_card_and_licence_go_with_a_model(tmp_path, tiny_model_dir, change):
    source = tmp_path / "source"
    shutil.copytree(tiny_model_dir, source)
    texts = {"README.md": "---\nlicense: llama2\n---\n", "LICENSE.txt": "You may.", "USE_POLICY.md": "But not that."}
    for name, text in texts.items():
        (source / name).write_text(text)
    out = convert(source=source, out_dir=tmp_path / "out", **change)
    assert {name: (out / name).read_text() for name in texts} == texts
