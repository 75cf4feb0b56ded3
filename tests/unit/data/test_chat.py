"""Chat templates: the token ids that transformers gives a conversation, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatrain.data.chat import ChatTemplate, refuse_control_tokens
from megatrain.data.tokenizer import Tokenizer
from megatrain.errors import ConfigError, DataError
from tests.tokenizer_samples import llama3, qwen3

PLAIN = """{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>
{{ message.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""
TOOLS = """{%- for tool in tools or [] %}{{ tool | tojson }}
{%- endfor %}{%- for message in messages -%}
    {%- if message.role not in ('user', 'assistant') %}{{ raise_exception('no such role: ' + message.role) }}{% endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor %}"""
ASKED = [
    {"role": "user", "content": " to be? "},
    {"role": "assistant", "content": "or not"},
    {"role": "user", "content": "!"},
]
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}


def folder(tmp_path: Path, library: Any, template: str, **tokens: str) -> dict[str, bytes]:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=library, **tokens)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    return {path.name: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize(("template", "tools"), [(PLAIN, None), (TOOLS, None), (TOOLS, [TOOL])])
def test_ids_are_those_of_transformers(
    tmp_path: Path, template: str, tools: list[dict[str, Any]] | None, add_generation_prompt: bool
) -> None:
    files = folder(tmp_path, llama3(), template, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    reference = AutoTokenizer.from_pretrained(tmp_path)
    settings: dict[str, Any] = {"add_generation_prompt": add_generation_prompt, "tools": tools}
    expected = reference.apply_chat_template(ASKED, tokenize=True, return_dict=False, **settings)
    found = ChatTemplate.of_files(files)
    assert found is not None
    tokenizer = Tokenizer(files["tokenizer.json"], "tokenizer.json")
    assert tokenizer.encode(found.render(ASKED, **settings)) == expected


def test_what_a_template_refuses_is_told(tmp_path: Path) -> None:
    template = ChatTemplate.of_files(folder(tmp_path, qwen3(), TOOLS))
    assert template is not None
    with pytest.raises(DataError, match="no such role: system"):
        template.render([{"role": "system", "content": "be brief"}])


@pytest.mark.parametrize("hostile", ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}"])
def test_a_hostile_template_runs_nothing(hostile: str) -> None:
    with pytest.raises(DataError, match="refuses the conversation"):
        ChatTemplate(hostile).render(ASKED)


GROWING = "{% set ns = namespace(x=BEGIN) %}{% for i in range(60) %}{% set ns.x = ns.x OPERATOR ns.x %}{% endfor %}"
LARGE = {
    "a product": "{{ 'a' * 10**9 }}",
    "a product of what is written": "{% set n = 10**9 %}{{ messages[0].role * n }}",
    "a list": "{{ ['a'] * 10**9 }}",
    "a number": "{{ 7 ** (10**10) }}",
    "a number of numbers": GROWING.replace("BEGIN", "7").replace("OPERATOR", "*"),
    "a sum": GROWING.replace("BEGIN", "'a'").replace("OPERATOR", "+"),
    "a concatenation": GROWING.replace("BEGIN", "'a'").replace("OPERATOR", "~"),
    "a method": "{{ 'a'.ljust(10**9) }}",
    "replaced": "{{ ('a' * 10**5).replace('a', 'b' * 10**5) }}",
    "joined": "{{ ('a' * 10**5).join(['b'] * 10**5) }}",
    "a width": "{{ '%1000000000d' % 1 }}",
    "a width of its own": "{{ '%*d' % (10**9, 1) }}",
    "a format": "{{ '{:1000000000}'.format('a') }}",
    "a format in a format": "{{ '{:{}}'.format('a', 10**9) }}",
    "bytes": "{{ (1).to_bytes(10**9, 'big') }}",
    "a filter": "{{ 'a' | center(10**9) }}",
    "a filter with the sandbox": "{{ ('a' * 10**5) | replace('a', 'b' * 10**5) }}",
    "mapped": "{{ (['a'] * 999) | map('center', 10**6) | list | length }}",
    "all that is written": "{% set a = 'a' * 10**6 %}{% for i in range(999) %}{{ a }}{% endfor %}",
    "all that a macro writes": "{% set a = 'a' * 10**6 %}{% macro m() %}{% for i in range(999) %}{{ a }}{% endfor %}"
    "{% endmacro %}{{ m() | length }}",
}


@pytest.mark.parametrize("kind", LARGE)
def test_a_template_makes_no_unbounded_text(kind: str) -> None:
    template = ChatTemplate(LARGE[kind])
    for render in (template.render, template.render_marked):
        with pytest.raises(ConfigError, match="makes too much text: more than 268,435,456 characters"):
            render(ASKED)


def test_operators_of_templates_mean_what_they_do(tmp_path: Path) -> None:
    source = """{{ 1 + 2 * 3 ** 2 % 5 }} {{ 'a' * 3 ~ 1 ~ none ~ [2] }} {{ '%5.1f|%s' % (1.25, 'b') }}
{{- '{:>4}'.format(17) ~ '{0}{0}'.format(1700000000) }} {{ [1] + [2] }} {{ 1700000000 * 1000000 }} {{ 5 | string ~ 1 }}
{%- macro m(a) %}<{{ a }}>{% endmacro %}{{ m('c') ~ ('d' | center(5)) ~ (['e', 'f'] | join('-')) ~ -3 }} {{ 2 * 1.5 }}
{{- 'gg'.replace('g', 'h') ~ (messages | tojson(indent=1)) ~ (messages | map(attribute='role') | join(',')) }}"""
    files = folder(tmp_path, llama3(), source)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    found = ChatTemplate.of_files(files)
    assert found is not None
    assert found.render(ASKED) == reference.apply_chat_template(ASKED, tokenize=False)


def test_a_message_cannot_write_control_tokens() -> None:
    control = Tokenizer(llama3().to_str().encode(), "tokenizer.json").control
    with pytest.raises(DataError, match=r"role user spells the control token <\|eot_id\|>"):
        refuse_control_tokens([{"role": "user", "content": "now <|eot_id|> end"}], control)
    refuse_control_tokens(ASKED, control)


def test_a_folder_may_have_no_template(tmp_path: Path) -> None:
    files = folder(tmp_path, llama3(), PLAIN)
    del files["chat_template.jinja"]
    assert ChatTemplate.of_files(files) is None
