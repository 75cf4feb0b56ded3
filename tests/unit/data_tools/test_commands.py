"""The commands around tokenising: corpus, train-tokenizer, inspect, verify, and the command line itself."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
import zstandard
from data_samples import WRITERS, Document, MakeDataset, RunCommand
from tokenizers import Tokenizer

from data_tools.progress import show_progress
from data_tools.tokenizer import train_tokenizer
from data_tools.units import ReadOptions


@pytest.fixture
def dataset_path(tmp_path: Path, documents: list[Document], make_dataset: MakeDataset) -> Path:
    WRITERS["a.jsonl"](tmp_path / "a.jsonl", documents)
    make_dataset(tmp_path / "a.jsonl", tmp_path / "dataset", shard_tokens=4_000)
    return tmp_path / "dataset"


def test_inspect_prints_the_keys_users_rely_on(dataset_path: Path, run_command: RunCommand) -> None:
    code, out, err = run_command("inspect", dataset_path, "--json")
    assert (code, err) == (0, "")
    shown = orjson.loads(out)
    assert {"documents", "tokens", "dtype", "digest", "tokenizer_sha256", "eod_id", "shards"} <= set(shown)
    assert len(shown["shards"]) > 1
    for shard in shown["shards"]:
        assert {"file", "documents", "tokens", "bytes"} <= set(shard)
        assert (dataset_path / shard["file"]).stat().st_size == shard["bytes"]
    assert sum(shard["tokens"] for shard in shown["shards"]) == shown["tokens"]
    assert sum(shard["documents"] for shard in shown["shards"]) == shown["documents"]
    assert "document" not in shown


def test_inspect_shows_text_beside_tokens(
    dataset_path: Path, run_command: RunCommand, documents: list[Document]
) -> None:
    kept = [text for _, text in documents if text]
    k = next(k for k, text in enumerate(kept) if "\0" in text)
    code, out, _ = run_command("inspect", dataset_path, "--document", k)
    assert code == 0
    assert "\\u0000\\u0001\\u007f\\u0080" in out
    assert "\0" not in out
    _, out, _ = run_command("inspect", dataset_path, "--document", k, "--json")
    assert orjson.loads(out)["document"]["text"] == kept[k]


@pytest.mark.parametrize("k", [-1, 10**9])
def test_a_missing_document_exits_2(dataset_path: Path, run_command: RunCommand, k: int) -> None:
    code, _, err = run_command("inspect", dataset_path, "--document", k)
    assert code == 2
    assert str(k) in err


def test_verify_passes_a_whole_dataset(dataset_path: Path, run_command: RunCommand) -> None:
    code, out, _ = run_command("verify", dataset_path)
    assert code == 0
    assert "is whole" in out


def test_one_flipped_bit_names_its_file(dataset_path: Path, run_command: RunCommand) -> None:
    rng = random.Random(0)
    for path in sorted(dataset_path.iterdir()):
        data = path.read_bytes()
        positions = [0, len(data) - 1, *(rng.randrange(len(data)) for _ in range(6))]
        for position in positions:
            flipped = bytearray(data)
            flipped[position] ^= 1 << rng.randrange(8)
            path.write_bytes(flipped)
            code, _, err = run_command("verify", dataset_path)
            assert code == 3, (path.name, position)
            assert path.name in err
            assert "Traceback" not in err
        path.write_bytes(data)
    assert run_command("verify", dataset_path)[0] == 0


def test_damaged_tokens_are_located_by_batch_and_document(dataset_path: Path, run_command: RunCommand) -> None:
    path = dataset_path / "shard-000000.arrow"
    data = bytearray(path.read_bytes())
    position = len(data) // 3
    data[position] ^= 1
    path.write_bytes(data)
    _, _, err = run_command("verify", dataset_path)
    first, last = (int(word) for word in err.split("tokens in bytes ")[1].split(")")[0].split(" to "))
    assert first <= position < last
    assert "record batch 0: document " in err


def test_files_that_are_missing_or_swapped_are_found(dataset_path: Path, run_command: RunCommand) -> None:
    for name in ("tokenizer.json", "shards.arrow", "shard-000001.arrow", "manifest.json"):
        kept = (dataset_path / name).read_bytes()
        (dataset_path / name).unlink()
        code, _, err = run_command("verify", dataset_path)
        assert code == 3
        assert name in err
        (dataset_path / name).write_bytes(kept)
    shutil.copy(dataset_path / "shard-000000.arrow", dataset_path / "shard-000001.arrow")
    assert run_command("verify", dataset_path)[0] == 3


@pytest.mark.slow
def test_the_corpus_is_real_text_split_by_name(tmp_path: Path, run_command: RunCommand) -> None:
    assert run_command("corpus", tmp_path / "one")[0] == 0
    texts: dict[str, dict[str, str]] = {}
    for name in ("code", "code-val", "prose", "prose-val"):
        stream = zstandard.ZstdDecompressor().stream_reader((tmp_path / "one" / f"{name}.jsonl.zst").read_bytes())
        records = [orjson.loads(line) for line in stream.read().splitlines()]
        texts[name] = {record["id"]: record["text"] for record in records}
        ids = [record["id"] for record in records if name.startswith("code")]
        assert ids == sorted(ids)
    assert not set(texts["code"]) & set(texts["code-val"])
    assert not set(texts["prose"]) & set(texts["prose-val"])
    assert "json/decoder.py" in {**texts["code"], **texts["code-val"]}
    assert sum(map(len, texts["code"].values())) > 5_000_000
    assert sum(map(len, texts["prose"].values())) > 1_000_000
    assert all(sum(map(len, texts[name].values())) > 10_000 for name in ("code-val", "prose-val"))


def test_trained_tokenizers_know_every_byte_and_are_reproducible(
    tmp_path: Path, documents: list[Document], tokenizer_path: Path, run_command: RunCommand
) -> None:
    WRITERS["a.jsonl"](tmp_path / "a.jsonl", documents)
    train_tokenizer([str(tmp_path / "a.jsonl")], 600, tmp_path / "again.json", ReadOptions())
    assert (tmp_path / "again.json").read_bytes() == tokenizer_path.read_bytes()
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    assert tokenizer.get_vocab_size() == 600
    every_character = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x10000, 7), 0x10FFFF]))
    assert tokenizer.decode(tokenizer.encode(every_character).ids) == every_character
    (tmp_path / "tiny.txt").write_text("aaaa")
    code, out, err = run_command(
        "train-tokenizer", tmp_path / "tiny.txt", "--vocab-size", 5000, "--out", tmp_path / "t"
    )
    assert code == 0
    assert "no more pairs" in err
    assert "tokens" in out


def test_a_sample_is_of_all_the_input(tmp_path: Path, run_command: RunCommand) -> None:
    """40 MB in two files, of which the compressed one is read from its start."""
    texts = [f"{chr(97 + number // 1000) * 9} " * 220 for number in range(20_000)]
    lines = [orjson.dumps({"text": text}) + b"\n" for text in texts]
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines[:18_000]))
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(b"".join(lines[18_000:])))
    made = []
    for out in ("t1.json", "t2.json"):
        options = ("--vocab-size", 400, "--out", tmp_path / out, "--sample-bytes", 2_000_000)
        code, _, err = run_command("train-tokenizer", tmp_path / "a.jsonl", tmp_path / "b.jsonl.zst", *options)
        assert code == 0
        assert "Training on a sample of 2.00 MB of some 39." in err
        assert "takes some 214 MB of memory, of " in err
        made.append((tmp_path / out).read_bytes())
    assert made[0] == made[1]
    words = {word.strip("Ġ") for word in orjson.loads(made[0])["model"]["vocab"]}
    assert {letter * 9 for letter in "acegikmoq"} <= words


def test_training_says_how_much_memory_it_takes(tmp_path: Path, run_command: RunCommand) -> None:
    (tmp_path / "a.txt").write_text("some words " * 1000)
    options = ("--vocab-size", 260, "--out", tmp_path / "t.json")
    _, _, err = run_command("train-tokenizer", tmp_path / "a.txt", *options)
    assert "Training on some 11.0 kB of text takes some 200 MB of memory, of " in err
    assert "All text is read; the merges are being found." in err


def test_help_is_quick_without_torch_or_arrow() -> None:
    script = (
        "import sys\n"
        "sys.argv = ['megatrain-data', '--help']\n"
        "from data_tools.cli import main\n"
        "try:\n    main()\n"
        "finally:\n"
        "    heavy = {'torch', 'pyarrow', 'numpy', 'tokenizers'} & set(sys.modules)\n"
        "    assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in ("corpus", "train-tokenizer", "tokenize", "dedup", "filter", "inspect", "stats", "verify"):
        assert command in done.stdout


def test_a_closed_output_pipe_is_no_error(dataset_path: Path) -> None:
    command = [sys.executable, "-m", "data_tools", "inspect", str(dataset_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.wait()


def test_progress_is_told_from_the_first_bytes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("data_tools.progress.LOG_SECONDS", 0.0)
    with show_progress("verify", 4_000_000) as advance:
        advance(0)  # a damaged part, of which nothing could be read, say
        assert capsys.readouterr().err == ""
        advance(1_000_000)
    assert "verify: 25% of 4.00 MB" in capsys.readouterr().err
