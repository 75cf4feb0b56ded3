"""State that a layout saved in the middle of its training, how it went on, and how it goes on where it is loaded.

What is saved is a real checkpoint, manifest included; each is made once, and loaded by as many layouts as ask for it.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatrain.checkpoint.manifest import MANIFEST, Manifest
from megatrain.checkpoint.rank_file import read_written
from megatrain.config import RunConfig
from megatrain.plan.flops import num_parameters
from tests.parity.figures import Pool, gather_state
from tests.parity.matrix import SEQUENCES

NUM_STEPS_BEFORE, NUM_STEPS_AFTER = 2, 2


@dataclass(frozen=True)
class Layout:
    """A number of ranks and a section ``parallel``. ``model``: which one it saves (as in `parity_config`)."""

    name: str
    num_ranks: int
    parallel: dict[str, Any]
    model: str

    def config(self, pool: Pool, model: str, train: dict[str, Any]) -> dict[str, Any]:
        """What its ranks train; two micro-batches on each of the data ranks, where sequences are enough."""
        data = self.num_ranks // (self.parallel.get("tensor", 1) * self.parallel.get("pipeline", 1))
        size = max(SEQUENCES // data // 2, 1)
        parallel = {"zero_stage": 0, **self.parallel}
        return pool.config(model, parallel=parallel, train={"micro_batch_size": size, **train})

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Continued:
    """State, by name and kind, and the losses of the steps after it. ``folder``: the checkpoint, of ``step``.

    ``validation``: the loss on held-out windows at the end. ``after``: what a manifest says of the state.
    """

    folder: Path
    step: int
    state: dict[tuple[str, str], torch.Tensor]
    losses: list[float]
    validation: float
    after: dict[str, Any]

    def assert_holds(self, other: Continued) -> None:
        """The same state, to the last bit."""
        assert self.state.keys() == other.state.keys()
        assert [key for key, tensor in self.state.items() if not torch.equal(tensor, other.state[key])] == []

    def distance(self, other: Continued) -> float:
        """The largest difference of two losses, over the loss."""
        return max(abs(a / b - 1) for a, b in zip(self.losses, other.losses, strict=True))


class Saves:
    """Checkpoints by the layout, the model and the ``train`` section under which they were made."""

    def __init__(self, pool: Pool, folder: Path) -> None:
        self._pool, self._folder = pool, folder
        self._made: dict[tuple[str, str, str], Continued] = {}

    def of(self, layout: Layout, num_steps: int = NUM_STEPS_BEFORE, **train: Any) -> Continued:
        """What ``layout`` saved after ``num_steps`` of training its model, and how it went on by itself."""
        key = (layout.name, layout.model, str(sorted(train.items())))
        if key not in self._made:
            self._made[key] = self._run(layout, layout.model, train, {"save_after": num_steps}, num_steps)
        return self._made[key]

    def load(self, saved: Continued, source: Layout, target: Layout, **train: Any) -> Continued:
        """What ``target`` holds after loading what ``source`` saved, and how it goes on."""
        case = {"load": str(saved.folder), "first_step": saved.step, "save_after": 0, **saved.after}
        return self._run(target, source.model, train, case, saved.step)

    def last(self, layout: Layout) -> Continued:
        """What ``layout`` saved after its last step in fp32: its ``validation`` is that of the state."""
        return self._run(layout, layout.model, {"precision": "fp32"}, {"num_steps": NUM_STEPS_BEFORE}, NUM_STEPS_BEFORE)

    def _run(self, layout: Layout, model: str, train: dict[str, Any], case: dict[str, Any], step: int) -> Continued:
        """Run a ``case`` that saves after ``step``."""
        config = layout.config(self._pool, model, train)
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        before = case.get("save_after", step)
        case = {"num_steps": before + NUM_STEPS_AFTER, **case, "config": config, "save": str(folder)}
        answer = self._pool.answer(layout.num_ranks, case)
        write_manifest(folder, config, step)
        state, losses = gather_state(folder), answer["losses"][before:]
        return Continued(folder, step, state, losses, answer["validation"], answer["saved"])


def assert_resumes_exactly(pool: Pool, config: dict[str, Any], folder: Path) -> None:
    """Two ranks that go on from what they saved in ``folder`` half-way have the losses and norms that they had."""
    num_steps = NUM_STEPS_BEFORE + NUM_STEPS_AFTER
    case = {"config": config, "num_steps": num_steps, "save": str(folder), "save_after": NUM_STEPS_BEFORE}
    whole = pool.answer(2, case)
    assert len(set(whole["losses"])) == num_steps
    write_manifest(folder, config, NUM_STEPS_BEFORE)
    rest = {"first_step": NUM_STEPS_BEFORE, "num_steps": NUM_STEPS_AFTER, "num_updates": NUM_STEPS_BEFORE}
    found = pool.answer(2, {"config": config, "load": str(folder), **rest})
    assert found["losses"] == whole["losses"][NUM_STEPS_BEFORE:]
    assert found["norms"] == whole["norms"][NUM_STEPS_BEFORE:]


def write_manifest(folder: Path, config: dict[str, Any], step: int) -> None:
    """Make a checkpoint of the pieces in a folder."""
    resolved = RunConfig.model_validate(config)
    written = [read_written(path) for path in sorted(folder.iterdir())]
    manifest = Manifest(
        step=step,
        tokens=step * SEQUENCES * resolved.data.seq_len,
        parameters=num_parameters(resolved.model),
        layout={},
        state={},
        config=resolved.model_dump(mode="json"),
        versions={},
        created="",
        files=tuple(written),
    )
    (folder / MANIFEST).write_bytes(manifest.encode())
