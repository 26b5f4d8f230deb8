"""Whether an opened sum is the sum of its members' signed ciphertexts.

Against the server alone it is: each member signed the fingerprint of its own ciphertext under a challenge that is the
hash of this very opening, and the fingerprints add up to that of the opened sum (:mod:`.fingerprint`). T signed answers
give the sum of the members' keys. The errors must be those of honest sites: with free errors any sum would fit.

That T answers name the members means that T helpers signed these members before, each after it had checked every
header: so a site that took no part in the round, or in the session, can verify its sum too.

A member that deviates together with the server can choose its fingerprint afterwards, and with it the sum.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedveil.common import canonical
from fedveil.common.errors import SecureSumError, UnverifiedOpening
from fedveil.common.threads import mapped
from fedveil.common.units import SiteId
from fedveil.common.wire import Packet, sha256
from fedveil.privacy.secagg import _seal, lattice, residuals, shamir
from fedveil.privacy.secagg import fingerprint as fingerprints
from fedveil.privacy.secagg import keysum_common as messages
from fedveil.privacy.secagg.blinding import GroupKey
from fedveil.privacy.secagg.fingerprint import Fingerprint
from fedveil.privacy.secagg.interface import SumSpec
from fedveil.privacy.secagg.keysum_opening import Opening
from fedveil.privacy.secagg.opened_sum import BUFFERS, KEYSUM
from fedveil.privacy.secagg.params import BLOCK_BYTES, HALF_BITS, choose


class Known(NamedTuple):
    """A parsed opening, and the digest of its members that helpers signed."""

    opening: Opening
    digest: str


# One of each: the virtual sites of a process read and verify the same sum.
_read: list[tuple[tuple[str, ...], bytes, Known]] = []
_last: list[tuple[Opening, str, NDArray[np.int64]]] = []


def parsed(spec: SumSpec, packet: Packet) -> Known:
    """:meth:`Opening.parse` for one of many sites in a process: what was read last is not read again."""
    data = packet.buffers.get(BUFFERS[KEYSUM], b"")
    seen = spec.session, spec.roster.hash, spec.plan_hash, canonical.digest(packet.header)
    for before, buffer, known in _read:
        if before == seen and buffer == data:
            return known
    opening = Opening.parse(spec, packet)
    known = Known(opening, opening.digest(spec))
    _read[:] = [(seen, data, known)]
    return known


def once(spec: SumSpec, opening: Opening, group: GroupKey | None = None) -> NDArray[np.int64]:
    """:func:`verify` for one of many sites in a process: what was verified last is not verified again.

    The values are shared and cannot be written to.

    Args:
        opening: what :func:`parsed` gave.
        group: the site's group key, where sums are blinded.
    """
    key = group.digest if group else ""
    for before, named, values in _last:
        if before is opening and named == key:
            return values
    blinds = group.streams(spec.session, opening.round, opening.nonce, tuple(opening.members)) if group else ()
    values = verify(spec, opening, blinds)
    values.flags.writeable = False
    _last[:] = [(opening, key, values)]
    return values


def verify(spec: SumSpec, opening: Opening, blinds: Sequence[lattice.Uniform] = ()) -> NDArray[np.int64]:
    """The ``(D,)`` integers of an opened sum.

    Args:
        blinds: the members' blindings, where sums are blinded.

    Raises:
        UnverifiedOpening: nothing shows that it is the sum of its members' signed ciphertexts, or its errors or values
            are not those of honest sites.
        WireError: a phase is not below q.
    """
    reader = residuals.Reader(choose(spec), len(opening.members), spec.length, spec.bound)
    try:
        check(spec, opening, blinds, reader)
        return reader.values
    except UnverifiedOpening:
        raise
    except SecureSumError as e:
        raise UnverifiedOpening(e.message, hint=e.hint) from e


class _Chunk(NamedTuple):
    """Packed phases from block ``first`` on, and what is taken from a sequence of its own for them."""

    first: int
    phases: memoryview
    public: NDArray[np.uint64]
    weights: fingerprints.Drawn
    blinds: list[NDArray[np.uint64]]


class _Checked(NamedTuple):
    fingerprint: Fingerprint
    ciphertexts: bytes
    honest: bool


def check(
    spec: SumSpec,
    opening: Opening,
    blinds: Sequence[lattice.Uniform] = (),
    reader: residuals.Reader | None = None,
) -> None:
    """Verify an opened sum, chunk by chunk over threads, and read its values where there is a ``reader``.

    Raises:
        UnverifiedOpening: see :func:`verify`; without a reader the errors are not judged.
        WireError: a phase is not below q.
    """
    key = _key(spec, opening)
    challenge = _vouched(spec, opening)
    engine, weights, total = _seal.engine(choose(spec).plain_bits), fingerprints.Weights(challenge), hashlib.sha256()
    public, transformed = lattice.PublicPolynomials(spec.session, opening.round, opening.nonce), engine.transformed(key)

    def chunks() -> Iterator[_Chunk]:
        for first, data in lattice.chunks(opening.phases):
            size = len(data) // BLOCK_BYTES
            yield _Chunk(first, data, public.take(size), weights.draw(size), [b.take(size) for b in blinds])

    def checked(chunk: _Chunk) -> _Checked:
        phases, product = lattice.from_bytes(chunk.phases), engine.product(chunk.public, transformed)
        ciphertexts = lattice.reduce(np.subtract(phases, product, out=product).view(np.int64))
        part, packed = weights.part(ciphertexts, chunk.weights), lattice.to_bytes(ciphertexts)
        for blind in chunk.blinds:
            phases = lattice.reduce(np.subtract(phases, blind, out=phases).view(np.int64))
        return _Checked(part, packed, reader is None or reader.take(chunk.first, phases))

    for found in mapped(checked, chunks()):
        if not found.honest:
            raise UnverifiedOpening(
                f"the sum of round {opening.round} does not open to a sum of honest sites: too large errors",
                hint="a helper's answer, or a member's ciphertext or share, was wrong",
            )
        weights.add(found.fingerprint)
        total.update(found.ciphertexts)
    if total.hexdigest() != opening.total:
        raise UnverifiedOpening(
            f"the sum of round {opening.round} is not the one whose hash its members were asked about"
        )
    if fingerprints.added([m.fingerprint for m in opening.members.values()]) != weights.sums:
        raise UnverifiedOpening(
            f"the members' fingerprints in round {opening.round} do not add up to that of the opened sum",
            hint="the server sent another sum, or a member another fingerprint",
        )


def _key(spec: SumSpec, opening: Opening) -> NDArray[np.int64]:
    """The sum of the members' keys, from T answers that their helpers signed for these members."""
    rows, digest = list[NDArray[np.int64]](), opening.digest(spec)
    for site, answer in opening.answers.items():
        header = messages.answer_header(spec, opening.round, site, digest, sha256(answer.shares))
        _check(spec, site, {**header, "signature": answer.signature}, "answer")
        row = np.frombuffer(answer.shares, "<u2").astype(np.int64)
        if int(row.max()) >= shamir.P:
            raise UnverifiedOpening(f"the answer of {site!r} in an opened sum is outside the field")
        rows.append(row)
    points = [spec.all_helpers.index(site) + 1 for site in opening.answers]
    key = shamir.centred(shamir.interpolate(points, np.stack(rows))[0])
    if not 0 < np.abs(key).max() <= HALF_BITS * len(opening.members):
        raise UnverifiedOpening(f"the answers of round {opening.round} do not open to a sum of keys of honest sites")
    return key


def _vouched(spec: SumSpec, opening: Opening) -> str:
    """The challenge, after the signature under every member's fingerprint was checked."""
    challenge, digest = opening.challenge(spec), opening.digest(spec)
    for site, member in opening.members.items():
        header = messages.fingerprint_header(spec, opening.round, site, digest, challenge, member.fingerprint)
        _check(spec, site, {**header, "signature": member.signature}, "fingerprint")
    return challenge


def _check(spec: SumSpec, site: SiteId, header: dict[str, Any], what: str) -> None:
    try:
        messages.check_signature(spec, site, header)
    except SecureSumError as e:
        raise UnverifiedOpening(
            f"the {what} of {site!r} in the opened sum of round {header['round']} is not signed by it for this sum"
        ) from e
