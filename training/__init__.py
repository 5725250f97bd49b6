"""What surrounds the training loop of finetune.py.

optimizer.py   AdamW, the learning rate, the time budget, and weights that step in the backward pass
metrics.py     what a run measures: a row of metrics.csv for each step, memory, FLOPs, the plot
run_folder.py  the folder of a run: checkpoints, rotation, room on the disk, what must match to resume
nonfinite.py   a step whose loss or gradient is not finite: which samples cause it, and replaying it
memory/        peak memory predicted before a step is run. Its own map is in memory/__init__.py

run_folder.py and nonfinite.py import memory/; memory/ imports metrics.py.
"""
