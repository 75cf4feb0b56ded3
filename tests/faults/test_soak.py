"""The soak, in short: `make soak` is the whole of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.soak import soak


@pytest.mark.slow
@pytest.mark.acceptance
def test_mixed_faults_lose_nothing_and_account_for_time(tmp_path: Path) -> None:
    said: list[str] = []
    soak(tmp_path, num_faults=3, seconds=(1.0, 2.0), seed=3, say=said.append)
    assert "nothing was lost" in said[-1]
