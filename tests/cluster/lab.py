"""A SLURM of several nodes on this machine: each with its own network address, host name, processes, sshd and slurmd.

The file system is shared, as on a cluster; what differs (host names, how ssh logs in) is mounted over in each node, so
nothing outside of the lab's folder is changed. All processes are children of this one, and die with it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from megatrain.distributed import local_ranks
from megatrain.distributed.bootstrap import free_port
from tests.runs import wait_until

PROGRAMS = (
    "slurmctld",
    "slurmd",
    "sbatch",
    "munged",
    "ip",
    "tc",
    "nsenter",
    "unshare",
    "setpriv",
    "sshd",
    "ssh-keygen",
    "pdsh",
)
_DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL")
_CONF = """\
ClusterName=lab
SlurmctldHost=ctl({ctl})
SlurmctldPort={ctl_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={lab}/munge.sock,cred_expire=5
StateSaveLocation={lab}/state
SlurmdSpoolDir={lab}/spool.%n
SlurmctldPidFile={lab}/slurmctld.pid
SlurmdPidFile={lab}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,requeue_delay=1
SlurmdTimeout={slurmd_timeout}
InactiveLimit=0
KillWait=30
UnkillableStepTimeout=600
CompleteWait=0
MessageTimeout=10
TCPTimeout=2
ReturnToService=2
GresTypes=gpu
"""
GPUS_PER_NODE = 2
"""In name: SLURM counts and gives them, by CUDA_VISIBLE_DEVICES; nothing else can be done with them."""


def missing() -> str | None:
    """Why no lab can be brought up here; None where one can."""
    if os.geteuid() != 0:
        return "a SLURM of its own needs root, for network namespaces"
    absent = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (Debian: slurm-wlm munge iproute2 openssh-server pdsh)"
    tried = subprocess.run(["unshare", "--net", "--uts", "--pid", "--mount", "--fork", "true"], capture_output=True)
    return "this machine allows no namespaces" if tried.returncode else None


_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class Lab:
    """Nodes node1, node2, ... under one slurmctld, in ``folder`` (short: sockets lie in it). Ended by `down`."""

    def __init__(self, folder: Path, num_nodes: int, slurmd_timeout: int = 60) -> None:
        self.folder = folder
        self.nodes = range(1, num_nodes + 1)
        number = os.getpid() % 16384
        self._net = f"10.{64 + number // 256}.{number % 256}"
        self._name = f"mt{number}"
        self.environment = {**os.environ, "PATH": _PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._inits: dict[int, subprocess.Popen[bytes]] = {}
        try:
            self._up(slurmd_timeout)
        except BaseException:
            self.down()
            raise

    def boot(self, node: int) -> None:
        """Start a node: its processes' first, sshd, slurmd."""
        setup = (
            f"hostname node{node}; cd {self.folder}; mount --bind hosts /etc/hosts; "
            "mount --bind empty /etc/resolv.conf; mount --bind ssh_config /etc/ssh/ssh_config; mkdir -p /run/sshd; "
            f": > up.node{node}; exec sleep infinity"
        )
        namespaces = ["--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        inside = ["nsenter", f"--net=/run/netns/{self._name}-{node}", "unshare", *namespaces]
        (self.folder / f"up.node{node}").unlink(missing_ok=True)
        self._inits[node] = self._start("init", [*inside, "bash", "-c", setup])
        wait_until((self.folder / f"up.node{node}").exists)
        options = {
            "ListenAddress": f"{self._net}.{node}",
            "HostKey": self.folder / "ssh/host",
            "AuthorizedKeysFile": self.folder / "ssh/id.pub",
            "PidFile": "none",
            "PasswordAuthentication": "no",
            "StrictModes": "no",
        }
        sshd = ["/usr/sbin/sshd", "-D", "-f", "/dev/null", *(f"-o{key}={value}" for key, value in options.items())]
        self._start(f"sshd.node{node}", self.inside(node, *sshd))
        self._start(f"slurmd.node{node}", self.inside(node, "slurmd", "-D", "-N", f"node{node}"))

    def crash(self, node: int) -> None:
        """The node loses power: all of its processes die at once."""
        self._init(node).send_signal(signal.SIGKILL)
        self._inits[node].wait()

    def cut(self, node: int) -> None:
        """No packet reaches the node or leaves it; its processes live on."""
        _ip("link", "set", f"{self._name}v{node}", "down")

    def heal(self, node: int) -> None:
        """The node is reachable again."""
        _ip("link", "set", f"{self._name}v{node}", "up")

    @contextlib.contextmanager
    def drained(self, nodes: Sequence[int]) -> Iterator[None]:
        """Some nodes take no jobs."""
        for node in nodes:
            self.call("scontrol", "update", f"nodename=node{node}", "state=drain", "reason=test")
        try:
            yield
        finally:
            for node in nodes:
                self.call("scontrol", "update", f"nodename=node{node}", "state=resume")

    def mend(self) -> None:
        """All nodes are up, reachable and have nothing to do, whatever was done to them."""
        for node in self.nodes:
            self.heal(node)
            if self._inits[node].poll() is not None:
                self.boot(node)
        wait_until(self._is_mended, 0.5)

    def inside(self, node: int, *command: str) -> list[str]:
        """A command that runs ``command`` in a node."""
        return ["nsenter", "-t", str(self._init(node).pid), "-n", "-u", "-p", "-m", *command]

    def call(self, *command: str, **more: str) -> str:
        """What a command prints, run where a user would log in; it must succeed."""
        ended = subprocess.run(command, env={**self.environment, **more}, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, f"{' '.join(command)}: {ended.stderr}"
        return ended.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Restarts, ExitCode, ..."""
        words = self.call("scontrol", "show", "job", "-o", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for_job(
        self, number: str, states: Sequence[str] = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL")
    ) -> str:
        """Until the job is in one of the states; which."""
        wait_until(lambda: self.job(number)["JobState"] in states, 0.3)
        return self.job(number)["JobState"]

    def ranks(self) -> list[psutil.Process]:
        """The trainers that run on any node of this lab."""
        ours = self.environment["SLURM_CONF"]
        return local_ranks.find_ranks(lambda process: process.environ().get("SLURM_CONF") == ours)

    def wait_until_idle(self) -> None:
        """Until all nodes are there and have nothing to do."""
        wait_until(lambda: self._num_idle() == len(self.nodes), 0.2)

    def down(self) -> None:
        """End it all."""
        for process in [*self._inits.values(), *self._daemons]:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children():
                    child.kill()
            process.kill()
            process.wait()
        for node in self.nodes:
            _ip("link", "del", f"{self._name}v{node}", check=False)  # at once: that of a network follows at some time
            _ip("netns", "del", f"{self._name}-{node}", check=False)
        _ip("link", "del", self._name, check=False)

    def _up(self, slurmd_timeout: int) -> None:
        for name in ("state", "ssh", "key"):
            (self.folder / name).mkdir()
        self._write_files(slurmd_timeout)
        munge = [
            "munged",
            "--foreground",
            "--key-file",
            self.folder / "key/munge.key",
            "--socket",
            self.folder / "munge.sock",
        ]
        munge += ["--pid-file", self.folder / "munged.pid", "--log-file", self.folder / "munged.log"]
        munge += ["--seed-file", self.folder / "munged.seed"]
        self._start("munged", list(map(str, munge)))
        wait_until((self.folder / "munge.sock").exists)
        self._wire()
        self._start("slurmctld", ["unshare", "--uts", "bash", "-c", "hostname ctl; exec slurmctld -D -c"])
        for node in self.nodes:
            self.boot(node)
        self.wait_until_idle()

    def _write_files(self, slurmd_timeout: int) -> None:
        folder, ctl = self.folder, f"{self._net}.254"
        ports = {"ctl_port": free_port(), "node_port": 16818}
        conf = _CONF.format(lab=folder, ctl=ctl, slurmd_timeout=slurmd_timeout, **ports)
        for node in self.nodes:
            name = f"NodeName=node{node} NodeHostname=node{node} NodeAddr={self._net}.{node}"
            conf += f"{name} CPUs=2 RealMemory=1000 Gres=gpu:{GPUS_PER_NODE}\n"
        conf += "PartitionName=main Nodes=ALL Default=YES State=UP OverTimeLimit=0\n"
        (folder / "slurm.conf").write_text(conf)
        gpus = [folder / f"gpu{number}" for number in range(GPUS_PER_NODE)]
        (folder / "gres.conf").write_text("".join(f"Name=gpu File={gpu}\n" for gpu in gpus))
        for gpu in gpus:
            os.mknod(gpu, stat.S_IFCHR | 0o666, os.makedev(1, 3))  # as /dev/null
        names = "".join(f"{self._net}.{node} node{node}\n" for node in self.nodes)
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{ctl} ctl\n{names}")
        (folder / "empty").touch()  # no name server: what is not in `hosts` fails at once
        (folder / "key/munge.key").write_bytes(os.urandom(128))
        for path, mode in ((folder, 0o755), (folder / "key", 0o700), (folder / "key/munge.key", 0o400)):
            path.chmod(mode)
        for key in ("id", "host"):
            self.call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "ssh" / key))
        (folder / "ssh_config").write_text(
            f"Host *\n  User root\n  IdentityFile {folder}/ssh/id\n  StrictHostKeyChecking no\n"
            "  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
        )

    def _wire(self) -> None:
        """A bridge, and a cable from each node's network to it."""
        _ip("link", "add", self._name, "type", "bridge")
        _ip("addr", "add", f"{self._net}.254/24", "dev", self._name)
        _ip("link", "set", self._name, "up")
        for node in self.nodes:
            space, cable = f"{self._name}-{node}", f"{self._name}v{node}"
            _ip("netns", "add", space)
            _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("link", "set", cable, "master", self._name, "up")
            _ip("-n", space, "link", "set", "lo", "up")
            _ip("-n", space, "addr", "add", f"{self._net}.{node}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")

    def _is_mended(self) -> bool:
        """Whether all are idle; those that SLURM has drained, as one cut off in the midst of a job, are resumed."""
        for name in self.call("sinfo", "-h", "-N", "-t", "drained", "-o", "%N").split():
            self.call("scontrol", "update", f"nodename={name}", "state=resume")
        return self._num_idle() == len(self.nodes)

    def _num_idle(self) -> int:
        return int(self.call("sinfo", "-h", "-t", "idle", "-o", "%D") or 0)

    def _init(self, node: int) -> psutil.Process:
        """The first of a node's processes: the child of `unshare`."""
        children = psutil.Process(self._inits[node].pid).children()
        assert children, f"node{node} is not up"
        return children[0]

    def _start(self, name: str, command: list[str]) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [*_DIES_WITH_US, *command], env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        if name != "init":
            self._daemons.append(process)
        time.sleep(0.05)
        return process


def _ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=True, env={**os.environ, "PATH": _PATH})
