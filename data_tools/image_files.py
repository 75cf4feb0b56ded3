"""Images out of files: one a file, in a column of a table, or all in an IDX file; and the names of their labels.

An IDX file (MNIST's format: http://yann.lecun.com/exdb/mnist) holds the pixels of all images, and another one beside it
their labels: `train-images-idx3-ubyte` and `train-labels-idx1-ubyte`, or with `.idx3`, compressed or not.
"""

from __future__ import annotations

import math
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import groupby
from pathlib import PurePosixPath
from typing import Any

import orjson
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_tools.inputs import FileSelector, InputFile, find_inputs
from data_tools.kinds import IMAGE_SUFFIXES, Kind, kind_of, suffix_of
from data_tools.streams import read_blocks
from data_tools.units import MAX_DOCUMENT_BYTES, BadInput, BadRow, ImageRecord, Part, ReadOptions, Row, Unit
from megatrain.errors import ConfigError, DataError

IDX_NAME = re.compile(r"(?P<before>.*)(?P<sign>[-.])idx(?P<dims>[134])-ubyte(?P<after>\.gz)?")
MAX_LABELS = 1 << 20
IDX_LABELS = "1"
UNSIGNED_BYTES = 8


@dataclass(frozen=True)
class ImageSelector(FileSelector):
    """Which of the files that are found hold images or their labels."""

    @property
    def advice(self) -> str:
        return ""

    def kind(self, name: str, is_named: bool) -> Kind | None:
        if IDX_NAME.fullmatch(PurePosixPath(name).name):
            return Kind.IDX
        if suffix_of(name) in IMAGE_SUFFIXES:
            return Kind.IMAGE
        return Kind.PARQUET if kind_of(name) == (Kind.PARQUET, None) else None


@dataclass(frozen=True)
class ImageFields:
    """An image under `text_key` of `ReadOptions` and its label under `label_key`, of a table; its folder's name, of a
    file."""

    label_key: str = "label"
    names: tuple[str, ...] = ()
    """Of the labels, by their numbers."""
    option: str = "--image-key"

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.label_key,)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}

    def record(self, values: list[Any], identity: str | None, extra: dict[str, Any]) -> ImageRecord:
        """Of an image, {bytes, path} as Hugging Face writes it or bytes, and a label. Raises BadInput."""
        image, label = values
        data = image.get("bytes") if isinstance(image, dict) else image
        if isinstance(image, dict) and data is None and image.get("path"):
            raise BadInput("its image is a path alone: write the table with the files' bytes in it")
        if not isinstance(data, bytes):
            raise BadInput(f"the value of {self.option} should be bytes, or bytes and path, not {image!r:.60}")
        return self.image(data, label, identity)

    def image(self, data: bytes, label: object, identity: str | None) -> ImageRecord:
        """Raises BadInput where the bytes are no image, or the label is none."""
        from megatrain.data.images import BadImage, decode_image  # an image library, for those who have images

        number = self._numbers.get(label, -1) if isinstance(label, str) else label
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < len(self.names):
            raise BadInput(f"the label {label!r:.60} is none of the {len(self.names)} labels")
        if len(data) > MAX_DOCUMENT_BYTES:
            raise BadInput(f"the image has more than {MAX_DOCUMENT_BYTES} bytes")
        try:
            height, width, channels = decode_image(data).shape
        except BadImage as error:
            raise BadInput(f"the image is unusable: {error}") from None
        return ImageRecord(data, number, (height, width, channels), identity)


def _fields(options: ReadOptions) -> ImageFields:
    assert isinstance(options.fields, ImageFields), "only `images` selects such files"
    return options.fields


def label_of(file: InputFile) -> str:
    """The label of an image's file: the name of its folder."""
    return PurePosixPath(file.name).parent.name


def read_image(unit: Unit, options: ReadOptions, advance: Callable[[int], None]) -> Iterator[Part]:
    """The one image of a file."""
    file = unit.files[0]
    try:
        with file.open() as raw:
            data = raw.read(MAX_DOCUMENT_BYTES + 1)
        row: Row = _fields(options).image(data, label_of(file), None)
    except BadInput as error:
        row = BadRow.of(BadInput(f"{file.name}: {error}."))
    advance(file.num_bytes)
    yield Part(0, enumerate([row]))


def read_idx(unit: Unit, options: ReadOptions, advance: Callable[[int], None]) -> Iterator[Part]:
    """The images of an IDX file, in parts by the size of what is before them."""
    placed = _idx_rows(unit.files[0], _fields(options), advance)
    for number, group in groupby(placed, key=lambda each: each[0] // unit.part_bytes):
        yield Part(number, enumerate(row for _, row in group))


def _idx_rows(file: InputFile, fields: ImageFields, advance: Callable[[int], None]) -> Iterator[tuple[int, Row]]:
    """Each image as a PGM or PPM file of its pixels, or at last what is wrong; and the bytes of pixels before it."""
    position = 0
    try:
        labels = read_labels(labels_name(file.name))
        blocks = _IdxBlocks(file, advance)
        count, height, width, *channels = blocks.dims((3, 4))
        form = {1: b"P5", 3: b"P6"}.get(channels[0] if channels else 1)
        num_bytes = math.prod([height, width, *channels])
        if form is None or not 0 < num_bytes <= MAX_DOCUMENT_BYTES:
            raise BadInput(f"{file.name} says {height} x {width} pixels of {channels or 1} channels: no image.")
        if len(labels) != count:
            raise BadInput(
                f"{file.name} has {count} images, and {labels_name(file.name)} {len(labels)} labels: they are not of "
                "one dataset."
            )
        head = b"%s %d %d 255\n" % (form, width, height)
        for label in labels:
            pixels = blocks.take(num_bytes)
            yield position, ImageRecord(head + pixels, label, (height, width, channels[0] if channels else 1), None)
            position += num_bytes
        blocks.refuse_more()
    except BadInput as error:
        yield position, BadRow.of(error)


class _IdxBlocks:
    """An IDX file, decompressed, from its beginning."""

    def __init__(self, file: InputFile, advance: Callable[[int], None]) -> None:
        self._name = file.name
        self._blocks = read_blocks(file, advance)
        self._rest = bytearray()

    def take(self, num_bytes: int) -> bytes:
        """The next bytes. Raises BadInput where the file ends before."""
        while len(self._rest) < num_bytes:
            block = next(self._blocks, b"")
            if not block:
                raise BadInput(f"{self._name} is cut off: it ends before what its head says. Download it again.")
            self._rest += block
        taken = bytes(self._rest[:num_bytes])
        del self._rest[:num_bytes]
        return taken

    def dims(self, wanted: Sequence[int]) -> tuple[int, ...]:
        """What its head says. Raises BadInput where it is not of unsigned bytes in so many dimensions."""
        zeros, kind, num_dims = struct.unpack(">HBB", self.take(4))
        if zeros or kind != UNSIGNED_BYTES or num_dims not in wanted:
            listed = " or ".join(map(str, wanted))
            raise BadInput(f"{self._name} is no IDX file of unsigned bytes in {listed} dimensions.")
        return struct.unpack(f">{num_dims}I", self.take(4 * num_dims))

    def refuse_more(self) -> None:
        if self._rest or next(self._blocks, b""):
            raise BadInput(f"{self._name} goes on behind the last image that its head says. Download it again.")


def labels_name(name: str) -> str:
    """The name of the IDX file with the labels of the images in another one. Raises BadInput."""
    found = IDX_NAME.fullmatch(name)
    assert found is not None
    before, plural, last = found["before"].rpartition("images")
    if not plural:
        raise BadInput(f"{name} does not have `images` in its name, so the file of its labels cannot be found.")
    return f"{before}labels{last}{found['sign']}idx{IDX_LABELS}-ubyte{found['after'] or ''}"


@lru_cache(2)
def read_labels(name: str) -> bytes:
    """The labels of an IDX file, a byte each. Raises BadInput."""
    blocks = _IdxBlocks(InputFile(name, 0, "", Kind.IDX), lambda _: None)
    labels = blocks.take(blocks.dims((1,))[0])
    blocks.refuse_more()
    return labels


def with_labels(files: list[InputFile]) -> tuple[list[InputFile], list[InputFile]]:
    """The files of images, and all files that are read: with those of labels. Raises DataError where one is missing."""
    by_name = {file.name: file for file in files}
    images = [file for file in files if file.kind is not Kind.IDX or _num_dims(file) != IDX_LABELS]
    partners: dict[str, InputFile] = {}
    for file in images:
        if file.kind is Kind.IDX:
            name = labels_name(file.name)
            partners[name] = by_name.get(name) or find_inputs([name], ImageSelector())[0]
    if not images:
        raise DataError("The input holds labels and no images: name the IDX file of the images too.")
    return images, [*images, *partners.values()]


def _num_dims(file: InputFile) -> str:
    found = IDX_NAME.fullmatch(file.name)
    assert found is not None
    return found["dims"]


class Labels:
    """What is known of the labels' names from the inputs: in their order, or unordered, or only their numbers."""

    def __init__(self) -> None:
        self.ordered: set[tuple[str, ...]] = set()
        self.names: set[str] = set()
        self.num_numbers = 0
        self.others: set[str] = set()

    def add(self, values: Iterable[object]) -> None:
        for value in values:
            if isinstance(value, str):
                self.names |= {value} - {""}
            elif isinstance(value, int):
                self.num_numbers = max(self.num_numbers, value + 1)
            elif value is not None:
                self.others.add(type(value).__name__)

    def resolve(self) -> tuple[str, ...]:
        """The names by number. Raises DataError where they cannot be told, or are fewer than two."""
        found = [*self.ordered, *([tuple(sorted(self.names))] if self.names else [])]
        if not found:
            found = [tuple(map(str, range(min(self.num_numbers, MAX_LABELS))))]
        advice = "Give the names, one a line in their order, in a file: --label-names FILE."
        if len(found) > 1 or (self.names and self.num_numbers):
            raise DataError(f"The inputs have labels of several kinds, or in several orders. {advice}")
        if len(found[0]) < 2:
            listed = ", ".join(map(repr, found[0])) or "none"
            others = f"; those of type {', '.join(sorted(self.others))} are none" if self.others else ""
            raise DataError(
                f"The images have fewer than two labels ({listed}{others}): an image's label is the name of its "
                f"folder, or in a table the column of --label-key, text or whole numbers. {advice}"
            )
        if repeated := [name for name, count in Counter(found[0]).items() if count > 1 or not name]:
            raise DataError(f"Two labels of a table have the name {repeated[0]!r}, or one has none. {advice}")
        return found[0]


def read_label_names(path: str) -> tuple[str, ...]:
    """The names in a file, one a line. Raises ConfigError."""
    try:
        with open(path, encoding="utf-8-sig") as file:  # noqa: PTH123 (the name is the user's)
            names = tuple(line.strip() for line in file if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--label-names {path} cannot be read: {getattr(error, 'strerror', None) or error}."
        ) from None
    if len(names) < 2 or len(set(names)) < len(names):
        raise ConfigError(f"--label-names {path} should have two names or more, one a line, each once.")
    return names


def find_labels(files: Iterable[InputFile], label_key: str) -> tuple[str, ...]:
    """The names of the labels of these files of images, by number: sorted, or in the order that a table says.

    Reads of each table the column of labels. Raises DataError where they cannot be told.
    """
    labels = Labels()
    for file in files:
        if file.kind is Kind.IMAGE:
            labels.add([label_of(file)])
        elif file.kind is Kind.IDX:
            labels.add(set(read_labels(labels_name(file.name))))
        else:
            _add_labels_of_table(labels, file, label_key)
    return labels.resolve()


def _add_labels_of_table(labels: Labels, file: InputFile, label_key: str) -> None:
    try:
        table = pq.ParquetFile(file.open() if file.path is None else str(file.path))
        if names := _class_labels(table.schema_arrow.metadata or {}, label_key):
            labels.ordered.add(names)
        elif label_key in table.schema_arrow.names:
            for batch in table.iter_batches(columns=[label_key]):
                labels.add(pc.unique(batch[label_key]).to_pylist())
    except (OSError, pq.lib.ArrowException) as error:
        problem = " ".join(str(error).split()).rstrip(".")
        raise BadInput(f"{file.name} is no whole parquet file: {problem}. Download or write it again.") from None


def _class_labels(metadata: dict[bytes, bytes], label_key: str) -> tuple[str, ...]:
    """The names that Hugging Face's `datasets` has written for a column of class labels; none where there are none."""
    try:
        feature = orjson.loads(metadata[b"huggingface"])["info"]["features"][label_key]
        return tuple(map(str, feature["names"]))
    except (KeyError, TypeError, orjson.JSONDecodeError):
        return ()


def resolve_images(
    options: ReadOptions, files: list[InputFile], names_file: str | None = None
) -> tuple[ReadOptions, list[InputFile]]:
    """The options with the labels' names, and the files of images among all. Raises ConfigError or DataError."""
    fields, (images, _) = _fields(options), with_labels(files)
    names = find_labels(images, fields.label_key) if names_file is None else read_label_names(names_file)
    return replace(options, fields=replace(fields, names=names)), images
