#!/usr/bin/env bash
#   skills/speed-up-training/check.sh RECIPE [path=value ...] [options of `pithwood bench train`]
# prints PASS, or FAIL with the first failing gate; exits 0 or 1
exec "$(dirname "${BASH_SOURCE[0]}")/../run.sh" bench train "$@" --limit 3
