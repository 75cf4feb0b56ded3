"""The charts of a run: each drawn by one function into the axes it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, MaxNLocator

from megatrain.observe.record import Column, RunRecord

CHART_INCHES = (5.0, 3.1)  # small, so that its text can be read on a phone
MAX_POINTS = 400
LEGEND_ABOVE: dict[str, Any] = {"borderaxespad": 0.2, "handlelength": 1, "columnspacing": 1.2, "labelspacing": 0.3}
MAX_BARS = 60  # of the chart of time: wide enough to see what a save or a validation costs among steps

INK, PALE_INK, GRID = "#2f3640", "#7a828c", "#e6e8eb"
BLUE, RED = "#2c6fad", "#c2553d"
PART_COLOURS = {
    "data": "#d9a441",
    "forward_backward": "#2c6fad",
    "exchange": "#4a5f86",
    "optimizer": "#7fb3d9",
    "eval": "#6a9f6e",
    "save": "#c2553d",
    "other": "#b4bac1",
}
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 16,
    "axes.labelcolor": PALE_INK,
    "axes.labelsize": 8.5,
    "axes.edgecolor": PALE_INK,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": PALE_INK,
    "ytick.color": PALE_INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.fonttype": "path",
    "svg.hashsalt": "megatrain",
}


def draw_loss(axes: Axes, run: RunRecord) -> None:
    """Training and validation loss by step."""
    axes.set_title("Loss")
    _line(axes, run, "loss", label="training")
    if len(run.validation_steps):
        axes.plot(run.validation_steps, run.validation_losses, "o-", color=RED, markersize=3.5, label="validation")
    axes.set_ylabel("nats a token")
    axes.legend(loc="upper right")
    _finish(axes, run)


def draw_throughput(axes: Axes, run: RunRecord) -> None:
    """Tokens a second of the whole job, by step."""
    axes.set_title("Throughput")
    _line(axes, run, "tokens_per_second")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("tokens a second")
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    _finish(axes, run)


def draw_grad_norm(axes: Axes, run: RunRecord) -> None:
    """Gradient norm before clipping, by step; on a logarithmic axis where it spans more than a factor of 30."""
    axes.set_title("Gradient norm")
    _line(axes, run, "grad_norm")
    norms = run.columns["grad_norm"]
    positive = norms[np.isfinite(norms) & (norms > 0)]
    if len(positive) and positive.max() > 30 * positive.min():
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set_ylabel("before clipping")
    _finish(axes, run)


def draw_learning_rate(axes: Axes, run: RunRecord) -> None:
    """Learning rate by step."""
    axes.set_title("Learning rate")
    _line(axes, run, "lr")
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    _finish(axes, run)


def draw_time(axes: Axes, run: RunRecord) -> None:
    """Where the time of a step went, by step, one part upon the other."""
    axes.set_title("Where the time went", pad=36)  # the legend is between title and axes
    steps, _, _ = _binned(run.steps, MAX_BARS)
    names = [*(n for n in PART_COLOURS if n in run.parts), *(n for n in run.parts if n not in PART_COLOURS)]
    heights = [_binned(run.parts[name], MAX_BARS)[0] for name in names]
    colours = [PART_COLOURS.get(name, PALE_INK) for name in names]
    if heights:
        labels = [name.replace("_", ", ") for name in names]
        axes.stackplot(steps, *heights, labels=labels, colors=colours, step="mid", linewidth=0)
        totals = np.sum(heights, axis=0)
        axes.set_ylim(0, min(totals.max() * 1.05, 3 * np.median(totals)) or 1.0)  # a slow first step hides no other
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=-(-len(names) // 2), **LEGEND_ABOVE)
    axes.set_ylabel("seconds a step")
    _finish(axes, run, mark=False)


def draw_progress(axes: Axes, run: RunRecord) -> None:
    """Steps by the hours since the run began: gaps are when it did not run."""
    axes.set_title("Progress over time")
    times = run.columns["time"]
    began = min([float(np.nanmin(times)), *(event["time"] for event in run.events if "time" in event)])
    scale, unit = (3600.0, "hours") if np.nanmax(times) - began > 2 * 3600 else (60.0, "minutes")
    axes.plot((times - began) / scale, run.steps, color=BLUE)
    resumes = [event for event in run.events if event["event"] == "resume" and "time" in event]
    last = max([float(np.nanmax(times)), *(event["time"] for event in resumes)])  # a start may find nothing to do
    axes.set_xlim(0, max(last - began, 1.0) / scale * 1.02)
    resumed_at = [(event["time"] - began) / scale for event in resumes]
    axes.plot(resumed_at, [event["step"] for event in resumes], "o", color=RED, markersize=4)
    _mark_resumes(axes, resumed_at)
    axes.set_xlabel(f"{unit} since the start")
    axes.set_ylabel("step")
    axes.set_ylim(bottom=0)


CHARTS: Mapping[str, Callable[[Axes, RunRecord], None]] = {
    "loss": draw_loss,
    "throughput": draw_throughput,
    "gradient norm": draw_grad_norm,
    "learning rate": draw_learning_rate,
    "where the time went": draw_time,
    "progress over time": draw_progress,
}


def draw_chart(draw: Callable[[Axes, RunRecord], None], run: RunRecord) -> Figure:
    """One chart, as a figure of its own."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=CHART_INCHES, layout="constrained")
        draw(figure.add_subplot(), run)
        return figure


def draw_all(run: RunRecord, headline: str) -> Figure:
    """All charts in one picture under ``headline``."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12.4, 10.4), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
        figure.suptitle(_plain(headline), x=0.012, ha="left", fontsize=12, fontweight="bold")
        for place, draw in enumerate(CHARTS.values(), start=1):
            draw(figure.add_subplot(3, 2, place), run)
        return figure


def _line(axes: Axes, run: RunRecord, name: str, label: str | None = None) -> None:
    """A column as a line; of a long run the mean of neighbouring steps, within the band of their extremes."""
    steps, _, _ = _binned(run.steps)
    mean, low, high = _binned(run.columns[name])
    if len(run.steps) > MAX_POINTS:
        axes.fill_between(steps, low, high, color=BLUE, alpha=0.18, linewidth=0)
    marker = "o" if len(steps) == 1 else None
    axes.plot(steps, mean, color=BLUE, label=label, marker=marker)


def _binned(column: Column, max_groups: int = MAX_POINTS) -> tuple[Column, Column, Column]:
    """Mean, least and largest of each of at most ``max_groups`` groups of neighbours, NaN where all are."""
    width = -(-len(column) // max_groups)
    padded = np.pad(column, (0, -len(column) % width), constant_values=np.nan)
    groups = np.ma.masked_invalid(padded.reshape(-1, width))
    return groups.mean(1).filled(np.nan), groups.min(1).filled(np.nan), groups.max(1).filled(np.nan)


def _finish(axes: Axes, run: RunRecord, mark: bool = True) -> None:
    """What all charts by step share: the axis of steps, and a mark where the run was resumed."""
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    first, last = float(run.steps[0]), float(run.steps[-1])
    axes.set_xlim(min(0.0, first), max(last, first + 1) * 1.01)
    if mark:
        _mark_resumes(axes, run.resumed_at)


def _mark_resumes(axes: Axes, places: Sequence[float]) -> None:
    """A dashed line where the run was resumed, labelled as long as the labels do not run into one another."""
    left, right = axes.get_xlim()
    labelled = -np.inf
    for x in sorted(places):
        axes.axvline(x, color=RED, linewidth=0.8, linestyle=(0, (3, 3)), alpha=0.8)
        if x - labelled > 0.1 * (right - left):
            labelled = x
            above = axes.get_xaxis_transform()  # x in steps or hours, y as a fraction of the axes' height
            axes.text(x, 1.02, "resumed", transform=above, color=RED, fontsize=7, ha="center", va="bottom")


def _plain(text: str) -> str:
    """Text that matplotlib must not read as a formula."""
    return text.replace("$", r"\$")
