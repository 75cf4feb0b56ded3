#!/usr/bin/env bash
# Makes .venv: megatrain, what it needs at the versions of constraints.txt, and the tools that check it. Run by make.
# TORCH=cpu or cuda: that build, whatever this machine has. TORCH=site: the torch of $PYTHON, a module's or a container's,
# stays, and .venv is laid over it. Left out: cuda where there is an NVIDIA driver, else cpu.
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

# The CUDA build weighs gigabytes that would do nothing on a CPU. For the CPU build what pip is configured with is asked
# first, then PyTorch's own index; PyPI's torch, the last way out, is the CUDA build on Linux.
install_torch() {
    if [ "$kind" = cpu ]; then
        .venv/bin/pip install -qq -c constraints.txt "torch==$torch+cpu" 2>/dev/null && return
        .venv/bin/pip install -qq --retries 1 --timeout 15 --extra-index-url "$cpu_index" \
            -c constraints.txt "torch==$torch+cpu" 2>/dev/null && return
    fi
    .venv/bin/pip install -qq -c constraints.txt "torch==$torch"
}

# Torch as it is, at its version, and the folder that it is in, as the site's python may be a virtual environment itself.
keep_torch_of_site() {
    local folder
    folder=$("$python" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])') ||
        fail "TORCH=site, but $python has no torch: load the site's module first, or name its python with PYTHON."
    echo "$folder" >"$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/site_torch.pth"
    torch=$("$python" -c 'from importlib.metadata import version; print(version("torch"))')
}

kind=${TORCH:-$(has_nvidia_driver && echo cuda || echo cpu)}
case $kind in
cpu | cuda | site) ;;
*) fail "TORCH=$kind: it is cpu, cuda or site." ;;
esac
python=$(find_python) || fail "no Python from 3.10 to 3.14 was found (set PYTHON to name one);" \
    "$(how_to_get 'python3 python3-venv' python3)"
"$python" -c 'import ensurepip, venv' 2>/dev/null || fail "$python cannot make virtual environments;" \
    "$(how_to_get "$(basename "$(readlink -f "$python")")-venv" python3)"
command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null ||
    fail "no C++ compiler was found, and DeepSpeed builds parts of itself with it;" "$(how_to_get g++ gcc-c++)"

made_for=$(cat .venv/torch 2>/dev/null || echo "$kind")
if [ "$made_for" != "$kind" ] || ! .venv/bin/python -c 'import pip' 2>/dev/null; then
    [ "$kind" = site ] && options=--system-site-packages || options=
    "$python" -m venv --clear $options .venv
fi
echo "$kind" >.venv/torch
if [ "$kind" = site ]; then
    keep_torch_of_site
    echo "Making .venv with $("$python" --version) over its torch $torch; a minute or two."
    sed "s/^torch==.*/torch==$torch/" constraints.txt >.venv/constraints.txt
    .venv/bin/pip install -qq -c .venv/constraints.txt -e '.[dev]'
else
    echo "Making .venv with $("$python" --version) and torch $torch for $kind; a minute or two."
    install_torch
    .venv/bin/pip install -qq -c constraints.txt -e '.[dev]'
fi
