"""Whole runs of an encoder and its decoder on pairs: killed, gone on with, evaluated by loss and by BLEU, exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sacrebleu.metrics.bleu import BLEU
from tokenizers import Tokenizer
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedTokenizerFast

import megatrain
from data_tools.supervised import SourceAndTarget
from data_tools.tokenizer import load_tokenizer, train_tokenizer
from data_tools.units import ReadOptions
from megatrain.checkpoint.lock import is_alive
from megatrain.tasks.evaluation import evaluate_tasks
from megatrain.train.convert import export_checkpoint, import_folder
from megatrain.train.evaluation import evaluate_checkpoint
from tests.in_process import Ended
from tests.runs import Metrics, TinyData, TrainProcess, tiny_config, wait_until, write_config
from tests.served import ServedRanks
from tests.supervised import make_answers

CONTEXT = 48
PAIRS = [(" ".join(map(str, range(k))), f"{k} items.\n" * (1 + k % 3)) for k in range(2, 20)]
MODELS: dict[str, dict[str, Any]] = {
    "t5": {"family": "t5", "num_key_value_heads": None, "max_position_embeddings": CONTEXT},
    "marian": {  # of two vocabularies
        "family": "marian",
        "num_key_value_heads": None,
        "max_position_embeddings": CONTEXT,
        "share_encoder_decoder_embeddings": False,
    },
}
STEPS = {"t5": 40, "marian": 10}  # until what is generated has words, and is not yet the same everywhere
SECTIONS: dict[str, dict[str, Any]] = {
    "objective": {"type": "sequence_to_sequence", "target_len": 40},
    "train": {"steps": 10, "eval_every_steps": 5, "eval_batches": None, "global_batch_size": 4},
    "optimizer": {"lr": 1.0e-2},
    "checkpoint": {"every_steps": 1},
}


@pytest.fixture(scope="module", params=MODELS)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def pairs(family: str, tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, target = tmp_path_factory.mktemp("pairs"), None
    if family == "marian":
        (folder / "targets.txt").write_text("".join(target for _, target in PAIRS))
        train_tokenizer([str(folder / "targets.txt")], 290, folder / "target.json", ReadOptions(), ["<pad>"])
        target = load_tokenizer(folder / "target.json")
    return make_answers(folder, PAIRS * 4, tiny_data.tokenizer, SourceAndTarget("<|endoftext|>", None, target))


def write_run(folder: Path, data: TinyData, pairs: Path, family: str, **train: Any) -> Path:
    """A config beside the run's folder."""
    sections = {
        **SECTIONS,
        "model": MODELS[family],
        "data": {"train": [{"path": str(pairs)}], "validation": [{"path": str(pairs)}], "seq_len": 48},
    }
    sections["train"] |= train
    return write_config(folder.with_suffix(".yaml"), tiny_config(data, folder, **sections))


@pytest.fixture(scope="module")
def translator(
    tiny_data: TinyData, pairs: Path, family: str, one_rank: ServedRanks, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a finished run, and its export in `hf` beside it."""
    run_dir = tmp_path_factory.mktemp("translator") / "run"
    one_rank.finish(write_run(run_dir, tiny_data, pairs, family, steps=STEPS[family], eval_every_steps=STEPS[family]))
    export_checkpoint(run_dir, run_dir.parent / "hf")
    return run_dir


def by_transformers(folder: Path, num_beams: int) -> list[str]:
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    batch = tokenizer([source for source, _ in PAIRS], return_tensors="pt", padding=True, return_token_type_ids=False)
    found = model.generate(**batch, max_new_tokens=12, num_beams=num_beams, do_sample=False)
    if (folder / "target_tokenizer.json").exists():
        special = {"eos_token": "<|endoftext|>", "pad_token": "<pad>"}
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "target_tokenizer.json"), **special)
    return [tokenizer.decode(row, skip_special_tokens=True) for row in found]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_bleu_is_that_of_what_transformers_generates(
    num_beams: int, run_megatrain: Callable[..., Ended], translator: Path, tmp_path: Path
) -> None:
    """Half of the references are what is generated; the others differ in the last word."""
    texts = by_transformers(translator.parent / "hf", num_beams)
    references = [text if row % 2 else f"{text} indeed" for row, text in enumerate(texts)]
    rows = [{"s": source, "t": text} for (source, _), text in zip(PAIRS, references, strict=True)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"name": "pairs", "kind": "generate", "path": str(tmp_path / "rows.jsonl"), "num_beams": num_beams}
    task |= {"prompt": "{{ s }}", "answer": "{{ t }}", "max_new_tokens": 12, "stop": [], "metrics": ["bleu", "chrf"]}
    (tmp_path / "tasks.yaml").write_text(json.dumps([task]))
    options = ("--tasks", tmp_path / "tasks.yaml", "--out", tmp_path / "out.jsonl", "--json")
    ended = run_megatrain("eval", translator, *options)
    assert ended.code == 0, ended.err
    assert [json.loads(line)["generated"] for line in (tmp_path / "out.jsonl").open()] == texts
    figures = json.loads(ended.out)["tasks"]["pairs"]
    assert 0 < figures["bleu"]["value"] < 100
    assert figures["bleu"]["value"] == pytest.approx(BLEU().corpus_score(texts, [references]).score)
    assert figures["chrf"]["n"] == len(PAIRS)


def test_a_source_may_fill_the_context(translator: Path, tmp_path: Path) -> None:
    """What the decoder writes takes no room of what the encoder reads."""
    tokenizer = Tokenizer.from_file(str(translator.parent / "hf" / "tokenizer.json"))
    whole = " ".join(map(str, range(60)))
    beginnings = [whole[:length] for length in range(len(whole))]
    texts = {len(tokenizer.encode(text, add_special_tokens=False).ids): text for text in beginnings}
    rows = "".join(json.dumps({"s": texts[count]}) + "\n" for count in (CONTEXT - 1, CONTEXT))
    (tmp_path / "rows.jsonl").write_text(rows)
    task = {"name": "t", "kind": "generate", "path": str(tmp_path / "rows.jsonl"), "prompt": "{{ s }}", "answer": "1"}
    (tmp_path / "tasks.yaml").write_text(json.dumps([task]))
    (result,) = evaluate_tasks(translator, tmp_path / "tasks.yaml")
    assert list(result.skipped) == [1]


def test_an_imported_model_scores_pairs_as_pairs(translator: Path, pairs: Path, tmp_path: Path) -> None:
    """No config comes with it that says what it was trained for."""
    import_folder(translator.parent / "hf", tmp_path / "imported")
    figures = [
        evaluate_checkpoint(place, pairs, 48, show_progress=False) for place in (translator, tmp_path / "imported")
    ]
    assert figures[0] == pytest.approx(figures[1], rel=1e-6)


@pytest.mark.slow
@pytest.mark.acceptance
def test_a_killed_translator_goes_on_exactly(
    tiny_data: TinyData,
    pairs: Path,
    family: str,
    two_ranks: ServedRanks,
    run_megatrain: Callable[..., Ended],
    tmp_path: Path,
) -> None:
    """`megatrain train --procs 2`, to the last bit. Then `eval` finds the loss of the run's last evaluation."""
    straight = write_run(tmp_path / "straight", tiny_data, pairs, family)
    two_ranks.finish(straight)
    for again in (False, True):
        process = TrainProcess(write_run(tmp_path / "killed", tiny_data, pairs, family), 2)
        if not again:
            process.wait_for_step(4)
            process.kill_all()
        code, output = process.wait()
        wait_until(lambda: not is_alive(tmp_path / "killed"))
        assert again == (code == 0), output
    whole, killed = (Metrics.read(tmp_path / name) for name in ("straight", "killed"))
    assert (killed.steps, killed.losses, killed.norms) == (whole.steps, whole.losses, whole.norms)
    ended = run_megatrain("eval", tmp_path / "killed", "--data", pairs, "--json")
    validations = megatrain.open_run(tmp_path / "killed").validations
    assert json.loads(ended.out)["loss"] == pytest.approx(validations["validation_loss"][-1].as_py())
