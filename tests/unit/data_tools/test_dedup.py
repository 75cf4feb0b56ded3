"""What dedup promises: the first of each stays, near duplicates are found, the same bytes whoever does the work."""

from __future__ import annotations

import os
import random
import resource
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from clean_samples import (
    WHOLE,
    jaccard,
    near_duplicate,
    read_records,
    real_paragraphs,
    run_dedup,
    silent,
    write_records,
)
from data_samples import RunCommand, folder_bytes

from data_tools.clean import attributes, candidates, clusters
from data_tools.clean import dedup as dedup_module
from data_tools.clean.attributes import Documents
from data_tools.clean.candidates import Matching
from data_tools.clean.clusters import find_roots, unite
from data_tools.clean.dedup import DedupOptions, dedup
from data_tools.clean.report import render
from data_tools.clean.sketch import MinHashSketch
from data_tools.executors import Advance
from data_tools.job import Effort
from data_tools.units import ReadOptions
from megatrain.errors import ConfigError, DataError

HOSTILE = ["", "x", "x", "", "!!!", "!!!", "one two", "two one", "你好吗", "你好吗", "(" * 50_000, "word " * 200_000]


def dropped(out: Path) -> list[dict[str, object]]:
    tables = [pa.ipc.open_file(str(path)).read_all() for path in sorted((out / ".report").glob("dropped-*.arrow"))]
    return list(pa.concat_tables(tables).to_pylist())


def test_exact_keeps_first_documents_and_locates_the_others(tmp_path: Path) -> None:
    texts = ["a b c", "A b c", "a b c", "a  b c", "a b c", "z"]
    source = write_records(tmp_path / "a.jsonl", texts, url="u", metadata={"n": 1}, added="2024")
    report = run_dedup(source, tmp_path / "out")
    records = read_records(tmp_path / "out")
    assert [record["id"] for record in records] == ["d0", "d1", "d3", "d5"]
    assert records[2] == {
        "text": "a  b c",
        "id": "d3",
        "source": str(source),
        "url": "u",
        "added": "2024",
        "metadata": {"n": 1, "provenance": {"file": str(source), "row": 3}},
    }
    assert [(each["id"], each["row"], each["kept_id"], each["kept_row"]) for each in dropped(tmp_path / "out")] == [
        ("d2", 2, "d0", 0),
        ("d4", 4, "d0", 0),
    ]
    assert (report["documents"], report["kept"], report["clusters"]) == (6, 4, {"3": 1})
    example = report["reasons"]["exact duplicate"]["examples"][0]
    assert example["kept"]["id"] == "d0" and example["text"] == "a b c"


@pytest.mark.parametrize("num_planted", [150, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.acceptance])])
def test_near_duplicates_are_found_and_hardly_anything_else(num_planted: int, tmp_path: Path) -> None:
    originals = real_paragraphs(3 * num_planted, 400)
    assert len(set(originals)) == len(originals)
    drawn = random.Random(2)
    planted = {f"d{len(originals) + k}": near_duplicate(originals[k], 0.8, drawn) for k in range(num_planted)}
    similarities = [jaccard(originals[k], text) for k, text in enumerate(planted.values())]
    assert min(similarities) > 0.78
    assert max(similarities) < 0.82
    texts = [*originals, *planted.values()]
    source = write_records(tmp_path / "a.jsonl", texts)
    run_dedup(source, tmp_path / "one", "minhash", workers=1, part_bytes=1 << 20)
    kept = {record["id"] for record in read_records(tmp_path / "one")}
    assert len(planted.keys() - kept) >= 0.95 * num_planted
    assert len({f"d{k}" for k in range(len(originals))} - kept) <= 0.005 * len(originals)
    run_dedup(source, tmp_path / "three", "minhash", workers=3, part_bytes=1 << 20)
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "three")


@pytest.mark.parametrize("method", ["exact", "minhash"])
def test_run_and_slice_sizes_change_no_byte(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    originals = real_paragraphs(300, 120)
    drawn = random.Random(4)
    texts = [*originals, *(near_duplicate(text, 0.9, drawn) for text in originals[::3]), *originals[::2], *HOSTILE]
    source = write_records(tmp_path / "a.jsonl", texts)
    options = {"num_permutations": 48} if method == "minhash" else {}
    report = run_dedup(source, tmp_path / "whole", method, **options)
    assert report["dropped"] > (230 if method == "minhash" else 150)
    monkeypatch.setattr(dedup_module, "MAX_RUN_DOCUMENTS", 37)
    monkeypatch.setattr(dedup_module, "SLICE_DOCUMENTS", 100)
    sizes = {
        "COMPARED_AT_ONCE": 7,
        "BATCH_DOCUMENTS": 10,
        "GROUPS_OF_KEY": 2,
        "MAPPED_FILES": 3,
        "JOINED_DOCUMENTS": 90,
    }
    for name, value in sizes.items():
        monkeypatch.setattr(candidates, name, value)
    monkeypatch.setattr(attributes, "BATCH_DOCUMENTS", 10)
    monkeypatch.setattr(clusters, "BLOCK_DOCUMENTS", 50)
    run_dedup(source, tmp_path / "pieces", method, **options)
    assert folder_bytes(tmp_path / "whole") == folder_bytes(tmp_path / "pieces")


def test_identical_documents_are_compared_with_the_first_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = 3000
    source = write_records(tmp_path / "a.jsonl", ["the same text for all of them, again and again"] * copies)
    compared = []

    def count(matching: Matching, first: Documents, second: Documents) -> npt.NDArray[np.bool_]:
        compared.append(len(first))
        return are_duplicates(matching, first, second)

    are_duplicates = Matching.are_duplicates
    monkeypatch.setattr(Matching, "are_duplicates", count)
    sketch = MinHashSketch(num_permutations=64)
    assert run_dedup(source, tmp_path / "out", "minhash", num_permutations=64)["clusters"] == {str(copies): 1}
    assert sum(compared) == sketch.num_keys * (copies - 1)


def test_empty_tiny_huge_and_wordless_documents_are_handled(tmp_path: Path) -> None:
    source = write_records(tmp_path / "a.jsonl", [*HOSTILE, "w" * 5_000_000, "w" * 5_000_000])
    for method in ("exact", "minhash"):
        run_dedup(source, tmp_path / method, method)
        kept = [record["id"] for record in read_records(tmp_path / method)]
        assert kept == ["d0", "d1", "d4", "d6", "d7", "d8", "d10", "d11", "d12"]


def test_table_columns_are_kept_and_missing_ids_derived(tmp_path: Path) -> None:
    table = pa.table({"content": ["a", "b", "a"], "text": [1, 2, 3], "when": pa.array([0, 1, 2], pa.timestamp("s"))})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    effort = Effort(1, silent, 1000)
    options = DedupOptions(ReadOptions("content", whole_records=True))
    dedup([str(tmp_path / "a.parquet")], tmp_path / "out", options, effort, False)
    first, second = read_records(tmp_path / "out")
    assert first["text"] == "a" and first["when"].startswith("1970-01-01")
    assert second["id"] == f"{tmp_path / 'a.parquet'}:1"
    assert second["metadata"] == {"text": 2, "provenance": {"file": str(tmp_path / "a.parquet"), "row": 1}}


def test_finished_work_survives_a_broken_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = tmp_path / "in"
    inputs.mkdir()
    write_records(inputs / "a.jsonl", ["one", "two", "one"])
    (inputs / "b.jsonl").write_bytes(b'{"text": "three"}\n{"text": \n')
    with pytest.raises(DataError, match=r"b\.jsonl, line 2: bad JSON"):
        run_dedup(inputs, tmp_path / "out", part_bytes=4)
    tagged = list((tmp_path / "out" / ".work" / "attributes").rglob("*.arrow"))
    assert tagged
    (inputs / "b.jsonl").write_bytes(b'{"text": "three"}\n')
    with pytest.raises(ConfigError, match="method"):
        run_dedup(inputs, tmp_path / "out", "minhash", part_bytes=4)
    before = set(tagged)
    tagged_again = []
    read = attributes.Tagging.read

    def note(tagging: attributes.Tagging, number: int, advance: Advance) -> None:
        tagged_again.append(tagging.commit(number))
        read(tagging, number, advance)

    monkeypatch.setattr(attributes.Tagging, "read", note)
    assert run_dedup(inputs, tmp_path / "out", part_bytes=4)["kept"] == 3
    assert tagged_again and not before & set(tagged_again)
    assert not (tmp_path / "out" / ".work").exists()


def test_a_finished_folder_is_replaced_only_on_request(tmp_path: Path) -> None:
    source = write_records(tmp_path / "a.jsonl", ["one", "two", "one"])
    first = run_dedup(source, tmp_path / "out")
    before = folder_bytes(tmp_path / "out")
    assert run_dedup(source, tmp_path / "out") == first
    with pytest.raises(ConfigError, match="--restart"):
        run_dedup(source, tmp_path / "out", "minhash")
    assert folder_bytes(tmp_path / "out") == before
    (tmp_path / "out" / "mine.txt").write_text("a user's own")
    with pytest.raises(ConfigError, match="other things in it"):
        run_dedup(source, tmp_path / "out", "minhash", restart=True)
    (tmp_path / "out" / "mine.txt").unlink()
    write_records(tmp_path / "a.jsonl", ["one", "two", "one", "three"])
    assert run_dedup(source, tmp_path / "out", restart=True)["kept"] == 3


def test_dedup_output_feeds_tokenize_and_dedup_again(
    tmp_path: Path, run_command: RunCommand, tokenizer_path: Path
) -> None:
    texts = real_paragraphs(20, 50)
    source = write_records(tmp_path / "a.jsonl", [*texts, *texts[:5]])
    code, shown, _ = run_command("dedup", source, "--out", tmp_path / "out", "--workers", 2)
    assert code == 0 and "Kept: 20" in shown and "kept " in shown and "id d0" in shown
    code, shown, _ = run_command("tokenize", tmp_path / "out", "--tokenizer", tokenizer_path, "--out", tmp_path / "ds")
    assert code == 0 and "20 documents" in shown
    assert run_command("dedup", tmp_path / "out", "--out", tmp_path / "again", "--method", "minhash")[0] == 0
    assert read_records(tmp_path / "again") == read_records(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--threshold", "1.5", "--method", "minhash"], 2, "--threshold 1.5 should be from 0.1 to 1"),
        (["--num-permutations", "3", "--method", "minhash"], 2, "--num-permutations 3 should be"),
        (["--ngram", "0", "--method", "minhash"], 2, "--ngram 0 should be"),
        (["--threshold", "0.9"], 2, "--threshold would do nothing: it is for near duplicates, --method minhash"),
        (["--ngram", "5", "--num-permutations", "256"], 2, "--num-permutations, --ngram would do nothing"),
        (["--text-key", "body"], 3, "no key 'body'"),
    ],
)
def test_wrong_options_end_with_their_code(
    options: list[str], code: int, message: str, tmp_path: Path, run_command: RunCommand
) -> None:
    source = write_records(tmp_path / "a.jsonl", ["one"])
    ended, _, error = run_command("dedup", source, "--out", tmp_path / "out", *options)
    assert (ended, "Traceback" in error) == (code, False)
    assert message in error


def test_an_occupied_folder_or_a_file_is_refused(tmp_path: Path, run_command: RunCommand) -> None:
    source = write_records(tmp_path / "a.jsonl", ["one"])
    assert run_command("dedup", source, "--out", tmp_path)[0] == 2
    assert run_command("dedup", source, "--out", source)[0] == 2
    assert run_command("dedup", tmp_path / "none.jsonl", "--out", tmp_path / "out")[0] == 3


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 1.0])
def test_bands_are_widest_that_find_99_percent(threshold: float) -> None:
    sketch = MinHashSketch(threshold)
    assert sketch.found_probability(threshold, sketch.rows_per_band) >= 0.99
    assert sketch.rows_per_band == 256 or sketch.found_probability(threshold, sketch.rows_per_band + 1) < 0.99


def test_estimates_are_those_of_the_jaccard_index() -> None:
    drawn = random.Random(3)
    sketch = MinHashSketch(num_permutations=512)
    errors = []
    for text in real_paragraphs(60, 400):
        other = near_duplicate(text, 0.7, drawn)
        column = sketch([text, other])["signature"].to_pylist()
        equal = sum(a == b for a, b in zip(*column, strict=True))
        errors.append(sketch.similarity(equal) - jaccard(text.lower(), other.lower()))
    assert abs(sum(errors) / len(errors)) < 0.03


def test_table_values_beyond_json_become_text(tmp_path: Path) -> None:
    moment = pa.array([1_700_000_000_123_456_789], pa.timestamp("ns"))
    columns = {
        "text": ["a"],
        "id": [b"\xff\x00"],
        "raw": [b"raw"],
        "blob": [b"\xff\x00"],
        "score": [float("nan")],
        "scores": [[1.5, float("inf"), float("-inf")]],
        "inner": [{"raw": b"\xff", "score": float("nan")}],
        "when": moment,
        "aware": moment.cast(pa.timestamp("ns", "UTC")),
        "whens": pa.ListArray.from_arrays([0, 1], moment),
        "whole": moment.cast(pa.timestamp("s"), safe=False),
        "time": pa.array([1], pa.time64("ns")),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", version="2.6")
    run_dedup(tmp_path / "a.parquet", tmp_path / "out")
    record = read_records(tmp_path / "out")[0]
    written = "2023-11-14 22:13:20.123456789"
    assert {key: record[key] for key in columns} == {
        "text": "a",
        "id": "/wA=",
        "raw": "raw",
        "blob": "/wA=",
        "score": "NaN",
        "scores": [1.5, "Infinity", "-Infinity"],
        "inner": {"raw": "/w==", "score": "NaN"},
        "when": written,
        "aware": f"{written}Z",
        "whens": [written],
        "whole": "2023-11-14T22:13:20",
        "time": "00:00:00.000000001",
    }


def test_chains_of_near_duplicates_are_told(tmp_path: Path, run_command: RunCommand) -> None:
    texts = [" ".join(f"w{word}" for word in range(first, first + 300)) for first in range(0, 600, 6)]
    source = write_records(tmp_path / "a.jsonl", [*texts, "alone"])
    code, shown, _ = run_command("dedup", source, "--out", tmp_path / "out", "--method", "minhash", "--workers", 1)
    assert (code, "Kept: 2 (2.0%)" in shown) == (0, True)
    assert "Least similar to the document that is kept instead: 0.0" in shown
    assert "dropped because others lie between:" in shown
    chains = orjson.loads((tmp_path / "out" / ".report" / "report.json").read_bytes())["chains"]
    dropped = int(chains["id"].removeprefix("d"))
    assert chains["least_similarity"] < 0.05 and jaccard(texts[0], texts[dropped]) < 0.05 and chains["kept_id"] == "d0"
    near = [text for text in texts[1:] if jaccard(texts[0], text) > 0.7]
    assert abs(chains["documents"] - (len(texts) - 1 - len(near))) <= 3
    source = write_records(tmp_path / "b.jsonl", ["x", "y"])
    assert run_dedup(source, tmp_path / "none", "minhash")["chains"] is None


def test_clusters_are_shown_by_their_size() -> None:
    report = {"documents": 20, "text_bytes": 0, "kept": 3, "kept_text_bytes": 0, "dropped": 17, "skipped": 0}
    clusters = {"11": 1, "14": 2, "2": 3}
    assert "Clusters by size: 3 of 2, 1 of 11, 2 of 14\n" in render({**report, "reasons": {}, "clusters": clusters})


def test_long_chains_are_joined_in_linear_time() -> None:
    def cpu_seconds(length: int) -> float:
        parents = np.arange(length, dtype=np.uint64)
        drawn = np.random.default_rng(1).permutation(length - 1).astype(np.uint64)
        started = time.process_time()
        for pairs in np.array_split(drawn, 10):
            unite(parents, pairs, pairs + np.uint64(1))
        assert not find_roots(parents, np.arange(length, dtype=np.uint64)).any()
        return time.process_time() - started

    assert min(cpu_seconds(240_000) for _ in range(3)) < 20 * min(cpu_seconds(30_000) for _ in range(3)) + 0.05


@pytest.mark.parametrize("bucket_documents", [1 << 21, 30])
def test_representatives_keep_what_is_unlike_them(
    bucket_documents: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_command: RunCommand
) -> None:
    monkeypatch.setattr(clusters, "BUCKET_DOCUMENTS", bucket_documents)
    texts = [" ".join(f"w{word}" for word in range(first, first + 300)) for first in range(0, 600, 6)]
    source = write_records(tmp_path / "a.jsonl", [*texts, texts[50], "alone"])
    options = ("--method", "minhash", "--cluster-by", "representative", "--workers", 1)
    code, shown, _ = run_command("dedup", source, "--out", tmp_path / "out", *options)
    assert (code, "dropped because others lie" in shown) == (0, False)
    report = orjson.loads((tmp_path / "out" / ".report" / "report.json").read_bytes())
    assert report["chains"]["documents"] == 0 and report["chains"]["least_similarity"] > 0.7
    kept = [record["text"] for record in read_records(tmp_path / "out")]
    assert 8 < len(kept) < 30 and kept[0] == texts[0] and kept[-1] == "alone" and len(set(kept)) == len(kept)
    similarities = [jaccard(a, b) for index, a in enumerate(kept) for b in kept[:index]]
    assert max(similarities) < 0.8
    by_id = {f"d{number}": text for number, text in enumerate([*texts, texts[50]])}
    for each in dropped(tmp_path / "out"):
        assert jaccard(by_id[str(each["id"])], by_id[str(each["kept_id"])]) > 0.65


@pytest.mark.slow
def test_more_runs_than_open_files_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dedup_module, "MAX_RUN_DOCUMENTS", 2)
    texts = [f"text number {number % 400}" for number in range(600)]
    source = write_records(tmp_path / "a.jsonl", texts)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        assert run_dedup(source, tmp_path / "out", part_bytes=60)["kept"] == 400
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_many_output_files_lie_in_numbered_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_records(tmp_path / "a.jsonl", [f"text number {number % 300}" for number in range(400)])
    monkeypatch.setattr(attributes, "TASK_BYTES", 1000)
    flat = run_dedup(source, tmp_path / "flat", part_bytes=60)
    monkeypatch.setattr(attributes, "FOLDER_FILES", 3)
    assert run_dedup(source, tmp_path / "folders", part_bytes=60) == flat
    for folder in (tmp_path / "folders", tmp_path / "folders" / ".report"):
        assert all(len(list(each.iterdir())) <= 3 for each in folder.glob("[0-9]*"))
        assert len(list(folder.glob("[0-9]*"))) > 1
    names = sorted((tmp_path / "folders").rglob("part-*"))
    assert [path.name for path in names] == sorted(path.name for path in (tmp_path / "flat").glob("part-*"))
    assert [path.read_bytes() for path in names] == [
        path.read_bytes() for path in sorted((tmp_path / "flat").glob("part-*"))
    ]
    assert run_dedup(source, tmp_path / "folders", part_bytes=60, restart=True) == flat
    assert run_dedup(tmp_path / "folders", tmp_path / "again", part_bytes=60)["documents"] == flat["kept"]


def test_other_documents_at_the_second_reading_are_noticed(tmp_path: Path) -> None:
    source = write_records(tmp_path / "a.jsonl", ["one", "two", "one", "three"])
    before = source.stat()

    def run(stage: str | None) -> dict[str, Any] | None:
        effort = Effort(1, silent, 100_000, stage=stage)
        return dedup([str(source)], tmp_path / "out", DedupOptions(WHOLE), effort, False)

    for stage in ("read", "index", "sort", "compare", "join", "cluster", "list", "tally"):
        assert run(stage) is None
    content = source.read_bytes()
    source.write_bytes(content.rpartition(b"\n{")[0].ljust(len(content) - 1) + b"\n")  # one document fewer
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DataError, match=r"a\.jsonl: not the same documents as when they were first read"):
        run(None)


def test_what_a_killed_write_left_harms_no_report(tmp_path: Path) -> None:
    source = write_records(tmp_path / "a.jsonl", ["one", "two", "one"])
    options, effort = DedupOptions(WHOLE), Effort(1, silent)
    for stage in ("read", "index", "sort", "compare", "join", "cluster", "list", "tally", "write"):
        assert dedup([str(source)], tmp_path / "out", options, replace(effort, stage=stage), False) is None
    (examples,) = tmp_path.glob("out/.work/of-*/examples")
    (examples / ".part-000000-000000.json.1-ab.tmp").touch()
    report = dedup([str(source)], tmp_path / "out", options, effort, False)
    assert report is not None and report["kept"] == 2
