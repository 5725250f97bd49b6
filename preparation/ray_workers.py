"""Workers on a Ray cluster: chunks go through Ray Data to any number of machines, and come back in order.

What is done to a chunk, and which rows it has, is the same as in workers.py, so the bytes are too. Rows and results
pass through this process, and what waits between two passes is on this machine's disk. So the others need no disk in
common with it, only Ray and the packages of requirements.txt; the project's code is sent to them.

A task whose process or machine is lost is run again. A chunk's result depends on nothing but the chunk, so it is the
same.
"""

import contextlib
import functools
import itertools
import logging
import os
import pickle
import shutil
import socket
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from preparation.workers import Context, cores
from shell import cli
from shell.cli import ROOT, UserError

if TYPE_CHECKING:
    import pyarrow
    import ray

CODE = ("preparation", "shell", "text")  # the folders that a worker imports
TASKS, BIG = 8, 2**23  # chunks that Ray gets as one, or fewer of so many bytes: it adds some 10 ms to whatever it gets
ROUND = 64  # of these for each CPU in a Dataset, which must have all its blocks before it starts
SECONDS = 5  # that the machine at an address has to answer
RETRIES = 3  # of a chunk whose process or machine was lost: one that ends any process it is given to must end the run


@contextlib.contextmanager
def ray_workers(context: Context) -> Iterator[Callable]:
    """Yields `parallel_map(function, tasks)`, as `workers.local_workers` does, over the cluster at --ray_address.

    Without an address, a cluster of this machine's cores is started, and ends with the block. UserError if there is
    none at the address, or if processes of it are lost again and again.
    """
    cli.check_installed("ray", where="--engine ray")
    workers = context.settings.workers
    with _cluster(context.settings.ray_address, workers):
        import ray

        cpus = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        # The script's own class of settings is not known in other processes.
        shared = ray.put(context._replace(settings=SimpleNamespace(**vars(context.settings))))

        def results_of(function, tasks):
            blocks = _blocks(tasks)
            while some := [ray.put(block) for block in itertools.islice(blocks, ROUND * cpus)]:
                yield from _map_blocks(function, shared, some, workers)

        with contextlib.ExitStack() as passes:

            def parallel_map(function, tasks):
                results = results_of(function, tasks)
                passes.callback(results.close)  # one that is left in its midst ends before Ray does
                return results

            yield parallel_map


# ---------------------------------------------------------------------------------------------------- the cluster


@contextlib.contextmanager
def _cluster(address: str | None, workers: int | None) -> Iterator[None]:
    """The cluster at an address, or one of this machine that lasts as long as the block."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # else a thread of Ray Data's that ends late would connect once more
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it logs as an error it raises too
    settings = ray.data.DataContext.get_current()
    settings.execution_options.preserve_order, settings.enable_progress_bars = True, False
    # Short, as the paths of sockets below it must be.
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir=os.environ.get("RAY_TMPDIR", "/tmp")))
    try:
        _connect(address, workers, folder)
        yield
    except (ray.exceptions.RayTaskError, ray.exceptions.UserCodeException):
        raise  # a fault of ours, with its traceback
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError):
        raise UserError(
            f"the same rows have ended a worker process {RETRIES + 1} times, perhaps for want of memory: try fewer "
            "--workers"
        ) from None
    except (ray.exceptions.RayError, ray.data.exceptions.ExecutionTimeoutError) as error:
        raise UserError(f"--engine ray: {_first_line(error)}") from None
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _connect(address: str | None, workers: int | None, folder: Path) -> None:
    """Connect to the cluster at an address, or start one of this machine in a folder, and send our code to it."""
    import ray

    if address and address != "auto":
        _check_answers(address)
    for name in CODE:
        shutil.copytree(ROOT / name, folder / "code" / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "requirements.txt", folder / "code")  # by which a missing package is explained
    # As the working directory: of another kind of code, what lies in the current folder would come first.
    environment = {"working_dir": str(folder / "code"), "env_vars": {"TOKENIZERS_PARALLELISM": "false"}}
    started = {"_temp_dir": str(folder), "num_cpus": workers or cores(), "include_dashboard": False}
    try:
        ray.init(
            address or "local", runtime_env=environment, log_to_driver=False, logging_level=logging.CRITICAL,
            **({} if address else started),
        )  # fmt: skip
    except (ConnectionError, RuntimeError, ValueError) as error:
        what = f"--ray_address {address}: cannot be used" if address else "--engine ray: cannot be started"
        raise UserError(f"{what}: {_first_line(error)}") from None


def _check_answers(address: str) -> None:
    """Raise UserError if nobody listens at an address: Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"--ray_address {address}: no cluster there: {error}") from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


# ---------------------------------------------------------------------------------------------------- what it does


def _blocks(tasks: Iterable) -> Iterator["pyarrow.Table"]:
    """Tasks as Ray's blocks: tables with a column of pickled ones."""
    import pyarrow

    waiting, size = [], 0
    for task in tasks:
        waiting.append(pickle.dumps(task, pickle.HIGHEST_PROTOCOL))
        size += len(waiting[-1])
        if len(waiting) == TASKS or size > BIG:
            yield pyarrow.table({"task": waiting})
            waiting, size = [], 0
    if waiting:
        yield pyarrow.table({"task": waiting})


def _map_blocks(
    function: Callable, shared: "ray.ObjectRef", blocks: list["ray.ObjectRef"], workers: int | None
) -> Iterator:
    """The results of all tasks in the blocks, in order. A UserError is raised when its turn has come."""
    import ray.data

    with warnings.catch_warnings():
        # From Ray 2.64 on max_retries has another place. Which, 2.60 does not say yet.
        warnings.simplefilter("ignore")
        results = ray.data.from_arrow_refs(blocks).map_batches(
            _work, fn_kwargs={"function": function, "shared": [shared]}, batch_size=None, batch_format="pyarrow",
            concurrency=workers, num_cpus=1, max_retries=RETRIES,
        )  # fmt: skip
    with contextlib.closing(iter(results.iter_batches(batch_size=None, batch_format="pyarrow"))) as tables:
        for table in tables:
            for data in table["result"]:
                result = pickle.loads(data.as_buffer())
                if isinstance(result, UserError):
                    raise result
                yield result


def _work(table: "pyarrow.Table", function: Callable, shared: list["ray.ObjectRef"]) -> "pyarrow.Table":
    """Called by Ray in one of its processes: the pickled result of each task, or the UserError that it ended with.

    shared: a reference to the context, in a list: Ray would unpack it again for every table.
    """
    import pyarrow

    context = _context_of(*shared)
    return pyarrow.table({"result": [_call(function, context, task.as_buffer()) for task in table["task"]]})


@functools.lru_cache(1)
def _context_of(shared):
    import ray

    return ray.get(shared)


def _call(function, context, task):
    try:
        result = function(context, pickle.loads(task))
    except UserError as error:  # as a result, since the first one in the data's order is to be reported
        result = error
    return pickle.dumps(result, pickle.HIGHEST_PROTOCOL)
