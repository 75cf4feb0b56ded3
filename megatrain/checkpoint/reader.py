"""Reading a checkpoint under any layout: ask for shards, get their elements, whoever wrote them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from megatrain.checkpoint.coverage import Coverage
from megatrain.checkpoint.location import Location, locate
from megatrain.checkpoint.manifest import MANIFEST, Base, FileEntry, Manifest, read_manifest
from megatrain.checkpoint.rank_file import RankFile, StoredShard, copy_into, is_rank_file
from megatrain.checkpoint.saved_config import SavedConfig, saved_config
from megatrain.checkpoint.store import read_small_file
from megatrain.distributed.activity import Activity
from megatrain.distributed.fragment import AVERAGE, WEIGHT, FlatShard, ShardSpec, shard_views
from megatrain.errors import CheckpointError, ConfigError, Unreachable
from megatrain.families.description import is_adapter

_FILES_IN_USE = 16
_STILL_OPEN_ELSEWHERE = ".nfs"
"""How NFS calls a file that was deleted while somebody has it open."""


class CheckpointReader:
    """One checkpoint. ``near``: the number of the rank that reads, and of how many. ``activity``: told of each block.
    ``ema``: its averaged weights stand for its weights.

    Files are opened when a shard is not found in those already open, from the reader's own position among the ranks
    outwards: a rank's share lies about there under every layout. So under the layout that wrote it each rank opens its
    own file alone, and under another its neighbours', not those of thousands. What is read is checked block by block;
    damage raises CheckpointError naming file and bytes. A checkpoint of adapters is read with its base's weights.
    Raises ConfigError for ``ema`` where no average was kept.
    """

    is_computed = False

    def __init__(
        self,
        folder: Location,
        near: tuple[int, int] | None = None,
        activity: Activity | None = None,
        *,
        ema: bool = False,
    ) -> None:
        self.folder = folder
        self._near, self._activity, self._ema = near, activity, ema
        self.manifest: Manifest = read_manifest(folder)
        if ema and not self.manifest.has_average:
            raise ConfigError(
                f"{folder} holds no averaged weights: its run was trained without optimizer.ema_decay. Take the "
                "weights as they are (without --ema)."
            )
        entries = [entry for entry in self.manifest.files if is_rank_file(entry.file)]
        self._unopened = _nearest_last(entries, near)
        self._found: dict[tuple[str, str], list[tuple[RankFile, StoredShard]]] = defaultdict(list)
        self._coverage = Coverage()
        self._in_use: dict[RankFile, None] = {}  # the last few that were read from, oldest first

    @cached_property
    def saved(self) -> SavedConfig:
        """What the checkpoint says of its model. Raises CheckpointError where this version cannot read it."""
        return saved_config(self.manifest, self.folder)

    @cached_property
    def base(self) -> CheckpointReader | None:
        """The checkpoint that these adapters adapt; None where this one holds whole weights. Raises CheckpointError
        where it is not where it was, or is another."""
        known = self.manifest.base
        if known is None:
            return None
        try:
            found = CheckpointReader(locate(known.path), self._near, self._activity)
        except Unreachable:
            raise
        except CheckpointError as error:
            raise CheckpointError(
                f"{self.folder} holds LoRA adapters, and their base is not to be had: {error} Where it has moved: "
                f"`megatrain checkpoint set-base {self.folder} FOLDER`."
            ) from None
        found.refuse_other_base(known)
        return found

    def refuse_other_base(self, known: Base) -> None:
        """Raise CheckpointError where this checkpoint's weights are not those that adapters were trained beside."""
        if self.manifest.weights_digest != known.digest:
            raise CheckpointError(
                f"{self.folder} holds other weights (digest {self.manifest.weights_digest}) than those that the LoRA "
                f"adapters were trained beside (digest {known.digest}): bring those back."
            )

    def read(self, wanted: FlatShard, kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """The elements of a shard as a 1-D CPU tensor. Raises CheckpointError where any of them is missing."""
        target = torch.empty(wanted.length, dtype=dtype)
        self.read_into(target, wanted, kind)
        return target

    def read_into(self, target: Tensor, wanted: FlatShard, kind: str) -> None:
        """The same into ``target``: 1-D, on the CPU, contiguous."""
        if self.manifest.base is not None and not is_adapter(wanted.name):
            assert self.base is not None
            self.base.read_into(target, wanted, kind)
            return
        kind = AVERAGE if self._ema and kind == WEIGHT else kind
        missing = wanted.length
        for file, stored in self._candidates(wanted.name, kind):
            if stored.shard.global_shape != wanted.global_shape:
                raise CheckpointError(
                    f"{file.path}: {wanted.name} has shape {stored.shard.global_shape} there and {wanted.global_shape} "
                    "in this run's model: the config's model section is not the checkpoint's."
                )
            copied = copy_into(target, wanted, file, stored)
            if copied:
                self._note_use(file)
            missing -= copied
            if missing <= 0:
                return
        raise CheckpointError(
            f"{self.folder}: {missing:,} of {wanted.length:,} elements of {wanted.name} ({kind}) are in no file of it: "
            "it was written by another model, or is incomplete."
        )

    def read_parameter(self, spec: ShardSpec, kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """A whole local parameter, in its shape; padding is zero."""
        flat = torch.zeros(spec.local_numel, dtype=dtype)
        for shard, where in shard_views(spec, 0, flat.numel()):
            flat[where if isinstance(where, slice) else torch.from_numpy(where)] = self.read(shard, kind, dtype)
        return flat.view(spec.local_shape)

    def read_file(self, name: str) -> bytes:
        """A small file that stands beside the rank files, checked. Raises CheckpointError naming it."""
        if (entry := self.manifest.file(name)) is None:
            raise CheckpointError(f"{self.folder} holds no {name}.")
        return read_small_file(self.folder, entry)

    def _candidates(self, name: str, kind: str) -> Iterator[tuple[RankFile, StoredShard]]:
        """Every stored shard of a tensor: those of open files, then, as long as they are asked for, of further ones."""
        seen = 0
        while True:
            found = self._found.get((name, kind), [])
            yield from found[seen:]
            seen = len(found)
            if not self._unopened:
                return
            self._open(self._unopened.pop())

    def _note_use(self, file: RankFile) -> None:
        """Let go of what was read long ago: each file in use holds memory and a descriptor."""
        self._in_use.pop(file, None)
        self._in_use[file] = None
        if len(self._in_use) > _FILES_IN_USE:
            oldest = next(iter(self._in_use))
            del self._in_use[oldest]
            oldest.release()

    def _open(self, entry: FileEntry) -> None:
        file = RankFile(self.folder, entry, self._activity)
        _cover(self._coverage, file)
        for stored in file.shards:
            self._found[stored.shard.name, stored.kind].append((file, stored))


def _nearest_last(entries: list[FileEntry], near: tuple[int, int] | None) -> list[FileEntry]:
    """The files, furthest first from where a rank of so many stands among those that wrote them."""
    in_order = sorted(entries, key=lambda entry: entry.file)
    if near is None:
        return in_order[::-1]
    rank, num_ranks = near
    middle = (2 * rank + 1) * len(in_order)

    def distance(number: int) -> int:
        return abs((2 * number + 1) * num_ranks - middle)

    return [in_order[number] for number in sorted(range(len(in_order)), key=distance, reverse=True)]


def check_files(folder: Location) -> Iterator[tuple[FileEntry, str | None]]:
    """Check every byte of a checkpoint: for each file, what is wrong with it, or None. Reads all of it.

    Raises CheckpointError where the manifest itself is damaged.
    """
    manifest = read_manifest(folder)
    coverage, damaged = Coverage(), False
    for entry in manifest.files:
        problem = None
        try:
            if is_rank_file(entry.file):
                file = RankFile(folder, entry)
                file.check()
                _cover(coverage, file)
            else:
                read_small_file(folder, entry)
        except CheckpointError as error:
            problem = str(error)
        damaged = damaged or problem is not None
        yield entry, problem
    known = {entry.file for entry in manifest.files} | {MANIFEST}
    names = (path.name for path in folder.iterdir())
    for stray in sorted(name for name in names if name not in known and not name.startswith(_STILL_OPEN_ELSEWHERE)):
        yield FileEntry(file=stray, bytes=0, checksum=""), f"{folder / stray}: the manifest does not know this file."
    if not damaged:
        whole = FileEntry(file=MANIFEST, bytes=0, checksum="")
        yield from ((whole, f"{folder}: {missing}.") for missing in coverage.incomplete())
        if (held := coverage.num_elements("weight")) != manifest.parameters:
            yield whole, f"{folder}: its files hold {held:,} parameters instead of {manifest.parameters:,}."


def _cover(coverage: Coverage, file: RankFile) -> None:
    """Count a file's shards in. Raises CheckpointError where another file holds some of them too."""
    try:
        for stored in file.shards:
            coverage.add(stored.shard, stored.kind)
    except ValueError as error:
        raise CheckpointError(f"{file.path}: {error}.") from None
