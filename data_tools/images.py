"""From files of images to a dataset of images: each image decoded once, to be sure, and stored as the file it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_tools.assemble import Made, Plan, document_hashes
from data_tools.dataset_job import make_dataset, pack_parts
from data_tools.executors import Advance
from data_tools.image_files import ImageFields, ImageSelector, resolve_images, with_labels
from data_tools.inputs import find_inputs
from data_tools.job import ANY_WORKERS, Effort
from data_tools.origin import Origin
from data_tools.outputs import refuse_overlap
from data_tools.units import ImageRecord, Part, ReadOptions, Unit
from data_tools.work import PartStore, write_batches
from megatrain.data.format import IMAGE_FORMAT_NAME, canonical_json, document_hash
from megatrain.data.image_format import ImageManifest, image_digest, image_schema, label_bytes
from megatrain.errors import DataError

BATCH_BYTES = 1 << 24
"""About so much is made one record batch of a part."""
DEFAULT_SHARD_BYTES = 1 << 28

PART_COLUMNS = {
    "image": image_schema().field("image").type,
    "id": pa.string(),
    "hash": pa.binary(16),
    "file": pa.uint32(),
    "row": pa.uint64(),
    **dict.fromkeys(("label", "width", "height", "channels"), pa.uint32()),
}
"""Those of a shard, but for what only the whole input tells: `file` is the index in the unit's files, `row` is counted
from the start of the part."""


@dataclass(frozen=True)
class ImageOptions:
    """What decides the bytes of a dataset of images, beside its inputs."""

    read: ReadOptions = field(
        default_factory=lambda: ReadOptions("image", selection=ImageSelector(), fields=ImageFields())
    )
    label_names: str | None = None
    """A file with the names of the labels, one a line; None: they are found in the inputs."""
    shard_bytes: int = DEFAULT_SHARD_BYTES


def pack_images(
    inputs: Sequence[str], out: Path, options: ImageOptions, effort: Effort, *, restart: bool = False
) -> ImageManifest | None:
    """Make the dataset `out`, or go on where an earlier run of the same command was stopped. As `tokenize`."""
    found = find_inputs(inputs, options.read.selection, say=effort.say)
    files = with_labels(found)[1]
    refuse_overlap(out, inputs, files)
    read, images = resolve_images(options.read, files, options.label_names)
    given = {**asdict(options.read), "shard_bytes": options.shard_bytes, "label_names": _names(read)}
    origin = Origin({"command": "images", "inputs": list(inputs), **given}, files)
    is_made = make_dataset(out, origin, images, _Images(read, options.shard_bytes), effort, restart=restart)
    return ImageManifest.load(out) if is_made else None


def _names(read: ReadOptions) -> tuple[str, ...]:
    assert isinstance(read.fields, ImageFields)
    return read.fields.names


@dataclass(frozen=True)
class ImageRecipe:
    """What, beside the images, goes into the files of a dataset of them."""

    label_names: tuple[str, ...]
    options: dict[str, str]
    shard_tokens: int
    """Bytes, of a shard."""
    files: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def same_for_all_shards(self) -> dict[str, Any]:
        return {"format": IMAGE_FORMAT_NAME, "label_names": self.label_names}

    def schema(self, metadata: dict[str, Any]) -> pa.Schema:
        return image_schema(metadata)

    def nothing_error(self, plan: Plan, skipped: bytes) -> DataError:
        left_out = f"; {plan.num_skipped} were left out, such as {skipped[:200]!r}" if plan.num_skipped else ""
        return DataError(f"The input holds no image{left_out}.")

    def manifest(self, made: Made, plan: Plan) -> bytes:
        return ImageManifest(
            digest=image_digest(self.label_names, document_hashes(made.shards)),
            num_shards=len(made.shards),
            num_images=made.total("documents"),
            num_bytes=made.total("tokens"),
            label_names=list(self.label_names),
            options=self.options,
            job=made.job,
            shard_table_checksum=made.shard_table_checksum,
            num_skipped=plan.num_skipped or None,
            skipped_checksum=made.skipped_checksum,
        ).dump()


@dataclass(frozen=True)
class _Images:
    """The contents of a dataset of images."""

    read: ReadOptions
    shard_bytes: int

    @property
    def recipe(self) -> ImageRecipe:
        return ImageRecipe(_names(self.read), {"errors": self.read.errors}, self.shard_bytes)

    def begin(self, out: Path, folder: Path) -> None:
        """There is nothing beside the shards."""

    def packer(self, store: PartStore, missing: list[Unit]) -> tuple[ImagePacker, int]:
        return ImagePacker(store, self.read), ANY_WORKERS

    def refuse(self, plan: Plan) -> None:
        """All that can be read is taken."""


@dataclass(frozen=True)
class ImagePacker:
    """Packs the images of units."""

    store: PartStore
    read: ReadOptions

    def __call__(self, unit: Unit, advance: Advance) -> None:
        pack_parts(self.store, unit, self.read, advance, partial(self._commit, unit))

    def _commit(self, unit: Unit, part: Part) -> None:
        counts: dict[str, Any] = {"num_empty": 0, "unknown": {}}
        batches = list(map(_record_batch, part.batches(BATCH_BYTES, counts)))
        counts["num_documents"] = sum(batch.num_rows for batch in batches)
        counts["num_tokens"] = sum(len(batch["image"].values) for batch in batches)
        unit.refuse_changed()
        schema = pa.schema(list(PART_COLUMNS.items()), metadata={b"megatrain": canonical_json(counts)})
        write_batches(self.store.part_path(unit, part.number), schema, _with(schema, batches))


def _record_batch(rows: list[tuple[int, ImageRecord]]) -> pa.RecordBatch:
    images = [image for _, image in rows]
    offsets = np.cumsum([0, *(len(each.image) for each in images)])
    pixels = pa.array(np.frombuffer(b"".join(each.image for each in images), np.uint8))
    heights, widths, channels = zip(*(each.shape for each in images), strict=True)
    columns = {
        "image": pa.LargeListArray.from_arrays(offsets, pixels, type=PART_COLUMNS["image"]),
        "id": [each.id for each in images],
        "hash": [document_hash(memoryview(each.image), memoryview(label_bytes(each.label))) for each in images],
        "file": [each.file for each in images],
        "row": [row for row, _ in rows],
        "label": [each.label for each in images],
        "width": widths,
        "height": heights,
        "channels": channels,
    }
    return pa.RecordBatch.from_pydict(columns, schema=pa.schema(list(PART_COLUMNS.items())))


def _with(schema: pa.Schema, batches: list[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    return (pa.RecordBatch.from_arrays(batch.columns, schema=schema) for batch in batches)
