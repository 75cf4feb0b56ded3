"""The file of `megatrain eval --tasks`: what is asked, of which rows, and how answers are scored."""

from __future__ import annotations

from pathlib import Path as FilePath
from typing import Annotated, Literal

from pydantic import Field, RootModel, ValidationError

from megatrain.config import document
from megatrain.config.checks import unused
from megatrain.config.explain import explain
from megatrain.config.problem import Problem, config_error
from megatrain.config.schema import Path, Section, Text
from megatrain.errors import ConfigError

TextScore = Literal["edit_similarity", "bleu", "chrf", "chrf++"]
Count = Annotated[int, Field(ge=1, le=1 << 20)]


def _check(task: Task) -> list[Problem]:
    problems = []
    wants, has = task.kind == "choices", task.choices is not None
    if wants != has:
        reason = "kind choices scores each of them" if wants else f"kind {task.kind} has none; leave it out"
        problems.append(Problem("choices", task.choices, reason))
    if task.kind != "generate":
        keys = ("metrics", "num_beams", "length_penalty")
        problems += unused(task, keys, f"of kind generate only (it is {task.kind})")
    if task.chat and not task.prompt:
        problems.append(Problem("prompt", task.prompt, "with chat it is the user's message, which may not be empty"))
    return problems


class Task(Section, check=_check):
    """One task. ``prompt``, ``answer`` and ``choices`` are Jinja templates over the keys of a row of ``path``."""

    name: Text
    kind: Literal["choices", "generate", "perplexity"]
    path: Annotated[Path, Field(description="JSON lines: one object a row.")]
    prompt: Annotated[str, Field(description="What comes before the answer; may be empty for perplexity.")]
    answer: Annotated[
        Text, Field(description="The right answer; for choices its text, or its index (from 0) among them.")
    ]
    choices: Annotated[
        Text | Annotated[tuple[Text, ...], Field(strict=False, min_length=2)] | None,
        Field(description="Templates of the choices, or one template that is a list: `{{ options }}`."),
    ] = None
    shots: Annotated[int, Field(ge=0, le=1 << 10, description="Solved rows before each prompt.")] = 0
    shots_path: Annotated[Path | None, Field(description="Where they are drawn from; null: the other rows.")] = None
    description: Annotated[str, Field(description="Before the first shot; with chat the system message.")] = ""
    chat: Annotated[
        bool, Field(description="Ask by the model's chat template: each shot is a turn of user and assistant.")
    ] = False
    delimiter: Annotated[str, Field(description="Between a prompt and its answer.")] = " "
    shots_delimiter: Annotated[str, Field(description="Between solved rows.")] = "\n\n"
    max_new_tokens: Annotated[Count, Field(description="Of kind generate.")] = 64
    stop: Annotated[
        tuple[Text, ...] | None,
        Field(
            strict=False,
            description="Texts that end an answer of kind generate; null: a new line, with chat only the turn's end.",
        ),
    ] = None
    num_beams: Annotated[
        Count, Field(description="Of kind generate: 1 for the likeliest token each time, more for beam search.")
    ] = 1
    length_penalty: Annotated[
        float, Field(allow_inf_nan=False, description="Of beam search: above 0, longer texts gain.")
    ] = 1.0
    metrics: Annotated[
        tuple[Literal["exact_match"] | TextScore, ...],
        Field(strict=False, min_length=1, description="Of kind generate; chrf++ is chrF with words (word_order 2)."),
    ] = ("exact_match",)
    cluster: Annotated[
        Text | None,
        Field(description="A template; rows for which it is the same text are drawn together by the bootstrap."),
    ] = None
    limit: Annotated[Count | None, Field(description="Only the first rows.")] = None

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is not None:
            return self.stop
        return () if self.chat else ("\n",)


class _TaskFile(RootModel[tuple[Task, ...]]):
    root: Annotated[tuple[Task, ...], Field(strict=False, min_length=1)]


def read_tasks(path: FilePath) -> tuple[Task, ...]:
    """The tasks of a YAML file: a list of mappings. Raises ConfigError with all that is wrong, by key and line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the tasks cannot be read: {error}") from None
    read = document.read(text, str(path))
    lines = {".".join(map(str, key)): f"line {line}" for key, line in read.lines.items()}
    try:
        tasks = _TaskFile.model_validate(read.tree).root
    except ValidationError as error:
        problems = [*read.problems, *explain(error, Task)]
        raise config_error(str(path), problems, lambda key: _line(key, lines)) from None
    if read.problems:
        raise config_error(str(path), read.problems)
    names = [task.name for task in tasks]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{path}: two tasks are called {repeated[0]}; give each a name of its own.")
    return tasks


def _line(key: str, lines: dict[str, str]) -> str:
    while key and key not in lines:
        key = key.rpartition(".")[0]
    return lines.get(key, "")
