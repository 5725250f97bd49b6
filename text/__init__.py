"""Text to tokens and back, and how a conversation is rendered: the same for training and inference.

tokenizer.py      a checkpoint's tokenizer (SentencePiece, tokenizers): encode, decode, stream
prompts.py        prompt styles, and which tokens are targets. Start here; a new style is a row in `STYLES`
chat_template.py  a checkpoint's Jinja chat template, run in a sandbox and a process with limits

prompts.py imports chat_template.py, tokenizer.py imports prompts.py.
"""
