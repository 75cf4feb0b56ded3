"""`megatrain-data filter`: documents that a predicate finds fault with are left out.

Stages: `read` (every document judged), `index`, `list` (of what is dropped), `tally`, `write`, `publish`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml
from pydantic import ValidationError

from data_tools.clean.attributes import Corpus
from data_tools.clean.filters import FILTERS, Document, Filter, own_filter
from data_tools.clean.job import REPORT_FILE, Cleaning
from data_tools.clean.output import Decisions
from data_tools.clean.report import Lister
from data_tools.job import Effort, Stage, committed_names
from data_tools.origin import Origin
from data_tools.outputs import find_inputs_apart
from data_tools.units import ReadOptions
from megatrain.errors import ConfigError

Chosen = dict[str, Filter]
"""Filters by name, in the order in which they are applied."""


def tag_reasons(chosen: Chosen, texts: list[str]) -> dict[str, pa.Array]:
    """Why each text is to be dropped: `filter: reason` of the first filter that finds one."""
    return {"reason": pa.array([_reason(chosen, text) for text in texts], pa.string())}


def _reason(chosen: Chosen, text: str) -> str | None:
    document = Document(text)
    found = ((name, each.reason(document)) for name, each in chosen.items())
    return next((f"{name}: {reason}" for name, reason in found if reason is not None), None)


def decide(corpus: Corpus, part: Any) -> Decisions:
    return Decisions(corpus.columns(part, ["reason"]).column(0).combine_chunks(), None)


def choose_filters(names: str | None, config: Path | None) -> Chosen:
    """The filters named, with their defaults, or those of a YAML file: name to parameters.

    Raises ConfigError where a filter or a parameter does not exist, or a value does not fit.
    """
    if (names is None) == (config is None):
        raise ConfigError(f"Give either --filters or --config. There are {', '.join(FILTERS)}.")
    listed = [name.strip() for name in names.split(",")] if names is not None else []
    twice = next((name for name in listed if listed.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"--filters names {twice} twice: name it once.")
    given: Any = dict.fromkeys(listed) if names is not None else _read(config)
    if not isinstance(given, dict) or not given:
        raise ConfigError(f"{config} should have the names of filters as keys: {', '.join(FILTERS)}.")
    return {name: _make_filter(name, parameters) for name, parameters in given.items()}


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would lose the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                problem = f"the key {key.value!r} stands twice; keep one"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read(config: Path | None) -> object:
    assert config is not None
    try:
        return yaml.load(config.read_bytes(), _UniqueKeys)
    except FileNotFoundError:
        raise ConfigError(f"--config {config} does not exist.") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{config}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(config)
        raise ConfigError(f"{place}: no YAML: {error.problem}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{config} is no YAML: {' '.join(str(error).split())}.") from None


def _make_filter(name: str, parameters: object) -> Filter:
    if ":" in name:
        return own_filter(name, parameters)
    if name not in FILTERS:
        raise ConfigError(
            f"There is no filter {name!r}. There are {', '.join(FILTERS)}, and your own: module:function."
        )
    try:
        return FILTERS[name].model_validate({} if parameters is None else parameters)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, (name, *first["loc"])))
        allowed = ", ".join(FILTERS[name].model_fields)
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{place}: {message}, got {first['input']!r}. Parameters of {name}: {allowed}.") from None


def filter_documents(
    inputs: Sequence[str], out: Path, read: ReadOptions, chosen: Chosen, effort: Effort, restart: bool
) -> dict[str, Any] | None:
    """Write the documents that no filter finds fault with to `out`, or go on where an earlier run was stopped.

    Returns the report; None where other processes are to do the rest. Raises ConfigError where `out` holds anything
    else.
    """
    files = find_inputs_apart(out, inputs, read, effort.say)
    filters = [[name, each.model_dump(mode="json")] for name, each in chosen.items()]
    command = {"command": "filter", "inputs": list(inputs), "part_bytes": effort.part_bytes, "filters": filters}
    cleaning = Cleaning(Origin(command | {"read": asdict(read)}, files), read, out, effort)

    def stages(folder: Path) -> Iterator[Stage]:
        if REPORT_FILE in committed_names(folder):
            yield cleaning.publish(folder)
        else:
            corpus = yield from cleaning.tag(partial(tag_reasons, chosen), folder)
            yield from cleaning.write(Lister(corpus, folder, decide))

    return cleaning.run(restart, stages)
