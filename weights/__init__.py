"""Model and adapter folders: read strictly, one tensor at a time, written whole, and converted from other formats.

checkpoint.py          Hugging Face's model folders, and the checkpoints of a run. Start here
families.py            what a config.json means, family by family. A new model family goes here
peft_format.py         adapter folders in PEFT's format
replaced.py            what such a folder changes beside its adapters: whole parameters, rows of tokens
safetensors_format.py  the safetensors header: what misleads is refused before memory is taken
mxfp4.py               the packed format of GPT-OSS's experts
bin_format.py          PyTorch's pickled files, unpickled without running code
gguf_format.py         llama.cpp's GGUF files
meta_format.py         Meta's consolidated.*.pth, sharded, and Mistral's consolidated*.safetensors
params_json.py         what a params.json beside those means
byte_level_bpe.py      byte-level BPE as a tokenizer.json, also from tiktoken's and Mistral's files
merge.py               adapter and base as one model

checkpoint.py imports families.py and peft_format.py; it and peft_format.py import safetensors_format.py; peft_format.py
imports replaced.py; the formats that are converted import checkpoint.py; meta_format.py imports bin_format.py and
params_json.py; it and gguf_format.py import byte_level_bpe.py, and gguf_format.py imports meta_format.py, whose order
of rows it has; merge.py imports no format that is converted.
"""
