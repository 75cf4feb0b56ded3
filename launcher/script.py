"""A job for SLURM as the batch script that a person would have written."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from launcher.options import as_comment, check_gpus, check_limit, check_passed, merged, value_of
from launcher.site import Site
from megatrain.errors import ConfigError

_CLEAN_STAGES = ("list", "tally", "write", "publish")
_PAIR_STAGES = ("read", "index", "sort", "compare", "join", "cluster")
STAGES = {
    "tokenize": ("encode", "plan", "shards", "manifest"),
    "dedup": (*_PAIR_STAGES, *_CLEAN_STAGES),
    "filter": ("read", "index", *_CLEAN_STAGES),
    "split": (*_PAIR_STAGES, "count", "number", "write-train", "write-validation", "report", "publish"),
}
"""Of the data tools' commands, in order: a job for each, of which the tasks do their shares."""
ARRAY_COMMANDS = {**dict.fromkeys(STAGES, "data_tools"), "sweep": "megatrain"}
"""Commands that an array of tasks can do, and whose module has them."""
UNSHARED = {"plan", "manifest", "index", "cluster", "assign", "tally", "number", "report", "publish"}
"""Stages of one unit."""
_PLAIN = re.compile(r"[\w@+=:,./-]+", re.ASCII)


@dataclass(frozen=True)
class Job:
    """What to run, on what, and what sbatch is asked for."""

    config: str
    overrides: tuple[str, ...]
    run_dir: Path
    working_dir: Path
    nodes: int
    min_nodes: int
    """As many as ``nodes``, or fewer where each start takes those that are there."""
    ranks_per_node: int
    gpus_per_node: str | None
    """As sbatch reads it, ``8`` or ``h100:8``; None for nodes without GPUs."""
    is_shared: bool
    """Whether a job with GPUs leaves the rest of its nodes to others."""
    via_ssh: bool
    """Whether `deepspeed` starts the ranks, over ssh; else `srun` does."""
    cpus_per_task: int | None
    options: tuple[str, ...]
    """Further options of sbatch, from the command line."""
    name: str
    signal_seconds: int
    tries: int
    chain: int | None

    @property
    def is_elastic(self) -> bool:
        """Whether it is known at each start alone on how many nodes."""
        return self.min_nodes < self.nodes

    @property
    def node_counts(self) -> str:
        return f"{self.min_nodes}-{self.nodes}" if self.is_elastic else str(self.nodes)

    @property
    def logs(self) -> Path:
        return self.run_dir / "logs"


@dataclass(frozen=True)
class Array:
    """A command that the tasks of an array do together: of the data tools, where each finds what is left to do by
    itself, or a sweep, where each trains one run."""

    command: tuple[str, ...]
    num_tasks: int
    max_running: int | None
    cpus_per_task: int | None
    working_dir: Path
    logs: Path
    options: tuple[str, ...]
    name: str

    @property
    def stages(self) -> list[str]:
        """What the command is done in, each by a job; nothing for a sweep."""
        stages = list(STAGES.get(self.command[0], ()))
        if self.command[0] == "dedup" and any("representative" in word for word in self.command):
            after = stages.index("cluster") + 1
            stages[after:after] = ["represent", "assign"]
        return stages

    def submissions(self, max_tasks: int) -> list[list[Submission]]:
        """For each stage its jobs: several, where an array has no more than `max_tasks` tasks."""
        starts = range(0, self.num_tasks, max_tasks)
        most = f"%{self.max_running}" if self.max_running else ""
        windows = [(start, min(max_tasks, self.num_tasks - start)) for start in starts]
        jobs = []
        for stage in self.stages:
            if stage in UNSHARED:
                jobs.append([Submission(("--array=0",), (stage,))])
            elif len(windows) == 1:
                jobs.append([Submission((), (stage,))])
            else:
                arrays = [(f"--array=0-{size - 1}{most}", str(start)) for start, size in windows]
                jobs.append([Submission((array,), (stage, start, str(self.num_tasks))) for array, start in arrays])
        return jobs


class Submission(NamedTuple):
    """One call of sbatch: its own options, and the words behind the script."""

    options: tuple[str, ...]
    words: tuple[str, ...]


def render(job: Job, site: Site) -> str:
    """The batch script. Makes nothing: where the folder of its output is not there, the script makes it.

    Raises ConfigError for what cannot stand in a script: control characters; names that DeepSpeed would pass over ssh
    unquoted; options that the script depends on; a limit that is shorter than the signal ahead of it.
    """
    options = _options(job, site)
    _check(job, site, options)
    words = [job.config, *job.overrides]
    remote_words = " ".join(shlex.quote(_for_remote_shell(word)) for word in words)
    bindings = shlex.join([*_bindings(job), *site.srun])
    return _fill("slurm.sh.j2", job, site, options, words, remote_words=remote_words, bindings=bindings)


def render_array(job: Array, site: Site, max_tasks: int) -> str:
    """The batch script of an array. Raises ConfigError for other commands, and for what cannot stand in a script."""
    if job.command[0] not in ARRAY_COMMANDS:
        raise ConfigError(f"{job.command[0]}: an array of tasks can do {', '.join(ARRAY_COMMANDS)}.")
    most = f"%{job.max_running}" if job.max_running else ""
    size = min(job.num_tasks, max_tasks)
    requested = [f"--job-name={job.name}", f"--array=0-{size - 1}{most}"]
    requested += [f"--cpus-per-task={job.cpus_per_task}"] if job.cpus_per_task else []
    options = [
        *_merged([], requested, job.options, site, _output(job.logs, job.working_dir, "%A_%a")),
        f"--chdir={job.working_dir}",
        "--open-mode=append",
        "--requeue",
        *(["--signal=B:TERM@180"] if job.command[0] == "sweep" else []),
    ]
    _check_words([*job.command, str(job.working_dir), job.name, *options], job.logs)
    check_limit(options)
    jobs = _submissions(job.submissions(max_tasks))
    return _fill("array.sh.j2", job, site, options, job.command, module=ARRAY_COMMANDS[job.command[0]], jobs=jobs)


def _submissions(stages: Iterable[Iterable[Submission]]) -> list[str]:
    """How a person submits the jobs: each after all of the stage before."""
    lines: list[str] = []
    after: tuple[str, ...] = ()
    for jobs in stages:
        calls = [("sbatch", "--parsable", *after, *options, "THIS_FILE", *words) for options, words in jobs]
        lines.append("jobs=" + ":".join(f"$({' '.join(call)})" for call in calls))
        after = ("--dependency=afterany:$jobs",)
    return lines


def why_not_ssh(job: Job, site: Site) -> str | None:
    """What keeps `deepspeed` from starting the ranks of this job; None where nothing does that can be seen here."""
    if site.srun:
        return "the site's srun options are for srun alone"
    if job.nodes == 1:
        return None
    if absent := [program for program in ("pdsh", "ssh") if shutil.which(program) is None]:
        return f"{' and '.join(absent)}, with which it reaches other nodes, cannot be found on this machine"
    return _ssh_cannot(job, site)


def _ssh_cannot(job: Job, site: Site) -> str | None:
    """What ssh to other nodes does not carry, wherever the job runs."""
    if len(site.python) > 1:
        return "a container (the site's python) is not what it starts ranks in on other nodes"
    if job.gpus_per_node and "--exclusive" not in _options(job, site):
        return "ranks started over ssh are outside of the job's share of a node, and would take somebody else's GPUs"
    for word in (str(job.working_dir), str(job.logs), *site.python):
        if not _PLAIN.fullmatch(word):
            return (
                f"{word}: it passes that over ssh without quotes, so it may have letters, digits and @+=:,./-_ alone; "
                "use another folder"
            )
    return None


def _fill(
    template: str, job: Job | Array, site: Site, options: Sequence[str], words: Iterable[str], **more: object
) -> str:
    environment = Environment(
        loader=PackageLoader("launcher", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(
        job=job,
        options=[as_comment(option) for option in options],
        python=shlex.join(site.python),
        words=shlex.join(words),
        logs=shlex.quote(str(job.logs)),
        has_logs=job.logs.is_dir(),
        prologue=site.prologue.strip("\n"),
        **more,
    )


def _options(job: Job, site: Site) -> list[str]:
    requested = [f"--job-name={job.name}", f"--nodes={job.node_counts}"]
    if job.is_elastic:  # SLURM gives no more nodes than tasks, and would count the tasks of the fewest: ask for cores
        requested += [f"--mincpus={job.ranks_per_node * (job.cpus_per_task or 1)}"]
    else:
        requested += [f"--ntasks-per-node={job.ranks_per_node}"]
        requested += [f"--cpus-per-task={job.cpus_per_task}"] if job.cpus_per_task else []
    usual = [f"--gpus-per-node={job.gpus_per_node}"] if job.gpus_per_node else []
    if job.gpus_per_node and not job.is_shared:  # else SLURM gives a core and a core's share of the memory with each
        usual += ["--exclusive", "--mem=0"]
    return [
        *_merged(usual, requested, job.options, site, _output(job.logs, job.working_dir, "%j")),
        f"--chdir={job.working_dir}",
        "--open-mode=append",
        "--no-requeue" if job.chain else "--requeue",
        f"--signal=B:USR1@{job.signal_seconds}",
    ]


def _merged(
    usual: Iterable[str], requested: Iterable[str], passed: Iterable[str], site: Site, output: str
) -> list[str]:
    """What this cluster does not refuse of the usual, the site's, what was asked for; an output, unless it has one."""
    check_passed(passed, "--sbatch")
    left = [option for option in usual if option.partition("=")[0] not in site.without]
    options = merged(left, site.sbatch, requested, passed, site.sbatch_always)
    return options if value_of(options, "--output") is not None else [*options, output]


def _output(logs: Path, working_dir: Path, number: str) -> str:
    """Where SLURM writes a job's output: into a folder that is there as the job begins, else SLURM fails it."""
    folder = logs if logs.is_dir() else working_dir
    return f"--output={str(folder).replace('%', '%%')}/slurm-{number}.out"


def _bindings(job: Job) -> list[str]:
    """srun's options that put ranks of a node side by side, and give each its cores.

    Ranks with GPUs bind themselves, to the cores near theirs. They see all GPUs of the job on their node and take
    theirs by LOCAL_RANK: hidden from each other, they copy slowly. (SLURM 22.05 hides from ranks of --gpu-bind=none
    which these are.)
    """
    shared = ["--distribution=block:block", *([f"--cpus-per-task={job.cpus_per_task}"] if job.cpus_per_task else [])]
    if job.gpus_per_node or not job.cpus_per_task:
        return [*shared, "--cpu-bind=none"]
    return [*shared, "--cpu-bind=cores", "--mem-bind=local"]


def _for_remote_shell(word: str) -> str:
    """A word that DeepSpeed may pass through pdsh (which replaces %n) to a shell at the other end, as it is.

    As $'...', with whatever is not plain by its bytes: so it has no space either, around which DeepSpeed would quote.
    """
    if _PLAIN.fullmatch(word):
        return word
    safe = (chr(b) if _PLAIN.fullmatch(chr(b)) and b < 128 else f"\\x{b:02x}" for b in word.encode())
    return f"$'{''.join(safe)}'"


def _check(job: Job, site: Site, options: list[str]) -> None:
    _check_words([job.config, *job.overrides, str(job.working_dir), *options], job.logs)
    check_limit(options, job.signal_seconds)
    if job.gpus_per_node:
        check_gpus(options, job.ranks_per_node, job.nodes)
    if job.via_ssh:
        if site.srun:
            raise ConfigError("the site's srun options need --via srun: with --via deepspeed, srun starts no ranks.")
        if job.nodes > 1 and (why := _ssh_cannot(job, site)) is not None:
            raise ConfigError(f"--via deepspeed cannot start these ranks: {why}. Use --via srun.")


def _check_words(words: Iterable[str], logs: Path) -> None:
    for word in (*words, str(logs)):
        if not word.isprintable():
            raise ConfigError(f"{word!r} has a control character: it cannot stand in a batch script.")
    if "\\" in str(logs):
        raise ConfigError(f"{logs}: SLURM writes no output below a name with a backslash. Take another folder.")
