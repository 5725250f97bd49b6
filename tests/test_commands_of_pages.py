# ruff: noqa: F811 (fixtures)
"""The commands of the pages about what is around a run are executed, letter by letter, on a tiny model and few samples.

Each page is a reader: in a folder with the project's code, a base, prepared data and what the page says must be there.
"""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT, free_port, wait_for
from s3_server import answers, environment, moto, s3  # noqa: F401
from test_docs import fences
from test_google import google  # noqa: F401
from test_push_to_hub import hub  # noqa: F401
from test_store import contents

from tracking.run_files import read_results

CODE = [path for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()]
ELSEWHERE = {  # by the words that a command begins with: why it is not run here
    "pip install": "the tests have what it installs",
    "wandb leet": "it fills a terminal; tests/tracking reads such files with `wandb leet inspect`",
    "HELM_MODEL_DIR=": "it installs HELM; helm_results.py, which it ends with, is the next line",
    "python bench/training/sweep.py": "it measures for minutes; tests/bench looks at it",
    "python flows/data_prep_flow.py --config prepare prepare.yaml argo-workflows": "tests/flows looks at the template",
    "python flows/finetune_flow.py --config finetune configs/dev.yaml argo-workflows": "tests/flows looks at it",
    "docker": "tests/deploy reads the file that it builds",
    "kubectl": "it needs a cluster; tests/deploy checks the files",
    "sbatch": "it needs a cluster; tests/deploy checks the file, and runs what it runs",
    "scancel": "it needs a cluster",
    "sky": "it needs a cluster; tests/deploy checks the files",
}
RUN = dict(
    checkpoint_dir="checkpoints/ORG/MODEL", data_dir="prepared/my", precision="32-true", max_steps=4, eval_interval=2,
    global_batch_size=4, save_interval=2,
)  # fmt: skip


def page(name):
    return (ROOT / "docs" / name).read_text()


def lines_of(name, begin="", end=""):
    """The lines of a page's blocks of shell, without remarks; of the part between two texts, if these are given."""
    text = page(name)
    text = text[text.index(begin) : text.rindex(end) if end else None]
    blocks = [block for language, block in fences(text) if language == "bash"]
    return [line.partition("  #")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]


class Reader:
    """Somebody in a folder of their own, with the project's code there. Commands that fail fail the test."""

    def __init__(self, folder):
        self.folder, self.servers = folder, []
        self.environment = {**os.environ, "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}

    def start(self, line):
        return subprocess.Popen(
            ["bash", "-c", line], cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def run(self, line):
        """Run a command to its end. Returns what it printed."""
        process = self.start(line)
        out = process.communicate(timeout=300)[0]
        assert process.returncode == 0, f"{line}\n{out}"
        return out

    def serve(self, line, port):
        """Start a server, and wait until it answers."""
        process = self.start(line)
        self.servers.append(process)
        wait_for(lambda: answers(port) or process.poll() is not None, 120)
        assert process.poll() is None, f"{line}\n{process.stdout.read()}"

    def write(self, name, content):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))

    def train(self, **flags):
        """Make a short run, as one that the page speaks of."""
        self.write("run.yaml", RUN | flags)
        self.run("python finetune.py --config run.yaml")

    def follow(self, *part):
        """Run the commands of a page, or of a part of it (see `lines_of`), but those of ELSEWHERE; what they print."""
        port, printed = free_port(), ""  # in the place of MLflow's
        lines = [line.replace("5000", str(port)) for line in lines_of(*part)]
        lines = [line for line in lines if not line.startswith(tuple(ELSEWHERE))]
        assert lines
        for line in lines:
            if line.startswith("mlflow server"):
                self.serve(line, port)
            elif line.startswith("tensorboard"):
                self.serve(f"{line} --port {(own := free_port())}", own)
            else:
                printed += self.run(line)
        return printed

    def end(self):
        for process in self.servers:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.fixture
def reader(tmp_path, tiny_model_dir, prepared):
    """A reader with a base whose licence is known, prepared data, their rows, and questions."""
    one = Reader(tmp_path / "reader")
    one.folder.mkdir()
    for path in CODE:
        (one.folder / path.name).symlink_to(path)
    shutil.copytree(tiny_model_dir, one.folder / "checkpoints/ORG/MODEL")
    one.write("checkpoints/ORG/MODEL/README.md", "---\nlicense: apache-2.0\n---\n")
    for name in ("my", "other"):
        shutil.copytree(prepared, one.folder / "prepared" / name)
    rows = (prepared.parent / "rows.jsonl").read_text()
    one.write("my.jsonl", rows)
    one.write("test.jsonl", "".join(rows.splitlines(keepends=True)[:3]))
    yield one
    one.end()


def test_tracking(reader, hub):
    reader.environment |= hub.environment | {"WANDB_MODE": "offline"}
    suite = {"name": {"name": "exact_match", "split": "test"}, "mean": 0.5}
    reader.write("out/helm/runs/v1/gsm/stats.json", json.dumps([suite]))
    reader.follow("tracking.md")
    runs = reader.folder / "out"
    for name, trackers in (("first", "tensorboard mlflow"), ("my", "tensorboard mlflow wandb"), ("wandb", "wandb")):
        assert {path.stem for path in runs.glob(f"{name}/tracking/*.json")} == {*trackers.split()}
    assert {each.kind for each in read_results(runs / "my")} == {"exact_match", "helm"}
    uploaded, written = hub.files, reader.folder / "upload"
    assert uploaded == {path.name: path.read_bytes() for path in written.iterdir()} and "README.md" in uploaded


def test_runs(reader):
    for name, rate in (("a", 0.01), ("b", 0.001)):
        reader.train(learning_rate=rate, out_dir=f"out/{name}")
    printed = reader.follow("runs.md")
    assert "KL(out/a || out/b)" in printed and "KL(out/b || out/a)" in printed
    assert all((reader.folder / name).stat().st_size for name in ("runs.csv", "runs.html", "both.png"))


def test_store(reader, s3, environment, google):
    reader.environment |= google | environment
    for bucket in ("s3://bucket", "gs://bucket"):
        reader.run(f"python store/models.py --push checkpoints/ORG/MODEL --to {bucket}/models/llama")
    reader.train(checkpoint_dir="s3://bucket/models/llama", out_dir="out/before", publish="s3://bucket/adapters/orders")
    (reader.folder / "checkpoints/my-model").symlink_to(reader.folder / "checkpoints/ORG/MODEL")
    printed = reader.follow("store.md")
    assert printed.count("published s3://bucket/adapters/orders@") == 2
    assert printed.count("published s3://bucket/models/my-model@") == 1
    pulled = reader.folder / "checkpoints/my-copy"
    assert contents(pulled) == contents(reader.folder / "checkpoints/my-model")


def test_sweeps(reader):
    joint = next(block for language, block in fences(page("sweeps.md")) if language == "yaml")
    reader.write("sweep.yaml", joint)
    search = yaml.safe_load((ROOT / "examples/search.yaml").read_text())
    reader.write("examples/search.yaml", search | {"trials": 3, "parameters": search["parameters"] | RUN})
    reader.follow("sweeps.md")
    variants = {path.name for path in (reader.folder / "out/sweep").iterdir() if (path / "final").is_dir()}
    assert {"low", "wide", "other"} < variants and len(variants) == 3 + 4
    trials = [*reader.folder.glob("out/search/*/final")]
    assert len(trials) == 3 and (reader.folder / "out/search/search.png").is_file()


def test_flows(reader, s3, environment):
    """Rows and prepared data are in a bucket; Metaflow keeps its own files there too."""
    reader.environment |= environment | {"METAFLOW_USER": "reader", "METAFLOW_HOME": str(reader.folder / "home")}
    reader.environment |= {
        "METAFLOW_DEFAULT_DATASTORE": "s3", "METAFLOW_DATASTORE_SYSROOT_S3": "s3://bucket/metaflow",
        "METAFLOW_S3_ENDPOINT_URL": environment["AWS_ENDPOINT_URL"],
    }  # fmt: skip
    s3.system.put(str(reader.folder / "my.jsonl"), "bucket/rows/my.jsonl")
    source = {"data": "s3://bucket/rows/my.jsonl", "checkpoint_dir": RUN["checkpoint_dir"], "val_fraction": 0.2}
    reader.write("prepare.yaml", source)
    reader.write("configs/dev.yaml", RUN)
    reader.follow("flows.md")
    assert any("/metaflow/FinetuneFlow/" in name for name in s3.objects())
    assert any("/data/flow/versions/" in name for name in s3.objects())
    assert [*reader.folder.glob("out/flows/run-*/final")]


def test_clusters(reader):
    for name in ("dev", "a100"):
        config = yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text())
        reader.write(f"configs/{name}.yaml", config | {"checkpoint_dir": RUN["checkpoint_dir"]})
    printed = reader.follow("clusters.md")
    assert printed.count("take the most memory") == 2


def test_versions_of_data(reader):
    for _ in range(2):
        printed = reader.follow("data.md", "### Versions", "## Speed")
    (folder,) = reader.folder.glob("prepared/my-*")
    assert len(folder.name) == len("my-") + 12 and folder.name in printed


def test_what_is_not_run_is_in_a_page():
    lines = [line for path in ROOT.glob("docs/*.md") for line in lines_of(path.name)]
    assert [words for words in ELSEWHERE if not any(line.startswith(words) for line in lines)] == []


def test_a_command_that_fails_is_found(reader):
    with pytest.raises(AssertionError, match="nowhere"):
        reader.run("python runs.py --out_dir nowhere")
