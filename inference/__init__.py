"""From a loaded model to text and log-likelihoods.

sampling.py  logits to tokens, in batches whose rows join and leave. Start here
decode.py    one token after another, fast: CUDA graphs on a GPU, compiled products on a CPU
kv_cache.py  keys and values of the tokens that were read
scoring.py   log-likelihoods of continuations and whole texts; a shared context is computed once
serving.py   requests that come at any time, answered together

serving.py imports sampling.py, and decode.py imports kv_cache.py.
"""
