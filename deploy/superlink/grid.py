"""Flower's ``Grid`` over SuperLink, for a task that our server executor has taken.

A SuperNode counts as a site if it authenticates with the TLS key that the signed roster names for that site. SuperNodes
with other keys do not exist here. Neither do sites that a gate refuses (revocation, expiry), from the moment it does.
Sites keep the node numbers they have on our own transport. So a run goes on after a restart, although Flower then gives
its nodes other numbers.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator

from cryptography.hazmat.primitives import serialization as ser
from flwr.app import Message, RecordDict

from fedveil.common import flwr_adapter as flower
from fedveil.common.errors import IdentityError, TransportError, WireError
from fedveil.common.identity import Roster
from fedveil.common.units import SiteId
from fedveil.common.wire import Limits
from fedveil.deploy.superlink.runtime import Inflow, Task
from fedveil.deploy.transport import Traffic

_POLL_S = 0.2
_LOG = logging.getLogger("fedveil.superlink")


def _open(site: SiteId) -> None:
    """Nobody is refused."""


class SuperlinkGrid(flower.BaseGrid):
    """Flower's ``Grid`` over the SuperNodes of a roster's sites.

    Args:
        task: the ServerApp's task, begun.
        roster: who takes part.
        limits: the largest size of one reply.
        gate: called with a site whenever it would be counted, asked or heard; raises :class:`IdentityError` when its
            certificate is not, or no longer, to be accepted.
    """

    def __init__(
        self, task: Task, roster: Roster, *, limits: Limits | None = None, gate: Callable[[SiteId], None] = _open
    ) -> None:
        super().__init__(task.run_id)
        self._gate, self._shut_out = gate, set[SiteId]()
        self._task, self._limits = task, limits or Limits()
        self._by_key = {m.tls_key: m.site for m in roster.sites}
        self._sites = {flower.node_id(m.site): m.site for m in roster.sites}
        self._theirs: dict[SiteId, int] = {}
        self._asked: dict[str, Message] = {}
        self._came: dict[str, Message] = {}
        self._arriving: list[Inflow] = []
        self._reply_to: dict[str, str] = {}
        self._traffic = Traffic()

    @property
    def traffic(self) -> dict[str, dict[str, int]]:
        """Payload bytes per site: ``sent`` to it, ``received`` from it."""
        return self._traffic.snapshot()

    def site_of(self, node_id: int) -> SiteId:
        """The site behind one of our numbers; its SuperNode holds the site's TLS key."""
        try:
            return self._sites[node_id]
        except KeyError as e:
            raise TransportError(f"node {node_id} is not a site of the roster") from e

    def get_node_ids(self) -> Iterable[int]:
        """The sites whose SuperNodes are online."""
        online: list[int] = []
        for number, pem in self._task.nodes():
            site = self._by_key.get(_fingerprint(pem))
            if site is not None and self._admitted(site):
                self._theirs[site] = number
                online.append(flower.node_id(site))
        return online

    def wait_for_sites(self, count: int, timeout: float) -> int:
        """Wait until ``count`` sites are online or ``timeout`` seconds have passed; returns how many are."""
        end = time.monotonic() + timeout
        while (there := len(list(self.get_node_ids()))) < count and time.monotonic() < end:
            time.sleep(_POLL_S)
        return there

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand every message to SuperLink. Returns the ids to pull replies by; an id is empty if nobody can be asked.

        That is so for a site that had no SuperNode since this process began, that the gate refuses, or that SuperLink
        does not know any more. A site that is only away is asked when it is back.
        """
        requests = list(messages)
        sites = [self.site_of(m.metadata.dst_node_id) for m in requests]
        if any(site not in self._theirs for site in sites):
            list(self.get_node_ids())
        asked = {s for s in sites if s in self._theirs and self._admitted(s)}
        known = [(s, m) for s, m in zip(sites, requests, strict=True) if s in asked]
        taken = iter(self._task.push([self._readdressed(s, m) for s, m in known]) if known else [])
        out: list[str] = []
        for site, request in zip(sites, requests, strict=True):
            message_id = next(taken) if site in asked else ""
            if message_id:
                self._asked[message_id] = _stub(request)
                self._traffic.add(site, sent=flower.content_bytes(request))
            else:
                _LOG.warning("%s cannot be asked", site)
            out.append(message_id)
        return out

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to ``message_ids`` that came whole; each is given once."""
        wanted = [i for i in message_ids if i in self._asked]
        if wanted:
            self._look(wanted)
        return [self._came.pop(i) for i in wanted if i in self._came]

    def replies(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """The replies one by one, as they come; after ``timeout`` seconds no more are waited for."""
        left = {i for i in self.push_messages(messages) if i}
        end = time.monotonic() + (float("inf") if timeout is None else timeout)
        while left:
            for reply in self.pull_messages(list(left)):
                left.discard(reply.metadata.reply_to_message_id)
                yield reply
                del reply
            if left and time.monotonic() > end:
                break
            if left:
                time.sleep(_POLL_S)
        for message_id in left:
            self._asked.pop(message_id, None)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """:meth:`replies`, all of them."""
        return list(self.replies(messages, timeout=timeout))

    def _look(self, wanted: list[str]) -> None:
        """Take what has come. A reply that is not whole yet is continued the next time."""
        # SuperLink forgets a message when it hands out the reply's envelope; asked again it says that there is none.
        handed_out = {*self._came, *self._reply_to.values()}
        asked = [i for i in wanted if i not in handed_out]
        for envelope, inflow in self._task.pull(asked, self._limits) if asked else []:
            self._reply_to[inflow.root] = envelope.metadata.reply_to_message_id
            self._arriving.append(inflow)
        arriving, self._arriving = self._arriving, []
        for inflow in arriving:
            request = self._asked.get(self._reply_to[inflow.root])
            if request is None:
                del self._reply_to[inflow.root]  # nobody waits for it any more
                continue
            try:
                site = self.site_of(request.metadata.dst_node_id)
                if not self._admitted(site):
                    raise IdentityError(f"{site} may not take part any more")
                state = self._task.fetch(inflow)
                if state == "partly":
                    self._arriving.append(inflow)
                    continue
                if state == "gone":
                    raise WireError("a reply's objects are gone")
                reply = inflow.message()
            except (WireError, IdentityError) as e:
                reply = flower.error_reply(e, request)
            self._accept(inflow.root, request, reply)

    def _accept(self, root: str, request: Message, reply: Message) -> None:
        """Keep a reply under its request's metadata, whatever its sender wrote there."""
        message_id = self._reply_to.pop(root)
        del self._asked[message_id]
        request.metadata.__dict__["_message_id"] = message_id
        out = self._came[message_id] = flower.readdressed(reply, request)
        site = self.site_of(request.metadata.dst_node_id)
        self._traffic.add(site, received=flower.content_bytes(out))

    def _admitted(self, site: SiteId) -> bool:
        try:
            self._gate(site)
        except IdentityError as e:
            if site not in self._shut_out:
                _LOG.error("%s is shut out: %s", site, e)
            self._shut_out.add(site)
            return False
        return True

    def _readdressed(self, site: SiteId, request: Message) -> Message:
        """``request`` under Flower's number of the site's SuperNode; its content is shared."""
        out = flower.with_metadata(_stub(request).metadata, request.content, None)
        out.metadata.dst_node_id = self._theirs[site]
        return out


def _stub(message: Message) -> Message:
    """``message`` without its content."""
    return flower.copied(flower.with_metadata(message.metadata, RecordDict(), None))


def _fingerprint(pem: bytes) -> str:
    """SHA-256 of the SubjectPublicKeyInfo, as the roster names TLS keys; empty for what is no key."""
    try:
        key = ser.load_pem_public_key(pem)
    except (ValueError, TypeError):
        return ""
    der = key.public_bytes(ser.Encoding.DER, ser.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()
