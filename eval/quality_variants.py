"""The variants that quality.py compares: how each is loaded, and what is measured of it in a process of its own.

`s` is always the Settings of quality.py, checked, with the folder of the base and how it was quantised in training.
"""

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from eval import divergence, quality_texts
from eval.exact_match import match_answers
from inference.decode import Decoder
from inference.writer import Writer
from model import Transformer
from ops.core_sharing import share_cores
from quantize import bitsandbytes, read_quantization
from shell.files import checked, read_json
from training.metrics import peak_memory_since, start_measuring, weight_bytes
from weights.checkpoint import fill_model, load_model
from weights.families import config_from_json
from weights.merge import Tuned
from weights.stored import Weights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
REFERENCES = "references.safetensors"
DECODED, REPEATS = 32, 3  # decoding speed is the median of so many repeats of so many tokens


def load_variant(s: Any, kind: str, form: str) -> Transformer:
    """The model of a variant, frozen. A merged one is merged tensor by tensor while it is loaded, as in a merge."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, quantize = DTYPES.get(form, torch.bfloat16), None if form in DTYPES else form
    if kind != "merged":
        return load_model(s.checkpoint_dir, dtype, device, quantize, s.adapter_dir if kind == "adapter" else None)
    values = read_json(s.checkpoint_dir / "config.json")
    tuned = Tuned(values, Weights(s.checkpoint_dir), s.quantize, s.adapter_dir)
    with torch.device("meta"):
        model = Transformer(config_from_json(tuned.merged_config(values)))
    with checked(s.checkpoint_dir):
        quantization = read_quantization(quantize, model)
        fill_model(model, lambda name: tuned.merged(name)[0], dtype, device, quantization)
    return model.eval()


def load_trained(s: Any, with_adapter: bool) -> Transformer:
    """The base as it was quantised in training, with or without its adapter, the rest in fp32."""
    adapter_dir = s.adapter_dir if with_adapter else None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_model(s.checkpoint_dir, torch.float32, device, s.quantize, adapter_dir)


def make_references(s: Any, folder: str) -> dict[str, dict]:
    """Write the reference to `folder`, on general text its base, too. Returns the results of both by text.

    The divergence from the base on general text is what the adapter has forgotten.
    """
    share_cores()
    texts, _ = quality_texts.read_texts(s)
    model, references = load_trained(s, with_adapter=True), {}
    for name, text in texts.items():
        references[f"reference/{name}"] = divergence.make_reference(model, text, s.micro_batch_tokens)
    results = {name: divergence.compare(model, text, s.micro_batch_tokens, {}) for name, text in texts.items()}
    if "general" in texts:
        del model
        base = load_trained(s, with_adapter=False)
        references["base/general"] = divergence.make_reference(base, texts["general"], s.micro_batch_tokens)
        results["base general"] = divergence.compare(base, texts["general"], s.micro_batch_tokens, {})
    divergence.save_references(Path(folder, REFERENCES), references)
    return results


def measure_variant(s: Any, variant: str, folder: str) -> dict:
    """All that the report says of a variant. Its peak memory is that of loading it and generating with it."""
    kind, _, form = variant.partition(":")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if form not in DTYPES or s.quantize:
        bitsandbytes()  # imported before measuring: its memory is not the model's
    before, started = start_measuring(device), time.perf_counter()
    model = load_variant(s, kind, form)
    result = {"variant": variant, "weight_bytes": weight_bytes(model), "load_seconds": time.perf_counter() - started}
    texts, samples = quality_texts.read_texts(s)
    writer = Writer(s.checkpoint_dir, s.adapter_dir, None, None, s.prompt_style, model)
    prompt = writer.encode(samples[0].prompt) if samples else next(iter(texts.values()))[0][0].tolist()
    result["tokens_per_second"] = decoding_speed(writer.decoder, prompt, device)
    if samples:
        _, right = match_answers(writer, samples, s)
        result["exact_match"] = sum(right) / len(right)
    result["peak_bytes"] = peak_memory_since(before, device)
    references = divergence.load_references(Path(folder, REFERENCES), device)
    for name, text in texts.items():
        of_text = {key.partition("/")[0]: r for key, r in references.items() if key.endswith("/" + name)}
        result[name] = divergence.compare(model, text, s.micro_batch_tokens, of_text)
    return result


def decoding_speed(decoder: Decoder, prompt: list[int], device: torch.device) -> float:
    """Tokens a second of decoding after one prompt (ids), in a batch of one."""
    tokens, padding = torch.tensor([prompt], device=device), torch.zeros(1, dtype=torch.int64, device=device)
    decoder.start(tokens, padding, len(prompt) + 1 + REPEATS * DECODED)
    seconds, ids = (
        [],
        decoder.step(tokens[:, -1]).argmax(dim=-1),
    )  # the first step also records or compiles what a step needs
    for _ in range(REPEATS):
        started = time.perf_counter()
        for _ in range(DECODED):
            ids = decoder.step(ids).argmax(dim=-1)
        ids.tolist()  # waits for a GPU
        seconds.append(time.perf_counter() - started)
    return DECODED / statistics.median(seconds)
