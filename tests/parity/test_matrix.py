"""Every layout trains the same model: each loss, each gradient norm and the final weights are those of one rank.

`make test` trains the quick cases, `-m slow` what else a pairwise cover needs, and MEGATRAIN_ACCEPTANCE=1 all. What has
passed then is recorded by commit, and left out when it is run again.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.parity.figures import Pool
from tests.parity.matrix import Case, all_cases, cover_cases, quick_cases

ROOT = Path(__file__).parents[2]
ACCEPTANCE = os.environ.get("MEGATRAIN_ACCEPTANCE") == "1"


def _selected() -> list[object]:
    quick = set(quick_cases())
    chosen = all_cases() if ACCEPTANCE else cover_cases()
    return [pytest.param(case, id=str(case), marks=() if case in quick else pytest.mark.slow) for case in chosen]


@pytest.mark.parametrize("case", _selected())
def test_a_layout_trains_as_one_rank_does(case: Case, pool: Pool, record: Record) -> None:
    if str(case) in record.passed:
        pytest.skip("has passed on this commit")
    pool.train(case.world_size, case.config(pool.data)).assert_equals(pool.alone(case.model))
    record.add(str(case))


class Record:
    """The cases that have passed, a line each; none where what is tested is not what was committed."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.passed = set(path.read_text().split()) if path and path.exists() else set()

    def add(self, case: str) -> None:
        if self._path:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(f"{case}\n")


@pytest.fixture(scope="session")
def record() -> Record:
    """MEGATRAIN_PARITY_RECORD, or else a file of the commit."""
    named = os.environ.get("MEGATRAIN_PARITY_RECORD")
    if named:
        return Record(Path(named))
    if not ACCEPTANCE or _git("status", "--porcelain", "--", "megatrain", "tests/parity"):
        return Record(None)
    return Record(ROOT / ".cache" / f"parity-{_git('rev-parse', 'HEAD')}.txt")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
