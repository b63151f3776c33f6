#!/usr/bin/env bash
# Everything that needs a GPU, in at most eight minutes: bash benchmarks/gpu.sh RESULTS.json
set -euo pipefail
cd "$(dirname "$0")/.."
exec timeout --signal=INT 480 python benchmarks/gpu.py "$@"
