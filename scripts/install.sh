#!/usr/bin/env bash
# Install pithwood into a virtual environment, with the torch build that fits this machine.
#
#   scripts/install.sh VENV [EXTRAS]      EXTRAS such as dev; PYTHON (default python3) makes the environment
#   TORCH_INDEX=URL                       an index to take torch from besides the configured one
set -euo pipefail

venv=$1
target=.${2:+[$2]}
python=${PYTHON:-python3}
cpu_index=https://download.pytorch.org/whl/cpu

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "install: $("$python" --version) is too old; set PYTHON to Python 3.11 or newer" >&2
    exit 2
}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
pip install 'pip>=23.3' # the first whose --dry-run reads metadata alone instead of downloading wheels

constraints=constraints.txt
index=()
if nvidia-smi >/dev/null 2>&1; then
    constraints=constraints-cuda.txt
elif [ -z "${TORCH_INDEX:-}" ]; then
    # On Linux the public index's plain wheel pulls gigabytes of CUDA libraries. Where the configured index would do that,
    # PyTorch's own CPU index is asked too: its +cpu build counts as the newer one. Where a CPU wheel is at hand, nothing
    # else is asked. A TORCH_INDEX of your own skips this.
    plan=$(pip install --dry-run --report - "$target" -c "$constraints")
    if grep -qi '"name": *"nvidia-' <<<"$plan"; then
        echo "install: taking the CPU build of torch from $cpu_index" >&2
        index=(--extra-index-url "$cpu_index")
    fi
fi
[ -z "${TORCH_INDEX:-}" ] || index=(--extra-index-url "$TORCH_INDEX")
echo "install: $target with $constraints into $venv" >&2
pip install "${index[@]}" -e "$target" -c "$constraints"
