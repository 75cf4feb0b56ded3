from __future__ import annotations

from pathlib import Path

import orjson
import pytest
import xxhash
from checkpoint_samples import manifest

from megatrain.checkpoint.manifest import FileEntry, read_manifest
from megatrain.errors import CheckpointError

ENTRY = FileEntry(file="rank-00000.safetensors", bytes=10, checksum="00")


def _signed(body: dict[str, object]) -> bytes:
    return orjson.dumps(
        {**body, "checksum": xxhash.xxh3_128(orjson.dumps(body)).hexdigest()},
        option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE,
    )


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = manifest(12, [ENTRY])
    (tmp_path / "manifest.json").write_bytes(written.encode())
    assert read_manifest(tmp_path) == written


def test_one_of_an_older_version_is_read(tmp_path: Path) -> None:
    written = manifest(12, [ENTRY])
    (tmp_path / "manifest.json").write_bytes(_signed(written.model_dump(mode="json", exclude={"special_tokens"})))
    assert read_manifest(tmp_path) == written


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b'"text"',
        b"[" * 100_000,
        b'{"checksum": "x"}',
        b"\xff\xfe",
        b"1e999",
        b'{"step": 1',
        b"\x80\x04\x95pickle",
    ],
)
def test_a_file_that_is_no_manifest_is_refused(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("step", -1), ("step", "1"), ("step", True), ("tokens", 1.5), ("files", {}), ("config", None), ("extra", 1)],
)
def test_a_wrong_type_is_refused_despite_the_checksum(key: str, value: object, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(_signed({**manifest(1, [ENTRY]).model_dump(mode="json"), key: value}))
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/b", "", ".", "..", "a\0b"])
def test_a_file_outside_of_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    body = manifest(1, [ENTRY]).model_dump(mode="json")
    body["files"][0]["file"] = name
    (tmp_path / "manifest.json").write_bytes(_signed(body))
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        read_manifest(tmp_path)


def test_a_later_format_is_named(tmp_path: Path) -> None:
    body = {**manifest(1, [ENTRY]).model_dump(mode="json"), "format_version": 2}
    (tmp_path / "manifest.json").write_bytes(_signed(body))
    with pytest.raises(CheckpointError, match="format version 2; this megatrain reads 1"):
        read_manifest(tmp_path)


def test_a_file_that_is_listed_twice_is_refused(tmp_path: Path) -> None:
    body = manifest(1, [ENTRY]).model_dump(mode="json")
    body["files"] *= 2
    (tmp_path / "manifest.json").write_bytes(_signed(body))
    with pytest.raises(CheckpointError, match=r"manifest\.json is not a manifest: files: .* a file is listed twice"):
        read_manifest(tmp_path)
