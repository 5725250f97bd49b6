"""From a loaded model to text and log-likelihoods.

sampling.py      logits to tokens, in batches whose rows join and leave. Start here
writer.py        a model with its tokenizer and prompt style: messages in, answers out. What generate.py and eval/ share
decode.py        one token after another, fast: CUDA graphs on a GPU, compiled products on a CPU
kv_cache.py      keys and values of the tokens that were read
prefix_cache.py  those of beginnings that prompts share, kept from request to request
several.py       several adapters over one base: which row of a batch goes through which
slots.py         the same at addresses that stay, for CUDA graphs
scoring.py       log-likelihoods of continuations and whole texts; a shared context is computed once
serving.py       continuous batching: requests that come at any time, answered together

slots.py imports kv_cache.py; decode.py imports both, prefix_cache.py and several.py; scoring.py several.py, too;
sampling.py imports decode.py; writer.py and serving.py import sampling.py.
"""
