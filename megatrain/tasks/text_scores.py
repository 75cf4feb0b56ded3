"""How like their references generated texts are: by edits, by BLEU, by chrF.

BLEU (Papineni et al. 2002) and chrF (Popovic 2015) are sacrebleu's, which makes and compares n-grams as papers report
them, and says how in its signature (Post 2018).

What a score is made of, counts of n-grams in each text, is summed over any sample of texts: see bootstrap. sacrebleu
has these counts under names of its own: ``_extract_corpus_statistics`` and ``_compute_score_from_stats``, as its own
paired tests use them; tests/unit/tasks/test_text_scores.py compares them with its ``corpus_score``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from rapidfuzz import fuzz
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from megatrain.config.tasks import TextScore
from megatrain.tasks.bootstrap import Figure, Floats, mean

_SACREBLEU: Mapping[TextScore, Callable[[], Any]] = {
    "bleu": BLEU,
    "chrf": lambda: CHRF(word_order=0),
    "chrf++": lambda: CHRF(word_order=2),
}


def text_score(name: TextScore, texts: Sequence[str], references: Sequence[str]) -> Figure:
    """Of texts, each beside its one reference. sacrebleu's: from 0 to 100, of texts as they are read (detokenized).

    edit_similarity: from 0 to 1, the mean share of characters that need neither be put in nor taken out (that of the
    longest common subsequence in both), spaces around both texts aside; CrossCodeEval's and RepoBench's.
    """
    if name == "edit_similarity":
        pairs = zip(texts, references, strict=True)
        return mean(np.array([fuzz.ratio(text.strip(), reference.strip()) / 100.0 for text, reference in pairs]))
    metric = _SACREBLEU[name]()
    counts = np.array(metric._extract_corpus_statistics(texts, [references]), dtype=np.float64)

    def of_sums(sums: Floats) -> float:
        return float(metric._compute_score_from_stats(sums.tolist()).score)

    return Figure(counts, of_sums, str(metric.get_signature()))
