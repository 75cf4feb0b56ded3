"""Initial weights: the same whichever slice is asked for, and normal with the right standard deviation."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch
import transformers
from model_samples import SIZES, random_batch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig

from megatrain.checkpoint.transformers_config import to_transformers
from megatrain.config.schema import ModelConfig
from megatrain.distributed.fragment import FlatShard, ShardSpec, TensorSlice, shard_views
from megatrain.distributed.rng import stream_key
from megatrain.families import FAMILIES
from megatrain.model.decoder import Decoder
from megatrain.model.encoder_decoder import whole_model
from megatrain.model.init import InitialWeights, _quantiles, init_model, normal, standard_deviation
from megatrain.plan.flops import parameter_shapes

CONFIG = ModelConfig(**SIZES)
NAME = "model.layers.1.self_attn.q_proj.weight"


def held(spec: ShardSpec, seed: int = 1, config: ModelConfig = CONFIG) -> Tensor:
    """What a rank with this spec fills its parameter with."""
    flat = torch.zeros(spec.local_numel)
    for shard, where in shard_views(spec, 0, flat.numel()):
        flat[where if isinstance(where, slice) else torch.from_numpy(where)] = InitialWeights(config, seed).read(
            shard, "weight"
        )
    return flat.view(spec.local_shape)


def whole(shape: tuple[int, ...], name: str = NAME, seed: int = 1) -> Tensor:
    return held(ShardSpec.whole(name, shape), seed)


def test_numbers_are_normal() -> None:
    x = normal(99, torch.arange(4_000_000)).double()
    num = len(x)
    assert x.mean().abs().item() < 4 / math.sqrt(num)
    assert x.std().item() == pytest.approx(1.0, abs=1e-3)
    assert (x**3).mean().abs().item() < 0.01
    assert (x**4).mean().item() == pytest.approx(3.0, abs=0.02)
    assert 4.0 < x.abs().max().item() < 4.5
    for share in (0.0001, 0.001, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999, 0.9999):
        below = (x < NormalDist().inv_cdf(share)).double().mean().item()
        assert below == pytest.approx(share, abs=4.5 * math.sqrt(share * (1 - share) / num))


def test_neighbours_are_independent() -> None:
    x = normal(99, torch.arange(1_000_000)).double()
    for lag in (1, 2, 64, 512):
        assert (x[lag:] * x[:-lag]).mean().abs().item() < 4.5e-3


def test_the_first_values_never_change() -> None:
    # Golden: a change here changes every run's start.
    values = normal(stream_key(1234, "lm_head.weight"), torch.arange(4))
    assert values.tolist() == [0.14939476549625397, 0.033420663326978683, 0.8387506008148193, 1.1439522504806519]


def test_a_slice_is_the_wholes_slice() -> None:
    expected = whole((300, 700))
    spec = ShardSpec(NAME, (300, 700), (TensorSlice((100, 35), (150, 600)),))
    assert torch.equal(held(spec), expected[100:250, 35:635])


@pytest.mark.parametrize("dim", [0, 1])
def test_several_boxes_are_concatenated_and_padded_with_zeros(dim: int) -> None:
    expected = whole((120, 120))
    slices = []
    for start in (10, 50, 90):  # a third of each of three parts
        offset, extent = [0, 0], [120, 120]
        offset[dim], extent[dim] = start, 13
        slices.append(TensorSlice(tuple(offset), tuple(extent)))
    spec = ShardSpec(NAME, (120, 120), tuple(slices), dim=dim, padding=5)
    part = held(spec)
    rows = torch.cat([torch.arange(start, start + 13) for start in (10, 50, 90)])
    assert torch.equal(part.narrow(dim, 0, 39), expected.index_select(dim, rows))
    assert not part.narrow(dim, 39, 5).any()


def test_a_flat_range_matches_the_flattened_whole() -> None:
    shape = (300, 700)
    shard = FlatShard(NAME, shape, TensorSlice((0, 0), shape), 150_000, 60_000)
    assert torch.equal(InitialWeights(CONFIG, 1).read(shard, "weight"), whole(shape).flatten()[150_000:])


def test_there_is_no_initial_optimizer_state() -> None:
    shard = FlatShard(NAME, (4, 4), TensorSlice((0, 0), (4, 4)), 0, 16)
    with pytest.raises(ValueError, match="exp_avg"):
        InitialWeights(CONFIG, 1).read(shard, "exp_avg")


def test_names_and_seeds_differ() -> None:
    one = whole((64, 64))
    assert not torch.equal(one, whole((64, 64), seed=2))
    assert not torch.equal(one, whole((64, 64), name="model.layers.0.self_attn.q_proj.weight"))
    assert torch.equal(one, whole((64, 64)))


@pytest.mark.parametrize(
    ("scheme", "name", "expected"),
    [
        ("gpt2", "transformer.h.1.attn.c_proj.weight", 0.02 / math.sqrt(4)),
        ("gpt2", "transformer.h.1.mlp.c_proj.weight", 0.02 / math.sqrt(4)),
        ("gpt2", "transformer.h.1.attn.c_attn.weight", 0.02),
        ("gpt2", "transformer.wte.weight", 0.02),
        ("depth", "transformer.h.0.mlp.c_proj.weight", 0.02 / math.sqrt(2)),
        ("depth", "transformer.h.1.mlp.c_proj.weight", 0.02 / math.sqrt(4)),
        ("normal", "transformer.h.1.mlp.c_proj.weight", 0.02),
    ],
)
def test_scheme_scales_what_writes_to_the_residual_stream(scheme: str, name: str, expected: float) -> None:
    config = ModelConfig(**SIZES, family="gpt2", init_scheme=scheme)  # type: ignore[arg-type]
    assert standard_deviation(name, config) == pytest.approx(expected)
    out = held(ShardSpec.whole(name, (400, 400)), config=config)
    assert out.std().item() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_norms_biases_and_matrices_start_as_specified(family: str) -> None:
    config = ModelConfig(**SIZES, family=family)  # type: ignore[arg-type]
    for name, empty in Decoder(config).named_parameters():
        parameter = held(ShardSpec.whole(name, empty.shape), config=config)
        if parameter.dim() == 1:
            assert torch.all(parameter == (0.0 if name.endswith("bias") else 1.0)), name
        else:
            assert parameter.std().item() == pytest.approx(standard_deviation(name, config), rel=0.05), name


SMALL: dict[str, Any] = {**SIZES, "intermediate_size": 96, "num_hidden_layers": 3}
NORMAL = {"init_scheme": "normal"}
OWN: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "t5": {  # whose head of its own is drawn otherwise there: its logits have a variance of hidden_size
        "tie_word_embeddings": True,
        "head_dim": 12,  # 4 heads: not as wide as the stream
        "relative_attention_num_buckets": 256,
        "relative_attention_max_distance": 512,
    },
    "vit": {**NORMAL, "image_size": 32, "patch_size": 4},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_model_is_drawn_as_in_transformers(family: str, tmp_path: Path) -> None:
    """By init_scheme normal, a gpt2 by gpt2: each matrix as wide; biases and norms alike."""
    config = ModelConfig(**{**SMALL, **OWN.get(family, NORMAL)}, family=family)
    known = config.description.hugging_face
    theirs = to_transformers(config, "float32") | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    twin = getattr(transformers, known.architecture)(AutoConfig.for_model(**theirs))
    twin.save_pretrained(tmp_path)
    drawn = load_file(tmp_path / "model.safetensors")
    # transformers 5.5 draws gpt2's residual projections as wide as its other matrices.
    left_out = "c_proj.weight" if transformers.__version__.startswith("5.5.") else "nothing"
    for name, shape in parameter_shapes(config).items():
        theirs_name = known.one_row.get(name, known.parameters.get(name, name))
        ours, expected = held(ShardSpec.whole(name, shape), config=config), drawn[theirs_name]
        if len(shape) == 1:
            assert torch.equal(ours, expected.flatten()), name
        elif not name.endswith(left_out):
            assert float(ours.std()) == pytest.approx(float(expected.std()), rel=8 / expected.numel() ** 0.5), name


UNTIED = {"tie_word_embeddings": False}
NEW_MODELS: list[dict[str, Any]] = [
    *({"family": family} for family in FAMILIES),
    *({"family": family, **UNTIED} for family, each in FAMILIES.items() if each.can_tie_head and family != "marian"),
    {"family": "marian", "share_encoder_decoder_embeddings": False, **UNTIED},
    {"family": "marian", "scale_embedding": True, "activation_function": "relu"},
    {"family": "bert", "num_labels": 90},
]


@pytest.mark.parametrize("keys", NEW_MODELS, ids=str)
def test_a_new_model_begins_with_guessing(keys: dict[str, Any]) -> None:
    """With the defaults of its family: the logits' variance, half of which is the loss beyond, is small."""
    config = ModelConfig(**{**SIZES, "hidden_size": 256, "vocab_size": 1000, **keys})
    model, batch = whole_model(config), random_batch(2, config.num_places or 40, config.num_answers)
    init_model(model, config, seed=1)
    if config.description.reads_images:
        batch = batch._replace(pixels_BCHW=torch.rand(2, 3, 224, 224))
    if config.description.encoder is not None:
        batch = batch._replace(source_tokens_BS=batch.tokens_BT.flip(1))
    with torch.no_grad():
        loss = float(model(batch)) / batch.targets_BM.numel()
    assert loss == pytest.approx(math.log(config.num_answers), rel=0.15)


class _Devices(TorchDispatchMode):
    """Notes where each result of an operation is."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen |= {x.device.type for x in tree_leaves(result) if isinstance(x, Tensor)}
        return result


@pytest.mark.parametrize("name", [NAME, "model.norm.weight", "h.0.attn.c_attn.bias", f"{NAME[:-7]}.lora_A.weight"])
def test_weights_are_made_where_they_go(name: str) -> None:
    """As on a GPU, to which nothing is copied: the meta device stands for it. tests/gpu compares the bits."""
    shape = (300, 700) if name.endswith((".q_proj.weight", ".lora_A.weight")) else (700,)
    part = TensorSlice((100,) + (35,) * (len(shape) - 1), (150,) + (600,) * (len(shape) - 1))
    shard, meta = FlatShard(name, shape, part, 3, part.numel - 3), torch.device("meta")
    _quantiles(meta)  # the one thing that is made on the CPU
    with _Devices() as devices:
        InitialWeights(CONFIG, 1).read_into(torch.empty(shard.length, device=meta), shard, "weight")
    assert devices.seen == {"meta"}
