"""Every parser is total: whatever stands at whichever place of a document, it is accepted or one of our own errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import parsers
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedveil.common import canonical
from fedveil.common.errors import FedveilError, PlanError, WireError
from fedveil.privacy.plan import from_json

PARSERS = parsers.parsers()
# What may stand anywhere in JSON, and what parsers forget: the empty, the nested, the wrong type, the far too large.
# The last three are no canonical JSON, and reach a parser that is given a value instead of bytes.
HOSTILE: list[Any] = [
    None, True, False, 0, -1, 2**64, 10**299, 0.5, -0.0, 5e-324, 1e308, "", "é", "0" * 64, "x" * 5000, [], [[]],
    [0] * 3, [{}], {}, {"a": []}, 10**400, float("nan"), "\ud800",
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield from places(inner, (*path, key))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """``value`` with ``new`` at the place ``path``; without that place where ``new`` is Ellipsis."""
    if not path:
        return None if new is ... else new
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(path) == 1 and new is ...:
        del copy[path[0]]
    else:
        copy[path[0]] = changed(value[path[0]], path[1:], new)
    return copy


def attempt(name: str, document: Any) -> None:
    try:
        PARSERS[name].parse(document)
    except FedveilError:
        pass


@pytest.mark.parametrize("name", PARSERS)
def test_the_document_itself_is_accepted(name: str) -> None:
    """Otherwise the tests below would end at a first check and see nothing."""
    fresh = parsers.made()[name]
    fresh.parse(fresh.document)


@pytest.mark.parametrize("name", PARSERS)
def test_one_hostile_value_at_any_place(name: str) -> None:
    document = PARSERS[name].document
    for path in places(document):
        for new in (*HOSTILE, ...):
            try:
                attempt(name, changed(document, path, new))
            except Exception as e:
                raise AssertionError(f"{type(e).__name__} with {str(new)[:40]!r} at {path}") from e


ANYTHING = st.recursive(
    st.sampled_from(HOSTILE[:-3]) | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from(["", "a", "kind", "é"]), v, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("name", PARSERS)
@given(data=st.data())
def test_several_hostile_values_at_once(name: str, data: st.DataObject) -> None:
    document = PARSERS[name].document
    for _ in range(data.draw(st.integers(1, 4))):
        path = data.draw(st.sampled_from([*places(document)]))
        document = changed(document, path, data.draw(ANYTHING))
    attempt(name, document)


@pytest.mark.parametrize(
    "text",
    [
        b'"\\ud800"', b'{"a":["\\uDC00"]}', b'{"\\udfff":1}', b'"\\ud800\\u0041"', b"9" * 301, b"-" + b"9" * 300,
        b'{"a":[1' + b"0" * 400 + b"]}",
    ],
    ids=str,
)  # fmt: skip
def test_what_no_reader_could_use_is_not_parsed(text: bytes) -> None:
    """Half a character cannot be written again, and no float holds so long a number."""
    with pytest.raises(WireError, match="malformed"):
        canonical.loads(text)


def test_what_looks_like_it_is_parsed() -> None:
    assert canonical.loads(b'"\\ud83d\\ude00"') == "\U0001f600"
    assert canonical.loads(b'"\\\\ud800"') == "\\ud800"
    assert float(canonical.loads(b"9" * 300)) == 1e300


@pytest.mark.parametrize("rate", [5e-324, 1e-320, 1e-309, 1e-100, 2.0**-49])
def test_a_plan_that_samples_less_than_an_accountant_can_divide_by_is_refused(rate: float) -> None:
    """Such a rate once ended in a ValueError of the accountant's."""
    with pytest.raises(PlanError, match="malformed in: sample_rate"):
        from_json(PARSERS["plan"].document | {"sample_rate": rate})
