#!/usr/bin/env bash
# Runs HELM against a running server (eval/helm_server.py) and prints the scores.
#
#     bash eval/run_helm.sh [URL] [CONF] [INSTANCES]      # http://127.0.0.1:8080 eval/helm.conf 10
#
# On first use HELM gets a virtual environment of its own (several GB, for PyTorch). Environment variables:
#
#     HELM_SCENARIOS    folder with files that HELM would download, as below its scenarios/: gsm/gsm_data_train, ...
#     HELM_SUITE        name of the run (v1)
#     HELM_OUT          folder of the results (out/helm)
#     HELM_THREADS      requests at one time (8)
#     HELM_MODEL_DIR    folder of the model or adapter that is served, to keep the scores with the run that made it
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
url=${1:-http://127.0.0.1:8080}
conf=${2:-$here/helm.conf}
instances=${3:-10}
suite=${HELM_SUITE:-v1}
out=${HELM_OUT:-out/helm}
venv=${HELM_VENV:-$here/../.venv-helm}
python=${PYTHON:-python3}

"$python" "$here/helm_results.py" --help >/dev/null  # it prints the scores at the end, by the project's environment

if [ ! -f "$conf" ]; then
    echo "error: $conf: no such file" >&2
    exit 2
fi
if ! "$python" -c "import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=10)" "$url/health" 2>/dev/null; then
    echo "error: $url/health does not answer: start eval/helm_server.py, and give its URL as the first argument" >&2
    exit 2
fi

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
if ! cmp -s "$here/requirements-helm.txt" "$venv/installed-requirements.txt"; then
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$here/requirements-helm.txt"
    cp "$here/requirements-helm.txt" "$venv/installed-requirements.txt"
fi

mkdir -p "$out/scenarios"
[ -z "${HELM_SCENARIOS:-}" ] || cp -R "$HELM_SCENARIOS/." "$out/scenarios/"
HELM_HTTP_MODEL_BASE_URL=$url "$venv/bin/helm-run" --conf-paths "$conf" --suite "$suite" --output-path "$out" \
    --max-eval-instances "$instances" --num-threads "${HELM_THREADS:-8}" --local-path "$out/local"
"$venv/bin/helm-summarize" --suite "$suite" --output-path "$out"

"$python" "$here/helm_results.py" --suite_dir "$out/runs/$suite" ${HELM_MODEL_DIR:+--model_dir "$HELM_MODEL_DIR"}
