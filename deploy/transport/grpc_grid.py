"""The server's half of our transport: Flower's ``Grid`` over mTLS gRPC. Sites dial out, nothing dials in.

Two calls. ``Work``: a site opens it once and the server streams messages to it. ``Reply``: the site streams one
answer. Each call is mapped from the peer's certificate (SHA-256 of its public key) to a member of the roster; a
certificate of another authority already fails in the TLS handshake.

Frames of ``Work`` are JSON control frames (``welcome``, ``message``, ``end``); after ``message`` come the codec's
chunks of one message. ``Reply`` carries the codec's chunks alone. Both calls name the site's process in the
metadata entry ``fedveil-instance``: a restarted process is told from a second one by whether the first one's stream
is alive (closed sockets show at once, a cut line by keep-alive within 15 seconds).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent import futures
from functools import lru_cache
from typing import Any, NoReturn

import grpc
from flwr.app import Context, Message, RecordDict
from flwr.serverapp import ServerApp

from fedveil.common import canonical, identity
from fedveil.common import flwr_adapter as flower
from fedveil.common.errors import FedveilError, IdentityError, TransportError, WireError
from fedveil.common.identity import Roster
from fedveil.common.units import SiteId
from fedveil.common.wire import Limits
from fedveil.deploy.transport import TlsFiles, Traffic
from fedveil.deploy.transport.codec import CHUNK, Decoder, cut
from fedveil.deploy.transport.mailbox import Mailbox

SERVICE = "fedveil.Transport1"
INSTANCE = "fedveil-instance"
OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", CHUNK + 4096),
    ("grpc.max_send_message_length", CHUNK + 4096),
    ("grpc.keepalive_time_ms", 10_000),
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
]
_FAREWELL_S = 5.0


class GrpcGrid(flower.BaseGrid):
    """Flower's ``Grid`` over the sites of a roster.

    Args:
        roster: who may connect; every site has a queue from the start, connected or not.
        limits: what one reply may measure.
        grace: seconds after which :meth:`send_and_receive` stops waiting for a site that is not connected.
    """

    def __init__(self, roster: Roster, *, limits: Limits | None = None, grace: float = 10.0) -> None:
        super().__init__()
        self.limits = limits or Limits()
        self.mailbox = Mailbox([m.site for m in roster.sites], grace)
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

        A reply that was given away is held by nobody else; those that come while it is worked on wait in memory.
        """
        return self.mailbox.replies(self.push_messages(messages), timeout)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """The replies that came within ``timeout`` seconds (None: no limit), in the order of ``messages``.

        The wait ends earlier when every site still silent has been away for the grid's ``grace``. What was not
        answered is withdrawn: a site that comes back later does not work for a round that is over.
        """
        return self.mailbox.collect(list(self.push_messages(messages)), timeout)


def serve(
    server_app: ServerApp,
    *,
    address: str,
    tls: TlsFiles,
    roster: Roster,
    run_config: Mapping[str, Any] | None = None,
    node_config: Mapping[str, Any] | None = None,
    ready: Callable[[int], None] | None = None,
    limits: Limits | None = None,
    grace: float = 10.0,
) -> GrpcGrid:
    """Run ``server_app`` over mTLS gRPC; returns the grid when the app has ended and the sites were told.

    Args:
        address: ``host:port`` to listen on; port 0 chooses a free one.
        run_config: the app's ``context.run_config``; ``node_config`` likewise.
        ready: called with the port once connections are accepted, before the app begins.
        limits, grace: see :class:`GrpcGrid`.

    The app's exceptions are the caller's. After an ``Exception`` the sites are told that the run was aborted; after
    ``KeyboardInterrupt`` or ``SystemExit`` they are told nothing and try to reconnect, as after a crash, so that
    a restarted server finds them.

    Raises:
        TransportError: the address cannot be bound, or a TLS file cannot be read.
    """
    grid = GrpcGrid(roster, limits=limits, grace=grace)
    workers = 2 * len(roster.sites) + 8
    server = grpc.server(
        futures.ThreadPoolExecutor(workers, thread_name_prefix="fedveil-grpc"),
        handlers=[_Service(grid, roster).handler()],
        options=_SERVER_OPTIONS,
        maximum_concurrent_rpcs=workers,
    )
    port = _bind(server, address, tls)
    status = ""
    try:
        server.start()
        if ready is not None:
            ready(port)
        config = dict(node_config or {})
        context = Context(grid.run.run_id, flower.SERVER_NODE, config, RecordDict(), dict(run_config or {}))
        server_app(grid, context)
        status = "finished"
    except Exception:
        status = "aborted"
        raise
    finally:
        if status:
            grid.mailbox.end(status, _FAREWELL_S)
        server.stop(_FAREWELL_S if status else 0).wait()
    return grid


def read_tls(tls: TlsFiles) -> tuple[bytes, bytes, bytes]:
    """Authority, certificate and key; :class:`TransportError` when one cannot be read."""
    try:
        return tls.ca.read_bytes(), tls.certificate.read_bytes(), tls.key.read_bytes()
    except OSError as e:
        raise TransportError(f"{e.filename} could not be read: {e.strerror}", hint="run 'fedveil provision'") from e


def _bind(server: grpc.Server, address: str, tls: TlsFiles) -> int:
    ca, certificate, key = read_tls(tls)
    credentials = grpc.ssl_server_credentials([(key, certificate)], ca, require_client_auth=True)
    try:
        port = server.add_secure_port(address, credentials)
    except RuntimeError as e:
        raise TransportError(
            f"cannot listen on {address}", hint="is another server running there? choose another port"
        ) from e
    if not port:
        raise TransportError(f"cannot listen on {address}", hint="check the address and the TLS files")
    return port


class _Service:
    """The two calls. Whatever a peer sends ends in an answer or a status, never in a handler's exception."""

    def __init__(self, grid: GrpcGrid, roster: Roster) -> None:
        self._grid, self._mailbox, self._roster = grid, grid.mailbox, roster
        self._site_by_pem = lru_cache(maxsize=2 * len(roster.sites))(self._look_up)

    def handler(self) -> grpc.GenericRpcHandler:
        """The calls by name; requests and responses are bytes."""
        calls = {
            "Work": grpc.unary_stream_rpc_method_handler(self.work),
            "Reply": grpc.stream_unary_rpc_method_handler(self.reply),
        }
        return grpc.method_handlers_generic_handler(SERVICE, calls)

    def work(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        """Stream messages to a site until the run or the connection ends."""
        site, instance = self._peer(context)
        try:
            session = self._mailbox.attach(site, instance)
        except TransportError as e:
            _abort(context, grpc.StatusCode.ALREADY_EXISTS, e)
        try:
            if not context.add_callback(lambda: self._mailbox.detach(site, session)):
                return
            yield canonical.dumps({"t": "welcome", "v": 1, "site": site, "run": str(self._grid.run.run_id)})
            while not isinstance(parcel := self._mailbox.next_parcel(site, session), str):
                yield canonical.dumps({"t": "message"})
                for chunk in cut(parcel.pieces):
                    self._grid.counters.add(site, sent=len(chunk))
                    yield chunk
            if parcel:
                yield canonical.dumps({"t": "end", "status": parcel})
        finally:
            self._mailbox.detach(site, session)

    def reply(self, stream: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        """Receive one answer; b"stale" when nobody waits for it any more."""
        site, instance = self._peer(context)
        try:
            self._mailbox.begin_reply(site, instance)
        except TransportError as e:
            _abort(context, grpc.StatusCode.FAILED_PRECONDITION, e)
        try:
            return self._receive(site, stream, context)
        finally:
            self._mailbox.end_reply(site)

    def _receive(self, site: SiteId, stream: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        decoder = Decoder(self._grid.limits)
        message_id = ""
        try:
            for chunk in stream:
                self._grid.counters.add(site, received=len(chunk))
                decoder.feed(chunk)
                if not message_id and decoder.metadata is not None:
                    message_id = decoder.metadata.reply_to_message_id
                    if not self._mailbox.owes(site, message_id):
                        return b"stale"
            if not decoder.complete:
                # A lost connection can look like this: the message stays owed and is sent again.
                _abort(context, grpc.StatusCode.ABORTED, WireError("the reply's stream ended early"))
            reply = decoder.result()
        except WireError as e:
            if decoder.metadata is not None:
                self._mailbox.accept(site, decoder.metadata.reply_to_message_id, e)
            _abort(context, grpc.StatusCode.INVALID_ARGUMENT, e)
        return b"ok" if self._mailbox.accept(site, message_id, reply) else b"stale"

    def _peer(self, context: grpc.ServicerContext) -> tuple[SiteId, str]:
        pems = context.auth_context().get("x509_pem_cert") or []
        instance = dict(context.invocation_metadata()).get(INSTANCE, "")
        try:
            if len(pems) != 1:
                raise IdentityError("no client certificate", hint="connect with the site's TLS files")
            site = self._site_by_pem(pems[0])
        except IdentityError as e:
            _abort(context, grpc.StatusCode.PERMISSION_DENIED, e)
        if not (isinstance(instance, str) and 0 < len(instance) <= 64):
            _abort(context, grpc.StatusCode.INVALID_ARGUMENT, WireError(f"the metadata lacks {INSTANCE}"))
        return site, instance

    def _look_up(self, pem: bytes) -> SiteId:
        return self._roster.by_tls_key(identity.spki_sha256(pem)).site


def _abort(context: grpc.ServicerContext, code: grpc.StatusCode, error: FedveilError) -> NoReturn:
    context.abort(code, flower.error_text(error))
    raise error  # abort() never returns; this tells type checkers
