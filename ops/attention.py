"""Attention: the plain form, and the fastest way of each device.

On CUDA the kernels are torch's, on a CPU they are kernels_cpu.cpp's. `choose_attention` says which way is taken when.
tests/ops/test_attention.py holds each way to the plain one.

Shapes: B rows, T queries, S keys, H query heads, K key/value heads, G = H / K heads that share keys, d head size.
"""

import ctypes
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes, is_in_torch_dispatch_mode
from torch.utils.flop_counter import register_flop_formula

from ops import flex
from ops.activation import plain_softcap
from ops.cpp import call_cpp, in_cpp, operator
from ops.devices import constants_on, numbers_on
from ops.dtypes import as_multiplied

LARGEST_FLASH_HEAD_DIM = 256  # of torch's FlashAttention, which takes multiples of 8
# From torch 2.12 on varlen_attn has to be told that query heads share keys. Before, it took them without a word.
GROUPS_ANNOUNCED = torch.__version__ >= (2, 12)


class Scores(NamedTuple):
    """What a layer makes of the product of a query and a key, before the softmax.

    scale: its factor. window: how many positions back a query sees, itself included; None for all. softcap: c, if
    scores are kept within c by c tanh(score / c) (Gemma 2). slopes: of each query head, how much a score falls for each
    position that the key lies back: ALiBi (Press et al. 2021, arXiv 2108.12409). sinks: whether each query head has one
    more key without a value, whose score is learned and which takes a share of the attention (GPT-OSS).
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    slopes: tuple[float, ...] | None = None
    sinks: bool = False

    @property
    def are_products(self) -> bool:
        """Whether they are scaled products of queries and keys and nothing more, as every kernel has them."""
        return self.softcap is None and self.slopes is None and not self.sinks


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scores: Scores, mask: Tensor, back: Tensor
) -> Tensor:
    """The reference: q (B, H, T, d) attends to k, v (B, K, S, d) where `mask` is true: (B, H, T, d).

    mask (B or 1, 1, T, S) bool; back (B or 1, 1, T, S): positions from each query back to each key. sinks (H,) or None:
    their scores.
    """
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))  # H / K query heads share keys
    s = plain_softcap((q @ k.transpose(-2, -1)).float() * scores.scale, scores.softcap)  # (B, H, T, S)
    if scores.slopes is not None:
        s = s - torch.tensor(scores.slopes, device=s.device)[:, None, None] * back
    s = s.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        s = torch.cat((s, sinks.float()[:, None, None].expand(*s.shape[:3], 1)), dim=-1)
    return s.softmax(dim=-1)[..., : k.size(2)].to(v.dtype) @ v


def choose_attention(layout: Any, head_dim: int, dtype: torch.dtype, scores: Scores) -> "Attend":
    """The fastest way to attend for the tokens of a `model.Layout`: a function of q, k, v of `dtype` and sinks.

    It computes what `plain_attention` does with `layout.mask(scores.window)` and `layout.back()`. The first row that
    fits decides. Samples: each row is one, or the packed row has several; no tokens are cached, and rows do not branch.

        samples on a CPU in fp32 or bf16, with a C++ compiler   cpp_attention
        samples on CUDA in 16 bits, d up to 256,
            scores that are products                            flash_varlen_attention
        other samples on CUDA: a soft cap, ALiBi, sinks,
            larger heads, fp32                                  flex_attention
            (both from compute capability 8.0 on)
        samples in a packed row elsewhere                       each_sample_attention
        every key before the query's, scores that are products  causal_attention
        all else                                                masked_attention

    Only the last, and `each_sample_attention` for each sample, have a mask of all pairs of positions: on CUDA none does
    in training, but on cards before Ampere, such as a T4. The device "meta", on which memory is planned
    (training/memory/plan.py), counts as CUDA; there `flex_stand_in` takes the place of `flex_attention`.
    """
    cache, tree = layout.cache, layout.tree
    if cache is None and tree is None and (attend := _choose_for_samples(layout, head_dim, dtype, scores)):
        return attend
    T = layout.tokens.size(1)
    S = T if cache is None else cache.length + T
    padded = cache is not None and cache.padding is not None
    causal = tree is None and not padded and (scores.window is None or scores.window >= S) and T in (1, S)
    if causal and scores.are_products:
        return Attend(causal_attention, scores=scores)  # the kernel can leave out half of the work
    back = None if scores.are_products else layout.back()
    return Attend(masked_attention, scores=scores, mask=layout.mask(scores.window), back=back)


def _choose_for_samples(layout, head_dim, dtype, scores):
    """The way for samples, whether rows or packed in one, or None where `choose_attention` has none for these alone."""
    device, ends = layout.tokens.device, layout.ends
    if in_cpp(layout.tokens, dtype):
        return Attend(cpp_attention, scores=scores, offsets=ends)
    if device.type not in ("cuda", "meta") or not has_flash_attention(device):
        return layout.offsets and Attend(each_sample_attention, scores=scores, offsets=ends)
    longest = max(end - start for start, end in pairwise(ends))
    half = dtype != torch.float32 or (device.type == "cuda" and torch.is_autocast_enabled("cuda"))
    flash = half and scores.are_products and head_dim <= LARGEST_FLASH_HEAD_DIM
    if flash or device.type == "meta":
        offsets = numbers_on(device, ends, torch.int32)
        function = flash_varlen_attention if flash else flex_stand_in
        return Attend(function, scores=scores, offsets=offsets, max_length=longest)
    window = None if scores.window is None or scores.window >= longest else scores.window
    mask, score = layout.block_mask(window), flex.score_function(scores, device)
    return Attend(flex_attention, scores=scores, offsets=ends, score=score, mask=mask)


@lru_cache
def has_flash_attention(device: torch.device) -> bool:
    """Whether FlashAttention has kernels for a card: from compute capability 8.0 (Ampere) on. "meta" counts as such."""
    return device.type == "meta" or torch.cuda.get_device_capability(device) >= (8, 0)


class Attend:
    """One of the functions below with what it has to know of a micro-batch: `attend(q, k, v)` calls it.

    torch.compile has to leave it alone: it would make a new graph for every micro-batch, and has nothing to fuse here.
    """

    def __init__(self, function: Callable, **known):
        self.function, self.known = function, known

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        """Attention of q (B, H, T, d) to k, v (B, K, S, d), sinks (H,) or None: (B, H, T, d)."""
        return self.function(q, k, v, sinks, **self.known)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scores: Scores) -> Tensor:
    """Each query sees all keys up to its own, which is the last or, if there are as many as queries, the same."""
    return sdpa_attention(q, k, v, None, scores.scale)


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scores: Scores, mask: Tensor, back: Tensor | None
) -> Tensor:
    """`plain_attention`, in torch's fused kernels where these can compute it. back: None if scores are products."""
    if scores.softcap is not None or sinks is not None:
        return plain_attention(q, k, v, sinks, scores, mask, back)
    if scores.slopes is not None:
        slopes = constants_on(q.device, scores.slopes)[:, None, None]
        mask = (-slopes * back).masked_fill(~mask, -torch.inf).to(q.dtype)
    return sdpa_attention(q, k, v, mask, scores.scale)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Scaled dot-product attention in torch's fused kernels; causal where `mask` is None."""
    B, H, T, d = q.shape
    K = k.size(1)
    if T == 1:  # the heads that share keys are the rows of one product: no key is copied
        q = q.view(B, K, H // K, d)
        if mask is not None and mask.size(1) == H:
            mask = mask.view(len(mask), K, H // K, -1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return y.reshape(B, H, T, d)  # CUDA's kernel for masks gives it in another order
    causal, grouped = mask is None, K != H
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)


# ---------------------------------------------------------------------------------- samples end to end in one row


def flash_varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scores: Scores, offsets: Tensor, max_length: int
) -> Tensor:
    """Causal attention of q (B, H, T, d) to k, v (B, K, T, d) inside each sample: (B, H, T, d).

    In one kernel: FlashAttention (Dao 2023, arXiv 2307.08691), which takes bf16 and fp16 on CUDA alone.
    offsets: (n + 1,) int32 on q's device, of all rows end to end; sample i takes the positions offsets[i] to before
    offsets[i + 1], B * T in all. max_length: the length of the longest sample.
    """
    d = q.size(-1)
    padded = (F.pad(x, (0, -d % 8)) if d % 8 else x for x in (q, k, v))  # zeros add nothing to a product
    return _varlen(*padded, scores, offsets, max_length)[0][..., :d]


def _varlen(q, k, v, scores, offsets, max_length):
    """Of FlashAttention's operation: y (B, H, T, d), and the log-sums of its softmax (B, H, T) fp32."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    B = len(q)
    q, k, v = (_end_to_end(as_multiplied(x)) for x in (q, k, v))
    groups = {"enable_gqa": True} if k.size(1) != q.size(1) and GROUPS_ANNOUNCED else {}
    left = -1 if scores.window is None else scores.window - 1  # the kernel does not count the query itself
    how = {"scale": scores.scale, "window_size": (left, 0), "return_aux": AuxRequest(lse=True), **groups}
    y, log_sums = varlen_attn(q, k, v, offsets, offsets, max_length, max_length, **how)
    return _as_rows(y, B), log_sums.unflatten(1, (B, -1)).transpose(0, 1)


def _end_to_end(x):
    """All rows of x (B, heads, T, d), one after another: (B * T, heads, d)."""
    return x.transpose(1, 2).flatten(0, 1)


def _as_rows(y, B):
    """y (B * T, heads, d) as B rows: (B, heads, T, d)."""
    return y.unflatten(0, (B, -1)).transpose(1, 2)


def flex_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    scores: Scores,
    offsets: list[int],
    score: Callable,
    mask: Any,
) -> Tensor:
    """As `flash_varlen_attention`, with any scores, in fp32 too, and for heads of any size: ops/flex.py.

    sinks: (H,) or None. offsets: of all rows, end to end: B * T positions. score, mask: `flex.score_function` of the
    scores and `flex.block_mask` of offsets and window. Triton has no room for large heads on every card: torch says so.
    """
    B, d = len(q), q.size(-1)
    fill = max(0, flex.LEAST_HEAD_DIM - d)
    q, k, v = (F.pad(x, (0, fill)) if fill else x for x in map(as_multiplied, (q, k, v)))
    q, k, v = (_end_to_end(x).transpose(0, 1)[None] for x in (q, k, v))  # (1, heads, B * T, d)
    attend = _compiled_for(q) if q.is_cuda else flex.attend
    if not is_in_torch_dispatch_mode():
        y = attend(q, k, v, sinks, score, mask)
    else:  # FLOPs are counted, in a mode of torch in which nothing is compiled; what is compiled goes backward in it
        with _disable_current_modes():
            y = attend(q, k, v, sinks, score, mask)
        y = _Counted.apply(y, k.size(1), offsets)
    return _as_rows(y[0].transpose(0, 1), B)[..., :d]


def _compiled_for(q):
    """`flex.attend`, compiled, with blocks for the card and the heads of q."""
    card = torch.cuda.get_device_properties(q.device)
    blocks = flex.blocks_that_fit(q.size(-1), q.element_size(), card.shared_memory_per_block_optin)
    return partial(flex.compiled(), blocks=blocks)


class _Counted(torch.autograd.Function):
    """Its input y (1, H, T, d). torch's modes see, forward and backward, the operations that FLOPs are known of."""

    @staticmethod
    def forward(ctx, y, key_heads, offsets):
        _, H, T, d = y.shape
        q, k = (torch.empty(1, T, heads, d, device="meta") for heads in (H, key_heads))
        known = offsets, 0, 1.0, 0.0, ()
        _, log_sums = _attend(q, k, k, None, *known)
        ctx.arguments = q, q, k, k, None, log_sums, *known
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad):
        _attend_backward(*ctx.arguments)
        return grad, None, None


def flex_stand_in(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scores: Scores, offsets: Tensor, max_length: int
) -> Tensor:
    """On "meta" tensors, what takes the memory and the FLOPs of `flex_attention`, which torch compiles for CUDA alone.

    It is FlashAttention's operation, for any dtype and head size: forward, both keep q, k, v, the output and the
    log-sums of each softmax; backward, both make the three gradients. The sinks' share follows as in flex.attend.
    """
    y, log_sums = _varlen(q, k, v, scores, offsets, max_length)
    return y if sinks is None else flex.take_from_sinks(y, log_sums, sinks)


def each_sample_attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scores: Scores, offsets: list[int]
) -> Tensor:
    """The same for a packed row, sample by sample, on a CPU where kernels_cpu.cpp is not used: (1, H, T, d).

    That is without a C++ compiler, in fp16, or where torch.compile traces the choice. Also on cards before Ampere.
    """
    parts = []
    for start, end in pairwise(offsets):
        part, index = [x[:, :, start:end] for x in (q, k, v)], torch.arange(end - start, device=q.device)
        back = (index[:, None] - index)[None, None]
        mask = (back >= 0) if scores.window is None else (back >= 0) & (back < scores.window)
        parts.append(masked_attention(*part, sinks, scores, mask, back))
    return torch.cat(parts, dim=2)


# --------------------------------------------------------------------------------------------------------- on a CPU


class Heads(ctypes.Structure):
    """kernels_cpu.cpp's description of what attends to what."""

    _fields_ = [(name, ctypes.c_int64) for name in ("heads", "key_heads", "d", "window", "samples")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("offsets", "slopes", "sinks")]
    _fields_ += [(name, ctypes.c_float) for name in ("scale", "softcap")]


# Of the operations below: `sinks` is (H,) fp32, and of `Scores` 0 is no window and no softcap, () no slopes.
KNOWN = "int[] offsets, int window, float scale, float softcap, float[] slopes"


def _call_cpp(function, q, k, sinks, known, arguments):
    """Attend in kernels_cpu.cpp. q, k (B, T, heads, d); known: as in KNOWN; arguments: tensors its function takes."""
    offsets, window, scale, softcap, slopes = known
    starts, slopes = torch.tensor(offsets), torch.tensor(slopes, dtype=torch.float32)
    where = [x.data_ptr() if x is not None and x.numel() and not x.is_meta else None for x in (starts, slopes, sinks)]
    heads = Heads(q.size(2), k.size(2), q.size(3), window, len(offsets) - 1, *where, scale, softcap)
    call_cpp(function, *arguments, ctypes.byref(heads))


@operator(f"attend(Tensor q, Tensor k, Tensor v, Tensor? sinks, {KNOWN}) -> (Tensor, Tensor)")
def _attend(q, k, v, sinks, *known):
    """Attention of q (B, T, H, d) to k, v (B, T, K, d) as q, and the log-sums of its softmax (B, T, H) fp32."""
    y, log_sums = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
    _call_cpp("attend", q, k, sinks, known, (q, k, v, y, log_sums))
    return y, log_sums


@operator(
    f"attend_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor log_sums, {KNOWN}"
    ") -> (Tensor, Tensor, Tensor, Tensor)"
)
def _attend_backward(grad, q, k, v, sinks, log_sums, *known):
    """The gradients of q, k, v and, zeros where there are none, of the sinks (H,)."""
    grads = tuple(torch.empty_like(x) for x in (q, k, v))
    grad_sinks = log_sums.new_zeros((0 if sinks is None else len(known[0]) - 1, q.size(2)))  # of each sample
    _call_cpp("attend_backward", q, k, sinks, known, (grad, q, k, v, log_sums, *grads, grad_sinks))
    return *grads, grad_sinks.sum(0)


@register_flop_formula(torch.ops.onetune.attend)
def _attend_flops(q, k, v, sinks, offsets, *_, out_shape=None):
    return 4 * q[2] * q[3] * sum((end - start) ** 2 for start, end in pairwise(offsets))


@register_flop_formula(torch.ops.onetune.attend_backward)
def _attend_backward_flops(grad, q, k, v, sinks, log_sums, offsets, *_, out_shape=None):
    return 5 * _attend_flops(q, k, v, sinks, offsets) // 2  # five products instead of two


class _CppAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks, *known):
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        y, log_sums = _attend(q, k, v, sinks, *known)
        ctx.save_for_backward(q, k, v, sinks, log_sums)
        ctx.known = known
        return y.transpose(1, 2)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.transpose(1, 2).contiguous()
        *grads, grad_sinks = _attend_backward(grad, *ctx.saved_tensors, *ctx.known)
        grad_sinks = grad_sinks if ctx.needs_input_grad[3] else None
        return *(x.transpose(1, 2) for x in grads), grad_sinks, *(None for _ in ctx.known)


def cpp_attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scores: Scores, offsets: list[int]) -> Tensor:
    """As `each_sample_attention`, in kernels_cpu.cpp: softmax in fp32, no tensor of weights, backward by hand.

    q (B, H, T, d), k, v (B, K, T, d) on a CPU: in bf16 if all three are, else in fp32 (autocast may mix them).
    sinks: (H,) or None. offsets: of all rows, end to end: B * T positions.
    """
    dtype = torch.bfloat16 if q.dtype == k.dtype == v.dtype == torch.bfloat16 else torch.float32
    q, k, v, sinks = *(x.to(dtype) for x in (q, k, v)), None if sinks is None else sinks.float()
    known = offsets, scores.window or 0, scores.scale, scores.softcap or 0.0, scores.slopes or ()
    return _CppAttention.apply(q, k, v, sinks, *known)
