"""What tokenising promises: the reference's ids, and the same bytes whoever does the work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import orjson
import psutil
import pyarrow as pa
import pytest
from data_samples import WRITERS, Document, MakeDataset, folder_bytes, json_lines
from tokenizers import Tokenizer, models, pre_tokenizers

from data_tools.engines import EDGE_CASES, Engine, choose_engine
from data_tools.tokenize import Effort, TokenizeOptions, tokenize
from megatrain.data import open_dataset
from megatrain.errors import ConfigError, DataError

DATA_TOOLS = [sys.executable, "-m", "data_tools"]


def expected_tokens(tokenizer_path: Path, text: str) -> list[int]:
    """Encoded by `tokenizers` from a copy of the tokenizer that has never heard of a special token."""
    description = orjson.loads(tokenizer_path.read_bytes())
    plain = Tokenizer.from_str(orjson.dumps({**description, "added_tokens": []}).decode())
    return [*plain.encode(text).ids, Tokenizer.from_file(str(tokenizer_path)).token_to_id("<|endoftext|>")]


QUICK = {"a.jsonl", "texts"}
"""Formats that are read by both engines in `make test`; the others in `make acceptance`."""


@pytest.fixture(scope="module")
def expected(documents: list[Document], tokenizer_path: Path) -> dict[str, list[int]]:
    return {text: expected_tokens(tokenizer_path, text) for _, text in documents}


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        *((name, "fastokens") for name in WRITERS),
        *(
            pytest.param(name, "tokenizers", marks=() if name in QUICK else (pytest.mark.slow, pytest.mark.acceptance))
            for name in WRITERS
        ),
    ],
)
def test_every_format_gives_the_ids_of_tokenizers(
    name: str,
    engine: str,
    tmp_path: Path,
    documents: list[Document],
    make_dataset: MakeDataset,
    expected: dict[str, list[int]],
) -> None:
    WRITERS[name](tmp_path / name, documents)
    manifest = make_dataset(tmp_path / name, tmp_path / "out", engine=engine)
    dataset = open_dataset(tmp_path / "out")
    kept = [(number, text) for number, (_, text) in enumerate(documents) if text]
    assert dataset.num_documents == len(kept)
    assert manifest.num_empty_documents == len(documents) - len(kept)
    for k, (number, text) in enumerate(kept):
        assert dataset.document(k).tolist() == expected[text], text[:50]
        info = dataset.document_info(k)
        assert info.text_bytes == len(text.encode())
        if name == "texts":
            source = str(tmp_path / name / f"{number:05d}.txt")
            assert (info.id, info.source_file, info.source_row) == (f"{source}:0", source, 0)
        else:
            assert (info.id, info.source_row) == (f"doc-{number}", number)
            assert info.source_file == str(tmp_path / name)


def test_the_digest_depends_on_the_content_alone(
    tmp_path: Path, documents: list[Document], make_dataset: MakeDataset
) -> None:
    digests = set()
    for number, name in enumerate(WRITERS):
        WRITERS[name](tmp_path / name, documents)
        shard_tokens, part_bytes = [(1 << 28, 1 << 20), (4_000, 10_000), (7_777, 100_000)][number % 3]
        out = tmp_path / f"out-{name}"
        digests.add(make_dataset(tmp_path / name, out, part_bytes=part_bytes, shard_tokens=shard_tokens).digest)
    assert len(digests) == 1
    WRITERS["a.jsonl"](tmp_path / "b.jsonl", [*documents[:-1], ("last", "last ")])
    assert make_dataset(tmp_path / "b.jsonl", tmp_path / "other").digest not in digests


def test_workers_and_part_size_change_no_byte(
    tmp_path: Path, documents: list[Document], make_dataset: MakeDataset
) -> None:
    WRITERS["a.jsonl"](tmp_path / "a.jsonl", documents)
    ways = [(1, 20_000), (2, 20_000), (3, 9_000), (1, 1 << 24)]
    folders = []
    for workers, part_bytes in ways:
        out = tmp_path / f"out-{workers}-{part_bytes}"
        make_dataset(tmp_path / "a.jsonl", out, workers=workers, part_bytes=part_bytes, shard_tokens=4_000)
        folders.append(folder_bytes(out))
    assert len(folders[0]) > 5
    assert all(folder == folders[0] for folder in folders[1:])


@pytest.mark.parametrize("name", [pytest.param("a.jsonl", marks=pytest.mark.slow), "a.jsonl.zst"])
def test_killed_runs_resume_and_change_no_byte(
    name: str, tmp_path: Path, documents: list[Document], tokenizer_path: Path, make_dataset: MakeDataset
) -> None:
    WRITERS[name](tmp_path / name, documents * 10)
    make_dataset(tmp_path / name, tmp_path / "straight", part_bytes=150_000, shard_tokens=100_000)
    out, work = tmp_path / "killed", tmp_path / "killed" / ".work"
    script = (
        "import sys; from pathlib import Path; from contextlib import nullcontext\n"
        "from data_tools.tokenize import Effort, TokenizeOptions, tokenize\n"
        "if __name__ == '__main__':\n"
        "    effort = Effort(2, 'auto', lambda *_: nullcontext(lambda n: None), print, part_bytes=150_000)\n"
        "    options = TokenizeOptions(shard_tokens=100_000)\n"
        "    tokenize([sys.argv[1]], Path(sys.argv[2]), Path(sys.argv[3]), options, effort)\n"
    )
    (tmp_path / "run.py").write_text(script)
    command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path / name), str(tokenizer_path), str(out)]
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    seen: set[str] = set()
    for _ in range(2):
        process = subprocess.Popen(command, env=environment)
        while process.poll() is None and not new_results(work, seen):
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        seen |= {path.name for path in work.glob("parts-*/*.arrow")}
    kept = {path: path.stat().st_mtime_ns for path in work.glob("parts-*/*.arrow")}
    assert kept
    assert not (out / "manifest.json").exists()
    make_dataset(tmp_path / name, out, part_bytes=150_000, shard_tokens=100_000)
    assert folder_bytes(out) == folder_bytes(tmp_path / "straight")


def new_results(work: Path, seen: set[str]) -> bool:
    return len({path.name for path in work.glob("parts-*/*.arrow")} - seen) >= 2


def test_committed_parts_survive_an_error(tmp_path: Path, documents: list[Document], make_dataset: MakeDataset) -> None:
    inputs = tmp_path / "in"
    inputs.mkdir()
    WRITERS["a.jsonl"](inputs / "a.jsonl", documents)
    (inputs / "b.jsonl").write_bytes(b'{"text": "fine"}\n{"text": \n')
    with pytest.raises(DataError, match=r"b\.jsonl, line 2: bad JSON"):
        make_dataset(inputs, tmp_path / "out")
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / ".work").glob("parts-*/*.arrow")}
    assert len(parts) > 1
    (inputs / "b.jsonl").write_bytes(b'{"text": "fine"}\n')
    before = {path.name: path.stat().st_ino for path in parts}
    with pytest.raises(ConfigError, match="shard_tokens"):
        make_dataset(inputs, tmp_path / "out", shard_tokens=10)
    assert {path.name: path.stat().st_ino for path in parts} == before
    assert make_dataset(inputs, tmp_path / "out").num_documents == sum(1 for _, text in documents if text) + 1
    assert not (tmp_path / "out" / ".work").exists()


def test_a_finished_dataset_is_left_alone(tmp_path: Path, documents: list[Document], make_dataset: MakeDataset) -> None:
    WRITERS["a.jsonl"](tmp_path / "a.jsonl", documents)
    make_dataset(tmp_path / "a.jsonl", tmp_path / "out")
    before = folder_bytes(tmp_path / "out")
    make_dataset(tmp_path / "a.jsonl", tmp_path / "out")
    with pytest.raises(ConfigError, match="other inputs or with other options"):
        make_dataset(tmp_path / "a.jsonl", tmp_path / "out", shard_tokens=5)
    later = time.time() + 10
    os.utime(tmp_path / "a.jsonl", (later, later))
    with pytest.raises(ConfigError, match="was changed after"):
        make_dataset(tmp_path / "a.jsonl", tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="other things in it"):
        make_dataset(tmp_path / "a.jsonl", tmp_path / "mine")


def start_long_run(tmp_path: Path, documents: list[Document], tokenizer_path: Path) -> subprocess.Popen[str]:
    """A command that is busy for many seconds, with both its workers at work."""
    (tmp_path / "big.jsonl").write_bytes(json_lines(documents) * 300)
    command = [*DATA_TOOLS, "tokenize", "big.jsonl", "--tokenizer", str(tokenizer_path), "--out", "out"]
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    process = subprocess.Popen(
        [*command, "--workers", "2", "--engine", "tokenizers"],
        cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in what a shell starts with &
    )  # fmt: skip
    while process.poll() is None and len(busy_children(process)) < 2:
        time.sleep(0.02)
    return process


def busy_children(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The workers: the children that spent some time computing (the resource tracker does not)."""
    return [child for child in psutil.Process(process.pid).children() if child.cpu_times().user > 0.3]


def test_a_dead_worker_exits_5_without_partial_output(
    tmp_path: Path, documents: list[Document], tokenizer_path: Path
) -> None:
    process = start_long_run(tmp_path, documents, tokenizer_path)
    busy_children(process)[0].kill()
    _, message = process.communicate(timeout=60)
    assert process.returncode == 5
    assert "killed by SIGKILL" in message
    assert "Traceback" not in message
    assert not list(tmp_path.glob("out/*.arrow"))


def test_a_file_named_twice_is_there_twice(tmp_path: Path, documents: list[Document], tokenizer_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(documents))
    effort = Effort(1, "tokenizers", lambda *_: nullcontext(lambda _: None), lambda _: None, part_bytes=20_000)
    once, twice = (
        tokenize([str(path)] * times, tokenizer_path, tmp_path / str(times), TokenizeOptions(shard_tokens=9000), effort)
        for times in (1, 2)
    )
    assert once is not None
    assert twice is not None
    assert once.num_shards > 2
    assert twice.num_tokens == 2 * once.num_tokens


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "number",
    [signal.SIGKILL, *(pytest.param(each, marks=pytest.mark.slow) for each in (signal.SIGTERM, signal.SIGINT))],
)
def test_no_worker_outlives_the_command(
    number: signal.Signals, tmp_path: Path, documents: list[Document], tokenizer_path: Path
) -> None:
    process = start_long_run(tmp_path, documents, tokenizer_path)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    _, message = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert "Traceback" not in message
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


def test_a_shard_is_plain_arrow_with_schema_metadata(
    tmp_path: Path, documents: list[Document], make_dataset: MakeDataset, tokenizer_path: Path
) -> None:
    WRITERS["a.jsonl"](tmp_path / "a.jsonl", documents)
    manifest = make_dataset(tmp_path / "a.jsonl", tmp_path / "out", shard_tokens=4_000)
    tables = [pa.ipc.open_file(str(path)).read_all() for path in sorted((tmp_path / "out").glob("shard-*.arrow"))]
    assert len(tables) == manifest.num_shards > 1
    assert tables[0].schema.names == ["tokens", "id", "hash", "source", "text_bytes"]
    assert tables[0].schema.field("tokens").type.value_type == pa.uint16()
    for number, table in enumerate(tables):
        facts = orjson.loads(table.schema.metadata[b"megatrain"])
        assert facts["format_version"] == 1
        assert facts["shard"] == number
        assert facts["tokenizer_sha256"] == manifest.tokenizer_sha256
        assert (facts["eod_id"], facts["num_documents"]) == (manifest.eod_id, table.num_rows)
        assert facts["num_tokens"] == sum(map(len, table["tokens"].to_pylist()))
    assert sum(table.num_rows for table in tables) == manifest.num_documents
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == tokenizer_path.read_bytes()


def test_fastokens_is_used_only_for_supported_tokenizers(tokenizer_path: Path) -> None:
    engine, warning = choose_engine("auto", tokenizer_path.read_bytes(), ["text"])
    assert (engine.name, warning) == ("fastokens", None)
    words = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "[UNK]": 1, "a": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    engine, warning = choose_engine("auto", words.to_str().encode(), ["a b"])
    assert engine.name == "tokenizers"
    assert warning is not None
    assert "Whitespace" in warning
    with pytest.raises(ConfigError, match="Whitespace"):
        choose_engine("fastokens", words.to_str().encode(), ["a b"])


def test_both_engines_agree_on_the_nastiest_texts(tokenizer_path: Path) -> None:
    data = tokenizer_path.read_bytes()
    for one, other in zip(
        Engine("tokenizers", data).encode(EDGE_CASES), Engine("fastokens", data).encode(EDGE_CASES), strict=True
    ):
        assert np.array_equal(one, other)
