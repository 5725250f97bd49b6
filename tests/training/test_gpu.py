"""What only a GPU can show: bitsandbytes' CUDA kernels, optimisers, loss scaling, decoding. `pytest -m gpu` runs it."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, Ids

import finetune
import lora
from batching import Samples
from generate import Settings as Sampling
from inference.decode import fastest_decoder
from inference.sampling import generate
from model import Transformer
from ops.dequantize import NF4_VALUES, plain_block_scales, plain_dequantize_4bit, plain_quantize_4bit
from ops.offload import Parking
from preparation.record_store import SampleWriter
from quantize import QUANTIZERS, Linear8bit, bitsandbytes
from training import build
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
    writer = SampleWriter()
    for length in (9, 30, 17, 24):
        writer.add(torch.randint(3, 500, (length,)).tolist(), [False] * 4 + [True] * (length - 4), source=0)
    writer.save(tmp_path / "train.safetensors")
    return Samples(tmp_path / "train.safetensors")


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
    assert torch.equal(layer.state.absmax.flatten(), absmax)
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
        given = layer.codes, layer.stored_scales(), layer.state.code, shape, dtype
        assert torch.equal(layer.block_scales(), plain_block_scales(layer.stored_scales()))
        expected = plain_dequantize_4bit(*given)
        whole = (len(layer.state.absmax), 64)
        theirs = torch.ops.bitsandbytes.dequantize_4bit(
            layer.codes, layer.block_scales(), 64, layer.state.quant_type, whole, dtype
        )
        assert torch.equal(expected, theirs.flatten()[: expected.numel()].view(shape))
    assert torch.equal(layer.dequantize(dtype), expected)


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
def test_the_fused_optimiser_steps_as_the_plain_one_on_a_cpu():
    start, gradients = torch.randn(40, 30), torch.randn(3, 40, 30)
    plain = torch.nn.Parameter(start.clone())
    fused = torch.nn.Parameter(start.to("cuda"))
    settings = finetune.Settings(checkpoint_dir=Path("none"), data_dir=Path("none"), weight_decay=0.1)
    options = {"lr": settings.learning_rate, "betas": (settings.beta1, settings.beta2), "weight_decay": 0.1}
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
        dict(optimizer="adamw-8bit-paged"), dict(offload="optimizer"),
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
