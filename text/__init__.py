"""Text to tokens and back, and how a conversation is rendered: the same for training and inference.

tokenizer.py        a checkpoint's tokenizer (SentencePiece, tokenizers): encode, decode, stream
prompts.py          prompt styles, and which tokens are targets. Start here; a new style is a function and a line in
                    `STYLES` (and in `TEMPLATES`, for other programs)
style_templates.py  the same styles as Jinja chat templates, written to merged models for other programs
chat_template.py    a checkpoint's Jinja chat template, run in a sandbox and a process with limits

prompts.py imports chat_template.py and tokenizer.py; style_templates.py imports prompts.py and tokenizer.py.
"""
