"""The server's half of the shared-key sum."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedveil.common.errors import SecureSumError, WireError
from fedveil.common.units import SiteId
from fedveil.common.wire import Packet, sha256
from fedveil.privacy.secagg import _seal, opened_sum
from fedveil.privacy.secagg import sharedkey_common as messages
from fedveil.privacy.secagg.interface import READY, ServerSum, SumSpec, another_state
from fedveil.privacy.secagg.params import check_sharedkey
from fedveil.privacy.secagg.sealed import TAG_BYTES, Joins


class SharedKeyServer(ServerSum):
    """Adds CKKS ciphertexts and never holds the key; the sites open the sum and T of them must say the same.

    **One curious site together with the server reads every site's vector** (see :class:`SharedKeySite`).
    """

    def __init__(self, spec: SumSpec) -> None:
        check_sharedkey(spec)
        self._spec, self._ckks = spec, _seal.Ckks(None)
        self._joins: Joins | None = None
        self._round: tuple[int, str] | None = None
        self._state = ""
        self._forget()

    def begin(
        self, joins: Mapping[SiteId, Mapping[str, Any]], replies: Mapping[SiteId, Packet]
    ) -> dict[SiteId, Packet]:
        """See :meth:`ServerSum.begin`; relays the sealed key of the first joined site to all others."""
        self._joins = Joins(self._spec, joins)
        lead, *others = self._joins.sites
        if lead not in replies:
            raise SecureSumError(f"{lead!r}, which makes the key, has not replied")
        for site, packet in replies.items():
            packet.expect(messages.DEAL if site == lead else READY)
        boxes = replies[lead].buffers.get("boxes", b"")
        size = len(boxes) // max(1, len(others))
        if not TAG_BYTES < size <= messages.MAX_KEY or size * len(others) != len(boxes):
            raise WireError(f"the sealed keys of {lead!r} have a wrong size")
        header = messages.fields(self._spec, messages.KEY, 0)
        return {site: Packet(header, {"box": boxes[i * size : (i + 1) * size]}) for i, site in enumerate(others)}

    def start_round(self, round: int, nonce: str, state: str = "") -> None:
        """See :meth:`ServerSum.start_round`."""
        self._spec.check_round(round, nonce)
        if self._joins is None:
            raise SecureSumError("no site has joined")
        self._round, self._state = (round, nonce), state
        self._forget()

    def add(self, site: SiteId, packet: Packet) -> None:
        """See :meth:`ServerSum.add`."""
        round, nonce, joins = self._open_round()
        if self._closed:
            raise SecureSumError(f"round {round} is closed")
        header = packet.expect(messages.SEALED).header
        if site not in joins.keys or site in self._headers:
            raise SecureSumError(f"{site!r} did not join, or contributed to round {round} before")
        said, state = messages.check_sealed(self._spec, joins, round, nonce, header)
        if said != site:
            raise SecureSumError(f"a contribution in another site's name came from {site!r}")
        if state != self._state:
            raise another_state(site)
        parts = list(messages.pieces(self._spec, packet))
        if sha256(packet.buffers["ciphertexts"]) != header["ciphertexts"]:
            raise SecureSumError(f"the ciphertexts of {site!r} are not those it signed")
        loaded = [self._ckks.load(data, count) for count, data in parts]
        if self._headers:
            loaded = [self._ckks.add(a, b) for a, b in zip(self._sums, loaded, strict=True)]
        self._sums = loaded
        self._headers[site] = header

    @property
    def members(self) -> tuple[SiteId, ...]:
        """See :attr:`ServerSum.members`."""
        return tuple(sorted(self._headers, key=self._spec.roster.index))

    @property
    def headers(self) -> tuple[dict[str, Any], ...]:
        """See :attr:`ServerSum.headers`."""
        return tuple(self._headers[site] for site in self.members)

    def agree_requests(self) -> dict[SiteId, Packet]:
        """None: closes the sum."""
        self._close()
        return {}

    def add_agreement(self, site: SiteId, packet: Packet) -> None:
        """This protocol has no agreement."""
        raise SecureSumError(f"an unexpected agreement of {site!r}")

    def open_requests(self) -> dict[SiteId, Packet]:
        """The encrypted sum, for all joined sites."""
        round, _, joins = self._close()
        parts = [vector.serialize() for vector in self._sums]
        header = messages.fields(self._spec, messages.OPEN, round, members=list(self.members))
        header["lengths"] = [len(p) for p in parts]
        packet = Packet(header, {"ciphertexts": b"".join(parts)})
        return dict.fromkeys(joins.sites, packet)

    def add_answer(self, site: SiteId, packet: Packet) -> None:
        """See :meth:`ServerSum.add_answer`."""
        round, _, joins = self._open_round()
        if not self._closed or site not in joins.keys or site in self._answers:
            raise SecureSumError(f"an answer of {site!r}, which was not asked or answered before")
        header = packet.expect(messages.OPENED).header
        expected = messages.fields(self._spec, messages.OPENED, round, site=site)
        messages.check_signed(self._spec, site, header, expected, {"values"})
        data = packet.buffer("values", 8 * self._spec.length)
        if sha256(data) != header["values"]:
            raise SecureSumError(f"the answer of {site!r} is not the one it signed")
        self._answers[site] = header["values"]
        self._values[header["values"]] = data

    def result(self) -> tuple[NDArray[np.int64], tuple[SiteId, ...]]:
        """See :meth:`ServerSum.result`: the answer that at least T sites gave."""
        self._close()
        best, count = (Counter(self._answers.values()).most_common(1) or [("", 0)])[0]
        if count < self._spec.threshold:
            raise SecureSumError(f"{count} sites gave the same answer, {self._spec.threshold} are needed")
        values = np.frombuffer(self._values[best], "<i8").astype(np.int64)
        if values.max() > self._spec.bound or values.min() < -self._spec.bound:
            raise SecureSumError("the sum left the bound declared in the plan", hint="the plan's range is too small")
        wrong = (site for site, said in self._answers.items() if said != best)
        self._suspects = tuple(sorted(wrong, key=self._spec.roster.index))
        return values, self.members

    def opened(self) -> Packet:
        """See :meth:`ServerSum.opened`."""
        values, members = self.result()
        return opened_sum.pack(self._spec, self._open_round()[0], members, values)

    @property
    def suspects(self) -> tuple[SiteId, ...]:
        """See :attr:`ServerSum.suspects`."""
        return self._suspects

    def _open_round(self) -> tuple[int, str, Joins]:
        if self._round is None or self._joins is None:
            raise SecureSumError("no round is open")
        return *self._round, self._joins

    def _close(self) -> tuple[int, str, Joins]:
        state = self._open_round()
        if len(self._headers) < self._spec.min_members:
            raise SecureSumError(
                f"{len(self._headers)} sites contributed; a sum of fewer than {self._spec.min_members} is never opened"
            )
        self._closed = True
        return state

    def _forget(self) -> None:
        self._sums = list[Any]()
        self._headers = dict[SiteId, dict[str, Any]]()
        self._closed = False
        self._answers = dict[SiteId, str]()
        self._values = dict[str, bytes]()
        self._suspects: tuple[SiteId, ...] = ()
