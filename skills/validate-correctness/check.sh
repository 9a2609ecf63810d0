#!/usr/bin/env bash
#   skills/validate-correctness/check.sh RECIPE [path=value ...] [--against path=value ...] [--commit REV]
# prints PASS, or FAIL with the first failing gate; exits 0 or 1
exec "$(dirname "${BASH_SOURCE[0]}")/../run.sh" check correctness "$@"
