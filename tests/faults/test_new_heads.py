"""A head of its own on weights that were trained for something else: drawn by the seed, the others stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest
import tokenizers
import torch
from safetensors.torch import load_file
from transformers import ViTConfig, ViTForImageClassification, pipeline

from data_tools.labeled import LabeledText
from megatrain.checkpoint.location import locate
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.checkpoint.stores import resolve
from megatrain.data import open_dataset
from megatrain.distributed.fragment import FlatShard, ShardSpec, TensorSlice
from megatrain.inference.loading import load_decoder
from megatrain.model.init import InitialWeights
from megatrain.plan.flops import parameter_shapes
from megatrain.train.convert import export_checkpoint
from tests.image_data import image_config
from tests.labeled_data import NUM_LABELS, make_labeled
from tests.runs import TinyData, tiny_config, write_config
from tests.served import ServedRanks

HEAD = {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}
ALONE = {"packing": "best_fit", "document_mask": True, "validation": []}


def masked_config(data: TinyData, run_dir: Path) -> Path:
    """Masked language modeling, on texts whose labels it does not look at."""
    config = tiny_config(data, run_dir, train={"steps": 1})
    config["model"] |= {"family": "bert", "num_key_value_heads": None}
    config["data"] |= ALONE
    config["schedule"] = {"warmup_steps": 0}
    return write_config(run_dir.with_suffix(".yaml"), config)


def classifier(data: TinyData, origin: Path, run_dir: Path, **parallel: int) -> Path:
    """A config whose only step learns nothing."""
    sections: dict[str, Any] = tiny_config(data, run_dir, train={"steps": 1}, optimizer={"lr": 0.0}, parallel=parallel)
    sections["run"] |= {"init_from": str(origin), "new_head": True}
    sections["data"] |= ALONE
    sections |= {"model": "from_checkpoint", "schedule": {"warmup_steps": 0}}
    return write_config(run_dir.with_suffix(".yaml"), sections)


@pytest.fixture(scope="module")
def masked_run(labeled_data: TinyData, one_rank: ServedRanks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("masked") / "run"
    one_rank.finish(masked_config(labeled_data, run_dir))
    return run_dir


def weights_of(run_dir: Path) -> tuple[CheckpointReader, dict[str, torch.Tensor]]:
    reader = CheckpointReader(locate(str(run_dir / "checkpoints" / "step-00000001")))
    shapes = parameter_shapes(reader.saved.model)
    whole = {name: ShardSpec.whole(name, shape) for name, shape in shapes.items()}
    return reader, {name: reader.read_parameter(spec, "weight") for name, spec in whole.items()}


def drawn(reader: CheckpointReader, name: str, like: torch.Tensor) -> torch.Tensor:
    """The initial value of a whole parameter, by the seed of the run."""
    part = TensorSlice((0,) * like.dim(), tuple(like.shape))
    shard = FlatShard(name, tuple(like.shape), part, 0, like.numel())
    return InitialWeights(reader.saved.model, seed=7).read(shard, "weight").view(like.shape)


@pytest.mark.slow
def test_a_new_head_leaves_other_weights_alone(
    labeled_data: TinyData, masked_run: Path, one_rank: ServedRanks, two_ranks: ServedRanks, tmp_path: Path
) -> None:
    """The same on one rank, on tensor ranks and under ZeRO 3, and from a folder of transformers."""
    export_checkpoint(locate(str(masked_run)), tmp_path / "hf")
    runs = [tmp_path / name for name in ("one", "tensor", "zero3", "folder")]
    number = f"model.num_labels={NUM_LABELS}"
    one_rank.finish(classifier(labeled_data, masked_run, runs[0]), number)
    two_ranks.finish(classifier(labeled_data, masked_run, runs[1], tensor=2), number)
    two_ranks.finish(classifier(labeled_data, masked_run, runs[2], zero_stage=3), number)
    one_rank.finish(classifier(labeled_data, tmp_path / "hf", runs[3]), number)
    _, before = weights_of(masked_run)
    for run in runs:
        reader, after = weights_of(run)
        assert after.keys() - before.keys() == HEAD
        for name, weight in after.items():
            expected = before[name] if name in before else drawn(reader, name, weight)
            assert torch.equal(weight, expected), name


@pytest.mark.slow
def test_a_new_head_goes_with_a_larger_vocabulary(
    labeled_data: TinyData, masked_run: Path, one_rank: ServedRanks, tmp_path: Path
) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(labeled_data.tokenizer))
    tokenizer.add_special_tokens(["<a>", "<b>", "<c>"])
    tokenizer.save(str(tmp_path / "more.json"))
    rows = [orjson.loads(line) for line in Path(f"{labeled_data.prose}.jsonl").read_bytes().splitlines()][:120]
    grown = make_labeled(rows, tmp_path / "more.json", tmp_path / "more", LabeledText("[SEP]", True))
    keys = (f"model.num_labels={NUM_LABELS}", "run.resize_token_embeddings=true", f"data.train=[{grown}]")
    one_rank.finish(classifier(labeled_data, masked_run, tmp_path / "run"), *keys)
    _, before = weights_of(masked_run)
    reader, after = weights_of(tmp_path / "run")
    for name, weight in after.items():
        expected = before[name] if name in before else drawn(reader, name, weight)
        assert torch.equal(weight[: len(expected)], expected), name
        assert len(weight) - len(expected) == (3 if "word_embeddings" in name else 0)


@pytest.mark.slow
def test_an_imported_vit_gets_a_new_head(image_data: TinyData, one_rank: ServedRanks, tmp_path: Path) -> None:
    """Of 7 labels; the data has 3."""
    sizes = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ViTForImageClassification(ViTConfig(**sizes, image_size=12, patch_size=4, num_labels=7)).save_pretrained(
        tmp_path / "hf"
    )
    config = image_config(image_data, tmp_path / "run", train={"steps": 1}, optimizer={"lr": 0.0})
    config["run"] |= {"init_from": str(tmp_path / "hf"), "new_head": True}
    config |= {"model": "from_checkpoint", "schedule": {"warmup_steps": 0}}
    path = write_config(tmp_path / "run.yaml", config)
    assert one_rank.train(path, "model.vocab_size=3", "run.new_head=false").codes == [4]
    one_rank.finish(path)
    before = load_file(tmp_path / "hf" / "model.safetensors")
    reader, after = weights_of(tmp_path / "run")
    assert after.keys() == before.keys()
    for name, weight in after.items():
        expected = drawn(reader, name, weight) if name.startswith("classifier.") else before[name]
        assert torch.equal(weight, expected), name


def test_another_head_is_refused_unless_asked_for(
    labeled_data: TinyData, masked_run: Path, one_rank: ServedRanks, tmp_path: Path
) -> None:
    config = classifier(labeled_data, masked_run, tmp_path / "run")
    ended = one_rank.train(config, f"model.num_labels={NUM_LABELS}", "run.new_head=false")
    assert ended.codes == [4]
    assert "model.num_labels is null there and 5 here. Set run.new_head=true" in ended.output[0]
    ended = one_rank.train(config, "model.num_labels=4")
    assert ended.codes == [2]
    assert "has 5 labels: set it to that" in ended.output[0]
    ended = one_rank.train(config, f"model.num_labels={NUM_LABELS}", "model.hidden_size=64")
    assert ended.codes == [4]
    assert "model.hidden_size is 32 there and 64 here" in ended.output[0]


def test_exported_encoders_read_texts_as_their_data_does(
    labeled_data: TinyData, masked_run: Path, one_rank: ServedRanks, tmp_path: Path
) -> None:
    """Pipelines of transformers, from the folder alone: ids, segments and scores are those of the run."""
    run = tmp_path / "run"
    one_rank.finish(classifier(labeled_data, masked_run, run), f"model.num_labels={NUM_LABELS}")
    for source, name in ((masked_run, "masked"), (run, "labels")):
        assert export_checkpoint(locate(str(source)), tmp_path / name).notes == []
    fill = pipeline("fill-mask", str(tmp_path / "masked"))
    assert len(fill("The value of [MASK] is a string.", top_k=3)) == 3
    classify = pipeline("text-classification", str(tmp_path / "labels"), top_k=None)
    row = orjson.loads(Path(f"{labeled_data.prose}.jsonl").read_bytes().splitlines()[0])
    pair = {"text": row["text"], "text_pair": row["other"]}
    read = classify.tokenizer(**pair, return_tensors="pt")
    tokens, segments = read["input_ids"], read["token_type_ids"]
    assert tokens[0].tolist() == open_dataset(labeled_data.prose).window(0, tokens.shape[1]).tolist()
    assert segments.diff().count_nonzero() == 1
    ours = load_decoder(CheckpointReader(resolve(locate(str(run)))))
    context = ours.make_context(torch.arange(tokens.shape[1]).unsqueeze(0), None, None, torch.float32)
    with torch.no_grad():
        expected = ours.logits(tokens, context._replace(segments_BT=segments))[0, 0].softmax(-1)
    found = {score["label"]: score["score"] for score in classify([pair])[0]}
    assert found == pytest.approx({str(number): float(score) for number, score in enumerate(expected)}, abs=1e-5)
    assert len(classify(["a text", "one that is longer than the other"], batch_size=2)) == 2
