"""Whether examples were in the training data: runs of 13 words that both have (Brown et al. 2020, appendix C)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from megatrain.data import Dataset
from megatrain.tasks.prompts import Example

NUM_WORDS = 13
_WORD = re.compile(r"\w+")


def find_seen(
    examples: Mapping[str, Sequence[Example]],
    datasets: Sequence[Dataset],
    share: tuple[int, int] = (0, 1),
    advance: Callable[[int], None] = lambda tokens: None,
) -> dict[str, set[int]]:
    """By task, the rows whose question with its answer or a choice shares a run of 13 words with a document.

    Words are compared in lower case and without punctuation; a text of fewer words is never found. ``share``: of the
    documents, those from the first number on at intervals of the second. ``advance``: called with tokens gone through.
    """
    owners: dict[int, list[tuple[str, int]]] = {}
    for task, of_task in examples.items():
        for example in of_task:
            for text in _texts(example):
                for run in _runs(text):
                    owners.setdefault(run, []).append((task, example.row))
    seen: dict[str, set[int]] = {task: set() for task in examples}
    if owners:
        first, step = share
        for dataset in datasets:
            for number in range(first, dataset.num_documents, step):
                tokens = dataset.document(number)
                for run in _runs(dataset.tokenizer.decode(tokens.tolist())):
                    for task, row in owners.get(run, ()):
                        seen[task].add(row)
                advance(len(tokens))
    return seen


def _texts(example: Example) -> Iterator[str]:
    """The question with each continuation, or with the answer where nothing is scored; no solved rows."""
    for end in example.scored or (example.answer,):
        yield f"{example.question} {end}"


def _runs(text: str) -> Iterator[int]:
    words = _WORD.findall(text.lower())
    for start in range(len(words) - NUM_WORDS + 1):
        yield hash(tuple(words[start : start + NUM_WORDS]))
