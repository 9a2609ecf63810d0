#!/usr/bin/env bash
# Run `pithwood` from this checkout for a skill's check: prints PASS, or FAIL with the first failing gate; exits 0 or 1.
#   skills/run.sh check mixer MIXER ...      PYTHON names an interpreter; else .venv's, else python3
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
command -v "$python" >/dev/null || python=python3
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
code=0
"$python" -m pithwood "$@" || code=$?
[ "$code" -lt 2 ] || echo "FAIL arguments: the line above says what to change"
exit $((code != 0))
