"""What was dropped and why: counts, and some examples with the places where they stand."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_tools.clean.attributes import Corpus, Location, read_columns
from data_tools.clean.job import Job
from data_tools.clean.output import Decide, write_kept
from data_tools.units import ReadOptions
from megatrain.data.format import SKIPPED_FILE
from megatrain.terminal import printable
from megatrain.units import format_bytes

EXAMPLES = 5
"""Of each reason."""
SHOWN_CHARACTERS = 200


def write_and_report(
    command: dict[str, Any], corpus: Corpus, out: Path, options: ReadOptions, decide: Decide, job: Job
) -> dict[str, Any]:
    """Write the documents that stay; gives the report, as plain data."""
    counts = job.share("counts", partial(_count, corpus, decide))
    examples = [example for dropped in counts["reasons"].values() for example in dropped["examples"]]
    numbers = sorted({number for _, *pair in examples for number in pair if number is not None})
    texts = write_kept(corpus, out, options, decide, set(numbers), job)
    locations = dict(zip(numbers, corpus.locations(np.array(numbers, np.uint64)), strict=True))
    for dropped in counts["reasons"].values():
        examples = dropped["examples"]
        dropped["examples"] = [_example(document, kept, locations, texts) for _, document, kept in examples]
    num_dropped, dropped_bytes = (
        sum(dropped[key] for dropped in counts["reasons"].values()) for key in ("documents", "text_bytes")
    )
    return {
        "command": command,
        "documents": corpus.num_documents,
        "skipped": corpus.num_skipped,
        "kept": corpus.num_documents - num_dropped,
        "dropped": num_dropped,
        "text_bytes": counts["text_bytes"],
        "kept_text_bytes": counts["text_bytes"] - dropped_bytes,
        "reasons": counts["reasons"],
    }


def _count(corpus: Corpus, decide: Decide) -> dict[str, Any]:
    """Bytes of text; for each reason what is dropped, and examples: their rank, the document, the one kept instead.

    Examples are those of the lowest rank, a hash of the document's number, so that they come from everywhere.
    """
    text_bytes = 0
    reasons: dict[str, dict[str, Any]] = {}
    for part in corpus.parts:
        found, kept = decide(part)
        sizes = read_columns(part.path, ["text_bytes"]).column(0).to_pylist()
        text_bytes += sum(sizes)
        for index, (reason, size) in enumerate(zip(found, sizes, strict=True)):
            if reason is None:
                continue
            dropped = reasons.setdefault(reason, {"documents": 0, "text_bytes": 0, "examples": []})
            dropped["documents"] += 1
            dropped["text_bytes"] += size
            document = part.first_document + index
            rank = xxhash.xxh3_64_intdigest(document.to_bytes(8, "little"))
            examples = dropped["examples"]
            if len(examples) < EXAMPLES or rank < examples[-1][0]:
                example = [rank, document, None if kept is None else int(kept[index])]
                dropped["examples"] = sorted([*examples, example])[:EXAMPLES]
    return {"text_bytes": text_bytes, "reasons": reasons}


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
