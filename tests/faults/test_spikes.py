"""A spike is skipped, or led away from; and what a run did about it is the same after a resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatrain.checkpoint.manifest import read_manifest
from megatrain.config import SpikesConfig
from megatrain.train.progress import Progress
from megatrain.train.spikes import Recent
from tests.runs import Metrics, TinyData, tiny_config, write_config
from tests.served import ServedRanks

TOUCHY: dict[str, Any] = {"window_steps": 8, "num_deviations": 0.1, "max_in_a_row": 500}
"""Finds a spike in what is usual."""


def config_of(data: TinyData, folder: Path, steps: int, **spikes: Any) -> Path:
    """Of a run whose every fourth step is a checkpoint."""
    return write_config(
        folder / "run.yaml",
        tiny_config(
            data,
            folder / "run",
            train={"steps": steps, "eval_batches": 2, "check_replica_hash_interval": 3},
            spikes={**TOUCHY, **spikes},
            checkpoint={"every_steps": 4},
            schedule={"type": "constant", "warmup_steps": 2},
        ),
    )


def progress_at(run_dir: Path, step: int) -> Progress:
    manifest = read_manifest(run_dir / "checkpoints" / f"step-{step:08d}")
    return Progress.from_state(manifest.step, manifest.tokens, manifest.state)


def told(run_dir: Path, name: str) -> list[tuple[int, str]]:
    return [(e["step"], e["message"]) for e in Metrics.read(run_dir).events if e["event"] == name]


@pytest.mark.sample(1)
@pytest.mark.slow
@pytest.mark.parametrize("engine", ["deepspeed", "fsdp2"])
def test_a_spike_is_skipped_and_statistics_survive_resuming(
    engine: str, tiny_data: TinyData, two_ranks: ServedRanks, tmp_path: Path
) -> None:
    under = f"parallel.engine={engine}"
    whole = config_of(tiny_data, tmp_path / "whole", 24, action="skip")
    two_ranks.finish(whole, under)
    halves = config_of(tiny_data, tmp_path / "halves", 14, action="skip")  # in the middle of what is judged
    two_ranks.finish(halves, under)
    two_ranks.finish(halves, under, "train.steps=24")
    runs = [tmp_path / name / "run" for name in ("whole", "halves")]
    one, other = map(Metrics.read, runs)
    assert one.losses == other.losses
    assert told(runs[0], "skipped") == told(runs[1], "skipped")
    skipped = [step for step, _ in told(runs[0], "skipped")]
    assert min(skipped) > 8
    assert progress_at(runs[0], 24).skipped == len(skipped)
    assert "deviation" in told(runs[0], "skipped")[0][1]
    # The end of the first half is evaluated, too.
    ends = [replace(progress_at(run_dir, 24), best_validation_loss=None, num_worse=0) for run_dir in runs]
    assert ends[0] == ends[1]


def test_too_many_spikes_in_a_row_end_training(tiny_data: TinyData, two_ranks: ServedRanks, tmp_path: Path) -> None:
    config = config_of(tiny_data, tmp_path, 24, action="skip", max_in_a_row=1)
    ended = two_ranks.train(config)
    assert ended.codes == [2, 2]
    assert "No update could be made in the last 1 steps, up to step " in "".join(ended.output)
    assert "(median of the 8 steps before: " in "".join(ended.output)


@pytest.mark.sample(1)
@pytest.mark.slow
@pytest.mark.parametrize(
    "parallel", [{"zero_stage": 0}, {"zero_stage": 3}, {"pipeline": 2}, {"engine": "fsdp2"}], ids=str
)
def test_fp16_that_diverges_ends_in_our_words(
    parallel: dict[str, Any], tiny_data: TinyData, two_ranks: ServedRanks, tmp_path: Path
) -> None:
    """At the least loss scale, below which DeepSpeed raises an error of its own."""
    fp16 = {"precision": "fp16", "initial_loss_scale_power": 0}
    config = write_config(
        tmp_path / "run.yaml", tiny_config(tiny_data, tmp_path / "run", train=fp16, parallel=parallel)
    )
    diverging = ("optimizer.lr=1e9", "optimizer.eps=1e-30", "spikes.max_in_a_row=4", "train.steps=20")
    ended = two_ranks.train(config, *diverging)
    output = "".join(ended.output)
    assert ended.codes == [2, 2], output
    assert "No update could be made in the last 4 steps" in output
    assert "Traceback" not in output


def num_spikes(metrics: Metrics, rule: SpikesConfig) -> int:
    """What the rule would find in the steps of a run that had none."""
    recent, found = Recent(), 0
    for loss, norm in zip(metrics.losses, metrics.norms, strict=True):
        found += recent.spike(loss, norm, rule) is not None
        recent = recent.after_step(loss, norm, rule.window_steps)
    return found


@pytest.mark.sample(1)
@pytest.mark.slow
@pytest.mark.parametrize("engine", ["deepspeed", "fsdp2"])
def test_rewinding_skips_the_batches_around_a_spike(
    engine: str, tiny_data: TinyData, two_ranks: ServedRanks, tmp_path: Path
) -> None:
    # What the steps before have learned does not matter: only the batches differ.
    calm = ("optimizer.lr=1.0e-6", f"parallel.engine={engine}")
    two_ranks.finish(config_of(tiny_data, tmp_path / "none", 24, action="skip", num_deviations=1e9), *calm)
    undisturbed = Metrics.read(tmp_path / "none" / "run")
    rule: dict[str, Any] = {"action": "rewind", "rewind_steps": 3, "margin_batches": 2, "window_steps": 8}
    most = (tenths / 10 for tenths in range(80, 0, -1))
    rule["num_deviations"] = next(k for k in most if num_spikes(undisturbed, SpikesConfig(**rule, num_deviations=k)))
    run_dir = tmp_path / "whole" / "run"
    two_ranks.finish(config_of(tiny_data, tmp_path / "whole", 24, **rule), *calm)
    last = progress_at(run_dir, 24)
    rewinds = last.rewinds
    assert [text for _, text in told(run_dir, "rewind")] == [rewind.text() for rewind in rewinds]
    assert rewinds[0].to_step == (rewinds[0].from_step - 3) // 4 * 4
    assert all(rewind.until_step == rewind.from_step + 3 for rewind in rewinds)
    assert last.skipped == 0
    left_out = [8 * (rewind.until_step - rewind.to_step) for rewind in rewinds]
    assert last.segments[-1].samples_before == 8 * last.segments[-1].first_step + sum(left_out)
    metrics = Metrics.read(run_dir)
    assert metrics.steps == list(range(1, 25))
    kept = rewinds[0].to_step
    assert metrics.losses[:kept] == undisturbed.losses[:kept]
    assert metrics.losses[kept] != undisturbed.losses[kept]
    # The same again, stopped and started on the way.
    halves = config_of(tiny_data, tmp_path / "halves", 14, **rule)
    two_ranks.finish(halves, *calm)
    two_ranks.finish(halves, *calm, "train.steps=24")
    assert Metrics.read(tmp_path / "halves" / "run").losses == metrics.losses
    assert progress_at(tmp_path / "halves" / "run", 24).rewinds == rewinds


def test_rewinding_repeatedly_to_one_checkpoint_ends_training(
    tiny_data: TinyData, two_ranks: ServedRanks, tmp_path: Path
) -> None:
    config = config_of(tiny_data, tmp_path, 40, action="rewind", num_deviations=0.001, rewind_steps=3, max_in_a_row=2)
    ended = two_ranks.train(config)
    assert ended.codes == [2, 2]
    assert "3 times in a row" in "".join(ended.output)
