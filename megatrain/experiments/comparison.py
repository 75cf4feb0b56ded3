"""Several runs on one page: their curves laid over one another, what differs in their configs, the best of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex

from megatrain.errors import ConfigError
from megatrain.experiments.runs import SORTS, Logged, differing_keys, summaries
from megatrain.observe.charts import draw_curves
from megatrain.observe.record import Column, RunRecord, read_run
from megatrain.observe.report import PAGES, data_uri, template, write_file

Curve = tuple[Column, Column]


def write_comparison(run_dirs: Sequence[Path], out: Path) -> None:
    """Write the page of these runs to ``out`` (.html).

    Raises DataError where one has no metrics of a step, ConfigError where ``out`` is no page or cannot be written.
    """
    if out.suffix.lower() not in PAGES:
        raise ConfigError(f"--out {out}: several runs are shown on a page, {' or '.join(PAGES)}.")
    folders = dict(zip(_names(run_dirs), run_dirs, strict=True))
    records = {name: read_run(folder) for name, folder in folders.items()}
    curves: dict[str, dict[str, Curve]] = {
        "Training loss": {n: (r.steps, r.columns["loss"]) for n, r in records.items()}
    }
    validated = {n: (r.validation_steps, r.validation_losses) for n, r in records.items() if len(r.validation_steps)}
    curves |= {"Validation loss": validated} if validated else {}
    sets = list(dict.fromkeys(each for record in records.values() for each in record.validation_sets))
    if len(sets) > 1:
        for each in sets:
            of_set = {n: r.validation_sets[each] for n, r in records.items() if each in r.validation_sets}
            curves[f"Validation loss, {each}"] = of_set
    palette = colormaps["tab10" if len(folders) <= 10 else "turbo"].resampled(max(len(folders), 10))
    colors = {name: to_hex(palette(number)) for number, name in enumerate(folders)}
    logged = {folders[name]: _logged(record) for name, record in records.items()}
    runs = sorted(summaries(folders, logged.__getitem__), key=SORTS["validation_loss"])
    page = template("comparison.html.j2").render(
        runs=runs,
        keys=differing_keys(runs),
        colors=colors,
        charts={title: data_uri(draw_curves(title, of_runs, colors)) for title, of_runs in curves.items()},
        best={title: best for title, of_runs in curves.items() if (best := _best(of_runs)) is not None},
    )
    write_file(out, page.encode())


def _logged(record: RunRecord) -> Logged:
    """What `summaries` would read once more."""
    values, last = record.columns, record.events[-1] if record.events else {}
    is_last = last.get("time", 0.0) >= values["time"][-1]
    loss = float(values["loss"][-1])
    best = _best({record.name: (record.validation_steps, record.validation_losses)})
    return Logged(
        step=int(record.steps[-1]),
        loss=loss if math.isfinite(loss) else None,
        best=best and best[1:],
        last_event=last.get("event") if is_last else None,
    )


def _best(curves: dict[str, Curve]) -> tuple[str, float, int] | None:
    """The run with the lowest value, that value and its step."""
    finite = [
        (float(values[k]), int(steps[k]), name)
        for name, (steps, values) in curves.items()
        if np.isfinite(values).any()
        for k in [int(np.nanargmin(values))]
    ]
    if not finite:
        return None
    value, step, name = min(finite)
    return name, value, step


def _names(run_dirs: Sequence[Path]) -> list[str]:
    """As little of each path as tells the runs apart. Raises ConfigError where one is given twice."""
    parts = [path.resolve().parts for path in run_dirs]
    if len(set(parts)) < len(parts):
        raise ConfigError("A run is given twice: name each once.")
    length = 1
    while len({each[-length:] for each in parts}) < len(parts):
        length += 1
    return [str(Path(*each[-length:])) for each in parts]
