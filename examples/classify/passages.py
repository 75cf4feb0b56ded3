"""Passages of the Linux kernel's documentation, each with the part of it that it is from."""

from __future__ import annotations

import gzip
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

PARTS_LEFT_OUT = ("translations",)
SHORTEST, LONGEST = 120, 300  # characters
LEAST_SHARE_OF_WORDS = 0.95  # of a paragraph's characters: letters and what stands between words
UNDERLINE = re.compile(r"^\s*([=\-~^\"#*+`.:_])\1{2,}\s*$", re.MULTILINE)
ROLE = re.compile(r":[\w:+-]+:`([^`<]*)[^`]*`")
PATH = re.compile(r"\S*Documentation/\S*")


class Passage(NamedTuple):
    """``file``: below Documentation, whose first folder is the part."""

    file: str
    text: str

    @property
    def part(self) -> str:
        return self.file.partition("/")[0]


def passages(documentation: Path) -> list[Passage]:
    """Of all parts, each text once, in the order of the files' names."""
    files = sorted(path.relative_to(documentation).as_posix() for path in documentation.glob("*/**/*.rst.gz"))
    found: dict[str, str] = {}
    for file in files:
        if file.partition("/")[0] not in PARTS_LEFT_OUT:
            text = gzip.decompress((documentation / file).read_bytes()).decode(errors="ignore")
            for paragraph in paragraphs(text):
                found.setdefault(paragraph, file)
    return [Passage(file, text) for text, file in found.items()]


def paragraphs(text: str) -> Iterator[str]:
    """Those of prose, without titles, directives, code, tables, markup of references and names of files; a long one is
    cut behind a word."""
    for block in re.split(r"\n\s*\n", text):
        if UNDERLINE.search(block) or block.lstrip().startswith(".."):
            continue
        words = " ".join(PATH.sub("", ROLE.sub(r"\1", block)).split())
        if len(words) > LONGEST:
            words = words[: words.rfind(" ", 0, LONGEST)]
        num_of_words = sum(letter.isalpha() or letter in " ,.'-" for letter in words)
        if len(words) >= SHORTEST and num_of_words >= LEAST_SHARE_OF_WORDS * len(words):
            yield words


def largest_parts(found: Sequence[Passage], number: int) -> list[str]:
    """Those with most files that have passages, by name."""
    files = {passage.file: passage.part for passage in found}
    return sorted(
        part for part, _ in sorted(Counter(files.values()).items(), key=lambda item: (-item[1], item[0]))[:number]
    )


def without_names(found: Sequence[Passage], names: Sequence[str]) -> list[Passage]:
    """The passages without these words."""
    pattern = re.compile(rf"\s*\b(?:{'|'.join(map(re.escape, names))})\b", re.IGNORECASE)
    return [passage._replace(text=pattern.sub("", passage.text).strip()) for passage in found]
