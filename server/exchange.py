"""Requests to sites and their replies, one reply at a time: what the strategy needs of a Grid.

A reply is handed on when it comes. So its content can be added and freed before the next reply is looked at.
How replies are fetched depends on the Grid. Ours tells of every arrival (``replies``). One that works while a message
is pushed (``inprocess``) gets one message after the other. Every other Grid is pulled until all replies are there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from flwr.app import Message
from flwr.serverapp import Grid

from fedveil.common import flwr_adapter
from fedveil.common.errors import FedveilError
from fedveil.common.units import SiteId
from fedveil.common.wire import Limits, Packet
from fedveil.privacy.secagg.plain import Together
from fedveil.server.job import Job

_FIRST_POLL_S, _MAX_POLL_S = 0.02, 1.0
_LOG = logging.getLogger("fedveil.server")


class Exchange:
    """The sites behind a Grid's nodes.

    Attributes:
        nodes: Flower's number of each site that takes part; filled as sites are admitted.
    """

    def __init__(self, job: Job, grid: Grid) -> None:
        self.job, self.grid = job, grid
        self.nodes: dict[SiteId, int] = {}

    def site_of(self, node: int) -> str:
        """The site behind a node, as the transport authenticated it. Empty if the transport authenticates nobody."""
        find = getattr(self.grid, "site_of", None)
        return str(find(node)) if find is not None else ""

    @property
    def together(self) -> Callable[[Mapping[SiteId, Packet]], Together] | None:
        """How a simulation's sites contribute in one go; None where every site answers by itself."""
        return getattr(self.grid, "together", None)

    def wait_for_sites(self, count: int, timeout: float) -> int:
        """Wait at most ``timeout`` seconds until ``count`` sites are connected; returns how many are.

        In a simulation sites do not connect: there all of them count.
        """
        wait = getattr(self.grid, "wait_for_sites", None)
        return len(self.nodes) if wait is None else int(wait(count, timeout))

    def messages(self, packets: Mapping[SiteId, Packet], action: str, round_: int) -> list[Message]:
        """Requests to the sites that have a node."""
        at = {self.nodes[s]: p for s, p in packets.items() if s in self.nodes}
        return flwr_adapter.requests(at, action=action, round=round_)

    def replies(self, messages: Iterable[Message], timeout: float) -> Iterator[Message]:
        """The replies in the order in which they come. The wait is at most ``timeout`` seconds."""
        messages = list(messages)
        if not messages:
            return
        if (stream := getattr(self.grid, "replies", None)) is not None:
            yield from stream(messages, timeout=timeout)
        else:
            yield from _pulled(self.grid, messages, timeout)

    def ask(self, packets: Mapping[SiteId, Packet], action: str, round_: int = 0) -> Iterator[Message]:
        """Send the :meth:`messages`, and give the :meth:`replies` that come within the job's time for a step."""
        return self.replies(self.messages(packets, action, round_), self.job.round_timeout)

    def packets(self, replies: Iterable[Message]) -> dict[SiteId, Packet]:
        """The answers that are not errors. Errors are logged and written into the journal."""
        out: dict[SiteId, Packet] = {}

        def refuse(site: SiteId, error: FedveilError) -> None:
            self.job.journal.append("site.refused", {"session": self.job.session, "site": site, "code": error.code})
            _LOG.warning("%s: %s", site, error)

        self.each(replies, out.__setitem__, refuse)
        return out

    def each(
        self,
        replies: Iterable[Message],
        take: Callable[[SiteId, Packet], None],
        refuse: Callable[[SiteId, FedveilError], None],
    ) -> None:
        """Open every reply as it comes and give it to ``take``. What is an error or no packet goes to ``refuse``.

        No reply is kept during the wait for the next one.
        """
        sites = {n: s for s, n in self.nodes.items()}
        for reply in replies:
            site = sites[reply.metadata.src_node_id]
            try:
                if (error := flwr_adapter.reply_error(reply)) is not None:
                    raise error
                packet = flwr_adapter.from_record(reply.content, Limits())
            except FedveilError as e:
                refuse(site, e)
            else:
                take(site, packet)
                del packet
            del reply


def _pulled(grid: Grid, messages: list[Message], timeout: float) -> Iterator[Message]:
    """Replies by Flower's own push and pull. The pauses between two pulls grow up to a second."""
    left = set(grid.push_messages(messages))
    end, pause = time.monotonic() + timeout, _FIRST_POLL_S
    while left:
        came = False
        for reply in grid.pull_messages(list(left)):
            left.discard(reply.metadata.reply_to_message_id)
            came = True
            yield reply
        rest = end - time.monotonic()
        if not left or rest <= 0:
            return
        pause = _FIRST_POLL_S if came else min(2 * pause, _MAX_POLL_S)
        time.sleep(min(pause, rest))
