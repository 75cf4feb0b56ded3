from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from launcher.environment import exports, secrets

NEEDED = {
    "PATH": "/usr/bin:/bin",
    "NCCL_SOCKET_IFNAME": "ib0",
    "NASTY": 'it\'s "$(touch broken)" `id` \\ #\nand a second line',
    "TOKENIZERS_PARALLELISM": "false",
    "SLURM_JOB_ID": "7",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "NCCL_IB_PKEY": "0x8001",
    "MONKEY": "1",
    "KEYBOARD": "us",
    "PASSENGERS": "3",
    "http_proxy": "http://proxy:3128",
    "MASTER_ADDR": "node1",
    "EMPTY": "",
}
SECRETS = {
    "HF_TOKEN": "x",
    "AWS_SECRET_ACCESS_KEY": "x",
    "AWS_ACCESS_KEY_ID": "x",
    "WANDB_API_KEY": "x",
    "pgpassword": "x",
    "MY_APIKEY": "x",
    "GITHUB_PAT": "x",
    "MYSQL_PWD": "x",
    "https_proxy": "http://me:word@proxy:3128",
    "DEPLOY": "-----BEGIN OPENSSH PRIVATE KEY-----",
    "SETTING": "hf_AbCdEfGhIjKlMnOpQrStUv",
    "OTHER": "AKIAIOSFODNN7EXAMPLE",
}
OF_THIS_NODE = {"SLURM_NODEID": "0", "SLURMD_NODENAME": "node1", "CUDA_VISIBLE_DEVICES": "0", "HOSTNAME": "node1",
                "SSH_AUTH_SOCK": "/run/x", "BASH_FUNC_module%%": "() { :; }", "PWD": "/x"}  # fmt: skip


def test_ranks_get_what_they_need_and_no_secrets(tmp_path: Path) -> None:
    text = exports({**NEEDED, **SECRETS, **OF_THIS_NODE})
    said = subprocess.run(["env", "-i", "bash", "-c", f"{text}\nenv -0"], cwd=tmp_path, capture_output=True, text=True)
    got = dict(line.split("=", 1) for line in said.stdout.split("\0") if line)
    assert {name: value for name, value in got.items() if name not in ("PWD", "SHLVL", "_")} == NEEDED
    assert not list(tmp_path.iterdir())


def test_what_is_left_out_is_named() -> None:
    assert secrets({**NEEDED, **SECRETS, **OF_THIS_NODE}) == sorted(SECRETS)


@pytest.mark.parametrize("name", ["GOOGLE_APPLICATION_CREDENTIALS", "AWS_SHARED_CREDENTIALS_FILE", "SSL_CERT_KEY"])
def test_a_path_to_a_secret_is_none(name: str, tmp_path: Path) -> None:
    assert secrets({name: str(tmp_path)}) == []
    assert secrets({name: "/s3cr/et"}) == [name]
