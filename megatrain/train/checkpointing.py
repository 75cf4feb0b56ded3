"""When a run saves its state, and where it goes on from: the trainer's side of checkpoints."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from megatrain.checkpoint.image_processor import to_transformers
from megatrain.checkpoint.location import Location
from megatrain.checkpoint.manifest import FileEntry, Manifest, Token, read_manifest
from megatrain.checkpoint.origin import Origin, find_origin, is_model_folder
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.checkpoint.saved_config import saved_config
from megatrain.checkpoint.saver import CheckpointSaver, SaveResult, SaveStatus
from megatrain.checkpoint.store import CheckpointFolder, CheckpointStore, Retention
from megatrain.checkpoint.stores import find_store
from megatrain.data import Dataset
from megatrain.data.images import ImageDataset
from megatrain.data.vocabulary import refuse_other_tokens
from megatrain.distributed.fragment import Fragment, ShardSpec
from megatrain.errors import CheckpointError, Diverged, NotFinite, Unreachable
from megatrain.families.description import PatchEmbedding
from megatrain.inference.assets import Assets
from megatrain.observe.metrics import METRICS_FILE
from megatrain.observe.record import last_saved_step
from megatrain.parallel.engine import Engine, StateReader
from megatrain.plan.flops import num_trained_parameters
from megatrain.train.assemble import Run
from megatrain.train.convert import import_folder
from megatrain.train.image_positions import ReplacedWeight, resized
from megatrain.train.new_tokens import NewHead, ResizedWeights, new_rows
from megatrain.train.progress import (
    Progress,
    former_config,
    refuse_changes,
    refuse_what_is_left_out,
    resume_order,
)
from megatrain.train.spikes import Rewind, SpikeError, num_in_a_row
from megatrain.version import __version__

logger = logging.getLogger(__name__)

T = TypeVar("T")
OVERRIDES = "overrides"  # what the command line gave, in a manifest's state
_VERSIONS = ("torch", "deepspeed")


class CheckpointManager:
    """Saves a run's state in the background; the same calls at the same steps on all ranks.

    A checkpoint replaces none that is older before an update was made from its state: the update before it may have
    ruined the weights, and from ruined ones no gradient is finite. ``num_updates``: made by the state that the run goes
    on from.
    """

    def __init__(self, run: Run, num_updates: int) -> None:
        self._run, self._num_updates = run, num_updates
        kept = run.config.checkpoint
        retention = Retention(kept.keep, kept.keep_every_steps, kept.keep_best)
        self._saver = CheckpointSaver(run.store, run.rank.rank, run.rank.world_size, retention, run.groups.activity)
        self.last_saved: int | None = None
        self.problem: str | None = None
        """Why the last save failed, wherever it did; None where it did not."""

    def prepare(self) -> None:
        """Once the optimizer has its state: get ready for the first save. Not collective."""
        self._saver.prepare(self._run.engine.state_fragments())

    def begin(self, progress: Progress, validation_loss: float | None, on_request: bool) -> list[SaveResult]:
        """Start to save, once the save before has ended. The saves that ended meanwhile.

        Raises Diverged where the state of the save before, or this one's, turns out not to be finite.
        ``validation_loss``: of this very step, where it was evaluated. ``on_request``: kept until somebody deletes it.
        """
        ended = self.finish()
        run, self._num_updates = self._run, progress.updates
        assets = assets_of(run) if run.rank.rank == 0 else run.assets
        self._saver.begin(
            progress.step,
            _verified_state(run.engine),
            lambda files: _manifest(run, progress, files).model_copy(
                update={
                    "validation_loss": validation_loss,
                    "on_request": on_request,
                    "special_tokens": assets.special_tokens,
                    "chat": assets.chat,
                }
            ),
            [*assets.files.items()],
        )
        return ended if run.config.checkpoint.background else [*ended, *self.finish()]

    def status(self) -> SaveStatus:
        return self._saver.status()

    def advance(self, total: SaveStatus) -> list[SaveResult]:
        """Go on by the sum of all ranks' statuses. The saves that ended."""
        result = self._saver.advance(total)
        return [self._record(result)] if result else []

    def finish(self) -> list[SaveResult]:
        """Wait until the current save has ended. Collective."""
        ended: list[SaveResult] = []
        while self._saver.is_saving:
            self._run.groups.wait_for_all_ranks(self._saver.pending)
            ended += self.advance(SaveStatus(*self._run.groups.all_reduce_sum(list(self._saver.status()))))
        return ended

    def has_updates(self, progress: Progress) -> bool:
        return progress.updates > self._num_updates

    def prune_if_sound(self, progress: Progress) -> None:
        """Let the last checkpoint replace older ones, once it is there and an update was made from its state."""
        if self.has_updates(progress):
            self._saver.prune()

    def close(self, *, prune: bool = True) -> None:
        """End the thread that writes; ``prune``: once it has removed what is not kept. Collective."""
        self._run.groups.run_on_all_ranks(lambda: self._saver.close(prune=prune))

    def _record(self, result: SaveResult) -> SaveResult:
        """Collective: a save ends for all ranks at the same step."""
        if result.path is not None:
            self.last_saved, self.problem = result.step, None
            return result
        if self._saver.error:
            logger.error("checkpoint of step %d failed on this rank: %s", result.step, self._saver.error)
        first = self._run.groups.first_value(self._saver.error)
        self.problem = str(first)
        if isinstance(first, NotFinite):
            raise Diverged(
                f"The state after step {result.step} was not saved, as it is ruined: {first}. The checkpoints before "
                "it stay. Look at the data and the learning rate, and start again; go back further, if need be, with "
                "`megatrain checkpoint rewind`."
            )
        return result


def restore(run: Run) -> tuple[Progress, CheckpointFolder | None, list[str]]:
    """Fill the engine from the newest good checkpoint, or with the initial weights where there is none. Collective.

    A checkpoint that turns out damaged on any rank is passed over on all, for the next older one; the third value says
    which and why (on rank 0). Raises CheckpointError where there are checkpoints but none is good, where those that the
    run has saved are gone, or where the config changes what a run cannot change.
    """
    generation = _on_rank0(run, partial(_open_generation, run))
    damaged: dict[Location, str] = {}
    progress: Progress | None = None
    complaints: list[str] = []
    while progress is None and (found := _on_rank0(run, lambda: run.store.newest_good(damaged))) is not None:
        progress, problem = _load(run, found.path)
        if problem is not None:
            logger.info("passing over %s: %s", found.path, problem)
            damaged[found.path] = problem
    if found is not None:
        complaints, generation = _on_rank0(run, partial(_set_aside, run.store, found.step, damaged))
    run.store.join(generation)
    return progress or _begin(run), found, complaints


def _load(run: Run, folder: Location) -> tuple[Progress | None, str | None]:
    """The progress of a checkpoint, once the engine has its state; or why it cannot be read, the same on all ranks."""
    reader, problem = _on_all_ranks(run, partial(_open, run, folder))
    if reader is None:
        return None, problem
    progress = _check_progress(run, reader.manifest)
    if (base := reader.manifest.base) is not None:
        run.base = base
        _load_frozen(run, reader)
    _, problem = _on_all_ranks(run, partial(_fill, run, reader, reader, progress.updates))
    if problem is not None:
        return None, problem
    if progress.loss_scale and run.engine.loss_scale:
        run.engine.load_loss_scale(progress.loss_scale)
    run.engine.sync_params_from_master()
    return progress, None


def rewind(run: Run, former: Progress, spike: SpikeError) -> tuple[Progress, list[str]]:
    """Restore the state well before a loss spike, and skip the data from there to behind it. Collective.

    ``former``: where the run stood. Raises Diverged where it has gone back to the same step too often.
    """
    rule, order = run.config.spikes, run.order
    _on_rank0(run, partial(_make_newest, run.store, spike.step - rule.rewind_steps))
    progress, _, complaints = restore(run)
    done = Rewind(spike.step, progress.step, spike.step + 1 + rule.margin_batches, spike.reason)
    rewinds = (*former.rewinds, done)
    if num_in_a_row(rewinds) > rule.max_in_a_row:
        raise Diverged(
            f"{done.text()}, and that {num_in_a_row(rewinds)} times in a row. Look at the data and the learning "
            "rate, go back further with `megatrain checkpoint rewind`, or raise spikes.max_in_a_row."
        )
    run.order = order.leave_out(done.to_step, done.until_step)
    return replace(progress, segments=run.order.segments, rewinds=rewinds), complaints


def _verified_state(engine: Engine) -> Iterator[Fragment]:
    """What a rank saves. Raises CheckpointError where it is not the weights that the module computes with."""
    engine.check_fragments()
    yield from engine.state_fragments()


def _make_newest(store: CheckpointStore, step: int) -> None:
    """Set aside what was saved after the newest good checkpoint up to ``step``; where none is so old, all but the
    oldest good one."""
    steps = [found.step for found in store.list() if found.good]
    before = [each for each in steps if each <= step]
    if steps:
        store.set_aside(max(before) if before else min(steps))


def _refuse_to_begin_again(run: Run) -> None:
    """A run whose checkpoints are not where they were would begin afresh without a word, and its metrics go."""
    if any(True for _ in run.store.names()):
        return
    run_dir = Path(run.config.run.dir)
    before = find_store(run_dir)
    if before.folder != run.store.folder and any(True for _ in before.names()):
        raise CheckpointError(
            f"checkpoint.dir was changed: the checkpoints are in {before.folder}, and {run.store.folder} has none. Put "
            "it back, or copy them there."
        )
    if (saved := last_saved_step(run_dir)) is not None:
        raise CheckpointError(
            f"{run_dir} has saved checkpoints, up to step {saved}, but {run.store.folder} has none: they were moved or "
            "deleted, or their disk is not mounted. Bring the step-* folders back there, or set checkpoint.dir to "
            f"where they are. To begin again at step 0, take another run.dir, or move {METRICS_FILE} and config*.yaml "
            "out of this one."
        )


def _open_generation(run: Run) -> str:
    _refuse_to_begin_again(run)
    return run.store.open_generation()


def _on_rank0(run: Run, action: Callable[[], T]) -> T:
    """All go by what rank 0 saw: folders may not appear everywhere at once. An OSError becomes a CheckpointError."""

    def checked() -> T:
        try:
            return action()
        except OSError as error:
            raise CheckpointError(f"{error.filename or run.store.folder}: {error.strerror or error}") from None

    return run.groups.run_on_rank0(checked)


def _set_aside(store: CheckpointStore, step: int, damaged: Mapping[Location, str]) -> tuple[list[str], str]:
    """Take what cannot be read out of the way of the steps to come; what was wrong with each, and where it is now.

    And the generation, which may be another one since.
    """
    problems = {found.step: found.problem or damaged.get(found.path) for found in store.list()}
    return [f"{problems[taken.step]} It is now {taken.path}." for taken in store.set_aside(step)], store.generation


def _on_all_ranks(run: Run, action: Callable[[], T]) -> tuple[T | None, str | None]:
    """Do it on every rank. Its result; or, where any rank raised a CheckpointError, what the first of them said.

    Raises Unreachable where that is it: a store that does not answer is no damage.
    """
    result: T | None = None
    problem: CheckpointError | None = None
    try:
        result = run.groups.run_on_all_ranks(action)
    except CheckpointError as error:
        problem = error
    first = run.groups.first_value(problem)
    if isinstance(first, Unreachable):
        raise first
    return (result, None) if first is None else (None, str(first))


def _open(run: Run, folder: Location, *, ema: bool = False) -> CheckpointReader:
    return CheckpointReader(folder, (run.rank.rank, run.rank.world_size), run.groups.activity, ema=ema)


def _load_frozen(run: Run, reader: CheckpointReader) -> None:
    """Take the weights that adapters stand beside, from a checkpoint of either. Raises CheckpointError where they are
    not to be had, on all ranks: without them no checkpoint of the run can be used, and none is damaged."""
    _on_rank0(run, lambda: reader.base)
    _, problem = _on_all_ranks(run, lambda: run.engine.load_frozen(reader))
    if problem is not None:
        raise CheckpointError(f"The weights that lora adapts cannot be read: {problem}")


def _check_progress(run: Run, manifest: Manifest) -> Progress:
    """Where the checkpoint's run stood, with the data's order from there on, which becomes the run's."""
    refuse_changes(run.config, manifest.config)
    run.former = former_config(manifest.config)
    refuse_what_is_left_out(run.former, run.config, manifest.state.get(OVERRIDES, ()), run.overrides)
    progress = Progress.from_state(manifest.step, manifest.tokens, manifest.state)
    run.order = resume_order(run.config, progress, run.datasets, run.order)
    return replace(progress, segments=run.order.segments)


def _fill(run: Run, reader: CheckpointReader, state: StateReader, num_updates: int) -> None:
    """Take ``state`` into the engine, and on rank 0 the files beside a checkpoint into the run."""
    run.engine.load_fragments(state, num_updates, has_average=reader.manifest.has_average)
    if run.rank.rank == 0:
        run.assets = Assets.of_checkpoint(reader)


def assets_of(run: Run) -> Assets:
    """What goes along with the weights of its checkpoints; on rank 0, where the run has what it began with."""
    dataset = run.datasets[0]
    if isinstance(dataset, ImageDataset):
        seen = to_transformers(run.config.objective.image_classification, run.config.model)
        return run.assets.with_images(dataset.label_names, seen)
    texts = [each for each in run.datasets if isinstance(each, Dataset)]
    eod, bos = Token(id=dataset.eod_id, token=dataset.manifest.eod_token), None
    if dataset.bos_id is not None:
        bos = Token(id=dataset.bos_id, token=dataset.manifest.bos_token)
    talks = next((each for each in texts if each.manifest.template_files), None)
    chat = (talks.template_files(), talks.chat_date) if talks is not None else ({}, None)
    target = None
    if (path := dataset.target_tokenizer_path) is not None:
        target = path.read_bytes(), Token(id=dataset.target_eod_id, token=dataset.manifest.eod_token)
    assets = run.assets.with_data(dataset.tokenizer_path.read_bytes(), eod, bos, *chat, target)
    classifies = run.config.model.description.classifies
    return assets.with_labels(dataset.label_names) if classifies and dataset.label_names else assets


def _fitting_origin(run: Run) -> Origin:
    """The checkpoint of ``run.init_from``. Raises CheckpointError where it is of another model or tokenizer.

    A Hugging Face folder is imported into RUN/imported, again at each start before the first save.
    """
    origin = find_origin(run.config)
    assert origin is not None
    may_grow, may_resize = run.config.run.resize_token_embeddings, run.config.lora is None
    new_head = run.config.run.new_head
    origin.refuse_other_model(run.config.model, may_grow=may_grow, may_resize=may_resize, new_head=new_head)
    origin.refuse_other_adapters(run.config.lora)
    for dataset in run.datasets:
        if dataset.label_names is not None and not new_head:
            origin.refuse_other_labels(dataset.path, dataset.label_names)
        if not isinstance(dataset, Dataset):
            continue
        if may_grow:
            refuse_other_tokens(dataset, origin.tokenizer(), origin.folder)
        else:
            own = dataset.tokenizer_path.read_bytes(), dataset.manifest.target_tokenizer_sha256
            origin.refuse_other_tokenizer(dataset.path, *own)
    if not is_model_folder(str(origin.folder)):
        return origin
    out = Path(run.config.run.dir) / "imported"
    shutil.rmtree(out, ignore_errors=True)
    import_folder(Path(str(origin.folder)), out)
    imported = replace(
        origin, folder=out, manifest=(manifest := read_manifest(out)), model=saved_config(manifest, out).model
    )
    imported.refuse_other_model(run.config.model, may_grow=may_grow, may_resize=may_resize, new_head=new_head)
    return imported


def _begin(run: Run) -> Progress:
    config = run.config
    if config.run.init_from is None:
        run.groups.run_on_all_ranks(lambda: run.engine.load_fragments(run.initial_weights, num_updates=0))
    else:
        origin = _on_rank0(run, partial(_fitting_origin, run))
        run.origin = folder = origin.folder
        reader = _open(run, folder, ema=config.run.init_from_ema)
        if config.lora is not None:
            run.base = origin.base
            _load_frozen(run, reader)
        weights = (
            run.initial_weights if config.lora is not None and origin.lora is None else _changed(run, origin, reader)
        )
        weights = _resized(run, origin, reader, weights) if origin.resizes(config.model) else weights
        _, problem = _on_all_ranks(run, lambda: _fill(run, reader, weights, num_updates=0))
        if problem is not None:
            raise CheckpointError(f"run.init_from cannot be used: {problem}")
        if run.rank.rank == 0 and (stay := run.assets.staying_behind):
            logger.warning(
                "%s has no tokenizer.json to compare with the data's: %s stay behind", folder, ", ".join(stay)
            )
    run.engine.sync_params_from_master()
    return Progress(0, 0, 0, 0, run.order.segments, tuple(dataset.digest for dataset in run.datasets))


def _changed(run: Run, origin: Origin, reader: CheckpointReader) -> StateReader:
    """The checkpoint's weights, with a head and rows for tokens that it lacks. Collective."""
    if not run.config.run.new_head:
        return _grown(run, origin, reader)
    head = run.config.model.description.head_weights
    if run.rank.rank == 0:
        logger.warning("%s: a new head, drawn by run.seed: %s", origin.folder, ", ".join(head))
    return NewHead(_grown(run, origin, reader), run.initial_weights, head)


def _grown(run: Run, origin: Origin, reader: CheckpointReader) -> StateReader:
    """The checkpoint's weights, with rows for the tokens that it lacks: rank 0 draws them for all. Collective."""
    config = run.config
    if origin.model.vocab_size == config.model.vocab_size or config.model.description.reads_images:
        return reader
    rows = _on_rank0(run, lambda: new_rows(reader, origin.model, config.model, config.run.seed))
    if run.rank.rank == 0:
        count = len(next(iter(rows.values())))
        logger.warning("%s: %d rows added to %s for new tokens", origin.folder, count, ", ".join(rows))
    return ResizedWeights(reader, rows)


def _resized(run: Run, origin: Origin, reader: CheckpointReader, weights: StateReader) -> StateReader:
    """``weights``, with positions for images of another size: rank 0 makes them for all. Collective."""
    (embedding,) = origin.model.description.embeddings
    assert isinstance(embedding, PatchEmbedding)
    name, shape = embedding.places.name, embedding.places.shape(origin.model.sizes)

    def interpolated() -> Tensor:
        positions_1AC = reader.read_parameter(ShardSpec.whole(name, shape), "weight")
        return resized(positions_1AC.float(), run.config.model.sizes["places"])

    return ReplacedWeight(weights, name, _on_rank0(run, interpolated))


def _manifest(run: Run, progress: Progress, files: Sequence[FileEntry]) -> Manifest:
    config, topology = run.config, run.groups.topology
    return Manifest(
        step=progress.step,
        tokens=progress.tokens,
        parameters=num_trained_parameters(config.model, config.lora),
        base=run.base,
        layout={
            "world_size": topology.world_size,
            "data": topology.data,
            "tensor": topology.tensor,
            "pipeline": topology.pipeline,
            "zero_stage": config.parallel.zero_stage,
            "precision": config.train.precision,
        },
        state={**progress.to_state(), OVERRIDES: list(run.overrides)},
        config=config.model_dump(mode="json"),
        versions={"megatrain": __version__} | {name: version(name) for name in _VERSIONS},
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        files=tuple(files),
    )
