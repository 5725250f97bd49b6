"""One call by kernel: how often each is launched and how long it takes, as torch's profiler sees it."""

import io
import time
from contextlib import redirect_stdout

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from bench.gpu.device import synchronize
from bench.measuring import print_table

NAME = 100  # letters of a kernel's name in the table
SHOWN = 25  # kernels of a row


def profile(work, device, path):
    """Profile one call of `work()`, print its table and write it to the file `path`. Returns the row.

    The kernels of CUDA; on a CPU torch's operations, each without those that it calls. "busy" is the time of all
    kernels over the time of the call: what is missing to 1 the device waited for the host. Profiling slows the host.
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    synchronize(device)
    started = time.perf_counter()
    with torch.profiler.profile(activities=activities) as profiler:
        work()
        synchronize(device)
        seconds = time.perf_counter() - started
    kernels = by_kernel(profiler.key_averages(), device)
    total = sum(kernel["ms"] for kernel in kernels)
    text = as_table(kernels, total)
    print(text)
    path.write_text(text)
    return {"step_seconds": seconds, "busy": total / 1e3 / seconds, "kernels": kernels[:SHOWN], "file": path.name}


def by_kernel(events, device):
    """Name, launches and milliseconds of each kernel, the longest first."""
    kind = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    rows = []
    for event in events:
        microseconds = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        if event.device_type == kind and microseconds > 0:
            rows.append({"kernel": event.key[:NAME], "launches": event.count, "ms": microseconds / 1e3})
    if not rows:
        raise RuntimeError("the profiler saw no kernel")
    return sorted(rows, key=lambda row: -row["ms"])


def as_table(kernels, total):
    """The table as text. total: milliseconds of all."""
    rows = [row | {"share": row["ms"] / total} for row in kernels]
    columns = {"kernel": "{kernel}", "launches": "{launches}", "ms": "{ms:.3f}", "share": "{share:.1%}"}
    with redirect_stdout(io.StringIO()) as text:
        print_table(columns, rows)
    return text.getvalue()
