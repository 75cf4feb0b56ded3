"""Between two log lines a step never waits for the device; where DeepSpeed decides on the host, that wait is named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.parity.figures import Pool
from tests.parity.test_encoder_decoder import SPANS, sections

FSDP2 = {"engine": "fsdp2", "zero_stage": 1}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "fsdp2": ("llama_tied", FSDP2, {}, {}),
    "fsdp2 zero 3 documents": ("llama_tied", {**FSDP2, "zero_stage": 3}, {}, {"document_mask": True}),
    "fsdp2 pipeline fp16": ("llama_tied", {**FSDP2, "pipeline": 2, "pipeline_chunks": 2}, {"precision": "fp16"}, {}),
    "fsdp2 tensor bf16": ("llama_tied", {**FSDP2, "tensor": 2}, {"precision": "bf16"}, {}),
    "fsdp2 masked": ("bert", {**FSDP2, "tensor": 2, "sequence": True}, {}, {}),
    "fsdp2 spans": ("t5", FSDP2, {}, {}),
    "fsdp2 images": ("vit", {**FSDP2, "zero_stage": 3}, {}, {}),
    "deepspeed": ("llama_tied", {"zero_stage": 1}, {}, {}),
    "deepspeed bf16 documents": ("llama_tied", {"zero_stage": 1}, {"precision": "bf16"}, {"document_mask": True}),
    "deepspeed pipeline fp16": ("llama_tied", {"pipeline": 2, "zero_stage": 1}, {"precision": "fp16"}, {}),
    "deepspeed zero 2": ("llama_tied", {"zero_stage": 2, "tensor": 2, "sequence": True}, {}, {}),
}
ALLOWED = {
    r".* in deepspeed\.py:(step|begin_step|_norm_before_update)": "what DeepSpeed's own step has decided on the host",
    r"_local_scalar_dense in utils\.py:(is_invalid_grad_norm|clip_tensors_by_global_norm)": "its norm, and its clip",
    r"lift_fresh in utils\.py:mask_nan_or_inf_with_val_inplace": "its mark of a norm that is not finite",
    r"(item|_local_scalar_dense) in stage_1_and_2\.py:has_overflow": "whether it skips an update",
}
"""Waits of DeepSpeed's step, and why. FSDP2 has none."""


@pytest.mark.parametrize("name", CASES)
def test_a_step_waits_for_no_device(name: str, pool: Pool, sentinel_data: Path, tmp_path: Path) -> None:
    model, parallel, train, data = CASES[name]
    own = sections(SPANS, sentinel_data, tmp_path) if model == "t5" else {}
    averaged = {"ema_decay": 0.9, "scale_parameter": True}
    config = pool.config(model, **{"parallel": parallel, "train": train, "data": data, "optimizer": averaged, **own})
    found = pool.answer(2, {"config": config, "num_steps": 3, "counts_waits": True})["waits"]
    reasons = ALLOWED if "deepspeed" in name else {}
    unnamed = {wait: count for wait, count in found.items() if not any(re.fullmatch(each, wait) for each in reasons)}
    assert unnamed == {}
