"""The one module that uses more of Flower than its public app API (written against flwr 1.41).

A :class:`~fedveil.common.wire.Packet` travels as a Flower ``RecordDict`` of exactly two records: the header's
canonical JSON in a ``ConfigRecord`` and the buffers in an ``ArrayRecord`` (dtype ``uint8``, one dimension, stype
``fedveil.raw.1``). Buffers are referenced, never copied and never base64. Importing this module silences
Flower's telemetry, its update check and its run-time installation of dependencies.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
# Flower reads these while it is imported, so they are set before the first import below.
os.environ.update(_ENVIRONMENT)
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, Metadata, MetricRecord, RecordDict  # noqa: E402
from flwr.clientapp import ClientApp  # noqa: E402
from flwr.serverapp import Grid  # noqa: E402
from flwr.supercore.run import Run  # noqa: E402
from flwr.supercore.task_identity import TaskIdentity  # noqa: E402

from fedveil.common import canonical, errors, wire  # noqa: E402
from fedveil.common.errors import FedveilError, ProtocolError, WireError  # noqa: E402
from fedveil.common.units import SiteId  # noqa: E402
from fedveil.common.wire import Limits, Packet  # noqa: E402

HEADER = "fedveil.header"
BUFFERS = "fedveil.buffers"
STYPE = "fedveil.raw.1"
SERVER_NODE = 1
ERROR_CODE = 70
INTERNAL_ERROR = "InternalError"
MAX_ERROR_BYTES = 1 << 14
_MAX_TEXT = {"code": 64, "message": 2000, "hint": 1000}
_JSON = "json"
_LOG = logging.getLogger("fedveil.transport")
T = TypeVar("T")
R = TypeVar("R", RecordDict, ArrayRecord, ConfigRecord, MetricRecord)


class _Canonical(threading.local):
    """Two headers known to be canonical: the latest read, with what it says, and the latest made. In a simulation a
    thousand sites read the same request, and the header that one side has made is the next that the other side reads.
    """

    latest = b""
    read: ClassVar[dict[str, Any]] = {}
    made = b""


_canonical = _Canonical()


def quiet_flower() -> None:
    """Switch off Flower's telemetry, update check and dependency installation; log from WARNING upwards.

    Holds for this process and, through the environment, for its children.
    """
    os.environ.update(_ENVIRONMENT)
    telemetry = sys.modules.get("flwr.supercore.telemetry")
    if telemetry is not None:
        # An import of flwr that came before ours read the variable already.
        telemetry.__dict__["FLWR_TELEMETRY_ENABLED"] = "0"
    logging.getLogger("flwr").setLevel(logging.WARNING)


def set_task_identity(run_id: int = 1, node: int = SERVER_NODE) -> None:
    """Give this process the identity that ``Message()`` asks for outside a Flower runtime."""
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = node


def node_id(site: SiteId) -> int:
    """Flower's number for ``site`` in our own engines: 56 bits of SHA-256, never 0 or the server's."""
    value = int.from_bytes(hashlib.sha256(b"fedveil/node/1\0" + site.encode()).digest()[:7], "big")
    return value if value > SERVER_NODE else value + (1 << 55)


def new_run_id() -> int:
    """A fresh positive run number of 62 bits."""
    return secrets.randbits(62) | 1


def to_record(packet: Packet) -> RecordDict:
    """``packet`` as Flower content; the buffers are shared with the packet, not copied.

    Raises:
        WireError: the packet is outside the default bounds of names and counts, or a buffer is not ``bytes``.
    """
    header = _canonical.made = canonical.dumps(packet.header)
    wire.check(packet, Limits(header=wire.Limits.header, buffers=sys.maxsize), header_bytes=len(header))
    for name, data in packet.buffers.items():
        if type(data) is not bytes:
            raise WireError(f"the buffer {name!r} is {type(data).__name__}, not bytes")
    arrays = {name: Array("uint8", (len(data),), STYPE, data) for name, data in packet.buffers.items()}
    return _filled(
        RecordDict(), {HEADER: _filled(ConfigRecord(), {_JSON: header}), BUFFERS: _filled(ArrayRecord(), arrays)}
    )


def from_record(content: RecordDict, limits: Limits) -> Packet:
    """The packet inside ``content``; buffers are shared with the record, and what is inside of a header that is read
    again with the packet before: nobody writes into it.

    Raises:
        WireError: the record has another shape than :func:`to_record` gives, its header is not canonical JSON, or
            a size is over ``limits``.
    """
    if set(content) != {HEADER, BUFFERS}:
        raise WireError("a message's content is not a packet")
    config, arrays = content[HEADER], content[BUFFERS]
    if not isinstance(config, ConfigRecord) or not isinstance(arrays, ArrayRecord) or set(config) != {_JSON}:
        raise WireError("a packet's records are of the wrong types")
    raw = config[_JSON]
    if not isinstance(raw, bytes):
        raise WireError("a packet's header is not bytes")
    if len(arrays) > wire.MAX_BUFFERS:
        raise WireError(f"{len(arrays)} buffers are over the limit of {wire.MAX_BUFFERS}")
    for array in arrays.values():
        data = array.data
        if array.dtype != "uint8" or array.stype != STYPE or type(data) is not bytes:
            raise WireError("a packet's buffer is not raw bytes")
        if tuple(array.shape) != (len(data),):
            raise WireError("a packet's buffer has another length than it declares")
    known = bool(raw) and raw == _canonical.latest and len(raw) <= limits.header
    header = _canonical.read if known else canonical.loads(raw, limit=limits.header)
    if not isinstance(header, dict) or (not known and raw != _canonical.made and canonical.dumps(header) != raw):
        raise WireError("a packet's header is not a canonical JSON object")
    if raw != _canonical.made:
        _canonical.latest, _canonical.read = raw, header
    buffers = {name: array.data for name, array in arrays.items()}
    return wire.check(Packet(dict(header), buffers, raw), limits, header_bytes=len(raw))


def request(packet: Packet | RecordDict, *, to: int, action: str, round: int, ttl: float | None = None) -> Message:
    """A message to node ``to`` for the handler ``action``.

    Args:
        packet: what to send; or its :func:`to_record`, made once, where many nodes get the same.
        action: Flower's message type, such as ``"train.contribute"``.
        round: becomes the message's ``group_id``.
        ttl: seconds during which message and reply are worth delivering; None: Flower's 12 hours.
    """
    _ensure_identity()
    content = packet if isinstance(packet, RecordDict) else to_record(packet)
    return Message(content, to, action, ttl=ttl, group_id=str(round))


def requests(packets: Mapping[int, Packet], *, action: str, round: int) -> list[Message]:
    """One :func:`request` to each node; a packet that goes to many is turned into a record once."""
    if not packets:
        return []
    _ensure_identity()
    records = {id(p): to_record(p) for p in {id(p): p for p in packets.values()}.values()}
    node, packet = next(iter(packets.items()))
    first = Message(records[id(packet)], node, action, group_id=str(round)).metadata
    out: list[Message] = []
    for node, packet in packets.items():
        metadata = _same(first)
        metadata.dst_node_id = node
        out.append(_message(metadata, records[id(packet)], None))
    return out


def reply(packet: Packet, to: Message) -> Message:
    """``packet`` as the answer to ``to``, to be delivered in what is left of the request's time."""
    now = time.time()
    metadata = _turned(to.metadata, to.metadata)
    left = max(to.metadata.created_at + to.metadata.ttl - now, 0.0)
    metadata.__dict__.update(_message_id="", _created_at=now, _delivered_at="", _ttl=left)
    return _message(metadata, to_record(packet), None)


def error_reply(error: FedveilError, to: Message) -> Message:
    """``error`` as the answer to ``to``: its class, message and hint, never a traceback."""
    return Message(Error(ERROR_CODE, error_text(error)), reply_to=to)


def internal_error_reply(to: Message) -> Message:
    """The answer to ``to`` after an exception outside our tree. It says that something failed, but not what."""
    text = canonical.dumps({"code": INTERNAL_ERROR, "hint": "", "message": ""}).decode()
    return Message(Error(ERROR_CODE, text), reply_to=to)


def reply_error(message: Message) -> FedveilError | None:
    """The error that ``message`` carries, as one of ours; None if it carries content.

    An error that is not of our making becomes a :class:`ProtocolError` without its text.
    """
    if not message.has_error():
        return None
    error = message.error
    return parse_error(error.reason or "" if error.code == ERROR_CODE else "")


def error_text(error: FedveilError) -> str:
    """Canonical JSON ``{"code", "hint", "message"}``, each cut to its bound."""
    parts = {"code": error.code, "message": error.message, "hint": error.hint}
    return canonical.dumps({k: _printable(v)[: _MAX_TEXT[k]] for k, v in parts.items()}).decode()


def parse_error(text: str) -> FedveilError:
    """Inverse of :func:`error_text` for text that a peer sent; anything else gives a bare ProtocolError."""
    foreign = ProtocolError("the peer reported an error that is not one of fedveil's", hint="see the peer's own log")
    try:
        value = canonical.loads(text.encode(), limit=MAX_ERROR_BYTES)
    except (WireError, UnicodeEncodeError):
        return foreign
    if not isinstance(value, dict) or set(value) != set(_MAX_TEXT):
        return foreign
    if not all(isinstance(v, str) and len(v) <= _MAX_TEXT[k] for k, v in value.items()):
        return foreign
    if value["code"] == INTERNAL_ERROR:
        return ProtocolError("the peer failed for a reason of its own (InternalError)", hint="see the peer's own log")
    cls = errors.by_code(value["code"])
    if cls.__name__ != value["code"]:
        return foreign
    return cls(_printable(value["message"]), hint=_printable(value["hint"]))


def stamp(message: Message) -> str:
    """Give ``message`` a fresh random id (128 bits, hex) and return it."""
    message_id = secrets.token_hex(16)
    message.metadata.__dict__["_message_id"] = message_id
    return message_id


def with_metadata(metadata: Metadata, content: RecordDict | None, error: Error | None) -> Message:
    """A message with given metadata and either content or an error."""
    arguments: dict[str, Any] = {"metadata": metadata, "content": content, "error": error}
    return Message(**arguments)


def readdressed(message: Message, request: Message) -> Message:
    """``message`` with the metadata that an answer to ``request`` must have, whatever its sender wrote there."""
    content = None if message.has_error() else message.content
    return _message(
        _turned(message.metadata, request.metadata), content, message.error if message.has_error() else None
    )


def copied(message: Message) -> Message:
    """A message that can be altered without touching ``message``; immutable bytes are shared."""
    metadata = _same(message.metadata)
    if message.has_error():
        return _message(metadata, None, Error(message.error.code, message.error.reason))
    content = _filled(RecordDict(), {k: _copied_record(r) for k, r in message.content.items()})
    return _message(metadata, content, None)


def content_bytes(message: Message) -> int:
    """Bytes of payload in ``message``: arrays, strings and bytes in full, 8 for every number."""
    if message.has_error():
        return len((message.error.reason or "").encode("utf-8", "replace"))
    total = 0
    for record in message.content.values():
        if isinstance(record, ArrayRecord):
            total += sum(len(a.data) for a in record.values())
        else:
            total += sum(_value_bytes(v) for v in record.values())
    return total


def answer(app: ClientApp, message: Message, context: Context) -> Message:
    """What ``app`` says to ``message``, with its id set; exceptions become error replies.

    A :class:`FedveilError` is sent as :func:`error_reply`. Any other exception is logged here, by class
    and place, and the peer learns only that there was one.
    """
    try:
        out = app(message, context)
        if not isinstance(out, Message):
            raise TypeError(f"the client app returned {type(out).__name__} instead of a Message")
        out = readdressed(out, message)
    except FedveilError as e:
        _LOG.warning("%s answered with %s: %s", message.metadata.message_type, e.code, e)
        out = error_reply(e, message)
    except Exception as e:
        _LOG.error("%s failed inside the client app: %s", message.metadata.message_type, errors.trace(e))
        out = internal_error_reply(message)
    stamp(out)
    return out


class BaseGrid(Grid):
    """The part of Flower's ``Grid`` that our engines share: one run, and messages made by the public constructor.

    Args:
        run_id: the run's number; None: a fresh random one.
    """

    def __init__(self, run_id: int | None = None) -> None:
        quiet_flower()
        self._run = Run.create_empty(run_id=run_id or new_run_id())
        set_task_identity(self._run.run_id)

    def set_run(self, run: Run) -> None:
        """Set the run this grid belongs to."""
        self._run = run
        set_task_identity(run.run_id)

    @property
    def run(self) -> Run:
        """The run this grid belongs to."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message with this run's metadata (Flower's older spelling of ``Message(...)``)."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)


def _ensure_identity() -> None:
    try:
        _ = (TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id)
    except RuntimeError:
        set_task_identity()


def _turned(metadata: Metadata, request: Metadata) -> Metadata:
    """``metadata`` addressed as the answer to ``request``; its own id and times are kept."""
    out, q = _same(metadata), request.__dict__
    out.__dict__.update(
        _run_id=q["_run_id"], _src_node_id=q["_dst_node_id"], _dst_node_id=q["_src_node_id"],
        _reply_to_message_id=q["_message_id"], _group_id=q["_group_id"], _message_type=q["_message_type"],
        _src_task_id=q["_dst_task_id"], _dst_task_id=q["_src_task_id"],
    )  # fmt: skip
    return out


def _message(metadata: Metadata, content: RecordDict | None, error: Error | None) -> Message:
    """As :func:`with_metadata`, in a tenth of its time. Only for parts that were checked when they were made."""
    out = Message.__new__(Message)
    out.__dict__.update(_metadata=metadata, _content=content, _error=error)
    return out


def _copied_record(record: ArrayRecord | ConfigRecord | MetricRecord) -> ArrayRecord | ConfigRecord | MetricRecord:
    if isinstance(record, ArrayRecord):
        return _filled(ArrayRecord(), {k: _same(a) for k, a in record.items()})
    return _filled(type(record)(), {k: list(v) if isinstance(v, list) else v for k, v in record.items()})


def _filled(record: R, values: dict[str, Any]) -> R:
    """``record``, empty and of Flower's, filled with checked ``values``. Its constructor would check each again."""
    record.__dict__["_data"] = values
    return record


def _same(value: T) -> T:
    """A copy of an object of Flower's that holds immutable values only."""
    out = value.__new__(type(value))
    out.__dict__.update(value.__dict__)
    return out


def _value_bytes(value: object) -> int:
    if isinstance(value, list):
        return sum(map(_value_bytes, value))
    if isinstance(value, str):
        return len(value.encode("utf-8", "replace"))
    return len(value) if isinstance(value, bytes) else 8


def _printable(text: str) -> str:
    """``text`` with its control characters replaced, which could move a terminal's cursor."""
    return "".join(c if c.isprintable() else "?" for c in text)
