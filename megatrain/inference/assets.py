"""The small files of a checkpoint: its tokenizer, and what an imported folder says of how to use it.

They go along from an import through the runs that begin from it to an export. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cached_property
from typing import Any

import orjson

from megatrain.checkpoint.image_processor import PREPROCESSOR
from megatrain.checkpoint.manifest import LABELS, TARGET_TOKENIZER, TOKENIZER, Chat, SpecialTokens, Token
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.checkpoint.transformers_config import label_names, labels_by_id, laid_over, to_transformers
from megatrain.config import ModelConfig
from megatrain.data.chat import CHAT_DATE, ChatTemplate
from megatrain.data.tokenizer import Tokenizer
from megatrain.errors import CheckpointError, DataError
from megatrain.families import FAMILIES

CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER_CONFIG, TOKENIZER_MAP = "tokenizer_config.json", "special_tokens_map.json"
TOKENIZER_FILES = (
    TOKENIZER,
    TARGET_TOKENIZER,
    TOKENIZER_CONFIG,
    TOKENIZER_MAP,
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
CARRIED = (CONFIG, GENERATION, PREPROCESSOR, *TOKENIZER_FILES)
"""The files of a Hugging Face folder that are kept as they are, both ways."""

_JSON_STYLE = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE
_PLAIN_CLASS = "PreTrainedTokenizerFast"
_FORMER_EOD = "<|endoftext|>"  # what `tokenize` ends documents with unless told otherwise


@dataclass(frozen=True)
class Assets:
    """What goes along with the weights. ``files``: name to content, of CARRIED. ``chat_date``: the day that the chat
    template is told; None: the folder's own, or CLOCK."""

    special_tokens: SpecialTokens = field(default_factory=SpecialTokens)
    files: Mapping[str, bytes] = field(default_factory=dict)
    chat_date: date | None = None

    @classmethod
    def of_folder(cls, files: Mapping[str, bytes]) -> Assets:
        """Those of an imported folder: its special tokens as transformers reads them. Raises CheckpointError where a
        decoder begins with another token there."""
        assets = cls(_read_special_tokens(files), files)
        assets._refuse_other_start()
        return assets

    def _refuse_other_start(self) -> None:
        config, tokenizer = _json(self.files, CONFIG) or {}, self.target_tokenizer or _tokenizer(self.files)
        theirs = (_json(self.files, GENERATION) or {}).get("decoder_start_token_id")
        theirs = config.get("decoder_start_token_id") if theirs is None else theirs
        family = FAMILIES.get(str(config.get("model_type")))
        if theirs is None or family is None or family.encoder is None or tokenizer is None:
            return
        if theirs != (ours := self.decoder_start(tokenizer)):
            raise CheckpointError(
                f"{CONFIG}: decoder_start_token_id is {theirs}; only {ours} can be imported, the id of <pad>, or where "
                "the tokenizer has none, of the end of text."
            )

    @property
    def mask_token(self) -> str | None:
        """What a folder's tokenizer hides tokens by."""
        return _folder_text(self.files, "mask")

    @classmethod
    def of_checkpoint(cls, reader: CheckpointReader) -> Assets:
        """Those of a checkpoint. Raises CheckpointError where a file is not what was written."""
        manifest = reader.manifest
        known = (*CARRIED, LABELS)
        files = {entry.file: reader.read_file(entry.file) for entry in manifest.files if entry.file in known}
        chat_date = manifest.chat.date if manifest.chat is not None else None
        if manifest.special_tokens is not None:
            return cls(manifest.special_tokens, files, chat_date)
        special_tokens = _read_special_tokens(files)  # an older version wrote it, which kept none
        tokenizer = _tokenizer(files)
        if special_tokens.eod is None and tokenizer is not None and _FORMER_EOD in tokenizer.ids:
            eod = Token(id=tokenizer.ids[_FORMER_EOD], token=_FORMER_EOD)
            special_tokens = special_tokens.model_copy(update={"eod": eod})
        return cls(special_tokens, files)

    def with_data(
        self,
        tokenizer_json: bytes,
        eod: Token,
        bos: Token | None = None,
        template_files: Mapping[str, bytes] = {},
        chat_date: date | None = None,
        target: tuple[bytes, Token] | None = None,
    ) -> Assets:
        """The same for a run on data of this tokenizer, whose documents end with ``eod``, and begin with ``bos``; with
        ``template_files``, what wrote its conversations, on ``chat_date``. ``target``: the tokenizer of targets that
        have one of their own, and what ends them.

        Tokenizer files that came without a tokenizer.json stay behind: whether they are of the same one is not known.
        """
        known = {name: content for name, content in self.files.items() if name not in self.staying_behind}
        update: dict[str, Any] = {"eod": eod, "bos": bos or self.special_tokens.bos, "begins_with_bos": bos is not None}
        files = {**known, TOKENIZER: tokenizer_json, **template_files}
        if target is not None:
            files[TARGET_TOKENIZER], update["target_eod"] = target
        named = _read_special_tokens(files)
        update |= {"pad": self.special_tokens.pad or named.pad, "unk": self.special_tokens.unk or named.unk}
        special_tokens = self.special_tokens.model_copy(update=update)
        return Assets(special_tokens, files, chat_date if template_files else self.chat_date)

    def with_images(self, label_names: Sequence[str], preprocessor: Mapping[str, Any]) -> Assets:
        """The same for a run on images of these labels; ``preprocessor``: how transformers reads images so."""
        described = {PREPROCESSOR: orjson.dumps(preprocessor, option=_JSON_STYLE)}
        return replace(self, files={**self.files, **described}).with_labels(label_names)

    def with_labels(self, label_names: Sequence[str]) -> Assets:
        """The same for a classifier of these labels."""
        return replace(self, files={**self.files, LABELS: orjson.dumps(list(label_names))})

    def between_borders(self) -> Assets:
        """The same with a tokenizer that puts around a text what begins and ends the data's documents, as encoders
        need."""
        tokenizer, bos, end = _tokenizer(self.files), self.special_tokens.bos, self.special_tokens.eod
        begin = bos.token if bos is not None and self.prompt_ids else None
        if tokenizer is None or end is None or not end.token:
            return self
        return replace(self, files={**self.files, TOKENIZER: tokenizer.with_borders(begin, end.token)})

    @property
    def label_names(self) -> list[str] | None:
        """Of a classifier: those of the data, or of the folder that was imported."""
        if LABELS in self.files:
            names: list[str] = orjson.loads(self.files[LABELS])
            return names
        theirs = _json(self.files, CONFIG)
        return label_names(theirs) if theirs and "id2label" in theirs else None

    @cached_property
    def template(self) -> ChatTemplate | None:
        """The chat template, told the day that its conversations were written on."""
        template = ChatTemplate.of_files(self.files)
        return template if template is None or self.chat_date is None else replace(template, clock=self.chat_date)

    @property
    def chat(self) -> Chat | None:
        """What a checkpoint records of the chat template."""
        if self.template is None:
            return None
        day = self.template.clock if self.template.reads_clock else None
        return Chat(template_sha256=self.template.sha256, date=day)

    @property
    def prompt_ids(self) -> list[int]:
        tokens = self.special_tokens
        return [tokens.bos.id] if tokens.bos is not None and tokens.begins_with_bos else []

    @property
    def notes(self) -> list[str]:
        bos, tokenizer, notes = self.special_tokens.bos, _tokenizer(self.files), []
        if bos is not None and self.prompt_ids and tokenizer and not _begins_with(bos, self.files, tokenizer):
            notes = [
                f"the data's documents begin with {bos.token}, which transformers does not put there: prompts need it."
            ]
        if self.chat is not None and self.chat.date is not None:
            notes.append(
                f"the chat template writes the date: here {self.chat.date}, as in the conversations of the data; "
                "transformers tells it today's."
            )
        return notes

    @property
    def staying_behind(self) -> list[str]:
        """The files that no run takes along."""
        return [] if TOKENIZER in self.files else [name for name in TOKENIZER_FILES if name in self.files]

    @cached_property
    def turn_end(self) -> Token | None:
        """What ends an answer of a chat model."""
        tokenizer = _tokenizer(self.files)
        if self.template is None or tokenizer is None:
            return None
        if (token := self.template.turn_end(tokenizer.control)) is None:
            return None
        return Token(id=tokenizer.control[token], token=token)

    @cached_property
    def target_tokenizer(self) -> Tokenizer | None:
        """That of what is written, where it is another one than that of what is read."""
        return _tokenizer(self.files, TARGET_TOKENIZER)

    @property
    def output_tokens(self) -> SpecialTokens:
        """The special tokens of what is written."""
        tokens = self.special_tokens
        return tokens if tokens.target_eod is None else tokens.model_copy(update={"eod": tokens.target_eod})

    def decoder_start(self, tokenizer: Tokenizer | None) -> int:
        """A decoder's first input beside an encoder. ``tokenizer``: of what is read."""
        eod, tokenizer = self.output_tokens.eod, self.target_tokenizer or tokenizer
        end = 0 if eod is None else eod.id
        return end if tokenizer is None else tokenizer.decoder_start(end)

    @cached_property
    def stop_ids(self) -> list[int]:
        """The tokens that end what is generated: the folder's own, where that which ends a document is among them, and
        the end of a turn."""
        eod, theirs = self.output_tokens.eod, _folder_ids(self.files, "eos")
        ends = theirs if eod is None or eod.id in theirs else [eod.id]
        return list(dict.fromkeys([*ends, *([self.turn_end.id] if self.turn_end else [])]))


def exported_files(assets: Assets, model: ModelConfig, dtype: str, mask_token: str | None = None) -> dict[str, bytes]:
    """The files of a Hugging Face folder beside its weights: what came along as it was, but for a model or an end of
    text that have become others. ``dtype``: torch's name of the weights' type. ``mask_token``: of an encoder.

    A special token that is not known is null in config.json: left out, transformers would take one of its own.
    """
    files, tokens = assets.files, assets.output_tokens
    ids = {f"{role}_token_id": token.id for role, token in _by_role(tokens) if role != "unk"}
    generation: dict[str, Any] = {}
    if model.description.encoder is not None and tokens.eod is not None:
        start = assets.decoder_start(_tokenizer(files))
        ids = {"decoder_start_token_id": start, "pad_token_id": start, **ids}
        if model.description.never_writes_start and start not in assets.stop_ids:
            generation = {"bad_words_ids": [[start]], "renormalize_logits": True}
    theirs = _json(files, CONFIG)
    changed: dict[str, dict[str, Any]] = {}
    reads_images = model.description.reads_images
    if theirs is None:
        nothing_known = {} if reads_images else dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        changed[CONFIG] = {**to_transformers(model, dtype), **nothing_known, **ids}
    else:
        changed[CONFIG] = laid_over(theirs, model, dtype)
    if model.description.classifies and assets.label_names:
        changed[CONFIG] |= labels_by_id(assets.label_names)
    if theirs is None and GENERATION not in files and not reads_images:
        changed[GENERATION] = {**ids, **generation}
    if TOKENIZER in files and TOKENIZER_CONFIG not in files:
        changed[TOKENIZER_CONFIG] = {
            "tokenizer_class": _PLAIN_CLASS,
            "model_max_length": model.max_position_embeddings,
            "model_input_names": ["input_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False,
            **{f"{role}_token": token.token for role, token in _by_role(tokens) if token.token is not None},
        }
        if model.description.encoder is not None:
            changed[TOKENIZER_CONFIG] |= {"pad_token": _padding(assets)}
        if not model.description.can_generate:
            ends = {"cls": tokens.bos, "sep": tokens.eod, "pad": tokens.pad or tokens.eod}
            texts = {**{role: token and token.token for role, token in ends.items()}, "mask": mask_token}
            if getattr(model, "type_vocab_size", 1) > 1:
                changed[TOKENIZER_CONFIG]["model_input_names"] += ["token_type_ids"]
            changed[TOKENIZER_CONFIG] |= {f"{role}_token": text for role, text in texts.items() if text is not None}
    folders_own = _by_role(_read_special_tokens(files))
    for role, token in _by_role(tokens):
        if (role, token) not in folders_own:  # it is the data's
            turn = assets.turn_end  # where a tokenizer names it as its end, a chat ends there
            ends_turns = role == "eos" and turn is not None and turn.token == _folder_text(files, "eos")
            by_text = () if ends_turns else (TOKENIZER_CONFIG, TOKENIZER_MAP)
            for name in (CONFIG, GENERATION, *by_text):
                value = changed.get(name) or _json(files, name)
                if value is not None:
                    by_id = name in (CONFIG, GENERATION)
                    changed[name] = _naming(value, f"{role}_token_id" if by_id else f"{role}_token", token)
    template, known = assets.template, ChatTemplate.of_files(files)
    if template and known and template.reads_clock and template.clock != known.clock:
        settings = changed.get(TOKENIZER_CONFIG) or _json(files, TOKENIZER_CONFIG) or {}
        changed[TOKENIZER_CONFIG] = {**settings, CHAT_DATE: template.clock.isoformat()}
    if len(assets.stop_ids) > 1 and assets.turn_end:
        for name in (CONFIG, GENERATION):
            value = changed.get(name) or _json(files, name) or {}
            if not {assets.turn_end.id, assets.stop_ids[0]} <= set(_as_list(value.get("eos_token_id"))):
                changed[name] = {**value, "eos_token_id": assets.stop_ids}
    made = {name: orjson.dumps(value, option=_JSON_STYLE) for name, value in changed.items()}
    return {name: content for name, content in {**files, **made}.items() if name != LABELS}


def _padding(assets: Assets) -> str | None:
    """The token that pads what an encoder reads."""
    tokenizer, eod = _tokenizer(assets.files), assets.special_tokens.eod
    return None if tokenizer is None or eod is None else tokenizer.token_of(tokenizer.decoder_start(eod.id))


def _naming(settings: dict[str, Any], key: str, token: Token) -> dict[str, Any]:
    """Settings of transformers in which ``key`` names this token; of several ends it may be one."""
    value, former = (token.id if key.endswith("_id") else token.token), settings.get(key)
    is_there = value in former if isinstance(former, list) else value == former
    return settings if is_there or value is None else {**settings, key: value}


def _by_role(tokens: SpecialTokens) -> list[tuple[str, Token]]:
    """The tokens that are known, by transformers' names of their roles."""
    named = {"eos": tokens.eod, "bos": tokens.bos, "pad": tokens.pad, "unk": tokens.unk}
    return [(role, token) for role, token in named.items() if token is not None]


def _read_special_tokens(files: Mapping[str, bytes]) -> SpecialTokens:
    """By ids of generation_config.json and config.json, which are of what is written, and by names of the tokenizer's
    files."""
    tokenizer, of_target = _tokenizer(files), _tokenizer(files, TARGET_TOKENIZER)
    written = of_target or tokenizer
    ids_by_text = written.ids if written is not None else {}
    texts_by_id = {number: text for text, number in ids_by_text.items()}
    found: dict[str, Token] = {}
    for role in ("eos", "bos", "pad", "unk"):
        named, ids = _folder_text(files, role), _folder_ids(files, role)
        number = ids_by_text.get(named) if named is not None else None
        if ids and number not in ids:
            number = ids[0]
        if number is not None:
            text = texts_by_id.get(number) if texts_by_id else (named if len(ids) == 1 else None)
            found["eod" if role == "eos" else role] = Token(id=number, token=text)
    if of_target is not None and "eod" in found:
        found["target_eod"] = end = found["eod"]
        if tokenizer is not None and end.token in tokenizer.ids:
            found["eod"] = Token(id=tokenizer.ids[end.token], token=end.token)
    return SpecialTokens(**found, begins_with_bos="bos" in found and _begins_with(found["bos"], files, tokenizer))


def _begins_with(bos: Token, files: Mapping[str, bytes], tokenizer: Tokenizer | None) -> bool:
    """Whether transformers puts it before a text: all classes but one of its tokenizers know ``add_bos_token``."""
    settings = _json(files, TOKENIZER_CONFIG) or {}
    asked = settings.get("add_bos_token")
    if isinstance(asked, bool) and settings.get("tokenizer_class") != _PLAIN_CLASS:
        return asked
    return tokenizer is not None and tokenizer.begins_with(bos.id)


def _folder_ids(files: Mapping[str, bytes], role: str) -> list[int]:
    key, config = f"{role}_token_id", _json(files, CONFIG) or {}
    value = (_json(files, GENERATION) or {}).get(key)
    if value is None:
        family = FAMILIES.get(str(config.get("model_type")))
        value = {**(family.hugging_face.absent if family else {}), **config}.get(key)
    size = config.get("decoder_vocab_size") or config.get("vocab_size")
    return [i for i in _as_list(value) if type(i) is int and 0 <= i < (size if type(size) is int else 1 << 32)]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _folder_text(files: Mapping[str, bytes], role: str) -> str | None:
    for name in (TOKENIZER_CONFIG, TOKENIZER_MAP):
        value = (_json(files, name) or {}).get(f"{role}_token")
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            return text
    return None


def _tokenizer(files: Mapping[str, bytes], name: str = TOKENIZER) -> Tokenizer | None:
    """That of a tokenizer.json; None where there is none that can be read."""
    try:
        return Tokenizer(files[name], name) if name in files else None
    except DataError:
        return None


def _json(files: Mapping[str, bytes], name: str) -> dict[str, Any] | None:
    if name not in files:
        return None
    try:
        value = orjson.loads(files[name])
    except orjson.JSONDecodeError as error:
        raise CheckpointError(f"{name} cannot be read as JSON: {error}.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} holds no JSON object.")
    return value
