"""Runs of LoRA: what their checkpoints hold, how they go on, and what of them is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatrain.api import load
from megatrain.checkpoint.inspection import describe, set_base, verify
from megatrain.checkpoint.manifest import read_manifest
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.distributed.fragment import ShardSpec
from megatrain.errors import CheckpointError
from tests.faults.conftest import Copy
from tests.runs import Metrics, TinyData, finished_config, write_config
from tests.served import ServedRanks

LORA = {"rank": 4, "alpha": 32.0, "dropout": 0.2, "target_modules": ["q_proj", "down_proj"]}
NUM_ADAPTED = 2 * 4 * ((32 + 32) + (64 + 32))  # layers, rank, inputs and outputs
SPLIT = ("parallel.tensor=2", "parallel.sequence=true")


@pytest.fixture
def adapting(copy_run: Callable[[], Copy], tiny_data: TinyData, tmp_path: Path) -> Callable[..., Copy]:
    """A run of LoRA on the finished run, whose folder is the test's own."""
    base = copy_run()

    def write(name: str = "lora", **sections: Any) -> Copy:
        config = finished_config(tiny_data, tmp_path / name)
        config |= {"lora": LORA, "optimizer": {"lr": 1.0e-2}, **sections}
        config["run"] = {**config["run"], "init_from": str(base.run_dir)}
        return Copy(tmp_path / name, write_config(tmp_path / f"{name}.yaml", config))

    return write


@pytest.mark.slow
def test_adapters_resume_bit_exactly_beside_their_base(adapting: Callable[..., Copy], two_ranks: ServedRanks) -> None:
    whole, cut = adapting("whole"), adapting("cut")
    two_ranks.finish(whole.config)
    two_ranks.finish(cut.config)
    shutil.rmtree(cut.checkpoint(6))
    two_ranks.finish(cut.config)
    assert Metrics.read(cut.run_dir).losses == Metrics.read(whole.run_dir).losses
    ours, theirs = (CheckpointReader(run.checkpoint(6)) for run in (cut, whole))
    assert ours.manifest.weights_digest == theirs.manifest.weights_digest
    other = adapting("other")
    shutil.copytree(whole.run_dir, other.run_dir)
    shutil.rmtree(other.checkpoint(6))
    two_ranks.finish(other.config, *SPLIT, "parallel.engine=fsdp2", "parallel.zero_stage=3")
    assert Metrics.read(other.run_dir).losses[4:] == pytest.approx(Metrics.read(whole.run_dir).losses[4:], abs=1e-4)


def test_checkpoints_hold_adapters_and_name_their_base(adapting: Callable[..., Copy], two_ranks: ServedRanks) -> None:
    run = adapting()
    two_ranks.finish(run.config, *SPLIT)
    reader = CheckpointReader(run.checkpoint(6))
    base = CheckpointReader(run.run_dir.parent / "run" / "checkpoints" / "step-00000006")
    assert reader.manifest.base is not None
    described = describe(run.run_dir)
    assert (described["parameters"], described["base"]["digest"]) == (NUM_ADAPTED, base.manifest.weights_digest)
    problems, _, num_bytes = verify(run.run_dir)
    assert problems == []
    assert num_bytes < base.manifest.files[0].bytes + 3 * 12 * NUM_ADAPTED + 3 * 600_000
    frozen = ShardSpec.whole("model.norm.weight", (32,))
    assert torch.equal(reader.read_parameter(frozen, "weight"), base.read_parameter(frozen, "weight"))
    adapted, plain = load(run.run_dir), load(base.folder)
    ids = list(range(10, 30))
    assert not torch.allclose(adapted.logits(ids), plain.logits(ids), atol=1e-3)
    for name, parameter in adapted.module.named_parameters():
        if name.endswith("lora_B.weight"):
            parameter.data.zero_()
    assert torch.equal(adapted.logits(ids), plain.logits(ids))


def test_a_moved_base_is_named_anew(adapting: Callable[..., Copy], two_ranks: ServedRanks) -> None:
    run = adapting()
    two_ranks.finish(run.config, "train.steps=4")
    old, new = run.run_dir.parent / "run", run.run_dir.parent / "moved"
    old.rename(new)
    with pytest.raises(CheckpointError, match=r"their base is not to be had: .*megatrain checkpoint set-base"):
        load(run.run_dir)
    ended = two_ranks.train(run.config)
    assert ended.codes == [4, 4]
    assert "megatrain checkpoint set-base" in "".join(ended.output)
    assert run.checkpoint(4).is_dir()  # and no checkpoint was taken for damaged
    assert set_base(run.run_dir, new, {}) == [run.checkpoint(2), run.checkpoint(4)]
    two_ranks.finish(run.config)
    assert read_manifest(run.checkpoint(6)).base == read_manifest(run.checkpoint(4)).base
    assert verify(run.run_dir)[0] == []


@pytest.mark.slow
@pytest.mark.acceptance
def test_another_base_is_refused_by_its_digest(adapting: Callable[..., Copy], two_ranks: ServedRanks) -> None:
    run = adapting()
    two_ranks.finish(run.config, "train.steps=4")
    base = run.run_dir.parent / "run" / "checkpoints"
    shutil.rmtree(base / "step-00000006")
    shutil.copytree(base / "step-00000004", base / "step-00000006")
    content = read_manifest(base / "step-00000004").model_copy(update={"step": 6}).encode()
    (base / "step-00000006" / "manifest.json").write_bytes(content)
    ended = two_ranks.train(run.config)
    assert ended.codes == [4, 4]
    assert "holds other weights (digest" in "".join(ended.output)
    with pytest.raises(CheckpointError, match=r"holds other weights \(digest"):
        set_base(run.run_dir, base / "step-00000002", {})
    assert run.checkpoint(4).is_dir()


@pytest.mark.slow
@pytest.mark.acceptance
def test_a_run_goes_on_from_adapters(
    adapting: Callable[..., Copy], two_ranks: ServedRanks, tiny_data: TinyData, tmp_path: Path
) -> None:
    first = adapting("first")
    two_ranks.finish(first.config)
    config = finished_config(tiny_data, tmp_path / "second") | {"lora": LORA}
    config["run"] = {**config["run"], "init_from": str(first.run_dir)}
    second = Copy(tmp_path / "second", write_config(tmp_path / "second.yaml", config))
    two_ranks.finish(second.config, "train.steps=2", "optimizer.lr=0.0", "train.eval_every_steps=2")
    assert read_manifest(second.checkpoint(2)).base == read_manifest(first.checkpoint(6)).base
    before, after = load(first.run_dir), load(second.run_dir)
    assert torch.equal(before.logits([5, 6, 7]), after.logits([5, 6, 7]))
    for overrides, told in (
        (["lora.rank=8"], "lora.rank is 4 there and 8 here"),
        (["lora=null"], "holds LoRA adapters, and lora is null here"),
    ):
        ended = two_ranks.train(second.config, f"run.dir={tmp_path / 'third'}", *overrides)
        assert ended.codes == [4, 4]
        assert told in "".join(ended.output)


@pytest.mark.slow
@pytest.mark.acceptance
@pytest.mark.parametrize("change", ["lora.rank=8", "lora.alpha=8.0", "lora=null"])
def test_adapters_may_not_change_at_a_resume(
    change: str, adapting: Callable[..., Copy], two_ranks: ServedRanks
) -> None:
    run = adapting()
    two_ranks.finish(run.config, "train.steps=2")
    ended = two_ranks.train(run.config, change)
    assert ended.codes == [4, 4]
    assert "other adapters have no use for these weights" in "".join(ended.output)
