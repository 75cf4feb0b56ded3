"""What may change when a run goes on, what may not, and that no layout matters."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from megatrain.checkpoint.location import locate
from megatrain.checkpoint.lock import is_alive
from megatrain.checkpoint.manifest import read_manifest
from megatrain.train.convert import export_checkpoint
from megatrain.train.progress import Progress
from tests.faults.conftest import Copy
from tests.runs import Metrics, TinyData, TrainProcess, tiny_config, wait_until, write_config
from tests.served import ServedRanks

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 rank, ZeRO 0": (1, {"zero_stage": 0}),
    "1 rank, ZeRO 3": (1, {"zero_stage": 3}),
    **{f"2 ranks, ZeRO {stage}": (2, {"zero_stage": stage}) for stage in range(4)},
    **{f"2 ranks, FSDP2, ZeRO {stage}": (2, {"engine": "fsdp2", "zero_stage": stage}) for stage in (1, 3)},
}
# Each layout writes once and reads once here; the slow test has all pairs.
PAIRS = [
    ("1 rank, ZeRO 0", "2 ranks, ZeRO 2"),
    ("2 ranks, ZeRO 2", "1 rank, ZeRO 3"),
    ("1 rank, ZeRO 3", "2 ranks, ZeRO 0"),
    ("2 ranks, ZeRO 0", "2 ranks, ZeRO 3"),
    ("2 ranks, ZeRO 3", "2 ranks, FSDP2, ZeRO 1"),
    ("2 ranks, FSDP2, ZeRO 1", "2 ranks, ZeRO 1"),
    ("2 ranks, ZeRO 1", "2 ranks, FSDP2, ZeRO 3"),
    ("2 ranks, FSDP2, ZeRO 3", "1 rank, ZeRO 0"),
]


@pytest.mark.parametrize(
    ("overrides", "key", "before", "after"),
    [
        (["model.hidden_size=64", "model.rms_norm_eps=1.0e-6"], "model.hidden_size", "32", "64"),
        (["model.rms_norm_eps=1.0e-6"], "model.rms_norm_eps", "1e-05", "1e-06"),
        (["data.seq_len=48"], "data.seq_len", "64", "48 (within an epoch it must divide 64)"),
        (["run.seed=8"], "run.seed", "7", "8"),
        (["data.document_mask=true"], "data.document_mask", "False", "True"),
    ],
)
def test_an_impossible_change_is_refused_by_key(
    overrides: list[str], key: str, before: str, after: str, copy_run: Callable[[], Copy], two_ranks: ServedRanks
) -> None:
    run = copy_run()
    config_before = (run.run_dir / "config.yaml").read_bytes()
    ended = two_ranks.train(run.config, "train.steps=8", *overrides)
    assert ended.codes == [4, 4]
    spoken = "".join(ended.output)
    assert f"{key} was {before} and is now {after}" in spoken
    assert "none is good" not in spoken
    assert "damaged" not in spoken
    assert "Traceback" not in spoken
    assert (run.run_dir / "config.yaml").read_bytes() == config_before


def test_another_dataset_is_refused_by_name(
    copy_run: Callable[[], Copy], two_ranks: ServedRanks, tiny_data: TinyData
) -> None:
    run = copy_run()
    ended = two_ranks.train(run.config, "train.steps=8", f"data.train.1.path={tiny_data.held_out}")
    assert ended.codes == [4, 4]
    assert str(tiny_data.held_out) in "".join(ended.output)


def test_changed_batch_size_and_weights_begin_a_segment(
    copy_run: Callable[[], Copy], two_ranks: ServedRanks, losses: list[float]
) -> None:
    run = copy_run()
    two_ranks.finish(run.config, "train.steps=8", "train.global_batch_size=4", "data.train.0.weight=5.0")
    manifest = read_manifest(run.checkpoint(8))
    segments = Progress.from_state(manifest.step, manifest.tokens, manifest.state).segments
    assert [segment.first_step for segment in segments] == [0, 6]
    assert [segment.settings.global_batch_size for segment in segments] == [8, 4]
    assert segments[1].samples_before == 6 * 8
    windows = segments[0].settings.num_samples
    assert sum(p.epoch * n + p.position for p, n in zip(segments[1].cursors, windows, strict=True)) == 6 * 8
    assert manifest.tokens == (6 * 8 + 2 * 4) * 64
    told = [event["message"] for event in Metrics.read(run.run_dir).events if event["event"] == "data order"]
    changes = "global_batch_size 4 (was 8), weights (5.0, 1.0) (was (2.0, 1.0))"
    assert told == [f"a new segment of the data order: {changes}"]
    assert Metrics.read(run.run_dir).losses[:6] == losses


@pytest.mark.slow
def test_windows_lengthen_only_in_a_new_epoch(
    copy_run: Callable[[], Copy], two_ranks: ServedRanks, losses: list[float]
) -> None:
    run = copy_run()
    two_ranks.finish(run.config, "train.steps=8", "data.seq_len=32")
    ended = two_ranks.train(run.config, "train.steps=10")
    assert ended.codes == [4, 4]
    assert "set data.num_new_epochs to 1" in "".join(ended.output)
    for steps in (10, 12):  # asked for once, whatever the config says from then on
        two_ranks.finish(run.config, f"train.steps={steps}", "data.num_new_epochs=1")
    manifest = read_manifest(run.checkpoint(12))
    first, shorter, new = Progress.from_state(manifest.step, manifest.tokens, manifest.state).segments
    assert (first.first_step, shorter.first_step, new.first_step) == (0, 6, 8)
    used = sum(cursor.epoch * n for cursor, n in zip(shorter.cursors, first.settings.num_samples, strict=True))
    cuts = [cut for cursor in shorter.cursors for cut in cursor.cuts]
    assert used + sum(cut.used for cut in cuts) == 6 * 8
    assert {cut.factor for cut in cuts} == {2}
    assert [cursor.epoch - before.epoch for cursor, before in zip(new.cursors, shorter.cursors, strict=True)] == [1, 1]
    assert manifest.tokens == (6 * 64 + 2 * 32 + 4 * 64) * 8
    assert Metrics.read(run.run_dir).losses[:6] == losses


@pytest.fixture(scope="module")
def layouts(
    tiny_data: TinyData, one_rank: ServedRanks, two_ranks: ServedRanks, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[ServedRanks, Path, Path]]:
    """For a layout: its ranks, and the run folder and config of three steps under it, made when first asked for."""
    made: dict[str, tuple[ServedRanks, Path, Path]] = {}

    def make(name: str) -> tuple[ServedRanks, Path, Path]:
        if name not in made:
            num_ranks, parallel = LAYOUTS[name]
            folder = tmp_path_factory.mktemp("layout")
            sections = {"train": {"steps": 3}, "parallel": parallel, "checkpoint": {"every_steps": 3}}
            config = write_config(folder / "run.yaml", tiny_config(tiny_data, folder / "run", **sections))
            ranks = one_rank if num_ranks == 1 else two_ranks
            ranks.finish(config)
            made[name] = ranks, folder / "run", config
        return made[name]

    return make


def _check_continues(
    first: str,
    second: str,
    layouts: Callable[[str], tuple[ServedRanks, Path, Path]],
    losses: list[float],
    tmp_path: Path,
) -> None:
    _, written, _ = layouts(first)
    ranks, _, config = layouts(second)
    shutil.copytree(written, tmp_path / "run")
    ranks.finish(config, f"run.dir={tmp_path / 'run'}", "train.steps=6")
    assert Metrics.read(tmp_path / "run").losses == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(*pair, id=" to ".join(pair), marks=pytest.mark.slow if number % 4 else ())
        for number, pair in enumerate(PAIRS)
    ],
)
def test_a_checkpoint_goes_on_under_another_layout(
    first: str,
    second: str,
    layouts: Callable[[str], tuple[ServedRanks, Path, Path]],
    losses: list[float],
    tmp_path: Path,
) -> None:
    _check_continues(first, second, layouts, losses, tmp_path)


@pytest.mark.slow
@pytest.mark.acceptance
@pytest.mark.parametrize("first", LAYOUTS)
def test_a_checkpoint_goes_on_under_every_layout(
    first: str, layouts: Callable[[str], tuple[ServedRanks, Path, Path]], losses: list[float], tmp_path: Path
) -> None:
    for number, second in enumerate(LAYOUTS):
        _check_continues(first, second, layouts, losses, tmp_path / str(number))


@pytest.mark.slow
def test_a_ramp_that_is_killed_goes_on_exactly(
    tiny_data: TinyData, one_rank: ServedRanks, two_ranks: ServedRanks, tmp_path: Path
) -> None:
    train = {"steps": 10, "global_batch_size": [[0, 4], [512, 8], [2000, 12]]}  # from steps 0, 2 and 5 on
    sections = {"train": train, "checkpoint": {"every_steps": 1}}
    straight = write_config(tmp_path / "straight.yaml", tiny_config(tiny_data, tmp_path / "straight", **sections))
    two_ranks.finish(straight)
    killed = write_config(tmp_path / "killed.yaml", tiny_config(tiny_data, tmp_path / "killed", **sections))
    process = TrainProcess(killed, 2)
    process.wait_for_step(4)
    process.kill_all()
    process.wait()
    wait_until(lambda: not is_alive(tmp_path / "killed"))  # a rank that is killed ends a moment later
    assert Metrics.read(tmp_path / "killed").steps[-1] < 10
    shutil.copytree(tmp_path / "killed", tmp_path / "narrow")
    two_ranks.finish(killed)
    one_rank.finish(killed, f"run.dir={tmp_path / 'narrow'}", "parallel.zero_stage=3")
    first, again, narrow = (Metrics.read(tmp_path / name) for name in ("straight", "killed", "narrow"))
    assert (again.steps, again.losses, again.norms) == (first.steps, first.losses, first.norms)
    assert narrow.losses == pytest.approx(first.losses, rel=1e-4)
    assert narrow.norms == pytest.approx(first.norms, rel=1e-3)
    for name in ("straight", "killed", "narrow"):
        manifest = read_manifest(tmp_path / name / "checkpoints" / "step-00000010")
        assert manifest.tokens == (2 * 4 + 3 * 8 + 5 * 12) * 64
        assert len(manifest.state["segments"]) == 1


def test_resuming_a_finished_run_trains_nothing(copy_run: Callable[[], Copy], two_ranks: ServedRanks) -> None:
    run = copy_run()
    steps = [line for line in (run.run_dir / "metrics.jsonl").read_bytes().splitlines() if b'"loss"' in line]
    two_ranks.finish(run.config)
    lines = (run.run_dir / "metrics.jsonl").read_bytes().splitlines()
    assert [line for line in lines if b'"loss"' in line] == steps
    assert orjson.loads(lines[-1])["event"] == "finish"


@pytest.mark.sample(1)
@pytest.mark.parametrize("engine", ["deepspeed", pytest.param("fsdp2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_half_precision_goes_on_to_the_last_bit(
    precision: str, engine: str, tiny_data: TinyData, two_ranks: ServedRanks, tmp_path: Path
) -> None:
    figures = []
    for name, pauses in (("straight", [6]), ("paused", [3, 6])):
        config = write_config(tmp_path / f"{name}.yaml", tiny_config(tiny_data, tmp_path / name))
        for steps in pauses:
            changes = (f"train.steps={steps}", f"train.precision={precision}", f"parallel.engine={engine}")
            two_ranks.finish(config, *changes)
        figures.append(Metrics.read(tmp_path / name))
    straight, paused = figures
    assert (paused.steps, paused.losses, paused.norms) == (straight.steps, straight.losses, straight.norms)


def test_weights_are_taken_from_another_runs_checkpoint(
    finished_run: Path, two_ranks: ServedRanks, tiny_data: TinyData, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "run.yaml", tiny_config(tiny_data, tmp_path / "run"))
    two_ranks.finish(config, "train.steps=2", f"run.init_from={finished_run}")
    begun = Metrics.read(tmp_path / "run")
    assert begun.losses[0] < Metrics.read(finished_run).losses[0] - 0.02
    assert begun.events[0]["init_from"] == str(finished_run / "checkpoints" / "step-00000006")


@pytest.mark.slow
def test_a_hugging_face_folder_begins_a_run(
    finished_run: Path, two_ranks: ServedRanks, tiny_data: TinyData, tmp_path: Path
) -> None:
    """In several files; under any layout as from the checkpoint that it was exported from. Continued pretraining: with
    another mixture, schedule and learning rate."""
    folder = tmp_path / "model"
    export_checkpoint(locate(str(finished_run)), folder, shard_bytes=30_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    sections: dict[str, Any] = tiny_config(tiny_data, tmp_path / "run", train={"steps": 2}, optimizer={"lr": 5.0e-3})
    sections |= {"model": "from_checkpoint", "schedule": {"type": "cosine", "warmup_steps": 1}}
    sections["data"]["train"] = [{"path": str(tiny_data.code), "weight": 3.0}, {"path": str(tiny_data.prose)}]
    config = write_config(tmp_path / "run.yaml", sections)
    overrides = ("parallel.tensor=2", "run.dir=" + str(tmp_path / "other"))
    two_ranks.finish(config, f"run.init_from={folder}", "parallel.tensor=2")
    two_ranks.finish(config, f"run.init_from={finished_run}", *overrides)
    imported, copied = (Metrics.read(tmp_path / name) for name in ("run", "other"))
    assert (imported.losses, imported.norms) == (copied.losses, copied.norms)
    assert imported.losses[0] < Metrics.read(finished_run).losses[0] - 0.02
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("10000.0", "20000.0"))
    ended = two_ranks.train(config, f"run.init_from={folder}", f"run.dir={tmp_path / 'third'}", "model.rope_theta=5.0")
    assert set(ended.codes) == {4}
    assert "model.rope_theta is 20000.0 there and 5.0 here" in "".join(ended.output)


def test_damaged_initial_weights_end_all_ranks(
    copy_run: Callable[[], Copy], two_ranks: ServedRanks, tiny_data: TinyData, tmp_path: Path
) -> None:
    source = copy_run().checkpoint(6)
    path = source / "rank-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-5000] ^= 16
    path.write_bytes(content)
    config = write_config(tmp_path / "new.yaml", tiny_config(tiny_data, tmp_path / "new"))
    ended = two_ranks.train(config, f"run.init_from={source}")
    assert ended.codes == [4, 4]
    assert f"run.init_from cannot be used: {path}: bytes" in "".join(ended.output)
    assert "Traceback" not in "".join(ended.output)


def test_an_fp16_overflow_is_counted_across_a_resume(
    tiny_data: TinyData, two_ranks: ServedRanks, tmp_path: Path
) -> None:
    too_high = {"steps": 6, "precision": "fp16", "initial_loss_scale_power": 28}
    config = write_config(tmp_path / "run.yaml", tiny_config(tiny_data, tmp_path / "run", train=too_high))
    two_ranks.finish(config, "train.steps=3")
    two_ranks.finish(config)
    lines = [orjson.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_bytes().splitlines()]
    steps = [line for line in lines if "loss" in line]
    skipped = [line["skipped"] for line in steps]
    assert skipped[0] == 1
    assert skipped == sorted(skipped)
    assert steps[0]["grad_norm"] is None  # it was not finite
    assert all(line["loss"] is not None for line in steps)
    progress = read_manifest(tmp_path / "run" / "checkpoints" / "step-00000006")
    assert progress.state["skipped"] == skipped[-1]
    assert progress.state["updates"] == 6 - skipped[-1]
    assert progress.state["loss_scale"]["cur_scale"] < 2.0**28
