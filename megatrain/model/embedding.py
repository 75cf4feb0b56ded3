"""The layers before the first decoder layer: tokens, and where a family learns them positions, to activations.

B: sequences, T: tokens, C: channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatrain.model.context import Context
from megatrain.model.dropout import Dropout


class TokenEmbedding(nn.Module):
    """A vector for each token id."""

    def __init__(self, vocab_size: int, size: int, dropout: Dropout | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, size))
        self.dropout = dropout

    def forward(self, tokens_BT: Tensor, context: Context) -> Tensor:
        """Look the tokens up."""
        x_BTC = functional.embedding(tokens_BT, self.weight)
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
