"""What a result is made from: a command and the files that it reads; and whether a finished one is still that."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from data_tools.inputs import InputFile
from megatrain.data.format import canonical_json
from megatrain.errors import ConfigError

LATER = ("fields", "supervision")
"""Options that commands got later: not given, they leave a command the name that it had."""


@dataclass(frozen=True)
class Origin:
    """A command, and the files that it reads."""

    command: Mapping[str, object]
    files: list[InputFile]

    @property
    def command_name(self) -> str:
        return _hash(_as_before(self.command))

    @property
    def versions(self) -> str:
        """Names the very files: another text where one is changed or replaced. For work that is unfinished."""
        return _hash([file.key for file in self.files])

    @property
    def name(self) -> str:
        """The command's name, and one of the files' content: it stands in results, whose bytes know no times."""
        return self.command_name + _hash([[file.name, file.num_bytes, file.fingerprint] for file in self.files])

    def refuse_other(self, name: str, made: Path, what: str, way_out: str) -> None:
        """Raise ConfigError, with the `way_out`, where `what`, finished by the file `made`, is of another origin."""
        if name[:32] != self.command_name:
            raise ConfigError(f"{what}, made from other inputs or with other options. {way_out}")
        made_ns = made.stat().st_mtime_ns
        changed = next((f"{file.name} was changed" for file in self.files if file.changed_ns > made_ns), None)
        if changed is None and name != self.name:
            changed = "an input was changed, replaced, added or taken away"
        if changed is not None:
            raise ConfigError(f"{what}, and {changed} after it was made. {way_out}")


def _as_before(value: object) -> object:
    if not isinstance(value, Mapping):
        return value
    return {key: _as_before(each) for key, each in value.items() if key not in LATER or each is not None}


def _hash(value: object) -> str:
    return hashlib.sha256(canonical_json(value)).hexdigest()[:32]
