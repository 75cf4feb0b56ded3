"""What of DeepSpeed is started, in a fresh process: nothing is compiled for it, and an old one is refused."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import deepspeed
import pytest
import tomllib

from megatrain.errors import ConfigError
from megatrain.parallel.deepspeed import OLDEST, start_deepspeed

PYPROJECT = Path(__file__).parents[3] / "pyproject.toml"
RANK = """
    import sys
    import deepspeed
    from megatrain.distributed.bootstrap import RankInfo, export_rank, free_port
    from megatrain.parallel.deepspeed import start_deepspeed

    export_rank(RankInfo(0, 1, 0, 1, "none", "127.0.0.1", free_port()))
    start_deepspeed(60.0)
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
    print("compilers", [name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules])
    print("ops", deepspeed.ops.__compatible_ops__)
    print("fp16", deepspeed.get_accelerator().is_fp16_supported())
"""


@pytest.mark.slow
def test_a_start_loads_no_compiler() -> None:
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(RANK)], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-3:] == ["compilers []", "ops {}", "fp16 True"]


def test_an_older_deepspeed_is_refused_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed, "__version__", "0.19.4")
    with pytest.raises(ConfigError, match=r"DeepSpeed 0\.19\.4 .* 0\.19\.8"):
        start_deepspeed(60.0)


def test_the_oldest_deepspeed_is_what_pip_requires() -> None:
    requirements = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    (required,) = (text for text in requirements if text.startswith("deepspeed"))
    assert re.match(r"deepspeed>=([\d.]+),", required).group(1) == OLDEST  # type: ignore[union-attr]
