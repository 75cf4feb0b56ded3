"""Images of known pixels, in every kind of file that images come in."""

from __future__ import annotations

import gzip
import io
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

NAMES = ("cat", "dog", "newt")
Pixels = npt.NDArray[np.uint8]


def make_images(count: int = 30, channels: int = 3) -> list[tuple[Pixels, int]]:
    """Noise of several sizes, with labels."""
    random = np.random.default_rng(0)
    return [
        (random.integers(0, 256, (8 + number % 3, 9, channels), np.uint8), number % len(NAMES))
        for number in range(count)
    ]


def encoded(pixels: Pixels, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(buffer, form, **options)
    return buffer.getvalue()


def write_folder(path: Path, images: list[tuple[Pixels, int]], form: str = "png") -> None:
    for number, (pixels, label) in enumerate(images):
        file = path / NAMES[label] / f"{number:04d}.{form}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(pixels, form.upper()))


def write_parquet(path: Path, images: list[tuple[Pixels, int]], labels: str = "class labels") -> None:
    """As `datasets` of Hugging Face writes them; or the labels are names, or numbers without names."""
    rows = [{"bytes": encoded(pixels), "path": f"{number}.png"} for number, (pixels, _) in enumerate(images)]
    features = {"image": {"_type": "Image"}, "label": {"names": list(NAMES), "_type": "ClassLabel"}}
    metadata = {b"huggingface": orjson.dumps({"info": {"features": features}})} if labels == "class labels" else None
    values = [NAMES[label] if labels == "names" else label for _, label in images]
    table = pa.table({"image": rows, "label": values}).replace_schema_metadata(metadata)
    pq.write_table(table, path, row_group_size=7)


def write_idx(
    folder: Path, images: list[tuple[Pixels, int]], before: str = "train-", num_labels: int | None = None
) -> Path:
    """The images, all of one size, and their labels; gives the path of the images."""
    pixels, labels = np.stack([each for each, _ in images]), [label for _, label in images][:num_labels]
    dims = pixels.shape[:3] if pixels.shape[3] == 1 else pixels.shape
    path = folder / f"train-images-idx{len(dims)}-ubyte.gz"
    head = struct.pack(f">HBB{len(dims)}I", 0, 8, len(dims), *dims)
    path.write_bytes(gzip.compress(head + pixels.tobytes(), mtime=0))
    data = struct.pack(">HBBI", 0, 8, 1, len(labels)) + bytes(labels)
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(data, mtime=0))
    return path
