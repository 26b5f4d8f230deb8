"""Messages of the sum of keys, as both sides build and check them (docs/protocol.md).

=======================  ==================================================================================
``keysum/deal``          lead -> server: buffer ``boxes``, the sealed group key for every other joined site
``keysum/group``         server -> site: buffer ``box``, the receiver's (both for blinded sums only)
``keysum/contribution``  site -> server: buffers ``ciphertext`` (7 bytes a coefficient) and ``shares`` (one box of
                         8208 bytes for each joined helper, in roster order); the header binds both by hash
``keysum/members``       server -> helpers: the members' signed headers
``keysum/agreement``     helper -> server: a signature of the digest of session, round and members
``keysum/open``          server -> helpers: T agreements on one digest; buffer ``shares``, the members' boxes
                         for the receiver
``keysum/answer``        helper -> server: buffer ``answer``, the sum of the shares modulo 65521, 2 bytes a coefficient
``keysum/challenge``     server -> members: the digest of each member's signed header, the hash of the sum of
                         ciphertexts, the digest of the T answers that opened it
``keysum/fingerprint``   member -> server: the fingerprint of its own ciphertext, signed
``keysum/opened``        server -> sites: see :mod:`.keysum_opening`
=======================  ==================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedveil.common import canonical, identity
from fedveil.common.errors import IdentityError, ProtocolError, SecureSumError, WireError
from fedveil.common.journal import Copy
from fedveil.common.units import SiteId
from fedveil.common.wire import Packet
from fedveil.privacy.secagg import fingerprint as fingerprints
from fedveil.privacy.secagg.fingerprint import Fingerprint
from fedveil.privacy.secagg.interface import Head, SumSpec, is_hex
from fedveil.privacy.secagg.params import N
from fedveil.privacy.secagg.sealed import TAG_BYTES, Joins

CONTRIBUTION, MEMBERS, AGREEMENT = "keysum/contribution", "keysum/members", "keysum/agreement"
OPEN, ANSWER = "keysum/open", "keysum/answer"
CHALLENGE, FINGERPRINT = "keysum/challenge", "keysum/fingerprint"
DEAL, GROUP = "keysum/deal", "keysum/group"
SHARE_BYTES = 2 * N
BOX_BYTES = SHARE_BYTES + TAG_BYTES
_DOMAINS = {
    CONTRIBUTION: "fedveil/contribution/1",
    AGREEMENT: "fedveil/agree/1",
    ANSWER: "fedveil/answer/1",
    FINGERPRINT: "fedveil/fingerprint/1",
    "sharedkey/sealed": "fedveil/contribution/1",
    "sharedkey/opened": "fedveil/answer/1",
}


@dataclass(frozen=True)
class Contribution:
    """A verified header of a contribution.

    ``digest`` stands for all of it, ``head`` is where its journal stood, ``state`` names the model state that it was
    computed from (empty if it names none).
    """

    site: SiteId
    nonce: str
    ciphertext: str
    shares: tuple[str, ...]
    digest: str
    head: Head | None
    state: str


def sign_header(key: Ed25519PrivateKey, header: dict[str, Any]) -> dict[str, Any]:
    """``header`` with its Ed25519 signature, in the domain of its kind."""
    return {**header, "signature": identity.sign(key, _DOMAINS[header["kind"]], canonical.dumps(header)).hex()}


def check_signature(spec: SumSpec, site: SiteId, header: Mapping[str, Any]) -> None:
    """Raise :class:`SecureSumError` unless ``header`` is signed by ``site``'s key on the roster."""
    signature = header.get("signature")
    if not is_hex(signature, 128):
        raise WireError(f"a message of {site!r} without a signature")
    payload = canonical.dumps({k: v for k, v in header.items() if k != "signature"})
    kind = str(header["kind"])
    try:
        member = spec.roster.member(site)
        identity.verify(
            member.signing_key, _DOMAINS[kind], payload, bytes.fromhex(str(signature)), what=f"{kind} of {site!r}"
        )
    except IdentityError as e:
        raise SecureSumError(e.message) from e


def contribution_header(
    spec: SumSpec, joins: Joins, round: int, nonce: str, site: SiteId, state: str = ""
) -> dict[str, Any]:
    """What a contribution's header says before the hashes of its buffers."""
    return {
        "kind": CONTRIBUTION,
        "session": spec.session,
        "round": round,
        "nonce": nonce,
        "site": site,
        "plan_hash": spec.plan_hash,
        "roster_hash": spec.roster.hash,
        "joins": joins.digest,
        **({"state": state} if state else {}),
    }


def check_contribution(spec: SumSpec, joins: Joins, round: int, nonce: str, header: Any) -> Contribution:
    """Verify a contribution's signed header: every field, then the signature.

    Raises:
        SecureSumError, WireError: a field is missing, of a wrong form or for another session, round, nonce or plan.
    """
    if not isinstance(header, dict):
        raise WireError("a contribution's header is not an object")
    site = header.get("site")
    if not isinstance(site, str) or site not in joins.keys:
        raise SecureSumError("a contribution of a site that did not join")
    site, state = SiteId(site), header.get("state", "")
    if "state" in header and not is_hex(state, 64):
        raise WireError(f"the model state that {site!r} names is malformed")
    expected = contribution_header(spec, joins, round, nonce, site, state)
    if set(header) - {"head"} != {*expected, "ciphertext", "shares", "signature"}:
        raise WireError(f"the header of the contribution of {site!r} has missing or unknown fields")
    for name, value in expected.items():
        if type(header[name]) is not type(value) or header[name] != value:
            raise SecureSumError(f"the contribution of {site!r} has another {name} than this round's")
    shares = header["shares"]
    if not (is_hex(header["ciphertext"], 64) and isinstance(shares, list) and len(shares) == len(joins.helpers)):
        raise WireError(f"the contribution of {site!r} has a malformed header")
    if not all(is_hex(h, 64) for h in shares):
        raise WireError(f"the contribution of {site!r} has a malformed header")
    head = _head(spec, site, header["head"]) if "head" in header else None
    check_signature(spec, site, header)
    return Contribution(site, nonce, header["ciphertext"], tuple(shares), canonical.digest(header), head, state)


def _head(spec: SumSpec, site: SiteId, value: Any) -> Head:
    try:
        head = Copy.from_json(value)
    except ProtocolError as e:
        raise WireError(f"{e.message}: in the contribution of {site!r}") from e
    if head.head.rows == 0 or not head.signed_by(site, spec.roster.member(site).signing_key):
        raise SecureSumError(f"the journal head in the contribution of {site!r} is not signed by it")
    return head


def check_members(spec: SumSpec, joins: Joins, request: Packet, kind: str) -> tuple[int, list[Contribution]]:
    """The round and the announced members of a request of the server, every header verified.

    Raises:
        SecureSumError, WireError: a header does not hold; the members are too few, twice there, out of order, or
            computed from different model states.
    """
    return _once((spec, joins.digest, kind), request, lambda: _check_members(spec, joins, request, kind))


def check_agreements(spec: SumSpec, joins: Joins, request: Packet, round: int, digest: str) -> None:
    """Raise :class:`SecureSumError` or :class:`WireError` unless T distinct helpers signed ``digest`` in a request."""
    asked = (spec, joins.digest, round, digest)
    _once(asked, request, lambda: _check_agreements(spec, joins, request, round, digest))


T = TypeVar("T")
_REMEMBERED = 4
_checked: list[tuple[tuple[Any, ...], bytes, Any]] = []


def _once(asked: tuple[Any, ...], request: Packet, check: Callable[[], T]) -> T:
    """What ``check`` says of the header of ``request``. In a simulation every site reads the same bytes: once for all.

    Args:
        asked: everything else that ``check`` depends on.
    """
    for known, raw, said in _checked:
        if request.raw and raw == request.raw and known == asked:
            return said
    said = check()
    _checked[:] = [(asked, request.raw, said), *_checked[: _REMEMBERED - 1]]
    return said


def _check_agreements(spec: SumSpec, joins: Joins, request: Packet, round: int, digest: str) -> None:
    if request.header.get("digest") != digest:
        raise SecureSumError(f"other members than those agreed for round {round}")
    agreements = request.header.get("agreements")
    if not isinstance(agreements, dict) or len(agreements) > len(spec.all_helpers):
        raise WireError("the agreements are malformed")
    if len(agreements) < spec.threshold:
        raise SecureSumError(f"{len(agreements)} agreements are fewer than the threshold {spec.threshold}")
    for site, signature in agreements.items():
        if site not in joins.helpers:
            raise SecureSumError("an agreement of a site that is no helper or did not join")
        header = agreement_header(spec, round, site, digest)
        check_signature(spec, site, {**header, "signature": signature})


_Members = tuple[int, list[Contribution]]


def _check_members(spec: SumSpec, joins: Joins, request: Packet, kind: str) -> _Members:
    round = check_request(spec, request, kind)
    headers, nonce = request.header.get("members"), request.header.get("nonce")
    if not isinstance(headers, list) or not isinstance(nonce, str) or len(headers) > len(joins.sites):
        raise WireError("the announced members are malformed")
    spec.check_round(round, nonce)
    if len(headers) < spec.min_members:
        raise SecureSumError(f"{len(headers)} members are fewer than the {spec.min_members} a sum needs")
    members = [check_contribution(spec, joins, round, nonce, h) for h in headers]
    order = [spec.roster.index(m.site) for m in members]
    if any(a >= b for a, b in pairwise(order)):
        raise SecureSumError("a site is announced twice, or the members are out of order")
    if (states := len({m.state for m in members})) > 1:
        raise SecureSumError(f"the members of round {round} computed from {states} different model states")
    return round, members


def box_context(round: int, nonce: str, ciphertext: str) -> list[Any]:
    """What a sealed share is bound to beside the session and its two sites."""
    return ["keysum/share", round, nonce, ciphertext]


def members_digest(spec: SumSpec, round: int, members: Mapping[SiteId, str]) -> str:
    """The digest sites sign: session, round and, in roster order, every member with its header's digest."""
    rows = [[site, members[site]] for site in sorted(members, key=spec.roster.index)]
    return canonical.digest({"session": spec.session, "round": round, "members": rows})


def agreement_header(spec: SumSpec, round: int, site: SiteId, digest: str) -> dict[str, Any]:
    """The unsigned header of one site's agreement."""
    return {"kind": AGREEMENT, "session": spec.session, "round": round, "site": site, "digest": digest}


def answer_header(spec: SumSpec, round: int, site: SiteId, digest: str, answer: str) -> dict[str, Any]:
    """The unsigned header of one site's answer; ``answer`` is the SHA-256 of its buffer."""
    return {**agreement_header(spec, round, site, digest), "kind": ANSWER, "answer": answer}


def fingerprint_header(
    spec: SumSpec, round: int, site: SiteId, digest: str, challenge: str, fingerprint: Fingerprint
) -> dict[str, Any]:
    """The unsigned header of one member's fingerprint."""
    header = agreement_header(spec, round, site, digest) | {"kind": FINGERPRINT, "challenge": challenge}
    return header | {"fingerprint": fingerprints.to_bytes(fingerprint).hex()}


class Challenge(NamedTuple):
    """A parsed ``keysum/challenge``: ``members`` gives the digest of each member's signed header."""

    round: int
    nonce: str
    members: dict[SiteId, str]
    digest: str
    challenge: str


def check_challenge(spec: SumSpec, request: Packet) -> Challenge:
    """What the server asks the members to vouch for.

    Raises:
        WireError, SecureSumError: another form or session, members that no sum can have.
    """
    return _once((spec, CHALLENGE), request, lambda: _check_challenge(spec, request))


def _check_challenge(spec: SumSpec, request: Packet) -> Challenge:
    round, header = check_request(spec, request, CHALLENGE), request.header
    nonce, rows, total, answers = (header.get(k) for k in ("nonce", "members", "sum", "answers"))
    if not (isinstance(nonce, str) and isinstance(rows, list) and is_hex(total, 64) and is_hex(answers, 64)):
        raise WireError("a challenge is malformed")
    if not all(isinstance(row, list) and len(row) == 2 and is_hex(row[1], 64) for row in rows):
        raise WireError("the members of a challenge are malformed")
    spec.check_round(round, nonce)
    names = spec.members([row[0] for row in rows])
    members = dict(zip(names, (str(row[1]) for row in rows), strict=True))
    digest = members_digest(spec, round, members)
    challenge = fingerprints.challenge(spec, round, nonce, digest, str(total), str(answers))
    return Challenge(round, nonce, members, digest, challenge)


def check_request(spec: SumSpec, packet: Packet, kind: str) -> int:
    """The round of a request of the server, after its kind and session were checked."""
    header = packet.expect(kind).header
    if header.get("session") != spec.session:
        raise SecureSumError("a request for another session")
    round = header.get("round")
    if type(round) is not int or not 0 <= round <= spec.rounds:
        raise WireError("a request without a planned round")
    return round
