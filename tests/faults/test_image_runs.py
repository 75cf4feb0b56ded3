"""Runs on images: resumed to the last bit, under other layouts, exported, evaluated; and what of them is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

from megatrain.api import load as load_model
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.config import load
from megatrain.data.images import ImageDataset, open_images
from megatrain.errors import CheckpointError, ConfigError, DataError
from megatrain.plan import rules
from megatrain.plan.flops import num_parameters
from megatrain.train.convert import export_checkpoint, import_folder
from megatrain.train.evaluation import evaluate_checkpoint
from megatrain.train.preview import check_data, check_origin
from tests.image_data import AUGMENTED, image_config
from tests.image_samples import NAMES
from tests.runs import Metrics, TinyData, write_config
from tests.served import ServedRanks

Write = Callable[..., Path]


@pytest.fixture
def write(image_data: TinyData, tmp_path: Path) -> Write:
    def write(name: str, **sections: Any) -> Path:
        train = {"steps": 6, "eval_batches": None, **sections.pop("train", {})}
        given = {"checkpoint": {"every_steps": 2}, **sections}
        config = image_config(image_data, tmp_path / name, train=train, **given)
        return write_config(tmp_path / f"{name}.yaml", config)

    return write


def checkpoint(config: Path, step: int = 6) -> Path:
    return config.with_suffix("") / "checkpoints" / f"step-{step:08d}"


def test_image_runs_resume_bit_exactly(write: Write, two_ranks: ServedRanks) -> None:
    whole, cut, other = write("whole"), write("cut"), write("other")
    two_ranks.finish(whole)
    two_ranks.finish(cut)
    shutil.rmtree(checkpoint(cut))
    shutil.copytree(cut.with_suffix(""), other.with_suffix(""))
    two_ranks.finish(cut)
    losses = Metrics.read(whole.with_suffix("")).losses
    assert Metrics.read(cut.with_suffix("")).losses == losses
    ours, theirs = (CheckpointReader(checkpoint(run)) for run in (cut, whole))
    assert ours.manifest.weights_digest == theirs.manifest.weights_digest
    two_ranks.finish(other, "parallel.tensor=2", "parallel.sequence=true", "parallel.recompute=full")
    assert Metrics.read(other.with_suffix("")).losses[4:] == pytest.approx(losses[4:], abs=1e-4)


def in_transformers(folder: Path, images: ImageDataset, **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels, as the exported image processor makes them, and labels."""
    processor = AutoImageProcessor.from_pretrained(folder, **how)
    pixels = [processor(images.image(k), return_tensors="pt").pixel_values for k in range(images.num_images)]
    return torch.cat(pixels), torch.tensor([images.label(k) for k in range(images.num_images)])


def test_exports_of_tensor_parallel_runs_work_alone(
    write: Write, two_ranks: ServedRanks, image_data: TinyData, tmp_path: Path
) -> None:
    seen = {**AUGMENTED, "image_mean": [0.3, 0.5, 0.6], "image_std": [0.4]}
    config, folder = write("run", objective={"image_classification": seen}), tmp_path / "exported"
    two_ranks.finish(config, "parallel.tensor=2")
    export_checkpoint(checkpoint(config), folder)
    import_folder(folder, tmp_path / "imported")
    held_out = open_images(image_data.held_out)
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    assert [model.config.id2label[k] for k in range(3)] == list(NAMES)
    pixels, labels = in_transformers(folder, held_out)
    with torch.no_grad():
        logits = model(pixels).logits
    torch.testing.assert_close(load_model(folder).logits(pixels), logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match=r"give floating-point numbers, \[B, 3, 12, 12\]"):
        load_model(folder).logits([[1, 2]])
    loss, accuracy = torch.nn.functional.cross_entropy(logits, labels), (logits.argmax(-1) == labels).float().mean()
    for evaluated in (checkpoint(config), tmp_path / "imported"):
        figures = evaluate_checkpoint(evaluated, image_data.held_out, show_progress=False)
        assert figures.keys() == {
            "loss",
            "accuracy",
            "accuracy_stderr",
            "accuracy_low",
            "accuracy_high",
            "images",
        }
        assert figures["loss"] == pytest.approx(float(loss), abs=1e-5)
        assert figures["accuracy"] == pytest.approx(float(accuracy), abs=1e-6)
    assert num_parameters(CheckpointReader(checkpoint(config)).saved.model) == sum(
        p.numel() for p in model.parameters()
    )
    tuned = load(write("tuned", run={"init_from": str(tmp_path / "imported")}))
    note = check_origin(tuned, must_exist=True)[1]
    assert "image_mean is [0.3, 0.5, 0.6] there and [0.5] here; image_std is [0.4] there and [0.5] here" in note
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    assert settings["size"] == {"height": 12, "width": 12}


@pytest.mark.slow
def test_images_of_another_size_begin_with_interpolated_positions(
    write: Write, two_ranks: ServedRanks, image_data: TinyData, tmp_path: Path
) -> None:
    """What the larger model begins with computes what transformers makes of the smaller one."""
    config = write("small")
    two_ranks.finish(config)
    export_checkpoint(checkpoint(config), tmp_path / "small-hf")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "small-hf").eval()
    size = {"height": 20, "width": 20}
    pixels, labels = in_transformers(tmp_path / "small-hf", open_images(image_data.held_out), size=size)
    with torch.no_grad():
        logits = model(pixels, interpolate_pos_encoding=True).logits
    expected = float(torch.nn.functional.cross_entropy(logits, labels))
    larger = {"data": {"seq_len": 26}, "model": {"image_size": 20}, "optimizer": {"lr": 0.0}}
    larger |= {"schedule": {"warmup_steps": 0}, "train": {"steps": 1}}
    for origin in (checkpoint(config), tmp_path / "small-hf"):
        other = write("large", run={"init_from": str(origin)}, **larger)
        (note,) = check_origin(load(other), must_exist=True)
        assert "with the positions of 9 patches interpolated to 25" in note
        two_ranks.finish(other, "parallel.tensor=2", "parallel.sequence=true")
        figures = evaluate_checkpoint(checkpoint(other, 1), image_data.held_out, show_progress=False)
        assert figures["loss"] == pytest.approx(expected, abs=1e-5)
        shutil.rmtree(other.with_suffix(""))
    with pytest.raises(CheckpointError, match="image_size is 12 there and 20 here"):
        adapters = {"lora": {"rank": 2, "alpha": 4.0}}
        check_origin(load(write("adapted", run={"init_from": str(checkpoint(config))}, **larger, **adapters)))


WRONG = {
    "data.seq_len=9": "patches and the class token; nearest: 10",
    "model.patch_size=5": "must divide image_size (12)",
    "model.num_channels=2": "3 channels (color) or 1 (gray)",
    "objective.image_classification.image_mean=[0.1,0.2]": "one number, or one for each of model.num_channels (3)",
    "data.packing=best_fit": "this run reads images",
    "objective.type=next_token": "family vit is trained by image_classification",
}


@pytest.mark.parametrize("override", WRONG)
def test_wrong_image_configs_name_their_key(override: str, write: Write) -> None:
    with pytest.raises(ConfigError) as told:
        load(write("wrong"), [override])
    assert override.partition("=")[0] in str(told.value)
    assert WRONG[override] in str(told.value)


def test_layouts_that_images_cannot_have_are_refused(write: Write) -> None:
    odd = load(write("odd", data={"seq_len": 17}, model={"image_size": 16}, parallel={"tensor": 2, "sequence": True}))
    with pytest.raises(ConfigError, match=r"an image is 17 tokens, .* nearest: parallel.sequence=false"):
        rules.check(odd, 2)
    heads = load(write("heads", model={"num_attention_heads": 6, "hidden_size": 36}, parallel={"tensor": 4}))
    with pytest.raises(ConfigError, match=r"must divide model.num_attention_heads \(6\)"):
        rules.check(heads, 4)


def test_data_of_another_kind_or_labels_is_refused(
    write: Write, tiny_data: TinyData, image_data: TinyData, two_ranks: ServedRanks, tmp_path: Path
) -> None:
    text = load(write("text", data={"train": [str(tiny_data.prose)]}))
    with pytest.raises(DataError, match="is a dataset of tokenized text"):
        check_data("text", text, must_exist=True)
    config = write("run")
    two_ranks.finish(config)
    export_checkpoint(checkpoint(config), tmp_path / "folder")
    settings = json.loads((tmp_path / "folder" / "config.json").read_text())
    settings["id2label"] = {"0": "newt", "1": "cat", "2": "dog"}
    (tmp_path / "folder" / "config.json").write_text(json.dumps(settings))
    import_folder(tmp_path / "folder", tmp_path / "other")
    with pytest.raises(CheckpointError, match="other labels"):
        check_origin(load(write("tuned", run={"init_from": str(tmp_path / "other")})), must_exist=True)
    with pytest.raises(DataError, match="other labels"):
        evaluate_checkpoint(tmp_path / "other", image_data.held_out, show_progress=False)
