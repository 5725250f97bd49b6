"""Metaflow flows: what a team lets run by itself, made of the project's own scripts. Start with finetune_flow.py.

data_prep_flow.py   fetch sources, prepare them, check the result, publish it, and say so by an event
finetune_flow.py    started by that event: get the base, tune, evaluate, merge; register what passes the gate
scripts.py          run a script of the project, and take its error line as the step's
registry.py         MLflow's model registry
cards.py            what the flows' cards show

A flow runs scripts as a user would, each in a process of its own, and keeps in Metaflow what they wrote where. So a
step has nothing that the scripts have not, and can be done by hand.

Imports from tracking/ and shell/.
"""
