from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from launcher.nodes import choose_nodes
from megatrain.config import RunConfig, load
from megatrain.errors import ConfigError
from tests.unit.launcher.conftest import CONFIG

MORE = "The layout is not legal on more of them; idle:"


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A config with a global batch of 32 and micro-batches of 2: legal on 1, 2, 4, 8 and 16 ranks."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"run": {"dir": str(tmp_path / "run")}, **CONFIG}))
    return load(path)


@pytest.mark.parametrize(
    ("given", "ranks_per_node", "used", "told"),
    [
        ("a,b,c,d", 1, 4, "trains on 4 of 4 nodes, 4 rank(s).\n"),
        ("a,b,c", 1, 2, f"trains on 2 of 3 nodes, 2 rank(s). {MORE} c.\n"),
        ("a,b,c,d,e,f", 2, 4, f"trains on 4 of 6 nodes, 8 rank(s). {MORE} e f.\n"),
        ("a", 8, 1, "trains on 1 of 1 nodes, 8 rank(s).\n"),
    ],
)
def test_a_start_uses_a_legal_number_of_nodes(
    given: str,
    ranks_per_node: int,
    used: int,
    told: str,
    config: RunConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SLURM_JOB_NODELIST", given)
    assert choose_nodes(config, ranks_per_node, 1) == used
    assert capsys.readouterr().err == f"Elastic: {told}"


def test_fewer_nodes_than_the_minimum_are_not_taken(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_NODELIST", "a,b,c")
    with pytest.raises(ConfigError, match="no number of nodes from 3 to 3"):
        choose_nodes(config, 1, 3)
