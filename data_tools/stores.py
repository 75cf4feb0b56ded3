"""Files at an address, through fsspec: listed, with a version of each, and opened."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import IO, Any, TypeVar

from data_tools.kinds import WEB, kind_of
from megatrain.errors import DataError

T = TypeVar("T")

_VERSION_KEYS = (
    *("ETag", "etag", "md5Hash", "content_md5", "Content-MD5", "blob_id", "generation"),
    *("LastModified", "last_modified", "Last-Modified", "modified", "updated", "mtime", "created"),
)
"""Under which stores say what changes when a file's content does; what follows from the content first."""


class StoreError(OSError):
    """A store's driver failed, with whatever exception it has."""


class StoreFile(io.RawIOBase):
    """A file of a store, whatever goes wrong with it as a StoreError."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    def readinto(self, buffer: Any) -> int:
        block = self._call(self._raw.read, len(buffer))
        buffer[: len(block)] = block
        return len(block)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._call(self._raw.seek, offset, whence)
        return self.tell()

    def tell(self) -> int:
        position: int = self._call(self._raw.tell)
        return position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._raw.close()
        super().close()

    @staticmethod
    def _call(function: Callable[..., T], *arguments: object) -> T:
        try:
            return function(*arguments)
        except Exception as error:
            raise StoreError(_sentence(error).removesuffix(".")) from error


def open_url(address: str) -> IO[bytes]:
    """The raw bytes of the file at an address. Raises DataError where it cannot be opened."""
    try:
        filesystem, path = _store(address)
        return io.BufferedReader(StoreFile(filesystem.open(path, "rb")))
    except Exception as error:  # noqa: BLE001 (each store's driver has exceptions of its own)
        raise DataError(f"{address} cannot be opened: {_sentence(error)} Check your access.") from None


def list_url(address: str) -> Iterator[tuple[str, bool, int | None, str]]:
    """What an address, folder or pattern names: address, whether it was named itself (and is not just one of a folder),
    bytes (None where the store does not say), and a version. Hidden files are left out.

    Raises DataError where the store does not answer.
    """
    given = set(address.split("/"))
    try:
        filesystem, path = _store(address)
        for name, named, info in _found(filesystem, path, address):
            if not any(part.startswith(".") and part not in given for part in name.split("/")):
                known = info if info.get("size") is not None else filesystem.info(name)
                version = next((str(known[key]) for key in _VERSION_KEYS if known.get(key)), "")
                yield filesystem.unstrip_protocol(name), named, known.get("size"), version
    except Exception as error:  # noqa: BLE001 (each store's driver has exceptions of its own)
        reason = error.__cause__ if isinstance(error, FileNotFoundError) else None
        raise DataError(
            f"Input {address} cannot be listed: {_sentence(reason or error)} Check the address and your access."
        ) from None


def _found(filesystem: Any, path: str, address: str) -> Iterator[tuple[str, bool, dict[str, Any]]]:
    # On the web whatever has links in it is a folder as well, and documents may have them.
    is_document = address.startswith(WEB) and any(kind_of(address)) and not set("*[") & set(address)
    is_folder = not is_document and filesystem.isdir(path)
    if is_document or (not is_folder and filesystem.exists(path)):
        yield path, True, filesystem.info(path)
        return
    matched = {path: {"type": "directory"}} if is_folder else filesystem.glob(path, detail=True)
    for name, info in matched.items():
        if info["type"] != "directory":
            yield name, True, info
            continue
        for inner, inner_info in filesystem.find(name, detail=True).items():
            yield inner, False, inner_info


def _store(address: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it. A name may hold "::" and "*": they are taken as they stand.

    Only where each text between "::" names a protocol are they fsspec's chain of file systems.
    """
    import fsspec

    known = fsspec.available_protocols()
    if "::" in address and all("://" in link or link in known for link in address.split("::")):
        filesystem, path = fsspec.core.url_to_fs(address)
        return filesystem, path
    kind = fsspec.get_filesystem_class(address.partition("://")[0])
    filesystem, path = kind(**kind._get_kwargs_from_urls(address)), kind._strip_protocol(address)
    is_relative = kind.root_marker == "/" and not path.startswith("/")  # memory:// leaves such a name as it is
    return filesystem, f"/{path}" if is_relative and not filesystem.exists(path) else path


def _sentence(error: BaseException) -> str:
    """The first line of an error's text, with one full stop."""
    return f"{(str(error) or type(error).__name__).partition(chr(10))[0].rstrip('. ')}."
