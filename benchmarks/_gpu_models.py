"""The models that a GPU is measured with, and that its time is computed for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks._bare_loop import Shape

VOCAB = 32000
MODELS: dict[str, tuple[Shape, int]] = {  # and the sequences of a micro-batch, of which a step has two
    "160m": (Shape(768, 2304, 20, 6, 2, VOCAB, 2048), 16),
    "0.5b": (Shape(1280, 4480, 24, 10, 2, VOCAB, 2048), 8),
    "1.5b": (Shape(2048, 5632, 32, 16, 4, VOCAB, 2048), 4),
    "3b": (Shape(2560, 8192, 36, 20, 4, VOCAB, 4096), 1),
}
TINY = Shape(64, 128, 2, 4, 2, 512, 64)


def config_of(shape: Shape, micro_batch: int, folder: Path, run: str, engine: str, precision: str) -> dict[str, Any]:
    """A run of the bare loop's model."""
    return {
        "run": {"dir": str(folder / run)},
        "model": {
            "hidden_size": shape.hidden,
            "intermediate_size": shape.ffn,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "max_position_embeddings": shape.seq_len,
            "vocab_size": shape.vocab,
        },
        "data": {"train": [{"path": str(folder / "data")}], "seq_len": shape.seq_len},
        "train": {
            "steps": 10000,
            "global_batch_size": 2 * micro_batch,
            "micro_batch_size": micro_batch,
            "precision": precision,
        },
        "parallel": {"engine": engine, "zero_stage": 1},
        "optimizer": {"lr": 1.0e-4},
        "schedule": {"type": "constant", "warmup_steps": 1},
        "checkpoint": {"every_steps": 10000},
        "observe": {"tensorboard": False},
    }
