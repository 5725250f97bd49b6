"""GGUF files that we write: against the gguf package, against an independent writer, and read back by ourselves."""

import dataclasses
import json
import shutil

import gguf
import pytest
import torch
import transformers
from conftest import FAMILIES, SMALL, tiny_reference, write_tiny_tokenizer
from safetensors.torch import load_file, save_file
from test_convert import NASTY, TOKENS, edit_json, our_logits, tuned_adapter
from test_convert import write_gguf as write_as_llama_cpp
from test_tokenizer import make_byte_level, make_llama, make_llama_json
from tokenizers import Regex, normalizers, pre_tokenizers

import convert_hf_checkpoint as script
from ops.rope import RoPE, inverse_frequencies
from shell.cli import UserError
from text.tokenizer import Tokenizer
from weights import gguf_format, gguf_writing
from weights.families import config_from_json
from weights.meta_format import half_split, interleaved

Type = gguf.GGMLQuantizationType
WRITABLE = [family for family in FAMILIES if family != "qwen2"] + ["qwen2-full"]  # qwen2 has windows in some layers
CPU = torch.device("cpu")


@pytest.fixture
def model_folder(tiny_checkpoint, tmp_path):
    """`model_folder("llama")`: a tiny model with a byte-level tokenizer, to be changed."""

    def make(family):
        folder = tmp_path / "model"
        shutil.copytree(tiny_checkpoint("qwen2" if family == "qwen2-full" else family), folder)
        if family == "qwen2-full":
            edit_json(folder / "config.json", use_sliding_window=False, layer_types=None)
        write_tiny_tokenizer(folder)
        return folder

    return make


def tiny_llama(folder, **changes):
    """A small Llama without a tokenizer in a new folder, its rows a multiple of the blocks of quantised types."""
    config = transformers.LlamaConfig(
        **SMALL | dict(hidden_size=96, intermediate_size=160, num_hidden_layers=1) | changes
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write(source, out_file, dtype="auto", **settings):
    """The script's .gguf file, made in this process."""
    script.main(script.Settings(source=source, out_file=out_file, dtype=dtype, **settings))
    return out_file


def read_back(path):
    """The model folder that we make of a .gguf file."""
    script.main(script.Settings(source=path, out_dir=path.with_suffix("")))
    return path.with_suffix("")


def same_computation(one, other):
    """Whether two configurations mean the same; a context of RoPE's is one of several with the same frequencies."""
    frequencies = [inverse_frequencies(config.ropes[0], CPU) for config in (one, other)]
    plain = [
        dataclasses.replace(config, ropes=(RoPE(config.ropes[0].theta, config.head_dim),) * len(config.ropes))
        for config in (one, other)
    ]
    return plain[0] == plain[1] and torch.allclose(*frequencies, rtol=1e-6)


def read_config(folder):
    return config_from_json(json.loads((folder / "config.json").read_text()))


# ------------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("family", WRITABLE)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_folder_comes_back(model_folder, tmp_path, family, dtype):
    source = model_folder(family)
    back = read_back(write(source, tmp_path / "a.gguf", dtype))
    assert same_computation(read_config(back), read_config(source))
    before, after = (load_file(folder / "model.safetensors") for folder in (source, back))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        expected = tensor if tensor.dim() == 1 else tensor.to(getattr(torch, dtype))
        assert after[name].dtype == expected.dtype and torch.equal(after[name], expected), name
    if dtype == "float32":
        torch.testing.assert_close(our_logits(back), our_logits(source), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", WRITABLE)
def test_a_file_equals_that_of_an_independent_writer(model_folder, tmp_path, family):
    """Every tensor under its name, and every key, as the gguf package reads both files."""
    source = model_folder(family)
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    theirs = gguf.GGUFReader(write_as_llama_cpp(tmp_path / "theirs.gguf", model, vocabulary=lambda writer: None))
    ours = gguf.GGUFReader(write(source, tmp_path / "ours.gguf", "float32"))
    found = {tensor.name: tensor for tensor in ours.tensors}
    assert found.keys() == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        assert found[tensor.name].shape.tolist() == tensor.shape.tolist()
        assert torch.allclose(*(torch.tensor(t.data) for t in (found[tensor.name], tensor)), rtol=1e-6, atol=0)
    keys = {key for key in theirs.fields if not key.startswith("GGUF.")}
    assert {key: ours.fields[key].contents() for key in keys} == {key: theirs.fields[key].contents() for key in keys}


@pytest.mark.parametrize("family", gguf_format.ARCHITECTURES)
def test_names_are_those_of_the_gguf_package(family):
    arch = gguf.MODEL_ARCH[gguf_format.ARCHITECTURES[family].upper()]
    names = gguf.get_tensor_name_map(arch, SMALL["num_hidden_layers"])
    for name in tiny_reference(family).state_dict():
        assert gguf_format.gguf_name(name) == names.get_name(name, (".weight", ".bias")), name
        assert gguf_format.hugging_face_name(gguf_format.gguf_name(name)) == name


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0"])
@pytest.mark.parametrize("tied", [False, True])
def test_quantised_types(tmp_path, dtype, tied):
    """Each tensor is what the gguf package makes of it, in the type that llama.cpp chooses."""
    source = tiny_llama(tmp_path / "model", tie_word_embeddings=tied, intermediate_size=80)
    write_tiny_tokenizer(source)
    path = write(source, tmp_path / "a.gguf", dtype)
    kinds = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(path).tensors}
    head = "token_embd.weight" if tied else "output.weight"
    assert kinds[head] == Type.Q8_0 and kinds["blk.0.attn_q.weight"] == Type[dtype.upper()]
    assert kinds["output_norm.weight"] == Type.F32 and kinds["blk.0.ffn_down.weight"] == Type.F16  # 80 = 2.5 blocks
    assert kinds.get("token_embd.weight") == (Type.Q8_0 if tied else Type[dtype.upper()])
    weights = gguf_format.GGUFWeights(path)
    for name, tensor in load_file(source / "model.safetensors").items():
        kind = kinds[gguf_format.gguf_name(name)]
        encoded = gguf.quants.quantize(tensor.numpy(), kind)
        assert torch.equal(weights.read(name), torch.from_numpy(gguf.quants.dequantize(encoded, kind)).float()), name
    types = {"q8_0": gguf.LlamaFileType.MOSTLY_Q8_0, "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0}
    assert weights.metadata["general.file_type"] == types[dtype]


def test_rows_for_ropes_layout_and_back():
    rows = torch.randn(6 * 8, 5)
    there = interleaved(rows, 6)
    assert torch.equal(half_split(there, 6), rows)
    assert torch.equal(there[:4], rows[[0, 4, 1, 5]])  # the first head's pairs i, i + 4


def test_a_dtype_of_its_own_for_each_tensor(model_folder, tmp_path):
    """--dtype auto keeps what the source has; norms are fp32 in every GGUF file."""
    source = model_folder("llama")
    tensors = load_file(source / "model.safetensors")
    tensors = {name: t.bfloat16() if "mlp" in name or t.dim() == 1 else t.half() for name, t in tensors.items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    after = load_file(read_back(write(source, tmp_path / "a.gguf")) / "model.safetensors")
    for name, tensor in tensors.items():
        assert after[name].dtype == (torch.float32 if tensor.dim() == 1 else tensor.dtype)
        assert torch.equal(after[name].float(), tensor.float()), name


def test_one_tensor_at_a_time(model_folder, tmp_path, monkeypatch):
    """When a tensor is read, all before it are in the file, and the writer has let go of them."""
    held = []
    original = gguf_writing.encode

    def encode(*args):
        held.append(sum(info.tensor is not None for infos in writers[0].tensors for info in infos.values()))
        return original(*args)

    writers, make = [], gguf.GGUFWriter
    monkeypatch.setattr(gguf, "GGUFWriter", lambda *args: writers.append(make(*args)) or writers[-1])
    monkeypatch.setattr(gguf_writing, "encode", encode)
    write(model_folder("llama"), tmp_path / "a.gguf")
    assert len(held) > 30 and set(held) == {0}


# --------------------------------------------------------------------------------------------------- the tokenizer


def make_qwen2(folder):
    pattern = pre_tokenizers.Split(Regex(gguf_format.QWEN2), behavior="isolated")
    to_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return make_byte_level(folder, normalizers.NFC(), pre_tokenizers.Sequence([pattern, to_letters]))


def make_llama3(folder):
    """As Llama 3's: whole words first, and BOS before each text."""
    pattern = pre_tokenizers.Split(Regex(gguf_format.LLAMA3), behavior="isolated")
    to_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    make_byte_level(folder, None, pre_tokenizers.Sequence([pattern, to_letters]), bos="<|endoftext|>")
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["model"]["ignore_merges"] = True
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return folder


def make_smollm(folder):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    parts = [pre_tokenizers.Digits(individual_digits=True), byte_level]
    return make_byte_level(folder, None, pre_tokenizers.Sequence(parts))


def make_gpt2(folder):
    return make_byte_level(folder, None, pre_tokenizers.ByteLevel(add_prefix_space=False))


def make_llama_of_json_alone(folder):
    make_llama_json(folder)
    (folder / "tokenizer.model").unlink()
    return folder


def make_vicuna(folder):
    """A tokenizer.model with tokens added beside it. A .gguf file cannot say `legacy`, we read it as false."""
    make_llama(folder, legacy=False, added_tokens_decoder={"32000": {"content": "<|im_end|>", "special": True}})
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 32000, "<tool>": 32001}))
    return folder


TOKENIZERS = {
    "gpt-2": make_gpt2, "smollm": make_smollm, "qwen2": make_qwen2, "llama-bpe": make_llama3, "model": make_llama,
    "json": make_llama_of_json_alone, "added": make_vicuna,
}  # fmt: skip
ROWS = {"model": 32000, "json": 32000, "added": 32004}


def model_with(make, folder, rows, **changes):
    """A tiny Llama with one layer and a tokenizer of this kind."""
    tiny_llama(folder, vocab_size=rows, hidden_size=12, intermediate_size=16, **changes)
    return make(folder)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_tokenizer_comes_back(tmp_path, kind):
    source = model_with(TOKENIZERS[kind], tmp_path / "model", ROWS.get(kind, 608))
    back = read_back(write(source, tmp_path / "a.gguf"))
    before, after = Tokenizer(source), Tokenizer(back)
    for text in [*NASTY, "<tool> and <|im_end|> in a text", "e\u0301"]:
        assert after.encode(text) == before.encode(text), text
        assert after.encode("a " + text, special=True) == before.encode("a " + text, special=True), text
        assert after.decode(after.encode(text)) == before.decode(before.encode(text)), text
    facts = [
        (t.bos_id, t.eos_ids, t.begin_ids, t.has_prefix, t.chat_template, t.template_pattern) for t in (before, after)
    ]
    assert facts[0] == facts[1]
    metadata = gguf_format.GGUFWeights(tmp_path / "a.gguf").metadata
    assert metadata["tokenizer.ggml.pre"] == (kind if kind in gguf_format.PRE_TOKENIZERS else "default")
    assert len(metadata["tokenizer.ggml.tokens"]) == ROWS.get(kind, 608)


def test_scores_of_a_tokenizer_json_give_sentencepieces_ids(tmp_path):
    """The scores from the order of the merges against the model that the merges were made of."""
    files = {}
    for kind in ("json", "model"):
        source = model_with(TOKENIZERS[kind], tmp_path / kind, 32000)
        files[kind] = gguf_format.GGUFWeights(write(source, tmp_path / f"{kind}.gguf")).metadata
    one, other = (files[kind]["tokenizer.ggml.scores"] for kind in files)
    tokens = files["json"]["tokenizer.ggml.tokens"]
    assert tokens == files["model"]["tokenizer.ggml.tokens"]
    assert files["json"]["tokenizer.ggml.token_type"] == files["model"]["tokenizer.ggml.token_type"]
    made = [id for id, score in enumerate(one) if -1e9 < score < 0]
    by_ours, by_theirs = (sorted(made, key=scores.__getitem__) for scores in (one, other))
    assert len(made) > 25000 and [other[id] for id in by_ours] == [other[id] for id in by_theirs]


def test_templates_and_ends_come_back(model_folder, tmp_path):
    source = model_folder("llama")
    templates = [{"name": "default", "template": "{{ a }}"}, {"name": "tool_use", "template": "{{ tools }}"}]
    edit_json(source / "tokenizer_config.json", chat_template=templates)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1]}))
    before, after = Tokenizer(source), Tokenizer(read_back(write(source, tmp_path / "a.gguf")))
    assert after.eos_ids == before.eos_ids == {0, 1, 2} and after.eos_id == before.eos_id
    assert (after.chat_template, after.tool_template) == ("{{ a }}", "{{ tools }}")


def edit_spec(folder, **changes):
    """Change tokenizer.json: a value by its path, with __ for what is in it."""
    spec = json.loads((folder / "tokenizer.json").read_text())
    for path, value in changes.items():
        *above, last = path.split("__")
        node = spec
        for key in above:
            node = node[key]
        node[last] = value
    (folder / "tokenizer.json").write_text(json.dumps(spec))


@pytest.mark.parametrize(
    "make, change, message",
    [
        (make_gpt2, {"normalizer": {"type": "Lowercase"}}, "normaliser is Lowercase"),
        (make_gpt2, {"normalizer": {"type": "NFC"}}, "normaliser is NFC"),
        (make_gpt2, {"pre_tokenizer__add_prefix_space": True}, "ByteLevel with other settings"),
        (make_gpt2, {"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
        (make_byte_level, {}, "none of gpt-2"),  # a pattern of its own
        (make_gpt2, {"model__dropout": 0.1}, "dropout 0.1"),
        (make_gpt2, {"model__merges": []}, "merges are missing"),
        (make_llama_of_json_alone, {"normalizer": {"type": "NFKC"}}, "NFKC"),
        (make_llama_of_json_alone, {"pre_tokenizer__split": True}, "Metaspace with other settings"),
        (make_llama_of_json_alone, {"model__byte_fallback": False}, "byte_fallback"),
    ],
)
def test_a_tokenizer_that_llama_cpp_lacks_is_refused(tmp_path, make, change, message):
    folder = model_with(make, tmp_path / "model", 32000 if make is make_llama_of_json_alone else 608)
    edit_spec(folder, **change)
    with pytest.raises(UserError, match=message):
        write(folder, tmp_path / "a.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("merges, fits", [(None, True), (20, False)])
def test_whole_words_first_or_not(tmp_path, merges, fits):
    """llama.cpp has it by the name of the pre-tokeniser. It makes no difference where merges make every token."""
    folder = model_with(make_qwen2, tmp_path / "model", 608)
    spec = json.loads((folder / "tokenizer.json").read_text())
    edit_spec(folder, model__ignore_merges=True, model__merges=spec["model"]["merges"][:merges])
    if fits:
        back = Tokenizer(read_back(write(folder, tmp_path / "a.gguf")))
        assert all(back.encode(text) == Tokenizer(folder).encode(text) for text in NASTY)
    else:
        with pytest.raises(UserError, match="ignore_merges is True, and no merges make"):
            write(folder, tmp_path / "a.gguf")


def test_merges_in_another_order_are_refused(tmp_path):
    folder = model_with(make_llama_of_json_alone, tmp_path / "model", 32000)
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    for changed in (merges[:500] + merges[501:], [merges[9000], *merges[:9000], *merges[9001:]]):
        edit_spec(folder, model__merges=changed)
        with pytest.raises(UserError, match="scores could give"):
            write(folder, tmp_path / "a.gguf")


def test_a_unigram_model_is_refused(tmp_path):
    from sentencepiece import SentencePieceTrainer

    folder = tiny_llama(tmp_path / "model")
    text = iter(["the cat sat on the mat and ran to the rat"] * 20)
    prefix = str(folder / "tokenizer")
    SentencePieceTrainer.train(
        sentence_iterator=text, model_prefix=prefix, vocab_size=20, hard_vocab_limit=False, minloglevel=2
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    with pytest.raises(UserError, match="tokenizer.model: it is no BPE model"):
        write(folder, tmp_path / "a.gguf")


def test_an_added_token_that_swallows_blanks_is_refused(model_folder, tmp_path):
    source = model_folder("llama")
    spec = json.loads((source / "tokenizer.json").read_text())
    spec["added_tokens"][1]["lstrip"] = True
    (source / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match=r"<\|im_start\|>' has lstrip"):
        write(source, tmp_path / "a.gguf")


def test_tokens_without_a_row_are_left_out_and_named(model_folder, tmp_path, capsys):
    source = model_folder("llama")
    spec = json.loads((source / "tokenizer.json").read_text())
    spec["added_tokens"].append(spec["added_tokens"][0] | {"id": 512, "content": "<pad>"})
    (source / "tokenizer.json").write_text(json.dumps(spec))
    edit_json(source / "tokenizer_config.json", pad_token="<pad>")
    metadata = gguf_format.GGUFWeights(write(source, tmp_path / "a.gguf")).metadata
    assert "'<pad>' (512)" in capsys.readouterr().out
    assert len(metadata["tokenizer.ggml.tokens"]) == 512 and "tokenizer.ggml.padding_token_id" not in metadata


# ------------------------------------------------------------------------------------------------------ the script


def test_as_a_user_runs_it(model_folder, tmp_path, run_script):
    """Write, refuse to write again, and read back."""
    source, path, back = model_folder("llama"), tmp_path / "new" / "a.gguf", tmp_path / "back"
    command = ("convert_hf_checkpoint.py", "--source", source, "--out_file", path, "--dtype", "float16")
    code, out, err = run_script(*command)
    assert code == 0, err
    assert f"wrote {path}: " in out and "F16 and F32" in out
    written = path.read_bytes()
    code, _, err = run_script(*command)
    assert code == 2 and f"{path} exists" in err and err.count("\n") == 1
    assert path.read_bytes() == written and [file.name for file in path.parent.iterdir()] == ["a.gguf"]
    code, out, err = run_script("convert_hf_checkpoint.py", "--source", path, "--out_dir", back)
    assert code == 0, err
    torch.testing.assert_close(our_logits(back), our_logits(source), atol=0.1, rtol=0)
    assert Tokenizer(back).encode("Hello") == Tokenizer(source).encode("Hello")


def test_an_adapter_is_merged(model_folder, tmp_path, capsys):
    base = model_folder("llama-tied")
    adapter = tuned_adapter(tmp_path / "adapter", base, targets=("lm_head", "q_proj", "down_proj"))
    script.main(script.Settings(adapter_dir=adapter, out_file=tmp_path / "a.gguf"))
    assert "same likeliest token in 100%" in capsys.readouterr().out
    back = read_back(tmp_path / "a.gguf")
    torch.testing.assert_close(our_logits(back), our_logits(base, adapter_dir=adapter), atol=1e-4, rtol=1e-4)
    assert "### Instruction" in Tokenizer(back).chat_template  # alpaca, in which the adapter was trained


def test_gguf_to_gguf_and_bin_to_gguf(model_folder, tmp_path):
    source = model_folder("mistral")
    one = write(source, tmp_path / "one.gguf", "float32")
    two = write(one, tmp_path / "two.gguf")
    assert two.read_bytes() == one.read_bytes()
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    three = write(source, tmp_path / "three.gguf")
    assert three.read_bytes() == one.read_bytes()


@pytest.mark.parametrize(
    "family, changes, message",
    [
        ("qwen2", {}, "no sliding window in a qwen2 model"),
        ("qwen3", {"rope_parameters": FAMILIES["llama-tied"][1]["rope_parameters"]}, "llama3"),
        ("mistral", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "some layers only"),
    ],
)
def test_a_model_that_llama_cpp_lacks_is_refused(model_folder, tmp_path, family, changes, message):
    source = model_folder(family)
    edit_json(source / "config.json", **changes)
    with pytest.raises(UserError, match=message):
        write(source, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def test_biases_that_llama_cpp_lacks_are_refused():
    config = {**SMALL, "model_type": "qwen3", "attention_bias": True, "head_dim": 16}
    with pytest.raises(UserError, match="attention_bias in a qwen3"):
        gguf_writing.check_family(config)


def test_a_window_is_noted_and_named(model_folder, tmp_path, capsys):
    back = read_back(write(model_folder("mistral"), tmp_path / "a.gguf"))
    assert capsys.readouterr().out.count("beyond 7 tokens") == 1 and read_config(back).windows == (7, 7, 7)


@pytest.mark.parametrize("dtype, limit", [("float16", 65504), ("q8_0", 127 * 65504), ("q4_0", 8 * 65504)])
def test_values_that_are_too_large_are_refused(tmp_path, dtype, limit):
    source = tiny_llama(tmp_path / "model")
    write_tiny_tokenizer(source)
    tensors = load_file(source / "model.safetensors")
    for factor in (1, 1.01):
        tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = limit * factor
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        if factor == 1:
            written = gguf_format.GGUFWeights(write(source, tmp_path / "fits.gguf", dtype))
            assert written.read("model.layers.0.mlp.up_proj.weight").abs().max() == limit
    with pytest.raises(UserError, match="up_proj.weight holds values too large"):
        write(source, tmp_path / "a.gguf", dtype)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fits.gguf", "model"]


@pytest.mark.real
def test_the_real_model_comes_back(smollm2_dir, tmp_path):
    """A folder made of llama.cpp's own file, to F16 and back: every tensor and every tokenizer file is the same."""
    back = read_back(write(smollm2_dir, tmp_path / "a.gguf", "float16"))
    for path in smollm2_dir.glob("*.json"):
        if path.name not in ("manifest.json", "config.json"):
            assert json.loads(path.read_text()) == json.loads((back / path.name).read_text()), path.name
    assert read_config(back) == read_config(smollm2_dir)
    before, after = (load_file(folder / "model.safetensors") for folder in (smollm2_dir, back))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    torch.testing.assert_close(our_logits(back, TOKENS), our_logits(smollm2_dir, TOKENS), atol=0, rtol=0)
