"""Messages of the shared-key sum.

======================  ====================================================================================
``sharedkey/deal``      lead -> server: buffer ``boxes``, the sealed key for every other joined site in roster order
``sharedkey/key``       server -> site: buffer ``box``, the receiver's
``sharedkey/sealed``    site -> server: buffer ``ciphertexts``, one a piece of 2048 values; the header has their lengths
``sharedkey/open``      server -> sites: the same form, holding the sums, and the members' names
``sharedkey/opened``    site -> server: buffer ``values``, the (D,) little-endian int64 sums
======================  ====================================================================================
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fedveil.common.errors import SecureSumError, WireError
from fedveil.common.units import SiteId
from fedveil.common.wire import Packet
from fedveil.privacy.secagg.interface import SumSpec, is_hex
from fedveil.privacy.secagg.keysum_common import check_signature
from fedveil.privacy.secagg.params import CKKS_SLOTS
from fedveil.privacy.secagg.sealed import Joins

DEAL, KEY, SEALED, OPEN, OPENED = (f"sharedkey/{step}" for step in ("deal", "key", "sealed", "open", "opened"))
KEY_CONTEXT = ["sharedkey/key"]
MAX_CIPHERTEXT = 1 << 17
MAX_KEY = 1 << 18


def slots(spec: SumSpec) -> list[int]:
    """Number of values in each piece of a vector."""
    return [min(CKKS_SLOTS, spec.length - first) for first in range(0, spec.length, CKKS_SLOTS)]


def fields(spec: SumSpec, kind: str, round: int, **more: Any) -> dict[str, Any]:
    """A header of this protocol."""
    return {"kind": kind, "session": spec.session, "plan_hash": spec.plan_hash, "round": round, **more}


def pieces(spec: SumSpec, packet: Packet) -> Iterator[tuple[int, bytes]]:
    """(number of values, ciphertext) of each piece, after all lengths were checked."""
    lengths, expected = packet.header.get("lengths"), slots(spec)
    if not isinstance(lengths, list) or len(lengths) != len(expected):
        raise WireError("the lengths of the ciphertexts are malformed")
    if not all(type(n) is int and 0 < n <= MAX_CIPHERTEXT for n in lengths):
        raise WireError("a ciphertext's length is out of bounds")
    data, at = packet.buffer("ciphertexts", sum(lengths)), 0
    for count, length in zip(expected, lengths, strict=True):
        yield count, data[at : at + length]
        at += length


def check_sealed(spec: SumSpec, joins: Joins, round: int, nonce: str, header: Any) -> tuple[SiteId, str]:
    """The site of a contribution's signed header and the model state that it names; empty if it names none.

    Raises:
        SecureSumError, WireError: a field is missing, malformed or of another session, plan, round or nonce; or the
            header is not signed by its site.
    """
    site = header.get("site") if isinstance(header, dict) else None
    if not isinstance(site, str) or site not in joins.keys:
        raise SecureSumError("a contribution of a site that did not join")
    if "state" in header and not is_hex(header["state"], 64):
        raise WireError(f"the model state that {site!r} names is malformed")
    expected = fields(spec, SEALED, round, nonce=nonce, site=site)
    check_signed(spec, SiteId(site), header, expected, {"lengths", "ciphertexts", *header.keys() & {"state"}})
    return SiteId(site), header.get("state", "")


def check_signed(spec: SumSpec, site: SiteId, header: dict[str, Any], expected: dict[str, Any], free: set[str]) -> None:
    """Refuse a header without exactly the ``expected`` values, the ``free`` fields and the signature of ``site``.

    Raises:
        SecureSumError, WireError: that says which of these it is.
    """
    if set(header) != {*expected, *free, "signature"}:
        raise WireError(f"a message of {site!r} has missing or unknown fields")
    if any(type(header[k]) is not type(v) or header[k] != v for k, v in expected.items()):
        raise SecureSumError(f"a message of {site!r} for another session, plan, round, nonce or site")
    check_signature(spec, site, header)
