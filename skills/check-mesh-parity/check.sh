#!/usr/bin/env bash
#   skills/check-mesh-parity/check.sh path=value ...      the mesh's sizes, and whatever else should differ
# prints PASS, or FAIL with the first failing gate; exits 0 or 1
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
command -v "$python" >/dev/null || python=python3
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$python" -W ignore::FutureWarning -m tests.parallel.parity "$@"
