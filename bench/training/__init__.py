"""Measurements of training.

speed.py      tokens a second and peak memory against transformers + PEFT, TRL, LitGPT, torchtune. Start here
peers.py      the peers' side of speed.py, and what a mode such as "lora-qv" means for all scripts
ours.py       our side: finetune.py's own step
accuracy.py   validation loss after N steps, against transformers + PEFT
gradients.py  fp32 gradients of LoRA against exact ones, beside transformers + PEFT's
memory.py     predicted against measured peak memory
fits.py       the largest micro-batch of a model on a card, by prediction
planners.py   what the choice of a step's samples does to the loss
saving.py     what a save costs
loading.py    what each device reads, holds, and takes at the peak when it loads its part of a model
sweep.py      variants trained together against runs one after another

peers.py runs under interpreters that have nothing but a peer installed.
"""
