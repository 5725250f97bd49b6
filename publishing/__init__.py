"""A trained adapter or a merged model, given to others on Hugging Face's hub.

push_to_hub.py      the script: checks, makes the folder that is uploaded, uploads it. Start here
model_files.py      which files are uploaded, and what in them is not
model_card.py       its README.md: what it was made of and what it can do, from the run that made it
                    (model_card.jinja: its text)

Imports from training/, weights/, tracking/, store/ and shell/.
"""
