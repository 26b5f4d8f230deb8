"""Messages between the server's app and the sites' streams: who is connected, what is owed, what has come.

No I/O: the app's thread puts messages and waits, the streams' threads take messages and hand in replies. A message
is owed from :meth:`Mailbox.put` until it is answered, withdrawn or expired; each new session of its site is given
it again, from the byte where the last one broke off. Waiting is by conditions under one lock, never by polling.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Generator, Iterable

from flwr.app import Message

from fedveil.common import flwr_adapter as flower
from fedveil.common.errors import FedveilError, TransportError
from fedveil.common.units import SiteId
from fedveil.common.wire import Limits
from fedveil.deploy.transport.codec import Decoder, encode
from fedveil.deploy.transport.guard import Bounds, Intake, Pace, Strikes
from fedveil.deploy.transport.parcels import Incoming, Link, Parcel, Session, nothing


class Mailbox:
    """The queues of all sites of a run.

    Args:
        sites: whoever may connect; each has its queue from the start.
        grace: seconds after which :meth:`collect` gives up a site that is not connected, counted from when it
            left (from the start if it never came): a site that is gone costs one wait, not one in every round.
        bounds: patience with slow transfers, room for replies, calls that may fail.
    """

    def __init__(self, sites: Iterable[SiteId], grace: float, bounds: Bounds | None = None) -> None:
        self._grace, self._bounds = grace, bounds or Bounds()
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        self._intake = Intake(self._bounds, self._lock)
        now = time.monotonic()
        self._links = {s: Link(s, threading.Condition(self._lock), now, Strikes(self._bounds, now)) for s in sites}
        self._owner: dict[str, Link] = {}
        self._replies: dict[str, Message] = {}
        self._ended = ""

    # The app's side

    def connected(self) -> list[SiteId]:
        """The sites that have a live session, in the order given at the start."""
        with self._lock:
            return self._connected()

    def wait_connected(self, count: int, timeout: float) -> int:
        """Wait until ``count`` sites are connected or ``timeout`` seconds are over; returns how many are."""
        with self._lock:
            self._arrived.wait_for(lambda: len(self._connected()) >= count, timeout)
            return len(self._connected())

    def put(self, site: SiteId, message: Message) -> str:
        """Encode ``message``, queue it and return its fresh id.

        Raises:
            WireError: the message cannot be encoded within the stream's bounds.
        """
        message_id = flower.stamp(message)
        now = time.monotonic()
        parcel = Parcel(message, encode(message), now, now + message.metadata.ttl)
        with self._lock:
            link = self._links[site]
            link.owed[message_id] = parcel
            self._owner[message_id] = link
            link.wake.notify_all()
        return message_id

    def take(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that have come, in the order of ``message_ids``; each is given once."""
        message_ids = list(message_ids)
        with self._lock:
            self._intake.want(*(i for i in message_ids if i in self._owner))
            return [self._pop(i) for i in message_ids if i in self._replies]

    def replies(self, message_ids: Iterable[str], timeout: float | None) -> Generator[Message, None, None]:
        """The replies as they come; what was not answered is then withdrawn.

        A message is given up ``timeout`` seconds after a byte of it, or of its answer, last moved, and after
        ``bounds.longest`` times as much in any case. The wait ends early when every site that still owes a reply has
        been away for ``grace`` seconds. A reply is given away: the mailbox keeps no reference to it. Closing the
        iterator withdraws the rest.
        """
        began = time.monotonic()
        left = dict.fromkeys(message_ids)
        with self._lock:
            self._intake.want(*(i for i in left if i in self._owner))
        try:
            while (message_id := self._next_reply(left, began, math.inf if timeout is None else timeout)) is not None:
                del left[message_id]
                with self._lock:
                    reply = [self._pop(message_id)]
                yield reply.pop()
        finally:
            with self._lock:
                for message_id in left:
                    self._forget(message_id)
                    if message_id in self._replies:
                        self._pop(message_id)

    def collect(self, message_ids: list[str], timeout: float | None) -> list[Message]:
        """:meth:`replies`, all of them, in the order of ``message_ids``."""
        found = {m.metadata.reply_to_message_id: m for m in self.replies(message_ids, timeout)}
        return [found[i] for i in message_ids if i in found]

    def end(self, status: str, timeout: float) -> None:
        """Withdraw everything, let every session end with ``status``, wait for that at most ``timeout`` seconds."""
        with self._lock:
            self._ended = status
            for message_id in list(self._owner):
                self._forget(message_id)
            for link in self._links.values():
                link.wake.notify_all()
            self._arrived.wait_for(lambda: not self._connected(), timeout)

    # The streams' side

    def admit(self, site: SiteId) -> None:
        """Hear a further call of ``site``; :class:`TransportError` when too many came to nothing lately."""
        with self._lock:
            if not self._links[site].strikes.allows(time.monotonic()):
                raise TransportError("too many failed calls of this site", hint="wait a minute")

    def strike(self, site: SiteId) -> None:
        """Count a call of ``site`` that came to nothing."""
        with self._lock:
            self._links[site].strikes.count(time.monotonic())

    def attach(
        self, site: SiteId, instance: str, *, cancel: Callable[[], object] = nothing, certificate: bytes = b""
    ) -> Session:
        """Begin a session of the site's process ``instance``, which replaces its own earlier one.

        Raises:
            TransportError: another process under the same identity is connected and alive.
        """
        with self._lock:
            link = self._links[site]
            old = link.session
            if old is not None:
                if old.instance != instance:
                    raise TransportError(
                        f"another process is connected as {site!r}",
                        hint="stop it: only one process may use an identity",
                    )
                old.alive = False
                old.cancel()
            if (arriving := link.incoming) is not None:
                arriving.cancel()  # its connection is gone, whether that was noticed here or not
                if arriving.instance != instance:
                    self._drop_incoming(link)
            link.session = Session(instance, cancel, certificate)
            link.wake.notify_all()
            self._arrived.notify_all()
            return link.session

    def detach(self, site: SiteId, session: Session) -> None:
        """End ``session``; a session that has replaced it goes on."""
        with self._lock:
            link = self._links[site]
            session.alive = False
            if link.session is session:
                link.session = None
                link.gone_since = time.monotonic()
            link.wake.notify_all()
            self._arrived.notify_all()

    def next_parcel(self, site: SiteId, session: Session) -> Parcel | str:
        """Wait for what to send next; a string means the end: the run's status, or '' if only the session is over.

        One at a time: the next message is given when the last one is answered or withdrawn.
        """
        with self._lock:
            link = self._links[site]
            while session.alive:
                if session.current not in link.owed:
                    session.current = self._first(link)
                    if session.current:
                        return link.owed[session.current]
                    if self._ended:
                        return self._ended
                link.wake.wait()
            return ""

    def delivery(self, session: Session) -> Pace:
        """The message that ``session`` was given begins to go out."""
        with self._lock:
            session.pace = Pace(self._bounds, time.monotonic())
            return session.pace

    def delivered(self, site: SiteId, session: Session) -> None:
        """The message has gone out, whole."""
        with self._lock:
            session.pace = None
            if (parcel := self._links[site].owed.get(session.current)) is not None:
                parcel.moved = time.monotonic()

    def parked(self, site: SiteId, instance: str, message_id: str) -> int:
        """How many bytes of the answer to ``message_id`` came before its stream broke.

        If a stream of the same process is just being broken off, this waits for its end.
        """
        with self._lock:
            link = self._links[site]
            self._arrived.wait_for(lambda: link.incoming is None or link.incoming.parked, self._bounds.stall)
            i = link.incoming
            return i.decoder.received if i and i.parked and (i.instance, i.message_id) == (instance, message_id) else 0

    def begin_reply(
        self, site: SiteId, instance: str, limits: Limits, start: int = 0, cancel: Callable[[], object] = nothing
    ) -> Incoming:
        """Admit one reply at a time, from the process whose session is alive; it begins at the byte ``start``.

        Raises:
            TransportError: no such session, another reply is arriving, or no half-sent one ends at ``start``.
        """
        with self._lock:
            link = self._links[site]
            if link.session is None or link.session.instance != instance:
                raise TransportError("this process has no session", hint="connect again")
            if link.incoming is not None and not link.incoming.parked:
                raise TransportError("a reply of this site is under way already", hint="connect again")
            if start:
                if link.incoming is None or link.incoming.decoder.received != start:
                    raise TransportError("there is no half-sent reply to go on with", hint="connect again")
                link.incoming.parked, link.incoming.cancel = False, cancel
            else:
                self._drop_incoming(link)
                link.incoming = Incoming(instance, Decoder(limits), cancel)
            link.incoming.pace = Pace(self._bounds, time.monotonic())
            return link.incoming

    def make_room(self, site: SiteId, incoming: Incoming, alive: Callable[[], bool]) -> bool:
        """Wait until the reply whose header has come fits into memory; False when nobody waits for it any more."""
        with self._lock:
            link, began = self._links[site], time.monotonic()
            pace, incoming.pace = incoming.pace, None
            fits = self._intake.reserve(
                incoming.message_id,
                incoming.decoder.expects,
                lambda: incoming.message_id in link.owed and alive(),
                self._evict,
            )
            if pace is not None:
                pace.pause(time.monotonic() - began)
            incoming.pace = pace
            return fits

    def end_reply(self, site: SiteId, incoming: Incoming, *, keep: bool) -> None:
        """The reply's stream is over. With ``keep`` it broke, and may go on from what has come of it."""
        with self._lock:
            link = self._links[site]
            incoming.parked = keep and incoming.message_id in link.owed
            incoming.cancel = nothing
            if link.incoming is incoming and not incoming.parked:
                self._drop_incoming(link)
            self._arrived.notify_all()
            self._intake.room.notify_all()

    def owes(self, site: SiteId, message_id: str) -> bool:
        """Whether ``site`` owes an answer to ``message_id``."""
        with self._lock:
            return message_id in self._links[site].owed

    def accept(self, site: SiteId, message_id: str, reply: Message | FedveilError) -> bool:
        """Take the answer to ``message_id``; False when it is not, or no longer, owed by ``site``.

        What a reply says of its sender, run and round is replaced by what the request said. An error stands for
        a reply that could not be read.
        """
        with self._lock:
            parcel = self._links[site].owed.get(message_id)
            if parcel is None:
                return False
            if isinstance(reply, FedveilError):
                reply = flower.error_reply(reply, parcel.message)
                flower.stamp(reply)
            self._replies[message_id] = flower.readdressed(reply, parcel.message)
            self._forget(message_id, answered=True)
            self._arrived.notify_all()
            return True

    # Looking after both

    def sweep(self, refused: Callable[[SiteId, bytes], bool]) -> list[tuple[SiteId, str]]:
        """Break off transfers that are too slow, and sessions whose certificate is ``refused`` by now.

        Returns:
            The sites concerned and why.
        """
        with self._lock:
            sessions = [(s, link.session) for s, link in self._links.items() if link.session is not None]
        gone = [(site, session) for site, session in sessions if refused(site, session.certificate)]
        out = [(site, "its certificate is not accepted any more") for site, _ in gone]
        cancels = [session.cancel for _, session in gone]
        with self._lock:
            now = time.monotonic()
            for site, link in self._links.items():
                for stream in (link.session, link.incoming):
                    if stream is not None and stream.pace is not None and stream.pace.late(now):
                        out.append((site, "a transfer stood still or was too slow"))
                        cancels.append(stream.cancel)
                        stream.pace = None
        for cancel in cancels:
            cancel()
        return out

    def _next_reply(self, message_ids: Iterable[str], began: float, timeout: float) -> str | None:
        """Wait until one of ``message_ids`` has its reply; None when no more is to be waited for."""
        with self._lock:
            while True:
                now = time.monotonic()
                rest = 0.0
                for message_id in message_ids:
                    if (due := self._due(message_id, began, timeout)) <= now:
                        self._forget(message_id)
                    else:
                        rest = max(rest, min(self._patience(message_id), due - now))
                if (came := next((i for i in message_ids if i in self._replies), None)) is not None:
                    return came
                if rest <= 0:
                    return None
                self._arrived.wait(None if math.isinf(rest) else rest)

    # Under the lock

    def _connected(self) -> list[SiteId]:
        return [s for s, link in self._links.items() if link.session is not None]

    def _due(self, message_id: str, began: float, timeout: float) -> float:
        """When the app gives ``message_id`` up if nothing moves from now on."""
        link = self._owner.get(message_id)
        if link is None:
            return math.inf
        moved, now = link.owed[message_id].moved, time.monotonic()
        going = link.session is not None and link.session.current == message_id and link.session.pace is not None
        coming = link.incoming is not None and link.incoming.message_id == message_id and not link.incoming.parked
        if going or coming:
            moved = now
        return min(max(began, moved) + timeout, began + self._bounds.longest * timeout)

    def _patience(self, message_id: str) -> float:
        """Seconds for which waiting makes sense: 0 when nothing is owed, infinite while the debtor is connected."""
        link = self._owner.get(message_id)
        if link is None:
            return 0.0
        return math.inf if link.session is not None else link.gone_since + self._grace - time.monotonic()

    def _first(self, link: Link) -> str:
        for message_id, parcel in list(link.owed.items()):
            if parcel.expires > time.monotonic():
                return message_id
            self._forget(message_id)
            self._arrived.notify_all()
        return ""

    def _forget(self, message_id: str, *, answered: bool = False) -> None:
        link = self._owner.pop(message_id, None)
        if link is not None:
            link.owed.pop(message_id, None)
            if not answered:
                self._intake.unwant(message_id)
            if link.incoming is not None and link.incoming.parked and link.incoming.message_id == message_id:
                self._drop_incoming(link)
            link.wake.notify_all()

    def _pop(self, message_id: str) -> Message:
        """Give a reply away."""
        self._intake.release(message_id)
        return self._replies.pop(message_id)

    def _drop_incoming(self, link: Link) -> None:
        """Let go what has come of a reply; an accepted one keeps its room until it is taken."""
        incoming, link.incoming = link.incoming, None
        if incoming is not None and incoming.message_id not in self._replies:
            self._intake.release(incoming.message_id)

    def _evict(self) -> bool:
        """Give up one half-sent reply of a stream that broke."""
        for link in self._links.values():
            if link.incoming is not None and link.incoming.parked:
                self._drop_incoming(link)
                return True
        return False
