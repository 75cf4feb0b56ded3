"""What is refused, and that the message has the key, the line, the value and the way out."""

from __future__ import annotations

import re
import resource
import subprocess
import sys

import pytest

from megatrain.config import dump, load
from megatrain.config.deepspeed_keys import DERIVED, REFUSED, ZERO_PASSED_THROUGH
from megatrain.config.keys import leaves
from megatrain.errors import EXIT_USAGE, ConfigError
from megatrain.families import FAMILIES


def test_all_problems_are_said_at_once_by_line(refused):
    text = """\
run: {dir: runs/x, dri: y}
model:
  hidden_size: 100
  num_hidden_layers: 2.0
  num_attention_heads: 4
data:
  train:
    - path: data/code
      weight: -1
  document_mask: yes
train: {stepz: 5, precision: bf17}
optimizer: {betas: [0.9, 1.0], lr: true}
paralel: {tensor: 2}
"""
    message = refused("parallel.tensor=true", text=text)
    for line in [
        "run.dri (line 1): y given; no such key; nearest: run.dir",
        "model.num_hidden_layers (line 4): 2.0 given; must be an integer; nearest: 2",
        "data.train.0.weight (line 9): -1 given; must be at least 0.0; nearest: 0.0",
        "data.document_mask (line 10): yes given; must be true or false; nearest: true",
        "parallel.tensor (the command line): true given; must be an integer; nearest: 1",
        "data.seq_len (data: line 6): is missing; a required key",
        "train.steps (train: line 11): is missing; a required key, or train.epochs in its place",
        "train.global_batch_size (train: line 11): is missing; a required key",
        "train.stepz (line 11): 5 given; no such key; nearest: train.steps",
        "train.precision (line 11): bf17 given; must be one of auto, bf16, fp16, fp32; nearest: bf16",
        "optimizer.betas.1 (line 12): 1.0 given; must be less than 1.0",
        "optimizer.lr (line 12): true given; must be a number; nearest: 1.0",
        "paralel (line 13): {tensor: 2} given; no such key; nearest: parallel",
    ]:
        assert f"  {line}\n" in message + "\n"
    assert message.splitlines()[0].endswith("run.yaml: 13 problems")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps=1.0", "must be an integer; nearest: 1"),
        ("train.steps=true", "must be an integer; nearest: 1"),
        ("train.steps='5'", 'train.steps (the command line): "5" given; must be an integer; nearest: 5'),
        ("train.steps=0", "must be at least 1"),
        ("train.steps=0.4", "must be an integer; nearest: 1"),
        ("train.micro_batch_size=1.0e12", "must be an integer; nearest: 16777216"),
        ("train.steps=", "null given; must be an integer"),
        ("parallel.zero_stage=true", "must be an integer; nearest: 1"),
        ("parallel.zero_stage=4", "must be at most 3; nearest: 3"),
        ("parallel.sequence=1", "must be true or false; nearest: true"),
        ("checkpoint.background=no", "no given; must be true or false; nearest: false"),
        ("observe.tensorboard='true'", "must be true or false; nearest: true"),
        ("optimizer.lr=false", "must be a number; nearest: 0.0"),
        ("optimizer.lr=-1e-3", "must be at least 0.0; nearest: 0.0"),
        ("optimizer.lr=.inf", "must be finite"),
        ("optimizer.lr=.nan", "must be finite"),
        ("optimizer.lr=1e999", "must be finite"),
        ("optimizer.eps=0", "must be more than 0.0"),
        ("optimizer.betas=[0.9]", "optimizer.betas.1"),
        ("optimizer.betas=[0.9, 0.95, 0.99]", "optimizer.betas"),
        ("optimizer.betas=0.9", "must be a list"),
        ("optimizer.type=adam", "must be one of adamw; nearest: adamw"),
        ("model.attention_dropout=1.0", "must be less than 1.0"),
        ("model.family=lama", f"must be one of {', '.join(FAMILIES)}; nearest: llama"),
        ("model.sliding_window=0", "must be at least 1"),
        ("run.dir=''", "must not be empty"),
        ("run.dir=2024", 'must be text; nearest: "2024"'),
        ("data.train=[]", "must have at least one entry"),
        ("data.train=data/code", "must be a list"),
        ("data.train=[5]", "data.train.0 (the command line): 5 given; must be a mapping"),
        ("model.rope_scaling={rope_type: yarn, factor: 2}", "must be one of linear, llama3"),
        ("train.lr=1", "no such key; nearest: optimizer.lr"),
        ("model.n_head=1", "no such key; nearest: model.num_attention_heads"),
        ("model.n_embd=1", "no such key; nearest: model.hidden_size"),
        ("model.n_layer=1", "no such key; nearest: model.num_hidden_layers"),
        ("learning_rate=1", "no such key; nearest: optimizer.lr"),
        ("train.batch_size=1", "no such key; nearest: train.global_batch_size"),
        ("block_size=1", "no such key; nearest: data.seq_len"),
        ("model.max_seq_len=1", "no such key; nearest: data.seq_len"),
        ("model.n_layers=1", "model.n_layers (the command line): 1 given; no such key; nearest: model.num"),
        ("train.global_batchsize=1", "no such key; nearest: train.global_batch_size"),
        ("precision=bf16", "no such key; nearest: train.precision"),
        ("train.global_batch_size=1.5", "must be an integer; nearest: 2"),
        ("train.global_batch_size=[]", "must have at least one entry"),
        ("train.global_batch_size=[[0, x]]", "train.global_batch_size.0.1 (the command line): x given; must be an int"),
        ("train.global_batch_size=[[0, 4, 5]]", "train.global_batch_size.0 (the command line): [0, 4, 5] given"),
        ("train.global_batch_size=[[1, 4]]", "the first entry must begin at 0 tokens, not at 1"),
        ("train.global_batch_size=[[0, 4], [9, 8], [9, 6]]", "the tokens of its entries must rise: 9 follows 9"),
    ],
)
def test_a_wrong_value_is_refused_with_the_nearest(refused, override, expected):
    message = refused(override)
    assert expected in message
    assert override.partition("=")[0] in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.hidden_size=66"], "model.hidden_size (the command line): 66 given; must be divisible by "),
        (["model.hidden_size=66"], "nearest: 64 or 68"),
        (["model.num_key_value_heads=3"], "must divide num_attention_heads (4); nearest: 2 or 4"),
        (["model.head_dim=15"], "must be even for the rotary embedding; nearest: 16"),
        (["model.layer_norm_epsilon=1e-6"], "read by bert, gpt2, marian, vit, not by llama"),
        (["model.sliding_window=8"], "model.sliding_window (the command line): 8 given; read by family mistral only"),
        (
            ["checkpoint.keep_best=2"],
            "checkpoint.keep_best (the command line): 2 given; keeps nothing: without data.val",
        ),
        (
            ["checkpoint.keep_best=2", "data.validation=[{path: v}]", "train.eval_every_steps=30", "train.steps=140"],
            "keep_best (the command line): 2 given; keeps nothing: no step before the last is both saved (checkpoint.",
        ),
        (
            ["checkpoint.keep_every_steps=75", "train.steps=140"],
            "keep_every_steps (the command line): 75 given; keeps nothing: no step up to train.steps (140) is a mul",
        ),
        (
            ["data.train.0.fill_in_the_middle.rate=0.75", "data.train.0.span_corruption.rate=0.5"],
            "span_corruption.rate (the command line): 0.5 given; a document gets this or fill_in_the_middle: "
            "their rates must add up to 1.0 at most; nearest: 0.25",
        ),
        (
            ["data.train.0.fill_in_the_middle={prefix_token: <a>, middle_token: <b>, suffix_token: <a>}"],
            "fill_in_the_middle.suffix_token (the command line): <a> given; another sentinel has this token",
        ),
        (
            ["data.train.0.span_corruption.sentinel_token=<extra>"],
            "must have {} for the number of the sentinel; nearest: ",
        ),
        (["data.train.0.transform=my/code.py:f"], "must be module:function, such as my_package.code:mask"),
        (["model.family=gpt2", "model.num_key_value_heads=2"], "family gpt2 has as many as num_attention_heads (4)"),
        (["model.family=gpt2", "model.head_dim=8"], "family gpt2 has hidden_size / num_attention_heads"),
        (["model.family=gpt2", "model.rope_theta=5e5"], "model.rope_theta (the command line): 500000.0 given; read by"),
        (["model.rope_scaling={rope_type: llama3, factor: 8}"], "model.rope_scaling.low_freq_factor"),
        (
            ["model.rope_scaling={rope_type: linear, factor: 8, low_freq_factor: 1}"],
            "used by rope_type llama3 only",
        ),
        (
            [
                "model.rope_scaling={rope_type: llama3, factor: 8, low_freq_factor: 4, high_freq_factor: 4,"
                " original_max_position_embeddings: 64}"
            ],
            "must be less than high_freq_factor (4.0)",
        ),
        (["data.train.0.weight=0"], "the weights must not all be zero"),
        (["data.seq_len=300"], "must be at most model.max_position_embeddings (256); nearest: 256"),
        (["schedule.warmup_steps=201"], "must be at most train.steps (200); nearest: 200"),
        (["schedule.type=wsd", "schedule.decay_steps=190"], "(200 - 20); nearest: 180"),
        (["schedule.decay_steps=10"], "used with type: wsd only"),
        (["schedule.stable_steps=10"], "used with type: inverse_sqrt only"),
        (["schedule.type=inverse_sqrt", "schedule.stable_steps=10"], "(20); nearest: 20"),
        (["schedule.type=inverse_sqrt", "schedule.warmup_steps=0"], "null given; must be given for inverse_sqrt"),
        (
            ["schedule.type=wsd", "schedule.warmup_steps=200", "schedule.decay_steps=5"],
            "train.steps - schedule.warmup_steps (200 - 200)\n",
        ),
        (["parallel.recompute_every=2"], "used with recompute: full only (it is none)"),
        (
            ["parallel.engine=fsdp2", "deepspeed.zero_optimization.overlap_comm=true"],
            "passed on with parallel.engine: deepspeed only (it is fsdp2); nearest: deepspeed left out",
        ),
        (["train.loss_scale_window=5"], "used with precision: fp16 only (it is auto)"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(refused, overrides, expected):
    assert expected in refused(*overrides) + "\n"


def test_an_entry_of_datasets_may_be_a_path(loaded):
    data = loaded("data.train=[a, {path: b, weight: 2}]", "data.validation=[c]").data
    assert [(dataset.path, dataset.weight) for dataset in data.train] == [("a", 1.0), ("b", 2.0)]
    assert [dataset.path for dataset in data.validation] == ["c"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.head_dim=32", "model.hidden_size=66"],
        ["model.family=gpt2", "model.layer_norm_epsilon=1e-6", "model.head_dim=16", "model.num_key_value_heads=4"],
        [
            "model.rope_scaling={rope_type: llama3, factor: 8, low_freq_factor: 1, high_freq_factor: 4,"
            " original_max_position_embeddings: 64}"
        ],
        ["schedule.type=wsd", "schedule.decay_steps=180"],
        ["data.train.0.fill_in_the_middle.rate=1.0", "data.train.0.token_masking={}"],
        ["data.train.0.fill_in_the_middle={}", "data.train.0.span_corruption={}", "data.train.0.transform=a.b:c_1"],
        ["parallel.recompute=full", "parallel.recompute_every=2"],
        ["train.precision=fp16", "train.initial_loss_scale_power=8"],
        ["schedule.warmup_steps=200"],
        ["optimizer.lr=1"],
        ["deepspeed.zero_optimization.reduce_bucket_size=5000000"],
        ["train.eval_batches=null"],
    ],
)
def test_keys_that_belong_together_load_again(loaded, overrides):
    config = loaded(*overrides)
    assert loaded(text=dump(config)) == config


@pytest.mark.parametrize(
    ("override", "instead"),
    [
        ("zero_optimization.stage=3", "parallel.zero_stage"),
        ("zero_optimization.offload_optimizer.device=cpu", "parallel.offload"),
        ("zero_optimization.offload_param={device: cpu}", "parallel.offload"),
        ("train_batch_size=8", "train.global_batch_size"),
        ("train_micro_batch_size_per_gpu=8", "train.micro_batch_size"),
        ("gradient_accumulation_steps=8", "train.global_batch_size, train.micro_batch_size"),
        ("bf16.enabled=true", "train.precision"),
        ("fp16.loss_scale_window=8", "train.precision, train.initial_loss_scale_power, train.loss_scale_window"),
        ("gradient_clipping=1.0", "train.gradient_clipping"),
        ("optimizer.type=Adam", "optimizer.type"),
        ("scheduler.type=WarmupLR", "schedule.type"),
        ("steps_per_print=1", "observe.log_every_steps"),
    ],
)
def test_what_megatrain_derives_cannot_be_passed_to_deepspeed(refused, override, instead):
    message = refused(f"deepspeed.{override}")
    assert message.endswith(f"megatrain derives it from its own keys; nearest: {instead}")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("zero_optimisation.reduce_bucket_size=5", "nearest: deepspeed.zero_optimization"),
        ("zero_optimization.reduce_bucket=5", "nearest: deepspeed.zero_optimization.reduce_bucket_size"),
        ("zero_optimization=5", "must be a mapping"),
        ("quux=5", "deepspeed.quux (the command line): 5 given; no such key is passed on to DeepSpeed"),
        ("zero_optimization.round_robin_gradients=true", "weights would be saved under other names"),
        ("gradient_predivide_factor=2.0", "not passed on to DeepSpeed: gradients are summed in fp32 and divided once"),
        ("wall_clock_breakdown=true", "nearest: observe.log_every_steps"),
        ("csv_monitor={enabled: true}", "nearest: observe.tensorboard"),
        ("tensorboard={enabled: true}", "nearest: observe.tensorboard"),
        ("wandb={enabled: true}", "nearest: observe.trackers"),
        ("comet={enabled: true}", "nearest: observe.trackers"),
    ],
)
def test_a_refused_deepspeed_key_tells_the_reason(refused, override, expected):
    assert expected in refused(f"deepspeed.{override}")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("wandb", "wandb given; must be a list, such as [a, b]; nearest: [wandb]"),
        ("[wandb, mlflow, wandb]", "names a tracker twice; nearest: [wandb, mlflow]"),
        (
            "[wandbd]",
            "observe.trackers.0 (the command line): wandbd given; must be one of wandb, mlflow; nearest: wandb",
        ),
    ],
)
def test_a_wrong_list_of_trackers_is_refused(refused, given, expected):
    assert expected in refused(f"observe.trackers={given}")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("reduce_bucket_size=big", "big given; must be an integer"),
        ("reduce_bucket_size=auto", "auto given; must be an integer"),
        ("reduce_bucket_size=0", "0 given; must be at least 1; nearest: 1"),
        ("reduce_bucket_size=true", "true given; must be an integer"),
        ("reduce_bucket_size=2.5", "2.5 given; must be an integer"),
        ("reduce_bucket_size=null", "null given; must be an integer"),
        ("sub_group_size=1e300", "must be at most 9007199254740992"),
        ("allgather_bucket_size=7", "7 given; must be a multiple of 2; nearest: 8"),
        ("stage3_prefetch_bucket_size=-1", "-1 given; must be at least 0; nearest: 0"),
        ("overlap_comm=1", "1 given; must be true or false"),
        ("contiguous_gradients={}", "must be true or false"),
    ],
)
def test_a_value_deepspeed_would_refuse_is_refused(refused, override, expected):
    message = refused(f"deepspeed.zero_optimization.{override}")
    assert message.split(": ", 1)[1].startswith(f"deepspeed.zero_optimization.{override.split('=')[0]} (")
    assert expected in message


def test_the_named_zero_keys_exist_in_deepspeed():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    names = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    named = {
        key.removeprefix("zero_optimization.") for key in DERIVED | REFUSED if key.startswith("zero_optimization.")
    }
    assert names >= ZERO_PASSED_THROUGH | named
    assert not ZERO_PASSED_THROUGH & named


def test_every_key_named_instead_of_deepspeeds_exists():
    instead = {key for keys in DERIVED.values() for key in keys.split(", ")}
    assert instead <= {path for path, _ in leaves()}


def test_bucket_sizes_reach_deepspeed_as_they_are(loaded):
    config = loaded(
        "deepspeed.zero_optimization={reduce_bucket_size: 5000000, sub_group_size: 5e8, overlap_comm: true}"
    )
    assert config.deepspeed == {
        "zero_optimization": {"reduce_bucket_size": 5000000, "sub_group_size": 5e8, "overlap_comm": True}
    }


def test_text_like_a_number_stays_text_when_written(loaded):
    for folder in ("3e-4", "0o17", "true", "~", "1_000", "2024-01-01", "no", "a: b", "# c", "ünïcode", " x "):
        config = loaded(f"run.dir={folder!r}")
        assert config.run.dir == folder
        assert loaded(text=dump(config)) == config


def test_what_is_no_config_file_is_named(tmp_path):
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"run: \xff\xfe")
    for path, reason in [
        (tmp_path / "none.yaml", "no such config file"),
        (tmp_path, "is a folder"),
        (binary, "not UTF-8 text (byte 5)"),
        (tmp_path / "none" / "\0.yaml", "cannot be read"),
        (binary / "run.yaml", "cannot be read"),
    ]:
        with pytest.raises(ConfigError, match=re.escape(reason)) as caught:
            load(path)
        assert str(path) in str(caught.value)
        assert caught.value.exit_code == EXIT_USAGE


@pytest.mark.parametrize("text", ["", "# nothing\n", "- a\n- b\n", "just words\n", "--- null\n"])
def test_a_file_that_holds_no_sections_is_refused(refused, text):
    assert "a config is a YAML mapping with the sections run, model, data" in refused(text=text)


def test_loading_is_quick_and_imports_no_torch(tmp_path):
    """CPU time, beyond the interpreter's start: 0.12 s on the machine it was written on."""
    program = (
        "import sys; from megatrain.config import load; from megatrain.plan import rules;"
        "rules.check(load('configs/llama_8b_64xh100.yaml'), 64);"
        "assert not {'torch', 'deepspeed', 'numpy'} & set(sys.modules), 'heavy import'"
    )

    def seconds(code: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds(program) for _ in range(3)) - min(seconds("pass") for _ in range(3)) < 0.6


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["lora={rank: 4, alpha: 8.0}"], "run.init_from"),
        (["lora={rank: 4, alpha: 8.0, target_modules: [qproj]}"], "nearest: q_proj"),
        (["lora={rank: 4, alpha: 8.0, target_modules: c_attn}"], "must be all-linear or a matrix of a llama layer"),
        (["lora={rank: 4, alpha: 8.0, target_modules: [lm_head]}"], "here they are one weight"),
        (["lora={rank: 4}"], "is missing; a required key"),
    ],
)
def test_adapters_need_a_base_and_known_matrices(overrides, told, refused):
    assert told in refused(*overrides)


def test_a_problem_of_the_objective_is_told_once(refused):
    assert refused("objective.target_len=5").count("objective.target_len") == 1
