"""Which layouts are proven against one rank: all legal ones, a pairwise cover of them, and the few of `make test`."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from tests.image_data import AUGMENTED
from tests.labeled_data import NUM_LABELS
from tests.runs import TinyData, tiny_config

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama", "num_key_value_heads": 4, "tie_word_embeddings": False},
    "llama_tied": {"family": "llama", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "llama_mqa": {"family": "llama", "num_key_value_heads": 1, "tie_word_embeddings": False},
    "gpt2": {"family": "gpt2", "num_key_value_heads": None, "tie_word_embeddings": False},
    "gpt2_tied": {"family": "gpt2", "num_key_value_heads": None, "tie_word_embeddings": True},
}
# Proven on some layouts, by test_families.py: the layers are llama's but for one thing.
FURTHER_MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {"family": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"family": "qwen3", "num_key_value_heads": 2, "tie_word_embeddings": True, "head_dim": 24},
    "qwen3_mqa": {"family": "qwen3", "num_key_value_heads": 1, "tie_word_embeddings": False, "head_dim": 8},
    "mistral": {
        "family": "mistral",
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
        "sliding_window": 10,
    },
    "t5": {
        "family": "t5",
        "num_key_value_heads": None,
        "tie_word_embeddings": False,
        "head_dim": 24,
        "num_decoder_layers": 3,
    },
    "t5_tied": {
        "family": "t5",
        "num_key_value_heads": None,
        "tie_word_embeddings": True,
    },
    "marian": {
        "family": "marian",
        "num_key_value_heads": None,
        "scale_embedding": True,
        "activation_function": "relu",
        "num_decoder_layers": 3,
        "initializer_range": 0.05,
    },
    "marian_untied": {
        "family": "marian",
        "num_key_value_heads": None,
        "share_encoder_decoder_embeddings": False,
        "decoder_vocab_size": 514,
        "tie_word_embeddings": False,
        "initializer_range": 0.05,
    },
}
# Trained by masked language modeling or classification, on documents that are packed each alone.
# Of wider initial weights: from 0.02, one bias has a gradient near Adam's eps, which rounding turns into another step,
# on one rank in two micro-batches as well.
_BERT = {"family": "bert", "num_key_value_heads": None, "initializer_range": 0.05}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {**_BERT, "tie_word_embeddings": True},
    "bert_untied": {**_BERT, "tie_word_embeddings": False},
    "bert_classifier": {**_BERT, "num_labels": NUM_LABELS, "hidden_dropout": 0.1},
}
# Of images, augmented: an image of 3 x 3 patches is 10 tokens, which 2 tensor ranks can share out.
CLASSIFIERS: dict[str, dict[str, Any]] = {
    "vit": {
        "family": "vit",
        "num_key_value_heads": None,
        "image_size": 12,
        "patch_size": 4,
        "vocab_size": 3,
        "tie_word_embeddings": False,
    },
}
DATA_OF = {
    **dict.fromkeys(ENCODERS, "masked_data"),
    "bert_classifier": "labeled_data",
    **dict.fromkeys(CLASSIFIERS, "image_data"),
}
"""The fixture that makes a model's data; of all others it is the pool's own."""
DEGREES = (1, 2, 4)
WORLD_SIZES = (2, 4, 8)
ZERO_STAGES = (0, 1, 2, 3)
ENGINES = ("deepspeed", "fsdp2")
RECOMPUTE = ("none", "selective", "full")
NUM_LAYERS = 4
CHUNKS = (1, 2)  # what a pipeline of two ranks has layers for; test_pipelines.py has more of them
SEQUENCES = 8  # of a step; enough for two micro-batches on each of four data ranks
ODD_VOCABULARY = 517  # so that tensor ranks have padding, and the last has fewer ids


@dataclass(frozen=True)
class Case:
    """One layout of one model. A cover looks at pairs of these fields."""

    data: int
    tensor: int
    pipeline: int
    zero_stage: int
    sequence: bool
    recompute: str
    model: str
    engine: str = "deepspeed"
    chunks: int = 1

    @property
    def world_size(self) -> int:
        return self.data * self.tensor * self.pipeline

    @property
    def micro_batch_size(self) -> int:
        """One or two micro-batches, in pipelines two or four: each layout has both, where sequences are enough."""
        num_micro_batches = (1 + self.zero_stage % 2) * (2 if self.pipeline > 1 else 1)
        return max(SEQUENCES // self.data // num_micro_batches, 1)

    @property
    def is_legal(self) -> bool:
        """As the project promises it, not as plan.rules computes it; the degrees divide the model in any case."""
        can_pipeline = self.engine == "fsdp2" or self.zero_stage < 3
        can_interleave = 1 < self.pipeline <= NUM_LAYERS // self.chunks
        return (
            (self.pipeline == 1 or can_pipeline)
            and (self.chunks == 1 or can_interleave)
            and (self.tensor > 1 or not self.sequence)
        )

    def __str__(self) -> str:
        sequence = "-sequence" if self.sequence else ""
        interleaved = f"v{self.chunks}" if self.chunks > 1 else ""
        degrees = f"{self.world_size}-d{self.data}-t{self.tensor}-p{self.pipeline}{interleaved}"
        return f"{degrees}-{self.engine}-zero{self.zero_stage}{sequence}-{self.recompute}-{self.model}"

    def config(self, data: TinyData) -> dict[str, Any]:
        """The config that a rank trains."""
        parallel = {
            "engine": self.engine,
            "tensor": self.tensor,
            "pipeline": self.pipeline,
            "pipeline_chunks": self.chunks,
            "zero_stage": self.zero_stage,
            "sequence": self.sequence,
            "recompute": self.recompute,
        }
        return parity_config(data, self.model, parallel=parallel, train={"micro_batch_size": self.micro_batch_size})


def parity_config(data: TinyData, model: str, /, **sections: dict[str, Any]) -> dict[str, Any]:
    """A tiny model that every degree up to 4 divides; ``sections`` are laid over it."""
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 4}
    kind = {**MODELS, **FURTHER_MODELS, **ENCODERS, **CLASSIFIERS}[model]
    packed = {"packing": "best_fit", "document_mask": True} if model in ENCODERS else {}
    own: dict[str, dict[str, Any]] = {
        "model": {**size, "max_position_embeddings": 64, "vocab_size": ODD_VOCABULARY, **kind},
        "data": {"seq_len": 10 if model in CLASSIFIERS else 32, **packed},
        "train": {"steps": 12, "global_batch_size": SEQUENCES},
        "objective": {"image_classification": AUGMENTED} if model in CLASSIFIERS else {},
    }
    config = tiny_config(data, Path("unused"))
    for layer in (own, sections):
        config = {name: {**config.get(name, {}), **layer.get(name, {})} for name in config.keys() | layer.keys()}
    return config


def all_cases() -> list[Case]:
    """Every legal case on 2, 4 and 8 ranks, ordered by the number of ranks."""
    axes = (DEGREES, DEGREES, DEGREES, ZERO_STAGES, (False, True), RECOMPUTE, MODELS, ENGINES, CHUNKS)
    cases = (Case(*values) for values in itertools.product(*axes))
    return by_world_size(case for case in cases if case.is_legal and case.world_size in WORLD_SIZES)


def quick_cases() -> list[Case]:
    """Those of `make test`: of the most dangerous mixes so many that each engine, stage and model is there."""
    return by_world_size(DANGEROUS[:NUM_QUICK])


def cover_cases() -> list[Case]:
    """The dangerous ones, and on them every pair of values that any legal case has."""
    return by_world_size(cover(all_cases(), [*DANGEROUS, *ALL_AXES], at_most=80))


ALL_AXES = (
    Case(2, 2, 2, 1, True, "full", "llama_tied"),
    Case(2, 2, 2, 0, False, "none", "gpt2_tied"),
    Case(1, 2, 2, 0, False, "none", "llama", "fsdp2"),
    Case(1, 2, 2, 1, True, "selective", "llama_tied", "fsdp2", 2),
    Case(1, 2, 2, 2, False, "full", "llama_mqa", "fsdp2"),
    Case(2, 2, 2, 3, True, "full", "llama_tied", "fsdp2", 2),
)
DANGEROUS = (
    Case(1, 2, 2, 1, True, "full", "llama_tied"),
    Case(1, 2, 2, 3, True, "full", "gpt2_tied", "fsdp2", 2),
    Case(2, 1, 2, 2, False, "selective", "llama_tied", "deepspeed", 2),
    Case(1, 4, 1, 0, True, "none", "llama_mqa"),
    Case(2, 2, 1, 2, True, "selective", "gpt2"),
    Case(2, 1, 1, 3, False, "full", "llama"),
    Case(2, 1, 1, 1, False, "none", "gpt2_tied", "fsdp2"),
    Case(2, 2, 1, 3, True, "full", "llama_tied", "fsdp2"),
    Case(1, 1, 4, 1, False, "none", "gpt2_tied"),
    Case(1, 2, 2, 0, True, "selective", "gpt2_tied"),
    Case(2, 1, 2, 1, False, "selective", "llama_tied"),
    Case(1, 4, 1, 3, False, "selective", "llama_tied"),
    Case(2, 2, 1, 3, True, "full", "llama_mqa"),
    Case(2, 2, 1, 3, False, "none", "gpt2_tied"),
    Case(1, 4, 1, 2, True, "selective", "llama_mqa", "fsdp2"),
)
NUM_QUICK = 9  # of them


def by_world_size(cases: Iterator[Case] | Sequence[Case]) -> list[Case]:
    """Ordered so that each number of ranks is started once."""
    return sorted(cases, key=lambda case: (case.world_size, astuple(case)))


def cover(cases: Sequence[Case], begin: Sequence[Case], at_most: int) -> list[Case]:
    """``begin``, and case by case the one with the most pairs of values that none before had, until none is missing."""
    chosen = list(begin)
    missing = set().union(*map(_pairs, cases)) - set().union(*map(_pairs, chosen))
    while missing and len(chosen) < at_most:
        best = max(cases, key=lambda case: len(_pairs(case) & missing))
        chosen.append(best)
        missing -= _pairs(best)
    return chosen


@functools.cache
def _pairs(case: Case) -> set[tuple[tuple[int, Any], tuple[int, Any]]]:
    return set(itertools.combinations(enumerate(astuple(case)), 2))
