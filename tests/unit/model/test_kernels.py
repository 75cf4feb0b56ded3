"""The kernel of attention: what each needs, and that one that computes something else is refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from megatrain.model.attention import attend_alone
from megatrain.model.kernels import Use, candidates, why_missing

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def make_use(device: torch.device = CPU, dtype: torch.dtype = torch.bfloat16, has_borders: bool = False) -> Use:
    return Use(device, dtype, num_tokens=40, heads_per_group=2, head_dim=16, has_borders=has_borders)


@pytest.mark.parametrize("has_borders", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", ["flash", "math"])
def test_a_cpus_kernels_are_there(kernel: str, dtype: torch.dtype, has_borders: bool) -> None:
    assert why_missing(kernel, make_use(CPU, dtype, has_borders), attend_alone) is None


def test_a_cpu_has_no_kernel_of_gpus() -> None:
    for kernel in ("flash3", "cudnn"):
        assert why_missing(kernel, make_use(), attend_alone) == "it needs a GPU, and this is a CPU"


def test_a_kernel_that_is_wrong_is_refused() -> None:
    def wrong(kernel: str, heads: Sequence[Tensor], *how: bool) -> Tensor:
        return attend_alone(kernel, heads, *how) * (1.1 if kernel == "flash" else 1.0)

    reason = why_missing("flash", make_use(), wrong)
    assert reason is not None
    assert "off by 10" in reason


@pytest.mark.parametrize(
    ("capability", "missing"),
    [((7, 5), {"flash3", "cudnn", "flash"}), ((8, 0), {"flash3"}), ((10, 0), {"flash3"}), ((9, 0), set())],
)
def test_gpus_have_kernels_by_their_capability(
    capability: tuple[int, int], missing: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("megatrain.model.kernels._activate_flash3", lambda: None)
    monkeypatch.setattr("megatrain.model.kernels._why_wrong", lambda kernel, use, attend: None)
    found = {kernel for kernel in ("flash3", "cudnn", "flash") if why_missing(kernel, make_use(GPU), attend_alone)}
    assert found == missing


def test_documents_leave_cudnn_out() -> None:
    assert list(candidates("auto", make_use(GPU))) == ["flash3", "cudnn", "flash"]
    assert list(candidates("auto", make_use(GPU, has_borders=True))) == ["flash3", "flash"]
    assert list(candidates("auto", make_use(CPU))) == []


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_cudnn_is_refused_where_bits_count(deterministic: None) -> None:
    assert why_missing("cudnn", make_use(GPU), attend_alone) == "its backward pass is not deterministic"


def test_a_kernel_that_varies_is_refused(deterministic: None) -> None:
    calls = iter(range(10))

    def varying(kernel: str, heads: Sequence[Tensor], *how: bool) -> Tensor:
        return attend_alone(kernel, heads, *how) * (1 + next(calls) * 2**-7)

    assert why_missing("flash", make_use(), varying) == "it does not compute the same bits twice"
    assert why_missing("flash", make_use(), attend_alone) is None
