#!/usr/bin/env bash
# Makes .venv: megatrain, what it needs at the versions of constraints.txt, and the tools that check it. Run by make.
set -euo pipefail
cd "$(dirname "$0")/.."

torch=$(sed -n 's/^torch==//p' constraints.txt)
cpu_index=https://download.pytorch.org/whl/cpu

fail() {
    echo "make setup: $*" >&2
    exit 1
}

how_to_get() { # Debian's package, Fedora's package
    if command -v apt-get >/dev/null; then
        echo "get it with: sudo apt-get install $1"
    elif command -v dnf >/dev/null; then
        echo "get it with: sudo dnf install $2"
    else
        echo "install it (Debian calls it $1, Fedora $2)."
    fi
}

# A name may be on the path and still not run (pyenv's shims): only what answers counts.
find_python() {
    for name in ${PYTHON:-python3 python python3.14 python3.13 python3.12 python3.11 python3.10}; do
        if "$name" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 15))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    return 1
}

has_nvidia_driver() {
    [ -e /proc/driver/nvidia/version ] || nvidia-smi >/dev/null 2>&1
}

# The CPU build where there is no driver: the CUDA build weighs gigabytes that would do nothing. What pip is configured
# with is asked first, then PyTorch's own index; PyPI's torch, the last way out, is the CUDA build on Linux.
install_torch() {
    if ! has_nvidia_driver; then
        .venv/bin/pip install -qq -c constraints.txt "torch==$torch+cpu" 2>/dev/null && return
        .venv/bin/pip install -qq --retries 1 --timeout 15 --extra-index-url "$cpu_index" \
            -c constraints.txt "torch==$torch+cpu" 2>/dev/null && return
    fi
    .venv/bin/pip install -qq -c constraints.txt "torch==$torch"
}

python=$(find_python) || fail "no Python from 3.10 to 3.14 was found (set PYTHON to name one);" \
    "$(how_to_get 'python3 python3-venv' python3)"
"$python" -c 'import ensurepip, venv' 2>/dev/null || fail "$python cannot make virtual environments;" \
    "$(how_to_get "$(basename "$(readlink -f "$python")")-venv" python3)"
command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null ||
    fail "no C++ compiler was found, and DeepSpeed builds parts of itself with it;" "$(how_to_get g++ gcc-c++)"

echo "Making .venv with $("$python" --version) and torch $torch; a minute or two."
.venv/bin/python -c 'import pip' 2>/dev/null || "$python" -m venv --clear .venv
install_torch
.venv/bin/pip install -qq -c constraints.txt -e '.[dev]'
