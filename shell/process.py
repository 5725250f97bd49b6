"""What belongs to a whole process: environment variables that libraries read as they load, and signals.

The variables are set before torch is imported, so nothing heavy is imported here.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

SIGNALS = (signal.SIGTERM, signal.SIGINT)  # those that ask a process to end

DEFAULTS = {
    # On a CPU, products in bf16 are compiled for their very shape, and rows of samples have ever new lengths. oneDNN
    # keeps the last 1,024 of them, and so does ideep, the layer between it and torch, for each kind of operation. They
    # are small blocks that stay in the heap between large ones, and cost 22 MB with every step of 64 samples
    # (SmolLM2-135M, GSM8K). A transformer block has fewer than 64 kinds of products in both directions.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "LRU_CACHE_CAPACITY": "64",
}

_set_here = set()  # the names that `set_defaults` found unset


def set_defaults() -> None:
    """Put DEFAULTS into the environment, for this process and its children, but where the user has set them."""
    for name, value in DEFAULTS.items():
        if name not in os.environ:
            os.environ[name] = value
            _set_here.add(name)


def is_first() -> bool:
    """Whether this is the process that writes, of the several that share a run's devices, on all its nodes."""
    if "RANK" in os.environ:  # torchrun's
        return os.environ["RANK"] == "0"
    if "LOCAL_RANK" in os.environ:  # Fabric's, which has started it; the user numbers the nodes
        return os.environ["LOCAL_RANK"] == os.environ.get("NODE_RANK", "0") == "0"
    return os.environ.get("SLURM_PROCID", "0") == "0"


def is_restarted() -> bool:
    """Whether torchrun has started this process again (--max-restarts), as one of its run has ended."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def environment_without_defaults() -> dict[str, str]:
    """The environment as it was before `set_defaults`, for programs that are not ours."""
    return {name: value for name, value in os.environ.items() if name not in _set_here}


@contextlib.contextmanager
def signals_handled(handler: Callable[[int, object], None]) -> Iterator[None]:
    """SIGTERM and SIGINT go to a handler as long as the block lasts.

    A signal that is to be ignored stays so, as the second one is under nohup and in the background of a script.
    """
    before = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: old for number, old in before.items() if old not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
