"""The site's half of the sum of keys (docs/protocol.md; the same family as Willow, CRYPTO 2025).

Every round the site encrypts under a fresh key of its own and shares that key among all sites. It helps to open a sum
of keys only after T sites signed the same members, and once per round. What a round has promised is on stable storage
before it is sent. So no restart makes a site promise something else: neither another plaintext under the same key, nor
another set of members.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from fedveil.common import canonical
from fedveil.common.errors import HelperRefusal, IdentityError, SecureSumError, UnverifiedOpening, WireError
from fedveil.common.threads import mapped, spans
from fedveil.common.units import SiteId
from fedveil.common.wire import Packet, sha256
from fedveil.privacy.secagg import _seal, lattice, named_state, shamir, verification
from fedveil.privacy.secagg import fingerprint as fingerprints
from fedveil.privacy.secagg import keysum_common as messages
from fedveil.privacy.secagg.blinding import BOX_BYTES as GROUP_BOX_BYTES
from fedveil.privacy.secagg.blinding import GroupKey
from fedveil.privacy.secagg.contributions import Contributions, from_bytes, to_parts
from fedveil.privacy.secagg.interface import READY, Head, Integers, SiteSum, SumSpec, Witness
from fedveil.privacy.secagg.params import N, choose
from fedveil.privacy.secagg.sealed import Joins, SessionKey
from fedveil.privacy.secagg.store import Store


class _Chunk(NamedTuple):
    """What a chunk of blocks is encrypted with beside the secret; all but the errors are taken from one sequence."""

    part: slice
    public: NDArray[np.uint64]
    errors: lattice.Stream
    blinding: NDArray[np.uint64] | None


class KeysumSite(SiteSum):
    """One site of one session; a new object on the same store continues where the old one stopped."""

    def __init__(self, spec: SumSpec, site: SiteId, key: Ed25519PrivateKey, store: Store) -> None:
        self._spec, self._site, self._signing_key, self._store = spec, site, key, store
        self._params = choose(spec)
        self._engine = _seal.engine(self._params.plain_bits)
        self._session = SessionKey(spec, site, store)
        self._contributions = Contributions(self._session, store)
        self._group = GroupKey(self._session, store) if spec.reveal_to == "sites" else None

    def join_fields(self) -> dict[str, Any]:
        """``{"x25519": hex}``: this session's public key."""
        return {"x25519": self._session.public()}

    def begin(self, joins: Mapping[SiteId, Mapping[str, Any]]) -> Packet:
        """See :meth:`SiteSum.begin`; for blinded sums the first joined site deals the group key."""
        lead, *others = self._session.join(joins).sites
        if self._group is None or self._site != lead:
            return Packet({"kind": READY})
        header = {"kind": messages.DEAL, "session": self._spec.session, "round": 0, "site": self._site}
        return Packet(header, {"boxes": b"".join(self._group.deal(others))})

    def receive(self, packet: Packet) -> None:
        """Take the group key, if sums are blinded and another site deals it."""
        joins = self._joined()
        if self._group is None or self._site == joins.sites[0]:
            raise SecureSumError("a key that this site did not expect")
        messages.check_request(self._spec, packet, messages.GROUP)
        self._group.take(joins.sites[0], packet.buffer("box", GROUP_BOX_BYTES))

    def contribute(self, round: int, nonce: str, values: Integers, head: Head | None = None, state: str = "") -> Packet:
        """See :meth:`SiteSum.contribute`: encrypt, share the key, seal, sign, store."""
        self._spec.check_round(round, nonce)
        joins = self._joined()
        held = self._contributions.held(round, nonce)
        if held is not None:
            return held
        values = self._spec.vector(values)
        secret = lattice.small(lattice.Stream.fresh(), (N,))
        try:
            ciphertext, digest = self._encrypt(round, nonce, values, secret)
            boxes = self._seal_shares(joins, round, nonce, digest, secret)
        finally:
            secret.fill(0)
        header = messages.contribution_header(self._spec, joins, round, nonce, self._site, state)
        header |= {"ciphertext": digest, "shares": [sha256(box) for box in boxes]}
        if head is not None:
            header["head"] = head.to_json()
        packet = Packet(
            messages.sign_header(self._signing_key, header), {"ciphertext": ciphertext, "shares": b"".join(boxes)}
        )
        return self._contributions.keep(round, packet)

    def replay(self, round: int) -> Packet | None:
        """See :meth:`SiteSum.replay`."""
        return self._contributions.replay(round)

    def agree(self, request: Packet, witness: Witness | None = None) -> Packet:
        """See :meth:`SiteSum.agree`: sign the announced members, one set per round."""
        try:
            joins = self._joined()
            if self._site not in joins.helpers:
                raise SecureSumError("this site is not on the committee that opens sums")
            round, members = self._check_members(request)
            self._check_own(round, members)
            if witness is not None:
                witness({m.site: m.head for m in members if m.head is not None})
        except (WireError, IdentityError, SecureSumError) as e:
            raise _refusal(e) from e
        digest = messages.members_digest(self._spec, round, {m.site: m.digest for m in members})
        mine = joins.helpers.index(self._site)
        promise = {
            "digest": digest,
            "nonce": members[0].nonce,
            "members": [[m.site, m.ciphertext, m.shares[mine]] for m in members],
        }
        try:
            self._store.put(self._session.name("agreed", round), canonical.dumps(promise))
        except SecureSumError as e:
            raise HelperRefusal(f"other members were announced for round {round} before") from e
        header = messages.agreement_header(self._spec, round, self._site, digest)
        return Packet(messages.sign_header(self._signing_key, header))

    def open(self, request: Packet) -> Packet:
        """See :meth:`SiteSum.open`: the sum of the members' shares, once per round."""
        try:
            round = messages.check_request(self._spec, request, messages.OPEN)
            promise = self._promise(round)
            self._check_agreements(request, round, promise["digest"])
            held = self._store.get(self._session.name("answer", round))
            if held is not None:
                return from_bytes(held)
            answer = self._sum_of_shares(request, round, promise)
        except (WireError, IdentityError, SecureSumError) as e:
            raise _refusal(e) from e
        header = messages.answer_header(self._spec, round, self._site, promise["digest"], sha256(answer))
        packet = Packet(messages.sign_header(self._signing_key, header), {"answer": answer})
        self._store.put(self._session.name("answer", round), *to_parts(packet))
        return packet

    def fingerprint(self, request: Packet) -> Packet:
        """See :meth:`SiteSum.fingerprint`: of the contribution that is kept, for one challenge a round."""
        try:
            self._joined()
            asked = messages.check_challenge(self._spec, request)
            self._check_agreed(asked.round, asked.digest)
            name = self._session.name("fingerprint", asked.round)
            held = self._store.get(name)
            if held is not None:
                packet = from_bytes(held)
                if packet.header["challenge"] != asked.challenge:
                    raise SecureSumError(f"another opening of round {asked.round} was vouched for before")
                return packet
            own = self._contributions.replay(asked.round)
            if own is None or asked.members.get(self._site) != canonical.digest(own.header):
                raise SecureSumError("this site is not among the members, or with a contribution that it does not keep")
            if own.header["nonce"] != asked.nonce:
                raise SecureSumError(f"an opening of round {asked.round} under another nonce")
            found = fingerprints.of(asked.challenge, own.buffers["ciphertext"])
            header = messages.fingerprint_header(
                self._spec, asked.round, self._site, asked.digest, asked.challenge, found
            )
            packet = Packet(messages.sign_header(self._signing_key, header))
            self._store.put(name, *to_parts(packet))  # before it leaves: there is never a second one
        except (WireError, IdentityError, SecureSumError) as e:
            raise _refusal(e) from e
        return packet

    def opened(self, packet: Packet) -> tuple[NDArray[np.int64], tuple[SiteId, ...]]:
        """See :meth:`SiteSum.opened`; the values are shared by the sites of a process, and cannot be written to."""
        opening, digest = verification.parsed(self._spec, packet)
        self._check_agreed(opening.round, digest)
        return verification.once(self._spec, opening, self._group), tuple(opening.members)

    def named(self, value: Any) -> tuple[int, str]:
        """See :meth:`SiteSum.named`."""
        joins = self._joined()

        def verify(round: int, nonce: str, header: Any) -> tuple[SiteId, str]:
            said = messages.check_contribution(self._spec, joins, round, nonce, header)
            return said.site, said.state

        return named_state.check(self._spec, value, verify)

    def end(self) -> None:
        """Destroy the session's keys: sealed shares that somebody recorded stay sealed for ever."""
        if self._group is not None:
            self._group.destroy()
        self._session.destroy()
        self._contributions.drop()

    def _joined(self) -> Joins:
        if self._session.joins is None or self._session.ended:
            raise SecureSumError("this site is not in the session", hint="join first; an ended session stays ended")
        return self._session.joins

    def _encrypt(self, round: int, nonce: str, values: Integers, secret: NDArray[np.int64]) -> tuple[bytes, str]:
        """delta * m + e - a * s modulo q, and the blinding if there is one, packed; and its SHA-256.

        Chunk by chunk over threads, each with errors from a key of its own. Only the ciphertext is held as a whole.
        """
        p, public = self._params, lattice.PublicPolynomials(self._spec.session, round, nonce)
        blind = None if self._group is None else self._group.stream(self._spec.session, round, nonce, self._site)
        out, digest, transformed = lattice.Packed(p.blocks), hashlib.sha256(), self._engine.transformed(secret)

        def chunks() -> Iterator[_Chunk]:
            for part in spans(p.blocks, lattice.CHUNK):
                size = part.stop - part.start
                yield _Chunk(part, public.take(size), lattice.Stream.fresh(), blind.take(size) if blind else None)

        def encrypted(chunk: _Chunk) -> memoryview:
            x = lattice.encode(lattice.rows(values, chunk.part, p), p)
            x += lattice.small(chunk.errors, x.shape)
            x -= self._engine.product(chunk.public, transformed).view(np.int64)
            if chunk.blinding is not None:
                x += chunk.blinding.view(np.int64)
            return out.put(chunk.part.start, lattice.reduce(x))

        try:
            for packed in mapped(encrypted, chunks()):
                with packed:
                    digest.update(packed)
        finally:
            transformed.fill(0)
        return out.value(), digest.hexdigest()

    def _seal_shares(self, joins: Joins, round: int, nonce: str, digest: str, secret: NDArray[np.int64]) -> list[bytes]:
        """One box per joined helper, in the helpers' order."""
        helpers = self._spec.all_helpers
        shares = shamir.share(secret, self._spec.threshold, len(helpers))
        context = messages.box_context(round, nonce, digest)
        boxes = [
            self._session.seal(site, context, row.astype("<u2").tobytes())
            for site, row in zip(helpers, shares, strict=True)
            if site in joins.keys
        ]
        shares.fill(0)
        return boxes

    def _check_members(self, request: Packet) -> tuple[int, list[messages.Contribution]]:
        """The round and the announced members, every header verified."""
        return messages.check_members(self._spec, self._joined(), request, messages.MEMBERS)

    def _check_own(self, round: int, members: list[messages.Contribution]) -> None:
        said = self._contributions.said(round)
        for m in members:
            if m.site == self._site and (said is None or said[0] != m.digest):
                raise SecureSumError("this site is announced with a contribution that it did not make")
        if said is not None and said[1] != members[0].state:
            raise SecureSumError(f"the members of round {round} computed from another model state than this site")

    def _check_agreed(self, round: int, digest: str) -> None:
        """A helper takes no sum of other members than it signed."""
        signed = self._store.get(self._session.name("agreed", round))
        if signed is not None and canonical.loads(signed)["digest"] != digest:
            raise UnverifiedOpening(f"a sum over other members than this site signed for round {round}")

    def _promise(self, round: int) -> dict[str, Any]:
        self._joined()
        data = self._store.get(self._session.name("agreed", round))
        if data is None:
            raise SecureSumError(f"this site agreed to no members for round {round}")
        return canonical.loads(data)

    def _check_agreements(self, request: Packet, round: int, digest: str) -> None:
        """T signatures of distinct helpers on ``digest``."""
        messages.check_agreements(self._spec, self._joined(), request, round, digest)

    def _sum_of_shares(self, request: Packet, round: int, promise: dict[str, Any]) -> bytes:
        members = promise["members"]
        boxes = request.buffer("shares", messages.BOX_BYTES * len(members))
        total = np.zeros(N, np.int64)
        for i, (site, ciphertext, expected) in enumerate(members):
            box = boxes[i * messages.BOX_BYTES : (i + 1) * messages.BOX_BYTES]
            if sha256(box) != expected:
                raise SecureSumError(f"the sealed share of {site!r} is not the one it signed")
            data = self._session.unseal(SiteId(site), messages.box_context(round, promise["nonce"], ciphertext), box)
            share = np.frombuffer(data, "<u2")
            if int(share.max()) >= shamir.P:
                raise SecureSumError(f"the share of {site!r} is outside the field")
            total += share
        return (total % shamir.P).astype("<u2").tobytes()


def _refusal(e: WireError | IdentityError | SecureSumError) -> HelperRefusal:
    return e if isinstance(e, HelperRefusal) else HelperRefusal(e.message, hint=e.hint)
