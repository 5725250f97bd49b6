"""Measurements of data preparation.

speed.py           prepare_data.py as a whole: time, and peak memory as the data grow
many_samples.py    finetune.py on many samples: what it takes to start
chat_templates.py  conversations through a chat template: rendering and tokenising
"""
