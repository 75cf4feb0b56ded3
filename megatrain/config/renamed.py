"""Keys that had another name. The old name keeps working: in files, on the command line, in what checkpoints saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatrain.config.problem import Problem

RENAMED: Mapping[str, str] = {
    "train.compare_weights_every_steps": "train.check_replica_hash_interval",
    "observe.compare_ranks_every_seconds": "observe.straggler_report_seconds",
}
"""Old names to new ones, of the same section."""


def both_given(old: str, value: object) -> Problem:
    """A key that stands under its old name, with this value, and under its new one."""
    return Problem(old, value, f"a former name of {RENAMED[old]}, which is given too; keep one")


def new_name(key: str) -> str:
    return RENAMED.get(key, key)


def with_new_names(tree: Any) -> Any:
    """A config's plain data under today's names. An old name beside its new one stays, to be refused."""
    if not isinstance(tree, Mapping):
        return tree
    for old, new in RENAMED.items():
        (section, old_key), new_key = old.split("."), new.rpartition(".")[2]
        keys = tree.get(section)
        if isinstance(keys, Mapping) and old_key in keys and new_key not in keys:
            renamed = {new_key if key == old_key else key: value for key, value in keys.items()}
            tree = {**tree, section: renamed}
    return tree
