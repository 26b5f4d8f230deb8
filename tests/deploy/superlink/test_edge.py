"""The edge's configuration under a real nginx, where there is one: what SuperNodes use passes, and nothing else."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from fedveil.deploy import superlink
from fedveil.deploy.enrol.provision import make_consortium

NGINX = shutil.which("nginx") or ""
CONF = Path(superlink.__file__).with_name("edge.nginx.conf")


def _edge(folder: Path, server: Path, port: int, upstream: int) -> str:
    """The shipped file with this test's ports and folders in it, inside a minimal nginx.conf."""
    text = CONF.read_text()
    for old, new in (
        ("listen 8443 ssl", f"listen 127.0.0.1:{port} ssl"),
        ("127.0.0.1:9092", f"127.0.0.1:{upstream}"),
        ("/etc/fedveil/identity", str(server)),
    ):
        assert old in text
        text = text.replace(old, new)
    temp = "\n".join(f"{k}_temp_path {folder / k};" for k in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    return (
        f"daemon off; pid {folder / 'pid'}; error_log {folder / 'error.log'};\n"
        f"events {{}}\nhttp {{ access_log off; {temp}\n{text}\n}}\n"
    )


class Upstream(BaseHTTPRequestHandler):
    """Stands for SuperLink: notes every path that reaches it."""

    seen: list[str]

    def do_POST(self) -> None:
        type(self).seen.append(self.path)
        self.rfile.read(int(self.headers.get("content-length") or 0))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is printed."""


@pytest.fixture
def edge(tmp_path: Path, free_port) -> Iterator[tuple[int, Path, list[str]]]:
    """Port of the edge, the consortium's folder, and the paths that came through."""
    make_consortium(tmp_path / "pki", ["a-hospital"], consortium="c", host="127.0.0.1")
    server = tmp_path / "pki" / "server"
    handler = type("Seen", (Upstream,), {"seen": []})
    behind = HTTPServer(("127.0.0.1", 0), handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server / "tls.pem", server / "tls.key")
    behind.socket = context.wrap_socket(behind.socket, server_side=True)
    threading.Thread(target=behind.serve_forever, daemon=True).start()
    port = free_port()
    (tmp_path / "nginx.conf").write_text(_edge(tmp_path, server, port, behind.server_port))
    process = subprocess.Popen([NGINX, "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")])
    try:
        for _ in range(100):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "error.log").read_text()
                threading.Event().wait(0.05)
        yield port, server, handler.seen
    finally:
        process.terminate()
        process.wait(600)
        behind.shutdown()
        behind.server_close()


def _ask(port: int, ca: Path, path: str, body: int = 0) -> int:
    """The status that ``path``, sent as it is, gets."""
    context = ssl.create_default_context(cafile=str(ca))
    with (
        socket.create_connection(("127.0.0.1", port), 10) as raw,
        context.wrap_socket(raw, server_hostname="127.0.0.1") as line,
    ):
        assert line.version() == "TLSv1.3"
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {body}\r\nconnection: close\r\n\r\n"
        line.sendall(head.encode())
        return int(line.recv(64).split()[1])


@pytest.mark.skipif(not NGINX, reason="no nginx on this machine")
def test_only_the_fleet_interface_passes_the_edge(edge) -> None:
    port, server, seen = edge
    assert _ask(port, server / "ca.pem", "/v1/fleet/pull-messages") == 200
    assert seen == ["/v1/fleet/pull-messages"]
    for path in (
        "/", "/v1/control/start-run", "/v1/runtime/acquire-task", "/v1/fleet", "/docs", "/V1/FLEET/x",
        "/v1/fleet/../control/start-run", "/v1/fleet/..%2fcontrol/start-run", "/v1/fleet/%2e%2e/runtime/acquire-task",
        "/v1//control/start-run", "//v1/control/start-run", "/v1/fleet/./../control/list-runs",
    ):  # fmt: skip
        assert _ask(port, server / "ca.pem", path) in (301, 400, 403), path
    assert seen == ["/v1/fleet/pull-messages"]
    # What is passed on is the path that was matched: nothing is left in it to be resolved behind the edge.
    assert _ask(port, server / "ca.pem", "/v1/control/../fleet/get-run") == 200
    assert seen[1:] == ["/v1/fleet/get-run"]
    assert _ask(port, server / "ca.pem", "/v1/fleet/push-object", body=17 << 20) == 413
    assert len(seen) == 2
