"""What tests of every kind share: a small real dataset, tokenized once by the real data tools."""

from __future__ import annotations

import json
import pydoc_data.topics
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from data_tools.tokenize import TokenizeOptions, tokenize
from data_tools.tokenizer import train_tokenizer
from data_tools.units import ReadOptions
from megatrain import cli
from megatrain.distributed.bootstrap import free_port
from tests.cluster.lab import Lab, missing
from tests.image_data import make_image_data
from tests.in_process import Ended, caller
from tests.labeled_data import make_labeled_data
from tests.masked_data import make_masked_data
from tests.runs import ACCEPTANCE, TinyData, finished_config, is_listening, wait_until, write_config
from tests.served import ServedRanks
from tests.tiny_data import QUIET, VOCAB_SIZE, make_tiny_data

MOST_SECONDS = 5.0
"""What a test that is not marked `slow` may take on an idle machine."""


def pytest_configure() -> None:
    """One thread for torch: for tensors as small as those of tests a second one costs several times what it saves."""
    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What a marker asks for and this machine or command has not is skipped, and said to be."""
    _take_samples(items)
    missing = {"gpu": None if torch.cuda.is_available() else "needs a GPU"}
    missing["acceptance"] = None if ACCEPTANCE else "part of `make acceptance`"
    for item in items:
        for name, why in missing.items():
            if why is not None and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=why))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tells which quick tests took so long that they belong under `slow`."""
    passed = terminalreporter.getreports("passed")
    long = [
        each for each in passed if each.when == "call" and each.duration > MOST_SECONDS and "slow" not in each.keywords
    ]
    for each in sorted(long, key=lambda each: -each.duration):
        terminalreporter.write_line(f"LONG {each.duration:.1f} s {each.nodeid}: not marked slow")


def _take_samples(items: list[pytest.Item]) -> None:
    """Of a test marked `sample(n)`, all slow cases but n, spread over their list, are for `make acceptance` alone."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        if {"sample", "slow"} <= marks and "acceptance" not in marks:
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for some in cases.values():
        (size,) = next(some[0].iter_markers("sample")).args
        taken = {place * len(some) // size for place in range(size)}
        for place, item in enumerate(some):
            if place not in taken:
                item.add_marker("acceptance")


@pytest.fixture
def run_megatrain(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Runs `megatrain` in this process."""
    return caller("megatrain", cli.main, monkeypatch, capfd)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """Prose (this Python's help topics), code (two modules of its library) and held-out prose, with one tokenizer."""
    return make_tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def masked_data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """Documents that begin with [CLS] and end with [SEP], in several shards."""
    return make_masked_data(tmp_path_factory.mktemp("masked"))


@pytest.fixture(scope="session")
def labeled_data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """Pairs of texts with labels, in several shards."""
    return make_labeled_data(tmp_path_factory.mktemp("labeled"))


@pytest.fixture(scope="session")
def image_data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """Small images with three labels."""
    return make_image_data(tmp_path_factory.mktemp("images"))


SENTINELS = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<mask>", *(f"<extra_id_{k}>" for k in range(20)))


@pytest.fixture(scope="session")
def sentinel_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of short and long documents whose tokenizer has sentinels, two of which are in the text too."""
    folder = tmp_path_factory.mktemp("sentinels")
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    lines = [line for topic in topics for line in topic.splitlines() if line.strip()]
    texts = [*lines[:300], *topics[:3], "a literal <|fim_prefix|> and a <mask>"]
    (folder / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    tokenizer = folder / "tokenizer.json"
    train_tokenizer([str(folder / "in.jsonl")], VOCAB_SIZE, tokenizer, ReadOptions(), SENTINELS)
    tokenize([str(folder / "in.jsonl")], tokenizer, folder / "set", TokenizeOptions(), QUIET)
    return folder / "set"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """A real S3-compatible server on this machine, which s3fs and boto find by the environment; its address."""
    # A process of its own: a test that waits in this one must not hold the server up.
    host, port = "127.0.0.1", free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", host, "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_until(lambda: is_listening(host, port))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "somebody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield f"http://{host}:{port}"
    server.kill()
    server.wait()


@pytest.fixture(scope="session")
def bucket(s3_server: str) -> str:
    """The URL of an S3 bucket that all tests share: each takes a folder of its own."""
    import boto3  # not on machines that only train

    boto3.client("s3", endpoint_url=s3_server).create_bucket(Bucket="megatrain-tests")
    return "s3://megatrain-tests"


@pytest.fixture(scope="session")
def one_rank() -> Iterator[ServedRanks]:
    ranks = ServedRanks(1)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[ServedRanks]:
    ranks = ServedRanks(2)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def finished_run(tiny_data: TinyData, two_ranks: ServedRanks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that two ranks trained under ZeRO 1, to the end. Not to be changed."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    two_ranks.finish(write_config(run_dir.parent / "run.yaml", finished_config(tiny_data, run_dir)))
    return run_dir


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    if (why := missing()) is not None:
        pytest.skip(why)
    folder = Path(tempfile.mkdtemp(prefix="megatrain-lab-"))
    lab = Lab(folder, 5, slurmd_timeout=15)  # jobs take two, or four: one is spare
    yield lab
    lab.down()
    shutil.rmtree(folder, ignore_errors=True)
