"""Runs on several devices: how they share the data and the model, and what each of them has of both.

layout.py     --parallel and --shard: how the devices are divided, and what does not go with that (no torch)
ranks.py      this process among the others: its place in the layout, and what is added up over whom
sharing.py    which micro-batches of a step each device gets
part.py       which part of a model a device has: it is a smaller model of the same kind
tensor.py     tensor parallelism: where the parts of layers are added up
stages.py     pipelines: what stands in the place of other stages' layers, and how hidden states go from stage to stage
pipeline.py   the gradient of a step whose micro-batches go through the stages
one_f_one_b.py  in which order they do: torch's Schedule1F1B, for micro-batches of any sizes
shard.py      FSDP2 over the blocks of such a model
pieces.py     which piece of each parameter is here, and whole tensors made of the pieces of all
loading.py    the model of one device, read from the files piece by piece
saving.py     checkpoints and final/, written by all devices at once in the formats of one
watch.py      a device that has died, or hangs, ends the others with a line that names it

layout.py, sharing.py, shard.py, stages.py and watch.py know nothing of the rest. part.py imports stages.py, and
tensor.py and ranks.py part.py. pieces.py imports ranks.py, saving.py imports pieces.py, and loading.py all of these.
Start with layout.py, then part.py.
"""
