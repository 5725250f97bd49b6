"""Measurements of onetune: against its peers, its own predictions, and what a machine can do.

training/     speed and memory of a step against peers, accuracy, predicted memory, planners, saving
inference/    speed of generation, and of multiple choice under lm-eval
preparation/  speed and memory of prepare_data.py
machine/      what a machine can do at most
scaling/      what scale.py runs in its processes, messages counted, and efficiency on clusters, calculated
gpu/          what one GPU does: training, decoding, kernels, resuming; all of it with gpu.sh
roofline.py   what training and decoding can reach on cards that are not here, predicted from every operation
operations.py every operation of a step or a token, with its FLOPs and bytes; roofline.py's and machine/rates.py's
measuring.py  what they share: JSON lines, alternating runs, processes, medians, tables, charts. Start here
shapes.py     what the config.json of published models says; random_model.py makes a folder of such a shape
scale.py      how training scales from one process to several, beside DDP and FSDP2 of transformers + PEFT
methods.py    every method of finetune.py on the same data: memory, speed, right answers
gpu.sh        the tests marked `gpu` and the parts of gpu/, each on its own clock, on a machine with a GPU
results/      JSON lines and charts of the figures in README and docs/
venvs/        made on first use: virtual environments of the peers, logs, converted models

Above everything else. Each script runs by itself, as `python bench/training/speed.py --help`.
"""
