"""The site's half of the shared-key sum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from fedveil.common.errors import HelperRefusal, IdentityError, SecureSumError, WireError
from fedveil.common.units import SiteId
from fedveil.common.wire import Packet, sha256
from fedveil.privacy.secagg import _seal, named_state, opened_sum
from fedveil.privacy.secagg import sharedkey_common as messages
from fedveil.privacy.secagg.contributions import Contributions
from fedveil.privacy.secagg.interface import READY, Head, Integers, SiteSum, SumSpec, Witness
from fedveil.privacy.secagg.keysum_common import check_request, sign_header
from fedveil.privacy.secagg.params import CKKS_MAX_VALUE, CKKS_SLOTS, check_sharedkey
from fedveil.privacy.secagg.sealed import SessionKey
from fedveil.privacy.secagg.store import Store


class SharedKeySite(SiteSum):
    """Encrypts under one CKKS key that all sites hold (the classic homomorphic mode).

    **One curious site together with the server reads every site's vector**: the site has the key, the server the
    ciphertexts. A server that lies about what it sends to be opened reads single vectors by itself. The protocol
    protects against a server that keeps to it, not against a holder of the key. The first joined site makes the key.
    """

    def __init__(self, spec: SumSpec, site: SiteId, key: Ed25519PrivateKey, store: Store) -> None:
        check_sharedkey(spec)
        self._spec, self._site, self._signing_key, self._store = spec, site, key, store
        self._session = SessionKey(spec, site, store)
        self._contributions = Contributions(self._session, store)
        self._ckks: _seal.Ckks | None = None

    def join_fields(self) -> dict[str, Any]:
        """``{"x25519": hex}``: the key for which the shared key is sealed."""
        return {"x25519": self._session.public()}

    def begin(self, joins: Mapping[SiteId, Mapping[str, Any]]) -> Packet:
        """See :meth:`SiteSum.begin`; the first joined site replies with the key, sealed for every other."""
        sites = self._session.join(joins).sites
        if self._site != sites[0]:
            return Packet({"kind": READY})
        key = self._store.get(self._session.name("ckks"))
        if key is None:
            key = _seal.ckks_key()
            self._store.put(self._session.name("ckks"), key)
        boxes = [self._session.seal(site, messages.KEY_CONTEXT, key) for site in sites[1:]]
        return Packet(messages.fields(self._spec, messages.DEAL, 0, site=self._site), {"boxes": b"".join(boxes)})

    def receive(self, packet: Packet) -> None:
        """Take the sealed key from the first joined site, once."""
        joins = self._session.joins
        if joins is None or self._site == joins.sites[0]:
            raise SecureSumError("a key that this site did not expect")
        check_request(self._spec, packet, messages.KEY)
        box = packet.buffers.get("box", b"")
        if not 0 < len(box) <= messages.MAX_KEY:
            raise WireError("a sealed key of a wrong size")
        key = self._session.unseal(joins.sites[0], messages.KEY_CONTEXT, box)
        self._ckks = _seal.Ckks(key)
        self._store.put(self._session.name("ckks"), key)

    def contribute(self, round: int, nonce: str, values: Integers, head: Head | None = None, state: str = "") -> Packet:
        """See :meth:`SiteSum.contribute`.

        Raises:
            SecureSumError: also for a value of 2^31 or more in size, which this protocol cannot hold.
        """
        self._spec.check_round(round, nonce)
        engine = self._engine()
        held = self._contributions.held(round, nonce)
        if held is not None:
            return held
        values = self._spec.vector(values)
        if max(int(values.max()), -int(values.min())) > CKKS_MAX_VALUE:
            raise SecureSumError("a value too large for a sum under CKKS", hint="use keysum")
        parts = [engine.encrypt(values[i : i + CKKS_SLOTS]) for i in range(0, values.size, CKKS_SLOTS)]
        data = b"".join(parts)
        named = {"state": state} if state else {}
        header = messages.fields(self._spec, messages.SEALED, round, nonce=nonce, site=self._site, **named)
        header |= {"lengths": [len(p) for p in parts], "ciphertexts": sha256(data)}
        return self._contributions.keep(round, Packet(sign_header(self._signing_key, header), {"ciphertexts": data}))

    def replay(self, round: int) -> Packet | None:
        """See :meth:`SiteSum.replay`."""
        return self._contributions.replay(round)

    def agree(self, request: Packet, witness: Witness | None = None) -> Packet:
        """This protocol has no agreement: always refused."""
        raise HelperRefusal("the protocol 'sharedkey' has no agreement step")

    def open(self, request: Packet) -> Packet:
        """Decrypt one sum per round; :class:`HelperRefusal` for a second one or for too few members."""
        try:
            round = check_request(self._spec, request, messages.OPEN)
            members = request.header.get("members")
            if not isinstance(members, list) or len(set(map(str, members))) < self._spec.min_members:
                raise SecureSumError(f"fewer than {self._spec.min_members} members are announced")
            engine = self._engine()
            parts = list(messages.pieces(self._spec, request))
            self._store.put(self._session.name("opened", round), sha256(request.buffers["ciphertexts"]).encode())
            values = np.concatenate([engine.decrypt(data, count) for count, data in parts])
        except (WireError, IdentityError, SecureSumError) as e:
            raise HelperRefusal(e.message, hint=e.hint) from e
        data = values.astype("<i8").tobytes()
        header = messages.fields(self._spec, messages.OPENED, round, site=self._site, values=sha256(data))
        return Packet(sign_header(self._signing_key, header), {"values": data})

    def opened(self, packet: Packet) -> tuple[NDArray[np.int64], tuple[SiteId, ...]]:
        """See :meth:`SiteSum.opened`: the server's word."""
        return opened_sum.unpack(self._spec, packet)

    def named(self, value: Any) -> tuple[int, str]:
        """See :meth:`SiteSum.named`."""
        joins = self._session.joins
        if joins is None:
            raise SecureSumError("this site was not told who joined", hint="the server begins a session first")
        return named_state.check(self._spec, value, lambda *said: messages.check_sealed(self._spec, joins, *said))

    def end(self) -> None:
        """Destroy the shared key and the X25519 key."""
        self._store.erase(self._session.name("ckks"))
        self._session.destroy()
        self._contributions.drop()
        self._ckks = None

    def _engine(self) -> _seal.Ckks:
        if self._session.ended:
            raise SecureSumError("this session has ended")
        if self._ckks is None:
            key = self._store.get(self._session.name("ckks"))
            if key is None:
                raise SecureSumError("this site has no shared key yet", hint="the first site deals it when it joins")
            self._ckks = _seal.Ckks(key)
        return self._ckks
