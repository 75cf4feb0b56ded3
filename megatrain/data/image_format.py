"""The Arrow format of a dataset of images: the same files as of text (`format.py`), but for these.

    manifest.json          totals, names of the labels, digest, and checksums
    shard-000000.arrow     the images, in order, as the files that they came in: see `image_schema`

There is no tokenizer. In the table of shards, `documents` are images, `tokens` are bytes of these files, and
`text_bytes` is 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from megatrain.data.format import (
    FORMAT_VERSION,
    IMAGE_FORMAT_NAME,
    MANIFEST_FILE,
    OTHER_CHECKSUM,
    digest_of,
    dump_manifest,
    manifest_body,
    names_problem,
    read_manifest,
    refuse_manifest,
    row_schema,
    values_problem,
)

LABEL_BYTES = 4


def image_schema(metadata: dict[str, Any] | None = None) -> pa.Schema:
    """Columns of a shard, one image a row.

    image       the bytes of a file that Pillow reads: PNG, JPEG, or another
    id, source  as of text
    hash        xxh3 (128 bits) of the image's bytes, and behind them of the label as a little-endian uint32
    label       the number of its label's name in the manifest
    width, height, channels: of the image as it is decoded; 1 channel is gray, 3 are red, green and blue
    """
    others = [pa.field(name, pa.uint32(), nullable=False) for name in ("label", "width", "height", "channels")]
    return row_schema("image", pa.uint8(), others, metadata)


def label_bytes(label: int) -> bytes:
    """A label as it goes into the hash of its image."""
    return label.to_bytes(LABEL_BYTES, "little")


def image_digest(label_names: Iterable[str], hashes: Iterable[pa.Array]) -> str:
    """SHA-256 over the labels' names and the hash of every image in order."""
    return digest_of({"label_names": list(label_names)}, hashes)


@dataclass(frozen=True)
class ImageManifest:
    """What manifest.json says of images. Written last, so a folder that has one is a whole dataset."""

    digest: str
    """See `image_digest`."""
    num_shards: int
    num_images: int
    num_bytes: int
    """Of the files of all images."""
    label_names: list[str]
    options: dict[str, str]
    job: str
    """Names the command that made the dataset: its inputs and options."""
    shard_table_checksum: str
    num_skipped: int | None = None
    """Images that were left out because they could not be read, if there are any."""
    skipped_checksum: str | None = None
    format: str = IMAGE_FORMAT_NAME
    format_version: int = FORMAT_VERSION

    @property
    def num_documents(self) -> int:
        return self.num_images

    @property
    def num_tokens(self) -> int:
        return self.num_bytes

    @property
    def text_bytes(self) -> int:
        return 0

    @property
    def num_empty_documents(self) -> int:
        return 0

    def dump(self) -> bytes:
        """The bytes of manifest.json, its own checksum included."""
        return dump_manifest(asdict(self))

    @staticmethod
    def load(folder: Path) -> ImageManifest:
        """As `Manifest.load`."""
        return ImageManifest.parse(str(folder / MANIFEST_FILE), read_manifest(folder))

    @staticmethod
    def parse(path: str, data: bytes) -> ImageManifest:
        """Check the bytes of a manifest.json; ``path`` names it in messages. Raises DataError."""
        body = manifest_body(path, data, IMAGE_FORMAT_NAME)
        refuse_manifest(path, values_problem(body, ImageManifest) or names_problem(body["label_names"]))
        manifest = ImageManifest(**body)
        refuse_manifest(path, None if manifest.dump() == data else OTHER_CHECKSUM)
        return manifest
