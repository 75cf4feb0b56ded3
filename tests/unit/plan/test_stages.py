"""Stages of equal cost, and what several of them hold."""

from __future__ import annotations

from typing import Any

import pytest

from megatrain.config import RunConfig
from megatrain.plan.flops import flops_of_pair_layers
from megatrain.plan.stages import shared_weights, stage_layers

EMBEDDING = "shared.weight"
BIASES = [f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight" for stack in ("encoder", "decoder")]


def config_of(num_stages: int, target_len: int = 32, **model: Any) -> RunConfig:
    sizes = {"hidden_size": 40, "intermediate_size": 52, "num_hidden_layers": 4, "num_attention_heads": 4}
    own = {"family": "t5", "max_position_embeddings": 256, "vocab_size": 101, **sizes, **model}
    return RunConfig.model_validate(
        {
            "run": {"dir": "unused"},
            "model": own,
            "data": {"train": [{"path": "unused"}], "seq_len": 32},
            "objective": {"type": "sequence_to_sequence", "target_len": target_len},
            "train": {"steps": 10, "global_batch_size": 24, "micro_batch_size": 1},
            "optimizer": {"lr": 1.0e-3},
            "parallel": {"pipeline": num_stages},
        }
    )


@pytest.mark.parametrize("target_len", [8, 32, 256])
@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 7])
def test_every_layer_of_both_stacks_has_a_stage(num_stages: int, target_len: int) -> None:
    stages = stage_layers(config_of(num_stages, target_len, num_decoder_layers=3))
    assert len(stages) == num_stages
    assert all(any(len(numbers) for numbers in layers) for layers in stages)
    for stack, count in enumerate((4, 3)):
        assert [number for layers in stages for number in layers[stack]] == [*range(count)]
    assert all(not encoder for _, (encoder, decoder) in enumerate(stages) if decoder and decoder[0] > 0)


def test_a_long_target_leaves_the_encoder_fewer_stages() -> None:
    of_encoder, of_decoder = flops_of_pair_layers(config_of(1, 256).model, 32, 256)
    assert of_decoder > 8 * of_encoder
    (encoder, decoder), *others = stage_layers(config_of(4, 256))
    assert (len(encoder), len(decoder)) == (4, 1)
    assert [len(decoder) for _, decoder in others] == [1, 1, 1]


def test_copies_are_where_several_stages_need_a_weight() -> None:
    assert shared_weights(config_of(1)) == {}
    assert stage_layers(config_of(2)) == [(range(4), range(1)), (range(0), range(1, 4))]
    assert shared_weights(config_of(2)) == {BIASES[1]: (0, 1)}
    assert shared_weights(config_of(2, tie_word_embeddings=True)) == {EMBEDDING: (0, 1), BIASES[1]: (0, 1)}
    stages = stage_layers(config_of(4, num_decoder_layers=4))
    begins = next(stage for stage, (_, decoder) in enumerate(stages) if 0 in decoder)
    holders = [tuple(stage for stage, layers in enumerate(stages) if len(layers[stack])) for stack in range(2)]
    assert all(len(each) > 1 for each in holders)
    biases = dict(zip(BIASES, holders, strict=True))
    assert shared_weights(config_of(4, tie_word_embeddings=True)) == {EMBEDDING: (0, begins, 3), **biases}
    assert shared_weights(config_of(4)) == {EMBEDDING: (0, begins), **biases}
