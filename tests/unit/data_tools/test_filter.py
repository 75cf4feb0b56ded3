"""What filter promises: datatrove's decisions, each drop with its reason, the same bytes whoever does the work."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import orjson
import pytest
import zstandard
from clean_samples import WHOLE, read_records, real_paragraphs, run_filter, write_records
from data_samples import RunCommand, folder_bytes

from data_tools.clean.filter import choose_filters
from data_tools.clean.filters import (
    C4Quality,
    Document,
    Filter,
    GopherQuality,
    GopherRepetition,
    Language,
    find_function,
)
from data_tools.clean.words import count_sentences, split_words
from megatrain.errors import ConfigError, DataError

PEER_DECISIONS = Path(__file__).parent / "filter_decisions.jsonl.zst"
"""Real documents with datatrove 0.10.1's decisions; written by benchmarks/filters.py --fixture."""

PROSE = (
    "The house stood at the end of the lane, and nobody had lived in it for years. People said that it was haunted, "
    "but they say that of every empty house. When the new owners came to look at it, they found the roof whole and the "
    "floors dry. They decided to stay with it for the winter. In spring they would be sure of what to do."
)


@pytest.mark.parametrize("name", ["gopher_quality", "gopher_repetition", "c4_quality"])
def test_decisions_are_those_of_datatrove(name: str) -> None:
    data = zstandard.ZstdDecompressor().decompress(PEER_DECISIONS.read_bytes())
    rows = [orjson.loads(line) for line in data.splitlines()]
    ours: Filter = {"gopher_quality": GopherQuality(), "gopher_repetition": GopherRepetition()}.get(name, C4Quality())
    same = [(ours.reason(Document(row["text"])) is None) == row["kept"][name] for row in rows]
    num_kept = sum(row["kept"][name] for row in rows)
    assert 0.1 < num_kept / len(rows) < 0.9
    assert sum(same) / len(same) >= 0.99


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("length", "", "too short"),
        ("symbol_ratio", "{}[]();;,,..--++ a 1234567890", "too many symbols"),
        ("language", "Das Haus stand am Ende der Gasse, und seit Jahren hatte niemand darin gewohnt.", "language de"),
        ("language", " ", "no text"),
        ("gopher_quality", "too short", "too few words"),
        ("gopher_quality", "a b c d e the and " * 10, "mean word length"),
        ("gopher_quality", PROSE + " #" * 30, "too many hash signs"),
        ("gopher_quality", PROSE + " wait..." * 30, "too many ellipses"),
        ("gopher_quality", "\n".join(f"- {line}." for line in PROSE.split(".")), "too many lines with bullets"),
        ("gopher_quality", PROSE + " 12345" * 60, "too few words with letters"),
        ("gopher_quality", "lorem ipsum dolor sit amet consectetur " * 20, "too few stop words"),
        ("gopher_repetition", "", "empty"),
        ("gopher_repetition", f"{PROSE}\n\n{PROSE}", "duplicate paragraphs"),
        ("gopher_repetition", f"{PROSE}\n{PROSE}", "duplicate lines"),
        ("gopher_repetition", "so it was that " * 30, "most frequent 2-gram"),
        ("c4_quality", "One two three. Four. Five six. Seven.", "too few sentences"),
        ("c4_quality", PROSE + " {x}.", "curly bracket"),
        ("c4_quality", PROSE + " Lorem ipsum.", "lorem ipsum"),
    ],
)
def test_each_rule_gives_its_reason(name: str, text: str, reason: str) -> None:
    chosen = choose_filters(name, None)[name]
    assert (chosen.reason(Document(text)) or "kept").startswith(reason)


@pytest.mark.parametrize(
    "name", ["length", "symbol_ratio", "language", "gopher_quality", "gopher_repetition", "c4_quality"]
)
def test_plain_prose_passes_every_filter(name: str) -> None:
    assert choose_filters(name, None)[name].reason(Document(PROSE)) is None


def test_languages_are_told_apart() -> None:
    keep_french = Language(keep=("fr",))
    assert keep_french.reason(Document("La maison se trouvait au bout de la ruelle, et personne n'y habitait.")) is None
    assert keep_french.reason(Document(PROSE)) == "language en"


def test_words_and_sentences_are_those_of_spacy() -> None:
    text = (
        "Don't stop (e.g. at 5km/h), Mr. O'Neil's well-known U.S. e-mail: a.b@c.org... it's $5.00!\nIs it? \"Yes.\" So."
    )
    expected = (
        "Do n't stop ( e.g. at 5 km/h ) , Mr. O'Neil 's well - known U.S. e - mail : a.b@c.org ... it 's $ 5.00 ! "
        'Is it ? " Yes . " So .'
    )
    assert split_words(text) == expected.split(" ")
    assert count_sentences(text) == 4


def test_the_first_reason_counts_and_is_reported(tmp_path: Path) -> None:
    texts = [PROSE, "short", f"{PROSE}\n\n{PROSE}", "", PROSE.replace("winter", "summer")]
    source = write_records(tmp_path / "a.jsonl", texts, metadata={"lang": "en"})
    report = run_filter(source, tmp_path / "out", "gopher_quality,gopher_repetition")
    records = read_records(tmp_path / "out")
    assert [record["id"] for record in records] == ["d0", "d4"]
    assert records[1]["metadata"] == {"lang": "en", "provenance": {"file": str(source), "row": 4}}
    assert {reason: found["documents"] for reason, found in report["reasons"].items()} == {
        "gopher_quality: too few words": 2,
        "gopher_repetition: duplicate paragraphs": 1,
    }
    example = report["reasons"]["gopher_repetition: duplicate paragraphs"]["examples"][0]
    assert (example["id"], example["row"], example["text"]) == ("d2", 2, PROSE[:200])


def test_workers_and_compression_change_no_document(tmp_path: Path) -> None:
    texts = real_paragraphs(400, 80)
    source = write_records(tmp_path / "a.jsonl", [text[: 40 + 13 * k] for k, text in enumerate(texts)])
    names = "length,gopher_quality,gopher_repetition,language"
    run_filter(source, tmp_path / "one", names, workers=1, part_bytes=20_000)
    run_filter(source, tmp_path / "three", names, workers=3, part_bytes=20_000)
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "three")
    kept = {record["id"] for record in read_records(tmp_path / "one")}
    assert 50 < len(kept) < 400
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(source.read_bytes()))
    run_filter(tmp_path / "b.jsonl.gz", tmp_path / "gz", names, part_bytes=20_000)
    assert {record["id"] for record in read_records(tmp_path / "gz")} == kept


def test_text_files_are_documents_with_their_own_place(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.txt").write_text(PROSE + str(number))
    (folder / "empty.txt").write_text("")
    run_filter(folder, tmp_path / "out", "length")
    records = read_records(tmp_path / "out")
    assert [record["source"] for record in records] == [str(folder / f"{number}.txt") for number in range(5)]
    assert {record["metadata"]["provenance"]["row"] for record in records} == {0}


def test_a_broken_record_names_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n\n{"text": 5}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 3: 'text' should be text"):
        run_filter(tmp_path / "a.jsonl", tmp_path / "out", "length", read=WHOLE)


def test_parameters_come_from_a_file_and_are_checked(tmp_path: Path, run_command: RunCommand) -> None:
    source = write_records(tmp_path / "a.jsonl", ["four", "fives", "sixsix"])
    config = tmp_path / "filters.yaml"
    config.write_text(
        "length: {min_characters: 5, max_characters: 5}\nlanguage: {keep: [en, nl, la], min_probability: 0}\n"
    )
    assert choose_filters(None, config)["length"] == choose_filters("length", None)["length"].model_copy(
        update={"min_characters": 5, "max_characters": 5}
    )
    config.write_text("length: {min_characters: 5, max_characters: 5}\n")
    code, shown, _ = run_command("filter", source, "--out", tmp_path / "out", "--config", config)
    assert code == 0 and "length: too short: 1" in shown and "length: too long: 1" in shown
    for text, message in [
        ("length: {min_character: 5}", "length.min_character"),
        ("length: {min_characters: many}", "length.min_characters"),
        ("lengths:", "no filter 'lengths'"),
        ("- length", "names of filters as keys"),
        ("a: [", "no YAML"),
        (
            "length: {min_characters: 5}\nlength: {max_characters: 9}",
            "line 2, column 1: no YAML: the key 'length'",
        ),
        ("length: {min_characters: 5, min_characters: 6}", "the key 'min_characters' stands twice"),
    ]:
        config.write_text(text)
        code, _, error = run_command("filter", source, "--out", tmp_path / "other", "--config", config)
        assert code == 2 and message in error and "Traceback" not in error
    assert run_command("filter", source, "--out", tmp_path / "other")[0] == 2
    with pytest.raises(ConfigError, match="names length twice"):
        choose_filters("length,language, length", None)
    with pytest.raises(ConfigError, match="no filter 'gopher'"):
        choose_filters("gopher", None)


def test_hostile_texts_take_no_quadratic_time() -> None:
    for text in ("(" * 60_000, "a:" * 30_000, ":/@." * 15_000, "." * 60_000, "a.b," * 15_000, "\n" * 60_000):
        for name in ("gopher_quality", "gopher_repetition", "c4_quality", "symbol_ratio", "language"):
            choose_filters(name, None)[name].reason(Document(text))


OWN = """
def keep_short(text, limit=5):
    return len(text) <= limit

def name_reason(text):
    return "has an x" if "x" in text else True

def broken(text):
    return None

LIMIT = 5
"""


def test_a_function_of_ones_own_filters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_command: RunCommand
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own_filters.py").write_text(OWN)
    source = write_records(tmp_path / "a.jsonl", ["four", "sixsix", "a x", "longest", "y"] * 50)
    (tmp_path / "f.yaml").write_text("own_filters:keep_short: {limit: 6}\nown_filters:name_reason:\n")
    options = ("--config", tmp_path / "f.yaml", "--workers", 2)
    code, shown, error = run_command("filter", source, "--out", tmp_path / "out", *options)
    assert (code, error.count("Traceback")) == (0, 0)
    assert "own_filters:keep_short: dropped: 50" in shown and "own_filters:name_reason: has an x: 100" in shown
    assert {record["text"] for record in read_records(tmp_path / "out")} == {"four", "y"}
    (tmp_path / "own_filters.py").write_text(OWN.replace("<=", "<"))
    find_function.cache_clear()
    code, _, error = run_command("filter", source, "--out", tmp_path / "out", *options)
    assert (code, "made from other inputs or with other options" in error) == (2, True)
    for name, ended, message in [
        ("own_filters:missing", 2, "no attribute 'missing'"),
        ("no_such_module:f", 2, "No module named 'no_such_module'"),
        ("own_filters:LIMIT", 2, "is no function but 5"),
        ("own_filters:broken", 3, "returned None. It should return True"),
    ]:
        code, _, error = run_command("filter", source, "--out", tmp_path / "other", "--filters", name, "--workers", 1)
        assert (code, message in error, "Traceback" in error) == (ended, True, False), error
    (tmp_path / "f.yaml").write_text("own_filters:keep_short: {limits: 6}\n")
    code, _, error = run_command("filter", source, "--out", tmp_path / "more", *options)
    assert code == 2 and "unexpected keyword argument 'limits'" in error
