"""Whether a run that is killed and resumed ends with the bytes of one that was not: finetune.py --deterministic.

A small random model in the shape of a published one, made on the spot, with a tokenizer whose tokens are bytes and data
prepared from made-up rows. Each way to train runs once to its end and once until SIGKILL meets it after a checkpoint;
what that leaves is resumed, and the SHA-256 of all files of final/ are compared.
"""

import json
import os
import random
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import prepare_data
from bench.gpu.random_models import TINY
from bench.measuring import last_line, script_command
from bench.random_model import write_random_model
from shell.files import sha256

MODELS = {"7b": TINY | dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
                            num_key_value_heads=4, max_position_embeddings=512), "tiny": TINY}  # fmt: skip
QUANTIZED = {"7b": ("bnb.nf4", None), "tiny": ("bnb.nf4",)}
STEPS, SAVED_EVERY = 30, 3  # of a run
END = "<|end|>"


@dataclass(frozen=True)
class Resume:
    """One way to train, killed and resumed."""

    quantize: str | None
    seconds = 35

    def __str__(self):
        return f"killed and resumed, {self.quantize or 'bf16'}"

    def about(self):
        """What its line says of it."""
        return vars(self)

    def measure(self, s, limits):
        """Its row. Raises if a file differs, or if the kill came too late."""
        with tempfile.TemporaryDirectory() as folder:
            return killed_and_resumed(Path(folder), MODELS[s.shape], self.quantize)


def measurements(s):
    """All, the most important first."""
    yield from map(Resume, QUANTIZED[s.shape])


def killed_and_resumed(folder, shape, quantize):
    """The row: how many files of final/ are equal, and the step after which the run was killed."""
    make_inputs(folder, shape)
    whole, killed = start(folder, "whole", quantize), start(folder, "killed", quantize)
    try:
        step = kill_after_checkpoint(folder / "killed", killed)
        finish(whole, folder / "whole")
        resumed = start(folder, "killed", quantize, resume=True)
        finish(resumed, folder / "killed")
    finally:
        for process in (whole, killed):
            process.kill()
            process.wait()
    expected, found = (hashes(folder / name / "final") for name in ("whole", "killed"))
    differing = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    if differing or not expected:
        raise AssertionError(f"files of final/ that differ: {', '.join(differing) or 'there are none'}")
    return {"equal_files": len(expected), "killed_after_step": step, "steps": STEPS, "sha256": expected}


def make_inputs(folder, shape):
    """The model in folder/model and the prepared data in folder/data."""
    tokenizer, rows = folder / "tokenizer", folder / "rows.jsonl"
    write_byte_tokenizer(tokenizer)
    write_random_model(shape, tokenizer, folder / "model")
    words = random.Random(1)
    texts = ["".join(words.choices("abcdefgh ", k=words.randint(5, 60))) for _ in range(64)]
    rows.write_text("".join(json.dumps({"question": text, "answer": text[::-1]}) + "\n" for text in texts))
    flags = {"data": rows, "checkpoint_dir": folder / "model", "out_dir": folder / "data", "prompt_style": "plain"}
    prepare_data.main(prepare_data.Settings(**flags))


def write_byte_tokenizer(folder):
    """A tokenizer whose tokens are the 256 bytes, and one for the end."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": END, "eos_token": END}))


def start(folder, name, quantize, resume=False):
    """finetune.py in a process of its own, whose folder is folder/name."""
    flags = {
        "checkpoint_dir": folder / "model", "data_dir": folder / "data", "out_dir": folder / name, "max_steps": STEPS,
        "save_interval": SAVED_EVERY, "eval_interval": 0, "global_batch_size": 8, "micro_batch_tokens": 256,
        "lora_dropout": 0.1, "deterministic": True, "resume": resume,
    }  # fmt: skip
    if quantize:
        flags["quantize"] = quantize
    command = script_command("finetune.py", flags)
    with open(folder / f"{name}.log", "w") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ)


def kill_after_checkpoint(out_dir, process):
    """Kill the process when its first checkpoint is there. Returns the step of the newest one that it left."""
    while not (found := sorted(out_dir.glob("step-*"))):
        if process.poll() is not None:
            raise RuntimeError(f"finetune.py ended before the kill: {last_line(out_dir.with_suffix('.log'))}")
        time.sleep(0.005)
    process.kill()
    if process.wait() != -signal.SIGKILL or (out_dir / "final").exists():
        raise RuntimeError("finetune.py ended before the kill")
    found = sorted(out_dir.glob("step-*"))
    return int(found[-1].name.removeprefix("step-"))


def finish(process, out_dir):
    """Wait for a process. Raises RuntimeError if it failed."""
    if process.wait():
        raise RuntimeError(f"finetune.py: {last_line(out_dir.with_suffix('.log'))}")


def hashes(folder):
    """{file: SHA-256} of all files below a folder."""
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}
