"""One contestant of benchmarks/tokenize.py, in a process of its own; imports nothing of this project.

    _tokenize_peer.py encode_batch|encode_batch_fast|fastokens TEXT TOKENIZER MEGABYTES NUM_COMPARED
    _tokenize_peer.py datatrove|datasets TEXT TOKENIZER OUT

The first kind prints bytes, CPU-seconds and wall seconds of the encoding alone, and a digest of the ids of the first
NUM_COMPARED documents.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

DOCUMENTS_AT_ONCE = 1000
NUM_CORES = 2


def read_texts(path: str, megabytes: int) -> list[str]:
    texts, num_bytes = [], 0
    with Path(path).open("rb") as file:
        for line in file:
            texts.append(orjson.loads(line)["text"])
            num_bytes += len(texts[-1].encode())
            if num_bytes >= megabytes * 1e6:
                break
    return texts


def encoder(name: str, tokenizer_json: str) -> Callable[[list[str]], Any]:
    """Texts to one item a text, which `ids_of` understands."""
    if name == "fastokens":
        import fastokens

        fast = fastokens.Tokenizer.from_json_str(tokenizer_json)
        return lambda texts: fast.encode_batch_flat(texts, add_special_tokens=False, split_special_tokens=True)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.encode_special_tokens = True
    encode = getattr(tokenizer, name)
    return lambda texts: [encoding.ids for encoding in encode(texts, add_special_tokens=False)]


def measure_alone(name: str, path: str, tokenizer: str, megabytes: int, num_compared: int) -> None:
    import numpy as np
    import xxhash

    texts = read_texts(path, megabytes)
    encode = encoder(name, Path(tokenizer).read_text())
    digest = xxhash.xxh3_64()
    begun, begun_cpu = time.perf_counter(), time.process_time()
    for start in range(0, len(texts), DOCUMENTS_AT_ONCE):
        encode(texts[start : start + DOCUMENTS_AT_ONCE])
    cpu_seconds, wall_seconds = time.process_time() - begun_cpu, time.perf_counter() - begun
    ids = encode(texts[:num_compared])
    if name == "fastokens":
        digest.update(ids[0])
    else:
        digest.update(np.concatenate([np.array(each, "<u4") for each in ids]))
    print(sum(len(text.encode()) for text in texts), cpu_seconds, wall_seconds, digest.hexdigest())


def run_datatrove(path: str, tokenizer: str, out: str) -> None:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    # It shares out files, so each core gets one with half of the lines.
    halves = Path(out) / "text"
    halves.mkdir(parents=True)
    lines = Path(path).read_bytes().splitlines(keepends=True)
    for core in range(NUM_CORES):
        (halves / f"{core}.jsonl").write_bytes(b"".join(lines[core::NUM_CORES]))
    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(str(halves), text_key="text"),
            DocumentTokenizer(f"{out}/tokens", tokenizer_name_or_path=tokenizer, eos_token="<|endoftext|>"),
        ],
        tasks=NUM_CORES,
        workers=NUM_CORES,
        start_method="fork",  # under a fork server its workers would not be this process's children, and cost nothing
        logging_dir=f"{out}/logs",
    ).run()


def run_datasets(path: str, tokenizer: str, out: str) -> None:
    import datasets
    from tokenizers import Tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    encode = Tokenizer.from_file(tokenizer).encode_batch
    loaded = datasets.load_dataset("json", data_files=path, split="train", cache_dir=f"{out}/cache")
    tokens = loaded.map(
        lambda batch: {"tokens": [encoding.ids for encoding in encode(batch["text"])]},
        batched=True,
        num_proc=NUM_CORES,
        remove_columns=loaded.column_names,
    )
    tokens.save_to_disk(f"{out}/tokens")


if __name__ == "__main__":
    kind, *rest = sys.argv[1:]
    if kind == "datatrove":
        run_datatrove(*rest)
    elif kind == "datasets":
        run_datasets(*rest)
    else:
        measure_alone(kind, rest[0], rest[1], int(rest[2]), int(rest[3]))
