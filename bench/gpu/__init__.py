"""What one GPU does, part by part, each in a process of its own. ../gpu.sh runs them all.

measure.py        the script: runs one part, writes its lines and the picture. Start here
training.py       LoRA, QLoRA and full: tokens/s, MFU, predicted memory; transformers + PEFT beside it
profiling.py      one step by kernel, as text
decoding.py       tokens/s as a share of reading the weights once
kernels.py        each kernel of ours against the bytes that it must move, bitsandbytes' beside those for NF4
resume.py         runs that are killed and resumed end with the bytes of one that was not
picture.py        the chart of all lines so far
random_models.py  shapes, random weights and samples
device.py         waiting for the device, and the best that it does
"""
