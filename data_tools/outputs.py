"""Where a command may write: a path of this machine, away from what the command reads, on a disk that has room."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from data_tools.inputs import InputFile, find_inputs, local_part
from data_tools.units import ReadOptions
from megatrain.errors import ConfigError, DataError

NFS_LEFT = ".nfs"
"""So begin the names of files that an NFS client keeps while somebody has them open, and then removes by itself."""
NO_ROOM = {errno.ENOSPC, errno.EDQUOT}


def local_path(text: str) -> Path:
    """The path that was given to write to. Raises ConfigError for an address, and for nothing at all."""
    if not text:
        raise ConfigError("An empty text was given as the place to write to (an unset variable?). Give a path.")
    if "://" in text:
        raise ConfigError(f"{text}: what is written needs a local path, not an address. Write it here and copy it.")
    path = local_part(text)
    assert path is not None
    return path


def find_inputs_apart(
    out: Path, arguments: Sequence[str], options: ReadOptions, say: Callable[[str], None]
) -> list[InputFile]:
    """What `find_inputs` gives. Raises ConfigError where `out` is, holds or lies in what is read."""
    files = find_inputs(arguments, options.selection, options.text_key, say)
    refuse_overlap(out, arguments, files)
    return files


def refuse_overlap(out: Path, arguments: Sequence[str], files: Sequence[InputFile]) -> None:
    """Raise ConfigError where `out` is, holds or lies in what is read.

    It would be overwritten; or the same command would find what it wrote, the next time, as its input.
    """
    place = Path(os.path.realpath(out))
    for argument in arguments:
        path = local_part(argument)
        if path is not None and path.is_dir() and place.is_relative_to(path.resolve()):
            raise ConfigError(f"--out {out} lies in the input folder {argument}. Give a place outside of it.")
    folders: dict[str, Path] = {}
    is_file = out.is_file()
    for path in (file.path for file in files if file.path is not None):
        folder = str(path.parent)
        if folder not in folders:  # one look for all files of a folder: there may be millions
            folders[folder] = Path(os.path.realpath(folder))
        if folders[folder].is_relative_to(place) or (is_file and out.samefile(path)):
            raise ConfigError(f"--out {out} is, or holds, the input {path}. Give another place to write to.")


def refuse_occupied(out: Path, work: Path) -> None:
    """Raise ConfigError where `out` is a file, or a folder with other things in it than a command's unfinished work."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; give the name of a folder.")
    if out.is_dir() and not work.is_dir() and not all(path.name.startswith(NFS_LEFT) for path in out.iterdir()):
        raise ConfigError(f"--out {out} is a folder with other things in it; give a new or empty one.")


@contextmanager
def disk_full_as_data_error(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise DataError(
            f"No room for {out}: {os.strerror(error.errno)}. Nothing half written was kept. "
            "Make room on that disk, and start the same command again: it goes on with what is left."
        ) from None
