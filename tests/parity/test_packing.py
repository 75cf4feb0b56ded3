"""Best-fit packing, whose samples have different numbers of targets: the same training on one rank and on two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.parity.figures import Pool
from tests.parity.matrix import parity_config


def config(pool: Pool, run_dir: Path, packing: str, document_mask: bool, **parallel: int) -> dict[str, Any]:
    sections = parity_config(pool.data, "llama", parallel=parallel)
    sections["run"] |= {"dir": str(run_dir)}
    sections["data"] |= {"packing": packing, "document_mask": document_mask, "seq_len": 64}
    return sections


@pytest.mark.parametrize("document_mask", [False, True])
def test_packed_documents_train_the_same_on_two_ranks_and_another_model_than_cut_ones(
    document_mask: bool, pool: Pool, tmp_path: Path
) -> None:
    two, one = (pool.train(n, config(pool, tmp_path, "best_fit", document_mask)) for n in (2, 1))
    two.assert_equals(one)
    assert len(list((tmp_path / "packing").iterdir())) == 2, "a plan for each dataset, and nothing else"
    assert two.losses != pool.train(1, config(pool, tmp_path, "concat", document_mask)).losses


def test_packed_documents_train_the_same_through_a_pipeline(pool: Pool, tmp_path: Path) -> None:
    two = pool.train(2, config(pool, tmp_path, "best_fit", True, pipeline=2))
    two.assert_equals(pool.train(1, config(pool, tmp_path, "best_fit", True)))
