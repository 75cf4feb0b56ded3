"""Which files an INPUT argument names, in which order, and what each of them is."""

from __future__ import annotations

import glob
import io
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import xxhash

from megatrain.errors import ConfigError, DataError


class Kind(Enum):
    """How documents lie in a file."""

    JSON_LINES = "jsonl"
    PARQUET = "parquet"
    ARROW = "arrow"
    TEXT = "text"


SUFFIXES = {
    ".jsonl": Kind.JSON_LINES,
    ".ndjson": Kind.JSON_LINES,
    ".parquet": Kind.PARQUET,
    ".arrow": Kind.ARROW,
}
COMPRESSED = {**SUFFIXES, ".json": Kind.JSON_LINES}
"""C4 and Dolma name their compressed JSON lines so; a .json by itself is one text, like any other source file."""
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
KNOWN = {*SUFFIXES, *COMPRESSIONS}
WEB = ("http://", "https://")

T = TypeVar("T")


@dataclass(frozen=True)
class InputFile:
    """One file, by the name the user gave it (its folder's or pattern's name included)."""

    name: str
    num_bytes: int
    version: str
    """Changes when the content does, as far as the file system tells: a modification time or an ETag."""

    @property
    def compression(self) -> str | None:
        """`gzip`, `zstd` or None, by the last suffix."""
        return COMPRESSIONS.get(_suffixes(self.name)[-1])

    @property
    def kind(self) -> Kind:
        """By the suffix before the compression's; anything unknown is a text file."""
        before, last = _suffixes(self.name)
        return COMPRESSED.get(before, Kind.TEXT) if self.compression else SUFFIXES.get(last, Kind.TEXT)

    @property
    def key(self) -> str:
        """Names this version of this file."""
        return xxhash.xxh3_128_hexdigest("\0".join([self.name, str(self.num_bytes), self.version]).encode())

    @property
    def is_streamed(self) -> bool:
        """Whether it is read from its beginning to its end, and never from the middle."""
        return self.compression is not None or self.kind is Kind.TEXT

    @property
    def is_remote(self) -> bool:
        """Whether the name is an fsspec URL."""
        return "://" in self.name

    def open(self) -> IO[bytes]:
        """The raw bytes of the file. Raises DataError where it cannot be opened."""
        try:
            if not self.is_remote:
                return Path(self.name).open("rb")
        except OSError as error:
            raise DataError(f"{self.name} cannot be opened: {error.strerror or error}.") from None
        import fsspec

        try:
            return cast("IO[bytes]", _RemoteBytes(fsspec.open(self.name, "rb").open()))
        except Exception as error:  # noqa: BLE001 (each store's driver has exceptions of its own)
            raise DataError(f"{self.name} cannot be opened: {_sentence(error)} Check your access.") from None


class _RemoteBytes(io.RawIOBase):
    """A file of a store, whatever goes wrong with it as an OSError: each store's driver has exceptions of its own."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    def read(self, size: int = -1) -> bytes:
        """``size`` bytes, fewer only at the end of the file: a driver may give what has arrived so far."""
        blocks: list[bytes] = []
        while size and (block := self._call(self._raw.read, size)):
            blocks.append(block)
            size -= len(block) if size > 0 else 0
        return b"".join(blocks)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place in the file."""
        self._call(self._raw.seek, offset, whence)
        return self.tell()

    def tell(self) -> int:
        """The place in the file."""
        position: int = self._call(self._raw.tell)
        return position

    def readable(self) -> bool:
        """It is."""
        return True

    def close(self) -> None:
        """Let the file go."""
        self._raw.close()
        super().close()

    @staticmethod
    def _call(function: Callable[..., T], *arguments: object) -> T:
        try:
            return function(*arguments)
        except OSError:
            raise
        except Exception as error:
            raise OSError(_sentence(error).removesuffix(".")) from error


def _suffixes(name: str) -> list[str]:
    """The last two suffixes, lower case; empty texts where there are fewer. What a URL asks for behind "?" is none."""
    if name.startswith(WEB):
        name = name.partition("?")[0].partition("#")[0]
    parts = name.rsplit("/", 1)[-1].lower().split(".")[1:]
    return ["", "", *(f".{part}" for part in parts)][-2:]


def find_inputs(arguments: Sequence[str]) -> list[InputFile]:
    """The files that the arguments name, in the order of the arguments; within a folder or pattern, sorted by name.

    A folder stands for every file below it but hidden ones (a name that begins with a dot).
    Raises DataError for an argument that names nothing, or a folder below it that cannot be read.
    """
    if "" in arguments:
        raise ConfigError("An input is an empty text (an unset variable?). Give a file, a folder, a glob or a URL.")
    files: list[InputFile] = []
    for argument in arguments:
        found = sorted(_find_remote(argument) if "://" in argument else _find_local(argument), key=lambda f: f.name)
        if not found:
            raise DataError(f"Input {argument} names no file. Give a file, a folder with files, a glob or a URL.")
        files += found
    return files


def _find_local(argument: str) -> Iterator[InputFile]:
    path = Path(argument)
    if path.is_dir():
        paths = list(_walk(path))
    elif path.exists():
        paths = [path]
    else:
        paths = list(_match(argument))
    for found in paths:
        if found.is_dir():
            continue
        try:
            status = found.stat()
        except OSError as error:
            raise DataError(f"Input {found} cannot be read: {error.strerror}.") from None
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"Input {found} is no regular file, so it cannot be read twice. Write it to a file first.")
        if not _is_utf8(found.as_posix()):
            raise DataError(
                f"Input {str(found)!a} has a name that is not UTF-8, which no dataset can store. Rename it."
            )
        yield InputFile(found.as_posix(), status.st_size, str(status.st_mtime_ns))


def _walk(folder: Path) -> Iterator[Path]:
    """The files below a folder, hidden ones and those in hidden folders left out; follows no links to folders.

    Raises DataError where a folder cannot be read: its documents would be left out in silence.
    """

    def refuse(error: OSError) -> None:
        raise DataError(
            f"Input folder {error.filename} cannot be read: {error.strerror}. Ask for access to it, or name the other "
            "inputs without it."
        ) from None

    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(place, name) for name in names if not name.startswith("."))


def _match(pattern: str) -> Iterator[Path]:
    """What the pattern names, hidden files left out. "**" follows no links to folders: they may go in circles."""
    if "**" not in pattern:
        yield from map(Path, glob.glob(pattern))  # noqa: PTH207 (Path.glob refuses "/x/*")
        return
    parts = Path(pattern).parts
    first = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    folder = Path(*parts[:first])
    for path in folder.glob("/".join(parts[first:])):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _find_remote(argument: str) -> Iterator[InputFile]:
    for name, info in _list_remote(argument):
        version = "".join(str(info.get(key, "")) for key in ("ETag", "etag", "md5Hash", "mtime", "LastModified"))
        file = InputFile(name, int(info.get("size") or 0), version)
        if info.get("size") is None and not file.is_streamed:
            raise DataError(
                f"Input {name} cannot be read in parts: its server does not say how large it is. Copy it to this "
                "machine first, or name a compressed one."
            )
        yield file


def _list_remote(argument: str) -> list[tuple[str, dict[str, Any]]]:
    """What the address, folder or pattern names, and what its store says of each file; hidden ones left out."""
    import fsspec

    given = set(argument.split("/"))
    try:
        filesystem, path = fsspec.core.url_to_fs(argument)
        if argument.startswith(WEB) and _suffixes(argument)[-1] in KNOWN and not set("*[") & set(argument):
            # On the web whatever has links in it is a folder as well, and documents may have them.
            found = {path: filesystem.info(path)}
        elif filesystem.isdir(path):
            found = filesystem.find(path, detail=True)
        else:
            found = filesystem.glob(path, detail=True)
        return [
            (filesystem.unstrip_protocol(name), info if info.get("size") is not None else filesystem.info(name))
            for name, info in found.items()
            if info["type"] != "directory"
            and not any(part.startswith(".") and part not in given for part in name.split("/"))
        ]
    except Exception as error:  # noqa: BLE001 (each store's driver has exceptions of its own)
        reason = error.__cause__ if isinstance(error, FileNotFoundError) else None
        raise DataError(
            f"Input {argument} cannot be listed: {_sentence(reason or error)} Check the address and your access."
        ) from None


def _sentence(error: BaseException) -> str:
    """The first line of an error's text, with one full stop."""
    return f"{(str(error) or type(error).__name__).partition(chr(10))[0].rstrip('. ')}."
