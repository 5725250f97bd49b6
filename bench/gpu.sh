#!/usr/bin/env bash
# All that needs a GPU, on one, in at most 8 minutes ($BUDGET seconds): the tests marked `gpu`, then the parts of
# bench/gpu/measure.py, which get the arguments. Each part is a process with a clock of its own: one that hangs is
# killed when its time is up and the next one starts. Ends with status 1 if a part failed, and says which.
#
# Writes into the folder $OUT, by default a new one in out/gpu: gpu.jsonl and gpu.png, after each part; gpu-tests.txt,
# and of each part PART.txt; profile-....txt. A machine with a CPU alone tries it all in small with
#   bash bench/gpu.sh --shape tiny --device cpu
#
# It installs nothing. Besides PyTorch with CUDA and Triton (2.11 or later) it takes these packages, in the versions of
# requirements.txt and requirements-dev.txt or near them:
#   bitsandbytes, jsonargparse, docstring_parser   (rarely there: unpack their wheels into a folder on PYTHONPATH)
#   lightning, safetensors, tokenizers, sentencepiece, Jinja2, PyYAML, numpy, matplotlib, tqdm
#   transformers, peft, pytest; and flash-attn, for one more side of the comparison
# COMMIT names the code in the results where there is no git to ask.
set -uo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] && source .venv/bin/activate
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
budget="${BUDGET:-480}" grace=4 # seconds in all; between asking a part to end and killing it
out="${OUT:-out/gpu/$(date +%Y-%m-%d-%H%M%S)}"
commit="$(git rev-parse --short HEAD 2>/dev/null || echo "${COMMIT:-unknown}")"
if [ -e "$out/gpu.jsonl" ]; then
    echo "error: OUT=$out has results: choose another folder" >&2
    exit 2
fi
mkdir -p "$out"
failed=()

# run NAME SHARE COMMAND...: the command with SHARE of 480 parts of the budget, or what is left of that; its output goes
# to $out/NAME.txt. "{}" in it stands for the seconds after which it should start nothing more.
run() {
    local name=$1 seconds=$(($2 * budget / 480)) left=$((budget - SECONDS - grace)) started=$SECONDS status
    shift 2
    [ "$seconds" -gt "$left" ] && seconds=$left
    status=124
    if [ "$seconds" -gt 0 ]; then
        timeout --kill-after="$grace" "$seconds" "${@//\{\}/$((seconds * 9 / 10))}" >"$out/$name.txt" 2>&1
        status=$?
        grep -E '^(\||FAILED|ERROR|SKIPPED|[0-9]+ |no tests|E  |error|.*Error:)' "$out/$name.txt" |
            cut -c1-200 | tail -60
    fi
    echo "$name ended with status $status after $((SECONDS - started)) s (0: good; 124 or 137: out of time)"
    printf '{"part": "ended", "name": "%s", "status": %d, "seconds": %d}\n' \
        "$name" "$status" "$((SECONDS - started))" >>"$out/gpu.jsonl"
    [ "$status" -eq 0 ] || failed+=("$name")
}

run gpu-tests 100 python3 -m pytest -q -m gpu $(grep -rl --include='test_*.py' 'mark\.gpu' tests)
measure=(python3 bench/gpu/measure.py --out_dir "$out" --commit "$commit" --seconds "{}" "$@")
run training 170 "${measure[@]}" --part training
run decoding 60 "${measure[@]}" --part decoding
run kernels 60 "${measure[@]}" --part kernels
run resume 85 "${measure[@]}" --part resume
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]} (their output is in $out)" >&2
    exit 1
fi
echo "all parts are good after $SECONDS s; results are in $out"
