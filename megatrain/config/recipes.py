"""The configs that come with megatrain, by name: a recipe's name does wherever a config's path does."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from megatrain.errors import ConfigError

FOLDER = Path(__file__).parents[1] / "recipes"
"""In a checkout a link to configs/; its files in an installed package."""


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find(config: str | Path) -> Path:
    """The recipe that ``config`` names, else ``config`` as a path. A file of that name goes before a recipe."""
    path = Path(config)
    recipe = FOLDER / f"{path.name}.yaml"
    is_name = str(config) == path.name and not path.is_file()
    return recipe if is_name and recipe.is_file() else path


def text(name: str) -> str:
    """A recipe as it is written. Raises ConfigError where there is none of that name."""
    if name not in names():
        raise ConfigError(f"{name}: {unknown(name)}")
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def unknown(name: str) -> str:
    """That there is no recipe of that name, and which was probably meant."""
    close = difflib.get_close_matches(name, names(), n=1, cutoff=0.6)
    nearest = f"; nearest: {close[0]}" if close else ""
    return f"no recipe has that name{nearest} (`megatrain recipes` lists them)"


def summary(name: str) -> str:
    """What a recipe says of itself: the first sentence of its header."""
    lines = text(name).splitlines()
    header = [line.lstrip("# ") for line in lines[: next(k for k, line in enumerate(lines) if line[:1] != "#")]]
    first, *_ = re.split(r"(?<!et al)\. ", " ".join(header))
    return first.rstrip(".") + "."
