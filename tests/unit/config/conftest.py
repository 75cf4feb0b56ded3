from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatrain.config import RunConfig, load
from megatrain.errors import ConfigError

REQUIRED_ONLY = """\
run: {dir: runs/x}
model: {hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 4}
data: {train: [{path: data/code}], seq_len: 256}
train: {steps: 200, global_batch_size: 16}
optimizer: {lr: 1.0e-3}
"""


@pytest.fixture
def loaded(tmp_path: Path) -> Callable[..., RunConfig]:
    """Loads a text as a config file, by default one that gives the required keys alone, with overrides."""

    def load_text(*overrides: str, text: str = REQUIRED_ONLY) -> RunConfig:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return load(path, overrides)

    return load_text


@pytest.fixture
def refused(loaded: Callable[..., RunConfig]) -> Callable[..., str]:
    """The message that a config, or the required keys with overrides, is refused with."""

    def message(*overrides: str, text: str = REQUIRED_ONLY) -> str:
        with pytest.raises(ConfigError) as caught:
            loaded(*overrides, text=text)
        return str(caught.value)

    return message


@pytest.fixture
def with_line() -> Callable[..., str]:
    """The required keys with further lines below them; a section that these give stands in place of its own."""

    def text(*lines: str) -> str:
        given = {line.partition(":")[0] for line in lines}
        kept = [line for line in REQUIRED_ONLY.splitlines() if line.partition(":")[0] not in given]
        return "\n".join([*kept, *lines]) + "\n"

    return text
