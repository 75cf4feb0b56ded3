import subprocess
import sys

SCRIPT = """
import logging, sys
from pathlib import Path
from megatrain.observe.logs import adopt_logger, setup_logging
noisy = logging.getLogger("noisy")
noisy.addHandler(logging.StreamHandler(sys.stdout))
noisy.propagate = False
setup_logging(Path(sys.argv[1]), rank=int(sys.argv[2]), console=sys.argv[2] == "0")
adopt_logger("noisy")
logging.getLogger("megatrain.x").warning("watch out")
logging.getLogger("noisy").warning("me too")
logging.getLogger("noisy").info("by the way")
"""


def log_from(run_dir, rank):
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, run_dir, str(rank)], capture_output=True, text=True, check=True
    )


def test_ranks_log_to_files_rank_0_warns(tmp_path):
    first, second = log_from(tmp_path, 0), log_from(tmp_path, 1)
    assert first.stdout == ""
    assert first.stderr == "WARNING: watch out\nWARNING: me too\n"
    assert (second.stdout, second.stderr) == ("", "")
    for rank in ("00000", "00001"):
        lines = (tmp_path / "logs" / f"rank-{rank}.log").read_text().splitlines()
        assert len(lines) == 3
        assert lines[0].endswith("WARNING megatrain.x: watch out")


def test_an_unwritable_log_folder_stops_nothing(tmp_path):
    (tmp_path / "logs").write_text("in the way")
    first, second = log_from(tmp_path, 0), log_from(tmp_path, 1)
    assert first.stderr.count("cannot write") == 1
    assert "watch out" in first.stderr
    assert "Traceback" not in first.stderr
    assert second.stderr == ""
