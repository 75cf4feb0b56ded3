"""What `dedup` and `filter` have in common: the documents read and tagged, then listed and written, then published."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from data_tools.clean.attributes import Corpus, Tagger, Tagging, index_parts, plan_reading, result_path
from data_tools.clean.output import EXAMPLES_FOLDER, OutputWriter, move_staged, output_files, staged_file
from data_tools.clean.report import (
    REPORT_FOLDER,
    Lister,
    Tally,
    example_documents,
    make_report,
    render,
    staged_list,
    sum_tallies,
)
from data_tools.folder import OutputFolder
from data_tools.job import Effort, Records, Stage, one_unit
from data_tools.origin import Origin
from data_tools.units import ReadOptions
from megatrain.atomic import commit_bytes
from megatrain.data.format import SKIPPED_FILE, canonical_json
from megatrain.errors import ConfigError

REPORT_FILE, TEXT_FILE = "report.json", "report.txt"
_MADE = re.compile(rf"part-\d{{6,}}-\d{{6,}}\.jsonl\.zst|\d{{4,}}|{re.escape(REPORT_FOLDER)}")

Describe = Callable[[Tally], dict[str, Any]]


@dataclass(frozen=True)
class Cleaning:
    """A command that writes its input without some of the documents."""

    origin: Origin
    read: ReadOptions
    out: Path
    effort: Effort
    folders: frozenset[str] = frozenset()
    """What the command makes beside what `_MADE` names."""

    @property
    def report_path(self) -> Path:
        return self.out / REPORT_FOLDER / REPORT_FILE

    def run(self, restart: bool, stages: Callable[[Path], Iterator[Stage]]) -> dict[str, Any] | None:
        """The report; None where others are to do the rest. Raises ConfigError where `out` holds anything else."""
        folder = OutputFolder(self.out, self.report_path, self._is_made)
        if folder.is_finished and not restart:
            report = self._finished()
            folder.close()
            return report
        if folder.is_finished:
            self._refuse_others()
        return self._finished() if folder.run(self.origin, self.effort, restart, stages) else None

    def _is_made(self, path: Path) -> bool:
        return path.name in self.folders or _MADE.fullmatch(path.name) is not None

    def _refuse_others(self) -> None:
        others = [path.name for path in self.out.iterdir() if not self._is_made(path) and path.name[0] != "."]
        if others:
            raise ConfigError(
                f"--out {self.out} is a folder with other things in it, such as {others[0]}, which --restart leaves "
                "alone: move them, or give a new folder."
            )

    def _finished(self) -> dict[str, Any]:
        report: dict[str, Any] = orjson.loads(self.report_path.read_bytes())
        way_out = "Give another --out, or --restart to replace it."
        self.origin.refuse_other(report["job"], self.report_path, f"{self.out} already holds a result", way_out)
        return report

    def tag(self, tagger: Tagger, folder: Path) -> Generator[Stage, None, Corpus]:
        """The stages in which all documents are read and tagged; gives these documents."""
        attributes = folder.parent / "attributes"
        units, chunks = plan_reading(self.origin.files, self.read, self.effort.part_bytes, folder)
        tagging, corpus = (
            Tagging(attributes, units, chunks, self.read, tagger),
            Corpus(folder, attributes, units, self.effort.memory),
        )
        yield tagging.stage()
        yield one_unit("index", folder / "parts.npy", partial(index_parts, tagging, corpus, folder / SKIPPED_FILE))
        return corpus

    def write(self, lister: Lister, describe: Describe = lambda tally: {}) -> Iterator[Stage]:
        """The stages in which what stays is written, reported and published; `describe` adds to the report."""
        corpus, folder = lister.corpus, lister.work
        yield lister.stage()
        tally_path = folder / "tally.json"
        yield one_unit("tally", tally_path, lambda: commit_bytes(tally_path, orjson.dumps(sum_tallies(lister))))
        tally = orjson.loads(tally_path.read_bytes())
        examples = frozenset(example_documents(tally))
        (folder / EXAMPLES_FOLDER).mkdir(exist_ok=True)
        writer = OutputWriter(corpus, self.read, folder, lister.decide, examples)
        yield writer.stage()

        def publish() -> None:
            made = make_report(dict(self.origin.command), corpus, tally, folder) | describe(tally)
            commit_bytes(folder / TEXT_FILE, render(made).encode())
            commit_bytes(folder / REPORT_FILE, canonical_json({**made, "job": self.origin.name}))
            self._publish(folder)

        yield one_unit("publish", self.report_path, publish)

    def publish(self, folder: Path) -> Stage:
        """The last stage, where it has been begun: what is whole moves to where it belongs, the report last."""
        return one_unit("publish", self.report_path, partial(self._publish, folder))

    def _publish(self, folder: Path) -> None:
        corpus = Corpus(folder, folder.parent / "attributes", Records(folder / "units.arrow"), self.effort.memory)
        reports, num_lists = self.out / REPORT_FOLDER, len(corpus.tasks)
        moves = {reports / TEXT_FILE: folder / TEXT_FILE}
        if self.read.errors == "skip":
            moves[reports / SKIPPED_FILE] = folder / SKIPPED_FILE
        for _, number, name in (file for write in corpus.writes for file in output_files(corpus, write)):
            moves[result_path(self.out, number, name, corpus.num_files)] = staged_file(folder, number, name)
        for staged in (staged_list(folder, number) for number in range(num_lists)):
            moves[result_path(reports, int(staged.stem[-6:]), staged.name, num_lists)] = staged
        there = {*self.out.glob("part-*"), *self.out.glob("[0-9]*/part-*"), *reports.rglob("dropped-*")}
        for path in there - moves.keys():
            path.unlink(missing_ok=True)  # of other inputs, where a kill has stopped this
        move_staged(moves.items())
        commit_bytes(self.report_path, (folder / REPORT_FILE).read_bytes(), folder)
