"""Reading a checkpoint under any layout: ask for pieces, get their elements, whoever wrote them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
import xxhash
from torch import Tensor

from megatrain.checkpoint.location import Location
from megatrain.checkpoint.manifest import FileEntry, Manifest, read_manifest
from megatrain.checkpoint.pieces import PieceFile, StoredPiece, copy_into
from megatrain.distributed.fragment import Piece, Placement, windows
from megatrain.errors import CheckpointError

PIECES_SUFFIX = ".safetensors"


class CheckpointReader:
    """One checkpoint. ``near``: the name of the file to look into first, that of the rank that reads.

    Files are opened when a piece is not found in those already open: under the layout that wrote it, each rank opens
    its own alone. What is read is checked block by block; damage raises CheckpointError naming file and bytes.
    """

    def __init__(self, folder: Location, near: str | None = None) -> None:
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        entries = [entry for entry in self.manifest.files if entry.file.endswith(PIECES_SUFFIX)]
        self._unopened = sorted(entries, key=lambda entry: (entry.file != near, entry.file), reverse=True)
        self._found: dict[tuple[str, str], list[tuple[PieceFile, StoredPiece]]] = defaultdict(list)

    def read(self, wanted: Piece, kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """The elements of a piece as a 1-D CPU tensor. Raises CheckpointError where any of them is missing."""
        target = torch.empty(wanted.length, dtype=dtype)
        self.read_into(target, wanted, kind)
        return target

    def read_into(self, target: Tensor, wanted: Piece, kind: str) -> None:
        """The same into ``target``: 1-D, on the CPU, contiguous."""
        missing = wanted.length
        for file, stored in self._candidates(wanted.name, kind):
            if stored.piece.global_shape != wanted.global_shape:
                raise CheckpointError(
                    f"{file.path}: {wanted.name} has shape {stored.piece.global_shape} there and {wanted.global_shape} "
                    "in this run's model: the config's model section is not the checkpoint's."
                )
            missing -= copy_into(target, wanted, file, stored)
            if missing <= 0:
                return
        raise CheckpointError(
            f"{self.folder}: {missing:,} of {wanted.length:,} elements of {wanted.name} ({kind}) are in no file of it: "
            "it was written by another model, or is incomplete."
        )

    def read_parameter(self, placement: Placement, kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """A whole local parameter, in its shape; padding is zero."""
        flat = torch.zeros(placement.local_numel, dtype=dtype)
        for piece, where in windows(placement, 0, flat.numel()):
            flat[where if isinstance(where, slice) else torch.from_numpy(where)] = self.read(piece, kind, dtype)
        return flat.view(placement.local_shape)

    def read_file(self, name: str) -> bytes:
        """A small file that stands beside the pieces, checked. Raises CheckpointError naming it."""
        entry = next((entry for entry in self.manifest.files if entry.file == name), None)
        if entry is None:
            raise CheckpointError(f"{self.folder} holds no {name}.")
        return check_plain_file(self.folder, entry)

    def _candidates(self, name: str, kind: str) -> Iterator[tuple[PieceFile, StoredPiece]]:
        """Every stored piece of a tensor: those of open files, then, as long as they are asked for, of further ones."""
        seen = 0
        while True:
            found = self._found.get((name, kind), [])
            yield from found[seen:]
            seen = len(found)
            if not self._unopened:
                return
            self._open(self._unopened.pop())

    def _open(self, entry: FileEntry) -> None:
        file = PieceFile(self.folder, entry.written)
        for stored in file.pieces:
            self._found[stored.piece.name, stored.kind].append((file, stored))


def check_files(folder: Location) -> Iterator[tuple[FileEntry, str | None]]:
    """Check every byte of a checkpoint: for each file, what is wrong with it, or None. Reads all of it.

    Raises CheckpointError where the manifest itself is damaged.
    """
    manifest = read_manifest(folder)
    elements: dict[tuple[str, str], int] = defaultdict(int)
    shapes: dict[tuple[str, str], tuple[int, ...]] = {}
    damaged = False
    for entry in manifest.files:
        problem = None
        try:
            if entry.file.endswith(PIECES_SUFFIX):
                file = PieceFile(folder, entry.written)
                file.check()
                for stored in file.pieces:
                    elements[stored.piece.name, stored.kind] += stored.piece.length
                    shapes[stored.piece.name, stored.kind] = stored.piece.global_shape
            else:
                check_plain_file(folder, entry)
        except CheckpointError as error:
            problem = str(error)
        damaged = damaged or problem is not None
        yield entry, problem
    known = {entry.file for entry in manifest.files} | {"manifest.json"}
    for stray in sorted(path.name for path in folder.iterdir() if path.name not in known):
        yield FileEntry(file=stray, bytes=0, checksum=""), f"{folder / stray}: the manifest does not know this file."
    for (name, kind), count in elements.items():
        whole = torch.Size(shapes[name, kind]).numel()
        if count != whole and not damaged:
            entry = FileEntry(file="manifest.json", bytes=0, checksum="")
            yield entry, f"{folder}: {name} ({kind}) has {count:,} elements on disk instead of {whole:,}."


def check_plain_file(folder: Location, entry: FileEntry) -> bytes:
    """The content of a file that holds no pieces (the tokenizer), as its checksum says. Raises CheckpointError naming
    it."""
    path = folder / entry.file
    try:
        size = path.stat().st_size
        if size != entry.bytes:
            raise CheckpointError(f"{path}: it has {size:,} bytes instead of {entry.bytes:,}.")
        content = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: it is missing.") from None
    except OSError as error:
        raise CheckpointError(f"{path}: it cannot be read ({error.strerror or error}).") from None
    if xxhash.xxh3_128(content).hexdigest() != entry.checksum:
        raise CheckpointError(f"{path}: its bytes are not what was written.")
    return content
