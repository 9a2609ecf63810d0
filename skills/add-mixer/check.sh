#!/usr/bin/env bash
#   skills/add-mixer/check.sh my_mixer.py:MyMixerConfig [path=value ...]
# prints PASS, or FAIL with the first failing gate; exits 0 or 1
exec "$(dirname "${BASH_SOURCE[0]}")/../run.sh" check mixer "$@"
