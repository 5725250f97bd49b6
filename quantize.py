"""Linear layers whose frozen weight is kept in 4 or 8 bits: what `--quantize` chooses among.

bitsandbytes does the quantising, called directly, on CPU and CUDA alike. A layer stores its result and multiplies by
what that dequantises to, so the gradient is the exact one of the dequantised weight. ops/dequantize.py writes the
formats out in plain torch: slow, readable, and bit for bit the same. On CUDA its Triton kernels dequantise.

A model's layers may all have the same quantiser, or each its own. Then they have a plan: a dict from the path of every
linear layer in the blocks to a key of `QUANTIZERS` or "none". eval/quality.py --sensitivity writes one to a file.

To add a quantiser: a class that inherits from `QuantizedLinear` and a line in `QUANTIZERS`; nothing else. The class has
- `__init__(self, weight, bias)`, which calls `super().__init__(weight, bias)` and stores the quantised weight on the
  weight's device, in plain attributes. It also runs on tensors without values ("meta"): it must not look at any.
- `dequantize(dtype)`, the weight that the layer multiplies by, and `nbytes()`, what it takes in memory.
It may override `forward` where there is a faster product. If several devices are to divide its layers, `__init__` also
takes `cut`, a `Cut`, and there is `by_rows`. bitsandbytes takes seconds to import, so that waits until a layer is made.
"""

import logging
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from model import Config
from ops.dequantize import (
    BLOCK,
    SCALE_BLOCK,
    BlockScales,
    dequantize_4bit,
    dequantize_rows,
    fits_multiply_4bit,
    multiply_4bit,
    part_of_scales,
    plain_multiply_4bit,
)
from ops.dtypes import as_multiplied
from ops.gpu import in_triton
from ops.linear import stored_linear
from shell.cli import UserError
from shell.files import read_json, whole_file, write_json

BLOCKS = "model.layers."  # before the path of every layer that may be quantised


def bitsandbytes() -> ModuleType:
    """The bitsandbytes package, without its advice to install `kernels`: with it, it would fetch native code."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes

    return bitsandbytes


@cache
def scale_values() -> Tensor:
    """bitsandbytes' table of what 8-bit scales stand for, (256,) fp32. A real tensor, also where others are made."""
    with _disable_current_modes(), torch.device("cpu"):
        return bitsandbytes().functional.create_dynamic_map()


class Cut(NamedTuple):
    """Which part of a weight a layer has, if several devices divide it: they quantise it as one device does the whole.

    shape: of the whole weight. row, column: where the part begins in it. maximum: called by all of these devices with
    tensors of one shape, gives each of the tensors the largest number at each place.
    """

    shape: tuple[int, int]
    row: int = 0
    column: int = 0
    maximum: Callable[[Tensor], object] = lambda tensor: None

    def of_whole(self, sizes: Tensor, columns: int) -> Tensor:
        """From the largest size of each `columns` weights in a row, (rows, n) in this part, those of the whole."""
        whole = sizes.new_zeros(self.shape[0], self.shape[1] // columns)
        self.part_of(whole, sizes.shape, columns).copy_(sizes)
        self.maximum(whole)
        return whole

    def part_of(self, whole: Tensor, shape: tuple[int, int], columns: int) -> Tensor:
        """Of a tensor with a number for each `columns` weights in a row, those of this part, of this shape; a view."""
        row, column = self.row, self.column // columns
        return whole[row : row + shape[0], column : column + shape[1]]


class QuantizedLinear(nn.Module):
    """What every quantised layer is: y = x @ dequantize(x.dtype).T + bias. The page's beginning says what to add."""

    shared: tuple[str, ...] = ()  # what devices that divide a layer all have of it, by the attributes' names

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.device = weight.device
        self.bias = bias  # (out_features,), unquantised, or None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) to (..., out_features), in x's dtype."""
        y = stored_linear(x, self.dequantize)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight that this layer multiplies by, (out_features, in_features) of `dtype`."""
        raise NotImplementedError

    def nbytes(self) -> int:
        """Bytes that the quantised weight takes, its scales included."""
        raise NotImplementedError

    def by_rows(self) -> dict[str, Tensor]:
        """What the weight is stored in, by the attribute's name, with a row for each row of the weight.

        So several devices can divide the layer by its rows: then these are parameters of those shapes, and the rest is
        what `shared` names. Raises UserError if it cannot be divided so.
        """
        raise UserError(f"--shard and --parallel: a weight stored as {type(self).__name__} has it cannot be divided")


class Linear4bit(QuantizedLinear):
    """4 bits a weight and one fp32 scale for each 64: 4.5 bits. `double_quant` stores the scales in 8 bits: 4.13."""

    shared = ("values", "nested", "offset")

    def __init__(self, weight: Tensor, bias: Tensor | None, data_type: str, double_quant: bool, cut: Cut | None = None):
        super().__init__(weight, bias)
        # From fp32 always: the codes must not depend on the precision that the rest of the model is loaded in.
        codes, state = bitsandbytes().functional.quantize_4bit(
            weight.float().contiguous(), blocksize=BLOCK, quant_type=data_type
        )
        self.codes = F.pad(codes, (0, 0, 0, -len(codes) % (BLOCK // 2)))  # whole blocks of two codes a byte
        self.absmax, self.quant_type, self.values = state.absmax.flatten(), state.quant_type, state.code
        self.nested, self.offset, self.cut = None, None, cut
        if double_quant:
            self._quantize_scales()

    def _quantize_scales(self):
        """Store the scales in 8 bits as bitsandbytes does: less the mean of the layer, with a scale for each 256."""
        absmax = self.absmax.view(self.out_features, -1) if self.cut else self.absmax
        # Of the 256 some may be in other parts.
        whole = self.cut.of_whole(absmax, BLOCK).flatten() if self.cut else absmax
        self.offset = whole.mean()
        quantize = bitsandbytes().functional.quantize_blockwise
        codes, self.nested = quantize(whole - self.offset, scale_values(), blocksize=SCALE_BLOCK)
        if self.cut:  # a copy: no view that would keep those of the other parts
            codes = self.cut.part_of(codes.view(self.cut.shape[0], -1), absmax.shape, BLOCK).flatten().clone()
        self.absmax = codes

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """As in `QuantizedLinear`."""
        if in_triton(self.codes, dtype):
            shape = (self.out_features, self.in_features)
            return dequantize_4bit(self.codes, self.stored_scales(), self.values, shape, dtype)
        # The operation itself, which torch.compile can trace; bitsandbytes' function around it would break the graph.
        # Whole blocks are given as rows, as its AVX-512 kernel takes each row for the start of a block.
        scales = self.block_scales()
        shape, kind = (len(scales), BLOCK), self.quant_type
        blocks = torch.ops.bitsandbytes.dequantize_4bit(self.codes.view(-1, 1), scales, BLOCK, kind, shape, dtype)
        return blocks.flatten()[: self.out_features * self.in_features].view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """As in `QuantizedLinear`; a few rows without gradient, as in decoding, by a kernel that reads the codes."""
        x = as_multiplied(x)
        learns = torch.is_grad_enabled() and x.requires_grad
        if not learns and in_triton(x) and fits_multiply_4bit(x) and self.is_standard():
            return self._from_codes(x, multiply_4bit)
        return super().forward(x)

    def _from_codes(self, x, multiply):
        """x (..., in_features) to (..., out_features) by `multiply_4bit` or the plain form of it."""
        y = multiply(x, self.codes, self.stored_scales(), self.values, self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @classmethod
    @cache
    def is_standard(cls) -> bool:
        """Whether this is `Linear4bit` itself (no subclass) and multiplies by what codes and scales stand for.

        A researcher may edit `dequantize`, or `QuantizedLinear.forward`, in place, so that is tried on a small layer
        of a CPU. Then a line on standard error says that the fast way is not taken.
        """
        if cls is not Linear4bit:
            return False
        with _disable_current_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False):
            try:
                follows = cls._follows_formula()
            except (AttributeError, RuntimeError, TypeError, ValueError):  # what else an edit may lead to
                follows = False
        if not follows:
            print(f"note: {cls.__name__} computes something new: going on without its fast way", file=sys.stderr)
        return follows

    @classmethod
    def _follows_formula(cls):
        """Whether a small layer, of 5 rows, computes what its codes and scales stand for."""
        x, weight, bias = (torch.linspace(-9, 9, n, device="cpu").sin() for n in (3 * BLOCK, 5 * BLOCK, 5))
        layer, x = cls(weight.view(5, BLOCK), bias, data_type="nf4", double_quant=True), x.view(3, BLOCK)
        found, formula = QuantizedLinear.forward(layer, x), layer._from_codes(x, plain_multiply_4bit)
        return found.shape == formula.shape and torch.allclose(found, formula, rtol=1e-4, atol=1e-4)

    def stored_scales(self) -> BlockScales:
        """The scale of each block as it is stored; of a part of a layer with double quantisation, in fp32."""
        if self.nested is None or self._is_part():
            return BlockScales(self.block_scales())
        return BlockScales(self.absmax.flatten(), self.nested.code, self.nested.absmax, self.offset)

    def block_scales(self) -> Tensor:
        """The scale of each block of 64 weights, in row order: fp32, also where they are stored in 8 bits."""
        if self.nested is None:
            return self.absmax.flatten().float()
        if self._is_part():
            absmax = self.absmax.view(self.out_features, -1)
            scales = BlockScales(absmax, self.nested.code, self.nested.absmax, self.offset)
            first = self.cut.row, self.cut.column // BLOCK
            return part_of_scales(scales, first, self.cut.shape[1] // BLOCK).flatten()
        scales = bitsandbytes().functional.dequantize_blockwise(self.absmax.flatten(), self.nested)
        return (scales + self.offset).float()

    def _is_part(self):
        """Whether this is less than a whole layer: then its blocks are not numbered as those that share a scale are."""
        return self.cut is not None and self.cut.shape != (self.out_features, self.in_features)

    def by_rows(self) -> dict[str, Tensor]:
        """As in `QuantizedLinear`: rows of whole blocks."""
        if self.in_features % BLOCK:
            raise UserError(
                f"--shard and --parallel: a layer, or a part of one, with {self.in_features} inputs cannot be divided "
                f"in 4 bits: its rows are no whole blocks of {BLOCK} weights with a scale each; take another size of "
                "tensor, --quantize bnb.int8 or none"
            )
        return {name: getattr(self, name).view(self.out_features, -1) for name in ("codes", "absmax")}

    def nbytes(self) -> int:
        """As in `QuantizedLinear`."""
        tensors = [self.codes, self.absmax]
        if self.nested is not None:
            tensors.append(self.nested.absmax)
        return sum(tensor.nbytes for tensor in tensors)


class Linear8bit(QuantizedLinear):
    """8 bits a weight and one fp32 scale a row, as LLM.int8() stores them (Dettmers et al. 2022, arXiv 2208.07339).

    Only the weight is quantised, not the activations: so their outliers need no care.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, cut: Cut | None = None):
        super().__init__(weight, bias)
        weight = weight.half()  # bitsandbytes takes fp16 alone here, whose range a weight never leaves
        if cut:  # the largest of the whole row, which decides about its codes, goes along as one more column
            largest = weight.abs().amax(dim=1, keepdim=True)
            whole = cut.of_whole(largest.float(), cut.shape[1])
            weight = torch.cat((weight, cut.part_of(whole, largest.shape, cut.shape[1]).half()), dim=1)
        codes, self.scales, _ = bitsandbytes().functional.int8_vectorwise_quant(weight.contiguous())
        self.codes = codes[:, : self.in_features].contiguous()

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """As in `QuantizedLinear`."""
        scales = self.scales.flatten()
        if in_triton(self.codes, dtype):
            return dequantize_rows(self.codes, scales, dtype)
        return bitsandbytes().functional.int8_vectorwise_dequant(self.codes, scales).to(dtype)

    def by_rows(self) -> dict[str, Tensor]:
        """As in `QuantizedLinear`."""
        return {"codes": self.codes, "scales": self.scales[:, None]}

    def nbytes(self) -> int:
        """As in `QuantizedLinear`."""
        return self.codes.nbytes + self.scales.nbytes


QUANTIZERS = {
    "bnb.nf4": partial(Linear4bit, data_type="nf4", double_quant=False),
    "bnb.nf4-dq": partial(Linear4bit, data_type="nf4", double_quant=True),
    "bnb.fp4": partial(Linear4bit, data_type="fp4", double_quant=False),
    "bnb.fp4-dq": partial(Linear4bit, data_type="fp4", double_quant=True),
    "bnb.int8": Linear8bit,
}


def check_divisible(quantization: str | dict | None, model: nn.Module) -> None:
    """Raise UserError if several devices cannot divide what a model without memory, not quantised yet, is to have.

    quantization: as `read_quantization` returns it.
    """
    layers = quantizable_layers(model).items()
    kinds = {(quantizer_of(quantization, path), layer.weight.shape): layer.weight for path, layer in layers}
    for (quantizer, _), weight in kinds.items():
        if quantizer:
            quantizer(weight, None).by_rows()


def quantized_layers(module: nn.Module) -> list[QuantizedLinear]:
    """Every quantised layer in a module, which may be one itself."""
    return [layer for layer in module.modules() if isinstance(layer, QuantizedLinear)]


# --------------------------------------------------------------------------------------- which layer has which of them

# What two models must have in common for a plan to fit both; named so in `model.Config` and in the file.
SIZES = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size",
)  # fmt: skip


def read_quantization(value: str | dict | None, model: nn.Module) -> str | dict | None:
    """What --quantize says, checked against a `Transformer` that is not quantised yet: None, a key, or a plan.

    value: None or "none"; a key of QUANTIZERS; a plan; or the path of a plan's file, NAME.json. Raises UserError.
    """
    if value in (None, "none"):
        return None
    if isinstance(value, dict):
        _check_plan(value, model, "--quantize")
    elif isinstance(value, str) and value.endswith(".json"):
        return _read_plan(value, model)
    elif not isinstance(value, str) or value not in QUANTIZERS:
        raise UserError(f"--quantize {value}: expected one of {', '.join(QUANTIZERS)}, or a plan's file, NAME.json")
    return value


def quantizer_of(quantization: str | dict | None, path: str) -> Callable[..., QuantizedLinear] | None:
    """The quantiser of a linear layer, a function of weight and bias, or None if it stays as it is.

    quantization: as `read_quantization` returns it. path: of a layer in the blocks.
    """
    return QUANTIZERS.get(quantization[path] if isinstance(quantization, dict) else quantization)


def quantizers_in_block(quantization: str | dict | None, number: int) -> str | tuple | None:
    """The quantisers of the layers of block `number`, in a form that is equal for blocks that have the same ones."""
    if not isinstance(quantization, dict):
        return quantization
    start = f"{BLOCKS}{number}."
    return tuple(sorted((path.removeprefix(start), q) for path, q in quantization.items() if path.startswith(start)))


def describe_quantization(quantization: str | dict | None) -> str:
    """In words, for a line on the terminal."""
    if not isinstance(quantization, dict):
        return str(quantization)
    names = [name for name in ("none", *QUANTIZERS) if name in quantization.values()]
    counts = (f"{name} in {list(quantization.values()).count(name)}" for name in names)
    return f"a plan ({', '.join(counts)} layers)"


def quantizable_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Path and module of every linear layer in the blocks of a model that is not quantised yet."""
    return {
        path: module
        for path, module in model.model.layers.named_modules(prefix=BLOCKS.removesuffix("."))
        if isinstance(module, nn.Linear)
    }


def write_plan(path: Path, plan: dict, config: Config, notes: dict) -> None:
    """Write a plan for a model of this `Config` to a file that --quantize takes. notes: further keys of the file."""
    with whole_file(path) as file:
        write_json(file, {**notes, "model": {name: getattr(config, name) for name in SIZES}, "layers": plan})


def _read_plan(path, model):
    values = read_json(path)
    sizes, plan = values.get("model"), values.get("layers")
    if not isinstance(sizes, dict) or not isinstance(plan, dict):
        raise UserError(
            f"{path} is no plan of quantisers, with model and layers: eval/quality.py --sensitivity makes one"
        )
    for name in SIZES:
        here = getattr(model.config, name)
        if sizes.get(name) != here:
            raise UserError(f"{path} is for another model: its {name} is {sizes.get(name)}, here it is {here}")
    _check_plan(plan, model, path)
    return plan


def _check_plan(plan, model, where):
    """Raise UserError unless a plan names each linear layer in the model's blocks, no other, and known quantisers."""
    layers = quantizable_layers(model)
    unknown, missing = ([n for n in a if n not in b] for a, b in ((plan, layers), (layers, plan)))
    for what, names in (("names a layer that the model does not have", unknown), ("leaves out a layer", missing)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{where}: the plan {what}: {names[0][:100]}{more}; it is for another model")
    for name, quantizer in plan.items():
        if quantizer != "none" and (not isinstance(quantizer, str) or quantizer not in QUANTIZERS):
            choices = ", ".join(("none", *QUANTIZERS))
            raise UserError(f"{where}: {name} has {str(quantizer)[:100]}: expected one of {choices}")
