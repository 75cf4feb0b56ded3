"""Rows and templates into prompts with solved rows before them, and those into token ids."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatrain.config.tasks import Task
from megatrain.data.chat import Message
from megatrain.data.json_lines import read_objects
from megatrain.data.tokenizer import Tokenizer
from megatrain.errors import ConfigError, DataError

Row = dict[str, Any]

_TEMPLATES = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)


class Example(NamedTuple):
    """A row that is asked, by its number.

    ``solved``: the solved rows before it, questions and answers, ``shots`` their numbers; ``scored``: the texts to be
    scored (of kind generate none); ``choices``: those to choose from; ``answer``: the right one; ``gold``: its index
    among the choices. ``delimiter``: between a question and its answer; ``between``: between rows. ``cluster``: of the
    examples that are drawn together where a figure's error is estimated; None: it is one by itself.
    """

    row: int
    description: str
    solved: tuple[tuple[str, str], ...]
    shots: tuple[int, ...]
    question: str
    delimiter: str
    between: str
    scored: tuple[str, ...]
    choices: tuple[str, ...]
    answer: str
    gold: int | None
    cluster: str | None = None

    @property
    def prompt(self) -> str:
        """All that comes before the answer."""
        head = (self.description,) if self.description else ()
        solved = (f"{asked}{self.delimiter}{answer}" if asked else answer for asked, answer in self.solved)
        return self.between.join((*head, *solved, self.question))

    @property
    def continuations(self) -> tuple[str, ...]:
        """What is scored after the prompt."""
        delimiter = self.delimiter if self.prompt else ""
        return tuple(delimiter + text for text in self.scored)

    @property
    def messages(self) -> list[Message]:
        """The same prompt as a conversation: each solved row a turn, the description as system message."""
        head = [("system", self.description)] if self.description else []
        turns = [turn for asked, answer in self.solved for turn in (("user", asked), ("assistant", answer))]
        return [{"role": role, "content": text} for role, text in (*head, *turns, ("user", self.question))]

    def with_fewer_shots(self) -> Example:
        """Without the first of the solved rows."""
        return self._replace(solved=self.solved[1:], shots=self.shots[1:])


def read_rows(path: str) -> list[Row]:
    """The objects of a JSON lines file. Raises DataError with the line."""
    rows = [row for _, row in read_objects(Path(path))]
    if not rows:
        raise DataError(f"{path} has no rows.")
    return rows


def make_examples(task: Task, num_shots: int, seed: int) -> list[Example]:
    """The examples of a task, in the order of its rows.

    Each example's solved rows depend on the seed, the task's name and its own index alone, and never hold itself.
    """
    solved = _Solved(task)
    rows = read_rows(task.path)
    pool = rows if task.shots_path is None else read_rows(task.shots_path)
    if num_shots > len(pool) - (task.shots_path is None):
        raise ConfigError(
            f"Task {task.name}: {num_shots} shots are more than the {len(pool)} rows of "
            f"{task.shots_path or task.path} can give. Give fewer, or name a file with more in shots_path."
        )
    examples = []
    for index, row in enumerate(rows[: task.limit]):
        own = index if task.shots_path is None else None
        shots = _draw(f"{seed}/{task.name}/{index}", len(pool), num_shots, own)
        question, choices, answer, gold = solved.render(row, index)
        examples.append(
            Example(
                row=index,
                description=task.description,
                solved=tuple(solved.question_and_answer(pool[shot], shot) for shot in shots),
                shots=shots,
                question=question,
                delimiter=task.delimiter,
                between=task.shots_delimiter,
                scored={"choices": choices, "perplexity": (answer,), "generate": ()}[task.kind],
                choices=choices,
                answer=answer,
                gold=gold,
                cluster=solved.cluster(row, index),
            )
        )
    return examples


class _Solved:
    """A task's templates."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._prompt, self._answer = self._template("prompt", task.prompt), self._template("answer", task.answer)
        given = task.choices
        self._list = self._expression(given) if isinstance(given, str) else None
        self._choices = [self._template("choices", text) for text in given] if isinstance(given, tuple) else []
        self._cluster = None if task.cluster is None else self._template("cluster", task.cluster)

    def render(self, row: Row, index: int) -> tuple[str, tuple[str, ...], str, int | None]:
        """Prompt, choices, answer, and the answer's index among the choices."""
        with self._failures_told(index):
            prompt, answer = self._prompt.render(row), self._answer.render(row)
            choices = [template.render(row) for template in self._choices]
            if self._list is not None:
                choices = self._list(**row)
        if not isinstance(choices, (list, tuple)) or not all(isinstance(choice, str) for choice in choices):
            raise self._error(index, "choices is no list of texts")
        if self._task.kind != "choices":
            if not answer:
                raise self._error(index, "the answer is empty")
            return prompt, (), answer, None
        if "" in choices or len(set(choices)) < max(len(choices), 2):
            raise self._error(index, f"the choices {list(choices)} are not two or more different texts")
        if answer in choices:
            return prompt, tuple(choices), answer, choices.index(answer)
        if answer.strip().isdigit() and int(answer) < len(choices):
            return prompt, tuple(choices), choices[int(answer)], int(answer)
        raise self._error(index, f"the answer {answer!r} is none of the choices, and no index of one")

    def question_and_answer(self, row: Row, index: int) -> tuple[str, str]:
        question, _, answer, _ = self.render(row, index)
        return question, answer

    def cluster(self, row: Row, index: int) -> str | None:
        with self._failures_told(index):
            return None if self._cluster is None else self._cluster.render(row)

    @contextlib.contextmanager
    def _failures_told(self, index: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - a template may raise whatever its operators do
            raise self._error(index, f"a template fails: {error}") from None

    def _template(self, key: str, text: str) -> jinja2.Template:
        try:
            return _TEMPLATES.from_string(text)
        except jinja2.TemplateError as error:
            raise ConfigError(f"Task {self._task.name}: {key} is no Jinja template: {error}.") from None

    def _expression(self, text: str) -> Any:
        inside = text.strip().removeprefix("{{").removesuffix("}}")
        try:
            return _TEMPLATES.compile_expression(inside, undefined_to_none=False)
        except jinja2.TemplateError as error:
            raise ConfigError(f"Task {self._task.name}: choices is no Jinja expression: {error}.") from None

    def _error(self, index: int, reason: str) -> DataError:
        return DataError(f"Task {self._task.name}, row {index} of {self._task.path}: {reason}.")


def _draw(key: str, num_rows: int, count: int, own: int | None) -> tuple[int, ...]:
    """``count`` different rows, none of them ``own``, as a hash of ``key`` has it."""
    drawn: list[int] = []
    for attempt in itertools.count():
        if len(drawn) == count:
            break
        digest = hashlib.blake2b(f"{key}/{attempt}".encode(), digest_size=8).digest()
        row = int.from_bytes(digest, "little") % num_rows
        if row != own and row not in drawn:
            drawn.append(row)
    return tuple(drawn)


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of a context and of what follows it, as lm-evaluation-harness splits them (``_encode_pair``).

    Spaces at the context's end go to the continuation; the whole is encoded at once, and cut after as many tokens as
    the context alone has.
    """
    stripped = context.rstrip()
    context, continuation = stripped, context[len(stripped) :] + continuation
    whole, before = tokenizer.encode(context + continuation), tokenizer.encode(context)
    return whole[: len(before)], whole[len(before) :]
