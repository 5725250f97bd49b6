"""Which files of a folder belong to its model or adapter, and these files without the places of this machine."""

import json
import shutil
from pathlib import Path

from shell.cli import UserError
from shell.files import MANIFEST, read_json, write_json
from weights.checkpoint import LEGAL_FILES, NOTES, SIDE_FILES
from weights.peft_format import METADATA
from weights.safetensors_format import read_metadata, read_tensors, write_tensors
from weights.stored import CHECKPOINT_AGAIN, INDEX, shard_paths

ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CARD = "README.md"
LICENCES = tuple(name for name in LEGAL_FILES if name != CARD)
BASE = "base_model_name_or_path"  # in ADAPTER
# Where other programs note from where they loaded something. Nothing reads these keys.
PLACES = ("_name_or_path", "name_or_path", "tokenizer_name_or_path", "tokenizer_file", "special_tokens_map_file")


def is_adapter(folder: Path) -> bool:
    """Whether a folder is that of an adapter, not of a model."""
    return (folder / ADAPTER).is_file()


def files_of_model(folder: Path) -> list[str]:
    """The names of the files that belong to the adapter or model in a folder. Raises UserError without its weights."""
    if is_adapter(folder):
        if not (folder / ADAPTER_WEIGHTS).is_file():
            raise UserError(f"{folder / ADAPTER_WEIGHTS} does not exist: the adapter has no weights")
        weights = [ADAPTER, ADAPTER_WEIGHTS]
    else:
        weights = [path.name for path in shard_paths(folder, INDEX, "*.safetensors")]
        weights += [INDEX] if len(weights) > 1 else []
    return [name for name in (*weights, *SIDE_FILES, *LICENCES, NOTES) if (folder / name).is_file()]


def left_out(folder: Path) -> list[str]:
    """What else is in the folder, by name: a checkpoint's state, notes, folders; its manifest is made again."""
    known = {*files_of_model(folder), MANIFEST}
    return sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if path.name not in known)


def copy_model(source: Path, folder: Path, base: str) -> None:
    """Copy what belongs to the model or adapter in `source`. base: what its files then call its base."""
    for name in files_of_model(source):
        shutil.copy(source / name, folder / name)
        if name.endswith(".json") and name != INDEX:
            _drop_places(folder / name)
    for name, key in ((ADAPTER, BASE), (NOTES, "checkpoint_dir")):
        if (folder / name).is_file():
            write_json(folder / name, read_json(folder / name) | {key: base})
    if is_adapter(source):
        _rename_base(source / ADAPTER_WEIGHTS, folder / ADAPTER_WEIGHTS, base)


def _drop_places(path):
    values = read_json(path)
    if not values.keys().isdisjoint(PLACES):
        write_json(path, {key: value for key, value in values.items() if key not in PLACES})


def _rename_base(source, target, base):
    """Where the metadata of the tensors have a description of the adapter, name its base there too."""
    metadata = read_metadata(source, CHECKPOINT_AGAIN)
    if METADATA in metadata:
        description = json.dumps(json.loads(metadata[METADATA]) | {BASE: base})
        write_tensors(target, read_tensors(source, CHECKPOINT_AGAIN), metadata | {METADATA: description})
