"""BLEU and chrF beside sacrebleu's own corpus scores, and their errors beside its own bootstrap."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
from sacrebleu.metrics.bleu import BLEU

from megatrain.config.tasks import Task
from megatrain.errors import DataError
from megatrain.tasks.bootstrap import bootstrap, difference, mean
from megatrain.tasks.evaluation import evaluate_tasks
from megatrain.tasks.metrics import Outcome, compare, judge_generation, summarize
from megatrain.tasks.prompts import Example
from megatrain.tasks.text_scores import text_score

WORDS = ("the", "a", "cat", "dog", "sat", "lay", "on", "under", "mat", "table,", "and", "then", "(far)", "away.")


def sentences(seed: int, count: int = 60) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, size=random.integers(1, 15))) for _ in range(count)]


REFERENCES = sentences(0)
TEXTS = [mine if k % 3 else whole for k, (mine, whole) in enumerate(zip(sentences(1), REFERENCES, strict=True))]


def outcomes_of(texts: list[str], references: list[str], **keys: Any) -> tuple[Task, list[Outcome]]:
    own = {"metrics": ["exact_match", "bleu", "chrf", "chrf++"], **keys}
    task = Task(name="t", kind="generate", path="unused", prompt="", answer="unused", **own)
    examples = [
        Example(k, "", (), (), "", " ", "\n", (), (), reference, None, str(k // 6))
        for k, reference in enumerate(references)
    ]
    return task, [judge_generation(task, *pair) for pair in zip(examples, texts, strict=True)]


def test_scores_are_those_of_sacrebleu() -> None:
    metrics = summarize(*outcomes_of(TEXTS, REFERENCES))
    bleu = sacrebleu.corpus_bleu(TEXTS, [REFERENCES])
    assert metrics["bleu"].value == pytest.approx(bleu.score, abs=1e-9)
    assert metrics["chrf"].value == pytest.approx(sacrebleu.corpus_chrf(TEXTS, [REFERENCES]).score, abs=1e-9)
    plus = sacrebleu.corpus_chrf(TEXTS, [REFERENCES], word_order=2)
    assert metrics["chrf++"].value == pytest.approx(plus.score, abs=1e-9)
    assert metrics["chrf"].value != metrics["chrf++"].value
    version = sacrebleu.__version__
    assert metrics["bleu"].signature == f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{version}"
    assert metrics["chrf++"].signature == f"nrefs:1|case:mixed|eff:yes|nc:6|nw:2|space:no|version:{version}"
    assert metrics["exact_match"].signature is None


def test_edit_similarity_counts_insertions_and_deletions() -> None:
    pairs = outcomes_of(["  abcd\n", "abxd", ""], ["abcd", "abcd", "abcd"], metrics=["edit_similarity"])
    assert summarize(*pairs)["edit_similarity"].value == pytest.approx((1.0 + 0.75 + 0.0) / 3)


def test_one_right_line_of_two_is_not_all() -> None:
    """References are a list for each set of them, not one for each text."""
    texts, references = ["the cat sat on the mat", "a dog"], ["the cat sat on the mat", "two entirely other words"]
    assert text_score("bleu", texts, references).value == pytest.approx(
        sacrebleu.corpus_bleu(texts, [references]).score, abs=1e-9
    )
    assert text_score("bleu", texts, references).value < 80.0
    assert text_score("bleu", references, references).value == pytest.approx(100.0)


def test_texts_with_new_lines_stay_one_text() -> None:
    texts, references = ["one line\nand a second of it", "a b c d"], ["one line\nand another of it", "a b c d"]
    figure = text_score("bleu", texts, references)
    assert len(figure.columns) == 2
    assert figure.value == pytest.approx(sacrebleu.corpus_bleu(texts, [references]).score, abs=1e-9)


def test_errors_are_those_of_sacrebleus_bootstrap() -> None:
    (ours,) = bootstrap([text_score("bleu", TEXTS, REFERENCES)])
    theirs = BLEU().corpus_score(TEXTS, [REFERENCES], n_bootstrap=1000)
    assert ours is not None
    assert (ours.high - ours.low) / 2 == pytest.approx(theirs._ci, rel=0.1)
    assert (ours.high + ours.low) / 2 == pytest.approx(theirs._mean, rel=0.05)


def test_clusters_are_drawn_whole() -> None:
    """Six copies of each example say no more than one does; drawn one by one they would seem to."""
    texts, references = ([each for each in some for _ in range(6)] for some in (TEXTS, REFERENCES))
    copied = summarize(*outcomes_of(texts, references, cluster="{{ unused }}"))
    apart = summarize(*outcomes_of(texts, references))
    once = summarize(*outcomes_of(TEXTS, REFERENCES))
    for name in ("bleu", "chrf", "exact_match"):
        assert copied[name].value == pytest.approx(once[name].value)
        assert copied[name].confidence_interval == pytest.approx(once[name].confidence_interval)
        assert copied[name].stderr == pytest.approx(once[name].stderr, rel=0.1)
        assert apart[name].stderr == pytest.approx((once[name].stderr or 0.0) / 6**0.5, rel=0.2)


def test_models_are_compared_on_the_same_samples() -> None:
    """A model that is better by the same on each example is better in each sample."""
    values = np.random.default_rng(3).normal(size=200)
    (paired,) = bootstrap([difference(mean(values + 0.01), mean(values))])
    assert paired is not None and paired.low == pytest.approx(0.01) and paired.stderr < 1e-9
    task, ours = outcomes_of(TEXTS, REFERENCES)
    _, theirs = outcomes_of(sentences(1), REFERENCES)
    found = compare(task, ours, theirs)
    better = summarize(task, ours)["bleu"].value - summarize(task, theirs)["bleu"].value
    assert found["bleu"].value == pytest.approx(better)
    low, _ = found["bleu"].confidence_interval or (0.0, 0.0)
    assert 0.0 < low < better


def test_a_mean_lies_within_its_interval_as_often() -> None:
    """Of 200 samples of 50 from a known distribution, about 95% of the intervals have its mean."""
    random, hits = np.random.default_rng(5), 0
    for _ in range(200):
        (sampled,) = bootstrap([mean(random.exponential(size=50))])
        assert sampled is not None
        hits += sampled.low <= 1.0 <= sampled.high
    assert 176 <= hits <= 197


def test_a_baseline_is_another_file_of_answers(finished_run: Path, tmp_path: Path) -> None:
    rows = [{"q": f"A {word}", "a": word} for word in ("list", "class", "module")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = "{name: t, kind: generate, path: PATH, prompt: '{{ q }}', answer: '{{ a }}', max_new_tokens: 4, "
    text += "metrics: [chrf], cluster: '{{ a }}'}"
    (tmp_path / "tasks.yaml").write_text(f"[{text}]".replace("PATH", str(tmp_path / "rows.jsonl")))
    evaluate_tasks(finished_run, tmp_path / "tasks.yaml", out=tmp_path / "out.jsonl")
    (result,) = evaluate_tasks(finished_run, tmp_path / "tasks.yaml", baseline=tmp_path / "out.jsonl")
    assert result.differences["chrf"].value == 0.0
    assert result.differences["chrf"].confidence_interval == (0.0, 0.0)
    (tmp_path / "fewer.jsonl").write_text((tmp_path / "out.jsonl").read_text().splitlines()[0])
    with pytest.raises(DataError, match="do not answer the same rows"):
        evaluate_tasks(finished_run, tmp_path / "tasks.yaml", baseline=tmp_path / "fewer.jsonl")
