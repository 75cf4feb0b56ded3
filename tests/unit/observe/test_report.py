import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread

from megatrain.errors import ConfigError, DataError
from megatrain.observe.charts import draw_chart
from megatrain.observe.goodput import Goodput
from megatrain.observe.metrics import MetricsWriter
from megatrain.observe.record import read_run
from megatrain.observe.report import write_report

HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(2)> $\\frac$ {{ 7 * 7 }}"


class Page(HTMLParser):
    """The tags, the addresses and the text of a page, as a browser would take them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def run_dir(tmp_path, make_step) -> Path:
    """A run of 40 steps that was killed after step 25 and resumed at step 20."""
    run = tmp_path / "demo"
    for first, last, resume in ((1, 25, 0), (21, 40, 20)):
        writer = MetricsWriter(run, resume)
        redone = {"num_steps_redone": writer.num_dropped_steps}
        writer.event("resume" if resume else "start", resume, {"layout": "2 ranks", "note": HOSTILE, **redone})
        for step in range(first, last + 1):
            writer.step(make_step(step))
            if step % 10 == 0:
                writer.validation(step, 9.5 - step / 100, 0.2)
                writer.event("save", step, {"path": f"step-{step}", "seconds": 0.1})
        writer.close()
    (run / "config.yaml").write_text(f"run: {{dir: runs/demo}}\nnote: {HOSTILE}\n")
    return run


def test_the_page_stands_alone_and_tells_what_happened(run_dir, tmp_path):
    write_report(run_dir, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.tags.count("img") == 6
    assert len(page.addresses) == 6
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses)
    assert "8.6000" in page.text  # the last training loss
    assert "9.1000" in page.text  # the last validation loss
    assert "num steps redone5" in page.text
    assert "runs/demo" in page.text


def test_events_are_told_in_words(run_dir, tmp_path):
    writer = MetricsWriter(run_dir, 40)
    startup = {"imports": 1.4069585800170898, "engine": 0.25}
    goodput = Goodput(training=30.0, restarting=10.0)._asdict()
    writer.event("resume", 40, {"startup_seconds": startup, "message": "resumed from step-40", "goodput": goodput})
    writer.close()
    write_report(run_dir, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "<dt>startup seconds</dt><dd>imports 1.41, engine 0.25</dd>" in text
    assert "<dd>resumed from step-40</dd>" in text
    assert "<td>starting</td>" in text
    assert "restarting" not in text


def test_the_legend_leaves_the_chart_its_width(run_dir):
    figure = draw_chart("Where the time went", read_run(run_dir))
    FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    assert axes.get_position().width > 0.8
    legend = axes.get_legend().get_window_extent()
    assert legend.x1 <= figure.bbox.x1
    assert axes.get_window_extent().y1 <= legend.y0 < legend.y1 <= axes._left_title.get_window_extent().y0


def test_each_config_and_a_divergence_are_shown(run_dir, tmp_path, make_step):
    for step, lr in ((0, "0.001"), (10, "0.001"), (20, "0.01")):
        (run_dir / f"config-step-{step}.yaml").write_text(f"optimizer: {{lr: {lr}}}\n")
    writer = MetricsWriter(run_dir, 40)
    writer.event("resume", 40, {"changes": {"optimizer.lr": [0.001, 0.01]}})
    for step in range(41, 81):
        writer.step(make_step(step, loss=1414.0))
    writer.close()
    write_report(run_dir, tmp_path / "report.html")
    text = Page((tmp_path / "report.html").read_text()).text
    assert "From step 1 on\noptimizer: {lr: 0.001}" in text
    assert "From step 11 on" not in text  # the same once more
    assert "From step 21 on\noptimizer: {lr: 0.01}" in text
    assert "changesoptimizer.lr 0.001 -> 0.01" in text
    assert "it diverged: the loss was 8.99 at first and is 1,414 in the end" in text


def test_text_of_others_is_shown_never_run(run_dir, tmp_path):
    write_report(run_dir, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    assert "script" not in page.tags
    assert page.text.count(HOSTILE) == 3  # the config and two events, letter by letter


def test_a_hostile_run_name_is_escaped(run_dir, tmp_path):
    named = run_dir.rename(tmp_path / "a $b^{ <script> c")
    write_report(named, tmp_path / "report.html")
    write_report(named, tmp_path / "report.png")
    assert "script" not in Page((tmp_path / "report.html").read_text()).tags
    assert imread(tmp_path / "report.png").shape[:2] == (1560, 1860)


def test_a_picture_is_written_where_asked(run_dir, tmp_path):
    write_report(run_dir, tmp_path / "report.png")
    pixels = imread(tmp_path / "report.png")[:, :, :3]
    blue = np.abs(pixels - np.array([0x2C, 0x6F, 0xAD]) / 255).max(-1) < 0.02
    assert blue.sum() > 5000  # lines were drawn, not only axes
    assert [path.name for path in tmp_path.glob("*.tmp")] == []


def test_the_record_reads_what_the_trainer_wrote(run_dir):
    run = read_run(run_dir)
    assert run.steps.tolist() == list(range(1, 41))
    assert run.validation_steps.tolist() == [10, 20, 30, 40]
    assert run.resumed_at == [20]
    assert run.parts["forward_backward"].tolist() == [0.4] * 40


def test_long_and_single_step_runs_are_drawn(tmp_path, make_step):
    long, short = MetricsWriter(tmp_path / "long"), MetricsWriter(tmp_path / "short")
    for step in range(1, 3001):
        long.step(make_step(step, grad_norm=10.0 ** (step % 5), loss=float("nan") if step < 1000 else 2.0))
    short.step(make_step(1, loss=float("nan"), grad_norm=float("inf"), mfu=None, parts={}))
    long.close()
    short.close()
    for name in ("long", "short"):
        write_report(tmp_path / name, tmp_path / f"{name}.html")
    assert "not finite" in Page((tmp_path / "short.html").read_text()).text
    assert (tmp_path / "long.html").stat().st_size < 2_000_000


def test_torn_and_senseless_lines_are_passed_over(run_dir):
    with (run_dir / "metrics.jsonl").open("ab") as file:
        file.write(b'[1]\n"x"\n{"step": "7", "loss": 1}\n\x00\x00\n{"step":41,"loss":"high","parts":3}\n{"step":42,"lo')
    run = read_run(run_dir)
    assert run.steps[-1] == 41
    assert np.isnan(run.columns["loss"][-1])


@pytest.mark.parametrize("content", [None, b"", b'{"event":"start","step":0}\n'])
def test_a_folder_without_steps_is_a_data_error(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=r"metrics\.jsonl"):
        write_report(tmp_path, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("out", ["report.docx", "missing/report.html"])
def test_an_unwritable_output_is_a_usage_error(run_dir, tmp_path, out):
    with pytest.raises(ConfigError, match="--out"):
        write_report(run_dir, tmp_path / out)


@pytest.mark.filterwarnings("error")
def test_a_late_start_without_work_is_drawn(run_dir, tmp_path):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    last = max(line["time"] for line in lines if "time" in line)
    late = {"event": "resume", "step": 40, "layout": "2 ranks", "time": last + 3600.0}
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(late) + "\n")
    write_report(run_dir, tmp_path / "report.html")
