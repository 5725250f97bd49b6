"""Files damaged at random: loading each ends in one line of error, or gives the original values.

    python tests/stress/mutations.py --count 1000 --seed 1

The files: a model in one file and in several, an adapter, prepared data, a checkpoint to resume from (all with the
manifest that is written with them), and a GGUF file. Half of the time the manifest is removed, as in a folder that
somebody else made: then damage that can be seen must be refused, and the rest must not crash.

Any other exception, more than `SECONDS` for one load, or other values than before are failures; the script prints them
with the number that makes them again (--only).
"""

import argparse
import contextlib
import faulthandler
import io
import json
import random
import shutil
import struct
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(1, str(Path(__file__).parents[1]))

import gguf
import numpy as np
import torch
from conftest import write_tiny_tokenizer
from prepared_parts import write_part

import batching
import convert_hf_checkpoint
import lora
from model import Transformer
from shell.cli import UserError
from shell.files import MANIFEST, check_manifest, new_folder, read_json, write_json
from text.tokenizer import Tokenizer
from weights import checkpoint, gguf_format, peft_format, stored
from weights.families import config_from_json

SECONDS = 30
CONFIG = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False, "eos_token_id": 2,
}  # fmt: skip
ADAPTER = lora.AdapterConfig(r=2, targets=("q_proj", "down_proj"))


# ------------------------------------------------------------------------------------------- what is good, and loads


def make_all(root):
    """Write one of each to the folder `root`. Returns {kind: (path, a function that loads a path to plain values)}."""
    torch.manual_seed(0)
    model = Transformer(config_from_json(CONFIG))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    parameters = dict(model.named_parameters())
    layout = {name: (parameter.dtype, tuple(parameter.shape)) for name, parameter in parameters.items()}
    (root / "tokenizer").mkdir()
    write_tiny_tokenizer(root / "tokenizer")
    for name, size in (("model", 10**9), ("sharded", 10**4)):
        with new_folder(root / name) as folder:
            checkpoint.write_weights(folder, layout, parameters.__getitem__, size)
            checkpoint.copy_side_files(root / "tokenizer", folder)
            write_json(folder / "config.json", CONFIG)
    lora.add_lora(model, ADAPTER)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for name, module in lora.adapters(model).items():
        module.lora_B.data.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    sum(p.square().sum() for p in model.parameters() if p.requires_grad).backward()
    optimizer.step()
    for name in ("adapter", "checkpoint"):
        with new_folder(root / name) as folder:
            peft_format.save_adapter(model, ADAPTER, folder, root / "model")
            write_json(folder / checkpoint.NOTES, {"prompt_style": "plain", "checkpoint_dir": str(root / "model")})
            if name == "checkpoint":
                checkpoint.save_optimizer(optimizer, folder)
                write_json(folder / "scaler.json", {"scale": 65536.0})
                write_json(folder / "settings.json", {"lora_r": 2, "seed": 1337})
    with new_folder(root / "data") as folder:
        for part in ("train", "val"):
            samples = [(range(3, 5 + i), [j > 0 for j in range(2 + i)], 0) for i in range(9)]
            write_part(folder, samples, part, shard_tokens=30)  # three shards
        sources = [{"name": "a", "paths": ["a.jsonl"], "counts": {"read": 9}}]
        more = {"tokenizer_hash": "0" * 64, "prompt_style": "plain", "sources": sources}
        write_json(folder / "data.json", read_json(folder / "data.json") | more)
    write_gguf(root / "tiny.gguf", parameters, root / "tokenizer")
    loaders = {
        "model": load_model, "sharded": load_model, "adapter": load_adapter, "checkpoint": load_checkpoint,
        "data": load_data, "tiny.gguf": load_gguf,
    }  # fmt: skip
    return {kind: (root / kind, loader) for kind, loader in loaders.items()}


def write_gguf(path, parameters, tokenizer):
    """The model as llama.cpp would have it, but for the order of the rows of q and k, and half of it quantised."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_block_count(2)
    writer.add_feed_forward_length(24)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    vocabulary = json.loads((tokenizer / "tokenizer.json").read_text())["model"]
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if id < 3 else gguf.TokenType.NORMAL for id in range(len(tokens))])
    writer.add_token_merges([" ".join(merge) for merge in vocabulary["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, parameter in parameters.items():
        array = parameter.detach().numpy()
        writer.add_tensor(
            names.get_name(name, (".weight",)), array.astype(np.float16 if "up_proj" in name else np.float32)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load_model(folder):
    model, tokenizer = checkpoint.load_model(folder, torch.float32), Tokenizer(folder)
    values = {name: parameter.detach() for name, parameter in model.named_parameters()}
    values |= {f"config.{name}": repr(value) for name, value in vars(model.config).items()}
    return values | {"ids": tokenizer.encode("the answer is 42", special=True), "template": tokenizer.chat_template,
                     "ends": sorted(tokenizer.eos_ids), "begin": tokenizer.begin_ids}  # fmt: skip


def load_adapter(folder, base="model"):
    model = checkpoint.load_model(folder.parent / base, torch.float32, adapter_dir=folder)
    values = {name: parameter.detach() for name, parameter in model.named_parameters() if "lora_" in name}
    scales = {f"scale.{name}": module.scale for name, module in lora.adapters(model).items()}
    return values | scales | {"notes": repr(checkpoint.read_notes(folder))}


def load_checkpoint(folder):
    """As finetune.py does to resume."""
    if (folder / MANIFEST).exists():
        check_manifest(folder)
    values = load_adapter(folder)
    model = Transformer(config_from_json(CONFIG))
    lora.add_lora(model, ADAPTER)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters)
    checkpoint.load_optimizer(optimizer, folder)
    for number, parameter in enumerate(parameters):
        values |= {f"{number}.{key}": value for key, value in optimizer.state[parameter].items()}
    return values | {name: repr(read_json(folder / f"{name}.json")) for name in ("settings", "scaler")}


def load_data(folder):
    info, values = batching.read_data_info(folder), {}
    values["info"] = repr(info)
    for part in ("train", "val"):
        samples = batching.open_samples(folder, part)
        columns = ("lengths", "target_counts", "sources")
        values |= {f"{part}.{name}": getattr(samples, name)[:] for name in columns}
        values |= {f"{part}.batch.{k}": x for k, x in enumerate(samples.padded(list(range(len(samples))))[:2])}
    return values


def load_gguf(path):
    weights = gguf_format.GGUFWeights(path)
    config = gguf_format.config_json(weights)
    convert_hf_checkpoint.check(weights, config, path)
    values = {name: weights.read(name) for name in weights.shapes} | {"config": repr(config)}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        gguf_format.write_tokenizer(weights, Path(folder))
        values["tokenizer"] = (Path(folder) / "tokenizer.json").read_bytes()
    return values


# ------------------------------------------------------------------------------------------------------ the mutations
# Each changes one file, with `rng`, a random.Random. True: the damage must be found even without a manifest.


def truncate(rng, path):
    size = path.stat().st_size
    keep = rng.choice([0, 1, 7, 8, 9, size // 2, size - 1, rng.randrange(size)])
    path.write_bytes(path.read_bytes()[: min(keep, size - 1)])
    return path.suffix != ".jinja"


def flip_bits(rng, path, within=None):
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 2, 16])):
        data[rng.randrange(min(len(data), within or len(data)))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return False


def flip_bits_of_the_header(rng, path):
    return flip_bits(rng, path, within=400)


def overwrite(rng, path):
    """A stretch of zeros, ones or noise, as a bad disk leaves it."""
    data, start = bytearray(path.read_bytes()), rng.randrange(path.stat().st_size)
    length = min(len(data) - start, rng.choice([4, 64, 4096]))
    data[start : start + length] = rng.choice([bytes(length), b"\xff" * length, rng.randbytes(length)])
    path.write_bytes(data)
    return False


def append(rng, path):
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.choice([1, 8, 1000])))
    return path.suffix == ".safetensors"


def put_folder(rng, path):
    path.unlink()
    path.mkdir()
    return True


def remove(rng, path):
    path.unlink()
    return path.suffix == ".safetensors" or path.suffix == ".gguf"


def huge_number(rng, path):
    """Eight bytes near the start, such as a length, become huge or negative."""
    data = bytearray(path.read_bytes())
    place = rng.choice([0, 8, 16, 24, rng.randrange(min(len(data), 3000))])
    number = rng.choice([2**64 - 1, 2**63, 2**63 - 1, 2**62, 2**40, 2**32, 10**8 + 1, 0])
    data[place : place + 8] = struct.pack("<Q", number)
    path.write_bytes(data)
    return path.suffix == ".safetensors" and place == 0


def edit_header(rng, path):
    """Lie about a tensor in a safetensors header."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    name = rng.choice([name for name in header if name != "__metadata__"])
    entry, (start, end) = header[name], header[name]["data_offsets"]
    lies = [
        {"data_offsets": [start, end + 4]}, {"data_offsets": [start + 4, end]}, {"data_offsets": [end, start]},
        {"data_offsets": [-4, end - start - 4]}, {"data_offsets": [2**63, 2**63 + end - start]},
        {"data_offsets": [start + 10**12, end + 10**12]}, {"data_offsets": [start]}, {"data_offsets": "all"},
        {"shape": [10**9, 10**9]}, {"shape": [2**63, 2**63]}, {"shape": [-1, *entry["shape"]]}, {"shape": [0]},
        {"shape": [float(n) for n in entry["shape"]]}, {"shape": None}, {"shape": [1] * 70 + entry["shape"]},
        {"dtype": "I64" if entry["dtype"] != "I64" else "F64"}, {"dtype": "U8"}, {"dtype": "F8_E4M3"}, {"dtype": 5},
        {"dtype": "F4"},
    ]  # fmt: skip
    header[name] = entry | rng.choice(lies)
    _put_header(path, data, size, json.dumps(header).encode())
    return True


def name_twice_in_header(rng, path):
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    name = rng.choice([name for name in header if name != "__metadata__"])
    second = header[name] | {"dtype": {"F32": "I32", "I32": "F32", "I64": "F64", "BOOL": "U8"}[header[name]["dtype"]]}
    encoded = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(second)}}}"
    _put_header(path, data, size, encoded.encode())
    return True


def deep_header(rng, path):
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    _put_header(path, data, size, data[8 : 8 + size].rstrip()[:-1] + b', "x": ' + b"[" * rng.choice([200, 10**5]))
    return True


def swap_header(rng, path):
    """The header of another file of safetensors."""
    others = [other for other in path.parents[1].glob("*/*.safetensors") if other.stat().st_size != path.stat().st_size]
    data, other = path.read_bytes(), rng.choice(others).read_bytes()
    size, other_size = (int.from_bytes(content[:8], "little") for content in (data, other))
    _put_header(path, data, size, other[8 : 8 + other_size])
    return data[8 : 8 + size] != other[8 : 8 + other_size]


def _put_header(path, data, size, header):
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])


ODD = [None, True, -1, 0, 10**30, 2.5, 1e308, float("nan"), float("inf"), "", "odd", "../x", "/etc/passwd", "a" * 10**5,
       [], [[]], {}, {"a": {}}, [None]]  # fmt: skip


def odd_value(rng, path):
    """Another value for a key somewhere in a JSON file."""
    root = json.loads(path.read_text())
    nodes = [root]
    for node in nodes:
        children = node.values() if isinstance(node, dict) else node
        nodes += [child for child in children if isinstance(child, dict | list) and child]
    node = rng.choice(nodes[:50])
    key = rng.choice([*node, "more"]) if isinstance(node, dict) else rng.randrange(len(node))
    node[key] = rng.choice(ODD)
    path.write_text(json.dumps(root))
    return False


def deep_json(rng, path):
    text = path.read_text().rstrip()
    deep = rng.choice(["[", '{"a":']) * rng.choice([2000, 10**5])
    path.write_text(rng.choice([deep, text[:-1] + ', "x": ' + deep]))
    return True


ALL = (truncate, flip_bits, flip_bits_of_the_header, overwrite, append, put_folder, remove, huge_number)
SAFETENSORS = (edit_header, edit_header, name_twice_in_header, deep_header, swap_header)
JSON = (odd_value, odd_value, deep_json)


def mutate(rng, path):
    """Change one file in a folder, or this one. Returns (the file, the name of what was done, whether it is seen)."""
    file = path if path.is_file() else rng.choice(sorted(path.iterdir()))
    more = {".safetensors": SAFETENSORS, ".json": JSON}.get(file.suffix, ())
    how = rng.choice([*ALL, *more, *more])
    return file, how.__name__, how(rng, file)


# Keys that the readers of a file know beside those it has.
KNOWN = {
    "config.json": (
        "rope_scaling", "rope_parameters", "sliding_window", "layer_types", "head_dim", "quantization_config",
        "attention_bias", "mlp_bias", "qk_norm", "use_sliding_window", "max_window_layers", "partial_rotary_factor",
        "original_max_position_embeddings", "hidden_activation", "per_layer_config", "num_experts",
    ),
    "tokenizer_config.json": (
        "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens", "chat_template", "add_bos_token",
        "legacy", "bos_token",
    ),
    "adapter_config.json": (
        "rank_pattern", "alpha_pattern", "layers_to_transform", "bias", "use_dora", "use_rslora", "lora_dropout",
        "init_lora_weights", "exclude_modules", "modules_to_save",
    ),
    "onetune.json": ("quantize", "prompt_style", "checkpoint_dir"),
}  # fmt: skip


def every_odd_value(path):
    """Give each key of a JSON file, at any depth, each value of `ODD`. Yields what was done, each time."""
    text = path.read_text()
    for place in [*_places(json.loads(text)), *((key,) for key in KNOWN.get(path.name, ()))]:
        for value in ODD:
            root = node = json.loads(text)
            for key in place[:-1]:
                node = node[key]
            node[place[-1]] = value
            path.write_text(json.dumps(root))
            yield f"{path.name}: {'.'.join(map(str, place))} = {str(value)[:20]}"
    path.write_text(text)


def _places(node, above=()):
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        yield (*above, key)
        if isinstance(value, dict | list):
            yield from _places(value, (*above, key))


# ------------------------------------------------------------------------------------------------------- the verdict


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[key], other[key]) if torch.is_tensor(one[key]) else one[key] == other[key] for key in one
    )


def try_one(good, originals, place, seed, share_signed):
    """Damage a copy of something good and load it. Returns (what happened, description); "wrong: …" is a failure."""
    rng = random.Random(seed)
    kind = rng.choice(sorted(good))
    path, loader = good[kind]
    copy = place / path.name
    shutil.copytree(path, copy) if path.is_dir() else shutil.copy(path, copy)
    # Its own copy of whatever else is looked at: an adapter's base, other headers.
    for other in good.values():
        if not (place / other[0].name).exists():
            (place / other[0].name).symlink_to(other[0])
    signed = path.is_dir() and rng.random() < share_signed
    if not signed and path.is_dir():
        (copy / MANIFEST).unlink()
    before = {file: file.read_bytes() for file in ([copy] if copy.is_file() else copy.iterdir())}
    file, how, seen = mutate(rng, copy)
    what = f"{seed}: {how} of {kind}/{file.name}{' with its manifest' if signed else ''}"
    if file.is_file() and file.read_bytes() == before[file]:
        return "unchanged", what
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    try:
        values = loader(copy)
    except UserError as error:
        # With a manifest the damaged file is named; a manifest that is damaged itself may blame the file it lists.
        named = file.name in str(error) or file.name == MANIFEST or not signed or file.name in _lists(copy)
        return ("refused" if named else f"wrong: it does not name the file: {error}"), what
    except Exception as error:
        return f"wrong: {type(error).__name__}: {str(error)[:300]}", what
    finally:
        faulthandler.cancel_dump_traceback_later()
    if same(values, originals[kind]):
        return "as before", what
    return ("wrong: other values" if seen or signed else "other values, and no manifest to tell"), what


def _lists(copy):
    """Files whose damage shows as that of another: an index names shards that are not there."""
    return {stored.INDEX} if (copy / stored.INDEX).exists() else set()


def run(seeds, report=print, share_signed=0.5):
    """Try a mutation for each seed. Returns a Counter of what happened, and the descriptions of the failures.

    share_signed: of the folders that keep their manifest.
    """
    counts, failures = Counter(), []
    with tempfile.TemporaryDirectory() as root:
        (Path(root) / "good").mkdir()
        good = make_all(Path(root) / "good")
        originals = {kind: loader(path) for kind, (path, loader) in good.items()}
        for seed in seeds:
            with tempfile.TemporaryDirectory(dir=root) as place:
                outcome, what = try_one(good, originals, Path(place), seed, share_signed)
            counts[outcome.partition(":")[0]] += 1
            if outcome.startswith("wrong"):
                failures.append(f"{what}: {outcome}")
                report(failures[-1])
    return counts, failures


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**9))
    parser.add_argument("--only", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    first = arguments.seed if arguments.only is None else arguments.only
    counts, failures = run(range(first, first + (arguments.count if arguments.only is None else 1)))
    print(f"seed {first}: {sum(counts.values())} mutations: " + ", ".join(f"{n} {what}" for what, n in counts.items()))
    sys.exit(bool(failures))
