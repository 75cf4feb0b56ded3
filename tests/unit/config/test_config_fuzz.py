"""Whatever is written on the command line or in the file, the answer is a config or a ConfigError."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatrain.config import RunConfig, dump, load
from megatrain.config.keys import leaves
from megatrain.errors import ConfigError
from megatrain.plan import rules
from tests.unit.config.conftest import REQUIRED_ONLY

KEYS = sorted(path.replace("*", "0") for path, _ in leaves())

VALUES = st.one_of(
    st.integers().map(str),
    st.integers(min_value=0, max_value=16).map(str),
    st.floats().map(repr),
    st.sampled_from(
        ["true", "false", "null", "yes", "''", "[]", "{}", "[0.5, 0.5]", "[1, 2]", "llama", "gpt2", "1e400"]
    ),
    st.sampled_from(
        ["bf16", "fp16", "cosine", "wsd", "full", "all", "optimizer", "linear", "9" * 500, "-.inf", ".nan"]
    ),
    st.text(max_size=20),
)


def outcome(text: bytes, overrides: list[str]) -> RunConfig | None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_bytes(text)
        try:
            config = load(path, overrides)
        except ConfigError as error:
            assert str(error)
            return None
        path.write_text(dump(config), encoding="utf-8")
        assert load(path) == config
        return config


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(KEYS), VALUES), max_size=4))
@example([("optimizer.lr", "9" * 350)])
@example([("run.dir", '"\\ud800"')])
def test_any_value_loads_or_is_refused(pairs):
    outcome(REQUIRED_ONLY.encode(), [f"{key}={value}" for key, value in pairs])


@settings(max_examples=100, deadline=None)
@given(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(lambda text: text.encode("utf-8", "ignore"))))
def test_any_text_loads_or_is_refused(tail):
    outcome(REQUIRED_ONLY.encode() + tail, [])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(KEYS), VALUES), max_size=4), st.integers(1, 64))
def test_a_loaded_config_has_a_legal_layout(pairs, world_size):
    config = outcome(REQUIRED_ONLY.encode(), [f"{key}={value}" for key, value in pairs])
    if config is None:
        return
    if rules.problems(config, world_size):
        rules.nearest_layout(config, world_size)
    else:
        degree, accumulated = rules.data_degree(config, world_size), rules.num_micro_batches(config, world_size)
        assert degree * accumulated * config.train.micro_batch_size == config.train.global_batch_size
