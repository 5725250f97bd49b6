"""Measurements of inference.

speed.py    prompts and decoding in tokens a second, against transformers and LitGPT. Start here
sides.py    what speed.py runs in the process of each side
prefixes.py few-shot prompts, whose examples are read once, against reading them each time
harness.py  multiple choice under lm-eval, against its own class for transformers' models
"""
