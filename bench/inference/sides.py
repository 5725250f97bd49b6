"""Generation by us and by the peers of bench/inference/speed.py, each in a process of its own.

A job: side, checkpoint_dir, cache_dir, dtype ("bf16" or "fp32"), quantize ("bnb.nf4" or None), prompts (lists of ids),
new_tokens, repeats. Every side takes the likeliest token and never stops early. The function of a side loads the model
and returns another one, which generates once and calls `tick` when the tokens of a step are chosen.

Imports nothing of the project at the top but what imports nothing itself: LitGPT's side runs where only that is
installed.
"""

import statistics
import time
from collections.abc import Callable

from bench.measuring import (
    OURS,
    Unavailable,
    cpu_times,
    device_name,
    installed_versions,
    others_share,
    peak_memory,
)
from bench.training.peers import litgpt_checkpoint, torch_dtype, transformers_model


class Ids:
    """Stands for `inference.sampling.Reply`: keeps the ids, has no tokenizer behind it, ends with the limit alone."""

    def __init__(self):
        self.ids, self.done = [], False

    @property
    def length(self) -> int:
        """The number of ids so far."""
        return len(self.ids)

    def push(self, id: int) -> None:
        """Add an id."""
        self.ids.append(id)

    def finish(self) -> None:
        """No more ids will come."""
        self.done = True


def ours(job: dict) -> Callable:
    """generate.py's own loop."""
    import generate
    from inference import sampling
    from inference.decode import fastest_decoder
    from ops.core_sharing import share_cores
    from weights.checkpoint import load_model

    share_cores()
    decoder = fastest_decoder(load_model(job["checkpoint_dir"], torch_dtype(job), device_name(), job["quantize"]))
    settings = generate.Settings(checkpoint_dir=".", temperature=0, max_new_tokens=job["new_tokens"])

    def run(tick):
        replies = [Ids() for _ in job["prompts"]]
        for _ in sampling.generate(decoder, job["prompts"], replies, settings, [0] * len(replies)):
            tick()
        return [reply.ids for reply in replies]

    return run


def transformers(job: dict, cache: str) -> Callable:
    """transformers' own `generate`, with its "dynamic" or "static" cache."""
    import torch
    from transformers import StoppingCriteria

    model = transformers_model(job).eval()
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


def litgpt(job: dict) -> Callable:
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

        fabric = lightning.Fabric(devices=1, plugins=BitsandbytesPrecision("nf4", torch_dtype(job)))
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
    OURS: ours,
    "transformers": lambda job: transformers(job, "dynamic"),
    "transformers-static": lambda job: transformers(job, "static"),
    "litgpt": litgpt,
}


def measure(job: dict) -> dict:
    """Tokens a second of prompt reading and of decoding: medians over the repeats, after one that is not counted."""
    run = SIDES[job["side"]](job)
    prompt_tokens, batch = sum(map(len, job["prompts"])), len(job["prompts"])
    prefill, decode = [], []
    for _ in range(job["repeats"] + 1):
        ticks, started = [time.perf_counter()], cpu_times()
        outputs = run(lambda ticks=ticks: ticks.append(time.perf_counter()))
        others = others_share(started, cpu_times())
        steps = [later - earlier for earlier, later in zip(ticks, ticks[1:], strict=False)][: job["new_tokens"]]
        if len(steps) < job["new_tokens"] or any(len(ids) != job["new_tokens"] for ids in outputs):
            raise RuntimeError(f"{len(steps)} of {job['new_tokens']} tokens were generated")
        prefill.append(prompt_tokens / steps[0])
        decode.append(batch * len(steps[1:]) / sum(steps[1:]))
    return {
        "prefill_tokens_per_second": statistics.median(prefill[1:]),
        "decode_tokens_per_second": statistics.median(decode[1:]),
        "peak_gb": peak_memory() / 1e9,
        "others_cpu": others,  # in the last repeat
        "outputs": outputs,
        "versions": installed_versions(),
    }
