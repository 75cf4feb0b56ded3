"""From input files to a dataset, of text or of images: every part packed and committed, then the shards put together.

Stages: `encode` (units of the input), `plan` (which rows go into which shard), `shards`, `manifest`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from data_tools.assemble import Assembly, Plan, Recipe
from data_tools.executors import Advance
from data_tools.folder import OutputFolder
from data_tools.inputs import InputFile
from data_tools.job import Effort, Records, Stage, committed_names, one_unit
from data_tools.origin import Origin
from data_tools.readers import plan_commits, read_commits
from data_tools.units import Part, ReadOptions, Unit
from data_tools.work import PartStore
from megatrain.data.format import (
    MANIFEST_FILE,
    SHARD_TABLE_FILE,
    SKIPPED_FILE,
    TARGET_TOKENIZER_FILE,
    TEMPLATE_FILES,
    TOKENIZER_FILE,
    manifest_body,
    read_manifest,
)
from megatrain.errors import ConfigError

PARTS_FOLDER = "parts"
FILES_IN_FOLDER = 500
"""About; at most 1,000."""

PackUnit = Callable[[Unit, Advance], None]


class Contents(Protocol):
    """What a dataset is made of, and how."""

    @property
    def recipe(self) -> Recipe: ...

    @property
    def read(self) -> ReadOptions: ...

    @property
    def shard_bytes(self) -> int:
        """About; of a shard's content."""

    def begin(self, out: Path, folder: Path) -> None:
        """Commit what lies in `out` from the beginning; `folder`: for what is unfinished."""

    def packer(self, store: PartStore, missing: list[Unit]) -> tuple[PackUnit, int]:
        """What commits the parts of a unit, picklable; and more than how many workers are of no use for these units."""

    def refuse(self, plan: Plan) -> None:
        """Raise DataError where what was read is not to become a dataset."""


def make_dataset(
    out: Path, origin: Origin, files: list[InputFile], contents: Contents, effort: Effort, *, restart: bool
) -> bool:
    """Make the dataset `out` of the rows in `files`, or go on where an earlier run of the same command was stopped.

    Returns at once where it is there already; False where others are to do the rest of it. Raises ConfigError where
    something else is in the way.
    """
    folder = OutputFolder(out, out / MANIFEST_FILE, _is_made)
    if folder.is_finished:
        job = str(manifest_body(str(folder.finished), read_manifest(out))["job"])
        if not restart:
            way_out = "Give another --out, or delete that folder."
            origin.refuse_other(job, folder.finished, f"{out} already holds a dataset", way_out)
            folder.close()
            return True
        if job[:32] != origin.command_name:
            raise ConfigError(
                f"--restart replaces only what the same command has made, and another one made {out}. "
                "Give another --out, or delete that folder."
            )
    return folder.run(origin, effort, restart, _Stages(folder, origin, files, contents, effort))


def _is_made(path: Path) -> bool:
    made = {MANIFEST_FILE, TOKENIZER_FILE, TARGET_TOKENIZER_FILE, SHARD_TABLE_FILE, SKIPPED_FILE, *TEMPLATE_FILES}
    return path.name in made or re.fullmatch(r"shard-\d{6,}\.arrow", path.name) is not None


def pack_parts(
    store: PartStore, unit: Unit, options: ReadOptions, advance: Advance, commit: Callable[[Part], None]
) -> None:
    """Call `commit` for each part of the unit that is not there, as it is read; then record the unit as finished."""
    numbers = []
    for part in read_commits(unit, options, advance):
        numbers.append(part.number)
        path = store.part_path(unit, part.number)
        if path.name not in committed_names(path.parent):
            commit(part)
    if not unit.is_one_part:
        store.finish_unit(unit, numbers)


@dataclass(frozen=True)
class _Units:
    """The units of the input, by number, and where what is made of them lies."""

    table: Records
    store: PartStore

    def __getitem__(self, number: int) -> Unit:
        return Unit.load(self.table[number])

    def __iter__(self) -> Iterator[Unit]:
        return map(Unit.load, self.table)

    def commit(self, number: int) -> Path:
        return self.store.commit(self[number])


@dataclass(frozen=True)
class _Packing:
    """Packs units, until the shards are planned: parts may be gone from then on."""

    units: _Units
    pack: PackUnit
    plan_path: Path

    def __call__(self, number: int, advance: Advance) -> None:
        if self.plan_path.name not in committed_names(self.plan_path.parent):
            self.pack(self.units[number], advance)


@dataclass(frozen=True)
class _Stages:
    """The stages of the command, called with the folder for what depends on these very inputs."""

    output: OutputFolder
    origin: Origin
    files: list[InputFile]
    contents: Contents
    effort: Effort

    def __call__(self, folder: Path) -> Iterator[Stage]:
        out = self.output.out
        self.contents.begin(out, folder)
        units = self.list_units(folder)
        assembly = Assembly(out, folder, units.store, self.contents.recipe, self.origin.name, self.effort.memory)
        yield self.encode(units, assembly)
        yield one_unit("plan", assembly.plan_path, partial(assembly.make_plan, units))
        self.contents.refuse(assembly.plan)
        num_bytes = [self.contents.shard_bytes] * len(assembly.shard_plans)
        yield Stage("shards", num_bytes, assembly.stats_path, assembly.write_shard)
        yield one_unit("manifest", self.output.finished, assembly.finish)

    def list_units(self, folder: Path) -> _Units:
        """The units, as they were cut when the command was first given, and the store of their parts."""
        table = folder / "units.arrow"
        if table.name not in committed_names(folder):
            how = (self.effort.part_bytes, self.contents.read.errors, self.effort.max_workers, self.effort.memory)
            Records.write(table, plan_commits(self.files, *how))
        records = Records(table)
        stores = sorted(self.output.work.glob(f"{PARTS_FOLDER}-*"))
        num_folders = int(stores[0].name.rpartition("-")[2]) if stores else -(-len(records) // FILES_IN_FOLDER)
        store = PartStore(self.output.work / f"{PARTS_FOLDER}-{num_folders}", max(num_folders, 1))
        store.make_folders()
        return _Units(records, store)

    def encode(self, units: _Units, assembly: Assembly) -> Stage:
        """The stage of encoding; it has nothing to do once the shards are planned."""
        is_planned = assembly.plan_path.name in committed_names(assembly.folder)
        listed = [] if is_planned else list(units)
        stage = Stage("encode", [unit.num_bytes for unit in listed], units.commit, lambda number, advance: None)
        missing = [listed[number] for number in stage.missing()]
        if not missing:
            return stage
        pack, max_workers = self.contents.packer(units.store, missing)
        return replace(stage, run=_Packing(units, pack, assembly.plan_path), max_workers=max_workers)
