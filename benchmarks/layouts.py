"""What does each layout cost a rank in memory and in messages, and is it what the papers say?

For each layout it starts real ranks (gloo, on this CPU), builds the engine that `megatrain train` builds, trains two
steps, and measures on every rank: bytes of parameters, gradients, optimizer state and activations, and the bytes sent
in a step by kind of collective. Beside them stand the formulas of the papers (benchmarks/_layout_formulas.py). Where
the two differ by more than 10%, it says why (benchmarks/_layout_reasons.py), or "unexplained", and exits with 1.

    python benchmarks/layouts.py [--quick] [--only TEXT] [--json FILE]

Weights and optimizer state are counted between the last backward pass and the update, gradients at their most between
passes, activations at their most. A table shows the first rank of each pipeline stage.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's own folder is on the path, not the one above

from rich.console import Console
from rich.table import Table

from benchmarks._layout_formulas import StageModel, memory, sent
from benchmarks._layout_reasons import UNEXPLAINED, why
from megatrain.config import RunConfig
from megatrain.distributed.bootstrap import child_environment, read_rank
from megatrain.distributed.topology import Topology

MODEL = {
    "family": "llama",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "vocab_size": 4096,
}
SEQ_LEN, GLOBAL_BATCH, MICRO_BATCH = 256, 4, 1
TOLERANCE = 0.1
SMALLEST_BYTES = 1 << 18  # rows of less are left out: the loss, the gradient's norm, small tables


@dataclass(frozen=True)
class Layout:
    """A number of ranks and what they do."""

    num_ranks: int
    precision: str
    parallel: dict[str, Any]

    @property
    def name(self) -> str:
        """As a user would say it."""
        degrees = [
            f"{value}" if key == "engine" else f"{key} {value}"
            for key, value in self.parallel.items()
            if value is not True
        ]
        switches = [key for key, value in self.parallel.items() if value is True]
        return ", ".join([f"{self.num_ranks} rank{'s' * (self.num_ranks > 1)}", self.precision, *degrees, *switches])

    @property
    def config(self) -> dict[str, Any]:
        """The run's config; its paths are not looked at."""
        return {
            "run": {"dir": "unused"},
            "model": MODEL,
            "data": {"train": [{"path": "unused"}], "seq_len": SEQ_LEN},
            "train": {
                "steps": 10,
                "global_batch_size": GLOBAL_BATCH,
                "micro_batch_size": MICRO_BATCH,
                "precision": self.precision,
            },
            "optimizer": {"lr": 1.0e-3},
            "parallel": self.parallel,
        }


def layouts(quick: bool) -> list[Layout]:
    """What is measured: each axis by itself, in both precisions where they differ, and mixes."""
    sequence, staged = {"zero_stage": 0, "tensor": 2, "sequence": True}, {"zero_stage": 0, "pipeline": 2}
    if quick:
        return [Layout(2, "bf16", parallel) for parallel in ({"zero_stage": 1}, sequence, staged)]
    two: list[dict[str, Any]] = [{"zero_stage": stage} for stage in range(4)]
    two += [{"zero_stage": 0, "recompute": kind} for kind in ("selective", "full")]
    two += [{"zero_stage": 0, "tensor": 2}, {"zero_stage": 0, "tensor": 2, "recompute": "full"}]
    two += [sequence, {**sequence, "recompute": "selective"}, {**sequence, "recompute": "full"}, staged]
    four: list[dict[str, Any]] = [
        {"zero_stage": 3},
        {"zero_stage": 0, "tensor": 4},
        {"zero_stage": 3, "tensor": 2},
        {"zero_stage": 0, "pipeline": 4},
        {"zero_stage": 1, "pipeline": 2},
        {"zero_stage": 0, "pipeline": 2, "tensor": 2},
        {"zero_stage": 0, "pipeline": 2, "tensor": 2, "sequence": True},
    ]
    fp32: list[dict[str, Any]] = [*({"zero_stage": stage} for stage in range(4)), {"zero_stage": 0, "tensor": 2}]
    fsdp2: list[dict[str, Any]] = [{"engine": "fsdp2", "zero_stage": stage} for stage in range(4)]
    two, fp32 = [*two, *fsdp2], [*fp32, *fsdp2[1::2]]
    four += [{"engine": "fsdp2", "zero_stage": stage, "tensor": 2} for stage in (1, 3)]
    four += [{"zero_stage": 1, "pipeline": 2, "pipeline_chunks": 2}, {"zero_stage": 2, "pipeline": 2}]
    four += [{"engine": "fsdp2", "zero_stage": stage, "pipeline": 2} for stage in (1, 2)]
    return [
        *(Layout(2, "bf16", parallel) for parallel in two),
        *(Layout(2, "fp32", parallel) for parallel in fp32),
        *(Layout(4, "bf16", parallel) for parallel in four),
    ]


def measure(chosen: list[Layout]) -> list[list[dict[str, Any]]]:
    """Each layout's figures on each of its ranks. All layouts of one size are measured by the same ranks."""
    found: dict[int, list[dict[str, Any]]] = {}
    for num_ranks in {layout.num_ranks for layout in chosen}:
        mine = [k for k, layout in enumerate(chosen) if layout.num_ranks == num_ranks]
        answers = _start_ranks(num_ranks, [chosen[k].config for k in mine])
        found |= dict(zip(mine, answers, strict=True))
    return [found[k] for k in range(len(chosen))]


def _start_ranks(num_ranks: int, cases: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    with tempfile.TemporaryDirectory() as folder:
        answers, log_file = Path(folder, "answers"), Path(folder, "log")
        environment = child_environment(num_ranks, has_gpu=False)
        environment |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(num_ranks)) | {"MASTER_ADDR": "127.0.0.1"}
        with log_file.open("wb") as log:
            ranks = [
                subprocess.Popen(
                    [sys.executable, __file__, "--rank", str(answers), json.dumps(cases)],
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=log,
                    stderr=log,
                )
                for rank in range(num_ranks)
            ]
            codes = [rank.wait() for rank in ranks]
        if any(codes):
            sys.exit(f"A rank failed:\n{log_file.read_text(errors='replace')[-4000:]}")
        return [json.loads(line) for line in answers.read_text().splitlines()]


def serve(answers: Path, cases: list[dict[str, Any]]) -> None:
    """Be a rank; the first of them writes a line for each case."""
    from benchmarks._layout_rank import measure_cases  # torch and DeepSpeed are for ranks alone

    rank = read_rank()
    for figures in measure_cases(rank, cases):
        if rank.rank == 0:
            with answers.open("a") as file:
                file.write(json.dumps(figures) + "\n")


@dataclass(frozen=True)
class Row:
    """One figure of one rank, in bytes, and why it is not what the formula says, if it is not."""

    kind: str
    measured: float
    formula: float
    why: str

    @property
    def agrees(self) -> bool:
        """Whether to 10%."""
        return abs(self.measured - self.formula) <= TOLERANCE * self.formula


def rows(layout: Layout, figures: dict[str, Any]) -> list[Row]:
    """A rank's figures beside the formulas."""
    config = RunConfig.model_validate(layout.config)
    mesh = Topology.of(layout.num_ranks, config.parallel.tensor, config.parallel.pipeline)
    part = StageModel(config, mesh, figures["stage"])
    pairs = [(kind, figures[kind], formula) for kind, formula in memory(part).items()]
    formulas = sent(part)
    for kind in sorted(formulas.keys() | figures["sent"].keys()):
        pairs.append((f"sent: {kind}", figures["sent"].get(kind, 0), formulas.get(kind, 0.0)))
    return [Row(*pair, why(pair[0], part)) for pair in pairs if max(pair[1:]) >= SMALLEST_BYTES]


def show(console: Console, layout: Layout, ranks: list[dict[str, Any]]) -> list[Row]:
    """A table of the first rank of each stage, and below it why some rows differ; the rows."""
    table = Table(title=layout.name, title_justify="left")
    for column in ("stage", "what", "measured MB", "formula MB", "ratio"):
        table.add_column(column, justify="left" if column == "what" else "right")
    shown = []
    for stage in sorted({figures["stage"] for figures in ranks}):
        table.add_section()
        for row in rows(layout, next(figures for figures in ranks if figures["stage"] == stage)):
            ratio = f"{row.measured / row.formula:.2f}" if row.formula else "-"
            table.add_row(str(stage), row.kind, f"{row.measured / 1e6:.2f}", f"{row.formula / 1e6:.2f}", ratio)
            shown.append(row)
    console.print(table)
    for reason in dict.fromkeys(f"{row.kind}: {row.why}" for row in shown if not row.agrees):
        console.print(f"  {reason}", highlight=False, soft_wrap=True)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three layouts on two ranks")
    parser.add_argument("--only", default="", metavar="TEXT", help="layouts whose name has this in it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every rank's figures")
    parser.add_argument("--rank", nargs=2, metavar=("FILE", "CASES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        serve(Path(options.rank[0]), json.loads(options.rank[1]))
        return
    chosen = [layout for layout in layouts(options.quick) if options.only in layout.name]
    found = measure(chosen)
    if options.json:
        named = [{"layout": layout.name, "ranks": ranks} for layout, ranks in zip(chosen, found, strict=True)]
        options.json.write_text(json.dumps(named, indent=1))
    console = Console(width=120)
    shown = [row for layout, ranks in zip(chosen, found, strict=True) for row in show(console, layout, ranks)]
    differing = [row for row in shown if not row.agrees]
    console.print(f"{len(shown)} figures; {len(differing)} differ from the formula by more than {TOLERANCE:.0%}")
    sys.exit(any(row.why == UNEXPLAINED for row in differing))


if __name__ == "__main__":
    main()
