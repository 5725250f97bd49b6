"""What the machine has: memory that this process may still take, and the speed of matrix products."""

import resource
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from ops import dtypes
from ops.allocator import address_space

# For each version of Linux's control groups: where they are mounted, the files of a group's limit and of what it takes,
# and the keys of memory.stat for cached files, which the system drops when memory is short.
CGROUPS = {
    2: ("sys/fs/cgroup", "memory.max", "memory.current", ("inactive_file", "active_file")),
    1: (
        "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
}  # fmt: skip


def free_memory(device: str) -> int:
    """Bytes that this process may still take: what is free, but no more than a limit on it leaves.

    On a CPU such limits are those of its address space (ulimit -v) and of its control groups (a container, a job).
    """
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    kilobytes = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())["MemAvailable"]
    free = [1024 * int(kilobytes.split()[0]), *free_in_groups()]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        free.append(limit - address_space())
    return max(0, min(free))


def free_in_groups(root: Path = Path("/")) -> Iterator[int]:
    """Bytes that are left in each of this process's control groups that have a limit. root: of the file system."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount, limit, usage, cached = CGROUPS[1 if controllers else 2]
        mount = root / mount
        group = mount / path.lstrip("/")
        # In a container the path may be the host's, and only the mount itself is there: it is then the container's.
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(mount))):
            try:
                most, taken = int((folder / limit).read_text()), int((folder / usage).read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # there is no such group, or its limit is "max": none
                continue
            yield most - taken + sum(int(stat.get(key, 0)) for key in cached)


def measured_flops(device: str, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of this device in linear layers of 1024 x 1024, in the dtype that it multiplies in."""
    x, weight = torch.rand(2, 1024, 1024).to(device, dtypes.compute_dtype(dtype, device))
    F.linear(x, weight)[0, 0].item()  # the first is slower
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        F.linear(x, weight)[0, 0].item()  # .item() waits for the device
        count += 1
    return count * 2 * 1024**3 / (time.perf_counter() - started)
