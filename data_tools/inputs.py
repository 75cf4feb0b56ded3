"""Which files an INPUT argument names, in which order, and what each of them is."""

from __future__ import annotations

import errno
import glob
import io
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any

import orjson
import xxhash

from data_tools.kinds import STREAMED, Compression, Kind, kind_of, magic_name, suffix_of
from data_tools.stores import list_url, open_url
from megatrain.errors import ConfigError, DataError
from megatrain.units import format_bytes

LOCAL = ("file://", "local://")
"""Addresses of this machine's own files, which are found and opened like paths."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
HEAD_BYTES = 1 << 16
UNKNOWN_KIND = ""
"""Why a file is passed over that --text-files would take."""
CUTTING = "2"
"""Version of how files are cut into units and parts: unfinished work of another version is done again."""
MAX_OBJECT_BYTES = 1 << 26
"""A .json file of one object that is larger is not looked into beforehand."""


@dataclass(frozen=True)
class FileSelector:
    """Which of the files that are found are read, and as what."""

    include: tuple[str, ...] = ()
    """Patterns, of which one has to fit a file's name or the end of its path; "*" stands for any characters."""
    exclude: tuple[str, ...] = ()
    format: Kind | None = None
    """What every file holds, whatever its name."""
    text_files: bool = False
    """Whether files of a folder whose kind is not known are documents."""

    @property
    def advice(self) -> str:
        """How to have files read whose kind is not known."""
        return "What is text is taken by --text-files, or by a glob that names it. "

    def selects(self, name: str) -> bool:
        return not _fits(name, self.exclude) and (not self.include or _fits(name, self.include))

    def kind(self, name: str, is_named: bool) -> Kind | None:
        """What a file is read as; None if it is not known. `is_named`: it is not just one of a folder's files."""
        as_text = Kind.TEXT if is_named or self.include or self.text_files else None
        return self.format or kind_of(name)[0] or as_text


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"*/{pattern}") for pattern in patterns)


@dataclass(frozen=True)
class InputFile:
    """One file, by the name the user gave it (its folder's or pattern's name included)."""

    name: str
    num_bytes: int
    version: str
    """Changes when the content does: a file's time, a link's target, an object's ETag or the like."""
    kind: Kind

    @property
    def compression(self) -> Compression | None:
        return kind_of(self.name)[1]

    @property
    def is_streamed(self) -> bool:
        """Whether it is read from its beginning to its end, and never from the middle."""
        return self.compression is not None or self.kind in STREAMED

    @property
    def key(self) -> str:
        """Names this version of this file."""
        return xxhash.xxh3_128_hexdigest("\0".join([CUTTING, self.name, str(self.num_bytes), self.version]).encode())

    @property
    def fingerprint(self) -> str:
        """Of the content: of its beginning and its end; for an object of a store, what the store says of it."""
        if self.path is None:
            return self.version
        with self.open() as raw:
            ends = raw.read(HEAD_BYTES)
            raw.seek(max(self.num_bytes - HEAD_BYTES, 0))
            return xxhash.xxh3_128_hexdigest(ends + raw.read(HEAD_BYTES))

    @property
    def changed_ns(self) -> int:
        """When it was written; 0 for an object of a store."""
        return int(self.version.partition(" ")[0]) if self.path is not None else 0

    def refuse_changed(self) -> None:
        """Raise DataError where a file of this machine is no longer what was found; stores are not asked."""
        if self.path is not None and _status(self.path) != (self.num_bytes, self.version):
            raise DataError(
                f"{self.name} was changed or replaced after this command had begun. Start the same command again when "
                "nothing writes it any more: what is made of it is done again."
            )

    @property
    def path(self) -> Path | None:
        """Where it lies on this machine; None for an address elsewhere."""
        return local_part(self.name)

    def open(self) -> IO[bytes]:
        return open_input(self.name)


def open_input(name: str) -> IO[bytes]:
    """The raw bytes of a file. Raises DataError where it cannot be opened."""
    path = local_part(name)
    if path is None:
        return open_url(name)
    try:
        return io.BufferedReader(LocalFile(path), 1 << 16)
    except OSError as error:
        raise DataError(f"{name} cannot be opened: {error.strerror or error}.") from None


class LocalFile(io.FileIO):
    """A file of this machine, opened once more where NFS says that its handle is stale."""

    def __init__(self, path: Path) -> None:
        try:
            super().__init__(path)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            super().__init__(path)

    def readinto(self, buffer: Any) -> int:
        try:
            return super().readinto(buffer) or 0
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
        position = self.tell()
        super().__init__(self.name)
        self.seek(position)
        return super().readinto(buffer) or 0

    # Both by `readinto`, which the file's own do not call.
    def read(self, size: int | None = -1) -> Any:
        return io.RawIOBase.read(self, -1 if size is None else size)

    def readall(self) -> bytes:
        return io.RawIOBase.readall(self)


def misnamed(file: InputFile, expected: str) -> str | None:
    """What to say of a file whose first bytes are those of something else than its name says."""
    with file.open() as raw:
        name = magic_name(raw.read(512))
    if name is None or name.lower() == expected:
        return None
    return f"{file.name} is {name}, not {expected} as its name says. Rename it, or get it again."


def local_part(argument: str) -> Path | None:
    """The path that a path or a file:// address stands for, "~" resolved; None for other addresses."""
    scheme = next((scheme for scheme in LOCAL if argument.startswith(scheme)), "")
    if not scheme and "://" in argument:
        return None
    path = argument.removeprefix(scheme)
    return Path(path if os.path.lexists(path) else os.path.expanduser(path))  # noqa: PTH111 (that one raises)


def find_inputs(
    arguments: Sequence[str],
    selection: FileSelector | None = None,
    text_key: str = "text",
    say: Callable[[str], None] = lambda _: None,
) -> list[InputFile]:
    """The files that the arguments name, in the order of the arguments; within a folder or pattern, sorted by name.

    A folder stands for the files of known kinds below it, hidden ones (a name that begins with a dot) left out; so does
    one that a pattern matches. `say` is called with how many files of which kind there are, and what was passed over.
    Raises DataError for an argument that names nothing, or a folder below it that cannot be read.
    """
    if "" in arguments:
        raise ConfigError("An input is an empty text (an unset variable?). Give a file, a folder, a glob or a URL.")
    selection = selection or FileSelector()
    advice = selection.advice
    files: list[InputFile] = []
    passed_over: dict[str, tuple[str, str]] = {}
    for argument in arguments:
        passed_here: dict[str, tuple[str, str]] = {}
        found = list(_find(argument, selection, text_key, passed_here))
        if not found:
            raise DataError(
                f"Input {argument} names no file{' that is read' if passed_here else ''}. "
                f"{_passed(passed_here, advice)}Give a file, a folder with files, a glob or a URL."
            )
        files += found
        passed_over |= passed_here
    kinds = Counter(file.kind.value for file in files)
    listed = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
    size = sum(file.num_bytes for file in files)
    again = len(files) - len({file.name for file in files})
    twice = f"Read more than once, as more than one input names them: {again}. " if again else ""
    say(f"Input: {len(files)} files ({listed}), {format_bytes(size)}. {twice}{_passed(passed_over, advice)}".strip())
    return files


def _passed(passed_over: Mapping[str, tuple[str, str]], advice: str) -> str:
    """What was left out, by what it is and why, and how to have it."""
    if not passed_over:
        return ""
    counts = sorted(Counter(passed_over.values()).items())
    listed = ", ".join(f"{number} {what}" + (f" ({why})" if why else "") for (what, why), number in counts)
    is_unknown = any(why == UNKNOWN_KIND for _, why in passed_over.values())
    return f"Passed over: {listed}. {advice if is_unknown else ''}"


def _find(
    argument: str, selection: FileSelector, text_key: str, passed_over: dict[str, tuple[str, str]]
) -> Iterator[InputFile]:
    """The files of an argument; `passed_over` gets what each of the others is, and why it is not read."""
    # Only what is more than wildcards names a file: `README*` and `*.md` do, `corpus/*` is a folder's content.
    is_specific = bool(argument.rstrip("/").rpartition("/")[2].strip("*?."))
    found = _find_local(argument, passed_over) if local_part(argument) is not None else list_url(argument)
    by_name = {each[0]: each for each in found}
    for name, is_named, num_bytes, version in sorted(by_name.values()):
        kind, why = _kind(name, num_bytes or 0, is_named and is_specific, selection, text_key)
        if kind is None:
            passed_over[name] = (suffix_of(name) or "without a suffix", why)
            continue
        file = InputFile(name, num_bytes or 0, version, kind)
        if num_bytes is None and not file.is_streamed:
            raise DataError(
                f"Input {name} cannot be read in parts: its server does not say how large it is. Copy it to this "
                "machine first, or name a compressed one."
            )
        yield file


def _kind(name: str, num_bytes: int, is_named: bool, selection: FileSelector, text_key: str) -> tuple[Kind | None, str]:
    """What a file is read as; None if it is passed over, and why."""
    if not selection.selects(name):
        return None, "by --include and --exclude"
    kind = selection.kind(name, is_named)
    if kind is Kind.JSON and kind_of(name)[1] is None and selection.format is None:
        return _sniff_json(name, num_bytes, text_key, is_named), f"an object without {text_key!r}"
    return kind, UNKNOWN_KIND


def _sniff_json(name: str, num_bytes: int, text_key: str, is_named: bool) -> Kind | None:
    """What a .json file holds: JSON lines, or values that go over many lines; None for metadata.

    Metadata is one object without the text's key, in a folder: state.json of `datasets`, a model's config.json.
    """
    with open_input(name) as raw:
        head = raw.read(HEAD_BYTES)
        kind = Kind.JSON_LINES if are_json_lines(head) else Kind.JSON
        first, _, more = head.lstrip().partition(b"\n")
        is_long = kind is Kind.JSON_LINES and more.strip() and is_object(first)
        if is_named or is_long or num_bytes > MAX_OBJECT_BYTES:
            return kind
        value = _parsed(head + raw.read())
    is_metadata = isinstance(value, dict) and not isinstance(pop_key(value, text_key), str | list)
    return None if is_metadata else kind


def are_json_lines(head: bytes) -> bool:
    """Whether what begins so has an object in each line, and not one value, or an array, over many lines."""
    lines = [line.strip() for line in head.removeprefix(BYTE_ORDER_MARK).lstrip().split(b"\n")[:8]]
    if lines[0].startswith(b"[") or lines[0] == b"{":
        return False
    return any(map(is_object, lines)) or len(lines) == 1


def is_object(line: bytes) -> bool:
    return isinstance(_parsed(line), dict)


def _parsed(data: bytes) -> object:
    try:
        return orjson.loads(data.removeprefix(BYTE_ORDER_MARK))
    except orjson.JSONDecodeError:
        return None


def pop_key(record: dict[str, Any], key: str, default: object = None) -> Any:
    """Remove and give what stands under a key; `a.b` is also the key `b` of the object under `a`."""
    if key in record:
        return record.pop(key)
    outer, _, inner = key.partition(".")
    value = record.get(outer) if inner else None
    return pop_key(value, inner, default) if isinstance(value, dict) else default


def _find_local(argument: str, passed_over: dict[str, tuple[str, str]]) -> Iterator[tuple[str, bool, int, str]]:
    """Name, whether it was named itself, bytes and version of each file."""
    path = local_part(argument)
    assert path is not None
    scheme = next((scheme for scheme in LOCAL if argument.startswith(scheme)), "")
    matched = [path] if path.exists() or path.is_symlink() else _match(str(path))
    for top in matched:
        is_folder = top.is_dir()
        for found in _walk(top, passed_over) if is_folder else [top]:
            yield scheme + found.as_posix(), not is_folder, *_status(found)


def _status(path: Path) -> tuple[int, str]:
    """Bytes and version of a file. Raises DataError where it is none that can be read twice, or named in a dataset."""
    target = ""
    try:
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            target, status = f" {path.readlink()}", path.stat()
    except OSError as error:
        raise DataError(f"Input {path} cannot be read: {error.strerror}.") from None
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"Input {path} is no regular file, so it cannot be read twice. Write it to a file first.")
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise DataError(
            f"Input {str(path)!a} has a name that is not UTF-8, which no dataset can store. Rename it."
        ) from None
    # No inode, which a remount may change, and no time of that: a copy that keeps its times is the same file.
    return status.st_size, f"{status.st_mtime_ns}{target}"


def _walk(folder: Path, passed_over: dict[str, tuple[str, str]]) -> Iterator[Path]:
    """The files below a folder, hidden ones and those in hidden folders left out; links to folders are passed over.

    Raises DataError where a folder cannot be read: its documents would be left out in silence.
    """

    def refuse(error: OSError) -> None:
        raise DataError(
            f"Input folder {error.filename} cannot be read: {error.strerror}. Ask for access to it, or name the other "
            "inputs without it."
        ) from None

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = (path for path in (Path(parent, name) for name in folders) if path.is_symlink())
        passed_over |= {str(link): ("link to a folder", "name it to have it read") for link in links}
        yield from (Path(parent, name) for name in names if not name.startswith("."))


def _match(pattern: str) -> list[Path]:
    """What the pattern names, hidden files left out. "**" follows no links to folders: they may go in circles."""
    if "**" not in pattern:
        return list(map(Path, glob.glob(pattern)))  # noqa: PTH207 (Path.glob refuses "/x/*")
    parts = Path(pattern).parts
    first = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    folder = Path(*parts[:first])
    found = folder.glob("/".join(parts[first:]))
    return [
        path
        for path in found
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and not (path.is_symlink() and path.is_dir())
    ]
