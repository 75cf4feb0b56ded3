"""Which files an input names: known kinds of a folder, whatever a glob matches, and nothing in silence."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from clean_samples import read_records, run_dedup, write_records
from data_samples import MakeDataset, RunCommand

from data_tools.inputs import FileSelector, InputFile, find_inputs
from data_tools.kinds import Kind
from data_tools.readers import plan_units, read_parts
from data_tools.units import ReadOptions, Record
from megatrain.data import open_dataset
from megatrain.errors import ConfigError, DataError
from tests.traced import needs_strace

LINE = b'{"text": "hello world", "id": "a"}\n'
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256))


def found(*arguments: object, **selection: object) -> tuple[list[tuple[str, str]], str]:
    """Name and kind of each file, and what was said of them."""
    said: list[str] = []
    files = find_inputs(list(map(str, arguments)), FileSelector(**selection), say=said.append)  # type: ignore[arg-type]
    return [(Path(file.name).name, file.kind.value) for file in files], said[0]


def rows(path: Path, **options: str) -> list[tuple[str, str | None]]:
    """Text and id of each record."""
    read = ReadOptions(**options)  # type: ignore[arg-type]
    units = plan_units(find_inputs([str(path)], text_key=read.text_key), 1000)
    records = [row for unit in units for part in read_parts(unit, read) for _, row in part.rows]
    return [(record.text, record.id) for record in records if isinstance(record, Record)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """What lies in a folder beside its documents: metadata of `datasets`, Spark's marks, a README, an archive."""
    folder = tmp_path / "corpus"
    (folder / "sub" / "deep").mkdir(parents=True)
    (folder / "part-0.json").write_bytes(LINE * 3)
    (folder / "array.json").write_text(json.dumps([{"text": "one"}, {"text": "two", "n": [{"m": 1}]}], indent=2))
    (folder / "record.json").write_text(json.dumps({"text": "a single record"}, indent=2))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}, indent=2))
    (folder / "dataset_dict.json").write_text('{"splits": ["train"]}')
    (folder / "sub" / "rows.csv").write_text('id,text\n1,"a, b"\n2,"x\ny"\n')
    (folder / "sub" / "deep" / "notes.txt").write_text("notes")
    for name in ("README.md", "_SUCCESS", "image.tar", "a.unknown"):
        (folder / name).write_bytes(b"no document")
    return folder


KNOWN = [
    *[("array.json", "json"), ("part-0.json", "jsonl"), ("record.json", "json")],
    *[("notes.txt", "text"), ("rows.csv", "csv")],
]


@pytest.mark.parametrize("pattern", ["{}", "{}/*", "{}/**", "file://{}", "file://{}/*", "{}/**/*"])
def test_folders_give_known_kinds_and_tell_the_rest(pattern: str, corpus: Path) -> None:
    files, said = found(pattern.format(corpus))
    assert files == KNOWN
    assert said.startswith("Input: 5 files (1 csv, 2 json, 1 jsonl, 1 text), 271 B. Passed over: 2 .json (an object ")
    assert "1 .md, 1 .tar, 1 .unknown, 1 without a suffix." in said


def test_a_store_is_searched_like_a_folder(corpus: Path) -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    store.put(str(corpus), "/inputs", recursive=True)
    for argument in ("memory://inputs", "memory://inputs/*", "memory://inputs/**"):
        assert found(argument)[0] == KNOWN


def test_other_text_has_to_be_named(corpus: Path) -> None:
    assert found(corpus / "*.md")[0] == [("README.md", "text")]
    assert found(corpus / "README.md")[0] == [("README.md", "text")]
    assert [name for name, _ in found(corpus, include=("*.md", "sub/*"))[0]] == ["README.md", "notes.txt", "rows.csv"]
    assert ("a.unknown", "text") in found(corpus, text_files=True)[0]
    files, said = found(corpus, exclude=("*.json", "deep/*"))
    assert (files, "5 .json (by" in said, "--text-files" in said) == ([("rows.csv", "csv")], True, True)
    assert {kind for _, kind in found(corpus / "sub", format=Kind.TEXT)[0]} == {"text"}
    with pytest.raises(DataError, match=r"names no file that is read\. Passed over: 1 \.csv \(by .* 5 \.json"):
        found(corpus, include=("*.jsonl",))


def test_folder_links_and_duplicate_files_are_reported(corpus: Path) -> None:
    (corpus / "linked").symlink_to(corpus / "sub")
    files, said = found(corpus, f"{corpus}/sub", exclude=("*.md", "*.tar", "*.unknown", "_SUCCESS"))
    assert (len(files), "1 link to a folder (name it" in said) == (7, True)
    assert ("names them: 2." in said, "--text-files" in said) == (True, False)
    assert len(found(corpus / "linked")[0]) == 2


def test_names_are_names_whatever_is_in_them(tmp_path: Path, run_command: RunCommand, tokenizer_path: Path) -> None:
    import fsspec

    names = ["a::b.jsonl", "x[1].jsonl", "s*.jsonl", "q?.jsonl"]
    store = fsspec.filesystem("memory")
    for name in names:
        store.pipe(f"/names/{name}", LINE)
        (tmp_path / name).write_bytes(LINE)
    given = [f"{place}/{name}" for place in ("memory://names", tmp_path, f"file://{tmp_path}") for name in names]
    arguments = ("--tokenizer", tokenizer_path, "--out", tmp_path / "out", "--workers", 1)
    assert run_command("tokenize", *given, *arguments)[0] == 0
    assert open_dataset(tmp_path / "out").num_documents == len(given)
    assert len(found("memory://names")[0]) == len(names)


TABLE = pa.table({"text": ["a, b", "x\ny"], "id": ["1", "2"]})
FORMS: dict[str, Callable[[Path], object]] = {
    "a.csv": lambda path: path.write_text('id,text,n\n1,"a, b",\n2,"x\ny",3\n'),
    "b.csv": lambda path: path.write_bytes(b'id,text\r1,"a, b"\r\r2,"x\ny"'),
    "a.tsv.gz": lambda path: path.write_bytes(gzip.compress(b'id\ttext\n1\ta, b\n2\t"x\ny"\n')),
    "a.jsonl.bz2": lambda path: path.write_bytes(b"".join(bz2.compress(line) for line in LINES)),
    "a.json.xz": lambda path: path.write_bytes(lzma.compress(b"".join(LINES))),
    "a.json": lambda path: path.write_bytes(b"\xef\xbb\xbf [" + b",\r\n".join(LINES) + b"]\n"),
    "b.json": lambda path: path.write_text("\n".join(json.dumps(json.loads(line), indent=1) for line in LINES)),
    "a.json.zst": lambda path: path.write_bytes(__import__("zstandard").compress(b"[" + b",".join(LINES) + b"]")),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES[0]) + bytes(99) + gzip.compress(LINES[1]) + b"end"),
    "a.feather": lambda path: __import__("pyarrow.feather").feather.write_feather(TABLE, str(path)),
    "bytes.parquet": lambda path: pq.write_table(TABLE.cast(pa.schema([("text", "binary"), ("id", "binary")])), path),
}
LINES = [b'{"text": "a, b", "id": "1"}\n', b'{"text": "x\\ny", "id": "2"}\n']


@pytest.mark.parametrize("name", list(FORMS))
def test_every_form_gives_the_same_documents(name: str, tmp_path: Path) -> None:
    FORMS[name](tmp_path / name)
    assert rows(tmp_path / name) == [("a, b", "1"), ("x\ny", "2")]


def test_long_arrays_keep_every_row(tmp_path: Path) -> None:
    texts = [f"{number} " + "]},{[" * (number % 50) for number in range(500)]
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in texts], indent=4))
    assert [text for text, _ in rows(tmp_path / "a.json")] == texts
    with pytest.raises(DataError, match=r"a\.json is cut off"):
        (tmp_path / "a.json").write_bytes((tmp_path / "a.json").read_bytes()[:-20])
        rows(tmp_path / "a.json")


def test_a_long_tail_of_gzip_is_damage(tmp_path: Path) -> None:
    for tail in (bytes(5) + b"x" * 70_000, b"xx" + gzip.compress(LINE)):
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINE) + tail)
        with pytest.raises(DataError, match="something else follows"):
            rows(tmp_path / "a.jsonl.gz")


def test_text_lies_in_nested_keys_too(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"doc": {"text": "j", "k": 1}, "meta": {"id": "x"}}\n{"doc.text": "dotted", "doc": {"text": "no"}}\n'
    )
    table = pa.table({"doc": [{"text": "p", "k": 1}], "meta": [{"id": "y"}]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    keys = {"text_key": "doc.text", "id_key": "meta.id"}
    assert rows(tmp_path / "a.jsonl", **keys) == [("j", "x"), ("dotted", None)]
    assert rows(tmp_path / "a.parquet", **keys) == rows(tmp_path / "a.arrow", **keys) == [("p", "y")]
    with pytest.raises(DataError, match="column 'doc' has no field 'body'"):
        rows(tmp_path / "a.parquet", text_key="doc.body")
    run_dedup(tmp_path / "a.parquet", tmp_path / "out", read=ReadOptions("doc.text", "meta.id", whole_records=True))
    record = read_records(tmp_path / "out")[0]
    assert (record["text"], record["id"], record["doc"], record["meta"]) == ("p", "y", {"k": 1}, {})


NO_TEXT = {
    "image.txt": (PNG, "a PNG image"),
    "lines.jsonl": (bz2.compress(LINE * 9), "line 1: this is bzip2"),
    "table.parquet": (gzip.compress(LINE), "is gzip, not parquet"),
    "open.csv": (b'id,text\n1,a\n2,"b\n3,c\n', "a quote in it does not end"),
    "part-00000": (LINE * 2, "Give --format jsonl, or text"),
    "pointer.txt": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer"),
    "rows.csv": (b"PK\x03\x04" + bytes(60), "zip (or docx, xlsx, npz), not csv"),
    "lines.json": (PNG + b"\n" * 9, "a PNG image"),
    "old.feather": (b"FEA1" + bytes(60), "Feather version 1, not arrow"),
    "zip.jsonl.gz": (b"PK\x03\x04" + bytes(60), "zip (or docx, xlsx, npz), not gzip"),
    "page.md": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n" + bytes(60), "PDF"),
    "latin.txt": ("hello, world".encode("utf-16-le"), "UTF-16 without a byte order mark"),
    "cyrillic.txt": ("Это — текст, и мир".encode("utf-16-be"), "UTF-16 without a byte order mark"),
    "marked.txt": ("hello".encode("utf-16"), "UTF-16 text"),
    "nul.jsonl": (b'{"text": "' + b"ab\\u0000" * 30 + b'"}\n', "U+FFFD or NUL"),
    "bytes.txt": ("эта кодировка не UTF-8".encode("cp1251"), "UTF-8"),
}


@pytest.mark.parametrize("name", list(NO_TEXT))
def test_what_is_no_text_is_named_and_refused(name: str, tmp_path: Path, run_command: RunCommand) -> None:
    data, message = NO_TEXT[name]
    (tmp_path / name).write_bytes(data)
    for errors in ("strict", "replace"):
        arguments = (tmp_path / name, "--out", tmp_path / errors, "--errors", errors, "--workers", 1)
        code, _, err = run_command("dedup", *arguments)
        assert (code, message in err, name in err) == (3, True, True), err


def test_a_replaced_input_is_never_taken_for_done(tmp_path: Path, make_dataset: MakeDataset) -> None:
    source, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    other.write_bytes(LINE.replace(b"hello", b"other"))
    os.utime(other, (1, 1))
    for again in (lambda: make_dataset(source, tmp_path / "ds"), lambda: run_dedup(source, tmp_path / "out")):
        source.write_bytes(LINE)
        again()
        again()  # the same command over the same file is done
        source.unlink()
        os.link(other, source)
        with pytest.raises(ConfigError, match="was changed"):
            again()
        source.unlink()
    link = tmp_path / "link.jsonl"
    link.symlink_to(other)
    first = find_inputs([str(link)])[0]
    source.write_bytes(LINE)
    os.utime(source, (1, 1))
    link.unlink()
    link.symlink_to(source)
    assert find_inputs([str(link)])[0].key != first.key
    assert find_inputs([f"file://{source}"])[0].version == find_inputs([str(source)])[0].version


def test_an_input_replaced_halfway_is_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_records(tmp_path / "a.jsonl", ["one", "one", "two"])
    with monkeypatch.context() as patch:
        patch.setattr("data_tools.clean.job.render", lambda *_: 1 / 0)  # when all has been written
        with pytest.raises(ZeroDivisionError):
            run_dedup(source, tmp_path / "out")
    assert list((tmp_path / "out" / ".work").rglob("part-*"))
    write_records(tmp_path / "a.jsonl", ["two", "two", "one"])
    assert run_dedup(source, tmp_path / "out")["kept"] == 2
    assert [record["text"] for record in read_records(tmp_path / "out")] == ["two", "one"]


def test_many_small_row_groups_are_read_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pa.table({"text": [f"row {number}" for number in range(3000)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    opened: list[object] = []
    real = pq.ParquetFile
    monkeypatch.setattr(
        pq, "ParquetFile", lambda *given, **more: opened.append(more["metadata"]) or real(*given, **more)
    )
    files = find_inputs([str(tmp_path / "a.parquet")])
    units = list(plan_units(files, 10_000))
    assert 5 < len(units) < 40
    texts = [row.text for unit in units for part in read_parts(unit, ReadOptions()) for _, row in part.rows]  # type: ignore[union-attr]
    assert texts == table["text"].to_pylist()
    assert opened.count(None) == 1  # the footer was parsed once
    assert len(list(plan_units(files))) == 1


def test_many_small_files_are_read_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number:02}.jsonl").write_bytes(b"\n" * (number % 3) + LINE.replace(b"hello", b"%d" % number) * 2)
    (folder / "20.jsonl").write_bytes(LINE + b"{bad")
    for number, write in enumerate(FORMS.values(), 21):
        write(folder / f"{number}.{list(FORMS)[number - 21].partition('.')[2]}")
    results = []
    for min_files in (16, 1 << 30):
        monkeypatch.setattr("data_tools.readers.MIN_FILES", min_files)
        units = list(plan_units(find_inputs([str(folder)])))
        assert (len(units) == 1) is (min_files == 16)
        out = tmp_path / str(min_files)
        run_dedup(folder, out, part_bytes=1 << 24, read=ReadOptions(errors="skip", whole_records=True))
        results.append((read_records(out), (out / ".report" / "skipped.jsonl").read_bytes()))
    assert results[0] == results[1]
    assert json.loads(results[0][1])["row"] == 1


def test_home_is_resolved_in_inputs_and_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_command: RunCommand
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_records(tmp_path / "a.jsonl", ["one"])
    assert run_command("dedup", "~/*.jsonl", "--out", "~/out", "--workers", 1)[0] == 0
    assert read_records(tmp_path / "out")[0]["source"] == str(tmp_path / "a.jsonl")


def test_a_file_address_is_kept_from_being_overwritten(tmp_path: Path, run_command: RunCommand) -> None:
    write_records(tmp_path / "a.jsonl", ["one"])
    code, _, err = run_command("dedup", f"file://{tmp_path}", "--out", tmp_path / "out")
    assert (code, "lies in the input folder" in err) == (2, True)


def test_an_input_file_knows_its_compression() -> None:
    names = {"a.JSONL.GZ": "gzip", "a.json.zst": "zstd", "a.csv.bz2": "bzip2", "a.txt.xz": "xz", "a.jsonl": None}
    assert {name: InputFile(name, 0, "", Kind.TEXT).compression for name in names} == names


def test_a_copy_with_its_times_is_the_same(tmp_path: Path) -> None:
    """As after a remount, which gives other inodes."""
    path, copy = tmp_path / "a.jsonl", tmp_path / "copy"
    path.write_bytes(LINE)
    before = find_inputs([str(path)])[0].key
    shutil.copy2(path, copy)
    copy.rename(path)
    assert find_inputs([str(path)])[0].key == before
    os.utime(path)
    assert find_inputs([str(path)])[0].key != before


@needs_strace
def test_a_stale_handle_is_opened_once_more(tmp_path: Path) -> None:
    """strace answers ESTALE, as an NFS client does once the server has put another file in its place."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(b"%07d\n" % number for number in range(100_000)))
    read = (
        "import sys; from data_tools.inputs import open_input; sys.stdout.buffer.write(open_input(sys.argv[1]).read())"
    )
    for call, when, code in (("read", "5", 0), ("openat", "1", 0), ("read", "5..6", 1)):
        strace = [
            "strace",
            "-o",
            str(tmp_path / "trace"),
            "-P",
            str(path),
            "-e",
            f"inject={call}:error=ESTALE:when={when}",
        ]
        ended = subprocess.run([*strace, sys.executable, "-c", read, str(path)], capture_output=True)
        assert ended.returncode == code, ended.stderr
        assert ended.stdout == (b"" if code else path.read_bytes())
        assert "ESTALE" in (tmp_path / "trace").read_text()
