"""The passes of prepare_data.py: from files of rows to tokens and targets on the disk.

In the order in which data goes through them; start with rendering.py:

mixture.py          which sources, with weights, filters and few-shot examples, from the command line or YAML
reading.py          files to rows (JSON, JSON Lines, CSV, Parquet, Hugging Face datasets); a new format is a function
                    and a line in `FORMATS`
columns.py          values of columns, and templates over them
shapes.py           which columns mean what, by their names; a new shape of rows is a line in `SHAPES`
dialects.py         conversations in other notations (ShareGPT's, Hermes')
multiple_choice.py  choices in an order, and the letter of the right one
pairs.py            preference pairs: a prompt apart from its chosen and its rejected answer
records.py          a row to a record: its conversation, and what is to be counted of it
filtering.py        a row to a record, and the filters that need one row alone
cleaning.py         finds duplicates, near-duplicates and leaked benchmark items; repetition
benchmarks.py       the samples that must not be trained on
dropping.py         drops what cleaning.py finds among all records
sampling.py         all that is random: validation split, few-shot examples, copies by a mixture's weights
rendering.py        a record to tokens and targets, cut to length
workers.py          the pool of processes that filter and render
ray_workers.py      the same on a Ray cluster
engines.py          which of the two: a new one is a line in `ENGINES`
record_store.py     records and tokens in temporary files between two passes
prepared_folder.py  the files that are written: samples and data.json
version.py          one hash of all that they depend on: what is prepared already is not prepared again
report.py           report.html, with histogram.py (lengths as SVG) and markup.py (text made visible)
show.py             samples on the terminal

A file may import those named before it: reading.py, columns.py, shapes.py, dialects.py, multiple_choice.py, pairs.py,
records.py, mixture.py, cleaning.py, workers.py, ray_workers.py, engines.py, rendering.py, filtering.py,
record_store.py, benchmarks.py, dropping.py, sampling.py, markup.py, prepared_folder.py, version.py, report.py.
"""
