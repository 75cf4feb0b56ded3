"""Every command on a real run: what it prints, and what programs read from it."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from megatrain.train.convert import import_folder
from tests.cli.conftest import Megatrain
from tests.runs import TinyData, finished_config, tiny_config, write_config


def test_check_tells_the_layout(megatrain: Megatrain, tiny_data: TinyData, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", finished_config(tiny_data, tmp_path / "run"))
    assert megatrain("check", config, "--procs", 2) == (
        0,
        f"{config} is right on 2 rank(s): data 2 x tensor 1 x pipeline 1, 2 micro-batch(es) a step.\n"
        f"epochs   {tiny_data.prose} 0.02, {tiny_data.code} 0.03\n",
        "",
    )
    ended = megatrain("check", config, "parallel.tensor=2", "--nodes", 2, "--gpus-per-node", 2)
    assert "4 rank(s): data 2 x tensor 2 x pipeline 1" in ended.out
    odd = megatrain("check", config, "model.hidden_size=30", "model.head_dim=8")
    assert "transformers 5 does not load a llama whose hidden_size (30)" in odd.out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "size", [("--nodes", 2), ("--gpus-per-node", 4), ("--nodes", 2, "--gpus-per-node", 2), ("--procs", 2), ()]
)
def test_check_and_plan_mean_the_same_ranks(
    size: tuple[str | int, ...], megatrain: Megatrain, tiny_data: TinyData, tmp_path: Path
) -> None:
    config = write_config(
        tmp_path / "run.yaml", tiny_config(tiny_data, tmp_path / "run", train={"micro_batch_size": 1})
    )
    words = [config, "train.global_batch_size=16", *size]
    ranks = json.loads(megatrain("plan", *words, "--json").out)["world_size"]
    assert f"is right on {ranks} rank(s)" in megatrain("check", *words).out


def test_check_needs_no_data_for_a_given_vocabulary(megatrain: Megatrain, tiny_data: TinyData, tmp_path: Path) -> None:
    config = finished_config(tiny_data, tmp_path / "run")
    config["model"]["vocab_size"] = 512
    config["data"] = {"train": [{"path": "nowhere"}], "seq_len": 64}
    assert megatrain("check", write_config(tmp_path / "run.yaml", config)).code == 0


def test_check_questions_a_far_too_large_vocabulary(megatrain: Megatrain, tiny_data: TinyData, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", finished_config(tiny_data, tmp_path / "run"))
    asks = "more than twice the 512 of the tokenizer"
    for size, code, asked in ((1024, 0, False), (1025, 0, True), (511, 2, False)):
        ended = megatrain("check", config, f"model.vocab_size={size}")
        assert (ended.code, asks in ended.out) == (code, asked), ended.err
    assert "has token ids up to 511" in ended.err


def test_check_refuses_datasets_that_are_not_alike(
    megatrain: Megatrain, tiny_data: TinyData, sentinel_data: Path, tmp_path: Path
) -> None:
    config = finished_config(tiny_data, tmp_path / "run")
    config["data"]["validation"] = [{"path": str(sentinel_data)}]
    ended = megatrain("check", write_config(tmp_path / "run.yaml", config))
    assert (ended.code, f"{sentinel_data} was tokenized with another tokenizer" in ended.err) == (3, True), ended


def test_checkpoints_are_listed_oldest_first(megatrain: Megatrain, finished_run: Path) -> None:
    rows = json.loads(megatrain("checkpoint", "list", finished_run, "--json").out)
    assert [(row["step"], row["good"]) for row in rows] == [(2, True), (4, True), (6, True)]
    assert all(Path(row["path"]).is_dir() and row["problem"] is None for row in rows)
    assert [row["tokens"] for row in rows] == [8 * 64 * step for step in (2, 4, 6)]
    assert [row["validation_loss"] is None for row in rows] == [True, True, False]  # the last step is evaluated
    text = megatrain("checkpoint", "list", finished_run).out
    assert text.count("good") == 3
    assert f"{8 * 64 * 6:,} tokens  validation loss {rows[-1]['validation_loss']:.4f}" in text


def test_a_checkpoint_is_described_as_it_is(megatrain: Megatrain, finished_run: Path) -> None:
    described = json.loads(megatrain("checkpoint", "inspect", finished_run, "--json").out)
    assert described["step"] == 6
    assert described["tokens"] == 6 * 8 * 64
    assert described["layout"] | {"world_size": 2, "zero_stage": 1} == described["layout"]
    folder = Path(described["path"])
    assert {entry["file"]: entry["bytes"] for entry in described["files"]} == {
        path.name: path.stat().st_size for path in folder.iterdir() if path.name != "manifest.json"
    }
    older = json.loads(megatrain("checkpoint", "inspect", folder.with_name("step-00000002"), "--json").out)
    assert older["step"] == 2
    assert "rank-00001.safetensors" in megatrain("checkpoint", "inspect", finished_run).out


def test_a_whole_checkpoint_is_verified(megatrain: Megatrain, finished_run: Path) -> None:
    ended = megatrain("checkpoint", "verify", finished_run / "checkpoints" / "step-00000006", "--json")
    assert ended.code == 0
    assert json.loads(ended.out)["good"] is True
    assert json.loads(ended.out)["files"] == 3
    assert "all as written" in megatrain("checkpoint", "verify", finished_run).out


def test_eval_gives_validation_loss_and_bits_per_byte(
    megatrain: Megatrain, finished_run: Path, tiny_data: TinyData
) -> None:
    ended = megatrain("eval", finished_run, "--data", tiny_data.held_out, "--json")
    assert ended.code == 0, ended.err
    figures = json.loads(ended.out)
    lines = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    (validation,) = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert figures["loss"] == pytest.approx(validation, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
    bits = figures["loss"] * figures["tokens"] / math.log(2)
    assert figures["bits_per_byte"] == pytest.approx(bits / figures["bytes"])
    assert 1 < figures["bytes"] / figures["tokens"] < 6
    assert "bits_per_byte" in megatrain("eval", finished_run, "--data", tiny_data.held_out).out


@pytest.mark.sample(1)
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [("--procs", 2), ("--tensor", 2), ("--procs", 4, "--tensor", 2)], ids=str)
def test_ranks_sharing_an_evaluation_agree_with_one(
    ranks: tuple[object, ...], megatrain: Megatrain, finished_run: Path, tiny_data: TinyData
) -> None:
    """Among windows that four ranks cannot share out evenly."""
    command = ("eval", finished_run, "--data", tiny_data.held_out, "--json")
    alone, shared = megatrain(*command), megatrain(*command, *ranks)
    assert shared.code == 0, shared.err
    found, expected = json.loads(shared.out), json.loads(alone.out)
    assert (found["tokens"], found["bytes"]) == (expected["tokens"], expected["bytes"])
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)


@pytest.mark.sample(1)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--data", "nowhere", "--procs", 2), 3, "There is no dataset at nowhere"),
        (("--procs", 3, "--tensor", 3), 2, "--tensor 3: "),
        (("--procs", 3, "--tensor", 2), 2, "--tensor 2 must divide the 3 ranks"),
    ],
    ids=str,
)
def test_ranks_that_cannot_evaluate_say_so_once(
    options: tuple[object, ...], code: int, words: str, megatrain: Megatrain, finished_run: Path, tiny_data: TinyData
) -> None:
    data = () if "--data" in options else ("--data", tiny_data.held_out)
    ended = megatrain("eval", finished_run, *data, *options)
    assert (ended.code, ended.out) == (code, "")
    assert ended.err.count("megatrain: ") == 1
    assert words in ended.err
    assert "Traceback" not in ended.err


def test_generate_repeats_itself_for_the_same_seed(megatrain: Megatrain, finished_run: Path) -> None:
    def text(*options: object) -> str:
        ended = megatrain("generate", finished_run, "--prompt", "The statement", "--max-new-tokens", 20, *options)
        assert ended.code == 0, ended.err
        assert ended.out.startswith("The statement")
        return ended.out

    assert text("--seed", 3) == text("--seed", 3)
    assert text("--seed", 3) != text("--seed", 4)
    assert text("--temperature", 0, "--seed", 3) == text("--temperature", 0, "--seed", 4)
    assert text("--top-k", 1) == text("--temperature", 0)


def test_each_prompt_of_a_file_is_answered(megatrain: Megatrain, finished_run: Path, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    rows = [{"prompt": "The statement\u2028", "id": 7}, {"prompt": "A class definition is"}]
    prompts.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    options = ("--max-new-tokens", 6, "--temperature", 0)
    assert megatrain("generate", finished_run, "--prompts", prompts, "--out", out, *options).code == 0
    found = [json.loads(line) for line in out.read_bytes().splitlines()]
    assert [{key: row[key] for key in asked} for row, asked in zip(found, rows, strict=True)] == rows
    for row in found:
        alone = megatrain("generate", finished_run, "--prompt", row["prompt"], *options)
        assert alone.out == row["prompt"] + row["text"] + "\n"


@pytest.mark.sample(2)
@pytest.mark.slow
@pytest.mark.parametrize("options", [("--temperature", 0), ("--temperature", 1, "--top-p", 0.9, "--seed", 5)], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_cut_among_ranks_generates_the_same(
    family: str, options: tuple[object, ...], megatrain: Megatrain, tmp_path: Path
) -> None:
    """A key-value head that both ranks hold, and a vocabulary that two do not divide."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 361, "eos_token_id": None, "bos_token_id": None, "initializer_range": 0.5}
    if family == "gpt2":
        model: Any = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **sizes))
    else:
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
        model = LlamaForCausalLM(
            LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, **heads, **sizes)
        )
    model.save_pretrained(tmp_path / "hf")
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(361)}, "w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(tmp_path / "hf" / "tokenizer.json"))
    import_folder(tmp_path / "hf", tmp_path / "checkpoint")
    command = ("generate", tmp_path / "checkpoint", "--prompt", "w1 w2", "--max-new-tokens", 40, *options)
    alone, shared = megatrain(*command), megatrain(*command, "--procs", 2)
    assert alone.code == 0, alone.err
    assert len(set(alone.out.split())) > 5
    assert shared == alone


@pytest.mark.sample(1)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--prompt", "a", "--procs", 3), "--tensor 3: "),
        (("--prompt", "a", "--procs", 4, "--tensor", 2), "--tensor 2: generate cuts the model among all of its ranks"),
        (("--prompt", "", "--tensor", 2), "The prompt is empty"),
    ],
    ids=str,
)
def test_ranks_that_cannot_generate_say_so_once(
    options: tuple[object, ...], words: str, megatrain: Megatrain, finished_run: Path
) -> None:
    ended = megatrain("generate", finished_run, *options)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.count("megatrain: ") == 1
    assert words in ended.err
    assert "Traceback" not in ended.err


def test_control_characters_of_generated_text_are_escaped(
    megatrain: Megatrain, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("generate", finished_run, "--prompt", "a\x1b[2J\x9b\u202eb\n", "--max-new-tokens", 1)
    assert megatrain(*options).out.startswith("a\x1b[2J\x9b\u202eb\n")  # a pipe or a file gets the text as it is
    own, terminal = os.openpty()
    with open(terminal, "w", encoding="utf-8") as stdout:  # noqa: PTH123 (a descriptor)
        monkeypatch.setattr("sys.stdout", stdout)
        megatrain(*options)
        shown = os.read(own, 1000)
    os.close(own)
    assert shown.startswith(rb"a\u001b[2J\u009b\u202eb")


def test_generate_stops_where_the_context_is_full(megatrain: Megatrain, finished_run: Path) -> None:
    ended = megatrain("generate", finished_run, "--prompt", "a", "--max-new-tokens", 10_000)
    assert ended.code == 0, ended.err
    assert "The text stops here because the model's context is full: 1 tokens of prompt and 63 new ones" in ended.err
    assert "context" not in megatrain("generate", finished_run, "--prompt", "a", "--max-new-tokens", 5).err


def test_a_refused_turn_ends_with_code_3(megatrain: Megatrain, finished_run: Path, tmp_path: Path) -> None:
    hf, checkpoint = tmp_path / "hf", tmp_path / "checkpoint"
    assert megatrain("export", finished_run, "--out", hf).code == 0
    (hf / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    assert megatrain("import", hf, "--out", checkpoint).code == 0
    ended = megatrain("generate", checkpoint, "--chat", "--prompt", "a <|endoftext|>")
    assert (ended.code, ended.out) == (3, "")
    assert ended.err.count("control token <|endoftext|>") == 1


@pytest.mark.parametrize("suffix", ["html", "png"])
def test_report_writes_a_page_or_a_picture(
    suffix: str, megatrain: Megatrain, finished_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / f"report.{suffix}"
    ended = megatrain("report", finished_run, "--out", out)
    assert ended.code == 0, ended.err
    assert out.read_bytes().startswith(b"\x89PNG" if suffix == "png" else b"<!")


def test_a_recipe_is_found_by_name_and_copied(megatrain: Megatrain, tmp_path: Path) -> None:
    listed = megatrain("recipes").out
    assert "\ntiny_cpu " in listed
    copy = tmp_path / "mine.yaml"
    assert megatrain("recipes", "tiny_cpu", "--out", copy).code == 0
    assert copy.read_text() == megatrain("recipes", "tiny_cpu").out
    assert megatrain("check", "tiny_cpu").out == megatrain("check", copy).out.replace(str(copy), "tiny_cpu")


def test_a_recipe_that_is_not_there_is_named(megatrain: Megatrain, tmp_path: Path) -> None:
    for words in (["check", "tiny_cpus"], ["recipes", "tiny_cpus"]):
        ended = megatrain(*words)
        assert (ended.code, "no recipe has that name; nearest: tiny_cpu" in ended.err) == (2, True)
    (tmp_path / "mine.yaml").touch()
    assert "exists already" in megatrain("recipes", "tiny_cpu", "--out", tmp_path / "mine.yaml").err
    assert "name the recipe" in megatrain("recipes", "--out", tmp_path / "mine.yaml").err


def test_a_file_goes_before_a_recipe(megatrain: Megatrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny_cpu").write_text("- no config\n")
    assert "is no mapping" in megatrain("check", "tiny_cpu").err


def test_average_makes_a_checkpoint_to_use(megatrain: Megatrain, finished_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "averaged"
    ended = megatrain("checkpoint", "average", finished_run, "--last", 2, "--out", out)
    assert ended == (0, f"{out} holds the mean weights of steps 4, 6 of {finished_run}.\n", "")
    assert megatrain("checkpoint", "verify", out).code == 0
    assert megatrain("generate", out, "--prompt", "def", "--max-new-tokens", 2).code == 0
    assert megatrain("checkpoint", "average", finished_run, "--last", 2, "--out", out).code == 2
    assert megatrain("checkpoint", "average", finished_run, "--last", 4, "--out", tmp_path / "more").code == 4
