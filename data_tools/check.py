"""Reading every input and writing nothing: all that is wrong, before hours of work stop at the first of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from data_tools.executors import Advance, Progress
from data_tools.inputs import find_inputs
from data_tools.readers import plan_units, read_parts
from data_tools.units import BadRow, ReadOptions, Record, Unit
from data_tools.work import run_tasks
from megatrain.errors import DataError


class Checked(NamedTuple):
    """What was found in a unit."""

    num_documents: int
    problems: dict[str, list[str]]
    """By file: what is wrong with the first row that cannot be read, and nothing for each further one."""


def check_unit(options: ReadOptions, unit: Unit, advance: Advance) -> Checked:
    num_documents = 0
    problems: dict[str, list[str]] = {}
    for _, row in (row for part in read_parts(unit, options, keep_bad_rows=True) for row in part.rows):
        num_documents += isinstance(row, Record)
        if isinstance(row, BadRow):
            found = problems.setdefault(unit.files[row.file].name, [])
            found.append("" if found else str(row.error()))
    advance(unit.num_bytes)
    return Checked(num_documents, problems)


def check_inputs(
    inputs: Sequence[str],
    options: ReadOptions,
    num_workers: int,
    progress: Progress,
    say: Callable[[str], None],
) -> None:
    """Read all inputs as a command would, and tell of each file that it would stop at.

    Raises DataError where there is one.
    """
    files = find_inputs(inputs, options.selection, options.text_key, say)
    units = list(plan_units(files, errors="skip"))
    options = options if options.errors == "replace" else replace(options, errors="skip")
    num_documents = 0
    counts: Counter[str] = Counter()
    firsts: dict[str, str] = {}
    with progress("check", sum(unit.num_bytes for unit in units)) as advance:
        for checked in run_tasks(partial(check_unit, options), units, num_workers, advance):
            num_documents += checked.num_documents
            for name, problems in checked.problems.items():
                counts[name] += len(problems)
                firsts.setdefault(name, problems[0])
    for name, first in firsts.items():
        say(f"{first} ({counts[name]} rows of this file cannot be read.)" if counts[name] > 1 else first)
    if firsts:
        raise DataError(
            f"{len(firsts)} of {len(files)} files have something that cannot be read, {counts.total()} rows in all; "
            f"{num_documents} documents can. --errors skip leaves such rows out."
        )
    say(f"All of it can be read: {num_documents} documents.")
