"""A plan as a person reads it: what each kind of rank holds, where a step's time goes, what failures cost."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from megatrain.config import RunConfig
from megatrain.plan import rules
from megatrain.plan.flops import num_parameters, num_trained_parameters
from megatrain.plan.memory import RankMemory
from megatrain.plan.nearest import as_overrides
from megatrain.plan.run_plan import RunPlan
from megatrain.units import format_bytes, format_count, format_duration

_NAMES = {
    "compute": "arithmetic",
    "tensor": "tensor messages",
    "pipeline": "pipeline messages",
    "bubble": "pipeline idle",
    "data": "data messages",
    "update": "update",
}
_SMALLEST_SHARE = 0.0005
_UNKNOWN = "for how long is not known: how many steps train.epochs is, the data says, which is not here"


def show(plan: RunPlan) -> None:
    console = Console(highlight=False, markup=False, soft_wrap=True)
    for line in _head(plan):
        console.print(line)
    console.print()
    console.print(_memory(plan.ranks))
    console.print()
    for line in _rest(plan):
        console.print(line)
    for problem in plan.problems:
        console.print(f"problem  {problem}", style="bold red")


def _head(plan: RunPlan) -> list[str]:
    config, cluster, parallel = plan.config, plan.cluster, plan.config.parallel
    return [
        f"model    {config.model.family}, {num_parameters(config.model):,} parameters, {_trained(config)}"
        f"{plan.flops_per_token / 1e9:,.2f} GFLOPs a token",
        f"layout   {plan.world_size:,} rank(s), {cluster.nodes:,} node(s) of {cluster.gpus_per_node} "
        f"{cluster.device.name}: data {rules.data_degree(config, plan.world_size)} x tensor {parallel.tensor} x "
        f"pipeline {parallel.pipeline}, ZeRO {parallel.zero_stage}, recompute {parallel.recompute}",
        _engine(plan),
        f"batch    {plan.tokens_per_step:,} tokens a step, in {plan.num_micro_batches} micro-batch(es){_ramp(plan)}",
    ]


def _trained(config: RunConfig) -> str:
    if config.lora is None:
        return ""
    return f"{num_trained_parameters(config.model, config.lora):,} in adapters beside them, "


def _engine(plan: RunPlan) -> str:
    """The engine and the chunks of a pipeline rank, and those that would be faster."""
    parallel, fastest = plan.config.parallel, plan.fastest
    text = f"engine   {parallel.engine}"
    if parallel.pipeline > 1:
        text += f", {parallel.pipeline_chunks} chunk(s) of layers on each pipeline rank"
    if not fastest.changes:
        return f"{text}; no other is faster"
    return f"{text}; {fastest.step_seconds:,.3f} s a step with {as_overrides(fastest.changes)}"


def _ramp(plan: RunPlan) -> str:
    """From which step on each size of a ramp holds, and the tokens of the whole run."""
    phases, seq_len = plan.batch_phases, plan.config.data.seq_len
    if len(phases) == 1:
        return ""
    sizes = (f"{phase.batch_size * seq_len:,} from step {phase.first_step:,} on" for phase in phases)
    return f", by a ramp: {', '.join(sizes)}; {_in_all(plan)}"


def _in_all(plan: RunPlan) -> str:
    return "how many in all, the data says" if plan.tokens is None else f"{plan.tokens:,} in all"


def _memory(ranks: tuple[RankMemory, ...]) -> Table:
    """A row for each stage. Buffers: what the peak has more than is kept."""
    table = Table(title="GB of a rank", title_justify="left", box=None, pad_edge=False, collapse_padding=True)
    columns = ("weights", "gradients", "optimizer", "activations", "buffers", "peak", "in CPU")
    for column in ("stage", "ranks", "params", *columns):
        table.add_column(column, justify="right")
    for rank in ranks:
        kept = (rank.weights_bytes, rank.gradients_bytes, rank.optimizer_bytes, rank.activations_bytes)
        sizes = (*kept, rank.peak_bytes - rank.total_bytes, rank.peak_bytes, sum(rank.cpu.values()))
        figures = [f"{size / 1e9:,.2f}" for size in sizes]
        table.add_row(f"{rank.stage}", f"{rank.num_ranks:,}", format_count(rank.parameters), *figures)
    return table


def _rest(plan: RunPlan) -> list[str]:
    config, failures, time = plan.config, plan.failures, plan.time
    shares = {_NAMES[key]: seconds / time.step for key, seconds in time.parts.items()}
    spent = ", ".join(f"{name} {share:.1%}" for name, share in shares.items() if share >= _SMALLEST_SHARE)
    long = f"{_in_words(plan.days)} for {config.train.steps:,} steps" if plan.days is not None else _UNKNOWN
    in_node = max(sum(rank.cpu.values()) for rank in plan.ranks) * plan.cluster.gpus_per_node
    return [
        f"CPU      {format_bytes(in_node)} of a node at the most: the copy that a save makes, and what is offloaded",
        f"step     {time.step:,.3f} s, an estimate with arithmetic at {plan.efficiency:.0%} of peak: {spent}",
        f"speed    {plan.tokens_per_second:,.0f} tokens/s, MFU {plan.mfu:.1%}: {long}",
        f"failures one in {failures.mtbf / 3600:,.1f} hours, {failures.restart:,.0f} s to restart, "
        f"{failures.checkpoint:,.2f} s a save",
        f"goodput  {plan.goodput:.2%} with a save every {plan.interval_seconds:,.0f} s ({plan.interval_steps:,} "
        f"step(s)), the best{_days(plan.days, plan.goodput)}; {plan.configured_goodput:.2%} with "
        f"checkpoint.every_steps={config.checkpoint.every_steps}{_days(plan.days, plan.configured_goodput)}",
    ]


def _days(days: float | None, goodput: float) -> str:
    if days is None:
        return ""
    return f": {_in_words(days / goodput)}" if goodput else ": never done"


def _in_words(days: float) -> str:
    return f"{days:,.1f} days" if days >= 0.1 else format_duration(days * 86400)
