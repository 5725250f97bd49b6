"""The passes of prepare_data.py: from files of rows to tokens and targets on the disk.

reading.py       files to rows (JSON, JSON Lines, CSV, Parquet, Hugging Face datasets); a new format is a row
records.py       rows to dialogs: which columns mean what
mixture.py       sources with weights, filters and few-shot examples, from YAML
cleaning.py      duplicates, near-duplicates, leaked benchmark items, filters
sampling.py      everything random, from the seed: the validation split, mixture weights, few-shot examples
rendering.py     a dialog to tokens and targets, on all cores. Start here
record_store.py  rows and tokens in temporary files between two passes
report.py        report.html and samples on the terminal

mixture.py imports reading.py and records.py; rendering.py imports cleaning.py, reading.py and records.py;
record_store.py imports cleaning.py.
"""
