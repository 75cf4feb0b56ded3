"""megatrain from Python: a model to use, and a run to read. `import megatrain` has these names, and imports no torch.

B: sequences, T: tokens, V: vocabulary.
"""

from __future__ import annotations

import contextlib
import operator
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatrain.checkpoint import huggingface
from megatrain.checkpoint.location import locate
from megatrain.checkpoint.lock import folders_of, locked
from megatrain.checkpoint.manifest import TOKENIZER
from megatrain.checkpoint.origin import load as load_config
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.checkpoint.store import CheckpointFolder, is_checkpoint
from megatrain.checkpoint.stores import find_store, resolve, resolve_best
from megatrain.config import ModelConfig, RunConfig, recipes
from megatrain.data.tokenizer import Tokenizer
from megatrain.distributed.bootstrap import job_identity, rank_exported, read_rank
from megatrain.distributed.signals import Requests, handlers_restored
from megatrain.errors import CheckpointError, ConfigError, DataError, Preempted
from megatrain.inference.assets import CARRIED, Assets
from megatrain.inference.loading import empty_decoder, load_decoder
from megatrain.inference.writer import TextSettings, Writer, encode_prompt
from megatrain.model.beams import BeamSearch, beam_search
from megatrain.model.encoder_decoder import EncoderDecoder, WholeModel
from megatrain.model.generate import Limits, Sampling, generate, require_generative
from megatrain.model.init import init_model
from megatrain.observe.callbacks import Callback
from megatrain.observe.goodput import Goodput
from megatrain.observe.logs import setup_logging
from megatrain.observe.record import CONFIG_FILE, RunRecord, read_run
from megatrain.plan import rules
from megatrain.train.config_record import refuse_record_of_another_run

__all__ = ["Callback", "Model", "Run", "load", "open_run", "train"]

Prompt = TypeVar("Prompt", str, list[str], list[int])
TokenIds = Sequence[int] | Sequence[Sequence[int]] | NDArray[np.integer[Any]] | Tensor


@dataclass(frozen=True)
class Model:
    """A model to use, whole on one device, in evaluation mode.

    ``module``: a torch module with Hugging Face's parameter names. ``tokenizer``: None where the model came without.
    """

    config: ModelConfig
    module: WholeModel
    tokenizer: Tokenizer | None
    _assets: Assets = field(default_factory=Assets, repr=False)

    def logits(self, ids: TokenIds) -> Tensor:
        """Logits [T, V] of token ids [T], or [B, T, V] of [B, T]: fp32, on the model's device. Of a classifier those of
        labels, [V] or [B, V]; one of images takes their normalised pixels [B, C, H, W].

        Raises ConfigError for ids out of range, for more tokens than the model has positions, and for other shapes.
        """
        if isinstance(self.module, EncoderDecoder):
            raise ConfigError(f"A {self.config.family} reads a source and a target: call its module, not logits.")
        if self.config.description.reads_images:
            return self._image_logits(ids)
        try:  # a copy: what is read from a dataset is read-only
            tokens = torch.as_tensor(ids if isinstance(ids, Tensor) else np.array(ids), device=self.module.device)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ConfigError(f"ids are not token ids: {error}") from None
        if tokens.dtype.is_floating_point or tokens.dtype == torch.bool or tokens.dim() not in (1, 2):
            raise ConfigError(f"ids are {tokens.dtype} {list(tokens.shape)}: give integers, [T] or [B, T].")
        tokens_BT = tokens.long() if tokens.dim() == 2 else tokens.long()[None]
        num_ids, longest = self.config.known_vocab_size, self.config.max_position_embeddings
        if tokens_BT.numel() == 0 or tokens_BT.min() < 0 or tokens_BT.max() >= num_ids:
            raise ConfigError(f"ids must be from 0 to {num_ids - 1}, and at least one.")
        if tokens_BT.shape[1] > longest:
            raise ConfigError(
                f"ids are {tokens_BT.shape[1]} tokens: the model has {longest} positions "
                "(model.max_position_embeddings)."
            )
        positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
        with torch.inference_mode():
            context = self.module.make_context(positions_BT, None, None, self.module.dtype)
            logits_BTV = self.module.logits(tokens_BT, context).float()
        logits = logits_BTV[:, 0] if self.config.description.classifies else logits_BTV
        return logits if tokens.dim() == 2 else logits[0]

    def _image_logits(self, images: Any) -> Tensor:
        assert not isinstance(self.module, EncoderDecoder), "which reads no images"
        device, model = self.module.device, self.config
        pixels_BCHW = torch.as_tensor(images if isinstance(images, Tensor) else np.array(images), device=device)
        size = getattr(model, "image_size")  # noqa: B009 (a family's own key)
        shape = [model.sizes["channels"], size, size]
        if not pixels_BCHW.dtype.is_floating_point or list(pixels_BCHW.shape[1:]) != shape:
            given = f"{pixels_BCHW.dtype} {list(pixels_BCHW.shape)}"
            raise ConfigError(f"images are {given}: give floating-point numbers, [B, {', '.join(map(str, shape))}].")
        places_BT = torch.arange(model.num_places or 0, device=device).expand(len(pixels_BCHW), -1)
        with torch.inference_mode():
            context = self.module.make_context(places_BT, None, None, self.module.dtype)
            logits_BTV: Tensor = self.module.logits(pixels_BCHW, context)
        return logits_BTV[:, 0].float()

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int = 50,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        early_stopping: bool | Literal["never"] = False,
        stop: str | Sequence[str] = (),
        seed: int = 0,
    ) -> Prompt:
        """What the model goes on with: a text after a text, token ids after token ids, a list of texts after several.

        At temperature 0 each token is the likeliest; ``num_beams`` above 1 searches for the likeliest text instead
        (`BeamSearch`). A text ends with the model's end of a document, before the text ``stop`` or the first of
        several, or where the context is full. A prompt of several gets what it would get by itself. Characters that the
        tokenizer does not know give a UserWarning. Raises ConfigError.
        """
        require_generative(self.config)
        sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
        beams = BeamSearch(num_beams, length_penalty, early_stopping) if num_beams > 1 else None
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in stops:
            raise ConfigError("stop is an empty text, which ends nothing: give a text, or leave it out.")
        settings = TextSettings(max_new_tokens, sampling, seed, stops, beams)
        generated: Any  # mypy checks the body once for each type of a prompt
        if isinstance(prompt, str):
            writer, tokenizer = self._writer()
            ids = writer.begin(encode_prompt(tokenizer, prompt, _warn))
            generated = "".join(writer.stream(ids, settings, _warn))
        elif len(prompt) and isinstance(prompt[0], str):
            writer, tokenizer = self._writer()
            begun = [writer.begin(encode_prompt(tokenizer, str(each), _warn)) for each in prompt]
            found = writer.write(begun, settings)
            generated = [text.text for text in found]
        else:
            if stops:
                raise ConfigError("stop ends texts, and the prompt is token ids: give a text, or leave it out.")
            tokens: Any = prompt
            try:
                ids = [operator.index(token) for token in tokens]
            except TypeError as error:
                raise ConfigError(f"The prompt is neither a text nor token ids: {error}.") from None
            generated = self._ids_after(ids, settings)
        result: Prompt = generated
        return result

    def _ids_after(self, ids: list[int], settings: TextSettings) -> list[int]:
        if isinstance(self.module, EncoderDecoder):
            raise ConfigError(f"A {self.config.family} reads a source: give the prompt as text.")
        limits = Limits(settings.max_new_tokens, self._assets.stop_ids)
        if settings.beams is None:
            return list(generate(self.module, ids, limits, settings.sampling, settings.seed))
        penalty = settings.sampling.repetition_penalty
        ((best, *_),) = beam_search(self.module, [ids], limits, settings.beams, penalty)
        return list(best.tokens)

    def _writer(self) -> tuple[Writer, Tokenizer]:
        if self.tokenizer is None:
            raise ConfigError("The model came without a tokenizer: give the prompt as token ids.")
        return Writer(self.module, self.tokenizer, self._assets), self.tokenizer


def load(path: str | Path, dtype: torch.dtype | None = None, *, best: bool = False, ema: bool = False) -> Model:
    """The model in a checkpoint or a run folder (its newest good checkpoint), here or at an address; in a Hugging Face
    folder; or of a config or a recipe's name: then with its initial weights.

    ``dtype``: None takes bf16 on a GPU and fp32 on a CPU. ``best``: of a run, the checkpoint with the lowest
    validation loss. ``ema``: with the averaged weights of a run that keeps them (`optimizer.ema_decay`). Raises
    CheckpointError where there is no model or it is damaged, ConfigError for a config that is wrong or whose vocabulary
    is not known.
    """
    place = locate(path)
    if isinstance(place, Path) and not (best or ema):
        config = recipes.find(path).expanduser()
        if config.suffix in (".yaml", ".yml") and config.is_file() and not place.is_dir():
            return _initial(load_config(config), dtype)
        if (place / huggingface.CONFIG).is_file() and not is_checkpoint(place):
            return _from_huggingface(place, dtype)
    reader = CheckpointReader((resolve_best if best else resolve)(place), ema=ema)
    assets = Assets.of_checkpoint(reader)
    return Model(reader.saved.model, load_decoder(reader, dtype), _tokenizer(assets, reader.folder), assets)


@dataclass(frozen=True)
class Run:
    """A run folder, read. What is read is kept: open the run again to see what it has done since."""

    dir: Path

    @cached_property
    def config(self) -> RunConfig:
        """What it trained with last. Raises ConfigError where the folder has none that can be read."""
        return load_config(self.dir / CONFIG_FILE)

    @cached_property
    def _record(self) -> RunRecord:
        return read_run(self.dir)

    @cached_property
    def metrics(self) -> pa.Table:
        """A row a logged step, columns as in metrics.jsonl (parts of a step as ``parts.NAME``, in seconds); null where
        a figure was not finite or not known. ``.to_pandas()`` makes a DataFrame where pandas is there."""
        parts = {f"parts.{name}": column for name, column in self._record.parts.items()}
        return _table({**self._record.columns, **parts})

    @cached_property
    def validations(self) -> pa.Table:
        """A row a validation: step, validation_loss."""
        return _table({"step": self._record.validation_steps, "validation_loss": self._record.validation_losses})

    @property
    def events(self) -> Sequence[Mapping[str, Any]]:
        """Starts, resumes, saves and whatever else happened, in order, as in metrics.jsonl."""
        return self._record.events

    @property
    def goodput(self) -> Goodput | None:
        """Where all time since the first start went, in seconds; None where nothing was logged of it yet."""
        return self._record.goodput

    @cached_property
    def checkpoints(self) -> Sequence[CheckpointFolder]:
        """Oldest first: step, path, whether they look whole, and their manifests."""
        return find_store(self.dir).list()


def open_run(path: str | Path) -> Run:
    """The run in a folder, finished or not. Raises DataError where the folder is not a run's."""
    folder = Path(path).expanduser()
    if not (folder / CONFIG_FILE).is_file():
        raise DataError(f"{folder} is not a run folder (it has no {CONFIG_FILE}): give run.dir of a run's config.")
    return Run(folder)


def train(config: str | Path, overrides: Sequence[str] = (), callbacks: Sequence[Callback] = ()) -> Run:
    """Train a config's (or a recipe's) run in this process, as one rank, to its end or where a callback stops it.

    ``overrides``: KEY=VALUE, as on the command line. Again, it goes on from the newest good checkpoint. Ctrl-C and
    SIGTERM end the run with its state saved, as for the command. Several ranks are for the command: `megatrain train`.
    Raises what the command would print: ConfigError, DataError, CheckpointError, Diverged.
    """
    began = time.time()
    from megatrain.parallel.deepspeed import forget_globals  # DeepSpeed, which takes seconds to import
    from megatrain.train import preview, start
    from megatrain.train.start_clock import StartClock

    path, rank = recipes.find(config).expanduser(), read_rank()
    if rank.world_size > 1:
        raise ConfigError("megatrain.train is one rank: several are started with the command, `megatrain train`.")
    if wrong := [each for each in callbacks if not isinstance(each, Callback)]:
        raise ConfigError(f"callbacks: {wrong[0]} is no object of a class that extends megatrain.Callback.")
    loaded = load_config(config, overrides)
    rules.check(loaded, 1)
    preview.check_trackers(loaded, must_exist=True)
    preview.check_tasks(loaded, must_exist=True)
    refuse_record_of_another_run(path, loaded, list(overrides))
    run_dir = Path(loaded.run.dir)
    with contextlib.ExitStack() as held:
        lease, *_ = [
            held.enter_context(locked(folder, job_identity())) for folder in folders_of(run_dir, loaded.checkpoint.dir)
        ]
        held.enter_context(handlers_restored())
        held.callback(forget_globals)
        held.enter_context(rank_exported(rank))
        setup_logging(run_dir, 0, console=True)
        with contextlib.suppress(Preempted):
            start.train(loaded, rank, Requests(), lease, StartClock(began), overrides=overrides, callbacks=callbacks)
    return open_run(run_dir)


def _table(columns: Mapping[str, NDArray[np.float64]]) -> pa.Table:
    counts = {"step", "tokens", "skipped", "memory_bytes"}
    return pa.table(
        {
            name: pa.array(column, pa.float64(), from_pandas=True).cast(pa.int64() if name in counts else pa.float64())
            for name, column in columns.items()
        }
    )


def _initial(config: RunConfig, dtype: torch.dtype | None) -> Model:
    if config.model.vocab_size is None:
        raise ConfigError("model.vocab_size is taken from the dataset when the run starts: give it to load the model.")
    module = empty_decoder(config.model, dtype)
    init_model(module, config.model, config.run.seed)
    return Model(config.model, module, None)


def _from_huggingface(folder: Path, dtype: torch.dtype | None) -> Model:
    config, _ = huggingface.read_config(folder)
    module = empty_decoder(config, dtype)
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for tensors in huggingface.HuggingFaceWeights(folder, config).batches():
            for name, tensor in tensors.items():
                parameters[name].copy_(tensor)
    assets = Assets.of_folder(huggingface.read_files(folder, CARRIED))
    return Model(config, module, _tokenizer(assets, folder), assets)


def _tokenizer(assets: Assets, folder: object) -> Tokenizer | None:
    data = assets.files.get(TOKENIZER)
    return None if data is None else Tokenizer(data, f"{folder}/{TOKENIZER}", CheckpointError)


def _warn(text: str) -> None:
    warnings.warn(text, UserWarning, stacklevel=3)
