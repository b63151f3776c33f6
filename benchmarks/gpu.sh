#!/usr/bin/env bash
# Everything that needs a GPU, in at most eight minutes: bash benchmarks/gpu.sh RESULTS.json
set -euo pipefail
cd "$(dirname "$0")/.."
python=python
if [ -z "${VIRTUAL_ENV:-}" ] && [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
exec timeout --signal=INT 480 "$python" benchmarks/gpu.py "$@"
