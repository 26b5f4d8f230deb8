"""Many sites in one process: the same apps, no sockets, one site after the other.

Light by construction: a request's record structure is copied for its receiver and its immutable bytes are
shared, so that no site can alter what another one sees and no array is duplicated. A reply is its maker's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedveil.common import flwr_adapter as flower
from fedveil.common.errors import ConfigError, TransportError
from fedveil.common.units import SiteId
from fedveil.deploy.transport import Traffic

Inprocess = TypeVar("Inprocess", bound="InprocessGrid")
Drop = Callable[[SiteId, Message], bool]


class InprocessGrid(flower.BaseGrid):
    """Flower's ``Grid`` over client apps that run in this process, when a message is pushed.

    Args:
        client_app: called for every message; its exceptions become error replies.
        sites: the virtual sites' names, each once.
        node_config: from a site's position to its ``node_config``; ``partition-id`` and ``num-partitions`` are
            added, as in Flower's simulation.
        drop: called with the site and every message to or from it (a reply's ``reply_to_message_id`` is not
            empty); True loses the message: a dropped request never reaches the app, a dropped reply is lost
            after the app has done its work.

    Contexts live in memory from the first message to the end of the grid. ``timeout`` is ignored: a sequential
    engine's clock says nothing about a deployment's.
    """

    def __init__(
        self,
        client_app: ClientApp,
        sites: Sequence[SiteId],
        node_config: Callable[[int], dict[str, Any]],
        *,
        drop: Drop | None = None,
    ) -> None:
        super().__init__()
        self.drop = drop
        self._app, self._node_config = client_app, node_config
        self._sites = {flower.node_id(s): (i, s) for i, s in enumerate(sites)}
        if len(self._sites) != len(sites):
            raise ConfigError("two simulated sites have the same name", hint="give every site its own name")
        self._contexts: dict[int, Context] = {}
        self._replies: dict[str, Message] = {}
        self._traffic = Traffic()

    @property
    def traffic(self) -> dict[str, dict[str, int]]:
        """Payload bytes per site: ``sent`` to it, ``received`` from it."""
        return self._traffic.snapshot()

    def site_of(self, node_id: int) -> SiteId:
        """The site behind Flower's number; :class:`TransportError` when there is none."""
        return self._site(node_id)[1]

    def get_node_ids(self) -> Iterable[int]:
        """All sites, in the order given."""
        return list(self._sites)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Deliver every message and keep the replies; returns the ids to pull them by."""
        return [self._deliver(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to ``message_ids`` that came; each is given once."""
        return [self._replies.pop(i) for i in list(message_ids) if i in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """The replies of the sites that were not dropped, in the order of ``messages``."""
        return self.pull_messages(self.push_messages(messages))

    def replies(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """The replies one by one: a site is only asked when the reply before was taken."""
        for message in messages:
            yield from self.send_and_receive([message])

    def _deliver(self, message: Message) -> str:
        message_id = flower.stamp(message)
        node = message.metadata.dst_node_id
        site = self.site_of(node)
        if self.drop is not None and self.drop(site, message):
            return message_id
        self._traffic.add(site, sent=flower.content_bytes(message))
        out = flower.answer(self._app, flower.copied(message), self._context(node))
        if self.drop is not None and self.drop(site, out):
            return message_id
        self._traffic.add(site, received=flower.content_bytes(out))
        self._replies[message_id] = out
        return message_id

    def _site(self, node_id: int) -> tuple[int, SiteId]:
        try:
            return self._sites[node_id]
        except KeyError as e:
            raise TransportError(f"node {node_id} is not one of the simulated sites") from e

    def _context(self, node: int) -> Context:
        if node not in self._contexts:
            index, _ = self._site(node)
            config = {"partition-id": index, "num-partitions": len(self._sites), **self._node_config(index)}
            self._contexts[node] = Context(self._run.run_id, node, config, RecordDict(), {})
        return self._contexts[node]


def run_inprocess(
    server_app: ServerApp,
    client_app: ClientApp,
    sites: Sequence[SiteId],
    node_config: Callable[[int], dict[str, Any]],
    *,
    drop: Drop | None = None,
) -> InprocessGrid:
    """Run ``server_app`` to its end over simulated sites; returns the grid (for its ``traffic``).

    Exceptions of the server app are the caller's.
    """
    return run_on(server_app, InprocessGrid(client_app, sites, node_config, drop=drop))


def run_on(server_app: ServerApp, grid: Inprocess) -> Inprocess:
    """The same on a grid that was made before."""
    context = Context(grid.run.run_id, flower.SERVER_NODE, {}, RecordDict(), {})
    server_app(grid, context)
    return grid
