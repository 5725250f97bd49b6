"""Model and adapter folders: read strictly, one tensor at a time, written whole, and converted from other formats.

checkpoint.py          Hugging Face's model folders, and the checkpoints of a run. Start here
families.py            what a config.json means, family by family. A new model family goes here
peft_format.py         adapter folders in PEFT's format
replaced.py            what such a folder changes beside its adapters: whole parameters, rows of tokens
safetensors_format.py  the safetensors header: what misleads is refused before memory is taken
gguf_format.py         llama.cpp's GGUF files: reading them, and the tables for both directions
gguf_writing.py        writing them: tensors, and what config.json says
gguf_vocabulary.py     writing them: the tokenizer
merge.py               adapter and base as one model

checkpoint.py imports families.py and peft_format.py; it and peft_format.py import safetensors_format.py; peft_format.py
imports replaced.py; gguf_format.py imports checkpoint.py; gguf_writing.py imports gguf_format.py, gguf_vocabulary.py,
which does too, and families.py; merge.py imports all but the three for GGUF.
"""
