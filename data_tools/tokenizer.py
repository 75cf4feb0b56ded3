"""The tokenizer of a dataset: trained here, or brought along as a tokenizer.json."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_tools.inputs import InputFile, find_inputs
from data_tools.outputs import refuse_among_inputs
from data_tools.readers import plan_units, read_parts
from data_tools.units import ReadOptions
from megatrain.data.format import commit_bytes
from megatrain.data.tokenizer import Tokenizer
from megatrain.errors import ConfigError, DataError

EOD_TOKEN = "<|endoftext|>"
NUM_BYTE_TOKENS = 256


@dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer.json, and what a dataset needs to know of it."""

    json: bytes
    sha256: str
    vocab_size: int
    """One more than the largest id."""
    eod_id: int
    eod_token: str


def load_tokenizer(path: Path, eod_token: str = EOD_TOKEN) -> TokenizerFile:
    """Read a tokenizer.json. Raises ConfigError where it is missing, broken, or has no token `eod_token`."""
    tokenizer = Tokenizer.open(path, ConfigError, "`megatrain-data train-tokenizer` makes one.")
    if eod_token not in tokenizer.ids:
        raise ConfigError(
            f"{path} has no token {eod_token!r} to end a document with. Name one with --eod-token; "
            f"its control tokens are {', '.join(list(tokenizer.control)[:20]) or 'none'}."
        )
    return TokenizerFile(tokenizer.json, tokenizer.sha256, tokenizer.vocab_size, tokenizer.ids[eod_token], eod_token)


def train_tokenizer(
    inputs: Sequence[str], vocab_size: int, out: Path, options: ReadOptions, special_tokens: Sequence[str] = ()
) -> int:
    """Train a byte-level BPE on the text of the inputs, write it to `out`, and return its true vocabulary size.

    Every byte has a token of its own, so no text is ever unknown. The same text gives the same file. The size is
    smaller than asked for where the text has not enough pairs to merge. ``special_tokens``: those that no text becomes,
    beside EOD_TOKEN, such as the sentinels of fill-in-the-middle.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = list(dict.fromkeys([EOD_TOKEN, *special_tokens]))
    smallest = NUM_BYTE_TOKENS + len(special)
    if vocab_size < smallest:
        raise ConfigError(
            f"--vocab-size {vocab_size} is too small: the bytes and {', '.join(special)} need {smallest}."
        )
    if "" in special:
        raise ConfigError("--special-token was given an empty text: a token needs a name.")
    if not out.parent.is_dir():
        raise ConfigError(f"There is no folder {out.parent} for --out {out}: make it first.")
    files = find_inputs(inputs)
    refuse_among_inputs(out, inputs, files)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = _TextIterator(files, options)
    tokenizer.train_from_iterator(texts, trainer)
    if texts.error is not None:
        raise texts.error
    if not texts.num_characters:
        raise DataError(f"The input holds no text: {texts.num_documents} documents, all of them empty.")
    commit_bytes(out, tokenizer.to_str(pretty=True).encode())
    return int(tokenizer.get_vocab_size(with_added_tokens=True))


class _TextIterator:
    """The texts of the inputs, streamed. Keeps what went wrong, which `tokenizers` would blur."""

    def __init__(self, files: list[InputFile], options: ReadOptions) -> None:
        self.error: DataError | None = None
        self.num_documents = 0
        self.num_characters = 0
        self._files = files
        self._options = options

    def __iter__(self) -> Iterator[str]:
        try:
            for unit in plan_units(self._files):
                for part in read_parts(unit, self._options):
                    for record in part.rows:
                        if record is not None:
                            self.num_documents += 1
                            self.num_characters += len(record.text)
                            yield record.text
        except DataError as error:
            self.error = error
