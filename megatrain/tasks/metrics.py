"""From scored examples to the figures of a task, each with its standard error and confidence interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from megatrain.config.tasks import Task
from megatrain.errors import CheckpointError
from megatrain.tasks.bootstrap import Figure, Floats, bootstrap, difference, mean, ratio
from megatrain.tasks.prompts import Example


class Outcome(NamedTuple):
    """An example, answered. ``figures``: what the task's metrics are made of, by metric; ``record``: a JSON line."""

    example: Example
    figures: Mapping[str, float]
    record: Mapping[str, Any]


class Metric(NamedTuple):
    """``value``, its standard error and the ends of its 95% confidence interval (None where one example is all), over
    how many examples, and sacrebleu's signature where the figure is one of its."""

    value: float
    stderr: float | None
    n: int
    confidence_interval: tuple[float, float] | None = None
    signature: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Without what there is not of most figures."""
        optional = {"confidence_interval": self.confidence_interval, "signature": self.signature}
        known = {key: value for key, value in optional.items() if value is not None}
        return {"value": self.value, "stderr": self.stderr, "n": self.n, **known}


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
    """The metrics of a task over its examples, with errors by bootstrap; the standard error of a mean of examples that
    do not come in clusters is the one that follows from their variance."""
    if not outcomes:
        return {}
    metrics = _with_errors(task, outcomes, figures_of(task, outcomes))
    for name in metrics.keys() & outcomes[0].figures if task.cluster is None and len(outcomes) > 1 else ():
        values = [outcome.figures[name] for outcome in outcomes]
        metrics[name] = metrics[name]._replace(stderr=float(np.std(values, ddof=1) / math.sqrt(len(values))))
    return metrics


def compare(task: Task, outcomes: Sequence[Outcome], baseline: Sequence[Outcome]) -> dict[str, Metric]:
    """The metrics less those of ``baseline``, another model's answers to the same examples in the same order; errors by
    paired bootstrap."""
    if not outcomes:
        return {}
    ours, theirs = figures_of(task, outcomes), figures_of(task, baseline)
    return _with_errors(task, outcomes, {name: difference(ours[name], theirs[name]) for name in ours})


def _with_errors(task: Task, outcomes: Sequence[Outcome], figures: Mapping[str, Figure]) -> dict[str, Metric]:
    clusters = None if task.cluster is None else [outcome.example.cluster for outcome in outcomes]
    metrics = {}
    for (name, figure), sampled in zip(figures.items(), bootstrap([*figures.values()], clusters), strict=True):
        stderr, interval = (None, None) if sampled is None else (sampled.stderr, (sampled.low, sampled.high))
        metrics[name] = Metric(figure.value, stderr, len(outcomes), interval, figure.signature)
    return metrics


def figures_of(task: Task, outcomes: Sequence[Outcome]) -> dict[str, Figure]:
    """By the names of the task's metrics."""
    columns = {name: np.array([o.figures[name] for o in outcomes]) for name in outcomes[0].figures}
    if task.kind == "choices":
        return {name: mean(values) for name, values in columns.items()}
    if task.kind == "perplexity":
        per_token = ratio(columns["nats"], columns["tokens"])
        return {
            "loss": per_token,
            "perplexity": per_token._replace(of_sums=lambda sums: math.exp(min(per_token.of_sums(sums), 700.0))),
            "bits_per_byte": ratio(columns["nats"] / math.log(2), columns["bytes"]),
        }
    return {name: _of_texts(name, columns, outcomes) for name in task.metrics}


def _of_texts(name: Any, columns: Mapping[str, Floats], outcomes: Sequence[Outcome]) -> Figure:
    if name in columns:
        return mean(columns[name])
    from megatrain.tasks.text_scores import text_score  # libraries that take a tenth of a second, for those who ask

    return text_score(name, [o.record["generated"] for o in outcomes], [o.example.answer for o in outcomes])


def _common(task: Task, example: Example) -> dict[str, Any]:
    prompt = {"messages": example.messages} if task.chat else {"prompt": example.prompt}
    return {"row": example.row, **prompt, "shots": list(example.shots)}


def _refuse_what_is_no_number(task: Task, example: Example, values: Sequence[float]) -> None:
    if not all(map(math.isfinite, values)):
        raise CheckpointError(
            f"Task {task.name}, row {example.row}: the model's log-likelihood is {values[0]}: its weights are "
            "ruined, as by a run that diverged. Take an earlier checkpoint."
        )
