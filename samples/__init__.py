"""Prepared data on the disk.

shards.py      the files that its samples are in, and what data.json says of them
"""
