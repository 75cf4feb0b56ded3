"""What a dataset holds: counted in a sample of its record batches or in all, shown, and drawn."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_tools.executors import Progress
from data_tools.supervised import describe_counts, scored_percent
from megatrain.data import Dataset
from megatrain.data.format import Manifest, shard_name
from megatrain.data.shard import Views
from megatrain.data.tokenizer import Tokenizer
from megatrain.errors import ConfigError
from megatrain.terminal import printable
from megatrain.units import format_bytes

SAMPLED_BATCHES = 64
MAX_SOURCES = 1000
TOTALS = ("documents", "tokens", "text_bytes")
NUM_FREQUENT = 20
PICTURES = (".png", ".svg", ".pdf")
SHARES = {"min": 0.0, "p10": 0.1, "p25": 0.25, "median": 0.5, "p75": 0.75, "p90": 0.9, "p99": 0.99, "max": 1.0}
BAR_WIDTH = 30
MAX_SHOWN_ROWS = 10
MAX_SHOWN_LINES = 40
MAX_SHOWN_TOKENS = 4000


@dataclass
class Statistics:
    """Exact counts of the record batches that were looked at."""

    vocab_size: int
    num_batches: int = 0
    num_documents: int = 0
    num_tokens: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    """How many documents have how many tokens."""
    sources: dict[str, npt.NDArray[np.int64]] = field(default_factory=dict)
    """Of each input file, or of each folder of them: documents, tokens, bytes of text."""
    token_counts: npt.NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.token_counts = np.zeros(self.vocab_size, np.int64)

    def add(self, batch: pa.RecordBatch) -> None:
        tokens, offsets = Views.of(batch)
        lengths = np.diff(offsets)
        self.num_batches += 1
        self.num_documents += len(lengths)
        self.num_tokens += len(tokens)
        self.lengths.update(dict(zip(*(part.tolist() for part in np.unique(lengths, return_counts=True)), strict=True)))
        counts = np.bincount(tokens, minlength=self.vocab_size)
        if len(counts) == self.vocab_size:  # otherwise the batch is damaged: `verify` tells how
            self.token_counts += counts
        table = pa.table(
            {"file": batch["source"].field("file"), "tokens": lengths, "text_bytes": batch["text_bytes"]}
        ).group_by("file")
        for row in table.aggregate([("file", "count"), ("tokens", "sum"), ("text_bytes", "sum")]).to_pylist():
            self._add_source(row["file"], np.array([row["file_count"], row["tokens_sum"], row["text_bytes_sum"]]))
        # By folder, so that a million small files do not fill the memory.
        while len(self.sources) > MAX_SOURCES and any("/" in name for name in self.sources):
            before, self.sources = self.sources, {}
            for name, totals in before.items():
                self._add_source(name if "/" not in name else name.rpartition("/")[0], totals)

    def _add_source(self, name: str, totals: npt.NDArray[np.int64]) -> None:
        self.sources[name] = self.sources.get(name, 0) + totals


def count(dataset: Dataset, progress: Progress, *, everything: bool) -> Statistics:
    """Look at all record batches, or at SAMPLED_BATCHES at even distances; a Statistics of constant size."""
    total = int(dataset.table.batch_starts[-1])
    num_batches = total if everything else min(SAMPLED_BATCHES, total)
    statistics = Statistics(dataset.num_ids)
    num_bytes = int(dataset.table.rows["bytes"].to_numpy().sum()) * num_batches // total
    with progress("count", num_bytes) as advance:
        for chosen in range(num_batches):
            shard, number = dataset.table.shard_of_batch(chosen * total // num_batches)
            opened = dataset.shard(shard)
            statistics.add(opened.record_batch(number))
            advance(opened.batches[number].num_bytes)
    return statistics


def describe_statistics(dataset: Dataset, statistics: Statistics) -> dict[str, Any]:
    """What was counted, and in how much of the dataset."""
    num_tokens = statistics.num_tokens
    ranked_sources = sorted(statistics.sources.items(), key=lambda item: (-item[1][1], item[0]))
    sources = [(name, dict(zip(TOTALS, totals.tolist(), strict=True))) for name, totals in ranked_sources]
    ranked_tokens = np.argsort(-statistics.token_counts, kind="stable")[:NUM_FREQUENT].tolist()
    tokens = [(token, int(statistics.token_counts[token])) for token in ranked_tokens if statistics.token_counts[token]]
    return {
        "counted": {
            "record_batches": statistics.num_batches,
            "of_record_batches": int(dataset.table.batch_starts[-1]),
            "documents": statistics.num_documents,
            "tokens": num_tokens,
        },
        "tokens_per_document": _length_figures(statistics),
        "length_histogram": _length_histogram(statistics),
        "sources": [{"source": name, "share": totals["tokens"] / num_tokens, **totals} for name, totals in sources],
        "frequent_tokens": [
            {"id": token, "text": dataset.texts_of_id(token), "count": number, "share": number / num_tokens}
            for token, number in tokens
        ],
    }


def _length_figures(statistics: Statistics) -> dict[str, float]:
    """Mean and quantiles of the tokens of a document; a quantile is the length of a document that there is."""
    lengths = np.array(sorted(statistics.lengths))
    ends = np.cumsum([statistics.lengths[length] for length in lengths.tolist()])
    at = {name: np.searchsorted(ends, max(share * ends[-1], 1)) for name, share in SHARES.items()}
    mean = statistics.num_tokens / statistics.num_documents
    return {"mean": mean, **{name: float(lengths[min(index, len(lengths) - 1)]) for name, index in at.items()}}


def _length_histogram(statistics: Statistics) -> list[dict[str, int]]:
    """Documents and tokens by length, in bins of powers of two: from <= tokens of a document < to."""
    documents: Counter[int] = Counter()
    tokens: Counter[int] = Counter()
    for length, number in statistics.lengths.items():
        documents[length.bit_length()] += number
        tokens[length.bit_length()] += number * length
    return [
        {"from": 1 << (bits - 1), "to": 1 << bits, "documents": documents[bits], "tokens": tokens[bits]}
        for bits in sorted(documents)
    ]


def check_picture(path: Path) -> None:
    """Raise ConfigError where the name of the file is not that of a picture we draw."""
    if path.suffix.lower() not in PICTURES:
        raise ConfigError(f"--plot {path}: its name should end in {', '.join(PICTURES)}, which says how it is drawn.")


def plot(statistics: Statistics, described: dict[str, Any], title: str, path: Path) -> None:
    """Draw lengths, sources, and tokens by frequency. Raises ConfigError where the file cannot be written so."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    lengths, sources, tokens = figure.subplots(1, 3)
    bins = described["length_histogram"]
    lengths.bar(range(len(bins)), [entry["documents"] for entry in bins], color="tab:blue")
    lengths.set_xticks(range(len(bins)), [f"{entry['from']}" for entry in bins], rotation=60)
    lengths.set(title="Documents by length", xlabel="tokens, from", ylabel="documents")
    shown = described["sources"][:NUM_FREQUENT][::-1]
    names = [PurePosixPath(entry["source"]).name[:40].replace("$", r"\$") for entry in shown]
    sources.barh(range(len(shown)), [100 * entry["share"] for entry in shown], color="tab:green")
    sources.set_yticks(range(len(shown)), names)
    sources.set(title="Sources", xlabel="% of the tokens")
    counts = np.sort(statistics.token_counts[statistics.token_counts > 0])[::-1]
    tokens.loglog(np.arange(1, len(counts) + 1), counts, color="tab:red")
    tokens.set(title=f"Tokens by frequency ({len(counts)} of {statistics.vocab_size})", xlabel="rank", ylabel="count")
    figure.suptitle(title.replace("$", r"\$"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of signs in names that the font has not: boxes stand for them
            figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot {path} cannot be written: {error}") from None


class OutputConsole(Console):
    """Standard output; raises BrokenPipeError where nothing reads it, which `Commands` handles."""

    def on_broken_pipe(self) -> None:
        raise  # rich calls this where it handles the error, and would exit with 1


def describe(dataset: Dataset, document: int | None) -> dict[str, Any]:
    """The figures of a dataset, and document number `document` if one is asked for (ConfigError if there is none)."""
    manifest = dataset.manifest
    description: dict[str, Any] = {
        "documents": dataset.num_documents,
        "tokens": dataset.num_tokens,
        "text_bytes": dataset.text_bytes,
        "empty_documents": manifest.num_empty_documents,
        "unknown": manifest.unknown and {**asdict(manifest.unknown), "share": manifest.unknown.share},
        "dtype": dataset.dtype.name,
        "digest": dataset.digest,
        "tokenizer_sha256": manifest.tokenizer_sha256,
        "vocab_size": dataset.vocab_size,
        "eod_id": dataset.eod_id,
        "eod_token": manifest.eod_token,
        "bos_id": dataset.bos_id,
        "bos_token": manifest.bos_token,
        **_of_target(manifest),
        "options": manifest.options,
        "bytes_per_token": dataset.text_bytes / dataset.num_tokens,
        "shards": [{"file": shard_name(index), **row} for index, row in enumerate(dataset.shard_rows())],
    }
    if dataset.has_scored:
        description |= {"scored_tokens": manifest.num_scored}
    if dataset.label_names is not None:
        description |= {"label_names": dataset.label_names}
    if manifest.examples is not None:
        description |= {"examples": manifest.examples}
    if document is not None:
        description["document"] = _describe_document(dataset, document)
    return description


def _of_target(manifest: Manifest) -> dict[str, Any]:
    """Of a tokenizer that the targets of pairs have of their own."""
    keys = ("target_tokenizer_sha256", "target_vocab_size", "target_eod_id")
    return {} if manifest.target_tokenizer_sha256 is None else {key: getattr(manifest, key) for key in keys}


def describe_json(description: dict[str, Any]) -> bytes:
    text = orjson.dumps(description, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE).decode()
    return printable(text).encode()


def show(dataset: Dataset, document: int | None, counted: dict[str, Any]) -> None:
    """Print the figures for people, and a document (the first, if none is asked for) as text beside its tokens.

    ``counted``: what ``describe_statistics`` gives.
    """
    description = describe(dataset, document or 0)
    shown, shards = description.pop("document"), description.pop("shards")
    description["unknown"] = dataset.manifest.unknown
    if dataset.has_scored:
        description["scored_tokens"] = f"{dataset.manifest.num_scored} ({scored_percent(dataset.manifest):.1f}%)"
    if dataset.label_names is not None:
        description["label_names"] = ", ".join(dataset.label_names)
    if dataset.manifest.examples is not None:
        description["examples"] = describe_counts(dataset.manifest.examples)
    console = OutputConsole(highlight=False, soft_wrap=True)
    for name, value in description.items():
        show_figure(console, name, f"{value:.3f}" if isinstance(value, float) else str(value))
    show_figure(console, "shards", f"{len(shards)}, {format_bytes(sum(shard['bytes'] for shard in shards))}")
    show_statistics(console, counted)
    console.print()
    label = f", label {shown['label']}" if "label" in shown else ""
    place = f"{shown['file']}, row {shown['row']}, {len(shown['tokens'])} tokens{label}"
    console.print(Text(_printable(f"Document {shown['index']}: {shown['id']} ({place})")))
    if dataset.has_scored:
        _show_scored(console, dataset, shown["tokens"][:MAX_SHOWN_TOKENS], shown["scored"])
    else:
        _show_lines(console, dataset, shown["tokens"][:MAX_SHOWN_TOKENS])


def show_statistics(console: Console, described: dict[str, Any]) -> None:
    counted, lengths = described["counted"], described["tokens_per_document"]
    whole = counted["record_batches"] == counted["of_record_batches"]
    extent = "all" if whole else f"a sample: {counted['record_batches']} of {counted['of_record_batches']}"
    show_figure(console, "counted", f"{extent} record batches, {counted['tokens']} tokens")
    show_figure(console, "tokens_per_document", ", ".join(f"{name} {value:.6g}" for name, value in lengths.items()))
    table = Table("document tokens", "documents", "", "tokens", show_edge=False, box=None)
    most = max(entry["documents"] for entry in described["length_histogram"])
    for entry in described["length_histogram"]:
        bar = "#" * -(-BAR_WIDTH * entry["documents"] // most)
        table.add_row(f"{entry['from']} to {entry['to'] - 1}", str(entry["documents"]), bar, str(entry["tokens"]))
    console.print(table)
    console.print("% of tokens  documents  bytes per token  source")
    for entry in described["sources"][:MAX_SHOWN_ROWS]:
        ratio = entry["text_bytes"] / entry["tokens"]
        figures = f"{100 * entry['share']:11.2f}  {entry['documents']:9}  {ratio:15.3f}"
        console.print(Text(f"{figures}  {_printable(entry['source'])}"))
    if len(described["sources"]) > MAX_SHOWN_ROWS:
        console.print(f"... and {len(described['sources']) - MAX_SHOWN_ROWS} more")
    table = Table("frequent token", "id", "% of tokens", show_edge=False, box=None)
    for entry in described["frequent_tokens"][:MAX_SHOWN_ROWS]:
        table.add_row(Text(_printable(repr(entry["text"]))), str(entry["id"]), f"{100 * entry['share']:.2f}")
    console.print(table)


def show_figure(console: Console, name: str, value: str) -> None:
    console.print(Text(_printable(f"{name.replace('_', ' '):<20} {value}")))


def _describe_document(dataset: Dataset, index: int) -> dict[str, Any]:
    try:
        tokens = dataset.document(index)
    except IndexError as error:
        raise ConfigError(str(error)) from None
    info = dataset.document_info(index)
    begin, end = dataset.document_range(index)
    beside: dict[str, Any] = {"scored": dataset.scored(begin, end - begin).tolist()} if dataset.has_scored else {}
    if dataset.label_names is not None:
        beside = {"label": dataset.label_names[dataset.label_at(begin)]}
    return {
        "index": index,
        "id": info.id,
        "file": info.source_file,
        "row": info.source_row,
        "hash": info.hash.hex(),
        "text_bytes": info.text_bytes,
        "text": dataset.text_of(tokens),
        "tokens": tokens.tolist(),
        **beside,
    }


def _show_lines(console: Console, dataset: Dataset, tokens: list[int]) -> None:
    table = Table("text", "tokens", show_edge=False, show_lines=True)
    for number, (text, ids) in enumerate(_token_lines(dataset.tokenizer, tokens)):
        if number == MAX_SHOWN_LINES:
            table.add_row("...", "")
            break
        table.add_row(Text(_printable(text)), Text(" ".join(map(str, ids))))
    console.print(table)


def _show_scored(console: Console, dataset: Dataset, tokens: list[int], scored: list[bool]) -> None:
    """Token by token with | between; what is scored stands in brackets, and green where the terminal has colors."""
    line, inside = Text(), False
    for number, (token, is_scored) in enumerate(zip(tokens, scored, strict=False)):
        if is_scored != inside:
            line.append("\u27e6" if is_scored else "\u27e7", "bold green")
        elif line:
            line.append("|", "dim")
        tokenizer = dataset.target_tokenizer if is_scored else dataset.tokenizer
        text, inside = tokenizer.decode([token]), is_scored
        if "\ufffd" in text:  # a part of a character
            text = tokenizer.token_of(token) or text
        line.append(printable(text).replace("\n", "\\n").replace("\t", "\\t"), "green" if is_scored else "")
        if text.endswith("\n") or number == len(tokens) - 1:
            console.print(line if not inside or number < len(tokens) - 1 else line.append("\u27e7", "bold green"))
            line = Text()


def _token_lines(tokenizer: Tokenizer, tokens: list[int]) -> Iterator[tuple[str, list[int]]]:
    line: list[int] = []
    for token in tokens:
        line.append(token)
        if "\n" in tokenizer.decode([token]):
            yield tokenizer.decode(line), line
            line = []
    if line:
        yield tokenizer.decode(line), line


def _printable(text: str) -> str:
    return printable(text.removesuffix("\n").replace("\t", "    "))
