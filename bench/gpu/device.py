"""The device: waiting for it, and the best that it does."""

import statistics
import time

import torch

# Dense bf16 products as the data sheets have them, TFLOP/s, by a part of the device's name.
NOMINAL_TFLOPS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312}


def synchronize(device):
    """Wait for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_per_call(call, device, calls=10):
    """Median over 5 rounds of so many calls each, after one that does not count."""
    times = []
    for _ in range(6):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize(device)
        times.append((time.perf_counter() - started) / calls)
    return statistics.median(times[1:])


def measure_limits(device):
    """The best the machine does, on random data: a bf16 matrix product, and a copy (bytes read and written)."""
    size, elements = (8192, 2**30) if device.type == "cuda" else (512, 2**22)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = seconds_per_call(lambda: a @ b, device)
    source = torch.randn(elements, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy = seconds_per_call(lambda: target.copy_(source), device)
    return {"tflops": 2 * size**3 / product / 1e12, "gigabytes_per_second": 2 * source.nbytes / copy / 1e9}


def nominal_tflops(name):
    """What the data sheet of the device of a name says, or None."""
    return next((rate for key, rate in NOMINAL_TFLOPS.items() if key in name), None)
