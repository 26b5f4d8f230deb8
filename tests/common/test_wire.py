"""Packets: every size and name bounded, every buffer of exactly the length that was asked for."""

from __future__ import annotations

import hashlib

import pytest

from fedveil.common import canonical, wire
from fedveil.common.errors import WireError
from fedveil.common.wire import Limits, Packet, check, sha256

SMALL = Limits(header=100, buffers=10)


def test_a_packet_within_its_limits() -> None:
    packet = Packet({"kind": "hello", "n": 1}, {"a": b"12345", "b_2": b"67890"})
    assert check(packet, SMALL) is packet
    assert packet.expect("hello") is packet
    assert packet.buffer("a", 5) == b"12345"
    assert check(Packet({"kind": "x"}, {"n" * 64: b""}), SMALL)


def test_sizes_at_their_limits() -> None:
    assert check(Packet({"kind": "x"}, {"a": b"1" * 10}), SMALL)
    with pytest.raises(WireError, match="buffers of 11 bytes"):
        check(Packet({"kind": "x"}, {"a": b"1" * 6, "b": b"1" * 5}), SMALL)
    header = {"kind": "x", "pad": ""}
    room = 100 - len(canonical.dumps(header))
    assert check(Packet(header | {"pad": "y" * room}), SMALL)
    with pytest.raises(WireError, match="header of 101 bytes"):
        check(Packet(header | {"pad": "y" * (room + 1)}), SMALL)
    with pytest.raises(WireError, match="header of 101"):
        check(Packet(header), SMALL, header_bytes=101)
    buffers = {f"b{i}": b"" for i in range(wire.MAX_BUFFERS)}
    assert check(Packet({"kind": "x"}, buffers), SMALL)
    with pytest.raises(WireError, match="65 buffers"):
        check(Packet({"kind": "x"}, buffers | {"one_more": b""}), SMALL)


@pytest.mark.parametrize(
    "name", ["", "x" * 65, "a b", "a-b", "A", "ä", "a\n", "a\0", "../x", "a.b", "²", "٣", "__class__\n"]
)
def test_names_that_mean_something_elsewhere(name) -> None:
    with pytest.raises(WireError, match="invalid name"):
        check(Packet({"kind": "x"}, {name: b""}), SMALL)


@pytest.mark.parametrize("header", [{}, {"kind": 1}, {"kind": None}, {"kind": ["hello"]}])
def test_a_message_without_a_kind(header) -> None:
    with pytest.raises(WireError, match="without a kind"):
        Packet(header).expect("hello")


def test_a_message_of_another_kind_is_not_repeated_in_full() -> None:
    with pytest.raises(WireError, match="'hello' was expected") as e:
        Packet({"kind": "z" * 100_000}).expect("hello")
    assert len(e.value.message) < 200


@pytest.mark.parametrize("length", [0, 4, 6, 1 << 40, -1])
def test_a_buffer_of_another_length(length) -> None:
    with pytest.raises(WireError, match="5 bytes instead of"):
        Packet({"kind": "x"}, {"a": b"12345"}).buffer("a", length)


def test_a_missing_buffer() -> None:
    with pytest.raises(WireError, match="'weights' is missing"):
        Packet({"kind": "x"}).buffer("weights", 4)


@pytest.mark.parametrize("value", [float("nan"), b"x", {1, 2}])
def test_a_header_that_is_no_json(value) -> None:
    with pytest.raises(WireError):
        check(Packet({"kind": "x", "v": value}), SMALL)


def test_hash() -> None:
    assert sha256(b"abc") == hashlib.sha256(b"abc").hexdigest()
