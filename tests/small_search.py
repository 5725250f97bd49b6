"""A small search over the tiny model."""

import json

import pytest
import yaml

SAMPLES = [{"instruction": f"what is {i}", "output": f"it is {i * 7 % 13}"} for i in range(60)]


@pytest.fixture(scope="session")
def prepared(tiny_model_dir, tmp_path_factory):
    """The folder of prepared data, a fifth of them for validation; beside it the samples, rows.jsonl."""
    folder = tmp_path_factory.mktemp("prepared")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in SAMPLES))
    import prepare_data

    settings = prepare_data.Settings(
        data=rows, checkpoint_dir=tiny_model_dir, out_dir=folder / "data", val_fraction=0.2
    )
    prepare_data.main(settings)
    return folder / "data"


@pytest.fixture
def write_search(tiny_model_dir, prepared, tmp_path):
    """`write_search({"lora_r": 4}, trials=2)`: the file of a search with these parameters and keys beside the usual."""

    def write(parameters, **keys):
        usual = {
            "checkpoint_dir": str(tiny_model_dir), "data_dir": str(prepared), "precision": "32-true", "max_steps": 6,
            "eval_interval": 2, "save_interval": 2, "global_batch_size": 4, "warmup_steps": 1,
        }  # fmt: skip
        path = tmp_path / "search.yaml"
        path.write_text(yaml.safe_dump({"parameters": usual | parameters, **keys}, sort_keys=False))
        return path

    return write


@pytest.fixture
def search_of(write_search):
    """The same, read."""
    from search.search_file import read_search

    return lambda parameters, **keys: read_search(write_search(parameters, **keys))
