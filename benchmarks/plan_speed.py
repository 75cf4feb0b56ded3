"""How near is `plan`'s speed to that of published runs?

Plans each run of benchmarks/published_runs.yaml as its layout says, and compares tokens a second with what was
published. The constants of megatrain/plan/arithmetic.py were set with its `runs` in view, `SUSTAINED` by them; its
`held_out` were entered later, and nothing was set by them. --left-out compares each of `runs` also by a plan with the
`SUSTAINED` that fits all others best, and with that of all runs of other sources.

    python benchmarks/plan_speed.py [--left-out] [--flat 0.5]

Prints each run's error, their median and the largest; --flat: with one share of the peak for all, as --efficiency does.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import yaml

from megatrain.config import RunConfig
from megatrain.plan.arithmetic import SUSTAINED
from megatrain.plan.cluster import Cluster
from megatrain.plan.stage_model import stage_models
from megatrain.plan.time import step_time

SETS = {"as planned": "runs", "held out": "held_out", "flash attention 1": "flash_attention_1"}
TRIED = [share / 100 for share in range(70, 103, 2)]


class Run(NamedTuple):
    """``tokens``: published, a second and GPU."""

    source: str
    name: str
    config: RunConfig
    cluster: Cluster
    tokens: float

    def error(self, sustained: float) -> float:
        """Logarithm of planned over published tokens a second."""
        device = self.cluster.device
        device = replace(device, product_share=device.product_share * sustained / SUSTAINED)
        cluster = replace(self.cluster, device=device)
        step = step_time(stage_models(self.config, cluster.world_size), cluster).step
        size = self.config.train.max_batch_size * self.config.data.seq_len
        return math.log(size / step / self.cluster.world_size / self.tokens)


def runs(flat: float | None, of: str) -> Iterator[Run]:
    """Those of one of the SETS."""
    text = (Path(__file__).parent / "published_runs.yaml").read_text(encoding="utf-8")
    published = yaml.safe_load(text)
    for run in published[of]:
        gpus = run.get("gpus", 1)
        nodes = max(1, gpus // run.get("gpus_per_node", 8))
        cluster = Cluster.of(nodes, gpus // nodes, run["device"], run.get("network_gbits", 400.0), flat)
        own = {"half_tflops": ("half_flops", 1e12), "memory_gbytes": ("bytes_per_second", 1e9)}
        device = {name: run[key] * factor for key, (name, factor) in own.items() if key in run}
        cluster = replace(cluster, device=replace(cluster.device, **device))
        compiled = run.get("compiled", published["sources"][run["source"]]["compiled"])
        config = config_of(run, published["models"][run["model"]], compiled)
        name = f"{run['source']} {run['model']} {run['device']} x{gpus} seq {run['seq_len']}"
        name += "".join(f" {key} {run[key]}" for key in ("tensor", "pipeline") if key in run)
        yield Run(run["source"], name, config, cluster, run["tokens"])


def config_of(run: Mapping[str, Any], model: Mapping[str, Any], compiled: bool) -> RunConfig:
    tensor = run.get("tensor", 1)
    return RunConfig.model_validate(
        {
            "run": {"dir": "unused"},
            "model": {
                **model,
                "max_position_embeddings": run["seq_len"],
                "attention": run.get("attention", "auto"),
            },
            "optimizer": {"lr": 1.0e-3},
            "data": {"train": [{"path": "unused"}], "seq_len": run["seq_len"]},
            "train": {
                "steps": 1000,
                "global_batch_size": run["global_batch"],
                "micro_batch_size": run["micro_batch"],
                "precision": "bf16",
                "compile": "on" if compiled else "off",
            },
            "parallel": {
                "engine": "fsdp2" if "fsdp" in run else "deepspeed",
                "zero_stage": run.get("fsdp", 1),
                "tensor": tensor,
                "sequence": tensor > 1,
                "pipeline": run.get("pipeline", 1),
                "pipeline_chunks": run.get("chunks", 1),
                "recompute": run.get("recompute", "none"),
                "recompute_every": run.get("recompute_every", 1),
            },
        }
    )


def best(errors: list[list[float]]) -> int:
    """Which of the shares TRIED has the least error on average, of some runs' errors with each."""
    return min(range(len(TRIED)), key=lambda index: sum(abs(of_run[index]) for of_run in errors))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flat", type=float, help="one share of the peak for all")
    parser.add_argument("--left-out", action="store_true", help="also by plans that know no run of the same source")
    given = parser.parse_args()
    found: dict[str, list[float]] = {}
    for name, of in SETS.items():
        found[name] = []
        for run in runs(given.flat, of):
            error = run.error(SUSTAINED)
            found[name].append(error)
            print(f"{run.name}: planned / published {math.exp(error):.2f}")
    if given.left_out:
        all_runs = list(runs(given.flat, "runs"))
        tried = [[run.error(share) for share in TRIED] for run in all_runs]
        print(f"share that fits all best: {TRIED[best(tried)]:.2f}")
        for name, key in (("without the run", lambda run: run.name), ("without its source", lambda run: run.source)):
            found[name] = []
            for run, errors in zip(all_runs, tried, strict=True):
                known = [each for other, each in zip(all_runs, tried, strict=True) if key(other) != key(run)]
                found[name].append(errors[best(known)])
    for name, errors in found.items():
        sizes = [abs(math.expm1(error)) for error in errors]
        print(f"{name}: median {median(sizes):.1%}, largest {max(sizes):.1%}, {len(sizes)} runs")


if __name__ == "__main__":
    main()
