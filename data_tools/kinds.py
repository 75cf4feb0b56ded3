"""What an input file is, by its name and its first bytes: the one description that finding, reading and messages use.

To add a kind: a member and its suffixes here, its reader in `readers.READERS`. docs/data.md lists them.
"""

from __future__ import annotations

from enum import Enum


class Kind(str, Enum):
    """How documents or images lie in a file. Those of text are the values of `--format`."""

    JSON_LINES = "jsonl"
    JSON = "json"
    CSV = "csv"
    TSV = "tsv"
    PARQUET = "parquet"
    ARROW = "arrow"
    TEXT = "text"
    IMAGE = "image"
    IDX = "idx"


class Compression(str, Enum):
    """How a file is compressed as a whole."""

    GZIP = "gzip"
    ZSTD = "zstd"
    BZIP2 = "bzip2"
    XZ = "xz"


SUFFIXES = {
    ".jsonl": Kind.JSON_LINES,
    ".ndjson": Kind.JSON_LINES,
    ".json": Kind.JSON,
    ".csv": Kind.CSV,
    ".tsv": Kind.TSV,
    ".parquet": Kind.PARQUET,
    ".arrow": Kind.ARROW,
    ".feather": Kind.ARROW,
    ".txt": Kind.TEXT,
}
COMPRESSIONS = {
    ".gz": Compression.GZIP,
    ".zst": Compression.ZSTD,
    ".bz2": Compression.BZIP2,
    ".xz": Compression.XZ,
}
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".ppm", ".pgm")
WHOLE_FILES = (Kind.TEXT, Kind.IMAGE)
"""A file is one document, or one image."""
STREAMED = (Kind.JSON, Kind.CSV, Kind.TSV, Kind.IDX, *WHOLE_FILES)
"""Read from the beginning to the end, never from the middle; so is whatever is compressed."""
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
WEB = ("http://", "https://")
MIN_HEAD_BYTES = 8
"""Fewer are no file, but some bytes of a text."""

_MAGIC = (
    (0, b"\x1f\x8b", "gzip"),
    (0, b"\x28\xb5\x2f\xfd", "zstd"),
    (0, b"BZh", "bzip2"),
    (0, b"\xfd7zXZ\0", "xz"),
    (0, b"\x04\x22\x4d\x18", "lz4"),
    (0, b"PK\x03\x04", "zip (or docx, xlsx, npz)"),
    (0, b"7z\xbc\xaf\x27\x1c", "7z"),
    (0, b"Rar!\x1a", "rar"),
    (257, b"ustar", "tar"),
    (0, b"PAR1", "parquet"),
    (0, b"ARROW1", "Arrow"),
    (0, b"FEA1", "Feather version 1"),
    (0, b"ORC", "ORC"),
    (0, b"Obj\x01", "Avro"),
    (0, b"\x93NUMPY", "NumPy"),
    (0, b"\x89HDF", "HDF5"),
    (0, b"SQLite format 3\0", "SQLite"),
    (0, b"%PDF-", "PDF"),
    (0, b"\x89PNG", "a PNG image"),
    (0, b"\xff\xd8\xff", "a JPEG image"),
    (0, b"GIF8", "a GIF image"),
    (0, b"II*\0", "a TIFF image"),
    (0, b"MM\0*", "a TIFF image"),
    (0, b"RIFF", "RIFF (WebP, WAV or AVI)"),
    (4, b"ftyp", "MP4"),
    (0, b"\xd0\xcf\x11\xe0", "an old Office document"),
    (0, b"\x80\x04\x95", "a Python pickle"),
    (0, b"\x7fELF", "a program"),
    (0, LFS_POINTER, "a Git LFS pointer and not the file itself, which `git lfs pull` gets"),
    (0, b"\xff\xfe\0\0", "UTF-32 text"),
    (0, b"\0\0\xfe\xff", "UTF-32 text"),
    (0, b"\xff\xfe", "UTF-16 text"),
    (0, b"\xfe\xff", "UTF-16 text"),
)
"""What files that are no text begin with, and where in them."""


def magic_name(head: bytes) -> str | None:
    """What a file is that begins with these bytes, where they tell. Some of them are letters, so text may have them."""
    found = (name for start, magic, name in _MAGIC if head.startswith(magic, start))
    return next(found, None) if len(head) >= MIN_HEAD_BYTES else None


def suffix_of(name: str) -> str:
    """All of a file's suffix that tells what it is, lower case: `.jsonl.gz`, `.md`, or none.

    What a URL asks for behind "?" belongs to no name.
    """
    if name.startswith(WEB):
        name = name.partition("?")[0].partition("#")[0]
    before, last = ["", "", *(f".{part}" for part in name.rsplit("/", 1)[-1].lower().split(".")[1:])][-2:]
    return before + last if last in COMPRESSIONS else last


def kind_of(name: str) -> tuple[Kind | None, Compression | None]:
    """What a file's name says that it holds (None where it is not known), and how it is compressed."""
    suffix = suffix_of(name)
    compression = next((found for end, found in COMPRESSIONS.items() if suffix.endswith(end)), None)
    return SUFFIXES.get(suffix.rpartition(".")[0] if compression else suffix), compression
