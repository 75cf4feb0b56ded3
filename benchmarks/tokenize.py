"""How much text a CPU-second turns into tokens: the whole command, and what others do, in one run.

    python benchmarks/tokenize.py [--megabytes 60 500] [--peers-python PATH] [--work DIR]

The text is real: the corpus of `megatrain-data corpus`, then sources and documentation that this machine has (Python
packages, C headers, /usr/share), each file once. If that is less than asked for, it is repeated, which is said.
A 32k byte-level BPE is trained on its first 30 MB.

Measured are `megatrain-data tokenize` as a process of its own, start-up, reading, writing and fsync included; and
alone, which means text in memory and ids thrown away, without start-up: `tokenizers` (encode_batch, encode_batch_fast)
and fastokens. Datatrove and datasets.map, whole processes too, run under --peers-python:

    python -m venv /tmp/peers && /tmp/peers/bin/pip install 'datatrove[io,processing]' datasets tokenizers orjson

All may use two cores. What is slow is measured on the first 60 MB. Ids are compared for the first 1,000 documents.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

# A script's folder is searched before Python's own modules, one of which has this file's name.
sys.path = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    importlib.import_module("benchmarks._tokenize_run").main(__doc__)
else:
    # Another script of this folder, or what it imports, asked for Python's `tokenize`: that is what it gets.
    del sys.modules[__name__]
    importlib.import_module(__name__)
