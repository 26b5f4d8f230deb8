"""The opened sum of the sum of keys, as sites and auditors get it: with all that shows whose sum it is.

``keysum/opened``, server -> sites: the header names the members of U, the T helpers whose answers open their sum, and
the SHA-256 of the packed sum of ciphertexts. The buffer ``opening`` holds, without gaps:

1. the phases delta * (sum of messages) + (sum of errors), and the blinding if there is one: 7 bytes a coefficient;
2. for each member the SHA-256 of its signed contribution's header (32 bytes), its fingerprint (35), its signature (64);
3. for each of the T helpers its signature (64) and its answer (8192).
"""

from __future__ import annotations

from dataclasses import dataclass

from fedveil.common import canonical
from fedveil.common.errors import SecureSumError, WireError
from fedveil.common.units import SiteId
from fedveil.common.wire import Packet, sha256
from fedveil.privacy.secagg import fingerprint as fingerprints
from fedveil.privacy.secagg import keysum_common as messages
from fedveil.privacy.secagg.fingerprint import Fingerprint
from fedveil.privacy.secagg.interface import SumSpec, is_hex
from fedveil.privacy.secagg.opened_sum import BUFFERS, KEYSUM
from fedveil.privacy.secagg.params import choose

_DIGEST, _SIGNATURE = 32, 64
_MEMBER = _DIGEST + fingerprints.BYTES + _SIGNATURE
_ANSWER = _SIGNATURE + messages.SHARE_BYTES
_FIELDS = {"kind", "session", "round", "nonce", "members", "helpers", "sum"}


@dataclass(frozen=True)
class Vouched:
    """A member's row: the digest of its signed contribution, its fingerprint, its signature; both in hex."""

    digest: str
    fingerprint: Fingerprint
    signature: str


@dataclass(frozen=True)
class Answer:
    """A helper's sum of shares, as it came, and its signature (hex)."""

    shares: bytes
    signature: str


@dataclass(frozen=True)
class Opening:
    """An opened sum.

    Attributes:
        total: SHA-256 (hex) of the packed sum of ciphertexts.
        members: in roster order.
        answers: of T helpers, in the helpers' order.
        phases: 7 bytes a coefficient.
    """

    round: int
    nonce: str
    total: str
    members: dict[SiteId, Vouched]
    answers: dict[SiteId, Answer]
    phases: bytes | memoryview

    @classmethod
    def parse(cls, spec: SumSpec, packet: Packet) -> Opening:
        """The parts of a packet; nothing is verified yet.

        Raises:
            WireError, SecureSumError: another form or session, a round that is not planned, members or helpers that
                are too few, twice there, out of order or not among the roster's.
        """
        round, header = messages.check_request(spec, packet, KEYSUM), packet.header
        nonce, total, helpers = header.get("nonce"), header.get("sum"), header.get("helpers")
        if set(header) != _FIELDS or not isinstance(nonce, str) or not is_hex(total, 64):
            raise WireError("an opened sum is malformed")
        spec.check_round(round, nonce)
        members = spec.members(header["members"])
        if not isinstance(helpers, list) or len(helpers) != spec.threshold:
            raise WireError(f"an opened sum does not hold the answers of {spec.threshold} helpers")
        chosen = tuple(site for site in spec.all_helpers if site in helpers)
        if list(chosen) != helpers:
            raise SecureSumError("the helpers of an opened sum are no helpers, out of order, or named twice")
        head = choose(spec).ciphertext_bytes
        data = packet.buffer(BUFFERS[KEYSUM], head + _MEMBER * len(members) + _ANSWER * len(chosen))
        answers_at = head + _MEMBER * len(members)
        return cls(
            round, nonce, str(total),
            {s: _member(data[head + i * _MEMBER : head + (i + 1) * _MEMBER]) for i, s in enumerate(members)},
            {s: _answer(data[answers_at + i * _ANSWER :][:_ANSWER]) for i, s in enumerate(chosen)},
            memoryview(data)[:head],
        )  # fmt: skip

    def packet(self, spec: SumSpec) -> Packet:
        """What :meth:`parse` takes."""
        header = {
            "kind": KEYSUM, "session": spec.session, "round": self.round, "nonce": self.nonce,
            "members": list(self.members), "helpers": list(self.answers), "sum": self.total,
        }  # fmt: skip
        rows = [
            bytes.fromhex(m.digest) + fingerprints.to_bytes(m.fingerprint) + bytes.fromhex(m.signature)
            for m in self.members.values()
        ]
        answers = [bytes.fromhex(a.signature) + a.shares for a in self.answers.values()]
        return Packet(header, {BUFFERS[KEYSUM]: b"".join([self.phases, *rows, *answers])})

    def digest(self, spec: SumSpec) -> str:
        """The digest of U that its helpers signed."""
        return messages.members_digest(spec, self.round, {s: m.digest for s, m in self.members.items()})

    def challenge(self, spec: SumSpec) -> str:
        """What the members' fingerprints answer."""
        return fingerprints.challenge(
            spec, self.round, self.nonce, self.digest(spec), self.total, answers_digest(self.answers)
        )


def max_bytes(spec: SumSpec) -> int:
    """The largest size of the buffer in a session."""
    return choose(spec).ciphertext_bytes + _MEMBER * len(spec.roster.sites) + _ANSWER * spec.threshold


def answers_digest(answers: dict[SiteId, Answer]) -> str:
    """SHA-256 (hex) that stands for the signed answers of these helpers."""
    return canonical.digest([[site, sha256(a.shares), a.signature] for site, a in answers.items()])


def _member(row: bytes) -> Vouched:
    at = _DIGEST + fingerprints.BYTES
    return Vouched(row[:_DIGEST].hex(), fingerprints.from_bytes(row[_DIGEST:at]), row[at:].hex())


def _answer(row: bytes) -> Answer:
    return Answer(row[_SIGNATURE:], row[:_SIGNATURE].hex())
