"""From arguments to a dataclass of flags: numbers, what may be left out, and help that reads as text."""

import re
from dataclasses import dataclass, field
from typing import Literal

import pytest
from tyro.conf import OmitArgPrefixes

from apt_jax.flags.reader import parse


@dataclass(frozen=True)
class Base:
    """Flags that others have too."""

    shared: int = 3
    """Of the base,
    over two lines."""
    changed: int = 1
    """As the base says it."""


@dataclass(frozen=True)
class Group:
    """A group of its own."""

    inner: float | None = None
    """Of the group,
    over two lines."""


@dataclass(frozen=True)
class Command(Base):
    """What is run."""

    share: float = 0.5
    """A part."""
    most: int | None = None
    """None is any number."""
    either: int | str = 0
    """A number or a word."""
    kind: Literal["a", "b"] = "a"
    undocumented: int = 0
    changed: int = 2
    """As the command says it."""
    group: OmitArgPrefixes[Group] = field(default_factory=Group)


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """Lines of any length."""
    monkeypatch.setenv("COLUMNS", "400")


def read(*arguments):
    return parse(Command, "prog", arguments)


def refused(capsys, *arguments):
    """The one sentence about a bad value."""
    with pytest.raises(SystemExit) as caught:
        read(*arguments)
    assert caught.value.code == 2
    return " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_numbers_are_read_by_their_kind():
    found = read("--shared", "7", "--share", "1e-1", "--most", "4", "--inner", "2", "--either", "x")
    assert found == Command(shared=7, share=0.1, most=4, group=Group(2.0), either="x")
    kinds = [type(value) for value in (found.shared, found.share, found.most, found.group.inner)]
    assert kinds == [int, float, int, float]
    assert read("--either", "5").either in (5, "5") and read() == Command()


def test_only_what_may_be_left_out_may_be_none(capsys):
    assert read("--most", "None", "--inner", "None") == Command()
    assert read("--most", "0").most == 0
    assert "'None' is not a whole number" in refused(capsys, "--shared", "None")
    assert "'none' is not a whole number" in refused(capsys, "--most", "none")


def test_a_value_of_another_kind_is_a_sentence(capsys):
    assert "'x' is not a number" in refused(capsys, "--share", "x")
    assert "'1.5' is not a whole number" in refused(capsys, "--shared", "1.5")
    said = refused(capsys, "--shared", "y" * 200)
    assert "y" * 80 in said and "y" * 81 not in said


def test_help_has_the_kind_the_text_and_the_default_of_each(capsys):
    with pytest.raises(SystemExit) as caught:
        read("--help")
    said = capsys.readouterr().out
    assert caught.value.code == 0
    for flag, text, default in (
        ("shared INT", "Of the base, over two lines. ", "3"), ("share FLOAT", "A part. ", "0.5"),
        ("most INT", "None is any number. ", "None"), ("inner FLOAT", "Of the group, over two lines. ", "None"),
        ("changed INT", "As the command says it. ", "2"), ("undocumented INT", "", "0"),
        ("either INT|STR", "A number or a word. ", "0"),
    ):  # fmt: skip
        assert re.search(rf"--{re.escape(flag)} +{re.escape(text)}\(default: {default}\)", said), flag
