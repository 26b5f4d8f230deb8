"""Canonical JSON: one byte string per value, and no value from bytes that mean something else elsewhere."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedveil.common import canonical
from fedveil.common.errors import WireError

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=4) | st.dictionaries(TEXT, v, max_size=4), max_leaves=20)


def shuffled(value):
    """The same value with every dictionary's keys put in another order."""
    if isinstance(value, dict):
        return {k: shuffled(v) for k, v in reversed(value.items())}
    return [shuffled(v) for v in value] if isinstance(value, list) else value


@given(VALUES)
def test_round_trip(value) -> None:
    data = canonical.dumps(value)
    again = canonical.loads(data)
    assert again == value
    assert canonical.dumps(again) == data
    assert canonical.dumps(shuffled(value)) == data
    assert canonical.digest(value) == canonical.sha256_hex(data)
    assert canonical.loads(data.decode()) == value
    assert json.loads(data) == value


@given(VALUES, VALUES)
def test_different_values_have_different_bytes(a, b) -> None:
    def same(x, y) -> bool:
        if type(x) is not type(y):
            return False
        if isinstance(x, dict):
            return x.keys() == y.keys() and all(same(x[k], y[k]) for k in x)
        if isinstance(x, list):
            return len(x) == len(y) and all(map(same, x, y))
        return repr(x) == repr(y)

    assert (canonical.dumps(a) == canonical.dumps(b)) == same(a, b)


def test_known_answers() -> None:
    assert canonical.dumps({"b": [1, 2.5, None, True], "a": 'é\n"'}) == '{"a":"é\\n\\"","b":[1,2.5,null,true]}'.encode()
    assert canonical.dumps({"é": 1, "z": 2, "Z": 3}) == '{"Z":3,"z":2,"é":1}'.encode()
    assert canonical.dumps(2**100) == b"1267650600228229401496703205376"
    assert canonical.dumps([1, 1.0, -0.0, 1e300, 0.1]) == b"[1,1.0,-0.0,1e+300,0.1]"
    assert canonical.digest({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


@pytest.mark.parametrize(
    "value",
    [
        float("nan"), float("inf"), [-float("inf")], {1, 2}, b"x", object(), {"a": b"x"}, {"a": 1, 2: 3}, [10**5000],
        "\ud800", {("a",): 1},
    ],
    ids=lambda v: type(v).__name__,
)  # fmt: skip
def test_what_has_no_form_is_refused(value) -> None:
    with pytest.raises(WireError, match="no canonical JSON form"):
        canonical.dumps(value)


def test_depth_is_refused_both_ways() -> None:
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(WireError):
        canonical.dumps(deep)
    with pytest.raises(WireError):
        canonical.loads(b"[" * 100_000 + b"]" * 100_000)


@pytest.mark.parametrize(
    "data",
    [
        b'{"a":1,"a":2}', b'{"x":{"a":1,"b":2,"a":1}}', b'{"a":1,"\\u0061":1}',
        b"NaN", b"[Infinity]", b"-Infinity", b"1e999", b'{"a":-1e400}',
        b"", b"{", b"[1,]", b"{'a':1}", b"1 2", b"nul", b'"\x01"', b"\xff", b'"\xff"', b"9" * 5000,
        '{"a":1}'.encode("utf-16"), '{"a":1}'.encode("utf-32"), b'\xef\xbb\xbf{"a":1}',
    ],
)  # fmt: skip
def test_what_is_malformed_is_refused(data) -> None:
    with pytest.raises(WireError, match="malformed"):
        canonical.loads(data)


@given(st.binary(max_size=200))
def test_any_bytes_parse_or_are_refused(data) -> None:
    try:
        value = canonical.loads(data)
    except WireError:
        return
    assert value == value  # no NaN at the top


@pytest.mark.parametrize("make", [bytes, bytes.decode])
def test_the_limit_counts_bytes(make) -> None:
    data = '["ééé"]'.encode()
    assert canonical.loads(make(data), limit=len(data)) == ["ééé"]
    with pytest.raises(WireError, match="over the limit"):
        canonical.loads(make(data), limit=len(data) - 1)


def test_a_lone_surrogate_is_refused_as_text() -> None:
    with pytest.raises(WireError):
        canonical.loads('"\ud800"')


@pytest.mark.parametrize("dense", ["[]", "{}", "0", '""', "[[]]"])
def test_text_that_would_take_many_times_its_length_in_memory_is_not_parsed(dense) -> None:
    """58 MiB of empty lists take 1.4 GiB; the limit on the length alone does not see it."""
    unit = f"{dense},".encode()
    data = b"[" + unit * (20_000_000 // len(unit)) + b"0]"
    with pytest.raises(WireError, match="more values than"):
        canonical.loads(data)


def test_many_values_of_ordinary_length_are_parsed() -> None:
    assert len(canonical.loads(b"[" + b"1234567," * 2_000_000 + b"0]")) == 2_000_001
