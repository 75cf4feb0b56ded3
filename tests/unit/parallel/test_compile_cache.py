"""Where layers are compiled into: a folder that can be used, of each local rank, on the node's own disk."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

import pytest
import torch

from megatrain.config import RunConfig
from megatrain.distributed.bootstrap import RankInfo
from megatrain.errors import ConfigError
from megatrain.parallel import compile_cache
from megatrain.parallel.compile import CACHE_DIR
from megatrain.parallel.compile_cache import settle_compile, shared_file_system, use_cache
from tests.unit.parallel.test_compile import make_config

MOUNTS = [("/", "ext4"), ("/home", "nfs4"), ("/home/me/fast", "xfs"), ("/tmp", "tmpfs")]


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (CACHE_DIR, "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # so that it is put back, whoever sets it
        monkeypatch.delenv(name)


class OneOfTwo:
    """Groups of two ranks; the other has no problem."""

    rank, device = 0, torch.device("cpu")

    def first_value(self, value: str | None) -> str | None:
        return value


def settle(compile_: str, device: str = "cpu") -> RunConfig:
    groups = OneOfTwo()
    groups.device = torch.device(device)
    rank = RankInfo(0, 2, 0, 2, "none", "127.0.0.1", 29500)
    return settle_compile(make_config(compile_), rank, groups)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("folder", "kind"),
    [("/home/me/cache", "nfs4"), ("/home/me/fast/cache", None), ("/tmp/cache", None), ("/homes/cache", None)],
)
def test_folders_that_nodes_share_are_known(folder: str, kind: str | None) -> None:
    assert shared_file_system(Path(folder), MOUNTS) == kind


def test_each_local_rank_has_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert use_cache(3) is None
    folder = tmp_path / f"megatrain-compiled-{os.getuid()}" / "rank-3"
    assert os.environ[CACHE_DIR] == str(folder)
    assert os.environ["TRITON_CACHE_DIR"] == str(folder / "triton")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert use_cache(3) is None  # a second run of this process
    assert os.environ[CACHE_DIR] == str(folder)


def test_a_local_disk_is_taken_before_shared_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no NFS here: a list of mounts says so."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(compile_cache, "_mounts", lambda: [("/", "ext4"), (str(tmp_path), "nfs4")])
    assert use_cache(0) is None
    assert not os.environ[CACHE_DIR].startswith(str(tmp_path))


def test_a_given_folder_that_is_shared_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(CACHE_DIR, str(tmp_path))
    monkeypatch.setattr(compile_cache, "_mounts", lambda: [("/", "lustre")])
    with caplog.at_level(logging.WARNING):
        assert use_cache(0) is None
    assert os.environ[CACHE_DIR] == str(tmp_path / "rank-0")
    assert f"{tmp_path} is on a lustre file system" in caplog.text


def test_a_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_DIR, str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    problem = use_cache(0)
    assert problem == f"{tmp_path / 'rank-0'} belongs to another user, whose code would be run"


def test_without_a_folder_auto_trains_on_uncompiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(CACHE_DIR, str(tmp_path / "file" / "cache"))
    (tmp_path / "file").touch()
    assert settle("auto", "cuda").train.compile == "off"
    assert "layers are not compiled" in caplog.text
    assert f"Set {CACHE_DIR} to a folder on the node's own disk" in caplog.text
    with pytest.raises(ConfigError, match=r"train.compile is on, but nothing can be compiled: .*cannot be written"):
        settle("on")
    assert settle("off").train.compile == "off"


def test_a_full_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_DIR, str(tmp_path))
    monkeypatch.setattr(compile_cache, "LEAST_FREE_BYTES", 1 << 62)
    with pytest.raises(ConfigError, match=r"rank-0 has .* left, less than"):
        settle("on")
