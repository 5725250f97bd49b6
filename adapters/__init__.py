"""Adapters beside LoRA: a few trained numbers over a frozen module. lora.py has LoRA, and the table of all of them.

adapter.py         what every adapter is. Start here
vera.py            VeRA: one random pair of matrices for all layers, and two trained vectors for each
ia3.py             (IA)3: a trained factor for each number that a layer gives or gets
bias.py            BitFit: the biases alone
virtual_tokens.py  prompt tuning and prefix tuning: trained tokens before every text
llama_adapter.py   LLaMA-Adapter v1 and v2: trained prompts in attention, whose gate is zero at the start

All import adapter.py; llama_adapter.py imports none of the others.
"""
