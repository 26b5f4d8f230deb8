"""The server's half of the sum of keys (docs/protocol.md).

It adds ciphertexts, never sees a key of a site, and opens one sum per round: with T sites' answers it interpolates
the sum of the members' keys and nothing else. Wrong answers cannot be told from right ones beforehand; they show
when the sum is opened, as errors that no sum of honest errors could have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedveil.common.errors import SecureSumError, WireError
from fedveil.common.units import SiteId
from fedveil.common.wire import Packet, sha256
from fedveil.privacy.secagg import _seal, lattice, shamir
from fedveil.privacy.secagg import keysum_common as messages
from fedveil.privacy.secagg.interface import READY, ServerSum, SumSpec
from fedveil.privacy.secagg.params import HALF_BITS, VARIANCE, N, Q, choose
from fedveil.privacy.secagg.sealed import Joins

MAX_TRIES = 256
# A block's mean squared error stays below 1.5 times its variance except with probability exp(-193): errors are
# strictly sub-Gaussian (sums of Rademacher variables), so that the chi-square bound 1.5^2048 * exp(-1024) holds.
# Under a wrong key it is about delta^2 / 12, at least ten times as much for any parameters that choose() returns.
EXCESS = 1.5


class KeysumServer(ServerSum):
    """The server of one session. State of a round goes forward only: adding, agreeing, opening."""

    def __init__(self, spec: SumSpec) -> None:
        self._spec = spec
        self._params = choose(spec)
        self._engine = _seal.engine(self._params.plain_bits)
        self._joins: Joins | None = None
        self._round: int | None = None
        self._nonce = ""
        self._forget()

    def begin(
        self, joins: Mapping[SiteId, Mapping[str, Any]], replies: Mapping[SiteId, Packet]
    ) -> dict[SiteId, Packet]:
        """See :meth:`ServerSum.begin`; nothing is relayed."""
        self._joins = Joins(self._spec, joins)
        for site, packet in replies.items():
            if site not in self._joins.keys:
                raise SecureSumError(f"a reply of {site!r}, which did not join")
            packet.expect(READY)
        return {}

    def start_round(self, round: int, nonce: str) -> None:
        """See :meth:`ServerSum.start_round`."""
        self._spec.check_round(round, nonce)
        if self._joins is None:
            raise SecureSumError("no site has joined")
        if self._round is not None and round <= self._round:
            raise SecureSumError(f"round {round} does not follow round {self._round}", hint="rounds only go forward")
        self._round, self._nonce = round, nonce
        self._forget()

    def add(self, site: SiteId, packet: Packet) -> None:
        """See :meth:`ServerSum.add`. The site's ciphertext is not kept."""
        round, joins = self._open_round()
        if self._digest is not None:
            raise SecureSumError(f"round {round} is closed")
        packet.expect(messages.CONTRIBUTION)
        if packet.header.get("site") != site:
            raise SecureSumError(f"a contribution in another site's name came from {site!r}")
        if site in self._headers:
            raise SecureSumError(f"{site!r} contributed to round {round} before")
        said = messages.check_contribution(self._spec, joins, round, self._nonce, packet.header)
        data = packet.buffer("ciphertext", self._params.ciphertext_bytes)
        boxes = packet.buffer("shares", messages.BOX_BYTES * len(joins.sites))
        if sha256(data) != said.ciphertext:
            raise SecureSumError(f"the ciphertext of {site!r} is not the one it signed")
        for i, expected in enumerate(said.shares):
            if sha256(boxes[i * messages.BOX_BYTES : (i + 1) * messages.BOX_BYTES]) != expected:
                raise SecureSumError(f"a sealed share of {site!r} is not the one it signed")
        self._engine.add_into(self._held, lattice.from_bytes(data))
        self._headers[site], self._digests[site], self._boxes[site] = packet.header, said.digest, boxes

    @property
    def members(self) -> tuple[SiteId, ...]:
        """See :attr:`ServerSum.members`."""
        return tuple(sorted(self._headers, key=self._spec.roster.index))

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
        return {site: Packet(header) for site in joins.sites}

    def add_agreement(self, site: SiteId, packet: Packet) -> None:
        """See :meth:`ServerSum.add_agreement`."""
        round, digest = self._closed_round(site)
        header = packet.expect(messages.AGREEMENT).header
        self._check_signed(site, header, messages.agreement_header(self._spec, round, site, digest))
        self._agreements[site] = header["signature"]

    def open_requests(self) -> dict[SiteId, Packet]:
        """See :meth:`ServerSum.open_requests`: to every site that agreed, as only those will answer."""
        round, joins = self._open_round()
        if len(self._agreements) < self._spec.threshold:
            raise SecureSumError(
                f"{len(self._agreements)} sites agreed on the members of round {round}; "
                f"{self._spec.threshold} are needed"
            )
        header = {"kind": messages.OPEN, "session": self._spec.session, "round": round, "digest": self._digest}
        header["agreements"] = dict(self._agreements)
        requests = dict[SiteId, Packet]()
        for site in self._agreements:
            at = joins.sites.index(site) * messages.BOX_BYTES
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

    def result(self) -> tuple[NDArray[np.int64], tuple[SiteId, ...]]:
        """See :meth:`ServerSum.result`. Beyond T answers, wrong ones are set aside and named in ``suspects``."""
        round, _ = self._open_round()
        if self._opened is None:
            if len(self._answers) < self._spec.threshold:
                raise SecureSumError(
                    f"{len(self._answers)} sites answered in round {round}, {self._spec.threshold} are needed"
                )
            self._opened = self._open(round)
            self._held, self._boxes = [], {}
        return self._opened.copy(), self.members

    @property
    def suspects(self) -> tuple[SiteId, ...]:
        """See :attr:`ServerSum.suspects`."""
        return self._suspects

    def _open(self, round: int) -> NDArray[np.int64]:
        sums = self._engine.total(self._held, self._params.blocks)
        for sites, key in self._candidates():
            try:
                values = self._decrypt(round, sums, key)
            finally:
                key.fill(0)
            if values is not None:
                self._name_suspects(sites)
                self._answers = {}
                return values
        raise SecureSumError(
            f"the shares that opened round {round} were wrong: the errors in the sum are not those of honest sites",
            hint="the round is lost; a site that sent wrong shares or answers must be found and excluded",
        )

    def _candidates(self) -> Iterator[tuple[tuple[SiteId, ...], NDArray[np.int64]]]:
        """Sums of keys by T answers each: first without anybody left out, then without one, two, ... sites."""
        answered = sorted(self._answers, key=self._spec.roster.index)
        spare = len(answered) - self._spec.threshold
        choices = (
            tuple(site for site in answered if site not in left_out)[: self._spec.threshold]
            for count in range(spare + 1)
            for left_out in combinations(answered, count)
        )
        largest = HALF_BITS * len(self._headers)
        seen = set[tuple[SiteId, ...]]()
        for sites in islice(choices, MAX_TRIES):
            if sites in seen:
                continue
            seen.add(sites)
            points = [self._spec.roster.index(site) + 1 for site in sites]
            key = shamir.centred(shamir.interpolate(points, np.stack([self._answers[site] for site in sites]))[0])
            # No honest sum of keys is zero, and SEAL refuses products with zero.
            if 0 < np.abs(key).max() <= largest:
                yield sites, key

    def _decrypt(self, round: int, sums: NDArray[np.uint64], key: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """The opened values, or None as soon as a block's errors are not those of a sum of honest sites."""
        p, length = self._params, self._spec.length
        public = lattice.PublicPolynomials(self._spec.session, round, self._nonce)
        decryptor = self._engine.decryptor(key)
        shift = np.uint64(p.delta * lattice.message_offset(p))
        allowed = EXCESS * VARIANCE * len(self._headers)
        per_block = p.per_coefficient * N
        out = np.empty(p.blocks * per_block, np.int64)
        for first in range(0, p.blocks, lattice.CHUNK):
            c0 = (sums[first : first + lattice.CHUNK] + shift) % np.uint64(Q)
            a = public.take(len(c0))
            noisy = lattice.reduce((c0 + self._engine.multiply(a, key)).view(np.int64))
            message = self._engine.decrypt(decryptor, c0, self._engine.inverse(a))
            error = (noisy - np.uint64(p.delta) * message).view(np.int64)
            error = np.where(error > Q // 2, error - Q, error).astype(np.float64)
            if float(np.mean(error * error, axis=1).max()) > allowed:
                return None
            values = lattice.unpack_values(message, p)
            out[first * per_block : (first + len(c0)) * per_block] = values.reshape(-1)
        return out[:length]

    def _name_suspects(self, trusted: tuple[SiteId, ...]) -> None:
        """Sites whose answer is not on the polynomial of those that opened the sum."""
        others = [site for site in self._answers if site not in trusted]
        if others:
            index = self._spec.roster.index
            known = np.stack([self._answers[site] for site in trusted])
            right = shamir.interpolate([index(s) + 1 for s in trusted], known, [index(s) + 1 for s in others])
            wrong = [s for s, row in zip(others, right, strict=True) if not np.array_equal(row, self._answers[s])]
            self._suspects = tuple(sorted(wrong, key=index))

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
        if site not in joins.keys:
            raise SecureSumError(f"a message of {site!r}, which did not join")
        return round, self._digest

    def _forget(self) -> None:
        self._held = list[Any]()
        self._headers = dict[SiteId, dict[str, Any]]()
        self._digests = dict[SiteId, str]()
        self._boxes = dict[SiteId, bytes]()
        self._digest: str | None = None
        self._agreements = dict[SiteId, str]()
        self._answers = dict[SiteId, NDArray[np.int64]]()
        self._opened: NDArray[np.int64] | None = None
        self._suspects: tuple[SiteId, ...] = ()
