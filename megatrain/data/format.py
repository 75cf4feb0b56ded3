"""The Arrow format of a tokenised dataset: its files, their columns, and how they are written and checked.

A dataset is a folder:

    manifest.json          totals, tokenizer, digest, and the checksums of the two files below; its own checksum too
    tokenizer.json         the tokenizer that made the tokens, byte for byte
    skipped.jsonl          only where rows were left out: file, row and problem of each
    tokenizer_config.json, chat_template.jinja, special_tokens_map.json
                           only of conversations: what came with the tokenizer, byte for byte
    shards.arrow           one row a shard: how many documents, tokens and bytes it holds, its checksum, and the same
                           of each of its record batches, with its offset in the file
    shard-000000.arrow     the documents, in order: uncompressed Arrow IPC files, see `document_schema`

The name of a shard follows from its number, so nothing read from a manifest ever becomes a path.
Checksums are xxh3 (128 bits), of whole files and of each record batch as it lies in its file.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from megatrain.errors import DataError

FORMAT_NAME = "megatrain-dataset"
IMAGE_FORMAT_NAME = "megatrain-images"
FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
TARGET_TOKENIZER_FILE = "target_tokenizer.json"  # of pairs whose target has a tokenizer of its own
SHARD_TABLE_FILE = "shards.arrow"
SKIPPED_FILE = "skipped.jsonl"
TEMPLATE_FILES = ("tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
"""What a tokenizer folder says of how conversations are written, beside tokenizer.json."""
BATCH_TOKENS = 1 << 20
"""A document belongs to record batch (its first token's position in the shard) // BATCH_TOKENS."""
MADE_BY = {
    FORMAT_NAME: "tokenized text (`megatrain-data tokenize`)",
    IMAGE_FORMAT_NAME: "images (`megatrain-data images`)",
}
"""What each kind of dataset holds, and what makes it."""
OTHER_CHECKSUM = "its checksum does not match its content"

MAX_MANIFEST_BYTES = 1 << 20
_UNKNOWN_TYPES = {"tokens": int, "characters": int, "of_characters": int, "example": str}

_RECORD_BATCH = pa.field(
    "item",
    pa.struct(
        [
            pa.field("offset", pa.int64(), nullable=False),
            pa.field("bytes", pa.int64(), nullable=False),
            pa.field("documents", pa.int64(), nullable=False),
            pa.field("tokens", pa.int64(), nullable=False),
            pa.field("checksum", pa.binary(16), nullable=False),
        ]
    ),
    nullable=False,
)

SHARD_TABLE_SCHEMA = pa.schema(
    [
        pa.field("documents", pa.int64(), nullable=False),
        pa.field("tokens", pa.int64(), nullable=False),
        pa.field("text_bytes", pa.int64(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("checksum", pa.binary(16), nullable=False),
        pa.field("batches", pa.list_(_RECORD_BATCH), nullable=False),
    ]
)


def shard_name(index: int) -> str:
    return f"shard-{index:06d}.arrow"


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrowest unsigned integer that holds every id below `vocab_size`."""
    return np.dtype(np.min_scalar_type(max(vocab_size - 1, 0)))


SCORED = pa.field("scored", pa.list_(pa.field("item", pa.uint32(), nullable=False)))
LABEL = pa.field("label", pa.string(), nullable=False)
LABELED_PAIRS = "labeled_pairs"
"""What `Manifest.options` says of two texts with one label, each of which ends with the end-of-document token."""


def document_schema(
    dtype: np.dtype[Any], metadata: dict[str, Any] | None = None, supervision: pa.Field | None = None
) -> pa.Schema:
    """Columns of a shard, one document a row.

    tokens      the document's ids, the end-of-document id last
    id          the record's own id; where it had none, `file:row`
    hash        see `document_hash`
    source      the input file as the user named it, and the 0-based row or line in it
    text_bytes  UTF-8 bytes of the text behind the tokens
    scored      only of conversations, prompts and answers: which tokens are scored as targets, as runs
                [begin, end, begin, end, ...] within the document, ascending; null: all
    label       only of labeled texts: the name of the document's label

    ``supervision``: which of the last two there is, SCORED or LABEL.
    """
    others = [pa.field("text_bytes", pa.uint64(), nullable=False), *([] if supervision is None else [supervision])]
    return row_schema("tokens", pa.from_numpy_dtype(dtype), others, metadata)


def row_schema(
    content: str, item: pa.DataType, others: Iterable[pa.Field], metadata: dict[str, Any] | None
) -> pa.Schema:
    """Columns that every shard has, of text or of images: its content, a list of ``item``; id, hash and source; and
    ``others``."""
    source = pa.struct([pa.field("file", pa.string(), nullable=False), pa.field("row", pa.uint64(), nullable=False)])
    columns = [
        pa.field(content, pa.large_list(pa.field("item", item, nullable=False)), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("hash", pa.binary(16), nullable=False),
        pa.field("source", source, nullable=False),
        *others,
    ]
    return pa.schema(columns, metadata=None if metadata is None else {b"megatrain": canonical_json(metadata)})


def canonical_json(value: object) -> bytes:
    """The one JSON text of a value: keys sorted, indented, a newline at the end."""
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS | orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def checksum(data: bytes | memoryview | pa.Buffer) -> bytes:
    return xxhash.xxh3_128_digest(memoryview(data))


def document_hash(tokens: memoryview, supervision: memoryview | bytes | None = None) -> bytes:
    """xxh3 (128 bits, big-endian digest) of the tokens' bytes as stored (little-endian), and behind them those of
    ``supervision``: the runs of scored tokens, unless they are null, or the label's name.
    """
    found = xxhash.xxh3_128(tokens)
    if supervision is not None:
        found.update(supervision)
    return found.digest()


def as_numpy(column: pa.Array) -> npt.NDArray[Any]:
    """The numbers of a column without nulls, where they lie. ``to_numpy`` would load pandas, where it is installed, for
    0.2 s of every start."""
    return np.from_dlpack(column)


def count_scored(batch: pa.RecordBatch) -> int:
    """Scored tokens of documents that have a column `scored`."""
    runs, is_whole = batch["scored"], batch["scored"].is_null()
    bounds = as_numpy(runs.flatten()).astype(np.int64)
    whole = pc.sum(pc.list_value_length(batch["tokens"]).filter(is_whole)).as_py() or 0
    return int((bounds[1::2] - bounds[::2]).sum()) + whole


def map_file(path: str | Path) -> pa.Buffer:
    """The bytes of a file, mapped: no file stays open, and the map lives as long as the buffer or a slice of it.

    Raises OSError.
    """
    with pa.memory_map(str(path)) as source:
        # Reading a buffer asks the kernel to fetch all of it beforehand, which would be the whole shard for one window.
        # So one byte is read, and the buffer stretched over the map that this byte keeps alive.
        num_bytes, first = source.size(), source.read_buffer(1)
        return pa.foreign_buffer(first.address, num_bytes, base=first) if num_bytes else first


def is_content(data: bytes | memoryview | pa.Buffer, checksum_hex: str) -> bool:
    """Whether these are the bytes of a checksum in hex: xxh3 (128 bits) or, if it is longer, SHA-256."""
    if len(checksum_hex) == 32:
        return checksum(data).hex() == checksum_hex
    return hashlib.sha256(memoryview(data)).hexdigest() == checksum_hex


def file_checksum(path: Path) -> bytes:
    """xxh3 (128 bits) of a whole file, read through a memory map."""
    return checksum(map_file(path))


@dataclass(frozen=True)
class Unknown:
    """Text that a tokenizer has no tokens for. ``characters``: those behind unknown tokens, or that gave no token."""

    tokens: int = 0
    characters: int = 0
    of_characters: int = 0
    example: str = ""
    """The text from the first such character on, and where it is from."""

    def __add__(self, later: Unknown) -> Unknown:
        return Unknown(
            self.tokens + later.tokens,
            self.characters + later.characters,
            self.of_characters + later.of_characters,
            self.example or later.example,
        )

    def __str__(self) -> str:
        if not self.characters:
            return "none"
        figures = f"{self.characters} of {self.of_characters} characters ({100 * self.share:.3g}%)"
        return f"{figures}, {self.tokens} unknown tokens, such as {self.example}"

    @property
    def share(self) -> float:
        """Of the characters, 0 to 1."""
        return self.characters / max(self.of_characters, 1)


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says. Written last, so a folder that has one is a whole dataset."""

    digest: str
    """See `content_digest`."""
    num_shards: int
    num_documents: int
    num_tokens: int
    text_bytes: int
    num_empty_documents: int
    """Documents without text, which were left out."""
    dtype: str
    vocab_size: int
    eod_id: int
    eod_token: str
    tokenizer_sha256: str
    options: dict[str, str]
    """What decides, beside the tokenizer, how a text becomes tokens."""
    job: str
    """Names the command that made the dataset: its inputs, tokenizer and options."""
    shard_table_checksum: str
    unknown: Unknown | None = None
    """None: it was not counted."""
    bos_id: int | None = None
    """Begins each document, where --bos-token was given."""
    bos_token: str | None = None
    num_skipped: int | None = None
    """Rows that were left out because they could not be read, if there are any."""
    skipped_checksum: str | None = None
    """Of SKIPPED_FILE, which lists them."""
    num_scored: int | None = None
    """Tokens that are scored as targets; None: all, and shards have no column `scored`."""
    examples: dict[str, int] | None = None
    """Of conversations, prompts and answers, labeled texts: how many were read, and what was left out or cut, by
    reason."""
    target_tokenizer_sha256: str | None = None
    """Of pairs: of the tokenizer of targets, where it is another one than that of sources; with two numbers of it."""
    target_vocab_size: int | None = None
    target_eod_id: int | None = None
    """Ends targets, under the same name as ``eod_token``."""
    template_files: dict[str, str] | None = None
    """Those of TEMPLATE_FILES that are there, by name, and their checksums."""
    label_names: list[str] | None = None
    """Of the labels that documents have, by number; None: shards have no column `label`."""
    format: str = FORMAT_NAME
    format_version: int = FORMAT_VERSION

    @property
    def supervision(self) -> pa.Field | None:
        """See `document_schema`."""
        return LABEL if self.label_names is not None else SCORED if self.num_scored is not None else None

    def dump(self) -> bytes:
        """The bytes of manifest.json, its own checksum included."""
        return dump_manifest(asdict(self))

    @staticmethod
    def load(folder: Path) -> Manifest:
        """Read and check the manifest of a dataset folder.

        Raises DataError where the folder is missing, is no dataset, or its manifest is not what was written.
        """
        return Manifest.parse(str(folder / MANIFEST_FILE), read_manifest(folder))

    @staticmethod
    def parse(path: str, data: bytes) -> Manifest:
        """Check the bytes of a manifest.json; ``path`` names it in messages. Raises DataError."""
        body = manifest_body(path, data, FORMAT_NAME)
        refuse_manifest(path, _manifest_problem(body))
        manifest = Manifest(**{**body, "unknown": Unknown(**body["unknown"]) if "unknown" in body else None})
        refuse_manifest(path, None if manifest.dump() == data else OTHER_CHECKSUM)
        return manifest


def dump_manifest(values: dict[str, Any]) -> bytes:
    """The bytes of a manifest.json of these values, its own checksum included."""
    # What is None is left out, as in manifests of versions that did not know of it.
    body = {name: value for name, value in values.items() if value is not None}
    return canonical_json({**body, "checksum": checksum(canonical_json(body)).hex()})


def read_manifest(folder: Path) -> bytes:
    """The bytes of a dataset's manifest.json. Raises DataError where the folder is missing or is no dataset."""
    try:
        with (folder / MANIFEST_FILE).open("rb") as file:
            return file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise DataError(_not_a_dataset(folder, error)) from None


def refuse_manifest(path: str, problem: str | None) -> None:
    """Raise DataError where there is a problem with a manifest."""
    if problem:
        broken = f"{path} is damaged or is no megatrain manifest"
        raise DataError(f"{broken}: {problem}. Copy it again, or make the dataset again.")


def manifest_body(path: str, data: bytes, wanted: str | None = None) -> dict[str, Any]:
    """What a manifest says, its checksum left out. ``wanted``: the format that it should have (None: any).

    Raises DataError where it is none, or of another format or version.
    """
    refuse_manifest(path, "it is far too long" if len(data) > MAX_MANIFEST_BYTES else None)
    body: object = None
    try:
        body = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        refuse_manifest(path, f"it is not JSON ({error})")
    found = body.get("format") if isinstance(body, dict) else None
    if not isinstance(body, dict) or found not in MADE_BY:
        raise DataError(
            f"{path} is damaged or is no megatrain manifest: it does not say format {wanted or FORMAT_NAME!r}. Give a "
            "folder that `megatrain-data` wrote."
        )
    if wanted is not None and found != wanted:
        folder = path.removesuffix(f"/{MANIFEST_FILE}")
        raise DataError(f"{folder} is a dataset of {MADE_BY[found]}. One of {MADE_BY[wanted]} is needed here.")
    if body.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{path} says format version {body.get('format_version')!r}; this megatrain reads version "
            f"{FORMAT_VERSION}. If it was copied whole, use the megatrain that wrote it, or make the dataset again."
        )
    body.pop("checksum", None)
    return body


def _not_a_dataset(folder: Path, error: OSError) -> str:
    if not folder.exists():
        return f"There is no dataset at {folder}. Give the folder that `megatrain-data tokenize` or `images` wrote."
    if isinstance(error, FileNotFoundError) and (folder / ".work").is_dir():
        return f"{folder} is an unfinished dataset. Run the `megatrain-data` command that began it again."
    return (
        f"{folder} is no dataset: {MANIFEST_FILE} cannot be read ({error.strerror}). "
        "Give the folder that `megatrain-data tokenize` or `images` wrote."
    )


def _manifest_problem(body: dict[str, Any]) -> str | None:
    """What is wrong with the values of a manifest, whoever wrote it."""
    if problem := values_problem(body, Manifest):
        return problem
    for marker in ("eod_id", "bos_id"):
        if not 0 < body["vocab_size"] <= 2**32 or body.get(marker, 0) >= body["vocab_size"]:
            return f"vocab_size {body['vocab_size']} and {marker} {body.get(marker)} cannot both be right"
    if {key: type(value) for key, value in body.get("unknown", asdict(Unknown())).items()} != _UNKNOWN_TYPES:
        return f"unknown is {body['unknown']!r:.80}, which cannot be"
    if ("bos_id" in body) != ("bos_token" in body):
        return "bos_id and bos_token belong together"
    of_target = [key in body for key in ("target_tokenizer_sha256", "target_vocab_size", "target_eod_id")]
    if any(of_target) and not all(of_target):
        return "target_tokenizer_sha256, target_vocab_size and target_eod_id belong together"
    largest = max(body["vocab_size"], body.get("target_vocab_size", 0))
    if body["dtype"] != token_dtype(largest).name:
        return f"dtype {body['dtype']!r} does not fit a vocabulary of {largest}"
    if not set(body.get("template_files", {})) <= set(TEMPLATE_FILES):
        return f"template_files should be of {', '.join(TEMPLATE_FILES)}"
    if "label_names" in body and (problem := names_problem(body["label_names"])):
        return problem
    return None


def names_problem(names: list[Any]) -> str | None:
    """What is wrong with the names of labels."""
    if not names or not all(isinstance(name, str) and name for name in names) or len(set(names)) != len(names):
        return "label_names should be different names"
    return None


def values_problem(body: dict[str, Any], manifest: type) -> str | None:
    """What is wrong with keys and types of a manifest's values: those of the fields of the class ``manifest``."""
    types: dict[str, type] = {"int": int, "str": str, "Unknown": dict, "list[str]": list}
    types |= {"dict[str, str]": dict, "dict[str, int]": dict}
    expected = {field.name: types[str(field.type).removesuffix(" | None")] for field in fields(manifest)}
    optional = {field.name for field in fields(manifest) if field.default is None}
    if not set(expected) - optional <= set(body) <= set(expected):
        return f"its keys should be {', '.join(sorted(expected))}"
    for name, value in body.items():
        kind = expected[name]
        if type(value) is not kind:
            return f"{name} should be a {kind.__name__}, not {value!r:.80}"
        if isinstance(value, int) and not 0 <= value < 2**62:
            return f"{name} is {value}, which cannot be"
    if not re.fullmatch("[0-9a-f]{32}", body["shard_table_checksum"]):
        return "shard_table_checksum is no checksum"
    return None


def shard_metadata(
    manifest_part: dict[str, Any], index: int, num_documents: int, num_tokens: int, text_bytes: int
) -> dict[str, Any]:
    """Schema metadata of one shard (JSON under the key `megatrain`); `manifest_part` is the same for all shards."""
    counts = {"num_documents": num_documents, "num_tokens": num_tokens, "text_bytes": text_bytes}
    return {"format": FORMAT_NAME, "format_version": FORMAT_VERSION, "shard": index, **manifest_part, **counts}


def content_digest(
    tokenizer_sha256: str, options: dict[str, str], label_names: list[str] | None, hashes: Iterable[pa.Array]
) -> str:
    """SHA-256 over tokenizer, options, the names of labels, and the 16-byte `hash` of every document in order; `hashes`
    come in batches.

    It names tokens, document boundaries, labels, tokenizer and options; not input format, shard size, ids, file names,
    workers.
    """
    labels = {} if label_names is None else {"label_names": label_names}
    return digest_of({"options": options, "tokenizer_sha256": tokenizer_sha256, **labels}, hashes)


def digest_of(decisive: dict[str, Any], hashes: Iterable[pa.Array]) -> str:
    """SHA-256 over what is decisive for a dataset's meaning, and the 16-byte hashes of its documents or images."""
    digest = hashlib.sha256(canonical_json({"format_version": FORMAT_VERSION, **decisive}))
    for batch in hashes:
        digest.update(memoryview(batch.buffers()[1])[16 * batch.offset : 16 * (batch.offset + len(batch))])
    return digest.hexdigest()
