import pytest
import torch

from megatrain.observe.flops import mfu, peak_flops


def test_a_cpu_has_a_measured_peak_only():
    assert peak_flops(torch.device("cpu"), None) is None
    assert peak_flops(torch.device("cpu"), 2e11) == 2e11


def test_mfu_is_the_share_of_a_known_peak():
    assert mfu(1000.0, 6e9, 1e12, 12) == pytest.approx(0.5)
    assert mfu(1000.0, 6e9, None, 12) is None
