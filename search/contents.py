"""What is in the folders and files that a search names: as long as it stays the same, trials can be compared.

Of data it is the hash in their data.json. Of models pieces are hashed: that finds another model, but not a flipped bit.
"""

import hashlib
from pathlib import Path

from search.search_file import Search
from shell.files import hash_of_pieces, sha256
from tracking.run_files import hashes_of_data


def contents(search: Search) -> dict[str, str | list[str]]:
    """Hashes of what is in each folder and file that the flags and the metric name, by its path."""
    found = {str(folder): _data(folder) for folder in search.paths("data_dir")}
    found |= {str(folder): _model(folder) for folder in search.paths("checkpoint_dir") + search.paths("teacher_dir")}
    files = [path for path in search.paths("quantize") if path.is_file()]  # and no name of a quantiser
    if search.metric.exact_match is not None:
        files.append(Path(search.metric.exact_match["data"]))
    return found | {str(path): sha256(path) for path in files}


def _data(folder):
    return [*hashes_of_data(folder).values()]


def _model(folder):
    paths = sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")])
    hashes = [f"{path.name} {hash_of_pieces(path)}" for path in paths]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()
