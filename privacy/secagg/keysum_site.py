"""The site's half of the sum of keys (docs/protocol.md; the same family as Willow, CRYPTO 2025).

Every round the site encrypts under a fresh key of its own and shares that key among all sites; it helps to open
a sum of keys only once T sites signed the same members, and once per round. What a round has promised is on stable
storage before it is sent, so that no restart makes a site promise something else: not another plaintext under
the same key, not another set of members.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from fedveil.common import canonical
from fedveil.common.errors import HelperRefusal, IdentityError, SecureSumError, WireError
from fedveil.common.units import SiteId
from fedveil.common.wire import Packet, sha256
from fedveil.privacy.secagg import _seal, lattice, shamir
from fedveil.privacy.secagg import keysum_common as messages
from fedveil.privacy.secagg.contributions import Contributions, from_bytes, to_bytes
from fedveil.privacy.secagg.interface import READY, SiteSum, SumSpec
from fedveil.privacy.secagg.params import N, choose
from fedveil.privacy.secagg.sealed import Joins, SessionKey
from fedveil.privacy.secagg.store import Store


class KeysumSite(SiteSum):
    """One site of one session; a new object on the same store continues where the old one stopped."""

    def __init__(self, spec: SumSpec, site: SiteId, key: Ed25519PrivateKey, store: Store) -> None:
        self._spec, self._site, self._signing_key, self._store = spec, site, key, store
        self._params = choose(spec)
        self._engine = _seal.engine(self._params.plain_bits)
        self._session = SessionKey(spec, site, store)
        self._contributions = Contributions(self._session, store)

    def join_fields(self) -> dict[str, Any]:
        """``{"x25519": hex}``: this session's public key."""
        return {"x25519": self._session.public()}

    def begin(self, joins: Mapping[SiteId, Mapping[str, Any]]) -> Packet:
        """See :meth:`SiteSum.begin`."""
        self._session.join(joins)
        return Packet({"kind": READY})

    def receive(self, packet: Packet) -> None:
        """Nothing is relayed in this protocol."""
        raise SecureSumError("an unexpected message in the protocol 'keysum'")

    def contribute(self, round: int, nonce: str, values: NDArray[np.int64]) -> Packet:
        """See :meth:`SiteSum.contribute`: encrypt, share the key, seal, sign, store."""
        self._spec.check_round(round, nonce)
        joins = self._joined()
        held = self._contributions.held(round, nonce)
        if held is not None:
            return held
        values = self._spec.vector(values)
        secret = lattice.small(lattice.Stream.fresh(), (N,))
        try:
            ciphertext = self._encrypt(round, nonce, values, secret)
            digest = sha256(ciphertext)
            boxes = self._seal_shares(joins, round, nonce, digest, secret)
        finally:
            secret.fill(0)
        header = messages.contribution_header(self._spec, joins, round, nonce, self._site)
        header |= {"ciphertext": digest, "shares": [sha256(box) for box in boxes]}
        packet = Packet(
            messages.sign_header(self._signing_key, header), {"ciphertext": ciphertext, "shares": b"".join(boxes)}
        )
        return self._contributions.keep(round, packet)

    def replay(self, round: int) -> Packet | None:
        """See :meth:`SiteSum.replay`."""
        return self._contributions.replay(round)

    def agree(self, request: Packet) -> Packet:
        """See :meth:`SiteSum.agree`: sign the announced members, one set per round."""
        try:
            round, members = self._check_members(request)
        except (WireError, IdentityError, SecureSumError) as e:
            raise _refusal(e) from e
        digest = messages.members_digest(self._spec, round, {m.site: m.digest for m in members})
        joins = self._joined()
        mine = joins.sites.index(self._site)
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
        self._store.put(self._session.name("answer", round), to_bytes(packet))
        return packet

    def end(self) -> None:
        """Destroy the session's X25519 key: sealed shares that somebody recorded stay sealed for ever."""
        self._session.destroy()
        self._contributions.drop()

    def _joined(self) -> Joins:
        if self._session.joins is None or self._session.ended:
            raise SecureSumError("this site is not in the session", hint="join first; an ended session stays ended")
        return self._session.joins

    def _encrypt(self, round: int, nonce: str, values: NDArray[np.int64], secret: NDArray[np.int64]) -> bytes:
        """delta * m + e - a * s modulo q, chunk by chunk, packed."""
        p = self._params
        public, errors = lattice.PublicPolynomials(self._spec.session, round, nonce), lattice.Stream.fresh()
        per_block = p.per_coefficient * N
        out = list[bytes]()
        for first in range(0, p.blocks, lattice.CHUNK):
            blocks = min(lattice.CHUNK, p.blocks - first)
            piece = values[first * per_block : (first + blocks) * per_block]
            if piece.size < blocks * per_block:
                piece = np.concatenate([piece, np.zeros(blocks * per_block - piece.size, np.int64)])
            x = lattice.encode(piece.reshape(blocks, p.per_coefficient, N), p)
            x += lattice.small(errors, (blocks, N))
            x -= self._engine.multiply(public.take(blocks), secret).view(np.int64)
            out.append(lattice.to_bytes(lattice.reduce(x)))
        return b"".join(out)

    def _seal_shares(self, joins: Joins, round: int, nonce: str, digest: str, secret: NDArray[np.int64]) -> list[bytes]:
        """One box per joined site, this one included, in roster order."""
        shares = shamir.share(secret, self._spec.threshold, len(self._spec.roster.sites))
        context = messages.box_context(round, nonce, digest)
        boxes = [
            self._session.seal(site, context, shares[self._spec.roster.index(site)].astype("<u2").tobytes())
            for site in joins.sites
        ]
        shares.fill(0)
        return boxes

    def _check_members(self, request: Packet) -> tuple[int, list[messages.Contribution]]:
        spec, joins = self._spec, self._joined()
        round = messages.check_request(spec, request, messages.MEMBERS)
        headers, nonce = request.header.get("members"), request.header.get("nonce")
        if not isinstance(headers, list) or not isinstance(nonce, str) or len(headers) > len(joins.sites):
            raise WireError("the announced members are malformed")
        spec.check_round(round, nonce)
        if len(headers) < spec.min_members:
            raise SecureSumError(f"{len(headers)} members are fewer than the {spec.min_members} a sum needs")
        members = [messages.check_contribution(spec, joins, round, nonce, h) for h in headers]
        order = [spec.roster.index(m.site) for m in members]
        if any(a >= b for a, b in pairwise(order)):
            raise SecureSumError("a site is announced twice, or the members are out of order")
        for m in members:
            if m.site == self._site:
                own = self.replay(round)
                if own is None or canonical.digest(own.header) != m.digest:
                    raise SecureSumError("this site is announced with a contribution that it did not make")
        return round, members

    def _promise(self, round: int) -> dict[str, Any]:
        self._joined()
        data = self._store.get(self._session.name("agreed", round))
        if data is None:
            raise SecureSumError(f"this site agreed to no members for round {round}")
        return canonical.loads(data)

    def _check_agreements(self, request: Packet, round: int, digest: str) -> None:
        """T signatures of distinct sites on the members this site itself agreed to."""
        if request.header.get("digest") != digest:
            raise SecureSumError(f"other members than those agreed for round {round}")
        agreements = request.header.get("agreements")
        if not isinstance(agreements, dict) or len(agreements) > len(self._spec.roster.sites):
            raise WireError("the agreements are malformed")
        if len(agreements) < self._spec.threshold:
            raise SecureSumError(f"{len(agreements)} agreements are fewer than the threshold {self._spec.threshold}")
        for site, signature in agreements.items():
            if site not in self._joined().keys:
                raise SecureSumError("an agreement of a site that did not join")
            header = messages.agreement_header(self._spec, round, site, digest)
            messages.check_signature(self._spec, site, {**header, "signature": signature})

    def _sum_of_shares(self, request: Packet, round: int, promise: dict[str, Any]) -> bytes:
        members = promise["members"]
        boxes = request.buffer("shares", messages.BOX_BYTES * len(members))
        total = np.zeros(N, np.int64)
        for i, (site, ciphertext, expected) in enumerate(members):
            box = boxes[i * messages.BOX_BYTES : (i + 1) * messages.BOX_BYTES]
            if sha256(box) != expected:
                raise SecureSumError(f"the sealed share of {site!r} is not the one it signed")
            data = self._session.unseal(SiteId(site), messages.box_context(round, promise["nonce"], ciphertext), box)
            share = np.frombuffer(data, "<u2").astype(np.int64)
            if int(share.max()) >= shamir.P:
                raise SecureSumError(f"the share of {site!r} is outside the field")
            total += share
        return (total % shamir.P).astype("<u2").tobytes()


def _refusal(e: WireError | IdentityError | SecureSumError) -> HelperRefusal:
    return e if isinstance(e, HelperRefusal) else HelperRefusal(e.message, hint=e.hint)
