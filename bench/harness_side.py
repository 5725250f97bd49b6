"""One side of bench/harness.py in a process of its own: one job in, one result out.

    python bench/harness_side.py job.json

A job is a JSON object: side ("onetune" or "hf"), checkpoint_dir, dtype ("fp32" or "bf16"), pairs (of texts, context and
continuation), batch_tokens, result (a path).
"""

import json
import os
import sys
import time
from pathlib import Path

from lines import busy_seconds, installed_versions, own_seconds, peak_memory

sys.path[0] = str(Path(__file__).resolve().parents[1])  # in place of this folder, whose generate.py is another


def ours(job):
    import generate
    from eval.lm_eval_harness import OnetuneLM

    precision = {"fp32": "32-true", "bf16": "bf16-true"}[job["dtype"]]
    return OnetuneLM(generate.Writer(job["checkpoint_dir"], None, None, precision), job["batch_tokens"])


def hf(job):
    import torch
    from lm_eval.models.huggingface import HFLM

    model = HFLM(
        pretrained=job["checkpoint_dir"], dtype={"fp32": "float32", "bf16": "bfloat16"}[job["dtype"]],
        device="cuda" if torch.cuda.is_available() else "cpu",
    )  # fmt: skip
    tokens = sum(len(model.tok_encode(context + continuation)) for context, continuation in job["pairs"])
    model.batch_size_per_gpu = max(1, job["batch_tokens"] * len(job["pairs"]) // tokens)
    return model


def measure(job):
    """Seconds for all pairs, after three questions that are not counted."""
    from lm_eval.api.instance import Instance

    model = {"onetune": ours, "hf": hf}[job["side"]](job)
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=tuple(pair), idx=i)
        for i, pair in enumerate(job["pairs"])
    ]
    model.loglikelihood(requests[:9], disable_tqdm=True)
    start, busy, own = time.perf_counter(), busy_seconds(), own_seconds()
    scores = model.loglikelihood(requests, disable_tqdm=True)
    seconds = time.perf_counter() - start
    own = own_seconds() - own
    others = busy_seconds() - busy - own
    return {
        "seconds": seconds,
        "cpu_seconds": own,
        "peak_gb": peak_memory() / 1e9,
        "others_cpu": max(0.0, others) / seconds / (os.cpu_count() or 1),
        "versions": installed_versions(),
        "scores": scores,
    }


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    Path(job["result"]).write_text(json.dumps(measure(job)))
