"""The tokenizer of a dataset: trained here, or brought along as a tokenizer.json."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.executors import Progress
from data_tools.machine import memory_bytes
from data_tools.outputs import find_inputs_apart
from data_tools.progress import no_progress
from data_tools.readers import plan_units, read_parts
from data_tools.units import PART_BYTES, BadRow, ReadOptions, Record, Unit, no_text_error
from megatrain.atomic import commit_bytes
from megatrain.data.tokenizer import Tokenizer
from megatrain.errors import ConfigError, DataError
from megatrain.units import format_bytes

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer

EOD_TOKEN = "<|endoftext|>"
NUM_BYTE_TOKENS = 256
MIN_SAMPLED_BYTES = 1 << 16
"""Of a unit at least: a sample of many files does not open all of them."""
MAX_UNITS_BITS = 18
BASE_MEMORY, MEMORY_PER_BYTE = 200_000_000, 7
"""What training takes of memory, and more for each byte of real text: 6.5 of 160 MB, as measured."""
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = {"gpt2": None, "llama3": _WORDS, "qwen2": _WORDS.replace("{1,3}", "")}
"""The patterns by which these models cut text into words, which merges never cross; None: the library's own."""

_MARKED = re.compile(r"[^\w\s]\S*\w\S*[^\w\s]|__\w+__")
"""A name with marks around it: <|name|>, [NAME], __name__."""


@dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer.json, and what a dataset needs to know of it."""

    json: bytes
    text_json: bytes
    """The one to encode text with: no text becomes a control token."""
    sha256: str
    vocab_size: int
    """One more than the largest id."""
    eod_id: int
    eod_token: str
    bos_id: int | None
    bos_token: str | None
    control: tuple[str, ...]
    special: tuple[str, ...]
    """The control tokens that no message of a conversation may write."""
    loses_nothing: bool
    """Whether all text has tokens."""


def load_tokenizer(path: Path, eod_token: str = EOD_TOKEN, bos_token: str | None = None) -> TokenizerFile:
    """Read a tokenizer.json. Raises ConfigError where it is missing or broken, or has no such tokens."""
    tokenizer = Tokenizer.open(path, ConfigError, _how_to_get(path))
    ends = {"--eod-token": eod_token} if bos_token is None else {"--eod-token": eod_token, "--bos-token": bos_token}
    for option, token in ends.items():
        if token not in tokenizer.ids:
            problem = f"{path} has no token {token!r}"
        elif (token not in tokenizer.added and tokenizer.comes_from_text(token)) or (
            token == tokenizer.unknown and not tokenizer.loses_nothing
        ):
            problem = f"{option} {token!r} of {path} is a token that text becomes, so it can mark no document"
        else:
            continue
        raise ConfigError(
            f"{problem}. Name a control token with {option}; its control tokens are "
            f"{', '.join(list(tokenizer.control)[:20]) or 'none'}."
        )
    if bos_token == eod_token:
        raise ConfigError(
            f"--bos-token and --eod-token are both {eod_token!r}: documents need two tokens to begin and end."
        )
    bos_id = None if bos_token is None else tokenizer.ids[bos_token]
    return TokenizerFile(
        tokenizer.json,
        tokenizer.for_text(*ends.values()),
        tokenizer.sha256,
        tokenizer.vocab_size,
        tokenizer.ids[eod_token],
        eod_token,
        bos_id,
        bos_token,
        tuple(dict.fromkeys([*tokenizer.control, *ends.values()])),
        tuple(dict.fromkeys([*tokenizer.special, *ends.values()])),
        tokenizer.loses_nothing,
    )


def _how_to_get(path: Path) -> str:
    if path.exists() or path.suffix == ".json":
        return (
            "`megatrain-data train-tokenizer` makes one. A tokenizer.model or vocab.txt is exported by "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(OUT) of transformers."
        )
    return (
        'If that is a name on the Hugging Face hub, export it first: python -c "from tokenizers import Tokenizer; '
        f"Tokenizer.from_pretrained('{path}').save('tokenizer.json')\""
    )


def train_tokenizer(
    inputs: Sequence[str],
    vocab_size: int,
    out: Path,
    options: ReadOptions,
    special_tokens: Sequence[str] = (),
    say: Callable[[str], None] = lambda _: None,
    *,
    words: str = "gpt2",
    split_digits: bool = False,
    sample_bytes: int | None = None,
    progress: Progress = no_progress,
) -> int:
    """Train a byte-level BPE on the text of the inputs, write it to `out`, and return its true vocabulary size.

    Every byte has a token of its own, so no text is ever unknown. The same text gives the same file. The size is
    smaller than asked for where the text has not enough pairs to merge. ``special_tokens``: those that no text becomes,
    beside EOD_TOKEN, such as the sentinels of fill-in-the-middle. ``words``: of WORDS; ``split_digits``: each digit is
    a word. ``sample_bytes``: about how much text to train on, from all over the input (None: all of it).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _word_splitter(words, split_digits)
    tokenizer.decoder = decoders.ByteLevel()
    special = list(dict.fromkeys([EOD_TOKEN, *special_tokens]))
    smallest = NUM_BYTE_TOKENS + len(special)
    if vocab_size < smallest:
        raise ConfigError(
            f"--vocab-size {vocab_size} is too small: the bytes and {', '.join(special)} need {smallest}."
        )
    for token in special:
        if not _MARKED.fullmatch(token):
            raise ConfigError(
                f"--special-token {token!r} is no more than words or signs, which text may have too: a token that no "
                "text becomes needs marks around its name, as <|name|> has."
            )
    if not out.parent.is_dir():
        raise ConfigError(f"There is no folder {out.parent} for --out {out}: make it first.")
    files = find_inputs_apart(out, inputs, options, say)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Small units for a sample, and yet no more than a list holds.
    size = PART_BYTES if sample_bytes is None else sum(file.num_bytes for file in files) >> MAX_UNITS_BITS
    units = list(plan_units(files, min(max(size, PART_BYTES >> 10), PART_BYTES), options.errors))
    sample = _sample_units(units, sample_bytes)
    say(_memory_line(sum(unit.text_bytes for unit in units), sample_bytes))
    with progress("read", sum(unit.num_bytes if quota is None else quota for unit, quota in sample)) as advance:
        texts = _TextIterator(sample, options, advance, lambda: say("All text is read; the merges are being found."))
        tokenizer.train_from_iterator(texts, trainer)
    if texts.error is not None:
        raise texts.error
    if not texts.num_characters:
        raise no_text_error(texts.num_documents, texts.num_skipped)
    if texts.num_skipped:
        say(f"{texts.num_skipped} rows could not be read and were skipped; --check lists where.")
    commit_bytes(out, tokenizer.to_str(pretty=True).encode())
    return int(tokenizer.get_vocab_size(with_added_tokens=True))


def _word_splitter(words: str, split_digits: bool) -> PreTokenizer:
    from tokenizers import Regex, pre_tokenizers

    pattern = WORDS[words]
    parts = [
        *([pre_tokenizers.Digits(individual_digits=True)] if split_digits else []),
        *([pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None),
    ]
    return pre_tokenizers.Sequence(parts) if len(parts) > 1 else parts[0]


Sample = list[tuple[Unit, int | None]]
"""Units, and how many bytes of the text at the beginning of each; None: all of it."""


def _sample_units(units: list[Unit], sample_bytes: int | None) -> Sample:
    """Units at even distances, each for its part of the sample."""
    total = sum(unit.text_bytes for unit in units)
    if sample_bytes is None or total <= sample_bytes:
        return [(unit, None) for unit in units]
    count = min(len(units), max(1, sample_bytes // MIN_SAMPLED_BYTES))
    chosen = [units[index * len(units) // count] for index in range(count)]
    total = sum(unit.text_bytes for unit in chosen)
    return [(unit, -(-sample_bytes * unit.text_bytes // max(total, 1))) for unit in chosen]


def _memory_line(text_bytes: int, sample_bytes: int | None) -> str:
    """What is trained on, and about how much memory that takes, before it begins."""
    trained = text_bytes if sample_bytes is None else min(sample_bytes, text_bytes)
    needed, there = BASE_MEMORY + MEMORY_PER_BYTE * trained, memory_bytes()
    of = f"a sample of {format_bytes(trained)} of some" if trained < text_bytes else "some"
    line = f"Training on {of} {format_bytes(text_bytes)} of text takes some {format_bytes(needed)} of memory"
    if needed <= there:
        return f"{line}, of {format_bytes(there)} here."
    fitting = there // 2 // MEMORY_PER_BYTE
    return f"Warning: {line}, and there are {format_bytes(there)} here: give --sample-bytes {fitting}."


class _TextIterator:
    """The texts of a sample, streamed. Keeps what went wrong, which `tokenizers` would blur."""

    def __init__(
        self, sample: Sample, options: ReadOptions, advance: Callable[[int], None], ended: Callable[[], None]
    ) -> None:
        self.error: DataError | None = None
        self.num_documents = self.num_skipped = self.num_characters = 0
        self._sample, self._options, self._advance, self._ended = sample, options, advance, ended

    def __iter__(self) -> Iterator[str]:
        try:
            for unit, quota in self._sample:
                yield from self._texts(unit, quota)
        except DataError as error:
            self.error = error
        else:
            self._ended()

    def _texts(self, unit: Unit, quota: int | None) -> Iterator[str]:
        """The first texts of a unit, until they have so many bytes."""
        parts = read_parts(unit, self._options, self._advance if quota is None else lambda _: None)
        left = sys.maxsize if quota is None else quota
        for _, row in (row for part in parts for row in part.rows):
            self.num_skipped += isinstance(row, BadRow)
            if isinstance(row, Record):
                self.num_documents += 1
                self.num_characters += len(row.text)
                yield row.text
                left -= len(row.text) if row.text.isascii() else len(row.text.encode())
                if left <= 0:
                    break
        if quota is not None:
            self._advance(quota)
