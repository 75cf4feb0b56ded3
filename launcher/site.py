"""What is particular to a cluster, from a small file of the site: its sbatch options, modules, container."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from launcher.options import check_passed
from megatrain.errors import ConfigError

Option = Annotated[str, StringConstraints(pattern=r"^--[a-z][^\x00-\x1f]*$")]
Name = Annotated[str, StringConstraints(pattern=r"^--[a-z-]+$")]
Word = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f]+$")]


class Site(BaseModel):
    """A site's own lines. Its author is trusted like the author of a batch script: ``prologue`` is shell code."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    sbatch: list[Option] = []
    """Options of sbatch, such as --constraint=ib. They win over what megatrain-launch asks for by itself (--exclusive,
    --mem=0, --gpus-per-node); the command line wins over them."""
    sbatch_always: list[Option] = []
    """The same, but they win over the command line too."""
    without: list[Name] = []
    """Options that this cluster refuses, such as --mem: megatrain-launch does not give them by itself."""
    prologue: str = ""
    """Lines of bash that run first in the batch script, such as `module load cuda`."""
    python: list[Word] = Field(default=[sys.executable], min_length=1)
    """The words that call Python: a path, or a container's command before it. Default: the one that runs this."""
    srun: list[Option] = []
    """Options of srun, such as --container-image=..."""


def read_site(path: Path | None) -> Site:
    """The site in a YAML file; the default where there is none. Raises ConfigError naming what is wrong."""
    if path is None:
        return Site()
    try:
        site = Site.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--site {path} cannot be read: {error}.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"--site {path} is no YAML: {' '.join(str(error).split())}.") from None
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(map(str, found['loc'])) or 'the file'}: {found['msg']}" for found in error.errors()
        )
        raise ConfigError(
            f"--site {path}: {wrong}. It may have: sbatch, sbatch_always, without, srun (lists of --options), prologue "
            "(text), python (a list)."
        ) from None
    check_passed([*site.sbatch, *site.sbatch_always], f"--site {path}")
    return site
