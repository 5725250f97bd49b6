"""In which dtype a product is computed: by device, by what weights are stored in, and under autocast."""

from functools import lru_cache, reduce

import torch
from torch import Tensor


@lru_cache
def compute_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """The dtype to multiply in, for weights of `dtype`.

    A CPU without bf16 instructions multiplies bf16 at a tenth of its fp32 speed (20 against 180 GFLOP/s on two Zen 3
    cores), so there weights are only kept in 16 bits, and cast where they are used. fp16 is slow on every CPU.
    """
    if device_type != "cpu" or dtype == torch.float32:
        return dtype
    fast = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype if fast else torch.float32


def as_multiplied(x: Tensor) -> Tensor:
    """x in the dtype that autocast, where it is on, multiplies in, for functions that autocast does not know."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x


def alike(*tensors: Tensor) -> list[Tensor]:
    """The tensors in one dtype, the widest of theirs: under autocast some come in bf16 and some in fp32."""
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    return [tensor.to(dtype) for tensor in tensors]
