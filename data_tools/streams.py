"""The bytes of a file from its beginning to its end, decompressed."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

import zstandard

from data_tools.inputs import InputFile, misnamed
from data_tools.kinds import Compression
from data_tools.units import BadInput
from megatrain.errors import DataError

BLOCK_BYTES = 1 << 20
MAX_TAIL_BYTES = 1 << 16
MAX_WINDOW_BYTES = 1 << 28


class _Format(NamedTuple):
    """How a compression is undone."""

    decompressor: Callable[[], Any]
    magic: bytes
    """With which each of its members begins; what follows the last one is left alone, as by its own tool."""
    piece_bytes: int = 1 << 12
    """Decompressed at once: a small piece bounds what it can blow up to."""


_FORMATS = {
    Compression.GZIP: _Format(lambda: zlib.decompressobj(wbits=31), b"\x1f\x8b\x08"),
    Compression.ZSTD: _Format(lambda: zstandard.ZstdDecompressor().decompressobj(), b""),
    Compression.BZIP2: _Format(bz2.BZ2Decompressor, b"BZh", 1 << 6),
    Compression.XZ: _Format(lambda: lzma.LZMADecompressor(memlimit=MAX_WINDOW_BYTES), b"\xfd7zXZ"),
}


def read_blocks(file: InputFile, advance: Callable[[int], None] = lambda _: None) -> Iterator[bytes]:
    """The bytes of the file, decompressed; `advance` is called with the number of bytes read.

    Raises BadInput where they are cut off or damaged, DataError where the disk or the store fails.
    """
    with file.open() as raw:
        pieces = _pieces(file, raw, _FORMATS[file.compression].piece_bytes if file.compression else BLOCK_BYTES)
        for block in _decompressed(file, pieces, advance) if file.compression else pieces:
            if not file.compression:
                advance(len(block))
            yield block


def _pieces(file: InputFile, raw: IO[bytes], num_bytes: int) -> Iterator[bytes]:
    try:
        while piece := raw.read(num_bytes):
            yield piece
    except OSError as error:
        raise DataError(f"{file.name} cannot be read: {error.strerror or error}.") from None


def _decompressed(file: InputFile, pieces: Iterator[bytes], advance: Callable[[int], None]) -> Iterator[bytes]:
    assert file.compression is not None
    form = _FORMATS[file.compression]
    member = form.decompressor()
    for piece in pieces:
        advance(len(piece))
        while piece:
            if member.eof:
                piece = _next_member(file, piece, pieces, form.magic)
                if not piece:
                    break
                member = form.decompressor()
            try:
                block = member.decompress(piece)
            except (OSError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
                raise BadInput(_damage(file, error)) from None
            piece = member.unused_data if member.eof else b""
            if block:
                yield block
    if not member.eof:
        raise BadInput(
            f"{file.name} is cut off: its last {file.compression.value} member does not end. Download or compress it "
            "again."
        )


def _next_member(file: InputFile, piece: bytes, pieces: Iterator[bytes], magic: bytes) -> bytes:
    """What follows a whole member: the next, behind zeros perhaps; nothing where it is a short tail of something else.

    A long tail, or one with the beginning of a member in it, is damage: a text would be lost.
    """
    piece = piece.lstrip(b"\0") if magic else piece
    while piece and len(piece) < len(magic) and (more := next(pieces, b"")):
        piece += more
    if not piece or piece.startswith(magic):
        return piece
    while len(piece) <= MAX_TAIL_BYTES and (more := next(pieces, b"")):
        piece += more
    if len(piece) > MAX_TAIL_BYTES or magic in piece:
        raise BadInput(_damage(file, "something else follows what was decompressed so far"))
    return b""


def _damage(file: InputFile, problem: object) -> str:
    assert file.compression is not None
    if "too much memory" in str(problem) or "Memory usage limit" in str(problem):
        return (
            f"{file.name} was compressed with a window of more than 128 MiB (zstd --long, xz), which takes as much "
            "memory to read. Compress it again without."
        )
    damaged = f"{file.name} is damaged or is not {file.compression.value}: {problem}. Download or compress it again."
    return misnamed(file, file.compression.value) or damaged
