"""What pydantic found wrong, in the words of the config: full key, what was given, what is allowed, what is nearest."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megatrain.config.keys import is_section, nearest_key, record_at, record_of
from megatrain.config.problem import NOT_GIVEN, Problem, shown
from megatrain.config.renamed import RENAMED
from megatrain.config.schema import FROM_CHECKPOINT, RunConfig

_WORDS = {
    **dict.fromkeys(("true", "yes", "on", "y", "1"), "true"),
    **dict.fromkeys(("false", "no", "off", "n", "0"), "false"),
}


def explain(error: ValidationError) -> list[Problem]:
    """One problem for each value that is wrong, in the order of the schema."""
    found: list[Problem] = []
    for details in error.errors(include_url=False):
        key = ".".join(map(str, details["loc"]))
        if details["type"] == "inconsistent":
            prefix = f"{key}." if key else ""
            found += [problem.below(prefix) for problem in details["ctx"]["problems"]]
        elif details["type"] == "missing":
            found += [Problem(each, NOT_GIVEN, "a required key") for each in _required(key)]
        elif details["type"] != "too_short" or not details["input"]:  # else its entries are wrong, and said to be
            found.append(_problem(key, details))
    return found


def _required(key: str) -> list[str]:
    """The keys that are missing with ``key``: where it is a section, those directly in it that have no default."""
    section = RunConfig.model_fields.get(key)
    record = record_of(section.annotation) if section and is_section(section) else None
    fields = record.model_fields if record else {}
    return [f"{key}.{name}" for name, field in fields.items() if field.is_required()] or [key]


def _problem(key: str, details: ErrorDetails) -> Problem:
    given, kind, context = details["input"], details["type"], details.get("ctx", {})
    if kind == "extra_forbidden" and key in RENAMED:
        return Problem(key, given, f"a former name of {RENAMED[key]}, which is given too; keep one")
    if kind == "extra_forbidden":
        record = record_at(details["loc"][:-1])
        return Problem(key, given, "no such key", nearest_key(key, record), is_value=False)
    if kind == "literal_error":
        allowed = [word.strip("'") for word in context["expected"].replace(" or ", ", ").split(", ")]
        close = difflib.get_close_matches(str(given).lower(), allowed, n=1, cutoff=0.5)
        return Problem(key, given, f"must be one of {', '.join(allowed)}", next(iter(close), None))
    if kind in _BOUNDS:
        name, words, closed = _BOUNDS[kind]
        bound = context[name]
        return Problem(key, given, f"must be {words} {shown(bound)}", shown(bound) if closed else None)
    if (key, given) == ("model", FROM_CHECKPOINT):
        return Problem(key, given, "there is no checkpoint yet to take it from: name one in run.init_from")
    reason, nearest = _TYPES.get(kind, (details["msg"][:1].lower() + details["msg"][1:], None))
    return Problem(key, given, reason, nearest(given) if nearest else None)


def _nearest_integer(given: object) -> str | None:
    try:
        return str(round(float(given)))  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None


def _nearest_number(given: object) -> str | None:
    try:
        return shown(float(given))  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None


def _nearest_boolean(given: object) -> str | None:
    if isinstance(given, (int, float)) and given in (0, 1):
        return shown(bool(given))
    return _WORDS.get(str(given).lower())


def _nearest_text(given: object) -> str | None:
    return f'"{shown(given)}"' if isinstance(given, (bool, int, float)) else None


_BOUNDS = {
    "greater_than_equal": ("ge", "at least", True),
    "less_than_equal": ("le", "at most", True),
    "greater_than": ("gt", "more than", False),
    "less_than": ("lt", "less than", False),
}

_TYPES: dict[str, tuple[str, Any]] = {
    "int_type": ("must be an integer", _nearest_integer),
    "int_from_float": ("must be an integer", _nearest_integer),
    "float_type": ("must be a number", _nearest_number),
    "finite_number": ("must be finite", None),
    "bool_type": ("must be true or false", _nearest_boolean),
    "string_type": ("must be text", _nearest_text),
    "string_too_short": ("must not be empty", None),
    "too_short": ("must have at least one entry", None),
    "tuple_type": ("must be a list, such as [a, b]", None),
    "mapping_type": ("must be a mapping of keys to values", None),
    "model_type": ("must be a mapping of keys to values", None),
    "model_attributes_type": ("must be a mapping of keys to values", None),
}
