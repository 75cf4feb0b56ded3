"""The charts of a run: each drawn by one function into the axes it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
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

STYLE = Path(__file__).with_name("charts.mplstyle")
BLUE, RED, PALE_INK = "#2c6fad", "#c2553d", "#7a828c"
PART_COLORS = {
    "data": "#d9a441",
    "forward_backward": "#2c6fad",
    "exchange": "#4a5f86",
    "optimizer": "#7fb3d9",
    "eval": "#6a9f6e",
    "save": "#c2553d",
    "other": "#b4bac1",
}


def draw_loss(axes: Axes, run: RunRecord) -> None:
    _plot(axes, run, "loss", "nats a token", label="training")
    if len(run.validation_steps):
        axes.plot(run.validation_steps, run.validation_losses, "o-", color=RED, markersize=3.5, label="validation")
    axes.legend(loc="upper right")


def draw_throughput(axes: Axes, run: RunRecord) -> None:
    _plot(axes, run, "tokens_per_second", "tokens a second")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))


def draw_grad_norm(axes: Axes, run: RunRecord) -> None:
    """Gradient norm before clipping, by step; on a logarithmic axis where it spans more than a factor of 30."""
    _plot(axes, run, "grad_norm", "before clipping")
    norms = run.columns["grad_norm"]
    positive = norms[np.isfinite(norms) & (norms > 0)]
    if len(positive) and positive.max() > 30 * positive.min():
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)


def draw_learning_rate(axes: Axes, run: RunRecord) -> None:
    _plot(axes, run, "lr")
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))


def draw_time(axes: Axes, run: RunRecord) -> None:
    """Where the time of a step went, by step, one part upon the other."""
    axes.set_title(axes.get_title("left"), pad=36)  # the legend is between title and axes
    steps, _, _ = _binned(run.steps, MAX_BARS)
    names = [*(n for n in PART_COLORS if n in run.parts), *(n for n in run.parts if n not in PART_COLORS)]
    heights = [_binned(run.parts[name], MAX_BARS)[0] for name in names]
    colors = [PART_COLORS.get(name, PALE_INK) for name in names]
    if heights:
        labels = [name.replace("_", ", ") for name in names]
        axes.stackplot(steps, *heights, labels=labels, colors=colors, step="mid", linewidth=0)
        totals = np.sum(heights, axis=0)
        axes.set_ylim(0, min(totals.max() * 1.05, 3 * np.median(totals)) or 1.0)  # a slow first step hides no other
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=-(-len(names) // 2), **LEGEND_ABOVE)
    axes.set_ylabel("seconds a step")
    _set_step_axis(axes, run)


def draw_progress(axes: Axes, run: RunRecord) -> None:
    """Steps by the hours since the run began: gaps are when it did not run."""
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
    "Loss": draw_loss,
    "Throughput": draw_throughput,
    "Gradient norm": draw_grad_norm,
    "Learning rate": draw_learning_rate,
    "Where the time went": draw_time,
    "Progress over time": draw_progress,
}
"""Each chart by its title."""


def draw_chart(title: str, run: RunRecord) -> Figure:
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=CHART_INCHES, layout="constrained")
        CHARTS[title](figure.add_subplot(title=title), run)
        return figure


def draw_curves(title: str, curves: Mapping[str, tuple[Column, Column]], colors: Mapping[str, str]) -> Figure:
    """Several runs' curves, steps and values by the run's name, laid over one another; of long ones means."""
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=CHART_INCHES, layout="constrained")
        axes = figure.add_subplot(title=title, xlabel="step", ylabel="nats a token")
        for name, (steps, values) in curves.items():
            x, y = _binned(steps)[0], _binned(values)[0]
            axes.plot(x, y, color=colors[name], marker="o" if len(x) < 20 else None, markersize=3)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        return figure


def draw_all(run: RunRecord, headline: str) -> Figure:
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(12.4, 10.4), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
        text = headline.replace("$", r"\$")  # or matplotlib reads it as a formula
        figure.suptitle(text, x=0.012, ha="left", fontsize=12, fontweight="bold")
        for number, (title, draw) in enumerate(CHARTS.items(), start=1):
            draw(figure.add_subplot(3, 2, number, title=title), run)
        return figure


def _plot(axes: Axes, run: RunRecord, column: str, unit: str = "", label: str | None = None) -> None:
    """A column by step; of a long run the mean of neighboring steps, within the band of their extremes."""
    steps, _, _ = _binned(run.steps)
    mean, low, high = _binned(run.columns[column])
    if len(run.steps) > MAX_POINTS:
        axes.fill_between(steps, low, high, color=BLUE, alpha=0.18, linewidth=0)
    axes.plot(steps, mean, color=BLUE, label=label, marker="o" if len(steps) == 1 else None)
    axes.set_ylabel(unit)
    _set_step_axis(axes, run)
    _mark_resumes(axes, run.resumed_at)


def _binned(column: Column, max_groups: int = MAX_POINTS) -> tuple[Column, Column, Column]:
    """Mean, least and largest of each of at most ``max_groups`` groups of neighbours, NaN where all are."""
    width = -(-len(column) // max_groups)
    padded = np.pad(column, (0, -len(column) % width), constant_values=np.nan)
    groups = np.ma.masked_invalid(padded.reshape(-1, width))
    return groups.mean(1).filled(np.nan), groups.min(1).filled(np.nan), groups.max(1).filled(np.nan)


def _set_step_axis(axes: Axes, run: RunRecord) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    first, last = float(run.steps[0]), float(run.steps[-1])
    axes.set_xlim(min(0.0, first), max(last, first + 1) * 1.01)


def _mark_resumes(axes: Axes, positions: Sequence[float]) -> None:
    """A dashed line where the run was resumed, labelled as long as the labels do not run into one another."""
    left, right = axes.get_xlim()
    labelled = -np.inf
    for x in sorted(positions):
        axes.axvline(x, color=RED, linewidth=0.8, linestyle=(0, (3, 3)), alpha=0.8)
        if x - labelled > 0.1 * (right - left):
            labelled = x
            above = axes.get_xaxis_transform()  # x in steps or hours, y as a fraction of the axes' height
            axes.text(x, 1.02, "resumed", transform=above, color=RED, fontsize=7, ha="center", va="bottom")
