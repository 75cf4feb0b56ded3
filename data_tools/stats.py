"""What a dataset holds, counted in a sample of its record batches or in all, and the picture of it."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_tools.work import Advance
from megatrain.data import Dataset
from megatrain.data.shard import Views
from megatrain.errors import ConfigError

SAMPLED_BATCHES = 64
MAX_SOURCES = 1000
NUM_FREQUENT = 20
PICTURES = (".png", ".svg", ".pdf")
SHARES = {"min": 0.0, "p10": 0.1, "p25": 0.25, "median": 0.5, "p75": 0.75, "p90": 0.9, "p99": 0.99, "max": 1.0}


class SourceTotals(NamedTuple):
    """What comes from one input file, or from one folder of them."""

    documents: int
    tokens: int
    text_bytes: int


@dataclass
class Statistics:
    """Exact counts of the record batches that were looked at."""

    vocab_size: int
    num_batches: int = 0
    num_documents: int = 0
    num_tokens: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    """How many documents have how many tokens."""
    sources: dict[str, SourceTotals] = field(default_factory=dict)
    token_counts: npt.NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.token_counts = np.zeros(self.vocab_size, np.int64)

    def add(self, batch: pa.RecordBatch) -> None:
        """Count a record batch."""
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
            self._add_source(row["file"], SourceTotals(row["file_count"], row["tokens_sum"], row["text_bytes_sum"]))
        while len(self.sources) > MAX_SOURCES and any("/" in name for name in self.sources):
            self._join_sources()

    def _add_source(self, name: str, totals: SourceTotals) -> None:
        before = self.sources.get(name, SourceTotals(0, 0, 0))
        self.sources[name] = SourceTotals(*(a + b for a, b in zip(before, totals, strict=True)))

    def _join_sources(self) -> None:
        """Count by folder what was counted by file, so that a million small files do not fill the memory."""
        before, self.sources = self.sources, {}
        for name, totals in before.items():
            self._add_source(name if "/" not in name else name.rpartition("/")[0], totals)


def gather(dataset: Dataset, advance: Advance, *, everything: bool) -> Statistics:
    """Look at all record batches, or at SAMPLED_BATCHES at even distances; a Statistics of constant size."""
    total = int(dataset.table.batch_starts[-1])
    count = total if everything else min(SAMPLED_BATCHES, total)
    statistics = Statistics(dataset.vocab_size)
    for chosen in range(count):
        shard, number = dataset.table.shard_of_batch(chosen * total // count)
        opened = dataset.shard(shard)
        statistics.add(opened.record_batch(number))
        advance(opened.batches[number].num_bytes)
    return statistics


def length_figures(statistics: Statistics) -> dict[str, float]:
    """Mean and quantiles of the tokens of a document; a quantile is the length of a document that there is."""
    lengths = np.array(sorted(statistics.lengths))
    ends = np.cumsum([statistics.lengths[length] for length in lengths.tolist()])
    at = {name: np.searchsorted(ends, max(share * ends[-1], 1)) for name, share in SHARES.items()}
    mean = statistics.num_tokens / statistics.num_documents
    return {"mean": mean, **{name: float(lengths[min(index, len(lengths) - 1)]) for name, index in at.items()}}


def length_histogram(statistics: Statistics) -> list[dict[str, int]]:
    """Documents and tokens by length, in bins of powers of two: from <= tokens of a document < to."""
    bins: dict[int, list[int]] = {}
    for length, count in statistics.lengths.items():
        entry = bins.setdefault(length.bit_length(), [0, 0])
        entry[0] += count
        entry[1] += count * length
    return [
        {"from": 1 << (bits - 1), "to": 1 << bits, "documents": bins[bits][0], "tokens": bins[bits][1]}
        for bits in sorted(bins)
    ]


def source_shares(statistics: Statistics) -> list[dict[str, Any]]:
    """What each source gives, the largest first; its share is that of the tokens."""
    ranked = sorted(statistics.sources.items(), key=lambda item: (-item[1].tokens, item[0]))
    return [
        {"source": name, "share": totals.tokens / statistics.num_tokens, **totals._asdict()} for name, totals in ranked
    ]


def frequent_tokens(statistics: Statistics, texts: Iterable[str]) -> list[dict[str, Any]]:
    """The most frequent tokens, the first NUM_FREQUENT; ``texts``: the text of each token id."""
    known = list(texts)
    ranked = np.argsort(-statistics.token_counts, kind="stable")[:NUM_FREQUENT].tolist()
    return [
        {
            "id": token,
            "text": known[token],
            "count": int(statistics.token_counts[token]),
            "share": int(statistics.token_counts[token]) / statistics.num_tokens,
        }
        for token in ranked
        if statistics.token_counts[token]
    ]


def check_picture(path: Path) -> None:
    """Raise ConfigError where the name of the file is not that of a picture we draw."""
    if path.suffix.lower() not in PICTURES:
        raise ConfigError(f"--plot {path}: its name should end in {', '.join(PICTURES)}, which says how it is drawn.")


def plot(statistics: Statistics, title: str, path: Path) -> None:
    """Draw lengths, sources, and tokens by frequency. Raises ConfigError where the file cannot be written so."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    lengths, sources, tokens = figure.subplots(1, 3)
    bins = length_histogram(statistics)
    lengths.bar(range(len(bins)), [entry["documents"] for entry in bins], color="tab:blue")
    lengths.set_xticks(range(len(bins)), [f"{entry['from']}" for entry in bins], rotation=60)
    lengths.set(title="Documents by length", xlabel="tokens, from", ylabel="documents")
    shown = source_shares(statistics)[:NUM_FREQUENT][::-1]
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
