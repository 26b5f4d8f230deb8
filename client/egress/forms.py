"""What each kind of reply may hold. A reply leaves only if every header field and every buffer is in these tables.

Most fields are compared with what they must be (the session's plan, the request's round and nonce, the site's own
journal) or recomputed (hashes of buffers, digests of members, signatures). Only a few fields are opaque: an ephemeral
public key, ciphertexts, sealed shares and shares of sums. The plan fixes their lengths.
"""

from __future__ import annotations

from typing import Any

from fedveil.client import report_receipt, witness
from fedveil.client.egress.ledger_rows import check_rows, exactly, hexadecimal
from fedveil.client.session import Session, Site
from fedveil.common import canonical, identity
from fedveil.common.errors import PolicyRefusal, ProtocolError
from fedveil.common.journal import Copy
from fedveil.common.wire import Packet, sha256
from fedveil.privacy.joining import JOIN, check_copies, sum_spec
from fedveil.privacy.report import signatures
from fedveil.privacy.secagg import keysum_common as keysum
from fedveil.privacy.secagg import sharedkey_common as sharedkey
from fedveil.privacy.secagg.blinding import BOX_BYTES as GROUP_BOX_BYTES
from fedveil.privacy.secagg.fingerprint import BYTES as FINGERPRINT_BYTES
from fedveil.privacy.secagg.interface import READY, SumSpec
from fedveil.privacy.secagg.params import choose
from fedveil.privacy.secagg.sealed import Joins

_SIGNATURE = hexadecimal(128)
_MAX_JOINS = 64


class Forms:
    """The table of replies, and what is kept from one reply to the next to save work."""

    def __init__(self) -> None:
        self._joins: dict[tuple[str, str], Joins] = {}

    def check(self, packet: Packet, action: str, request: Packet, site: Site) -> None:
        """Raise :class:`PolicyRefusal` unless ``packet`` is one of the answers to ``action`` that may leave.

        Args:
            action: ``join``, ``begin``, ``deal``, ``contribute``, ``agree``, ``open``, ``fingerprint``,
                ``apply``, ``finish``, ``report``.
            request: what is being answered.
        """
        check = {
            "join": self._join, "begin": self._begin, "deal": self._deal, "contribute": self._contribute,
            "agree": self._agree, "open": self._open, "fingerprint": self._fingerprint,
            "apply": self._apply, "finish": self._finish, "report": self._report,
        }.get(action)  # fmt: skip
        if check is None:
            raise PolicyRefusal("this kind of request is never answered")
        session = site.session(request.header.get("session"))
        check(packet, request, site, session)

    # --- before and after the rounds ------------------------------------------------------------------------

    def _join(self, packet: Packet, request: Packet, site: Site, session: Session) -> None:
        """The signed statement: hashes that everybody knows, a fresh public key, and the heads of journals."""
        site.fits(session)
        _exact(packet, {"kind": "joined", "statement": lambda s: isinstance(s, dict)})
        payload = identity.opened(
            packet.header["statement"], JOIN, identity.public_hex(site.key), what="this site's own statement"
        )
        exactly("the statement", packet.header["statement"], {
            "payload": lambda _: True, "signer": identity.public_hex(site.key), "signature": _SIGNATURE,
        })  # fmt: skip
        exactly("the statement", payload, {
            "v": 1, "session": request.header["session"], "site": site.id, "plan_hash": session.plan_hash,
            "roster_hash": site.roster.hash, "contract_hash": site.contract_hash,
            "fields": lambda _: True, **witness.told(site.ledger, site.data_set, site.peers),
        })  # fmt: skip
        check_copies(packet.header["statement"], site.id, site.roster)
        keyed = session.plan.sum in ("keysum", "sharedkey")
        exactly("the statement's fields", payload["fields"], {"x25519": hexadecimal(64)} if keyed else {})
        if payload["fields"] != session.sum.join_fields():
            raise PolicyRefusal("the statement announces a key that is not this session's")

    def _begin(self, packet: Packet, request: Packet, site: Site, session: Session) -> None:
        spec = self._spec(session, site)
        others = len(self._joined(session, site).sites) - 1 if packet.kind != READY else 0
        base = {"session": session.id, "round": 0, "site": site.id}
        if packet.kind == keysum.DEAL and spec.reveal_to == "sites":
            _exact(packet, {"kind": keysum.DEAL, **base}, boxes=others * GROUP_BOX_BYTES)
        elif packet.kind == sharedkey.DEAL and spec.protocol == "sharedkey":
            boxes = len(packet.buffers.get("boxes", b""))
            if boxes > others * sharedkey.MAX_KEY or boxes % max(others, 1):
                raise PolicyRefusal("the sealed keys have the wrong size")
            _exact(packet, {"kind": sharedkey.DEAL, "plan_hash": session.plan_hash, **base}, boxes=boxes)
        else:
            _exact(packet, {"kind": READY})

    def _deal(self, packet: Packet, request: Packet, site: Site, session: Session) -> None:
        _exact(packet, {"kind": "dealt"})

    def _apply(self, packet: Packet, request: Packet, site: Site, session: Session) -> None:
        held = site.model(session).held
        _exact(packet, {"kind": "applied", "round": held.round, "state": held.name})

    def _finish(self, packet: Packet, request: Packet, site: Site, session: Session) -> None:
        """The ledger, row by row, exactly as it is on disk."""
        rows = site.ledger.journal.rows
        check_rows(rows, site.id, site.contract)
        lines = b"".join(row.line() for row in rows)
        _exact(packet, {"kind": "finished", "head": list(site.ledger.head)}, journal=len(lines))
        if packet.buffers["journal"] != lines:
            raise PolicyRefusal("the journal to be handed over is not the site's ledger")

    def _report(self, packet: Packet, request: Packet, site: Site, session: Session) -> None:
        """Only the statement that this site has seen the report, which it has verified and kept."""
        _exact(packet, {"kind": "signed", "statement": lambda s: isinstance(s, dict)})
        statement, own = packet.header["statement"], identity.public_hex(site.key)
        exactly("the signature", statement, {"payload": lambda _: True, "signer": own, "signature": _SIGNATURE})
        payload = identity.opened(statement, signatures.DOMAIN, own, what="this site's signature under the report")
        exactly("the signature", payload, {
            "v": 1, "site": site.id, "session": session.id, "report": report_receipt.digest(site, session),
        })  # fmt: skip

    # --- a round --------------------------------------------------------------------------------------------

    def _contribute(self, packet: Packet, request: Packet, site: Site, session: Session) -> None:
        """The sum's own form. And the ledger: nothing leaves unless it was charged for this round as the plan says."""
        plan, round_ = session.plan, request.header.get("round")
        site.fits(session)
        if not isinstance(round_, int) or site.ledger.tally.by_round.get((session.id, round_)) != plan.event:
            raise PolicyRefusal("a contribution to a round for which the ledger was not charged as planned")
        if (session.id, round_) not in site.ledger.tally.committed:
            raise PolicyRefusal("a contribution that the ledger has no commit row for")
        spec, nonce, state = self._spec(session, site), request.header.get("nonce"), _charged(round_, site, session)
        if spec.protocol == "keysum":
            self._keysum(packet, round_, str(nonce), state, site, session)
        elif spec.protocol == "sharedkey":
            lengths = packet.header.get("lengths")
            fields = sharedkey.fields(spec, sharedkey.SEALED, round_, nonce=nonce, site=site.id, state=state)
            data = packet.buffers.get("ciphertexts", b"")
            fields |= {"lengths": lengths, "ciphertexts": sha256(data), "signature": _SIGNATURE}
            _exact(packet, fields, ciphertexts=len(data))
            for _ in sharedkey.pieces(spec, packet):
                pass  # there are as many pieces as the plan's length needs, each within its bound
            keysum.check_signature(spec, site.id, packet.header)
        else:
            _exact(
                packet,
                {
                    "kind": f"{spec.protocol}/contribution", "session": session.id, "round": round_, "nonce": nonce,
                    "site": site.id, "state": state,
                },
                values=8 * spec.length,
            )  # fmt: skip

    def _keysum(self, packet: Packet, round_: int, nonce: str, state: str, site: Site, session: Session) -> None:
        spec, joins = self._spec(session, site), self._joined(session, site)
        boxes, n = packet.buffers.get("shares", b""), len(joins.helpers)
        fields = keysum.contribution_header(spec, joins, round_, nonce, site.id, state) | {
            "ciphertext": sha256(packet.buffers.get("ciphertext", b"")),
            "shares": [sha256(boxes[i * keysum.BOX_BYTES : (i + 1) * keysum.BOX_BYTES]) for i in range(n)],
            "signature": _SIGNATURE,
        }
        if "head" in packet.header:
            fields["head"] = lambda head: _own_head(head, site)
        size = choose(spec).ciphertext_bytes
        _exact(packet, fields, ciphertext=size, shares=n * keysum.BOX_BYTES)
        keysum.check_signature(spec, site.id, packet.header)

    def _agree(self, packet: Packet, request: Packet, site: Site, session: Session) -> None:
        spec, round_ = self._spec(session, site), request.header.get("round")
        _, members = keysum.check_members(spec, self._joined(session, site), request, keysum.MEMBERS)
        digest = keysum.members_digest(spec, int(str(round_)), {m.site: m.digest for m in members})
        _exact(packet, keysum.agreement_header(spec, int(str(round_)), site.id, digest) | {"signature": _SIGNATURE})
        keysum.check_signature(spec, site.id, packet.header)
        if (session.id, round_) not in site.ledger.tally.agreed:
            raise PolicyRefusal("an agreement that the ledger does not hold")

    def _open(self, packet: Packet, request: Packet, site: Site, session: Session) -> None:
        """A helper's share of the sum of keys. If every site has the key: the sum itself."""
        site.fits(session)
        spec, round_ = self._spec(session, site), int(str(request.header.get("round")))
        if spec.protocol == "keysum":
            answer = packet.buffers.get("answer", b"")
            header = keysum.answer_header(spec, round_, site.id, str(request.header.get("digest")), sha256(answer))
            _exact(packet, header | {"signature": _SIGNATURE}, answer=keysum.SHARE_BYTES)
        else:
            values = packet.buffers.get("values", b"")
            header = sharedkey.fields(spec, sharedkey.OPENED, round_, site=site.id, values=sha256(values))
            _exact(packet, header | {"signature": _SIGNATURE}, values=8 * spec.length)
        keysum.check_signature(spec, site.id, packet.header)

    def _fingerprint(self, packet: Packet, request: Packet, site: Site, session: Session) -> None:
        """A few numbers that follow from a ciphertext which has left already, and from the request."""
        site.fits(session)
        spec, asked = self._spec(session, site), keysum.check_challenge(self._spec(session, site), request)
        if (session.id, asked.round) not in site.ledger.tally.committed:
            raise PolicyRefusal("a fingerprint of a contribution that the ledger has no commit row for")
        header = keysum.fingerprint_header(spec, asked.round, site.id, asked.digest, asked.challenge, ())
        _exact(packet, header | {"fingerprint": hexadecimal(2 * FINGERPRINT_BYTES), "signature": _SIGNATURE})
        keysum.check_signature(spec, site.id, packet.header)

    # --- what the session's members know --------------------------------------------------------------------

    def _spec(self, session: Session, site: Site) -> SumSpec:
        return sum_spec(session.plan, session.id, site.roster)

    def _joined(self, session: Session, site: Site) -> Joins:
        """Who joined, from the site's own store. It was written there after every statement had been checked."""
        held = site.store_for(session.id).get("joins")
        if held is None:
            raise PolicyRefusal("an answer for a session that has not begun")
        key = (session.id, sha256(held))
        if key not in self._joins:
            if len(self._joins) >= _MAX_JOINS:
                self._joins.clear()
            self._joins[key] = Joins(self._spec(session, site), canonical.loads(held))
        return self._joins[key]


def _exact(packet: Packet, header: dict[str, Any], **buffers: int) -> None:
    """The header's fields and the buffers' names and lengths, and nothing else."""
    exactly(f"the answer {header['kind']!r}", packet.header, header)
    lengths = {name: len(data) for name, data in packet.buffers.items()}
    if lengths != buffers:
        raise PolicyRefusal(f"the answer {header['kind']!r} has other buffers than it may have")


def _charged(round_: int, site: Site, session: Session) -> str:
    """The model state that the ledger names for this round's charge."""
    for row in reversed(site.ledger.journal.rows):
        if row.kind == "spend" and (row.body["session"], row.body["round"]) == (session.id, round_):
            return str(row.body.get("state", ""))
    return ""


def _own_head(value: Any, site: Site) -> bool:
    """Whether ``value`` is a head that this site's own journal had at some time."""
    rows = site.ledger.journal.rows
    try:
        copy = Copy.from_json(value)
    except ProtocolError:
        return False
    (count, last), known = copy.head, (rows[0].hash, site.data_set)
    genuine = copy.signed_by(site.id, identity.public_hex(site.key)) and (copy.ledger, copy.data_set) == known
    return genuine and 0 < count <= len(rows) and rows[count - 1].hash == last
