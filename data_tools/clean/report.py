"""What was dropped and why: a list of all, counts, and some examples with the places where they stand."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from data_tools.clean.attributes import Corpus, Documents, Location, make_folders, work_path
from data_tools.clean.candidates import Runs
from data_tools.clean.output import EXAMPLES_FOLDER, Decide
from data_tools.executors import Advance
from data_tools.job import Stage
from data_tools.work import write_batches
from megatrain.atomic import commit_bytes
from megatrain.data.format import SKIPPED_FILE
from megatrain.terminal import printable
from megatrain.units import format_bytes

REPORT_FOLDER = ".report"
"""Hidden, so that a command which reads the folder finds documents only."""
EXAMPLES = 5
"""Of each reason."""
SHOWN_CHARACTERS = 200
LISTED_AT_ONCE = 1 << 16
"""Dropped documents."""

DROPPED_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "file": pa.string(),
        "row": pa.uint64(),
        "reason": pa.string(),
        "kept_id": pa.string(),
        "kept_file": pa.string(),
        "kept_row": pa.uint64(),
    }
)
"""The list of dropped documents; the last three are null where no other is kept instead."""

Tally = dict[str, Any]
"""`text_bytes`; `reasons`, for each what is dropped, and examples: their rank, the document, the one kept instead;
`below` and `least`, of near duplicates: how many are not like the one that is kept, and the least similar."""


@dataclass(frozen=True)
class Lister:
    """Commits the lists of what is dropped, and tallies of it."""

    corpus: Corpus
    work: Path
    decide: Decide
    runs: Runs | None = None
    """Where the documents that are kept instead are found."""
    measures: bool = False
    """Whether those that are dropped may be unlike the one that is kept."""

    def stage(self) -> Stage:
        make_folders(self.work / "tallies", len(self.corpus.tasks))
        return Stage("list", self.corpus.tasks["num_bytes"].tolist(), self.list_path, self.list_dropped)

    def list_path(self, number: int) -> Path:
        return staged_list(self.work, number)

    def tally_path(self, number: int) -> Path:
        return work_path(self.work / "tallies", number, f"{number:06d}.json")

    def list_dropped(self, number: int, advance: Advance) -> None:
        tally: Tally = {"text_bytes": 0, "reasons": {}, "below": 0, "least": None}
        task = self.corpus.tasks[number]

        def batches() -> Iterator[pa.RecordBatch]:
            for part in self.corpus.parts[int(task["first_part"]) : int(task["last_part"])]:
                yield from self._dropped(part, tally)
                self.corpus.memory.release_mapped()
            commit_bytes(
                self.tally_path(number), orjson.dumps(tally), self.work
            )  # before the list, which ends the unit

        write_batches(self.list_path(number), DROPPED_SCHEMA, batches(), self.work)
        advance(int(task["num_bytes"]))

    def _dropped(self, part: Any, tally: Tally) -> Iterator[pa.RecordBatch]:
        """The list for a part; what is in it is added to the tally."""
        reasons, kept = self.decide(self.corpus, part)
        sizes = self.corpus.columns(part, ["text_bytes"]).column(0).to_numpy()
        tally["text_bytes"] += int(sizes.sum())
        indices = np.flatnonzero(~np.asarray(reasons.is_null()))
        for start in range(0, max(len(indices), 1), LISTED_AT_ONCE):
            some = indices[start : start + LISTED_AT_ONCE]
            documents = some.astype(np.uint64) + part["first_document"]
            some_kept = None if kept is None else kept[some]
            some_reasons = reasons.take(pa.array(some))
            _count(tally["reasons"], documents, some_kept, some_reasons, sizes[some])
            rows: Sequence[Sequence[Any]] = list(zip(*self.corpus.locations_in(part, pa.array(some)), strict=True))
            kept_rows = self._kept_rows(some_kept, len(some))
            if self.measures and some_kept is not None and self.runs is not None and len(some):
                _measure(tally, self.runs, some_kept, documents)
            columns = [*(rows or [[]] * 3), some_reasons.cast(pa.string()), *kept_rows]
            arrays = [pa.array(values, each.type) for values, each in zip(columns, DROPPED_SCHEMA, strict=True)]
            yield pa.RecordBatch.from_arrays(arrays, schema=DROPPED_SCHEMA)

    def _kept_rows(self, kept: Documents | None, number: int) -> Sequence[Sequence[Any]]:
        """Columns: where the documents stand that are kept instead."""
        if kept is None or self.runs is None or not number:
            return [[None] * number] * 3
        numbers, inverse = np.unique(kept, return_inverse=True)
        found = self.runs.locations(numbers)
        return list(zip(*(found[index] for index in inverse.tolist()), strict=True))


def staged_list(work: Path, number: int) -> Path:
    """Where the list of what a task drops lies until all of the result is whole."""
    return work_path(work / "lists", number, f"dropped-{number:06d}.arrow")


def _count(
    counts: dict[str, Tally], documents: Documents, kept: Documents | None, reasons: pa.Array, sizes: npt.NDArray[Any]
) -> None:
    """Add dropped documents to the counts.

    Examples are those of the lowest rank, a hash of the document's number, so that they come from everywhere.
    """
    ranks = np.fromiter(map(xxhash.xxh3_64_intdigest, documents.astype("<u8").view("V8").tolist()), np.uint64)
    for reason in pc.unique(reasons).to_pylist():
        found = np.flatnonzero(np.asarray(pc.equal(reasons, reason)))
        lowest = found[np.argsort(ranks[found])[:EXAMPLES]]
        examples = [[int(ranks[i]), int(documents[i]), None if kept is None else int(kept[i])] for i in lowest]
        _add(counts, reason, {"documents": len(found), "text_bytes": int(sizes[found].sum()), "examples": examples})


def _add(counts: dict[str, Tally], reason: str, more: Tally) -> None:
    known = counts.setdefault(reason, {"documents": 0, "text_bytes": 0, "examples": []})
    known["documents"] += more["documents"]
    known["text_bytes"] += more["text_bytes"]
    known["examples"] = sorted([*known["examples"], *more["examples"]])[:EXAMPLES]


def _measure(tally: Tally, runs: Runs, kept: Documents, documents: Documents) -> None:
    """How like the one that is kept the dropped documents are: they may be duplicates of it by way of others."""
    num_equal = runs.count_equal_bytes(kept, documents)
    at = int(num_equal.argmin())
    least = [int(num_equal[at]), int(documents[at]), int(kept[at])]
    tally["least"] = min(tally["least"] or least, least)
    tally["below"] += int((num_equal < runs.sketch.min_equal_bytes).sum())


def sum_tallies(lister: Lister) -> Tally:
    total: Tally = {"text_bytes": 0, "reasons": {}, "below": 0, "least": None}
    for number in range(len(lister.corpus.tasks)):
        tally = orjson.loads(lister.tally_path(number).read_bytes())
        total["text_bytes"] += tally["text_bytes"]
        total["below"] += tally["below"]
        total["least"] = min(filter(None, (total["least"], tally["least"])), default=None)
        for reason, more in tally["reasons"].items():
            _add(total["reasons"], reason, more)
    return total


def example_documents(tally: Tally) -> list[int]:
    """The documents whose text the report shows: examples, and those kept instead."""
    pairs = [pair for dropped in tally["reasons"].values() for _, *pair in dropped["examples"]]
    return sorted({number for pair in pairs for number in pair if number is not None})


def make_report(command: dict[str, Any], corpus: Corpus, tally: Tally, work: Path) -> dict[str, Any]:
    """The report, as plain data."""
    texts: dict[int, str] = {}
    for path in sorted((work / EXAMPLES_FOLDER).glob("[!.]*")):  # not what a killed process has left unfinished
        texts.update({int(key): text for key, text in orjson.loads(path.read_bytes()).items()})
    numbers = example_documents(tally)
    if any(number not in texts for number in numbers):  # NFS may show a file late: see data_tools.job.when_seen
        raise FileNotFoundError(errno.ENOENT, "texts of examples are not there", str(work / EXAMPLES_FOLDER / "*"))
    locations = dict(zip(numbers, corpus.locations(np.array(numbers, np.uint64)), strict=True))
    for dropped in tally["reasons"].values():
        dropped["examples"] = [_example(document, kept, locations, texts) for _, document, kept in dropped["examples"]]
    num_dropped, dropped_bytes = (
        sum(dropped[key] for dropped in tally["reasons"].values()) for key in ("documents", "text_bytes")
    )
    return {
        "command": command,
        "documents": corpus.num_documents,
        "skipped": corpus.num_skipped,
        "kept": corpus.num_documents - num_dropped,
        "dropped": num_dropped,
        "text_bytes": tally["text_bytes"],
        "kept_text_bytes": tally["text_bytes"] - dropped_bytes,
        "reasons": tally["reasons"],
    }


def _example(document: int, kept: int | None, locations: dict[int, Location], texts: dict[int, str]) -> dict[str, Any]:
    text = texts[document]
    shown: dict[str, Any] = {"document": document, **locations[document]._asdict()}
    if kept is None:
        return {**shown, "text": text[:SHOWN_CHARACTERS]}
    other = texts[kept]
    # Two near duplicates often begin alike: show them from shortly before they part.
    parting = next((place for place, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), 0)
    start = max(parting - SHOWN_CHARACTERS // 4, 0)
    window = slice(start, start + SHOWN_CHARACTERS)
    shown_kept = {"document": kept, **locations[kept]._asdict(), "text": other[window]}
    return {**shown, "text": text[window], "shown_from": start, "kept": shown_kept}


def render(report: dict[str, Any]) -> str:
    documents, size = report["documents"], report["text_bytes"]
    lines = [
        f"{documents} documents, {format_bytes(size)} of text. "
        f"Kept: {report['kept']} ({_share(report['kept'], documents)}), {format_bytes(report['kept_text_bytes'])} "
        f"({_share(report['kept_text_bytes'], size)}). Dropped: {report['dropped']}."
    ]
    if report["skipped"]:
        lines.append(f"Skipped, because they could not be read: {report['skipped']} rows, listed in {SKIPPED_FILE}.")
    if report.get("clusters"):
        sizes = sorted((int(size), number) for size, number in report["clusters"].items())
        lines.append("Clusters by size: " + ", ".join(f"{number} of {size}" for size, number in sizes))
    if report.get("chains"):
        lines.append(_chains(report["chains"], report["dropped"]))
    for reason, found in sorted(report["reasons"].items(), key=lambda item: -item[1]["documents"]):
        lines += ["", f"{reason}: {found['documents']} documents, {format_bytes(found['text_bytes'])}"]
        for example in found["examples"]:
            lines += ["", f"  dropped  {_where(example)}", *_quoted(example["text"])]
            if "kept" in example:
                similarity = f"  (similarity {example['similarity']:.2f})" if "similarity" in example else ""
                lines += [f"  kept     {_where(example['kept'])}{similarity}", *_quoted(example["kept"]["text"])]
    return printable("\n".join(lines) + "\n")


def _chains(chains: dict[str, Any], num_dropped: int) -> str:
    """How far clusters reach: their documents are the same by way of others, and need not be like the one kept."""
    least = f"Least similar to the document that is kept instead: {chains['least_similarity']:.2f}"
    if not chains["documents"]:
        return f"{least}."
    return (
        f"{least} (id {chains['id']}, kept {chains['kept_id']}). Below the threshold, and dropped because others lie "
        f"between: {chains['documents']} of {num_dropped} ({_share(chains['documents'], num_dropped)})."
    )


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "none"


def _where(example: dict[str, Any]) -> str:
    return f"{example['file']}, row {example['row']}, id {example['id']}"


def _quoted(text: str) -> list[str]:
    return [f"    | {line}" for line in text.splitlines()[:6]]
