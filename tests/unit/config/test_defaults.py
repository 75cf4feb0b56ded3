"""Every default is the one that the documentation of the config promises."""

from __future__ import annotations

import pytest
import yaml
from pydantic import ValidationError

from megatrain.config import ModelConfig, RunConfig

DEFAULTS = yaml.safe_load("""
run:        {seed: 1234, init_from: null, init_from_ema: false, resize_token_embeddings: false, new_head: false}
model:      {family: llama, intermediate_size: null, num_key_value_heads: null, head_dim: null,
             max_position_embeddings: 256, vocab_size: null, rms_norm_eps: 1.0e-5, layer_norm_epsilon: 1.0e-5,
             rope_theta: 10000.0, tie_word_embeddings: true, attention_dropout: 0.0, hidden_dropout: 0.0,
             rope_scaling: null, initializer_range: 0.02, init_scheme: gpt2, sliding_window: null, attention: auto,
             type_vocab_size: 2, num_labels: null, image_size: 224, patch_size: 16, num_channels: 3,
             num_decoder_layers: null, relative_attention_num_buckets: 32, relative_attention_max_distance: 128,
             scale_decoder_outputs: false, activation_function: gelu, scale_embedding: false,
             share_encoder_decoder_embeddings: true, decoder_vocab_size: null}
data:       {validation: [], cache_dir: ~/.cache/megatrain, cache_bytes: 68719476736,
             document_mask: false, packing: concat, score_after_eod: null, num_new_epochs: 0}
objective:
  type: null
  target_len: null
  label_smoothing: 0.0
  span_corruption: {corrupted: 0.15, mean_span_tokens: 3.0, sentinel_token: "<extra_id_{}>"}
  masked_lm: {mlm_probability: 0.15, mask_replace_prob: 0.8, random_replace_prob: 0.1, whole_word_mask: false,
              mask_token: "[MASK]"}
  image_classification: {image_mean: [0.5], image_std: [0.5], min_crop_scale: 1.0, flip_prob: 0.0, randaugment: null,
                         mixup_alpha: 0.0}
parallel:   {tensor: 1, pipeline: 1, pipeline_chunks: 1, engine: deepspeed, zero_stage: 1, sequence: false,
             recompute: none, recompute_every: 1, offload: none}
train:      {micro_batch_size: 2, precision: auto, compile: auto, deterministic: false, gradient_clipping: 1.0,
             epochs: null, eval_every_steps: 50, tasks: null, eval_batches: 16, hang_timeout_seconds: 600,
             check_replica_hash_interval: 100, early_stopping: null,
             initial_loss_scale_power: 16, loss_scale_window: 1000}
spikes:     {action: none, window_steps: 128, num_deviations: 8.0, rewind_steps: 100, margin_batches: 10,
             max_in_a_row: 50}
optimizer:  {type: adamw, betas: [0.9, 0.95], eps: 1.0e-8, weight_decay: 0.1,
             no_weight_decay: [norms, biases, positions], scale_parameter: false, ema_decay: null}
lora:       null
schedule:   {type: cosine, warmup_steps: 20, min_lr_ratio: 0.1, decay_steps: null, stable_steps: null}
checkpoint: {every_steps: 50, keep: 3, keep_every_steps: null, keep_best: 0, dir: null, background: true}
observe:    {log_every_steps: 1, tensorboard: true, trackers: [], straggler_report_seconds: 60.0, peak_flops: null}
deepspeed:  {}
""")

REQUIRED = {
    "run": {"dir"},
    "model": {"hidden_size", "num_hidden_layers", "num_attention_heads"},
    "data": {"train", "seq_len"},
    "train": {"steps", "global_batch_size"},
    "optimizer": {"lr"},
}


def test_every_key_left_out_has_its_documented_default(loaded):
    resolved = loaded().model_dump(mode="json")
    assert {name: keys_but_required(name, section) for name, section in resolved.items()} == DEFAULTS
    transforms = dict.fromkeys(("fill_in_the_middle", "span_corruption", "token_masking", "transform"))
    assert resolved["data"]["train"] == [{"path": "data/code", "weight": 1.0, **transforms}]


def keys_but_required(name: str, section: dict[str, object] | None) -> dict[str, object] | None:
    return section and {key: value for key, value in section.items() if key not in REQUIRED.get(name, ())}


def test_exactly_the_required_keys_are_required(refused):
    message = refused(text="run: {}\nmodel: {}\ndata: {}\n")  # the keys of a section left out are named one by one
    missing = {line.split()[0].rstrip(":") for line in message.splitlines()[1:] if "is missing" in line}
    assert missing == {f"{section}.{key}" for section, keys in REQUIRED.items() for key in keys}


@pytest.mark.parametrize(("steps", "warmup"), [(5, 5), (19, 19), (20, 20), (200, 20)])
def test_a_short_run_needs_no_own_warmup(loaded, steps, warmup):
    assert loaded(f"train.steps={steps}").schedule.warmup_steps == warmup


def test_a_checked_config_cannot_be_changed(loaded):
    config = loaded()
    with pytest.raises(ValidationError, match="frozen"):
        config.train.steps = 7
    with pytest.raises(ValidationError, match="frozen"):
        config.train = config.train
    assert isinstance(config.data.train, tuple)
    assert isinstance(config.optimizer.betas, tuple)


@pytest.mark.parametrize(
    ("family", "hidden_size", "intermediate_size", "ffn_size"),
    [("gpt2", 768, None, 3072), ("llama", 256, None, 768), ("llama", 4096, None, 11008), ("llama", 96, 100, 100)],
)
def test_the_mlp_has_the_familys_or_given_width(family, hidden_size, intermediate_size, ffn_size):
    model = ModelConfig(
        family=family,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    assert model.ffn_size == ffn_size


@pytest.mark.parametrize(
    ("given", "tied", "scaled"),
    [
        ({}, False, False),
        ({"tie_word_embeddings": True}, True, True),
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, True, False),
    ],
    ids=str,
)
def test_the_head_of_a_t5_is_v1_1s(given, tied, scaled):
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = ModelConfig(family="t5", **sizes, **given)
    assert (model.tie_word_embeddings, model.scale_decoder_outputs) == (tied, scaled)


def test_heads_left_out_follow_the_model(loaded):
    model = loaded().model
    assert (model.kv_heads, model.head_size) == (4, 16)
    model = loaded("model.num_key_value_heads=2", "model.head_dim=32").model
    assert (model.kv_heads, model.head_size) == (2, 32)


def test_every_key_says_what_it_means():
    def undescribed(record, prefix=""):
        for name, field in record.model_fields.items():
            if hasattr(field.annotation, "model_fields"):
                yield from undescribed(field.annotation, f"{prefix}{name}.")
            elif not field.description:
                yield f"{prefix}{name}"

    assert list(undescribed(RunConfig)) == []
