"""What FSDP2 asks of torch."""

from __future__ import annotations

import pytest
from torch.distributed.fsdp import FSDPModule

from megatrain.errors import ConfigError
from megatrain.parallel.fsdp2 import check_torch


def test_a_torch_that_only_averages_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_torch()
    monkeypatch.delattr(FSDPModule, "set_force_sum_reduction_for_comms")
    with pytest.raises(ConfigError, match=r"parallel.engine is fsdp2, for which torch 2\S+ is too old"):
        check_torch()
