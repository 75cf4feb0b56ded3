"""What a decoder layer needs to know of its tokens, besides activations; made once a forward, shared by all layers.

B: sequences, T: tokens, S: tokens seen so far, G: key-value heads, D: head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from megatrain.batch import document_starts
from megatrain.model.kernels import TAKE_BORDERS
from megatrain.model.rope import Rotary, RotaryEmbedding

if TYPE_CHECKING:
    from megatrain.config.schema import ModelConfig

TORCH_VERSION = TorchVersion(torch.__version__)


class EncoderOutput(NamedTuple):
    """What a decoder's layers attend to. ``mask``: what is added to the scores, minus infinity where a target token
    does not see a source token; None: all do.

    ``keys_values``: by layer, what generation need not compute again; None while training.
    """

    hidden_BSC: Tensor
    mask_B1TS: Tensor | None = None
    keys_values: dict[int, Sequence[Tensor]] | None = None

    def select(self, rows: Sequence[int]) -> EncoderOutput:
        """See KeyValueCache.select."""
        index = torch.tensor(rows, device=self.hidden_BSC.device)
        kept: dict[int, Sequence[Tensor]] = {
            layer: [x[index] for x in pair] for layer, pair in (self.keys_values or {}).items()
        }
        return EncoderOutput(self.hidden_BSC[index], None if self.mask_B1TS is None else self.mask_B1TS[index], kept)


class KeyValueCache:
    """Keys and values of the tokens seen so far, for every layer: what generation need not compute again.

    Rows may have seen different numbers of tokens. Tokens are given padded on the right, where no token before looks;
    what follows them takes the places of the padding. ``lengths``: how many tokens of each row every layer has stored.
    """

    def __init__(
        self, num_layers: int, capacity: int, num_rows: int = 1, sources: Sequence[Sequence[int]] | None = None
    ) -> None:
        self.capacity = capacity
        self.lengths = [0] * num_rows
        self.sources = sources  # what an encoder is to read
        self.encoded: EncoderOutput | None = None  # what it has made of them
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * num_layers
        self._ends_B: Tensor | None = None

    @property
    def is_ragged(self) -> bool:
        """Whether rows have different lengths."""
        return min(self.lengths) != max(self.lengths)

    def update(self, layer: int, k_BTGD: Tensor, v_BTGD: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values behind the old ones; return all of them, [B, S, G, D] each."""
        num_new = k_BTGD.shape[1]
        stored = self._layers[layer]
        if stored is None:
            shape = (k_BTGD.shape[0], self.capacity, *k_BTGD.shape[2:])
            stored = self._layers[layer] = (k_BTGD.new_zeros(shape), v_BTGD.new_zeros(shape))
        end = max(self.lengths) + num_new
        for cache, new in zip(stored, (k_BTGD, v_BTGD), strict=True):
            if self.is_ragged:
                rows_B1 = torch.arange(len(new), device=new.device).unsqueeze(1)
                cache[rows_B1, self._places(num_new, new.device)] = new
            else:
                cache[:, end - num_new : end] = new
        return stored[0][:, :end], stored[1][:, :end]

    def visible(self, num_new: int, window: int | None, device: torch.device) -> Tensor | None:
        """[B, 1, T, S], True where a row's new token sees a key; None for prompts, whose tokens see those before them,
        and for one new token in rows that are alike, which sees all."""
        if max(self.lengths) == 0 or (num_new == 1 and not self.is_ragged):
            return None
        places_BT1 = self._places(num_new, device).unsqueeze(2)
        keys_S = torch.arange(max(self.lengths) + num_new, device=device)
        visible_BTS = keys_S <= places_BT1
        if window is not None:
            visible_BTS &= keys_S > places_BT1 - window
        return visible_BTS.unsqueeze(1)

    def advance(self, num_tokens: int | Sequence[int]) -> None:
        """Count tokens as seen, so many of all rows or of each, once every layer has stored them."""
        new = [num_tokens] * len(self.lengths) if isinstance(num_tokens, int) else num_tokens
        self.lengths, self._ends_B = [a + b for a, b in zip(self.lengths, new, strict=True)], None

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order; a row may be there several times."""
        if list(rows) == list(range(len(self.lengths))):
            return
        self.lengths, self._ends_B = [self.lengths[row] for row in rows], None
        for layer, stored in enumerate(self._layers):
            if stored is not None:
                index = torch.tensor(rows, device=stored[0].device)
                self._layers[layer] = (stored[0].index_select(0, index), stored[1].index_select(0, index))
        if self.sources is not None:
            self.sources = [self.sources[row] for row in rows]
        if self.encoded is not None:
            self.encoded = self.encoded.select(rows)

    def _places(self, num_new: int, device: torch.device) -> Tensor:
        """[B, T]: where each row's next tokens go."""
        if self._ends_B is None:
            self._ends_B = torch.tensor(self.lengths, device=device)
        return self._ends_B.unsqueeze(1) + torch.arange(num_new, device=device)


class Context(NamedTuple):
    """Beside ``positions_BT``, ``document_ids_BT`` and ``sample_ids_B`` (see Batch), what follows from them.

    ``rotary``: cosines and sines of the positions, where the family rotates.
    ``document_starts``: int32, where each document starts in the B*T tokens laid end to end, and B*T; where a window
    is shorter than the sequences, and there are no documents, where each sequence does. None where the device has no
    attention over sequences of unequal length.
    ``cache``: keys and values of earlier tokens; None while training.
    ``segments_BT``: int64, which segment of its document a token is in (BERT's token types); None: all in the first.
    ``bias``: what a family with relative positions adds to the scores of self-attention, minus infinity where a token
    is not seen. ``encoded``: what a decoder attends to beside its own tokens.
    """

    positions_BT: Tensor
    document_ids_BT: Tensor | None = None
    sample_ids_B: Tensor | None = None
    rotary: Rotary | None = None
    document_starts: Tensor | None = None
    cache: KeyValueCache | None = None
    segments_BT: Tensor | None = None
    bias_BHTS: Tensor | None = None
    encoded: EncoderOutput | None = None


class ContextBuilder:
    """Makes the Context of a forward from the tensors that a pipeline hands on between its stages."""

    def __init__(self, config: ModelConfig) -> None:
        self._rotary_embedding = RotaryEmbedding(config) if config.description.block.attention.rotates else None
        self._window = config.attention_window
        self.kernel = "auto"

    def __call__(
        self,
        positions_BT: Tensor,
        document_ids_BT: Tensor | None,
        sample_ids_B: Tensor | None,
        dtype: torch.dtype,
        cache: KeyValueCache | None = None,
        borders: Tensor | None = None,
    ) -> Context:
        """The context of a forward in ``dtype``. ``borders``: the batch's document_starts, for which the device would
        have to be waited for else."""
        rotary = self._rotary_embedding(positions_BT, dtype) if self._rotary_embedding else None
        starts = None
        if takes_borders(self.kernel, positions_BT.device, dtype):
            num_tokens = positions_BT.shape[1]
            if document_ids_BT is not None:
                starts = document_starts(document_ids_BT) if borders is None else borders
            elif self._window is not None and self._window < num_tokens:
                starts = torch.arange(
                    0, positions_BT.numel() + 1, num_tokens, dtype=torch.int32, device=positions_BT.device
                )
        return Context(positions_BT, document_ids_BT, sample_ids_B, rotary, starts, cache)


def takes_borders(kernel: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a kernel of ``model.attention`` is told where documents begin, rather than given a mask."""
    return kernel in TAKE_BORDERS or (kernel == "auto" and has_variable_length_attention(device, dtype))


def has_variable_length_attention(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether attention over documents needs no dense mask: flash attention, so CUDA and half precision; torch 2.11."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or TORCH_VERSION < "2.11":
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
