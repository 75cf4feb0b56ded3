"""A job for SLURM as the batch script that a person would have written."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from launcher.site import Site
from megatrain.errors import ConfigError

ARRAY_COMMANDS = ("tokenize", "dedup", "filter")
_PLAIN = re.compile(r"[\w@+=:,./-]+", re.ASCII)
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<rest>\d+(?::\d+){0,2})")


@dataclass(frozen=True)
class Job:
    """What to run, on what, and how it is asked for."""

    config: str
    overrides: tuple[str, ...]
    run_dir: Path
    working_dir: Path
    nodes: int
    min_nodes: int
    """As many as ``nodes``, or fewer where each start takes those that are there."""
    ranks_per_node: int
    has_gpus: bool
    via_ssh: bool
    """Whether `deepspeed` starts the ranks, over ssh; else `srun` does."""
    cpus_per_task: int | None
    options: Mapping[str, str | None]
    """Options of sbatch by name; those that are None are left out."""
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
        """On how many nodes, as sbatch reads it."""
        return f"{self.min_nodes}-{self.nodes}" if self.is_elastic else str(self.nodes)

    @property
    def logs(self) -> Path:
        """Where the job's output and its files go."""
        return self.run_dir / "logs"


@dataclass(frozen=True)
class Array:
    """A command of the data tools that the tasks of an array do together: each finds what is left to do by itself."""

    command: tuple[str, ...]
    num_tasks: int
    cpus_per_task: int | None
    working_dir: Path
    options: Mapping[str, str | None]
    name: str


def render(job: Job, site: Site) -> str:
    """The batch script; makes the folder of its output, without which SLURM would fail the job.

    Raises ConfigError for what cannot stand in a script: control characters; names that DeepSpeed would pass over ssh
    unquoted; a limit that is shorter than the signal ahead of it.
    """
    _check(job, site)
    try:
        job.logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{job.logs} cannot be made: {error.strerror}. Set run.dir to shared storage.") from None
    words = [job.config, *job.overrides]
    return _template("slurm.sh.j2").render(
        job=job,
        options=[_for_sbatch(option) for option in _options(job, site)],
        python=shlex.join(site.python),
        words=shlex.join(words),
        remote_words=" ".join(shlex.quote(_for_remote_shell(word)) for word in words),
        bindings=shlex.join([*_bindings(job), *site.srun]),
        logs=shlex.quote(str(job.logs)),
        prologue=site.prologue.strip("\n"),
    )


def render_array(job: Array, site: Site) -> str:
    """The batch script of an array. Raises ConfigError for other commands, and for what cannot stand in a script."""
    if job.command[0] not in ARRAY_COMMANDS:
        raise ConfigError(f"{job.command[0]}: an array of tasks can do {', '.join(ARRAY_COMMANDS)}.")
    _refuse_control_characters([*job.command, str(job.working_dir), job.name, *_given(job.options)])
    if job.options.get("time") is not None:
        limit_seconds(str(job.options["time"]))
    options = [*site.sbatch, f"--job-name={job.name}", f"--array=0-{job.num_tasks - 1}"]
    options += [f"--cpus-per-task={job.cpus_per_task}"] if job.cpus_per_task else []
    options += [f"--{name}={value}" for name, value in job.options.items() if value is not None]
    options += [f"--chdir={job.working_dir}", "--open-mode=append", "--requeue"]
    return _template("array.sh.j2").render(
        job=job,
        options=[_for_sbatch(option) for option in options],
        python=shlex.join(site.python),
        words=shlex.join(job.command),
        prologue=site.prologue.strip("\n"),
    )


def _template(name: str) -> Template:
    environment = Environment(
        loader=PackageLoader("launcher", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(name)


def _options(job: Job, site: Site) -> list[str]:
    """sbatch's options, in the order that a person would look for them."""
    given = [f"--{name}={value}" for name, value in job.options.items() if value is not None]
    counts = [f"--nodes={job.node_counts}"]
    if job.is_elastic:  # SLURM gives no more nodes than tasks, and would count the tasks of the fewest: ask for cores
        counts += [f"--mincpus={job.ranks_per_node * (job.cpus_per_task or 1)}"]
    else:
        counts += [f"--ntasks-per-node={job.ranks_per_node}"]
    counts += [f"--gpus-per-node={job.ranks_per_node}"] if job.has_gpus else []
    counts += [f"--cpus-per-task={job.cpus_per_task}"] if job.cpus_per_task and not job.is_elastic else []
    output = str(job.logs).replace("%", "%%") + "/slurm-%j.out"
    return [
        *site.sbatch,
        f"--job-name={job.name}",
        *counts,
        *given,
        f"--chdir={job.working_dir}",
        f"--output={output}",
        "--open-mode=append",
        "--no-requeue" if job.chain else "--requeue",
        f"--signal=B:USR1@{job.signal_seconds}",
    ]


def _for_sbatch(option: str) -> str:
    """An option as sbatch reads it in a comment: quotes as in a shell, but a backslash escapes even inside of them."""
    return shlex.quote(option.replace("\\", "\\\\"))


def _bindings(job: Job) -> list[str]:
    """srun's options that give each rank its cores and their memory.

    Ranks see all GPUs of their node and take theirs by LOCAL_RANK: hidden from each other, they copy slowly.
    """
    gpus = ["--gpu-bind=none"] if job.has_gpus else []
    if job.cpus_per_task is None:
        return [*gpus, "--cpu-bind=none"]
    return [*gpus, f"--cpus-per-task={job.cpus_per_task}", "--cpu-bind=cores", "--mem-bind=local"]


def _for_remote_shell(word: str) -> str:
    """A word that DeepSpeed may pass through pdsh (which replaces %n) to a shell at the other end, as it is.

    As $'...', with whatever is not plain by its bytes: so it has no space either, around which DeepSpeed would quote.
    """
    if _PLAIN.fullmatch(word):
        return word
    safe = (chr(b) if _PLAIN.fullmatch(chr(b)) and b < 128 else f"\\x{b:02x}" for b in word.encode())
    return f"$'{''.join(safe)}'"


def _check(job: Job, site: Site) -> None:
    paths = [str(job.run_dir), str(job.working_dir)]
    _refuse_control_characters([job.config, *job.overrides, *paths, job.name, *_given(job.options)])
    if "\\" in str(job.logs):
        raise ConfigError(f"{job.logs}: SLURM writes no output below a name with a backslash. Set run.dir elsewhere.")
    limit = job.options.get("time")
    if limit is not None and (seconds := limit_seconds(limit)) is not None and seconds <= job.signal_seconds:
        raise ConfigError(
            f"--time {limit} is no longer than --signal-seconds {job.signal_seconds}: the run would be asked to end as "
            "it begins. Give more time, or a signal closer to the limit."
        )
    if not job.via_ssh:
        return
    if site.srun:
        raise ConfigError("the site's srun options need --via srun: with --via deepspeed, srun starts no ranks.")
    if job.nodes > 1:
        if len(site.python) > 1:
            raise ConfigError("a container (the site's python) needs --via srun: DeepSpeed starts ranks outside of it.")
        for word in (str(job.working_dir), str(job.logs), *site.python):
            if not _PLAIN.fullmatch(word):
                raise ConfigError(
                    f"{word}: DeepSpeed passes it over ssh without quotes, so it may have letters, digits and "
                    "@+=:,./-_ alone. Use another folder, or --via srun."
                )


def _given(options: Mapping[str, str | None]) -> list[str]:
    return [value for value in options.values() if value is not None]


def _refuse_control_characters(words: Iterable[str]) -> None:
    for word in words:
        if not word.isprintable():
            raise ConfigError(f"{word!r} has a control character: it cannot stand in a batch script.")


def limit_seconds(limit: str) -> int | None:
    """A limit as sbatch takes it (minutes, m:s, h:m:s, d-h, d-h:m, d-h:m:s); None where it has none, such as UNLIMITED.

    Raises ConfigError for other text.
    """
    if limit.upper() in {"INFINITE", "UNLIMITED"}:
        return None
    match = _TIME.fullmatch(limit)
    if match is None:
        raise ConfigError(f"--time {limit}: give minutes, minutes:seconds, hours:minutes:seconds, or days-hours.")
    parts = [int(part) for part in match["rest"].split(":")]
    if match["days"] is not None:
        hours, minutes, seconds = [*parts, 0, 0][:3]
        return ((int(match["days"]) * 24 + hours) * 60 + minutes) * 60 + seconds
    hours, minutes, seconds = parts if len(parts) == 3 else (0, *[*parts, 0][:2])
    return (hours * 60 + minutes) * 60 + seconds
