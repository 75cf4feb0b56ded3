"""The checkpoint that a run takes its first weights from, and a config that takes its model from there too.

What needs no checkpoint stays quick: the rest is imported where it is used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatrain import config
from megatrain.config import LoraConfig, ModelConfig, RunConfig
from megatrain.config.keys import differences
from megatrain.config.problem import as_yaml
from megatrain.errors import CheckpointError, ConfigError, Unreachable

if TYPE_CHECKING:
    from megatrain.checkpoint.location import Location
    from megatrain.checkpoint.manifest import Base, Manifest

VOCABULARIES = ("vocab_size", "decoder_vocab_size")
MAY_DIFFER: Mapping[str, str] = {
    "attention": "another kernel computes the same, but for rounding",
    "attention_dropout": "it is used in training alone",
    "hidden_dropout": "it is used in training alone",
    "initializer_range": "the weights are there",
    "init_scheme": "the weights are there",
    "max_position_embeddings": "it may be longer, but where each position has a weight (gpt2)",
    "image_size": "the positions of the patches are interpolated to their new number (vit); not with lora",
}
"""The model's keys that may differ from those of the checkpoint in ``run.init_from``; docs/resuming.md has them."""


def load(path: str | Path, overrides: Sequence[str] = (), note: Callable[[str], None] = lambda text: None) -> RunConfig:
    """`megatrain.config.load`, for configs that say ``model: from_checkpoint`` too.

    That is the model of the run's own newest checkpoint, or, where it has none, of ``run.init_from``. Raises
    ConfigError, CheckpointError.
    """
    return config.load(path, overrides, _saved_model, note)


def gives_same_ids(one: bytes, other: bytes) -> bool:
    """Whether two tokenizer.json are equal but for what their post-processors put around a text."""
    if one == other:
        return True
    try:
        descriptions = [{**json.loads(content), "post_processor": None} for content in (one, other)]
    except (ValueError, TypeError):
        return False
    return descriptions[0] == descriptions[1]


@dataclass(frozen=True)
class Origin:
    """A checkpoint to begin from. ``model``: what its weights are the weights of. ``lora``: the adapters that it holds
    beside its base's weights; None: it holds all weights."""

    folder: Location
    manifest: Manifest
    model: ModelConfig
    lora: LoraConfig | None = None

    @property
    def base(self) -> Base:
        """The weights that adapters of this checkpoint's model stand beside."""
        from megatrain.checkpoint.location import address
        from megatrain.checkpoint.manifest import Base

        digest, size = self.manifest.weights_digest, self.manifest.parameters
        return self.manifest.base or Base(path=address(self.folder), digest=digest, parameters=size)

    def refuse_other_adapters(self, lora: LoraConfig | None) -> None:
        """Raise CheckpointError where the checkpoint holds adapters that are not those of ``lora``."""
        if self.lora is None:
            return
        if lora is None:
            raise CheckpointError(
                f"run.init_from: {self.folder} holds LoRA adapters, and lora is null here. Go on with its lora section "
                f"({as_yaml(self.lora.model_dump(mode='json'))}), or merge them: `megatrain export --merge`, then "
                "`megatrain import`."
            )
        theirs, ours = (
            {**each.model_dump(mode="json"), "target_modules": self.model.description.adapted(each.adapts)}
            for each in (self.lora, lora)
        )
        found = [f"{key} is {a} there and {b} here" for key, a, b in differences(theirs, ours, "lora")]
        found = [text for text in found if not text.startswith("lora.dropout ")]
        if found:
            raise CheckpointError(f"run.init_from: {self.folder} holds other LoRA adapters: {'; '.join(found)}.")

    def refuse_other_model(
        self, model: ModelConfig, *, may_grow: bool = False, may_resize: bool = True, new_head: bool = False
    ) -> None:
        """Raise CheckpointError, naming each key with both values, where the weights would compute something else in
        ``model``. A vocabulary that is not known yet is passed over. ``may_grow``: or that is larger. ``may_resize``:
        images may have another size. ``new_head``: what the head alone decides may differ."""
        if may_resize and self.resizes(model):
            model = model.model_copy(update={"image_size": _image_size(self.model)})
        if may_grow and (model.vocab_size or 0) > (self.model.vocab_size or 0):
            model = model.model_copy(update={"vocab_size": self.model.vocab_size})
        found = [
            f"model.{key} is {as_yaml(theirs)} there and {as_yaml(ours)} here"
            for key, theirs, ours in differences(_resolved(self.model), _resolved(model))
            if not _may_differ(key, theirs, ours, model)
            and not (key in VOCABULARIES and ours is None)
            and not (new_head and key in ("tie_word_embeddings", model.description.hugging_face.labels_key))
        ]
        if found:
            of_head = f"model.{model.description.hugging_face.labels_key}"
            if all(text.startswith((of_head, "model.tie_word_embeddings")) for text in found):
                raise CheckpointError(
                    f"run.init_from: {self.folder} holds a model with another head: {found[0]}. Set run.new_head=true, "
                    "and this model's begins anew."
                )
            raise CheckpointError(
                f"run.init_from: {self.folder} holds the weights of another model than this config's: "
                f"{'; '.join(found)}. `model: from_checkpoint` takes the whole section from there. To change a key on "
                "purpose, `megatrain export` the checkpoint, edit config.json, and `megatrain import` that."
            )
        from megatrain.plan.flops import num_parameters

        if new_head:
            model = self.model
        if model.vocab_size is not None and self.base.parameters != num_parameters(model):
            raise CheckpointError(
                f"run.init_from: {self.folder} holds {self.base.parameters:,} parameters, and this config's model "
                f"has {num_parameters(model):,}: there are tensors too many or too few."
            )

    def resizes(self, model: ModelConfig) -> bool:
        """Whether images have another size in ``model`` than here."""
        return self.model.description.reads_images and _image_size(self.model) != _image_size(model)

    def tokenizer(self) -> bytes | None:
        """The checkpoint's tokenizer.json; None where it has none."""
        from megatrain.checkpoint.manifest import TOKENIZER

        return self.files([TOKENIZER]).get(TOKENIZER)

    def files(self, names: Sequence[str]) -> dict[str, bytes]:
        """Those of these small files that lie beside the weights."""
        from megatrain.checkpoint.store import read_small_file

        if isinstance(self.folder, Path) and is_model_folder(str(self.folder)):
            return {name: (self.folder / name).read_bytes() for name in names if (self.folder / name).is_file()}
        entries = [entry for entry in map(self.manifest.file, names) if entry is not None]
        return {entry.file: read_small_file(self.folder, entry) for entry in entries}

    def refuse_other_tokenizer(self, dataset: object, tokenizer: bytes, target_sha256: str | None = None) -> None:
        """Raise CheckpointError where ``dataset`` is of another ``tokenizer``; ``target_sha256``: of one that its
        targets have of their own. One that the checkpoint lacks is passed over: nothing can be compared."""
        from megatrain.checkpoint.manifest import TARGET_TOKENIZER, TOKENIZER

        content = self.tokenizer()
        target = self.files([TARGET_TOKENIZER]).get(TARGET_TOKENIZER)
        known = None if target is None else hashlib.sha256(target).hexdigest()
        if content is not None and known != target_sha256:
            raise CheckpointError(
                f"run.init_from: the targets of {dataset} have another tokenizer than those of {self.folder}: tokenize "
                f"the pairs again {'without --target-tokenizer' if target is None else 'with --target-tokenizer '}"
                f"{'' if target is None else self.folder / TARGET_TOKENIZER}."
            )
        if content is not None and not gives_same_ids(content, tokenizer):
            raise CheckpointError(
                f"run.init_from: {dataset} was tokenized with another tokenizer than that of {self.folder}: its token "
                "ids mean other texts to these weights. Tokenize the text again with --tokenizer "
                f"{self.folder / TOKENIZER}; if it has that one's tokens and further ones, set "
                "run.resize_token_embeddings=true."
            )

    def refuse_other_labels(self, dataset: object, label_names: list[str]) -> None:
        """Raise CheckpointError where ``dataset`` has other labels than the checkpoint, as far as it names its own."""
        import orjson

        from megatrain.checkpoint.manifest import LABELS
        from megatrain.checkpoint.transformers_config import label_names as names_in

        files = self.files((LABELS, "config.json"))
        known: list[str] | None = orjson.loads(files[LABELS]) if LABELS in files else None
        if known is None and "config.json" in files:
            known = names_in(orjson.loads(files["config.json"]))
        if known is not None and known != label_names:
            raise CheckpointError(
                f"run.init_from: {dataset} has other labels than {self.folder}, or in another order: they mean "
                "something else to these weights. Make it with --label-names, in the order of the checkpoint; or set "
                "run.new_head=true, and the head begins anew."
            )


def find_origin(config: RunConfig) -> Origin | None:
    """What a start of this run would begin from; None where ``run.init_from`` is null, or where the run has
    checkpoints of its own and goes on from those. Raises CheckpointError where there is no good checkpoint there,
    ConfigError where it has no average, which ``run.init_from_ema`` asks for."""
    if config.run.init_from is None:
        return None
    from megatrain.checkpoint.location import locate
    from megatrain.checkpoint.manifest import read_manifest
    from megatrain.checkpoint.saved_config import saved_config
    from megatrain.checkpoint.store import find_problem
    from megatrain.checkpoint.stores import open_store, resolve

    if any(True for _ in open_store(Path(config.run.dir), config.checkpoint.dir).names()):
        return None
    with _naming_the_key():
        if is_model_folder(config.run.init_from):
            origin = _of_model_folder(Path(config.run.init_from))
        else:
            folder = resolve(locate(config.run.init_from))
            if (problem := find_problem(folder)) is not None:
                raise CheckpointError(problem)
            manifest = read_manifest(folder)
            saved = saved_config(manifest, folder)
            origin = Origin(folder, manifest, saved.model, saved.lora)
    if config.run.init_from_ema and not origin.manifest.has_average:
        raise ConfigError(
            f"run.init_from_ema: {origin.folder} holds no averaged weights: its run was trained without "
            "optimizer.ema_decay. Leave it out to take the weights as they are."
        )
    return origin


def is_model_folder(path: str) -> bool:
    """Whether ``run.init_from`` is a Hugging Face folder, which a start imports first."""
    from megatrain.checkpoint.manifest import MANIFEST

    folder = Path(path)
    return "://" not in path and (folder / "config.json").is_file() and not (folder / MANIFEST).exists()


def _of_model_folder(folder: Path) -> Origin:
    """By its config.json alone, without torch: what its weights say otherwise, the import tells."""
    import orjson

    from megatrain.checkpoint.manifest import Manifest
    from megatrain.checkpoint.transformers_config import from_transformers
    from megatrain.plan.flops import num_parameters

    path = folder / "config.json"
    try:
        keys = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from None
    if not isinstance(keys, dict):
        raise CheckpointError(f"{path} holds no JSON object.")
    model = from_transformers(keys, path)
    manifest = Manifest(
        step=0,
        tokens=0,
        parameters=num_parameters(model),
        layout={},
        state={},
        config={},
        versions={},
        created="",
        files=(),
    )
    return Origin(folder, manifest, model)


def may_differ_table() -> str:
    rows = (f"| `model.{key}` | {why} |" for key, why in MAY_DIFFER.items())
    return "\n".join(["| key | why |", "|---|---|", *rows])


def _may_differ(key: str, theirs: Any, ours: Any, model: ModelConfig) -> bool:
    if key == "max_position_embeddings":
        return bool(ours > theirs) and not model.description.learns_positions
    return key in MAY_DIFFER and key != "image_size"


def _image_size(model: ModelConfig) -> int:
    return int(getattr(model, "image_size"))  # noqa: B009 (a family's own key)


def _resolved(model: ModelConfig) -> dict[str, Any]:
    """The model with what follows from its keys where they are null."""
    derived = {"intermediate_size": model.ffn_size, "num_key_value_heads": model.kv_heads, "head_dim": model.head_size}
    if model.description.encoder is not None:
        derived["num_decoder_layers"] = model.num_layers(model.description.decoder)
    return {**model.model_dump(mode="json"), **derived, "tie_word_embeddings": model.is_tied}


def _saved_model(run_dir: str | None, checkpoint_dir: str | None, init_from: str | None) -> dict[str, Any] | None:
    """What ``model: from_checkpoint`` stands for; None where there is no checkpoint to take it from.

    Of each checkpoint only the manifest is read: all ranks of a run do it.
    """
    from megatrain.checkpoint.location import locate
    from megatrain.checkpoint.store import is_checkpoint
    from megatrain.checkpoint.stores import find_store, open_store, resolve

    own = [*open_store(Path(run_dir), checkpoint_dir).names()] if run_dir is not None else []
    if own or init_from is None:
        return _newest_model(own)
    with _naming_the_key():
        if is_model_folder(init_from):
            return _of_model_folder(Path(init_from)).model.model_dump(mode="json")
        path = locate(init_from)
        if is_checkpoint(path):
            return _newest_model([(0, path)])
        return _newest_model([*find_store(path).names()] or [(0, resolve(path))])


@contextmanager
def _naming_the_key() -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise type(error)(f"run.init_from cannot be used: {error}") from None


def _newest_model(checkpoints: Sequence[tuple[int, Location]]) -> dict[str, Any] | None:
    from megatrain.checkpoint.manifest import read_manifest
    from megatrain.checkpoint.saved_config import saved_config

    problem = None
    for _, folder in sorted(checkpoints, key=lambda found: found[0], reverse=True):
        try:
            return saved_config(read_manifest(folder), folder).model.model_dump(mode="json")
        except Unreachable:
            raise
        except CheckpointError as error:  # the start will pass over it, too
            problem = problem or error
    if problem is not None:
        raise problem
    return None
