"""FlexAttention's kernels of ops/flex.py, compiled for CUDA cards that need not be here: whether they fit.

A kernel that takes more shared memory than a card has is an error there, when the first step is run. Here torch traces
`flex.attend` on a CPU; Inductor is told that the tensors are on CUDA, and Triton which card to compile for. Nothing is
run. It patches what torch asks a card about itself, so it works with the versions of requirements.txt alone.

    python bench/machine/flex_kernels.py --cards '[89, 90]' --head_dims '[64, 256]' --dtypes '[bfloat16]'
"""

import contextlib
import functools
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

if __name__ == "__main__":  # the project's folder in place of this one, wherever it is started from
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.machine.cards import CARDS, check_known
from shell import cli
from shell.cli import UserError

ROOT = Path(__file__).resolve().parents[2]
DTYPES = ("bfloat16", "float16", "float32")


@dataclass
class Settings:
    """The command line.

    Args:
        cards: Compute capabilities, as 80.
        head_dims: Sizes of a head.
        dtypes: Of queries, keys and values.
    """

    cards: list[int] = field(default_factory=lambda: [*CARDS])
    head_dims: list[int] = field(default_factory=lambda: [16, 64, 128, 256])
    dtypes: list[str] = field(default_factory=lambda: ["bfloat16", "float32"])

    def __post_init__(self):
        check_known(cards=(self.cards, CARDS), dtypes=(self.dtypes, DTYPES))
        if not self.head_dims or min(self.head_dims) < 1:
            raise UserError(f"--head_dims {self.head_dims}: expected sizes above 0")


if __name__ == "__main__":
    settings = cli.parse(Settings)

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported: it would run kernels as numpy

import torch

from ops import flex
from ops.attention import Scores

HEADS, KEY_HEADS, T = 10, 2, 700
SCORES = Scores(0.25, window=100, softcap=20.0, slopes=(0.1,) * HEADS, sinks=True)
CUDA = torch.device("cuda", 0)


def patches(capability: tuple[int, int], shared_memory: int, sources: list[str]) -> contextlib.ExitStack:
    """Contexts in which torch believes in a card, and Inductor appends what it writes to `sources` and runs nothing."""
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.graph import GraphLowering
    from torch._inductor.runtime import triton_helpers
    from torch.nn.attention import flex_attention
    from triton.backends.compiler import GPUTarget

    hop = sys.modules["torch._higher_order_ops.flex_attention"]
    number = 10 * capability[0] + capability[1]
    card = SimpleNamespace(
        name="", gcnArchName="", major=capability[0], minor=capability[1], multi_processor_count=100,
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=1536, max_threads_per_block=1024, warp_size=32,
        total_memory=24 << 30, shared_memory_per_block_optin=shared_memory,
    )  # fmt: skip
    triton.runtime.driver.set_active(
        SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", number, 32), get_current_device=lambda: 0)
    )

    def keep(graph):
        code = graph.codegen()[0]
        sources.append(getattr(code, "value", code))
        return SimpleNamespace(__file__="", __path__="", key="", call=None)

    answers = {
        torch.cuda: {
            "is_available": True, "device_count": 1, "current_device": 0, "get_device_properties": card,
            "get_device_capability": capability, "_exchange_device": 0, "_maybe_exchange_device": 0,
            "get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None, "synchronize": None,
        },
        CudaInterface: {"get_compute_capability": number, "get_device_properties": card, "is_available": True,
                        "raise_if_triton_unavailable": None},
        CudaInterface.Worker: {"get_device_properties": card},
        triton_helpers: {"set_driver_to_gpu": None},
        flex_attention: {"_validate_device": None},  # which refuses gradients on a CPU
    }  # fmt: skip
    stack = contextlib.ExitStack()
    for where, functions in answers.items():
        for name, value in functions.items():
            answer = functools.partial(lambda value, *_, **__: value, value)
            answer = answer if not isinstance(where, type) else staticmethod(answer)
            stack.enter_context(patch.object(where, name, answer))
    stack.enter_context(patch.object(GraphLowering, "compile_to_module", keep))
    stack.enter_context(patch.object(hop, "_permute_strides", permuted_strides))  # without its copy
    return stack


def permuted_strides(out, strides):
    """An empty tensor of out's shape, whose strides are in the order of `strides`, with the last dimension dense."""
    order = sorted(range(out.dim() - 1), key=lambda dim: strides[dim])
    result, size = [0] * (out.dim() - 1) + [1], out.size(-1)
    for dim in order:
        result[dim], size = size, size * out.size(dim)
    return out.new_empty_strided(out.shape, result)


def moved(graph: torch.fx.GraphModule, inputs: list) -> None:
    """Let all of a traced graph's tensors say that they are on CUDA."""
    graphs = [module for module in graph.modules() if isinstance(module, torch.fx.GraphModule)]
    nodes = [node for module in graphs for node in module.graph.nodes]
    for node in nodes:
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": CUDA}
    values = [(node.meta.get("val"), node.meta.get("example_value")) for node in nodes]
    for value in torch.utils._pytree.tree_leaves((values, inputs)):
        if isinstance(value, torch._subclasses.FakeTensor):
            value.fake_device = CUDA


def compile_for_card(graph, inputs, is_backward=False):
    """An AOTAutograd compiler: Inductor's, and in place of what it would run zeros of the right shapes."""
    from functorch.compile import make_boxed_func
    from torch._inductor.compile_fx import compile_fx_inner

    outputs = [node and node.meta["val"] for node in graph.graph.output_node().args[0]]
    size = lambda value: value if isinstance(value, int) else value.node.hint  # noqa: E731
    blank = [
        value if value is None else torch.zeros([size(n) for n in value.shape], dtype=value.dtype)
        if isinstance(value, torch.Tensor) else size(value)
        for value in outputs
    ]  # fmt: skip
    moved(graph, inputs)
    with torch.no_grad():
        compile_fx_inner(graph, inputs, is_backward=is_backward)
    return make_boxed_func(lambda *_: blank)


def kernel_sources(head_dim: int, dtype: torch.dtype, shared_memory: int, sources: list[str]) -> list[tuple[str, str]]:
    """Name and source of each kernel that Inductor writes for attention and its gradients, in `patches`."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    backend = aot_autograd(
        fw_compiler=compile_for_card,
        bw_compiler=functools.partial(compile_for_card, is_backward=True),
        decompositions=select_decomp_table(),
    )
    cpu = torch.device("cpu")
    q, k, v = (
        torch.randn(1, T, heads, head_dim, dtype=dtype).transpose(1, 2).requires_grad_()
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )
    sinks = torch.randn(HEADS, requires_grad=True)
    mask, score = flex.block_mask([0, 300, T], SCORES.window, cpu), flex.score_function(SCORES, cpu)
    blocks = flex.blocks_that_fit(head_dim, dtype.itemsize, shared_memory)
    attend = torch.compile(flex.attend, backend=backend, dynamic=True, fullgraph=True)
    attend(q, k, v, sinks, score, mask, blocks).float().sum().backward()
    return [found for source in sources for found in re.findall(r"\.triton\('(\w+)', '''(.*?)'''", source, re.S)]


def shared_memory_of(name: str, source: str, folder: str) -> int:
    """Compile a kernel's source for the card of `patches`: the bytes of shared memory that it takes."""
    path = Path(folder, f"{name}.py")
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kernel = getattr(module, name)
    kernel.precompile(warm_cache_only=True)
    return max(result.kernel.shared for result in kernel.compile_results)


def report(card: int, head_dim: int, dtype: str) -> bool:
    """Print what the two kernels of attention take on a card; whether that is what it has."""
    import torch._functorch.config
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1
    torch._inductor.config.fx_graph_cache = torch._functorch.config.enable_autograd_cache = False
    sources, fit, room = [], True, CARDS[card].shared_of_block
    with patches(divmod(card, 10), room, sources), tempfile.TemporaryDirectory() as folder:
        kernels = kernel_sources(head_dim, getattr(torch, dtype), room, sources)
        for name, source in kernels:
            taken = shared_memory_of(name, source, folder)
            fit = fit and taken <= room
            if "_tem_" in name:  # a template's: attention itself, not what Inductor adds around it
                which = "backward" if "backward" in name else "forward"
                print(f"{card:5} {dtype:>8} {head_dim:4} {which:8} {taken:7} of {room:,}", flush=True)
    return fit and sum("_tem_" in name for name, _ in kernels) == 2


def main(s: Settings) -> None:
    """Each case in a process of its own, as torch asks a card about itself once."""
    cases = [(card, dim, dtype) for card in s.cards for dtype in s.dtypes for dim in s.head_dims]
    code = "import sys; from bench.machine.flex_kernels import report; sys.exit(not report{})"
    failed = [case for case in cases if subprocess.run([sys.executable, "-c", code.format(case)], cwd=ROOT).returncode]
    if failed:
        raise UserError(f"kernels do not fit, or do not compile: {', '.join(map(str, failed))}")


if __name__ == "__main__":
    cli.run(main, settings)
