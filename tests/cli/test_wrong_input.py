"""What a user can get wrong: the right exit code and a short message that names it, without a traceback."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from data_tools.tokenize import TokenizeOptions, tokenize
from data_tools.tokenizer import train_tokenizer
from data_tools.units import ReadOptions
from tests.cli.conftest import Megatrain
from tests.runs import TinyData, finished_config, tiny_config, write_config
from tests.served import ServedRanks
from tests.tiny_data import QUIET


class Place(NamedTuple):
    """What the cases refer to."""

    folder: Path
    config: Path
    run: Path
    data: TinyData


@pytest.fixture
def place(tiny_data: TinyData, finished_run: Path, tmp_path: Path) -> Place:
    config = write_config(tmp_path / "run.yaml", finished_config(tiny_data, tmp_path / "run"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.yaml").write_text("run: {dir: [")
    (tmp_path / "empty.yaml").touch()
    (tmp_path / "profiled").mkdir()
    (tmp_path / "profiled" / "profile.json").touch()
    shutil.copytree(tiny_data.prose, tmp_path / "unfinished")
    (tmp_path / "unfinished" / "manifest.json").unlink()
    torn = tmp_path / "torn" / "checkpoints" / "step-00000006"
    shutil.copytree(finished_run / "checkpoints" / "step-00000006", torn)
    (torn / "rank-00000.safetensors").write_bytes(b"")
    return Place(tmp_path, config, finished_run, tiny_data)


Arguments = Callable[[Place], list[object]]
USAGE: dict[str, tuple[Arguments, str]] = {
    "a prompt that is no text": (lambda p: ["generate", p.run, "--prompt", "a\udcff"], "--prompt"),
    "no such command": (lambda p: ["fly"], "fly"),
    "no config": (lambda p: ["train"], "CONFIG"),
    "a config that is not there": (lambda p: ["check", p.folder / "none.yaml"], "none.yaml"),
    "a folder for a config": (lambda p: ["check", p.folder], "is a folder"),
    "broken YAML": (lambda p: ["check", p.folder / "broken.yaml"], "broken.yaml"),
    "an empty config": (lambda p: ["check", p.folder / "empty.yaml"], "is empty"),
    "an unknown key": (lambda p: ["check", p.config, "train.stepz=5"], "train.steps"),
    "a wrong type": (lambda p: ["train", p.config, "train.steps=many"], "train.steps"),
    "an override without a value": (lambda p: ["check", p.config, "train.steps"], "train.steps"),
    "a layout that does not fit": (lambda p: ["check", p.config, "--procs", 3], "global_batch_size"),
    "ranks that do not divide": (lambda p: ["train", p.config, "--procs", 3], "global_batch_size"),
    "no ranks": (lambda p: ["train", p.config, "--procs", 0], "--procs"),
    "ranks said twice": (lambda p: ["check", p.config, "--procs", 2, "--nodes", 2], "--procs"),
    "no step to profile": (lambda p: ["profile", p.config, "--steps", 0], "--steps"),
    "a file for a profile": (lambda p: ["profile", p.config, "--out", p.config], "is a file"),
    "a layout that cannot be profiled": (lambda p: ["profile", p.config, "--procs", 3], "global_batch_size"),
    "a profile in the way": (lambda p: ["profile", p.config, "--out", p.folder / "profiled"], "holds a profile"),
    "no prompt": (lambda p: ["generate", p.run], "--prompt"),
    "a negative temperature": (lambda p: ["generate", p.run, "--prompt", "a", "--temperature", -1], "--temperature"),
    "a top-p of 0": (lambda p: ["generate", p.run, "--prompt", "a", "--top-p", 0], "top_p"),
    "too large a seed": (lambda p: ["generate", p.run, "--prompt", "a", "--seed", 2**70], "--seed"),
    "a window beyond the context": (lambda p: ["eval", p.run, "--data", p.data.prose, "--seq-len", 65], "--seq-len 65"),
    "too long a prompt": (lambda p: ["generate", p.run, "--prompt", "word " * 200], "64"),
    "an empty prompt": (lambda p: ["generate", p.run, "--prompt", ""], "prompt"),
    "no data to evaluate on": (lambda p: ["eval", p.run], "--data"),
    "an empty stop": (lambda p: ["generate", p.run, "--prompt", "a", "--stop", ""], "--stop"),
    "texts to no folder": (
        lambda p: ["generate", p.run, "--prompts", p.folder / "broken.yaml", "--out", p.folder / "gone" / "texts"],
        "there is no folder",
    ),
    "answers to no folder": (
        lambda p: ["eval", p.run, "--tasks", p.config, "--out", p.folder / "gone" / "answers"],
        "there is no folder",
    ),
    "answers to a folder": (lambda p: ["eval", p.run, "--tasks", p.config, "--out", p.folder], "is a folder"),
    "a window of tasks": (lambda p: ["eval", p.run, "--tasks", p.config, "--seq-len", 8], "--seq-len belongs to"),
    "tasks that are no list": (lambda p: ["eval", p.run, "--tasks", p.folder / "empty.yaml"], "all of it"),
}
DATA: dict[str, tuple[Arguments, str]] = {
    "a missing dataset": (lambda p: ["train", p.config, "data.train.0.path=nowhere"], "nowhere"),
    "a missing validation set": (lambda p: ["train", p.config, "data.validation.0.path=nowhere"], "nowhere"),
    "an unfinished dataset": (
        lambda p: ["train", p.config, f"data.train.0.path={p.folder / 'unfinished'}"],
        "unfinished",
    ),
    "a dataset that is none": (lambda p: ["eval", p.run, "--data", p.folder / "empty"], "empty"),
    "a report of nothing": (lambda p: ["report", p.folder / "empty"], "metrics.jsonl"),
    "a report of no folder": (lambda p: ["report", p.folder / "gone"], "gone"),
}
CHECKPOINTS: dict[str, tuple[Arguments, str]] = {
    "no such run": (lambda p: ["checkpoint", "list", p.folder / "gone"], "gone"),
    "a run without checkpoints": (lambda p: ["checkpoint", "list", p.folder / "empty"], "empty"),
    "inspect nothing": (lambda p: ["checkpoint", "inspect", p.folder / "empty"], "empty"),
    "verify nothing": (lambda p: ["checkpoint", "verify", p.folder / "gone"], "gone"),
    "verify a torn one": (lambda p: ["checkpoint", "verify", p.folder / "torn"], "rank-00000.safetensors"),
    "generate from nothing": (lambda p: ["generate", p.folder / "gone", "--prompt", "a"], "gone"),
    "generate from a torn one": (lambda p: ["generate", p.folder / "torn", "--prompt", "a"], "rank-00000.safetensors"),
    "generate from a dataset": (lambda p: ["generate", p.data.prose, "--prompt", "a"], "is a dataset"),
    "evaluate nothing": (lambda p: ["eval", p.folder / "gone", "--data", p.data.held_out], "gone"),
    "a model to begin from that is not there": (
        lambda p: ["train", p.config, f"run.init_from={p.folder / 'gone'}"],
        "run.init_from cannot be used",
    ),
    "weights of another model": (
        lambda p: ["train", p.config, f"run.init_from={p.run}", "model.rope_theta=5.0"],
        "model.rope_theta is 10000.0 there and 5.0 here",
    ),
    "weights of another model, checked": (
        lambda p: ["check", p.config, f"run.init_from={p.run}", "model.tie_word_embeddings=false"],
        "model.tie_word_embeddings is true there and false here",
    ),
    "a run folder that is a file": (lambda p: ["train", p.config, f"run.dir={p.config}"], "run.yaml"),
}
CASES = [
    pytest.param(code, arguments, named, id=name)
    for code, cases in ((2, USAGE), (3, DATA), (4, CHECKPOINTS))
    for name, (arguments, named) in cases.items()
]


@pytest.mark.parametrize(("code", "arguments", "named"), CASES)
def test_wrong_input_has_its_exit_code_and_cause(
    code: int, arguments: Arguments, named: str, place: Place, megatrain: Megatrain
) -> None:
    ended = megatrain(*arguments(place))
    assert ended.code == code, ended.err
    assert named in ended.err
    assert "Traceback" not in ended.err
    assert len(ended.err.strip().splitlines()) <= 8
    assert ended.out == "" or "verify" in arguments(place)


def test_a_dataset_of_another_tokenizer_is_refused(place: Place, megatrain: Megatrain, other_tokenizer: Path) -> None:
    ended = megatrain("eval", place.run, "--data", other_tokenizer)
    assert ended.code == 3
    assert "another tokenizer" in ended.err


def test_weights_meet_no_other_tokenizer(place: Place, megatrain: Megatrain, other_tokenizer: Path) -> None:
    overrides = [f"run.init_from={place.run}", f"data.train=[{{path: {other_tokenizer}}}]", "data.validation=[]"]
    for command in ("check", "train"):
        ended = megatrain(command, place.config, *overrides, "model.vocab_size=512")
        assert ended.code == 4
        assert "another tokenizer than that of" in ended.err


@pytest.fixture(scope="module")
def other_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other")
    (folder / "text.txt").write_text("some other words " * 500)
    train_tokenizer([str(folder / "text.txt")], 270, folder / "tokenizer.json", ReadOptions())
    tokenize([str(folder / "text.txt")], folder / "tokenizer.json", folder / "set", TokenizeOptions(), QUIET)
    return folder / "set"


def test_a_plain_launcher_reports_a_problem_once(tiny_data: TinyData, two_ranks: ServedRanks, tmp_path: Path) -> None:
    """Started without `megatrain train`, in front of a stale record of an earlier failure."""
    run_dir = tmp_path / "run"
    (run_dir / "logs").mkdir(parents=True)
    (run_dir / "logs" / "first-failure.json").write_text("{}")
    config = write_config(tmp_path / "run.yaml", tiny_config(tiny_data, run_dir))
    ended = two_ranks.train(config, "train.steps=x")
    assert ended.codes == [2, 2]
    assert ["train.steps" in output for output in ended.output] == [True, False]


def test_a_relative_path_names_the_other_place(tmp_path: Path, megatrain: Megatrain, tiny_data: TinyData) -> None:
    folder = tmp_path / "project"
    config = tiny_config(tiny_data, tmp_path / "run")
    config["data"] |= {"train": [{"path": "data/prose"}], "validation": []}
    path = write_config(folder / "run.yaml", config)
    ended = megatrain("check", path)
    assert (ended.code, "data/prose: not on this machine" in ended.out) == (0, True)
    shutil.copytree(tiny_data.prose, folder / "data" / "prose")
    hint = f"{folder / 'data' / 'prose'} is there: relative paths are taken from the working directory, {Path.cwd()}."
    assert hint in megatrain("check", path).out
    ended = megatrain("train", path)
    assert (ended.code, hint in ended.err) == (3, True)
