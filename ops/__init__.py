"""What the decoder computes most often, forward and backward by hand, each beside its plain reference.

Autograd keeps more than it needs and makes a new tensor for every small step. Written by hand, a function keeps only
its inputs, computes the rest again where that is cheap, and works in place. `plain_*` is the same in a few lines of
ordinary torch: what the tests compare with, what torch.compile gets, which fuses by itself, and what is left on a CPU
without a C++ compiler. With one, what is not a product of matrices is kernels_cpu.cpp's there.

dtypes.py      in which dtype a product is computed
linear.py      linear layers: stored in another dtype or in 4 bits, with LoRA
norm.py        RMSNorm. Start here: the smallest
activation.py  SwiGLU
rotation.py    RoPE applied to queries and keys
attention.py   the fastest way to attend on a device: SDPA, variable-length FlashAttention, C++. Plain: in model.py
loss.py        cross-entropy at target positions, in chunks
cpp.py         C++ compiled on first use, kept in a cache, called through ctypes
kernels_cpu.cpp                the C++ of training
decode_cpu.cpp                 the C++ of inference/decode.py
vectors.h, matrix_tiles.h      what both compute with: vectors, bf16, small products; AMX tiles

cpp.py and dtypes.py import nothing of ours; the others import these two. Below model.py.
"""
