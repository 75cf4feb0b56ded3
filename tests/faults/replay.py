"""What a disk holds after a power loss: a recorded run of system calls, replayed without what was not yet synced."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

_CALL = re.compile(r"^(?:\d+ +)?(\w+)\((.*)\) += (-?\d+)")
_FD = re.compile(r"^\d+<((?:\\x[0-9a-f]{2})*|[^>]*)>")
_STRING = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')


@dataclass
class _File:
    data: bytes = b""
    synced: bytes = b""


@dataclass
class _Folder:
    entries: dict[str, _File | _Folder] = field(default_factory=dict)
    synced: dict[str, _File | _Folder] = field(default_factory=dict)


class Disk:
    """The files below ``root``, by what of them is certain. ``before``: what ``root/checkpoints`` held, all synced."""

    def __init__(self, root: Path, before: Path) -> None:
        self._root = root
        self._tree = _Folder()
        self._tree.entries["checkpoints"] = self._tree.synced["checkpoints"] = _load(before)

    def apply(self, line: str) -> bool:
        """Do what a line of strace's output says; whether it changed something below the root."""
        match = _CALL.match(line)
        if match is None or int(match[3]) < 0:
            return False
        call, arguments = match[1], match[2]
        if call in ("write", "fsync"):
            named = _FD.match(arguments)
            path = Path(_text(named[1])) if named else Path("/")
            if not path.is_relative_to(self._root):
                return False
            node = self._find(path)
            if call == "write":
                assert isinstance(node, _File)
                (content,) = _STRING.findall(arguments)
                node.data += _bytes(content)[: int(match[3])]
            elif isinstance(node, _File):
                node.synced = node.data
            else:
                node.synced = dict(node.entries)
            return True
        paths = [Path(_text(text)) for text in _STRING.findall(arguments)]
        if call == "unlinkat" and (named := _FD.match(arguments)):
            paths = [Path(_text(named[1])) / paths[0]]
        if not paths or not paths[0].is_relative_to(self._root) or (call == "openat" and "O_CREAT" not in arguments):
            return False
        return self._change(call, paths)

    def _change(self, call: str, paths: list[Path]) -> bool:
        parent = self._folder(paths[0].parent)
        name = paths[0].name
        if call == "openat":
            if name in parent.entries:
                return False
            parent.entries[name] = _File()
        elif call == "mkdir":
            parent.entries[name] = _Folder()
        elif call == "rename":
            self._folder(paths[1].parent).entries[paths[1].name] = parent.entries.pop(name)
        else:
            assert call in ("unlink", "unlinkat", "rmdir"), call
            del parent.entries[name]
        return True

    def write(self, target: Path, unsynced_names_from: int | None) -> None:
        """Make the files as a power loss would leave them: contents as far as synced; names too, but for those so many
        folders down or further, which are as they were last (None: nowhere)."""
        _store(self._tree, target, unsynced_names_from)

    def _find(self, path: Path) -> _File | _Folder:
        node: _File | _Folder = self._tree
        for part in path.relative_to(self._root).parts:
            assert isinstance(node, _Folder)
            node = node.entries[part]
        return node

    def _folder(self, path: Path) -> _Folder:
        node = self._find(path)
        assert isinstance(node, _Folder)
        return node


def _load(path: Path) -> _File | _Folder:
    if path.is_dir():
        entries = {child.name: _load(child) for child in path.iterdir()}
        return _Folder(dict(entries), dict(entries))
    content = path.read_bytes()
    return _File(content, content)


def _store(node: _File | _Folder, target: Path, unsynced_from: int | None) -> None:
    if isinstance(node, _File):
        target.write_bytes(node.synced)
        return
    target.mkdir()
    below = None if unsynced_from is None else max(unsynced_from - 1, 0)
    for name, child in (node.entries if unsynced_from == 0 else node.synced).items():
        _store(child, target / name, below)


def _bytes(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))


def _text(text: str) -> str:
    return _bytes(text).decode() if text.startswith("\\x") else text
