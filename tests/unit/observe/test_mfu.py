import time

import pytest
import torch

from megatrain.observe.flops import measure_cpu_peak, mfu, peak_flops


def test_a_cpu_peak_is_measured_quickly_and_close_to_what_a_large_product_reaches():
    started = time.perf_counter()
    peak = peak_flops(torch.device("cpu"), "fp32")
    assert time.perf_counter() - started < 0.6
    a = torch.rand(1024, 1024)
    rates = []
    for _ in range(5):
        started = time.perf_counter()
        a @ a
        rates.append(2 * 1024**3 / (time.perf_counter() - started))
    assert 0.5 * max(rates) < peak < 3 * max(rates)


def test_a_slow_precision_still_keeps_the_time():
    started = time.perf_counter()
    assert measure_cpu_peak(torch.float16) > 0
    assert time.perf_counter() - started < 0.8


def test_mfu_is_the_share_of_all_devices_and_none_where_the_peak_is_unknown():
    assert mfu(1000.0, 6e9, 1e12, 12) == pytest.approx(0.5)
    assert mfu(1000.0, 6e9, None, 12) is None
