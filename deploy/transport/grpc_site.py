"""The site's half of our transport: dial the server, answer its messages with the locally installed ClientApp.

No code is received. Messages are handled one after the other in the caller's thread. When the connection breaks, the
site dials again, and a half-sent message or answer goes on where it broke off. A message that was answered already is
answered with the same bytes, without asking the app.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

import grpc
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedveil.common import canonical
from fedveil.common import flwr_adapter as flower
from fedveil.common.errors import RunAborted, TransportError, WireError
from fedveil.common.units import SiteId
from fedveil.common.wire import Limits
from fedveil.deploy.transport import TlsFiles
from fedveil.deploy.transport.codec import Decoder, cut, encode
from fedveil.deploy.transport.grpc_grid import OPTIONS, read_tls, warn_of_old_tls
from fedveil.deploy.transport.grpc_service import FROM, HAVE, INSTANCE, SERVICE
from fedveil.deploy.transport.handshake import handshake_problem, trusted

_LOG = logging.getLogger("fedveil.transport")
_OPTIONS: list[tuple[str, Any]] = [*OPTIONS, ("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
_FIRST_DELAY_S, _MAX_DELAY_S = 0.05, 5.0
_STOP_POLL_S = 0.2
_CONTROL_LIMIT = 4096


def run_site(
    client_app: ClientApp,
    *,
    address: str,
    tls: TlsFiles,
    site: SiteId,
    stop: threading.Event,
    on_status: Callable[[str], None] | None = None,
    wait: float = 60.0,
    takeover: float = 20.0,
    limits: Limits | None = None,
    server_key: str = "",
) -> None:
    """Serve one run: returns when the server says that it is over, or soon after ``stop`` is set.

    Args:
        address: ``host:port`` of the server; its certificate must name the host.
        stop: a message being worked on is still answered after it is set.
        on_status: told ``connecting``, ``connected``, ``working``, ``waiting``, ``lost``, ``finished``, ``aborted``
            and ``stopped``, from this thread.
        wait: seconds without a server, at the start or after a loss, before giving up.
        takeover: seconds to wait while another process holds this identity. More than 15 is enough for an earlier
            process whose machine vanished without closing its connection.
        limits: the largest size of a message from the server.
        server_key: SHA-256 (hex) of the public key that the roster names for the server's certificate. Empty if it
            names none: then any certificate of the authority for this host is the server's.

    Raises:
        IdentityError: the server has a certificate of this authority with another key than ``server_key``.
        TransportError: no server within ``wait``; a certificate is refused by either side; the certificate
            is not on the roster or is another site's; another process is connected under this identity.
        RunAborted: the server ended the run by an error.
        WireError: the server broke the protocol.
    """
    flower.quiet_flower()
    warn_of_old_tls()
    worker = _Site(client_app, address, tls, site, stop, on_status or (lambda _: None), limits or Limits())
    worker.server_key = server_key
    worker.context = Context(0, flower.node_id(site), {"site": site}, RecordDict(), {})
    watcher = threading.Thread(target=worker.watch, name=f"fedveil-stop-{site}", daemon=True)
    watcher.start()
    try:
        worker.run(wait, takeover)
    finally:
        worker.over.set()
        watcher.join()


class _Lost(Exception):
    """The session broke without a gRPC status; dial again."""


class _Site:
    context: Context
    server_key = ""

    def __init__(
        self,
        app: ClientApp,
        address: str,
        tls: TlsFiles,
        site: SiteId,
        stop: threading.Event,
        on_status: Callable[[str], None],
        limits: Limits,
    ) -> None:
        self._app, self._address, self._tls, self._site = app, address, tls, site
        self._stop, self._status, self._limits = stop, on_status, limits
        self._metadata = ((INSTANCE, secrets.token_hex(16)),)
        self._last: tuple[str, list[bytes]] = ("", [])
        self._asked = 0  # bytes of the message that was answered last
        self._partial: Decoder | None = None
        self._lock = threading.Lock()
        self._idle_call: grpc.Call | None = None
        self._connected = False
        self.over = threading.Event()

    def watch(self) -> None:
        """Until the end: once ``stop`` is set, break off a call that only waits."""
        while not self.over.is_set():
            if self._stop.wait(_STOP_POLL_S):
                with self._lock:
                    if self._idle_call is not None:
                        self._idle_call.cancel()
                self.over.wait(_STOP_POLL_S)

    def run(self, wait: float, takeover: float) -> None:
        """Dial, work, dial again."""
        since, held_since, delay = time.monotonic(), None, _FIRST_DELAY_S
        self._status("connecting")
        while not self._stop.is_set():
            try:
                status = self._session()
            except (grpc.RpcError, _Lost) as e:
                if self._stop.is_set():
                    break
                now = time.monotonic()
                if self._connected:
                    self._status("lost")
                    since, held_since, delay, self._connected = now, None, _FIRST_DELAY_S, False
                held = isinstance(e, grpc.Call) and e.code() == grpc.StatusCode.ALREADY_EXISTS
                held_since = (held_since or now) if held else None
                problem = self._problem(e)
                if problem is not None and (held_since is None or now - held_since >= takeover):
                    raise problem from e
                if held_since is None and now - since >= wait:
                    raise TransportError(
                        f"no server answered at {self._address} for {wait:g} seconds",
                        hint="check that the server runs, its address and the network; --wait waits longer",
                    ) from e
                self._stop.wait(delay * (0.5 + secrets.randbelow(1000) / 1000))
                delay = min(2 * delay, _MAX_DELAY_S)
            else:
                self._status(status)
                if status == "aborted":
                    raise RunAborted(
                        "the server ended the run with an error before its plan was carried out",
                        hint="see the server's log",
                    )
                return
        self._status("stopped")

    def _session(self) -> str:
        ca, certificate, key = read_tls(self._tls)
        if self.server_key:
            try:
                ca = trusted(self._address, self._tls, self.server_key, self._stop)
            except (OSError, ValueError) as e:
                raise _Lost from e
        credentials = grpc.ssl_channel_credentials(ca, key, certificate)
        with grpc.secure_channel(self._address, credentials, _OPTIONS) as channel:
            call = channel.unary_stream(f"/{SERVICE}/Work")(b"", metadata=(*self._metadata, *self._have()))
            reply = channel.stream_unary(f"/{SERVICE}/Reply")
            try:
                self._welcome(self._frame(call))
                while True:
                    self._status("waiting")
                    control = _control(self._frame(call))
                    if control.get("t") == "end" and control.get("status") in ("finished", "aborted"):
                        return control["status"]
                    if control.get("t") != "message":
                        raise WireError("the server sent an unknown control frame")
                    start, got = _offset(control, "from"), _offset(control, "got")
                    self._send(reply, self._work(call, start), got)
                    if self._stop.is_set():
                        raise _Lost
            finally:
                call.cancel()

    def _frame(self, call: Any) -> bytes:
        """The next frame. Only here this side waits for the server, and only here ``stop`` breaks in."""
        with self._lock:
            self._idle_call = call
        try:
            return next(call)
        except StopIteration:
            raise _Lost from None
        finally:
            with self._lock:
                self._idle_call = None

    def _welcome(self, frame: bytes) -> None:
        control = _control(frame)
        run = control.get("run")
        if control.get("t") != "welcome" or control.get("v") != 1 or not isinstance(run, str) or len(run) > 20:
            raise WireError("the server does not speak this protocol", hint="install the same version on both sides")
        if control.get("site") != self._site:
            raise TransportError(
                f"the certificate in use is not that of {self._site!r}",
                hint="point to this site's own TLS files, or correct the site's name",
            )
        self.context.run_id = int(run) if run.isdecimal() else 0
        self._connected = True
        self._status("connected")

    def _have(self) -> tuple[tuple[str, str], ...]:
        """What the server need not send again: the message answered last, or what came of the one that broke off."""
        message_id, size = self._last[0], self._asked
        if self._partial is not None and self._partial.metadata is not None:
            message_id, size = self._partial.metadata.message_id, self._partial.received
        return ((HAVE, f"{message_id}:{size}"),) if message_id else ()

    def _work(self, call: Any, start: int) -> list[bytes]:
        """The answer to the message that follows on ``call`` from its byte ``start``."""
        partial, self._partial = self._partial, None
        if start and partial is None:
            if start != self._asked or not self._last[0]:
                raise WireError("the server goes on with a message that was never begun")
            return self._last[1]
        if start and partial is not None and start != partial.received:
            raise WireError("the server goes on at another byte than where the message broke off")
        decoder = partial if start and partial is not None else Decoder(self._limits)
        while not decoder.complete:
            self._partial = decoder
            decoder.feed(self._frame(call))
        self._partial = None
        message = decoder.result()
        message_id = message.metadata.message_id
        if message_id != self._last[0]:
            self._status("working")
            self._last, self._asked = ("", []), 0
            self._last = (message_id, _encoded(flower.answer(self._app, message, self.context), message))
            self._asked = decoder.received
        return self._last[1]

    def _send(self, reply: grpc.StreamUnaryMultiCallable, pieces: list[bytes], got: int) -> None:
        metadata = (*self._metadata, (FROM, str(got))) if got else self._metadata
        try:
            reply(cut(pieces, skip=got), metadata=metadata)
        except grpc.RpcError as e:
            code = e.code() if isinstance(e, grpc.Call) else None
            if code == grpc.StatusCode.INVALID_ARGUMENT:
                _LOG.error("the server refused a reply: %s", _details(e))
            elif code != grpc.StatusCode.UNAVAILABLE:
                raise _Lost from e
            # If the connection is gone, reading the next frame says so, or that the run is over.

    def _problem(self, error: Exception) -> TransportError | None:
        """What makes it pointless to dial again, in words; None if dialling again may help."""
        if not isinstance(error, grpc.Call):
            return None
        code = error.code()
        if code in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.ALREADY_EXISTS):
            told = flower.parse_error(error.details() or "")
            return TransportError(
                f"the server at {self._address} refuses {self._site!r}: {told.message}", hint=told.hint
            )
        if code in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.INVALID_ARGUMENT):
            return TransportError(
                f"the server at {self._address} does not speak this protocol",
                hint="install the same version of fedveil on both sides",
            )
        if code != grpc.StatusCode.UNAVAILABLE:
            return None
        return handshake_problem(self._address, self._tls, self._stop)


def _encoded(out: Message, request: Message) -> list[bytes]:
    try:
        return encode(out)
    except WireError as e:
        _LOG.error("%s gave a reply that cannot be sent: %s", request.metadata.message_type, e)
        # In fixed words: this error is made after the egress gate.
        error = flower.error_reply(WireError("the reply cannot be sent", hint="see the site's own log"), request)
        flower.stamp(error)
        return encode(error)


def _control(frame: bytes) -> dict[str, Any]:
    value = canonical.loads(frame, limit=_CONTROL_LIMIT)
    if not isinstance(value, dict):
        raise WireError("the server sent a malformed control frame")
    return value


def _offset(control: dict[str, Any], name: str) -> int:
    value = control.get(name, 0)
    if type(value) is not int or not 0 <= value < 2**50:
        raise WireError("the server sent a malformed control frame")
    return value


def _details(error: grpc.RpcError) -> str:
    return str(flower.parse_error(error.details() or "")) if isinstance(error, grpc.Call) else ""
