"""The monitor's web server: three addresses on 127.0.0.1, reading only, for people and programs of this machine.

It has no login, so it never listens elsewhere (reach it through ``ssh -L`` or ``kubectl port-forward``). It answers
only if ``Host`` is a name of loopback, so a page elsewhere that gives its own name this address reads nothing.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fedveil.common.errors import TransportError
from fedveil.deploy.watch.monitor import Health, RunView, metrics_text, refreshed
from fedveil.privacy.report.plots import Chart, Series

ADDRESS = "127.0.0.1"
TEMPLATE = "monitor.html.j2"
MAX_ROWS = 60
MAX_REQUESTS = 8  # at a time; further ones are closed unanswered
PATIENCE_S = 5.0
_NAMES = {"localhost", "127.0.0.1", "[::1]"}
_LOG = logging.getLogger("fedveil.monitor")
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Monitor:
    """A server for one run folder, which need not exist yet. Call :meth:`serve`, and :meth:`close` from another thread.

    Args:
        run: the run's folder.
        port: on 127.0.0.1; 0 chooses a free one, see :attr:`port`.

    Raises:
        TransportError: the port cannot be had.
    """

    def __init__(self, run: Path, port: int) -> None:
        self._view, self._lock = RunView(run), threading.Lock()
        self._server = _listen(port, self._answer)
        self.port = int(self._server.server_address[1])

    def serve(self) -> None:
        """Answer until :meth:`close`."""
        self._server.serve_forever(poll_interval=0.2)

    def close(self) -> None:
        """End :meth:`serve` and give the port back."""
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, path: str) -> tuple[int, str, str]:
        """Status, content type and body."""
        with self._lock:
            if path == "/":
                health = refreshed(self._view)
                return 200, "text/html; charset=utf-8", page(self._view, health)
            if path == "/metrics":
                return 200, "text/plain; version=0.0.4; charset=utf-8", metrics_text(self._view, refreshed(self._view))
            if path == "/healthz":
                health = refreshed(self._view)
                said = {"status": health.status, "server_alive": health.alive, "ending": self._view.status}
                quiet = {"seconds_since_last_event": round(self._view.quiet_for(), 1)}
                return 200 if health.ok else 503, "application/json", json.dumps(said | quiet) + "\n"
        return 404, "text/plain; charset=utf-8", "/, /metrics and /healthz are here\n"


def page(view: RunView, health: Health) -> str:
    """The status page; every text in it is escaped."""
    lines = list(view.rounds)
    metrics = view.ended_metrics or (lines[-1]["metrics"] if lines else {})
    return _environment().get_template(TEMPLATE).render(
        v=view, p=view.plan, health=health, rounds=lines[: -MAX_ROWS - 1 : -1], metrics=metrics,
        charts=_charts(view), quiet=view.quiet_for(), now=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    )  # fmt: skip


def _charts(view: RunView) -> list[Chart]:
    lines = list(view.rounds)
    if not lines:
        return []
    opened = [(r["round"], r["epsilon_opened"]) for r in lines]
    series = [Series("ε of the rounds opened", opened, "a", dots=True)]
    if planned := view.plan.get("epsilon"):
        ends = [(lines[0]["round"], planned), (max(int(view.plan["steps"]), lines[-1]["round"]), planned)]
        series.append(Series("ε of the plan", ends, "ref"))
    text = f"After round {lines[-1]['round']} no site was charged more than ε = {lines[-1]['epsilon_opened']:.4g}."
    out = [Chart("Privacy budget", "round", "ε", text, series, low=0, whole_x=True)]
    bars = [(r["round"], r["members"]) for r in lines]
    title = "Sites in the sum (0: aborted)"
    out.append(Chart(title, "round", "sites", title, bars=bars, low=0, whole_x=True, whole_y=True))
    names = sorted({n for r in lines for n in r["metrics"]})[:2]
    if names:
        drawn = [
            Series(n, [(r["round"], r["metrics"][n]) for r in lines if n in r["metrics"]], "ab"[i], dots=True)
            for i, n in enumerate(names)
        ]
        title = "On the public test table"
        out.append(Chart(title, "round", names[0] if len(names) == 1 else "value", title, drawn, whole_x=True))
    megabytes = [(r["round"], (r["sent"] + r["received"]) / 1e6) for r in lines]
    title = "Megabytes to and from all sites"
    out.append(Chart(title, "round", "MB", title, bars=megabytes, low=0, whole_x=True))
    return out


def _environment() -> Environment:
    env = Environment(
        loader=PackageLoader("fedveil.deploy.watch", "."), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    env.filters["size"] = _size
    env.filters["drawn"] = lambda chart: Markup(chart.svg())  # noqa: S704  (plots escapes its texts)
    env.filters["utc"] = lambda at: time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at))
    return env


def _size(count: int) -> str:
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def _listen(port: int, answer: Callable[[str], tuple[int, str, str]]) -> _Server:
    try:
        return _Server((ADDRESS, port), _handler(answer))
    except (OSError, OverflowError) as e:
        raise TransportError(f"cannot listen on {ADDRESS}:{port}", hint="choose another --port") from e


class _Server(ThreadingHTTPServer):
    """At most MAX_REQUESTS at a time; one that does not go on is closed after PATIENCE_S seconds."""

    daemon_threads = True
    request_queue_size = 16

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self._room = threading.BoundedSemaphore(MAX_REQUESTS)
        super().__init__(address, handler)

    def process_request(self, request: socket.socket | tuple[bytes, socket.socket], client_address: object) -> None:
        if self._room.acquire(blocking=False):
            super().process_request(request, client_address)  # type: ignore[arg-type]
        else:
            self.shutdown_request(request)

    def process_request_thread(
        self, request: socket.socket | tuple[bytes, socket.socket], client_address: object
    ) -> None:
        watchdog = threading.Timer(2 * PATIENCE_S, _hang_up, (request,))
        watchdog.daemon = True
        watchdog.start()
        try:
            super().process_request_thread(request, client_address)  # type: ignore[arg-type]
        finally:
            watchdog.cancel()
            self._room.release()

    def handle_error(self, request: object, client_address: object) -> None:
        _LOG.warning("a request failed", exc_info=True)


def _hang_up(request: socket.socket) -> None:
    """End a request that sends a byte now and then; its reader then sees the end of the stream."""
    try:
        request.shutdown(socket.SHUT_RDWR)
    except OSError:
        _LOG.debug("a slow request was closed already")


def _handler(answer: Callable[[str], tuple[int, str, str]]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """GET and HEAD of three paths."""

        timeout = PATIENCE_S
        server_version, sys_version = "fedveil", ""

        def do_GET(self) -> None:
            """One answer, and the connection is closed."""
            self._reply(True)

        def do_HEAD(self) -> None:
            """The same without the body."""
            self._reply(False)

        def _reply(self, with_body: bool) -> None:
            if not _loopback(self.headers.get("Host", "")):
                status, kind, body = 421, "text/plain; charset=utf-8", "this server answers for loopback only\n"
            else:
                status, kind, body = answer(self.path.partition("?")[0])
            data = body.encode()
            self.send_response(status)
            for name, value in {**_HEADERS, "Content-Type": kind, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            _LOG.debug("%s", format % args)

    return Handler


def _loopback(host: str) -> bool:
    """Whether a ``Host`` header names this machine to itself; the port may be that of a tunnel."""
    name, colon, port = host.rpartition(":") if not host.endswith("]") else (host, "", "")
    return (name if colon and port.isdecimal() else host).lower() in _NAMES
