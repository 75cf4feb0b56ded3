"""A packing plan that would be another in the middle of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatrain.checkpoint.manifest import read_manifest
from megatrain.data import open_dataset, packing
from tests.runs import Metrics, TinyData, tiny_config, write_config
from tests.served import ServedRanks


@pytest.mark.slow
def test_a_changed_packing_plan_needs_new_epochs(
    tiny_data: TinyData, two_ranks: ServedRanks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = tiny_config(tiny_data, tmp_path / "run")
    sections["data"] |= {"packing": "best_fit"}
    config = write_config(tmp_path / "run.yaml", sections)
    two_ranks.finish(config, "train.steps=3")
    folder = tmp_path / "run" / "packing"
    plan = next(path for path in folder.iterdir() if path.name.startswith(open_dataset(tiny_data.prose).digest))
    good = plan.read_bytes()

    plan.unlink()
    two_ranks.finish(config, "train.steps=4")  # made anew, it is the same
    assert plan.read_bytes() == good

    plan.unlink()
    with monkeypatch.context() as another_version:
        another_version.setattr(packing, "BLOCK_DOCUMENTS", 3)
        packing.store_plan(open_dataset(tiny_data.prose), 64, folder)
    assert plan.read_bytes() != good
    losses = Metrics.read(tmp_path / "run").losses
    ended = two_ranks.train(config, "train.steps=6")
    assert ended.codes == [4, 4]
    spoken = "".join(ended.output)
    assert f"The packing plan of {tiny_data.prose} is not the one this run was trained with" in spoken
    assert "Traceback" not in spoken
    assert Metrics.read(tmp_path / "run").losses == losses

    two_ranks.finish(config, "train.steps=6", "data.num_new_epochs=1")
    first, second = read_manifest(tmp_path / "run" / "checkpoints" / "step-00000006").state["segments"]
    assert (first["first_step"], second["first_step"]) == (0, 4)
    assert first["terms"]["plans"][0] == good[-16:].hex()
    assert second["terms"]["plans"][0] == plan.read_bytes()[-16:].hex()
    assert first["terms"]["plans"][1] == second["terms"]["plans"][1]
