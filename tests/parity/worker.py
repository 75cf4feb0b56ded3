"""A rank that trains one case after another: what comes on its standard input, until that ends.

Starting ranks costs far more than building another engine on ranks that are up.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import sys
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatrain.checkpoint.manifest import Token
from megatrain.checkpoint.rank_file import rank_file_name, write_rank_file
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.config import RunConfig
from megatrain.data import Dataset
from megatrain.data.augmentation import open_augmentations
from megatrain.data.batches import BatchMaker, EvaluationBatches, TrainingBatches
from megatrain.data.order import DataOrder
from megatrain.data.vocabulary import resolve_vocabulary
from megatrain.distributed.bootstrap import read_rank
from megatrain.distributed.groups import Groups, make_groups
from megatrain.distributed.topology import Topology
from megatrain.errors import CheckpointError
from megatrain.inference.assets import Assets
from megatrain.inference.writer import Writer, agreement
from megatrain.model.init import InitialWeights
from megatrain.model.norm import RmsNorm
from megatrain.objectives import make_objective
from megatrain.parallel import compile as compiling
from megatrain.parallel.deepspeed import start_deepspeed
from megatrain.parallel.engine import Engine
from megatrain.plan.stages import shared_weights
from megatrain.tasks.evaluation import answer, ask, collect, read_questions
from megatrain.train.assemble import (
    build_engine,
    open_training_data,
    sampling_settings,
    training_sources,
)
from megatrain.train.schedule import learning_rate
from tests.parity.waits import waits_counted
from tests.runs import die_with_parent

TIMEOUT_SECONDS = 120.0
NUM_VALIDATION_WINDOWS = 5
INDUCTOR = compiling.BACKEND


@dataclass
class Case:
    """What to train. ``load``: a checkpoint to begin from, and what its manifest would say of it: ``num_updates``,
    ``loss_scale``. ``save``: a folder for the pieces, after ``save_after`` steps (None: the last).
    ``poisoned_step``: the last rank's gradients are NaN in it, and in the ``num_poisoned`` steps from there on.
    ``counted``: so many targets are said to be in a batch. ``refused_step``: its update is left out at the last
    moment. ``flipped``: when all is done, one bit of this parameter flips on the last rank.
    ``swapped``: of these parameters, one is taken for the other when the state is saved.
    ``drifts``: ranks that hold a weight with others have gradients of it that are a little off, but for the first one.
    ``tasks``: a file of tasks, answered in the end.
    ``gpu_kernels``: attention and norms by the functions that a GPU runs.
    ``twice``: go back to the initial weights in the end, and take the first steps again.
    ``backend``: of torch.compile, in place of its own.
    ``counts_waits``: from the second step on, of what would make a rank wait for its device, and of its messages."""

    config: dict[str, Any]
    first_step: int = 0
    num_steps: int = 12
    load: str | None = None
    num_updates: int = 0
    loss_scale: dict[str, float] | None = None
    save: str | None = None
    save_after: int | None = None
    poisoned_step: int | None = None
    num_poisoned: int = 1
    counted: int | None = None
    refused_step: int | None = None
    flipped: str | None = None
    swapped: tuple[str, str] | None = None
    drifts: bool = False
    tasks: str | None = None
    gpu_kernels: bool = False
    twice: bool = False
    backend: str | None = None
    counts_waits: bool = False


@functools.cache
def groups_of(topology: Topology, kv_heads: int, shared: tuple[tuple[int, ...], ...]) -> Groups:
    """The groups of a mesh; made once, for they cannot be freed and each has its own threads."""
    return make_groups(topology, read_rank().rank, torch.device("cpu"), TIMEOUT_SECONDS, kv_heads, shared)


def train(case: Case) -> dict[str, Any]:
    """Train a case on this rank; its figures, the same on all ranks."""
    rank = read_rank()
    config = RunConfig.model_validate(case.config)
    train_sets, _ = open_training_data(config)
    config = resolve_vocabulary(config, train_sets[0])
    RmsNorm.has_own_cpu_kernel = not case.gpu_kernels
    compiling.BACKEND = case.backend or INDUCTOR
    topology = Topology.of(rank.world_size, config.parallel.tensor, config.parallel.pipeline)
    groups = groups_of(topology, config.model.kv_heads, tuple(sorted({*shared_weights(config).values()})))
    engine = build_engine(config, groups)
    engine.load_frozen(InitialWeights(config.model, config.run.seed))
    if case.drifts:
        let_gradients_drift(engine)
    if case.load:
        reader = CheckpointReader(Path(case.load), near=(rank.rank, rank.world_size))
        engine.load_fragments(reader, case.num_updates, has_average=reader.manifest.has_average)
        if case.loss_scale and engine.loss_scale:
            engine.load_loss_scale(case.loss_scale)
    else:
        engine.load_fragments(InitialWeights(config.model, config.run.seed), num_updates=0)
    engine.sync_params_from_master()
    frozen = [held.master.clone() for held in engine._sharding.frozen_slices()]
    objective = make_objective(config.objective, config.model, config.data, config.run.seed)
    augmentations = open_augmentations(config, train_sets)
    sources = training_sources(objective, train_sets, augmentations, Path(config.run.dir), groups)
    maker = BatchMaker(sources, config.train.micro_batch_size)
    order = DataOrder.begin(config.run.seed, sampling_settings(config, sources))
    batches = TrainingBatches(maker, order, *groups.batch_share)
    if engine.is_compiled:
        engine.compile(batches.micro_batches(case.first_step)[0])
    losses, norms, skipped, num_updates, saved = [], [], [], case.num_updates, {}
    problem, waits, messages = None, Counter[str](), Counter[str]()
    save_step = case.first_step + (case.num_steps if case.save_after is None else case.save_after)
    for step in range(case.first_step, case.first_step + case.num_steps):
        if step == save_step:
            saved, problem = save(engine, case, rank.rank, num_updates)
        lr = learning_rate(config.schedule, config.optimizer.lr, step, config.train.steps)
        count = case.counted or batches.num_targets(step)
        since = -1 if case.poisoned_step is None else step - case.poisoned_step
        is_poisoned = 0 <= since < case.num_poisoned and rank.rank == rank.world_size - 1
        judged: list[float] = []
        # Who is asked before an update looks at figures, and so waits.
        admit = None if case.counts_waits else functools.partial(_admit, groups, judged, step == case.refused_step)
        is_counted = case.counts_waits and step > case.first_step
        with waits_counted(waits, messages) if is_counted else contextlib.nullcontext():
            result = engine.train_batch(batches.micro_batches(step), math.nan if is_poisoned else count, lr, admit)
        skipped.append(bool(result.skipped))
        (loss_sum,) = groups.all_reduce_sum([float(result.loss_sum)])
        losses.append(loss_sum / count)
        norms.append(float(result.grad_norm))
        assert is_poisoned or judged in ([], [loss_sum, norms[-1]]), "judged by other figures than are shown"
        num_updates += not skipped[-1]
    again = take_first_steps_again(engine, config, batches) if case.twice else []
    batches.close()
    unchanged = training_sources(objective, train_sets, [None] * len(train_sets), Path(config.run.dir), groups)
    whole = BatchMaker(unchanged, config.train.micro_batch_size)
    evaluation = EvaluationBatches(whole, *groups.batch_share, NUM_VALIDATION_WINDOWS)
    (validation,) = groups.all_reduce_sum([float(engine.evaluate(evaluation))])
    tasks = answer_tasks(engine, Path(case.tasks), train_sets[0]) if case.tasks else {}
    if case.swapped:
        swap_names(engine, *case.swapped)
    if case.save_after in (None, case.num_steps):
        saved, problem = save(engine, case, rank.rank, num_updates)
    if case.flipped and rank.rank == rank.world_size - 1:
        flip_a_bit(engine, case.flipped)
    pairs = zip(frozen, engine._sharding.frozen_slices(), strict=True)
    assert all(torch.equal(before, held.master) for before, held in pairs), "a frozen weight has changed"
    difference = engine.find_differences()
    assert case.flipped or difference is None, difference
    if difference is not None and difference.may_drift:
        engine.mend_differences()
        assert engine.find_differences() is None
        assert engine._sharding.misplaced() is None
    problem = groups.first_value(problem)
    engine.close()
    return {
        "losses": losses,
        "norms": norms,
        "skipped": skipped,
        "validation": validation / evaluation.num_targets,
        "saved": saved,
        "difference": difference and difference.text,
        "problem": problem,
        "again": again,
        "tasks": tasks,
        "waits": waits,
        "messages": messages,
    }


def answer_tasks(engine: Engine, path: Path, dataset: Dataset) -> dict[str, Any]:
    """As the trainer does."""
    questions, groups = read_questions(path), engine.groups
    assets = Assets().with_data(dataset.tokenizer_path.read_bytes(), Token(id=dataset.eod_id))
    with engine.in_use():
        writer = Writer(engine, dataset.tokenizer, assets, agreement(groups))
        own = answer(ask(questions, writer, groups), writer)
    results = collect(questions, own, groups)
    return {result.task.name: [outcome.record for outcome in result.outcomes] for result in results}


def take_first_steps_again(engine: Engine, config: RunConfig, batches: TrainingBatches) -> list[float]:
    """The losses of four steps from the initial weights, in an engine that has gone on from there before."""
    engine.load_fragments(InitialWeights(config.model, config.run.seed), num_updates=0)
    engine.sync_params_from_master()
    losses = []
    for step in range(4):
        lr, count = (
            learning_rate(config.schedule, config.optimizer.lr, step, config.train.steps),
            batches.num_targets(step),
        )
        result = engine.train_batch(batches.micro_batches(step), count, lr)
        losses.append(engine.groups.all_reduce_sum([float(result.loss_sum)])[0] / count)
    return losses


def _admit(groups: Groups, judged: list[float], refused: bool, loss_sum: float, norm: float) -> bool:
    judged += [*groups.all_reduce_sum([loss_sum]), norm]
    return not refused


def parameters_of(engine: Any) -> dict[str, Any]:
    """What a rank holds, by name."""
    parameters: dict[str, Any] = engine._sharding._parameters
    return parameters


def flip_a_bit(engine: Any, name: str) -> None:
    """The lowest bit of the first element that this rank holds of a parameter."""
    model = getattr(engine._sharding, "_model", None)  # DeepSpeed's; the copy of a tied weight is not in the other dict
    parameter = (parameters_of(engine) if model is None else model.parameters())[name]
    held = getattr(parameter, "ds_tensor", parameter).detach().view(-1)
    held[:1].view(torch.int16)[:1] ^= 1


def let_gradients_drift(engine: Any) -> None:
    """As sums over data ranks that are made in another order for each tensor rank do, only more; but for parts of
    gradients, of which the ranks have their own anyway, and which are summed later."""
    partial = {name for _, names in getattr(engine._sharding, "_partial", ()) for name in names}
    for name, parameter in parameters_of(engine).items():
        if engine._specs[name].replica and name not in partial:
            parameter.register_hook(lambda gradient: gradient * (1 + 1e-5))


def swap_names(engine: Engine, one: str, other: str) -> None:
    """Take each of two parameters for the other, as where DeepSpeed kept its state in an order of its own."""
    other_name = {one: other, other: one}
    sharding: Any = engine._sharding
    sharding._parameters = {other_name.get(name, name): p for name, p in sharding._parameters.items()}
    sharding._flattened = [[other_name.get(name, name) for name in names] for names in sharding._flattened]


def save(engine: Engine, case: Case, rank: int, num_updates: int) -> tuple[dict[str, Any], str | None]:
    """Write this rank's pieces, if they are asked for; what a manifest would say beside them, and what is wrong."""
    problem = None
    if case.save:
        folder = Path(case.save)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            engine.check_fragments()
            write_rank_file(folder / rank_file_name(rank), list(engine.state_fragments()))
        except CheckpointError as error:
            problem = str(error)
    return {"num_updates": num_updates, "loss_scale": engine.loss_scale}, problem


def main() -> None:
    """Serve cases; rank 0 answers with a line each, on the file descriptor that is named in the arguments."""
    die_with_parent()
    answers = os.fdopen(int(sys.argv[1]), "w")
    torch.set_num_threads(1)
    start_deepspeed(TIMEOUT_SECONDS)
    rank = read_rank()
    for line in sys.stdin:
        try:
            answer = train(Case(**json.loads(line)))
        except Exception:  # noqa: BLE001 - the test shows it
            answer = {"error": traceback.format_exc(), "rank": rank.rank}
        if rank.rank == 0 or "error" in answer:
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
        if "error" in answer:
            sys.exit(1)


if __name__ == "__main__":
    main()
