"""The only place where the parts meet: a config and a rank become a run that is ready to train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatrain.checkpoint.location import Location
from megatrain.checkpoint.manifest import Base
from megatrain.checkpoint.store import CheckpointStore
from megatrain.checkpoint.stores import open_store
from megatrain.config import RunConfig
from megatrain.data.augmentation import Augmentation, open_augmentations
from megatrain.data.batches import BatchMaker, EvaluationBatches, TrainingBatches
from megatrain.data.epochs import num_steps, with_default_warmup
from megatrain.data.images import AnyDataset, open_for, require_alike
from megatrain.data.order import DataOrder, SamplingSettings
from megatrain.data.remote import Cache
from megatrain.data.sample import Source
from megatrain.data.storage import MAPPED_SHARDS
from megatrain.data.vocabulary import resolve_vocabulary
from megatrain.distributed.bootstrap import RankInfo, extensions_dir
from megatrain.distributed.determinism import set_deterministic
from megatrain.distributed.device import local_device
from megatrain.distributed.groups import Groups, make_groups
from megatrain.distributed.health_checks import Finding
from megatrain.distributed.preflight import LEAST_FREE_BYTES, Folders, examine, existing
from megatrain.distributed.rendezvous import init_process_group
from megatrain.distributed.topology import Topology
from megatrain.errors import ConfigError, RankError
from megatrain.inference.assets import Assets
from megatrain.model.attention import CoreAttention, attend_alone
from megatrain.model.block import Activation
from megatrain.model.encoder_decoder import build_stage
from megatrain.model.init import InitialWeights
from megatrain.model.kernels import Use, candidates, forget_flash3, why_missing
from megatrain.model.linear import add_adapters
from megatrain.model.masked_attention import MaskedAttention
from megatrain.objectives import make_objective
from megatrain.objectives.objective import Objective
from megatrain.parallel.compile_cache import CompiledGraphs, settle_compile
from megatrain.parallel.deepspeed import DeepSpeedSharding, start_deepspeed
from megatrain.parallel.engine import Engine, Sharding
from megatrain.parallel.shard import DTYPES, ShardedModel, shard_model, share_across_stages
from megatrain.plan import rules
from megatrain.plan.engine_memory import weight_state_bytes
from megatrain.plan.flops import num_trained_parameters
from megatrain.plan.hardware import resolve_precision
from megatrain.plan.stages import shared_weights, stage_layers
from megatrain.plan.this_machine import cpu_computes_bf16
from megatrain.tasks.evaluation import Questions, read_questions
from megatrain.train.start_clock import StartClock

MAPPED_SHARDS_IN_ALL = 32_768
"""Half of the regions that Linux lets a process map unless told otherwise (vm.max_map_count)."""

SHORTEST_WAIT_SECONDS = 60.0
"""For ranks that have not come: one may start much later than another where nodes are busy."""


RECOMPUTED = (CoreAttention, MaskedAttention, Activation)
"""What selective recomputation recomputes: it costs memory, not time."""


@dataclass
class Run:
    """Everything a trainer works with, on one rank."""

    config: RunConfig
    rank: RankInfo
    groups: Groups
    engine: Engine
    initial_weights: InitialWeights
    datasets: Sequence[AnyDataset]
    order: DataOrder
    maker: BatchMaker
    validation: Mapping[str, EvaluationBatches]
    store: CheckpointStore
    findings: Sequence[Finding]
    attention: str
    """The kernel that computes attention, by the names of `model.attention`."""
    assets: Assets = field(default_factory=Assets)
    """What came along with the weights it has begun with; on rank 0."""
    origin: Location | None = None
    """The checkpoint that its first weights were taken from, in this start."""
    base: Base | None = None
    """The weights that LoRA's adapters stand beside."""
    compiled: CompiledGraphs | None = None
    """What its layers have become, once they are compiled."""
    former: RunConfig | None = None
    """The config of the checkpoint that it goes on from."""
    questions: Sequence[Questions] = ()
    """Of train.tasks."""
    overrides: tuple[str, ...] = ()
    """The KEY=VALUE that its config was given on the command line."""

    @property
    def num_steps(self) -> int:
        """Steps of the whole run, as its data is read from where it stands."""
        return num_steps(self.config, self.order)

    def training_batches(self, order: DataOrder) -> TrainingBatches:
        return TrainingBatches(self.maker, order, *self.groups.batch_share)


def open_training_data(config: RunConfig) -> tuple[list[AnyDataset], list[AnyDataset]]:
    """The datasets to train and to validate on.

    Raises DataError where one is broken, or where they are not alike (`require_alike`).
    """
    cache = Cache(Path(config.data.cache_dir).expanduser(), config.data.cache_bytes)
    share = MAPPED_SHARDS_IN_ALL // (len(config.data.train) + len(config.data.validation))
    images = config.model.description.reads_images
    opened = partial(open_for, images=images, cache=cache, max_mapped_shards=min(max(share, 1), MAPPED_SHARDS))
    train = [opened(entry.path) for entry in config.data.train]
    validation = [opened(entry.path) for entry in config.data.validation]
    require_alike([*train, *validation])
    return train, validation


def assemble(config: RunConfig, rank: RankInfo, clock: StartClock | None = None) -> Run:
    """Open the data, join the other ranks, build the model on this one. Collective; weights are not filled in yet.

    ``clock``: told what each part took.
    """
    lap = clock.lap if clock else lambda part: None
    train, validation = open_training_data(config)
    config = resolve_vocabulary(config, train[0])
    augmentations = open_augmentations(config, train)
    objective = make_objective(config.objective, config.model, config.data, config.run.seed)
    held_out = [objective.evaluation_source(dataset) for dataset in validation]
    questions = read_questions(Path(config.train.tasks)) if config.train.tasks else []
    lap("datasets")
    set_deterministic(config.train.deterministic)
    device = local_device(rank.local_rank)
    # The liveness monitor, which can say who is stuck, comes before the collectives' own timeout.
    patience_seconds = 1.5 * config.train.hang_timeout_seconds + 60.0
    wait_seconds = max(config.train.hang_timeout_seconds, SHORTEST_WAIT_SECONDS)
    is_new_group = init_process_group(rank, wait_seconds, patience_seconds)
    start_deepspeed(patience_seconds)
    lap("rendezvous")
    topology = Topology.of(rank.world_size, config.parallel.tensor, config.parallel.pipeline)
    shared = shared_weights(config).values()
    groups = make_groups(topology, rank.rank, device, patience_seconds, config.model.kv_heads, shared)
    config = resolve_precision(config, not groups.all_reduce_max([0.0 if computes_bf16(device) else 1.0])[0])
    lap("groups")
    findings = _preflight(config, rank, groups) if is_new_group else []
    lap("preflight")
    sources = training_sources(objective, train, augmentations, Path(config.run.dir), groups)
    micro_batch_size = config.train.micro_batch_size
    limit = _num_samples_of_each(config, len(held_out))
    maker = partial(BatchMaker, micro_batch_size=micro_batch_size, activity=groups.activity, pin=device.type == "cuda")
    evaluations = {
        name: EvaluationBatches(maker([source]), *groups.batch_share, limit)
        for name, source in zip(_names(validation), held_out, strict=True)
    }
    order = DataOrder.begin(config.run.seed, sampling_settings(config, sources))
    config = with_default_warmup(config, num_steps(config, order))
    lap("order")
    attention = choose_attention(config, groups)
    config = settle_compile(config, rank, groups)
    engine = build_engine(config, groups, attention)
    lap("engine")
    store = open_store(Path(config.run.dir), config.checkpoint.dir)
    store.activity = groups.activity
    return Run(
        config=config,
        rank=rank,
        groups=groups,
        engine=engine,
        attention=attention,
        initial_weights=InitialWeights(config.model, config.run.seed),
        datasets=train,
        order=order,
        maker=maker(sources),
        validation=evaluations,
        store=store,
        findings=findings,
        questions=questions,
    )


def _num_samples_of_each(config: RunConfig, num_datasets: int) -> int | None:
    """Of how many samples of each dataset an evaluation takes; None: all."""
    batches = config.train.eval_batches
    return None if batches is None else -(-batches * config.train.max_batch_size // max(num_datasets, 1))


def _names(datasets: Sequence[AnyDataset]) -> list[str]:
    """What figures of these datasets stand under: the last part of each path, or the path where two have the same."""
    paths = [str(dataset.path).rstrip("/") for dataset in datasets]
    last = [path.rsplit("/", 1)[-1] for path in paths]
    return last if len(set(last)) == len(last) else paths


def _preflight(config: RunConfig, rank: RankInfo, groups: Groups) -> list[Finding]:
    """What is bad about the ranks, and does not keep a run from starting. Collective; raises RankError for the rest."""
    num_saved = 0 if config.checkpoint.dir else num_trained_parameters(config.model, config.lora)
    folders = Folders(
        Path(config.run.dir), existing(extensions_dir()), max(weight_state_bytes(config) * num_saved, LEAST_FREE_BYTES)
    )
    findings, _ = examine(groups, rank, folders)
    fatal = "; ".join(finding.text for finding in findings if finding.is_fatal)
    if fatal:
        raise RankError(f"{fatal}. Make them the same on all nodes, or leave those out.")
    return findings


def training_sources(
    objective: Objective[Any],
    datasets: Sequence[AnyDataset],
    augmentations: Sequence[Augmentation | None],
    run_dir: Path,
    groups: Groups,
) -> list[Source]:
    """The samples of each dataset. Collective: rank 0 plans what is packed, then all map the plans."""
    folder = run_dir / "packing"
    groups.run_on_rank0(lambda: objective.store_plans(datasets, folder))
    pairs = zip(datasets, augmentations, strict=True)
    return [objective.training_source(dataset, folder, augmentation) for dataset, augmentation in pairs]


def sampling_settings(config: RunConfig, sources: Sequence[Source]) -> SamplingSettings:
    return SamplingSettings(
        global_batch_size=config.train.global_batch_size,
        weights=tuple(entry.weight for entry in config.data.train),
        seq_len=config.data.seq_len,
        num_samples=tuple(source.num_samples for source in sources),
        plans=tuple(source.plan.checksum for source in sources if source.plan is not None),
        num_new_epochs=config.data.num_new_epochs,
    )


def choose_attention(config: RunConfig, groups: Groups) -> str:
    """The kernel that all ranks have, as `model.attention` asks for it; auto: what the model does by itself.

    Collective. Raises ConfigError where the one that is asked for is missing.
    """
    model = config.model
    if model.description.block.attention.relative_bias is not None:
        return "auto"  # a trained bias is added to the scores
    has_borders = config.data.document_mask or model.attention_window is not None
    is_causal = model.description.block.attention.is_causal
    heads_per_group = model.num_attention_heads // model.kv_heads
    dtype = DTYPES[config.train.precision]
    use = Use(groups.device, dtype, config.data.seq_len, heads_per_group, model.head_size, has_borders, is_causal)
    for kernel in candidates(model.attention, use) if model.attention_dropout == 0 else ():
        reason = groups.first_value(why_missing(kernel, use, attend_alone))
        if reason is None:
            return kernel
        forget_flash3()  # another rank may have no such thing
        if model.attention != "auto":
            raise ConfigError(f"model.attention is {kernel}, which cannot be used here: {reason}. Set it to auto.")
    return "auto"


def build_engine(config: RunConfig, groups: Groups, attention: str | None = None) -> Engine:
    """The model of the config under the layout of the groups. Collective; its weights are not yet filled in.

    ``attention``: what ``choose_attention`` gives, where it is known.
    """
    rules.check(config, groups.topology.world_size)
    attention = attention or choose_attention(config, groups)
    mine = stage_layers(config)[groups.coordinate.pipeline :: groups.topology.pipeline]
    with torch.device("meta"):
        chunks = [build_stage(config.model, config.run.seed, layers) for layers in mine]
        for chunk in chunks:
            add_adapters(chunk, config.lora, config.run.seed)
            chunk.use_attention(attention)
            chunk.smooth_labels(config.objective.label_smoothing)
    model = share_across_stages(shard_model(chunks, config, groups, RECOMPUTED), shared_weights(config), groups)
    return Engine(config, model, _sharding(config, model, groups), groups)


def _sharding(config: RunConfig, model: ShardedModel, groups: Groups) -> Sharding:
    if config.parallel.engine == "fsdp2":
        from megatrain.parallel.fsdp2 import FSDP2Sharding  # half a second on each rank, for those who use it

        return FSDP2Sharding(config, model, groups)
    return DeepSpeedSharding(config, model, groups)


def computes_bf16(device: torch.device) -> bool:
    """Whether a device has units for bf16; without, it takes many times as long."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return cpu_computes_bf16()
