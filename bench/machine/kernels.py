"""Compiles the Triton kernels that a step launches, for cards that need not be there, and prints what they take.

    python bench/machine/kernels.py                # Llama-2-7B and others, for A100, A10/3090, 4090 and H100/H200

The step runs on tensors without memory, which stand for a GPU: so what is compiled is what a real step would launch,
with its shapes and constants. ptxas then says how many registers and how much shared memory a kernel takes. A kernel
that spills registers into memory, or takes more than a card has, is named, and the exit status is 2.
"""

import inspect
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # the project's folder in place of this one, wherever it is started from
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.machine.cards import CARDS, Card, check_known
from bench.shapes import SHAPES
from shell import cli
from shell.cli import UserError


@dataclass
class Settings:
    """The command line.

    Args:
        models: Names of bench/shapes.py whose step is looked at.
        tokens: Positions of a micro-batch.
        cards: Compute capabilities, as 80.
    """

    models: list[str] = field(default_factory=lambda: ["Llama-2-7B", "Gemma-2-9B", "BLOOM-7b1"])
    tokens: int = 2048
    cards: list[int] = field(default_factory=lambda: [80, 86, 89, 90])

    def __post_init__(self):
        cli.check_numbers(self, "tokens", above=0)
        check_known(models=(self.models, SHAPES), cards=(self.cards, CARDS))


REGISTERS = 65536  # of a multiprocessor
WARP = 32

if __name__ == "__main__":
    settings = cli.parse(Settings)
    os.environ.pop("TRITON_INTERPRET", None)

import torch

import lora
from bench.measuring import print_table
from ops import gpu
from quantize import QUANTIZERS, quantized_layers
from training.memory import plan
from weights.families import config_from_json


class Launch(NamedTuple):
    """A kernel as it is specialised: Triton's type of each argument, its constants, which arguments divide by 16.

    options: for Triton's compiler, with the number of warps.
    """

    name: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]


def main(s: Settings) -> None:
    """Compile and print."""
    rows = []
    for launch in sorted(launches(s), key=str):
        rows += [compiled(launch, card) for card in s.cards]
    columns = {
        "kernel": "{name}", "constants": "{constants}", "sm": "{card}", "warps": "{warps}", "registers": "{registers}",
        "spilled": "{spilled}", "shared": "{shared}", "occupancy": "{occupancy:.0%}",
    }  # fmt: skip
    print_table(columns, list({tuple(row.values()): row for row in rows}.values()))
    wrong = [f"{row['name']} on sm_{row['card']}" for row in rows if row["spilled"] or not row["occupancy"]]
    if wrong:
        raise UserError(f"registers are spilled, or a card has not enough: {', '.join(wrong)}")


def launches(s: Settings) -> set[Launch]:
    """All that steps launch: with an adapter over a base in bf16 and in 4 bits, and with all weights."""
    found = set()

    def note(name, grid, arguments, how):
        found.add(specialised(name, arguments, how))

    gpu.observers.append(note)
    try:
        for name in s.models:
            config = config_from_json(SHAPES[name])
            shape = plan.packed_shape(s.tokens, s.tokens, s.tokens)
            for how in jobs():
                predictor = plan.Predictor(plan.Job(config, "meta", **how))
                predictor.trace(shape)
                with plan.fake_tensors(predictor.mode, "meta"):
                    multiply_few_rows(predictor.model)
    finally:
        gpu.observers.remove(note)
    return found


@torch.no_grad()
def multiply_few_rows(model: torch.nn.Module) -> None:
    """What decoding multiplies by quantised weights: one row, as many as are added up one by one, and more."""
    for layer in quantized_layers(model):
        for rows in (1, 2, 16):
            layer(torch.empty(rows, layer.in_features, dtype=torch.bfloat16, device="meta"))


def jobs() -> list[dict]:
    """What `plan.Job` gets beside model and device."""
    adapter = lora.AdapterConfig(targets=r"model\.layers\..*", dropout=0.1)  # whatever a family calls its projections
    in_bf16 = [{"quantize": name, "adapter": adapter} for name in (None, *QUANTIZERS)]
    return [*({"dtype": torch.bfloat16, **how} for how in [*in_bf16, {}]), {"dtype": torch.float32}]


def specialised(name: str, arguments: tuple, how: dict) -> Launch:
    """A launch as Triton would specialise it: None and 1 are constants, and numbers that divide by 16 are known to."""
    names = list(inspect.signature(gpu.kernel(name).fn).parameters)
    options = {"num_warps": 4} | {option: value for option, value in how.items() if option not in names}
    signature, constants, aligned = {}, {}, []
    for place, (parameter, value) in enumerate(zip(names, arguments, strict=False)):
        if value is None or (isinstance(value, int) and value == 1):
            signature[parameter], constants[parameter] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter] = "*" + TYPES[value.dtype]
            aligned.append(place)
        elif isinstance(value, int):
            signature[parameter] = "i32" if abs(value) < 2**31 else "i64"
            aligned += [place] * (value % 16 == 0)
        else:
            signature[parameter] = "fp32"
    for parameter in how.keys() - options.keys():
        signature[parameter], constants[parameter] = "constexpr", how[parameter]
    described = (tuple(sorted(values.items())) for values in (constants, options))
    constants, options = described
    return Launch(name, tuple(signature.items()), constants, tuple(aligned), options)


TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int32: "i32",
    torch.uint8: "u8", torch.int8: "i8",
}  # fmt: skip


def compiled(launch: Launch, card: int) -> dict:
    """What a kernel takes on a card: a row of the table."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function, attributes = gpu.kernel(launch.name), {(place,): [["tt.divisibility", 16]] for place in launch.aligned}
    source = ASTSource(function, dict(launch.signature), dict(launch.constants), attributes)
    result = triton.compile(source, target=GPUTarget("cuda", card, WARP), options=dict(launch.options))
    registers, spilled, shared = resources(result.asm["cubin"])
    warps = dict(launch.options)["num_warps"]
    row = {"name": launch.name, "card": card, "warps": warps, "registers": registers, "spilled": spilled}
    constants = " ".join(f"{name}={value}" for name, value in launch.constants if name.isupper())
    tensors = ",".join(kind[1:] for _, kind in launch.signature if kind[0] == "*")
    share = occupancy(CARDS[card], warps, registers, shared)
    return row | {"constants": f"{tensors} {constants}", "shared": shared, "occupancy": share}


def resources(cubin: bytes) -> tuple[int, int, int]:
    """Of a compiled kernel: registers of a thread, bytes that each thread spills, and bytes of shared memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuobjdump(), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"], found["SHARED"]


@cache
def cuobjdump() -> str:
    """NVIDIA's program of that name, which comes with Triton."""
    import triton.backends.nvidia

    return str(Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump")


def occupancy(card: Card, warps: int, registers: int, shared: int) -> float:
    """The share of a multiprocessor's threads that a kernel's blocks can fill; 0 if not one block fits.

    Registers are given out to a warp in steps of 256 (8 a thread).
    """
    if shared > card.shared_of_block:
        return 0.0
    of_block = warps * -(-registers // 8) * 8 * WARP
    blocks = min(REGISTERS // of_block, card.threads // (warps * WARP), card.blocks, card.shared // max(shared, 1))
    return blocks * warps * WARP / card.threads


if __name__ == "__main__":
    cli.run(main, settings)
