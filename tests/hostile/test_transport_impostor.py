"""Whoever holds a second certificate of the consortium's authority cannot play the server to a site with a roster."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization as ser
from cryptography.hazmat.primitives.asymmetric import ec

from fedveil.common import flwr_adapter as flower
from fedveil.common.errors import FedveilError, IdentityError, TransportError
from fedveil.common.units import SiteId
from fedveil.common.wire import Packet
from fedveil.deploy.enrol.provision import Authority, load_roster, load_tls, make_consortium
from fedveil.deploy.transport import handshake
from fedveil.deploy.transport.grpc_grid import serve
from fedveil.deploy.transport.grpc_site import run_site

from flwr.app import Context, Message  # isort: skip
from flwr.clientapp import ClientApp  # isort: skip
from flwr.serverapp import Grid, ServerApp  # isort: skip


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A consortium; ``impostor/`` holds another certificate for the server's host, of the same authority."""
    out = tmp_path_factory.mktemp("impostor")
    make_consortium(out, ["north"], consortium="two servers", host="127.0.0.1")
    key = ec.generate_private_key(ec.SECP256R1())
    pem = Authority.load(out / "consortium", 30).issue_to("server", key.public_key(), "127.0.0.1")
    other = out / "impostor"
    other.mkdir()
    (other / "tls.pem").write_bytes(pem)
    (other / "tls.key").write_bytes(key.private_bytes(ser.Encoding.PEM, ser.PrivateFormat.PKCS8, ser.NoEncryption()))
    (other / "tls.key").chmod(0o600)
    (other / "ca.pem").write_bytes((out / "consortium" / "ca.pem").read_bytes())
    load_tls(other)  # nothing is wrong with it
    return out


class Server:
    """Asks the first site that connects one question, and then ends the run."""

    def __init__(self, pki: Path, folder: str) -> None:
        self.answers: list[Any] = []
        self.over = threading.Event()
        app, ports = ServerApp(), queue.Queue[int]()

        @app.main()
        def run(grid: Grid, context: Context) -> None:
            while not (nodes := list(grid.get_node_ids())) and not self.over.wait(0.02):
                pass
            asked = [flower.request(Packet({"kind": "secrets"}), to=n, action="train.echo", round=1) for n in nodes]
            self.answers += grid.send_and_receive(asked, timeout=600)

        def work() -> None:
            roster = load_roster(pki / "server")
            serve(app, address="127.0.0.1:0", tls=load_tls(pki / folder), roster=roster, ready=ports.put)

        self._thread = threading.Thread(target=work)
        self._thread.start()
        self.port = ports.get(timeout=600)

    def close(self) -> None:
        self.over.set()
        self._thread.join(600)
        assert not self._thread.is_alive()


@pytest.fixture
def server(pki: Path) -> Iterator[Callable[[str], Server]]:
    made: list[Server] = []

    def make(folder: str) -> Server:
        made.append(Server(pki, folder))
        return made[-1]

    yield make
    for s in made:
        s.close()


def visit(pki: Path, port: int, *, pinned: bool = True, wait: float = 600.0) -> FedveilError | None:
    """What ends a site that dials ``port``; None if its run went to its end."""
    app = ClientApp()

    @app.train("echo")
    def echo(message: Message, context: Context) -> Message:
        return flower.reply(Packet({"kind": "told"}), message)

    key = load_roster(pki / "sites" / "north").server.tls_key if pinned else ""
    try:
        run_site(
            app, address=f"127.0.0.1:{port}", tls=load_tls(pki / "sites" / "north"), site=SiteId("north"),
 stop=threading.Event(), wait=wait, server_key=key,
        )  # fmt: skip
    except FedveilError as e:
        return e
    return None


def test_another_certificate_of_the_authority_is_not_the_server(pki: Path, server: Callable[[str], Server]) -> None:
    impostor = server("impostor")
    error = visit(pki, impostor.port)
    assert isinstance(error, IdentityError)
    assert "key on the roster" in error.message
    impostor.close()
    assert impostor.answers == []


def test_controls(pki: Path, server: Callable[[str], Server]) -> None:
    """The same attack on a site that compares no key succeeds; the roster's own server is served."""
    impostor, real = server("impostor"), server("server")
    assert visit(pki, impostor.port, pinned=False) is None
    assert visit(pki, real.port) is None
    for s in (impostor, real):
        s.close()
        assert len(s.answers) == 1


class Relay:
    """Forwards connection number i (from 0) to the port that ``to`` names for it; speaks CONNECT if told so."""

    def __init__(self, to: Callable[[int], int], *, proxy: bool = False) -> None:
        self.count, self.asked, self._to, self._proxy = 0, list[bytes](), to, proxy
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                if self._proxy:
                    said = b""
                    while b"\r\n\r\n" not in said:
                        said += near.recv(4096)
                    self.asked.append(said)
                    near.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                far = socket.create_connection(("127.0.0.1", self._to(self.count)))
                self.count += 1
                self._open += [near, far]
                for a, b in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=(a, b), daemon=True).start()

    @staticmethod
    def _pump(a: socket.socket, b: socket.socket) -> None:
        with suppress(OSError):
            while data := a.recv(1 << 16):
                b.sendall(data)
            b.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        for s in (self._listener, *self._open):
            s.close()


def test_an_impostor_that_comes_in_after_the_first_look(pki: Path, server: Callable[[str], Server]) -> None:
    """Whoever owns the network shows the real server to the handshake that compares, and itself to gRPC's."""
    impostor, real = server("impostor"), server("server")
    relay = Relay(lambda number: impostor.port if number else real.port)
    try:
        error = visit(pki, relay.port)
    finally:
        relay.close()
    assert isinstance(error, TransportError | IdentityError)
    assert relay.count > 1, "the impostor was never dialled"
    impostor.close()
    assert impostor.answers == []


def test_a_relay_that_holds_every_connection_for_a_while_is_passed(pki: Path, server: Callable[[str], Server]) -> None:
    """A filter that looks at a connection first, or a machine that has to be woken: gRPC itself waits 20 seconds."""
    real = server("server")

    def held(number: int) -> int:
        time.sleep(3.5)
        return real.port

    relay = Relay(held)
    try:
        assert visit(pki, relay.port) is None
    finally:
        relay.close()
    assert relay.count >= 2


class Silent:
    """A port that takes connections, and then says nothing for ever; ``stop`` is set once the first one was taken."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._taken: list[socket.socket] = []
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                self._taken.append(self._listener.accept()[0])
                self.stop.set()

    def close(self) -> None:
        for s in (self._listener, *self._taken):
            s.close()


@pytest.fixture
def silent() -> Iterator[Silent]:
    made = Silent()
    yield made
    made.close()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handshake without limits of its own: what does not end it lets the test hang."""
    for name in ("_CONNECT_S", "_TIMEOUT_S", "_WHOLE_S"):
        monkeypatch.setattr(handshake, name, 1e6)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("probe", [False, True], ids=["before it dials", "after it failed to"])
def test_a_handshake_that_waits_is_broken_off(pki: Path, silent: Silent, probe: bool) -> None:
    address, tls, stop = f"127.0.0.1:{silent.port}", load_tls(pki / "sites" / "north"), silent.stop
    if probe:
        assert handshake.handshake_problem(address, tls, stop) is None
    else:
        with pytest.raises(OSError, match="broken off"):
            handshake.trusted(address, tls, "0" * 64, stop)
    assert stop.is_set()


@pytest.mark.usefixtures("patient")
def test_a_site_stops_while_a_handshake_waits(pki: Path, silent: Silent) -> None:
    said = list[str]()
    run_site(
        ClientApp(), address=f"127.0.0.1:{silent.port}", tls=load_tls(pki / "sites" / "north"), site=SiteId("north"),
 stop=silent.stop, wait=600.0, server_key="0" * 64, on_status=said.append,
    )  # fmt: skip
    assert said[-1] == "stopped"


@pytest.mark.usefixtures("patient")
def test_a_handshake_ends_by_itself(pki: Path, silent: Silent, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where every single step is quick enough: the whole has a limit too."""
    tls = load_tls(pki / "sites" / "north")
    for name in ("_TIMEOUT_S", "_WHOLE_S"):
        with monkeypatch.context() as m:
            m.setattr(handshake, name, 0.5)
            with pytest.raises(TimeoutError):
                handshake.trusted(f"127.0.0.1:{silent.port}", tls, "0" * 64)


@pytest.mark.parametrize(("exempt", "tunnels"), [("", True), ("127.0.0.0/8", False), ("0.1,x.example", False)])
def test_both_handshakes_go_through_the_proxy(pki, server, monkeypatch, exempt, tunnels) -> None:
    for name in ("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    real = server("server")
    relay = Relay(lambda _: real.port, proxy=True)
    monkeypatch.setenv("https_proxy", f"http://who:secret@127.0.0.1:{relay.port}")
    if exempt:
        monkeypatch.setenv("no_proxy", exempt)
    try:
        assert visit(pki, real.port) is None
    finally:
        relay.close()
    assert len(relay.asked) == 2 * tunnels
    assert all(line.startswith(f"CONNECT 127.0.0.1:{real.port} ".encode()) for line in relay.asked)
    assert all(b"asic d2hvOnNlY3JldA==" in line for line in relay.asked)
