"""Meta's and Mistral's own formats: what is converted computes what the model did, and what does not fit is named.

The files are written by the code here, from the definition: Meta's RoPE turns neighbouring rows of a head, a shard has
the slices that its device computes with. `meta_logits` computes with them as Meta's definition says.
"""

import base64
import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import regex
import torch
import transformers
from conftest import write_tiny_tokenizer
from safetensors.torch import load_file, save_file

import convert_hf_checkpoint as script
from shell.cli import UserError
from text.tokenizer import Tokenizer
from weights import byte_level_bpe
from weights.checkpoint import load_model
from weights.meta_format import ConsolidatedWeights, half_split

TOKENS = torch.arange(3, 43)[None] * 7 % 512
LLAMA3_SCALING = {
    "rope_type": "llama3", "rope_theta": 500000.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
# What is peculiar to a version: of its params.json, of its configuration in transformers, and how shards cut the
# embedding.
VERSIONS = {
    "1": ({"vocab_size": -1, "norm_eps": 1e-6}, {"max_position_embeddings": 2048}, 1),
    "1-65b": ({"vocab_size": -1, "norm_eps": 1e-5, "n_layers": 80}, {"max_position_embeddings": 2048}, 1),
    "2": ({"vocab_size": -1, "norm_eps": 1e-5, "n_kv_heads": 4}, {"max_position_embeddings": 4096}, 1),
    "code": ({"rope_theta": 1e6}, {"max_position_embeddings": 16384, "rope_theta": 1e6}, 1),
    "3": (
        {"n_kv_heads": 4, "rope_theta": 500000.0, "use_scaled_rope": False},
        {"max_position_embeddings": 8192, "rope_theta": 500000.0},
        0,
    ),
    "3.1": (
        {"n_kv_heads": 4, "rope_theta": 500000.0, "use_scaled_rope": True, "ffn_dim_multiplier": 1.3},
        {"max_position_embeddings": 131072, "rope_parameters": {**LLAMA3_SCALING, "factor": 8.0}},
        0,
    ),
    "3.2": (
        {"n_kv_heads": 4, "rope_theta": 500000.0, "use_scaled_rope": True},
        {"max_position_embeddings": 131072, "rope_parameters": {**LLAMA3_SCALING, "factor": 32.0}},
        0,
    ),
}


def make_random(model):
    """A transformers model in fp32 with every parameter random."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.size(1) ** -0.5)
            else:
                parameter.normal_(mean=float("norm" in name), std=0.3)
    return model.float().eval()


def llama(version, vocab_size=512):
    """(a tiny random Llama, its params.json)."""
    more, settings, _ = VERSIONS[version]
    params = {"dim": 64, "n_layers": 2, "n_heads": 8, "multiple_of": 16, "norm_eps": 1e-5, "vocab_size": vocab_size}
    params |= more
    config = transformers.LlamaConfig(
        hidden_size=64, num_hidden_layers=params["n_layers"], num_attention_heads=8, vocab_size=vocab_size,
        num_key_value_heads=params.get("n_kv_heads", 8), rms_norm_eps=params["norm_eps"],
        intermediate_size=224 if "ffn_dim_multiplier" in params else 176,  # 170 or 221, up to a multiple of 16
        tie_word_embeddings=version == "3.2", **settings,
    )  # fmt: skip
    return make_random(transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager")), params


def own_tensors(model):
    """The tensors of a transformers Llama or Mistral under Meta's names, q and k in Meta's order of rows."""
    c, stored = model.config, model.state_dict()
    tensors = {
        "tok_embeddings.weight": stored["model.embed_tokens.weight"], "norm.weight": stored["model.norm.weight"],
        "output.weight": stored["lm_head.weight"], "rope.freqs": torch.ones(4),
    }  # fmt: skip
    names = {
        "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj", "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
    }  # fmt: skip
    d = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    for layer in range(c.num_hidden_layers):
        for name, theirs in names.items():
            tensor = stored[f"model.layers.{layer}.{theirs}.weight"]
            if name.endswith(
                ("wq", "wk")
            ):  # the rows 2i and 2i + 1 of a head are a pair, in transformers i and i + d/2
                order = [h * d + i // 2 + i % 2 * (d // 2) for h in range(len(tensor) // d) for i in range(d)]
                tensor = tensor[order]
            tensors[f"layers.{layer}.{name}.weight"] = tensor
    return tensors


def cut(tensors, shards, embedding_axis):
    """What each device has in tensor parallelism: heads and hidden units, or their inputs; norms whole."""
    axes = {"wo": 1, "w2": 1, "tok_embeddings": embedding_axis} | dict.fromkeys(
        ("wq", "wk", "wv", "w1", "w3", "output"), 0
    )
    parts = [{} for _ in range(shards)]
    for name, tensor in tensors.items():
        axis = axes.get(name.split(".")[-2])
        pieces = [tensor] * shards if axis is None else tensor.chunk(shards, axis)
        for part, piece in zip(parts, pieces, strict=True):
            part[name] = piece.clone()
    return parts


def write_meta(folder, tensors, params, shards=1, embedding_axis=0):
    """A folder in Meta's format."""
    folder.mkdir(parents=True)
    (folder / "params.json").write_text(json.dumps(params))
    for number, part in enumerate(cut(tensors, shards, embedding_axis)):
        torch.save(part, folder / f"consolidated.{number:02d}.pth")
    return folder


def meta_logits(tensors, params, tokens):
    """The definition: a Llama as Meta writes it, RoPE as a product of complex numbers. Tokens (T,) to logits (T, V)."""
    heads, kv_heads, T = params["n_heads"], params.get("n_kv_heads", params["n_heads"]), len(tokens)
    d = params["dim"] // heads
    angles = torch.arange(T)[:, None] / params.get("rope_theta", 10000.0) ** (torch.arange(0, d, 2) / d)
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]  # (T, 1, d/2)

    def norm(x, name):
        return x * (x.square().mean(-1, keepdim=True) + params["norm_eps"]).rsqrt() * tensors[f"{name}.weight"]

    def turned(x):
        return torch.view_as_real(torch.view_as_complex(x.reshape(T, -1, d // 2, 2)) * turns).flatten(2)

    x = tensors["tok_embeddings.weight"][tokens]
    for layer in range(params["n_layers"]):
        w = {name: tensors[f"layers.{layer}.attention.w{name}.weight"] for name in "qkvo"}
        w |= {name: tensors[f"layers.{layer}.feed_forward.{name}.weight"] for name in ("w1", "w2", "w3")}
        y = norm(x, f"layers.{layer}.attention_norm")
        q, k, v = turned(y @ w["q"].T), turned(y @ w["k"].T), (y @ w["v"].T).view(T, kv_heads, d)
        k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / d**0.5 + torch.full((T, T), -torch.inf).triu(1)
        x = x + torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1) @ w["o"].T
        y = norm(x, f"layers.{layer}.ffn_norm")
        x = x + (torch.nn.functional.silu(y @ w["w1"].T) * (y @ w["w3"].T)) @ w["w2"].T
    return norm(x, "norm") @ tensors["output.weight"].T


@torch.no_grad()
def check_logits(out, model, tokens=TOKENS):
    """What was written computes, here and in transformers, what the model does."""
    expected = model(tokens).logits
    torch.testing.assert_close(load_model(out, torch.float32)(tokens), expected, atol=1e-5, rtol=1e-5)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager").eval()
    torch.testing.assert_close(theirs(tokens).logits, expected, atol=1e-6, rtol=1e-6)
    for key in ("rope_parameters", "max_position_embeddings", "tie_word_embeddings", "model_type", "rms_norm_eps"):
        assert getattr(theirs.config, key) == getattr(model.config, key), key
    return theirs.config


def convert(source, out, **settings):
    script.main(script.Settings(source=source, out_dir=out, **settings))
    return out


# ---------------------------------------------------------------------------------------------------------- Meta's


@pytest.mark.parametrize("version", ["1", "2", "3"])
@torch.no_grad()
def test_the_files_here_are_in_metas_layout(version):
    """By Meta's definition they are the model: or the tests below would only prove that two errors agree."""
    model, params = llama(version)
    found = meta_logits(own_tensors(model), params, TOKENS[0])
    torch.testing.assert_close(found, model(TOKENS).logits[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("version", ["1", "2", "3", "3.1", "3.2"])
def test_logits(tmp_path, version, shards, capsys):
    model, params = llama(version)
    source = write_meta(tmp_path / "meta", own_tensors(model), params, shards, VERSIONS[version][2])
    check_logits(convert(source, tmp_path / "out"), model)
    text = capsys.readouterr().out
    assert f"{model.config.max_position_embeddings} is written, that of Llama {version}" in text
    assert "no tokenizer.model" in text
    factor = {"3.1": "8", "3.2": "32"}.get(version)
    assert ("factor for RoPE" in text) == bool(factor)
    assert not factor or f"factor for RoPE: {factor} is written" in text


@pytest.mark.parametrize("version", ["1-65b", "code"])
def test_context_of_models_that_look_like_others(tmp_path, version):
    model, params = llama(version)
    source = write_meta(tmp_path / "meta", own_tensors(model), {"model": params}, 2, 1)
    check_logits(convert(source, tmp_path / "out"), model)


def test_a_context_in_the_file_is_taken(tmp_path):
    model, params = llama("2")
    source = write_meta(tmp_path / "meta", own_tensors(model), params | {"max_seq_len": 77, "n_extra": None})
    out = convert(source, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["max_position_embeddings"] == 77


def test_a_tied_head_that_is_not_in_the_file(tmp_path):
    model, params = llama("3.2")
    tensors = own_tensors(model)
    del tensors["output.weight"]
    check_logits(convert(write_meta(tmp_path / "meta", tensors, params), tmp_path / "out"), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_written_as_they_are(tmp_path, dtype):
    model, params = llama("3.1")
    tensors = {name: tensor.to(dtype) for name, tensor in own_tensors(model.to(dtype)).items()}
    out = convert(write_meta(tmp_path / "meta", tensors, params, 2), tmp_path / "out")
    found = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert found.dtype == dtype
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


def test_as_a_user_runs_it(tmp_path, run_script):
    """A repository of Meta's, whose files are in original/."""
    model, params = llama("3.1")
    write_meta(tmp_path / "Llama" / "original", own_tensors(model), params, 4)
    out = tmp_path / "out"
    code, text, err = run_script("convert_hf_checkpoint.py", "--source", tmp_path / "Llama", "--out_dir", out)
    assert code == 0, err
    assert text.splitlines()[-1].startswith("next: python prepare_data.py")
    check_logits(out, model)


def test_rows_are_put_in_order_once():
    """`half_split` on its own: each row of a head's lower half was even, each of the upper one odd."""
    heads, d = random.randint(1, 5), 2 * random.randint(1, 6)
    rows = torch.randn(heads * d, 3)
    split = half_split(rows, heads)
    for head in range(heads):
        for i in range(d // 2):
            assert torch.equal(split[head * d + i], rows[head * d + 2 * i])
            assert torch.equal(split[head * d + d // 2 + i], rows[head * d + 2 * i + 1])


# ------------------------------------------------------------------------------------------------------- Mistral's


def mistral(**changes):
    """(a tiny random Mistral, its params.json)."""
    config = transformers.MistralConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=3,
        head_dim=16, rms_norm_eps=1e-5, max_position_embeddings=32768,
        **{"vocab_size": 512, "sliding_window": None, "rope_theta": 1e6} | changes,
    )  # fmt: skip
    model = make_random(transformers.MistralForCausalLM._from_config(config, attn_implementation="eager"))
    params = {
        "dim": 48, "n_layers": 3, "head_dim": 16, "hidden_dim": 80, "n_heads": 6, "n_kv_heads": 3, "norm_eps": 1e-5,
        "vocab_size": config.vocab_size, "rope_theta": 1e6,
    }  # fmt: skip
    return model, params


def write_mistral(folder, tensors, params, files=1):
    """A folder in Mistral's format: safetensors in one file or more, whole tensors each."""
    folder.mkdir(parents=True)
    (folder / "params.json").write_text(json.dumps(params))
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items() if name != "rope.freqs"}
    if files == 1:
        save_file(tensors, folder / "consolidated.safetensors")
        return folder
    place = {name: f"consolidated-{i % files + 1:05d}-of-{files:05d}.safetensors" for i, name in enumerate(tensors)}
    for file in set(place.values()):
        save_file({name: tensors[name] for name in tensors if place[name] == file}, folder / file)
    (folder / "consolidated.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    return folder


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("window", [None, 7])
def test_mistral_logits(tmp_path, files, window):
    model, params = mistral(sliding_window=window)
    params |= {"sliding_window": window, "max_seq_len": 32768, "moe": None, "model_type": "transformer"}
    source = write_mistral(tmp_path / "mistral", own_tensors(model), params, files)
    assert check_logits(convert(source, tmp_path / "out"), model).sliding_window == window


def test_mistral_in_a_pickle(tmp_path, capsys):
    """As Mistral 7B v0.1 first came."""
    model, params = mistral()
    check_logits(convert(write_meta(tmp_path / "mistral", own_tensors(model), params), tmp_path / "out"), model)
    assert "32768 is written, that of Mistral 7B" in capsys.readouterr().out


@pytest.mark.parametrize("in_file", [True, False])
def test_mistral_with_a_tied_head(tmp_path, in_file):
    model, params = mistral(tie_word_embeddings=True)
    tensors = own_tensors(model)
    if not in_file:
        del tensors["output.weight"]
    source = write_mistral(tmp_path / "mistral", tensors, params | {"tied_embeddings": True})
    check_logits(convert(source, tmp_path / "out"), model)


def test_hugging_faces_files_beside_mistrals_own_win(tmp_path, tiny_model_dir, capsys):
    source = tmp_path / "both"
    shutil.copytree(tiny_model_dir, source)
    save_file({"a": torch.ones(1)}, source / "consolidated.safetensors")
    (source / "params.json").write_text("{}")
    script.main(script.Settings(source=source))
    assert "nothing to convert" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------- downloads


def test_what_a_download_takes():
    own = {"params.json", "tokenizer.model", "consolidated.00.pth", "consolidated.01.pth"}
    names = {f"original/{name}" for name in own} | {"README.md", "config.json", "original/orig_params.json"}
    fetched = script.files_to_fetch("a/b", names | {"model.safetensors"})
    assert fetched == ["model.safetensors", "config.json", "README.md"]  # the last for its licence
    assert set(script.files_to_fetch("a/b", names)) == {f"original/{name}" for name in own} | {"README.md"}
    assert script.files_to_fetch("a/b", names)[0] == "original/consolidated.00.pth"
    names = {"consolidated.safetensors", "params.json", "tekken.json", "tokenizer.model.v3", "a/consolidated.00.pth"}
    assert set(script.files_to_fetch("a/b", names)) == names - {"a/consolidated.00.pth"}
    assert script.files_to_fetch("a/b", {"consolidated.00.pth", "consolidated.safetensors"}) == [
        "consolidated.safetensors"
    ]


def test_a_download_is_converted(tmp_path, monkeypatch):
    """Safetensors in Mistral's format are no model folder as they stand."""
    import huggingface_hub

    model, params = mistral()
    repo = write_mistral(tmp_path / "repo", own_tensors(model), params)
    (repo / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    siblings = [SimpleNamespace(rfilename=path.name, size=1) for path in repo.iterdir()]
    info = SimpleNamespace(sha="0", siblings=siblings)
    monkeypatch.setattr(huggingface_hub, "model_info", lambda *_, **__: info)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *_, local_dir, **__: shutil.copytree(repo, local_dir)
    )
    out = tmp_path / "checkpoints" / "model"
    script.main(script.Settings(repo_id="a/b", out_dir=out))
    check_logits(out, model)
    assert [path.name for path in out.parent.iterdir()] == ["model"]
    assert (out / "README.md").read_bytes() == (repo / "README.md").read_bytes()


# ------------------------------------------------------------------------------------------------------- tokenizers

TEXTS = [
    "", " ", "Hello world! 123", "  multiple   spaces", "Café déjà vu.", "a\n\n\nb\t\tc 12345 67.89 ½ ² Ⅷ", "日本語 😀",
    "'s 'S don't DON'T I'LL", "x" * 50 + " " * 20, "\r\n\r\n  y", "\u00a0\u3000z ~~ !!??", "The answer is 42, it was.",
    "<|eot_id|> [INST] <s>",
]  # fmt: skip


def ranked_tokens(tmp_path, count):
    """`count` tokens by rank, as training merges them: the bytes in a random order, then longer and longer ones."""
    write_tiny_tokenizer(tmp_path, 3 + count)
    letters = byte_level_bpe.LETTERS.items()
    byte_of = {letter: byte for byte, letter in letters}
    vocabulary = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = [bytes(map(byte_of.get, text)) for text in vocabulary if not text.startswith("<|")]
    single = [token for token in tokens if len(token) == 1]
    longer = sorted((token for token in tokens if len(token) > 1), key=lambda token: vocabulary[to_letters(token)])
    random.shuffle(single)
    longer[-1] = b"zqzqzq"  # no two parts of it are tokens: only a whole word is this one
    longer[-2] = b" wor"
    assert len(single) == 256 and len(longer) == count - 256
    return single + longer


def to_letters(token):
    return "".join(byte_level_bpe.LETTERS[byte] for byte in token)


def by_rank(text, pattern, tokens):
    """The definition: in each word the neighbours whose token has the lowest rank are merged, until none are left."""
    ranks, ids = {token: rank for rank, token in enumerate(tokens)}, []
    for word in regex.findall(pattern, text):
        word = word.encode()
        parts = [word] if word in ranks else [word[i : i + 1] for i in range(len(word))]
        while True:
            found = [
                (ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in ranks
            ]
            if not found:
                break
            _, place = min(found)
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def random_texts(tokens):
    """Texts made of tokens, of parts of them, and of the letters that are in them."""
    whole = [text for token in tokens if (text := token.decode(errors="ignore"))]
    return ["".join(random.choices(whole, k=random.randint(1, 30))) for _ in range(200)] + [
        "".join(random.choices("abdefglnorstuz .\n1é", k=random.randint(1, 40))) for _ in range(200)
    ]


@pytest.mark.parametrize("since_3_1", [False, True])
def test_tiktoken_vocabulary(tmp_path, since_3_1):
    tiktoken = pytest.importorskip("tiktoken")
    tokens = ranked_tokens(tmp_path, 500)
    model, params = llama("3.1" if since_3_1 else "3", 756)
    source = write_meta(tmp_path / "meta", own_tensors(model), params)
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]
    (source / "tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")
    out = convert(source, tmp_path / "out")
    check_logits(out, model)
    ours, theirs = Tokenizer(out), transformers.AutoTokenizer.from_pretrained(out)
    ranks = {token: rank for rank, token in enumerate(tokens)}
    library = tiktoken.Encoding("tiny", pat_str=byte_level_bpe.LLAMA3, mergeable_ranks=ranks, special_tokens={})
    for text in [*TEXTS, "zqzqzq zqzqzqz", *random_texts(tokens)]:
        expected = by_rank(text, byte_level_bpe.LLAMA3, tokens)
        assert ours.encode(text) == expected == library.encode_ordinary(text), text
        assert theirs.decode(expected) == ours.decode(expected) == text
    assert theirs("Hello").input_ids == [500, *ours.encode("Hello")]
    assert ours.encode("<|begin_of_text|><|start_header_id|><|eot_id|>", special=True) == [500, 506, 509]
    assert ours.begin_ids == (ours.bos_id,) == (500,) and ours.vocab_size == 756
    assert ours.eos_ids == ({501, 508, 509} if since_3_1 else {501, 509})
    assert ours.token_bytes(504) == (b"<|finetune_right_pad_id|>" if since_3_1 else b"<|reserved_special_token_2|>")
    assert ours.token_bytes(755) == (
        b"<|reserved_special_token_247|>" if since_3_1 else b"<|reserved_special_token_250|>"
    )
    config = json.loads((out / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (500, 501)


def test_merges_need_one_pair_for_each_token():
    """In an alphabet of three letters, where tokens overlap in all ways: as by the definition."""
    for _ in range(50):
        tokens = [b"a", b"b", b"c"]
        while len(tokens) < 40:
            token = (
                b"".join(random.choices(tokens, k=2)) if random.random() < 0.9 else bytes(random.choices(b"abc", k=4))
            )
            if token not in tokens:
                tokens.append(token)
        merges = [tuple(part.decode() for part in pair) for pair in byte_level_bpe.merges_by_rank(tokens)]
        ids = {token.decode(): rank for rank, token in enumerate(tokens)}
        tokenizer = byte_level_bpe.make_tokenizer(ids, merges, [r"\w+"], {}, None, True)
        for _ in range(100):
            text = "".join(random.choices("abc", k=random.randint(1, 30)))
            assert tokenizer.encode(text).ids == by_rank(text, r"\w+", tokens), (text, tokens)


def tekken(tokens, special):
    vocabulary = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for rank, token in enumerate(tokens)
    ]
    config = {
        "pattern": byte_level_bpe.TEKKEN, "num_vocab_tokens": len(tokens), "default_vocab_size": len(tokens) + 25 - 7,
        "default_num_special_tokens": 25, "version": "v3",
    }  # fmt: skip
    return {"config": config, "vocab": vocabulary} | ({"special_tokens": special} if special else {})


@pytest.mark.parametrize("named", [True, False])
def test_tekken_vocabulary(tmp_path, named):
    """The file has seven tokens more than the model. Its special tokens have the first ids."""
    tokens = ranked_tokens(tmp_path, 494)
    names = ["<unk>", "<s>", "</s>", "[A]"]
    special = [{"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(names)]
    model, params = mistral()
    source = write_mistral(tmp_path / "mistral", own_tensors(model), params)
    (source / "tekken.json").write_text(json.dumps(tekken(tokens, special if named else None)))
    (source / "tokenizer.model.v3").write_bytes(b"not read")
    out = convert(source, tmp_path / "out")
    ours, theirs = Tokenizer(out), transformers.AutoTokenizer.from_pretrained(out)
    for text in [*TEXTS, *random_texts(tokens)]:
        expected = [25 + rank for rank in by_rank(text, byte_level_bpe.TEKKEN, tokens[:487])]
        assert ours.encode(text) == expected, text
        assert ours.decode(expected) == text
    assert theirs("Hello").input_ids == [1, *ours.encode("Hello")]
    assert (ours.bos_id, ours.eos_ids, ours.begin_ids, ours.vocab_size) == (1, {2}, (1,), 512)
    assert ours.token_bytes(3) == (b"[A]" if named else b"[INST]") and ours.token_bytes(24) == b"<SPECIAL_24>"


def test_real_tekken_vocabulary(tmp_path):
    mistral_common = pytest.importorskip("mistral_common")
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    path = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
    vocabulary = byte_level_bpe.read_tekken(path)
    vocabulary.write(tmp_path)
    ours, theirs = Tokenizer(tmp_path), Tekkenizer.from_file(path)
    for text in [*TEXTS, *random_texts(vocabulary.tokens), (Path(__file__).parents[2] / "README.md").read_text()]:
        assert ours.encode(text) == theirs.encode(text, bos=False, eos=False), text
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (theirs.bos_id, theirs.eos_id, theirs.n_words)
    assert [entry["token_str"] for entry in theirs.DEPRECATED_SPECIAL_TOKENS] == byte_level_bpe.TEKKEN_SPECIAL


@pytest.mark.parametrize("format", ["meta", "mistral"])
def test_sentencepiece_vocabulary(tmp_path, format):
    mistral_common = pytest.importorskip("mistral_common")
    import sentencepiece

    real = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    if format == "meta":
        model, params = llama("2", 32000)
        source = write_meta(tmp_path / "own", own_tensors(model), params)
        shutil.copy(real, source / "tokenizer.model")
    else:
        model, params = mistral(vocab_size=32000)
        source = write_mistral(tmp_path / "own", own_tensors(model), params)
        shutil.copy(real, source / "tokenizer.model.v3")
        (source / "tokenizer.model").write_bytes(b"older")
    out = convert(source, tmp_path / "out")
    check_logits(out, model)
    ours, library = Tokenizer(out), sentencepiece.SentencePieceProcessor(str(real))
    for text in TEXTS[2:-1]:
        assert ours.encode(text) == library.encode(text), text
    assert (ours.bos_id, ours.eos_ids, ours.begin_ids) == (1, {2}, (1,))


# --------------------------------------------------------------------------------------------------------- mistakes


def change_shard(number, change):
    def spoil(folder):
        path = folder / f"consolidated.{number:02d}.pth"
        tensors = torch.load(path, weights_only=True)
        change(tensors)
        torch.save(tensors, path)

    return spoil


def change_params(**changes):
    def spoil(folder):
        path = folder / "params.json"
        values = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in values.items() if value != "remove"}))

    return spoil


def put(name, value):
    """Set a tensor's first value."""

    def change(tensors):
        tensors[name].view(-1)[0] = value

    return change


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


WQ, W1 = "layers.1.attention.wq.weight", "layers.0.feed_forward.w1.weight"
LARGER = b"".join(base64.b64encode(bytes([i]) if i < 256 else bytes([i - 256, 1])) + b" %d\n" % i for i in range(300))
META_MISTAKES = {
    "a shard is missing": (lambda f: (f / "consolidated.00.pth").unlink(), ["consolidated.00.pth is missing"]),
    "the last shard is missing": (lambda f: (f / "consolidated.01.pth").unlink(), ["1 of 2 shards"]),
    "params.json is missing": (lambda f: (f / "params.json").unlink(), ["params.json does not exist"]),
    "a shard is cut": (write("consolidated.01.pth", b"PK\x03\x04abc"), ["consolidated.01.pth", "damaged"]),
    "a shard runs code": (write("consolidated.01.pth", b"cos\nsystem\n(S'true'\ntR."), ["01.pth", "could run code"]),
    "a tensor is in one shard": (change_shard(1, lambda t: t.pop(WQ)), [WQ, "consolidated.01.pth", "only"]),
    "a slice is of another shape": (change_shard(1, lambda t: t.update({WQ: t[WQ][:-1]})), [WQ, "another shape"]),
    "a slice is of another dtype": (change_shard(1, lambda t: t.update({WQ: t[WQ].half()})), [WQ, "dtype in some"]),
    "a slice is NaN": (change_shard(1, put(WQ, float("nan"))), ["consolidated.01.pth", WQ, "NaN"]),
    "a name is a number": (change_shard(0, lambda t: t.update({5: t[WQ]})), ["00.pth", "tensors by name"]),
    "norms differ": (change_shard(1, put("norm.weight", 9.0)), ["01.pth", "norm.weight", "two models"]),
    "a key is not known": (change_params(vision_chunk_size=448), ["params.json", "vision_chunk_size = 448"]),
    "a size is a text": (change_params(n_heads="8"), ["params.json", "n_heads = 8"]),
    "a size is none": (change_params(n_layers=0), ["params.json", "n_layers = 0"]),
    "a number is too large": (change_params(rope_theta=10**400), ["params.json", "rope_theta = 1000"]),
    "there are more heads than numbers": (change_params(n_heads=128), ["params.json", "dim 64", "128"]),
    "a key is missing": (change_params(n_layers="remove"), ["params.json", "'n_layers' is missing"]),
    "a layer is missing": (change_params(n_layers=3), ["missing model.layers.2."]),
    "a layer is surplus": (change_params(n_layers=1), ["surplus model.layers.1."]),
    "the feed-forward size is another": (change_params(multiple_of=7), ["params.json", "175", "176"]),
    "heads are replicated": (change_params(n_kv_heads=2), ["k_proj.weight (32, 64) instead of (16, 64)"]),
    "the vocabulary is another": (change_params(vocab_size=500), ["tokens.weight (512, 64) instead of (500, 64)"]),
    "the tokenizer is of a larger model": (write("tokenizer.model", LARGER), ["556 tokens are more than the 512"]),
    "a line of the tokenizer is damaged": (write("tokenizer.model", b"YQ== 0\nY\n"), ["tokenizer.model:2 is damaged"]),
    "a rank is missing": (write("tokenizer.model", b"YQ== 0\nYg== 2\n"), ["tokenizer.model is damaged"]),
    "a byte has no token": (write("tokenizer.model", b"YQ== 0\nYg== 1\n"), ["tokenizer.model", "a byte has none"]),
    "the tokenizer is something else": (write("tokenizer.model", b"\0\1\2"), ["tokenizer.model is no SentencePiece"]),
    "the tokenizer is empty": (write("tokenizer.model", b""), ["tokenizer.model is no SentencePiece"]),
}  # fmt: skip


def check_refused(folder, tmp_path, says):
    with pytest.raises(UserError) as caught:
        convert(folder, tmp_path / "out")
    message = str(caught.value)
    assert "\n" not in message and all(text in message for text in says), message
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("mistake", META_MISTAKES)
def test_metas_files_that_do_not_fit(tmp_path, mistake):
    model, params = llama("2")
    spoil, says = META_MISTAKES[mistake]
    tensors = own_tensors(model)
    folder = write_meta(tmp_path / "meta", tensors, params, 2, 1)
    spoil(folder)
    check_refused(folder, tmp_path, says)


def drop(*names):
    """Write the file again without some tensors."""

    def spoil(folder):
        tensors = load_file(folder / "consolidated.safetensors")
        save_file({n: t for n, t in tensors.items() if n not in names}, folder / "consolidated.safetensors")

    return spoil


def rename_file(folder):
    (folder / "consolidated.safetensors").rename(folder / "consolidated-00001-of-00002.safetensors")


def hugging_faces_names(folder):
    save_file({"model.norm.weight": torch.ones(48)}, folder / "consolidated.safetensors")


TEKKEN_FILE = tekken([bytes([byte]) for byte in range(256)], None)
MISTRAL_MISTAKES = {
    "experts": (change_params(moe={"num_experts": 8}), ["params.json", "moe = {'num_experts': 8} is not supported"]),
    "images": (change_params(vision_encoder={"a": 1}), ["vision_encoder"]),
    "quantised": (change_params(quantization={"qformat_weight": "fp8_e4m3"}), ["quantization"]),
    "YaRN": (change_params(yarn={"factor": 4}), ["yarn"]),
    "windows by layer": (change_params(sliding_window=[7, 8]), ["sliding_window"]),
    "no head size": (change_params(head_dim="remove"), ["'head_dim' is missing"]),
    "another head size": (change_params(head_dim=8), ["q_proj.weight (96, 48) instead of (48, 48)"]),
    "a head that is tied and differs": (change_params(tied_embeddings=True), ["tied_embeddings", "differs"]),
    "a head that is not there": (
        lambda f: (change_params(tied_embeddings=False)(f), drop("output.weight")(f)), ["missing lm_head.weight"],
    ),
    "no embedding": (drop("tok_embeddings.weight"), ["missing model.embed_tokens.weight"]),
    "no index": (rename_file, ["consolidated.safetensors.index.json is missing"]),
    "names that are Hugging Face's": (hugging_faces_names, ["consolidated.safetensors", "model.norm.weight is not"]),
    "cut": (write("consolidated.safetensors", b"\1\2\3"), ["consolidated.safetensors is damaged"]),
    "tekken that is cut": (write("tekken.json", b'{"config": '), ["tekken.json"]),
    "tekken of another kind": (write("tekken.json", b'{"config": 1}'), ["tekken.json is damaged or of another"]),
    "tekken with too few tokens": (
        write("tekken.json", json.dumps(TEKKEN_FILE | {"vocab": TEKKEN_FILE["vocab"][:9]}).encode()),
        ["tekken.json", "9 tokens instead of 249"],
    ),
    "tekken without some bytes": (
        write("tekken.json", json.dumps(TEKKEN_FILE).encode()), ["tekken.json", "a byte has none"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTRAL_MISTAKES)
def test_mistrals_files_that_do_not_fit(tmp_path, mistake):
    model, params = mistral()
    spoil, says = MISTRAL_MISTAKES[mistake]
    folder = write_mistral(tmp_path / "mistral", own_tensors(model), params)
    spoil(folder)
    check_refused(folder, tmp_path, says)


def test_a_tensor_is_joined_without_a_second_copy(tmp_path, monkeypatch):
    """Beside the mapped files one tensor is allocated, as large as the whole one."""
    model, params = llama("3")
    weights = ConsolidatedWeights(write_meta(tmp_path / "meta", own_tensors(model), params, 2), params)
    allocated, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kw: allocated.append(empty(*args, **kw)) or allocated[-1])
    name = "model.layers.0.self_attn.q_proj.weight"
    assert weights.read(name).data_ptr() == allocated[0].data_ptr() and len(allocated) == 1
    assert torch.equal(allocated[0], model.state_dict()[name])
