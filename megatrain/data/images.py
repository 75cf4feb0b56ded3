"""Reading a dataset of images: files of images as they were packed, decoded when one is asked for.

H: height, W: width, C: channels.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from megatrain.data.dataset import Dataset, open_dataset, require_same_tokenizer
from megatrain.data.format import FORMAT_NAME, as_numpy, manifest_body
from megatrain.data.image_format import ImageManifest, image_schema
from megatrain.data.remote import Cache, RemoteFolder
from megatrain.data.sharded import ShardedDataset, open_storage
from megatrain.data.storage import MAPPED_SHARDS, LocalFolder
from megatrain.errors import DataError

Pixels = npt.NDArray[np.uint8]

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM")
"""What Pillow may decode: each format that it knows is code that hostile bytes reach."""
MAX_PIXELS = 1 << 26
"""8,192 by 8,192. A small file may claim to be larger, and fill the memory."""
TOO_LARGE = f"it has more than {MAX_PIXELS} pixels"
LABEL_BATCHES = 1 << 14
"""Record batches whose labels are kept."""


class BadImage(ValueError):
    """Bytes that are no image, or none that is taken."""


def decode_image(data: bytes | memoryview) -> Pixels:
    """The pixels [H, W, C] of a file: gray where the image is (C = 1), else red, green and blue (C = 3).

    Upright, as its EXIF orientation says. Of an animation the first frame. Transparency is dropped. Palettes, CMYK and
    other color spaces become RGB; 16 bits become the upper 8. Raises BadImage.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes, which are checked here, and of odd metadata
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise BadImage(TOO_LARGE)
                return _pixels(ImageOps.exif_transpose(image))
    except BadImage:
        raise
    except Image.DecompressionBombError:  # twice Pillow's own limit, which is above ours
        raise BadImage(TOO_LARGE) from None
    except UnidentifiedImageError:
        raise BadImage(f"it is no image in a format that is read ({', '.join(FORMATS)})") from None
    except Exception as error:  # noqa: BLE001 (each decoder has errors of its own)
        raise BadImage(f"it cannot be decoded: {str(error).rstrip('.') or type(error).__name__}") from None


def _pixels(image: Image.Image) -> Pixels:
    if image.mode.startswith("I"):  # 16 bits a pixel: to convert them to 8 would clip, not scale
        pixels = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
    elif image.mode == "F":
        raise BadImage("its pixels are floating-point numbers, which have no range")
    else:
        pixels = np.array(image.convert("L" if image.mode in ("1", "L", "LA", "La") else "RGB"))
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


class ImageDataset(ShardedDataset):
    """The images of a dataset. Made by `open_images`."""

    manifest: ImageManifest

    def __init__(self, storage: LocalFolder | RemoteFolder) -> None:
        super().__init__(storage, ImageManifest.parse(*storage.manifest()), image_schema())
        self._labels = lru_cache(LABEL_BATCHES)(self._read_labels)

    @property
    def contents(self) -> str:
        """In words."""
        return f"{self.num_images} images"

    @property
    def num_images(self) -> int:
        return self.manifest.num_images

    @property
    def amount(self) -> str:
        """How large it is, in words."""
        return f"{self.num_images:,} images"

    @property
    def vocab_size(self) -> int:
        """Labels: what a classifier is asked is one of them."""
        return len(self.label_names)

    @property
    def label_names(self) -> list[str]:
        return self.manifest.label_names

    def file(self, k: int) -> memoryview:
        """The bytes of the file that image k came in. IndexError where there is none."""
        shard, batch, row = self._find_document(k)
        data, offsets = shard.views(batch)
        return data[offsets[row] : offsets[row + 1]].data

    def image(self, k: int) -> Pixels:
        """See `decode_image`. Raises DataError where it cannot be decoded: the files of the dataset are damaged."""
        try:
            return decode_image(self.file(k))
        except BadImage as error:
            raise DataError(
                f"Image {k} of {self.path}: {error}. `megatrain-data verify` checks the whole dataset."
            ) from None

    def label(self, k: int) -> int:
        """The number of its label's name."""
        shard, batch, row = self._place(k)
        return int(self._labels(shard, batch)[row])

    def figures(self, k: int) -> dict[str, int]:
        """Its label, width, height and channels."""
        shard, batch, row = self._find_document(k)
        known = shard.record_batch(batch).select(["label", "width", "height", "channels"])
        figures: dict[str, int] = known.slice(row, 1).to_pylist()[0]
        return figures

    def _read_labels(self, shard: int, batch: int) -> npt.NDArray[np.uint32]:
        labels: npt.NDArray[np.uint32] = as_numpy(self.shard(shard).record_batch(batch)["label"]).copy()
        return labels


def open_images(path: str | Path, cache: Cache | None = None, max_mapped_shards: int = MAPPED_SHARDS) -> ImageDataset:
    """Open the folder that `megatrain-data images` wrote, or a copy of it at an address. As `open_dataset`."""
    dataset = ImageDataset(open_storage(path, cache, max_mapped_shards))
    if isinstance(dataset.storage, LocalFolder):
        dataset.table  # noqa: B018 (what is wrong with it is told early)
    return dataset


AnyDataset = Dataset | ImageDataset


def open_for(
    path: str | Path, *, images: bool, cache: Cache | None = None, max_mapped_shards: int = MAPPED_SHARDS
) -> AnyDataset:
    """Open a dataset for a model that reads ``images``, or one that reads text."""
    return (open_images if images else open_dataset)(path, cache, max_mapped_shards)


def require_alike(datasets: Sequence[AnyDataset]) -> None:
    """Raise DataError where datasets for one model, all of one kind, do not have the same labels in the same order, or
    as `require_same_tokenizer` says."""
    require_same_tokenizer([each for each in datasets if isinstance(each, Dataset)])
    for first, other in pairwise(datasets):
        if other.label_names != first.label_names:
            raise DataError(
                f"{other.path} has other labels than {first.path} ({len(other.label_names or [])} and "
                f"{len(first.label_names or [])}), or in another order: a model knows one list of labels. Make both "
                "with the same --label-names FILE of `megatrain-data`."
            )


def open_either(path: str | Path) -> AnyDataset:
    """Open a dataset of text or of images, whichever it is."""
    storage = open_storage(path)
    is_text = manifest_body(*storage.manifest())["format"] == FORMAT_NAME
    return Dataset(storage) if is_text else ImageDataset(storage)
