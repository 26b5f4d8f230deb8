"""An opened sum on its way to the sites.

====================  ==============================================================================================
``sum/opened``        server -> sites, of every protocol but ``keysum``: the members' names; buffer ``values``, D
                      little-endian integers of 4 bytes, of 8 if the bound of the plan is 2^31 or more
``keysum/opened``     what the sites can verify: :mod:`.keysum_opening`; buffer ``opening``
====================  ==============================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedveil.common.errors import SecureSumError, WireError
from fedveil.common.units import SiteId
from fedveil.common.wire import Packet
from fedveil.privacy.secagg.interface import SumSpec

FOLDER = "sums"  # of a run's folder, where the server keeps them
MAX_SUMS = 32  # in one message
OPENED, KEYSUM = "sum/opened", "keysum/opened"
BUFFERS = {OPENED: "values", KEYSUM: "opening"}  # of each kind
_FIELDS = {"kind", "session", "round", "members"}


def pack(spec: SumSpec, round: int, members: Sequence[SiteId], values: NDArray[np.int64]) -> Packet:
    """The sum over ``members`` as the sites get it."""
    header = {"kind": OPENED, "session": spec.session, "round": round, "members": list(members)}
    return Packet(header, {BUFFERS[OPENED]: values.astype(_width(spec)).tobytes()})


def unpack(spec: SumSpec, packet: Packet) -> tuple[NDArray[np.int64], tuple[SiteId, ...]]:
    """(D,) int64, not to be written to, and the members. The latest sum is remembered: all sites of a process get it.

    Raises:
        WireError, SecureSumError: another form, session or round; members that are too few, twice there, out of order
            or not on the roster; a value beyond the plan's bound.
    """
    header = packet.expect(OPENED).header
    asked = (spec, packet.buffers, header)
    for known in _latest:
        if type(header.get("round")) is int and known[0] == asked:  # True and 1.0 equal 1, and are no rounds
            return known[1]
    # A copy, so that whoever alters the packet afterwards does not alter what it is compared with.
    kept = (spec, dict(packet.buffers), {k: list(v) if isinstance(v, list) else v for k, v in header.items()})
    found = _unpack(spec, packet)
    found[0].flags.writeable = False
    _latest[:] = [(kept, found)]
    return found


_Opened = tuple[NDArray[np.int64], tuple[SiteId, ...]]
_latest: list[tuple[tuple[SumSpec, dict[str, bytes], dict[str, Any]], _Opened]] = []


def _unpack(spec: SumSpec, packet: Packet) -> _Opened:
    header = packet.header
    if set(header) != _FIELDS:
        raise WireError("an opened sum is malformed")
    round = header["round"]
    if header["session"] != spec.session or type(round) is not int or not 0 <= round <= spec.rounds:
        raise SecureSumError("an opened sum of another session, or of a round that is not planned")
    members = spec.members(header["members"])
    width = _width(spec)
    values = np.frombuffer(packet.buffer(BUFFERS[OPENED], width.itemsize * spec.length), width).astype(np.int64)
    if max(int(values.max()), -int(values.min())) > spec.bound:
        raise SecureSumError("an opened sum is beyond the bound declared in the plan")
    return values, members


def with_sums(header: dict[str, Any], buffers: dict[str, bytes], sums: Sequence[Packet]) -> Packet:
    """A message that brings ``sums``, in order: their headers in its own, each buffer under a number."""
    brought = {f"sum_{i}": packet.buffers[BUFFERS[packet.kind]] for i, packet in enumerate(sums)}
    return Packet({**header, "sums": [packet.header for packet in sums]}, {**buffers, **brought})


def sums_in(message: Packet) -> list[Packet]:
    """The sums that :func:`with_sums` put into a message; none if it speaks of none.

    Raises:
        WireError: it is malformed, or brings more than :data:`MAX_SUMS`.
    """
    headers = message.header.get("sums", [])
    if not isinstance(headers, list) or len(headers) > MAX_SUMS:
        raise WireError(f"a message's list of opened sums is malformed or has more than {MAX_SUMS}")
    out: list[Packet] = []
    for i, header in enumerate(headers):
        kind, data = header.get("kind") if isinstance(header, dict) else None, message.buffers.get(f"sum_{i}")
        if not isinstance(kind, str) or kind not in BUFFERS or data is None:
            raise WireError("a message brings an opened sum without a known kind, or without its values")
        out.append(Packet(header, {BUFFERS[kind]: data}))
    return out


def _width(spec: SumSpec) -> np.dtype[np.signedinteger]:
    return np.dtype("<i4" if spec.bound < 1 << 31 else "<i8")
