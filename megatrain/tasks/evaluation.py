"""Tasks answered by a model, by all ranks together: `megatrain eval --tasks`, and `train.tasks` during training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import orjson
import torch.distributed as dist
from rich.progress import Progress

from megatrain.atomic import commit_bytes
from megatrain.checkpoint.location import Location
from megatrain.config.tasks import Task, read_tasks
from megatrain.data import Dataset, open_dataset
from megatrain.distributed.bootstrap import RankInfo
from megatrain.distributed.groups import Groups
from megatrain.errors import ConfigError, DataError
from megatrain.inference.writer import TextSettings, Writer, open_writer
from megatrain.model.beams import BeamSearch
from megatrain.tasks.baseline import Baseline
from megatrain.tasks.contamination import find_seen
from megatrain.tasks.metrics import Metric, Outcome, judge_choices, judge_generation, judge_text, summarize
from megatrain.tasks.prompts import Example, encode_pair, make_examples
from megatrain.tasks.scoring import Request, score


@dataclass(frozen=True)
class TaskResult:
    """A task, answered. ``skipped``: examples that are longer than the model's context without any solved row: no
    figure counts them. ``num_shots_dropped``: solved rows that prompts had no room for.
    ``seen``: rows of which a run of 13 words is in the training data; None: it was not looked for. ``differences``: the
    metrics less those of a baseline, where there is one."""

    task: Task
    metrics: Mapping[str, Metric]
    outcomes: Sequence[Outcome]
    skipped: Sequence[int]
    num_shots_dropped: int
    seen: frozenset[int] | None = None
    differences: Mapping[str, Metric] = field(default_factory=dict)

    @property
    def figures(self) -> dict[str, Metric]:
        """The metrics, and where it was looked for, the share of the rows that are in the training data."""
        if self.seen is None:
            return dict(self.metrics)
        num_rows = len(self.outcomes) + len(self.skipped)
        return {**self.metrics, "seen_in_training": Metric(len(self.seen) / num_rows, None, num_rows)}

    @property
    def left_out(self) -> dict[str, int]:
        """Counts by what was left out."""
        return {"examples": len(self.skipped), "shots": self.num_shots_dropped}


class Questions(NamedTuple):
    """A task with its examples, in the order of its rows."""

    task: Task
    examples: Sequence[Example]


def read_questions(path: Path, num_shots: int | None = None, *, seed: int = 0, chat: bool = False) -> list[Questions]:
    """Those of a file of tasks. ``num_shots``: in place of each task's own; ``chat``: all tasks ask by the chat
    template. Raises ConfigError, DataError."""
    tasks = [task.model_copy(update={"chat": task.chat or chat}) for task in read_tasks(path)]
    if chat and (silent := [task.name for task in tasks if not task.prompt]):
        raise ConfigError(f"Task {silent[0]} has an empty prompt, which no user's message can be: leave out --chat.")
    return [Questions(t, make_examples(t, t.shots if num_shots is None else num_shots, seed)) for t in tasks]


def evaluate_tasks(
    path: Location,
    tasks: str | Path,
    num_shots: int | None = None,
    *,
    seed: int = 0,
    chat: bool = False,
    out: Path | None = None,
    baseline: Path | None = None,
    rank: RankInfo | None = None,
    tensor: int = 1,
    ema: bool = False,
    training_data: Sequence[str] = (),
    show_progress: bool = False,
) -> list[TaskResult]:
    """Each task of the file ``tasks``, answered by the model of a checkpoint; the same on all ranks.

    ``num_shots``, ``seed``, ``chat``: see `read_questions`. ``out``: a file of JSON lines for each example's answers,
    written by rank 0; ``baseline``: such a file of another model, to compare with. ``ema``: with the averaged weights.
    ``training_data``: datasets in which the examples are looked for. Collective over the ranks that ``rank`` is one of.
    Raises ConfigError, DataError or CheckpointError, before the model is loaded where that can be known.
    """
    questions = read_questions(Path(tasks), num_shots, seed=seed, chat=chat)
    answers = None if baseline is None else Baseline(baseline)
    datasets = [open_dataset(path) for path in training_data]
    writer, groups = open_writer(path, rank, tensor, ema=ema)
    with Progress(disable=not show_progress, transient=True) as progress:
        results = collect(questions, answer(ask(questions, writer, groups), writer, progress), groups)
        seen = _find_seen(questions, datasets, groups, progress) if datasets else {}
    results = [replace(result, seen=seen.get(result.task.name)) for result in results]
    if answers is not None:
        results = [replace(r, differences=answers.compare(r.task, r.outcomes)) for r in results]
    if out is not None and (rank is None or rank.rank == 0):
        commit_bytes(out, b"".join(_line(result, outcome) for result in results for outcome in result.outcomes))
    if groups is not None:
        dist.destroy_process_group()
    return results


def _line(result: TaskResult, outcome: Outcome) -> bytes:
    """An example's JSON line."""
    row = outcome.example.row
    seen = {} if result.seen is None else {"seen_in_training": row in result.seen}
    line = {"task": result.task.name, **outcome.record, **seen, "figures": outcome.figures}
    return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)


def _find_seen(
    questions: Sequence[Questions], datasets: Sequence[Dataset], groups: Groups | None, progress: Progress
) -> dict[str, frozenset[int]]:
    """`find_seen`, shared out to all ranks."""
    examples = {task.name: of_task for task, of_task in questions}
    share = (0, 1) if groups is None else (groups.rank, groups.topology.world_size)
    bar = progress.add_task("training data", total=sum(dataset.num_tokens for dataset in datasets) // share[1])
    own = find_seen(examples, datasets, share, lambda count: progress.advance(bar, count))
    every = [own] if groups is None else groups.all_gather_object(own)
    return {task: frozenset().union(*(each[task] for each in every)) for task in examples}


def ask(questions: Sequence[Questions], writer: Writer, groups: Groups | None) -> list[Asked]:
    """This rank's share of each task's examples as token ids. Raises ConfigError, DataError for one that cannot be
    asked."""
    family = writer.model.config.description
    if family.encoder is not None and (scoring := [task.name for task, _ in questions if task.kind != "generate"]):
        raise ConfigError(
            f"{scoring[0]}: an encoder-decoder model writes answers (kind generate); it scores no continuation of a "
            "prompt."
        )
    first, step = (0, 1) if groups is None else groups.batch_share
    found = []
    for task, examples in questions:
        mine = [_encode(task, example, writer) for example in examples[first::step]]
        found.append(Asked(task, [each for each in mine if each is not None]))
    return found


def answer(asked: Sequence[Asked], writer: Writer, progress: Progress | None = None) -> list[list[Outcome]]:
    """What was asked, answered. Collective over the ranks that share a copy of the model."""
    progress = progress or Progress(disable=True)
    found = []
    for task, examples in asked:
        bar = progress.add_task(task.name, total=sum(len(each.requests) for each in examples))
        found.append(_ANSWER[task.kind](task, examples, writer, partial(progress.advance, bar)))
    return found


def collect(
    questions: Sequence[Questions], own: Sequence[Sequence[Outcome]], groups: Groups | None
) -> list[TaskResult]:
    """Each task's results, from those of all ranks. Collective."""
    every = [own]
    if groups is not None:
        is_first_of_copy = groups.coordinate.tensor == groups.coordinate.pipeline == 0
        every = groups.all_gather_object(own if is_first_of_copy else [[] for _ in questions])
    return [
        _result(task, examples, sorted((o for each in every for o in each[number]), key=lambda o: o.example.row))
        for number, (task, examples) in enumerate(questions)
    ]


def _result(task: Task, examples: Sequence[Example], outcomes: Sequence[Outcome]) -> TaskResult:
    num_shots = {example.row: len(example.shots) for example in examples}
    answered = {outcome.example.row: len(outcome.example.shots) for outcome in outcomes}
    return TaskResult(
        task=task,
        metrics=summarize(task, outcomes),
        outcomes=outcomes,
        skipped=[row for row in num_shots if row not in answered],
        num_shots_dropped=sum(num_shots[row] - left for row, left in answered.items()),
    )


class _AskedExample(NamedTuple):
    """An example and its token ids: a request a continuation; of kind generate one, whose continuation is empty."""

    example: Example
    requests: Sequence[Request]


class Asked(NamedTuple):
    """A task with those of its examples that a rank answers."""

    task: Task
    examples: Sequence[_AskedExample]


def _encode(task: Task, example: Example, writer: Writer) -> _AskedExample | None:
    """The example with as many of its solved rows as the context has room for; None where it has none for itself."""
    num_new = task.max_new_tokens if task.kind == "generate" else -1  # the last token of a continuation is not read
    if writer.model.config.description.encoder is not None:
        num_new = 0  # a decoder writes where it reads no prompt
    while True:
        requests = _requests(task, example, writer)
        longest = max(len(request.context) + len(request.continuation) for request in requests)
        if longest + num_new <= writer.model.config.max_position_embeddings:
            return _AskedExample(example, requests)
        if not example.shots:
            return None
        example = example.with_fewer_shots()


def _requests(task: Task, example: Example, writer: Writer) -> list[Request]:
    """See _AskedExample."""
    if task.chat:
        return _chat_requests(task, example, writer)
    if task.kind == "generate":
        return [Request(_context(writer.tokenizer.encode(example.prompt), writer), ())]
    pairs = [encode_pair(writer.tokenizer, example.prompt, text) for text in example.continuations]
    return [Request(_context(context, writer), tuple(continuation)) for context, continuation in pairs]


def _context(ids: list[int], writer: Writer) -> tuple[int, ...]:
    """A prompt as documents begin. Without tokens it is what a document begins after: its end."""
    if context := writer.begin(ids):
        return tuple(context)
    if (eod := writer.assets.special_tokens.eod) is None:
        raise ConfigError(
            "An example without a prompt needs a token to begin after, and the model's tokenizer names no "
            "beginning and no end of a document: give the task a prompt."
        )
    return (eod.id,)


def _chat_requests(task: Task, example: Example, writer: Writer) -> list[Request]:
    """The template writes all special tokens itself, the first one too. It is encoded with the answer, as a
    conversation is for training, and what begins the answer is never part of it."""
    try:
        prompt = writer.chat_text(example.messages)
    except DataError as error:
        raise DataError(f"Task {task.name}, row {example.row}: {error}") from None
    before = tuple(writer.tokenizer.encode(prompt))
    whole = [tuple(writer.tokenizer.encode(prompt + text)) for text in example.scored]
    return [Request(ids[: len(before)], ids[len(before) :]) for ids in whole] or [Request(before, ())]


def _answer_choices(
    task: Task, asked: Sequence[_AskedExample], writer: Writer, advance: Callable[[int], None]
) -> list[Outcome]:
    scores = iter(score(writer.model, [request for each in asked for request in each.requests], advance))
    outcomes = []
    for example, requests in asked:
        likelihoods = [next(scores).log_likelihood for _ in requests]
        outcomes.append(judge_choices(task, example, likelihoods, [len(each.continuation) for each in requests]))
    return outcomes


def _answer_perplexity(
    task: Task, asked: Sequence[_AskedExample], writer: Writer, advance: Callable[[int], None]
) -> list[Outcome]:
    scores = score(writer.model, [request for each in asked for request in each.requests], advance)
    return [
        judge_text(task, example, found.log_likelihood, len(request.continuation), found.is_greedy)
        for (example, (request,)), found in zip(asked, scores, strict=True)
    ]


def _answer_by_generation(
    task: Task, asked: Sequence[_AskedExample], writer: Writer, advance: Callable[[int], None]
) -> list[Outcome]:
    beams = BeamSearch(task.num_beams, task.length_penalty) if task.num_beams > 1 else None
    settings = TextSettings(task.max_new_tokens, stops=task.stops, beams=beams)
    texts = writer.write([request.context for each in asked for request in each.requests], settings, advance)
    return [judge_generation(task, each.example, text.text) for each, text in zip(asked, texts, strict=True)]


_ANSWER = {"choices": _answer_choices, "perplexity": _answer_perplexity, "generate": _answer_by_generation}
