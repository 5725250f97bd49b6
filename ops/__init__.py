"""The operations that the decoder computes most often, with backward passes written by hand.

Autograd saves more tensors than it needs and makes a new one for every small step. Written by hand, a function saves
only its inputs, computes the rest again where that is cheap, and works in place. Each has a plain reference, `plain_*`,
in a few lines of ordinary torch. The tests compare with it, torch.compile is given it, and fuses it itself, and a CPU
without a C++ compiler runs it. With a compiler, a CPU runs kernels_cpu.cpp for everything except products with the
base; a GPU runs Triton's kernels.

dtypes.py      in which dtype a product is computed
devices.py     copies between host and device that nobody waits for, and the one that somebody does
norm.py        RMSNorm and LayerNorm. Start here: the smallest; norm_gpu.py, its kernels
linear.py      linear layers whose weights are stored in another dtype or in 4 bits
low_rank.py    such layers with LoRA, of one adapter or of several; low_rank_gpu.py, its kernel
dequantize.py  weights in 4 and 8 bits: to numbers, and products with a few rows; dequantize_gpu.py, its kernels
dropout.py     dropout that keeps no mask; dropout_gpu.py, its kernel
activation.py  activations of MLPs, gated (SwiGLU and its kin) and plain; activation_gpu.py, their kernels
grouping.py    tokens sorted by the expert that they go to, and back
rope.py        RoPE: how fast each pair of dimensions turns, and the ways to stretch it
rotation.py    RoPE applied to queries and keys; rotation_gpu.py, its kernel
alibi.py       ALiBi: how much each head's scores fall with distance
attention.py   attention, and the fastest way on a device: SDPA, FlashAttention, FlexAttention, C++
flex.py        what FlexAttention is made of on CUDA: scores, block masks, sinks, and its compiled form
forks.py       attention where several samples share their beginning, which is computed once
noise.py       how large the noise on embedded tokens is, with NEFTune
chunks.py      what is computed for each position by itself, for some positions at a time
offload.py     tensors in host memory between forward and backward pass; copies beside the computations
loss.py        cross-entropy at target positions, in chunks; loss_gpu.py, its kernel
gpu.py         when Triton's kernels compute, and how they are launched
cpp.py         C++ compiled on first use, kept in a cache, called through ctypes
allocator.py   memory of tensors on a CPU, so that a run's peak follows from their sizes
core_sharing.py                cores that other processes want, too
allocator_cpu.cpp              the C++ of allocator.py
kernels_cpu.cpp                the C++ of training
decode_cpu.cpp                 the C++ of inference/decode.py
vectors.h, matrix_tiles.h      what both compute with: vectors, bf16, small products; AMX tiles

cpp.py, gpu.py and dtypes.py import none of these files, but gpu.py the kernels; most others import them. All are below
model.py.
"""
