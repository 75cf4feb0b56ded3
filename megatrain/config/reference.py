"""docs/config.md, written from the schema: `python -m megatrain.config.reference > docs/config.md`."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from megatrain.config.deepspeed_keys import DERIVED, REFUSED, ZERO_PASSED_THROUGH
from megatrain.config.keys import is_list, is_section, record_of
from megatrain.config.problem import as_yaml
from megatrain.config.renamed import RENAMED
from megatrain.config.schema import RunConfig, Section
from megatrain.families.description import LARGEST_SIZE

_INTRODUCTION = """\
# The config

A run is described by one YAML file, checked as a whole before anything is allocated. An unknown key, a value of the
wrong type or an impossible combination ends with exit code 2 and a list of everything that is wrong: the key's full
path, the line, what was given, what is allowed and the nearest legal value.

- `KEY=VALUE` on the command line sets any key over the file: `parallel.tensor=2`, `data.train.0.weight=0.5`,
  `optimizer.betas.1=0.98`. The value is read as YAML; of several for one key the last holds.
- Text is read by the rules of YAML 1.2: `3e-4` is a number, `no` is text, a duplicate key is an error. Merge
  keys (`<<: *base`) work, and keys that begin with `x-` are ignored: they are for what several sections share.
- Types are strict: `1` is a number where one is asked for, but `1.0` is no integer and `true` is no 1.
- A path that begins with `~/` is in the home folder.
- Batch sizes count sequences. A batch size that the layout does not divide is refused, not rounded.
- The resolved config, every default written out, is in the run folder: `RUN/config.yaml`.

This page is generated from `megatrain/config/schema.py`; a test keeps the two equal.
"""

_DERIVED = """\
Refused, because megatrain derives them from its own keys, with all that is below them:

| DeepSpeed's key | use instead |
|---|---|
"""

_REFUSED = """\
Refused for other reasons, with all that is below them:

| DeepSpeed's key | why |
|---|---|
"""


def reference() -> str:
    parts = [_INTRODUCTION]
    for name, field in RunConfig.model_fields.items():
        record = record_of(field.annotation)
        if record is not None:
            parts += _tables(name, record)
    derived = "\n".join(f"| `{key}` | `{instead.replace(', ', '`, `')}` |" for key, instead in DERIVED.items())
    description = RunConfig.model_fields["deepspeed"].description
    passed = f"Passed on, in `zero_optimization`: {_listed(ZERO_PASSED_THROUGH)}."
    refused = "\n".join(f"| `{key}` | {reason} |" for key, reason in REFUSED.items())
    parts.append(f"## deepspeed\n\n{description}\n\n{passed}\n\n{_DERIVED}{derived}\n\n{_REFUSED}{refused}\n")
    return "\n".join(parts)


def _tables(path: str, record: type[Section]) -> list[str]:
    """The section's own table, and one for each kind of record inside it."""
    properties = record.model_json_schema()["properties"]
    text = inspect.cleandoc(record.__doc__ or "")
    head = f"## {path}\n\n{text}\n\n| key | allowed | default | meaning |\n|---|---|---|---|\n"
    rows, inner_tables = [], []
    for name, field in record.model_fields.items():
        default = "required" if field.is_required() else f"`{as_yaml(field.default)}`".replace("|", "\\|")
        inner = record_of(field.annotation)
        if inner is not None:
            below = f"{path}.{name}.N" if is_list(field) else f"{path}.{name}"
            keys = f"[keys](#{_anchor(below)})" if is_section(field) else f"[keys](#{_anchor(below)}), null"
            allowed = f"a list of [{below}](#{_anchor(below)})" if is_list(field) else keys
            default = "its own" if is_section(field) else default
            inner_tables += _tables(below, inner)
        else:
            allowed = _allowed(properties[name])
        old = next((key.rpartition(".")[2] for key, new in RENAMED.items() if new == f"{path}.{name}"), None)
        meaning = f"{field.description} Formerly `{old}`, which still works." if old else field.description
        rows.append(f"| `{name}` | {allowed} | {default} | {meaning} |")
    return [head + "\n".join(rows) + "\n", *inner_tables]


def _listed(names: set[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def _anchor(heading: str) -> str:
    return heading.lower().replace(".", "")


def _allowed(schema: dict[str, Any]) -> str:
    """What a JSON schema allows, in words."""
    if options := schema.get("anyOf") or schema.get("oneOf"):
        return ", ".join(_allowed(option) for option in options)
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if options := schema.get("items", {}).get("enum"):
        return f"a list of {', '.join(f'`{value}`' for value in options)}"
    plain = {"string": "text", "number": "numbers"}
    if (kind := schema.get("items", {}).get("type")) in plain:
        return f"a list of {plain[kind]}"
    if "items" in schema:
        return f"a list of [{', '.join('integer ' + _bounds(item) for item in schema['items']['prefixItems'])}]"
    if schema["type"] == "array":
        items = schema["prefixItems"]
        return f"[{', '.join('number' for _ in items)}], each {_bounds(items[0])}"
    words = {"string": "text", "boolean": "true, false"}
    return " ".join(part for part in (words.get(schema["type"], schema["type"]), _bounds(schema)) if part)


def _bounds(schema: dict[str, Any]) -> str:
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [
        f"{sign} {schema[key]}" for key, sign in signs.items() if key in schema and abs(schema[key]) < LARGEST_SIZE
    ]
    return " and ".join(bounds)


if __name__ == "__main__":
    sys.stdout.write(reference())
