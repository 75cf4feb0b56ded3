"""Ten thousand documents of the nastiest text: every format, the ids of `tokenizers`, token by token.

The suite marked slow takes three formats, MEGATRAIN_ACCEPTANCE=1 all.
"""

from __future__ import annotations

import random
import unicodedata
from pathlib import Path

import numpy as np
import orjson
import pytest
from data_samples import WRITERS, Document, MakeDataset
from tokenizers import Tokenizer

from data_tools.engines import EDGE_CASES
from megatrain.data import open_dataset
from tests.runs import ACCEPTANCE

ALPHABETS = [
    [chr(code) for code in range(128)],
    [chr(code) for code in range(0x80, 0x600)],
    [chr(code) for code in range(0x300, 0x370)] + list("aeiou"),
    [chr(code) for code in (*range(0x2000, 0x2070), 0xFEFF, 0xFFFD, 0xFFFE, 0xFFFF, 0x85, 0xA0)],
    [chr(code) for code in range(0x900, 0xE80) if unicodedata.category(chr(code)) != "Cn"],
    [chr(code) for code in range(0x3040, 0x30FF)] + [chr(code) for code in range(0x4E00, 0x4F00)],
    [chr(code) for code in (*range(0x1F1E6, 0x1F200), *range(0x1F3FB, 0x1F600), 0x200D, 0xFE0F, 0x20E3)],
    [chr(code) for code in (*range(0xE000, 0xE010), *range(0x10FFF0, 0x110000), *range(0xE0000, 0xE0080))],
    ["\r\n", "\n", "\r", "\t", " ", "  ", "\0", "\x0b", "\x1c", "\u2028"],
    ["<|endoftext|>", "<|", "|>", "<|endof", "text|>", "'s", "'LL", "1", "23", "\u0664", "\u00b2"],
    ["the", " quick", " brown", "\n\n    ", "def ", "(self)", "://", "____", ".", ",", "don't"],
]

FORMATS = list(WRITERS) if ACCEPTANCE else ["a.jsonl.zst", "a.parquet", "texts"]


def nasty_documents(num_documents: int) -> list[Document]:
    """Mixtures of alphabets; some empty, one of the known nasty texts now and then, the last two of 5 MB."""
    generator = random.Random(2026)
    texts = []
    for number in range(num_documents - 2):
        alphabets = generator.sample(ALPHABETS, generator.randint(1, 3))
        letters = [letter for alphabet in alphabets for letter in alphabet]
        length = int(2 ** generator.uniform(0, 9))
        texts.append("" if number % 100 == 7 else "".join(generator.choices(letters, k=length)))
        if number % 50 == 3:
            texts[-1] = EDGE_CASES[number // 50 % len(EDGE_CASES)]
    long_text = "".join(texts)
    while len(long_text.encode()) < 5_000_000:
        long_text += long_text
    long_text = long_text.encode()[:5_000_000].decode(errors="ignore")
    texts += [long_text, "a" * 5_000_000]
    return [(f"doc-{number}", text) for number, text in enumerate(texts)]


@pytest.mark.slow
def test_ten_thousand_nasty_documents(tmp_path: Path, tokenizer_path: Path, make_dataset: MakeDataset) -> None:
    documents = nasty_documents(10_000)
    assert len(documents) == 10_000
    plain = Tokenizer.from_str(orjson.dumps({**orjson.loads(tokenizer_path.read_bytes()), "added_tokens": []}).decode())
    eod_id = Tokenizer.from_file(str(tokenizer_path)).token_to_id("<|endoftext|>")
    kept = [text for _, text in documents if text]
    expected = [np.array([*encoding.ids, eod_id]) for encoding in plain.encode_batch(kept)]
    for name in FORMATS:
        WRITERS[name](tmp_path / name, documents)
        make_dataset(tmp_path / name, tmp_path / f"out-{name}", part_bytes=1 << 20, shard_tokens=3_000_000)
        dataset = open_dataset(tmp_path / f"out-{name}")
        assert dataset.num_documents == len(kept)
        for k, tokens in enumerate(expected):
            assert np.array_equal(dataset.document(k), tokens), (name, k, kept[k][:60])
