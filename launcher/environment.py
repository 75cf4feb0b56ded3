"""The variables that a batch script passes on to ranks that ssh starts: through a file, which holds no secrets."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path

_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_OF_THE_JOB = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_CONF")
_OF_THIS_NODE = re.compile(
    r"(SLURM|SLURMD|PMI|PMIX)_.*|(CUDA|ROCR|HIP)_VISIBLE_DEVICES|GPU_DEVICE_ORDINAL|ZE_AFFINITY_MASK"
    r"|HOSTNAME|OLDPWD|PWD|SHLVL|_|TERM|DISPLAY|SSH_.*|DBUS_.*|XDG_(SESSION|RUNTIME).*|BASH_.*|SUDO_.*"
)
_SECRET_NAME = re.compile(
    r"(.*_)?(AUTH|COOKIE|CREDS|DSN|JWT|KEYS?|PASS|PAT|PRIVATE|PWD?|SIGNATURE|WEBHOOK)(_.*)?"
    r"|.*(APIKEY|CREDENTIAL|PASSPHRASE|PASSW|SECRET|TOKEN(?!I)).*",
    re.IGNORECASE,
)
_SWITCH = re.compile(r"\d?|true|false|yes|no|on|off", re.IGNORECASE)
_SECRET_VALUE = re.compile(
    r"://[^/\s:@]*:[^/\s@]+@|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|\b(hf_|ghp_|gho_|ghs_|github_pat_|glpat-|xox[abp]-|sk-)\w{16}"
    r"|\bAKIA[0-9A-Z]{16}\b|\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\."
)


def exports(environ: Mapping[str, str]) -> str:
    """What other nodes should know, as lines of a shell; not what is true of this node alone, nor secrets."""
    hidden = set(secrets(environ))
    return "".join(
        f"export {name}={shlex.quote(value)}\n"
        for name, value in sorted(_needed(environ).items())
        if name not in hidden
    )


def secrets(environ: Mapping[str, str]) -> list[str]:
    """The names of variables that look like secrets, by their name or their value. A path to one is none."""
    return [name for name, value in sorted(_needed(environ).items()) if _is_secret(name, value)]


def _needed(environ: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in environ.items()
        if _NAME.fullmatch(name) and (name in _OF_THE_JOB or not _OF_THIS_NODE.fullmatch(name))
    }


def _is_secret(name: str, value: str) -> bool:
    if _SECRET_VALUE.search(value):
        return True
    return bool(_SECRET_NAME.fullmatch(name)) and not _SWITCH.fullmatch(value) and not _is_path(value)


def _is_path(value: str) -> bool:
    return value.startswith("/") and "\n" not in value and len(value) < 4096 and Path(value).exists()
