"""NEFTune: the noise itself, against transformers, and in runs."""

from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from families.tiny import distance
from test_finetune import column, final_weights, random_sample, random_samples, run, settings  # noqa: F401 (fixtures)

import finetune
from batching import Batch, open_samples
from finetune import Settings
from objectives import CrossEntropy, up_to_last_target
from ops.forks import Forks
from ops.noise import neftune_sizes
from training import build
from training.build import Run
from weights.checkpoint import load_model

SIZES = ((3, 4), (1, 1), (9, 2), (2, 12))  # tokens of prompt and of answer


@pytest.fixture
def samples(settings):  # noqa: F811
    s = settings([random_sample(*each) for each in SIZES])
    return open_samples(s.data_dir, "train")


def test_each_token_has_the_noise_of_its_own_sample(samples):
    """In packed and in padded rows the same; nothing on padding."""
    (_, targets, offsets), (_, padded, _) = samples.packed(range(4)), samples.padded(range(4))
    packed = neftune_sizes(5.0, 48, torch.ones_like(targets, dtype=torch.bool), offsets)
    rows = neftune_sizes(5.0, 48, up_to_last_target(padded), None)
    lengths = [prompt + answer - 1 for prompt, answer in SIZES]
    expected = [torch.full((L,), 5 / (L * 48) ** 0.5) for L in lengths]
    assert packed.shape == targets.shape and rows.shape == padded.shape
    assert torch.allclose(packed[0], torch.cat(expected))
    for row, own, L in zip(rows, expected, lengths, strict=True):
        assert torch.allclose(row[:L], own) and not row[L:].any()


def test_virtual_tokens_have_none_and_do_not_count(samples):
    """In packed and padded rows: real tokens have the noise that they have without virtual ones before them."""
    s = Settings("model", "data", neftune_alpha=5.0)
    config = SimpleNamespace(vocab_size=512, embedding_size=None, hidden_size=48)
    model = SimpleNamespace(
        config=config, training=True, model=SimpleNamespace(embed_tokens=SimpleNamespace(weight=torch.zeros(1)))
    )
    layouts = samples.packed, samples.padded
    plain = [CrossEntropy(s).noise(model, Batch(*layout(range(4)))) for layout in layouts]
    samples.prepend([512, 513, 514])
    for layout, expected in zip(layouts, plain, strict=True):
        batch = Batch(*layout(range(4)))
        sizes, real = CrossEntropy(s).noise(model, batch), batch.tokens < 512
        assert not sizes[~real].any() and (~real).sum() == 12
        torch.testing.assert_close(sizes[real], expected.flatten())


def test_a_beginning_has_the_noise_of_its_first_sample():
    """Samples of 3 + 2 and 3 + 5 tokens, and of 0 + 4 and 0 + 1."""
    forks = Forks((3, 0), ((2, 5), (4, 1)))
    sizes = neftune_sizes(2.0, 7, torch.ones(1, 15, dtype=torch.bool), forks)
    lengths = torch.tensor([5.0] * 5 + [8] * 5 + [4] * 4 + [1])
    assert torch.allclose(sizes, 2 / (lengths * 7).sqrt()[None])


@torch.no_grad()
@pytest.mark.parametrize("rope", ["default", "dynamic"])
def test_forks_have_the_noise_of_whole_samples(tiny_checkpoint, rope):
    """Also where a RoPE that depends on lengths needs the beginning once for each end."""
    model = load_model(tiny_checkpoint("llama"), torch.float32)
    if rope == "dynamic":
        ropes = (replace(each, scaling=rope, factor=3.0, original_context=3) for each in model.config.ropes)
        model.config = replace(model.config, ropes=tuple(ropes))
    tokens, forks, sizes = torch.randint(3, 512, (1, 9)), Forks((4,), ((2, 3),)), torch.rand(1, 9)
    with patch.object(torch.Tensor, "uniform_", lambda x, low, high: x.fill_(high)):
        x = model.hidden_states(tokens, offsets=forks, noise=sizes)
        for end in ([4, 5], [6, 7, 8]):
            own = [0, 1, 2, 3, *end]
            expected = model.hidden_states(tokens[:, own], noise=sizes[:, own])
            assert distance(x[:, end], expected[:, 4:]) < 1e-5


@torch.no_grad()
def test_the_model_with_noise_is_transformers_with_noise(tiny_checkpoint):
    from transformers import AutoModelForCausalLM

    folder = tiny_checkpoint("llama")
    ours, tokens = load_model(folder, torch.float32), torch.randint(3, 512, (2, 9))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    sizes = torch.rand(2, 9)
    torch.manual_seed(5)
    logits = ours(tokens, noise=sizes)
    torch.manual_seed(5)
    noise = torch.empty(2, 9, 48).uniform_(-1, 1) * sizes[..., None]
    assert (noise.abs() <= sizes[..., None]).all() and noise.std() > 0.1
    expected = theirs(inputs_embeds=theirs.get_input_embeddings()(tokens) + noise).logits
    assert distance(logits, expected) < 1e-5 and distance(ours(tokens), expected) > 0.01


@pytest.mark.parametrize("method, flags", [("lora", {}), ("full", {}), ("lora", {"quantize": "bnb.nf4"})])
def test_noise_in_training_alone_and_from_the_steps_seed(settings, method, flags):  # noqa: F811
    s = settings([random_sample(*each) for each in SIZES], method=method, neftune_alpha=100.0, **flags)
    fabric = build.start_fabric(s)
    model, _ = build.build_model(s, fabric.device, None)
    the_run = Run(s, fabric, model.train(), None, open_samples(s.data_dir, "train"))

    def loss(seed, recompute=0.0):
        torch.manual_seed(seed)
        s.recompute = recompute
        return finetune.forward(the_run, the_run.train, [0, 1, 2, 3]).summed.item()

    assert loss(1) == loss(1) != loss(2)
    assert loss(1, recompute=1.0) == pytest.approx(loss(1), rel=1e-6)
    model.eval()
    assert loss(1) == loss(2)
    s.neftune_alpha = 0.0
    assert loss(1) == loss(model.train() and 2)


@pytest.mark.parametrize("planner", ["packed", "sorted_in_step"])
def test_a_run_with_noise_resumes_bit_for_bit(run, planner):  # noqa: F811
    flags = dict(neftune_alpha=5.0, planner=planner, save_interval=2, recompute=0.5, max_steps=4, eval_interval=2)
    whole = run(random_samples(16), random_samples(4), name="whole", **flags)
    plain = run(name="plain", **(flags | {"neftune_alpha": 0.0}))
    stopped = run(name="stopped", **flags)
    for path in (stopped / "final", stopped / "step-000004"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    resumed = run(name="stopped", resume=True, **flags)
    assert final_weights(resumed).read_bytes() == final_weights(whole).read_bytes()
    assert column(whole, "loss") != column(plain, "loss")
