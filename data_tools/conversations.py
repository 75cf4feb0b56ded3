"""Conversations into examples: rendered whole by a chat template, and which of the text is answers.

A template that marks what is generated (`{% generation %}`) is taken at its word. Of another one, an answer is what
follows the rendering of the messages before it with the generation prompt, up to the last control token that the
template writes behind it: its header and the white space behind that token are not scored.
"""

from __future__ import annotations

import re
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import date
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import orjson
import pyarrow as pa

from data_tools.image_files import read_label_names
from data_tools.labeled import LabeledText
from data_tools.supervised import Example, LeftOut, PromptAndAnswer, SourceAndTarget, Spans, max_tokens_named, replaced
from data_tools.tokenizer import load_tokenizer
from data_tools.units import Fields, ReadOptions, Record
from megatrain.data.chat import CHAT_DATE, CLOCK, ChatTemplate
from megatrain.data.format import SCORED, TEMPLATE_FILES
from megatrain.errors import ConfigError, DataError

ASSISTANT = "assistant"
OWN_WEIGHT = ("weight", "train")
"""Keys of a message that say whether it is scored, whatever its role: OpenAI's (0 or 1), and axolotl's."""
MAX_MESSAGES_RENDERED = 1 << 22
"""Of one conversation, over all of its answers: about a minute."""

Messages = list[dict[str, Any]]
Tools = Sequence[Mapping[str, Any]] | None


class _Unclear(Exception):
    """It cannot be told which of a text is the answer."""


@dataclass(frozen=True)
class Conversations:
    """Which messages are scored of conversations that a template renders."""

    target_tokenizer: ClassVar[None] = None

    template: ChatTemplate
    files: Mapping[str, bytes]
    """Of TEMPLATE_FILES, those that came with the tokenizer: they go along with the dataset."""
    special: tuple[str, ...]
    """Tokens that the template may write, and no message."""
    roles: tuple[str, ...] = (ASSISTANT,)
    last_only: bool = False
    max_tokens: int | None = None
    column: ClassVar[pa.Field] = SCORED

    @property
    def named(self) -> dict[str, str]:
        return {
            "examples": "chat",
            "chat_template": self.template.sha256,
            "loss": "last" if self.last_only else "all",
            "train_on_roles": ",".join(self.roles),
            **({CHAT_DATE: self.template.clock.isoformat()} if self.template.reads_clock else {}),
            **max_tokens_named(self.max_tokens),
        }

    def examples(self, record: Record, counts: Counter[str]) -> Iterator[Example | LeftOut]:
        given, tools = orjson.loads(record.text)
        messages = [{key: value for key, value in message.items() if value is not None} for message in given]
        try:
            scored, tools = self._scored(messages), _as_tools(tools)
            if not any(map(_says_something, map(messages.__getitem__, scored))):
                yield LeftOut("no_answer", "no message that is to be scored says anything")
                return
            disguise = _Disguise.of(self.special, [messages, tools])
            counts["spelled_control_tokens"] += disguise.is_needed
            rendering = _Rendering(self, disguise.put_on(messages), disguise.put_on(tools) or None)
            texts = rendering.texts(scored)
            counts["split_into_turns"] += len(texts) > 1 or texts[0].is_part
        except DataError as error:
            yield LeftOut("rejected", str(error))
        except _Unclear as error:
            yield LeftOut("unclear", str(error))
        else:
            for text in texts:
                yield self._example(record, text, disguise)

    def _example(self, record: Record, found: _Text, disguise: _Disguise) -> Example | LeftOut:
        if not found.scored:
            return LeftOut("no_answer", "the template writes no answer")
        if found.scored == ((0, len(found.text)),):
            return LeftOut("no_prompt", "all of its text would be scored")
        text, literal, scored = disguise.take_off(found.text, found.scored)
        return Example(text, record.id, record.file, scored, literal, found.is_open)

    def _scored(self, messages: Messages) -> list[int]:
        """The numbers of the messages that are scored; their own weights are taken off them."""
        chosen = []
        for number, message in enumerate(messages):
            own = [message.pop(key) for key in OWN_WEIGHT if key in message]
            if any(weight not in (0, 1) for weight in own):
                raise DataError(f"The weight of message {number} is {own[0]!r}: 0 or 1 says whether it is scored.")
            if own[0] if own else message["role"] in self.roles:
                chosen.append(number)
        return chosen[-1:] if self.last_only else chosen

    @cached_property
    def closer(self) -> re.Pattern[str]:
        """A control token at the end of a text, and white space behind it."""
        return re.compile(f"({'|'.join(map(re.escape, self.special))})\\s*\\Z")

    @property
    def notes(self) -> list[str]:
        """What the template writes of its own accord: a system prompt, and nothing that ends an answer."""
        first, answer, second = (secrets.token_hex(8) for _ in range(3))
        roles = ("user", ASSISTANT, "user")
        messages = [{"role": role, "content": text} for role, text in zip(roles, (first, answer, second), strict=True)]
        try:
            text = self.template.render(messages)
            (turn,) = _Rendering(self, messages[:2], None).texts([1])
        except (DataError, _Unclear):
            return []
        notes = []
        if prompt := self._own_prompt(text.partition(first)[0], text.partition(answer)[2].partition(second)[0]):
            notes.append(f"Where no system message begins a conversation, the template writes {prompt!r}.")
        if not any(self.closer.search(turn.text[begin:end]) for begin, end in turn.scored):
            notes.append(
                "Warning: no control token ends what the template writes of an answer, or {% generation %} leaves it "
                "out: the model does not learn to stop there."
            )
        return notes

    def _own_prompt(self, before: str, between: str) -> str:
        """What a template writes before the first question, but not before the second."""
        control = re.compile(f"({'|'.join(map(re.escape, self.special))})")
        pieces, others = (control.split(text)[::-1] for text in (before, between))
        # How both end is a question's header.
        alike = list(takewhile(lambda pair: pair[0] == pair[1], zip(pieces, others, strict=False)))
        written = "".join(pieces[len(alike) :][::-1])
        return written if re.search(r"\w", control.sub("", written)) else ""


class _Text(NamedTuple):
    """A rendered conversation, or the first turns of it."""

    text: str
    scored: Spans
    is_open: bool
    """Whether no control token ends the last answer, with which the text ends."""
    is_part: bool = False


@dataclass(frozen=True)
class _Rendering:
    """One conversation, and what the template makes of it and of its beginnings."""

    how: Conversations
    messages: Messages
    tools: Tools
    rendered: dict[tuple[int, bool], str] = field(default_factory=dict)
    """By the number of messages, and with the generation prompt or without."""

    def texts(self, scored: list[int]) -> list[_Text]:
        """The conversation with its answers; or one text for each answer, where the template writes the turns before
        the last one otherwise than it wrote them when they were the last.

        Raises DataError where the template knows no content in parts, and shows it as Python does.
        """
        texts = self._texts(scored)
        for content in (message.get("content") for message in self.messages):
            if content and isinstance(content, list | dict) and any(str(content) in found.text for found in texts):
                raise DataError(
                    "The chat template does not know content in parts: give it as text, or another template."
                )
        return texts

    def _texts(self, scored: list[int]) -> list[_Text]:
        roles = {self.messages[number]["role"] for number in scored}
        if self.how.template.marks_answers and roles == {ASSISTANT} and (marked := self._marked(scored)):
            return [marked]
        if len(scored) * len(self.messages) > MAX_MESSAGES_RENDERED:
            raise DataError(
                f"It is too long to find {len(scored):,} answers in {len(self.messages):,} messages, each of which is "
                "rendered with all before it: shorten it, or use a template with {% generation %}, or --loss last."
            )
        whole = self._render(len(self.messages))
        if all(whole.startswith(self._prefix(number + 1)) for number in scored):
            return [self._with_answers(whole, scored)]
        ends = [number + 1 for number in scored]
        return [self._with_answers(self._render(end), [end - 1])._replace(is_part=True) for end in ends]

    def _marked(self, scored: list[int]) -> _Text | None:
        """The answers as the template marks them; None where it cannot be told which mark is whose."""
        text, spans = self.how.template.render_marked(self.messages, self.tools)
        answers = [number for number, message in enumerate(self.messages) if message["role"] == ASSISTANT]
        if answers != scored:
            if len(spans) != len(answers):
                return None
            spans = [span for number, span in zip(answers, spans, strict=True) if number in scored]
        return _Text(text, tuple((begin, end) for begin, end in spans if begin < end), is_open=False)

    def _with_answers(self, text: str, scored: list[int]) -> _Text:
        spans, is_open = [], False
        for number in scored:
            begin, end = self._begin(text, number), len(self._prefix(number + 1))
            closer = self.how.closer.search(text, begin, end)
            is_open = closer is None and end == len(text)
            spans.append((begin, closer.end(1) if closer else begin + len(text[begin:end].rstrip())))
        return _Text(text, tuple(spans), is_open)

    def _begin(self, text: str, number: int) -> int:
        """Where message ``number`` begins in a text, behind its header."""
        if self.messages[number]["role"] == ASSISTANT and number and self._prompts_generation:
            context = self._render(number, add_generation_prompt=True)
            if text.startswith(context):
                return len(context)
        # Without a generation prompt: the header is what the template writes before the content.
        mark = secrets.token_hex(16)
        message = self.messages[number]
        content = [{"type": "text", "text": mark}] if isinstance(message.get("content"), list) else mark
        marked = [*self.messages[:number], {**message, "content": content}]
        header, found, _ = self.how.template.render(marked, tools=self.tools).partition(mark)
        if not found or not text.startswith(header):
            raise _Unclear(f"it cannot be told where the text of message {number} begins in what the template writes")
        return len(header)

    @cached_property
    def _prompts_generation(self) -> bool:
        """Whether the template writes something ahead of an answer that is to come."""
        first = next(number for number, message in enumerate(self.messages) if message["role"] == ASSISTANT and number)
        return self._render(first, add_generation_prompt=True) != self._prefix(first)

    def _prefix(self, end: int) -> str:
        """The first messages; a text that is none where the template refuses them."""
        try:
            return self._render(end)
        except DataError:
            return "\0"

    def _render(self, end: int, *, add_generation_prompt: bool = False) -> str:
        key = end, add_generation_prompt
        if key not in self.rendered:
            messages, render = self.messages[:end], self.how.template.render
            self.rendered[key] = render(messages, tools=self.tools, add_generation_prompt=add_generation_prompt)
        return self.rendered[key]


@dataclass(frozen=True)
class _Disguise:
    """Words that stand for the control tokens that messages spell, while the template writes them."""

    words: dict[str, str]
    """By token."""

    @classmethod
    def of(cls, special: Sequence[str], values: object) -> _Disguise:
        written = orjson.dumps(values).decode()
        spelled = [token for token in special if orjson.dumps(token).decode()[1:-1] in written]
        secret = secrets.token_hex(8)
        return cls({token: f"{secret}x{number}x" for number, token in enumerate(spelled)})

    @property
    def is_needed(self) -> bool:
        return bool(self.words)

    def put_on(self, value: Any) -> Any:
        """A value in whose texts words stand for the tokens."""
        if isinstance(value, str):
            pattern = "|".join(map(re.escape, sorted(self.words, key=len, reverse=True)))
            return re.sub(pattern, lambda found: self.words[found[0]], value) if self.words else value
        if isinstance(value, dict):
            return {key: self.put_on(each) for key, each in value.items()}
        return [self.put_on(each) for each in value] if isinstance(value, list) else value

    def take_off(self, text: str, spans: Spans) -> tuple[str, Spans, Spans]:
        """The text with the tokens in place of the words, where these tokens are in it, and the spans in it."""
        if not self.words:
            return text, (), spans
        tokens = {word: token for token, word in self.words.items()}
        edits = [(*found.span(), tokens[found[0]]) for found in re.finditer("|".join(tokens), text)]
        restored, moved = replaced(text, edits, [*spans, *(edit[:2] for edit in edits)])
        return restored, moved[len(spans) :], moved[: len(spans)]


def _as_tools(given: Any) -> Tools:
    """The tools of a record: a list of JSON schemas, or that list as text. Raises DataError for anything else."""
    try:
        tools = orjson.loads(given) if isinstance(given, str) else given
    except orjson.JSONDecodeError as error:
        raise DataError(f"Its tools are no JSON: {error}.") from None
    if tools is None or (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        return tools
    raise DataError(f"Its tools are no list of JSON schemas: {tools!r:.80}.")


def _says_something(message: Mapping[str, Any]) -> bool:
    return any(value for key, value in message.items() if key not in ("role", "name", "tool_call_id"))


@dataclass(frozen=True)
class Answers:
    """What was given on the command line of conversations, prompts and answers, and of labels."""

    chat: bool = False
    messages_key: str | None = None
    tools_key: str | None = None
    loss: str | None = None
    train_on_roles: Sequence[str] = ()
    chat_date: str | None = None
    prompt_key: str | None = None
    answer_key: str | None = None
    source_key: str | None = None
    target_key: str | None = None
    target_tokenizer: Path | None = None
    max_tokens: int | None = None
    label_key: str | None = None
    text_pair_key: str | None = None
    label_names: str | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Answers:
        """Those among all options of a command."""
        return cls(**{each.name: given[each.name] for each in fields(cls) if given[each.name]})

    def read(self, read: ReadOptions) -> ReadOptions:
        """With what is read of each record. Raises ConfigError where options do not belong together."""
        given = {f"--{name.replace('_', '-')}": value for name, value in vars(self).items() if value}
        of_chat = {"--messages-key", "--tools-key", "--loss", "--train-on-roles", "--chat-date"} & given.keys()
        of_answers = {"--prompt-key", "--answer-key"} & given.keys()
        of_pairs = of_answers | ({"--source-key", "--target-key"} & given.keys())
        if of_labels := {"--label-key", "--text-pair-key", "--label-names"} & given.keys():
            return self._read_labeled(read, of_labels, given.keys() - of_labels)
        if of_chat and not self.chat:
            raise ConfigError(f"{', '.join(sorted(of_chat))} would do nothing: it is for conversations, --chat.")
        if self.chat and of_pairs:
            raise ConfigError(
                "--chat reads conversations, --prompt-key and --answer-key, or --source-key and --target-key, pairs: "
                "give one of them."
            )
        if len(of_answers) == 1 or len(of_pairs - of_answers) == 1:
            raise ConfigError(
                "--prompt-key and --answer-key belong together, and so do --source-key and --target-key: give both."
            )
        if self.target_tokenizer is not None and self.source_key is None:
            raise ConfigError("--target-tokenizer would do nothing: it is for pairs, --source-key and --target-key.")
        if len(of_pairs) == 4:
            raise ConfigError(
                "--prompt-key makes examples for a decoder, --source-key for an encoder: give one of them."
            )
        if self.max_tokens is not None and not (self.chat or of_pairs):
            raise ConfigError("--max-tokens would do nothing: plain documents are cut as they are read for training.")
        if not self.chat and not of_pairs:
            return read
        if read.text_key != ReadOptions.text_key:
            raise ConfigError("--text-key would do nothing: it is for plain documents.")
        if self.chat:
            kind = Fields((self.tools_key or "tools",), is_chat=True, option="--messages-key")
            return replace(read, text_key=self.messages_key or "messages", fields=kind)
        first, second = (self.prompt_key, self.answer_key) if of_answers else (self.source_key, self.target_key)
        kind = Fields((second or "",), is_chat=False, option="--prompt-key" if of_answers else "--source-key")
        return replace(read, text_key=first or "", fields=kind)

    def _read_labeled(self, read: ReadOptions, of_labels: set[str], others: set[str]) -> ReadOptions:
        if self.label_key is None:
            raise ConfigError(f"{', '.join(sorted(of_labels))} would do nothing: it is for labels, --label-key.")
        if others:
            raise ConfigError(f"--label-key reads texts and their labels: leave out {', '.join(sorted(others))}.")
        keys = (self.label_key, *([self.text_pair_key] if self.text_pair_key else []))
        return replace(read, fields=Fields(keys, is_chat=False, option="--text-key"))

    def supervision(
        self, tokenizer: Path, eod_token: str, bos_token: str | None
    ) -> Conversations | PromptAndAnswer | SourceAndTarget | LabeledText | None:
        """What makes the examples. Raises ConfigError where the tokenizer has no chat template."""
        if self.label_key:
            names = None if self.label_names is None else read_label_names(self.label_names)
            return LabeledText(eod_token, self.text_pair_key is not None, names)
        if self.source_key:
            target = None
            if self.target_tokenizer is not None:
                target = load_tokenizer(self.target_tokenizer.expanduser(), eod_token)
            return SourceAndTarget(eod_token, self.max_tokens, target)
        if not self.chat:
            return PromptAndAnswer(self.max_tokens) if self.prompt_key else None
        try:
            clock = None if self.chat_date is None else date.fromisoformat(self.chat_date)
        except ValueError:
            raise ConfigError(f"--chat-date {self.chat_date} is no date, such as {CLOCK}.") from None
        template, files = load_template(tokenizer, clock)
        special = load_tokenizer(tokenizer, eod_token, bos_token).special
        if bos_token is not None and not template.begins_with(bos_token):
            raise ConfigError(
                f"--bos-token {bos_token}: the chat template does not begin with it, and so does no prompt of a "
                "chat. Leave out --bos-token, or have the template begin with {{ bos_token }}."
            )
        roles = tuple(self.train_on_roles) or (ASSISTANT,)
        return Conversations(template, files, special, roles, self.loss == "last", self.max_tokens)


def load_template(tokenizer: Path, clock: date | None) -> tuple[ChatTemplate, dict[str, bytes]]:
    """The chat template beside a tokenizer.json, and the files that it is from. Raises ConfigError.

    ``clock``: the day that it is told; None: the folder's own.
    """
    folder = tokenizer if tokenizer.is_dir() else tokenizer.parent
    files = {name: (folder / name).read_bytes() for name in TEMPLATE_FILES if (folder / name).is_file()}
    template = ChatTemplate.of_files(files)
    if template is None:
        raise ConfigError(
            f"{folder} has no chat template: put a chat_template.jinja beside its tokenizer.json, or give a folder "
            "that AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER) of transformers wrote."
        )
    return template if clock is None else replace(template, clock=clock), files
