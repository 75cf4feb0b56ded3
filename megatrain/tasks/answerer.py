"""A checkpoint that answers: its model, its tokenizer and its special tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatrain.checkpoint.location import Location
from megatrain.checkpoint.manifest import TOKENIZER
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.checkpoint.stores import resolve
from megatrain.data.tokenizer import Tokenizer
from megatrain.distributed.bootstrap import RankInfo
from megatrain.distributed.groups import Groups
from megatrain.errors import CheckpointError
from megatrain.model.decoder import Decoder
from megatrain.model.generate import Sampling
from megatrain.train.assets import Assets
from megatrain.train.inference import stream_text
from megatrain.train.loading import load_on_rank


class Answerer(NamedTuple):
    """A model with what turns texts into its token ids; on tensor ranks, their agreement on a token."""

    model: Decoder
    tokenizer: Tokenizer
    assets: Assets
    agree: Callable[[int], int] | None = None


def open_answerer(path: Location, rank: RankInfo | None = None, tensor: int = 1) -> tuple[Answerer, Groups | None]:
    """The model of a checkpoint on this rank; see `load_on_rank`."""
    reader = CheckpointReader(resolve(path))
    tokenizer = Tokenizer(reader.read_file(TOKENIZER), reader.folder / TOKENIZER, CheckpointError)
    model, groups = load_on_rank(reader, rank, tensor)
    agree = None if groups is None or tensor == 1 else _agreement(groups)
    return Answerer(model, tokenizer, Assets.of_checkpoint(reader), agree), groups


def greedy_text(answerer: Answerer, prompt: str, stops: Sequence[str], max_new_tokens: int) -> str:
    """The likeliest text after a prompt, up to and without the first of ``stops``."""
    text = ""
    for piece in stream_text(
        answerer.model,
        answerer.tokenizer,
        answerer.assets,
        answerer.tokenizer.encode(prompt),
        max_new_tokens=max_new_tokens,
        sampling=Sampling(),
        seed=0,
        warn=lambda text: None,
        agree=answerer.agree,
    ):
        text += piece
        ends = [at for stop in stops if (at := text.find(stop)) >= 0]
        if ends:
            return text[: min(ends)]
    return text


def _agreement(groups: Groups) -> Callable[[int], int]:
    """The choice of the first of the tensor ranks, on all of them."""
    source = dist.get_global_rank(groups.tensor, 0)

    def agree(token: int) -> int:
        chosen = torch.tensor(token, device=groups.device)
        dist.broadcast(chosen, source, group=groups.tensor)
        return int(chosen)

    return agree
