"""What was dropped and why: counts, and some examples with the places where they stand."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import xxhash

from data_tools.clean.job import Job
from data_tools.clean.output import Decisions
from data_tools.clean.survey import Corpus, DocumentPlace, read_columns
from megatrain.data.format import SKIPPED_FILE

EXAMPLES = 5
"""Of each reason."""
SHOWN_CHARACTERS = 200


@dataclass(frozen=True, order=True)
class Example:
    """A document that is dropped, and the one that is kept instead, if any."""

    rank: int
    """By which examples are drawn: a hash of the number, so that they come from everywhere."""
    document: int
    kept: int | None


@dataclass
class Dropped:
    """What was dropped for one reason."""

    documents: int = 0
    text_bytes: int = 0
    examples: list[Example] = field(default_factory=list)

    def add(self, document: int, kept: int | None, text_bytes: int) -> None:
        """Count a document, and draw it as an example perhaps."""
        self.documents += 1
        self.text_bytes += text_bytes
        rank = xxhash.xxh3_64_intdigest(document.to_bytes(8, "little"))
        if len(self.examples) < EXAMPLES or rank < self.examples[-1].rank:
            self.examples = sorted([*self.examples, Example(rank, document, kept)])[:EXAMPLES]


@dataclass
class Tally:
    """Counts over the whole input."""

    documents: int = 0
    text_bytes: int = 0
    dropped: dict[str, Dropped] = field(default_factory=dict)

    @property
    def examples(self) -> list[Example]:
        """Of all reasons."""
        return [example for dropped in self.dropped.values() for example in dropped.examples]


def tally(corpus: Corpus, decisions: Decisions, job: Job) -> Tally:
    """Count what is dropped, by reason."""
    plain = job.share("tally", lambda: asdict(_count(corpus, decisions)))
    found = {
        reason: Dropped(each["documents"], each["text_bytes"], [Example(**example) for example in each["examples"]])
        for reason, each in plain["dropped"].items()
    }
    return Tally(plain["documents"], plain["text_bytes"], found)


def _count(corpus: Corpus, decisions: Decisions) -> Tally:
    total = Tally()
    for part in corpus.parts:
        reasons, kept = decisions.of(part)
        sizes = read_columns(part.path, ["text_bytes"]).column(0).to_pylist()
        total.documents += part.num_documents
        total.text_bytes += sum(sizes)
        for index, (reason, size) in enumerate(zip(reasons, sizes, strict=True)):
            if reason is not None:
                dropped = total.dropped.setdefault(reason, Dropped())
                dropped.add(part.first_document + index, None if kept is None else int(kept[index]), size)
    return total


def wanted_texts(total: Tally) -> set[int]:
    """Documents whose text the examples show."""
    return {number for each in total.examples for number in (each.document, each.kept) if number is not None}


def make_report(command: dict[str, Any], total: Tally, corpus: Corpus, texts: dict[int, str]) -> dict[str, Any]:
    """The report as plain data."""
    num_dropped = sum(each.documents for each in total.dropped.values())
    numbers = sorted(wanted_texts(total))
    places = dict(zip(numbers, corpus.places(np.array(numbers, np.uint64)), strict=True))
    return {
        "command": command,
        "documents": total.documents,
        "skipped": corpus.num_skipped,
        "kept": total.documents - num_dropped,
        "dropped": num_dropped,
        "text_bytes": total.text_bytes,
        "kept_text_bytes": total.text_bytes - sum(each.text_bytes for each in total.dropped.values()),
        "reasons": {
            reason: {
                "documents": found.documents,
                "text_bytes": found.text_bytes,
                "examples": [_example(each, places, texts) for each in found.examples],
            }
            for reason, found in total.dropped.items()
        },
    }


def _example(example: Example, places: dict[int, DocumentPlace], texts: dict[int, str]) -> dict[str, Any]:
    text = texts[example.document]
    shown: dict[str, Any] = {"document": example.document, **places[example.document]._asdict()}
    if example.kept is None:
        return {**shown, "text": text[:SHOWN_CHARACTERS]}
    other = texts[example.kept]
    # Two near duplicates often begin alike: show them from shortly before they part.
    parting = next((place for place, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), 0)
    start = max(parting - SHOWN_CHARACTERS // 4, 0)
    window = slice(start, start + SHOWN_CHARACTERS)
    kept = {"document": example.kept, **places[example.kept]._asdict(), "text": other[window]}
    return {**shown, "text": text[window], "shown_from": start, "kept": kept}


def render(report: dict[str, Any]) -> str:
    """The report for people."""
    documents, size = report["documents"], report["text_bytes"]
    lines = [
        f"{documents} documents, {size / 1e6:.1f} MB of text. "
        f"Kept: {report['kept']} ({_share(report['kept'], documents)}), {report['kept_text_bytes'] / 1e6:.1f} MB "
        f"({_share(report['kept_text_bytes'], size)}). Dropped: {report['dropped']}."
    ]
    if report["skipped"]:
        lines.append(f"Skipped, because they could not be read: {report['skipped']} rows, listed in {SKIPPED_FILE}.")
    if report.get("clusters"):
        sizes = sorted((int(size), number) for size, number in report["clusters"].items())
        lines.append("Clusters by size: " + ", ".join(f"{number} of {size}" for size, number in sizes))
    if report.get("chains"):
        lines.append(_chains(report["chains"], report["dropped"]))
    by_number = sorted(report["reasons"].items(), key=lambda item: -item[1]["documents"])
    for reason, found in by_number:
        lines += ["", f"{reason}: {found['documents']} documents, {found['text_bytes'] / 1e6:.1f} MB"]
        for example in found["examples"]:
            lines += ["", f"  dropped  {_where(example)}", *_quoted(example["text"])]
            if "kept" in example:
                similarity = f"  (similarity {example['similarity']:.2f})" if "similarity" in example else ""
                lines += [f"  kept     {_where(example['kept'])}{similarity}", *_quoted(example["kept"]["text"])]
    return "\n".join(lines) + "\n"


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
