"""A whole decoder on one device, or the layers of one pipeline stage, built from the family's description.

B: sequences, T: tokens, C: channels, V: vocabulary, N: tokens whose successor is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn

from megatrain.batch import Batch, InferenceBatch
from megatrain.families.description import Embedding
from megatrain.model.attention import CoreAttention
from megatrain.model.block import DecoderLayer, attach, build_norm
from megatrain.model.context import Context, ContextBuilder
from megatrain.model.dropout import Dropout
from megatrain.model.embedding import PositionEmbedding, TokenEmbedding
from megatrain.model.loss import OutputHead, token_scores

if TYPE_CHECKING:
    from megatrain.config.schema import ModelConfig


@dataclass(frozen=True)
class LayerSpec:
    """A layer of the stack: ``prefix`` + "." + a parameter's name in it is the parameter's canonical name.

    Every layer is called as ``layer(x, context)`` and returns the next x (the first takes token ids), but for the head,
    which takes x alone: ``head(x)`` gives logits, ``head.loss_sum(x, targets, loss_mask)`` the loss.
    """

    prefix: str
    kind: Literal["embedding", "decoder", "norm", "head"]
    build: Callable[[], nn.Module]


def build_layers(config: ModelConfig, seed: int = 0) -> list[LayerSpec]:
    """The stack of the config's family, in order; nothing is built yet. ``seed`` is that of dropout."""
    family, vocab_size = config.description, config.known_vocab_size
    embeddings = [LayerSpec(e.name, "embedding", partial(_embedding, config, seed, e)) for e in family.embeddings]
    numbers = range(config.num_hidden_layers)
    prefix = family.block.prefix
    return [
        *embeddings,
        *(LayerSpec(f"{prefix}.{i}", "decoder", partial(DecoderLayer, config, family.block, i, seed)) for i in numbers),
        LayerSpec(family.norm.name, "norm", partial(build_norm, family.norm, config)),
        LayerSpec(family.head.name, "head", partial(OutputHead, vocab_size, config.hidden_size)),
    ]


def _embedding(config: ModelConfig, seed: int, embedding: Embedding) -> nn.Module:
    is_last = embedding is config.description.embeddings[-1]
    dropout = Dropout(config.hidden_dropout, seed, embedding.name) if is_last else None
    kind = TokenEmbedding if embedding.rows == "vocab" else PositionEmbedding
    return kind(config.sizes[embedding.rows], config.hidden_size, dropout)


class DecoderStage(nn.Module):
    """Consecutive layers of a decoder: all of them, or those of one pipeline stage.

    Parameters have Hugging Face's names; they are not initialised here. Layers are looked up by name in every forward,
    so that a parallel layout can put others in their places.
    """

    def __init__(self, config: ModelConfig, specs: Sequence[LayerSpec]) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.make_context = ContextBuilder(config)
        for spec in specs:
            attach(self, spec.prefix, spec.build())
        self.body_names = [spec.prefix for spec in specs if spec.kind != "head"]
        self.head_name = next((spec.prefix for spec in specs if spec.kind == "head"), None)
        self.embedding_names = [spec.prefix for spec in specs if spec.kind == "embedding"]
        self.decoder_names = [spec.prefix for spec in specs if spec.kind == "decoder"]

    def forward(self, batch: Batch | InferenceBatch, x_BTC: Tensor | None = None) -> Tensor:
        """Through this stage's layers. ``x_BTC``: what the stage before gave; None in the first one.

        Gives [B, T, C]; in the last stage the sum of the cross-entropy (nats) over the batch's scored targets, an fp32
        scalar, or what an InferenceBatch asks: fp32 logits [N, V], or with its targets their `token_scores` [2, N].
        """
        if isinstance(batch, InferenceBatch):
            return self._answer(batch, x_BTC)
        x_BTC = self.hidden(batch.tokens_BT if x_BTC is None else x_BTC, self.context(batch))
        return x_BTC if self.head_name is None else self.head.loss_sum(x_BTC, batch.targets_BM, batch.loss_mask_BM)

    def context(self, batch: Batch) -> Context:
        """What its layers need to know of a batch's tokens."""
        places = batch.positions_BT, batch.document_ids_BT, batch.sample_ids_B
        return self.make_context(*places, self.dtype, borders=batch.document_starts)

    def _answer(self, batch: InferenceBatch, x_BTC: Tensor | None) -> Tensor:
        context = self.make_context(batch.positions_BT, None, None, self.dtype, batch.cache)
        x_BTC = self.hidden(batch.tokens_BT if x_BTC is None else x_BTC, context)
        if self.head_name is None:
            return x_BTC
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

    def tie_weights(self) -> None:
        """Let head and token embedding share one parameter, where the config says so and both are in this stage.

        To be called again after replacing either.
        """
        if self.config.tie_word_embeddings and self.head_name is not None and self.embedding_names:
            self.head.weight = cast(TokenEmbedding, self.get_submodule(self.embedding_names[0])).weight


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
        logits_BTV: Tensor = self.head(self.hidden(tokens_BT, context))
        return logits_BTV
