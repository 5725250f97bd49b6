"""Between the scripts and the machine: command lines and files. Imports nothing of ours.

cli.py    flags from a dataclass, and every mistake answered in one line with exit status 2. Start here.
files.py  files and folders that appear whole or not at all, their SHA-256 hashes, JSON

files.py imports cli.py, for its `UserError`.
"""
