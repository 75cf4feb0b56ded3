"""Conversations into text, by the chat template of a tokenizer folder and transformers' own renderer (its sandbox)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from megatrain.errors import ConfigError, DataError

TEMPLATE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
Message = Mapping[str, Any]
"""``role`` and ``content``, and whatever else a template reads."""


@dataclass(frozen=True)
class ChatTemplate:
    """``source``: Jinja; ``special_tokens``: what it may write, such as ``bos_token``, by transformers' names."""

    source: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_files(cls, files: Mapping[str, bytes]) -> ChatTemplate | None:
        """That of a tokenizer folder's files; None where it has none."""
        settings = orjson.loads(files.get(TOKENIZER_CONFIG, b"{}"))
        source = files[TEMPLATE].decode() if TEMPLATE in files else settings.get("chat_template")
        if isinstance(source, list):  # several by name
            source = {each["name"]: each["template"] for each in source}.get("default")
        if not isinstance(source, str):
            return None
        tokens = {key: _text(value) for key, value in settings.items() if key.endswith("_token")}
        return cls(source, {key: text for key, text in tokens.items() if text is not None})

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The conversation as text; ``add_generation_prompt``: with what begins the next answer.

        Raises DataError for a conversation that the template refuses, ConfigError where transformers is not installed.
        """
        try:
            from transformers.utils.chat_template_utils import render_jinja_template
        except ImportError:
            raise ConfigError("Chat templates are rendered by transformers: pip install 'megatrain[chat]'.") from None
        known: dict[str, Any] = {
            **self.special_tokens,
            "chat_template": self.source,
            "tools": None if tools is None else list(tools),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            rendered: Any = render_jinja_template([[dict(message) for message in messages]], **known)
        except Exception as error:  # noqa: BLE001 - a template may raise whatever its operators do
            raise DataError(f"The chat template refuses the conversation: {error}") from None
        return str(rendered[0][0])


def refuse_control_tokens(messages: Sequence[Message], control: Mapping[str, int]) -> None:
    """Raise DataError where a message's text spells a control token: it would become one."""
    for message in messages:
        content = message.get("content")
        found = next((token for token in control if isinstance(content, str) and token in content), None)
        if found is not None:
            raise DataError(f"A message of the role {message.get('role')} spells the control token {found}.")


def _text(token: Any) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
