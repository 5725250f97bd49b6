"""What sweep.py is made of: a search for the best flags of finetune.py, over Optuna.

search_file.py  the YAML file of a search, read and checked. Start here
ranges.py       what a flag may be in a search: a range of numbers, or choices
metric.py       what is compared: a column of metrics.csv, or the exact match
contents.py     what is in the folders and files that a search names, as hashes
study.py        Optuna's study, which all processes share, and which trial a process takes next
trial.py        a trial: finetune.py in a child process, followed, pruned, continued
children.py     child processes, and the signals that are passed on to them
report.py       the table of all trials, the best one, which flags matter
picture.py      the picture of it

ranges.py and children.py import none of the others; metric.py imports children.py; search_file.py imports metric.py
and ranges.py; contents.py, study.py, report.py and picture.py import search_file.py, study.py imports contents.py,
trial.py imports children.py, metric.py and study.py. Nothing here imports torch: it is in the child processes.
"""
