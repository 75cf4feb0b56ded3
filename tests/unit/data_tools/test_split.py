"""`megatrain-data split`: each document on one side, the same side for near duplicates, before and after tokenizing."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from data_samples import RunCommand

from megatrain.data import open_dataset
from tests.faults.tokenize_inputs import folder_bytes

NUM_GROUPS = 300
SHARE = 0.2


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Groups of three: a text, a near duplicate of it, and the very same; then texts of two words."""
    drawn = random.Random(0)
    words = [f"word{number}" for number in range(3000)]
    texts = []
    for group in range(NUM_GROUPS):
        text = drawn.choices(words, k=200)
        near = [*text[:-2], "another", "end"]
        texts += [(group, "first", " ".join(text)), (group, "near", " ".join(near)), (group, "same", " ".join(text))]
    drawn.shuffle(texts)
    folder = tmp_path_factory.mktemp("split") / "in"
    folder.mkdir()
    for number in range(3):
        lines = [json.dumps({"id": f"{group}-{kind}", "text": text, "group": group}) for group, kind, text in texts]
        (folder / f"{number}.jsonl").write_text("\n".join(lines[number::3]) + "\n")
    return folder


def sides(out: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for side in ("train", "validation"):
        files = sorted((out / side).rglob("part-*.jsonl.zst"))
        data = b"".join(zstandard.ZstdDecompressor().decompressobj().decompress(file.read_bytes()) for file in files)
        found[side] = [json.loads(line) for line in data.splitlines()]
    return found


def test_near_duplicates_are_on_one_side(inputs: Path, tmp_path: Path, run_command: RunCommand) -> None:
    out = tmp_path / "out"
    command = ("split", inputs, "--validation", f"{SHARE:.0%}", "--out", out)
    code, shown, err = run_command(*command, "--workers", 1)
    assert code == 0, err
    found = sides(out)
    groups = {side: {record["group"] for record in records} for side, records in found.items()}
    assert not groups["train"] & groups["validation"]
    assert len(groups["train"] | groups["validation"]) == NUM_GROUPS
    assert sum(map(len, found.values())) == 3 * NUM_GROUPS
    assert abs(len(groups["validation"]) - SHARE * NUM_GROUPS) < 4 * np.sqrt(SHARE * (1 - SHARE) * NUM_GROUPS)
    assert f"{out / 'validation'}: {len(found['validation'])} documents" in shown
    assert run_command(*command, "--workers", 1)[:2] == (0, shown)  # it is there already
    assert run_command(*command[:3], "1%", *command[4:])[0] == 2
    assert not (out / ".work").exists()


def test_exact_copies_are_on_one_side(inputs: Path, tmp_path: Path, run_command: RunCommand) -> None:
    out = tmp_path / "out"
    options = ("--validation", SHARE, "--out", out, "--workers", 1)
    assert run_command("split", inputs, *options, "--method", "exact")[0] == 0
    found = sides(out)
    texts = {side: {record["text"] for record in records} for side, records in found.items()}
    assert not texts["train"] & texts["validation"]
    assert len(texts["train"] | texts["validation"]) == 2 * NUM_GROUPS


def test_a_dataset_is_split_like_its_texts(
    inputs: Path, tmp_path: Path, tokenizer_path: Path, run_command: RunCommand
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    options = ("--tokenizer", tokenizer_path, "--out", data, "--workers", 1, "--shard-tokens", 20_000)
    assert run_command("tokenize", inputs, *options)[0] == 0
    assert run_command("split", inputs, "--validation", SHARE, "--out", tmp_path / "text", "--workers", 1)[0] == 0
    code, shown, err = run_command("split", data, "--validation", SHARE, "--out", out, "--workers", 1)
    assert code == 0, err
    whole, texts = open_dataset(data), sides(tmp_path / "text")
    tokens = 0
    for side in texts:
        dataset = open_dataset(out / side)
        ids = [dataset.document_info(k).id for k in range(dataset.num_documents)]
        assert sorted(ids) == sorted(record["id"] for record in texts[side])
        assert run_command("verify", out / side)[0] == 0
        assert f"{dataset.num_tokens} tokens" in shown
        tokens += dataset.num_tokens
        by_id = {whole.document_info(k).id: k for k in range(whole.num_documents)}
        for k in (0, dataset.num_documents - 1):
            assert np.array_equal(dataset.document(k), whole.document(by_id[ids[k]]))
    assert tokens == whole.num_tokens


@pytest.mark.sample(1)
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["texts", "dataset"])
def test_any_number_of_workers_splits_alike(
    kind: str, inputs: Path, tmp_path: Path, tokenizer_path: Path, run_command: RunCommand
) -> None:
    source = inputs
    if kind == "dataset":
        source = tmp_path / "data"
        options = ("--tokenizer", tokenizer_path, "--out", source, "--workers", 1, "--shard-tokens", 20_000)
        assert run_command("tokenize", inputs, *options)[0] == 0
    made = []
    for workers in (1, 2):
        out = tmp_path / f"out{workers}"
        assert run_command("split", source, "--validation", SHARE, "--out", out, "--workers", workers)[0] == 0
        made.append({path: data for path, data in folder_bytes(out).items() if ".report" not in str(path)})
    assert made[0] == made[1]


@pytest.mark.parametrize("share", ["0", "1", "100%", "a tenth", "-1%", "nan"])
def test_a_share_that_cannot_be_is_refused(share: str, inputs: Path, tmp_path: Path, run_command: RunCommand) -> None:
    code, _, err = run_command("split", inputs, f"--validation={share}", "--out", tmp_path / "out")
    assert code == 2
    assert f"--validation {share} should be a share of the documents" in err


def test_a_side_without_documents_is_refused(inputs: Path, tmp_path: Path, run_command: RunCommand) -> None:
    options = ("--validation", "0.0000001%", "--out", tmp_path / "out", "--workers", 1)
    code, _, err = run_command("split", inputs, *options)
    assert code == 3
    assert "No document would be on the side of validation: there are 900 in all" in err
