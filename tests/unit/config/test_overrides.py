"""KEY=VALUE on the command line."""

from __future__ import annotations

import pytest


def test_the_command_line_sets_any_leaf(loaded):
    config = loaded(
        "run.dir=runs/other",
        "data.train.0.weight=2",
        "optimizer.betas.1=0.98",
        "optimizer.lr=3e-4",
        "model.rope_scaling.rope_type=linear",
        "model.rope_scaling.factor=2",
        "parallel.recompute=full",
        "run.init_from=runs/first",
        "observe.tensorboard=false",
    )
    assert config.run.dir == "runs/other"
    assert config.data.train[0].weight == 2.0
    assert config.optimizer.betas == (0.9, 0.98)
    assert config.optimizer.lr == 3e-4
    assert config.model.rope_scaling is not None
    assert config.model.rope_scaling.factor == 2.0
    assert config.run.init_from == "runs/first"
    assert config.observe.tensorboard is False


def test_a_whole_list_can_be_set(loaded):
    config = loaded("data.train=[{path: a, weight: 3}, {path: b}]", "data.validation=[{path: c}]")
    assert [(dataset.path, dataset.weight) for dataset in config.data.train] == [("a", 3.0), ("b", 1.0)]
    assert config.data.validation[0].path == "c"


def test_the_last_value_of_a_key_holds(loaded):
    assert loaded("train.steps=5", "train.steps=7").train.steps == 7


def test_epochs_and_steps_replace_each_other(loaded, refused, with_line):
    train = loaded("train.epochs=1.5").train
    assert (train.steps, train.epochs) == (None, 1.5)
    by_epochs = with_line("train: {epochs: 3.0, global_batch_size: 16}")
    assert loaded("train.steps=5", text=by_epochs).train.epochs is None
    assert loaded(text=by_epochs).train.steps is None
    assert "train.steps is given too (5): one of the two" in refused("train.steps=5", "train.epochs=1.0")
    assert "unless train.epochs is given in its place" in refused("train.steps=")
    unseen = "data.train=[{path: a, weight: 0}, {path: b}]"
    assert "counts how often data.train.0 is seen" in refused("train.epochs=1.0", unseen)


def test_a_value_may_hold_an_equals_sign(loaded):
    assert loaded("run.dir=runs/lr=3").run.dir == "runs/lr=3"


def test_the_command_line_puts_a_wrong_value_right(loaded, with_line):
    text = with_line("optimizer: {lr: fast}")
    assert loaded("optimizer.lr=0.1", text=text).optimizer.lr == 0.1


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps", "an override is KEY=VALUE, such as parallel.tensor=2"),
        ("=5", "an override is KEY=VALUE"),
        ("train..steps=5", "an override is KEY=VALUE"),
        ("", "an override is KEY=VALUE"),
        ("parallel={tensor: 2}", "is a section: set its keys one by one, such as parallel.tensor=..."),
        ("data.train.1.path=b", "data.train is a list with the entries 0 to 0"),
        ("data.train.-1.path=b", "data.train is a list with the entries 0 to 0"),
        ("data.train.first.path=b", "data.train is a list with the entries 0 to 0"),
        ("data.validation.0.path=b", "data.validation is an empty list"),
        ("train.steps.more=5", "train.steps has no keys below it"),
        ("train.eval_batches.more=5", "train.eval_batches (the command line): {more: 5} given; must be an integer"),
        ("train.steps={", "not valid YAML"),
        ("train.steps=[1", "train.steps"),
        ("paralel.tensor=2", "paralel (the command line): {tensor: 2} given; no such key; nearest: parallel"),
    ],
)
def test_an_override_that_goes_nowhere_is_refused(refused, override, expected):
    assert expected in refused(override)


def test_overrides_and_file_are_blamed_apart(refused, with_line):
    message = refused("train.steps=0", "optimizer.eps=0", text=with_line("optimizer: {lr: x}"))
    assert "train.steps (the command line)" in message
    assert "optimizer.eps (the command line)" in message
    assert "optimizer.lr (line 5)" in message


def test_home_is_resolved_in_every_path(loaded, monkeypatch):
    monkeypatch.setenv("HOME", "/home/user")
    paths = ("run.dir=~/r", "run.init_from=~/i", "data.train=[~/d]", "data.validation=[{path: ~/v}]")
    config = loaded(*paths)
    assert (config.run.dir, config.run.init_from) == ("/home/user/r", "/home/user/i")
    assert (config.data.train[0].path, config.data.validation[0].path) == ("/home/user/d", "/home/user/v")
    assert loaded("data.train=['s3://a/~b']").data.train[0].path == "s3://a/~b"
