"""Some inputs for every fuzz target, always the same; and the fuzzer itself, which must find a fault that is there."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fedveil_fuzzer", Path(__file__).with_name("fuzzer.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


fuzzer = load()


@pytest.mark.parametrize("name", sorted(fuzzer.TARGETS))
def test_no_input_gets_past_the_error_tree(name: str) -> None:
    out = fuzzer.fuzz(name, 2, executions=1500)
    assert not out.failures, out.failures[0]
    assert out.executions == 1500
    assert out.accepted > 5
    assert out.edges > 10


def test_a_planted_fault_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(data: bytes) -> None:
        value = fuzzer.canonical.loads(data)
        if isinstance(value, dict) and len(value) == 1:  # no seed is one
            raise KeyError("planted")

    monkeypatch.setitem(fuzzer.TARGETS, "loads", faulty)
    out = fuzzer.fuzz("loads", 1, executions=200_000, most=1)
    assert out.failures
    assert "planted" in out.failures[0][1]
