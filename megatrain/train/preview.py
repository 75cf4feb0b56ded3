"""What can be said of a run before it starts, without torch: whether its data and the checkpoint it begins from fit.

What reads them is imported where they are here: a config is checked without it.
"""

from __future__ import annotations

import json
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from megatrain.config import RunConfig
from megatrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    from megatrain.data.epochs import Length
    from megatrain.data.images import AnyDataset

PROFILE_FILE = "profile.json"


def check_data(name: str, config: RunConfig, must_exist: bool = False) -> list[str]:
    """Refuse datasets that are missing or broken (if they must exist), not alike, or that the model or its objective
    cannot read, as far as they are here; what there is to say of them. ``name``: the config's, or a recipe's."""
    every = [*(entry.path for entry in config.data.train), *(entry.path for entry in config.data.validation)]
    missing = [path for path in dict.fromkeys(every) if "://" not in path and not Path(path).exists()]
    notes = []
    if missing and not must_exist:
        text = f"{', '.join(missing)}: not on this machine, so whether the data fits is not known."
        notes.append(f"{text}{_elsewhere(missing[0], name)}")
    paths = [path for path in every if must_exist or Path(path).is_dir()]
    if not paths:
        return notes
    from megatrain.data import Dataset
    from megatrain.data.conversations import advice
    from megatrain.data.images import require_alike
    from megatrain.data.vocabulary import resolve_vocabulary, unused_vocabulary
    from megatrain.objectives import make_objective

    datasets = []
    for path in paths:
        try:
            datasets.append(_opened(path, config))
        except DataError as error:  # which a start says; a config can be right without its data
            if must_exist or _is_dataset(path):
                raise DataError(f"{error}{_elsewhere(path, name)}") from None
            return [*notes, str(error)]
    require_alike(datasets)
    resolve_vocabulary(config, datasets[0])
    objective = make_objective(config.objective, config.model, config.data, config.run.seed)
    for dataset in datasets:
        objective.refuse_unsuited(dataset)
    texts = [dataset for dataset in datasets if isinstance(dataset, Dataset)]
    found = [unused_vocabulary(config, texts[0]) if texts else None, *(advice(each, config.data) for each in texts)]
    talks = [dataset for dataset in texts if dataset.chat_template is not None]
    for other in talks[1:]:
        if (other.chat_template, other.chat_date) != (talks[0].chat_template, talks[0].chat_date):
            found.append(
                f"{other.path} was written by another chat template than {talks[0].path}, or on another day: the run's "
                f"checkpoints have that of {talks[0].path}."
            )
    return [*notes, *(note for note in found if note is not None)]


def _opened(path: str, config: RunConfig) -> AnyDataset:
    """A dataset for the model; the files of one at an address come through the run's own cache."""
    from megatrain.data.images import open_for
    from megatrain.data.remote import Cache

    cache = Cache(Path(config.data.cache_dir).expanduser(), config.data.cache_bytes)
    return open_for(path, images=config.model.description.reads_images, cache=cache)


def _is_dataset(path: str) -> bool:
    """Whether it is a whole dataset, of whatever kind."""
    from megatrain.data.images import open_either

    with suppress(DataError):
        return bool(open_either(path))
    return False


def _elsewhere(path: str, name: str) -> str:
    """Where a relative path that is not found would be, if it were meant from the config's folder."""
    from megatrain.config import recipes

    other = recipes.find(name).resolve().parent / path
    if Path(path).is_absolute() or Path(path).exists() or not other.exists():
        return ""
    return f" {other} is there: relative paths are taken from the working directory, {Path.cwd()}."


def check_origin(config: RunConfig, must_exist: bool = False) -> list[str]:
    """Refuse a checkpoint in run.init_from that is of another model or tokenizer, as far as it and the data are here;
    what there is to say of it."""
    from megatrain.checkpoint.image_processor import PREPROCESSOR, differences, from_transformers
    from megatrain.checkpoint.origin import find_origin

    given = config.run.init_from
    if given is None:
        return []
    if not must_exist and "://" not in given and not Path(given).exists():
        return [f"run.init_from: {given} is not here, so whether it fits is not known."]
    if (origin := find_origin(config)) is None:
        return ["run.init_from: not used any more, the run has checkpoints of its own."]
    from megatrain.data import Dataset
    from megatrain.data.chat import ChatTemplate
    from megatrain.data.format import TEMPLATE_FILES
    from megatrain.data.vocabulary import refuse_other_tokens, resolve_vocabulary

    may_grow, new_head, notes = config.run.resize_token_embeddings, config.run.new_head, []
    template = ChatTemplate.of_files(origin.files(TEMPLATE_FILES))
    resizes = config.lora is None
    origin.refuse_other_model(config.model, may_grow=may_grow, may_resize=resizes, new_head=new_head)
    origin.refuse_other_adapters(config.lora)
    for entry in config.data.train:
        if must_exist or Path(entry.path).exists():
            dataset = _opened(entry.path, config)
            if dataset.label_names is not None and not new_head:
                origin.refuse_other_labels(entry.path, dataset.label_names)
            if not isinstance(dataset, Dataset):
                continue
            if may_grow:
                refuse_other_tokens(dataset, origin.tokenizer(), origin.folder)
                config = resolve_vocabulary(config, dataset)
            else:
                own = dataset.tokenizer_path.read_bytes(), dataset.manifest.target_tokenizer_sha256
                origin.refuse_other_tokenizer(entry.path, *own)
            if template is not None and dataset.chat_template not in (None, template.sha256):
                notes.append(
                    f"run.init_from: {entry.path} was written by another chat template than that of {origin.folder}: "
                    "the weights know the turns of that one, and the run's checkpoints get the dataset's."
                )
    num_new = (config.model.vocab_size or 0) - (origin.model.vocab_size or 0)
    grown = f", with {num_new} rows more in the embedding for new tokens" if may_grow and num_new > 0 else ""
    grown += ", with a new head" if new_head else ""
    averaged = "averaged " if config.run.init_from_ema else ""
    if (file := origin.files([PREPROCESSOR]).get(PREPROCESSOR)) is not None and config.model.description.reads_images:
        theirs, _ = from_transformers(json.loads(file), origin.model)
        if others := differences(theirs, config.objective.image_classification):
            notes.append(
                f"run.init_from: {origin.folder} reads other numbers of a pixel: {'; '.join(others)}. Set them below "
                "objective.image_classification, unless that is what you want."
            )
    places = [(each.num_places or 1) - 1 for each in (origin.model, config.model)]
    sized = (
        ", with the positions of {} patches interpolated to {}".format(*places) if origin.resizes(config.model) else ""
    )
    return [f"run.init_from: {averaged}weights of {origin.folder}, the same model{grown}{sized}.", *notes]


def check_tasks(config: RunConfig, must_exist: bool = False) -> list[str]:
    """Refuse a file of tasks that is wrong, or whose rows are; what there is to say of it."""
    if config.train.tasks is None:
        return []
    path = Path(config.train.tasks)
    if not must_exist and not path.exists():
        return [f"train.tasks: {path} is not here, so whether it is right is not known."]
    from megatrain.config.tasks import read_tasks
    from megatrain.tasks.prompts import make_examples

    counts = {task.name: len(make_examples(task, task.shots, 0)) for task in read_tasks(path)}
    return [f"train.tasks: {', '.join(f'{name} ({count:,} examples)' for name, count in counts.items())}."]


def check_trackers(config: RunConfig, must_exist: bool = False) -> list[str]:
    """Refuse trackers whose package is not installed, if it must be; what there is to say of them."""
    missing = [name for name in config.observe.trackers if find_spec(name) is None]
    text = f"observe.trackers: {', '.join(missing)} not installed here: pip install 'megatrain[{','.join(missing)}]'."
    if missing and must_exist:
        raise ConfigError(text)
    return [text] if missing else []


def check_profile_folder(out: Path) -> None:
    """Refuse a folder for a profile that is a file, or that holds one."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file: name a folder for the profile, which need not exist.")
    if (out / PROFILE_FILE).exists():
        raise ConfigError(f"--out {out} holds a profile already: name another folder, or remove it.")


def length(config: RunConfig) -> Length | None:
    """How many steps the run has, and how often it sees each dataset; None where one is not here, and without loading
    what reads them. Raises DataError for one of which no sample can be made."""
    if not all(Path(entry.path).is_dir() for entry in config.data.train):
        return None
    from megatrain.data.epochs import planned_length
    from megatrain.objectives import make_objective

    objective = make_objective(config.objective, config.model, config.data, config.run.seed)

    def num_samples(dataset: AnyDataset) -> int:
        if not (count := objective.num_samples(dataset)):
            objective.evaluation_source(dataset)  # it says why
        return count

    return planned_length(config, num_samples)


def with_steps(config: RunConfig, length: Length | None) -> RunConfig:
    """The config with the steps that its train.epochs is, where that is known."""
    if length is None:
        return config
    return config.model_copy(update={"train": config.train.model_copy(update={"steps": length.num_steps})})


def with_vocabulary(config: RunConfig) -> RunConfig:
    """The config with the vocabulary that the first dataset's tokenizer decides, where it leaves that open."""
    may_grow = config.run.resize_token_embeddings and Path(config.data.train[0].path).is_dir()
    if config.model.vocab_size is not None and not may_grow:
        return config
    from megatrain.data.images import open_for
    from megatrain.data.vocabulary import resolve_vocabulary

    images, path = config.model.description.reads_images, config.data.train[0].path
    try:
        return resolve_vocabulary(config, open_for(path, images=images))
    except DataError as error:
        raise DataError(
            f"model.vocab_size is null, so the dataset decides it; set it to plan without data. {error}"
        ) from error
