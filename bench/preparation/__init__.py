"""Measurements of data preparation.

speed.py           prepare_data.py as a whole: time, and peak memory as the data grow
growth.py          its time and memory as the rows grow, with each engine
many_samples.py    finetune.py on many samples: what it takes to start
chat_templates.py  conversations through a chat template: rendering and tokenising
"""
