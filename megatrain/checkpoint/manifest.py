"""manifest.json: what a checkpoint is, and which files it has. Its appearance makes the checkpoint exist."""

from __future__ import annotations

import datetime
import re
from pathlib import PurePosixPath
from typing import Any

import orjson
import xxhash
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError, field_validator

from megatrain.checkpoint.location import Location, store_errors
from megatrain.errors import CheckpointError
from megatrain.units import format_bytes

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"  # of the data, beside the rank files
TARGET_TOKENIZER = "target_tokenizer.json"  # of the targets of pairs, where they have one of their own
LABELS = "label_names.json"  # of a classifier's data; an export has them in its config.json
NAME = re.compile(r"step-(\d{8,})(?:\.g\d+-[0-9a-f]+)?")  # of a checkpoint's folder; in a store with its generation
FORMAT_VERSION = 1
_MAX_BYTES = 64 << 20


class FileEntry(BaseModel):
    """A file of the checkpoint. ``checksum``: xxh3-128, of a ``.safetensors`` file that of header and block table."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    file: str
    bytes: NonNegativeInt
    checksum: str

    @field_validator("file")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if PurePosixPath(name).name != name or name in {"", ".", ".."} or "\0" in name:
            raise ValueError("a file's name must be plain, without a folder")
        return name


class Token(BaseModel):
    """A special token. ``token``: its text, None where only its id is known (a folder without a tokenizer)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    id: NonNegativeInt
    token: str | None = None


class SpecialTokens(BaseModel):
    """Which tokens have a meaning of their own; None: there is none, or none is known. ``eod`` ends a document;
    ``target_eod`` a target whose tokenizer is another one than its source's.

    ``begins_with_bos``: whether ``bos`` begins each document, and so each prompt.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    eod: Token | None = None
    bos: Token | None = None
    begins_with_bos: bool = False
    pad: Token | None = None
    unk: Token | None = None
    target_eod: Token | None = None


class Chat(BaseModel):
    """The chat template beside the weights. ``template_sha256``: of its Jinja text. ``date``: the day that it is told,
    where it asks for one."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    template_sha256: str
    date: datetime.date | None = None


class Base(BaseModel):
    """The checkpoint whose weights LoRA's adapters stand beside. ``digest``: its `Manifest.weights_digest`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    path: str
    digest: str
    parameters: NonNegativeInt


class Manifest(BaseModel):
    """The contents of manifest.json.

    ``layout``: the degrees and the ZeRO stage it was written under (for the curious; loading does not depend on it).
    ``state``: what the trainer needs to go on, besides tensors. ``config``: the resolved config of the run.
    ``validation_loss``: at this step, where it was evaluated. ``on_request``: somebody asked for it, so it stays.
    ``special_tokens``: of the tokenizer beside it; None in checkpoints of versions that did not keep them.
    ``chat``: None where there is no chat template, and in checkpoints of versions that did not keep it.
    ``base``: of one that holds LoRA's adapters alone, which ``parameters`` counts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format_version: int = FORMAT_VERSION
    step: NonNegativeInt
    tokens: NonNegativeInt
    parameters: NonNegativeInt
    layout: dict[str, int | str | bool]
    state: dict[str, Any]
    config: dict[str, Any]
    versions: dict[str, str]
    created: str
    files: tuple[FileEntry, ...]
    validation_loss: float | None = None
    on_request: bool = False
    special_tokens: SpecialTokens | None = None
    chat: Chat | None = None
    base: Base | None = None

    @property
    def has_average(self) -> bool:
        """Whether it holds averaged weights too (`optimizer.ema_decay`)."""
        return self.config.get("optimizer", {}).get("ema_decay") is not None

    @field_validator("files")
    @classmethod
    def _each_once(cls, files: tuple[FileEntry, ...]) -> tuple[FileEntry, ...]:
        if len({entry.file for entry in files}) != len(files):
            raise ValueError("a file is listed twice")
        return files

    def file(self, name: str) -> FileEntry | None:
        """The entry of the file called ``name``; None where the checkpoint has none."""
        return next((entry for entry in self.files if entry.file == name), None)

    @property
    def weights_digest(self) -> str:
        """Of all that its rank files hold, by their checksums: the same wherever the folder lies, and whenever it was
        written."""
        files = sorted((e.file, e.bytes, e.checksum) for e in self.files if e.file.endswith(".safetensors"))
        return xxhash.xxh3_128(orjson.dumps(files)).hexdigest()

    def encode(self) -> bytes:
        """The bytes of manifest.json; its last key is the checksum of what comes before."""
        return _signed(self.model_dump(mode="json"))


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def _signed(body: dict[str, Any]) -> bytes:
    checksum = xxhash.xxh3_128(orjson.dumps(body)).hexdigest()
    return orjson.dumps({**body, "checksum": checksum}, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def read_manifest(folder: Location) -> Manifest:
    """Read and check the manifest of a checkpoint folder. Raises CheckpointError naming it."""
    path = folder / MANIFEST
    try:
        with store_errors(path), path.open("rb") as file:
            text = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is no checkpoint: it has no {MANIFEST}.") from None
    if len(text) > _MAX_BYTES:
        raise CheckpointError(f"{path} is larger than any manifest ({format_bytes(_MAX_BYTES)}).")
    try:
        body = orjson.loads(text)
        if type(body) is dict and "num_documents" in body:
            raise CheckpointError(
                f"{folder} is a dataset: give a checkpoint folder (RUN/checkpoints/step-...) or a run folder."
            )
        checksum = body.pop("checksum")
        if type(body) is not dict or xxhash.xxh3_128(orjson.dumps(body)).hexdigest() != checksum:
            raise CheckpointError(f"{path} is not what was written: its checksum does not match.")
        if body.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format version {body.get('format_version')!r}; this megatrain reads {FORMAT_VERSION}."
            )
        manifest = Manifest.model_validate_json(orjson.dumps(body))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{path} is not a manifest: {where}: {first['msg']}.") from None
    except (orjson.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a manifest: {str(error).splitlines()[0]}.") from None
    if text != _signed(body):  # by the keys that it has: an older version wrote fewer
        raise CheckpointError(f"{path} is not what was written: a byte outside of its values has changed.")
    named = NAME.fullmatch(folder.name)
    if named and int(named[1]) != manifest.step:
        raise CheckpointError(f"{path} is that of step {manifest.step}, in the folder of step {int(named[1])}.")
    return manifest
