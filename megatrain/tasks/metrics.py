"""From scored examples to the figures of a task, each with its standard error."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from megatrain.config.tasks import Task
from megatrain.errors import CheckpointError
from megatrain.tasks.prompts import Example

SAMPLES = 1000


class Outcome(NamedTuple):
    """An example, answered. ``figures``: what the task's metrics are made of, by metric; ``record``: a JSON line."""

    example: Example
    figures: Mapping[str, float]
    record: Mapping[str, Any]


class Metric(NamedTuple):
    """``value``, its standard error (None where one example is all), and over how many examples."""

    value: float
    stderr: float | None
    n: int


def judge_choices(task: Task, example: Example, log_likelihoods: Sequence[float], num_tokens: Sequence[int]) -> Outcome:
    """Right or wrong by the likeliest choice: as a whole (``acc``), by character (``acc_norm``), by UTF-8 byte
    (``acc_bytes``), by token (``acc_tokens``); lengths without the delimiter, as lm-evaluation-harness has them.
    Of choices that are equally likely the first counts."""
    _refuse_what_is_no_number(task, example, log_likelihoods)
    values = np.array(log_likelihoods)
    lengths = {
        "acc": np.ones(len(values)),
        "acc_norm": np.array([len(choice) for choice in example.choices]),
        "acc_bytes": np.array([len(choice.encode()) for choice in example.choices]),
        "acc_tokens": np.array(num_tokens),
    }
    chosen = {name: int(np.argmax(values / length)) for name, length in lengths.items()}
    figures = {name: float(index == example.gold) for name, index in chosen.items()}
    figures["ties"] = float(np.sum(values == values.max()) > 1)
    record = {
        **_common(task, example),
        "choices": list(example.choices),
        "gold": example.gold,
        "log_likelihoods": list(log_likelihoods),
        "chosen": chosen,
    }
    return Outcome(example, figures, record)


def judge_text(task: Task, example: Example, log_likelihood: float, num_tokens: int, is_greedy: bool) -> Outcome:
    """Of kind perplexity: nats, tokens and UTF-8 bytes of the answer."""
    _refuse_what_is_no_number(task, example, [log_likelihood])
    figures = {"nats": -log_likelihood, "tokens": float(num_tokens), "bytes": float(len(example.answer.encode()))}
    record = {
        **_common(task, example),
        "answer": example.answer,
        "log_likelihood": log_likelihood,
        "is_greedy": is_greedy,
    }
    return Outcome(example, figures, record)


def judge_generation(task: Task, example: Example, text: str) -> Outcome:
    """Of kind generate: whether the text is the answer, spaces around both aside."""
    is_right = text.strip() == example.answer.strip()
    record = {**_common(task, example), "answer": example.answer, "generated": text, "exact_match": is_right}
    return Outcome(example, {"exact_match": float(is_right)}, record)


def summarize(task: Task, outcomes: Sequence[Outcome]) -> dict[str, Metric]:
    """The metrics of a task: means over its examples; of perplexity, ratios of sums, with errors by bootstrap over
    the examples."""
    if not outcomes:
        return {}
    columns = {name: np.array([o.figures[name] for o in outcomes]) for name in outcomes[0].figures}
    if task.kind != "perplexity":
        return {name: _mean(values) for name, values in columns.items()}
    draws = np.random.default_rng(0).integers(len(outcomes), size=(SAMPLES, len(outcomes)))
    return dict(_ratios(columns, draws))


def _mean(values: np.ndarray[Any, np.dtype[np.float64]]) -> Metric:
    n = len(values)
    return Metric(float(values.mean()), float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else None, n)


def _ratios(columns: Mapping[str, Any], draws: Any) -> Iterator[tuple[str, Metric]]:
    n = len(draws[0])
    for name, per in (("loss", "tokens"), ("perplexity", "tokens"), ("bits_per_byte", "bytes")):
        value = float(_shaped(name, columns["nats"].sum() / columns[per].sum()))
        sampled = _shaped(name, columns["nats"][draws].sum(1) / columns[per][draws].sum(1))
        yield name, Metric(value, float(sampled.std(ddof=1)) if n > 1 else None, n)


def _shaped(name: str, nats: Any) -> Any:
    """From nats a token, or a byte."""
    if name == "perplexity":
        return np.exp(np.minimum(nats, 700.0))
    return nats / math.log(2) if name == "bits_per_byte" else nats


def _common(task: Task, example: Example) -> dict[str, Any]:
    prompt = {"messages": example.messages} if task.chat else {"prompt": example.prompt}
    return {"row": example.row, **prompt, "shots": list(example.shots)}


def _refuse_what_is_no_number(task: Task, example: Example, values: Sequence[float]) -> None:
    if not all(map(math.isfinite, values)):
        raise CheckpointError(
            f"Task {task.name}, row {example.row}: the model's log-likelihood is {values[0]}: its weights are "
            "ruined, as by a run that diverged. Take an earlier checkpoint."
        )
