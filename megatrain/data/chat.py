"""Conversations into text, by the chat template of a tokenizer folder and transformers' own renderer (its sandbox)."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any

import orjson

from megatrain.errors import ConfigError, DataError

TEMPLATE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
CLOCK = date(2024, 7, 26)
"""The day that templates are told by ``strftime_now``: what they write does not depend on when it is written. It is
what Llama 3's templates write where there is no clock.
"""
CHAT_DATE = "chat_date"
"""The key of tokenizer_config.json under which an export keeps another day, which its model was trained with."""

Message = Mapping[str, Any]
"""``role`` and ``content``, and whatever else a template reads."""
Spans = Sequence[tuple[int, int]]
"""Runs of characters, [begin, end), ascending."""


@dataclass(frozen=True)
class ChatTemplate:
    """``source``: Jinja; ``special_tokens``: what it may write, such as ``bos_token``, by transformers' names."""

    source: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    clock: date = CLOCK

    @classmethod
    def of_files(cls, files: Mapping[str, bytes]) -> ChatTemplate | None:
        """That of a tokenizer folder's files, with the day that an export keeps; None where it has none."""
        settings = orjson.loads(files.get(TOKENIZER_CONFIG, b"{}"))
        source = files[TEMPLATE].decode() if TEMPLATE in files else settings.get("chat_template")
        if isinstance(source, list):  # several by name
            source = {each["name"]: each["template"] for each in source}.get("default")
        if not isinstance(source, str):
            return None
        tokens = {key: _text(value) for key, value in settings.items() if key.endswith("_token")}
        return cls(source, {key: text for key, text in tokens.items() if text is not None}, _day(settings))

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.source.encode()).hexdigest()

    @property
    def reads_clock(self) -> bool:
        return "strftime_now" in self.source

    @property
    def marks_answers(self) -> bool:
        """Whether it says itself which of its text is generated, by ``{% generation %}``."""
        return "endgeneration" in self.source

    def begins_with(self, token: str) -> bool:
        """Whether it writes this token before a question."""
        return self.render([{"role": "user", "content": "?"}]).startswith(token)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The conversation as text; ``add_generation_prompt``: with what begins the next answer.

        Raises DataError for a conversation that the template refuses; ConfigError for a template that does not end or
        makes too much text, and where transformers is not installed.
        """
        return self._render(messages, tools, add_generation_prompt=add_generation_prompt)[0]

    def render_marked(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> tuple[str, Spans]:
        """The conversation as text, and which of it the template marks as generated. Raises what ``render`` does."""
        return self._render(messages, tools, return_assistant_tokens_mask=True)

    def turn_end(self, control: Mapping[str, int]) -> str | None:
        """The control token that it writes behind an answer; None where it writes none, or refuses to be asked."""
        answer = "an answer to it"
        try:
            text = self.render([{"role": "user", "content": "a question"}, {"role": "assistant", "content": answer}])
        except (ConfigError, DataError):
            return None
        behind = text.rpartition(answer)[2].lstrip()
        return max((token for token in control if behind.startswith(token)), key=len, default=None)

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, **how: bool
    ) -> tuple[str, Spans]:
        from megatrain.data.bounded_template import bind, bounded

        try:
            from transformers.utils import chat_template_utils
        except ImportError:
            raise ConfigError("Chat templates are rendered by transformers: pip install 'megatrain[chat]'.") from None
        # A template of the renderer's own, which it compiles and keeps by this name; bind has it do as this one does.
        name = f"{{# {{% generation %}} {self.sha256} #}}"
        known: dict[str, Any] = {
            **self.special_tokens,
            **how,
            "chat_template": name,
            "tools": None if tools is None else list(tools),
        }
        try:
            sandbox = bind(chat_template_utils._compile_jinja_template(name), self.source)
            sandbox.globals["strftime_now"] = self.clock.strftime
            with bounded(sandbox, len(messages)):
                rendered: Any = chat_template_utils.render_jinja_template([list(map(dict, messages))], **known)
        except ConfigError:
            raise
        except Exception as error:  # noqa: BLE001 - a template may raise whatever its operators do
            raise DataError(f"The chat template refuses the conversation: {error}") from None
        texts, marked = rendered
        return str(texts[0]), marked[0] if marked else ()


def refuse_control_tokens(messages: Sequence[Message], special: Collection[str]) -> None:
    """Raise DataError where a message's text spells one of the ``special`` tokens: it would become one."""
    for message in messages:
        content = message.get("content")
        found = next((token for token in special if isinstance(content, str) and token in content), None)
        if found is not None:
            raise DataError(f"A message of the role {message.get('role')} spells the control token {found}.")


def _day(settings: Mapping[str, Any]) -> date:
    try:
        return date.fromisoformat(settings[CHAT_DATE])
    except (KeyError, TypeError, ValueError):
        return CLOCK


def _text(token: Any) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
