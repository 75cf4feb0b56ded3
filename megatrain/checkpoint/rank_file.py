"""The file a rank writes: a plain safetensors file whose header also says where each shard lies in the whole.

Bytes: [8: length of the header] [header, JSON] [data] [block table]. Each tensor of the file is one shard, flat. The
header's ``__metadata__`` holds ``pieces``, a JSON table ``{key: [name, kind, global shape, slice offset, slice
extent, start]}``. The last tensor, ``__blocks__``, is the xxh3-128 digest of each 16 MiB block of the data before it,
so that a range can be checked as it is read. The file's checksum (in the manifest) is the xxh3-128 of header and block
table: it vouches for the table, and the table for the data. The file is written front to back, each byte once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import orjson
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from megatrain.checkpoint.location import Bytes, ByteSource, Location, create, open_bytes, sync_so_far, write_all
from megatrain.checkpoint.manifest import FileEntry
from megatrain.distributed.activity import Activity
from megatrain.distributed.fragment import FlatShard, Fragment, TensorSlice, copy_overlap, shared_range
from megatrain.errors import CheckpointError

BLOCK_BYTES = 16 << 20
_SUFFIX = ".safetensors"
BLOCKS_KEY = "__blocks__"
FORMAT = "megatrain-pieces-1"
_DIGEST_BYTES = 16
_MAX_HEADER_BYTES = 1 << 26
_MAX_RESIDENT_BYTES = 4 * BLOCK_BYTES
_BLOCKS_PER_SYNC = 16

DTYPE_CODES = {  # of safetensors
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}
_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}


def rank_file_name(rank: int) -> str:
    return f"rank-{rank:05d}{_SUFFIX}"


def is_rank_file(name: str) -> bool:
    return name.endswith(_SUFFIX)


@dataclass(frozen=True)
class StoredShard:
    """One entry of a file's table. ``begin``: its first byte, from the start of the data."""

    shard: FlatShard
    kind: str
    dtype: torch.dtype
    begin: int

    @property
    def num_bytes(self) -> int:
        return self.shard.length * self.dtype.itemsize


def write_rank_file(path: Location, fragments: Sequence[Fragment], activity: Activity | None = None) -> FileEntry:
    """Write ``fragments`` to a new file at ``path`` and wait until the disk, or the store, has it.

    ``activity``: told of each part. The fragments' data must not change meanwhile. Raises OSError; what could be
    written is left to the caller.
    """
    activity = activity or Activity()
    header = _encode_header(fragments)
    digests = bytearray()
    size = len(header)
    block = xxhash.xxh3_128()
    room = BLOCK_BYTES
    with create(path) as file:
        write_all(file, memoryview(header))
        for fragment in fragments:
            data = tensor_bytes(fragment.data)
            size += len(data)
            while data:
                part, data = data[:room], data[room:]
                write_all(file, part)
                block.update(part)
                room -= len(part)
                if not room:
                    digests += block.digest()
                    block, room = xxhash.xxh3_128(), BLOCK_BYTES
                    if len(digests) % (_BLOCKS_PER_SYNC * _DIGEST_BYTES) == 0:
                        sync_so_far(file)
                activity.transfer(len(part))
        if room < BLOCK_BYTES:
            digests += block.digest()
        write_all(file, memoryview(digests))
    checksum = xxhash.xxh3_128(header + bytes(digests)).hexdigest()
    return FileEntry(file=path.name, bytes=size + len(digests), checksum=checksum)


def read_written(path: Location) -> FileEntry:
    """What ``write_rank_file`` returned for a file, from the file's header and block table alone. Raises OSError, or
    CheckpointError where it is no rank file."""
    try:
        file = open_bytes(path)
        begin, end = _data_range(file.size, file.fetch(0, min(8, file.size)).tobytes())
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}.") from None
    vouched = file.fetch(0, begin).tobytes() + file.fetch(end, file.size).tobytes()
    return FileEntry(file=path.name, bytes=file.size, checksum=xxhash.xxh3_128(vouched).hexdigest())


class RankFile:
    """A rank file, mapped into memory or read from a store by ranges; each block is checked when first read.

    Opening checks the header and the block table against ``written``. Nothing in the file is trusted further than it
    has been checked: lengths are compared with the file's before anything is allocated. Raises CheckpointError naming
    the file. ``activity``: told of each block.
    """

    def __init__(self, folder: Location, written: FileEntry, activity: Activity | None = None) -> None:
        self.path = folder / written.file
        self._activity = activity or Activity()
        self._file = self._open(written)
        head, self._table = self._read_header(written)
        try:
            self.shards = _decode_header(orjson.loads(head[8:]), self._data_end - self._data_begin)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise self._damaged(f"its header cannot be read ({error})") from None
        self._checked = np.zeros(len(self._table) // _DIGEST_BYTES, dtype=bool)
        self._last: tuple[int, Bytes] | None = None
        self.release()  # most files of a checkpoint are opened for their tables alone

    def read(self, stored: StoredShard, first: int = 0, last: int | None = None) -> NDArray[Any]:
        """Elements [first, last) of one of ``shards``, flat (bfloat16 as its uint16 bit patterns).

        A view of the map where the file is mapped. No other blocks are read than those that hold them.
        """
        size = stored.dtype.itemsize
        begin = stored.begin + first * size
        end = stored.begin + (stored.shard.length if last is None else last) * size
        if self._file.is_mapped:
            self.check(begin, end)
            self._make_room(end - begin)
            data = self._data(self._file.read, begin, end)
        else:
            parts = [
                self._block(block)[max(begin - block * BLOCK_BYTES, 0) : end - block * BLOCK_BYTES]
                for block in range(begin // BLOCK_BYTES, -(-end // BLOCK_BYTES))
            ]
            data = np.concatenate([np.empty(0, np.uint8), *parts])
        return data.view(_numpy_dtype(stored.dtype))

    def check(self, begin: int = 0, end: int | None = None) -> None:
        """Compare the blocks behind data bytes [begin, end) with the block table, those not yet checked."""
        end = self._data_end - self._data_begin if end is None else end
        for block in range(begin // BLOCK_BYTES, -(-end // BLOCK_BYTES)):
            if not self._checked[block]:
                self._block(block)

    def release(self) -> None:
        """Let go of the memory that holds what was read, and of the open file. Views stay good; reading goes on."""
        self._file.release()
        self._last, self._resident_bytes = None, 0

    def _make_room(self, num_bytes: int) -> None:
        """Before so much more is read: let go of what was, a checkpoint may be larger than memory."""
        if self._resident_bytes + num_bytes > _MAX_RESIDENT_BYTES:
            self.release()
        self._resident_bytes += num_bytes

    def _block(self, block: int) -> Bytes:
        """A block of the data, checked. The last one is kept: small shards lie side by side in it."""
        if self._last is not None and self._last[0] == block:
            return self._last[1]
        first = block * BLOCK_BYTES
        last = min(first + BLOCK_BYTES, self._data_end - self._data_begin)
        data = self._data(self._file.fetch, first, last)
        if xxhash.xxh3_128(data.data).digest() != self._table[block * _DIGEST_BYTES : (block + 1) * _DIGEST_BYTES]:
            raise self._damaged(f"bytes {self._in_words(first, last)} are not what was written")
        self._activity.transfer()
        self._checked[block] = True
        self._last = (block, data)
        return data

    def _data(self, read: Callable[[int, int], Bytes], begin: int, end: int) -> Bytes:
        """Bytes [begin, end) of the data, as they are."""
        try:
            return read(self._data_begin + begin, self._data_begin + end)
        except OSError as error:
            cause = error.strerror or error
            raise self._damaged(f"bytes {self._in_words(begin, end)} cannot be read ({cause})") from None

    def _in_words(self, begin: int, end: int) -> str:
        """A range of the data, counted from the beginning of the file."""
        return f"{self._data_begin + begin} to {self._data_begin + end}"

    def _open(self, written: FileEntry) -> ByteSource:
        try:
            file = open_bytes(self.path)
        except FileNotFoundError:
            raise self._damaged("it is missing") from None
        except OSError as error:
            raise self._damaged(f"it cannot be read ({error.strerror or error})") from None
        if file.size != written.bytes:
            raise self._damaged(f"it has {file.size:,} bytes instead of {written.bytes:,}")
        if file.size < 8:
            raise self._damaged("it is too short to be a rank file")
        return file

    def _read_header(self, written: FileEntry) -> tuple[bytes, bytes]:
        try:
            self._data_begin, self._data_end = _data_range(written.bytes, self._file.fetch(0, 8).tobytes())
            head = self._file.fetch(0, self._data_begin).tobytes()
            table = self._file.fetch(self._data_end, written.bytes).tobytes()
        except ValueError as error:
            raise self._damaged(str(error)) from None
        except OSError as error:
            raise self._damaged(f"it cannot be read ({error.strerror or error})") from None
        if xxhash.xxh3_128(head + table).hexdigest() != written.checksum:
            raise self._damaged("its header or block table does not match the manifest's checksum")
        return head, table

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}.")


def copy_into(target: Tensor, wanted: FlatShard, file: RankFile, stored: StoredShard) -> int:
    """Copy what ``stored`` holds of ``wanted`` into ``target`` (1-D, on the CPU); the number of elements copied.

    A type other than the target's is converted, as ``Tensor.to`` does.
    """
    first, last = shared_range(wanted, stored.shard)
    if first >= last:
        return 0
    held = replace(stored.shard, start=stored.shard.start + first, length=last - first)
    source = file.read(stored, first, last)
    if stored.dtype == target.dtype:
        bits = target.view(torch.uint16) if _is_bits(target.dtype) else target
        return copy_overlap(bits.numpy(), wanted, source, held)
    converted = torch.from_numpy(source.copy()).view(stored.dtype).to(target.dtype)
    return copy_overlap(target.numpy(), wanted, converted.numpy(), held)


def _encode_header(fragments: Sequence[Fragment]) -> bytes:
    table: dict[str, list[Any]] = {}
    tensors: dict[str, Any] = {}
    begin = 0
    for number, (shard, kind, data) in enumerate(fragments):
        if data.numel() != shard.length:
            raise ValueError(f"{shard.name} {kind}: {data.numel()} elements for a shard of {shard.length}")
        key = f"{shard.name}:{kind}:{number}"
        part = shard.tensor_slice
        table[key] = [shard.name, kind, shard.global_shape, part.offset, part.extent, shard.start]
        end = begin + data.numel() * data.element_size()
        tensors[key] = {"dtype": DTYPE_CODES[data.dtype], "shape": [shard.length], "data_offsets": [begin, end]}
        begin = end
    table_bytes = -(-begin // BLOCK_BYTES) * _DIGEST_BYTES
    tensors[BLOCKS_KEY] = {"dtype": "U8", "shape": [table_bytes], "data_offsets": [begin, begin + table_bytes]}
    metadata = {"format": FORMAT, "block_bytes": str(BLOCK_BYTES), "pieces": orjson.dumps(table).decode()}
    text = orjson.dumps({"__metadata__": metadata, **tensors})
    text += b" " * (-(len(text) + 8) % 64)  # data aligned for every element type
    return len(text).to_bytes(8, "little") + text


def _data_range(file_bytes: int, length: bytes) -> tuple[int, int]:
    """Where a file's data begins and ends, from its size and its first 8 bytes; the rest is the block table."""
    header_bytes = int.from_bytes(length, "little")
    if header_bytes > min(_MAX_HEADER_BYTES, file_bytes - 8):
        raise ValueError("its header's length is impossible")
    begin = 8 + header_bytes
    num_blocks = -(-(file_bytes - begin) // (BLOCK_BYTES + _DIGEST_BYTES))
    return begin, max(begin, file_bytes - num_blocks * _DIGEST_BYTES)


def _decode_header(header: dict[str, Any], data_bytes: int) -> list[StoredShard]:
    metadata = header["__metadata__"]
    if metadata["format"] != FORMAT or metadata["block_bytes"] != str(BLOCK_BYTES):
        raise ValueError(f"format {metadata['format']!r} is not {FORMAT!r}")
    shards = []
    expected = 0
    for key, (name, kind, shape, offset, extent, start) in orjson.loads(metadata["pieces"]).items():
        entry = header[key]
        dtype = _DTYPES[entry["dtype"]]
        begin, end = _counts(entry["data_offsets"])
        length, rest = divmod(end - begin, dtype.itemsize)
        part = TensorSlice(_counts(offset), _counts(extent))
        inside = all(
            n > 0 and o + n <= size for o, n, size in zip(part.offset, part.extent, _counts(shape), strict=True)
        )
        (first,) = _counts([start])
        if begin != expected or rest or not inside or not first <= first + length <= part.numel:
            raise ValueError(f"the shard {key!r} lies outside of its tensor or its file")
        shards.append(StoredShard(FlatShard(str(name), tuple(shape), part, first, length), str(kind), dtype, begin))
        expected = end
    if expected != data_bytes or header[BLOCKS_KEY]["data_offsets"][0] != expected:
        raise ValueError("the block table is not where the data ends")
    return shards


def _counts(values: list[Any]) -> tuple[int, ...]:
    if not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"{values} are not whole numbers")
    return tuple(values)


def _is_bits(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16


def _numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    return np.dtype("<u2") if _is_bits(dtype) else torch.empty(0, dtype=dtype).numpy().dtype


def tensor_bytes(data: Tensor) -> memoryview:
    """The bytes of a tensor, without a copy where it is contiguous and on the CPU."""
    flat = data.detach().to("cpu").contiguous().flatten().view(torch.uint8)
    return flat.numpy().data
