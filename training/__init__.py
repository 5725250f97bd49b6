"""What surrounds the training loop of finetune.py.

settings.py    the flags. Start here
from_settings.py               the flags as objects: dtypes, the adapter
targets.py     which layers get an adapter, of which rank
initialization.py              how adapters start: PiSSA, OLoRA, LoftQ
eva.py         how they start with EVA
build.py       from the flags to a `Run`: data, model, optimiser, devices
schedule.py    the learning rate of each step, the time budget, when to validate, save and stop
steps.py       how many steps a run has, and the micro-batches of each
streaming.py   data at an address: which shards a run needs, and when
optimizer.py   the optimisers by name, their groups and bytes, and one within the backward pass
update_rules.py                the optimisers that are written out here: schedule-free AdamW, APOLLO; several as one
mezo.py        an optimiser that needs no backward pass
offload.py     AdamW in host memory
reference.py   what the base alone makes of preference pairs
teacher.py     what a teacher finds likely at each target, for distillation
forgetting.py  how far training has taken a model from its base, on text that it is not to forget
metrics.py     what a run measures: a row of metrics.csv for each step, memory, FLOPs, the plot
run_folder.py  the folder of a run: checkpoints, rotation, disk space, what must match to resume
nonfinite.py   a step whose loss or gradient is not finite: which samples cause it, and replaying it
sweep/         several variants over one base, trained together. Its map is in sweep/__init__.py
parallel/      several devices: what each has of the data and of the model. Its map is in parallel/__init__.py
memory/        peak memory predicted and tried out before the first step. Its map is in memory/__init__.py

from_settings.py imports targets.py and initialization.py, which imports eva.py and steps.py; mezo.py imports
update_rules.py, optimizer.py both; offload.py imports optimizer.py; forgetting.py, reference.py import none;
streaming.py imports steps.py; teacher.py imports from_settings.py; parallel/ imports from_settings.py,
initialization.py, optimizer.py and steps.py; build.py imports from_settings.py, initialization.py, forgetting.py,
offload.py, optimizer.py, parallel/, streaming.py and teacher.py; nonfinite.py imports build.py and steps.py; memory/
imports from_settings.py, metrics.py, offload.py, optimizer.py, parallel/, steps.py and teacher.py; sweep/ imports
build.py, memory/ and what they import.
"""
