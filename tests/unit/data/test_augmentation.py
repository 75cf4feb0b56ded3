"""Transforms on real samples: which documents, with which numbers, and what does not change."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from data_tools.tokenize import Effort, TokenizeOptions, tokenize
from megatrain.batch import Batch
from megatrain.config import RunConfig
from megatrain.data import Dataset, open_dataset
from megatrain.data.augmentation import Augmentation, DocumentPart, open_augmentations
from megatrain.data.batches import BatchMaker, TrainingBatches
from megatrain.data.order import DataOrder, Samples, SamplingSettings
from megatrain.data.packing import open_plan, store_plan
from megatrain.errors import ConfigError, DataError
from megatrain.objectives.next_token import ConcatSource, PackedSource
from tests.tokenizer_samples import qwen3

SampleSource = ConcatSource | PackedSource
SEQ_LEN = 128
FILL = {"fill_in_the_middle": {"rate": 0.5}}
SPANS = {"span_corruption": {"rate": 0.5}}
MASK = {"token_masking": {"rate": 0.2}}

Ints = NDArray[np.int64]


@pytest.fixture(scope="module")
def dataset(sentinel_data: Path) -> Dataset:
    return open_dataset(sentinel_data)


@pytest.fixture(scope="module", params=["concat", "best_fit"])
def source(request: pytest.FixtureRequest, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> SampleSource:
    if request.param == "concat":
        return ConcatSource(dataset, SEQ_LEN, document_mask=True)
    folder = tmp_path_factory.mktemp("plan")
    store_plan(dataset, SEQ_LEN, folder)
    return PackedSource(dataset, open_plan(dataset, SEQ_LEN, folder), document_mask=True)


def opened(dataset: Dataset, *transforms: dict[str, Any], seed: int = 1) -> Augmentation:
    entry = {key: value for transform in transforms for key, value in transform.items()}
    config = RunConfig.model_validate(
        {
            "run": {"dir": "unused", "seed": seed},
            "model": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
            "data": {"train": [{"path": str(dataset.path), **entry}], "seq_len": SEQ_LEN},
            "train": {"steps": 10, "global_batch_size": 2},
            "optimizer": {"lr": 1.0e-3},
        }
    )
    (augmentation,) = open_augmentations(config, [dataset])
    assert augmentation is not None
    return augmentation


def samples_of(windows: Ints, epoch: int = 0) -> Samples:
    zeros = np.zeros_like(windows)
    return Samples(zeros, zeros + epoch, windows, windows)


def whole(source: SampleSource, augmentation: Augmentation | None, epoch: int = 0) -> Batch:
    """All samples of a source, transformed, in one batch."""
    every = np.arange(source.num_samples)
    (batch,) = BatchMaker([replace(source, augmentation=augmentation)], len(every)).make(samples_of(every, epoch))
    return batch


def assert_equal(one: Batch, other: Batch, fields: Sequence[str] = Batch._fields) -> None:
    for field in fields:
        first, second = getattr(one, field), getattr(other, field)
        assert (first is second is None) or bool((first == second).all()), field


def sentinel_ids(dataset: Dataset) -> dict[str, int]:
    from tokenizers import Tokenizer

    added = Tokenizer.from_file(str(dataset.tokenizer_path)).get_added_tokens_decoder()
    return {token.content: number for number, token in added.items()}


def test_the_parts_of_a_sample_are_its_documents(source: SampleSource, dataset: Dataset) -> None:
    tokens = np.empty(SEQ_LEN + 1, dtype=np.int64)
    for window in range(source.num_samples):
        source.fill(window, tokens, None, None)
        at = 0
        for document, offset, begin, end in source.parts(window):
            assert begin == at
            assert dataset.document(document)[offset : offset + end - begin].tolist() == tokens[begin:end].tolist()
            at = end
        assert set(tokens[at:].tolist()) <= {dataset.eod_id}


def test_fill_in_the_middle_loses_no_part(source: SampleSource, dataset: Dataset) -> None:
    """Put together again, each part of a document is the text without its last three tokens, or untouched."""
    ids = sentinel_ids(dataset)
    prefix, middle, suffix = (ids[f"<|fim_{name}|>"] for name in ("prefix", "middle", "suffix"))
    fill = opened(dataset, FILL)
    plain, tokens = np.empty(SEQ_LEN + 1, dtype=np.int64), np.empty(SEQ_LEN + 1, dtype=np.int64)
    choices: dict[int, set[bool]] = {}
    for window in range(source.num_samples):
        source.fill(window, plain, None, None)
        tokens[:] = plain
        assert fill.apply(source.parts(window), 0, tokens) is tokens
        assert (tokens[plain == dataset.eod_id] == dataset.eod_id).all()
        for part in source.parts(window):
            before, after = (array[part.begin : part.end].tolist() for array in (plain, tokens))
            end = [before.pop(), after.pop()] if before[-1] == dataset.eod_id else [0, 0]
            assert end[0] == end[1]
            is_long = len(before) >= 16
            if after[:1] != [prefix]:
                assert after == before
            else:
                assert is_long
                at, cut = after.index(middle), after.index(suffix)
                is_spm = cut == 1
                text = after[at + 1 :] + after[2:at] if is_spm else after[1:cut] + after[at + 1 :] + after[cut + 1 : at]
                assert text == before[:-3]
            if is_long:
                choices.setdefault(part.document, set()).add(after[:1] == [prefix])
    assert all(len(choice) == 1 for choice in choices.values()), "a document's parts share its choice"
    assert len(choices) > 150
    assert np.mean([True in choice for choice in choices.values()]) == pytest.approx(0.5, abs=0.12)


@pytest.mark.parametrize("transforms", [[FILL], [SPANS], [MASK], [FILL, SPANS, MASK]])
def test_borders_positions_and_scored_targets_stay(
    transforms: list[dict[str, Any]], source: SampleSource, dataset: Dataset
) -> None:
    plain, made = whole(source, None), whole(source, opened(dataset, *transforms))
    assert_equal(plain, made, ("loss_mask_BM", "positions_BT", "document_ids_BT", "sample_ids_B"))
    assert bool((plain.tokens_BT != made.tokens_BT).any())
    is_end = plain.tokens_BT == dataset.eod_id
    assert bool((is_end == (made.tokens_BT == dataset.eod_id)).all())


def test_masking_hides_inputs_but_not_targets(source: SampleSource, dataset: Dataset) -> None:
    plain, made = whole(source, None), whole(source, opened(dataset, MASK))
    assert_equal(plain, made, ("targets_BM",))
    hidden = made.tokens_BT == sentinel_ids(dataset)["<mask>"]
    assert bool((made.tokens_BT == plain.tokens_BT)[~hidden].all())
    assert float(hidden.float().mean()) == pytest.approx(0.2, abs=0.02)


def test_transforms_depend_only_on_seed_epoch_and_document(source: SampleSource, dataset: Dataset) -> None:
    transforms = (FILL, SPANS, MASK)
    first = whole(source, opened(dataset, *transforms))
    assert_equal(first, whole(source, opened(dataset, *transforms)))
    for other in (
        whole(source, opened(dataset, *transforms, seed=2)),
        whole(source, opened(dataset, *transforms), epoch=1),
    ):
        share = (other.tokens_BT == first.tokens_BT).float().mean()
        assert float(share) < 0.8
    backwards = np.arange(source.num_samples)[::-1].copy()
    changed = replace(source, augmentation=opened(dataset, *transforms))
    (batch,) = BatchMaker([changed], len(backwards)).make(samples_of(backwards))
    assert bool((batch.tokens_BT.flip(0) == first.tokens_BT).all())


@pytest.mark.parametrize(("num_ranks", "micro_batch_size"), [(2, 1), (4, 3)])
def test_ranks_and_resumes_see_the_same_transformed_samples(
    num_ranks: int, micro_batch_size: int, source: SampleSource, dataset: Dataset
) -> None:
    def found(num_ranks: int, micro_batch_size: int, order: DataOrder, steps: Sequence[int]) -> list[tuple[Any, ...]]:
        maker = BatchMaker([replace(source, augmentation=opened(dataset, FILL, SPANS, MASK))], micro_batch_size)
        rows, counts = [], set()
        for rank in range(num_ranks):
            batches = TrainingBatches(maker, order, rank, num_ranks)
            for step in steps:
                counts.add((step, batches.num_targets(step)))
                for batch in batches.micro_batches(step):
                    lists = batch.sample_ids_B.tolist(), batch.tokens_BT.tolist(), batch.targets_BM.tolist()
                    rows += [(number, tuple(a), tuple(b)) for number, a, b in zip(*lists, strict=True)]
            batches.close()
        assert len(counts) == len(steps)
        return sorted(rows)

    order = DataOrder.begin(5, SamplingSettings(12, (1.0,), SEQ_LEN, (source.num_samples,)))
    steps = [0, 1, 60]  # 60 is in a later epoch
    assert order.batch(60).epoch[0] > 0
    straight = found(1, 12, order, steps)
    resumed = DataOrder(5, order.segments)
    assert sorted(found(num_ranks, micro_batch_size, resumed, steps)) == straight


@pytest.mark.parametrize(
    ("transform", "key", "token"),
    [
        ({"fill_in_the_middle": {"suffix_token": "<none>"}}, "fill_in_the_middle.suffix_token", "<none>"),
        ({"fill_in_the_middle": {"middle_token": "e"}}, "fill_in_the_middle.middle_token", "e"),
        ({"token_masking": {"mask_token": "<|endoftext|>"}}, "token_masking.mask_token", "<|endoftext|>"),
        ({"span_corruption": {"sentinel_token": "<s{}>"}}, "span_corruption.sentinel_token", "<s0>"),
    ],
)
def test_a_sentinel_must_be_an_added_token(transform: dict[str, Any], key: str, token: str, dataset: Dataset) -> None:
    with pytest.raises(ConfigError) as refused:
        opened(dataset, transform)
    assert f"data.train.0.{key}: {token} given; it must be an added token" in str(refused.value)
    assert "<|fim_prefix|>, <|fim_middle|>" in str(refused.value)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_transforms.py").write_text(
        """
import numpy as np

number = 7

def rotate(tokens, random):
    return np.roll(tokens, random.integers(1, 5))

def shorten(tokens, random):
    return tokens[1:]

def overflow(tokens, random):
    return tokens + 10**6

def words(tokens, random):
    return tokens / 2

def unsteady(tokens, random):
    return np.random.permutation(tokens)

def fussy(tokens, random):
    if len(tokens) != TRIED:
        raise ValueError("too long")
    return tokens
""".replace("TRIED", str(len("x")))
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "my_transforms", raising=False)
    return "my_transforms"


def test_a_user_function_transforms_each_document(module: str, source: SampleSource, dataset: Dataset) -> None:
    rotate = opened(dataset, {"transform": f"{module}:rotate"})
    plain, tokens = np.empty(SEQ_LEN + 1, dtype=np.int64), np.empty(SEQ_LEN + 1, dtype=np.int64)
    for window in range(0, source.num_samples, 7):
        source.fill(window, plain, None, None)
        tokens[:] = plain
        rotate.apply(source.parts(window), 0, tokens)
        for part in source.parts(window):
            end = part.end - (plain[part.end - 1] == dataset.eod_id)
            turned = [np.roll(plain[part.begin : end], by).tolist() for by in range(1, 5)]
            assert tokens[part.begin : end].tolist() in turned
    assert_equal(whole(source, rotate), whole(source, opened(dataset, {"transform": f"{module}:rotate"})))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("shorten", "gives back as many token ids as it is given"),
        ("words", "gives back as many token ids as it is given"),
        ("overflow", "whose ids are 0 to"),
        ("unsteady", "two different things of the same tokens"),
        ("fussy", "ValueError('too long')"),
        ("number", "it is no function"),
        ("missing", "cannot be imported: AttributeError"),
    ],
)
def test_a_function_that_is_no_transform_is_refused(name: str, words: str, module: str, dataset: Dataset) -> None:
    with pytest.raises(ConfigError) as refused:
        opened(dataset, {"transform": f"{module}:{name}"})
    assert str(refused.value).startswith(f"data.train.0.transform: {module}:{name}")
    assert words in str(refused.value)


def test_a_module_that_is_not_there_is_refused(dataset: Dataset) -> None:
    with pytest.raises(ConfigError, match="no_such_module:f given; it cannot be imported: ModuleNotFoundError"):
        opened(dataset, {"transform": "no_such_module:f"})


def test_a_function_that_fails_later_is_named(module: str, dataset: Dataset) -> None:
    augmentation = opened(dataset, {"transform": f"{module}:rotate"})
    vars(__import__(module))["np"] = None  # what it needs is gone
    with pytest.raises(DataError, match=f"{module}:rotate failed on 10 tokens of"):
        augmentation.apply([DocumentPart(0, 0, 0, 10)], 0, np.arange(100, 111))


def test_bos_and_eod_stay_added_tokens_are_sentinels(tmp_path: Path) -> None:
    """A dataset with --bos-token, of a tokenizer that does not call its sentinels special."""
    qwen3().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("to be <|fim_prefix|> or not <tool_call> to be that is the question " * 20)
    effort = Effort(1, "tokenizers", lambda *_: nullcontext(lambda _: None), lambda _: None)
    options = TokenizeOptions(bos_token="<|im_start|>")
    tokenize([str(tmp_path / "a.txt")], tmp_path / "tokenizer.json", tmp_path / "out", options, effort)
    made = open_dataset(tmp_path / "out")
    tokens = made.document(0).astype(np.int64)
    prefix, *others = (made.tokenizer.ids[f"<|fim_{name}|>"] for name in ("prefix", "middle", "suffix"))
    assert not {prefix, *others, made.tokenizer.ids["<tool_call>"]} & set(tokens.tolist())
    filled = tokens.copy()
    part = DocumentPart(0, 0, 0, len(tokens))
    opened(made, {"fill_in_the_middle": {"rate": 1.0, "spm_rate": 0.0}}).apply([part], 0, filled)
    assert filled[[0, 1, -1]].tolist() == [made.bos_id, prefix, made.eod_id]
    assert set(others) <= set(filled.tolist())
    for token in ("<|im_start|>", "<|endoftext|>", "the"):
        with pytest.raises(ConfigError, match="it must be an added token"):
            opened(made, {"fill_in_the_middle": {"middle_token": token}})
