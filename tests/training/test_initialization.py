"""How adapters start: against PEFT, and what is left of a start in a run's folders."""

import json
import warnings
from collections.abc import Iterator
from types import SimpleNamespace

import peft
import pytest
import torch
from families.tiny import distance, random_tokens
from safetensors.torch import load_file
from test_finetune import (  # noqa: F401 (fixtures)
    column,
    final_weights,
    random_samples,
    run,
    settings,
)

import finetune
import lora
from batching import IGNORE
from convert_hf_checkpoint import Settings as Convert
from convert_hf_checkpoint import merge
from quantize import QUANTIZERS, quantized_layers
from shell.cli import UserError
from training import build, eva, initialization
from training.initialization import INITIALISATIONS, Layer, loftq, olora, pissa
from training.memory.budget import predicted_peak
from weights.checkpoint import load_model
from weights.residual import rest

R, ALPHA = 3, 7
TAKING = ["pissa", "olora"]
OTHERS = ["gaussian", "orthogonal", "pissa", "olora", "loftq", "eva"]
warnings.filterwarnings("ignore", category=DeprecationWarning)


def peft_layer(weight, init, r=R, alpha=ALPHA, **more):
    """PEFT's adapter, with this start, over a linear layer with this weight: A, B, and what is left of the weight."""
    layer = torch.nn.Linear(*reversed(weight.shape), bias=False)
    layer.weight.data = weight.clone()
    config = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=["0"], init_lora_weights=init, **more)
    (adapted,) = peft.get_peft_model(torch.nn.Sequential(layer), config).base_model.model
    A, B = (getattr(adapted, f"lora_{letter}")["default"].weight.detach() for letter in "AB")
    return A, B, adapted.base_layer.weight.detach()


def weight_of(*shape):
    """A random weight whose singular values are far from equal, as those of a trained one."""
    U, _, Vh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    return U * 0.5 ** torch.arange(min(shape)) @ Vh


def layer(scale, r=R, quantizer=None, iterations=None):
    return Layer("a layer", r, scale, quantizer, iterations)


# ------------------------------------------------------------------------------------------------ against PEFT


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24), (5, 24)], ids=str)
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    "make, iterations, init", [(pissa, None, "pissa"), (pissa, 16, "pissa_niter_16"), (olora, None, "olora")],
    ids=["pissa", "fast pissa", "olora"],
)  # fmt: skip
def test_a_start_by_the_weight_is_pefts(shape, rslora, make, iterations, init):
    """Its products, as singular vectors may have either sign; and what it leaves of the weight."""
    weight, scale = weight_of(*shape), ALPHA / (R**0.5 if rslora else R)
    A, B, left = peft_layer(weight, init, use_rslora=rslora)
    made = make(weight, layer(scale, iterations=iterations))
    assert made.A.shape == A.shape and made.B.shape == B.shape
    assert distance(made.B @ made.A, B @ A) < 1e-5
    assert distance(rest(weight, *made.taken, scale), left) < 1e-5
    assert distance(made.A.norm(dim=1), A.norm(dim=1)) < 1e-5  # and the size is shared in the same way
    assert distance(left + scale * B @ A, weight) < 1e-5 and distance(left, weight) > 0.1


def plain_loftq(weight, quantise, r, iterations):
    """Algorithm 1 of the paper. Returns Q, A and B."""
    A, B = torch.zeros(r, weight.size(1)), torch.zeros(weight.size(0), r)
    for _ in range(iterations):
        Q = quantise(weight - B @ A)
        U, S, Vh = torch.linalg.svd(weight - Q)
        A, B = S[:r].sqrt()[:, None] * Vh[:r], U[:, :r] * S[:r].sqrt()
    return Q, A, B


@pytest.mark.parametrize("quantizer", ["bnb.nf4", "bnb.nf4-dq", "bnb.int8"])
@pytest.mark.parametrize("iterations", [1, 2, 5])
@pytest.mark.parametrize("scale", [1, 2.5])
def test_loftq_is_the_papers(quantizer, iterations, scale):
    weight, quantise = torch.randn(40, 64) / 8, lambda w: QUANTIZERS[quantizer](w, None).dequantize(torch.float32)
    Q, A, B = plain_loftq(weight, quantise, R, iterations)
    made = loftq(weight, layer(scale, quantizer=QUANTIZERS[quantizer], iterations=iterations))
    left = weight if made.taken is None else rest(weight, *made.taken, scale)
    assert (made.taken is None) == (iterations == 1)
    # A weight in the middle between two codes may fall to either side.
    assert distance(quantise(left), Q) < 1e-3
    assert distance(scale * made.B @ made.A, B @ A) < 0.02
    nearer = distance(quantise(left) + scale * made.B @ made.A, weight)
    assert nearer < distance(quantise(weight), weight)


def test_loftq_is_pefts(monkeypatch):
    """Which needs a GPU for no reason: here it is told that a CPU is one."""
    from peft.utils import loftq_utils

    monkeypatch.setattr(loftq_utils, "is_xpu_available", lambda: False)
    monkeypatch.setattr(loftq_utils, "clear_device_cache", lambda: None)
    to = torch.Tensor.to

    def on_cpu(self, *args, **kwargs):
        args = tuple("cpu" if arg == "cuda" else arg for arg in args)
        return to(self, *args, **{key: "cpu" if value == "cuda" else value for key, value in kwargs.items()})

    weight, quantizer = torch.randn(48, 64) / 8, QUANTIZERS["bnb.nf4"]
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", on_cpu)
        import bitsandbytes as bnb

        params = bnb.nn.Params4bit.to
        patch.setattr(bnb.nn.Params4bit, "to", lambda self, device: params(self, "cpu"))
        patch.setattr(bnb.nn.Params4bit, "_quantize", bnb.nn.Params4bit._quantize)
        for iterations in (1, 3):
            theirs, A, B = loftq_utils.loftq_init(weight, num_bits=4, reduced_rank=R, num_iter=iterations)
            made = loftq(weight, layer(1, quantizer=quantizer, iterations=iterations))
            left = weight if made.taken is None else rest(weight, *made.taken, 1)
            assert distance(quantizer(left, None).dequantize(torch.float32), theirs) < 1e-3
            assert distance(made.B @ made.A, B @ A) < 0.02


def test_gaussian_and_orthogonal_are_pefts():
    for name, init in (("gaussian", initialization.gaussian), ("orthogonal", initialization.orthogonal)):
        base = lora.Linear(24, 40, bias=False)
        adapter = lora.LoRALinear(base, 4, 8)
        seed = torch.randint(10**6, ()).item()
        torch.manual_seed(seed)
        with torch.no_grad():
            init(adapter)
        if name == "orthogonal":
            with torch.random.fork_rng():
                layer = torch.nn.Linear(24, 40, bias=False)
            config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=False)
            (theirs,) = peft.get_peft_model(torch.nn.Sequential(layer), config).base_model.model
            torch.manual_seed(seed)
            theirs.orthogonal_init("default")
            assert distance(adapter.lora_A, theirs.lora_A["default"].weight) < 1e-6
            assert distance(adapter.lora_B, theirs.lora_B["default"].weight) < 1e-6
            assert (adapter.lora_B @ adapter.lora_A).abs().max() < 1e-6 < adapter.lora_B.abs().max()
        else:
            assert adapter.lora_B.count_nonzero() == 0
            assert adapter.lora_A.std().item() == pytest.approx(1 / 4, rel=0.3)


class Batches:
    """Batches of a fixed order, as PEFT takes them from a data loader."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __iter__(self) -> Iterator:
        return iter(self.batches)


def low_rank_batches(N, B=3, T=13):
    """Batches of tokens from a small part of the vocabulary, so that main directions of their inputs are soon clear."""
    for _ in range(N):
        tokens = torch.randint(3, 12, (B, T))
        targets = torch.randint(3, 12, (B, T))
        targets[torch.rand(B, T) < 0.2] = IGNORE
        yield tokens, targets, None


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_eva_is_pefts(tiny_models, rho):
    """The directions of all layers and their ranks, with the positions that have a target."""
    tiny, targets = tiny_models(("llama", 0)), ["q_proj", "k_proj", "v_proj", "down_proj"]
    batches = list(low_rank_batches(12))
    theirs = tiny.loaded_by_transformers(tiny.folder)
    config = peft.LoraConfig(
        r=R, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=rho),
    )  # fmt: skip
    model = peft.get_peft_model(theirs, config, low_cpu_mem_usage=True)
    loader = Batches([{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": y} for x, y, _ in batches])
    peft.initialize_lora_eva_weights(model, dataloader=loader, show_progress_bar=False)
    expected = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    ours = tiny.load()
    before = lora.AdapterConfig(r=R, alpha=ALPHA, targets=tuple(targets))
    with torch.no_grad():
        after, As = eva.eva(ours, before, (batches * 50), rho)
    ranks = {name: after.rank(name) for name in lora.linear_layers(ours) if after.covers(name)}
    theirs = {name: module.r["default"] for name, module in expected.items()}
    assert by_block(ranks) == by_block(theirs)
    assert sum(ranks.values()) == R * 4 * 3 and (rho == 1.0) == (set(ranks.values()) == {R})
    for name, module in expected.items():
        if not (r := min(ranks.get(name, 0), theirs[name])):
            continue
        assert after.scale(name) == pytest.approx(module.scaling["default"])
        # Rounding turns directions of nearly equal variance: what is made of equal inputs is compared below.
        assert distance(As[name][:r], module.lora_A["default"].weight[:r]) < 0.1, name


def by_block(ranks):
    """Ranks by the layer's place, sorted: of queries, keys and values, whose inputs are equal, any may come first."""
    found = {}
    for name, r in ranks.items():
        found.setdefault(name.rpartition(".")[0], []).append(r)
    return {name: sorted(each) for name, each in found.items()}


def test_main_directions_are_pefts():
    """To rounding, of the same rows."""
    from peft.utils.incremental_pca import IncrementalPCA

    theirs, ours = IncrementalPCA(4, lowrank=True, lowrank_seed=42), eva.PrincipalComponents(4)
    mixing = torch.randn(20, 20) * 0.6 ** torch.arange(20)[:, None]
    for N in (31, 4, 90):
        x = torch.randn(N, 20) @ mixing + torch.randn(20)
        theirs.partial_fit(x)
        ours.update(x)
        assert distance(ours.components, theirs.components_) < 1e-4
        assert distance(ours.values, theirs.singular_values_) < 1e-5
        assert distance(ours.shares, theirs.explained_variance_ratio_) < 1e-5


def test_eva_goes_where_the_variance_is():
    """Of two layers, one with inputs of one direction, the other of many."""
    shares = {"a": torch.tensor([0.9, 0.01, 0.0, 0.0]), "b": torch.tensor([0.3, 0.29, 0.2, 0.1])}
    assert eva.shared_out(shares, lora.AdapterConfig(r=2)) == {"a": 1, "b": 3}


def test_main_directions_are_those_of_all_rows_together():
    mixing = torch.randn(20, 20) * torch.logspace(0, -3, 20)[:, None]
    x, parts = torch.randn(600, 20) @ mixing + torch.randn(20), eva.PrincipalComponents(4)
    for batch in x.split([300, 3, 250, 47]):  # three rows are too few
        parts.update(batch)
    rows = torch.cat([x[:300], x[303:]])
    _, S, Vh = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    assert distance(parts.shares, S[:4].square() / S.square().sum()) < 1e-2
    assert (parts.components @ Vh[:4].T).diag().abs().min() > 0.99
    assert parts.count == len(rows) and distance(parts.mean.float(), rows.mean(0)) < 1e-5


# ------------------------------------------------------------------------------------------------ in a run


def flags_of(init):
    """What goes with each start: ranks that it can have, quantised layers for what needs them."""
    more = {"orthogonal": dict(lora_r=4), "loftq": dict(quantize="bnb.nf4", lora_init_iterations=3)}
    return {"lora_init": init, "lora_r": 3, "lora_alpha": 5, **more.get(init, {})}


def started(s):
    """A run's model at its start, and its adapter's config."""
    torch.manual_seed(s.seed)
    return build.build_model(s, torch.device("cpu"), None)


@torch.no_grad()
@pytest.mark.parametrize("quantize", [None, "bnb.nf4"])
@pytest.mark.parametrize("init", INITIALISATIONS)
def test_step_0_is_the_base(settings, init, quantize):  # noqa: F811
    """Up to rounding; a quantised base is that of the rest of the weights, nearer to the dense model than without."""
    flags = flags_of(init) | ({"quantize": quantize} if quantize else {})
    s = settings(random_samples(20), **flags)
    model, config = started(s)
    tokens = random_tokens(2, 9)
    dense = load_model(s.checkpoint_dir, torch.float32)(tokens)
    bare = load_model(s.checkpoint_dir, torch.float32, quantize=s.quantize)(tokens)
    logits = model.eval()(tokens)
    if s.quantize and init in ("pissa", "olora", "loftq"):
        assert distance(logits, bare) > 1e-3
        layers = {"pissa": 0.999, "olora": 1.05, "loftq": 0.99}
        assert errors(model, s) < layers[init] * errors(model, s, bare=True)
        assert len(quantized_layers(model)) == len(lora.adapters(model)) == 21
    else:
        assert distance(logits, bare) < 1e-5
    assert config.residual == (init in ("pissa", "olora", "loftq"))
    assert distance(logits, dense) < 1
    for adapter in lora.adapters(model).values():
        assert adapter.lora_A.count_nonzero() and (adapter.lora_B.count_nonzero() > 0) == (init in OTHERS[1:-1])


def errors(model, s, bare=False):
    """How far base and adapters are from the dense weights, over all layers."""
    dense = dict(load_model(s.checkpoint_dir, torch.float32).named_parameters())
    bases = lora.linear_layers(load_model(s.checkpoint_dir, torch.float32, quantize=s.quantize))
    return sum(
        (bases[name].dequantize(torch.float32) if bare else adapter.merged_weight()).sub(dense[f"{name}.weight"]).norm()
        for name, adapter in lora.adapters(model).items()
    )


@pytest.mark.parametrize("planner", ["packed", "sorted_in_step"])
@pytest.mark.parametrize("init", OTHERS)
def test_a_run_resumes_bit_for_bit(run, init, planner):  # noqa: F811
    """With recomputation, dropout and bf16, over 4 bits where that is another base."""
    flags = flags_of(init) | dict(
        planner=planner, recompute=0.5, lora_dropout=0.1, precision="bf16-true", learning_rate=1e-3,
        save_interval=2, global_batch_size=4,
    )  # fmt: skip
    flags |= dict(quantize="bnb.nf4") if planner == "packed" else {}
    samples = random_samples(24)
    whole = run(samples, random_samples(4), name="whole", max_steps=6, eval_interval=3, **flags)
    resumed_from = run(name="resumed", max_steps=6, eval_interval=3, **flags)
    for path in ("final", "step-000006", "metrics.csv"):
        remove(resumed_from / path)
    before = (resumed_from / "step-000004" / "adapter_model.safetensors").read_bytes()
    resumed = run(name="resumed", resume=True, max_steps=6, eval_interval=3, **flags)
    assert final_weights(resumed).read_bytes() == final_weights(whole).read_bytes() != before
    assert column(whole, "loss")[-2:] == column(resumed, "loss")[-2:]


def remove(path):
    import shutil

    shutil.rmtree(path) if path.is_dir() else path.unlink()


@torch.no_grad()
@pytest.mark.parametrize("quantize", [None, "bnb.nf4"])
@pytest.mark.parametrize("init", OTHERS)
def test_what_a_run_leaves_is_what_it_trained(run, settings, tmp_path, init, quantize):  # noqa: F811
    """final/ gives the trained model's logits: loaded by us, in PEFT over the base as it was, and merged."""
    flags = flags_of(init) | ({"quantize": quantize} if quantize else {})
    flags |= dict(lora_rank_pattern={"down_proj": 2}, lora_alpha_pattern={"q_proj": 2.5}, lora_rslora=True)
    with torch.enable_grad():
        folder = run(random_samples(20), max_steps=3, **flags) / "final"
    tokens = random_tokens(2, 9)
    s = settings(**flags)
    ours = load_model(s.checkpoint_dir, torch.float32, quantize=s.quantize, adapter_dir=folder)
    found = lora.adapters(ours)
    assert all(adapter.standard and len(adapter.lora_A) <= 6 for adapter in found.values())
    expected = ours(tokens)
    assert distance(expected, load_model(s.checkpoint_dir, torch.float32)(tokens)) > 1e-3
    if not s.quantize:
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(s.checkpoint_dir, dtype=torch.float32)
        theirs = peft.PeftModel.from_pretrained(base, folder).eval()
        assert distance(theirs(tokens).logits, expected) < 1e-5
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["r"] == (6 if init in TAKING else s.lora_r)
    merge(Convert(source=s.checkpoint_dir, adapter_dir=folder, out_dir=tmp_path / "merged"))
    assert distance(load_model(tmp_path / "merged", torch.float32)(tokens), expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_the_run_that_ended_had_these_logits(settings, monkeypatch, init):  # noqa: F811
    """Not only what is loaded again: the model at the end of training."""
    s, models = settings(random_samples(12), max_steps=2, **flags_of(init)), []
    made = build.build_run
    monkeypatch.setattr(build, "build_run", lambda *args: models.append(made(*args)) or models[0])
    with torch.enable_grad():
        finetune.main(s)
    tokens = random_tokens(2, 9)
    again = load_model(s.checkpoint_dir, torch.float32, quantize=s.quantize, adapter_dir=s.out_dir / "final")
    assert torch.equal(models[0].model.eval()(tokens), again(tokens))


@torch.no_grad()
@pytest.mark.parametrize(
    "family, quantize", [("gpt_neox", None), ("gpt_neox", "bnb.nf4"), ("mixtral", None), ("gpt2", "bnb.nf4")]
)
def test_other_families(tiny_models, tmp_path, family, quantize):
    """Whose layers are parts of one in PEFT's file, or experts: PiSSA over all of them."""
    tiny = tiny_models((family, 0))
    targets = tuple(dict.fromkeys(name.rpartition(".")[2] for name in lora.linear_layers(tiny.load())))
    targets = tuple(name for name in targets if name != "lm_head")
    config = lora.AdapterConfig(r=2, alpha=3, targets=targets, residual=True)
    s = SimpleNamespace(
        checkpoint_dir=tiny.folder, quantize=quantize, lora_init="pissa", lora_init_iterations=None,
        data_dir=None, method="lora",
    )  # fmt: skip
    model, config = initialization.start(s, config, torch.float32, torch.device("cpu"), quantize)
    tokens = random_tokens(2, 9)
    if not quantize:
        assert distance(model(tokens), tiny.load()(tokens)) < 1e-4
    for adapter in lora.adapters(model).values():
        adapter.lora_A.add_(torch.randn_like(adapter.lora_A) * 0.05)
    from weights.peft_format import save_adapter

    save_adapter(model, config, tmp_path, tiny.folder)
    again = tiny.load(quantize=quantize, adapter_dir=tmp_path)
    assert torch.equal(again(tokens), model(tokens))
    if not quantize:
        theirs = peft.PeftModel.from_pretrained(tiny.loaded_by_transformers(tiny.folder), tmp_path).eval()
        assert distance(theirs(tokens, use_cache=False).logits, model(tokens)) < 1e-4
    merge(Convert(source=tiny.folder, adapter_dir=tmp_path, quantize=quantize, out_dir=tmp_path / "merged"))
    assert distance(load_model(tmp_path / "merged", torch.float32)(tokens), model(tokens)) < 1e-4


@torch.no_grad()
def test_over_an_unchanged_base_it_is_ordinary_lora(run, settings):  # noqa: F811
    """As several adapters over one base need it."""
    from weights.peft_format import load_adapter

    s = settings(random_samples(12), max_steps=2, **flags_of("pissa"))
    with torch.enable_grad():
        finetune.main(s)
    folder, tokens = s.out_dir / "final", random_tokens(2, 9)
    model = load_model(s.checkpoint_dir, torch.float32)
    assert load_adapter(model, folder).r == 6
    expected = load_model(s.checkpoint_dir, torch.float32, adapter_dir=folder)(tokens)
    assert distance(model(tokens), expected) < 1e-5


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_eva_ranks_go_with_the_checkpoints(run, rho):  # noqa: F811
    folder = run(random_samples(30, longest_answer=20), max_steps=2, lora_init="eva", lora_r=2, lora_eva_rho=rho)
    config = json.loads((folder / "final" / "adapter_config.json").read_text())
    assert bool(config["rank_pattern"]) == (rho == 2.0)
    tensors = load_file(final_weights(folder))
    assert sum(len(tensor) for name, tensor in tensors.items() if "lora_A" in name) == 2 * 21


def test_the_plan_counts_what_a_start_keeps(settings):  # noqa: F811
    """A_0 and B_0, which are as large as the adapter, and without gradient and moments."""
    plain, taking = (settings(random_samples(8), lora_r=5, lora_init=init) for init in ("default", "pissa"))
    data = build.open_data(plain)
    adapter = sum(p.nbytes for p in started(plain)[0].parameters() if p.requires_grad)
    assert predicted_peak(taking, data.train) - predicted_peak(plain, data.train) == adapter


@pytest.mark.parametrize(
    "flags, says",
    [
        (dict(lora_init="pissa", method="dora"), "needs --method lora as published, not dora"),
        (dict(lora_init="olora", lora_r=49), "a rank of 49 is more than model.layers.0.* has, 48"),
        (dict(lora_init="orthogonal", lora_r=3), "orthogonal needs an even rank"),
        (dict(lora_init="eva", lora_r=60), "more than"),
        (dict(lora_init="eva", lora_r=24), "no micro-batch has 48 targets"),
    ],
)
def test_what_cannot_start_so_is_refused(run, flags, says):  # noqa: F811
    with pytest.raises(UserError, match=says):
        run(random_samples(8, longest_answer=3), max_steps=1, **flags)


def test_a_tied_head_cannot_give_from_its_weight(tiny_checkpoint, settings, tmp_path):  # noqa: F811
    import shutil

    from conftest import write_tiny_tokenizer

    shutil.copytree(tiny_checkpoint("llama-tied"), tmp_path / "tied")
    write_tiny_tokenizer(tmp_path / "tied")
    s = settings(
        random_samples(8), checkpoint_dir=tmp_path / "tied", lora_init="pissa", lora_targets=["q_proj", "lm_head"]
    )
    with pytest.raises(UserError, match="the head's weight is the embedding's too"):
        finetune.main(s)


@pytest.mark.parametrize(
    "start, says",
    [
        ({"r": 2}, "not twice"), ({"lora_alpha": 1}, "not twice"), ({"r": None}, "r is missing"),
        ({"r": "many"}, "many"), ({"rank_pattern": {"q_proj": 1}}, "not twice"), ("[1]", "is no object"),
    ],
)  # fmt: skip
def test_damaged_metadata_are_refused_in_one_line(run, settings, start, says):  # noqa: F811
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = final_weights(run(random_samples(8), max_steps=1, **flags_of("olora")))
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    before = json.loads(metadata["onetune.residual"])
    metadata["onetune.residual"] = start if isinstance(start, str) else json.dumps(before | start)
    save_file(load_file(path), path, metadata=metadata)
    (path.parent / "manifest.json").unlink()
    with pytest.raises(UserError, match=says) as error:
        load_model(settings().checkpoint_dir, torch.float32, adapter_dir=path.parent)
    assert "\n" not in str(error.value) and str(path.parent) in str(error.value)
