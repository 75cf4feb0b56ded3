"""`train.deterministic`: what it sets, what it refuses, and that a run under it is the one without."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import megatrain
from megatrain.distributed.causes import explain
from megatrain.distributed.determinism import set_deterministic
from megatrain.errors import EXIT_USAGE, ConfigError
from tests.runs import Metrics, TinyData, tiny_config, write_config


@pytest.fixture(autouse=True)
def own_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As a process that has set nothing yet; what is set is taken back."""
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"):
        monkeypatch.setenv(name, "")  # so that it is put back, whoever sets it
        monkeypatch.delenv(name)
    yield
    set_deterministic(False)


def test_all_of_it_is_set_and_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config as inductor

    set_deterministic(True)
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.deterministic
    assert inductor.deterministic
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert (os.environ["CUBLAS_WORKSPACE_CONFIG"], os.environ["NCCL_ALGO"]) == (":4096:8", "Ring")
    set_deterministic(False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic
    assert not inductor.deterministic
    assert torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("CUBLAS_WORKSPACE_CONFIG", ":16:8", True),
        ("CUBLAS_WORKSPACE_CONFIG", ":0:0", False),
        ("NCCL_ALGO", "Tree", True),
        ("NCCL_ALGO", "^NVLS", True),
        ("NCCL_ALGO", "NVLS,Ring", False),
    ],
)
def test_an_environment_that_asks_otherwise_is_refused(
    name: str, value: str, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    if allowed:
        set_deterministic(True)
        return
    with pytest.raises(ConfigError, match=f"train.deterministic is true, but {name} is {value}"):
        set_deterministic(True)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_process_that_uses_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(ConfigError, match="has started CUDA already"):
        set_deterministic(True)


def test_an_operation_that_cannot_is_told_plainly() -> None:
    set_deterministic(True)
    with pytest.raises(RuntimeError) as raised:
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))
    explained = explain(raised.value, "Rank 3 on node-1")
    assert explained is not None
    code, message = explained
    assert code == EXIT_USAGE
    assert message.startswith("Rank 3 on node-1: an operation is not deterministic (put_")
    assert message.endswith("or set train.deterministic to false.")


@pytest.mark.parametrize("engine", ["deepspeed", "fsdp2"])
@pytest.mark.slow
def test_a_cpu_run_loses_no_bit_by_it(engine: str, tiny_data: TinyData, tmp_path: Path) -> None:
    found = []
    for deterministic in (False, True):
        run_dir = tmp_path / str(deterministic)
        train = {"steps": 3, "deterministic": deterministic}
        data = {"document_mask": True}
        sections = {"train": train, "parallel": {"engine": engine}}
        config = tiny_config(tiny_data, run_dir, data={**tiny_config(tiny_data, run_dir)["data"], **data}, **sections)
        megatrain.train(write_config(run_dir.with_suffix(".yaml"), config))
        found.append(Metrics.read(run_dir))
        assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert found[0].losses == found[1].losses
    assert found[0].norms == found[1].norms
