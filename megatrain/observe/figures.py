"""A line of metrics.jsonl as figures under the names that TensorBoard and trackers show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatrain.observe.goodput import goodput_of


def figures_of(line: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a step, a validation or train.tasks; none of an event. What is not known is left out."""
    if "event" in line:
        return {}
    if "tasks" in line:
        named = _of_tasks(line)
    else:
        named = _of_validation(line) if "validation_loss" in line else _of_step(line)
    return {name: float(value) for name, value in named if isinstance(value, int | float)}


def _of_step(line: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield "train/loss", line.get("loss")
    yield "train/grad_norm", line.get("grad_norm")
    yield "train/learning_rate", line.get("lr")
    yield "train/tokens", line.get("tokens")
    yield "train/skipped_updates", line.get("skipped")
    yield "throughput/tokens_per_second", line.get("tokens_per_second")
    yield "throughput/step_seconds", line.get("step_seconds")
    yield "throughput/mfu", line.get("mfu")
    if isinstance(held := line.get("memory_bytes"), int):
        yield "memory/peak_GiB", held / 2**30
    for part, seconds in _mapping(line, "parts"):
        yield f"step_parts/{part}_seconds", seconds
    for part, spread in _mapping(line, "ranks"):
        for name, value in spread.items():
            yield f"ranks/{part}_{name}", value
    if (goodput := goodput_of(line)) is not None:
        yield from ((f"goodput/{part}", share) for part, share in goodput.shares.items())


def _of_validation(line: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield "validation/loss", line["validation_loss"]
    yield "validation/perplexity", line.get("perplexity")
    for name, of_set in _mapping(line, "validation_losses"):
        yield f"validation_loss/{name}", of_set


def _of_tasks(line: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, figures in _mapping(line, "tasks"):
        for metric, figure in figures.items():
            yield f"tasks/{name}/{metric}", figure["value"]


def _mapping(line: Mapping[str, Any], key: str) -> list[tuple[str, Any]]:
    found = line.get(key)
    return list(found.items()) if isinstance(found, Mapping) else []
