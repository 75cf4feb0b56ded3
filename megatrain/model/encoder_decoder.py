"""An encoder and a decoder on one device, built from the family's description.

B: pairs of a source and a target, S: tokens of source, T: tokens of target, C: channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from megatrain.batch import Batch, InferenceBatch
from megatrain.families.description import Stack
from megatrain.model.context import Context, EncoderOutput, KeyValueCache
from megatrain.model.decoder import Decoder, DecoderStage, build_layers
from megatrain.model.loss import token_scores

if TYPE_CHECKING:
    from megatrain.config.schema import ModelConfig


class EncoderDecoder(DecoderStage):
    """Source and target token ids to the loss. ``share``: what a layout does with the encoder's output, which all of
    the decoder's layers read."""

    tokens_at_once = 8192
    tokens_multiple = 1

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        """``seed`` is that of dropout."""
        super().__init__(config, build_layers(config, seed))
        self.tie_weights()
        self.share: Callable[[Tensor], Tensor] = lambda hidden_BSC: hidden_BSC
        self.stacks = config.description.stacks
        self.output_scale = config.hidden_size**-0.5 if getattr(config, "scale_decoder_outputs", False) else 1.0

    def forward(self, batch: Batch | InferenceBatch, x_BTC: Tensor | None = None) -> Tensor:
        """The sum of the cross-entropy (nats) over the batch's scored targets, an fp32 scalar, or what an
        InferenceBatch asks, as DecoderStage gives it."""
        if isinstance(batch, InferenceBatch):
            return self._answer(batch, x_BTC)
        assert batch.source_tokens_BS is not None
        ids_BS = batch.source_document_ids_BS
        # Other ids than the target's: embeddings that both share are not to drop the same.
        encoded = self.encode(batch.source_tokens_BS, batch.source_positions_BS, ids_BS, ~batch.sample_ids_B)
        if ids_BS is not None and batch.document_ids_BT is not None:
            encoded = encoded._replace(mask_B1TS=_alike(batch.document_ids_BT, ids_BS))
        x_BTC = self.decode(batch.tokens_BT, self.context(batch)._replace(encoded=encoded))
        return self.head.loss_sum(x_BTC, batch.targets_BM, batch.loss_mask_BM)

    def encode(
        self,
        tokens_BS: Tensor,
        positions_BS: Tensor | None,
        document_ids_BS: Tensor | None,
        sample_ids_B: Tensor | None,
    ) -> EncoderOutput:
        """A source sees itself in both directions; where there are ids, each token those with its own."""
        encoder, _ = self.stacks
        if positions_BS is None:
            positions_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
        context = self.make_context(positions_BS, document_ids_BS, sample_ids_B, self.dtype)
        seen = None if document_ids_BS is None else _alike(document_ids_BS, document_ids_BS)
        context = context._replace(bias_BHTS=self._bias(encoder, tokens_BS.shape[1], seen))
        return EncoderOutput(self.share(self._through(encoder, tokens_BS, context)))

    def decode(self, tokens_BT: Tensor, context: Context) -> Tensor:
        """[B, T, C], what the head is applied to."""
        _, decoder = self.stacks
        first = 0 if context.cache is None else max(context.cache.lengths)
        last = first + tokens_BT.shape[1]
        places = torch.arange(last, device=tokens_BT.device)
        seen = (places <= places[first:].unsqueeze(1))[None, None]
        if context.document_ids_BT is not None:
            seen = seen & _alike(context.document_ids_BT, context.document_ids_BT)
        context = context._replace(bias_BHTS=self._bias(decoder, last, seen, first))
        return self._through(decoder, tokens_BT, context) * self.output_scale

    def _through(self, stack: Stack, tokens_BT: Tensor, context: Context) -> Tensor:
        x = tokens_BT
        names = [layer.name for layer in stack.first_layers]
        names += [f"{stack.block.prefix}.{number}" for number in range(self.config.num_layers(stack))]
        names += [] if stack.norm is None else [stack.norm.name]
        for name in names:
            x = self.get_submodule(name)(x, context)
        return x

    def _bias(self, stack: Stack, num_keys: int, seen: Tensor | None, first: int = 0) -> Tensor | None:
        """[B or 1, H, T, S] for the queries from ``first`` on, minus infinity where a key is not ``seen``.

        One for all layers. Within a document distances are those of places.
        """
        table = stack.block.attention.relative_bias
        if table is None:
            return None
        places_1S = torch.arange(num_keys, device=self.device).unsqueeze(0)
        bias_1HTS: Tensor = self.get_submodule(table.name)(places_1S[:, first:], places_1S)
        return bias_1HTS if seen is None else bias_1HTS.masked_fill(~seen, float("-inf"))

    def _answer(self, batch: InferenceBatch, x_BTC: Tensor | None) -> Tensor:
        cache: KeyValueCache | None = batch.cache
        context = self.make_context(batch.positions_BT, None, None, self.dtype, cache)
        x_BTC = self.decode(batch.tokens_BT, context._replace(encoded=self._encoded(batch)))
        logits_NV: Tensor = self.head(x_BTC, None, None, (batch.rows_N, batch.columns_N)).float()
        return logits_NV if batch.targets_N is None else token_scores(logits_NV, batch.targets_N)

    def _encoded(self, batch: InferenceBatch) -> EncoderOutput:
        """Of the batch's sources, or what the cache has of it."""
        cache: KeyValueCache | None = batch.cache
        if cache is not None and cache.encoded is not None:
            return cache.encoded
        assert batch.source_tokens_BS is not None and batch.source_lengths_B is not None
        places_S = torch.arange(batch.source_tokens_BS.shape[1], device=self.device)
        is_filling_BS = places_S >= batch.source_lengths_B.unsqueeze(1)
        encoded = self.encode(batch.source_tokens_BS, None, is_filling_BS, None)
        encoded = encoded._replace(mask_B1TS=~is_filling_BS[:, None, None])
        if cache is not None:
            cache.encoded = encoded = encoded._replace(keys_values={})
        return encoded

    @torch.inference_mode()
    def infer(self, batch: InferenceBatch) -> Tensor:
        """See LanguageModel. The model is to be in evaluation mode."""
        answer: Tensor = self(batch.to(self.device))
        return answer


WholeModel: TypeAlias = Decoder | EncoderDecoder


def whole_model(config: ModelConfig, seed: int = 0) -> WholeModel:
    """All layers of a model on one device; ``seed`` is that of dropout."""
    return Decoder(config, seed) if config.description.encoder is None else EncoderDecoder(config, seed)


def _alike(ids_BT: Tensor, ids_BS: Tensor) -> Tensor:
    """[B, 1, T, S], True where both have the same id."""
    return (ids_BT.unsqueeze(2) == ids_BS.unsqueeze(1)).unsqueeze(1)
