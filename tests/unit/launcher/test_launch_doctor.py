from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launcher.doctor import read_hostfile
from megatrain.errors import ConfigError


def test_a_hostfile_is_read_as_deepspeed_does(tmp_path: Path) -> None:
    path = tmp_path / "hostfile"
    path.write_text("# ours\nnode1 slots=8\n\nnode2 slots=4 # half of it\n")
    assert read_hostfile(path) == {"node1": 8, "node2": 4}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("node1\n", "line 1: write each host once, as `node1 slots=8`"),
        ("node1 slots=8\nnode1 slots=8\n", "line 2: write each host once"),
        ("node1 slots=0\n", "line 1"),
        ("-oProxyCommand=x slots=8\n", "line 1"),
        ("# nobody\n", "names no host"),
    ],
)
def test_a_wrong_hostfile_is_refused_with_its_line(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "hostfile"
    path.write_text(text)
    with pytest.raises(ConfigError, match=problem):
        read_hostfile(path)


@pytest.mark.parametrize("options", [["--hostfile", "gone"], ["--folder", "gone"]])
def test_what_is_not_there_is_code_2_and_named(tmp_path: Path, options: list[str]) -> None:
    command = [sys.executable, "-m", "launcher", "doctor", *options]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "gone" in ended.stderr
    assert "Traceback" not in ended.stderr
