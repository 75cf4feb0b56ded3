"""Documents come out of every format as a naive loop reads them, wherever the input is cut into units and parts."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.inputs import find_inputs
from data_tools.readers import plan_units, read_parts
from data_tools.units import ReadOptions, Record


def lines_of(texts: list[str]) -> bytes:
    """JSON lines, with a blank one after every third."""
    lines = [json.dumps({"n": n, "text": text}) + "\n" * (2 if n % 3 == 2 else 1) for n, text in enumerate(texts)]
    return "".join(lines).encode()


def write_parquet(path: Path, texts: list[str]) -> None:
    pyarrow.parquet.write_table(pa.table({"text": pa.array(texts, pa.string())}), path, row_group_size=3)


def write_arrow(path: Path, texts: list[str]) -> None:
    table = pa.table({"text": pa.array(texts, pa.string())})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


WRITERS: dict[str, Callable[[Path, list[str]], object]] = {
    "a.jsonl": lambda path, texts: path.write_bytes(lines_of(texts)),
    "a.jsonl.gz": lambda path, texts: path.write_bytes(gzip.compress(lines_of(texts))),
    "a.jsonl.zst": lambda path, texts: path.write_bytes(zstandard.compress(lines_of(texts))),
    "a.parquet": write_parquet,
    "a.arrow": write_arrow,
}
TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=40), min_size=1, max_size=40)


@pytest.mark.parametrize("name", WRITERS)
@settings(max_examples=40, deadline=None)
@given(texts=TEXTS, part_bytes=st.integers(1, 400))
def test_any_cut_reads_what_a_loop_reads(name: str, texts: list[str], part_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        WRITERS[name](Path(folder) / name, texts)
        units = plan_units(find_inputs([str(Path(folder) / name)]), part_bytes)
        rows = [row for unit in units for part in read_parts(unit, ReadOptions()) for _, row in part.rows]
    assert [row.text for row in rows if isinstance(row, Record)] == texts
