"""What runs the passes of prepare_data.py: the processes of this machine, or a Ray cluster (`--engine`).

An engine is a context manager that takes a `Context` and yields `parallel_map(function, tasks)`, which yields the
results of function(context, task) in the order of the tasks. It takes tasks ahead, but not all: they may come from a
file of any size. All that is decided by more than one chunk of rows (what is a duplicate, what is held back) is decided
by the process that calls it, so that every engine gives the same bytes.
"""

from preparation.ray_workers import ray_workers
from preparation.workers import local_workers

ENGINES = {
    "local": local_workers,
    "ray": ray_workers,
}
