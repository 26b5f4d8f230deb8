"""Flower messages as a stream of bytes: a canonical JSON header, then raw buffers.

::

    "FVM1"  |  header length (4 bytes, big endian)  |  header (canonical JSON)  |  buffer 0  |  buffer 1 ...

The header holds the metadata, the records without their bytes, and the length of every buffer in order; the bytes
of arrays and of ``ConfigRecord`` values are the buffers, so nothing is base64 and nothing is escaped. Floats
are written in hexadecimal, which is exact and has NaN and the infinities. A decoder checks every declared size
before it accepts a byte of it, and holds no more than what has arrived.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, Metadata, MetricRecord, RecordDict

from fedveil.common import canonical
from fedveil.common import flwr_adapter as flower
from fedveil.common.errors import MALFORMED, WireError
from fedveil.common.wire import Limits

MAGIC = b"FVM1"
CHUNK = 1 << 20
MAX_HEADER = 8 << 20
MAX_RECORDS = 256
MAX_ITEMS = 1 << 16
MAX_TEXT = 1 << 10
_PREFIX = struct.Struct("!4sI")
_METADATA = {
    "run_id": int,
    "message_id": str,
    "src_node_id": int,
    "dst_node_id": int,
    "reply_to_message_id": str,
    "group_id": str,
    "created_at": float,
    "ttl": float,
    "message_type": str,
}
_WITHIN: dict[type, Callable[[Any], bool]] = {
    int: lambda v: 0 <= v < 2**64,
    str: lambda v: len(v) <= MAX_TEXT,
    float: math.isfinite,
}
_KINDS: dict[str, type[ConfigRecord] | type[MetricRecord]] = {"config": ConfigRecord, "metric": MetricRecord}


def encode(message: Message) -> list[bytes]:
    """The pieces of the stream: prefix and header, then the message's own buffers, uncopied."""
    buffers: list[bytes] = []
    metadata = {k: getattr(message.metadata, k) for k in _METADATA}
    metadata |= {k: float(metadata[k]).hex() for k in ("created_at", "ttl")}
    header: dict[str, Any] = {"metadata": metadata}
    if message.has_error():
        header["error"] = [message.error.code, message.error.reason or ""]
    else:
        header["records"] = [[name, *_record(record, buffers)] for name, record in message.content.items()]
    header["buffers"] = [len(b) for b in buffers]
    raw = canonical.dumps(header)
    if len(raw) > MAX_HEADER:
        raise WireError(f"a message's header of {len(raw)} bytes is over the limit of {MAX_HEADER}")
    return [_PREFIX.pack(MAGIC, len(raw)) + raw, *buffers]


def cut(pieces: Iterable[bytes], size: int = CHUNK, *, skip: int = 0) -> Iterator[bytes]:
    """The pieces of a stream, less the first ``skip`` bytes, as chunks of exactly ``size`` bytes but for the last.

    Each byte is copied once.
    """
    parts: list[bytes | memoryview] = []
    room = size
    for piece in pieces:
        view = memoryview(piece)[skip:]
        skip -= min(skip, len(piece))
        while len(view) >= room:
            parts.append(view[:room])
            yield b"".join(parts)
            view, parts, room = view[room:], [], size
        if view:
            parts.append(view)
            room -= len(view)
    if parts:
        yield b"".join(parts)


class Decoder:
    """Takes a stream in chunks of any size.

    Args:
        limits: ``limits.header + limits.buffers`` bounds the sum of all buffers (a packet's own header travels
            as one); the stream's header is bounded by 8 MiB in any case.

    Raises (from :meth:`feed` and :meth:`result`):
        WireError: the stream breaks the format or a bound; the decoder is then of no further use.
    """

    def __init__(self, limits: Limits) -> None:
        self._limit = limits.header + limits.buffers
        self._header: dict[str, Any] | None = None
        self._head = bytearray()
        self._lengths: list[int] = []
        self._buffers: list[bytes] = []
        self._current = BytesIO()
        self._room = 0
        self.received = 0

    @property
    def metadata(self) -> Metadata | None:
        """The message's metadata as soon as its header has arrived, before its buffers."""
        return None if self._header is None else self._header["metadata"]

    @property
    def expects(self) -> int:
        """Bytes of all buffers as the header declares them; 0 before it has arrived."""
        return sum(self._lengths)

    @property
    def complete(self) -> bool:
        """Whether the whole message has arrived."""
        return self._header is not None and len(self._buffers) == len(self._lengths)

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes of the stream."""
        self.received += len(chunk)
        view = memoryview(chunk)
        if self._header is None:
            view = self._feed_header(view)
        while view and self._header is not None:
            if self.complete:
                raise WireError("a message is followed by more bytes than it declares")
            view = self._feed_buffer(view)

    def result(self) -> Message:
        """The message; :class:`WireError` unless it is complete."""
        if self._header is None or not self.complete:
            raise WireError("a message is cut: its stream ended early")
        metadata, error = self._header["metadata"], self._header["error"]
        if error is not None:
            return flower.with_metadata(metadata, None, error)
        taken = iter(self._buffers)
        try:
            content = RecordDict({name: _open(kind, items, taken) for name, kind, items in self._header["records"]})
        except (*MALFORMED, StopIteration) as e:
            raise WireError("a message's records are malformed") from e
        if next(taken, None) is not None:
            raise WireError("a message has more buffers than its records use")
        return flower.with_metadata(metadata, content, None)

    def _feed_header(self, view: memoryview) -> memoryview:
        view = self._fill_head(view, _PREFIX.size)
        if len(self._head) < _PREFIX.size:
            return view
        magic, length = _PREFIX.unpack_from(self._head)
        if magic != MAGIC:
            raise WireError("a stream that is not a message of this protocol")
        if length > MAX_HEADER:
            raise WireError(f"a message's header of {length} bytes is over the limit of {MAX_HEADER}")
        view = self._fill_head(view, _PREFIX.size + length)
        if len(self._head) < _PREFIX.size + length:
            return view
        self._header = _parse_header(bytes(memoryview(self._head)[_PREFIX.size :]))
        self._head = bytearray()
        self._lengths = self._header["buffers"]
        if sum(self._lengths) > self._limit:
            raise WireError(f"a message of {sum(self._lengths)} bytes is over the limit of {self._limit}")
        self._begin()
        return view

    def _fill_head(self, view: memoryview, size: int) -> memoryview:
        missing = max(0, size - len(self._head))
        self._head += view[:missing]
        return view[missing:]

    def _feed_buffer(self, view: memoryview) -> memoryview:
        taken = view[: self._room]
        self._current.write(taken)
        self._room -= len(taken)
        if not self._room:
            # BytesIO gives its own buffer away here, so a large array is not copied again.
            self._buffers.append(self._current.getvalue())
            self._begin()
        return view[len(taken) :]

    def _begin(self) -> None:
        while not self.complete and self._lengths[len(self._buffers)] == 0:
            self._buffers.append(b"")
        self._current = BytesIO()
        self._room = 0 if self.complete else self._lengths[len(self._buffers)]


def _record(record: ArrayRecord | ConfigRecord | MetricRecord, buffers: list[bytes]) -> tuple[str, list[Any]]:
    if isinstance(record, ArrayRecord):
        buffers += [a.data for a in record.values()]
        return "array", [[k, a.dtype, list(a.shape), a.stype] for k, a in record.items()]
    kind = "config" if isinstance(record, ConfigRecord) else "metric"
    return kind, [[k, _value(v, buffers)] for k, v in record.items()]


def _value(value: Any, buffers: list[bytes]) -> Any:
    if isinstance(value, list):
        return [_value(v, buffers) for v in value]
    if isinstance(value, bytes):
        buffers.append(value)
        return {"b": len(value)}
    if isinstance(value, float):
        return {"f": value.hex()}
    return value


def _open(kind: str, items: list[Any], buffers: Iterator[bytes]) -> ArrayRecord | ConfigRecord | MetricRecord:
    if kind == "array":
        return ArrayRecord({k: Array(dtype, tuple(s), stype, next(buffers)) for k, dtype, s, stype in items})
    values: dict[str, Any] = {k: _opened_value(v, buffers) for k, v in items}
    return _KINDS[kind](values)


def _opened_value(value: Any, buffers: Iterator[bytes], depth: int = 0) -> Any:
    if isinstance(value, list) and depth == 0:
        return [_opened_value(v, buffers, 1) for v in value]
    if isinstance(value, dict):
        [(tag, inner)] = value.items()
        if tag == "f" and isinstance(inner, str):
            return float.fromhex(inner)
        data = next(buffers)
        if tag != "b" or inner != len(data):
            raise ValueError("a value's bytes have another length than declared")
        return data
    if isinstance(value, bool | int | str):
        return value
    raise ValueError(f"a value of type {type(value).__name__}")


def _parse_header(raw: bytes) -> dict[str, Any]:
    """Everything the header says, shapes checked; ``metadata`` and ``error`` are Flower objects."""
    header = canonical.loads(raw, limit=MAX_HEADER)
    try:
        kind = "error" if "error" in header else "records"
        if set(header) != {"metadata", "buffers", kind}:
            raise ValueError("keys")
        lengths = header["buffers"]
        if type(lengths) is not list or len(lengths) > MAX_ITEMS or not all(type(n) is int and n >= 0 for n in lengths):
            raise ValueError("buffers")
        error = None
        if kind == "error":
            code, reason = header["error"]
            if type(code) is not int or type(reason) is not str or len(reason) > flower.MAX_ERROR_BYTES or lengths:
                raise ValueError("error")
            error = Error(code, reason)
        records = [_checked_record(r) for r in _bounded(header.get("records", []), MAX_RECORDS)]
        if len({name for name, _, _ in records}) != len(records):
            raise ValueError("a record's name is used twice")
        metadata = _parse_metadata(header["metadata"])
    except MALFORMED as e:
        raise WireError("a message's header is malformed") from e
    return {"metadata": metadata, "error": error, "records": records, "buffers": lengths}


def _parse_metadata(values: dict[str, Any]) -> Metadata:
    if set(values) != set(_METADATA):
        raise ValueError("metadata keys")
    parsed: dict[str, Any] = {}
    for name, kind in _METADATA.items():
        value: Any = float.fromhex(values[name]) if kind is float else values[name]
        if type(value) is not kind or not _WITHIN[kind](value):
            raise ValueError(name)
        parsed[name] = value
    return Metadata(**parsed)


def _checked_record(record: Any) -> tuple[str, str, list[Any]]:
    name, kind, items = record
    if type(name) is not str or len(name) > MAX_TEXT or kind not in {"array", *_KINDS}:
        raise ValueError("record")
    for item in _bounded(items, MAX_ITEMS):
        if type(item) is not list or len(item) != (4 if kind == "array" else 2):
            raise ValueError("item")
        if type(item[0]) is not str or len(item[0]) > MAX_TEXT:
            raise ValueError("key")
        if kind == "array":
            _, dtype, shape, stype = item
            if type(dtype) is not str or type(stype) is not str or max(len(dtype), len(stype)) > MAX_TEXT:
                raise ValueError("array")
            if not all(type(n) is int and n >= 0 for n in _bounded(shape, 64)):
                raise ValueError("shape")
    if len({item[0] for item in items}) != len(items):
        raise ValueError("a key is used twice")
    return name, kind, items


def _bounded(value: Any, limit: int) -> list[Any]:
    if type(value) is not list or len(value) > limit:
        raise ValueError("list")
    return value
