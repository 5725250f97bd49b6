"""The model store: folders of models and adapters at s3://, gs:// and file://, and a local cache of them.

address.py  what an address such as s3://bucket/models/NAME@VERSION means, and where in the store its parts are
fetch.py    a folder from its address, checked, by way of the cache. Start here: `fetch_folders` is what scripts call.
publish.py  a folder to an address: what is there already is not sent again, the name is written last
streaming.py   files of a folder that come when they are needed: shards of prepared data
cache.py    the folders that were fetched: locks, the size limit, and which address a folder came from
version.py  the list of files that is one version of a name
remote.py   the few calls of fsspec that the others need, with retries, and every failure in one line
models.py   the command: push, pull, list, verify, trim

streaming.py imports fetch.py, models.py fetch.py and publish.py, these the others; cache.py and version.py import
address.py. fsspec is imported in remote.py alone, when an address is used.
"""
