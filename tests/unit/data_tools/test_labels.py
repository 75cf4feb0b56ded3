"""Texts with labels become datasets that say which labels there are, and what was left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from data_tools.labeled import LabeledText
from data_tools.verify import verify_dataset
from megatrain.data import open_dataset
from megatrain.errors import DataError
from tests.labeled_data import make_labeled
from tests.runs import TinyData
from tests.tiny_data import silent

ROWS: list[dict[str, Any]] = [
    {"text": "one", "label": "b"},
    {"text": "two", "label": "a"},
    {"text": "none"},
    {"text": "", "label": "a"},
    {"text": "three", "label": "c"},
    {"text": "four", "label": 7},
]


def labels_of(path: Path) -> list[str]:
    dataset = open_dataset(path)
    assert dataset.label_names is not None
    begins = [dataset.document_range(number)[0] for number in range(dataset.num_documents)]
    return [dataset.label_names[dataset.label_at(begin)] for begin in begins]


def test_labels_are_sorted_and_rows_without_left_out(labeled_data: TinyData, tmp_path: Path) -> None:
    out = make_labeled(ROWS, labeled_data.tokenizer, tmp_path / "set", LabeledText("[SEP]"))
    dataset = open_dataset(out)
    assert dataset.label_names == ["7", "a", "b", "c"]
    assert labels_of(out) == ["b", "a", "c", "7"]
    assert dataset.manifest.examples == {"read": 6, "no_label": 1, "no_text": 1}
    listed = [orjson.loads(line)["problem"] for line in (out / "skipped.jsonl").read_bytes().splitlines()]
    assert listed == ["the record has no label", "a text is empty, or is none"]
    verify_dataset(str(out), silent)


def test_numbers_are_sorted_as_numbers() -> None:
    for names in (["0", "9", "10"], ["-10", "-9", "2"], ["1e-07", "0.5", "10.0"], ["03", "3", "3.0", "9" * 5000]):
        assert LabeledText("[SEP]").names_of(names[::-1]) == names
    assert LabeledText("[SEP]").names_of(["\u0663", "10", "9"]) == ["10", "9", "\u0663"]


def test_given_names_keep_their_order(labeled_data: TinyData, tmp_path: Path) -> None:
    supervision = LabeledText("[SEP]", names=("c", "b", "a"))
    out = make_labeled(ROWS, labeled_data.tokenizer, tmp_path / "set", supervision)
    dataset = open_dataset(out)
    assert dataset.label_names == ["c", "b", "a"]
    assert labels_of(out) == ["b", "a", "c"]
    assert dataset.manifest.examples == {"read": 6, "no_label": 1, "no_text": 1, "unknown_label": 1}
    other = make_labeled(ROWS, labeled_data.tokenizer, tmp_path / "other", LabeledText("[SEP]", names=("a", "b", "c")))
    assert open_dataset(other).digest != dataset.digest


def test_another_label_is_another_document(labeled_data: TinyData, tmp_path: Path) -> None:
    """The hash of a document has its label, so that a changed one is found."""
    changed = [{**ROWS[0], "label": "a"}, *ROWS[1:], {"text": "five", "label": "b"}]
    before, after = (
        open_dataset(make_labeled(rows, labeled_data.tokenizer, tmp_path / name, LabeledText("[SEP]")))
        for name, rows in (("before", ROWS), ("after", changed))
    )
    assert before.document(0).tolist() == after.document(0).tolist()
    assert before.document_info(0).hash != after.document_info(0).hash


def test_an_input_without_labels_is_refused(labeled_data: TinyData, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"No text of the input has a label .* the record has no label"):
        make_labeled([{"text": "one"}], labeled_data.tokenizer, tmp_path / "set", LabeledText("[SEP]"))
    with pytest.raises(DataError, match="All texts have the label 'b', and what is classified has two or more"):
        make_labeled([{"text": "one", "label": "b"}] * 2, labeled_data.tokenizer, tmp_path / "b", LabeledText("[SEP]"))
