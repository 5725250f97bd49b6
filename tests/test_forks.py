"""The project as a researcher forks it: a copy is edited in one place, then trains, resumes, generates and merges.

Each fork runs in a child process (`DRIVER`). What it leaves is held against what the edit should give, computed here by
the unedited project from plain weights.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from safetensors.torch import load_file
from test_finetune import random_sample, rows, write_data

import finetune
import lora
import model as model_file
from quantize import QUANTIZERS
from shell.cli import UserError
from training import metrics
from training.run_folder import source_files
from training.settings import Settings
from weights import peft_format
from weights.checkpoint import load_model

TARGETS = ("q_proj", "v_proj", "down_proj")
SAMPLES = 4  # all in one step, so that its loss does not depend on their order

DRIVER = """
import json, shutil, sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import convert_hf_checkpoint, finetune
from inference.writer import Writer
from shell import cli
from training import metrics
from training.settings import Settings

metrics.plot_losses = lambda *_: None  # takes half a second
flags, out, tokens = json.loads(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
run, resumed = out / "run", out / "resumed"
finetune.main(cli.parse(Settings, [*flags, "--out_dir", str(run)]))
shutil.copytree(run, resumed)
shutil.rmtree(resumed / "step-000004")
shutil.rmtree(resumed / "final")
finetune.main(cli.parse(Settings, [*flags, "--out_dir", str(resumed), "--resume"]))

decoder = Writer(None, run / "final", None, "32-true").decoder
ids, logits = torch.tensor([tokens]), decoder.start(torch.tensor([tokens]), torch.zeros(1, dtype=torch.int64), 64)
for _ in range(8):
    ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    logits = decoder.step(ids[:, -1])
with torch.no_grad():
    save_file({"ids": ids, "logits": decoder.model(ids)}, out / "result.safetensors")
print("decoder:", type(decoder).__name__)
convert_hf_checkpoint.main(convert_hf_checkpoint.Settings(adapter_dir=run / "final", out_dir=out / "merged"))
"""


class Fork:
    """A copy of the project in `folder`, and what came of it: see `DRIVER`."""

    def __init__(self, folder, model_dir):
        self.folder, self.model_dir = folder / "fork", model_dir
        for path in source_files():
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, self.folder / path)
        self.samples = [random_sample(prompt, answer) for prompt, answer in ((3, 9), (8, 5), (2, 14), (6, 6))]
        write_data(folder / "data", model_dir, self.samples)
        self.out, self.data = folder / "out", folder / "data"

    def edit(self, name, old, new):
        """Replace a text that occurs once in a file."""
        path = self.folder / name
        text = path.read_text()
        assert text.count(old) == 1, f"{name}: {old!r}"
        path.write_text(text.replace(old, new))

    def run(self, **flags):
        """Train, resume, generate and merge; what the child wrote to standard output and standard error."""
        self.flags = {
            "checkpoint_dir": self.model_dir, "data_dir": self.data, "precision": "32-true", "max_steps": 4,
            "global_batch_size": SAMPLES, "learning_rate": 0.05, "warmup_steps": 0, "save_interval": 2,
            "eval_interval": 0, "lora_r": 4, "lora_alpha": 8, "lora_targets": list(TARGETS), **flags,
        }  # fmt: skip
        given = [f"--{name}={str(value).replace(chr(39), '')}" for name, value in self.flags.items()]
        (self.folder / "driver.py").write_text(DRIVER)
        arguments = json.dumps(given), str(self.out), json.dumps(torch.randint(3, 512, (5,)).tolist())
        done = subprocess.run(
            [sys.executable, "driver.py", *arguments], cwd=self.folder, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
        return done.stdout, done.stderr

    @property
    def tensors(self):
        """Of the trained adapter: {module: {name: tensor}}."""
        result = {}
        for name, tensor in load_file(self.final / "adapter_model.safetensors").items():
            name = name.removeprefix(peft_format.PREFIX).removesuffix(".weight").replace(".lora_", ":lora_")
            module, _, key = name.partition(":")
            result.setdefault(module, {})[key] = tensor
        return result

    @property
    def final(self):
        return self.out / "run" / "final"

    def expected_model(self, weight_of=None, base=lambda weight: weight):
        """The unedited model in whose weights is what `weight_of` makes of each adapted layer and its tensors.

        base: what the frozen weights of linear layers in the blocks are before.
        """
        model = load_model(self.model_dir, torch.float32)
        for name, layer in lora.linear_layers(model).items():
            if name != "lm_head":
                layer.weight.data = base(layer.weight.data)
        for name, tensors in self.tensors.items():
            layer = model.get_submodule(name)
            layer.weight.data = (weight_of or plain_lora)(layer.weight.data, tensors)
        return model

    @torch.no_grad()
    def check(self, expected, plain):
        """Hold what the child computed against the model `expected`, which must differ from `plain`."""
        first, second = ((self.out / run / "final" / "adapter_model.safetensors") for run in ("run", "resumed"))
        assert first.read_bytes() == second.read_bytes()
        result = load_file(self.out / "result.safetensors")
        logits = expected(result["ids"])
        assert distance(result["logits"], logits) < 1e-4
        for i in range(5, 13):  # greedy, and where two are all but equal, either
            assert logits[0, i - 1, result["ids"][0, i]] > logits[0, i - 1].max() - 1e-3
        assert distance(plain(result["ids"]), logits) > 1e-2

    @torch.no_grad()
    def check_merged(self, expected):
        merged = load_model(self.out / "merged", torch.float32)
        ids = load_file(self.out / "result.safetensors")["ids"]
        assert distance(merged(ids), expected(ids)) < 1e-4

    def loss(self, model, chosen=range(SAMPLES), of_logits=None):
        """The mean loss of samples, from their logits (n, V) and targets (n,) by torch alone."""
        total = count = 0
        for ids, targets, _ in (self.samples[i] for i in chosen):
            with torch.no_grad():
                logits = model(torch.tensor([ids]))[0, :-1]
            places = [i for i in range(len(ids) - 1) if targets[i + 1]]
            total += (of_logits or cross_entropy)(logits[places], torch.tensor(ids)[1:][places]).item()
            count += len(places)
        return total / count


def plain_lora(weight, tensors, factor=1.0):
    return weight + factor * (8 / 4) * tensors["lora_B"] @ tensors["lora_A"]


def cross_entropy(logits, targets):
    return F.cross_entropy(logits, targets, reduction="sum")


def distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.fixture
def fork(tmp_path, tiny_model_dir):
    return Fork(tmp_path, tiny_model_dir)


def adapter_config(fork):
    return json.loads((fork.final / "adapter_config.json").read_text())


def assert_not_taken_for_lora(fork, kind):
    """PEFT does not load it, and the unedited project names what it lacks."""
    from peft import PeftConfig

    assert adapter_config(fork)["peft_type"] == f"ONETUNE_{kind}"
    with pytest.raises(KeyError, match="ONETUNE"):
        PeftConfig.from_pretrained(fork.final)
    with pytest.raises(
        UserError, match=r"adapter_config\.json: it (is an adapter of the kind|was trained with another)"
    ):
        load_model(fork.model_dir, torch.float32, adapter_dir=fork.final)


# --------------------------------------------------------------------------------------------------------- adapters

LOUD = '''class LoudLinear(LoRALinear):
    """Twice what LoRA adds."""

    def low_rank(self, x):
        return 2 * super().low_rank(x)


ADAPTERS = {"loud": LoudLinear, '''


def nf4(weight):
    return QUANTIZERS["bnb.nf4"](weight, None).dequantize(torch.float32)


def test_an_adapter_that_overrides_one_method(fork, monkeypatch):
    """Over a quantised base. At every step, loss and gradient see it: as if alpha were twice as large."""
    fork.edit("lora.py", "ADAPTERS = {", LOUD)
    fork.run(method="loud", quantize="bnb.nf4")
    loud = fork.expected_model(lambda weight, tensors: plain_lora(weight, tensors, 2), nf4)
    fork.check(loud, fork.expected_model(base=nf4))
    fork.check_merged(loud)
    assert_not_taken_for_lora(fork, "loud")
    monkeypatch.setattr(metrics, "plot_losses", lambda *_: None)
    reference = fork.out / "reference"
    finetune.main(Settings(**fork.flags | {"out_dir": reference, "method": "lora", "lora_alpha": 16}))
    losses, expected = ([row["loss"] for row in rows(out)] for out in (fork.out / "run", reference))
    assert losses == pytest.approx(expected, rel=1e-4) and losses[3] < 0.9 * losses[0]
    assert json.loads((reference / "final" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_lora_edited_in_place(fork):
    """Nothing tells by its type that it is another."""
    fork.edit("lora.py", "x = F.linear(x, self.lora_A.to(x.dtype)) * self.scale", "x = F.linear(x, self.lora_A) * -6")
    _, err = fork.run()
    assert err.count("note: LoRALinear computes something new") == 1
    expected = fork.expected_model(lambda weight, tensors: plain_lora(weight, tensors, -3))
    fork.check(expected, fork.expected_model())
    fork.check_merged(expected)
    assert_not_taken_for_lora(fork, "lora")


VERA = '''@cache
def random_matrix(out_features, in_features, device):
    generator = torch.Generator().manual_seed(out_features * 1000 + in_features)
    return torch.randn(out_features, in_features, generator=generator, device="cpu").to(device)


class OwnVeRALinear(Adapter):
    """y = base(x) + b * B (d * A x), A and B shared by all layers of a size (Kopiczko et al., arXiv 2310.11454)."""

    def __init__(self, base, r, alpha, dropout=0.0, rslora=False):
        super().__init__(base)
        self.register_buffer("A", random_matrix(r, self.in_features, self.device), persistent=False)
        self.register_buffer("B", random_matrix(self.out_features, r, self.device), persistent=False)
        self.d = nn.Parameter(torch.full((r,), 0.1, device=self.device))
        self.b = nn.Parameter(torch.zeros(self.out_features, device=self.device))

    def forward(self, x):
        small = F.linear(x, self.A.to(x.dtype)) * self.d.to(x.dtype)
        return self.base(x) + F.linear(small, self.B.to(x.dtype)) * self.b.to(x.dtype)


ADAPTERS = {"own-vera": OwnVeRALinear, '''


def vera_weight(weight, tensors):
    out_features, in_features = weight.shape

    def matrix(rows, columns):
        return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * 1000 + columns))

    low_rank = matrix(out_features, 4) * tensors["d"] @ matrix(4, in_features)
    return weight + tensors["b"][:, None] * low_rank


def test_an_adapter_with_tensors_of_its_own(fork):
    fork.edit("lora.py", "ADAPTERS = {", VERA)
    out, _ = fork.run(method="own-vera")
    losses = [row["loss"] for row in rows(fork.out / "run")]
    base = load_model(fork.model_dir, torch.float32)
    assert losses[0] == pytest.approx(fork.loss(base), rel=1e-5) and losses[3] < losses[0]
    assert {name for tensors in fork.tensors.values() for name in tensors} == {"d", "b", peft_format.UNSAVED}
    adapted = [layer for name, layer in lora.linear_layers(base).items() if name.endswith(TARGETS)]
    assert f"{sum(4 + layer.out_features for layer in adapted):,} trainable parameters" in out
    expected = fork.expected_model(vera_weight)
    fork.check(expected, base)
    fork.check_merged(expected)
    assert_not_taken_for_lora(fork, "own-vera")


# --------------------------------------------------------------------------------------- planner, norm, quantiser, loss


def test_a_planner(fork):
    """In the order of the file, one sample a micro-batch: the loss of each of the first two steps is that of two."""
    fork.edit(
        "batching.py",
        "PLANNERS = {",
        "def one_by_one(lengths, targets, budget):\n"
        "    return [[place] for place in range(len(lengths))]\n\n\n"
        "def of_the_file(order, lengths, size):\n"
        "    return lambda place: torch.arange(place * size, min((place + 1) * size, len(order)))\n\n\n"
        'PLANNERS = {\n    "one_by_one": Planner(one_by_one, Samples.padded, of_the_file),',
    )
    fork.run(planner="one_by_one", global_batch_size=2, learning_rate=0.01)
    found = rows(fork.out / "run")
    base = load_model(fork.model_dir, torch.float32)
    assert found[0]["loss"] == pytest.approx(fork.loss(base, [0, 1]), rel=1e-5)
    assert abs(fork.loss(base, [0, 1]) - fork.loss(base)) > 1e-3
    assert [row["tokens"] for row in found] == [
        sum(len(fork.samples[i][0]) - 1 for i in two) for two in [(0, 1), (2, 3)] * 2
    ]
    assert {row["padding"] for row in found} == {0}
    expected = fork.expected_model()
    fork.check(expected, base)
    fork.check_merged(expected)


def test_a_norm(fork, monkeypatch):
    """decode_cpu.cpp has a norm of its own, which must not be taken."""
    fork.edit(
        "model.py",
        "return rms_norm(x, self.weight, self.eps, self.plus_one)",
        "return rms_norm(x, self.weight, self.eps, self.plus_one) * 1.25",
    )
    out, err = fork.run()
    plain = fork.expected_model()
    norm = model_file.RMSNorm.forward
    with monkeypatch.context() as patch, torch.no_grad():
        ids = load_file(fork.out / "result.safetensors")["ids"]
        before = plain(ids)
        patch.setattr(model_file.RMSNorm, "forward", lambda self, x: 1.25 * norm(self, x))
        expected = fork.expected_model()
        fork.check(expected, lambda ids: before)
        fork.check_merged(expected)
        assert rows(fork.out / "run")[0]["loss"] == pytest.approx(
            fork.loss(load_model(fork.model_dir, torch.float32)), rel=1e-5
        )
    assert "decoder: Decoder" in out
    assert err.count("note: CompiledDecoder is not taken: it computes something else than this model.py") <= 1


QUANTISER = '''class Ternary(QuantizedLinear):
    """-1, 0 or 1 times a scale for each row."""

    def __init__(self, weight, bias):
        super().__init__(weight, bias)
        self.size = weight.float().abs().mean(dim=1, keepdim=True)
        self.signs = (weight.float() / self.size).round().clamp(-1, 1).to(torch.int8)

    def dequantize(self, dtype):
        return (self.signs * self.size).to(dtype)

    def nbytes(self):
        return self.signs.nbytes + self.size.nbytes


QUANTIZERS = {
    "ternary": Ternary,'''


def ternary(weight):
    size = weight.abs().mean(dim=1, keepdim=True)
    return (weight / size).round().clamp(-1, 1) * size


def test_a_quantiser(fork):
    fork.edit("quantize.py", "QUANTIZERS = {", QUANTISER)
    out, _ = fork.run(quantize="ternary")
    base = fork.expected_model(lambda weight, tensors: weight, ternary)
    assert rows(fork.out / "run")[0]["loss"] == pytest.approx(fork.loss(base), rel=1e-5)
    expected = fork.expected_model(base=ternary)
    fork.check(expected, fork.expected_model())
    fork.check_merged(expected)
    total = sum(parameter.numel() for parameter in base.parameters())
    assert f"beside {total:,} frozen ones" in out
    with pytest.raises(UserError, match="ternary"):
        load_model(fork.model_dir, torch.float32, quantize="ternary")


def test_an_objective(fork):
    """Label smoothing (Szegedy et al. 2015, arXiv 1512.00567, section 7)."""
    fork.edit(
        "model.py",
        "return head_loss(x, self.lm_head.weight, targets, bias, softcap, z_loss)",
        "how = dict(reduction='none', label_smoothing=0.3)\n"
        "            losses = nn.functional.cross_entropy(self.lm_head(x).float(), targets, **how)\n"
        "            return losses.sum(), losses.detach()",
    )

    def smoothed(logits, targets):
        return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=0.3)

    fork.run()
    losses = [row["loss"] for row in rows(fork.out / "run")]
    base = load_model(fork.model_dir, torch.float32)
    assert losses[0] == pytest.approx(fork.loss(base, of_logits=smoothed), rel=1e-5)
    assert abs(losses[0] - fork.loss(base)) > 1e-3 and losses[3] < losses[0]
    expected = fork.expected_model()
    fork.check(expected, base)
    fork.check_merged(expected)


def test_the_copy_is_all_of_the_product(fork):
    assert (fork.folder / "training" / "settings.py").is_file() and not (fork.folder / "tests").exists()
    assert Path(fork.folder, "ops", "decode_cpu.cpp").is_file()
