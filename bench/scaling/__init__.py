"""How training scales over devices: measured on CPUs, calculated for clusters. ../scale.py measures; start there.

sides.py     what it runs in the processes of each side
messages.py  what a process hands to torch.distributed, counted
clusters.py  efficiency on 8 to 512 H100s, calculated from the plan
"""
