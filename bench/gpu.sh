#!/usr/bin/env bash
# All that needs a GPU, on one, in under 10 minutes: the tests marked `gpu`, then bench/machine/gpu.py (which gets the
# arguments). Writes gpu-tests.txt and gpu.jsonl into the folder $OUT, or out/gpu.
#
# It installs nothing. Besides PyTorch with CUDA and Triton (2.11 or later) it takes these packages, in the versions of
# requirements.txt and requirements-dev.txt or near them:
#   bitsandbytes, jsonargparse, docstring_parser   (rarely there: unpack their wheels into a folder on PYTHONPATH)
#   lightning, safetensors, tokenizers, sentencepiece, Jinja2, PyYAML, numpy, matplotlib, tqdm
#   transformers, peft, pytest
# COMMIT names the code in the results where there is no git to ask.
set -uo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] && source .venv/bin/activate
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
out="${OUT:-out/gpu}"
mkdir -p "$out"

timeout 150 python3 -m pytest -q -m gpu $(grep -rl --include='test_*.py' 'mark\.gpu' tests) >"$out/gpu-tests.txt" 2>&1
tests=$?
grep -E '^(FAILED|ERROR|SKIPPED|[0-9]+ |no tests|E  )' "$out/gpu-tests.txt" | cut -c1-300 | tail -40
echo "GPU tests ended with status $tests after $SECONDS s (0: none failed; 124: out of time)"

commit="$(git rev-parse --short HEAD 2>/dev/null || echo "${COMMIT:-unknown}")"
timeout $((585 - SECONDS)) python3 bench/machine/gpu.py --out_file "$out/gpu.jsonl" --commit "$commit" \
    --seconds $((540 - SECONDS)) "$@" 2>"$out/gpu-errors.txt"
bench=$?
grep -E '^(error|.*Error|.*error:)' "$out/gpu-errors.txt" | cut -c1-300 | tail -20
echo "bench/machine/gpu.py ended with status $bench after $SECONDS s"
exit $((tests != 0 || bench != 0))
