"""A config file and the command line's KEY=VALUE into a RunConfig, or one error that lists all that is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import yaml
from pydantic import ValidationError

from megatrain.config import document, recipes
from megatrain.config.document import Path
from megatrain.config.explain import explain
from megatrain.config.overrides import apply_override
from megatrain.config.problem import SEPARATOR, Problem, config_error
from megatrain.config.renamed import RENAMED, both_given, with_new_names
from megatrain.config.scalar import scalar
from megatrain.config.schema import FROM_CHECKPOINT, RunConfig, in_home
from megatrain.errors import ConfigError
from megatrain.families import FAMILIES

COMMAND_LINE = "the command line"
_LENGTHS = ("steps", "epochs")  # a run has one of them
SavedModel = Callable[[str | None, str | None, str | None], Mapping[str, Any] | None]
"""run.dir, checkpoint.dir and run.init_from to the keys of a model; None: there is no checkpoint to take it from."""


def load(
    path: str | FilePath,
    overrides: Sequence[str] = (),
    saved_model: SavedModel = lambda *paths: None,
    note: Callable[[str], None] = lambda text: None,
) -> RunConfig:
    """The config in the YAML file `path`, or the recipe of that name, with "section.key=value" overrides put over it.

    A list entry is reached by its index (`data.train.0.weight=2`); values are read as YAML; the last override of a
    key wins. Raises ConfigError with every problem found, each with its key, its line and what would be legal.
    ``saved_model``: finds what `model: from_checkpoint` stands for; overrides of the model's keys are put over that.
    ``note``: called for each key that is given under a former name.
    """
    read = document.read(_text(recipes.find(path)), str(path))
    if not isinstance(read.tree, dict):
        content = "is empty" if read.tree is None else "is no mapping"
        raise ConfigError(
            f"{path} {content}; a config is a YAML mapping with the sections {', '.join(RunConfig.model_fields)}"
        )
    problems = list(read.problems)
    sources = {key: f"line {line}" for key, line in read.lines.items()}
    given = {key.strip(): value for key, _, value in (override.partition("=") for override in overrides)}
    for old, new in RENAMED.items():
        if source := sources.get(tuple(old.split("."))):
            sources.setdefault(tuple(new.split(".")), source)
        if old in given and new in given:
            problems.append(both_given(old, scalar(given[old])))
            sources[tuple(old.split("."))] = COMMAND_LINE
        if source or old in given:
            note(f"{old} is called {new} now; the old name still works.")
    tree, in_order = _with_one_length(with_new_names(read.tree), given), sorted(overrides, key=_is_of_the_model)
    for override in in_order:
        if _is_of_the_model(override):
            tree = _with_saved_model(tree, saved_model)
        tree, changed, found = apply_override(tree, override)
        problems += found
        for changed_path in changed:
            sources[changed_path] = COMMAND_LINE
            for end in range(1, len(changed_path)):  # sections that the file leaves out
                sources.setdefault(changed_path[:end], COMMAND_LINE)
    tree = _with_saved_model(tree, saved_model)
    config, found = _validated(tree)
    problems += [_with_legal_hint(problem, tree) for problem in found]
    if config is None or problems:
        raise config_error(str(path), problems, lambda key: _source(key, sources))
    return config


def dump(config: RunConfig) -> str:
    """The config as YAML with every default written out; `load` reads the same config from it."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)


def _validated(tree: dict[str, Any]) -> tuple[RunConfig | None, list[Problem]]:
    try:
        return RunConfig.model_validate(tree), []
    except ValidationError as error:
        return None, explain(error)


def _with_legal_hint(problem: Problem, tree: dict[str, Any]) -> Problem:
    """The problem without nearest values that would be refused in turn: in place of each, what is nearest to that."""
    if problem.nearest is None or not problem.is_value:
        return problem
    to_try, legal = problem.nearest.split(SEPARATOR), []
    for value in to_try:  # grows
        changed, _, refused = apply_override(tree, f"{problem.key}={value}")
        found = refused or [other for other in _validated(changed)[1] if other.key == problem.key]
        if not found:
            legal.append(value)
        to_try += [other.nearest for other in found if other.nearest is not None and other.nearest not in to_try]
    return replace(problem, nearest=SEPARATOR.join(legal) or None)


def _is_of_the_model(override: str) -> bool:
    return override.lstrip().startswith("model.")


def _with_one_length(tree: dict[str, Any], given: Mapping[str, str]) -> dict[str, Any]:
    """The tree without train.steps where train.epochs alone is given on the command line, and the other way round."""
    section = tree.get("train")
    named = {key for key in _LENGTHS if scalar(given.get(f"train.{key}", "null").strip()) is not None}
    if len(named) != 1 or not isinstance(section, dict):
        return tree
    return {**tree, "train": {key: value for key, value in section.items() if key in named or key not in _LENGTHS}}


def _with_saved_model(tree: dict[str, Any], saved_model: SavedModel) -> dict[str, Any]:
    """The tree with a saved model's keys where it says `model: from_checkpoint`, if there is such a model.

    A new head has as many labels as the data: of a family that always classifies, theirs are not taken.
    """
    if tree.get("model") != FROM_CHECKPOINT:
        return tree
    values = (_value(tree, *key) for key in (("run", "dir"), ("checkpoint", "dir"), ("run", "init_from")))
    run_dir, checkpoint_dir, init_from = (in_home(v) if isinstance(v, str) and v else None for v in values)
    model = saved_model(run_dir, checkpoint_dir, init_from)
    if model is None:
        return tree
    labels_key = FAMILIES[model["family"]].hugging_face.labels_key
    of_new_head = {labels_key: None} if labels_key and _value(tree, "run", "new_head") is True else {}
    return {**tree, "model": {**model, **of_new_head}}


def _value(tree: dict[str, Any], section: str, key: str) -> object:
    inside = tree.get(section)
    return inside.get(key) if isinstance(inside, dict) else None


def _text(path: FilePath) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}); a config is a YAML file") from None
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file, and {recipes.unknown(path.stem)}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; name the YAML file in it") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: the config cannot be read: {error}") from None


def _source(key: str, sources: dict[Path, str]) -> str:
    """Where the key comes from; of one that is missing, the innermost section around it."""
    by_key = {".".join(map(str, path)): source for path, source in sources.items() if path}
    if key in by_key:
        return by_key[key]
    while "." in key:
        key = key.rpartition(".")[0]
        if key in by_key:
            return f"{key}: {by_key[key]}"
    return ""


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.2 would read as something other than text, such as a folder named 3e-4."""


def _represent_text(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    plain = scalar(value)
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if plain == value else '"')


_Dumper.add_representer(str, _represent_text)
