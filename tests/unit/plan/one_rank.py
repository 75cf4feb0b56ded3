"""One rank of many: builds the engines of each case over torch's fake process group, and says what they hold.

Nothing is sent, so that what other ranks own stays unfilled; what is allocated is real. A pipeline cannot step without
its neighbours: there the gradients and the activations are left out.
"""

from __future__ import annotations

import gc
import json
import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks._layout_rank import Held, _batch, _live_tensors
from megatrain.batch import Batch
from megatrain.config import RunConfig
from megatrain.distributed.bootstrap import RankInfo, export_rank, free_port
from megatrain.distributed.fragment import FlatShard
from megatrain.distributed.groups import make_groups
from megatrain.distributed.topology import Topology
from megatrain.parallel.deepspeed import start_deepspeed
from megatrain.plan.stages import shared_weights
from megatrain.train.assemble import build_engine


class Zeros:
    """A source of state, so that the optimizer has all of its own before the first step."""

    is_computed = True

    def read_into(self, target: Tensor, wanted: FlatShard, kind: str) -> None:
        target.zero_()


def _asked(batch: Batch, config: RunConfig) -> Batch:
    """Of a model that is asked at places: as many of them as its objective has."""
    if not config.model.description.asks_at_places:
        return batch
    num_targets = config.objective.most_targets(config.model, config.data.seq_len)
    places_BM = torch.arange(num_targets).expand(len(batch.tokens_BT), -1).contiguous()
    targets_BM = batch.targets_BM[:, :num_targets] % (config.model.num_answers or 1)
    batch = batch._replace(targets_BM=targets_BM, target_places_BM=places_BM)
    if not config.model.description.reads_images:
        return batch
    size = getattr(config.model, "image_size")  # noqa: B009 (a family's own key)
    return batch._replace(pixels_BCHW=torch.zeros(len(batch.tokens_BT), config.model.sizes["channels"], size, size))


def _paired(batch: Batch, config: RunConfig) -> Batch:
    """With a source, and where several pairs may be in a sample, the ids by which they are told apart."""
    source = _batch((len(batch.tokens_BT), config.data.seq_len), config.model.vocab_size or 0, 0).tokens_BT
    batch = batch._replace(source_tokens_BS=source)
    if config.objective.type != "sequence_to_sequence":
        return batch
    ids, source_ids = (torch.zeros(tokens.shape, dtype=torch.int32) for tokens in (batch.tokens_BT, source))
    return batch._replace(document_ids_BT=ids, source_document_ids_BS=source_ids)


def measure(config: RunConfig, rank: int, world_size: int) -> dict[str, Any]:
    """Bytes of each kind that a rank's engine holds, and of what it would save."""
    mesh = Topology.of(world_size, config.parallel.tensor, config.parallel.pipeline)
    shared = shared_weights(config).values()
    groups = make_groups(mesh, rank, torch.device("cpu"), 60.0, config.model.kv_heads, shared)
    others = _live_tensors()
    engine = build_engine(config, groups)
    engine.load_fragments(Zeros(), num_updates=1)
    held = Held(engine, others)
    if mesh.pipeline == 1:
        train = config.train
        shape = (train.micro_batch_size, config.target_len or config.data.seq_len)
        count = train.global_batch_size // (train.micro_batch_size * mesh.data)
        batches = [_asked(_batch(shape, config.model.vocab_size or 0, seed), config) for seed in range(count)]
        if config.target_len is not None:
            batches = [_paired(batch, config) for batch in batches]
        with held.watch():
            engine.train_batch(batches, count * shape[0] * shape[1], 1e-4)
    else:
        held._take()
        del held.bytes["gradients"]
    saved = sum(fragment.data.numel() * fragment.data.element_size() for fragment in engine.state_fragments())
    engine.close()
    return {**held.bytes, "saved": saved}


def main() -> None:
    rank, world_size = int(sys.argv[1]), int(sys.argv[2])
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    places = {"local_rank": 0, "local_world_size": 8, "master_addr": "127.0.0.1", "master_port": free_port()}
    export_rank(RankInfo(rank=rank, world_size=world_size, launcher="none", **places))
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    start_deepspeed(60.0)
    answers = []
    for case in json.load(sys.stdin):
        answers.append(measure(RunConfig.model_validate(case), rank, world_size))
        gc.collect()
    sys.stdout.write(f"\nanswer {json.dumps(answers)}\n")


if __name__ == "__main__":
    main()
