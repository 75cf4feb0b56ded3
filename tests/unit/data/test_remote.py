"""Datasets at an address: the same tokens as in the folder, fetched once, checked, kept within bounds."""

from __future__ import annotations

import functools
import multiprocessing
import pickle
import random
import shutil
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest

from data_tools.tokenize import Effort, TokenizeOptions, tokenize
from data_tools.verify import verify_dataset
from megatrain.data import Dataset, open_dataset
from megatrain.data.format import shard_name
from megatrain.data.remote import Cache
from megatrain.errors import ConfigError, DataError
from tests.runs import TinyData


class RangeHandler(SimpleHTTPRequestHandler):
    """Files of a folder, whole or by range, as object stores serve them; each request is noted."""

    requests: list[str]
    failures: list[int]
    ranges = True

    def do_GET(self) -> None:
        self.requests.append(self.path)
        if self.failures:
            self.send_error(self.failures.pop())
            return
        path = Path(self.translate_path(self.path))
        wanted = self.headers.get("Range")
        if wanted is None or not self.ranges or not path.is_file():
            super().do_GET()
            return
        first, last = (int(part) for part in wanted.removeprefix("bytes=").split("-"))
        data = path.read_bytes()[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Range", f"bytes {first}-{first + len(data) - 1}/{path.stat().st_size}")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        """Nothing: `requests` has them."""


class Server:
    """A folder under http://."""

    def __init__(self, folder: Path) -> None:
        self.handler = type("Handler", (RangeHandler,), {"requests": [], "failures": []})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(self.handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture(scope="module")
def folder(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of many shards, with a record batch each."""
    path = tmp_path_factory.mktemp("served")
    shutil.copy(tiny_data.prose.with_suffix(".jsonl"), path / "prose.jsonl")
    effort = Effort(1, "tokenizers", lambda *_: nullcontext(lambda _: None), lambda _: None)
    tokenize(
        [str(path / "prose.jsonl")], tiny_data.tokenizer, path / "data", TokenizeOptions(shard_tokens=4000), effort
    )
    return path / "data"


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    server = Server(folder.parent)
    yield server
    server.stop()


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", retry_seconds=5.0)


def read_all(dataset: Dataset) -> np.ndarray:
    return np.concatenate([dataset.document(k) for k in range(dataset.num_documents)])


def cached_bytes(cache: Cache) -> int:
    return sum(path.stat().st_size for path in (cache.folder / "objects").rglob("*") if path.is_file())


@pytest.mark.parametrize("kind", ["http", "s3"])
def test_remote_tokens_equal_local_ones(kind: str, folder: Path, server: Server, bucket: str, cache: Cache) -> None:
    url = f"{server.url}/data" if kind == "http" else f"{bucket}/datasets/tiny"
    if kind == "s3":
        fsspec.filesystem("s3").put(str(folder), url, recursive=True)
    local, remote = open_dataset(folder), open_dataset(url, cache)
    assert (remote.digest, remote.num_tokens, remote.num_shards) == (local.digest, local.num_tokens, local.num_shards)
    assert remote.num_shards > 10
    rng = random.Random(0)
    for _ in range(200):
        start = rng.randrange(local.num_tokens - 6000)
        length = rng.choice([1, 64, 6000])
        assert np.array_equal(remote.window(start, length), local.window(start, length))
        assert np.array_equal(remote.document_starts(start, length), local.document_starts(start, length))
        assert remote.document_at(start) == local.document_at(start)
    assert remote.window_bytes(5, 9000) == local.window_bytes(5, 9000)
    assert remote.tokenizer_path.read_bytes() == local.tokenizer_path.read_bytes()
    assert np.array_equal(pickle.loads(pickle.dumps(remote)).window(7, 99), local.window(7, 99))
    opened, num_bytes = verify_dataset(url, lambda *_: nullcontext(lambda _: None))
    assert num_bytes == sum(row["bytes"] for row in opened.shard_rows())


@pytest.mark.parametrize("kind", ["http", "s3"])
def test_remote_shards_of_many_batches_are_verified(
    kind: str, folder: Path, bucket: str, tiny_data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_tools.assemble.BATCH_TOKENS", 2000)
    effort = Effort(1, "tokenizers", lambda *_: nullcontext(lambda _: None), lambda _: None)
    tokenize([str(folder.parent / "prose.jsonl")], tiny_data.tokenizer, tmp_path / "data", TokenizeOptions(), effort)
    server = Server(tmp_path)
    url = f"{server.url}/data" if kind == "http" else f"{bucket}/many"
    if kind == "s3":
        fsspec.filesystem("s3").put(str(tmp_path / "data"), url, recursive=True)
    opened, num_bytes = verify_dataset(url, lambda *_: nullcontext(lambda _: None))
    server.stop()
    assert num_bytes == sum(row["bytes"] for row in opened.shard_rows())
    assert len(opened.table.batches(0)) > 10


def test_opening_fetches_the_manifest_alone(server: Server, cache: Cache) -> None:
    dataset = open_dataset(f"{server.url}/data/", cache)
    assert dataset.num_tokens > 0
    assert server.handler.requests == ["/data/manifest.json"]


def read_in_child(url: str, cache: Cache, queue: multiprocessing.Queue[int]) -> None:
    queue.put(int(read_all(open_dataset(url, cache)).astype(np.int64).sum()))


def test_a_machine_fetches_each_record_batch_once(folder: Path, server: Server, cache: Cache) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    children = [context.Process(target=read_in_child, args=(f"{server.url}/data", cache, queue)) for _ in range(2)]
    for child in children:
        child.start()
    expected = int(read_all(open_dataset(folder)).astype(np.int64).sum())
    assert [queue.get(timeout=60) for _ in children] == [expected] * 2
    for child in children:
        child.join()
    fetched = [path for path in server.handler.requests if "manifest" not in path]
    assert len(fetched) == len(set(fetched)) == open_dataset(folder).num_shards + 1


def test_the_cache_stays_bounded_and_correct_in_use(folder: Path, server: Server, tmp_path: Path) -> None:
    local = open_dataset(folder)
    cache = Cache(tmp_path / "cache", max_bytes=100_000)
    remote = open_dataset(f"{server.url}/data", cache)
    assert sum(row["bytes"] for row in local.shard_rows()) > 200_000
    held = []
    for k in range(local.num_documents):
        held.append(remote.document(k))
        assert cached_bytes(cache) <= cache.max_bytes
    assert np.array_equal(np.concatenate(held), read_all(local))
    before = len(server.handler.requests)
    remote.document(local.num_documents - 1)
    assert len(server.handler.requests) == before
    assert np.array_equal(open_dataset(f"{server.url}/data", cache).document(0), local.document(0))
    assert len(server.handler.requests) > before + 1, "the first shard should have been given up, and fetched again"


def test_a_server_that_fails_is_asked_again(server: Server, cache: Cache) -> None:
    server.handler.failures[:] = [503, 500]
    assert open_dataset(f"{server.url}/data", cache).num_tokens > 0
    assert len(server.handler.requests) == 3


def test_a_lost_server_ends_in_one_paragraph(folder: Path, tmp_path: Path) -> None:
    server = Server(folder.parent)
    cache = Cache(tmp_path / "cache", retry_seconds=0.3)
    dataset = open_dataset(f"{server.url}/data", cache)
    dataset.document(0)
    server.stop()
    assert len(dataset.document(0))
    with pytest.raises(DataError, match=r"shard-0000\d\d\.arrow cannot be read.*Check the address"):
        dataset.document(dataset.num_documents - 1)
    with pytest.raises(DataError, match=r"manifest\.json cannot be read"):
        open_dataset(f"{server.url}/data", cache)


def test_an_object_that_was_changed_is_named(folder: Path, tmp_path: Path, cache: Cache) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "data"))
    server = Server(tmp_path)
    dataset = open_dataset(f"{server.url}/data", cache)
    path = copied / shard_name(3)
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"shard-000003\.arrow, bytes \d+ to \d+, is not what the dataset says"):
        dataset.window(0, dataset.num_tokens)
    with pytest.raises(DataError, match=r"shard-000003\.arrow, record batch 0: document \d+ of the shard"):
        verify_dataset(f"{server.url}/data", lambda *_: nullcontext(lambda _: None))
    (copied / "shards.arrow").write_bytes(b"other")
    with pytest.raises(DataError, match=r"shards\.arrow is not what the dataset says"):
        open_dataset(f"{server.url}/data", Cache(tmp_path / "other")).window(0, 1)
    server.stop()


def test_damage_in_the_cache_is_fetched_anew(folder: Path, server: Server, cache: Cache) -> None:
    expected = read_all(open_dataset(folder))
    read_all(open_dataset(f"{server.url}/data", cache))
    for path in (cache.folder / "objects").glob("*/*"):
        path.write_bytes(path.read_bytes()[:-1])
    assert np.array_equal(read_all(open_dataset(f"{server.url}/data", cache)), expected)


def test_unusable_addresses_servers_and_caches_are_named(server: Server, cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"There is no http.*/none/manifest\.json"):
        open_dataset(f"{server.url}/none", cache)
    with pytest.raises(ConfigError, match="Protocol not known"):
        open_dataset("floppy://a/data", cache)
    server.handler.ranges = False
    with pytest.raises(DataError, match="answers ranges of bytes"):
        open_dataset(f"{server.url}/data", cache).window(0, 10)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data\.cache_dir"):
        open_dataset(f"{server.url}/data", Cache(tmp_path / "file")).window(0, 10)


@pytest.mark.parametrize("kind", ["http", "s3"])
def test_remote_inputs_give_the_same_dataset(
    kind: str, folder: Path, server: Server, bucket: str, tmp_path: Path, tiny_data: TinyData
) -> None:
    url = f"{server.url}/prose.jsonl"
    if kind == "s3":
        url = f"{bucket}/inputs/prose.jsonl"
        fsspec.filesystem("s3").put(str(folder.parent / "prose.jsonl"), url)
    effort = Effort(1, "tokenizers", lambda *_: nullcontext(lambda _: None), lambda _: None)
    tokenize([url], tiny_data.tokenizer, tmp_path / "out", TokenizeOptions(), effort)
    dataset = open_dataset(tmp_path / "out")
    assert dataset.digest == open_dataset(folder).digest
    assert dataset.document_info(0).source_file == url
