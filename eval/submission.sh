#!/usr/bin/env bash
# What the container of eval/Dockerfile runs: `fetch` downloads the weights; `serve` does so too if they are not there,
# and starts the server. Its settings are environment variables:
#
#     MODEL       folder, or ORGANISATION/NAME on Hugging Face's hub: a merged model, or the base of an adapter
#     ADAPTER     folder, or ORGANISATION/NAME on the hub: an adapter for this base
#     REVISION, ADAPTER_REVISION    commits on the hub, if not the newest
#     QUANTIZE, PRECISION, PROMPT_STYLE, PORT, HOST, API_KEY    the server's flags of these names
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -z "${MODEL:-}" ]; then
    echo "error: MODEL is not set: give a folder or a repository on the hub (docker run -e MODEL=…)" >&2
    exit 2
fi

model=$MODEL
if [ ! -d "$model" ]; then
    model=checkpoints/$MODEL
    [ -f "$model/config.json" ] ||
        python convert_hf_checkpoint.py --repo_id "$MODEL" ${REVISION:+--revision "$REVISION"} --out_dir "$model"
fi
adapter=${ADAPTER:-}
if [ -n "$adapter" ] && [ ! -d "$adapter" ]; then
    adapter=adapters/$ADAPTER
    [ -f "$adapter/adapter_config.json" ] ||
        hf download "$ADAPTER" ${ADAPTER_REVISION:+--revision "$ADAPTER_REVISION"} --local-dir "$adapter"
fi
[ "${1:-serve}" != fetch ] || exit 0

exec python eval/helm_server.py --checkpoint_dir "$model" ${adapter:+--adapter_dir "$adapter"} \
    ${QUANTIZE:+--quantize "$QUANTIZE"} ${PRECISION:+--precision "$PRECISION"} \
    ${PROMPT_STYLE:+--prompt_style "$PROMPT_STYLE"} ${API_KEY:+--api_key_env API_KEY} \
    --host "${HOST:-127.0.0.1}" --port "${PORT:-80}"
