#!/usr/bin/env bash
# Lint and all tests, as CI runs them. Arguments go to pytest: bash test.sh -k lora
set -euo pipefail
cd "$(dirname "$0")"

[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
source .venv/bin/activate
if ! cat requirements*.txt | cmp -s - .venv/installed-for-tests.txt; then
    files=(requirements*.txt)
    python -m pip install --quiet --disable-pip-version-check "${files[@]/#/--requirement=}"
    cat requirements*.txt >.venv/installed-for-tests.txt
fi

ruff check .
ruff format --check .
python -m pytest -n "${TEST_WORKERS:-2}" --durations=10 "$@"
