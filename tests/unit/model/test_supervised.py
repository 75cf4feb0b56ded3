"""Training on answers computes what transformers computes with the same labels, each conversation alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_samples import SIZES, decoder_like, twin
from torch import Tensor
from transformers import PreTrainedModel

from megatrain.batch import Batch
from megatrain.config.schema import ModelConfig
from megatrain.data import Dataset, open_dataset
from megatrain.data.batches import BatchMaker
from megatrain.data.order import Samples
from megatrain.data.packing import make_plan
from megatrain.model.decoder import Decoder
from megatrain.model.loss import OutputHead
from megatrain.objectives.next_token import PackedSource
from tests.supervised import make_answers

SEQ_LEN = 1200
PAIRS = [
    ("one scored target: the end", ""),
    ("a thousand:", "abcde" * 200),
    *((f"question {k} " * (k % 5 + 1), f"answer {k} " * (k % 3 + 1)) for k in range(12)),
    ("too long " * 200, "dropped"),
]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "gpt2": {"family": "gpt2"},
    "mistral-window": {"family": "mistral", "num_key_value_heads": 2, "sliding_window": 9},
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return open_dataset(make_answers(tmp_path_factory.mktemp("answers"), [(p, a or "\n") for p, a in PAIRS]))


@pytest.fixture(params=FAMILIES)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return ModelConfig(**{**SIZES, "vocab_size": 257, "max_position_embeddings": SEQ_LEN, **FAMILIES[request.param]})


def packed_batches(dataset: Dataset, micro_batch_size: int) -> list[Batch]:
    source = PackedSource(dataset, make_plan(dataset, SEQ_LEN), document_mask=True)
    every = np.arange(source.num_samples)
    return BatchMaker([source], micro_batch_size).make(Samples(0 * every, 0 * every, every, every))


def labelled(dataset: Dataset) -> list[tuple[Tensor, Tensor]]:
    """Token ids and labels of each conversation that fits, as transformers takes them."""
    found = []
    for k in range(dataset.num_documents):
        (begin, end), tokens = dataset.document_range(k), torch.from_numpy(dataset.document(k).astype(np.int64))
        if len(tokens) <= SEQ_LEN:
            scored = torch.from_numpy(dataset.scored(begin, end - begin))
            found.append((tokens[None], torch.where(scored, tokens, -100)[None]))
    return found


def train_ours(model: Decoder, batches: list[Batch], num_targets: int) -> float:
    losses = [model(batch) / num_targets for batch in batches]
    sum(losses).backward()
    return float(sum(losses).detach())


def train_theirs(model: PreTrainedModel, conversations: list[tuple[Tensor, Tensor]], num_targets: int) -> float:
    losses = [model(ids, labels=labels, num_items_in_batch=num_targets).loss for ids, labels in conversations]
    sum(losses).backward()
    return float(sum(losses).detach())


def test_loss_and_gradients_are_those_of_transformers(config: ModelConfig, dataset: Dataset) -> None:
    """One scored target in one conversation and a thousand in another count alike, in micro-batches of any size."""
    reference, conversations = twin(config), labelled(dataset)
    counts = [int((labels != -100).sum()) for _, labels in conversations]
    assert max(counts) > 1000 > 3 > min(counts)
    expected = train_theirs(reference, conversations, sum(counts))
    theirs = dict(reference.named_parameters())
    for size in (1, 3):
        model = decoder_like(reference, config)
        found = train_ours(model, packed_batches(dataset, size), sum(counts))
        assert found == pytest.approx(expected, abs=1e-5)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-5, rtol=1e-4)


def test_nothing_scored_adds_nothing() -> None:
    torch.manual_seed(1)
    head = OutputHead(31, 8)
    torch.nn.init.normal_(head.weight)
    x_BTC = torch.randn(2, 5, 8, requires_grad=True)
    loss = head.loss_sum(x_BTC, torch.randint(31, (2, 5)), torch.zeros(2, 5, dtype=torch.bool))
    loss.backward()
    assert float(loss.detach()) == 0.0
    for x in (x_BTC, head.weight):
        assert x.grad is not None
        assert not x.grad.any()


@pytest.mark.slow
def test_trl_masks_and_computes_the_same(dataset: Dataset, tmp_path: Path) -> None:
    from datasets import Dataset as Rows
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    config = ModelConfig(**{**SIZES, "vocab_size": 257, "max_position_embeddings": SEQ_LEN, "num_key_value_heads": 2})
    eod = dataset.manifest.eod_token
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(dataset.tokenizer_path), eos_token=eod, pad_token=eod)
    rows = Rows.from_list([{"prompt": prompt, "completion": answer or "\n"} for prompt, answer in PAIRS[:-1]])
    reference = twin(config)
    settings = SFTConfig(str(tmp_path), max_length=SEQ_LEN, use_cpu=True, report_to=[], completion_only_loss=True)
    trainer = SFTTrainer(reference, settings, train_dataset=rows, processing_class=tokenizer)
    batch = trainer.data_collator([{k: row[k] for k in ("input_ids", "labels")} for row in trainer.train_dataset])
    for (ids, labels), theirs, their_labels in zip(labelled(dataset), batch["input_ids"], batch["labels"], strict=True):
        length = ids.shape[1]
        assert torch.equal(ids[0], theirs[:length])
        assert torch.equal(labels[0], their_labels[:length])
        assert (their_labels[length:] == -100).all()
    num_targets = int((batch["labels"][:, 1:] != -100).sum())
    expected = reference(**batch, num_items_in_batch=num_targets).loss
    model = decoder_like(reference, config)
    found = sum(model(each) / num_targets for each in packed_batches(dataset, 2))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
