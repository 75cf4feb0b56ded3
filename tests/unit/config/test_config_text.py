"""The YAML reader: what scalars mean, and hostile or careless text."""

from __future__ import annotations

import time

import pytest

from megatrain.config.document import read
from megatrain.config.scalar import scalar


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1e-3", 1e-3),
        ("1.0e-3", 1e-3),
        ("1E5", 1e5),
        (".5", 0.5),
        ("5.", 5.0),
        ("-2", -2),
        ("+3", 3),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("-.inf", float("-inf")),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("off", "off"),
        ("1_000", "1_000"),
        ("12:30:45", "12:30:45"),
        ("2024-01-01", "2024-01-01"),
        ("e5", "e5"),
        ("1e", "1e"),
        ("١", "١"),
        ("1\n", "1\n"),
    ],
)
def test_scalars_are_read_by_yaml_1_2(text, value):
    read_value = scalar(text)
    assert (read_value, type(read_value)) == (value, type(value))


def test_quoted_text_stays_text():
    assert read("a: '3e-4'\nb: \"true\"\nc: |\n  5\n", "x").tree == {"a": "3e-4", "b": "true", "c": "5\n"}


def test_a_repeated_key_is_refused_with_both_lines(refused, with_line):
    message = refused(text=with_line("optimizer:", "  lr: 1", "  eps: 1e-8", "  lr: 2"))
    assert "optimizer.lr (line 6): 2 given; line 8: duplicate key, first on line 6; keep one" in message
    message = refused(text=with_line("observe: {log_every_steps: 1}", "observe: {log_every_steps: 2}"))
    assert "observe (line 6): a mapping given; line 7: duplicate key, first on line 6" in message


def test_a_repeated_key_in_an_override_is_refused(refused):
    assert "duplicate key" in refused("data.train=[{path: a, path: b}]")


def test_a_broken_file_is_refused_by_place(refused, with_line):
    assert "run.yaml, line 6, column 1: not valid YAML" in refused(text=with_line("optimizer: {lr: 1"))
    assert "line 6, column 1: not valid YAML: while scanning for the next token" in refused(
        text=with_line("\toptimizer: {lr: 1}")
    )
    assert "line 6: not valid YAML: unacceptable character #x0000" in refused(text=with_line("a: \0"))
    assert "but found another document" in refused(text=with_line("---", "a: b"))
    assert "found undefined alias" in refused(text=with_line("optimizer: *other"))


def test_anchors_may_be_used(loaded, with_line):
    text = with_line("data:", "  seq_len: 256", "  train: [&code {path: data/code}, *code]")
    assert [dataset.path for dataset in loaded(text=text).data.train] == ["data/code", "data/code"]


def test_merge_keys_fill_in_what_is_missing(loaded, with_line):
    base = "x-base: &base {lr: 1.0e-3, weight_decay: 0.5}"
    more = "x-more: &more {<<: *base, eps: 1.0e-6, weight_decay: 0.25}"
    assert loaded(text=with_line(base, "optimizer: {<<: *base, lr: 2.0e-3}")).optimizer.lr == 2.0e-3
    optimizer = loaded(text=with_line(base, more, "optimizer: {<<: [*more, *base]}")).optimizer
    assert (optimizer.lr, optimizer.eps, optimizer.weight_decay) == (1.0e-3, 1.0e-6, 0.25)


def test_a_merge_key_merges_mappings_alone(refused, with_line):
    message = refused(text=with_line("x-base: &base [1]", "optimizer: {<<: *base, lr: 1.0e-3}"))
    assert "optimizer.<<" in message
    assert "merges a mapping, or a list of mappings" in message


def test_a_typo_in_merged_keys_is_refused(refused, with_line):
    message = refused(text=with_line("x-base: &base {lr: 1.0e-3, wait_decay: 0.5}", "optimizer: {<<: *base}"))
    assert "optimizer.wait_decay (line 5): 0.5 given; no such key; nearest: optimizer.weight_decay" in message


def test_keys_that_begin_with_x_are_left_alone(loaded, with_line):
    assert loaded(text=with_line("x-note: !!set {any: thing}", "x-note: twice")) == loaded()


def test_unbounded_aliases_are_refused_at_once(refused, with_line):
    bomb = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    bomb += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 15)]
    start = time.perf_counter()
    assert "no config needs that" in refused(text=with_line(*bomb))
    assert "more than 20 levels" in refused(text=with_line("a: &a [*a]"))
    assert "more than 20 levels" in refused(text=with_line("a: &a {<<: *a}"))
    bomb = ["x-0: &a0 {x: 1}"]
    bomb += [f"x-{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 15)]
    assert "no config needs that" in refused(text=with_line(*bomb, "a: *a14"))
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("text", ["[" * 50_000, "a: " + "{b: " * 5_000, "- " * 20_000, "x" * 300_000])
def test_text_too_deep_or_long_is_refused(refused, text):
    assert "run.yaml" in refused(text=text)


@pytest.mark.parametrize("value", ["!!python/object/apply:os.system ['true']", "!!int '5'", "!mine 5"])
def test_tags_are_refused_and_construct_nothing(refused, with_line, value):
    assert "optimizer.lr (line 5): " in refused(text=with_line(f"optimizer: {{lr: {value}}}"))
    assert "tags are not used in a config" in refused(text=with_line(f"optimizer: {{lr: {value}}}"))


def test_a_key_that_is_a_list_is_refused(refused, with_line):
    assert "a key must be one word" in refused(text=with_line("? [a, b]", ": 5"))
