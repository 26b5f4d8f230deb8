"""The server's half of the sum of keys (docs/protocol.md).

It adds ciphertexts, never sees a key of a site, and opens one sum per round: with T sites' answers it interpolates
the sum of the members' keys and nothing else. Wrong answers cannot be told from right ones beforehand. They show when
there are more than T (Reed-Solomon), or as errors that no honest sum has. At last every member vouches for the sum.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from itertools import combinations, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedveil.common.errors import SecureSumError, UnverifiedOpening, WireError
from fedveil.common.threads import each, mapped, spans
from fedveil.common.units import SiteId
from fedveil.common.wire import Packet, sha256
from fedveil.privacy.secagg import _seal, lattice, opening, reed_solomon, residuals, shamir
from fedveil.privacy.secagg import fingerprint as fingerprints
from fedveil.privacy.secagg import keysum_common as messages
from fedveil.privacy.secagg.blinding import BOX_BYTES as GROUP_BOX_BYTES
from fedveil.privacy.secagg.fingerprint import Fingerprint
from fedveil.privacy.secagg.interface import READY, ServerSum, SumSpec, another_state, is_hex
from fedveil.privacy.secagg.kept import KeptCiphertexts
from fedveil.privacy.secagg.keysum_opening import Answer, Opening, Vouched, answers_digest
from fedveil.privacy.secagg.params import HALF_BITS, N, choose
from fedveil.privacy.secagg.sealed import Joins

MAX_TRIES = 256


class KeysumServer(ServerSum):
    """The server of one session. State of a round goes forward only: adding, agreeing, opening, being vouched for.

    Args:
        kept: where ciphertexts are kept for an auditor, if they are.
    """

    def __init__(self, spec: SumSpec, kept: KeptCiphertexts | None = None) -> None:
        self._spec, self._kept = spec, kept
        self._params = choose(spec)
        self._engine = _seal.engine(self._params.plain_bits)
        self._joins: Joins | None = None
        self._round: int | None = None
        self._nonce = self._state = ""
        self._forget()

    def begin(
        self, joins: Mapping[SiteId, Mapping[str, Any]], replies: Mapping[SiteId, Packet]
    ) -> dict[SiteId, Packet]:
        """See :meth:`ServerSum.begin`; for blinded sums the first site's sealed group key is relayed to all others."""
        self._joins = Joins(self._spec, joins)
        blinds = self._spec.reveal_to == "sites"
        lead, *others = self._joins.sites
        for site, packet in replies.items():
            if site not in self._joins.keys:
                raise SecureSumError(f"a reply of {site!r}, which did not join")
            packet.expect(messages.DEAL if blinds and site == lead else READY)
        if not blinds:
            return {}
        if lead not in replies:
            raise SecureSumError(f"{lead!r}, which makes the group key, has not replied")
        boxes = replies[lead].buffer("boxes", GROUP_BOX_BYTES * len(others))
        header = {"kind": messages.GROUP, "session": self._spec.session, "round": 0}
        return {
            site: Packet(header, {"box": boxes[i * GROUP_BOX_BYTES : (i + 1) * GROUP_BOX_BYTES]})
            for i, site in enumerate(others)
        }

    def start_round(self, round: int, nonce: str, state: str = "") -> None:
        """See :meth:`ServerSum.start_round`."""
        self._spec.check_round(round, nonce)
        if self._joins is None:
            raise SecureSumError("no site has joined")
        if self._round is not None and round <= self._round:
            raise SecureSumError(f"round {round} does not follow round {self._round}", hint="rounds only go forward")
        self._round, self._nonce, self._state = round, nonce, state
        self._forget()

    def add(self, site: SiteId, packet: Packet) -> None:
        """See :meth:`ServerSum.add`. The site's ciphertext is not kept, unless the run says so."""
        round, joins = self._open_round()
        if self._digest is not None:
            raise SecureSumError(f"round {round} is closed")
        packet.expect(messages.CONTRIBUTION)
        if packet.header.get("site") != site:
            raise SecureSumError(f"a contribution in another site's name came from {site!r}")
        if site in self._headers:
            raise SecureSumError(f"{site!r} contributed to round {round} before")
        said = messages.check_contribution(self._spec, joins, round, self._nonce, packet.header)
        if said.state != self._state:
            raise another_state(site)
        data = packet.buffer("ciphertext", self._params.ciphertext_bytes)
        boxes = packet.buffer("shares", messages.BOX_BYTES * len(joins.helpers))
        digest, inside = lattice.examined(data)
        if digest != said.ciphertext:
            raise SecureSumError(f"the ciphertext of {site!r} is not the one it signed")
        if not inside:
            raise WireError(f"the ciphertext of {site!r} holds a coefficient outside the ring")
        for i, expected in enumerate(said.shares):
            if sha256(boxes[i * messages.BOX_BYTES : (i + 1) * messages.BOX_BYTES]) != expected:
                raise SecureSumError(f"a sealed share of {site!r} is not the one it signed")
        if self._kept is not None:
            self._kept.keep(round, site, packet)
        self._add(data)
        self._headers[site], self._digests[site], self._boxes[site] = packet.header, said.digest, boxes

    def _add(self, data: bytes) -> None:
        """Add a ciphertext, which is in the ring throughout: nothing is refused any more."""
        if self._held is None:
            self._held = np.zeros((self._params.blocks, N), np.uint64)
        held = self._held

        def add(chunk: tuple[int, memoryview]) -> None:
            blocks = lattice.from_bytes(chunk[1])
            self._engine.add_into(held[chunk[0] : chunk[0] + len(blocks)], blocks)

        each(add, lattice.chunks(data))

    @property
    def members(self) -> tuple[SiteId, ...]:
        """See :attr:`ServerSum.members`."""
        return tuple(sorted(self._headers, key=self._spec.roster.index))

    @property
    def headers(self) -> tuple[dict[str, Any], ...]:
        """See :attr:`ServerSum.headers`."""
        return tuple(self._headers[site] for site in self.members)

    def agree_requests(self) -> dict[SiteId, Packet]:
        """See :meth:`ServerSum.agree_requests`."""
        round, joins = self._open_round()
        if len(self._headers) < self._spec.min_members:
            raise SecureSumError(
                f"{len(self._headers)} sites contributed to round {round}; "
                f"a sum of fewer than {self._spec.min_members} is never opened"
            )
        self._digest = messages.members_digest(self._spec, round, self._digests)
        header = {"kind": messages.MEMBERS, "session": self._spec.session, "round": round, "nonce": self._nonce}
        header["members"] = [self._headers[site] for site in self.members]
        return dict.fromkeys(joins.helpers, Packet(header))

    def add_agreement(self, site: SiteId, packet: Packet) -> None:
        """See :meth:`ServerSum.add_agreement`."""
        round, digest = self._closed_round(site)
        header = packet.expect(messages.AGREEMENT).header
        self._check_signed(site, header, messages.agreement_header(self._spec, round, site, digest))
        self._agreements[site] = header["signature"]

    def open_requests(self) -> dict[SiteId, Packet]:
        """See :meth:`ServerSum.open_requests`: to every helper that agreed, as only those will answer."""
        round, joins = self._open_round()
        if self._opened is not None:
            raise SecureSumError(f"round {round} is open already")
        if len(self._agreements) < self._spec.threshold:
            raise SecureSumError(
                f"{len(self._agreements)} sites agreed on the members of round {round}; "
                f"{self._spec.threshold} are needed"
            )
        header = {"kind": messages.OPEN, "session": self._spec.session, "round": round, "digest": self._digest}
        header["agreements"] = dict(self._agreements)
        requests = dict[SiteId, Packet]()
        for site in self._agreements:
            at = joins.helpers.index(site) * messages.BOX_BYTES
            boxes = [self._boxes[member][at : at + messages.BOX_BYTES] for member in self.members]
            requests[site] = Packet(header, {"shares": b"".join(boxes)})
        return requests

    def add_answer(self, site: SiteId, packet: Packet) -> None:
        """See :meth:`ServerSum.add_answer`."""
        round, digest = self._closed_round(site)
        if site not in self._agreements or site in self._answers:
            raise SecureSumError(f"an answer of {site!r}, which was not asked or answered before")
        data = packet.expect(messages.ANSWER).buffer("answer", messages.SHARE_BYTES)
        header = messages.answer_header(self._spec, round, site, digest, sha256(data))
        self._check_signed(site, packet.header, header)
        answer = np.frombuffer(data, "<u2").astype(np.int64)
        if int(answer.max()) >= shamir.P:
            raise WireError(f"the answer of {site!r} is outside the field")
        self._answers[site] = answer
        self._signatures[site] = packet.header["signature"]

    def fingerprint_requests(self) -> dict[SiteId, Packet]:
        """See :meth:`ServerSum.fingerprint_requests`; the sum of ciphertexts is let go of."""
        round, _ = self._open_round()
        phases, _ = self._opened_sum()
        if self._held is None:
            raise SecureSumError(f"the members of round {round} were asked before")
        held, total = self._held, hashlib.sha256()
        for packed in mapped(lambda some: lattice.to_bytes(held[some]), spans(len(held), lattice.CHUNK)):
            total.update(packed)
        members = {s: Vouched(self._digests[s], (), "") for s in self.members}
        self._vouched = Opening(round, self._nonce, total.hexdigest(), members, self._trusted, phases)
        self._challenge = self._vouched.challenge(self._spec)
        self._expected, self._held = fingerprints.of_blocks(self._challenge, held), None
        header = {"kind": messages.CHALLENGE, "session": self._spec.session, "round": round, "nonce": self._nonce}
        header["members"] = [[site, member.digest] for site, member in members.items()]
        header |= {"sum": self._vouched.total, "answers": answers_digest(self._trusted)}
        return {site: Packet(header) for site in members}

    def add_fingerprint(self, site: SiteId, packet: Packet) -> None:
        """See :meth:`ServerSum.add_fingerprint`."""
        asked = self._asked()
        if site not in asked.members or asked.members[site].signature:
            raise SecureSumError(f"a fingerprint of {site!r}, which was not asked or answered before")
        header, said = packet.expect(messages.FINGERPRINT).header, packet.header.get("fingerprint")
        if not is_hex(said, 2 * fingerprints.BYTES):
            raise WireError(f"the fingerprint of {site!r} is malformed")
        found = fingerprints.from_bytes(bytes.fromhex(str(said)))
        expected = messages.fingerprint_header(
            self._spec, asked.round, site, self._digest or "", self._challenge, found
        )
        self._check_signed(site, header, expected)
        asked.members[site] = Vouched(self._digests[site], found, header["signature"])

    def result(self) -> tuple[NDArray[np.int64], tuple[SiteId, ...]]:
        """See :meth:`ServerSum.result`. Beyond T answers, wrong ones are set aside and named in ``suspects``."""
        if self._spec.reveal_to != "server" or (values := self._opened_sum()[1]) is None:
            raise SecureSumError("the sum is revealed to the sites only", hint="send them what opened() returns")
        values.flags.writeable = False  # it is kept, and shared with who steps on it
        return values, self.members

    def opened(self) -> Packet:
        """See :meth:`ServerSum.opened`: every member has vouched for it, and their fingerprints add up."""
        opening = self._asked()
        missing = tuple(site for site, member in opening.members.items() if not member.signature)
        if missing:
            self._unvouched = missing
            raise UnverifiedOpening(
                f"no fingerprint from {', '.join(missing[:8])}{' and others' if len(missing) > 8 else ''}",
                hint="nobody steps on a sum for which not every member vouched",
            )
        if fingerprints.added([m.fingerprint for m in opening.members.values()]) != self._expected:
            self._unvouched = self._wrong_fingerprints(opening)
            raise UnverifiedOpening(
                f"the members' fingerprints do not add up: that of {', '.join(self._unvouched)} is wrong"
                if self._unvouched
                else "the members' fingerprints do not add up: one of the members is wrong, or the sum",
                hint="" if self._unvouched else "with [run] keep_ciphertexts the server can say which member is wrong",
            )
        return opening.packet(self._spec)

    def _wrong_fingerprints(self, opening: Opening) -> tuple[SiteId, ...]:
        """The members whose fingerprints are not those of their ciphertexts, where these are kept."""
        if self._kept is None:
            return ()
        known = {site: self._kept.fingerprint(opening.round, site, self._challenge) for site in opening.members}
        return tuple(s for s, m in opening.members.items() if known[s] is not None and known[s] != m.fingerprint)

    def _asked(self) -> Opening:
        if self._vouched is None:
            raise SecureSumError("no member was asked to vouch for the sum of this round")
        return self._vouched

    @property
    def suspects(self) -> tuple[SiteId, ...]:
        """See :attr:`ServerSum.suspects`."""
        return self._suspects

    @property
    def unvouched(self) -> tuple[SiteId, ...]:
        """See :attr:`ServerSum.unvouched`."""
        return self._unvouched

    def _opened_sum(self) -> tuple[bytes, NDArray[np.int64] | None]:
        """The packed phases, and the values where the server reads them; opened at the first call."""
        round, _ = self._open_round()
        if self._opened is None:
            if len(self._answers) < self._spec.threshold:
                raise SecureSumError(
                    f"{len(self._answers)} sites answered in round {round}, {self._spec.threshold} are needed"
                )
            self._opened = self._open(round)
            self._boxes = {}
        return self._opened

    def _open(self, round: int) -> tuple[bytes, NDArray[np.int64] | None]:
        sums = self._held
        if sums is None:
            raise SecureSumError(f"nothing was added in round {round}")
        for trusted, wrong in self._candidates():
            key = self._key(trusted)
            try:
                # No honest sum of keys is zero or this large, and SEAL refuses products with zero.
                small = 0 < np.abs(key).max() <= HALF_BITS * len(self._headers)
                opened = self._read(round, sums, key) if small else None
            finally:
                key.fill(0)
            if opened is not None:
                self._suspects = wrong if wrong is not None else self._not_on_the_polynomial_of(trusted)
                self._trusted = {
                    s: Answer(self._answers[s].astype("<u2").tobytes(), self._signatures[s])
                    for s in self._spec.all_helpers
                    if s in trusted
                }
                self._answers = {}
                return opened
        raise SecureSumError(
            f"the shares that opened round {round} were wrong: the errors in the sum are not those of honest sites",
            hint="the round is lost; a site that sent wrong shares or answers must be found and excluded",
        )

    def _candidates(self) -> Iterator[tuple[tuple[SiteId, ...], tuple[SiteId, ...] | None]]:
        """T answers to open with, and the wrong ones among all where these are known.

        First by Reed-Solomon: up to (R - T) / 2 wrong ones among R. Then, where the errors in the sum can tell right
        from wrong, by leaving out one, two, ... sites, which finds more of them in small sessions.
        """
        answered, threshold = self._answered(), self._spec.threshold
        seen = set[tuple[SiteId, ...]]()
        rows = reed_solomon.wrong_rows(
            [self._point(site) for site in answered], np.stack([self._answers[site] for site in answered]), threshold
        )
        if rows is not None:
            wrong = tuple(answered[row] for row in rows)
            sites = tuple(site for site in answered if site not in wrong)[:threshold]
            seen.add(sites)
            yield sites, wrong
        if self._spec.reveal_to != "server":
            return
        choices = (
            tuple(site for site in answered if site not in left_out)[:threshold]
            for count in range(len(answered) - threshold + 1)
            for left_out in combinations(answered, count)
        )
        for sites in islice(choices, MAX_TRIES):
            if sites not in seen:
                seen.add(sites)
                yield sites, None

    def _answered(self) -> list[SiteId]:
        return sorted(self._answers, key=self._spec.roster.index)

    def _point(self, site: SiteId) -> int:
        return self._spec.all_helpers.index(site) + 1

    def _key(self, sites: tuple[SiteId, ...]) -> NDArray[np.int64]:
        """The sum of the members' keys by T answers."""
        answers = np.stack([self._answers[site] for site in sites])
        return shamir.centred(shamir.interpolate([self._point(site) for site in sites], answers)[0])

    def _read(
        self, round: int, sums: NDArray[np.uint64], key: NDArray[np.int64]
    ) -> tuple[bytes, NDArray[np.int64] | None] | None:
        """The packed phases and the values; None as soon as a block's errors are not those of a sum of honest sites.

        Of a blinded sum there are no values, and only the sites can see whether its errors are honest.
        """
        p, reader = self._params, None
        if self._spec.reveal_to == "server":
            reader = residuals.Reader(p, len(self._headers), self._spec.length, self._spec.bound)
        public = lattice.PublicPolynomials(self._spec.session, round, self._nonce)
        phases = opening.read(self._engine, p, sums, public, key, reader)
        return None if phases is None else (phases, None if reader is None else reader.values)

    def _not_on_the_polynomial_of(self, trusted: tuple[SiteId, ...]) -> tuple[SiteId, ...]:
        others = [site for site in self._answered() if site not in trusted]
        if not others:
            return ()
        known = np.stack([self._answers[site] for site in trusted])
        right = shamir.interpolate([self._point(s) for s in trusted], known, [self._point(s) for s in others])
        return tuple(s for s, row in zip(others, right, strict=True) if not np.array_equal(row, self._answers[s]))

    def _check_signed(self, site: SiteId, header: dict[str, Any], expected: dict[str, Any]) -> None:
        if {k: v for k, v in header.items() if k != "signature"} != expected:
            raise SecureSumError(f"a message of {site!r} for another session, round or set of members")
        messages.check_signature(self._spec, site, header)

    def _open_round(self) -> tuple[int, Joins]:
        if self._round is None or self._joins is None:
            raise SecureSumError("no round is open")
        return self._round, self._joins

    def _closed_round(self, site: SiteId) -> tuple[int, str]:
        round, joins = self._open_round()
        if self._digest is None:
            raise SecureSumError(f"the members of round {round} are not announced yet")
        if site not in joins.helpers:
            raise SecureSumError(f"a message of {site!r}, which is no helper or did not join")
        return round, self._digest

    def _forget(self) -> None:
        self._held: NDArray[np.uint64] | None = None
        self._headers = dict[SiteId, dict[str, Any]]()
        self._digests = dict[SiteId, str]()
        self._boxes = dict[SiteId, bytes]()
        self._digest: str | None = None
        self._agreements = dict[SiteId, str]()
        self._answers = dict[SiteId, NDArray[np.int64]]()
        self._signatures = dict[SiteId, str]()
        self._opened: tuple[bytes, NDArray[np.int64] | None] | None = None
        self._trusted = dict[SiteId, Answer]()
        self._vouched: Opening | None = None
        self._challenge, self._expected = "", Fingerprint()
        self._suspects = self._unvouched = tuple[SiteId, ...]()
