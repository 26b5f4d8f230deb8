"""Messages: a canonical JSON header and named raw buffers. Every size is bounded before anything is parsed.

A :class:`Packet` is what one protocol step sends. Its header is a JSON object. Its buffers are raw bytes. The header's
``kind`` fixes their lengths and meaning. Nothing is ever unpickled, and no code is taken from a message.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from typing import Any

from fedveil.common import canonical
from fedveil.common.errors import WireError

MAX_BUFFERS = 64
MAX_NAME = 64
_NAME = re.compile(f"[a-z0-9_]{{1,{MAX_NAME}}}")


@dataclass(frozen=True)
class Limits:
    """What a receiver accepts, in bytes: of the JSON header, and of all buffers together."""

    header: int = 1 << 22
    buffers: int = 1 << 30


@dataclass(frozen=True)
class Packet:
    """One protocol message.

    Attributes:
        header: JSON object; ``header["kind"]`` names the message.
        buffers: raw bytes by name (1 to 64 characters out of a-z, 0-9, '_').
        raw: the canonical bytes that the header was read from; empty where it was not read from bytes.
    """

    header: dict[str, Any]
    buffers: dict[str, bytes] = field(default_factory=dict)
    raw: bytes = field(default=b"", compare=False, repr=False)

    @property
    def kind(self) -> str:
        """The message's name; :class:`WireError` when the header has none."""
        kind = self.header.get("kind")
        if not isinstance(kind, str):
            raise WireError("a message without a kind")
        return kind

    def expect(self, kind: str) -> Packet:
        """This packet, if it is of ``kind``."""
        if self.kind != kind:
            raise WireError(f"a message of kind {self.kind[:64]!r} where {kind!r} was expected")
        return self

    def buffer(self, name: str, length: int) -> bytes:
        """The buffer ``name``, which must have exactly ``length`` bytes."""
        data = self.buffers.get(name)
        if data is None:
            raise WireError(f"{self.kind}: the buffer {name!r} is missing")
        if len(data) != length:
            raise WireError(f"{self.kind}: the buffer {name!r} has {len(data)} bytes instead of {length}")
        return data


def check(packet: Packet, limits: Limits, *, header_bytes: int | None = None) -> Packet:
    """Raise :class:`WireError` unless ``packet`` is within ``limits``.

    Args:
        header_bytes: length of the header's canonical form, where the caller has it already.
    """
    if len(packet.buffers) > MAX_BUFFERS:
        raise WireError(f"{len(packet.buffers)} buffers are over the limit of {MAX_BUFFERS}")
    for name in packet.buffers:
        if not _NAME.fullmatch(name):
            raise WireError("a buffer has an invalid name")
    total = sum(map(len, packet.buffers.values()))
    if total > limits.buffers:
        raise WireError(f"buffers of {total} bytes are over the limit of {limits.buffers}")
    size = len(canonical.dumps(packet.header)) if header_bytes is None else header_bytes
    if size > limits.header:
        raise WireError(f"a header of {size} bytes is over the limit of {limits.header}")
    return packet


def sha256(data: bytes) -> str:
    """SHA-256 of a buffer, hex."""
    return hashlib.sha256(data).hexdigest()
