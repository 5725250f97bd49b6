"""What a machine can do.

limits.py      matrix products at a model's shapes, copying and reading memory. Start here
kernels.py     Triton kernels compiled for cards that need not be there: registers, shared memory, occupancy
cards.py       what cards have by compute capability, for kernels.py and flex_kernels.py
rates.py       a CPU's speed in each operation of a step, for ../roofline.py
replay.py      measures it: the operations of a micro-batch in their order
contention.py  two processes at once on the same cores: training, decoding, ours and the peers'
flex_kernels.py  FlexAttention's kernels compiled for cards that are not here: whether they fit
"""
