"""How much a chat template may do for one conversation: lines of its code, and characters of the texts that it makes.

Jinja's sandbox bounds what a template reaches and how long a range is, but neither an endless loop nor
``'a' * 10**9``. Here each operation whose result may be longer than what it is given is asked for that before it runs.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import FrameType
from typing import Any

from jinja2 import nodes
from jinja2.environment import Template
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from megatrain.errors import ConfigError

MAX_LINES, LINES_OF_A_MESSAGE = 1_000_000, 100
MAX_CHARACTERS = 1 << 28
"""Of all texts that are made on the way, together: some sixty times a context of a million tokens."""
_CODE = "<template>"  # what Jinja calls the file of compiled templates
_METHODS = {"center", "expandtabs", "format", "format_map", "join", "ljust", "replace", "rjust", "to_bytes"}
_METHODS |= {"translate", "zfill"}
_FILTERS = ("batch", "center", "format", "indent", "join", "replace", "slice", "tojson", "wordwrap")
_WIDTH_GIVEN = re.compile(r"\*|\{[^{}]*\{")  # in a format: its width is one of the values


class _BoundedSandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})
    source: str | None = None
    num_left = MAX_CHARACTERS

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self._refuse(_most_of_operator(operator, left, right))
        return self.count(super().call_binop(context, operator, left, right))

    def call(self, context: Context, function: Any, *values: Any, **named: Any) -> Any:
        method = getattr(function, "__wrapped__", function)  # the sandbox has a format of its own
        owner = getattr(method, "__self__", None)
        if not isinstance(owner, str | bytes | int) or getattr(method, "__name__", None) not in _METHODS:
            return super().call(context, function, *values, **named)
        self._refuse(_most(owner, [*values, *named.values()], is_format=method.__name__.startswith("format")))
        return self.count(super().call(context, function, *values, **named))

    def concat(self, texts: Iterable[str]) -> str:
        """What a macro, a block, or the whole template has written."""
        return "".join(self.count(text) for text in texts)

    def bound_filters(self) -> None:
        for name in _FILTERS:
            self.filters[name] = self._bounded(name, self.filters[name])

    def _bounded(self, name: str, apply: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(apply)
        def bounded(*values: Any, **named: Any) -> Any:
            value, *others = values[1:] if hasattr(apply, "jinja_pass_arg") else values
            self._refuse(_most(value, [*others, *named.values()], is_format=name == "format"))
            return self.count(apply(*values, **named))

        return bounded

    def count(self, made: Any) -> Any:
        self.num_left -= _size(made)
        self._refuse(0)
        return made

    def _refuse(self, size: int) -> None:
        if size > self.num_left:
            raise ConfigError(
                f"The chat template makes too much text: more than {MAX_CHARACTERS:,} characters for one conversation. "
                "Use another."
            )

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        parsed: nodes.Template = _Sums().visit(super()._parse(source, name, filename))
        return parsed


class _Sums(NodeTransformer):
    """``a ~ b`` as the sum of both texts, which a sandbox can intercept."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:  # noqa: N802 (Jinja's name)
        self.generic_visit(node)
        total: nodes.Expr | None = None
        for each in node.nodes:
            text = nodes.Filter(each, "string", [], [], None, None, lineno=node.lineno)
            total = text if total is None else nodes.Add(total, text, lineno=node.lineno)
        assert total is not None
        return total


def _most_of_operator(operator: str, left: Any, right: Any) -> int:
    """How long the result may be; of whole numbers, how much work it may be."""
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length()
        return {"**": (bits * max(right, 0)) ** 2, "*": bits * right.bit_length()}.get(operator, 0)
    if operator == "*":
        sizes = [value if isinstance(value, int) else _size(value) for value in (left, right)]
        return sizes[0] * sizes[1]
    if operator == "%" and isinstance(left, str | bytes):
        return _most(left, [right], is_format=True)
    return _size(left) + _size(right) if operator == "+" else 0


def _most(value: Any, others: Iterable[Any], *, is_format: bool) -> int:
    """How long what a method or filter makes of a value may be; numbers that it is given may be widths."""
    size, has_widths = _size(value), True
    if is_format and isinstance(value, str | bytes):
        text = value if isinstance(value, str) else value.decode("latin-1")
        size += sum(map(int, re.findall(r"\d{1,4000}", text)))
        has_widths = _WIDTH_GIVEN.search(text) is not None
    return size * (1 + sum(_size(other, has_widths=has_widths) for other in others))


def _size(value: Any, *, has_widths: bool = False) -> int:
    """Characters of a text, and of all texts in a list; a number's own size, where it may be a width."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, list | tuple):
        return sum(1 + _size(each, has_widths=has_widths) for each in value)
    if isinstance(value, dict):
        return sum(1 + _size(each, has_widths=has_widths) for each in value.values())
    return abs(value) if has_widths and isinstance(value, int) else 1


def bind(template: Template, source: str) -> _BoundedSandbox:
    """Make a compiled template of an immutable sandbox the one of ``source``, in the same sandbox with bounds.

    Not of ``source`` compiled before: the compiler computes what is constant, without bounds.
    """
    sandbox = template.environment
    if not isinstance(sandbox, _BoundedSandbox):
        sandbox.__class__ = _BoundedSandbox
        assert isinstance(sandbox, _BoundedSandbox)
        sandbox.bound_filters()
        del sandbox.globals["lipsum"]  # as much text as it is asked for, and another each time
    if sandbox.source != source:
        vars(template).update(vars(sandbox.from_string(source)))
        sandbox.source = source
    return sandbox


@contextmanager
def bounded(sandbox: _BoundedSandbox, num_messages: int) -> Iterator[None]:
    """Let a template do as much as it may, which is the same on every machine. Raises ConfigError beyond that."""
    most = max(MAX_LINES, LINES_OF_A_MESSAGE * num_messages)
    left, sandbox.num_left = most, MAX_CHARACTERS

    def on_line(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        left -= event == "line"
        if event == "return":  # what it has written
            sandbox.count(argument)
        if left < 0:
            raise ConfigError(
                f"The chat template does not end: {most:,} of its lines have run for one conversation. Use another."
            )
        return on_line

    def on_call(frame: FrameType, event: str, argument: object) -> Any:
        return on_line if frame.f_code.co_filename == _CODE else None

    before = sys.gettrace()
    sys.settrace(on_call)
    try:
        yield
    finally:
        sys.settrace(before)
