"""What a dataset of images holds: counted in a sample of its record batches or in all, and shown."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_tools.executors import Progress
from data_tools.inspect import MAX_SHOWN_ROWS, SAMPLED_BATCHES, OutputConsole, show_figure
from megatrain.data.format import shard_name
from megatrain.data.image_format import ImageManifest
from megatrain.data.images import ImageDataset
from megatrain.errors import ConfigError
from megatrain.terminal import printable
from megatrain.units import format_bytes

SHOWN_NAMES = 10


def describe_labels(manifest: ImageManifest) -> str:
    """How many labels there are, and the first of them."""
    names = manifest.label_names
    more = ", ..." if len(names) > SHOWN_NAMES else ""
    return f"{len(names)} labels ({', '.join(names[:SHOWN_NAMES])}{more})"


def describe_images(
    dataset: ImageDataset, image: int | None, progress: Progress, *, everything: bool
) -> dict[str, Any]:
    """The figures of a dataset, and image number `image` if one is asked for. Raises ConfigError if there is none."""
    manifest = dataset.manifest
    description = {
        "images": dataset.num_images,
        "bytes": manifest.num_bytes,
        "digest": dataset.digest,
        "label_names": dataset.label_names,
        "options": manifest.options,
        "skipped": manifest.num_skipped or 0,
        "shards": [{"file": shard_name(index), **row} for index, row in enumerate(dataset.shard_rows())],
        **_counted(dataset, progress, everything),
    }
    if image is not None:
        try:
            info, figures = dataset.document_info(image), dataset.figures(image)
        except IndexError as error:
            raise ConfigError(str(error)) from None
        name = dataset.label_names[figures["label"]]
        place = {"index": image, "id": info.id, "file": info.source_file, "row": info.source_row}
        described = {**place, **figures, "label_name": name, "bytes": len(dataset.file(image))}
        description["image"] = {**described, "hash": info.hash.hex()}
    return description


def _counted(dataset: ImageDataset, progress: Progress, everything: bool) -> dict[str, Any]:
    """Labels and sizes, of all record batches or of SAMPLED_BATCHES at even distances."""
    total = int(dataset.table.batch_starts[-1])
    num_batches = total if everything else min(SAMPLED_BATCHES, total)
    labels = np.zeros(len(dataset.label_names), np.int64)
    sizes: Counter[tuple[int, int, int]] = Counter()
    with progress("count", num_batches) as advance:
        for chosen in range(num_batches):
            shard, number = dataset.table.shard_of_batch(chosen * total // num_batches)
            batch = dataset.shard(shard).record_batch(number)
            labels += np.bincount(batch["label"].to_numpy(), minlength=len(labels))
            shapes = (batch[name].to_pylist() for name in ("width", "height", "channels"))
            sizes.update(zip(*shapes, strict=True))
            advance(1)
    return {
        "counted": {"record_batches": num_batches, "of_record_batches": total, "images": int(labels.sum())},
        "labels": [
            {"name": name, "images": number} for name, number in zip(dataset.label_names, labels.tolist(), strict=True)
        ],
        "sizes": [
            {"width": width, "height": height, "channels": channels, "images": number}
            for (width, height, channels), number in sizes.most_common(MAX_SHOWN_ROWS)
        ],
        "num_sizes": len(sizes),
    }


def show_images(description: dict[str, Any]) -> None:
    """Print the figures for people."""
    console: Console = OutputConsole(highlight=False, soft_wrap=True)
    counted = description["counted"]
    for name in ("images", "digest", "options", "skipped"):
        show_figure(console, name, str(description[name]))
    show_figure(console, "bytes", format_bytes(description["bytes"]))
    show_figure(console, "shards", str(len(description["shards"])))
    extent = f"{counted['record_batches']} of {counted['of_record_batches']} record batches, {counted['images']} images"
    show_figure(console, "counted", extent)
    table = Table("label", "images", show_edge=False, box=None)
    for entry in description["labels"][:MAX_SHOWN_ROWS]:
        table.add_row(Text(printable(entry["name"])), str(entry["images"]))
    console.print(table)
    if len(description["labels"]) > MAX_SHOWN_ROWS:
        console.print(f"... and {len(description['labels']) - MAX_SHOWN_ROWS} more")
    table = Table("size", "images", show_edge=False, box=None)
    for entry in description["sizes"]:
        table.add_row(f"{entry['width']} x {entry['height']} x {entry['channels']}", str(entry["images"]))
    console.print(table)
    if "image" in description:
        for name, value in description["image"].items():
            show_figure(console, name, str(value))
