"""Control characters of a document, or of a file's name, are spelled out wherever they are shown."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from data_samples import RunCommand

ALL = "".join(map(chr, [*range(32), *range(0x7F, 0xA0), 0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), 0x2066, 0x2069]))
EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202eevil\r\b"
CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    texts = [f"{EVIL} some words {ALL}\nand more of them", f"{EVIL} other words {ALL}", "plain words"] * 2
    lines = [json.dumps({"text": text, "id": f"{EVIL}{number}"}) for number, text in enumerate(texts)]
    (folder / f"{EVIL}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_no_command_shows_control_characters(
    inputs: Path, tokenizer_path: Path, tmp_path: Path, run_command: RunCommand
) -> None:
    out = tmp_path / f"out{EVIL}"
    tokenizer = ("--tokenizer", tokenizer_path)
    shown = [
        run_command("tokenize", inputs, *tokenizer, "--out", out, "--workers", 1),
        run_command("inspect", out, "--document", 0),
        run_command("inspect", out, "--document", 0, "--json"),
        run_command("stats", out),
        run_command("verify", out),
        run_command("dedup", inputs, "--out", tmp_path / "dedup", "--workers", 1),
        run_command("filter", inputs, "--out", tmp_path / "filter", "--filters", "gopher_quality", "--workers", 1),
        run_command("tokenize", inputs, "--check", *tokenizer, "--out", tmp_path / "new", "--workers", 1),
    ]
    assert [ended.code for ended in shown] == [0] * len(shown), shown
    assert json.loads(shown[2].out)["document"]["text"].startswith(EVIL)
    (inputs / f"{EVIL}.jsonl").write_text('{"text": 1}\n')
    failed = [
        run_command("tokenize", inputs, *tokenizer, "--out", tmp_path / "bad", "--workers", 1),
        run_command("tokenize", inputs, "--check", *tokenizer, "--out", tmp_path / "bad", "--workers", 1),
        run_command("inspect", tmp_path / EVIL),
    ]
    assert [ended.code for ended in failed] == [3] * len(failed), failed
    assert all("evil" in ended.out + ended.err for ended in shown[:-1] + failed)
    for ended in shown + failed:
        assert not CONTROL.search(ended.out + ended.err), ended
    assert not CONTROL.search((tmp_path / "dedup" / ".report" / "report.txt").read_text())
