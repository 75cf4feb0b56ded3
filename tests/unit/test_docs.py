"""The documentation says what is: its commands exist, its links lead somewhere, its code runs."""

from __future__ import annotations

import json
import re
import sys
from contextlib import redirect_stdout
from functools import cache
from importlib import import_module
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from megatrain import cli
from megatrain.checkpoint.rank_file import write_rank_file
from megatrain.config.keys import leaves
from megatrain.distributed.fragment import FlatShard, Fragment, TensorSlice

REPOSITORY = Path(__file__).parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
MODULES = {"megatrain": "megatrain", "megatrain-data": "data_tools", "megatrain-launch": "launcher"}


def command_lines(text: str) -> list[list[str]]:
    """The words of each line in a code block that calls one of our commands, after the command's name."""
    blocks = re.findall(r"```(?:console|bash)?\n(.*?)```", text, re.DOTALL) + re.findall(r"(?:^ {4}.*\n)+", text, re.M)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [
        line.strip().removeprefix("$ ").split()
        for line in lines
        if re.match(r"\s*(\$ )?megatrain(-data|-launch)? ", line)
    ]


@cache
def help_of(command: str, *subcommands: str) -> str:
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as shown:
        patch.setenv("COLUMNS", "200")
        patch.setattr(sys, "argv", [command, *subcommands, "--help"])
        with pytest.raises(SystemExit, match=r"^0$"):
            import_module(f"{MODULES[command]}.cli").main()
    return shown.getvalue()


def names_in(help_text: str) -> set[str]:
    """Commands and options that a --help lists."""
    return set(re.findall(r"[│|]\s*\*?\s*(--[\w-]+|[a-z-]+)\s", help_text))


def used_commands() -> dict[tuple[str, ...], set[str]]:
    """Each command that a page uses, with its subcommands, and the options it is used with."""
    used: dict[tuple[str, ...], set[str]] = {}
    for page in PAGES:
        if page.name == "commands.md":  # generated from the commands
            continue
        for command, *line in command_lines(page.read_text(encoding="utf-8")):
            words = line[: line.index("--")] if "--" in line else line  # beyond it are another command's
            depth = 2 if words[0] in ("checkpoint", "job") else 1
            options = {word.split("=")[0] for word in words[depth:] if word.startswith("--")}
            used.setdefault((command, *words[:depth]), set()).update(options)
    return used


@pytest.mark.parametrize(("command", "options"), used_commands().items(), ids=lambda value: " ".join(sorted(value)))
def test_a_documented_command_exists_with_its_options(command, options):
    *before, last = command
    assert last in names_in(help_of(*before)), f"{' '.join(command)} is not a command"
    assert options - {"--help"} <= names_in(help_of(*command))


SHOWN = [
    shown
    for page in PAGES
    for shown in re.findall(
        r"^ {4}\$ (megatrain (?:check|plan|recipes).*)\n((?: {4}.+\n|\n(?= {4}[^$]))+)", page.read_text(), re.M
    )
]


@pytest.mark.parametrize(("command", "output"), SHOWN, ids=[command for command, _ in SHOWN])
def test_a_command_prints_what_a_page_shows(command, output, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", command.split())
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit):
        cli.main()
    printed = capsys.readouterr()
    lines = [line.rstrip() for line in (printed.out + printed.err).splitlines()]
    expected = [line.rstrip().removeprefix("    ") for line in output.splitlines()]
    assert [line for line in expected if line not in lines] == ["  ..."] * expected.count("  ...")
    assert "  ..." in expected or len(expected) == len(lines)


def test_the_tour_is_among_the_commands():
    assert {("megatrain", "train"), ("megatrain-data", "tokenize")} <= used_commands().keys()
    assert len(SHOWN) >= 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_pages_link_to_exist(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_every_page_is_in_the_navigation():
    settings = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = set(re.findall(r"[\w-]+\.md", str(settings["nav"])))
    assert listed == {page.name for page in PAGES[1:]}


WHERE = [
    (page.name, row.rpartition(" | ")[2])
    for page in PAGES
    for row in re.findall(r"^\| (.*) \|$", page.read_text(encoding="utf-8"), re.M)
    if page.name in ("architecture.md", "glossary.md", "pitfalls.md")
    and re.search(r"`[\w/]+/[\w/]+\.py`", row.rpartition(" | ")[2])
]


@pytest.mark.parametrize(("page", "where"), WHERE)
def test_the_named_code_is_in_the_named_file(page, where):
    """`path.py` or `path.py`: `name`, `name`; the names before the next path are those of that file."""
    named: dict[Path, list[str]] = {}
    for token in re.findall(r"`([^`]+)`", where):
        if token.endswith(".py"):
            path = REPOSITORY / token
            named[path] = []
        else:
            named[path].append(token.rpartition(".")[2])
    for path, names in named.items():
        text = path.read_text(encoding="utf-8")
        assert [name for name in names if not re.search(rf"\b(def|class) {name}\b", text)] == [], path


def test_keys_named_for_other_trainers_exist():
    page = (REPOSITORY / "docs" / "migrating.md").read_text(encoding="utf-8")
    ours = " ".join(row.split("|")[2] for row in page.splitlines() if row.startswith("| "))
    named = set(re.findall(r"`([a-z]+\.[a-z_]+)\b", ours))
    assert len(named) > 40
    assert named <= {path for path, _ in leaves()} | {"data.train"}


def test_every_module_has_its_line_in_the_architecture():
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    folders = [REPOSITORY / name for name in ("megatrain", "data_tools", "launcher")]
    modules = {path.name for folder in folders for path in folder.rglob("*.py")} - {"__init__.py"}
    assert [name for name in sorted(modules) if f"`{name}`" not in text] == []


def test_the_documented_checkpoint_reader_reads_two_ranks(tmp_path):
    weight = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    left, right = TensorSlice((0, 0), (4, 2)), TensorSlice((0, 2), (4, 4))  # as two tensor ranks would cut it
    fragments = [
        [Fragment(FlatShard("w", (4, 6), left, 0, 8), "weight", weight[:, :2].flatten())],
        [
            Fragment(FlatShard("w", (4, 6), right, 0, 5), "weight", weight[:, 2:].flatten()[:5]),
            Fragment(FlatShard("w", (4, 6), right, 5, 11), "weight", weight[:, 2:].flatten()[5:]),
        ],
    ]
    written = [write_rank_file(tmp_path / f"rank-{rank:05d}.safetensors", own) for rank, own in enumerate(fragments)]
    (tmp_path / "manifest.json").write_text(json.dumps({"files": [vars(entry) for entry in written]}))
    page = (REPOSITORY / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[-1], names)
    assert np.array_equal(names["read_checkpoint"](tmp_path)["w"], weight.numpy())
