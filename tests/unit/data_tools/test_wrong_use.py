"""What a command line can get wrong ends with its exit code and one sentence, and harms no file."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_samples import MakeDataset, RunCommand, folder_bytes

from data_tools.inputs import find_inputs
from data_tools.outputs import disk_full_as_data_error
from megatrain.errors import DataError

GOOD = b'{"text": "good, and some more of it"}\n'


def commands(source: object, out: object, tokenizer: object) -> list[tuple[object, ...]]:
    return [
        ("train-tokenizer", source, "--vocab-size", 260, "--out", out),
        ("tokenize", source, "--tokenizer", tokenizer, "--out", out),
        ("dedup", source, "--out", out),
        ("filter", source, "--filters", "length", "--out", out),
    ]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder of input."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(GOOD)
    return tmp_path / "in"


def test_nothing_is_written_over_or_among_the_inputs(
    source: Path, tokenizer_path: Path, run_command: RunCommand
) -> None:
    before = folder_bytes(source.parent)
    (source.parent / "link").symlink_to(source)
    cases = [(source / "a.jsonl", source / "a.jsonl"), (source, source / "out"), (source.parent / "link", source / "o")]
    for given, out in cases:
        for arguments in commands(given, out, tokenizer_path):
            code, _, err = run_command(*arguments)
            assert (code, str(out) in err) == (2, True), arguments
    assert folder_bytes(source.parent) == before


def test_restart_does_not_remove_its_own_input(source: Path, run_command: RunCommand) -> None:
    out = source.parent / "out"
    assert run_command("dedup", source, "--out", out, "--workers", 1)[0] == 0
    before = folder_bytes(out)
    code, _, err = run_command("dedup", out / "*.zst", "--out", out, "--restart")
    assert (code, "holds, the input" in err) == (2, True)
    assert folder_bytes(out) == before


def test_addresses_and_empty_paths_are_refused_as_output(
    source: Path, tokenizer_path: Path, run_command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(source.parent)
    for out, message in (("s3://bucket/out", "needs a local path"), ("", "empty text")):
        for arguments in [*commands(source, out, tokenizer_path), ("corpus", out)]:
            code, _, err = run_command(*arguments)
            assert (code, message in err) == (2, True), arguments
    assert list(source.parent.iterdir()) == [source]


def test_an_empty_text_is_no_input(tmp_path: Path, tokenizer_path: Path, run_command: RunCommand) -> None:
    for arguments in commands("", tmp_path / "out", tokenizer_path):
        code, _, err = run_command(*arguments)
        assert (code, "empty text" in err) == (2, True), arguments


@contextmanager
def powerless() -> Iterator[None]:
    """As root, whom no permission stops, be nobody."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


def test_an_unreadable_folder_is_named_not_skipped() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders let nobody else in
        folder = Path(name)
        (folder / "closed").mkdir()
        (folder / "a.txt").write_text("good")
        (folder / "closed" / "b.txt").write_text("left out")
        folder.chmod(0o755)
        (folder / "closed").chmod(0)
        try:
            for given in (folder, folder / "closed"):
                with powerless(), pytest.raises(DataError, match=r"closed cannot be read: Permission denied"):
                    find_inputs([str(given)])
        finally:
            (folder / "closed").chmod(0o700)


def test_missing_store_credentials_are_an_access_error(
    tmp_path: Path, tokenizer_path: Path, run_command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    class NoCredentialsError(Exception):
        """As botocore's: no OSError."""

    class Store(fsspec.AbstractFileSystem):  # type: ignore[misc]
        """A driver with exceptions of its own."""

        protocol = "closedstore"

        def info(self, path: str, **options: object) -> dict[str, object]:
            """Needs credentials."""
            raise NoCredentialsError("Unable to locate credentials")

    fsspec.register_implementation("closedstore", Store, clobber=True)
    for arguments in commands("closedstore://bucket/x", tmp_path / "out", tokenizer_path):
        code, _, err = run_command(*arguments)
        assert code == 3
        assert "closedstore://bucket/x cannot be listed: Unable to locate credentials. Check the address" in err


@pytest.mark.parametrize("method", ["exact", "minhash"])
def test_dedup_of_no_documents_is_an_empty_result(tmp_path: Path, method: str, run_command: RunCommand) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"")
    for groups, name in ((True, "rows.parquet"), (False, "groups.parquet")):
        with pq.ParquetWriter(tmp_path / name, pa.schema([("text", pa.string())])) as writer:
            if groups:
                writer.write_table(pa.table({"text": pa.array([], pa.string())}))
    for name in ("a.jsonl", "rows.parquet", "groups.parquet"):
        out = tmp_path / f"out-{name}"
        code, said, _ = run_command("dedup", tmp_path / name, "--out", out, "--method", method, "--workers", 1)
        assert (code, "Kept: 0" in said) == (0, True)
        assert (out / ".report" / "report.json").is_file()


def test_a_tokenizer_needs_text(tmp_path: Path, run_command: RunCommand) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": ""}\n')
    code, _, err = run_command("train-tokenizer", tmp_path / "a.jsonl", "--vocab-size", 300, "--out", tmp_path / "t")
    assert (code, "The input holds no text: 1 documents" in err) == (3, True)
    assert not (tmp_path / "t").exists()


def test_a_dataset_without_its_tokenizer_names_it(
    source: Path, make_dataset: MakeDataset, run_command: RunCommand
) -> None:
    dataset = source.parent / "data"
    make_dataset(source, dataset)
    for damage in (lambda path: path.write_text("{}"), lambda path: path.unlink()):
        damage(dataset / "tokenizer.json")
        for command in ("inspect", "stats"):
            code, _, err = run_command(command, dataset)
            assert (code, f"{dataset}/tokenizer.json cannot be read as a tokenizer.json" in err) == (3, True)


def test_a_token_that_text_becomes_cannot_end_documents(
    source: Path, tokenizer_path: Path, tmp_path: Path, run_command: RunCommand
) -> None:
    arguments = ("--tokenizer", tokenizer_path, "--out", tmp_path / "out", "--eod-token", "e")
    code, _, err = run_command("tokenize", source, *arguments)
    assert (code, "Traceback" in err) == (2, False)
    assert f"--eod-token 'e' of {tokenizer_path} is a token that text becomes" in err
    assert "its control tokens are <|endoftext|>" in err
    assert not (tmp_path / "out").exists()


def test_numbers_beyond_reason_are_refused(source: Path, tokenizer_path: Path, run_command: RunCommand) -> None:
    train, tokenize, dedup, _ = commands(source, source.parent / "out", tokenizer_path)
    for arguments in (
        (*train, "--vocab-size", 2**31 + 1),
        (*tokenize, "--shard-tokens", 2**63),
        (*tokenize, "--workers", 5000),
        (*dedup, "--workers", 5000),
    ):
        assert run_command(*arguments)[0] == 2, arguments
    assert not (source.parent / "out").exists()


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"No room for {tmp_path}: No space left .* the same command again"):  # noqa: SIM117
        with disk_full_as_data_error(tmp_path), Path("/dev/full").open("wb", buffering=0) as full:
            full.write(b"x")


def test_a_closed_pipe_ends_in_silence(source: Path, make_dataset: MakeDataset) -> None:
    make_dataset(source, source.parent / "data")
    for options in ([], ["--json"]):
        reader, writer = os.pipe()
        os.close(reader)
        command = [sys.executable, "-m", "data_tools", "inspect", str(source.parent / "data"), *options]
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
        os.close(writer)
        assert (done.returncode, done.stderr) == (141, "")


def test_unknown_filters_are_named_in_one_line(source: Path, run_command: RunCommand) -> None:
    config = source.parent / "filters.yaml"
    for text, message in (
        ("language: {keep: [en, xx]}", "language.keep: there is no language 'xx'; known are ace, af, am"),
        ("length:\n  a: [\nb", f"{config}, line 3, column 2: no YAML: expected"),
    ):
        config.write_text(text)
        code, _, err = run_command("filter", source, "--config", config, "--out", source.parent / "out")
        assert (code, message in err) == (2, True)
        assert len(err.splitlines()) == 1


def test_errors_state_place_and_remedy_once(source: Path, make_dataset: MakeDataset, run_command: RunCommand) -> None:
    dataset = source.parent / "data"
    make_dataset(source, dataset)
    (dataset / "shard-000000.arrow").unlink()
    code, _, err = run_command("verify", dataset)
    assert (code, err.count("Copy"), "Errno" in err) == (3, 1, False)
    assert "shard-000000.arrow cannot be read: No such file or directory. Copy these files again" in err
    (source / "a.jsonl").write_bytes(GOOD + b'{"text": "x", }\n')
    (source / "b.parquet").write_bytes(b"x" * 99)
    for name, message in (("a.jsonl", "a.jsonl, line 2: bad JSON (trailing comma"), ("b.parquet", "parquet file.")):
        code, _, err = run_command("dedup", source / name, "--out", source.parent / f"out-{name}")
        assert (code, message in err, "line 1" in err, ".." in err) == (3, True, False, False)


@pytest.mark.filterwarnings("error")
def test_a_picture_has_the_format_of_its_extension(
    source: Path, make_dataset: MakeDataset, run_command: RunCommand
) -> None:
    dataset = source.parent / "data"
    (source / "a.jsonl").rename(source / "\u4e2d$_x$.jsonl")  # what the font lacks, and mathematics to matplotlib
    make_dataset(source, dataset)
    before = sorted(source.parent.iterdir())
    for name in ("x", "x.eps", "x.jpg"):
        code, _, err = run_command("stats", dataset, "--plot", source.parent / name)
        assert (code, ".png, .svg, .pdf" in err) == (2, True)
    assert sorted(source.parent.iterdir()) == before
    code, out, err = run_command("stats", dataset, "--plot", source.parent / "x.svg")
    assert (code, f"The picture: {source.parent}/x.svg" in out, err) == (0, True, "")
    assert b"<svg" in (source.parent / "x.svg").read_bytes()
