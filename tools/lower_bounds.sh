#!/usr/bin/env bash
# pytest, with the arguments given, on the lowest versions that pyproject.toml allows, in an environment that is thrown
# away. Ends with 69 where they cannot be installed.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export UV_CACHE_DIR=$folder/cache
source="deepspeed hjson megatrain sqlitedict rouge-score word2number" # these come as source alone
wheels="--only-binary :all: $(printf -- '--no-binary %s ' $source)"
{
    .venv/bin/python -m venv "$folder/venv" &&
        "$folder/venv/bin/pip" install -qq uv &&
        "$folder/venv/bin/uv" pip install -q --python "$folder/venv/bin/python" --resolution lowest-direct $wheels -e '.[dev]'
} || exit 69
rm -rf "$UV_CACHE_DIR"
"$folder/venv/bin/python" -m pytest "$@"
