"""Several variants of a run trained at once over one frozen base: finetune.py --sweep.

variants.py  the file of the variants, as the settings of each. Start here
layers.py    one frozen linear layer under the adapters of all variants, each on its own rows
joint.py     the step of all variants together: rows that hold samples of several, one pass over the base
halving.py   successive halving: which variants go on
plan.py      memory of all of them, predicted
report.py    the table and the picture of all variants
loop.py      the training loop

layers.py and variants.py import none of the others; joint.py imports layers.py, halving.py, plan.py and report.py
import variants.py, and loop.py imports all.
"""
