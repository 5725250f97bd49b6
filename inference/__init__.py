"""From a loaded model to text and log-likelihoods.

sampling.py  logits to tokens, in batches whose rows join and leave. Start here
decode.py    one token after another, fast: CUDA graphs on a GPU, compiled products on a CPU
scoring.py   log-likelihoods of continuations and whole texts; a shared context is computed once
serving.py   continuous batching: requests that come at any time, answered together

serving.py imports decode.py and sampling.py.
"""
