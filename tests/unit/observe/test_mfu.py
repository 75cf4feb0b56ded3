import pytest
import torch

from megatrain.observe.flops import measure_cpu_peak, mfu, peak_flops


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_cpu_peak_is_measured_and_is_that_of_a_cpu(precision):
    # How close it comes is for benchmarks/: the machine of a test may be busy with anything.
    assert 1e8 < peak_flops(torch.device("cpu"), precision) < 1e14


def test_a_longer_measurement_is_no_slower_than_its_budget_by_more_than_a_product():
    sizes = []
    product = torch.mm

    def counted(a, b):
        sizes.append(len(a))
        return product(a, b)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "mm", counted)
        assert measure_cpu_peak(torch.float32, budget_seconds=0.0) > 0
    assert sizes == [128, 128]  # the one that starts the threads, and one that counts


def test_mfu_is_the_share_of_all_devices_and_none_where_the_peak_is_unknown():
    assert mfu(1000.0, 6e9, 1e12, 12) == pytest.approx(0.5)
    assert mfu(1000.0, 6e9, None, 12) is None
