"""Tensors that wait in host memory, and MLPs in chunks: the same numbers, and copies that are waited for."""

import gc

import pytest
import torch
from conftest import FAMILIES, SMALL
from lazy_stream import LazyStream
from torch import nn

import lora
import model as model_file
from model import MLP, Transformer, works_by_position
from ops import offload
from ops.chunks import in_chunks
from ops.offload import CopyStream, Parked, Parking, PinnedPool, host_bytes, host_tensor, laid_in
from weights.families import config_from_json

EXPERTS = {
    "model_type": "qwen3_moe", **SMALL, "head_dim": 16, "num_experts": 5, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "norm_topk_prob": True, "mlp_only_layers": [1],
}  # fmt: skip
KINDS = {name: {"model_type": name.partition("-")[0], **SMALL, **changes} for name, (_, changes) in FAMILIES.items()}
KINDS |= {"experts": EXPERTS, "falcon": {  # attention and MLP beside each other
    "model_type": "falcon", "vocab_size": 512, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6,
    "multi_query": True, "new_decoder_architecture": False, "parallel_attn": True, "bias": False, "alibi": False,
}}  # fmt: skip


def random_model(values, adapter=None):
    model = Transformer(config_from_json(values))
    if adapter:
        lora.add_lora(model, adapter)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.train()


def loss_and_gradients(model, recompute, autocast=False, seed=5):
    """Of a packed row of which a part are targets; gradients of router logits too, where there are experts."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 500, (1, 41), generator=generator)
    torch.manual_seed(seed)  # of the dropout
    routed = [] if model.config.experts else None
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(tokens, tokens, recompute=recompute, offsets=[0, 17, 18, 41], routed=routed)
    loss = loss + sum(logits.square().mean() for logits in routed or ())
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), gradients


def assert_equal(a, b):
    assert torch.equal(a[0], b[0]) and a[1].keys() == b[1].keys()
    for name in a[1]:
        assert torch.equal(a[1][name], b[1][name]), name


def assert_close(a, b, within=1e-5):
    assert (a[0] - b[0]).abs() <= within * b[0].abs() and a[1].keys() == b[1].keys()
    for name in a[1]:
        assert (a[1][name] - b[1][name]).norm() <= within * b[1][name].norm() + 1e-6, name


@pytest.fixture
def parked(monkeypatch):
    """The shapes of all tensors parked since."""
    shapes, park = [], Parking.park
    monkeypatch.setattr(Parking, "park", lambda self, x: shapes.append(tuple(x.shape)) or park(self, x))
    return shapes


# ----------------------------------------------------------------------------------------------- between the passes


@pytest.mark.parametrize("kind", KINDS)
def test_parked_inputs_give_the_same_bits(kind, parked):
    model = random_model(KINDS[kind])
    expected = loss_and_gradients(model, 1.0)
    assert not parked
    assert_equal(loss_and_gradients(model, "offload"), expected)
    assert parked == [(1, 41, 48)] * 3


@pytest.mark.parametrize("targets", [lora.PROJECTIONS, r"model\.layers\.[12]\.self_attn\.q_proj"])
def test_an_adapter_with_dropout_gives_the_same_bits(targets):
    """The first block's input has no gradient; where it has no adapter, it is not computed again at all."""
    model = random_model(KINDS["llama"], lora.AdapterConfig(r=3, dropout=0.4, targets=targets))
    expected = loss_and_gradients(model, 1.0)
    assert_equal(loss_and_gradients(model, "offload"), expected)
    assert loss_and_gradients(model.eval(), 1.0)[0] != expected[0]  # there was dropout


def test_the_same_bits_under_autocast():
    model = random_model(KINDS["llama"])
    expected = loss_and_gradients(model, 1.0, autocast=True)
    assert_equal(loss_and_gradients(model, "offload", autocast=True), expected)
    assert loss_and_gradients(model, 1.0)[0] != expected[0]


def test_nothing_is_parked_where_nothing_goes_backward(parked):
    model, tokens = random_model(KINDS["llama"]), torch.randint(3, 500, (2, 9))
    with torch.no_grad():
        assert torch.equal(model(tokens, recompute="offload"), model(tokens))
    assert not parked


@pytest.fixture
def lazy(monkeypatch):
    stream, pool = LazyStream(), PinnedPool()
    monkeypatch.setattr(offload, "host_tensor", lambda nbytes, pinned: host_tensor(nbytes, False))
    monkeypatch.setattr(offload, "for_parking", lambda on_cuda: (stream, pool))
    return stream, pool


def test_copies_are_waited_for_and_buffers_used_again(lazy):
    stream, pool = lazy
    model = random_model(KINDS["llama"])
    expected = loss_and_gradients(model, 1.0)
    for _ in range(3):
        assert_equal(loss_and_gradients(model, "offload"), expected)
        gc.collect()
        assert len(pool.free) == 3  # one for each block, given back
    assert not stream.queue and stream.copies == 3 * 6
    assert stream.most == 1  # never more than one on its way


def test_one_tensor_is_fetched_ahead_and_sources_are_let_go(lazy):
    parking = Parking()
    with parking:
        first, second, third = (parking.park(torch.full((2, 3), float(n))) for n in range(3))
        assert first.source is None and second.source is None and third.source is not None
    assert third.source is None
    assert third.take().unique().tolist() == [2] and second.fetched is not None and first.fetched is None
    assert second.take().unique().tolist() == [1] and first.fetched is not None and second.fetched is None
    assert first.take().unique().tolist() == [0]
    assert first.take().unique().tolist() == [0]  # again, as for a second backward pass


def test_a_source_that_is_changed_under_the_copy_is_an_error(lazy):
    parking, x = Parking(), torch.zeros(3)
    parking.park(x)
    x += 1
    with pytest.raises(RuntimeError, match="changed in place"):
        parking.park(torch.zeros(3))


def test_what_was_fetched_for_nobody_outlives_its_copy(lazy):
    stream, _ = lazy
    parked = Parked(torch.ones(3), None)
    parked.release()
    parked.fetch()
    del parked
    gc.collect()
    assert not stream.queue


def test_a_pool_lends_the_smallest_that_fits_and_replaces_what_is_too_small(lazy):
    pool = PinnedPool()
    small, large = pool.take(10), pool.take(100)
    pool.give(large), pool.give(small)
    assert pool.take(9) is small and pool.take(9) is large
    pool.give(small), pool.give(large)
    assert len(pool.take(200)) == 200 and pool.free == [small]


def test_a_buffer_is_any_tensor():
    x = torch.randn(3, 5).to(torch.bfloat16)
    buffer = host_tensor(64, pinned=False)
    CopyStream(False).copy(laid_in(buffer, x), x)
    assert torch.equal(laid_in(buffer, x), x) and laid_in(buffer, x).data_ptr() == buffer.data_ptr()
    assert laid_in(buffer, torch.tensor(1.0)).shape == ()


def test_pinned_memory_is_a_power_of_two():
    assert [host_bytes(n, True) for n in (0, 1, 2, 3, 64, 65)] == [0, 1, 2, 4, 64, 128]
    assert host_bytes(65, False) == 65


# ------------------------------------------------------------------------------------------------------------ chunks


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_change_nothing_but_rounding(kind, monkeypatch):
    model = random_model(KINDS[kind])
    expected, sizes = loss_and_gradients(model, 1.0), []
    for module in model.modules():
        if isinstance(module, MLP):
            module.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[:-1].numel()))
    monkeypatch.setattr(model_file, "MLP_CHUNK", 7)
    assert_close(loss_and_gradients(model, "offload"), expected)
    if kind == "experts":  # whose layers but one are mixtures, which are left whole
        assert 7 in sizes
    else:
        assert set(sizes) == {7, 41 % 7}


def test_chunks_repeat_the_dropout(monkeypatch):
    """Its masks are others than without chunks, but the same ones when a chunk is computed again."""
    monkeypatch.setattr(model_file, "MLP_CHUNK", 7)
    model = random_model(KINDS["llama"], lora.AdapterConfig(r=3, dropout=0.4))
    with monkeypatch.context() as patch:  # the same chunks, none of them computed twice
        patch.setattr(model_file, "checkpoint", lambda f, *args, **_: f(*args))
        patch.setattr("ops.chunks.checkpoint", lambda f, *args, **_: f(*args))
        expected = loss_and_gradients(model, "offload")
    assert_close(loss_and_gradients(model, "offload"), expected, 1e-4)


def test_rows_are_cut_as_one(parked):
    x = torch.randn(3, 5, 4, requires_grad=True)
    assert torch.equal(in_chunks(torch.sin, x, 4), torch.sin(x))
    sizes = []
    in_chunks(lambda part: sizes.append(len(part)) or part, x, 4)
    assert sizes == [4, 4, 4, 3]
    whole = []
    in_chunks(lambda part: whole.append(part) or part, x, 15)
    assert whole == [x]


@pytest.mark.parametrize(
    "edit",
    [
        lambda forward: lambda self, x: forward(self, x + 0.1 * x.roll(1, dims=-2)),  # each token sees the one before
        lambda forward: lambda self, x: forward(self, x) - forward(self, x).mean(dim=-2, keepdim=True),
        lambda forward: lambda self, x: forward(self, x.unflatten(0, (x.size(0), 1)).squeeze(1).expand(2, -1, -1)),
    ],
    ids=["roll", "mean", "fails"],
)
def test_an_edited_mlp_that_mixes_positions_is_not_cut(edit, monkeypatch, capsys):
    monkeypatch.setattr(model_file, "MLP_CHUNK", 7)
    model = random_model(KINDS["llama"])
    assert works_by_position(model.config)
    monkeypatch.setattr(MLP, "forward", edit(MLP.forward))
    works_by_position.cache_clear()
    assert model.mlp_chunk() is None
    assert "note: the MLP mixes positions" in capsys.readouterr().err
    works_by_position.cache_clear()


def test_an_adapter_of_ones_own_is_not_cut(monkeypatch):
    class Own(lora.LoRALinear):
        def low_rank(self, x):
            return super().low_rank(x) + x.mean(dim=-2, keepdim=True).sum()

    monkeypatch.setitem(lora.ADAPTERS, "own", Own)
    assert random_model(KINDS["llama"], lora.AdapterConfig("lora", r=3)).mlp_chunk() == model_file.MLP_CHUNK
    assert random_model(KINDS["llama"], lora.AdapterConfig("own", r=3)).mlp_chunk() is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_mlps_of_all_kinds_work_by_position(kind):
    assert works_by_position(config_from_json(KINDS[kind]))
