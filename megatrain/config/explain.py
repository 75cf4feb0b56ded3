"""What pydantic found wrong, in the words of the config: full key, what was given, what is allowed, what is nearest."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from megatrain.config.keys import is_section, nearest_key, record_at, record_of
from megatrain.config.problem import NOT_GIVEN, Problem, as_yaml
from megatrain.config.renamed import RENAMED, both_given
from megatrain.config.schema import FROM_CHECKPOINT, RAMP_TAG, SIZE_TAG, RunConfig, Section


def explain(error: ValidationError, root: type[Section] = RunConfig) -> list[Problem]:
    """One problem for each value that is wrong, in the order of the schema. ``root``: the record, or a list's."""
    found: list[Problem] = []
    for details in error.errors(include_url=False):
        key = ".".join(str(part) for part in details["loc"] if part not in (SIZE_TAG, RAMP_TAG))
        if details["type"] == "inconsistent":
            prefix = f"{key}." if key else ""
            found += [problem.below(prefix) for problem in details["ctx"]["problems"]]
        elif details["type"] == "missing":
            found += [Problem(each, NOT_GIVEN, _NEEDED.get(each, "a required key")) for each in _required(key)]
        elif details["type"] != "too_short" or not details["input"]:  # else its entries are wrong, and said to be
            found.append(_problem(key, details, root))
    return found


def _required(key: str) -> list[str]:
    """The keys that are missing with ``key``: where it is a section, those directly in it that have no default."""
    section = RunConfig.model_fields.get(key)
    record = record_of(section.annotation) if section and is_section(section) else None
    fields = record.model_fields if record else {}
    return [f"{key}.{name}" for name, field in fields.items() if field.is_required()] or [key]


def _problem(key: str, details: ErrorDetails, root: type[Section]) -> Problem:
    given, kind, context = details["input"], details["type"], details.get("ctx", {})
    if kind == "extra_forbidden" and key in RENAMED:
        return both_given(key, given)
    if kind == "extra_forbidden":
        record = record_at(details["loc"][:-1], root)
        return Problem(key, given, "no such key", nearest_key(key, record, root), is_value=False)
    if kind == "literal_error":
        allowed = [word.strip("'") for word in context["expected"].replace(" or ", ", ").split(", ")]
        close = difflib.get_close_matches(str(given).lower(), allowed, n=1, cutoff=0.5)
        return Problem(key, given, f"must be one of {', '.join(allowed)}", next(iter(close), None))
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        bound = as_yaml(context[name])
        return Problem(key, given, f"must be {words} {bound}", bound if name in ("ge", "le") else None)
    if (key, given) == ("model", FROM_CHECKPOINT):
        return Problem(key, given, "there is no checkpoint yet to take it from: name one in run.init_from")
    return Problem(key, given, _REASONS.get(kind) or details["msg"], _converted(kind, given))


def _converted(kind: str, given: Any) -> str | None:
    """The value as the type that it should have, where it can be taken for one."""
    try:
        if kind in ("int_type", "int_from_float"):
            return str(round(float(given)))
        if kind == "float_type":
            return as_yaml(float(given))
        if kind == "tuple_type":
            return f"[{as_yaml(given)}]"
        if kind == "bool_type":
            return as_yaml(TypeAdapter(bool).validate_python(given))
    except (TypeError, ValueError, OverflowError):
        return None
    return f'"{as_yaml(given)}"' if kind == "string_type" and isinstance(given, (bool, int, float)) else None


_NEEDED = {"train.steps": "a required key, or train.epochs in its place"}
_BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "less_than_equal": ("le", "at most"),
    "greater_than": ("gt", "more than"),
    "less_than": ("lt", "less than"),
}
_REASONS = {
    **dict.fromkeys(("int_type", "int_from_float"), "must be an integer"),
    "float_type": "must be a number",
    "finite_number": "must be finite",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "too_short": "must have at least one entry",
    "too_long": "has more entries than it may have",
    "tuple_type": "must be a list, such as [a, b]",
    **dict.fromkeys(("mapping_type", "model_type", "model_attributes_type"), "must be a mapping of keys to values"),
}
