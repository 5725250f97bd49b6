"""Peak memory, FLOPs and time of a training step, predicted from shapes alone.

allocations.py  adds up what is allocated while a model runs, on real tensors or on those without memory
plan.py         runs the model without memory under it: the peak by part. Start here
machine.py      memory that this process may still take, in a container too; the speed of matrix products
layouts.py      what the devices of each layout send, and the fastest layout that fits
budget.py       from a run's settings to its plan, the largest micro-batch that fits, what to change when none does
dry_run.py      the largest micro-batch of a run, forward and backward once before the first step

plan.py imports allocations.py and parallel/, layouts.py imports plan.py, budget.py imports both and machine.py.
"""
