"""`megatrain profile`: where the time of a step went, on real ranks."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tests.runs import TinyData, tiny_config, write_config
from tests.served import ServedRanks

MODULES = {"model.embed_tokens", "model.layers.self_attn.core", "model.layers.mlp.up_proj", "model.norm", "lm_head"}
COMPILED = {"model.embed_tokens", "model.layers", "model.norm", "lm_head"}
AROUND = {"data", "optimizer", "exchange"}


def profiled(ranks: ServedRanks, data: TinyData, folder: Path, **sections: Any) -> tuple[list[dict[str, Any]], str]:
    """What profile.json says of each rank, and the table."""
    config = write_config(folder / "config.yaml", tiny_config(data, folder / "run", **sections))
    ended = ranks.profile(config, folder / "out", "--steps", "2")
    assert ended.codes == [0] * ranks.num_ranks, "\n".join(ended.output)
    assert not (folder / "run").exists()
    found: list[dict[str, Any]] = json.loads((folder / "out" / "profile.json").read_bytes())
    names = {"profile.json", *(rank["trace"] for rank in found)}
    assert {path.name for path in (folder / "out").iterdir()} == names
    for rank in found:
        steps = rank["steps"]
        parts = [part[key] for part in steps["parts"] for key in ("forward", "backward", "outside", "idle")]
        assert sum(parts) + steps["messages"] == pytest.approx(steps["step"])
        assert rank["plain_seconds"] > 0.0 < steps["step"]
    return found, ended.output[0]


def names_of(rank: dict[str, Any]) -> set[str]:
    return {part["name"] for part in rank["steps"]["parts"]}


def test_the_parts_sum_to_the_step(tiny_data: TinyData, one_rank: ServedRanks, tmp_path: Path) -> None:
    (rank,), shown = profiled(one_rank, tiny_data, tmp_path)
    assert names_of(rank) >= MODULES | AROUND | {"gradients"}
    parts = {part["name"]: part for part in rank["steps"]["parts"]}
    for name in MODULES - {"model.embed_tokens"}:
        assert parts[name]["forward"] > 0.0 < parts[name]["backward"], parts[name]
        assert parts[name]["peak_bytes"] > 0.0
    assert parts["model.layers.mlp.up_proj"]["kept_bytes"] >= 8 * 64 * 64 * 4 * 2  # its outputs, of both layers
    assert any(kernel["name"] == "aten::mm" and kernel["calls"] > 0 for kernel in rank["steps"]["kernels"])
    assert "model.layers.mlp.up_proj" in shown
    assert "rank-00000.json.gz" in shown
    events = json.loads(gzip.decompress((tmp_path / "out" / rank["trace"]).read_bytes()))["traceEvents"]
    assert {"step", "forward", "backward", "optimizer", "model.layers.1.mlp.up_proj"} <= {
        event.get("name") for event in events
    }


def test_a_profiled_step_waits_for_no_device(tiny_data: TinyData, one_rank: ServedRanks, tmp_path: Path) -> None:
    """Neither the step nor what the profile does around it; what is read at an exchange is shown as one."""
    (rank,), _ = profiled(one_rank, tiny_data, tmp_path, parallel={"engine": "fsdp2"})
    events = json.loads(gzip.decompress((tmp_path / "out" / rank["trace"]).read_bytes()))["traceEvents"]
    timed = [event for event in events if event.get("dur")]
    waits = [event for event in timed if event["name"] in ("aten::item", "aten::nonzero", "aten::masked_select")]
    # A CPU's fused AdamW reads its count of steps by item(); a GPU's kernel reads it where it lies.
    fused = [event for event in timed if event["name"] == "aten::_fused_adamw_"]
    assert any(event["name"] == "aten::mm" for event in timed)
    assert len(fused) > 0
    assert not [wait for wait in waits if not any(_is_inside(wait, kernel) for kernel in fused)]


def _is_inside(event: dict[str, Any], other: dict[str, Any]) -> bool:
    ends = event["ts"] + event["dur"] <= other["ts"] + other["dur"]
    return event["tid"] == other["tid"] and event["ts"] >= other["ts"] and bool(ends)


@pytest.mark.sample(1)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "train"),
    [
        pytest.param({"tensor": 2, "sequence": True, "engine": "fsdp2", "recompute": "selective"}, {}, id="tensor"),
        pytest.param({"pipeline": 2}, {}, id="pipeline"),
        pytest.param(
            {"engine": "fsdp2", "zero_stage": 3, "recompute": "full"},
            {"compile": "on"},
            id="compiled",
            marks=pytest.mark.acceptance,
        ),
    ],
)
def test_each_stage_of_a_layout_is_profiled(
    parallel: dict[str, Any], train: dict[str, Any], tiny_data: TinyData, two_ranks: ServedRanks, tmp_path: Path
) -> None:
    ranks, _ = profiled(two_ranks, tiny_data, tmp_path, parallel=parallel, train=train)
    assert [rank["stage"] for rank in ranks] == list(range(parallel.get("pipeline", 1)))
    expected = (COMPILED if train else MODULES) - ({"model.layers.mlp.up_proj"} if "tensor" in parallel else set())
    assert set().union(*map(names_of, ranks)) >= expected | AROUND
    assert all(rank["steps"]["messages"] > 0.0 for rank in ranks)
