"""The text that a checkpoint's model generates, on one device or on tensor ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import torch
import torch.distributed as dist
from rich.progress import Progress

from megatrain.checkpoint.location import Location
from megatrain.checkpoint.manifest import TOKENIZER
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.checkpoint.stores import resolve
from megatrain.data.chat import TEMPLATE, Message, refuse_control_tokens
from megatrain.data.json_lines import read_objects
from megatrain.data.tokenizer import Tokenizer
from megatrain.data.unknown_text import UnknownText
from megatrain.distributed.bootstrap import RankInfo
from megatrain.distributed.groups import Groups
from megatrain.errors import CheckpointError, ConfigError, DataError
from megatrain.inference.assets import Assets
from megatrain.inference.loading import load_on_rank
from megatrain.inference.text_stream import TextStream
from megatrain.model.beams import BeamSearch, beam_search
from megatrain.model.generate import (
    Agree,
    LanguageModel,
    Limits,
    Sampling,
    generate_batch,
    require_generative,
)


@dataclass(frozen=True)
class TextSettings:
    """How text is generated. ``stops``: texts that end it, and are left out; ``beams``: in place of ``sampling``."""

    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    stops: Sequence[str] = ()
    beams: BeamSearch | None = None


class Generated(NamedTuple):
    """``reason``: "stop" for the end of a document or a stop string, "length" for ``max_new_tokens``, "context" where
    the model's positions are full. ``score``: of beam search."""

    text: str
    num_tokens: int
    reason: str
    score: float | None = None


class Writer:
    """A model with what turns texts into its token ids; ``agree``: on ranks that share the model."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, assets: Assets, agree: Agree | None = None) -> None:
        self.model, self.tokenizer, self.assets, self._agree = model, tokenizer, assets, agree
        self.template = assets.template
        self.target_tokenizer = assets.target_tokenizer or tokenizer  # of what it writes
        self.has_encoder = model.config.description.encoder is not None

    def begin(self, prompt_ids: Sequence[int]) -> list[int]:
        """With the token before them that begins a document, where the model knows one; as a source, with its end."""
        eod = self.assets.special_tokens.eod if self.has_encoder else None
        return [*self.assets.prompt_ids, *prompt_ids, *([] if eod is None else [eod.id])]

    def _begun(self, given: Sequence[list[int]]) -> tuple[Sequence[list[int]], Sequence[list[int]] | None]:
        """What the decoder goes on from, and what an encoder reads: the prompts, where there is one."""
        if not self.has_encoder:
            return given, None
        return [[self.assets.decoder_start(self.tokenizer)]] * len(given), given

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """A conversation up to where the model's answer begins; the template writes all special tokens itself.

        Raises ConfigError where the model came without a chat template, DataError for a conversation that it refuses.
        """
        return self.tokenizer.encode(self.chat_text(messages))

    def chat_text(self, messages: Sequence[Message]) -> str:
        """See chat_ids."""
        if self.template is None:
            raise ConfigError(
                f"The model came without a chat template ({TEMPLATE}): ask it without --chat, and without chat: true."
            )
        refuse_control_tokens(messages, self.tokenizer.special)
        return self.template.render(messages, add_generation_prompt=True)

    def stream(self, ids: Sequence[int], settings: TextSettings, warn: Callable[[str], None]) -> Iterator[str]:
        """What the model goes on with after token ids, each character as soon as it is whole.

        Raises ConfigError at once. ``warn`` hears in the end of a context that was full before the text had ended.
        """
        if settings.beams is not None:
            (found,) = self.write([ids], settings)
            return iter((found.text,))
        prompts, sources = self._begun([list(ids)])
        limits = self._limits(settings, prompts[0])
        step = (self.model, prompts, limits, settings.sampling, settings.seed, self._agree)
        tokens = (token for (token,) in generate_batch(*step, sources=sources) if token is not None)
        return self._streamed(prompts[0], tokens, limits, settings, warn)

    def _streamed(
        self,
        ids: Sequence[int],
        tokens: Iterator[int],
        limits: Limits,
        settings: TextSettings,
        warn: Callable[[str], None],
    ) -> Iterator[str]:
        text, num_new = self._text_after(ids, settings), 0
        for token in tokens:
            num_new += 1
            yield text.add(token)
            if text.has_stopped:
                return
        yield text.end()
        if num_new == limits.max_new_tokens < settings.max_new_tokens:
            warn(
                f"The text stops here because the model's context is full: {len(ids)} tokens of prompt and {num_new} "
                f"new ones are all of its {self.model.config.max_position_embeddings} positions "
                "(model.max_position_embeddings)."
            )

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        settings: TextSettings,
        advance: Callable[[int], None] = lambda count: None,
    ) -> list[Generated]:
        """What the model goes on with after token ids, in batches of about the same length.

        ``advance``: called with how many are done since the last call. Raises ConfigError for a prompt that is too
        long, as `generate_batch` does.
        """
        whole = [list(prompt) for prompt in prompts]
        rows = settings.beams.num_beams if settings.beams else 1
        lengths = [(len(ids) + settings.max_new_tokens) * rows for ids in whole]
        found: list[Generated | None] = [None] * len(prompts)
        for numbers in batches_by_length(lengths, 2 * self.model.tokens_at_once):
            batch = [whole[number] for number in numbers]
            texts = self._searched(batch, settings) if settings.beams else self._sampled(batch, settings)
            for number, text in zip(numbers, texts, strict=True):
                found[number] = text
            advance(len(numbers))
        return [text for text in found if text is not None]

    def _sampled(self, given: Sequence[list[int]], settings: TextSettings) -> list[Generated]:
        prompts, sources = self._begun(given)
        rooms = [self._limits(settings, ids).max_new_tokens for ids in prompts]
        streams = [self._text_after(ids, settings) for ids in prompts]
        texts, counts, ended = [""] * len(prompts), [0] * len(prompts), set[int]()
        limits = self._limits(settings, max(prompts, key=len))._replace(max_new_tokens=max(rooms))
        chosen = settings.sampling, settings.seed, self._agree
        for step in generate_batch(self.model, prompts, limits, *chosen, ended, sources):
            for row, token in enumerate(step):
                if token is not None:
                    counts[row] += 1
                    texts[row] += streams[row].add(token)
                    if streams[row].has_stopped or counts[row] == rooms[row]:
                        ended.add(row)
        return [
            self._generated(text if stream.has_stopped else text + stream.end(), stream, count, room, settings)
            for text, stream, count, room in zip(texts, streams, counts, rooms, strict=True)
        ]

    def _searched(self, given: Sequence[list[int]], settings: TextSettings) -> list[Generated]:
        assert settings.beams is not None
        prompts, sources = self._begun(given)
        rooms = [self._limits(settings, ids).max_new_tokens for ids in prompts]
        found = []
        for room in sorted(set(rooms)):  # all of a search have the same room: it decides on lengths
            rows = [row for row, own in enumerate(rooms) if own == room]
            limits = self._limits(settings, prompts[rows[0]])
            penalty = settings.sampling.repetition_penalty
            batch = [prompts[row] for row in rows]
            read = None if sources is None else [sources[row] for row in rows]
            searched = beam_search(self.model, batch, limits, settings.beams, penalty, self._agree, read)
            for row, (best, *_) in zip(rows, searched, strict=True):
                stream = self._text_after(prompts[row], settings)
                text = ""
                for token in best.tokens:
                    text += "" if stream.has_stopped else stream.add(token)
                text += "" if stream.has_stopped else stream.end()
                shown = self._generated(text, stream, len(best.tokens), room, settings)
                found.append((row, shown._replace(score=best.score)))
        return [shown for _, shown in sorted(found)]

    def _text_after(self, ids: Sequence[int], settings: TextSettings) -> TextStream:
        """What is written after these ids; beside an encoder nothing comes before it but the decoder's start."""
        return TextStream(self.target_tokenizer, [] if self.has_encoder else ids, settings.stops)

    def _generated(self, text: str, stream: TextStream, count: int, room: int, settings: TextSettings) -> Generated:
        if stream.has_stopped or count < room:
            return Generated(text, count, "stop")
        return Generated(text, count, "length" if room == settings.max_new_tokens else "context")

    def _limits(self, settings: TextSettings, ids: Sequence[int]) -> Limits:
        """As many new tokens as there is room for; a prompt without room is refused later."""
        room = self.model.config.max_position_embeddings - len(ids)
        most, stop_ids = settings.max_new_tokens, self.assets.stop_ids
        never = [self.assets.decoder_start(self.tokenizer)] if self.model.config.description.never_writes_start else []
        suppress_ids = [token for token in never if token not in stop_ids]
        return Limits(min(most, room) if room > 0 else most, stop_ids, self.target_tokenizer.vocab_size, suppress_ids)


def batches_by_length(lengths: Sequence[int], tokens_at_once: int) -> Iterator[list[int]]:
    """Indices of ``lengths`` in batches, longest first: the first batch is the largest that will be."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    while order:
        size = max(1, tokens_at_once // max(lengths[order[0]], 1))
        yield order[:size]
        order = order[size:]


def open_writer(
    path: Location, rank: RankInfo | None = None, tensor: int = 1, *, ema: bool = False
) -> tuple[Writer, Groups | None]:
    """The model of a checkpoint on this rank; see `load_on_rank`. ``ema``: with its averaged weights."""
    reader = CheckpointReader(resolve(path), ema=ema)
    require_generative(reader.saved.model)
    tokenizer = Tokenizer(reader.read_file(TOKENIZER), reader.folder / TOKENIZER, CheckpointError)
    model, groups = load_on_rank(reader, rank, tensor)
    agree = None if groups is None or tensor == 1 else agreement(groups)
    return Writer(model, tokenizer, Assets.of_checkpoint(reader), agree), groups


def generate_text(
    path: Location,
    prompt: str,
    settings: TextSettings,
    *,
    warn: Callable[[str], None],
    rank: RankInfo | None = None,
    ema: bool = False,
) -> Iterator[str]:
    """Yield the prompt (not where an encoder reads it), then what the model writes, piece by piece as it can be shown.

    Raises ConfigError for a prompt with bytes that are no text. ``warn`` hears of characters that have no tokens, and
    in the end of a context that was full before the text had come to its end. Collective over the ranks that ``rank``
    is one of, which share each of the model's matrices and all yield the same. ``ema``: with the averaged weights.
    """
    writer, groups = open_writer(path, rank, 1 if rank is None else rank.world_size, ema=ema)
    texts = writer.stream(writer.begin(encode_prompt(writer.tokenizer, prompt, warn)), settings, warn)
    yield "" if writer.has_encoder else prompt
    yield from texts
    if groups is not None:
        dist.destroy_process_group()


def chat(
    path: Location,
    turns: Iterable[str],
    settings: TextSettings,
    *,
    system: str | None = None,
    warn: Callable[[str], None],
    rank: RankInfo | None = None,
    ema: bool = False,
) -> Iterator[Iterator[str]]:
    """Yield the answer to each of a user's ``turns``, piece by piece; the next turn is asked for once it is read.

    A turn that the template refuses is left out, and ``warn`` hears why. Collective, as `generate_text`.
    """
    writer, groups = open_writer(path, rank, 1 if rank is None else rank.world_size, ema=ema)
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    for turn in turns:
        asked = [*messages, {"role": "user", "content": turn}]
        try:
            ids = writer.chat_ids(asked)
        except DataError as error:
            warn(str(error))
            continue
        pieces: list[str] = []
        yield _collected(writer.stream(ids, settings, warn), pieces)
        messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]
    if groups is not None:
        dist.destroy_process_group()


def _collected(texts: Iterator[str], into: list[str]) -> Iterator[str]:
    for text in texts:
        into.append(text)
        yield text


def generate_file(
    path: Location,
    prompts: Path,
    settings: TextSettings,
    *,
    warn: Callable[[str], None],
    rank: RankInfo | None = None,
    ema: bool = False,
    show_progress: bool = False,
) -> bytes:
    """JSON lines: each prompt of a file with what the model goes on with. Collective, as `generate_text`.

    The file has a prompt a line, or where its name ends in .jsonl an object with "prompt" a line, whose other keys go
    along.
    """
    rows = _read_prompts(prompts)
    writer, groups = open_writer(path, rank, 1 if rank is None else rank.world_size, ema=ema)
    ids = [writer.begin(encode_prompt(writer.tokenizer, row["prompt"], warn)) for row in rows]
    with Progress(disable=not show_progress, transient=True) as progress:
        bar = progress.add_task("generating", total=len(rows))
        found = writer.write(ids, settings, lambda count: progress.advance(bar, count))
    if groups is not None:
        dist.destroy_process_group()
    lines = []
    for row, text in zip(rows, found, strict=True):
        shown = {key: value for key, value in text._asdict().items() if value is not None}
        lines.append(orjson.dumps({**row, **shown}, option=orjson.OPT_APPEND_NEWLINE))
    return b"".join(lines)


def _read_prompts(path: Path) -> list[dict[str, Any]]:
    rows = _prompt_objects(path) if path.suffix == ".jsonl" else _prompt_lines(path)
    if not rows:
        raise DataError(f"{path} has no prompts: give one a line.")
    return rows


def _prompt_lines(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines would cut within a text, at U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The prompts {path} cannot be read: {error}") from None
    return [{"prompt": line} for line in lines if line]


def _prompt_objects(path: Path) -> list[dict[str, Any]]:
    rows = read_objects(path)
    for number, row in rows:
        if not isinstance(row.get("prompt"), str):
            raise DataError(f'{path}, line {number}: not an object with a text under "prompt".')
    return [row for _, row in rows]


def encode_prompt(tokenizer: Tokenizer, prompt: str, warn: Callable[[str], None]) -> list[int]:
    """A prompt's token ids. Raises ConfigError where it has bytes that are not text."""
    if any("\ud800" <= character <= "\udfff" for character in prompt):  # how Python hands on bytes that are none
        raise ConfigError("The prompt (--prompt) has bytes that are not UTF-8: give it as text.")
    ids = tokenizer.encode(prompt)
    unknown = UnknownText(tokenizer).count([prompt], np.array(ids), np.array([0, len(ids)]), ["the prompt"])
    if unknown.characters:
        warn(f"The checkpoint's tokenizer has no tokens for {unknown}.")
    return ids


def agreement(groups: Groups) -> Agree:
    """The choices of the first of the ranks that share a model, on all of them."""
    source = dist.get_global_rank(groups.model_parallel_group, 0)

    def agree(choices: list[int]) -> list[int]:
        chosen = torch.tensor(choices, device=groups.device)
        dist.broadcast(chosen, source, group=groups.model_parallel_group)
        agreed: list[int] = chosen.tolist()
        return agreed

    return agree
