"""A run as its folder records it, and how trackers get to see it. Start with sending.py.

run_files.py        what lies in a run's folder: rows of metrics.csv, record.json, results, pictures; where each is
record.py           record.json: hashes of data, base and code, git commit, environment; git.diff
results.py          results of an evaluation, kept beside the run whose model was evaluated
trackers.py         the table of trackers, and what each must do
to_tensorboard.py, to_mlflow.py, to_wandb.py    one tracker each, by its own library
sending.py          what a tracker has not got yet goes there; how far it got is kept in the run's folder
following.py        the processes beside a training run that do so, one for each tracker
upload.py           the script that they run, and that sends later what could not be sent
overview.py         the runs below a folder: state, settings, numbers and curves of each, for runs.py
run_table.py        runs as a table, sorted, as text and CSV
comparison.py       two runs side by side, and both losses in one picture
page.py             all runs on one page: runs.html is its template, runs.js its script
curves.py           running means, fewer points, an axis for losses

The run's folder is the truth: training writes there and nowhere else, and no tracker's library is in its process. So a
tracker that is down or slow cannot stop or slow a run.

Imports from shell/ alone.
"""
