"""A run on one page: a self-contained HTML file, or a picture, for a person to look at."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from matplotlib.figure import Figure

from megatrain.atomic import commit_bytes
from megatrain.errors import ConfigError
from megatrain.observe.charts import CHARTS, draw_all, draw_chart
from megatrain.observe.goodput import PART_NAMES
from megatrain.observe.record import Column, RunRecord, read_run
from megatrain.units import format_bytes, format_count, format_duration

PAGES = (".html", ".htm")
PICTURES = (".png", ".svg", ".pdf")
MAX_SAVES_LISTED = 5


def write_report(run_dir: Path, out: Path) -> None:
    """Write the report of the run in ``run_dir`` to ``out``: a page (.html) or a picture (.png, .svg, .pdf).

    Raises ``DataError`` where the folder holds no metrics of a step, ``ConfigError`` where ``out`` cannot be written.
    """
    kind = out.suffix.lower()
    if kind not in PAGES + PICTURES:
        raise ConfigError(f"--out {out}: the report is written as one of {', '.join(PAGES + PICTURES)}.")
    run = read_run(run_dir)
    write_file(out, _picture(run, kind) if kind in PICTURES else _page(run).encode())


def write_file(out: Path, content: bytes) -> None:
    """Write a report. Raises ConfigError where ``out`` cannot be written."""
    try:
        commit_bytes(out, content)
    except OSError as error:
        raise ConfigError(f"--out {out}: {error.strerror}. Name a file that can be written.") from None


def template(name: str) -> Template:
    """A page's template. What is put in is always escaped: names, paths and configs are text of others."""
    environment = Environment(
        loader=PackageLoader("megatrain.observe", "."), autoescape=True, undefined=StrictUndefined
    )
    environment.filters |= {"duration": format_duration, "percent": "{:.1%}".format, "when": _when, "words": _in_words}
    environment.filters["figure"] = lambda value: "" if value is None else _figure(value, ".4f")
    return environment.get_template(name)


def _picture(run: RunRecord, kind: str) -> bytes:
    return _render(draw_all(run, f"{run.name}: {_status(run)}"), kind)


def _page(run: RunRecord) -> str:
    saves = [event for event in run.events if event["event"] == "save"]
    return template("report.html.j2").render(
        run=run,
        status=_status(run),
        summary=_summary(run),
        charts={title: data_uri(draw_chart(title, run)) for title in CHARTS},
        part_seconds={name: float(seconds.mean()) for name, seconds in run.parts.items()},
        goodput_names=PART_NAMES,
        num_saves=len(saves),
        last_saves=saves[-MAX_SAVES_LISTED:],
    )


def _summary(run: RunRecord) -> dict[str, str]:
    """What one wants to know first, ready to be shown; what is not known is left out."""
    columns = run.columns
    began = min([float(columns["time"][0]), *(event["time"] for event in run.events if "time" in event)])
    facts = {
        "steps": f"{run.steps[-1]:,.0f}",
        "tokens": format_count(columns["tokens"][-1]),
        "training loss, last": _figure(columns["loss"][-1], ".4f"),
    }
    if (divergence := run.divergence()) is not None:
        facts["diverged"] = divergence
    if len(run.validation_losses):
        facts["validation loss, last"] = _figure(run.validation_losses[-1], ".4f")
    facts["tokens a second, median"] = format_count(_median(columns["tokens_per_second"]))
    if np.isfinite(columns["mfu"]).any():
        facts["MFU, median"] = _figure(_median(columns["mfu"]), ".1%")
    facts["peak memory, rank 0"] = format_bytes(float(np.nan_to_num(columns["memory_bytes"]).max()))
    if run.goodput is not None:
        facts["goodput"] = f"{run.goodput.shares['training']:.1%}"
    facts["from first to last step"] = format_duration(float(columns["time"][-1]) - began)
    facts["resumed"] = f"{len(run.resumed_at)} times" if len(run.resumed_at) != 1 else "once"
    facts["skipped updates"] = _figure(columns["skipped"][-1], ".0f")
    return facts


def _status(run: RunRecord) -> str:
    last = [event for event in run.events if event["event"] not in ("save", "start", "resume")]
    message = last[-1].get("message") if last and last[-1]["step"] >= run.steps[-1] else None
    logged = f"step {run.steps[-1]:.0f} logged on {_when(run.columns['time'][-1])} UTC"
    return f"{logged}; {message}" if message else logged


def _in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_in_words(each)}" for name, each in value.items())
    if isinstance(value, list):
        return " -> ".join(map(_in_words, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _when(time: object) -> str:
    if not isinstance(time, int | float) or not np.isfinite(time):
        return "unknown"
    return datetime.fromtimestamp(float(time), timezone.utc).strftime("%Y-%m-%d %H:%M:%S")


def _median(column: Column) -> float:
    return float(np.nanmedian(column)) if np.isfinite(column).any() else float("nan")


def _figure(value: float, form: str) -> str:
    return format(value, form) if np.isfinite(value) else "not finite"


def data_uri(figure: Figure) -> str:
    """The chart as an image within the page: scripts and names inside an image reach nothing outside it."""
    return "data:image/svg+xml;base64," + base64.b64encode(_render(figure, ".svg")).decode()


def _render(figure: Figure, kind: str) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format=kind[1:], dpi=150)
    return content.getvalue()
