"""How fast is a dataset read, beside a raw memory map of the same tokens, Megatron's indexed dataset, and `datasets`?

A window is 2,048 tokens at a random place, copied into an int64 array as training does; the same places for every
reader, in one process, several rounds in turn. Figures are windows per CPU-second, the median of the rounds. Then: the
time to open a dataset, and the memory it takes, at 10^6 documents, and at 10^12 tokens in 10^5 sparse shards.

    python benchmarks/reading.py [--tokens N] [--sparse-shards N] [--document-tokens N]
                                [--rounds N] [--folder DIR]

Megatron's and Hugging Face's readers are measured where they can be imported, otherwise left out, and it says so. To
have them without what they would install beside this project:

    pip install --target PEERS --no-deps megatron-core datasets dill multiprocess pandas
    PYTHONPATH=PEERS python benchmarks/reading.py
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's own folder is on the path, not the one above

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from benchmarks._sparse_dataset import write_sparse_dataset
from megatrain.atomic import committed
from megatrain.data import Dataset, open_dataset
from megatrain.data.format import MANIFEST_FILE, SHARD_TABLE_FILE, Manifest, document_schema, file_checksum, shard_name
from megatrain.data.shard_table import shard_row, write_shard_table

WINDOW = 2048
NUM_WINDOWS = 20_000
BATCH_TOKENS = 1_000_000
EOD_ID = 0

Fill = Callable[[np.ndarray, int], None]


def write_dataset(folder: Path, num_tokens: int, document_tokens: int, num_shards: int) -> None:
    """A dataset of random uint16 tokens, in documents of so many tokens."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    schema = document_schema(np.dtype(np.uint16))
    rows = []
    batch_documents = BATCH_TOKENS // document_tokens
    per_batch = batch_documents * document_tokens
    for index in range(num_shards):
        num_batches = num_tokens // num_shards // per_batch
        with pa.ipc.new_file(str(folder / shard_name(index)), schema) as writer:
            for _ in range(num_batches):
                writer.write_batch(_batch(rng, schema, batch_documents, document_tokens))
        documents = num_batches * batch_documents
        rows.append(shard_row(folder / shard_name(index), documents, num_batches * per_batch, num_batches * per_batch))
    with committed(folder / SHARD_TABLE_FILE) as path:
        write_shard_table(path, rows)
    manifest = Manifest(
        digest="0" * 64,
        num_shards=num_shards,
        num_documents=sum(row["documents"] for row in rows),
        num_tokens=sum(row["tokens"] for row in rows),
        text_bytes=sum(row["text_bytes"] for row in rows),
        num_empty_documents=0,
        dtype="uint16",
        vocab_size=50_000,
        eod_id=EOD_ID,
        eod_token="<|endoftext|>",
        tokenizer_sha256="0" * 64,
        options={},
        job="benchmark",
        shard_table_checksum=file_checksum(folder / SHARD_TABLE_FILE).hex(),
    )
    (folder / MANIFEST_FILE).write_bytes(manifest.dump())


def _batch(rng: np.random.Generator, schema: pa.Schema, count: int, document_tokens: int) -> pa.RecordBatch:
    tokens = rng.integers(1, 50_000, count * document_tokens, dtype=np.uint16)
    tokens[document_tokens - 1 :: document_tokens] = EOD_ID
    offsets = np.arange(count + 1) * document_tokens
    source = [pa.array(["a.jsonl"] * count), pa.array(np.arange(count), pa.uint64())]
    columns = [
        pa.LargeListArray.from_arrays(offsets, pa.array(tokens), type=schema.field("tokens").type),
        pa.array([f"document-{k}" for k in range(count)]),
        pa.array([bytes(16)] * count, pa.binary(16)),
        pa.StructArray.from_arrays(source, fields=list(schema.field("source").type)),
        pa.array(np.full(count, document_tokens), pa.uint64()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def raw_map(folder: Path, dataset: Dataset) -> np.memmap:
    """The tokens in one file, mapped."""
    path = folder / "raw.bin"
    with path.open("wb") as file:
        for start in range(0, dataset.num_tokens, 1 << 22):
            file.write(dataset.window(start, min(1 << 22, dataset.num_tokens - start)).tobytes())
    return np.memmap(path, np.uint16, "r")


def array_reader(tokens: np.ndarray) -> Fill:
    def fill(out: np.ndarray, start: int) -> None:
        out[:] = tokens[start : start + WINDOW]

    return fill


def megatrain_reader(dataset: Dataset) -> Fill:
    """What training calls."""

    def fill(out: np.ndarray, start: int) -> None:
        out[:] = dataset.window(start, WINDOW)

    return fill


def megatron_reader(folder: Path, dataset: Dataset) -> Fill:
    """Megatron's .bin and .idx; a window is a document of WINDOW tokens there, as its index gives them."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    prefix = str(folder / "megatron")
    import torch

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for start in range(0, dataset.num_tokens - WINDOW, WINDOW):
        builder.add_item(torch.from_numpy(dataset.window(start, WINDOW).astype(np.int64)))
    builder.end_document()
    builder.finalize(f"{prefix}.idx")
    indexed = IndexedDataset(prefix)

    def fill(out: np.ndarray, start: int) -> None:
        out[:] = indexed[start // WINDOW]

    return fill


def datasets_reader(folder: Path, dataset: Dataset) -> Fill:
    """Rows of WINDOW tokens in a mapped Arrow table of Hugging Face's datasets, as NumPy arrays."""
    from datasets import Dataset as HuggingFaceDataset

    count = dataset.num_tokens // WINDOW
    values = pa.array(dataset.window(0, count * WINDOW))
    table = pa.table({"tokens": pa.ListArray.from_arrays(np.arange(count + 1, dtype=np.int32) * WINDOW, values)})
    path = folder / "rows.arrow"
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)
    rows = HuggingFaceDataset.from_file(str(path)).with_format("numpy")

    def fill(out: np.ndarray, start: int) -> None:
        out[:] = rows[start // WINDOW]["tokens"]

    return fill


def windows_per_cpu_second(fill: Fill, starts: list[int]) -> float:
    out = np.empty(WINDOW, np.int64)
    began = time.thread_time()
    for start in starts:
        fill(out, start)
    return len(starts) / (time.thread_time() - began)


OPENING = """
import random, sys, time
from megatrain.data import open_dataset
def status(name):
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) / 1024
open_dataset(sys.argv[1])
before = status("RssAnon")
began = time.perf_counter()
dataset = open_dataset(sys.argv[1])
opened = time.perf_counter() - began
rng = random.Random(0)
starts = [rng.randrange(dataset.num_tokens - 2048) for _ in range(int(sys.argv[2]))]
began, cpu = time.perf_counter(), time.process_time()
for start in starts:
    dataset.window(start, 2048)
wall, cpu = time.perf_counter() - began, time.process_time() - cpu
maps = sum("shard-" in line for line in open("/proc/self/maps"))
count = len(starts)
print(
    f"{dataset.num_documents:,} documents, {dataset.num_tokens:,} tokens, {dataset.num_shards:,} shards: "
    f"opened in {opened * 1e3:.2f} ms; {count:,} random windows, each {cpu / count * 1e6:.1f} us of CPU and "
    f"{wall / count * 1e6:.1f} us in all; then {maps} shards mapped, {status('RssAnon') - before:.1f} MiB more memory"
)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256_000_000)
    parser.add_argument("--document-tokens", type=int, default=250)
    parser.add_argument("--sparse-shards", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to work (2 GB and more); a temporary folder unless given")
    options = parser.parse_args()
    console = Console(soft_wrap=True, highlight=False)
    folder = Path(tempfile.mkdtemp(prefix="reading-", dir=options.folder))
    try:
        write_dataset(folder / "data", options.tokens, options.document_tokens, num_shards=8)
        compare(folder, options.rounds, console)
        write_sparse_dataset(folder / "sparse", options.sparse_shards, 10_000_000)
        for name, count in (("data", 100_000), ("sparse", 100_000)):
            command = [sys.executable, "-c", OPENING, str(folder / name), str(count)]
            done = subprocess.run(command, cwd=Path(__file__).parents[1], check=True, capture_output=True, text=True)
            console.print(done.stdout.strip())
    finally:
        shutil.rmtree(folder)


def compare(folder: Path, rounds: int, console: Console) -> None:
    dataset = open_dataset(folder / "data")
    mapped = raw_map(folder, dataset)
    # np.memmap makes an object of its own class of each slice, which a plain array of the same map does not.
    readers = {"np.memmap": array_reader(mapped), "ndarray of the same map": array_reader(np.asarray(mapped))}
    readers["megatrain"] = megatrain_reader(dataset)
    peers = {"megatron": ("Megatron's IndexedDataset", megatron_reader), "datasets": ("datasets", datasets_reader)}
    for module, (name, reader) in peers.items():
        if find_spec(module) is None:
            console.print(f"{name}: left out, {module} cannot be imported here")
        else:
            readers[name] = reader(folder, dataset)
    rng = random.Random(1)
    last = dataset.num_tokens // WINDOW - 1
    starts = [rng.randrange(last) * WINDOW for _ in range(NUM_WINDOWS)]
    figures: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(rounds + 1):  # the first fills the page cache
        for name, fill in readers.items():
            figures[name].append(windows_per_cpu_second(fill, starts))
    raw = statistics.median(figures["np.memmap"][1:])
    table = Table("reader", f"windows of {WINDOW} per CPU-second", "of np.memmap", box=None)
    for name, values in figures.items():
        median = statistics.median(values[1:])
        table.add_row(name, f"{median:,.0f}", f"{median / raw:.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
