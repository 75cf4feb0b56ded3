"""Pipeline parallelism: consecutive layers on consecutive ranks, 1F1B through DeepSpeed's pipeline engine.

A rank's layers are one item of DeepSpeed's pipeline, so that what they share (positions, rotary angles) is computed
once. Between stages go the activations and, only where layers need them, the numbers of documents and of samples.

B: sequences, T: tokens, C: channels.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.pipe.schedule import ForwardPass, OptimizerStep, ReduceTiedGrads
from torch import Tensor, nn

from megatrain.batch import Batch
from megatrain.config import RunConfig
from megatrain.distributed.activity import Activity
from megatrain.distributed.groups import Groups, release
from megatrain.parallel.engine import Admit, StepResult
from megatrain.parallel.old_deepspeed_engine import StageZero, make_engine
from megatrain.parallel.old_engine import OldEngine
from megatrain.parallel.old_mpu import DeepSpeedMPU, use_as_grid
from megatrain.parallel.replicas import Replicas
from megatrain.parallel.shard import ShardedModel


class PipelinedEngine(OldEngine):
    """The engine of a model whose layers are spread over pipeline stages."""

    def __init__(self, config: RunConfig, model: ShardedModel, groups: Groups) -> None:
        self._carries = StageTensors(
            documents=config.data.document_mask, samples=_has_dropout(config), seq_len=config.data.seq_len
        )
        self._tied = config.model.tie_word_embeddings
        super().__init__(config, model, groups)

    def train_batch(
        self, micro_batches: Sequence[Batch], num_targets: int, lr: float, admit: Admit | None = None
    ) -> StepResult:
        """See Engine. DeepSpeed's schedule interleaves the micro-batches' forward and backward passes."""
        engine = self._deepspeed
        self._set_lr(lr)
        self._set_num_micro_batches(len(micro_batches))
        skipped_before = engine.skipped_steps
        scale = self._layers.loss_scale = self._scale(len(micro_batches), num_targets)
        engine.seconds_of_step = 0.0
        self._ask(admit, lambda: self._loss_sum(scale))
        engine.train_batch(data_iter=self._feed(micro_batches))
        skipped = self._update_guard.refused or engine.skipped_steps > skipped_before
        return StepResult(self._own_share(self._loss_sum(scale)), self._norm(), skipped, engine.seconds_of_step)

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterable[Batch]) -> float:
        """See Engine."""
        batches = list(self._counted(micro_batches))
        self._layers.loss_scale = 1.0
        losses = self._deepspeed.eval_batch(
            self._feed(batches), reduce_output=None, bcast_loss=False, num_micro_batches=len(batches)
        )
        self._deepspeed.train()
        if not self._deepspeed.is_last_stage() or self.groups.coordinate.tensor != 0:
            return 0.0
        return sum(float(loss) for loss in losses)

    def close(self) -> None:
        """See Engine."""
        pipe = self._deepspeed.module
        super().close()
        release([pipe.world_group])

    def _loss_sum(self, scale: float) -> float:
        """Of this rank's micro-batches so far; the last stage knows it."""
        return float(self._deepspeed.total_loss) / scale if self._deepspeed.is_last_stage() else 0.0

    def _replicas(self) -> Iterator[Replicas]:
        """See Engine; and the embedding that the first and the last stage share."""
        yield from super()._replicas()
        for weight, group in self._deepspeed.module.get_tied_weights_and_groups():
            yield Replicas(group, {"the tied embedding": weight})

    def _start(self, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> Any:
        self._layers = StageLayers(self._model.module, self._carries, self.groups.activity)
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its plans
            module = StagePipe(self._layers, self.groups, self._tied)
            return make_engine(StagedDeepSpeedEngine, module, module.mpu(), optimizer, settings, self.groups)

    def _feed(self, micro_batches: Sequence[Batch]) -> Iterator[tuple[Any, tuple[Tensor, ...]]]:
        for batch in micro_batches:
            labels = (batch.targets_BT,) if batch.loss_mask_BT is None else (batch.targets_BT, batch.loss_mask_BT)
            yield (
                self._carries.pack(batch.tokens_BT, batch.positions_BT, batch.document_ids_BT, batch.sample_ids_B),
                labels,
            )


class StageTensors:
    """What goes from stage to stage beside the activations; a lone tensor where nothing does."""

    def __init__(self, *, documents: bool, samples: bool, seq_len: int) -> None:
        self._documents, self._samples, self._seq_len = documents, samples, seq_len

    def pack(self, x: Tensor, positions_BT: Tensor, document_ids_BT: Tensor | None, sample_ids_B: Tensor | None) -> Any:
        """What is sent."""
        packed = [x]
        if self._documents:
            assert document_ids_BT is not None
            packed += [positions_BT, document_ids_BT]
        if self._samples:
            assert sample_ids_B is not None
            packed.append(sample_ids_B)
        return tuple(packed) if len(packed) > 1 else x

    def unpack(self, packed: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """x, positions, document ids, sample ids."""
        x, *rest = packed if isinstance(packed, tuple) else (packed,)
        if self._documents:
            positions_BT, document_ids_BT, *rest = rest
        else:
            positions_BT = torch.arange(self._seq_len, device=x.device).expand(x.shape[0], -1)
            document_ids_BT = None
        return x, positions_BT, document_ids_BT, rest[0] if self._samples else None


class StageLayers(nn.Module):
    """A stage as DeepSpeed's pipeline calls it: packed in, packed out, and from the last one the scaled loss.

    The loss belongs to the forward pass: at the border of that, DeepSpeed clears gradients. ``labels`` (targets, and
    the loss mask if there is one) are set before. ``activity``: told of each micro-batch.
    """

    def __init__(self, stage: Any, carried: StageTensors, activity: Activity) -> None:
        super().__init__()
        self._activity = activity
        self.stage = stage
        self.labels: tuple[Tensor, ...] = ()
        self.loss_scale = 1.0
        self._carried = carried

    def forward(self, packed: Any) -> Any:
        """Through all layers of the stage."""
        self._activity.batch()
        x, positions_BT, document_ids_BT, sample_ids_B = self._carried.unpack(packed)
        context = self.stage.make_context(positions_BT, document_ids_BT, sample_ids_B, self.stage.dtype)
        x = self.stage.hidden(x, context)
        if self.stage.head_name is None:
            return self._carried.pack(x, positions_BT, document_ids_BT, sample_ids_B)
        targets_BT, *mask = self.labels
        return self.stage.head.loss_sum(x, targets_BT, mask[0] if mask else None) * self.loss_scale


class StagePipe(PipelineModule):  # type: ignore[misc]
    """DeepSpeed's description of the pipeline, with one item a stage, of which this rank has only its own."""

    def __init__(self, layers: StageLayers, groups: Groups, tied: bool) -> None:
        self._groups, self._tied = groups, tied
        mesh, here = groups.topology, groups.coordinate
        items = [layers if stage == here.pipeline else None for stage in range(mesh.pipeline)]
        mpu = DeepSpeedMPU(groups)
        with use_as_grid(mpu):
            super().__init__(items, topology=mpu.topology())

    def _partition_layers(self, method: str = "uniform") -> None:
        self.parts = list(range(self.num_stages + 1))
        self._set_bounds(start=self.stage_id, stop=self.stage_id + 1)

    def _index_tied_modules(self) -> dict[str, Any]:
        """The tied weight: its gradients are summed over the first and last stage, its norm counted on the first."""
        ends = dist.get_process_group_ranks(self._groups.embedding_group)
        if not self._tied or len(ends) < 2:
            return {}
        here = self._groups.coordinate
        stage = getattr(self, str(self.stage_id)).stage
        module = stage.head if here.pipeline else stage.get_submodule(stage.embedding_names[0])
        self.tied_modules["embedding"] = module
        module.weight.ds_pipe_replicated = here.pipeline > 0
        return {
            "embedding": {
                "ranks": ends,
                "group": self._groups.embedding_group,
                "weight_attr": ["weight"],
                "module": module,
            }
        }

    def _synchronize_tied_weights(self) -> None:
        """Nothing: both ends are filled from the same source."""


class StagedDeepSpeedEngine(StageZero, PipelineEngine):  # type: ignore[misc]
    """DeepSpeed's pipeline engine, which also says how long the update took."""

    seconds_of_step = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.using_bf16_optimizer = hasattr(self.optimizer, "fp32_groups_gradients_flat")  # a subclass of it, too

    def _exec_forward_pass(self, buffer_id: int) -> None:
        if self.is_last_stage():
            getattr(self.module, str(self.stage_id)).labels = self.pipe_buffers["labels"][buffer_id]
        super()._exec_forward_pass(buffer_id)

    def _exec_optimizer_step(self, lr_kwargs: Any = None) -> None:
        began = time.perf_counter()
        super()._exec_optimizer_step(lr_kwargs)
        for weight, group in self.module.get_tied_weights_and_groups():
            # Over three data ranks and more, sums are rounded by where an element lies, which differs between stages.
            dist.broadcast(weight.detach(), dist.get_process_group_ranks(group)[0], group=group)
        self.seconds_of_step += time.perf_counter() - began

    def _exec_reduce_tied_grads(self) -> None:
        for weight, group in self.module.get_tied_weights_and_groups():
            # Where gradients are accumulated beside the parameter, DeepSpeed's own would look in the wrong place.
            grads = (getattr(weight, name, None) for name in ("_hp_grad", "grad_accum", "grad"))
            grad = next(grad for grad in grads if grad is not None)
            dist.all_reduce(grad, group=group)

    _INSTRUCTION_MAP = {  # noqa: RUF012 - DeepSpeed's own name and form
        **PipelineEngine._INSTRUCTION_MAP,
        ForwardPass: _exec_forward_pass,
        OptimizerStep: _exec_optimizer_step,
        ReduceTiedGrads: _exec_reduce_tied_grads,
    }


def _has_dropout(config: RunConfig) -> bool:
    return config.model.hidden_dropout > 0.0 or config.model.attention_dropout > 0.0
