"""The figures that the secure sum promises beside the CKKS setting of other platforms (`make bench`)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).with_name("secagg_table.py")

pytestmark = pytest.mark.bench


def _table():
    spec = importlib.util.spec_from_file_location("secagg_table", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_client_needs_an_eighth_of_the_time_and_a_fourteenth_of_the_bytes():
    table = _table()
    side = table.side_by_side(3)
    assert side["theirs"] >= table.TARGETS["cpu"] * side["ours"]
    assert side["their_bytes"] >= table.TARGETS["bytes"] * side["our_bytes"]
    assert side["our_bytes"] <= table.TARGETS["per"] * table.MILLION


def test_a_client_needs_two_and_a_half_times_a_float32_update_and_no_second_copy_of_its_vector():
    table = _table()
    assert table.memory("int32") + 4 <= table.TARGETS["memory"] * 4
    assert table.memory("int64") < 8, "a copy of the vector would be 8 bytes and the ciphertext 3.5"


def test_the_resnet_is_a_resnet():
    state = _table().resnet18()
    assert len(state) == 62
    assert sum(v.size for v in state.values()) == 11_689_512
