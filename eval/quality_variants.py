"""The variants that quality.py compares: how each is loaded, and what is measured of it in a process of its own.

`s` is always the Settings of quality.py, checked, with the folder of the base and its quantisation in training.
"""

import statistics
import time
from pathlib import Path

import torch

import generate
from eval import divergence, quality_texts
from eval.exact_match import match_answers
from model import Transformer
from quantize import bitsandbytes, read_quantization
from shell.files import checked, read_json
from text.prompts import encode_prompt
from training.metrics import peak_memory_since, start_measuring, weight_bytes
from weights.checkpoint import Weights, fill_model, load_model
from weights.families import config_from_json
from weights.merge import Tuned

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
REFERENCES = "references.safetensors"
DECODED, REPEATS = 32, 3  # tokens of a measurement of the speed of decoding, and measurements


def load_variant(s, kind, form):
    """The model that a variant is, frozen. A merged one is merged tensor by tensor on the way in, as for a file."""
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


def load_trained(s, with_adapter):
    """The base as in training, with or without its adapter, but in fp32."""
    adapter_dir = s.adapter_dir if with_adapter else None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_model(s.checkpoint_dir, torch.float32, device, s.quantize, adapter_dir)


def make_references(s, folder):
    """Write what is kept of the reference to `folder`, and of its base for what was forgotten. Returns how they do."""
    texts, _ = quality_texts.read_texts(s)
    model, references = load_trained(s, with_adapter=True), {}
    for name, text in texts.items():
        references[f"reference/{name}"] = divergence.make_reference(model, text, s.micro_batch_tokens)
    how = {name: divergence.compare(model, text, s.micro_batch_tokens, {}) for name, text in texts.items()}
    if "general" in texts:
        del model
        base = load_trained(s, with_adapter=False)
        references["base/general"] = divergence.make_reference(base, texts["general"], s.micro_batch_tokens)
        how["base general"] = divergence.compare(base, texts["general"], s.micro_batch_tokens, {})
    divergence.save_references(Path(folder, REFERENCES), references)
    return how


def measure_variant(s, variant, folder):
    """All that the report says of a variant, as a dict. Its memory is that of loading it and generating with it."""
    kind, _, form = variant.partition(":")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if form not in DTYPES or s.quantize:
        bitsandbytes()  # an import is no memory of the model's
    before, started = start_measuring(device), time.perf_counter()
    model = load_variant(s, kind, form)
    result = {"variant": variant, "weight_bytes": weight_bytes(model), "load_seconds": time.perf_counter() - started}
    texts, dialogs = quality_texts.read_texts(s)
    writer = generate.Writer(s.checkpoint_dir, s.adapter_dir, None, None, s.prompt_style, model)
    prompt = (
        encode_prompt(writer.tokenizer, dialogs[0][:-1], writer.style)
        if dialogs
        else next(iter(texts.values()))[0][0].tolist()
    )
    result["tokens_per_second"] = decoding_speed(writer.decoder, prompt, device)
    if dialogs:
        right = match_answers(writer, dialogs, s)[2]
        result["exact_match"] = sum(right) / len(right)
    result["peak_bytes"] = peak_memory_since(before, device)
    references = divergence.load_references(Path(folder, REFERENCES), device)
    for name, text in texts.items():
        of_text = {key.partition("/")[0]: r for key, r in references.items() if key.endswith("/" + name)}
        result[name] = divergence.compare(model, text, s.micro_batch_tokens, of_text)
    return result


def decoding_speed(decoder, prompt, device):
    """Tokens a second after one prompt, alone: the median of REPEATS times DECODED steps."""
    tokens, padding = torch.tensor([prompt], device=device), torch.zeros(1, dtype=torch.int64, device=device)
    decoder.start(tokens, padding, len(prompt) + 1 + REPEATS * DECODED)
    seconds, ids = [], decoder.step(tokens[:, -1]).argmax(dim=-1)  # the first step makes ready
    for _ in range(REPEATS):
        started = time.perf_counter()
        for _ in range(DECODED):
            ids = decoder.step(ids).argmax(dim=-1)
        ids.tolist()  # waits for a GPU
        seconds.append(time.perf_counter() - started)
    return DECODED / statistics.median(seconds)
