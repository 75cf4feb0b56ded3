"""Fixtures: documents, a tokenizer trained on them, and the two ways to run the data tools."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from data_samples import Document, MakeDataset, RunCommand, json_lines, make_documents

from data_tools import cli
from data_tools.tokenize import Effort, TokenizeOptions, tokenize
from data_tools.tokenizer import train_tokenizer
from data_tools.units import ReadOptions
from megatrain.data.format import Manifest
from tests.in_process import caller


@pytest.fixture(scope="session")
def documents() -> list[Document]:
    return make_documents()


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory, documents: list[Document]) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "a.jsonl").write_bytes(json_lines(documents))
    train_tokenizer([str(folder / "a.jsonl")], 600, folder / "tokenizer.json", ReadOptions())
    return folder / "tokenizer.json"


@contextmanager
def _silent(name: str, total: int) -> Iterator[Callable[[int], None]]:
    yield lambda amount: None


@pytest.fixture
def make_dataset(tokenizer_path: Path) -> MakeDataset:
    """Tokenises through the Python interface, in small parts unless told otherwise."""

    def make(
        source: Path, out: Path, workers: int = 1, part_bytes: int = 40_000, engine: str = "auto", **options: int
    ) -> Manifest:
        warnings: list[str] = []
        effort = Effort(workers, engine, _silent, warnings.append, part_bytes, worker_seconds=0.0)
        read: dict[str, Any] = options
        manifest = tokenize([str(source)], tokenizer_path, out, TokenizeOptions(**read), effort)
        assert manifest is not None
        return manifest

    return make


@pytest.fixture
def run_command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> RunCommand:
    """Runs `megatrain-data` in this process: exit code, standard output, standard error."""

    return caller("megatrain-data", cli.main, monkeypatch, capfd)
