"""What the server and a site say to each other, seen from the server.

There are two calls. ``Work``: a site opens it once and the server streams messages to it. ``Reply``: the site streams
one answer, so each answer has its own flow control and outcome. The peer's certificate (SHA-256 of its public key)
tells which member of the roster makes a call.

Frames of ``Work`` are JSON control frames (``welcome``, ``message``, ``end``); after ``message`` come the codec's
chunks of one message. ``Reply`` carries the codec's chunks alone. Metadata entries of a call:

====================== ==========================================================================================
``fedveil-instance``   both calls: the site's process. A new one is a second process while the earlier one's
                       stream is alive, else a restarted one (a closed socket shows at once, a cut line by
                       keep-alive within 15 seconds).
``fedveil-have``       ``Work``: ``<message id>:<bytes>`` of a message of which so much came before the line broke.
``fedveil-from``       ``Reply``: the byte of the answer's stream with which this call begins.
====================== ==========================================================================================

The frame ``message`` says from which byte of the message it goes on (``from``) and how much of its answer has
come (``got``), so that what was half sent, in either direction, is not sent again.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NoReturn

import grpc

from fedveil.common import canonical, identity
from fedveil.common import flwr_adapter as flower
from fedveil.common.errors import FedveilError, IdentityError, TransportError, WireError
from fedveil.common.identity import Roster
from fedveil.common.units import SiteId
from fedveil.common.wire import Limits
from fedveil.deploy.transport import Traffic
from fedveil.deploy.transport.codec import cut
from fedveil.deploy.transport.mailbox import Mailbox
from fedveil.deploy.transport.parcels import Incoming, Parcel, Session

SERVICE = "fedveil.Transport1"
INSTANCE, HAVE, FROM = "fedveil-instance", "fedveil-have", "fedveil-from"
_HAVE = re.compile(r"([0-9a-f]{32}):([0-9]{1,15})")
_FROM = re.compile(r"[0-9]{1,15}")
_QUIET_S = 60.0
_LOG = logging.getLogger("fedveil.transport")


class Service:
    """The two calls. Whatever a peer sends ends in an answer or a status, never in a handler's exception."""

    def __init__(
        self,
        mailbox: Mailbox,
        roster: Roster,
        counters: Traffic,
        limits: Limits,
        run_id: int,
        gate: Callable[[SiteId, bytes], None] | None,
        report: Callable[[SiteId, str], None],
    ) -> None:
        self._mailbox, self._roster, self._counters, self._limits = mailbox, roster, counters, limits
        self._run_id, self._gate, self._report = run_id, gate, report
        self._site_by_pem = lru_cache(maxsize=2 * len(roster.sites))(self._look_up)
        self._told: dict[tuple[SiteId, str], float] = {}
        self._telling = threading.Lock()

    def handler(self) -> grpc.GenericRpcHandler:
        """The calls by name; requests and responses are bytes.

        ``Work`` has one empty request, which is never waited for: a peer that does not send it would hold a thread.
        """
        calls = {
            "Work": grpc.stream_stream_rpc_method_handler(self.work),
            "Reply": grpc.stream_unary_rpc_method_handler(self.reply),
        }
        return grpc.method_handlers_generic_handler(SERVICE, calls)

    def watch(self, over: threading.Event, every: float) -> None:
        """Until ``over``: break off what is too slow, and sessions that the gate does not accept any more."""
        while not over.wait(every):
            for site, why in self._mailbox.sweep(self._refused):
                self._tell(site, why)

    def work(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """Stream messages to a site until the run or the connection ends."""
        site, instance, pem = self._peer(context)
        have = _HAVE.fullmatch(_entry(context, HAVE))
        self._mailbox.strike(site)  # a site dials seldom; one that does so all the time is not heard for a while
        try:
            session = self._mailbox.attach(site, instance, cancel=context.cancel, certificate=pem)
        except TransportError as e:
            self._tell(site, "a second live process under its identity was refused")
            _abort(context, grpc.StatusCode.ALREADY_EXISTS, e)
        try:
            if not context.add_callback(lambda: self._mailbox.detach(site, session)):
                return
            yield canonical.dumps({"t": "welcome", "v": 1, "site": site, "run": str(self._run_id)})
            while not isinstance(parcel := self._mailbox.next_parcel(site, session), str):
                yield from self._deliver(site, session, parcel, have)
            if parcel:
                yield canonical.dumps({"t": "end", "status": parcel})
        finally:
            self._mailbox.detach(site, session)

    def reply(self, stream: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        """Receive one answer; b"stale" when nobody waits for it any more."""
        site, instance, _ = self._peer(context)
        start = _entry(context, FROM)
        try:
            if start and not _FROM.fullmatch(start):
                raise TransportError(f"the metadata entry {FROM} is no number", hint="connect again")
            offset = int(start or 0)
            incoming = self._mailbox.begin_reply(site, instance, self._limits, offset, context.cancel)
        except TransportError as e:
            self._mailbox.strike(site)
            _abort(context, grpc.StatusCode.FAILED_PRECONDITION, e)
        outcome = b""
        broken = [True]
        try:
            outcome = self._receive(site, incoming, stream, context, broken)
            return outcome
        finally:
            if outcome != b"ok":
                self._mailbox.strike(site)
            self._mailbox.end_reply(site, incoming, keep=not outcome and broken[0])

    def _deliver(self, site: SiteId, session: Session, parcel: Parcel, have: re.Match[str] | None) -> Iterator[bytes]:
        start = 0
        if have is not None and have[1] == session.current and int(have[2]) <= parcel.size:
            start = int(have[2])
        got = self._mailbox.parked(site, session.instance, session.current)
        yield canonical.dumps({"t": "message", "from": start, "got": got})
        pace = self._mailbox.delivery(session)
        for chunk in cut(parcel.pieces, skip=start):
            self._counters.add(site, sent=len(chunk))
            yield chunk
            pace.moved(len(chunk), time.monotonic())
        self._mailbox.delivered(site, session)

    def _receive(
        self,
        site: SiteId,
        incoming: Incoming,
        stream: Iterator[bytes],
        context: grpc.ServicerContext,
        broken: list[bool],
    ) -> bytes:
        decoder = incoming.decoder
        try:
            for chunk in stream:
                self._counters.add(site, received=len(chunk))
                decoder.feed(chunk)
                if incoming.pace is not None:
                    incoming.pace.moved(len(chunk), time.monotonic())
                if not incoming.message_id and decoder.metadata is not None:
                    incoming.message_id = decoder.metadata.reply_to_message_id
                    if not self._mailbox.make_room(site, incoming, context.is_active):
                        return b"stale"
                if incoming.message_id and not self._mailbox.owes(site, incoming.message_id):
                    return b"stale"
            if not decoder.complete:
                # A lost connection can look like this. The answer is still owed, and goes on later.
                _abort(context, grpc.StatusCode.ABORTED, WireError("the reply's stream ended early"))
            reply = decoder.result()
        except WireError as e:
            broken[0] = False
            if decoder.metadata is not None:
                self._mailbox.accept(site, decoder.metadata.reply_to_message_id, e)
            _abort(context, grpc.StatusCode.INVALID_ARGUMENT, e)
        return b"ok" if self._mailbox.accept(site, incoming.message_id, reply) else b"stale"

    def _peer(self, context: grpc.ServicerContext) -> tuple[SiteId, str, bytes]:
        pems = context.auth_context().get("x509_pem_cert") or []
        instance = _entry(context, INSTANCE)
        try:
            if len(pems) != 1:
                raise IdentityError("no client certificate", hint="connect with the site's TLS files")
            pem = bytes(pems[0])
            site = self._site_by_pem(pem)
            if self._gate is not None:
                self._gate(site, pem)
        except IdentityError as e:
            _abort(context, grpc.StatusCode.PERMISSION_DENIED, e)
        try:
            self._mailbox.admit(site)
        except TransportError as e:
            self._tell(site, e.message)
            _abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, e)
        if not 0 < len(instance) <= 64:
            self._mailbox.strike(site)
            _abort(context, grpc.StatusCode.INVALID_ARGUMENT, WireError(f"the metadata lacks {INSTANCE}"))
        return site, instance, pem

    def _look_up(self, pem: bytes) -> SiteId:
        return self._roster.by_tls_key(identity.spki_sha256(pem)).site

    def _refused(self, site: SiteId, pem: bytes) -> bool:
        try:
            if self._gate is not None:
                self._gate(site, pem)
        except IdentityError:
            return True
        return False

    def _tell(self, site: SiteId, what: str) -> None:
        """Report and log, the same thing once a minute: a peer must not be able to fill a disk."""
        with self._telling:
            now = time.monotonic()
            if now - self._told.get((site, what), -_QUIET_S) < _QUIET_S:
                return
            self._told[site, what] = now
        _LOG.warning("%s: %s", site, what)
        self._report(site, what)


def _entry(context: grpc.ServicerContext, name: str) -> str:
    value = dict(context.invocation_metadata()).get(name, "")
    return value if isinstance(value, str) else ""


def _abort(context: grpc.ServicerContext, code: grpc.StatusCode, error: FedveilError) -> NoReturn:
    context.abort(code, flower.error_text(error))
    raise error  # abort() never returns; this tells type checkers
