"""Text to tokens and back, and how a conversation is rendered: the same for training and inference.

tokenizer.py        a checkpoint's tokenizer: encode, decode, stream; added tokens, BOS and EOS
added.py            adding tokens to its files
vocabulary.py       what is in its files, run by the libraries tokenizers and SentencePiece
word_cache.py       text to ids word by word, each word remembered
messages.py         what a conversation is made of: one form for all the forms that people and programs write
segments.py         stretches of a rendered conversation, what of them is a target, and their tokens
prompts.py          prompt styles. Start here; a new style is a function and a line in `STYLES` (and in `TEMPLATES`, for
                    other programs)
template_style.py   the style `checkpoint`: a conversation rendered by the checkpoint's own chat template
chat_template.py    such a Jinja template, run in a sandbox and a process with limits
style_templates.py  our styles as Jinja chat templates, written to merged models for other programs
tool_calls.py       calls of tools in the text that a model writes

prompts.py imports template_style.py, which imports chat_template.py; both import segments.py and messages.py.
style_templates.py imports prompts.py; segments.py, tool_calls.py and added.py import tokenizer.py, which imports
vocabulary.py, and that word_cache.py.
"""
