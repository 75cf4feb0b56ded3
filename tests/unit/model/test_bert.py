"""An encoder computes what transformers computes: whatever the segments, each packed document alone, padded or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_samples import SIZES, decoder_like, twin
from torch.nn import functional

from megatrain.batch import Batch, document_starts
from megatrain.config.schema import ModelConfig

LENGTHS = (23, 1, 40)


def bert(**keys: Any) -> ModelConfig:
    return ModelConfig(**{**SIZES, "family": "bert", "type_vocab_size": 3, **keys})


@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_each_segment_are_equal(tied: bool) -> None:
    config = bert(tie_word_embeddings=tied, intermediate_size=80)
    reference = twin(config)
    model = decoder_like(reference, config)
    tokens_BT, segments_BT = torch.randint(0, 131, (2, 300)), torch.randint(0, 3, (2, 300))
    context = model.make_context(torch.arange(300).expand(2, -1), None, None, model.dtype)
    with torch.no_grad():
        ours = model.logits(tokens_BT, context._replace(segments_BT=segments_BT))
        theirs = reference(tokens_BT, token_type_ids=segments_BT).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_loss_and_gradients_at_masked_places_are_equal() -> None:
    config = bert()
    reference = twin(config)
    model = decoder_like(reference, config)
    tokens_BT = torch.randint(0, 131, (2, 64))
    places_BM = torch.stack([torch.randperm(64)[:9].sort().values for _ in range(2)])
    targets_BM, mask_BM = torch.randint(0, 131, (2, 9)), torch.arange(9).expand(2, -1) < torch.tensor([[9], [5]])
    positions_BT = torch.arange(64).expand(2, -1)
    batch = Batch(tokens_BT, targets_BM, mask_BM, positions_BT, None, torch.arange(2), target_places_BM=places_BM)
    ours = model(batch) / mask_BM.sum()
    labels_BT = torch.full((2, 64), -100)
    for row in range(2):
        labels_BT[row, places_BM[row][mask_BM[row]]] = targets_BM[row][mask_BM[row]]
    expected = reference(tokens_BT, labels=labels_BT).loss
    ours.backward()
    expected.backward()
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-6)
    names, theirs = config.description.hugging_face.parameters, dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[names.get(name, name)].grad, atol=1e-5, rtol=1e-4)
    scores = model.target_scores(batch)
    assert -float(scores[0][mask_BM.flatten()].sum()) / int(mask_BM.sum()) == pytest.approx(float(ours), rel=1e-6)


def test_packed_documents_are_computed_as_each_alone() -> None:
    """As transformers computes it, where they are padded into a batch of their own."""
    config = bert()
    reference = twin(config)
    model = decoder_like(reference, config)
    documents = [torch.randint(0, 131, (length,)) for length in LENGTHS]
    ids_BT = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS)).unsqueeze(0)
    positions_BT = torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0)
    context = model.make_context(positions_BT, ids_BT, None, model.dtype, borders=document_starts(ids_BT))
    padded = torch.stack([functional.pad(document, (0, 40 - len(document)), value=7) for document in documents])
    is_there = torch.arange(40) < torch.tensor(LENGTHS).unsqueeze(1)
    with torch.no_grad():
        ours = model.logits(torch.cat(documents).unsqueeze(0), context)[0]
        theirs = reference(padded, attention_mask=is_there.long()).logits[is_there]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_classifier_computes_what_transformers_does() -> None:
    """Loss and every gradient, of packed pairs as of padded ones; dropout of the pooled output where it is asked."""
    config = bert(num_labels=7)
    reference = twin(config)
    model = decoder_like(reference, config)
    documents = [torch.randint(0, 131, (length,)) for length in LENGTHS]
    segments = [(torch.arange(length) > length // 2).long() for length in LENGTHS]
    labels, starts = torch.tensor([[4, 0, 6, 1]]), torch.tensor([[0, 23, 24, 0]])
    ids_BT = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS)).unsqueeze(0)
    batch = Batch(
        torch.cat(documents).unsqueeze(0),
        labels,
        torch.tensor([[True, True, True, False]]),
        torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0),
        ids_BT,
        torch.arange(1),
        document_starts(ids_BT),
        target_places_BM=starts,
        segments_BT=torch.cat(segments).unsqueeze(0),
    )
    ours = model(batch) / 3
    padded, types = (
        torch.stack([functional.pad(each, (0, 40 - len(each))) for each in every]) for every in (documents, segments)
    )
    is_there = torch.arange(40) < torch.tensor(LENGTHS).unsqueeze(1)
    expected = reference(padded, attention_mask=is_there.long(), token_type_ids=types, labels=labels[0, :3]).loss
    ours.backward()
    expected.backward()
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-6)
    theirs = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-5, rtol=1e-4)
    pooler = model.get_submodule("bert.pooler")
    x_BMC = torch.ones(1, 4, 64)
    pooler.dropout.probability = 0.5  # type: ignore[union-attr, assignment]
    assert not torch.any(pooler(x_BMC, torch.arange(1)) == 0)
    assert 0.4 < float((pooler.train()(x_BMC, torch.arange(1)) == 0).float().mean()) < 0.6
