"""Model and adapter folders: read strictly, one tensor at a time, written whole, and converted from other formats.

checkpoint.py          Hugging Face's model folders, and the checkpoints of a run. Start here
families.py            what a config.json means, family by family. A new model family goes here
names.py               what families whose tensors are not Llama's call them, and how they lay them out
stored.py              the tensors of a model folder, under the names in the files or the decoder's
rope_config.py         RoPE in a config.json
config_keys.py         checks of single values of a config.json
peft_format.py         adapter folders in PEFT's format
adapter_config.py      their adapter_config.json, checked
peft_kinds.py          those that are not LoRA: VeRA, (IA)3, virtual tokens, LLaMA-Adapter
peft_layout.py         how they lie there where a family calls our layers otherwise or joins them
residual.py            adapters whose start is taken from the base's weights
beside.py              what trains beside adapters: whole modules, rows of tokens
replaced.py            what such a folder changes beside its adapters: whole parameters, rows of tokens
safetensors_format.py  the safetensors header: what misleads is refused before memory is taken
mxfp4.py               the packed format of GPT-OSS's experts
bin_format.py          PyTorch's pickled files, unpickled without running code
gguf_format.py         llama.cpp's GGUF files: reading them, and the tables for both directions
gguf_architectures.py  what the metadata and tensors of each of its architectures mean
gguf_writing.py        writing them: tensors, and what config.json says
gguf_vocabulary.py     writing them: the tokenizer
meta_format.py         Meta's consolidated.*.pth, sharded, and Mistral's consolidated*.safetensors
params_json.py         what a params.json beside those means
byte_level_bpe.py      byte-level BPE as a tokenizer.json, also from tiktoken's and Mistral's files
grown.py               a larger vocabulary
merge.py               adapter and base as one model
combine.py             several adapters as one

checkpoint.py imports families.py, peft_format.py and stored.py; they import safetensors_format.py; peft_format.py and
stored.py import replaced.py; peft_format.py imports adapter_config.py and beside.py, which do too, peft_layout.py and
residual.py; adapter_config.py and peft_format.py import peft_kinds.py, which imports peft_layout.py; that, beside.py,
stored.py and checkpoint.py import names.py; families.py imports rope_config.py and both config_keys.py; the formats
that are converted import stored.py; meta_format.py imports bin_format.py and params_json.py; it and gguf_format.py
import byte_level_bpe.py, and gguf_format.py imports meta_format.py, whose order of rows some architectures have, and
gguf_architectures.py, which imports families.py; combine.py imports peft_format.py and stored.py; gguf_writing.py
imports gguf_format.py, gguf_vocabulary.py, which does too, and families.py; grown.py imports families.py and
replaced.py; merge.py imports no format that is converted.
"""
