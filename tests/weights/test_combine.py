"""Several adapters as one, against PEFT's `add_weighted_adapter`, tensor for tensor."""

import json
import shutil

import peft
import pytest
import torch
import transformers
from conftest import SEED, tiny_reference
from peft.tuners.lora import model as peft_model
from safetensors.torch import load_file, save_file

import convert_hf_checkpoint
import lora
from shell.cli import UserError
from shell.files import read_json
from text.tokenizer import Tokenizer
from weights import combine as combination
from weights import peft_format
from weights.checkpoint import load_model, model_of
from weights.combine import COMBINATIONS, Options
from weights.stored import Weights

SAME_RANK = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
WEIGHTS = [0.7, -0.4, 1.3]


def make_adapter(folder, base, **config):
    """A folder with a LoRA adapter of random numbers."""
    model, config = load_model(base, torch.float32), lora.AdapterConfig(**config)
    lora.add_lora(model, config)
    for adapter in lora.adapters(model).values():
        adapter.lora_A.data.normal_()
        adapter.lora_B.data.normal_()
    folder.mkdir()
    peft_format.save_adapter(model, config, folder, base)
    (folder / "onetune.json").write_text(json.dumps({"prompt_style": "plain", "checkpoint_dir": str(base)}))
    return folder


@pytest.fixture(scope="module")
def base(tiny_model_dir):
    return tiny_model_dir


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    """Adapters of one rank and of different scales, on different layers."""
    top = tmp_path_factory.mktemp("combined")
    torch.manual_seed(SEED)
    return [
        make_adapter(top / "a", base, r=4, alpha=8),
        make_adapter(top / "b", base, r=4, alpha=3, rslora=True, targets=("q_proj", "v_proj")),
        make_adapter(top / "c", base, r=4, alpha=4, targets=("q_proj", "up_proj"), alpha_pattern={"up_proj": 9}),
    ]


@pytest.fixture(scope="module")
def unequal(folders, base):
    return [*folders[:2], make_adapter(folders[0].parent / "d", base, r=7, alpha=7, rank_pattern={"o_proj": 3})]


def combined(base, folders, kind, weights, **options):
    """{layer: (A, B)} and the config of a combination."""
    seed = options.pop("seed", 0)
    values = read_json(base / "config.json")
    _, model, stored = model_of(values, Weights(base))
    options = Options(**options, generator=torch.Generator().manual_seed(seed))
    config = combination.combine(model, stored, folders, kind, weights, options)
    return {name: (a.lora_A.detach(), a.lora_B.detach()) for name, a in lora.adapters(model).items()}, config


def by_peft(folders, kind, weights, monkeypatch, seed=0, **options):
    """The same by PEFT. It draws numbers for the new adapter's start before the combination draws its own."""
    reference = peft.PeftModel.from_pretrained(tiny_reference("llama"), folders[0], adapter_name="0")
    names = [str(number) for number in range(len(folders))]
    for name, folder in zip(names[1:], folders[1:], strict=True):
        reference.load_adapter(folder, name)
    before = peft_model._freeze_adapter

    def freeze(*args):
        before(*args)
        torch.manual_seed(seed)

    monkeypatch.setattr(peft_model, "_freeze_adapter", freeze)
    reference.base_model.add_weighted_adapter(names, weights, "new", combination_type=kind, **options)
    layers = {name.removeprefix("base_model.model."): module for name, module in reference.named_modules()}
    return {
        name: (module.lora_A["new"].weight.detach(), module.lora_B["new"].weight.detach())
        for name, module in layers.items()
        if "new" in getattr(module, "lora_A", {})
    }


def assert_same(found, expected, tolerance=1e-5):
    """Of the same layers; PEFT fills up with zeros where fewer adapters are on a layer."""
    assert found.keys() == expected.keys()
    for name, (A, B) in found.items():
        theirs_A, theirs_B = expected[name]
        r = len(A)
        assert not theirs_A[r:].any() and not theirs_B[:, r:].any()
        for ours, theirs in ((A, theirs_A[:r]), (B, theirs_B[:, :r])):
            assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max().clamp(min=1e-3), name


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.3, 0.75])
@pytest.mark.parametrize("kind", [kind for kind in COMBINATIONS if not kind.endswith("svd")])
def test_factors_are_pefts(base, folders, kind, density, sign, monkeypatch):
    """Random values that are dropped are the same ones, too."""
    found, config = combined(base, folders, kind, WEIGHTS, density=density, sign=sign, seed=SEED)
    expected = by_peft(folders, kind, WEIGHTS, monkeypatch, SEED, density=density, majority_sign_method=sign)
    assert_same(found, expected)
    assert config.alpha == config.r == (12 if kind == "cat" else 4)


@pytest.mark.parametrize("rank", [None, 3, 20])
@pytest.mark.parametrize("kind", [kind for kind in COMBINATIONS if kind.endswith("svd")])
def test_products_are_pefts(base, unequal, kind, rank, monkeypatch):
    """Of factors of an SVD the signs are free, two by two: their product is compared, and their sizes."""
    found, config = combined(base, unequal, kind, WEIGHTS, density=0.6, rank=rank, seed=SEED)
    expected = by_peft(unequal, kind, WEIGHTS, monkeypatch, SEED, density=0.6, svd_rank=rank)
    assert config.r == (rank or 7)
    assert found.keys() == expected.keys()
    for name, (A, B) in found.items():
        theirs_A, theirs_B = expected[name]
        assert A.shape == theirs_A.shape and B.shape == theirs_B.shape
        right = theirs_B @ theirs_A
        assert (B @ A - right).abs().max() <= 1e-5 * right.abs().max()
        assert (B.norm(dim=0) - theirs_B.norm(dim=0)).abs().max() <= 1e-5 * theirs_B.norm()


def test_cat_takes_unequal_ranks(base, unequal, monkeypatch):
    """And is the sum of what the adapters do: task arithmetic."""
    found, config = combined(base, unequal, "cat", WEIGHTS)
    assert_same(found, by_peft(unequal, "cat", WEIGHTS, monkeypatch))
    models = [load_model(base, torch.float32, adapter_dir=folder) for folder in unequal]
    for name, (A, B) in found.items():
        right = 0
        for model, weight in zip(models, WEIGHTS, strict=True):
            adapter = model.get_submodule(name)
            if isinstance(adapter, lora.Adapter):
                right = right + weight * (adapter.merged_weight() - adapter.base.weight)
        assert (B @ A - right).abs().max() <= 1e-5 * right.abs().max()


@pytest.mark.parametrize("kind", SAME_RANK)
def test_what_peft_refuses_is_refused(base, unequal, kind, monkeypatch):
    with pytest.raises(ValueError, match="same r value"):
        by_peft(unequal, kind, WEIGHTS, monkeypatch, density=0.5)
    with pytest.raises(UserError, match=f"--combine {kind}: the adapters have the ranks .* on .*: they must be equal"):
        combined(base, unequal, kind, WEIGHTS, density=0.5)


def test_a_density_of_1_keeps_all(base, folders):
    for one, other in (("dare_linear", "linear"), ("magnitude_prune", "linear"), ("dare_ties", "ties")):
        found, _ = combined(base, folders, one, WEIGHTS, density=1.0)
        right, _ = combined(base, folders, other, WEIGHTS, density=1.0)
        assert_same(found, right)


def test_no_other_kind_and_nothing_whole(base, folders, tmp_path):
    dora = make_adapter(tmp_path / "dora", base, kind="dora", r=4)
    with pytest.raises(UserError, match="dora is a dora adapter: only LoRA"):
        combined(base, [folders[0], dora], "cat", [1, 1])
    whole = shutil.copytree(folders[0], tmp_path / "whole")
    tensors = load_file(whole / "adapter_model.safetensors")
    embedding = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    for key, value, refused in (("base_layer.weight", 1, False), ("base_layer.weight", 2, True), ("weight", 1, True)):
        added = tensors | {f"base_model.model.model.embed_tokens.{key}": embedding * value}
        save_file(added, whole / "adapter_model.safetensors")
        if refused:
            with pytest.raises(UserError, match=r"whole changes model\.embed_tokens\.weight as a whole"):
                combined(base, [folders[0], whole], "cat", [1, 1])
        else:
            combined(base, [folders[0], whole], "cat", [1, 1])


# ------------------------------------------------------------------------------------------------------------- command


def command(folders, out_dir, **flags):
    flags = {"combine": "cat", "weights": [1.0] * len(folders), **flags}
    convert_hf_checkpoint.main(convert_hf_checkpoint.Settings(adapter_dir=list(folders), out_dir=out_dir, **flags))


def measured(out):
    """{what it is compared with: KL} of the lines that a combination prints."""
    lines = [line for line in out.splitlines() if line.startswith("combined against ")]
    return {
        line.split(",")[0].removeprefix("combined against "): float(line.split("mean KL ")[1].split(",")[0])
        for line in lines
    }


@pytest.mark.parametrize("kind", ["cat", "ties", "dare_linear_svd"])
def test_the_folder_is_pefts_and_ours(base, folders, tmp_path, kind, capsys):
    options = {} if kind == "cat" else {"density": 0.5}
    options |= {"seed": 3} if "dare" in kind else {}
    (tmp_path / "text.txt").write_text("the answer to the question is 42 " * 9)
    command(folders, tmp_path / "out", combine=kind, weights=WEIGHTS, text=tmp_path / "text.txt", **options)
    ours = load_model(base, torch.float32, adapter_dir=tmp_path / "out")
    reference = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(reference, tmp_path / "out").eval()
    tokens = torch.randint(512, (2, 9))
    with torch.no_grad():
        right = theirs(tokens).logits
        assert (ours(tokens) - right).abs().max() <= 1e-4 * right.abs().max()
    assert read_json(tmp_path / "out" / "onetune.json") == {
        "prompt_style": "plain", "checkpoint_dir": str(base), "quantize": None,
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert f"{kind} of 3 adapters" in printed
    kl = measured(printed)
    assert [*kl] == [*(f"base + {folder}" for folder in folders), "the base"] and all(
        value > 1e-4 for value in kl.values()
    )
    positions = int(printed.split(" positions")[0].split(" ")[-1])
    assert positions > 20
    with torch.no_grad():
        tokenizer = Tokenizer(base)
        ids = torch.tensor([[*tokenizer.begin_ids, *tokenizer.encode((tmp_path / "text.txt").read_text())]])
        p, q = (m(ids)[0].double().log_softmax(-1) for m in (load_model(base, torch.float32), ours))
    assert kl["the base"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=0.06)


def test_weights_of_0_and_1_give_an_adapter_back(base, folders, tmp_path, capsys):
    command(folders[:2], tmp_path / "out", weights=[1.0, 0.0])
    kl = measured(capsys.readouterr().out)
    assert abs(kl[f"base + {folders[0]}"]) < 1e-9 and kl[f"base + {folders[1]}"] > 1e-3


def test_adapters_of_different_styles(base, folders, tmp_path, capsys):
    other = shutil.copytree(folders[1], tmp_path / "other")
    (other / "onetune.json").write_text(json.dumps({"prompt_style": "alpaca", "checkpoint_dir": str(base)}))
    command([folders[0], other], tmp_path / "out")
    assert "different prompt styles (plain, alpaca)" in capsys.readouterr().out
    assert "prompt_style" not in read_json(tmp_path / "out" / "onetune.json")


def test_adapters_of_different_bases(base, folders, tmp_path):
    for notes, words in (
        ({"checkpoint_dir": str(tmp_path)}, "was trained on .*--source"),
        ({"checkpoint_dir": str(base), "quantize": "bnb.nf4"}, "bnb.nf4: adapters need one"),
    ):
        other = shutil.copytree(folders[1], tmp_path / "other", dirs_exist_ok=True)
        (other / "onetune.json").write_text(json.dumps(notes))
        with pytest.raises(UserError, match=words):
            command([folders[0], other], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_family_that_has_q_k_and_v_in_one_layer(tmp_path, capsys):
    """The combination is stacked in the file as any adapter is."""
    sizes = dict(vocab_size=512, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6)
    transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes)).save_pretrained(tmp_path / "base")
    pairs = (("a", 2, ("q_proj", "v_proj")), ("b", 5, ("q_proj", "up_proj")))
    each = [make_adapter(tmp_path / name, tmp_path / "base", r=r, alpha=4, targets=on) for name, r, on in pairs]
    command(each, tmp_path / "out", weights=[2.0, 0.5])
    *models, ours = (load_model(tmp_path / "base", torch.float32, adapter_dir=d) for d in (*each, tmp_path / "out"))
    assert len(lora.adapters(ours)) == 3 * 2
    for name, adapter in lora.adapters(ours).items():
        right = 0
        for model, weight in zip(models, (2.0, 0.5), strict=True):
            if isinstance(one := model.get_submodule(name), lora.Adapter):
                right = right + weight * (one.merged_weight() - one.base.weight)
        assert (adapter.merged_weight() - adapter.base.weight - right).abs().max() <= 1e-5 * right.abs().max()
    theirs = peft.PeftModel.from_pretrained(
        transformers.GPTNeoXForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "out"
    ).eval()
    tokens = torch.randint(512, (1, 7))
    with torch.no_grad():
        assert (ours(tokens) - theirs(tokens).logits).abs().max() <= 1e-4 * ours(tokens).abs().max()
