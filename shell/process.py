"""Environment variables of the whole process, which libraries read as they load: set before torch is imported."""

import os

# Each is left alone if the user has set it, or the variable named after it, which decides the same.
DEFAULTS = {
    # OpenMP's threads wait for each other at the end of each operation. GNU's runtime, which torch brings along, lets
    # them spin for 300,000 rounds (about 1 ms) before they give up the core. A second busy process on the same cores
    # then waits for threads that do nothing, and both slow down 10 to 30 times: two runs of finetune.py on 2 cores
    # reached 22 to 60 tokens/s each where one alone made 650. With 2,000 rounds: 410 each, 590 alone; with
    # OMP_WAIT_POLICY=passive, which does not spin: 450 and 475.
    "GOMP_SPINCOUNT": ("2000", "OMP_WAIT_POLICY"),
    # On a CPU, products in bf16 are compiled for their very shape, and rows of samples have ever new lengths. oneDNN
    # keeps the last 1,024 of them, and so does ideep, the layer between it and torch, for each kind of operation. They
    # are small blocks that stay in the heap between large ones, and cost 22 MB with every step of 64 samples
    # (SmolLM2-135M, GSM8K). A transformer block has fewer than 64 kinds of products in both directions.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": ("64",),
    "LRU_CACHE_CAPACITY": ("64",),
}


def set_defaults() -> None:
    """Put DEFAULTS into the environment, for this process and its children, unless the user decided otherwise."""
    for name, (value, *alternatives) in DEFAULTS.items():
        if not any(variable in os.environ for variable in (name, *alternatives)):
            os.environ[name] = value


def environment_without_defaults() -> dict[str, str]:
    """The environment as it was before `set_defaults`, for programs that are not ours."""
    ours = {name: value for name, (value, *_) in DEFAULTS.items()}
    return {name: value for name, value in os.environ.items() if ours.get(name) != value}
