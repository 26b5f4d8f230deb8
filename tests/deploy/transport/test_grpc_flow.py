"""Real mTLS gRPC: half-sent messages, room for replies, slow transfers, refused certificates, TLS versions."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedveil.common import canonical
from fedveil.common import flwr_adapter as flower
from fedveil.common.errors import IdentityError, TransportError
from fedveil.common.units import SiteId
from fedveil.common.wire import Limits, Packet
from fedveil.deploy.transport.codec import CHUNK, Decoder, cut, encode
from fedveil.deploy.transport.grpc_grid import GrpcGrid
from fedveil.deploy.transport.grpc_service import FROM, HAVE, SERVICE
from fedveil.deploy.transport.guard import Bounds
from fedveil.deploy.transport.mailbox import Mailbox

if TYPE_CHECKING:
    from tests.deploy.transport.conftest import World

BIG = 5 << 20


def broken_after(
    bytes_: int, once: list[int], arrived: Callable[[], int] = lambda: BIG
) -> Callable[..., Iterator[bytes]]:
    """A ``cut`` whose stream breaks after ``bytes_``, the first time, once 2 MiB of it have ``arrived``."""

    def broken(pieces: list[bytes], size: int = CHUNK, *, skip: int = 0) -> Iterator[bytes]:
        once.append(skip)
        sent = 0
        for chunk in cut(pieces, size, skip=skip):
            if len(once) == 1 and sent >= bytes_:
                while arrived() < 2 << 20:
                    time.sleep(0.01)
                raise ConnectionError("the line broke")
            yield chunk
            sent += len(chunk)

    return broken


def test_a_half_sent_answer_goes_on_where_it_broke(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedveil.deploy.transport import grpc_site

    starts: list[int] = []
    grids: list[GrpcGrid] = []
    arrived = lambda: grids[0].traffic["north"]["received"]  # noqa: E731
    monkeypatch.setattr(grpc_site, "cut", broken_after(3 << 20, starts, arrived))
    data = os.urandom(BIG)

    def main(grid: GrpcGrid) -> tuple[Any, Any]:
        grids.append(grid)
        grid.wait_for_sites(1, 600)
        return world.ask(grid, Packet({"kind": "x"}, {"a": data}), sites=["north"]), grid.traffic["north"]

    server = world.server(main)
    world.site("north")
    assert server.ended() is None
    replies, traffic = server.result
    assert world.opened(replies["north"]).buffers["a"] == data
    assert starts[0] == 0
    assert starts[1] >= 2 << 20
    assert traffic["received"] < BIG + CHUNK, "bytes that had come were sent again"
    assert traffic["sent"] < BIG + CHUNK, "the question was sent again to a site that had answered it"
    assert "lost" in world.statuses["north"]


def test_a_half_sent_message_goes_on_where_it_broke(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedveil.deploy.transport import grpc_service

    starts: list[int] = []
    monkeypatch.setattr(grpc_service, "cut", broken_after(3 << 20, starts))
    data = os.urandom(BIG)

    def main(grid: GrpcGrid) -> Any:
        grid.wait_for_sites(1, 600)
        return world.ask(grid, Packet({"kind": "x"}, {"a": data}), sites=["north"])

    server = world.server(main)
    world.site("north")
    assert server.ended() is None
    assert world.opened(server.result["north"]).buffers["a"] == data
    assert starts[0] == 0
    assert 2 << 20 <= starts[1] <= 3 << 20


def test_a_server_that_goes_on_elsewhere_is_refused(world: World) -> None:
    """A site takes up a message only at the byte that it has."""
    server = world.server(lambda grid: world.ask(grid, Packet({"kind": "x"}, {"a": bytes(BIG)}), ["north"]))
    first = world.wire("north")
    assert canonical.loads(next(first.work)) == {"t": "message", "from": 0, "got": 0}
    decoder = Decoder(Limits())
    decoder.feed(next(first.work))
    decoder.feed(next(first.work))
    assert decoder.metadata is not None
    message_id, had = decoder.metadata.message_id, decoder.received
    # The same process again, on a new call: the old one is replaced.
    for claim, start in ((f"{message_id}:{had}", had), (f"{message_id}:{10**14}", 0), ("x:1", 0), ("f" * 32 + ":5", 0)):
        first.work = call = first.channel.unary_stream(f"/{SERVICE}/Work")(
            b"", metadata=(*first.metadata, (HAVE, claim))
        )
        assert canonical.loads(next(call))["t"] == "welcome"
        assert canonical.loads(next(call))["from"] == start
        if start:
            while not decoder.complete:
                decoder.feed(next(call))
    message = decoder.result()
    answer = encode(flower.reply(Packet({"kind": "a"}), message))
    for bad in ("5", "x", "-1", "9" * 30):
        stream = first.channel.stream_unary(f"/{SERVICE}/Reply")
        call = stream.future(cut(answer), metadata=(*first.metadata, (FROM, bad)), timeout=600)
        assert call.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert first.reply(cut(answer)) == b"ok"
    first.close()
    assert server.ended() is None


def test_replies_wait_at_their_sites_until_there_is_room(world: World) -> None:
    most: list[int] = []

    def main(grid: GrpcGrid) -> list[str]:
        grid.wait_for_sites(3, 600)
        came = []
        packet = Packet({"kind": "x"}, {"a": bytes(BIG)})
        for reply in grid.replies(world.requests(grid, packet), timeout=600):
            time.sleep(0.3)  # the app is slower than the sites
            most.append(grid.mailbox._intake.held)
            came.append(grid.site_of(reply.metadata.src_node_id))
        assert grid.mailbox._intake.held == 0
        return sorted(came)

    server = world.server(main, bounds=Bounds(held=BIG + 1000))
    for name in ("north", "south", "west"):
        world.site(name)
    assert server.ended() is None
    assert server.result == ["north", "south", "west"]
    assert max(most) <= BIG + 1000


def test_no_dead_lock_when_the_app_asks_for_the_one_that_has_no_room(world: World) -> None:
    def main(grid: GrpcGrid) -> tuple[int, int]:
        grid.wait_for_sites(2, 600)
        packet = Packet({"kind": "x"}, {"a": bytes(BIG)})
        [north], [south] = (world.requests(grid, packet, [s]) for s in ("north", "south"))
        pushed = list(grid.push_messages([north]))
        world.until(lambda: grid.mailbox._intake.held > 0)
        second = len(list(grid.send_and_receive([south], timeout=600)))
        return second, len(list(grid.pull_messages(pushed)))

    server = world.server(main, bounds=Bounds(held=1000))
    for name in ("north", "south"):
        world.site(name)
    assert server.ended() is None
    assert server.result == (1, 1)


@pytest.mark.slow
def test_a_slow_line_is_waited_for_beyond_the_time_limit_and_not_for_ever(world: World) -> None:
    """The limit is for standing still: 4 s; the answer takes 6 s to come, and moves all the time."""

    def main(grid: GrpcGrid) -> tuple[int, int]:
        grid.wait_for_sites(1, 600)
        return len(world.ask(grid, sites=["north"], timeout=4.0)), len(world.ask(grid, sites=["north"], timeout=4.0))

    server = world.server(main)
    wire = world.wire("north")

    def slowly(message: Message, seconds: float) -> Iterator[bytes]:
        chunks = [*cut(encode(flower.reply(Packet({"kind": "a"}, {"a": bytes(300_000)}), message)), 10_000)]
        for chunk in chunks:
            yield chunk
            time.sleep(seconds / len(chunks))

    assert wire.reply(slowly(wire.message(), 6)) == b"ok"
    assert wire.reply(slowly(wire.message(), 20)) == b"stale", "three times the limit is the end"
    wire.close()
    assert server.ended() is None
    assert server.result == (1, 0)


def test_a_certificate_that_is_refused_later_ends_the_session(world: World) -> None:
    revoked, reports = threading.Event(), []

    def gate(site: SiteId, pem: bytes) -> None:
        assert pem.startswith(b"-----BEGIN CERTIFICATE")
        if revoked.is_set() and site == "north":
            raise IdentityError("revoked", hint="ask the consortium")

    def main(grid: GrpcGrid) -> list[str]:
        grid.wait_for_sites(2, 600)
        revoked.set()
        world.until(lambda: grid.mailbox.connected() == [SiteId("south")])
        answered = sorted(world.ask(grid))
        world.until(lambda: not world.tasks[1].is_alive())  # it dials again and is told why
        return answered

    server = world.server(main, gate=gate, report=lambda *r: reports.append(r))
    north = world.site("north")
    world.site("south")
    assert server.ended() is None
    error = north.ended()
    assert isinstance(error, TransportError)
    assert "revoked" in error.message
    assert server.result == ["south"]
    assert ("north", "its certificate is not accepted any more") in reports


def test_a_site_that_dials_again_at_once_is_not_its_own_rival(world: World) -> None:
    """Its old answer's stream still hangs at the server when the same process is back."""
    app, calls = ClientApp(), []

    @app.train("echo")
    def work(message: Message, context: Context) -> Message:
        calls.append(1)
        return flower.reply(Packet({"kind": "a"}, {"a": bytes(BIG)}), message)

    boxes: list[Mailbox] = []
    server = world.server(lambda grid: boxes.append(grid.mailbox) or len(world.ask(grid, sites=["north"])))
    wire = world.wire("north")
    message = wire.message()
    hang = threading.Event()

    def begun() -> bool:
        incoming = boxes[0]._links[SiteId("north")].incoming
        return incoming is not None and incoming.decoder.received > 0

    def hanging() -> Iterator[bytes]:
        yield encode(flower.reply(Packet({"kind": "a"}, {"a": bytes(BIG)}), message))[0]
        hang.wait(600)

    old = wire.channel.stream_unary(f"/{SERVICE}/Reply").future(hanging(), metadata=wire.metadata)
    world.until(begun)
    wire.work = wire.channel.unary_stream(f"/{SERVICE}/Work")(b"", metadata=wire.metadata)
    assert canonical.loads(next(wire.work))["t"] == "welcome"
    assert canonical.loads(next(wire.work))["got"] > 0
    assert wire.reply(cut(encode(flower.reply(Packet({"kind": "new"}), message)))) == b"ok"
    hang.set()
    assert old.code() is not grpc.StatusCode.OK
    wire.close()
    assert server.ended() is None
    assert server.result == 1


TLS = """
import socket, ssl, sys, threading
from pathlib import Path
from fedveil.deploy.transport.grpc_grid import serve
from flwr.serverapp import ServerApp
from fedveil.deploy.enrol.provision import load_roster, load_tls
folder = Path(sys.argv[1])
files, results = load_tls(folder / "sites" / "north"), []

def probe(port):
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        context = ssl.create_default_context(cafile=str(files.ca))
        context.load_cert_chain(files.certificate, files.key)
        context.set_alpn_protocols(["h2"])
        context.minimum_version = context.maximum_version = version
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=600) as raw:
                with context.wrap_socket(raw, server_hostname="127.0.0.1") as s:
                    results.append(bool(s.recv(1)))
        except (ssl.SSLError, ConnectionError):
            results.append(False)

app = ServerApp()
app.main()(lambda grid, context: None)
serve(app, address="127.0.0.1:0", tls=load_tls(folder / "server"), roster=load_roster(folder / "server"), ready=probe)
print(results)
"""


@pytest.mark.parametrize(("first", "expected"), [("", "[False, True]"), ("import grpc\n", "[True, True]")])
def test_only_tls_1_3_is_spoken_and_a_process_that_cannot_ensure_it_says_so(
    pki: Path, first: str, expected: str
) -> None:
    env = {k: v for k, v in os.environ.items() if k != "GRPC_SSL_CIPHER_SUITES"}
    command = [sys.executable, "-c", first + textwrap.dedent(TLS), str(pki)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.stdout.strip() == expected, done.stderr
    assert ("TLS 1.2 is not excluded" in done.stderr) is bool(first)
