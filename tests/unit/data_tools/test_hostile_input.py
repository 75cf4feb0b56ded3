"""Input made to do harm: bombs, endless lines, tricks with paths, foreign encodings. Code 3, a name, bounded memory."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import zlib
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from data_samples import RunCommand

from data_tools.inputs import find_inputs
from megatrain.data import open_dataset
from megatrain.errors import DataError

MIB = 1 << 20
NUM_MIB = 1100
GOOD = b'{"text": "good"}\n'

# Runs the command, and says last how much memory it ever had.
MEASURED = """
import re, sys
from pathlib import Path
from data_tools.cli import main
try:
    main()
finally:
    # Not ru_maxrss, which begins with what the process that started this one had.
    peak_kib = re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]
    print(int(peak_kib) // 1024, file=sys.stderr)
"""


def tokenize_measured(source: Path, tokenizer_path: Path) -> tuple[int, str, int]:
    """Exit code, message, and the peak of resident memory in MiB."""
    command = [sys.executable, "-c", MEASURED, "tokenize", str(source), "--tokenizer", str(tokenizer_path)]
    done = subprocess.run(
        [*command, "--out", str(source.parent / "out"), "--workers", "1"], capture_output=True, text=True, check=False
    )
    *message, memory_mib = done.stderr.splitlines()
    return done.returncode, "\n".join(message), int(memory_mib)


def gzip_bomb(path: Path) -> None:
    compressor = zlib.compressobj(9, wbits=31)
    with path.open("wb") as file:
        file.write(compressor.compress(GOOD))
        for _ in range(NUM_MIB):
            file.write(compressor.compress(bytes(MIB)))
        file.write(compressor.flush())


def zstd_bomb(path: Path) -> None:
    with path.open("wb") as file, zstandard.ZstdCompressor(19).stream_writer(file) as stream:
        stream.write(GOOD)
        for _ in range(NUM_MIB):
            stream.write(b" " * MIB)


def long_line(path: Path) -> None:
    path.write_bytes(GOOD + b'{"text": "')
    os.truncate(path, NUM_MIB * MIB)  # zeros that take no room on disk


def long_text(path: Path) -> None:
    path.write_bytes(b"")
    os.truncate(path, NUM_MIB * MIB)


def parquet_document(path: Path) -> None:
    table = pa.table({"text": ["good", "x" * (300 * MIB)]})
    pq.write_table(table, path, compression="zstd", use_dictionary=False, write_statistics=False)


BOMBS = {
    "bomb.jsonl.gz": (gzip_bomb, "bomb.jsonl.gz, line 2: the line is longer than"),
    "bomb.jsonl.zst": (zstd_bomb, "bomb.jsonl.zst, line 2: the line is longer than"),
    "bomb.txt.zst": (zstd_bomb, "bomb.txt.zst is a text file of more than"),
    "line.jsonl": (long_line, "line.jsonl, line 2: the line is longer than"),
    "text.txt": (long_text, "text.txt is a text file of more than"),
    "document.parquet": (parquet_document, "document.parquet: "),
}


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "name",
    [
        name if name in {"bomb.jsonl.zst", "line.jsonl"} else pytest.param(name, marks=pytest.mark.slow)
        for name in BOMBS
    ],
)
def test_memory_bombs_are_refused_in_bounded_memory(name: str, tmp_path: Path, tokenizer_path: Path) -> None:
    write, message = BOMBS[name]
    write(tmp_path / name)
    code, err, memory_mib = tokenize_measured(tmp_path / name, tokenizer_path)
    assert code == 3, err
    assert message in err
    assert "Traceback" not in err
    assert memory_mib < 800, memory_mib


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_dictionaries_are_expanded_for_few_rows_at_once(kind: str, tmp_path: Path, tokenizer_path: Path) -> None:
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 200, pa.int32()), pa.array(["so it goes " * (MIB // 2)]))
    table, path = pa.table({"text": texts}), tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(table, path, store_schema=False, dictionary_pagesize_limit=64 * MIB)
    else:
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    command = [sys.executable, "-c", MEASURED, "dedup", str(path), "--out", str(tmp_path / "out"), "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "exact duplicate: 199 documents" in done.stdout
    assert int(done.stderr.split()[-1]) < 800, done.stderr


@pytest.mark.sample(1)
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_much_text_in_little_space_streams_through(kind: str, tmp_path: Path, tokenizer_path: Path) -> None:
    line = orjson.dumps({"text": "so it goes " * 90}) + b"\n"
    lines = line * (MIB // len(line))
    path = tmp_path / f"big.jsonl.{kind}"
    with gzip.open(path, "wb", 6) if kind == "gz" else zstandard.open(path, "wb") as stream:
        for _ in range(80):
            stream.write(lines)
    assert path.stat().st_size < 4 * MIB
    code, err, memory_mib = tokenize_measured(path, tokenizer_path)
    assert code == 0, err
    assert memory_mib < 800, memory_mib


FOREIGN = {
    "utf16.jsonl": ('{"text": "ab"}\n' * 3).encode("utf-16"),
    "utf16be.jsonl": ('{"text": "ab"}\n' * 3).encode("utf-16-be"),
    "utf32.jsonl": ('{"text": "ab"}\n' * 3).encode("utf-32"),
    "latin1.jsonl": GOOD + '{"text": "h\u00e9"}\n'.encode("latin-1"),
    "latin1.txt": "h\u00e9".encode("latin-1"),
    "utf16.txt": "\u00e9ab".encode("utf-16"),
    "zeros.jsonl": bytes(1000),
    "zeros.parquet": bytes(1000),
    "zeros.arrow": bytes(1000),
    "zeros.jsonl.gz": bytes(1000),
    "zeros.jsonl.zst": bytes(1000),
    "nested.jsonl": b'{"text": ' + b"[" * 100_000 + b"\n",
    "number.jsonl": b'{"text": 1' + b"0" * 100_000 + b"}\n",
}


@pytest.mark.parametrize("name", list(FOREIGN))
def test_foreign_bytes_are_code_3_with_their_place(
    name: str, tmp_path: Path, tokenizer_path: Path, run_command: RunCommand
) -> None:
    (tmp_path / name).write_bytes(FOREIGN[name])
    code, _, err = run_command(
        "tokenize", tmp_path / name, "--tokenizer", tokenizer_path, "--out", tmp_path / "out", "--workers", 1
    )
    assert code == 3
    assert name in err
    assert "Traceback" not in err
    assert len(err) < 700
    if name.startswith("utf16") and name.endswith("jsonl"):
        assert "UTF-16" in err


def test_a_byte_order_mark_is_dropped(tmp_path: Path, tokenizer_path: Path, run_command: RunCommand) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf\n\xef\xbb\xbf".join([b"\xef\xbb\xbf" + GOOD.strip()]) + b"\n")
    source, out = tmp_path / "a.jsonl", tmp_path / "out"
    code, _, err = run_command("tokenize", source, "--tokenizer", tokenizer_path, "--out", out)
    assert code == 0, err
    assert open_dataset(out).num_documents == 1


def test_tricks_with_paths(tmp_path: Path, tokenizer_path: Path, run_command: RunCommand) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a\nb.jsonl").write_bytes(GOOD)
    (folder / "..txt").write_bytes(b"hidden")
    (folder / "loop").symlink_to(folder)
    (folder / "deep").mkdir()
    (folder / "deep" / "up").symlink_to(folder)
    for argument in (folder, f"{folder}/../in", f"{folder}/**/*.jsonl"):
        assert [Path(file.name).name for file in find_inputs([str(argument)])] == ["a\nb.jsonl"]
    code, _, err = run_command(
        "tokenize", f"{folder}/../in", "--tokenizer", tokenizer_path, "--out", tmp_path / "out", "--workers", 1
    )
    assert code == 0, err
    assert open_dataset(tmp_path / "out").document_info(0).source_file == f"{folder}/../in/a\nb.jsonl"


def test_unreadable_kinds_of_input_are_refused(tmp_path: Path) -> None:
    (tmp_path / "self").symlink_to(tmp_path / "self")
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("self", "Too many levels of symbolic links"), ("pipe", "is no regular file")):
        with pytest.raises(DataError, match=message):
            find_inputs([str(tmp_path / name)])
    (tmp_path / "pipe").unlink()
    with pytest.raises(DataError, match="cannot be read: Too many levels"):
        find_inputs([str(tmp_path)])
    (tmp_path / "self").unlink()
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_bytes(b"text")
    with pytest.raises(DataError, match="not UTF-8"):
        find_inputs([str(tmp_path)])
