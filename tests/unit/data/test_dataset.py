"""Reading a dataset: documents, windows, borders, bytes; in threads and forks; and what may be wrong with a folder."""

from __future__ import annotations

import multiprocessing
import pickle
import random
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import orjson
import pytest

from data_tools.tokenize import Effort, TokenizeOptions, tokenize
from data_tools.tokenizer import train_tokenizer
from data_tools.units import ReadOptions
from megatrain.data import Dataset, open_dataset
from megatrain.data.format import BATCH_TOKENS, Manifest, canonical_json, checksum, shard_name, token_dtype
from megatrain.errors import DataError


def make_texts() -> list[str]:
    rng = random.Random(5)
    words = ["sein", "und", "Zeit", "\u00fcber", "\u65e5\u672c", "\U0001f600", "<|endoftext|>", "\n", "x = 1", "  "]
    texts = ["".join(rng.choices(words, k=rng.choice([1, 3, 50, 400]))) for _ in range(400)]
    return [*texts * 24, " ".join(rng.choices(words, k=100_000)), *texts]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return make_texts()


@pytest.fixture(scope="session", params=[1 << 28, 200_000], ids=["one shard", "many shards"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A dataset whose documents end at, before and behind the borders of record batches and shards."""
    path = tmp_path_factory.mktemp("dataset")
    (path / "in.jsonl").write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts))
    train_tokenizer([str(path / "in.jsonl")], 300, path / "tokenizer.json", ReadOptions())
    effort = Effort(1, "auto", lambda *_: nullcontext(lambda _: None), lambda _: None)
    options = TokenizeOptions(shard_tokens=request.param)
    tokenize([str(path / "in.jsonl")], path / "tokenizer.json", path / "out", options, effort)
    return path / "out"


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def laid_out(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """All tokens end to end, and where each document begins."""
    documents = [dataset.document(k) for k in range(dataset.num_documents)]
    return np.concatenate(documents), np.cumsum([0, *map(len, documents)])


def test_windows_are_cut_from_documents_end_to_end(folder: Path) -> None:
    dataset = open_dataset(folder)
    tokens, starts = laid_out(dataset)
    assert len(tokens) == dataset.num_tokens
    assert tokens.dtype == dataset.dtype
    assert np.array_equal(np.flatnonzero(tokens == dataset.eod_id) + 1, starts[1:])
    rng = random.Random(1)
    for _ in range(500):
        length = rng.choice([0, 1, 2, 64, 2048, 70_000, dataset.num_tokens])
        start = rng.randrange(dataset.num_tokens - length + 1)
        assert np.array_equal(dataset.window(start, length), tokens[start : start + length])
        inside = starts[:-1][(starts[:-1] >= start) & (starts[:-1] < start + length)]
        assert np.array_equal(dataset.document_starts(start, length), inside - start)
        if length:
            k = dataset.document_at(start)
            assert dataset.document_range(k) == (starts[k], starts[k + 1])
            assert starts[k] <= start < starts[k + 1]


def test_a_long_dataset_spans_record_batches_or_shards(folder: Path) -> None:
    dataset = open_dataset(folder)
    assert dataset.num_tokens > BATCH_TOKENS
    if dataset.num_shards == 1:
        assert len(dataset.shard(0).batches) == 1 + (
            dataset.document_range(dataset.num_documents - 1)[0] // BATCH_TOKENS
        )
    else:
        assert dataset.num_shards > 4


def test_bytes_behind_tokens_add_up_to_the_text(folder: Path, texts: list[str]) -> None:
    dataset = open_dataset(folder)
    assert dataset.text_bytes == sum(len(text.encode()) for text in texts)
    assert dataset.window_bytes(0, dataset.num_tokens) == dataset.text_bytes
    for k in (0, 7, 9600, 10000):
        start, stop = dataset.document_range(k)
        assert dataset.window_bytes(start, stop - start) == len(texts[k].encode())
        assert dataset.document_info(k).text_bytes == len(texts[k].encode())
        middle = (start + stop) // 2
        halves = dataset.window_bytes(start, middle - start) + dataset.window_bytes(middle, stop - middle)
        assert halves == len(texts[k].encode())


def test_bytes_of_documents_are_exact_despite_normalisation(tmp_path: Path) -> None:
    texts = ["\ufb01x the \ufb02ow of o\ufb03ces", "\ufb01ne", "plain"] * 5
    (tmp_path / "in.jsonl").write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts))
    train_tokenizer([str(tmp_path / "in.jsonl")], 300, tmp_path / "plain.json", ReadOptions())
    tokenizer = {**orjson.loads((tmp_path / "plain.json").read_bytes()), "normalizer": {"type": "NFKC"}}
    (tmp_path / "tokenizer.json").write_bytes(orjson.dumps(tokenizer))
    effort = Effort(1, "tokenizers", lambda *_: nullcontext(lambda _: None), lambda _: None)
    tokenize([str(tmp_path / "in.jsonl")], tmp_path / "tokenizer.json", tmp_path / "out", TokenizeOptions(), effort)
    dataset = open_dataset(tmp_path / "out")
    sizes = [len(text.encode()) for text in texts]
    assert int(dataset.token_bytes[dataset.window(0, dataset.num_tokens)].sum()) < sum(sizes)
    assert dataset.window_bytes(0, dataset.num_tokens) == sum(sizes)
    for k in range(len(texts)):
        start, stop = dataset.document_range(k)
        cuts = (start, start + 1, (start + stop) // 2)
        parts = [dataset.window_bytes(start, cut - start) + dataset.window_bytes(cut, stop - cut) for cut in cuts]
        assert parts == [sizes[k]] * 3


def test_what_is_not_there_is_an_index_error(folder: Path) -> None:
    dataset = open_dataset(folder)
    for k in (-1, dataset.num_documents):
        with pytest.raises(IndexError, match="counted from 0"):
            dataset.document(k)
    for start, length in ((-1, 1), (0, -1), (dataset.num_tokens, 1), (0, dataset.num_tokens + 1)):
        with pytest.raises(IndexError, match="are not in"):
            dataset.window(start, length)
    assert len(dataset.window(dataset.num_tokens, 0)) == 0


def test_tokens_cannot_be_written_to(folder: Path) -> None:
    with pytest.raises(ValueError, match="read-only"):
        open_dataset(folder).window(0, 5)[0] = 1


def digest_of_windows(dataset: Dataset, seed: int) -> int:
    rng = random.Random(seed)
    starts = [rng.randrange(dataset.num_tokens - 512) for _ in range(300)]
    return sum(int(dataset.window(start, 512).astype(np.int64).sum()) * (n + 1) for n, start in enumerate(starts))


def in_child(dataset: Dataset, queue: multiprocessing.Queue[int]) -> None:
    queue.put(digest_of_windows(dataset, 3))


def test_threads_forks_and_pickles_read_the_same(
    folder: Path,
) -> None:
    expected = digest_of_windows(open_dataset(folder), 3)
    shared = open_dataset(folder, max_mapped_shards=2)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: digest_of_windows(shared, 3), range(12))) == {expected}
    assert shared.shard.cache_info().currsize <= 2
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=in_child, args=(shared, queue))
    child.start()
    assert queue.get(timeout=30) == expected
    child.join()
    assert digest_of_windows(pickle.loads(pickle.dumps(shared)), 3) == expected


def test_opening_reads_no_shard_and_imports_no_torch(copied: Path) -> None:
    for path in copied.glob("shard-*.arrow"):
        path.unlink()
    dataset = open_dataset(copied)
    assert dataset.num_tokens > 0
    with pytest.raises(DataError, match=r"shard-000000\.arrow cannot be read"):
        dataset.window(0, 1)
    script = "import sys, megatrain.data; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_window_takes_microseconds(folder: Path) -> None:
    dataset = open_dataset(folder)
    starts = [random.Random(2).randrange(dataset.num_tokens - 256) for _ in range(5_000)]
    for start in starts:
        dataset.window(start, 256)
    began = time.thread_time()
    for start in starts:
        dataset.window(start, 256)
    assert (time.thread_time() - began) / len(starts) < 20e-6


def rewritten_manifest(folder: Path, **changes: object) -> None:
    """A manifest that someone else wrote, its checksum right."""
    body = orjson.loads((folder / "manifest.json").read_bytes())
    body = {key: value for key, value in {**body, **changes}.items() if key != "checksum" and value is not None}
    body["checksum"] = checksum(canonical_json(body)).hex()
    (folder / "manifest.json").write_bytes(canonical_json(body))


HOSTILE: dict[str, dict[str, object]] = {
    "negative count": {"num_tokens": -5},
    "count that is true": {"num_shards": True},
    "count that is a text": {"num_documents": "5"},
    "huge count": {"num_tokens": 2**63},
    "other total": {"num_tokens": 12345},
    "too many shards": {"num_shards": 99999},
    "other type": {"dtype": "object"},
    "type that does not fit": {"dtype": "uint32"},
    "end-of-document id outside the vocabulary": {"eod_id": 10**6},
    "path for a checksum": {"shard_table_checksum": "../../../etc/passwd"},
    "unknown key": {"files": ["../../../etc/passwd"]},
    "missing key": {"digest": None},
    "newer version": {"format_version": 2},
    "other format": {"format": "tar"},
}


@pytest.mark.parametrize("case", list(HOSTILE))
def test_a_hostile_manifest_is_refused(case: str, copied: Path) -> None:
    rewritten_manifest(copied, **HOSTILE[case])
    with pytest.raises(DataError, match=str(copied)):
        open_dataset(copied)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff" * 99, b"[" * 100_000, b" " * (1 << 21)])
def test_a_manifest_that_is_none_is_refused(data: bytes, copied: Path) -> None:
    (copied / "manifest.json").write_bytes(data)
    with pytest.raises(DataError, match=r"manifest\.json"):
        open_dataset(copied)


def test_a_missing_or_unfinished_dataset_says_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no dataset at .*none.*tokenize"):
        open_dataset(tmp_path / "none")
    with pytest.raises(DataError, match="is no dataset"):
        open_dataset(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="is no dataset"):
        open_dataset(tmp_path / "file")
    (tmp_path / ".work").mkdir()
    with pytest.raises(DataError, match="unfinished"):
        open_dataset(tmp_path)


def test_a_truncated_or_foreign_shard_is_refused(copied: Path) -> None:
    path = copied / shard_name(0)
    data = path.read_bytes()
    foreign = (copied / "shards.arrow").read_bytes()
    for broken in (data[:-100], foreign, foreign.ljust(len(data), b"\0"), b"\0" * len(data)):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"shard-000000\.arrow"):
            open_dataset(copied).window(0, 1)


def test_token_ids_take_the_narrowest_type_that_fits() -> None:
    sizes = {1: "uint8", 256: "uint8", 257: "uint16", 65_536: "uint16", 65_537: "uint32", 2**32: "uint32"}
    assert {size: token_dtype(size).name for size in sizes} == sizes


def test_a_manifest_reads_back_as_it_was_written(folder: Path) -> None:
    manifest = Manifest.load(folder)
    assert manifest.dump() == (folder / "manifest.json").read_bytes()
