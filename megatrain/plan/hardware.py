"""What a device can do at most: peak rates and memory, by the name it gives itself.

Dense rates, without the doubling that vendors print for structured sparsity. The figures are the vendors' own, from the
data sheet or whitepaper of each product; the comment above a group names it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatrain.config import RunConfig

_TERA = 1e12
_GIGA = 1e9


@dataclass(frozen=True)
class Device:
    """One kind of accelerator, as one rank sees it.

    ``pattern``: a regular expression that finds it in ``torch.cuda.get_device_name()``, in any case of letters.
    ``half_flops``: FLOP/s of dense matrix products in bf16, with sums in fp32 (of those without bf16: fp16).
    ``single_flops``: FLOP/s in fp32 as torch computes it by default, without tensor cores.
    ``memory_bytes``: nominal. ``bytes_per_second``: the memory's bandwidth. ``link_bytes_per_second``: what it sends to
    its neighbours in the node at the most, one way: over NVLink or Infinity Fabric if boards come with it, else PCIe.
    ``units``: streaming multiprocessors, or compute units; 0: not known. ``product_share``: of its peak that the
    fastest product in bf16 reaches, as measured (S. Bekman, "Machine Learning Engineering", "Maximum Achievable Matmul
    FLOPS"); where it was not, as on most.
    """

    name: str
    pattern: str
    half_flops: float
    single_flops: float
    memory_bytes: float
    bytes_per_second: float
    link_bytes_per_second: float
    has_bf16: bool = True
    units: int = 0
    product_share: float = 0.8

    def peak_flops(self, precision: str) -> float:
        """Peak FLOP/s in ``precision``: bf16, fp16 or fp32."""
        return self.single_flops if precision == "fp32" else self.half_flops


def resolve_precision(config: RunConfig, has_bf16: bool) -> RunConfig:
    """The config with the precision that ``train.precision: auto`` stands for on devices with or without bf16 units."""
    if config.train.precision != "auto":
        return config
    train = config.train.model_copy(update={"precision": "bf16" if has_bf16 else "fp32"})
    return config.model_copy(update={"train": train})


def _device(
    name: str,
    pattern: str,
    half: float,
    single: float,
    memory: float,
    bandwidth: float,
    link: float,
    units: int,
    product_share: float = 0.8,
    has_bf16: bool = True,
) -> Device:
    """A row of the table: TFLOP/s, TFLOP/s, GB, GB/s, GB/s."""
    rates = half * _TERA, single * _TERA, memory * _GIGA, bandwidth * _GIGA, link * _GIGA
    return Device(name, pattern, *rates, has_bf16, units, product_share)


# The first row whose pattern is found counts: variants stand before the plain name, which then means the common form.
DEVICES: tuple[Device, ...] = (
    # "NVIDIA Blackwell Architecture Technical Brief", HGX and GB200 NVL72 data sheets (halved: printed with sparsity)
    _device("gb300", r"\bgb300\b", 2500, 80, 288, 8000, 900, 152, 0.786),
    _device("b300", r"\bb300\b", 2250, 75, 288, 8000, 900, 148, 0.786),
    _device("gb200", r"\bgb200\b", 2500, 80, 192, 8000, 900, 152, 0.729),
    _device("b200", r"\bb200\b", 2250, 75, 192, 8000, 900, 148, 0.776),
    # "NVIDIA H100 Tensor Core GPU Architecture" whitepaper; H100, H100 NVL, H200, GH200 and H20 data sheets
    _device("gh200", r"\bgh200\b", 989.4, 66.9, 96, 4000, 450, 132, 0.838),
    _device("h200-nvl", r"\bh200[ -]nvl\b", 835.5, 60, 141, 4800, 450, 132),
    _device("h200", r"\bh200\b", 989.4, 66.9, 141, 4800, 450, 132, 0.803),
    _device("h100-nvl", r"\bh100[ -]nvl\b", 835.5, 60, 94, 3938, 300, 132),
    _device("h100-pcie", r"\bh[18]00[ -]pcie\b", 756.4, 51.2, 80, 2000, 64, 114),
    _device("h100", r"\bh[18]00\b", 989.4, 66.9, 80, 3350, 450, 132, 0.803),
    _device("h20", r"\bh20\b", 148, 44, 96, 4000, 450, 78),
    # "NVIDIA A100 Tensor Core GPU Architecture" whitepaper; A100, A30, A40, A10 and RTX A6000 data sheets
    _device("a100-40gb", r"\ba[18]00.*\b40gb\b", 312, 19.5, 40, 1555, 300, 108, 0.869),
    _device("a100-pcie", r"\ba[18]00.*\bpcie\b", 312, 19.5, 80, 1935, 32, 108, 0.811),
    _device("a100", r"\ba[18]00\b", 312, 19.5, 80, 2039, 300, 108, 0.869),
    _device("a6000", r"\brtx a6000\b|^a6000$", 154.8, 38.7, 48, 768, 32, 84),
    _device("a40", r"\ba40\b", 149.7, 37.4, 48, 696, 32, 84),
    _device("a30", r"\ba30\b", 165, 10.3, 24, 933, 32, 56),
    _device("a10g", r"\ba10g\b", 70, 35, 24, 600, 32, 80),
    _device("a10", r"\ba10\b", 125, 31.2, 24, 600, 32, 72),
    # "NVIDIA Ada GPU Architecture" whitepaper; L40S, L40, L4 and RTX 6000 Ada data sheets
    _device("l40s", r"\bl40s\b", 362.05, 91.6, 48, 864, 32, 142),
    _device("l40", r"\bl40\b", 181.05, 90.5, 48, 864, 32, 142),
    _device("l4", r"\bl4\b", 121, 30.3, 24, 300, 32, 58),
    _device("rtx6000-ada", r"\brtx 6000 ada\b|^rtx6000-ada$", 364.2, 91.1, 48, 960, 32, 142),
    # "NVIDIA RTX Blackwell", "Ada", "Ampere GA102 GPU Architecture" whitepapers: FP16 tensor rate with FP32 accumulate
    _device("rtx5090", r"\brtx ?5090$", 209.5, 104.8, 32, 1792, 64, 170),
    _device("rtx4090", r"\brtx ?4090$", 165.2, 82.6, 24, 1008, 32, 128),
    _device("rtx3090", r"\brtx ?3090$", 71, 35.6, 24, 936, 32, 82),
    # "NVIDIA Tesla V100 GPU Architecture" and "NVIDIA Turing GPU Architecture" whitepapers
    _device("v100-pcie", r"\bv100-pcie\b", 112, 14, 32, 900, 16, 80, has_bf16=False),
    _device("v100", r"\bv100\b", 125, 15.7, 32, 900, 150, 80, has_bf16=False),
    _device("t4", r"\bt4\b", 65, 8.1, 16, 320, 16, 40, has_bf16=False),
    # AMD Instinct data sheets; an MI250X shows itself as two devices, each half of it
    _device("mi355x", r"\bmi355x\b", 2516.6, 157.3, 288, 8000, 538, 256, 0.622),
    _device("mi350x", r"\bmi350x\b", 2306.9, 144.2, 288, 8000, 538, 256, 0.622),
    _device("mi325x", r"\bmi325x\b", 1307.4, 163.4, 256, 6000, 448, 304, 0.6),
    _device("mi300x", r"\bmi300x\b", 1307.4, 163.4, 192, 5300, 448, 304, 0.511),
    _device("mi300a", r"\bmi300a\b", 980.6, 122.6, 128, 5300, 384, 228, 0.511),
    _device("mi250x", r"\bmi250x?\b", 191.5, 23.9, 64, 1638, 200, 110),
    _device("mi210", r"\bmi210\b", 181, 22.6, 64, 1638, 150, 104),
)


def find_device(name: str) -> Device | None:
    """The device called ``name``: a name of the table ("h100"), or as torch gives it ("NVIDIA H100 80GB HBM3").

    None for a device that the table does not know, and for a slice of one (MIG), whose share of the peak is not known.
    """
    if re.search(r"\bMIG\b", name):
        return None
    return next((d for d in DEVICES if d.name == name.lower() or re.search(d.pattern, name, re.IGNORECASE)), None)
