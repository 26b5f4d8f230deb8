"""The codec: any chunking gives the same message, anything else gives WireError and no big allocation."""

import json
import math
import struct
import tracemalloc
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.common import canonical
from fedveil.common import flwr_adapter as flower
from fedveil.common.errors import WireError
from fedveil.common.wire import Limits
from fedveil.deploy.transport.codec import CHUNK, MAGIC, MAX_HEADER, Decoder, cut, encode

LIMITS = Limits(header=10_000, buffers=10_000)
KEYS = st.text("abcö/_", max_size=5)
FLOATS = st.floats(allow_nan=False)
SCALARS = [
    st.integers(-(2**63), 2**63 - 1),
    FLOATS,
    st.booleans(),
    st.text("aä𝄞\0", max_size=4),
    st.binary(max_size=40),
]
VALUES = st.one_of(*SCALARS, *(st.lists(s, max_size=4) for s in SCALARS))
ARRAYS = st.builds(
    Array,
    st.sampled_from(["uint8", "float32"]),
    st.lists(st.integers(0, 9), max_size=3).map(tuple),
    st.sampled_from(["numpy.ndarray", flower.STYPE]),
    st.binary(max_size=200),
)
RECORDS = st.one_of(
    st.dictionaries(KEYS, VALUES, max_size=4).map(ConfigRecord),
    st.dictionaries(KEYS, st.one_of(st.integers(-9, 9), FLOATS, st.lists(FLOATS, max_size=3)), max_size=3).map(
        MetricRecord  # type: ignore[arg-type]
    ),
    st.dictionaries(KEYS, ARRAYS, max_size=4).map(ArrayRecord),
)
CONTENTS = st.dictionaries(KEYS, RECORDS, max_size=4).map(RecordDict)  # type: ignore[arg-type]


def decode(stream, limits):
    decoder = Decoder(limits)
    for chunk in stream:
        decoder.feed(chunk)
    return decoder.result()


def message(content: RecordDict) -> Message:
    flower.set_task_identity(9)
    out = Message(content, 123456789, "train.contribute", ttl=17.25, group_id="4")
    flower.stamp(out)
    return out


def raw(m: Message) -> bytes:
    return b"".join(encode(m))


@given(CONTENTS, st.lists(st.integers(1, 50), max_size=30), st.integers(1, 100))
def test_any_chunking_gives_the_same_message(content: RecordDict, cuts: list[int], last: int) -> None:
    m = message(content)
    data = raw(m)
    pieces, at = [], 0
    for step in [*cuts, *[last] * len(data)]:
        pieces.append(data[at : at + step])
        at += step
    back = decode(pieces, LIMITS)
    assert back.content == m.content
    assert [type(r) for r in back.content.values()] == [type(r) for r in m.content.values()]
    assert {k: v for k, v in vars(back.metadata).items() if "task" not in k} == {
        k: v for k, v in vars(m.metadata).items() if "task" not in k
    }


@given(CONTENTS, st.integers(1, 300))
def test_chunks_are_the_stream_in_equal_steps(content: RecordDict, size: int) -> None:
    m = message(content)
    out = list(cut(encode(m), size))
    assert b"".join(out) == raw(m)
    assert all(len(c) == size for c in out[:-1])
    assert 0 < len(out[-1]) <= size


def test_values_come_back_exactly_with_their_types() -> None:
    values: dict[str, Any] = {"nan": math.nan, "inf": [math.inf, -math.inf], "t": True, "i": [1, 2], "b": [b"", b"x"]}
    back = decode([raw(message(RecordDict({"c": ConfigRecord(values)})))], LIMITS).content["c"]
    assert math.isnan(back.pop("nan"))  # type: ignore[arg-type]
    assert repr(dict(back)) == repr({k: v for k, v in values.items() if k != "nan"})


def test_errors_travel() -> None:
    q = message(RecordDict())
    m = Message(Error(70, "what"), reply_to=q)
    back = decode([raw(m)], LIMITS)
    assert back.error == m.error
    assert back.metadata.reply_to_message_id == q.metadata.message_id


def test_every_truncation_is_refused() -> None:
    data = raw(message(RecordDict({"a": ArrayRecord({"x": Array("uint8", (9,), "s", b"123456789")})})))
    for n in range(len(data)):
        with pytest.raises(WireError):
            decode([data[:n]], LIMITS)
    with pytest.raises(WireError, match="more bytes"):
        decode([data, b"!"], LIMITS)
    with pytest.raises(WireError, match="more bytes"):
        decode([data + b"!"], LIMITS)


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        decode([data], LIMITS)
    with pytest.raises(WireError):
        decode([MAGIC, struct.pack("!I", len(data)), data], LIMITS)


@settings(max_examples=300)
@given(CONTENTS, st.data())
def test_an_altered_header_gives_a_message_or_wire_error(content: RecordDict, data: st.DataObject) -> None:
    stream = bytearray(raw(message(content)))
    for _ in range(data.draw(st.integers(1, 3))):
        stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert isinstance(decode([bytes(stream)], LIMITS), Message)
    except WireError:
        pass


def stream_of(**changes: Any) -> bytes:
    m = message(RecordDict({"a": ArrayRecord({"x": Array("uint8", (2,), "s", b"ab")}), "c": ConfigRecord({"b": b"c"})}))
    first, *buffers = encode(m)
    header = json.loads(first[8:]) | changes
    encoded = canonical.dumps({k: v for k, v in header.items() if v is not ...})
    return MAGIC + struct.pack("!I", len(encoded)) + encoded + b"".join(buffers)


ARRAY, CONFIG = ["a", "array", [["x", "uint8", [2], "s"]]], ["c", "config", [["b", {"b": 1}]]]
METADATA = json.loads(encode(message(RecordDict()))[0][8:])["metadata"]


def test_the_hand_made_stream_is_accepted() -> None:
    assert decode([stream_of(records=[ARRAY, CONFIG])], LIMITS).content["c"] == {"b": b"c"}


@pytest.mark.parametrize(
    "changes",
    [
        {"metadata": ...},
        {"metadata": []},
        {"metadata": METADATA | {"more": 1}},
        {"metadata": METADATA | {"run_id": "1"}},
        {"metadata": METADATA | {"run_id": True}},
        {"metadata": METADATA | {"dst_node_id": -1}},
        {"metadata": METADATA | {"dst_node_id": 2**64}},
        {"metadata": METADATA | {"message_type": "exec"}},
        {"metadata": METADATA | {"group_id": "x" * 2000}},
        {"metadata": METADATA | {"ttl": 1}},
        {"metadata": METADATA | {"ttl": "inf"}},
        {"metadata": METADATA | {"ttl": "0x1p99999"}},
        {"error": [1, "x"]},
        {"records": ..., "error": [1, "x"]},
        {"records": ..., "error": [1, "x" * 99_999], "buffers": []},
        {"records": {}},
        {"records": [ARRAY, ARRAY]},
        {"records": [ARRAY]},
        {"records": [ARRAY, CONFIG, ["d", "config", [["e", {"b": 1}]]]]},
        {"records": [ARRAY, ["c", "pickle", [["b", {"b": 1}]]]]},
        {"records": [ARRAY, ["c", "metric", [["b", {"b": 1}]]]]},
        {"records": [ARRAY, ["c", "config", [["b", {"b": 2}]]]]},
        {"records": [ARRAY, ["c", "config", [["b", {"b": 1, "f": "0x1p0"}]]]]},
        {"records": [ARRAY, ["c", "config", [["b", {"f": "x"}]]]]},
        {"records": [ARRAY, ["c", "config", [["b", {"b": 1}], ["d", {"f": "0x1p99999"}]]]]},
        {"records": [ARRAY, ["c", "config", [["b", {"b": 1}], ["b", 1]]]]},
        {"records": [ARRAY, ["c", "config", [["b", [[1]]]]]]},
        {"records": [ARRAY, ["c", "config", [["b", [1, "x"]]]]]},
        {"records": [ARRAY, ["c", "config", [["b", None]]]]},
        {"records": [["a", "array", [["x", "uint8", [-2], "s"]]], CONFIG]},
        {"records": [["a", "array", [["x", "uint8", 2, "s"]]], CONFIG]},
        {"records": [["a", "array", [["x", "uint8", [2], "s", "t"]]], CONFIG]},
        {"records": [["a", "array", [["x", 8, [2], "s"]]], CONFIG]},
        {"records": [["a", "array", [[]]], CONFIG]},
        {"records": [ARRAY, ["c", "config", [[]]]]},
        {"records": [ARRAY, ["c", "config", ["bc", ["b", {"b": 1}]]]]},
        {"records": [ARRAY, ["c", "config", [{"0": "b", "1": 1}]]]},
        {"records": [[f"r{i}", "config", []] for i in range(257)], "buffers": []},
        {"buffers": [2, 2]},
        {"buffers": [2]},
        {"buffers": [3]},
        {"buffers": [2, -1]},
        {"buffers": [2, 1, 0]},
        {"buffers": [2, True]},
        {"buffers": [0] * 70_000},
        {"buffers": [2, 10**40]},
    ],
    ids=lambda c: "+".join(c),
)
def test_hostile_headers_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(WireError):
        decode([stream_of(**changes)], LIMITS)


def test_limits_hold_before_anything_is_allocated() -> None:
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match="limit"):
            Decoder(LIMITS).feed(MAGIC + struct.pack("!I", MAX_HEADER + 1))
        with pytest.raises(WireError, match="limit"):
            Decoder(LIMITS).feed(stream_of(buffers=[2, 20_001]))
        within = Decoder(Limits(buffers=1 << 40))
        within.feed(stream_of(buffers=[2, 1 << 39]))
        assert not within.complete
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_large_array_is_held_about_once() -> None:
    size = 40 << 20
    m = message(RecordDict({"a": ArrayRecord({"x": Array("uint8", (size,), "s", bytes(size))})}))
    decoder = Decoder(Limits())
    tracemalloc.start()
    try:
        for chunk in cut(encode(m)):
            assert len(chunk) <= CHUNK
            decoder.feed(chunk)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert decoder.result().content == m.content
    assert peak < 1.4 * size
