"""Commands of the data tools on a small input, in parts so small that there are many, and the executors for them.

The parts are small in every process, through a sitecustomize of the folder: so the commands are those that users type.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tests.faults.tokenize_inputs import environment, folder_bytes, write_conversations, write_inputs, write_tokenizer
from tests.image_samples import make_images, write_folder, write_parquet
from tests.runs import wait_until

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PREPARE = """
from data_tools import units
units.PART_BYTES = 4000
from data_tools import job, tokenize
job.LOOK_AGAIN_SECONDS = 5.0
tokenize.BYTES_A_SECOND = dict.fromkeys(tokenize.BYTES_A_SECOND, 1.0)  # so that there is work for all workers
from data_tools.clean import attributes, candidates, clusters, dedup
candidates.WORKER_BYTES, candidates.JOINED_DOCUMENTS, clusters.BUCKET_DOCUMENTS = 1, 100, 200  # likewise
attributes.TASK_BYTES, attributes.READER_CHUNKS = 20_000, 1
dedup.MAX_RUN_DOCUMENTS, dedup.SLICE_DOCUMENTS = 100, 200
"""
TEMPLATE = "{% for m in messages %}{{ m.role + ': ' + m.content + '<|endoftext|>' }}{% endfor %}"
MINHASH = ("--method", "minhash", "--num-permutations", "32")
COMMANDS: dict[str, tuple[str, ...]] = {
    "tokenize": ("tokenize", "in", "--tokenizer", "tokenizer.json", "--shard-tokens", "1000"),
    "chat": ("tokenize", "talks", "--chat", "--tokenizer", "tokenizer.json", "--shard-tokens", "1000"),
    "exact": ("dedup", "in"),
    "minhash": ("dedup", "in", *MINHASH),
    "representative": ("dedup", "in", *MINHASH, "--cluster-by", "representative"),
    "filter": ("filter", "in", "--filters", "length,gopher_repetition"),
    "split": ("split", "in", "--validation", "0.3", "--method", "exact"),
    "images": ("images", "images", "images.parquet", "--shard-bytes", "10000"),
    "split dataset": ("split", "set", "--validation", "0.3", "--method", "exact"),
}
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


class DaskCluster(NamedTuple):
    scheduler_file: str
    scheduler: subprocess.Popen[bytes]
    workers: list[subprocess.Popen[bytes]]


@dataclass(frozen=True)
class JobFolder:
    """Has the inputs of the commands; each command runs in it."""

    path: Path

    @staticmethod
    def make(path: Path) -> JobFolder:
        folder = JobFolder(path)
        write_inputs(path / "in", 1)
        write_tokenizer(path / "tokenizer.json", path / "in")
        write_conversations(path / "talks", 150)
        write_folder(path / "images", make_images(40))
        write_parquet(path / "images.parquet", make_images(40), labels="names")
        (path / "chat_template.jinja").write_text(TEMPLATE)
        (path / "sitecustomize.py").write_text(PREPARE)
        ended = folder.run(folder.command("tokenize", "set"))
        assert ended.returncode == 0, ended.stderr
        return folder

    def command(self, name: str, out: str, *options: str) -> list[str]:
        return [sys.executable, "-m", "data_tools", *COMMANDS[name], "--out", out, *options]

    def environment(self, **more: str) -> dict[str, str]:
        return {**environment(**AS_ROOT, **more), "PYTHONPATH": f"{self.path}{os.pathsep}{ROOT}"}

    def run(self, command: list[str], **more: str) -> subprocess.CompletedProcess[str]:
        env = self.environment(**more)
        return subprocess.run(command, cwd=self.path, env=env, capture_output=True, text=True, check=False, timeout=240)

    def start(self, command: list[str], cwd: str | None = None, **more: str) -> subprocess.Popen[bytes]:
        env, null = self.environment(**more), subprocess.DEVNULL
        return subprocess.Popen(
            command, cwd=cwd or self.path, env=env, stdout=null, stderr=null, start_new_session=True
        )

    def made(self, out: str) -> dict[str, bytes]:
        return folder_bytes(self.path / out)

    @contextlib.contextmanager
    def dask_cluster(self, num_workers: int, *scheduler: str, **more: str) -> Iterator[DaskCluster]:
        """A scheduler and workers, which run in another folder."""
        file = self.path / "scheduler.json"
        file.unlink(missing_ok=True)
        module = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--port", "0", "--no-dashboard"]
        options = ["--scheduler-file", str(file), *(scheduler or ("--host", "127.0.0.1"))]
        processes = [self.start([*module, *options], cwd="/tmp", **more)]
        worker = [sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", str(file), "--no-nanny"]
        worker += ["--nthreads", "1", "--no-dashboard", "--local-directory", str(self.path / "dask")]
        try:
            wait_until(file.exists)
            processes += [self.start(worker, cwd="/tmp", **more) for _ in range(num_workers)]
            yield DaskCluster(str(file), processes[0], processes[1:])
        finally:
            for process in processes:
                process.kill()
                process.wait()


def mpirun(num_ranks: int, command: list[str]) -> list[str]:
    return [str(BIN / "mpirun"), "--oversubscribe", "-n", str(num_ranks), *command]


def by_workers(folder: JobFolder, name: str, out: str, num_workers: int) -> None:
    ended = folder.run(folder.command(name, out, "--workers", str(num_workers)))
    assert ended.returncode == 0, ended.stderr


def by_shares(folder: JobFolder, name: str, out: str) -> None:
    """As three machines do it that know nothing of each other, stage by stage; the last share of each begins late."""
    command = folder.command(name, out, "--workers", "1")
    for _ in range(15):
        tasks = [folder.start([*command, "--share", f"{number}/3"]) for number in (3, 1)]
        assert [task.wait(timeout=240) for task in tasks] == [0, 0]
        ended = folder.run([*command, "--share", "2/3"])
        assert ended.returncode == 0, ended.stderr
        if "is done" not in ended.stderr:
            return
    raise AssertionError("the stages do not end")


def by_ranks(folder: JobFolder, name: str, out: str) -> None:
    ended = folder.run(mpirun(4, folder.command(name, out)))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("documents") == folder.run(folder.command(name, out)).stdout.count("documents")


def by_dask(folder: JobFolder, name: str, out: str) -> None:
    with folder.dask_cluster(3) as cluster:
        ended = folder.run(folder.command(name, out, "--dask", cluster.scheduler_file))
    assert ended.returncode == 0, ended.stderr


EXECUTORS: Mapping[str, Callable[[JobFolder, str, str], None]] = {
    "4 workers": partial(by_workers, num_workers=4),
    "shares": by_shares,
    "4 MPI ranks": by_ranks,
    "3 Dask workers": by_dask,
}
