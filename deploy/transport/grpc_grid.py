"""The server's half of our transport: Flower's ``Grid`` over mTLS gRPC. Sites dial out, nothing dials in.

TLS 1.3 only. A certificate of another authority already fails in the handshake. What is said after the handshake is
described in :mod:`fedveil.deploy.transport.grpc_service`.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import Any

import grpc
from flwr.app import Context, Message, RecordDict
from flwr.serverapp import ServerApp

from fedveil.common import flwr_adapter as flower
from fedveil.common.errors import TransportError
from fedveil.common.identity import Roster
from fedveil.common.units import SiteId
from fedveil.common.wire import Limits
from fedveil.deploy import TLS13_ONLY
from fedveil.deploy.transport import TlsFiles, Traffic
from fedveil.deploy.transport.codec import CHUNK
from fedveil.deploy.transport.grpc_service import Service
from fedveil.deploy.transport.guard import Bounds
from fedveil.deploy.transport.mailbox import Mailbox

OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", CHUNK + 4096),
    ("grpc.max_send_message_length", CHUNK + 4096),
    ("grpc.keepalive_time_ms", 10_000),  # more often than a proxy forgets an idle connection
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # without it a dead line is noticed after a minute
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
_SERVER_OPTIONS: list[tuple[str, Any]] = [
    *OPTIONS,
    ("grpc.so_reuseport", 0),  # otherwise a second server would share the port without a word
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.max_concurrent_streams", 16),
    ("grpc.server_handshake_timeout_ms", 10_000),  # for a peer that is silent or sends byte by byte
    ("grpc.max_connection_idle_ms", 60_000),  # a site always has a call open
    ("grpc.max_metadata_size", 8 << 10),
    ("grpc.absolute_max_metadata_size", 16 << 10),
]
_CONNECTIONS_PER_SITE, _SPARE_CONNECTIONS = 2, 512
_FAREWELL_S = 5.0
_SWEEP_S = 1.0
_LOG = logging.getLogger("fedveil.transport")
Gate = Callable[[SiteId, bytes], None]
Report = Callable[[SiteId, str], None]


def _silent(site: SiteId, what: str) -> None:
    """Nobody is told."""


class GrpcGrid(flower.BaseGrid):
    """Flower's ``Grid`` over the sites of a roster.

    Args:
        roster: who may connect; every site has a queue from the start, connected or not.
        limits: the largest size of one reply.
        grace: seconds after which :meth:`send_and_receive` stops waiting for a site that is not connected.
        bounds: what else a site may ask of the server.
    """

    def __init__(
        self, roster: Roster, *, limits: Limits | None = None, grace: float = 10.0, bounds: Bounds | None = None
    ) -> None:
        super().__init__()
        self.limits = limits or Limits()
        self.mailbox = Mailbox([m.site for m in roster.sites], grace, bounds)
        self.counters = Traffic()
        self._site_of = {flower.node_id(m.site): m.site for m in roster.sites}

    @property
    def traffic(self) -> dict[str, dict[str, int]]:
        """Bytes of encoded messages per site (before TLS): ``sent`` to it, ``received`` from it."""
        return self.counters.snapshot()

    def site_of(self, node_id: int) -> SiteId:
        """The site behind Flower's number; its messages were authenticated by its certificate.

        Raises:
            TransportError: no site of the roster has this number.
        """
        try:
            return self._site_of[node_id]
        except KeyError as e:
            raise TransportError(f"node {node_id} is not a site of the roster") from e

    def get_node_ids(self) -> Iterable[int]:
        """The sites that are connected now, in the roster's order."""
        return [flower.node_id(s) for s in self.mailbox.connected()]

    def wait_for_sites(self, count: int, timeout: float) -> int:
        """Wait until ``count`` sites are connected or ``timeout`` seconds have passed; returns how many are."""
        return self.mailbox.wait_connected(count, timeout)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue every message for its site, connected or not; returns the ids to pull replies by."""
        return [self.mailbox.put(self.site_of(m.metadata.dst_node_id), m) for m in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to ``message_ids`` that came; each is given once."""
        return self.mailbox.take(message_ids)

    def replies(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """:meth:`send_and_receive`, reply by reply in the order in which they come.

        The grid keeps no reference to a reply that it gave away. While that reply is worked on, others come: as many as
        ``bounds.held`` allows wait in memory, the rest at their sites, half sent.
        """
        return self.mailbox.replies(self.push_messages(messages), timeout)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """The replies that came in time, in the order of ``messages``.

        A site is given up after ``timeout`` seconds (None: no limit) in which nothing moved to or from it, and after
        ``bounds.longest`` times as long in any case. The wait ends earlier when every site still silent has been
        away for the grid's ``grace``. What was not answered is withdrawn: a site that comes back later does not work
        for a round that is over.
        """
        return self.mailbox.collect(list(self.push_messages(messages)), timeout)


def serve(
    server_app: ServerApp,
    *,
    address: str,
    tls: TlsFiles,
    roster: Roster,
    ready: Callable[[int], None] | None = None,
    limits: Limits | None = None,
    grace: float = 10.0,
    bounds: Bounds | None = None,
    gate: Gate | None = None,
    report: Report = _silent,
) -> GrpcGrid:
    """Run ``server_app`` over mTLS gRPC; returns the grid when the app has ended and the sites were told.

    Args:
        address: ``host:port`` to listen on; port 0 chooses a free one.
        ready: called with the port once connections are accepted, before the app begins.
        limits, grace, bounds: see :class:`GrpcGrid`.
        gate: called with a site and its certificate (PEM) at every call, and every second for every open session;
            raises :class:`IdentityError` when the certificate is not, or no longer, to be accepted.
        report: told, from any thread, of what a site tried and was refused (a second live process of one identity,
            a transfer that is too slow, ...); a refusal that repeats itself is told once a minute.

    The app's exceptions are the caller's. After an ``Exception`` the sites are told that the run was aborted; after
    ``KeyboardInterrupt`` or ``SystemExit`` they are told nothing and try to reconnect, as after a crash, so that
    a restarted server finds them.

    Raises:
        TransportError: the address cannot be bound, or a TLS file cannot be read.
    """
    warn_of_old_tls()
    grid = GrpcGrid(roster, limits=limits, grace=grace, bounds=bounds)
    workers = 3 * len(roster.sites) + 8
    connections = _CONNECTIONS_PER_SITE * len(roster.sites) + _SPARE_CONNECTIONS
    service = Service(grid.mailbox, roster, grid.counters, grid.limits, grid.run.run_id, gate, report)
    server = grpc.server(
        futures.ThreadPoolExecutor(workers, thread_name_prefix="fedveil-grpc"),
        handlers=[service.handler()],
        options=[*_SERVER_OPTIONS, ("grpc.max_allowed_incoming_connections", connections)],
        maximum_concurrent_rpcs=workers,
    )
    port = _bind(server, address, tls)
    status, over = "", threading.Event()
    watch = threading.Thread(target=service.watch, args=(over, _SWEEP_S), name="fedveil-watch", daemon=True)
    try:
        server.start()
        watch.start()
        if ready is not None:
            ready(port)
        server_app(grid, Context(grid.run.run_id, flower.SERVER_NODE, {}, RecordDict(), {}))
        status = "finished"
    except Exception:
        status = "aborted"
        raise
    finally:
        if status:
            grid.mailbox.end(status, _FAREWELL_S)
        over.set()
        server.stop(_FAREWELL_S if status else 0).wait()
    return grid


def require_free(address: str) -> None:
    """Raise :class:`TransportError` if nobody could listen on ``address`` now."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal()):
        raise TransportError(f"address = {address!r} is not host:port", hint="for example 0.0.0.0:8443")
    try:
        [*_, (family, kind, _, _, target)] = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        with socket.socket(family, kind) as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind(target)
    except (OSError, OverflowError) as e:
        raise TransportError(
            f"cannot listen on {address}", hint="stop the server that uses the port, or choose another port"
        ) from e


def read_tls(tls: TlsFiles) -> tuple[bytes, bytes, bytes]:
    """Authority, certificate and key; :class:`TransportError` when one cannot be read."""
    try:
        return tls.ca.read_bytes(), tls.certificate.read_bytes(), tls.key.read_bytes()
    except OSError as e:
        raise TransportError(
            f"{e.filename} could not be read: {e.strerror}", hint="'fedveil client join' installs the TLS files"
        ) from e


def warn_of_old_tls() -> None:
    """Say so if this process cannot refuse TLS 1.2."""
    if not TLS13_ONLY:
        _LOG.warning("grpc was imported before fedveil.deploy: TLS 1.2 is not excluded; import fedveil.deploy first")


def _bind(server: grpc.Server, address: str, tls: TlsFiles) -> int:
    ca, certificate, key = read_tls(tls)
    credentials = grpc.ssl_server_credentials([(key, certificate)], ca, require_client_auth=True)
    try:
        port = server.add_secure_port(address, credentials)
    except RuntimeError as e:
        raise TransportError(
            f"cannot listen on {address}", hint="stop the server that uses the port, or choose another port"
        ) from e
    if not port:
        raise TransportError(f"cannot listen on {address}", hint="check the address and the TLS files")
    return port
