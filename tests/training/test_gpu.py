"""What only a GPU can show: bitsandbytes' CUDA kernels, optimisers, loss scaling, decoding. `pytest -m gpu` runs it."""

import contextlib
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, Ids
from prepared_parts import write_part
from test_divided_weights import DIVISIONS, SHAPE, parts_of

import finetune
import lora
from batching import open_samples
from generate import Settings as Sampling
from inference.decode import fastest_decoder
from inference.sampling import generate
from model import Layout, Transformer
from ops.alibi import alibi_slopes
from ops.attention import Scores, choose_attention, flash_varlen_attention, flex_attention, plain_attention
from ops.dequantize import NF4_VALUES, plain_block_scales, plain_dequantize_4bit, plain_quantize_4bit
from ops.offload import Parking
from quantize import QUANTIZERS, Linear8bit, bitsandbytes
from training import build
from training.metrics import flop_counter
from training.steps import planned_steps
from weights.checkpoint import load_model, load_optimizer, save_optimizer
from weights.families import config_from_json

HAS_GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU")
pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _exact_products():
    """start_fabric allows TF32, whose products are good to 1e-3 only."""
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def samples(tmp_path):
    lengths = (9, 30, 17, 24)
    written = [(torch.randint(3, 500, (n,)).tolist(), [False] * 4 + [True] * (n - 4), 0) for n in lengths]
    return open_samples(write_part(tmp_path, written), "train")


def trainer(folder, samples, **changes):
    """A function that makes the next step of a run on the GPU and gives its row; the model and its optimiser."""
    settings = finetune.Settings(
        checkpoint_dir=folder, data_dir=Path("none"), global_batch_size=len(samples), micro_batch_tokens=64, **changes
    )
    fabric = build.start_fabric(settings)
    torch.set_float32_matmul_precision("highest")
    assert fabric.device.type == "cuda"
    model, _ = build.build_model(settings, fabric.device, newest=None)
    optimizer = build.place_optimizer(settings, fabric, model)
    plan = planned_steps(settings, samples, 0, 100)
    model.train()

    def step():
        number, micro_batches = next(plan)
        return finetune.train_step(build.Run(settings, fabric, model, optimizer, samples), micro_batches, number, 1e-3)

    return step, model, optimizer, fabric


def trainable(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


# -------------------------------------------------------------------------------------------------- quantised layers


@needs_gpu
def test_nf4_on_the_gpu_is_the_plain_reference():
    weight = torch.randn(96, 256, device="cuda")
    layer = QUANTIZERS["bnb.nf4"](weight, None)
    codes, absmax = plain_quantize_4bit(weight, torch.tensor(NF4_VALUES, device="cuda"))
    assert torch.equal(layer.absmax.flatten(), absmax)
    assert (layer.codes.flatten() != codes).float().mean() < 1e-3  # a value between two codes may fall to either


@needs_gpu
@pytest.mark.parametrize("shape", [(96, 256), (129, 192), (1, 64), (37, 75), (300, 640)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_weight_dequantised_on_the_gpu_is_bitsandbytes(name, dtype, shape):
    layer = QUANTIZERS[name](torch.randn(shape, device="cuda"), None)
    if isinstance(layer, Linear8bit):
        expected = bitsandbytes().functional.int8_vectorwise_dequant(layer.codes, layer.scales).to(dtype)
    else:
        given = layer.codes, layer.stored_scales(), layer.values, shape, dtype
        assert torch.equal(layer.block_scales(), plain_block_scales(layer.stored_scales()))
        expected = plain_dequantize_4bit(*given)
        whole = (len(layer.absmax), 64)
        theirs = torch.ops.bitsandbytes.dequantize_4bit(
            layer.codes, layer.block_scales(), 64, layer.quant_type, whole, dtype
        )
        assert torch.equal(expected, theirs.flatten()[: expected.numel()].view(shape))
    assert torch.equal(layer.dequantize(dtype), expected)


@needs_gpu
@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("division", DIVISIONS)
def test_a_part_on_the_gpu_is_that_part_of_one_devices(name, division):
    weight = torch.randn(SHAPE, device="cuda")
    whole = QUANTIZERS[name](weight, None).dequantize(torch.bfloat16)
    for ((start, stop), (first, last)), part in parts_of(weight, QUANTIZERS[name], DIVISIONS[division]):
        assert torch.equal(part.dequantize(torch.bfloat16), whole[start:stop, first:last])


@needs_gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("rows", [1, 2, 3, 16, 40])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_quantised_layer_multiplies_by_what_it_dequantises_to(name, rows, dtype, tolerance):
    layer = QUANTIZERS[name](torch.randn(96, 256, device="cuda"), torch.randn(96, device="cuda"))
    x = torch.randn(rows, 256, device="cuda", dtype=dtype, requires_grad=True)
    plain = x.detach().float().requires_grad_()
    y, expected = layer(x), F.linear(plain, layer.dequantize(torch.float32), layer.bias)
    grad = torch.randn_like(y)
    got, wanted = torch.autograd.grad(y, x, grad)[0], torch.autograd.grad(expected, plain, grad.float())[0]
    for value, reference in ((y, expected), (got, wanted)):
        assert value.dtype == dtype
        assert (value.float() - reference).norm() < tolerance * reference.norm()
    with torch.no_grad():  # decoding may take another kernel
        assert (layer(x).float() - expected).norm() < tolerance * expected.norm()


# ----------------------------------------------------------------------------------------------------------- training


@needs_gpu
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_loss_and_gradients_are_those_of_the_cpu(tiny_checkpoint, samples, family, recompute):
    tokens, targets = samples.padded([0, 1, 2, 3])[:2]
    results = []
    for device in ("cpu", "cuda"):
        torch.set_float32_matmul_precision("highest")
        model = load_model(tiny_checkpoint(family), torch.float32, device).requires_grad_(True)
        loss = model(tokens.to(device), targets.to(device), recompute=recompute)
        loss.backward()
        results.append([loss.detach().cpu(), *(parameter.grad.cpu() for parameter in model.parameters())])
    for value, reference in zip(*reversed(results), strict=True):
        assert (value - reference).norm() < 1e-4 * reference.norm() + 1e-5


@needs_gpu
@pytest.mark.parametrize("quantize", [None, *QUANTIZERS])
def test_an_adapter_learns(tiny_model_dir, samples, quantize):
    step, model, _, _ = trainer(tiny_model_dir, samples, quantize=quantize, recompute=1.0)
    rows = [step() for _ in range(5)]
    assert all(row["grad_norm"] > 0 for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert all(value.dtype == torch.float32 for value in trainable(model).values())


@needs_gpu
@pytest.mark.parametrize(
    "flags", [{}, {"method": "full"}, {"quantize": "bnb.nf4", "recompute": 1.0, "lora_dropout": 0.1}]
)
def test_a_step_waits_for_the_gpu_once(tiny_model_dir, samples, flags):
    """tests/training/test_waiting.py shows the same without a GPU."""
    step, _, _, _ = trainer(tiny_model_dir, samples, **flags)
    step(), step()  # kernels are compiled and memory is taken in the first ones
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(warning.message) for warning in warned if "synchronizing" in str(warning.message)]
    assert len(waits) == 1, waits


@needs_gpu
def test_the_fused_optimiser_steps_as_the_plain_one_on_a_cpu():
    start, gradients = torch.randn(40, 30), torch.randn(3, 40, 30)
    plain = torch.nn.Parameter(start.clone())
    fused = torch.nn.Parameter(start.to("cuda"))
    settings = finetune.Settings(checkpoint_dir=Path("none"), data_dir=Path("none"), weight_decay=0.1)
    options = {"lr": settings.learning_rate, "betas": settings.betas, "weight_decay": 0.1}
    reference = torch.optim.AdamW([plain], **options, foreach=False)
    optimizer = build.build_optimizer(settings, torch.nn.ParameterList([fused]))
    for gradient in gradients:
        plain.grad, fused.grad = gradient.clone(), gradient.to("cuda")
        reference.step(), optimizer.step()
    torch.testing.assert_close(fused.detach().cpu(), plain.detach(), rtol=1e-5, atol=1e-6)


@needs_gpu
@pytest.mark.parametrize(
    "flags",
    [
        dict(optimizer="adamw"), dict(optimizer="adamw-8bit"), dict(optimizer="adamw-paged"),
        dict(optimizer="adamw-8bit-paged"), dict(offload="optimizer"), dict(optimizer="lion"), dict(optimizer="muon"),
        dict(optimizer="apollo", apollo_rank=4), dict(optimizer="schedule-free", schedule="constant"),
        dict(optimizer="adafactor"), dict(optimizer="sgd"),
    ],
    ids=str,
)  # fmt: skip
def test_an_optimisers_state_survives_saving(tiny_model_dir, samples, tmp_path, flags):
    first, model, state, _ = trainer(tiny_model_dir, samples, method="full", precision="32-true", **flags)
    for _ in range(2):
        first()
    save_optimizer(state, tmp_path)
    second, copy, copied_state, _ = trainer(tiny_model_dir, samples, method="full", precision="32-true", **flags)
    with torch.no_grad():
        for parameter, source in zip(copy.parameters(), model.parameters(), strict=True):
            parameter.copy_(source)
    load_optimizer(copied_state, tmp_path)
    before = trainable(model)
    first(), second()
    for (name, value), other in zip(trainable(model).items(), trainable(copy).values(), strict=True):
        assert not torch.equal(value, before[name]), name
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)


@needs_gpu
def test_large_8bit_states_have_8_bits():
    parameter = torch.nn.Parameter(torch.randn(256, 512, device="cuda"))
    settings = finetune.Settings(checkpoint_dir=Path("none"), data_dir=Path("none"), optimizer="adamw-8bit")
    optimizer = build.build_optimizer(settings, torch.nn.ParameterList([parameter]))
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert optimizer.state[parameter]["state1"].dtype == torch.uint8


@needs_gpu
def test_a_loss_scale_too_large_skips_the_step_and_halves(tiny_model_dir, samples):
    step, model, _, fabric = trainer(tiny_model_dir, samples, precision="16-mixed")
    step()
    scaler = fabric.strategy.precision.scaler
    scaler.load_state_dict(scaler.state_dict() | {"scale": 2.0**80})
    before = trainable(model)
    step()
    assert all(torch.equal(value, before[name]) for name, value in trainable(model).items())
    assert scaler.get_scale() == 2.0**79
    scaler.load_state_dict(scaler.state_dict() | {"scale": 2.0**8})
    step()
    assert any(not torch.equal(value, before[name]) for name, value in trainable(model).items())


# -------------------------------------------------------------------------------------------------------- host memory


def wide_model(dtype):
    """Blocks whose inputs are large enough that a copy takes a while: 4 MB in fp32 for 2,048 positions."""
    values = {"model_type": "llama", **SMALL, "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8,
              "num_key_value_heads": 4, "num_hidden_layers": 8, "max_position_embeddings": 4096}  # fmt: skip
    model = Transformer(config_from_json(values))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.02)
    return model.to("cuda", dtype).train()


@needs_gpu
@pytest.mark.parametrize("chunk", [4096, 300])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_inputs_of_blocks_wait_in_pinned_memory(dtype, tolerance, chunk, monkeypatch):
    """Steps of different lengths one after the other, so that buffers are used again while copies go on."""
    parked, park = [], Parking.park
    monkeypatch.setattr(Parking, "park", lambda self, x: parked.append(park(self, x)) or parked[-1])
    monkeypatch.setattr("model.MLP_CHUNK", chunk)
    model = wide_model(dtype)
    for T in (2048, 1500, 2048, 7):
        tokens, results = torch.randint(3, 500, (1, T), device="cuda"), []
        for recompute in (1.0, "offload"):
            loss = model(tokens, tokens, recompute=recompute, offsets=[0, T // 3, T])
            loss.backward()
            results.append([loss.detach(), *(p.grad for p in model.parameters())])
            model.zero_grad()
        assert len(parked) == 8 and all(x.host.is_pinned() and x.source is None for x in parked)
        parked.clear()
        for value, reference in zip(*reversed(results), strict=True):
            assert (value - reference).float().norm() < tolerance * reference.float().norm() + 1e-5


@needs_gpu
def test_parked_inputs_take_no_memory_on_the_gpu():
    model, tokens = wide_model(torch.float32), torch.randint(3, 500, (1, 2048), device="cuda")
    kept = {}
    for recompute in (1.0, "offload", 1.0, "offload"):  # the first ones also allocate what libraries keep
        before = torch.cuda.memory_allocated()
        loss = model(tokens, tokens, recompute=recompute)
        kept[recompute] = torch.cuda.memory_allocated() - before
        loss.backward()
        model.zero_grad()
        del loss
    assert kept[1.0] - kept["offload"] > 6 * 2048 * 512 * 4  # of 8 blocks


@needs_gpu
@pytest.mark.parametrize("most", [0.0, 1.0])
def test_adamw_in_host_memory_steps_as_on_the_gpu(tiny_model_dir, samples, most):
    ended = []
    for where in (None, "optimizer"):
        flags = dict(method="full", precision="32-true", max_grad_norm=most, offload=where)
        step, model, optimizer, _ = trainer(tiny_model_dir, samples, **flags)
        start, rows = trainable(model), [step() for _ in range(3)]
        ended.append((rows, trainable(model)))
    assert all(p.grad is None for p in model.parameters())
    states = [value for state in optimizer.state.values() for value in state.values()]
    assert all(value.device.type == "cpu" and value.dtype == torch.float32 for value in states)
    buffer = optimizer.buffers.get()
    assert buffer.is_pinned()
    (rows, there), (rows_here, here) = ended
    assert [row["loss"] for row in rows_here] == pytest.approx([row["loss"] for row in rows], rel=1e-4)
    assert [row["grad_norm"] for row in rows_here] == pytest.approx([row["grad_norm"] for row in rows], rel=1e-3)
    for name, value in there.items():
        assert (here[name] - value).norm() < 0.02 * (value - start[name]).norm(), name


@needs_gpu
def test_bf16_weights_are_those_of_host_memory(tiny_model_dir, samples):
    flags = dict(method="full", offload="optimizer", recompute="offload", max_grad_norm=0.0)
    step, model, optimizer, _ = trainer(tiny_model_dir, samples, **flags)
    rows = [step() for _ in range(5)]
    assert rows[-1]["loss"] < rows[0]["loss"]
    for parameter, weight in optimizer.weights.items():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter.detach().cpu(), weight.master.detach().to(torch.bfloat16))


# ---------------------------------------------------------------------------------------------------------- attention

H, K, LENGTHS = 6, 2, (5, 1, 140, 128, 2, 300)  # 576 positions: four and a half blocks of FlexAttention
SCORES = {
    "products": {},
    "softcap": dict(softcap=1.5),
    "ALiBi": dict(slopes=alibi_slopes(H)),
    "sinks": dict(sinks=True),
    "all": dict(softcap=3.0, slopes=alibi_slopes(H), sinks=True),
}
# |difference| / |exact|. bf16 and fp16 round to 2^-9 and 2^-12. On a CPU attention written out in bf16 is up to 0.006
# from the exact, values and every gradient, with these lengths and scores.
TOLERANCES = {torch.bfloat16: 0.02, torch.float16: 0.003, torch.float32: 2e-5}


@pytest.fixture
def no_kernels():
    """Kernels that earlier tests have compiled count towards the limit of graphs."""
    torch._dynamo.reset()


def random_rows(rows, T, d, dtype, sinks):
    """q, k, v as transposed views like the model's and the sinks (or None), on the GPU, with gradients."""
    q, k, v = (torch.randn(rows, T, heads, d, dtype=dtype, device="cuda").transpose(1, 2) for heads in (H, K, K))
    sinks = torch.randn(H, device="cuda") if sinks else None
    return [x if x is None else x.requires_grad_() for x in (q, k, v, sinks)]


def assert_is_plain(inputs, layout, scores, way):
    """What `choose_attention` chooses is `way`, and gives values and gradients of attention written out in fp32."""
    torch.set_float32_matmul_precision("highest")
    q = inputs[0]
    attend = choose_attention(layout, q.size(-1), q.dtype, scores)
    assert attend.function is way
    exact = [None if x is None else x.detach().float().requires_grad_() for x in inputs]
    y = attend(*inputs)
    expected = plain_attention(*exact, scores, layout.mask(scores.window), layout.back())
    grad = torch.randn_like(y)
    given, of = ([x for x in tensors if x is not None] for tensors in (inputs, exact))
    got, wanted = torch.autograd.grad(y, given, grad), torch.autograd.grad(expected, of, grad.float())
    assert y.dtype == q.dtype and [x.dtype for x in got] == [x.dtype for x in given]
    for one, other in zip((y, *got), (expected, *wanted), strict=True):
        assert (one.float() - other).norm() < TOLERANCES[q.dtype] * other.norm()


def layout_of(rows):
    """Samples of LENGTHS in one row, or rows of 200."""
    offsets = None if rows > 1 else [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    T = 200 if rows > 1 else sum(LENGTHS)
    return Layout(torch.zeros(rows, T, dtype=torch.int64, device="cuda"), offsets=offsets)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [64, 100, 10, 128, 256])
@pytest.mark.parametrize("rows, window", [(1, None), (1, 50), (3, None), (3, 50)])
def test_flash_attention_is_the_plain_one(rows, window, d, dtype):
    layout = layout_of(rows)
    inputs = random_rows(rows, layout.tokens.size(1), d, dtype, sinks=False)
    assert_is_plain(inputs, layout, Scores(d**-0.5, window), flash_varlen_attention)


@needs_gpu
@pytest.mark.parametrize(
    "kind, dtype, d, rows, window",
    [
        ("products", torch.float32, 64, 1, None),
        ("products", torch.float32, 10, 3, 50),
        ("all", torch.float32, 64, 1, 150),
        ("all", torch.float32, 128, 3, None),
        ("softcap", torch.bfloat16, 256, 1, 150),  # Gemma 2
        ("ALiBi", torch.bfloat16, 64, 1, None),  # BLOOM, Falcon-RW
        ("ALiBi", torch.bfloat16, 128, 3, None),  # MPT
        ("sinks", torch.bfloat16, 64, 1, 128),  # GPT-OSS
        ("all", torch.float16, 80, 1, 150),
    ],
)
def test_flex_attention_is_the_plain_one(kind, dtype, d, rows, window, no_kernels):
    layout, known = layout_of(rows), SCORES[kind]
    inputs = random_rows(rows, layout.tokens.size(1), d, dtype, known.get("sinks"))
    assert_is_plain(inputs, layout, Scores(d**-0.5, window, **known), flex_attention)


@needs_gpu
def test_layers_share_a_block_mask_and_lengths_a_kernel(no_kernels):
    graphs = []
    for lengths in ((300, 41), (700,), (256, 257, 1000), (20, 400)):
        offsets = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        layout = Layout(torch.zeros(1, offsets[-1], dtype=torch.int64, device="cuda"), offsets=offsets)
        inputs = random_rows(1, offsets[-1], 64, torch.bfloat16, sinks=False)
        ways = [choose_attention(layout, 64, torch.bfloat16, Scores(scale, softcap=9.0)) for scale in (0.1, 0.2)]
        assert ways[0].known["mask"] is ways[1].known["mask"]
        for attend in ways:
            attend(*inputs).sum().backward()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1]


@needs_gpu
def test_flex_attention_has_no_tensor_of_all_pairs_of_positions(no_kernels):
    T = 32768
    inputs = random_rows(1, T, 64, torch.bfloat16, sinks=True)
    layout = Layout(torch.zeros(1, T, dtype=torch.int64, device="cuda"), offsets=[0, 3000, T])
    attend = choose_attention(layout, 64, torch.bfloat16, Scores(0.125, sinks=True))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attend(*inputs).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < T * T  # a mask would take a byte a pair


@needs_gpu
@pytest.mark.parametrize("family", ["gemma2", "bloom", "mpt", "gpt_oss"])
@pytest.mark.parametrize("recompute", [0.0, 1.0])
def test_families_train_on_the_gpu_as_on_the_cpu(family, recompute, tiny_models, samples, no_kernels):
    """Packed samples, without FLOPs counted and with them."""
    tokens, targets, offsets = samples.packed([0, 1, 2, 3])
    tokens = tokens % 150 + 3
    targets = torch.where(targets < 0, targets, targets % 150 + 3)
    results = []
    for device, count in (("cpu", False), ("cuda", False), ("cuda", True)):
        torch.set_float32_matmul_precision("highest")
        model = tiny_models((family, 0)).load().to(device).requires_grad_(True)
        with flop_counter() if count else contextlib.nullcontext() as counter:
            loss = model(tokens.to(device), targets.to(device), recompute=recompute, offsets=offsets)
            loss.backward()
        assert not count or counter.get_total_flops() > 0
        results.append([loss.detach().cpu(), *(p.grad.cpu() for p in model.parameters() if p.grad is not None)])
    reference, *others = results
    for other in others:
        for value, wanted in zip(other, reference, strict=True):
            assert (value - wanted).norm() < 1e-4 * wanted.norm() + 1e-5


# ----------------------------------------------------------------------------------------------------------- decoding


@needs_gpu
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_greedy_answers_are_those_of_the_cpu(tiny_checkpoint, family):
    prompts = [torch.randint(3, 500, (length,)).tolist() for length in (4, 19, 11)]
    sampling = Sampling(checkpoint_dir=Path("none"), max_new_tokens=12, temperature=0)
    answers = {}
    for device in ("cpu", "cuda"):
        torch.set_float32_matmul_precision("highest")
        model = load_model(tiny_checkpoint(family), torch.float32, device)
        replies = [Ids() for _ in prompts]
        for _ in generate(fastest_decoder(model), prompts, replies, sampling, [1, 2, 3]):
            pass
        answers[device] = [reply.ids for reply in replies]
    assert answers["cuda"] == answers["cpu"]
    assert all(len(ids) == 12 for ids in answers["cpu"])


@needs_gpu
@pytest.mark.parametrize("quantize", [None, *QUANTIZERS])
def test_a_batch_is_decoded_in_bf16(tiny_checkpoint, quantize):
    model = load_model(tiny_checkpoint("llama"), torch.bfloat16, "cuda", quantize)
    lora.add_lora(model, lora.AdapterConfig(r=4))
    replies = [Ids() for _ in range(3)]
    prompts = [[5] * 3, [7] * 9, [11] * 6]
    sampling = Sampling(checkpoint_dir=Path("none"), max_new_tokens=8, temperature=0.8, top_k=20, top_p=0.9)
    for _ in generate(fastest_decoder(model.eval()), prompts, replies, sampling, [1, 2, 3]):
        pass
    assert all(len(reply.ids) == 8 and max(reply.ids) < 512 for reply in replies)
