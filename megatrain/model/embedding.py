"""The layers before the blocks: tokens, and where a family has them positions and segments, or images, to activations.

B: sequences, T: tokens, C: channels, P: positions.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatrain.families.description import PatchEmbedding, Width
from megatrain.model.block import attach
from megatrain.model.context import Context
from megatrain.model.dropout import Dropout
from megatrain.model.norm import LayerNorm


class TokenEmbedding(nn.Module):
    """A vector for each token id, times ``scale``."""

    def __init__(self, vocab_size: int, size: int, dropout: Dropout | None, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, size))
        self.dropout = dropout
        self.scale = scale

    def forward(self, tokens_BT: Tensor, context: Context) -> Tensor:
        """Look the tokens up."""
        x_BTC = functional.embedding(tokens_BT, self.weight)
        x_BTC = x_BTC if self.scale == 1.0 else x_BTC * self.scale
        return x_BTC if self.dropout is None else self.dropout(x_BTC, context.sample_ids_B)


class PositionEmbedding(nn.Module):
    """A vector for each position, added to the tokens'."""

    def __init__(self, num_positions: int, size: int, dropout: Dropout | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_positions, size))
        self.dropout = dropout

    def forward(self, x_BTC: Tensor, context: Context) -> Tensor:
        """Add the positions' vectors."""
        y_BTC = x_BTC + functional.embedding(context.positions_BT, self.weight)
        return y_BTC if self.dropout is None else self.dropout(y_BTC, context.sample_ids_B)


class SinusoidalEmbedding(nn.Module):
    """Sines and cosines of each position, added to the tokens' vectors."""

    def __init__(self, num_positions: int, size: int, dropout: Dropout | None) -> None:
        super().__init__()
        self.num_positions, self.size = num_positions, size
        self.dropout = dropout

    def forward(self, x_BTC: Tensor, context: Context) -> Tensor:
        """Add the positions' vectors."""
        table_PC = sinusoids(self.num_positions, self.size, x_BTC.device)
        y_BTC = x_BTC + functional.embedding(context.positions_BT, table_PC).to(x_BTC.dtype)
        return y_BTC if self.dropout is None else self.dropout(y_BTC, context.sample_ids_B)


@functools.lru_cache(maxsize=8)
def sinusoids(num_positions: int, size: int, device: torch.device) -> Tensor:
    """[P, C] in fp32: sines of p / 10000^(2i / C) for each i < C / 2, then their cosines. Vaswani et al. 2017, section
    3.5, but not interleaved, as transformers has them."""
    with torch.inference_mode(mode=False):  # training reads it too
        places_P1 = torch.arange(num_positions, dtype=torch.float64, device="cpu").unsqueeze(1)
        exponents_C = torch.arange(0, size, 2, dtype=torch.float64, device="cpu") / size
        angles_PC = places_P1 / 10000.0**exponents_C
        return torch.cat([angles_PC.sin(), angles_PC.cos()[:, : size // 2]], dim=1).float().to(device)


class SegmentEmbedding(nn.Module):
    """A vector for each segment of a document, added to those before."""

    def __init__(self, num_segments: int, size: int, dropout: Dropout | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_segments, size))
        self.dropout = dropout

    def forward(self, x_BTC: Tensor, context: Context) -> Tensor:
        """Add the segments' vectors; documents of one segment have the first one's."""
        segments_BT = context.segments_BT
        if segments_BT is None:
            segments_BT = torch.zeros_like(context.positions_BT)
        y_BTC = x_BTC + functional.embedding(segments_BT, self.weight)
        return y_BTC if self.dropout is None else self.dropout(y_BTC, context.sample_ids_B)


class ImageEmbedding(nn.Module):
    """A vector for each patch of an image, and for the class token before them, with those of the places added."""

    def __init__(self, spec: PatchEmbedding, sizes: Mapping[Width, int], dropout: Dropout) -> None:
        super().__init__()
        self._spec = spec
        side, width = sizes["patch"], sizes["hidden"]
        self.register_parameter(spec.class_token, nn.Parameter(torch.empty(1, 1, width)))
        self.register_parameter(spec.positions, nn.Parameter(torch.empty(1, sizes["places"], width)))
        attach(self, spec.projection, nn.Conv2d(sizes["channels"], width, side, stride=side))
        self.dropout = dropout

    def forward(self, pixels_BCHW: Tensor, context: Context) -> Tensor:
        """[B, T, C], the class token first."""
        class_token, positions = getattr(self, self._spec.class_token), getattr(self, self._spec.positions)
        patches_BCT = self.get_submodule(self._spec.projection)(pixels_BCHW.to(positions.dtype)).flatten(2)
        x_BTC = torch.cat([class_token.expand(len(pixels_BCHW), -1, -1), patches_BCT.transpose(1, 2)], dim=1)
        return self.dropout(x_BTC + positions, context.sample_ids_B)  # type: ignore[no-any-return]


class EmbeddingNorm(LayerNorm):
    """Normalises the sum of the embeddings, before their dropout."""

    def __init__(self, size: int, eps: float, dropout: Dropout) -> None:
        super().__init__(size, eps)
        self.dropout = dropout

    def forward(self, x_BTC: Tensor, context: Context | None = None) -> Tensor:
        """Normalise each token."""
        assert context is not None
        return self.dropout(super().forward(x_BTC), context.sample_ids_B)  # type: ignore[no-any-return]
