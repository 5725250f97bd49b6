"""Model folders: what is refused, what is written, and how much memory it takes; folders that are whole or absent."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import FAMILIES, ROOT
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from model import Transformer
from shell import files
from shell.cli import UserError
from shell.files import MANIFEST, check_manifest, new_folder
from weights import checkpoint, stored
from weights.checkpoint import load_model, read_config, save_model, write_weights
from weights.families import config_from_json
from weights.merge import Tuned
from weights.stored import INDEX, Weights

WEIGHTS = "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    """A copy of the tiny Llama that a test may damage."""
    for file in tiny_checkpoint("llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def change_tensors(folder, change, name=WEIGHTS):
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name, metadata={"format": "pt"})


def change_config(folder, **changes):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))


def split(folder):
    """The same model in two files with an index."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for name, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, folder / name, metadata={"format": "pt"})
    (folder / WEIGHTS).unlink()
    change_index(folder, {key: name for name, keys in parts.items() for key in keys})


def change_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# ------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_load_puts_every_tensor_in_its_place(tiny_checkpoint, family, dtype):
    model = load_model(tiny_checkpoint(family), dtype)
    stored = load_file(tiny_checkpoint(family) / WEIGHTS)
    stored.setdefault("lm_head.weight", stored["model.embed_tokens.weight"])
    parameters = model.state_dict()
    assert parameters.keys() == stored.keys()
    for name, parameter in parameters.items():
        assert torch.equal(parameter, stored[name].to(dtype)), name
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == model.config.tie_word_embeddings


def test_several_files_with_and_without_index(tiny_checkpoint, folder):
    expected = load_model(tiny_checkpoint("llama"), torch.float32).state_dict()
    split(folder)
    for _ in range(2):
        state = load_model(folder, torch.float32).state_dict()
        assert all(torch.equal(state[name], expected[name]) for name in expected)
        (folder / INDEX).unlink(missing_ok=True)


def test_a_loaded_model_is_independent_of_its_files(folder):
    model = load_model(folder, torch.float32)
    before = model.state_dict()[UP].clone()
    (folder / WEIGHTS).write_bytes(b"\0" * (folder / WEIGHTS).stat().st_size)
    assert torch.equal(model.state_dict()[UP], before)


def test_what_old_files_hold_besides_is_ignored(tiny_checkpoint, folder):
    change_tensors(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    load_model(folder, torch.float32)


# ------------------------------------------------------------------------------------------------ head and embedding


@pytest.fixture
def tied_folder(tiny_checkpoint, tmp_path):
    """A copy of the tiny Llama whose config.json ties the head."""
    for file in tiny_checkpoint("llama-tied").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def logits_of_transformers(folder, tokens):
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()(tokens).logits


def assert_as_in_transformers(folder):
    """Loaded whole and block by block, and as `read_config` says. Returns the model."""
    tokens, model = torch.randint(512, (1, 12)), load_model(folder, torch.float32)
    expected = logits_of_transformers(folder, tokens)
    values = json.loads((folder / "config.json").read_text())
    for logits in (model(tokens), Tuned(values, Weights(folder)).logits(tokens)):
        assert (logits - expected).norm() < 1e-5 * expected.norm()
    assert read_config(folder) == model.config
    assert model.config.tie_word_embeddings == (model.lm_head.weight is model.model.embed_tokens.weight)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stored_head_that_equals_a_tied_embedding_changes_nothing(tied_folder, dtype, capsys):
    def store(tensors):
        tensors["model.embed_tokens.weight"] = tensors[
            "model.embed_tokens.weight"
        ].bfloat16()  # so that both can hold it
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].to(dtype, copy=True)

    change_tensors(tied_folder, store)
    assert (
        load_model(tied_folder, torch.float32).config.tie_word_embeddings
        and read_config(tied_folder).tie_word_embeddings
    )
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("sharded", [False, True])
def test_a_stored_head_that_differs_is_kept(tied_folder, sharded, capsys, monkeypatch):
    """As in transformers 5, whatever config.json says."""
    monkeypatch.setattr(stored, "PIECE", 1000)

    def store(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"][-1, -1] += 1  # the last bytes that are compared

    change_tensors(tied_folder, store)
    if sharded:
        split(tied_folder)
    model = assert_as_in_transformers(tied_folder)
    assert not model.config.tie_word_embeddings
    err = capsys.readouterr().err
    notes = [line for line in err.splitlines() if line.startswith("note")]
    assert len(notes) == 1 and str(tied_folder) in notes[0] and "lm_head.weight that differs" in notes[0]
    with new_folder(tied_folder / "again", {}) as folder:
        save_model(model, folder, tied_folder)
    assert json.loads((tied_folder / "again" / "config.json").read_text())["tie_word_embeddings"] is False
    again = assert_as_in_transformers(tied_folder / "again")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_a_tied_model_whose_file_has_only_the_head(tied_folder):
    change_tensors(tied_folder, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    model = assert_as_in_transformers(tied_folder)
    assert model.config.tie_word_embeddings
    change_config(tied_folder, tie_word_embeddings=False)
    with pytest.raises(UserError, match="missing model.embed_tokens.weight"):
        load_model(tied_folder, torch.float32)


def test_a_config_can_be_read_without_weights(tied_folder):
    (tied_folder / WEIGHTS).unlink()
    assert read_config(tied_folder).tie_word_embeddings


# --------------------------------------------------------------------------------- files that lie beside the weights


def noted(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if "left aside" in line]


@pytest.mark.parametrize(
    "name", ["consolidated.safetensors", "adapter_model.safetensors", "model-00001-of-00002.safetensors"]
)
def test_the_one_file_of_a_small_model_comes_first(tiny_checkpoint, folder, name, capsys):
    save_file({"a": torch.ones(1)}, folder / name)
    change_index(folder, {"a": "is_gone.safetensors"})
    state, expected = (
        load_model(folder, torch.float32).state_dict(),
        load_model(tiny_checkpoint("llama"), torch.float32),
    )
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.state_dict().items())
    (line,) = noted(capsys)
    assert f"read from {WEIGHTS}; left aside: {name}, {INDEX}" in line and str(folder) in line
    load_model(folder, torch.float32)
    assert noted(capsys) == []  # once in a process
    tokens = torch.randint(512, (1, 9))
    assert torch.allclose(logits_of_transformers(folder, tokens), expected(tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("indexed", [True, False])
def test_files_of_another_kind_are_left_aside(folder, indexed, capsys):
    split(folder)
    for name in ("a", "b"):
        (folder / f"{name}.safetensors").rename(folder / f"model-{name}.safetensors")
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    change_index(folder, {key: f"model-{name}" for key, name in weight_map.items()})
    if not indexed:
        (folder / INDEX).unlink()
    for name in ("consolidated-1.safetensors", "adapter_model.safetensors", "optimizer.safetensors", "c.safetensors"):
        save_file({"a": torch.ones(1)}, folder / name)
    load_model(folder, torch.float32)
    (line,) = noted(capsys)
    assert (
        "2 files, model-a.safetensors and so on; left aside: adapter_model.safetensors, c.safetensors, consol" in line
    )
    assert "optimizer" not in line  # ours, in a checkpoint to resume from


def poison(value):
    return lambda folder: change_tensors(folder, lambda tensors: tensors[UP].view(-1)[77:78].fill_(value))


def truncate(size, name=WEIGHTS):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def misshape(tensors):
    tensors[UP] = tensors[UP].T.contiguous()


def swap_index_name(new):
    def damage(folder):
        split(folder)
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        change_index(folder, {**weight_map, UP: new})

    return damage


def lose_a_shard(folder):
    split(folder)
    (folder / "b.safetensors").unlink()


def shard_twice(folder):
    (folder / WEIGHTS).rename(folder / "model-a.safetensors")
    (folder / "model-b.safetensors").write_bytes((folder / "model-a.safetensors").read_bytes())


def only_an_index(text):
    def damage(folder):
        (folder / WEIGHTS).unlink()
        (folder / INDEX).write_text(text)

    return damage


def only_beside(folder):
    (folder / WEIGHTS).rename(folder / "consolidated.safetensors")


def remove_config(folder):
    (folder / "config.json").unlink()


DAMAGES = {
    "missing": (lambda f: change_tensors(f, lambda t: t.pop(UP)), f"missing {UP}"),
    "surplus": (lambda f: change_tensors(f, lambda t: t.update({"model.extra": torch.ones(2)})), "surplus model.extra"),
    "surplus layer": (lambda f: change_config(f, num_hidden_layers=2), "surplus model.layers.2.* and 9 more|surplus"),
    "missing layer": (lambda f: change_config(f, num_hidden_layers=4), "missing model.layers.3"),
    "missing bias": (lambda f: change_tensors(f, lambda t: t.pop(UP[:-6] + "bias")), f"missing {UP[:-6]}bias"),
    "surplus biases": (lambda f: change_config(f, mlp_bias=False), "surplus model.layers.0.mlp"),
    "misshapen": (lambda f: change_tensors(f, misshape), rf"misshapen {UP} \(48, 80\) instead of \(80, 48\)"),
    "another width": (lambda f: change_config(f, hidden_size=64, head_dim=8), r"misshapen model.embed_tokens.weight"),
    "NaN": (poison(float("nan")), f"{UP} holds NaN"),
    "infinity": (poison(float("-inf")), f"{UP} holds NaN or infinity"),
    "truncated": (truncate(-1), WEIGHTS),
    "header truncated": (truncate(100), WEIGHTS),
    "empty": (truncate(0), WEIGHTS),
    "a web page": (lambda f: (f / WEIGHTS).write_text("<html>not found</html>"), WEIGHTS),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "no \\*.safetensors"),
    "a lost shard": (lose_a_shard, "b.safetensors"),
    "index names another file": (swap_index_name("c.safetensors"), "c.safetensors"),
    "index leaves the folder": (swap_index_name("../model.safetensors"), r"\.\./model.safetensors"),
    "index names a full path": (swap_index_name("/etc/hostname"), "/etc/hostname"),
    "index names no file": (swap_index_name(None), INDEX),
    "index broken": (only_an_index("{"), INDEX),
    "index is a list": (only_an_index("[]"), INDEX),
    "index without map": (only_an_index("{}"), INDEX),
    "index with a list": (only_an_index('{"weight_map": ["a.safetensors"]}'), INDEX),
    "twice": (shard_twice, "lm_head.weight.*is in.*too"),
    "only Mistral's own file": (only_beside, r"\(only consolidated.safetensors, which is not read as a model\)"),
    "no config": (remove_config, "config.json does not exist"),
    "config truncated": (truncate(40, "config.json"), "config.json"),
    "config not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json"),
    "another architecture": (lambda f: change_config(f, model_type="gpt_neox"), "config.json.*gpt_neox"),
    "config of odd types": (lambda f: change_config(f, num_attention_heads="six"), "config.json"),
    "no heads": (lambda f: change_config(f, num_attention_heads=0), "config.json"),
}


@pytest.mark.parametrize("damage, named", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_model_is_refused_in_one_line(folder, damage, named):
    load_model(folder, torch.bfloat16)
    damage(folder)
    with pytest.raises(UserError, match=named) as error:
        load_model(folder, torch.bfloat16)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="nothing does not exist"):
        load_model(tmp_path / "nothing", torch.float32)


def test_an_unknown_quantizer(folder):
    with pytest.raises(UserError, match="bnb.nf4-dq"):
        load_model(folder, torch.float32, quantize="nf4")


@pytest.mark.parametrize("quantize", [None, "bnb.nf4"])
def test_a_value_that_only_overflows_in_fp16_is_not_hidden(folder, quantize):
    """1e30 is a fine bf16 weight and infinity in fp16."""
    change_tensors(folder, lambda tensors: tensors["model.norm.weight"].view(-1)[:1].fill_(1e30))
    load_model(folder, torch.bfloat16, quantize=quantize)
    with pytest.raises(UserError, match="model.norm.weight"):
        load_model(folder, torch.float16, quantize=quantize)


# ------------------------------------------------------------------------------------------------------- writing


def some_tensors():
    return {
        "a.fp32": torch.randn(5, 7),
        "b.bf16": torch.randn(3, 2, 2).bfloat16(),
        "c.fp16": torch.randn(9).half(),
        "d.one": torch.randn(1).bfloat16(),
        "e.scalar": torch.tensor(3.5),
        "f.empty": torch.zeros(0, 4).half(),
        "g.transposed": torch.randn(6, 3).T,
        "h.slice": torch.randn(10, 10).bfloat16()[2:5, ::2],
        "i.parameter": torch.nn.Parameter(torch.randn(4)),
        "j.odd": torch.randn(3).half(),
        "k.special": torch.tensor([float("nan"), float("-inf"), -0.0, 1e-45]),
    }


def layout_of(tensors):
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def bits(tensor):
    return tensor.detach().contiguous().flatten().view(torch.uint8)


@pytest.mark.parametrize("shard_bytes, count", [(10**9, 1), (100, None), (1, None)])
def test_written_bytes_are_read_back_by_the_library(tmp_path, shard_bytes, count):
    tensors, asked = some_tensors(), []

    def read(name):
        asked.append(name)
        return tensors[name]

    write_weights(tmp_path, layout_of(tensors), read, shard_bytes)
    assert asked == list(tensors)
    paths = sorted(tmp_path.glob("*.safetensors"))
    assert count is None or [path.name for path in paths] == [WEIGHTS]
    found = {}
    for path in paths:
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            for name in file.keys():  # noqa: SIM118 (not a dict)
                assert name not in found
                found[name] = path.name
                tensor = file.get_tensor(name)
                assert (tensor.dtype, tensor.shape) == (tensors[name].dtype, tensors[name].shape)
                assert torch.equal(bits(tensor), bits(tensors[name])), name
    assert found.keys() == tensors.keys()
    if count is None:
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["weight_map"] == found and len(paths) > 3
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
        for path in paths:
            size = sum(tensor.nbytes for tensor in load_file(path).values())
            assert size <= shard_bytes or len(load_file(path)) == 1 or size - shard_bytes <= 0
    else:
        assert not (tmp_path / INDEX).exists()


def test_a_tensor_that_is_not_as_announced_is_not_written(tmp_path):
    layout = {"a": (torch.float32, (2, 2))}
    for wrong in (torch.zeros(2, 2).half(), torch.zeros(4)):
        with pytest.raises(AssertionError, match="a"):
            write_weights(tmp_path, layout, lambda name, wrong=wrong: wrong)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shard_bytes", [10**9, 40_000])
def test_transformers_loads_what_we_write(tiny_checkpoint, tmp_path, family, shard_bytes, monkeypatch):
    from transformers import AutoModelForCausalLM

    model = load_model(tiny_checkpoint(family), torch.float32)
    monkeypatch.setattr(write_weights, "__defaults__", (shard_bytes,))
    save_model(model, tmp_path, tiny_checkpoint(family))
    assert (tmp_path / INDEX).exists() == (shard_bytes < 10**9)
    assert (tmp_path / "generation_config.json").is_file()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32)
    tokens = torch.randint(512, (2, 9))
    with torch.no_grad():
        logits = theirs(tokens).logits
        assert (model(tokens) - logits).norm() / logits.norm() < 1e-5
    again = load_model(tmp_path, torch.float32)
    assert torch.equal(again(tokens), model(tokens))


@pytest.mark.parametrize("make", ["AdamW", "AdamW fused", "SGD momentum", "AdamW8bit"])
def test_optimizer_resumes_where_it_was(tmp_path, make):
    def optimizer_over(parameters):
        if make == "AdamW8bit":
            import bitsandbytes

            return bitsandbytes.optim.AdamW8bit(parameters, lr=1e-2)
        if make == "SGD momentum":
            return torch.optim.SGD(parameters, lr=1e-2, momentum=0.9)
        return torch.optim.AdamW(parameters, lr=1e-2, fused=make == "AdamW fused")

    def step(parameters, optimizer, number):
        generator = torch.Generator().manual_seed(number)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()

    start = [torch.randn(64, 128), torch.randn(33), torch.randn(100, 100)]
    parameters = [torch.nn.Parameter(tensor.clone()) for tensor in start]
    optimizer = optimizer_over(parameters)
    for number in range(3):
        step(parameters, optimizer, number)
    checkpoint.save_optimizer(optimizer, tmp_path)
    resumed = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    other = optimizer_over(resumed)
    checkpoint.load_optimizer(other, tmp_path)
    fresh = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    forgetful = optimizer_over(fresh)
    for number in range(3, 6):
        step(parameters, optimizer, number)
        step(resumed, other, number)
        step(fresh, forgetful, number)
    assert all(torch.equal(a, b) for a, b in zip(parameters, resumed, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(parameters, fresh, strict=True))


# -------------------------------------------------------------------------------------- folders, whole or absent


def fill(folder, text):
    (folder / "a.txt").write_text(text)
    (folder / "b.bin").write_bytes(os.urandom(5000))


def test_new_folder_appears_whole(tmp_path):
    with new_folder(tmp_path / "sub" / "final") as folder:
        fill(folder, "one")
        assert not (tmp_path / "sub" / "final").exists()
    assert sorted(os.listdir(tmp_path / "sub")) == ["final"]
    assert sorted(os.listdir(tmp_path / "sub" / "final")) == ["a.txt", "b.bin", MANIFEST]
    check_manifest(tmp_path / "sub" / "final")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_nothing(tmp_path, error):
    with pytest.raises(error), new_folder(tmp_path / "final") as folder:
        fill(folder, "one")
        raise error
    assert os.listdir(tmp_path) == []


def test_an_existing_folder_is_replaced_whole_or_kept(tmp_path):
    with new_folder(tmp_path / "final") as folder:
        fill(folder, "one")
        (folder / "only in the first").touch()
    with pytest.raises(ValueError), new_folder(tmp_path / "final") as folder:
        fill(folder, "two")
        raise ValueError
    assert (tmp_path / "final" / "a.txt").read_text() == "one"
    check_manifest(tmp_path / "final")
    with new_folder(tmp_path / "final") as folder:
        fill(folder, "three")
        assert (tmp_path / "final" / "a.txt").read_text() == "one"
    assert (tmp_path / "final" / "a.txt").read_text() == "three"
    assert not (tmp_path / "final" / "only in the first").exists()
    assert os.listdir(tmp_path) == ["final"]
    check_manifest(tmp_path / "final")


def test_leftovers_of_a_killed_run_are_cleared(tmp_path):
    (tmp_path / ".final.tmp").mkdir()
    (tmp_path / ".final.tmp" / "half").touch()
    with new_folder(tmp_path / "final") as folder:
        fill(folder, "one")
    assert os.listdir(tmp_path) == ["final"]
    assert not (tmp_path / "final" / "half").exists()


@pytest.mark.parametrize("how", ["error", "killed"])
def test_the_old_folder_survives_a_failure_between_the_two_renames(tmp_path, how, monkeypatch):
    target = tmp_path / "final"
    with new_folder(target) as folder:
        fill(folder, "one")
    monkeypatch.setattr(files, "_exchange", lambda *_: False)  # as where the file system cannot
    if how == "killed":
        target.rename(tmp_path / ".final.old")
    else:
        rename = files.Path.rename

        def failing(path, new):
            if path.name == ".final.tmp":
                raise OSError("disk on fire")
            return rename(path, new)

        monkeypatch.setattr(files.Path, "rename", failing)
    with pytest.raises(OSError if how == "error" else KeyboardInterrupt), new_folder(target) as folder:
        fill(folder, "two")
        if how == "killed":
            raise KeyboardInterrupt
    assert (target / "a.txt").read_text() == "one"
    assert os.listdir(tmp_path) == ["final"]
    check_manifest(target)


def test_manifest_finds_a_flipped_bit_and_a_missing_file(tmp_path):
    for damage in ("flip", "shorten", "remove", "no manifest", "broken manifest"):
        with new_folder(tmp_path / "final") as folder:
            fill(folder, "one")
        path = tmp_path / "final" / "b.bin"
        content = bytearray(path.read_bytes())
        named = "b.bin"
        if damage == "flip":
            content[2500] ^= 1
            path.write_bytes(content)
        elif damage == "shorten":
            path.write_bytes(content[:-1])
        elif damage == "remove":
            path.unlink()
        else:
            path, named = tmp_path / "final" / MANIFEST, MANIFEST
            path.unlink() if damage == "no manifest" else path.write_text("{")
        with pytest.raises(UserError, match=named):
            check_manifest(tmp_path / "final")


# -------------------------------------------------------------------------------------------------------- memory

MEASURE = """
import sys
import torch, bitsandbytes, lora
from weights import checkpoint
torch.set_num_threads(1)

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

folder, quantize, adapter = sys.argv[1:]
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = peak()
model = checkpoint.load_model(folder, torch.bfloat16, quantize=quantize or None)
if adapter:
    lora.add_lora(model, lora.AdapterConfig(adapter, r=8))
grown = peak() - before
size = sum(parameter.nbytes for parameter in model.parameters())
size += sum(module.nbytes() for module in model.modules() if hasattr(module, "nbytes"))
print(grown, size, max(parameter.nbytes for parameter in model.parameters()))
"""


@pytest.fixture(scope="module")
def half_a_gigabyte(tmp_path_factory):
    """A random Llama of 557 MB in bf16."""
    folder = tmp_path_factory.mktemp("big")
    values = dict(
        model_type="llama", vocab_size=32000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=14,
        num_attention_heads=16, num_key_value_heads=4, rms_norm_eps=1e-5, max_position_embeddings=512,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values))
    with torch.device("meta"):
        model = Transformer(config_from_json(values))
    layout = {name: (torch.bfloat16, tuple(parameter.shape)) for name, parameter in model.named_parameters()}
    noise = torch.randn(32000 * 1024).bfloat16() / 50
    write_weights(folder, layout, lambda name: noise[: torch.Size(layout[name][1]).numel()].view(layout[name][1]))
    yield folder
    (folder / WEIGHTS).unlink()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("quantize", ["", "bnb.nf4", "bnb.int8"])
def test_peak_memory_is_the_finished_model_and_little_more(half_a_gigabyte, quantize):
    command = [sys.executable, "-c", MEASURE, str(half_a_gigabyte), quantize, ""]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown, size, largest = map(int, done.stdout.split())
    figures = f"grown {grown / 1e6:.0f} MB, model {size / 1e6:.0f} MB, largest tensor {largest / 1e6:.0f} MB"
    print(figures)
    assert size > 400e6 if not quantize else 200e6 < size < 400e6, figures
    assert 0.9 * size < grown < size + largest + 100e6, figures
