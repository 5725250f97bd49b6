"""Quantised layers that several devices divide: each part is, bit for bit, that part of the layer of one device."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from model import Transformer
from ops import gpu
from quantize import QUANTIZERS, Cut, Linear4bit, bitsandbytes, check_divisible, quantized_layers
from shell.cli import UserError
from training.memory import plan
from training.parallel.part import Part, check_quantized
from weights.families import config_from_json

ROOT = Path(__file__).parents[1]
every_quantizer = pytest.mark.parametrize("name", QUANTIZERS)
SHAPE = 40, 768  # of twelve blocks in a row: 256 that share a scale in double quantisation end within one
ROWS, COLUMNS = (0, 17, 40), (0, 320, 768)
DIVISIONS = {
    "rows": (ROWS, (0, SHAPE[1])),
    "columns": ((0, SHAPE[0]), COLUMNS),
    "both": (ROWS, COLUMNS),
    "one": ((0, SHAPE[0]), (0, SHAPE[1])),
}


def parts_of(weight, quantizer, division):
    """The layer of each device, with its box of the weight: rows, columns. As if all computed at one time.

    division: where rows and where columns are cut, with the beginning and the end.
    """
    boxes, found = [*itertools.product(*map(itertools.pairwise, division))], []

    def make(box, maximum):
        (start, stop), (first, last) = box
        part = weight[start:stop, first:last].contiguous()
        return quantizer(part, None, cut=Cut(tuple(weight.shape), start, first, maximum))

    for box in boxes:
        make(box, lambda numbers: found.append(numbers.clone()))
    largest = torch.stack(found).amax(0) if found else None
    return [(box, make(box, lambda numbers: numbers.copy_(largest))) for box in boxes]


@every_quantizer
@pytest.mark.parametrize("division", DIVISIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_part_is_that_part_of_one_devices(name, division, dtype):
    weight = torch.randn(SHAPE) * torch.rand(SHAPE[0], 1)
    whole = QUANTIZERS[name](weight, None).dequantize(dtype)
    for ((start, stop), (first, last)), part in parts_of(weight, QUANTIZERS[name], DIVISIONS[division]):
        expected = whole[start:stop, first:last]
        assert torch.equal(part.dequantize(dtype), expected)
        for stored in part.by_rows().values():
            assert len(stored) == stop - start
        x = torch.randn(3, last - first, dtype=dtype)
        assert torch.equal(part(x), F.linear(x, expected.contiguous()))


def test_a_part_by_itself_would_be_another():
    """So the test above can fail: scales and codes do depend on what other devices have."""
    weight = torch.randn(SHAPE) * torch.rand(SHAPE[0], 1)
    for name, columns in (("bnb.nf4-dq", SHAPE[1]), ("bnb.int8", COLUMNS[1])):
        alone = QUANTIZERS[name](weight[: ROWS[1], :columns].contiguous(), None).dequantize(torch.float32)
        assert not torch.equal(alone, QUANTIZERS[name](weight, None).dequantize(torch.float32)[: ROWS[1], :columns])


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(96, 64), (5, 24), (130, 192)], ids=str)
def test_double_quantisation_is_bitsandbytes_own(kind, shape):
    weight = torch.randn(shape)
    layer = Linear4bit(weight, None, kind, double_quant=True)
    codes, state = bitsandbytes().functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=True, quant_type=kind
    )
    assert torch.equal(layer.codes[: len(codes)], codes) and torch.equal(layer.absmax, state.absmax.flatten())
    assert torch.equal(layer.offset, state.offset) and torch.equal(layer.nested.absmax, state.state2.absmax)


@pytest.mark.parametrize("name", ["bnb.fp4-dq", "bnb.int8"])
@pytest.mark.parametrize("division", DIVISIONS)
def test_the_kernels_give_the_same(name, division, interpreted, monkeypatch):
    """Triton's, for whole weights and for a few rows of a product."""
    weight = torch.randn(SHAPE) / 10
    whole, names = QUANTIZERS[name](weight, None).dequantize(torch.float32), []
    Linear4bit.is_standard()  # which may try the kernels
    monkeypatch.setattr(gpu, "observers", [lambda name, *_: names.append(name)])
    for ((start, stop), (first, last)), part in parts_of(weight, QUANTIZERS[name], DIVISIONS[division]):
        names.clear()
        expected = whole[start:stop, first:last]
        assert torch.equal(part.dequantize(torch.float32), expected)
        x = torch.randn(2, last - first)
        with torch.no_grad():
            torch.testing.assert_close(part(x), x @ expected.T, rtol=1e-4, atol=1e-4)
        assert names == (["dequantize_rows"] * 2 if name == "bnb.int8" else ["dequantize_4bit", "multiply_4bit_sums"])


@every_quantizer
@pytest.mark.parametrize("division", DIVISIONS)
def test_a_part_takes_its_share_of_memory(name, division):
    """Beside the scales of scales, of which each device has all: a 4,000th of a weight's bytes."""
    weight = torch.randn(512, 1024)
    rows, columns = DIVISIONS[division]
    cuts = [0, 192, 512] if len(rows) > 2 else [0, 512], [0, 384, 1024] if len(columns) > 2 else [0, 1024]
    parts = [part for _, part in parts_of(weight, QUANTIZERS[name], cuts)]
    whole = QUANTIZERS[name](weight, None)
    shared = whole.nested.absmax.nbytes if name.endswith("-dq") else 0
    rows_scales = whole.scales.nbytes if name == "bnb.int8" else 0
    own = whole.nbytes() - shared - rows_scales
    assert sum(part.nbytes() for part in parts) == own + len(parts) * shared + (len(cuts[1]) - 1) * rows_scales
    assert shared <= whole.nbytes() / 2000
    for part in parts:  # and no view of a larger tensor
        for stored in part.by_rows().values():
            assert stored.untyped_storage().nbytes() == stored.nbytes


LLAMA = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 256, "intermediate_size": 320, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "rope_theta": 1e4, "tie_word_embeddings": False, "attention_bias": False,
}  # fmt: skip


@every_quantizer
def test_the_plan_counts_what_a_device_stores(name):
    """Of the device along tensor with the largest part, which is the last one."""
    config = config_from_json(LLAMA)
    part, whole = Part(config, 1, 2), Transformer(config)
    expected = 0
    for path, layer in part.model().named_modules():
        if path.startswith("model.layers.") and isinstance(layer, torch.nn.Linear):
            cut = part.cut(path, whole.get_submodule(path).weight.shape)
            expected += QUANTIZERS[name](layer.weight.detach(), None, cut=cut).nbytes()
    predictor = plan.Predictor(plan.Job(config, "cpu", torch.float32, quantize=name, tensor=2))
    assert sum(layer.nbytes() for layer in quantized_layers(predictor.model)) == expected


def test_what_cannot_be_divided_is_refused():
    narrow = config_from_json(LLAMA | {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 3})
    with pytest.raises(UserError, match="96 inputs cannot be divided in 4 bits"):
        check_quantized(narrow, 1, "bnb.nf4-dq")
    check_quantized(narrow, 1, "bnb.int8")
    heads = config_from_json(LLAMA | {"head_dim": 32})  # of 4 heads with 2 of keys and values two, of 32, at each
    check_quantized(heads, 2, "bnb.fp4-dq")
    with pytest.raises(UserError, match="32 inputs cannot be divided in 4 bits"):
        check_quantized(heads, 4, "bnb.fp4-dq")


def test_a_quantiser_that_says_nothing_of_parts_is_refused(monkeypatch):
    class Ternary(Linear4bit.__mro__[1]):
        """As a researcher may write one."""

    monkeypatch.setitem(QUANTIZERS, "ternary", Ternary)
    with torch.device("meta"), pytest.raises(UserError, match="stored as Ternary has it cannot be divided"):
        check_divisible("ternary", Transformer(config_from_json(LLAMA)))


def test_looking_at_a_model_without_memory_leaves_nothing_behind():
    """bitsandbytes keeps the first table of 8-bit scales for the process."""
    command = (
        "import torch, quantize; quantizer = quantize.QUANTIZERS['bnb.nf4-dq'];\n"
        "with torch.device('meta'): quantizer(torch.empty(4, 64), None).by_rows()\n"
        "print(quantizer(torch.ones(4, 64), None).dequantize(torch.float32).unique().tolist())"
    )
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[1.0]\n", done.stderr
