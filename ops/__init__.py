"""The operations that the decoder computes most often, with backward passes written by hand.

Autograd saves more tensors than it needs and makes a new one for every small step. Written by hand, a function saves
only its inputs, computes the rest again where that is cheap, and works in place. Each has a plain reference, `plain_*`,
in a few lines of ordinary torch. The tests compare with it, torch.compile is given it, and fuses it itself, and a CPU
without a C++ compiler runs it. With a compiler, a CPU runs kernels_cpu.cpp for everything except matrix products.

dtypes.py      in which dtype a product is computed
linear.py      linear layers: stored in another dtype or in 4 bits, with LoRA
norm.py        RMSNorm and LayerNorm. Start here: the smallest
activation.py  activations of MLPs, gated (SwiGLU and its kin) and plain
grouping.py    tokens sorted by the expert that they go to, and back
rope.py        RoPE: how fast each pair of dimensions turns, and the ways to stretch it
rotation.py    RoPE applied to queries and keys
alibi.py       ALiBi: how much each head's scores fall with distance
attention.py   attention, and the fastest way on a device: SDPA, FlashAttention, FlexAttention, C++
flex.py        what FlexAttention is made of on CUDA: scores, block masks, sinks, and its compiled form
loss.py        cross-entropy at target positions, in chunks
cpp.py         C++ compiled on first use, kept in a cache, called through ctypes
allocator.py   memory of tensors on a CPU, so that a run's peak follows from their sizes
core_sharing.py                cores that other processes want, too
allocator_cpu.cpp              the C++ of allocator.py
kernels_cpu.cpp                the C++ of training
decode_cpu.cpp                 the C++ of inference/decode.py
vectors.h, matrix_tiles.h      what both compute with: vectors, bf16, small products; AMX tiles

cpp.py and dtypes.py import none of these files; most others import one or both of them. Below model.py.
"""
