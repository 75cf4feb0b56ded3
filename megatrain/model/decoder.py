"""A whole model on one device, or the layers of one pipeline stage, built from the family's description.

B: sequences, T: tokens, C: channels, M: targets of a sequence, V: vocabulary, N: tokens whose successor is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn

from megatrain.batch import Batch, InferenceBatch
from megatrain.families.description import (
    Attention,
    FirstLayer,
    HeadTransform,
    Norm,
    PatchEmbedding,
    SinusoidalPositions,
    Stack,
)
from megatrain.model.attention import CoreAttention
from megatrain.model.block import Activation, DecoderLayer, attach, build_norm
from megatrain.model.context import Context, ContextBuilder
from megatrain.model.dropout import Dropout
from megatrain.model.embedding import (
    EmbeddingNorm,
    ImageEmbedding,
    PositionEmbedding,
    SegmentEmbedding,
    SinusoidalEmbedding,
    TokenEmbedding,
)
from megatrain.model.generate import require_generative
from megatrain.model.loss import OutputHead, token_scores
from megatrain.model.relative_bias import RelativeBias

if TYPE_CHECKING:
    from megatrain.config.schema import ModelConfig


Streams: TypeAlias = Mapping[str, Tensor]
"""Activations that one pipeline stage gives the next, by name."""


@dataclass(frozen=True)
class LayerSpec:
    """A layer of a stack: ``prefix`` + "." + a parameter's name in it is the parameter's canonical name.

    Every layer is called as ``layer(x, context)`` and returns the next x (the first takes token ids), but for a
    relative bias, which is computed for all layers of its stack, and for the head and what transforms its input, which
    take x alone: ``head(x)`` gives logits, ``head.loss_sum(x, targets, loss_mask)`` the loss.
    """

    prefix: str
    kind: Literal["embedding", "decoder", "norm", "bias", "transform", "head"]
    build: Callable[[], nn.Module]


def build_layers(config: ModelConfig, seed: int = 0, layers: Sequence[range] | None = None) -> list[LayerSpec]:
    """The stacks of the config's family, in order; nothing is built yet. ``seed`` is that of dropout. ``layers``: of a
    pipeline stage, the numbers of the layers that it has of each stack; None: all.

    With the first of a stack go its embeddings, with the last its norm, and with the last of all the head.
    """
    config.known_vocab_size  # noqa: B018 (raises where it is not known)
    family = config.description
    found: dict[str, LayerSpec] = {}  # two stacks may have an embedding in common
    all_layers = [range(config.num_layers(stack)) for stack in family.stacks]
    for stack, numbers, every in zip(family.stacks, layers or all_layers, all_layers, strict=True):
        for e in stack.first_layers if every[0] in numbers else ():
            found[e.name] = LayerSpec(e.name, "embedding", partial(_embedding, config, seed, stack, e))
        for number in numbers:
            name = f"{stack.block.prefix}.{number}"
            found[name] = LayerSpec(name, "decoder", partial(DecoderLayer, config, stack.block, number, seed))
        if numbers and (bias := stack.block.attention.relative_bias) is not None:
            found[bias.name] = LayerSpec(bias.name, "bias", partial(_relative_bias, config, stack.block.attention))
        if stack.norm is not None and every[-1] in numbers:
            found[stack.norm.name] = LayerSpec(stack.norm.name, "norm", partial(build_norm, stack.norm, config))
    if layers is not None and all_layers[-1][-1] not in layers[-1]:
        return [*found.values()]
    transform = [] if family.head_transform is None else [_transform(config, seed, family.head_transform)]
    head = partial(OutputHead, config.num_answers, config.hidden_size, family.head.bias)
    return [*found.values(), *transform, LayerSpec(family.head.name, "head", head)]


def _embedding(config: ModelConfig, seed: int, stack: Stack, layer: FirstLayer | Norm) -> nn.Module:
    """The last one of a stack drops."""
    dropout = Dropout(config.hidden_dropout, seed, layer.name)
    if isinstance(layer, PatchEmbedding):
        return ImageEmbedding(layer, config.sizes, dropout)
    if isinstance(layer, Norm):
        return EmbeddingNorm(config.hidden_size, getattr(config, layer.eps_key), dropout)
    size, last = config.hidden_size, dropout if layer is stack.first_layers[-1] else None
    if isinstance(layer, SinusoidalPositions):
        return SinusoidalEmbedding(config.max_position_embeddings, size, last)
    if layer.rows in ("vocab", "source_vocab"):
        return TokenEmbedding(config.sizes[layer.rows], size, last, size**0.5 if layer.is_scaled else 1.0)
    kinds = {"positions": PositionEmbedding, "segments": SegmentEmbedding}
    return kinds[layer.rows](config.sizes[layer.rows], size, last)


def _transform(config: ModelConfig, seed: int, spec: HeadTransform) -> LayerSpec:
    dropout = Dropout(config.hidden_dropout if spec.drops else 0.0, seed, spec.name)
    return LayerSpec(spec.name, "transform", partial(TransformedInput, config, spec, dropout))


class TransformedInput(nn.Module):
    """What a head reads: norm(activation(linear(x))), dropped. An ``nn.Linear`` gets no adapter, as the head gets
    none."""

    def __init__(self, config: ModelConfig, spec: HeadTransform, dropout: Dropout) -> None:
        super().__init__()
        self.linear_name, self.norm_name = spec.linear.name, spec.norm.name if spec.norm else None
        self.add_module(self.linear_name, nn.Linear(config.hidden_size, config.hidden_size, spec.linear.bias))
        if spec.norm is not None:
            self.add_module(spec.norm.name, build_norm(spec.norm, config))
        self.activation = Activation(spec.activation)
        self.dropout = dropout

    def forward(self, x: Tensor, sample_ids_B: Tensor | None = None) -> Tensor:
        x = self.activation(self.get_submodule(self.linear_name)(x))
        x = x if self.norm_name is None else self.get_submodule(self.norm_name)(x)
        return self.dropout(x, sample_ids_B)  # type: ignore[no-any-return]


class TargetPicker(nn.Module):
    """The activations that targets are asked at: so many of each sequence, which no device has to count."""

    def forward(self, x_BTC: Tensor, places_BM: Tensor) -> Tensor:
        rows_B1 = torch.arange(len(x_BTC), device=x_BTC.device).unsqueeze(1)
        return x_BTC[rows_B1, places_BM]  # unlike gather, keeps no x for the backward pass


def _relative_bias(config: ModelConfig, attention: Attention) -> nn.Module:
    assert attention.relative_bias is not None
    sizes, distance = config.sizes, getattr(config, attention.relative_bias.distance_key)
    return RelativeBias(sizes["buckets"], sizes["heads"], distance, is_causal=attention.is_causal)


class DecoderStage(nn.Module):
    """Consecutive layers of a decoder: all of them, or those of one pipeline stage.

    Parameters have Hugging Face's names; they are not initialised here. Layers are looked up by name in every forward,
    so that a parallel layout can put others in their places. ``keeps_encoded``: a cache keeps what an encoder made of
    the sources; not where each pass needs all data ranks, which then must pass through the same layers.
    """

    keeps_encoded = True

    def __init__(self, config: ModelConfig, specs: Sequence[LayerSpec]) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.make_context = ContextBuilder(config)
        for spec in specs:
            attach(self, spec.prefix, spec.build())
        self.body_names = [spec.prefix for spec in specs if spec.kind not in ("transform", "head")]
        self.transform_name = next((spec.prefix for spec in specs if spec.kind == "transform"), None)
        self.head_name = next((spec.prefix for spec in specs if spec.kind == "head"), None)
        self.last_names = [spec.prefix for spec in specs if spec.kind in ("norm", "transform", "head")]
        self.pick = TargetPicker() if config.description.asks_at_places and self.head_name else None
        self.embedding_names = [spec.prefix for spec in specs if spec.kind == "embedding"]
        self.decoder_names = [spec.prefix for spec in specs if spec.kind == "decoder"]
        self.bias_names = [spec.prefix for spec in specs if spec.kind == "bias"]

    def forward(self, batch: Batch | InferenceBatch, received: Streams | None = None) -> Tensor | Streams:
        """Through this stage's layers. ``received``: what the stage before gave; None in the first one.

        Gives activations by the names of ``gives``; in the last stage the sum of the cross-entropy (nats) over the
        batch's scored targets, an fp32 scalar, or what an InferenceBatch asks: fp32 logits [N, V], or with its targets
        their `token_scores` [2, N].
        """
        if isinstance(batch, InferenceBatch):
            return self._answer(batch, received)
        x_BTC = self.hidden(batch.inputs if received is None else received["hidden"], self.context(batch))
        if self.head_name is None:
            return {"hidden": x_BTC}
        return self.head.loss_sum(self._at_targets(x_BTC, batch), batch.targets_BM, batch.loss_mask_BM)

    def takes(self, batch: Batch | InferenceBatch) -> Sequence[str]:
        """What a stage that is not the first one receives: "hidden", activations of the batch's tokens [B, T, C]."""
        return ("hidden",)

    def gives(self, batch: Batch | InferenceBatch) -> Sequence[str]:
        """What the stage behind this one receives."""
        return ("hidden",)

    def layer_inputs(self, batch: Batch) -> list[tuple[list[str], str, Context]]:
        """Of each stack, the names of its layers here, that of the stream that they are given, and the context."""
        return [(self.decoder_names, "hidden", self.context(batch))]

    def target_scores(self, batch: Batch) -> Tensor:
        """The `token_scores` [2, B * M] of a batch's targets, scored or not; of a whole model."""
        x_BTC = self.hidden(batch.inputs, self.context(batch))
        logits_BMV: Tensor = self.head(self._at_targets(x_BTC, batch))
        return token_scores(logits_BMV.flatten(0, 1), batch.targets_BM.flatten())

    def _at_targets(self, x_BTC: Tensor, batch: Batch) -> Tensor:
        """What the head reads of the last layer's activations, for each target."""
        if self.pick is None:
            return x_BTC
        assert batch.target_places_BM is not None
        return self.transformed(self.pick(x_BTC, batch.target_places_BM), batch.sample_ids_B)

    def transformed(self, x: Tensor, sample_ids_B: Tensor | None = None) -> Tensor:
        """Activations as the head reads them."""
        return x if self.transform_name is None else self.get_submodule(self.transform_name)(x, sample_ids_B)

    def context(self, batch: Batch) -> Context:
        """What its layers need to know of a batch's tokens."""
        places = batch.positions_BT, batch.document_ids_BT, batch.sample_ids_B
        context = self.make_context(*places, self.dtype, borders=batch.document_starts)
        return context._replace(segments_BT=batch.segments_BT)

    def _answer(self, batch: InferenceBatch, received: Streams | None) -> Tensor | Streams:
        require_generative(self.config)
        context = self.make_context(batch.positions_BT, None, None, self.dtype, batch.cache)
        x_BTC = self.hidden(batch.tokens_BT if received is None else received["hidden"], context)
        return {"hidden": x_BTC} if self.head_name is None else self._asked(x_BTC, batch)

    def _asked(self, x_BTC: Tensor, batch: InferenceBatch) -> Tensor:
        """What an InferenceBatch asks, of the last layer's activations."""
        logits_NV: Tensor = self.head(x_BTC, None, None, (batch.rows_N, batch.columns_N)).float()
        return logits_NV if batch.targets_N is None else token_scores(logits_NV, batch.targets_N)

    def hidden(self, x: Tensor, context: Context) -> Tensor:
        """Token ids (the first stage's input) or activations, through all layers but the head: [B, T, C]."""
        for name in self.body_names:
            x = self.get_submodule(name)(x, context)
        return x

    @property
    def head(self) -> OutputHead:
        """The output head, or what a parallel layout put in its place; only the last stage has one."""
        assert self.head_name is not None
        return cast(OutputHead, self.get_submodule(self.head_name))

    @property
    def dtype(self) -> torch.dtype:
        """The type the layers compute in: that of their weights, unless a layout keeps those in another one."""
        return self.compute_dtype or next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def use_attention(self, kernel: str) -> None:
        """Compute attention by a kernel of ``model.attention``."""
        self.make_context.kernel = kernel
        for module in self.modules():
            if isinstance(module, CoreAttention):
                module.kernel = kernel

    def smooth_labels(self, amount: float) -> None:
        """Smooth the targets of training; see OutputHead."""
        if self.head_name is not None:
            self.head.label_smoothing = amount

    def tie_weights(self) -> None:
        """Let head and token embedding share one parameter, where the config says so and both are in this stage.

        To be called again after replacing either.
        """
        embedding = self.config.description.embeddings[0].name
        if self.config.is_tied and self.head_name is not None and embedding in self.embedding_names:
            self.head.weight = cast(TokenEmbedding, self.get_submodule(embedding)).weight


class Decoder(DecoderStage):
    """A whole decoder: token ids to logits, or to the loss. In use a `megatrain.model.generate.LanguageModel`."""

    tokens_at_once = 8192
    tokens_multiple = 1

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        """``seed`` is that of dropout."""
        super().__init__(config, build_layers(config, seed))
        self.tie_weights()

    @torch.inference_mode()
    def infer(self, batch: InferenceBatch) -> Tensor:
        """See LanguageModel. The model is to be in evaluation mode."""
        answer: Tensor = self(batch.to(self.device))
        return answer

    def logits(self, tokens_BT: Tensor, context: Context) -> Tensor:
        """[B, T, V], in the type of the weights."""
        logits_BTV: Tensor = self.head(self.transformed(self.hidden(tokens_BT, context)))
        return logits_BTV
