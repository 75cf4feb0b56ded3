"""A tokenizer with further tokens: rows are added for them, the same under every layout, and the old ones stay."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from data_tools.tokenize import TokenizeOptions, tokenize
from data_tools.tokenizer import train_tokenizer
from data_tools.units import ReadOptions
from megatrain.checkpoint.location import locate
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.config import ModelConfig
from megatrain.distributed.fragment import FlatShard, ShardSpec, TensorSlice
from megatrain.train.evaluation import evaluate_checkpoint
from megatrain.train.new_tokens import ResizedWeights, new_rows
from tests.runs import TinyData, tiny_config, write_config
from tests.served import ServedRanks
from tests.tiny_data import QUIET, VOCAB_SIZE

NEW = ["<|user|>", "<|assistant|>", "<|end|>"]
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def grown(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """The held-out prose, tokenized by the same tokenizer with new tokens; and by another one of as many."""
    folder = tmp_path_factory.mktemp("grown")
    tokenizer = tokenizers.Tokenizer.from_file(str(tiny_data.tokenizer))
    tokenizer.add_special_tokens(NEW)
    tokenizer.save(str(folder / "more.json"))
    code = str(tiny_data.prose.with_name("code.jsonl"))
    train_tokenizer([code], VOCAB_SIZE + len(NEW), folder / "other.json", ReadOptions())
    found = []
    for name in ("more", "other"):
        text = str(tiny_data.prose.with_name("held-out.jsonl"))
        tokenize([text], folder / f"{name}.json", folder / name, TokenizeOptions(), QUIET)
        found.append(folder / name)
    return TinyData(found[0], found[1], tiny_data.held_out, folder / "more.json")


def beginning(data: TinyData, grown: TinyData, origin: Path, run_dir: Path, **parallel: int) -> Path:
    """A config whose only step learns nothing."""
    sections: dict[str, Any] = tiny_config(data, run_dir, train={"steps": 1}, optimizer={"lr": 0.0}, parallel=parallel)
    sections["run"] |= {"init_from": str(origin), "resize_token_embeddings": True}
    sections["data"] |= {"train": [str(grown.prose)], "validation": []}
    sections |= {"model": "from_checkpoint", "schedule": {"warmup_steps": 0}}
    return write_config(run_dir.with_suffix(".yaml"), sections)


def table(run_dir: Path, step: int, rows: int) -> torch.Tensor:
    reader = CheckpointReader(locate(str(run_dir / "checkpoints" / f"step-{step:08d}")))
    return reader.read_parameter(ShardSpec.whole(EMBEDDING, (rows, 32)), "weight")


@pytest.mark.slow
def test_new_tokens_get_rows_and_old_ones_stay(
    tiny_data: TinyData,
    grown: TinyData,
    finished_run: Path,
    one_rank: ServedRanks,
    two_ranks: ServedRanks,
    tmp_path: Path,
) -> None:
    runs = [tmp_path / name for name in ("one", "tensor", "zero3")]
    one_rank.finish(beginning(tiny_data, grown, finished_run, runs[0]))
    two_ranks.finish(beginning(tiny_data, grown, finished_run, runs[1], tensor=2))
    two_ranks.finish(beginning(tiny_data, grown, finished_run, runs[2], zero_stage=3))
    before = table(finished_run, 6, VOCAB_SIZE)
    after = [table(run, 1, VOCAB_SIZE + len(NEW)) for run in runs]
    assert torch.equal(after[0], after[1])
    assert torch.equal(after[0], after[2])
    assert torch.equal(after[0][:VOCAB_SIZE], before)
    rows = after[0][VOCAB_SIZE:]
    assert len({tuple(row) for row in rows.tolist()}) == len(NEW)
    torch.testing.assert_close(rows, before.mean(0).expand_as(rows), atol=1e-4, rtol=0)
    # The mean of logits is the logit of the mean, so that by convexity each row adds at most 1/n to the softmax's sum.
    pairs = ((finished_run, tiny_data.held_out), (runs[0], grown.prose))
    before_loss, after_loss = (evaluate_checkpoint(locate(str(r)), d, show_progress=False)["loss"] for r, d in pairs)
    assert 0.0 < after_loss - before_loss <= math.log1p(len(NEW) / VOCAB_SIZE) + 1e-6


def test_another_vocabulary_is_refused(
    tiny_data: TinyData, grown: TinyData, finished_run: Path, one_rank: ServedRanks, tmp_path: Path
) -> None:
    config = beginning(tiny_data, grown, finished_run, tmp_path / "run")
    ended = one_rank.train(config, "run.resize_token_embeddings=false", "model.vocab_size=null")
    assert ended.codes == [4]
    assert "model.vocab_size is 512 there and 515 here" in ended.output[0]
    ended = one_rank.train(config, f"data.train=[{grown.code}]")
    assert ended.codes == [4]
    assert "is not that of" in ended.output[0]


class Table:
    """A checkpoint of one table."""

    def __init__(self, rows: torch.Tensor) -> None:
        self._rows = rows

    def read(self, wanted: FlatShard, kind: str) -> torch.Tensor:
        (row, column), (height, width) = wanted.tensor_slice.offset, wanted.tensor_slice.extent
        assert wanted.global_shape == tuple(self._rows.shape)
        part = self._rows[row : row + height, column : column + width].flatten()
        return part[wanted.start : wanted.start + wanted.length]

    def read_into(self, target: torch.Tensor, wanted: FlatShard, kind: str) -> None:
        target[:] = self.read(wanted, kind)


def test_any_slice_of_a_grown_table_is_read() -> None:
    old, added = torch.randn(7, 4), torch.randn(3, 4)
    both = torch.cat([old, added])
    source = ResizedWeights(Table(old), {EMBEDDING: added})  # type: ignore[arg-type]
    whole = Table(both)
    for first in range(10):
        for last in range(first + 1, 11):
            for left, width in ((0, 4), (1, 2)):
                part = TensorSlice((first, left), (last - first, width))
                for start in range(0, part.numel, 3):
                    wanted = FlatShard(EMBEDDING, (10, 4), part, start, min(7, part.numel - start))
                    read = torch.empty(wanted.length)
                    source.read_into(read, wanted, "weight")
                    assert torch.equal(read, whole.read(wanted, "weight"))


def test_new_rows_spread_as_those_of_transformers(finished_run: Path) -> None:
    """Of many rows mean and covariance are those that transformers draws from; head and embedding each have theirs."""
    model = ModelConfig(hidden_size=4, num_hidden_layers=1, num_attention_heads=1, vocab_size=50)
    model = model.model_copy(update={"tie_word_embeddings": False})
    torch.manual_seed(3)
    old = torch.randn(50, 4) @ torch.randn(4, 4) + 1.0
    rows = new_rows(Table(old), model, model.model_copy(update={"vocab_size": 4050}), 7)  # type: ignore[arg-type]
    assert list(rows) == [EMBEDDING, "lm_head.weight"]
    assert not torch.equal(*rows.values())
    again = new_rows(Table(old), model, model.model_copy(update={"vocab_size": 4050}), 7)  # type: ignore[arg-type]
    for name, found in rows.items():
        assert torch.equal(found, again[name])
        spread = (found.double() - old.double().mean(0)) / math.sqrt(1e-9)
        torch.testing.assert_close(spread.mean(0), torch.zeros(4).double(), atol=0.2, rtol=0)
        covariance = torch.cov(old.double().T, correction=0)
        torch.testing.assert_close(torch.cov(spread.T), covariance, atol=0.1 * float(covariance.abs().max()), rtol=0.1)


class Biased(Table):
    """A checkpoint of one table and one bias."""

    def __init__(self, rows: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__(rows)
        self._bias = bias

    def read_parameter(self, spec: ShardSpec, kind: str) -> torch.Tensor:
        return self._bias

    def read_into(self, target: torch.Tensor, wanted: FlatShard, kind: str) -> None:
        first = wanted.tensor_slice.offset[0] + wanted.start
        target[:] = self._bias[first : first + wanted.length]


def test_a_grown_heads_bias_gets_the_mean() -> None:
    """As in transformers, of each slice that a tensor rank may ask for."""
    model = ModelConfig(family="bert", hidden_size=4, num_hidden_layers=1, num_attention_heads=1, vocab_size=50)
    reader, name = Biased(torch.randn(50, 4), torch.randn(50)), "cls.predictions.decoder.bias"
    rows = new_rows(reader, model, model.model_copy(update={"vocab_size": 53}), 7)  # type: ignore[arg-type]
    assert list(rows) == ["bert.embeddings.word_embeddings.weight", name]
    whole = torch.cat([reader._bias, reader._bias.mean().expand(3)])
    for first, last in ((0, 27), (27, 53), (51, 53)):
        read = torch.empty(last - first - 1)
        wanted = FlatShard(name, (53,), TensorSlice((first,), (last - first,)), 1, last - first - 1)
        ResizedWeights(reader, rows).read_into(read, wanted, "weight")  # type: ignore[arg-type]
        torch.testing.assert_close(read, whole[first + 1 : last])
