"""A larger vocabulary: the folder that is written, against transformers; its tokens in data and in training."""

import json
import shutil

import pytest
import torch
import transformers
from conftest import SMALL
from families.tiny import distance
from safetensors.torch import load_file
from test_tokenizer import make_llama

import convert_hf_checkpoint
import finetune
import prepare_data
from batching import open_samples
from convert_hf_checkpoint import Settings
from text.tokenizer import Tokenizer
from weights.checkpoint import load_model, read_config

NEW = ["<|tool|>", "<|end_tool|>", "Größe"]
TEXT = "call <|tool|>look it up<|end_tool|> of Größe 3"


def grow(source, folder, **settings):
    convert_hf_checkpoint.main(Settings(source=source, out_dir=folder, add_tokens=NEW, **settings))
    return folder


@pytest.fixture(params=["llama", "llama-tied", "gpt_neox", "padded"])
def base(request, tiny_checkpoint, tiny_model_dir, tiny_models, tmp_path):
    """Model folders with a tokenizer of 512 tokens: untied, tied, of another family, and with 8 rows to spare."""
    folder = tmp_path / "base"
    if request.param in ("llama", "llama-tied"):
        shutil.copytree(tiny_checkpoint(request.param), folder)
    else:
        kind = {"gpt_neox": transformers.GPTNeoXForCausalLM, "padded": transformers.LlamaForCausalLM}[request.param]
        sizes = {key: value for key, value in SMALL.items() if key not in ("num_key_value_heads", "rms_norm_eps")}
        rows = 520 if request.param == "padded" else 512
        kind(kind.config_class(**{**sizes, "vocab_size": rows})).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model_dir / name, folder)
    return folder


@torch.no_grad()
def test_transformers_loads_it_and_sees_the_mean(base, tmp_path):
    """All old tokens as they were, and each new one with the mean of them, as transformers' own resizing has it."""
    folder = grow(base, tmp_path / "grown")
    before = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    after = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = max(515, before.config.vocab_size)
    assert after.config.vocab_size == read_config(folder).vocab_size == rows
    for module in ("get_input_embeddings", "get_output_embeddings"):
        old, new = (getattr(model, module)().weight for model in (before, after))
        assert torch.equal(new[:512], old[:512]) and len(new) == rows
        assert distance(new[512:], old[:512].mean(0).expand(rows - 512, -1)) < 1e-5
    tokens = torch.randint(3, 512, (2, 9))
    assert distance(after(tokens).logits[..., :512], before(tokens).logits[..., :512]) < 1e-5
    assert distance(load_model(folder, torch.float32)(tokens), after(tokens).logits) < 1e-5
    tied = before.config.tie_word_embeddings
    assert after.config.tie_word_embeddings == tied
    assert any("lm_head" in name or "embed_out" in name for name in load_file(folder / "model.safetensors")) == (
        not tied
    )


def test_new_tokens_are_one_id_in_transformers_and_in_ours(base, tmp_path):
    folder = grow(base, tmp_path / "grown")
    ours, theirs = Tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    ids = ours.encode(TEXT, special=True)
    assert [ids.count(id) for id in (512, 513, 514)] == [1, 1, 1]
    assert ids == theirs.encode(TEXT, add_special_tokens=False)
    assert ours.decode(ids, skip_special=False) == TEXT  # transformers decodes what is not ASCII to bytes' letters
    assert theirs.decode(ids).replace("Gr\ufffd\ufffde", "Größe") == TEXT
    assert ours.decode(ids) == "call look it up of  3"
    assert not {512, 513, 514} & {*ours.encode(TEXT)}  # a user's text is no template
    old = Tokenizer(base)
    assert old.encode("all the rest") == ours.encode("all the rest") and ours.eos_ids == old.eos_ids


def test_tokens_that_are_not_special_are_found_in_a_users_text(base, tmp_path):
    folder = grow(base, tmp_path / "grown", add_special=False)
    ours, theirs = Tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    ids = ours.encode(TEXT)
    assert {512, 513, 514} <= {*ids} and ids == theirs.encode(TEXT, add_special_tokens=False)
    assert ours.decode(ids) == TEXT


def test_a_folder_that_lists_its_added_tokens(base, tmp_path):
    """As transformers writes it: the new ones are on the list."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(base)
    path = base / "tokenizer_config.json"
    listed = {"0": "<|endoftext|>", "1": "<|im_start|>", "2": "<|im_end|>"}
    values = json.loads(path.read_text())
    values["added_tokens_decoder"] = {id: {"content": text, "special": True} for id, text in listed.items()}
    path.write_text(json.dumps(values))
    folder = grow(base, tmp_path / "grown")
    values = json.loads((folder / "tokenizer_config.json").read_text())
    assert [token["content"] for token in values["added_tokens_decoder"].values()] == [*listed.values(), *NEW]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.encode(TEXT, add_special_tokens=False) == Tokenizer(folder).encode(TEXT, special=True)


def test_sentencepiece_alone(tmp_path):
    """The list in tokenizer_config.json is all that there is to write to."""
    base = make_llama(tmp_path / "base")
    config = transformers.LlamaConfig(**{**SMALL, "vocab_size": 32000})
    transformers.LlamaForCausalLM(config).save_pretrained(base)
    folder = grow(base, tmp_path / "grown")
    assert not (folder / "tokenizer.json").exists()
    ours, before = Tokenizer(folder), Tokenizer(base)
    ids = ours.encode(TEXT, special=True)
    assert [ids.count(id) for id in (32000, 32001, 32002)] == [1, 1, 1]
    assert ours.decode(ids, skip_special=False).replace(" ", "") == TEXT.replace(" ", "")  # each text has its prefix
    assert ours.encode("all the rest") == before.encode("all the rest")
    assert (ours.bos_id, ours.eos_id, ours.begin_ids) == (before.bos_id, before.eos_id, before.begin_ids)


def test_new_tokens_train_alone(tiny_model_dir, tmp_path):
    """Prepared, trained by their rows alone, and saved: of a template's tokens and of a text's."""
    folder = grow(tiny_model_dir, tmp_path / "grown", add_special=False)
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"look for {i}", "completion": f"<|tool|>{i}<|end_tool|>"} for i in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepared = tmp_path / "data"
    prepare_data.main(prepare_data.Settings(data=data, checkpoint_dir=folder, out_dir=prepared, val_fraction=0))
    samples = open_samples(prepared, "train")
    tokens = torch.cat([samples.stored(i)[0] for i in range(len(samples))])
    assert ((tokens == 512).sum(), (tokens == 513).sum()) == (12, 12)
    s = finetune.Settings(
        checkpoint_dir=folder, data_dir=prepared, out_dir=tmp_path / "run", precision="32-true", max_steps=20,
        global_batch_size=8, learning_rate=0.1, warmup_steps=0, lora_r=1, lora_targets=["q_proj"], lora_layers=[0],
        lora_modules_to_save=["lm_head"], lora_tokens=["<|tool|>", "<|end_tool|>"], eval_interval=0,
    )  # fmt: skip
    finetune.main(s)
    losses = [float(line.split(",")[2]) for line in (tmp_path / "run" / "metrics.csv").read_text().splitlines()[1:]]
    assert losses[-1] < 0.5 * losses[0]
    rows = load_file(tmp_path / "run" / "final" / "adapter_model.safetensors")
    (name,) = (name for name in rows if "trainable_tokens_delta" in name)
    before = load_model(folder, torch.float32).model.embed_tokens.weight
    assert distance(rows[name], before[[512, 513]]) > 0.1
