"""Options that several commands of `megatrain-data` share: what is read, who runs the work, and `--check`.

Only what parses the command line is imported here.
"""

from __future__ import annotations

import inspect as inspect_module
import os
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from data_tools.kinds import Kind
from megatrain.errors import EXIT_BUG, EXIT_DATA, MegatrainError
from megatrain.terminal import printable

if TYPE_CHECKING:
    from data_tools.executors import Place

TextFormat = Literal["jsonl", "json", "csv", "tsv", "parquet", "arrow", "text"]
Workers = Annotated[int | None, typer.Option(min=1, max=1024, help="Worker processes; one a core unless given.")]


def show_text(text: str, err: bool = False) -> None:
    typer.echo(printable(text), err=err)


def tell(text: str) -> None:
    show_text(text, err=True)


def report_error(error: BaseException) -> int:
    """Say what is wrong, in one paragraph, and give the exit code for it; show a bug in full."""
    if isinstance(error, MegatrainError):
        tell(f"megatrain-data: {error}")
        return error.exit_code
    if not isinstance(error, OSError):
        traceback.print_exception(error)
        return EXIT_BUG
    what = os.strerror(error.errno) if error.errno else str(error)  # pyarrow's own text of it says the same thrice
    tell(f"megatrain-data: {error.filename or 'a file'}: {what.rstrip('.')}.")
    return EXIT_DATA


def text_options(
    text_key: Annotated[str, typer.Option(help="The key or column with a record's text; a.b: key b in a.")] = "text",
    id_key: Annotated[str, typer.Option(help="The key or column that holds a record's id, if it has one.")] = "id",
    include: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Read only such files; repeatable.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Leave out such files; repeatable.")] = None,
    format: Annotated[TextFormat | None, typer.Option(help="What every file holds, whatever its name.")] = None,
    text_files: Annotated[
        bool, typer.Option("--text-files", help="Files of folders whose kind is not known are text, a document each.")
    ] = False,
    errors: Annotated[
        Literal["strict", "replace", "skip"],
        typer.Option(help="What cannot be read: stop; stop, but keep invalid UTF-8 as U+FFFD; leave out and list."),
    ] = "strict",
) -> Any:
    from data_tools.inputs import FileSelector
    from data_tools.units import ReadOptions

    kind = None if format is None else Kind(format)
    selection = FileSelector(tuple(include or ()), tuple(exclude or ()), kind, text_files)
    return ReadOptions(text_key, id_key, errors, selection=selection)


def image_options(
    image_key: Annotated[str, typer.Option(help="The column of a table with the images: bytes, or {bytes, path}.")] = (
        "image"
    ),
    label_key: Annotated[str, typer.Option(help="The column with their labels: numbers or names.")] = "label",
    id_key: Annotated[str, typer.Option(help="The column that holds an image's id, if there is one.")] = "id",
    include: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Read only such files; repeatable.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Leave out such files; repeatable.")] = None,
    errors: Annotated[
        Literal["strict", "skip"], typer.Option(help="What cannot be read: stop; leave out and list.")
    ] = "strict",
) -> Any:
    """What `images` reads of its inputs."""
    from data_tools.image_files import ImageFields, ImageSelector
    from data_tools.units import ReadOptions

    selection = ImageSelector(tuple(include or ()), tuple(exclude or ()))
    return ReadOptions(image_key, id_key, errors, selection=selection, fields=ImageFields(label_key))


class Running:
    """By whom a command's units are run, and which of them: options of the command."""

    def __init__(
        self,
        workers: Workers = None,
        restart: Annotated[
            bool, typer.Option("--restart", help="Start over: remove what this command has made before.")
        ] = False,
        share: Annotated[
            str | None,
            typer.Option(metavar="K/N", help="Do share K of N (K from 1) of the first stage that is not done."),
        ] = None,
        stage: Annotated[
            str | None, typer.Option(help="Do this stage alone; code 75 where an earlier one is not done.")
        ] = None,
        dask: Annotated[
            str | None,
            typer.Option(
                metavar="ADDRESS|FILE", help="Workers of a Dask cluster: tls://HOST:PORT, or a scheduler file."
            ),
        ] = None,
        dask_plain: Annotated[
            bool, typer.Option("--dask-plain", help="Let the Dask cluster be without TLS: its network is closed.")
        ] = False,
        max_memory: Annotated[
            str | None,
            typer.Option(metavar="SIZE", help="What each process may hold, such as 2G; 80% of its share unless given."),
        ] = None,
    ) -> None:
        self.workers, self.restart, self.stage = workers, restart, stage
        self._place = share, dask, dask_plain, max_memory

    def place(self) -> AbstractContextManager[Place | None]:
        from data_tools.executors import find_place

        return find_place(report_error, self.workers, *self._place, tell)


def _check_options(
    check: Annotated[
        bool,
        typer.Option("--check", help="Read all inputs, try the storage, list all that is wrong, and leave nothing."),
    ] = False,
) -> bool:
    return check


def _check(inputs: Sequence[str], out: Path, read: Any, running: Running | None = None, **given: Any) -> None:
    """Look at all that the command with these options needs."""
    from data_tools.check import Storage, check_command
    from data_tools.clean.filter import choose_filters
    from data_tools.conversations import Answers
    from data_tools.image_files import resolve_images
    from data_tools.progress import show_progress
    from data_tools.ranks import Ranks
    from data_tools.tokenizer import load_tokenizer

    others: list[Callable[[], object]] = []
    if "tokenizer" in given:
        ends = given["eod_token"], given["bos_token"]
        others.append(partial(load_tokenizer, given["tokenizer"].expanduser(), *ends))
        answers = Answers.of(given)
        read = answers.read(read)
        others.append(partial(answers.supervision, given["tokenizer"].expanduser(), *ends))
    if "filters" in given:
        others.append(partial(choose_filters, given["filters"], given["config"] and given["config"].expanduser()))
    storage = Storage(out, running is not None, 0.0 if running is None else 1.0)
    num_workers = (running and running.workers) or Ranks().num_cores()
    is_images = "label_names" in given and "tokenizer" not in given
    resolve = partial(resolve_images, names_file=given["label_names"]) if is_images else None
    check_command(inputs, read, storage, others, num_workers, show_progress, show_text, resolve)


def reads_inputs(
    stages: Any = None, read: Callable[..., Any] = text_options
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command options in place of its parameters `read` and, where it has `stages`, `running`; and `--check`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        groups: dict[str, Callable[..., Any]] = {"running": Running, "read": read, "check": _check_options}
        if stages is None:
            del groups["running"]
        options = {name: inspect_module.signature(make, eval_str=True).parameters for name, make in groups.items()}
        own = inspect_module.signature(command, eval_str=True).parameters.values()
        parameters = [each for each in own if each.name not in groups]
        for name, option in ((name, option) for group in options.values() for name, option in group.items()):
            kind = option.annotation if name != "stage" else Annotated[stages | None, option.annotation.__metadata__[0]]
            parameters.append(option.replace(kind=option.KEYWORD_ONLY, annotation=kind))

        def run(**given: Any) -> None:
            for name, make in groups.items():
                given[name] = make(**{option: given.pop(option) for option in options[name]})
            (_check if given.pop("check") else command)(**given)

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        run.__signature__ = inspect_module.Signature(parameters)  # type: ignore[attr-defined]
        return run

    return decorate
