"""A whole decoder on one device, put together from its family's layers.

B: sequences, T: tokens, C: channels, V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from megatrain.batch import Batch
from megatrain.model.context import Context, ContextBuilder
from megatrain.model.embedding import TokenEmbedding
from megatrain.model.families import LayerSpec, build_layers, family_of
from megatrain.model.loss import OutputHead

if TYPE_CHECKING:
    from megatrain.config.schema import ModelConfig


class DecoderStage(nn.Module):
    """Consecutive layers of a decoder: all of them, or those of one pipeline stage.

    Parameters have Hugging Face's names; they are not initialised here. Layers are looked up by name in every forward,
    so that a parallel layout can put others in their places.
    """

    def __init__(self, config: ModelConfig, specs: Sequence[LayerSpec]) -> None:
        super().__init__()
        self.config = config
        self.make_context = ContextBuilder(config, family_of(config).rotates)
        attach_layers(self, specs)
        self.body_names = [spec.prefix for spec in specs if spec.kind != "head"]
        self.head_name = next((spec.prefix for spec in specs if spec.kind == "head"), None)
        self.embedding_names = [spec.prefix for spec in specs if spec.kind == "embedding"]
        self.decoder_names = [spec.prefix for spec in specs if spec.kind == "decoder"]

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
        """The type the layers compute in: that of their weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def tie_weights(self) -> None:
        """Let head and token embedding share one parameter, where the config says so and both are in this stage.

        To be called again after replacing either.
        """
        if self.config.tie_word_embeddings and self.head_name is not None and self.embedding_names:
            self.head.weight = cast(TokenEmbedding, self.get_submodule(self.embedding_names[0])).weight


class Decoder(DecoderStage):
    """A whole decoder: token ids to logits, or to the loss."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        """``seed`` is that of dropout."""
        super().__init__(config, build_layers(config, seed))
        self.tie_weights()

    def forward(self, batch: Batch) -> Tensor:
        """Sum of the cross-entropy (nats) over the batch's scored targets: an fp32 scalar."""
        context = self.make_context(batch.positions_BT, batch.document_ids_BT, batch.sample_ids_B, self.dtype)
        return self.head.loss_sum(self.hidden(batch.tokens_BT, context), batch.targets_BT, batch.loss_mask_BT)

    def logits(self, tokens_BT: Tensor, context: Context) -> Tensor:
        """[B, T, V], in the type of the weights."""
        logits_BTV: Tensor = self.head(self.hidden(tokens_BT, context))
        return logits_BTV


def attach_layers(parent: nn.Module, specs: Sequence[LayerSpec]) -> None:
    """Build the layers and register each under its dotted prefix, so that state_dict() has the canonical names."""
    for spec in specs:
        *path, name = spec.prefix.split(".")
        module = parent
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.add_module(name, spec.build())
