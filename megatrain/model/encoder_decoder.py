"""An encoder-decoder model, whole on one device or the layers of one pipeline stage, built from the family's
description.

B: pairs of a source and a target, S: tokens of source, T: tokens of target, C: channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor

from megatrain.batch import Batch, InferenceBatch
from megatrain.families.description import Stack
from megatrain.model.context import Context, EncoderOutput, KeyValueCache
from megatrain.model.decoder import Decoder, DecoderStage, LayerSpec, Streams, build_layers

if TYPE_CHECKING:
    from megatrain.config.schema import ModelConfig


class _Part(NamedTuple):
    """The layers that a stage has of a stack. ``begins``: with the stack's embeddings, which take token ids."""

    stack: Stack
    layers: list[str]
    begins: bool
    ends: bool

    @property
    def names(self) -> list[str]:
        """All that activations pass through, in order."""
        first = [layer.name for layer in self.stack.first_layers] if self.begins else []
        return [*first, *self.layers, *([self.stack.norm.name] if self.ends and self.stack.norm else [])]


class EncoderDecoderStage(DecoderStage):
    """Consecutive layers of an encoder-decoder model: all of them, or those of one pipeline stage.

    Two streams travel between stages: "source", activations of the source's tokens and then what the encoder made of
    them, for all of the decoder's layers; and "hidden", those of the target's tokens, once the decoder has begun.
    ``share``: what a layout does with the encoder's output, which all of the decoder's layers read.
    """

    def __init__(self, config: ModelConfig, specs: Sequence[LayerSpec]) -> None:
        super().__init__(config, specs)
        self.share: Callable[[Tensor], Tensor] = lambda hidden_BSC: hidden_BSC
        self.encoder_part, self.decoder_part = (self._part(stack) for stack in config.description.stacks)
        self.output_scale = config.hidden_size**-0.5 if getattr(config, "scale_decoder_outputs", False) else 1.0

    def _part(self, stack: Stack) -> _Part:
        every = [f"{stack.block.prefix}.{number}" for number in range(self.config.num_layers(stack))]
        here = [name for name in every if name in self.decoder_names]
        return _Part(stack, here, every[0] in here, every[-1] in here)

    def forward(self, batch: Batch | InferenceBatch, received: Streams | None = None) -> Tensor | Streams:
        """See DecoderStage."""
        if isinstance(batch, InferenceBatch):
            return self._answer(batch, received)
        received = received or {}
        source_BSC = self.encode(batch.source_tokens_BS, received, partial(self._encoder_context, batch))
        if not self.decoder_part.layers:
            return {"source": source_BSC}
        x_BTC = self.decode(batch.tokens_BT, received, self._decoder_context(batch, self.share(source_BSC)))
        if self.head_name is None:
            return {"hidden": x_BTC, "source": source_BSC}
        return self.head.loss_sum(x_BTC, batch.targets_BM, batch.loss_mask_BM)

    def takes(self, batch: Batch | InferenceBatch) -> Sequence[str]:
        """See DecoderStage."""
        has_begun = not self.encoder_part.layers and not self.decoder_part.begins
        return [*(["hidden"] if has_begun else []), *([] if _is_encoded(batch) else ["source"])]

    def gives(self, batch: Batch | InferenceBatch) -> Sequence[str]:
        """See DecoderStage."""
        return [*(["hidden"] if self.decoder_part.layers else []), *([] if _is_encoded(batch) else ["source"])]

    def layer_inputs(self, batch: Batch) -> list[tuple[list[str], str, Context]]:
        """See DecoderStage. What has a gradient in a step has one here."""
        assert batch.source_tokens_BS is not None
        shape = (*batch.source_tokens_BS.shape, self.config.hidden_size)
        source_BSC = torch.zeros(shape, dtype=self.dtype, device=self.device, requires_grad=True)
        found = [
            (part.layers, stream, make())
            for part, stream, make in (
                (self.encoder_part, "source", partial(self._encoder_context, batch)),
                (self.decoder_part, "hidden", partial(self._decoder_context, batch, source_BSC)),
            )
            if part.layers
        ]
        return [
            (names, stream, c if c.bias_BHTS is None else c._replace(bias_BHTS=c.bias_BHTS.detach().requires_grad_()))
            for names, stream, c in found
        ]

    def encode(self, tokens_BS: Tensor | None, received: Streams, context: Callable[[], Context]) -> Tensor:
        """The source through the encoder's layers that are here, if any: [B, S, C]."""
        x = tokens_BS if self.encoder_part.begins else received["source"]
        assert x is not None
        return self._through(self.encoder_part, x, context()) if self.encoder_part.layers else x

    def decode(self, tokens_BT: Tensor, received: Streams, context: Context) -> Tensor:
        """The target through the decoder's layers that are here: [B, T, C]; behind the last one what the head is
        applied to."""
        x_BTC = self._through(self.decoder_part, tokens_BT if self.decoder_part.begins else received["hidden"], context)
        return x_BTC * self.output_scale if self.decoder_part.ends else x_BTC

    def _encoder_context(self, batch: Batch) -> Context:
        assert batch.source_tokens_BS is not None
        # Other ids than the target's: embeddings that both share are not to drop the same.
        ids = batch.source_document_ids_BS, ~batch.sample_ids_B
        return self._context(self.encoder_part, _positions(batch.source_tokens_BS, batch.source_positions_BS), *ids)

    def _decoder_context(self, batch: Batch, source_BSC: Tensor) -> Context:
        ids_BT, ids_BS = batch.document_ids_BT, batch.source_document_ids_BS
        mask_B1TS = None if ids_BT is None or ids_BS is None else self._mask(_alike(ids_BT, ids_BS))
        context = self._context(self.decoder_part, batch.positions_BT, ids_BT, batch.sample_ids_B)
        return context._replace(encoded=EncoderOutput(source_BSC, mask_B1TS))

    def _context(
        self,
        part: _Part,
        positions_BT: Tensor,
        document_ids_BT: Tensor | None,
        sample_ids_B: Tensor | None,
        cache: KeyValueCache | None = None,
    ) -> Context:
        """A source sees itself in both directions, a target what is before it; where there are ids, each token those
        with its own."""
        context = self.make_context(positions_BT, document_ids_BT, sample_ids_B, self.dtype, cache)
        first = 0 if cache is None else max(cache.lengths)
        places = torch.arange(first + positions_BT.shape[1], device=positions_BT.device)
        seen = None if document_ids_BT is None else _alike(document_ids_BT, document_ids_BT)
        if part.stack.block.attention.is_causal:
            is_before = (places <= places[first:].unsqueeze(1))[None, None]
            seen = is_before if seen is None else seen & is_before
        return context._replace(bias_BHTS=self._bias(part.stack, places.unsqueeze(0), first, seen))

    def _bias(self, stack: Stack, places_1S: Tensor, first: int, seen: Tensor | None) -> Tensor | None:
        """[B or 1, H, T, S] for the queries from ``first`` on, minus infinity where a key is not ``seen``.

        One for all layers. Within a document distances are those of places.
        """
        table = stack.block.attention.relative_bias
        if table is None:
            return None
        bias_1HTS: Tensor = self.get_submodule(table.name)(places_1S[:, first:], places_1S)
        return bias_1HTS if seen is None else bias_1HTS.masked_fill(~seen, float("-inf"))

    def _through(self, part: _Part, x: Tensor, context: Context) -> Tensor:
        for name in part.names:
            x = self.get_submodule(name)(x, context)
        return x

    def _answer(self, batch: InferenceBatch, received: Streams | None) -> Tensor | Streams:
        received = received or {}
        cache: KeyValueCache | None = batch.cache
        streams: dict[str, Tensor] = {}
        encoded = None if cache is None else cache.encoded
        if encoded is None:
            encoded, streams["source"] = self._encoded(batch, received)
            if cache is not None and self.keeps_encoded:
                cache.encoded = encoded = encoded._replace(keys_values={})
        if not self.decoder_part.layers:
            return streams
        context = self._context(self.decoder_part, batch.positions_BT, None, None, cache)
        x_BTC = self.decode(batch.tokens_BT, received, context._replace(encoded=encoded))
        return {"hidden": x_BTC, **streams} if self.head_name is None else self._asked(x_BTC, batch)

    def _encoded(self, batch: InferenceBatch, received: Streams) -> tuple[EncoderOutput, Tensor]:
        """What the decoder reads of the batch's sources, and what travels of it."""
        tokens_BS, lengths_B = batch.source_tokens_BS, batch.source_lengths_B
        assert tokens_BS is not None and lengths_B is not None
        is_filling_BS = torch.arange(tokens_BS.shape[1], device=self.device) >= lengths_B.unsqueeze(1)
        context = partial(self._context, self.encoder_part, _positions(tokens_BS), is_filling_BS, None)
        source_BSC = self.encode(tokens_BS, received, context)
        read_BSC = self.share(source_BSC) if self.decoder_part.layers else source_BSC
        return EncoderOutput(read_BSC, self._mask(~is_filling_BS[:, None, None])), source_BSC

    def _mask(self, seen: Tensor) -> Tensor:
        """One for all layers: what is added to the scores."""
        return torch.zeros(seen.shape, dtype=self.dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


class EncoderDecoder(EncoderDecoderStage):
    """A whole encoder-decoder model. In use a `megatrain.model.generate.LanguageModel`."""

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

    def logits(self, source_BS: Tensor, target_BT: Tensor) -> Tensor:
        """[B, T, V], in the type of the weights, of sources and targets without filling."""
        source_BSC = self.encode(
            source_BS, {}, partial(self._context, self.encoder_part, _positions(source_BS), None, None)
        )
        context = self._context(self.decoder_part, _positions(target_BT), None, None)
        x_BTC = self.decode(target_BT, {}, context._replace(encoded=EncoderOutput(source_BSC)))
        logits_BTV: Tensor = self.head(x_BTC)
        return logits_BTV


WholeModel: TypeAlias = Decoder | EncoderDecoder


def whole_model(config: ModelConfig, seed: int = 0) -> WholeModel:
    """All layers of a model on one device; ``seed`` is that of dropout."""
    return Decoder(config, seed) if config.description.encoder is None else EncoderDecoder(config, seed)


def build_stage(config: ModelConfig, seed: int, layers: Sequence[range]) -> DecoderStage:
    """The ``layers`` that a pipeline stage has of each of the model's stacks."""
    kind = DecoderStage if config.description.encoder is None else EncoderDecoderStage
    return kind(config, build_layers(config, seed, layers))


def _is_encoded(batch: Batch | InferenceBatch) -> bool:
    """Whether the batch's cache has what the encoder made of its sources."""
    return isinstance(batch, InferenceBatch) and batch.cache is not None and batch.cache.encoded is not None


def _positions(tokens_BT: Tensor, given_BT: Tensor | None = None) -> Tensor:
    if given_BT is not None:
        return given_BT
    return torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)


def _alike(ids_BT: Tensor, ids_BS: Tensor) -> Tensor:
    """[B, 1, T, S], True where both have the same id."""
    return (ids_BT.unsqueeze(2) == ids_BS.unsqueeze(1)).unsqueeze(1)
