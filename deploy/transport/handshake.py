"""TLS handshakes with the server by hand, for what gRPC does not do from Python.

gRPC accepts any certificate of its roots that names the host, also a second one of the same authority. But the roster
names one key. So a handshake of our own fetches the server's certificate and compares its key with the roster's. Then
gRPC gets that certificate as its only root: nothing else completes its handshake, even if somebody else answers
the second time. gRPC also does not say why a handshake failed.
"""

from __future__ import annotations

import base64
import http.client
import ipaddress
import os
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import TypeVar

from fedveil.common import identity
from fedveil.common.errors import IdentityError, TransportError
from fedveil.deploy.transport import TlsFiles

_CONNECT_S = 5.0  # for each of a host's addresses
_TIMEOUT_S = 15.0  # for each step after that; gRPC gives up a connection after 20 seconds
_WHOLE_S = 30.0
_POLL_S = 0.1
_PROBES = 3
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")  # gRPC's order
_EXCEPT = ("no_grpc_proxy", "no_proxy")
_T = TypeVar("_T")


def trusted(address: str, tls: TlsFiles, server_key: str, stop: threading.Event | None = None) -> bytes:
    """The certificate (PEM) of the server at ``address``, the only root to trust from then on.

    Args:
        server_key: SHA-256 (hex) of the SubjectPublicKeyInfo that the roster names.
        stop: breaks the handshake off at once when it is set.

    Raises:
        IdentityError: the authority vouches for the server's certificate, but it has another key.
        TransportError: the certificate is not of this authority, or not for this host.
        OSError, ValueError: nobody answers there in time, or not in TLS 1.3; it is not a host and a port; ``stop`` was
            set.
    """

    def certificate() -> bytes:
        with shake(address, tls) as connection:
            return connection.getpeercert(binary_form=True) or b""

    try:
        der = _awaited(certificate, stop)
    except ssl.SSLCertVerificationError as e:
        raise not_accepted(address, e) from e
    pem = ssl.DER_cert_to_PEM_cert(der).encode()
    if identity.spki_sha256(pem) != server_key:
        raise IdentityError(
            f"the server at {address} does not use the key on the roster",
            hint="take the latest roster; if it is the latest, somebody else poses as the server",
        )
    return pem


def handshake_problem(address: str, tls: TlsFiles, stop: threading.Event | None = None) -> TransportError | None:
    """Why gRPC cannot complete a handshake, in words; None if dialling again may help, or ``stop`` was set."""
    try:
        if not all(_awaited(lambda: _closed_at_once(address, tls), stop) for _ in range(_PROBES)):
            return None
    except ssl.SSLCertVerificationError as e:
        return not_accepted(address, e)
    except (OSError, ValueError):
        return None
    return TransportError(
        f"the server at {address} does not accept this site's certificate",
        hint="use the TLS files that this consortium issued for the site, and check that they have not expired",
    )


def not_accepted(address: str, error: ssl.SSLCertVerificationError) -> TransportError:
    """The error for a certificate that the authority does not vouch for."""
    return TransportError(
        f"the server's certificate at {address} is not accepted: {error.verify_message}",
        hint="use the ca.pem of this consortium and the host name that the server was provisioned with",
    )


@contextmanager
def shake(address: str, tls: TlsFiles) -> Iterator[ssl.SSLSocket]:
    """A connection to ``host:port`` whose handshake is complete on our side.

    Raises:
        ssl.SSLCertVerificationError, OSError, ValueError
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    context = ssl.create_default_context(cafile=str(tls.ca))
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(tls.certificate, tls.key)
    context.set_alpn_protocols(["h2"])
    with _reach(host, int(port)) as raw, context.wrap_socket(raw, server_hostname=host) as connection:
        yield connection


def _awaited(work: Callable[[], _T], stop: threading.Event | None) -> _T:
    """What ``work`` gives, within a limit for all of it: the look-up of a name and a proxy have no limit of their own.

    It runs in a thread, because a signal's handler that sets ``stop`` does not end a system call. When it is broken
    off, only its own time limits end the thread.

    Raises:
        ConnectionAbortedError: ``stop`` was set.
        TimeoutError
    """
    out, until = Future[_T](), time.monotonic() + _WHOLE_S

    def run() -> None:
        try:
            out.set_result(work())
        except BaseException as e:
            out.set_exception(e)

    threading.Thread(target=run, name="fedveil-handshake", daemon=True).start()
    while not out.done():
        if stop is not None and stop.is_set():
            raise ConnectionAbortedError("the handshake was broken off")
        if time.monotonic() >= until:
            raise TimeoutError("the handshake takes too long")
        wait([out], timeout=_POLL_S)
    return out.result()


def _reach(host: str, port: int) -> socket.socket:
    """A connection, by way of the proxy that gRPC would use."""
    proxy = next((v for name in _PROXIES if (v := os.environ.get(name))), "")
    if not proxy or _excepted(host):
        found = socket.create_connection((host, port), timeout=_CONNECT_S)
        found.settimeout(_TIMEOUT_S)
        return found
    at = urllib.parse.urlsplit(proxy if "//" in proxy else f"//{proxy}")
    tunnel = http.client.HTTPConnection(at.hostname or "", at.port or 80, timeout=_TIMEOUT_S)
    user = f"{urllib.parse.unquote(at.username)}:{urllib.parse.unquote(at.password or '')}" if at.username else ""
    said = {"Proxy-Authorization": "Basic " + base64.b64encode(user.encode()).decode()} if user else {}
    tunnel.set_tunnel(host, port, said)
    try:
        tunnel.connect()
    except http.client.HTTPException as e:
        raise ConnectionError("the proxy does not speak HTTP") from e
    return tunnel.sock


def _excepted(host: str) -> bool:
    """Whether the environment says that no proxy is used for ``host``: a suffix of its name, or a network."""
    for entry in next((v for name in _EXCEPT if (v := os.environ.get(name))), "").split(","):
        try:
            if ipaddress.ip_address(host) in ipaddress.ip_network(entry.strip(), strict=False):
                return True
        except ValueError:
            if entry.strip() and host.endswith(entry.strip()):
                return True
    return False


def _closed_at_once(address: str, tls: TlsFiles) -> bool:
    """Whether the server hangs up without a word after the handshake.

    With TLS 1.3 the server judges our certificate after our own handshake is complete. gRPC closes if it refuses the
    certificate; a server that accepts us speaks first.
    """
    with shake(address, tls) as connection:
        try:
            return not connection.recv(1)
        except (ssl.SSLError, ConnectionError):
            return True
