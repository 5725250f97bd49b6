"""Generation by us and by the peers of bench/generate.py, each in a process of its own: one job in, one result out.

    python bench/generators.py job.json

A job is a JSON object: side, checkpoint_dir, cache_dir, dtype ("bf16" or "fp32"), quantize ("bnb.nf4" or null), prompts
(lists of ids), new_tokens, repeats, result (a path). Every side takes the likeliest token and never stops early. A
runner returns a function that generates once and calls `tick` when the tokens of a step are chosen.
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path

from lines import Unavailable, busy_seconds, installed_versions, own_seconds, peak_memory
from peers import litgpt_checkpoint

ROOT = Path(__file__).resolve().parents[1]


def ours(job):
    sys.path.insert(0, str(ROOT))  # before this folder, whose generate.py is another
    import torch

    import generate
    from inference import sampling
    from weights.checkpoint import load_model

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[job["dtype"]]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    decoder = generate.fastest_decoder(load_model(job["checkpoint_dir"], dtype, device, job["quantize"]))
    settings = generate.Settings(checkpoint_dir=".", temperature=0, max_new_tokens=job["new_tokens"])

    class Ids:
        done = False

        def __init__(self):
            self.ids = []

        length = property(lambda self: len(self.ids))

        def push(self, id):
            self.ids.append(id)

        def finish(self):
            self.done = True

    def run(tick):
        replies = [Ids() for _ in job["prompts"]]
        for _ in sampling.generate(decoder, job["prompts"], replies, settings, [0] * len(replies)):
            tick()
        return [reply.ids for reply in replies]

    return run


def transformers(job, cache):
    import torch
    from transformers import AutoModelForCausalLM, StoppingCriteria

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[job["dtype"]]
    options = {"dtype": dtype, "device_map": "cuda" if torch.cuda.is_available() else "cpu"}
    if job["quantize"]:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    model = AutoModelForCausalLM.from_pretrained(job["checkpoint_dir"], **options).eval()
    model.generation_config.eos_token_id = None  # never stop
    longest = max(map(len, job["prompts"]))
    ids = [[0] * (longest - len(prompt)) + prompt for prompt in job["prompts"]]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in job["prompts"]]
    ids, mask = torch.tensor(ids, device=model.device), torch.tensor(mask, device=model.device)

    class Tick(StoppingCriteria):
        def __init__(self, tick):
            self.tick = tick

        def __call__(self, input_ids, scores, **_):
            self.tick()
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def run(tick):
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=job["new_tokens"], do_sample=False, pad_token_id=0,
            stopping_criteria=[Tick(tick)], **({"cache_implementation": "static"} if cache == "static" else {}),
        )  # fmt: skip
        return out[:, longest:].tolist()

    return run


def litgpt(job):
    """The steps of `litgpt generate`."""
    if len(job["prompts"]) > 1:
        raise Unavailable("its batches need prompts of one length: it has no mask for padding")
    import lightning
    import torch
    from litgpt import GPT, Config
    from litgpt.generate.base import generate_fn
    from litgpt.utils import load_checkpoint

    folder, precision = litgpt_checkpoint(job), {"bf16": "bf16-true", "fp32": "32-true"}[job["dtype"]]
    if job["quantize"]:
        from lightning.fabric.plugins import BitsandbytesPrecision

        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[job["dtype"]]
        fabric = lightning.Fabric(devices=1, plugins=BitsandbytesPrecision("nf4", dtype))
    else:
        fabric = lightning.Fabric(devices=1, precision=precision)
    prompt = torch.tensor(job["prompts"][0], device=fabric.device)
    end = len(prompt) + job["new_tokens"]
    with fabric.init_module(empty_init=True):
        model = GPT(Config.from_file(folder / "model_config.yaml"))
    with fabric.init_tensor():
        model.max_seq_length = end
        model.set_kv_cache(batch_size=1)
    model = fabric.setup_module(model.eval())
    load_checkpoint(fabric, model, folder / "lit_model.pth")

    @torch.inference_mode()
    def run(tick):
        for block in model.transformer.h:
            block.attn.kv_cache.reset_parameters()
        ids = []
        for token in generate_fn(
            model, prompt, end, temperature=0.0, top_k=None, top_p=1.0, stop_tokens=(), include_prompt=False,
            include_eos=True,
        ):  # fmt: skip
            ids.append(token.item())
            tick()
        return [ids]

    return run


SIDES = {
    "onetune": ours,
    "transformers": lambda job: transformers(job, "dynamic"),
    "transformers-static": lambda job: transformers(job, "static"),
    "litgpt": litgpt,
}


def measure(job):
    """Tokens a second of prompt reading and of decoding: medians over the repeats, after one that is not counted."""
    run = SIDES[job["side"]](job)
    prompt_tokens, batch = sum(map(len, job["prompts"])), len(job["prompts"])
    prefill, decode, outputs = [], [], []
    for _ in range(job["repeats"] + 1):
        ticks, cpu = [time.perf_counter()], (busy_seconds(), own_seconds())
        outputs.append(run(lambda ticks=ticks: ticks.append(time.perf_counter())))
        others = busy_seconds() - cpu[0] - (own_seconds() - cpu[1])
        steps = [later - earlier for earlier, later in zip(ticks, ticks[1:], strict=False)][: job["new_tokens"]]
        if len(steps) < job["new_tokens"] or any(len(ids) != job["new_tokens"] for ids in outputs[-1]):
            raise RuntimeError(f"{len(steps)} of {job['new_tokens']} tokens were generated")
        prefill.append(prompt_tokens / steps[0])
        decode.append(batch * len(steps[1:]) / sum(steps[1:]))
    return {
        "prefill_tokens_per_second": statistics.median(prefill[1:]),
        "decode_tokens_per_second": statistics.median(decode[1:]),
        "peak_gb": peak_memory() / 1e9,
        "others_cpu": max(0.0, others) / (ticks[-1] - ticks[0]) / (os.cpu_count() or 1),  # in the last repeat
        "outputs": outputs[-1],
        "versions": installed_versions(),
    }


def main():
    job = json.loads(Path(sys.argv[1]).read_text())
    try:
        result = measure(job)
    except Unavailable as error:
        result = {"unavailable": str(error)}
    Path(job["result"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
