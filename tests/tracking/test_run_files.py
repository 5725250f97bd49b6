"""What a run's folder says of what lies elsewhere."""

from test_finetune import random_samples, run, settings, write_data  # noqa: F401 (fixtures)

from shell.files import new_folder, write_json
from tracking.run_files import data_of_run


def test_the_data_of_a_run_are_those_it_was_trained_on(run, tmp_path, tiny_model_dir):  # noqa: F811
    samples, data = random_samples(8), tmp_path / "data"
    out = run(samples, max_steps=1)
    assert data_of_run(out) == data
    data.rename(tmp_path / "moved")
    assert data_of_run(out) is None, "the folder is gone"
    for now, same in ((samples, True), (random_samples(9), False)):
        with new_folder(data) as folder:
            folder.rmdir()
            write_data(folder, tiny_model_dir, now)
        assert data_of_run(out) == (data if same else None)
    (data / "train.safetensors").unlink()
    write_json(data / "data.json", {})
    assert data_of_run(out) is None, "a data.json without hashes is that of other data"
    (out / "record.json").unlink()
    assert data_of_run(out) is None, "nothing says which data they were"
