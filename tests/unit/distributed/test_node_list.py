from __future__ import annotations

import itertools
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.distributed.node_list import expand, hostnames, tasks_per_node
from megatrain.errors import ConfigError

CONF = "ClusterName=x\nSlurmctldHost=localhost\nNodeName=n1 CPUs=1\nPartitionName=main Nodes=ALL\n"
texts = st.text("ab-.", min_size=1, max_size=4)
ranges = st.tuples(st.integers(0, 120), st.integers(0, 12), st.integers(1, 4)).map(
    lambda drawn: (f"{drawn[0]:0{drawn[2]}d}", f"{drawn[0] + drawn[1]:0{drawn[2]}d}")
)
brackets = st.lists(ranges, min_size=1, max_size=3)
terms = st.lists(st.one_of(texts, brackets), min_size=1, max_size=4)


def written(term: list[str | list[tuple[str, str]]]) -> str:
    """A term as SLURM writes it."""
    return "".join(part if isinstance(part, str) else f"[{','.join(map(_range, part))}]" for part in term)


def named(term: list[str | list[tuple[str, str]]]) -> list[str]:
    """The names that it stands for."""
    choices = [[part] if isinstance(part, str) else [n for pair in part for n in _counted(*pair)] for part in term]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _range(pair: tuple[str, str]) -> str:
    return pair[0] if pair[0] == pair[1] else "-".join(pair)


def _counted(first: str, last: str) -> list[str]:
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]


@given(st.lists(terms, min_size=1, max_size=3))
def test_a_node_list_expands_to_its_names(drawn: list[list[str | list[tuple[str, str]]]]) -> None:
    assert expand(",".join(map(written, drawn))) == [name for term in drawn for name in named(term)]


@pytest.mark.skipif(shutil.which("scontrol") is None, reason="needs SLURM's scontrol (Debian: slurm-client)")
@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(texts, brackets), min_size=1, max_size=2))
def test_lists_are_read_as_scontrol_does(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[str, list[tuple[str, str]]]]
) -> None:
    """As far as SLURM 22.05 knows them: no suffixes; of three brackets the order is its own."""
    conf = tmp_path_factory.getbasetemp() / "slurm.conf"
    conf.write_text(CONF)
    text = "n" + "".join(written(list(term)) for term in drawn)
    command = ["scontrol", "show", "hostnames", text]
    said = subprocess.run(command, env={"PATH": "/usr/bin", "SLURM_CONF": str(conf)}, capture_output=True, text=True)
    assert expand(text) == said.stdout.split()


@pytest.mark.parametrize(
    "text", ["", "n[3-1]", "n[1-2", "n]1", "a,,b", "n[]", "n[a-b]", "n[000x011]", "a b", "n[1-2],"]
)
def test_what_is_no_list_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        expand(text)


@pytest.mark.parametrize(
    "script",
    [
        "echo Invalid hostlist >&2",  # as of SLURM 22.05, with code 0, for a suffix
        "echo no configuration >&2; exit 1",
        None,
    ],
)
def test_without_scontrols_word_suffixes_are_known(
    script: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if script is not None:
        (tmp_path / "scontrol").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hostnames("node[1-3]-ib,rack[1-2]n[7]") == ["node1-ib", "node2-ib", "node3-ib", "rack1n7", "rack2n7"]


def test_scontrols_word_on_a_list_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scontrol").write_text('#!/bin/sh\nprintf "%s\\n" first second "$3"\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hostnames("n[1-2]") == ["first", "second", "n[1-2]"]


def test_task_counts_are_given_node_by_node() -> None:
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    with pytest.raises(ConfigError, match="tasks per node"):
        tasks_per_node("2(x")
