"""The kernel of attention: the best that the devices have, chosen once for a run.

Before a kernel is taken it computes attention at the run's shape, forward and backward, and is compared with PyTorch's
math backend: kernels have been wrong for some lengths, head sizes and layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import attention
from torch.nn.attention import SDPBackend

BACKENDS = {
    "flash3": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "math": SDPBackend.MATH,
}
"""Of scaled_dot_product_attention, by the names of ``model.attention``."""

BEST_FIRST = ("flash3", "cudnn", "flash")
TAKE_BORDERS = ("flash3", "flash")
"""Kernels with a variant for sequences of unequal length, which need no mask for documents and windows."""

MAX_TRIED_TOKENS = 4096
_RELATIVE_ERROR = 0.03  # of a whole tensor, in half precision; fp32 is far below


@dataclass(frozen=True)
class Use:
    """What a run asks of a kernel. ``has_borders``: whether documents or a window end what a token sees. ``is_causal``:
    a token sees none after it."""

    device: torch.device
    dtype: torch.dtype
    num_tokens: int
    heads_per_group: int
    head_dim: int
    has_borders: bool
    is_causal: bool = True

    @property
    def capability(self) -> tuple[int, int]:
        """Of an NVIDIA GPU, (8, 0) for Ampere."""
        return torch.cuda.get_device_capability(self.device)


Attend = Callable[[str, Sequence[Tensor], bool, bool], Tensor]
"""By a kernel's name, from queries, keys and values [1, T, heads, D]; if told, in two documents; if told, causally."""


def candidates(wanted: str, use: Use) -> Sequence[str]:
    """Kernels to try in turn for ``model.attention``. On a CPU none is better than those of the model itself."""
    if wanted != "auto":
        return (wanted,)
    if use.device.type != "cuda":
        return ()
    return [kernel for kernel in BEST_FIRST if kernel in TAKE_BORDERS or not use.has_borders]


def why_missing(kernel: str, use: Use, attend: Attend) -> str | None:
    """Why a kernel cannot be used; None where it can, and then it is the one that ``attend`` reaches by its name."""
    reason = _needs(kernel, use)
    if reason is None and kernel == "flash3":
        reason = _activate_flash3()
    if reason is None:
        reason = _why_wrong(kernel, use, attend)
    if reason is not None and kernel == "flash3":
        forget_flash3()
    return reason


def forget_flash3() -> None:
    """Let "flash" be flash attention 2 again."""
    chosen = getattr(attention, "current_flash_attention_impl", None)  # torch 2.9 has one alone
    if chosen is not None and chosen() == "FA3":
        attention.restore_flash_attention_impl()


def _needs(kernel: str, use: Use) -> str | None:
    """What a kernel needs of the device and of the run, and has not got."""
    if kernel == "math":
        return None
    if use.device.type != "cuda":
        return None if kernel == "flash" else "it needs a GPU, and this is a CPU"
    if kernel == "cudnn" and torch.are_deterministic_algorithms_enabled():
        return "its backward pass is not deterministic"
    if kernel == "cudnn" and use.has_borders:
        return "it is used without masks, which documents and windows need"
    if use.dtype not in (torch.bfloat16, torch.float16):
        return "it computes in bf16 and fp16 alone"
    if torch.version.hip is not None:
        return None if kernel == "flash" else "it needs an NVIDIA GPU"
    major, minor = use.capability
    if kernel == "flash3" and major != 9:
        return f"it needs compute capability 9 (Hopper), and this GPU has {major}.{minor}"
    return f"it needs compute capability 8.0, and this GPU has {major}.{minor}" if major < 8 else None


def _activate_flash3() -> str | None:
    try:
        attention.activate_flash_attention_impl("FA3")
    except (ImportError, RuntimeError, ValueError, AttributeError) as error:
        return f"torch {torch.__version__} cannot activate it ({error or type(error).__name__})"
    return None


def _why_wrong(kernel: str, use: Use, attend: Attend) -> str | None:
    """By trying it, beside the math backend in fp32."""
    generator = torch.Generator(use.device).manual_seed(0)
    length = min(use.num_tokens, MAX_TRIED_TOKENS)
    shapes = [(1, length, heads, use.head_dim) for heads in (use.heads_per_group, 1, 1, use.heads_per_group)]
    *inputs, grad = (torch.randn(shape, generator=generator, device=use.device).to(use.dtype) for shape in shapes)
    try:
        found = _with_gradients(kernel, inputs, grad, use, attend)
    except RuntimeError as error:
        return str(error).strip().partition("\n")[0]
    if torch.are_deterministic_algorithms_enabled():
        again = _with_gradients(kernel, inputs, grad, use, attend)
        if not all(map(torch.equal, found, again)):
            return "it does not compute the same bits twice"
    exact = _with_gradients("math", [x.float() for x in inputs], grad.float(), use, attend)
    errors = [float((a.float() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
    if all(error < _RELATIVE_ERROR for error in errors):
        return None
    return f"it is off by {max(errors):.1%} from the math backend at {length} tokens and heads of {use.head_dim}"


def _with_gradients(kernel: str, inputs: Sequence[Tensor], grad: Tensor, use: Use, attend: Attend) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attend(kernel, leaves, use.has_borders, use.is_causal)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]
