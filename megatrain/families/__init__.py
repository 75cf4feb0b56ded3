"""The model families, one file each: what is particular to it, as data. docs/families.md says how to add one.

The table is the folder: a family's name is that of its file, which has the description under ``FAMILY``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping

from megatrain.families.description import Family

FAMILIES: Mapping[str, Family] = {
    name: importlib.import_module(f"{__name__}.{name}").FAMILY
    for _, name, _ in pkgutil.iter_modules(__path__)
    if name != "description"
}
