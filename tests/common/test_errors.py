"""The exception tree: its drawing is right, each error has one exit code and travels by its name."""

from __future__ import annotations

import re

import pytest

from fedveil.common import errors
from fedveil.common.errors import FedveilError, PlanError, ProtocolError, by_code


def tree(cls: type[FedveilError], depth: int = 0) -> list[tuple[str, int, int]]:
    out = [(cls.__name__, depth, cls.exit_code)]
    for child in cls.__subclasses__():
        if child.__module__ == errors.__name__:
            out += tree(child, depth + 1)
    return out


def test_the_drawing_is_the_tree() -> None:
    drawn = []
    for line in (errors.__doc__ or "").splitlines():
        if m := re.match(r"^([ │├└─]*)([A-Z]\w+) +exit (\d+)", line):
            drawn.append((m[2], len(m[1]) // 4 - 1, int(m[3])))
    assert sorted(drawn) == sorted(tree(FedveilError))
    assert len(drawn) > 15


def test_every_exit_code_says_which() -> None:
    codes = [code for _, _, code in tree(FedveilError)]
    assert len(set(codes)) == len(codes)
    assert all(0 < c < 126 for c in codes if c != 130)  # 128 + SIGINT, as a shell says it


@pytest.mark.parametrize("name", [name for name, _, _ in tree(FedveilError)])
def test_every_class_travels_by_name(name) -> None:
    cls = by_code(name)
    assert cls.__name__ == name
    error = cls("what and where", hint="what to do")
    assert error.code == name
    assert (error.message, error.hint) == ("what and where", "what to do")
    assert str(error) == "what and where (what to do)"
    assert str(cls("what")) == "what"
    assert isinstance(error, FedveilError)


@pytest.mark.parametrize("code", ["", "Exception", "KeyboardInterrupt", "object", "fedveil", "OSError", "x" * 10_000])
def test_a_strangers_code_is_a_protocol_error(code) -> None:
    assert by_code(code) is ProtocolError


def test_a_plan_error_carries_its_proposal() -> None:
    assert PlanError("x").nearest is None
    assert PlanError("x", nearest={"sites": 3}).nearest == {"sites": 3}
