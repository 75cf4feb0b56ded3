import re
import subprocess
import sys

import pytest

from megatrain.plan.hardware import DEVICES, find_device

# As torch.cuda.get_device_name() gives them.
DEVICE_NAMES = [
    ("NVIDIA A100-SXM4-80GB", "a100", 312),
    ("NVIDIA A100 80GB PCIe", "a100-pcie", 312),
    ("NVIDIA A100-SXM4-40GB", "a100-40gb", 312),
    ("NVIDIA A100-PCIE-40GB", "a100-40gb", 312),
    ("NVIDIA H100 80GB HBM3", "h100", 989.4),
    ("NVIDIA H100 PCIe", "h100-pcie", 756.4),
    ("NVIDIA H100 NVL", "h100-nvl", 835.5),
    ("NVIDIA H200", "h200", 989.4),
    ("NVIDIA H200 NVL", "h200-nvl", 835.5),
    ("NVIDIA GH200 480GB", "gh200", 989.4),
    ("NVIDIA B200", "b200", 2250),
    ("NVIDIA GB200", "gb200", 2500),
    ("NVIDIA L4", "l4", 121),
    ("NVIDIA L40", "l40", 181.05),
    ("NVIDIA L40S", "l40s", 362.05),
    ("NVIDIA A10", "a10", 125),
    ("NVIDIA A10G", "a10g", 70),
    ("NVIDIA RTX A6000", "a6000", 154.8),
    ("NVIDIA RTX 6000 Ada Generation", "rtx6000-ada", 364.2),
    ("NVIDIA GeForce RTX 4090", "rtx4090", 165.2),
    ("Tesla V100-SXM2-16GB", "v100", 125),
    ("Tesla V100-PCIE-32GB", "v100-pcie", 112),
    ("Tesla T4", "t4", 65),
    ("AMD Instinct MI300X", "mi300x", 1307.4),
    ("AMD Instinct MI250X / MI250", "mi250x", 191.5),
]


@pytest.mark.parametrize(("given", "name", "teraflops"), DEVICE_NAMES)
def test_a_device_is_found_by_its_own_name(given, name, teraflops):
    device = find_device(given)
    assert device.name == name
    assert device.peak_flops("bf16") == device.peak_flops("fp16") == pytest.approx(teraflops * 1e12)


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_a_short_name_finds_its_device(device):
    assert find_device(device.name) is device
    assert find_device(device.name.upper()) is device


@pytest.mark.parametrize(
    "given",
    ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA A100-SXM4-80GB MIG 1g.10gb", "cpu", ""],
)
def test_what_only_resembles_a_known_device_is_unknown(given):
    assert find_device(given) is None


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_figures_are_of_a_plausible_size(device):
    """Catches a slipped unit or a column in the wrong place."""
    assert 60e12 <= device.half_flops <= 3e15
    assert 1.9 < device.half_flops / device.single_flops < 35
    assert 16e9 <= device.memory_bytes <= 300e9
    assert 300e9 <= device.bytes_per_second <= 8e12
    size = re.search(r"(\d+)gb$", device.name)
    assert size is None or device.memory_bytes == int(size[1]) * 1e9


def test_the_plan_never_imports_torch():
    script = "import sys, megatrain.plan.hardware, megatrain.plan.flops; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_every_device_says_how_it_computes_products():
    for device in DEVICES:
        assert 40 <= device.units <= 304, device.name
        assert 0.5 < device.product_share < 0.9, device.name
