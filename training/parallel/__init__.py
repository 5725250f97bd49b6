"""Runs on several devices: how they share the data and the model, and what each of them has of both.

layout.py     --parallel and --shard: how the devices are divided, and what does not go with that (no torch)
ranks.py      this process among the others: its place in the layout, and what is added up over whom
sharing.py    which micro-batches of a step each device gets
tensor.py     tensor parallelism: each device's model is a smaller one of the same kind, and where the parts are added
shard.py      FSDP2 over the blocks of such a model
pieces.py     which piece of each parameter is here, and whole tensors made of the pieces of all
loading.py    the model of one device, read from the files piece by piece
saving.py     checkpoints and final/, written by all devices at once in the formats of one
watch.py      a device that has died, or hangs, ends the others with a line that names it

layout.py, sharing.py, shard.py, tensor.py and watch.py know nothing of the rest. ranks.py imports all of these but
watch.py, pieces.py imports ranks.py, saving.py imports pieces.py, and loading.py all.
Start with layout.py, then tensor.py.
"""
