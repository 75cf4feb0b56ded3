"""Broken input stops with code 3 (usage with 2), the file and the place, in a short paragraph."""

from __future__ import annotations

import bz2
import errno
import gzip
from collections.abc import Callable
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from data_samples import RunCommand

from data_tools.inputs import find_inputs
from data_tools.readers import plan_units, read_parts
from data_tools.units import ReadOptions
from megatrain.data import open_dataset
from megatrain.errors import DataError
from tests.faults.small_disk import small_disk

GOOD = b'{"text": "good", "id": 7}\n'
INCOMPRESSIBLE = orjson.dumps({"text": bytes(range(32, 90)).decode() * 30_000, "id": "x"}) + b"\n"


def table_bytes(table: pa.Table, kind: str) -> bytes:
    sink = pa.BufferOutputStream()
    if kind == "parquet":
        pq.write_table(table, sink)
    else:
        with (pa.ipc.new_file if kind == "file" else pa.ipc.new_stream)(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=10)
    return bytes(sink.getvalue())


WORDS = pa.table({"text": [f"word {number}" for number in range(100)]})
LONG = zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters(window_log=28)).compressobj()
LONG_WINDOW = LONG.compress(GOOD) + LONG.flush()
TWICE = pa.table([["a"], ["b"]], ["text", "text"])
FAR_AWAY = pa.table({"text": ["a"], "id": pa.array([10**17], pa.timestamp("s"))})
BAD_UTF8 = pa.table({"text": pa.array([b"good", b"\xff\xfe"]).view(pa.string())})

BROKEN: dict[str, tuple[str, bytes, str]] = {
    "bad JSON": ("a.jsonl", GOOD * 5 + b'{"text": "x"\n', "a.jsonl, line 6: bad JSON"),
    "a line that is no object": ("a.jsonl", GOOD + b"[1]\n", "a.jsonl, line 2: the line is no JSON object"),
    "no text key": ("a.jsonl", GOOD + b'{"body": "x"}\n', "line 2: the record has no key 'text', its keys are 'body'"),
    "text that is a number": ("a.jsonl", b'\n\n{"text": 5}\n', "a.jsonl, line 3: 'text' should be text, not 5"),
    "null text": ("a.jsonl", b'{"text": null}\n', "line 1: 'text' should be text, not None"),
    "invalid UTF-8": ("a.jsonl", GOOD + b'{"text": "\xff"}\n', "a.jsonl, line 2: invalid UTF-8"),
    "a lone surrogate": ("a.jsonl", GOOD + b'{"text": "\\ud800"}\n', "a.jsonl, line 2: invalid UTF-8"),
    "bad JSON in zstd": ("a.jsonl.zst", zstandard.compress(GOOD * 9 + b"{\n"), "a.jsonl.zst, line 10: bad JSON"),
    "cut-off zstd": ("a.jsonl.zst", zstandard.compress(GOOD * 999 + INCOMPRESSIBLE)[:-9], "a.jsonl.zst is cut off"),
    "damaged zstd": ("a.jsonl.zst", b"not zstd at all", "a.jsonl.zst is damaged or is not zstd"),
    "empty zstd": ("a.jsonl.zst", b"", "a.jsonl.zst is cut off"),
    "zstd --long": ("a.jsonl.zst", LONG_WINDOW, "a.jsonl.zst was compressed with a window of more than 128 MiB"),
    "cut-off gzip": ("a.jsonl.gz", gzip.compress(GOOD * 999)[:-9], "a.jsonl.gz is cut off"),
    "damaged gzip": ("a.jsonl.gz", b"not gzip at all", "a.jsonl.gz is damaged or is not gzip"),
    "cut-off parquet": ("a.parquet", table_bytes(WORDS, "parquet")[:-20], "a.parquet is no whole parquet file"),
    "parquet without the column": (
        "a.parquet", table_bytes(WORDS.rename_columns(["body"]), "parquet"), "a.parquet has no column 'text'"
    ),
    "Arrow with the column twice": ("a.arrow", table_bytes(TWICE, "file"), "a.arrow has more than one column 'text'"),
    "parquet with the column twice": (
        "a.parquet", table_bytes(TWICE, "parquet"), "a.parquet has more than one column 'text'"
    ),
    "an id too far away": ("a.arrow", table_bytes(FAR_AWAY, "file"), "a.arrow: the column 'id' cannot be read"),
    "parquet of numbers": ("a.parquet", table_bytes(pa.table({"text": [1]}), "parquet"), "'text' holds int64, not"),
    "null in parquet": ("a.parquet", table_bytes(pa.table({"text": ["a", None]}), "parquet"), "row 1: 'text' should"),
    "invalid UTF-8 in parquet": ("a.parquet", table_bytes(BAD_UTF8, "parquet"), "a.parquet, row 1: invalid UTF-8"),
    "invalid UTF-8 in Arrow": ("a.arrow", table_bytes(BAD_UTF8, "file"), "a.arrow, row 1: invalid UTF-8"),
    "cut-off Arrow stream": ("a.arrow", table_bytes(WORDS, "stream")[:-300], "a.arrow is cut off or damaged"),
    "cut-off Arrow file": ("a.arrow", table_bytes(WORDS, "file")[:-20], "a.arrow is cut off or damaged"),
    "no Arrow": ("a.arrow", b"", "a.arrow is empty"),
    "invalid UTF-8 in a text file": ("a.txt", b"good \xff", "a.txt: invalid UTF-8 at byte 5"),
    "a row of CSV too many": ("a.csv", b"text,n\na,1\nb\n", "a.csv is cut off or damaged: CSV parse error: Row #2"),
    "CSV without the column": ("a.csv", b"body\na\n", "a.csv has no column 'text', its columns are 'body'"),
    "cut-off bzip2": ("a.jsonl.bz2", bz2.compress(GOOD * 9)[:-9], "a.jsonl.bz2 is cut off"),
    "damaged xz": ("a.jsonl.xz", b"not xz at all", "a.jsonl.xz is damaged or is not xz"),
    "two arrays": ("a.json", b'[{"text": "a"}] [1]', "a.json is no JSON: something follows its array"),
    "an array of numbers": ("a.json", b'[{"text": "a"}, 1]', "a.json, record 2: the line is no JSON object"),
    "no document at all": ("a.jsonl", b"\n\n", "The input holds no text: no documents in its files."),
    "nothing but empty documents": ("a.jsonl", b'{"text": ""}\n', "The input holds no text: 1 documents"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(BROKEN))
def test_broken_input_is_named_with_its_place(
    case: str, tmp_path: Path, tokenizer_path: Path, run_command: RunCommand
) -> None:
    name, data, message = BROKEN[case]
    (tmp_path / name).write_bytes(data)
    code, out, err = run_command(
        "tokenize", tmp_path / name, "--tokenizer", tokenizer_path, "--out", tmp_path / "out", "--workers", 1
    )
    assert code == 3
    assert message in err
    assert str(tmp_path / name) in err or "no text" in message
    assert "Traceback" not in err
    assert len(err) < 600
    assert out == ""
    assert not list(tmp_path.glob("out/*.json")) or not (tmp_path / "out" / "manifest.json").exists()


def test_the_place_is_right_behind_a_part_border(tmp_path: Path, make_dataset: Callable[..., object]) -> None:
    lines = [GOOD] * 3000
    lines[2345] = b"{\n"
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    with pytest.raises(Exception, match=r"a\.jsonl, line 2346: bad JSON"):
        make_dataset(tmp_path / "a.jsonl", tmp_path / "out", part_bytes=30_000)


def test_usage_errors_are_code_2(tmp_path: Path, tokenizer_path: Path, run_command: RunCommand) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    out = tmp_path / "out"
    missing_tokenizer = ("tokenize", tmp_path / "a.jsonl", "--tokenizer", tmp_path / "none.json", "--out", out)
    broken_tokenizer = ("tokenize", tmp_path / "a.jsonl", "--tokenizer", tmp_path / "a.jsonl", "--out", out)
    unknown_eod = ("tokenize", tmp_path / "a.jsonl", "--tokenizer", tokenizer_path, "--out", out, "--eod-token", "</s>")
    tiny_vocabulary = ("train-tokenizer", tmp_path / "a.jsonl", "--vocab-size", 256, "--out", tmp_path / "t.json")
    for arguments in (missing_tokenizer, broken_tokenizer, unknown_eod, tiny_vocabulary, ("no-such-command",)):
        code, _, err = run_command(*arguments)
        assert code == 2, arguments
        assert "Traceback" not in err
        assert err.strip()
    assert not out.exists()


def test_missing_input_is_code_3(tmp_path: Path, tokenizer_path: Path, run_command: RunCommand) -> None:
    for missing in (tmp_path / "none.jsonl", tmp_path / "*.parquet", "memory://nothing/here.jsonl"):
        code, _, err = run_command("tokenize", missing, "--tokenizer", tokenizer_path, "--out", tmp_path / "out")
        assert code == 3
        assert str(missing) in err
        code, _, _ = run_command("train-tokenizer", missing, "--vocab-size", 300, "--out", tmp_path / "t.json")
        assert code == 3


def test_errors_replace_keeps_what_is_not_utf8(tmp_path: Path, tokenizer_path: Path, run_command: RunCommand) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a\xffb"}\n{"text": "c\\ud800d"}\n{"text": "\xc3\xa9"}\n')
    (tmp_path / "b.txt").write_bytes(b"e\xfff")
    (tmp_path / "c.parquet").write_bytes(table_bytes(BAD_UTF8, "parquet"))
    arguments = ("--tokenizer", tokenizer_path, "--out", tmp_path / "out", "--errors", "replace", "--workers", 1)
    code, _, _ = run_command("tokenize", *(tmp_path / name for name in ("a.jsonl", "b.txt", "c.parquet")), *arguments)
    assert code == 0
    texts = []
    for k in range(open_dataset(tmp_path / "out").num_documents):
        _, out, _ = run_command("inspect", tmp_path / "out", "--document", k, "--json")
        texts.append(orjson.loads(out)["document"]["text"])
    assert texts == ["a\ufffdb", "c\ufffdd", "\u00e9", "e\ufffdf", "good", "\ufffd\ufffd"]


def test_errors_replace_keeps_fields_beside_the_text(tmp_path: Path, run_command: RunCommand) -> None:
    odd = b'"m": {"k\\ud800": ["\\ud800", "\\ud83d\\ude00", "\\\\ud800"]}, "n": 123456789012345678901234567890}\n'
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a\xff", ' + odd + b'{"text": "\\ud800", ' + odd)
    arguments = (tmp_path / "a.jsonl", "--out", tmp_path / "out", "--errors", "replace", "--workers", 1)
    assert run_command("dedup", *arguments)[0] == 0
    with zstandard.open(tmp_path / "out" / "part-000000-000000.jsonl.zst", "rt", encoding="utf-8") as file:
        records = [orjson.loads(line) for line in file]
    assert [record["text"] for record in records] == ["a\ufffd", "\ufffd"]
    for record in records:
        assert record["m"] == {"k\ufffd": ["\ufffd", "\U0001f600", "\\ud800"]}


@pytest.mark.parametrize(
    ("depth", "errors", "message"),
    [
        (100_000, "replace", "a.jsonl, line 2: bad JSON ("),
        (
            300,
            "strict",
            "a.jsonl, row 1 (from 0): the record cannot be written again as JSON: Recursion limit reached.",
        ),
    ],
)
def test_nesting_without_end_is_refused(
    depth: int, errors: str, message: str, tmp_path: Path, run_command: RunCommand
) -> None:
    text = b"\xff" if errors == "replace" else b""
    (tmp_path / "a.jsonl").write_bytes(GOOD + b'{"text": "%s", "m": %s%s}\n' % (text, b"[" * depth, b"]" * depth))
    arguments = (tmp_path / "a.jsonl", "--out", tmp_path / "out", "--errors", errors, "--workers", 1)
    code, _, err = run_command("dedup", *arguments)
    assert (code, message in err, "Traceback" in err) == (3, True, False), err


def test_inputs_may_be_mixed_globbed_nested_and_remote(
    tmp_path: Path, tokenizer_path: Path, run_command: RunCommand
) -> None:
    import fsspec

    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / ".hidden").write_bytes(b"\xff")
    (tmp_path / "in" / "b.jsonl").write_bytes(GOOD)
    (tmp_path / "in" / "deep" / "a.txt").write_bytes(b"text")
    (tmp_path / "x1.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD)
    (tmp_path / "x2.ndjson").write_bytes(GOOD.rstrip())
    with fsspec.open("memory://bucket/r.jsonl", "wb") as file:
        file.write(GOOD * 2)
    code, _, err = run_command(
        "tokenize", tmp_path / "x*.*json*", tmp_path / "in", "memory://bucket/*.jsonl",
        "--tokenizer", tokenizer_path, "--out", tmp_path / "out", "--workers", 1,
    )  # fmt: skip
    assert (code, err) == (0, "Input: 5 files (4 jsonl, 1 text), 136 B.\n")
    dataset = open_dataset(tmp_path / "out")
    infos = [dataset.document_info(k) for k in range(dataset.num_documents)]
    names = [info.source_file.rsplit("/", 1)[-1] for info in infos]
    assert names == ["x1.jsonl", "x2.ndjson", "b.jsonl", "a.txt", "r.jsonl", "r.jsonl"]
    assert [info.id for info in infos[:2]] == ["7", "7"]


def bad_folder(folder: Path) -> list[tuple[str, int]]:
    """A folder of files that have something wrong each, beside five good documents; file and row of all that is."""
    folder.mkdir()
    files: dict[str, tuple[bytes, list[int]]] = {
        "a.jsonl": (GOOD + b"{bad\n" + GOOD + b'{"text": 5}\n', [1, 3]),
        "b.jsonl.gz": (gzip.compress(GOOD + INCOMPRESSIBLE)[:-99], [1]),
        "c.parquet": (table_bytes(BAD_UTF8, "parquet"), [1]),
        "d.parquet": (b"no parquet", [0]),
        "e.csv": (b"text,n\nfine,1\nb\n", [1]),
        "f.json.gz": (b"no gzip", [0]),
        "g.txt": ("utf-16 text".encode("utf-16-le"), [0]),
    }
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    return [(str(folder / name), row) for name, (_, rows) in files.items() for row in rows]


def test_skipped_rows_are_counted_and_listed(tmp_path: Path, tokenizer_path: Path, run_command: RunCommand) -> None:
    bad = bad_folder(tmp_path / "in")
    arguments = (tmp_path / "in", "--errors", "skip", "--workers", 1)
    code, _, err = run_command("tokenize", *arguments, "--tokenizer", tokenizer_path, "--out", tmp_path / "ds")
    assert (code, "8 rows were left out" in err) == (0, True), err
    dataset = open_dataset(tmp_path / "ds")
    assert (dataset.num_documents, dataset.manifest.num_skipped) == (5, len(bad))
    listed = [orjson.loads(line) for line in (tmp_path / "ds" / "skipped.jsonl").read_bytes().splitlines()]
    assert [(each["file"], each["row"]) for each in listed] == bad
    assert all(each["problem"] for each in listed)
    assert run_command("verify", tmp_path / "ds")[0] == 0
    code, shown, _ = run_command("dedup", *arguments, "--out", tmp_path / "clean")
    assert (code, "Skipped, because they could not be read: 8 rows" in shown) == (0, True)
    assert orjson.loads((tmp_path / "clean" / ".report" / "report.json").read_bytes())["skipped"] == len(bad)
    assert (tmp_path / "clean" / ".report" / "skipped.jsonl").read_bytes() == (
        tmp_path / "ds" / "skipped.jsonl"
    ).read_bytes()
    code, _, err = run_command("train-tokenizer", *arguments[:3], "--vocab-size", 300, "--out", tmp_path / "t.json")
    assert (code, "8 rows could not be read and were skipped" in err) == (0, True)
    (tmp_path / "ds" / "skipped.jsonl").write_bytes(b"")
    code, _, err = run_command("verify", tmp_path / "ds")
    assert (code, "skipped.jsonl: its checksum" in err) == (3, True)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_check_lists_every_bad_file_and_writes_nothing(workers: int, tmp_path: Path, run_command: RunCommand) -> None:
    bad = bad_folder(tmp_path / "in")
    arguments = (tmp_path / "in", "--check", "--workers", workers, "--out", tmp_path / "out")
    code, shown, err = run_command("dedup", *arguments)
    assert (code, "7 of 7 files have something that cannot be read, 8 rows in all; 5 documents can" in err) == (3, True)
    assert all(sum(name in line for line in shown.splitlines()) == 1 for name, _ in bad)
    assert "a.jsonl, line 2: bad JSON" in shown and "(2 rows of this file cannot be read.)" in shown
    code, shown, _ = run_command("filter", *arguments, "--filters", "length", "--include", "b*.gz", "--format", "text")
    assert (code, "b.jsonl.gz is cut off" in shown) == (3, True)
    assert not (tmp_path / "out").exists()
    (tmp_path / "good.jsonl").write_bytes(GOOD)
    code, shown, _ = run_command("dedup", tmp_path / "good.jsonl", *arguments[1:])
    assert (code, "All of it can be read: 1 documents." in shown) == (0, True)


def test_check_reports_all_that_is_wrong(tmp_path: Path, run_command: RunCommand) -> None:
    bad_folder(tmp_path / "in")
    (tmp_path / "file").write_bytes(b"")
    inputs = (tmp_path / "in", tmp_path / "missing1", tmp_path / "missing2")
    options = ("--check", "--workers", 1, "--tokenizer", tmp_path / "none.json", "--out", tmp_path / "file" / "out")
    before = sorted(tmp_path.rglob("*"))
    code, shown, err = run_command("tokenize", *inputs, *options)
    assert code == 3
    for words in ("missing1", "missing2", "a.jsonl, line 2", f"{tmp_path / 'file'} is a file", "none.json"):
        assert sum(words in line for line in shown.splitlines()) == 1, words
    assert "7 of 7 files have something that cannot be read" in err
    assert sorted(tmp_path.rglob("*")) == before


def test_check_tries_the_storage_and_its_room(
    tmp_path: Path, run_command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what only some storage lacks, one call at a time fails."""
    (tmp_path / "good.jsonl").write_bytes(GOOD)
    arguments = ("dedup", tmp_path / "good.jsonl", "--check", "--workers", 1, "--out", tmp_path / "new" / "out")
    with small_disk(tmp_path / "disk", 1 << 16) as disk:
        (tmp_path / "long.jsonl").write_bytes(GOOD * 10_000)
        code, _, err = run_command("dedup", tmp_path / "long.jsonl", *arguments[2:-1], disk / "out")
        assert (code, "cannot reserve the" in err, "are free" in err) == (3, True, True), err
        assert list(disk.iterdir()) == []

    def fail(*given: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    for call, step in (
        ("os.fsync", "write and fsync"),
        ("pathlib.Path.rename", "rename"),
        ("os.mkdir", "make a folder"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(call, fail)
            code, _, err = run_command(*arguments)
        assert (code, f"the storage at {tmp_path} cannot {step}: Function not implemented" in err) == (3, True), err
    assert run_command(*arguments)[0] == 0
    assert not list(tmp_path.glob(".megatrain*"))


def test_a_failing_disk_or_store_is_not_skipped(tmp_path: Path) -> None:
    written = {"a.jsonl.gz": gzip.compress(GOOD), "a.txt": GOOD, "a.parquet": table_bytes(WORDS, "parquet")}
    for name, data in written.items():
        (tmp_path / name).write_bytes(data)
        files = find_inputs([str(tmp_path / name)])
        units = list(plan_units(files))
        (tmp_path / name).unlink()
        with pytest.raises(DataError, match=r"cannot be (opened|read): .*No such file"):
            [row for unit in units for part in read_parts(unit, ReadOptions(errors="skip")) for _, row in part.rows]
