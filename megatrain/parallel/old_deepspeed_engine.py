"""What megatrain changes in DeepSpeed's engines, and how they are started. DeepSpeed's own globals end here.

- ZeRO stage 0 in bf16 and fp16: DeepSpeed would accumulate gradients in that type. Its ZeRO-1 optimizer for bf16 sums
  whole fp32 gradients over the data ranks and cuts only the optimizer's state, so given a group of one to cut among, it
  is stage 0. It lacks a loss scale, which ``ScaledOptimizer`` adds.
- ZeRO stage 0 in fp32: DeepSpeed clips, but forgets the gradient's norm, and would apply one that is not finite.
"""

from __future__ import annotations

import contextlib
import gc
import io
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses
from deepspeed.utils import groups as deepspeed_groups
from deepspeed.utils.bwc import bwc_tensor_model_parallel_rank
from deepspeed.utils.timer import NoopTimer
from torch import nn
from torch.nn import functional

from megatrain.distributed.groups import Groups
from megatrain.parallel.old_loss_scale import ScaledOptimizer


class StageZero:
    """Mixed into DeepSpeed's engines: what stage 0 lacks there (see the module's docstring)."""

    alone: dist.ProcessGroup
    optimizer: Any

    def _broadcast_model(self) -> None:
        """Nothing: the weights come later, and every rank finds its own."""

    def _do_optimizer_sanity_check(self, basic_optimizer: Any) -> Any:
        half = self.bfloat16_enabled() or self.fp16_enabled()  # type: ignore[attr-defined]
        if self.zero_optimization_stage() == 0 and half:  # type: ignore[attr-defined]
            return "bf16"
        return super()._do_optimizer_sanity_check(basic_optimizer)  # type: ignore[misc]

    def _configure_bf16_optimizer(self, optimizer: Any) -> Any:
        scaled = ScaledOptimizer(
            optimizer,
            self.param_names,  # type: ignore[attr-defined]
            bfloat16_config=DeepSpeedBF16Config(enabled=True),
            mpu=self.mpu,  # type: ignore[attr-defined]
            clip_grad=self.gradient_clipping(),  # type: ignore[attr-defined]
            allgather_bucket_size=self.zero_allgather_bucket_size(),  # type: ignore[attr-defined]
            dp_process_group=self.alone if self.zero_optimization_stage() == 0 else self.seq_data_parallel_group,  # type: ignore[attr-defined]
            timers=NoopTimer(),
            grad_acc_dtype=torch.float32,
        )
        if self.fp16_enabled():  # type: ignore[attr-defined]
            scaled.use_dynamic_scale(self.dynamic_loss_scale_args())  # type: ignore[attr-defined]
        return scaled

    def _take_model_step(self, lr_kwargs: Any) -> None:
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            super()._take_model_step(lr_kwargs)  # type: ignore[misc]
            return
        norm = clip_gradients(list(self.module.parameters()), self.gradient_clipping(), self.mpu)  # type: ignore[attr-defined]
        self._global_grad_norm = norm
        if not torch.isfinite(norm):
            self.zero_grad()  # type: ignore[attr-defined]
            self.skipped_steps += 1  # type: ignore[attr-defined]
            self.global_steps += 1  # type: ignore[attr-defined]
        else:
            super()._take_model_step(lr_kwargs)  # type: ignore[misc]

    def clip_fp32_gradients(self) -> None:
        """Done before, with the norm."""


class PlainDeepSpeedEngine(StageZero, DeepSpeedEngine):  # type: ignore[misc]
    """DeepSpeed's engine for models without pipeline stages."""


def make_engine(
    kind: Any,
    module: nn.Module,
    mesh: Any,
    optimizer: torch.optim.Optimizer,
    settings: dict[str, Any],
    groups: Groups,
) -> Any:
    """What ``deepspeed.initialize`` does, for ``kind``: an engine of DeepSpeed's with StageZero mixed in."""
    kind.alone = groups.self_group
    with _as_no_garbage(), contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints what memory it finds
        return kind(
            args=None,
            model=module,
            optimizer=optimizer,
            mpu=mesh,
            dist_init_required=False,
            config=settings,
            config_class=DeepSpeedConfig(settings, mesh),
        )


@contextlib.contextmanager
def _as_no_garbage() -> Iterator[None]:
    """What is there by now need not be looked through for garbage: for its reports of memory, most of them never
    shown, DeepSpeed collects it half a dozen times, each a sixth of a second with all that torch has imported."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def forget_globals() -> None:
    """Let another engine, of another layout, be made in this process, and compute what it would in a fresh one."""
    deepspeed_groups.mpu = None
    # ZeRO 3 puts its own for torch's, which rounds otherwise in bf16, and leaves it there.
    functional.linear = getattr(InsertPostInitMethodToModuleSubClasses, "linear_bk", functional.linear)


def clip_gradients(parameters: list[nn.Parameter], largest: float, mesh: Any) -> torch.Tensor:
    """Scale the gradients to a global L2 norm of at most ``largest`` (0: do not); the norm before.

    A parameter that tensor ranks hold alike is counted on the first of them, one that stages tie on the first stage.
    """
    first = bwc_tensor_model_parallel_rank(mesh) == 0
    counted = [
        parameter.grad
        for parameter in parameters
        if parameter.grad is not None
        and (first or getattr(parameter, "model_parallel", False))
        and not getattr(parameter, "ds_pipe_replicated", False)
    ]
    square = torch.zeros(1, device=parameters[0].device)
    if counted:
        square += torch.nn.utils.get_total_norm(counted).float() ** 2
    dist.all_reduce(square, group=mesh.get_model_parallel_group())
    norm = square.sqrt().squeeze()
    if largest > 0.0:
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm
