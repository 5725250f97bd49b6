"""Command lines and files, for all scripts. Imports nothing of ours.

cli.py           flags from a dataclass, and every mistake answered in one line with exit status 2. Start here.
explain.py       the values of flags in --help, and the messages about wrong ones
requirements.py  the message about a requirement that is not installed
process.py       environment variables that libraries read as they load: caches of compiled products
progress.py      progress bars with the time left, quiet where there is no terminal
files.py         files and folders that appear complete or not at all, their SHA-256 hashes, JSON

cli.py imports explain.py, requirements.py and process.py; files.py imports cli.py, for its `UserError`.
"""
