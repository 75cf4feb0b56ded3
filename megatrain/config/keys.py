"""The tree of keys behind the records: what stands where, and which key was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

from megatrain.config.schema import RunConfig, Section


def record_of(annotation: Any) -> type[Section] | None:
    """The record inside an annotation, such as TrainingDataset in tuple[TrainingDataset, ...], if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    inner = (record_of(argument) for argument in get_args(annotation))
    return next((record for record in inner if record is not None), None)


def record_at(path: Sequence[str | int]) -> type[Section] | None:
    """The record whose keys stand below `path`, if any; list indices in it count as steps into the list's record."""
    record: type[Section] | None = RunConfig
    for name in path:
        if isinstance(name, int) or record is None:
            continue
        field = record.model_fields.get(name)
        record = record_of(field.annotation) if field else None
    return record


def is_section(field: FieldInfo) -> bool:
    """Whether the field always holds a record, so that its keys are set one by one."""
    return isinstance(field.annotation, type) and issubclass(field.annotation, Section)


def is_list(field: FieldInfo) -> bool:
    """Whether the field holds a list."""
    return get_origin(field.annotation) is tuple


def leaves(record: type[Section] = RunConfig, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key with its full path, in the order of the schema; keys of a list's entries stand under `*`."""
    for name, field in record.model_fields.items():
        inner = record_of(field.annotation)
        if not is_section(field):
            yield f"{prefix}{name}", field
        if inner is not None:
            yield from leaves(inner, f"{prefix}{name}.*." if is_list(field) else f"{prefix}{name}.")


def nearest_key(unknown: str, record: type[Section] | None) -> str | None:
    """The key that was probably meant by the full path `unknown`, which stands in `record`."""
    section, _, name = unknown.rpartition(".")
    beside = difflib.get_close_matches(name, record.model_fields if record else (), n=1, cutoff=0.7)
    if beside:
        return f"{section}.{beside[0]}" if section else beside[0]
    everywhere = [path for path, _ in leaves()]
    same_name = [path for path in everywhere if path.rpartition(".")[2] == name]
    if same_name:
        return same_name[0]
    return next(iter(difflib.get_close_matches(unknown, everywhere, n=1, cutoff=0.7)), None)


def differences(before: Any, after: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Path, former and present value of every key that differs between two dumps; of `data.train`, whose entries
    stand under `*`, as far as both go."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in sorted(before.keys() | after.keys()):
            yield from differences(before.get(key), after.get(key), f"{path}.{key}" if path else key)
    elif path == "data.train":
        for one, other in zip(before, after, strict=False):
            yield from differences(one, other, f"{path}.*")
    elif before != after:
        yield path, before, after
