from __future__ import annotations

import inspect
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml

import data_tools.cli
from launcher.options import limit_seconds
from launcher.script import STAGES, Array
from megatrain.errors import ConfigError
from tests.unit.launcher.conftest import Launch


def sbatch_options(script: str) -> dict[str, str]:
    """What sbatch is told, by option; the last of a name wins, as it does there."""
    words = shlex.split(" ".join(line.removeprefix("#SBATCH ") for line in script.splitlines() if "#SBATCH" in line))
    return dict(word.split("=", 1) if "=" in word else (word, "") for word in words)


def checked(script: str) -> str:
    """The script, which bash can parse and shellcheck (where it is installed) finds no fault with."""
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    if shutil.which("shellcheck"):
        found = subprocess.run(["shellcheck", "-S", "warning", "-"], input=script, text=True, capture_output=True)
        assert found.returncode == 0, found.stdout
    return script


VARIANTS = [
    ("--nodes", "2", "--procs-per-node", "2", "--via", "srun"),
    ("--nodes", "2", "--gpus-per-node", "2", "--via", "srun", "--cpus-per-task", "8"),
    ("--nodes", "2", "--procs-per-node", "2", "--via", "deepspeed", "--cpus-per-task", "1"),
    ("--nodes", "1", "--gpus-per-node", "4", "--via", "deepspeed", "--cpus-per-task", "8"),
    ("--nodes", "1", "--procs-per-node", "4", "--chain", "3"),
    ("--nodes", "4", "--min-nodes", "2", "--gpus-per-node", "2", "--via", "srun", "--cpus-per-task", "8"),
    ("--nodes", "2", "--min-nodes", "1", "--procs-per-node", "2", "--via", "deepspeed"),
    ("--nodes", "2", "--gpus-per-node", "h100:2", "--via", "deepspeed"),
    ("--nodes", "2", "--gpus-per-node", "2", "--shared", "--via", "srun"),
]


@pytest.mark.parametrize("options", VARIANTS, ids=" ".join)
def test_a_script_is_short_and_sound_bash(launch: Launch, options: tuple[str, ...]) -> None:
    script = checked(launch("slurm", "run.yaml", *options).out)
    assert script.startswith("#!/bin/bash\n")
    assert len(script.splitlines()) < 80


def test_sbatch_is_told_what_was_asked_for(launch: Launch, tmp_path: Path) -> None:
    options = ["--partition", "gpu", "--account", "a", "--qos", "long", "--exclude", "bad[1-2],bad7", "--time", "2-00"]
    script = launch("slurm", "run.yaml", "--nodes", "2", "--procs-per-node", "4", *options, "--signal-seconds", "600")
    assert sbatch_options(script.out) == {
        "--job-name": "run",
        "--nodes": "2",
        "--ntasks-per-node": "4",
        "--partition": "gpu",
        "--account": "a",
        "--qos": "long",
        "--exclude": "bad[1-2],bad7",
        "--time": "2-00",
        "--chdir": str(tmp_path),
        "--output": f"{tmp_path}/slurm-%j.out",
        "--open-mode": "append",
        "--requeue": "",
        "--signal": "B:USR1@600",
    }


GPUS = ("slurm", "run.yaml", "--nodes", "2", "--gpus-per-node")
_WHOLE = {"--gpus-per-node": "4", "--exclusive": "", "--mem": "0"}


@pytest.mark.parametrize(
    ("options", "site", "asked"),
    [
        ((), {}, _WHOLE),
        (("--shared",), {}, {"--gpus-per-node": "4"}),
        (("--sbatch", "--mem=500G"), {}, {**_WHOLE, "--mem": "500G"}),
        (("--sbatch=--mem-per-gpu=60G",), {}, {"--gpus-per-node": "4", "--exclusive": "", "--mem-per-gpu": "60G"}),
        (("--sbatch", "--gres=gpu:h100:4"), {}, {"--exclusive": "", "--mem": "0", "--gres": "gpu:h100:4"}),
        ((), {"sbatch": ["--gres=nvme:1,gpu:4"]}, {"--exclusive": "", "--mem": "0", "--gres": "nvme:1,gpu:4"}),
        (
            (),
            {"sbatch": ["--oversubscribe", "--mem=9G"]},
            {"--gpus-per-node": "4", "--oversubscribe": "", "--mem": "9G"},
        ),
        ((), {"without": ["--mem", "--exclusive"]}, {"--gpus-per-node": "4"}),
        (("--sbatch", "--mem=1G"), {"without": ["--mem"]}, {**_WHOLE, "--mem": "1G"}),
        (("--sbatch", "--mem=1G"), {"sbatch": ["--mem=2G"]}, {**_WHOLE, "--mem": "1G"}),
        (("--sbatch", "--mem=1G"), {"sbatch_always": ["--mem=3G"]}, {**_WHOLE, "--mem": "3G"}),
    ],
)
def test_gpu_jobs_take_whole_nodes_unless_told(
    options: tuple[str, ...], site: dict[str, list[str]], asked: dict[str, str], launch: Launch
) -> None:
    Path("site.yaml").write_text(yaml.safe_dump(site))
    ended = launch(*GPUS, "4", "--site", "site.yaml", "--via", "srun", *options)
    names = {"--gpus-per-node", "--gres", "--exclusive", "--oversubscribe", "--mem", "--mem-per-gpu"}
    assert {name: value for name, value in sbatch_options(ended.out).items() if name in names} == asked, ended.err


def test_options_of_sbatch_are_passed_on(launch: Launch) -> None:
    passed = ["--sbatch", "--reservation=big one", "--sbatch", "--mail-type=END,FAIL", "--sbatch=--mail-user=a@b.c"]
    options = sbatch_options(checked(launch(*GPUS, "h100:4", *passed).out))
    assert (options["--reservation"], options["--mail-type"], options["--mail-user"]) == (
        "big one",
        "END,FAIL",
        "a@b.c",
    )
    assert (options["--gpus-per-node"], options["--ntasks-per-node"]) == ("h100:4", "4")


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("--nodes=3", "--nodes"),
        ("--ntasks-per-node=3", "--gpus-per-node or"),
        ("--signal=B:TERM@5", "--signal-seconds"),
        ("--wrap=ls", "Leave it out"),
        ("-p debug", "long form"),
        ("--time=tomorrow", "--time tomorrow"),
        ("--gres=gpu:8", "8 GPU(s) on each node to 4 rank(s)"),
        ("--gpus-per-node=h100:8", "8 GPU(s) on each node to 4 rank(s)"),
        ("--gpus-per-task=2", "8 GPU(s) on each node to 4 rank(s)"),
        ("--gpus=4", "GPU(s) on each node to 4 rank(s)"),
        ("--comment=a\nb", "control character"),
    ],
)
def test_options_the_script_depends_on_are_refused(option: str, named: str, launch: Launch) -> None:
    ended = launch(*GPUS, "4", "--sbatch", option)
    assert (ended.code, ended.out) == (2, "")
    assert named in ended.err
    Path("site.yaml").write_text(yaml.safe_dump({"sbatch": [option]}))
    assert launch(*GPUS, "4", "--site", "site.yaml").code == 2


@pytest.mark.parametrize("gpus", ["0", "h100:", "h100:0", ":8", "8:h100", "gpu:h100:8", "a b:8"])
def test_gpus_that_are_no_number_are_refused(gpus: str, launch: Launch) -> None:
    ended = launch(*GPUS, gpus)
    assert ended.code == 2
    assert f"--gpus-per-node {gpus}" in ended.err


@pytest.mark.parametrize("folder", [None, "runs/one/logs"])
def test_printing_a_script_makes_nothing(folder: str | None, launch: Launch, tmp_path: Path) -> None:
    """SLURM fails a job whose output has no folder: until the script makes it, the output is in the working folder."""
    if folder is not None:
        (tmp_path / folder).mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    script = checked(launch("slurm", "run.yaml", "--nodes", "1", "--procs-per-node", "4").out)
    checked(launch("array", "--tasks", "8", "--", "tokenize", "x").out)
    assert sorted(tmp_path.rglob("*")) == before
    assert sbatch_options(script)["--output"] == f"{tmp_path / (folder or '')}/slurm-%j.out"
    assert ("mkdir" in script) == (folder is None)


def test_srun_starts_ranks_where_pdsh_is_missing(
    launch: Launch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    common = ["slurm", "run.yaml", "--procs-per-node", "2", "--nodes"]
    ended = launch(*common, "2")
    assert "\nsrun " in ended.out
    assert ended.err.startswith("megatrain-launch: srun starts the ranks: pdsh and ssh, with which it")
    ended = launch(*common, "2", "--via", "deepspeed")
    assert "deepspeed.launcher" in ended.out
    assert ended.err.startswith("megatrain-launch: --via deepspeed may fail: pdsh and ssh, with which it")
    ended = launch(*common, "1")
    assert "deepspeed.launcher" in ended.out
    assert ended.err == ""


@pytest.mark.parametrize("site", [{}, {"without": ["--exclusive"]}, {"sbatch": ["--oversubscribe"]}])
def test_shared_gpus_are_not_reached_over_ssh(site: dict[str, list[str]], launch: Launch) -> None:
    Path("site.yaml").write_text(yaml.safe_dump(site))
    options = [*GPUS, "4", "--site", "site.yaml", *([] if site else ["--shared"])]
    assert "somebody else's GPUs" in launch(*options, "--via", "deepspeed").err
    assert "\nsrun " in launch(*options).out


def test_ranks_of_one_node_keep_slurm_gpus(launch: Launch) -> None:
    script = launch("slurm", "run.yaml", "--nodes", "1", "--gpus-per-node", "2", "--shared", "--via", "deepspeed").out
    assert "export MEGATRAIN_ASSIGNED_DEVICES=$CUDA_VISIBLE_DEVICES" in checked(script)


def test_an_elastic_job_starts_ranks_on_available_nodes(launch: Launch) -> None:
    options = ["--nodes", "4", "--min-nodes", "2", "--procs-per-node", "2", "--cpus-per-task", "3", "--via", "srun"]
    script = launch("slurm", "run.yaml", *options).out
    asked = sbatch_options(script)
    assert asked["--nodes"] == "2-4"
    assert asked["--mincpus"] == "6"
    assert "--ntasks-per-node" not in asked  # else SLURM would give two nodes at the most
    assert '--nodes="$nodes" --relative=0 --ntasks=$((nodes * 2))' in script
    fixed = launch("slurm", "run.yaml", "--nodes", "4", "--min-nodes", "4", "--procs-per-node", "2").out
    assert sbatch_options(fixed)["--nodes"] == "4"
    assert "$nodes" not in fixed


def test_a_chain_does_not_requeue(launch: Launch) -> None:
    script = launch("slurm", "run.yaml", "--nodes", "1", "--procs-per-node", "4", "--chain", "3").out
    assert "--no-requeue" in sbatch_options(script)
    assert "scontrol requeue" not in script
    assert "afternotok" in script


def test_ranks_are_bound_where_cores_were_asked_for(launch: Launch) -> None:
    common = ["slurm", "run.yaml", "--nodes", "2", "--procs-per-node", "2"]
    assert "--distribution=block:block --cpu-bind=none" in launch(*common, "--via", "srun").out
    assert (
        "--distribution=block:block --cpus-per-task=3 --cpu-bind=cores --mem-bind=local"
        in launch(*common, "--via", "srun", "--cpus-per-task", "3").out
    )
    assert "MEGATRAIN_BIND_CORES=1" in launch(*common, "--via", "deepspeed", "--cpus-per-task", "3").out
    assert "BIND" not in launch(*common, "--via", "deepspeed").out


@pytest.mark.parametrize("via", ["srun", "deepspeed"])
def test_gpu_ranks_bind_themselves_and_need_gpus(via: str, launch: Launch) -> None:
    script = launch("slurm", "run.yaml", "--nodes", "2", "--gpus-per-node", "2", "--via", via).out
    assert "export MEGATRAIN_DEVICE=cuda MEGATRAIN_BIND_CORES=${MEGATRAIN_BIND_CORES:-1}" in script
    assert ("--cpu-bind=none" in script) == (via == "srun")
    assert "--gpu-bind" not in script  # with "none" SLURM 22.05 does not tell ranks which GPUs are theirs


def test_a_sites_own_lines_come_from_its_file(launch: Launch) -> None:
    site = {
        "sbatch": ["--constraint=ib", "--partition=theirs"],
        "prologue": "module load cuda\n",
        "python": ["apptainer", "exec", "my image.sif", "python3"],
        "srun": ["--network=ib"],
    }
    Path("site.yaml").write_text(yaml.safe_dump(site))
    options = ["--nodes", "2", "--procs-per-node", "2", "--site", "site.yaml", "--partition", "ours"]
    script = checked(launch("slurm", "run.yaml", *options, "--via", "srun").out)
    assert sbatch_options(script)["--constraint"] == "ib"
    assert sbatch_options(script)["--partition"] == "ours"
    assert "\nmodule load cuda\n" in script
    assert "python=(apptainer exec 'my image.sif' python3)" in script
    assert "--network=ib" in script


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("sbatch: [account=x]", "sbatch.0"),
        ('sbatch: ["--a=x\\n#SBATCH --b"]', "sbatch.0"),
        ("modules: [cuda]", "modules"),
        ("python: []", "python"),
        ("[", "no YAML"),
        ("prologue: 3", "prologue"),
        ("srun: [--mpi=none]", "--via srun"),
        ("python: [apptainer, exec, image.sif, python]", "a container"),
    ],
)
def test_mistakes_in_a_site_file_are_named(launch: Launch, text: str, named: str) -> None:
    Path("site.yaml").write_text(text)
    options = ["--nodes", "2", "--procs-per-node", "2", "--via", "deepspeed"]
    ended = launch("slurm", "run.yaml", *options, "--site", "site.yaml")
    assert (ended.code, ended.out) == (2, "")
    assert named in ended.err


NASTY = 'run.dir=runs/it\'s $(touch broken) "`id`" %n {x}; #'


def test_words_reach_the_trainer_as_they_were_given(launch: Launch, tmp_path: Path) -> None:
    ended = launch("slurm", "run.yaml", NASTY, "--nodes", "1", "--procs-per-node", "4", "--via", "srun")
    assert ended.code == 0, ended.err
    script = ended.out
    line = next(line for line in checked(script).splitlines() if line.startswith("config="))
    shown = subprocess.run(["bash", "-c", line + '\nprintf "%s\\n" "${config[@]}"'], capture_output=True, text=True)
    assert shown.stdout == f"run.yaml\n{NASTY}\n"
    assert sbatch_options(script)["--output"].startswith(str(tmp_path))
    assert not list(tmp_path.rglob("broken"))


def test_words_survive_the_shell_behind_ssh(launch: Launch) -> None:
    nasty = "train.steps= 20"
    script = launch("slurm", "run.yaml", nasty, "--nodes", "2", "--procs-per-node", "2", "--via", "deepspeed").out
    line = next(line for line in checked(script).splitlines() if line.startswith("remote_config="))
    sent = subprocess.run(
        ["bash", "-c", line.split(" #")[0] + '\nprintf "%s " "${remote_config[@]}"'], capture_output=True
    )
    assert b"train.steps= " not in sent.stdout  # DeepSpeed would put quotes of its own around a space
    arrived = subprocess.run(["bash", "-c", "printf '%s\\n' " + sent.stdout.decode()], capture_output=True, text=True)
    assert arrived.stdout == f"run.yaml\n{nasty}\n"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--nodes", "2"], "either --gpus-per-node"),
        (["--nodes", "2", "--gpus-per-node", "2", "--procs-per-node", "2"], "either --gpus-per-node"),
        (["--nodes", "3", "--gpus-per-node", "1"], "global_batch_size"),
        (["--nodes", "4", "--gpus-per-node", "1", "--min-nodes", "3"], "it is legal on 1, 2, 4."),
        (["--nodes", "2", "--gpus-per-node", "1", "--min-nodes", "4"], "--min-nodes 4 is more than --nodes 2"),
        (["--nodes", "2", "--gpus-per-node", "2", "train.stepz=3"], "train.stepz"),
        (["--nodes", "2", "--gpus-per-node", "2", "--time", "tomorrow"], "--time tomorrow"),
        (["--nodes", "2", "--gpus-per-node", "2", "--time", "2"], "--signal-seconds 180"),
        (["--nodes", "2", "--gpus-per-node", "2", "--partition", "a\n#SBATCH --uid=0"], "control character"),
        (["--nodes", "2", "--gpus-per-node", "2", "run.dir=runs/a b", "--via", "deepspeed"], "--via srun"),
        (["--nodes", "2", "--gpus-per-node", "2", "--site", "nowhere.yaml"], "nowhere.yaml"),
        (["--nodes", "2", "--gpus-per-node", "2", "run.dir=runs/a\\\\b"], "backslash"),
    ],
)
def test_what_cannot_run_is_refused_with_code_2(launch: Launch, arguments: list[str], named: str) -> None:
    ended = launch("slurm", "run.yaml", *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert named in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("option", ["--submit", "--test-only"])
def test_without_sbatch_nothing_is_submitted(
    option: str, launch: Launch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    ended = launch("slurm", "run.yaml", "--nodes", "1", "--procs-per-node", "4", option)
    assert ended.code == 2
    assert f"{option}: there is no sbatch here" in ended.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [
        ("30", 1800),
        ("5:30", 330),
        ("1:00:00", 3600),
        ("2-00", 172800),
        ("1-2:30", 95400),
        ("1-00:00:05", 86405),
        ("UNLIMITED", None),
        ("0", None),  # "a time limit of zero requests that no time limit be imposed"
        ("0:00", None),
        ("0-00:00:00", None),
    ],
)
def test_limits_are_read_as_sbatch_reads_them(limit: str, seconds: int | None) -> None:
    assert limit_seconds(limit) == seconds


@pytest.mark.parametrize("limit", ["", "1h", "1:2:3:4", "-5", "1-2-3"])
def test_other_limits_are_refused(limit: str) -> None:
    with pytest.raises(ConfigError, match="--time"):
        limit_seconds(limit)


def test_an_array_runs_a_data_tools_command(launch: Launch, tmp_path: Path) -> None:
    words = ["tokenize", "my data/*.jsonl", "--tokenizer", "t.json", "--out", "$HOME", "--workers", "2"]
    (tmp_path / "logs").mkdir()
    options = ["--tasks", "8", "--cpus-per-task", "2", "--time", "60", "--max-running", "3", "--mem", "16G"]
    script = checked(launch("array", *options, "--", *words).out)
    assert sbatch_options(script) == {
        "--job-name": "megatrain-tokenize",
        "--array": "0-7%3",
        "--cpus-per-task": "2",
        "--time": "60",
        "--mem": "16G",
        "--chdir": str(tmp_path),
        "--output": f"{tmp_path}/logs/slurm-%A_%a.out",
        "--open-mode": "append",
        "--requeue": "",
    }
    echoed = script.replace(shlex.quote(sys.executable), "printf '%s\\n'").replace("exec ", "")
    shown = subprocess.run(["bash", "-c", echoed], capture_output=True, text=True)
    assert shown.stdout.splitlines() == ["-m", "data_tools", *words]
    environment = {**os.environ, "SLURM_ARRAY_TASK_ID": "4"}
    behind = ["bash", "-c", echoed, "job.sh", "encode", "1001", "1010"]
    shown = subprocess.run(behind, capture_output=True, text=True, env=environment)
    assert shown.stdout.splitlines()[-4:] == ["--stage", "encode", "--share", "1006/1010"]


COMMANDS = {
    "tokenize": data_tools.cli.tokenize,
    "dedup": data_tools.cli.dedup,
    "filter": data_tools.cli.filter_command,
    "split": data_tools.cli.split,
}


@pytest.mark.parametrize("command", list(STAGES))
def test_arrays_know_the_stages_of_data_tools(command: str) -> None:
    option = inspect.signature(COMMANDS[command]).parameters["stage"].annotation
    known = get_args(get_args(get_args(option)[0])[0])  # of a Literal, or None, annotated
    array = Array((command, "--cluster-by", "representative"), 8, 3, None, Path(), Path(), (), "name")
    assert set(array.stages) == set(known)
    first, second = array.submissions(1001)[:2]
    assert (first, second) == ([((), (array.stages[0],))], [(("--array=0",), (array.stages[1],))])
    assert array.submissions(5)[0] == [
        (("--array=0-4%3",), (array.stages[0], "0", "8")),
        (("--array=0-2%3",), (array.stages[0], "5", "8")),
    ]


def test_each_task_of_an_array_trains_one_run(launch: Launch) -> None:
    words = ["sweep", "run.yaml", "optimizer.lr=1e-3,3e-3"]
    script = checked(launch("array", "--tasks", "2", "--", *words).out)
    assert sbatch_options(script)["--signal"] == "B:TERM@180"  # in time to save
    echoed = script.replace(shlex.quote(sys.executable), "printf '%s\\n'").replace("exec ", "")
    environment = {**os.environ, "SLURM_ARRAY_TASK_ID": "1"}
    shown = subprocess.run(["bash", "-c", echoed], capture_output=True, text=True, env=environment)
    assert shown.stdout.splitlines()[-6:] == ["-m", "megatrain", *words, "--point", "1"][-6:]


def test_an_array_of_unshareable_work_is_refused(launch: Launch) -> None:
    ended = launch("array", "--tasks", "8", "--", "inspect", "data/code")
    assert ended.code == 2
    assert "tokenize, dedup, filter" in ended.err
