"""Real mTLS gRPC on loopback: exact bytes, and what a slow, lost or killed site or server does to a run."""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedveil.common import flwr_adapter as flower
from fedveil.common.errors import PolicyRefusal, ProtocolError, RunAborted, WireError
from fedveil.common.units import SiteId
from fedveil.common.wire import Packet
from fedveil.deploy.transport.grpc_grid import GrpcGrid

if TYPE_CHECKING:
    from tests.deploy.transport.conftest import World


def test_large_buffers_come_back_exactly_and_the_run_ends(world: World) -> None:
    big = Packet({"kind": "x"}, {"a": os.urandom(5_000_000), "empty": b"", "b": os.urandom((1 << 20) + 1)})

    def main(grid: GrpcGrid) -> tuple[Any, ...]:
        assert grid.wait_for_sites(3, 600) == 3
        assert [grid.site_of(n) for n in grid.get_node_ids()] == ["north", "south", "west"]
        return world.ask(grid, big), grid.traffic

    server = world.server(main)
    sites = [world.site(name) for name in ("north", "south", "west")]
    assert server.ended() is None
    assert [s.ended() for s in sites] == [None] * 3
    replies, traffic = server.result
    for name in ("north", "south", "west"):
        assert world.opened(replies[name]) == Packet({"kind": "echo", "site": name}, big.buffers)
        assert world.statuses[name][-1] == "finished"
        total = sum(map(len, big.buffers.values()))
        assert total < traffic[name]["sent"] < total + 2000
        assert total < traffic[name]["received"] < total + 2000


def test_contexts_last_over_many_rounds(world: World) -> None:
    app = ClientApp()
    calls: list[Context] = []

    @app.train("echo")
    def count(message: Message, context: Context) -> Message:
        calls.append(context)
        return flower.reply(Packet({"kind": "n", "n": len(calls)}), message)

    def main(grid: GrpcGrid) -> None:
        grid.wait_for_sites(1, 600)
        for _ in range(20):
            assert len(world.ask(grid)) == 1

    server = world.server(main)
    world.site("north", app)
    assert server.ended() is None
    assert len({id(c) for c in calls}) == 1
    assert calls[0].run_id > 0


def test_our_errors_arrive_and_other_exceptions_do_not(world: World) -> None:
    def app_raising(error: Exception) -> ClientApp:
        app = ClientApp()

        @app.train("echo")
        def fail(message: Message, context: Context) -> Message:
            raise error

        return app

    def main(grid: GrpcGrid) -> dict[str, Message]:
        grid.wait_for_sites(2, 600)
        world.ask(grid)
        return world.ask(grid)

    server = world.server(main)
    world.site("north", app_raising(PolicyRefusal("too many rounds", hint="ask less")))
    world.site("south", app_raising(KeyError("patient Meier")))
    assert server.ended() is None
    north, south = (flower.reply_error(server.result[s]) for s in ("north", "south"))
    assert isinstance(north, PolicyRefusal)
    assert north.hint == "ask less"
    assert type(south) is ProtocolError
    assert "Meier" not in str(server.result["south"])


def test_a_site_that_dies_at_work_does_not_hold_up_the_round(world: World) -> None:
    at_work, app = threading.Event(), ClientApp()

    @app.train("echo")
    def die(message: Message, context: Context) -> Message:
        at_work.set()
        raise SystemExit  # leaves run_site without an answer, as a killed process does

    def main(grid: GrpcGrid) -> set[str]:
        grid.wait_for_sites(2, 600)
        return set(world.ask(grid, timeout=None))  # without the grace this wait never ends

    server = world.server(main, grace=0.5)
    world.site("north")
    dead = world.site("south", app)
    assert isinstance(dead.ended(), SystemExit)
    assert at_work.is_set()
    assert server.ended() is None
    assert server.result == {"north"}


def test_timeout_rules_over_a_connected_site_that_is_slow(world: World) -> None:
    release = threading.Event()
    app, handled = ClientApp(), []

    @app.train("echo")
    def slow(message: Message, context: Context) -> Message:
        handled.append(message.metadata.group_id)
        if len(handled) == 1:
            release.wait(600)
        return flower.reply(world.PING, message)

    def main(grid: GrpcGrid) -> tuple[int, int]:
        grid.wait_for_sites(1, 600)
        first = 0
        while not handled:  # on a busy machine the first question may be over before it reaches the site
            first += len(world.ask(grid, timeout=0.3))
        release.set()
        return first, len(world.ask(grid, timeout=600))

    server = world.server(main)
    world.site("north", app)
    assert server.ended() is None
    assert server.result == (0, 1)
    assert len(handled) == 2


def test_messages_wait_for_a_site_that_comes_late(world: World) -> None:
    server = world.server(
        lambda grid: world.opened(world.ask(grid, sites=["north"], timeout=600)["north"]).header["site"]
    )
    time.sleep(0.3)
    world.site("north")
    assert server.ended() is None
    assert server.result == "north"


def test_a_reply_can_be_worked_on_while_another_site_still_works(world: World) -> None:
    free, app = threading.Event(), ClientApp()

    @app.train("echo")
    def work(message: Message, context: Context) -> Message:
        assert free.wait(600)
        return flower.reply(world.PING, message)

    def main(grid: GrpcGrid) -> list[str]:
        assert grid.wait_for_sites(3, 600) == 3
        came = list[str]()
        for reply in grid.replies(world.requests(grid), timeout=600):
            came.append(grid.site_of(reply.metadata.src_node_id))
            if len(came) == 2:
                assert not free.is_set()
                free.set()  # the slow site may answer only now
        return came

    server = world.server(main)
    for name in ("north", "west"):
        world.site(name)
    world.site("south", app)
    assert server.ended() is None
    assert set(server.result[:2]) == {"north", "west"}
    assert server.result[2] == "south"


def test_a_late_site_does_no_work_for_a_round_that_is_over(world: World) -> None:
    app, handled, go = ClientApp(), [], threading.Event()

    @app.train("echo")
    def work(message: Message, context: Context) -> Message:
        handled.append(message.metadata.group_id)
        return flower.reply(world.PING, message)

    def main(grid: GrpcGrid) -> int:
        assert world.ask(grid, sites=["north"]) == {}
        go.set()
        grid.wait_for_sites(1, 600)
        return len(
            list(
                grid.send_and_receive(
                    [flower.request(world.PING, to=flower.node_id(SiteId("north")), action="train.echo", round=2)]
                )
            )
        )

    server = world.server(main, grace=0.1)
    assert go.wait(600)
    world.site("north", app)
    assert server.ended() is None
    assert server.result == 1
    assert handled == ["2"]


def test_a_site_answers_a_repeated_message_with_the_same_bytes(world: World) -> None:
    """The connection breaks after the work and before the reply: the app is not asked twice."""
    app, handled, broken = ClientApp(), [], []

    @app.train("echo")
    def work(message: Message, context: Context) -> Message:
        handled.append(message.metadata.message_id)
        server_mailbox = mailboxes[0]
        link = server_mailbox._links[SiteId("north")]
        if not broken:
            broken.append(1)
            server_mailbox.detach(SiteId("north"), link.session)  # the server loses the stream
        return flower.reply(Packet({"kind": "a", "nonce": secrets.token_hex(8)}), message)

    mailboxes: list[Any] = []

    def main(grid: GrpcGrid) -> int:
        mailboxes.append(grid.mailbox)
        grid.wait_for_sites(1, 600)
        return len(world.ask(grid, sites=["north"]))

    server = world.server(main)
    world.site("north", app)
    assert server.ended() is None
    assert server.result == 1
    assert len(handled) == 1
    assert "lost" in world.statuses["north"]


def test_a_site_may_start_before_the_server_and_outlive_its_restart(world: World, free_port: Any) -> None:
    port = free_port()
    seen: list[int] = []
    site = world.site("north", address=f"127.0.0.1:{port}")

    def crash(grid: GrpcGrid) -> None:
        grid.wait_for_sites(1, 600)
        seen.append(len(world.ask(grid)))
        raise KeyboardInterrupt

    assert isinstance(world.server(crash, port=port).ended(), KeyboardInterrupt)

    def main(grid: GrpcGrid) -> int:
        grid.wait_for_sites(1, 600)
        return len(world.ask(grid))

    second = world.server(main, port=port)
    assert second.ended() is None
    assert (seen, second.result) == ([1], 1)
    assert site.ended() is None
    assert world.statuses["north"].count("connected") == 2


class Line:
    """A TCP line to the server that can go dead without closing, as a pulled cable does."""

    def __init__(self, port: int) -> None:
        self.target, self.dead = port, threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        self.sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            self.sockets.append(near)
            try:
                far = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                near.close()  # the server has ended
                continue
            self.sockets.append(far)
            dead = self.dead = threading.Event()
            for a, b in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(a, b, dead), daemon=True).start()

    @staticmethod
    def _pump(a: socket.socket, b: socket.socket, dead: threading.Event) -> None:
        try:
            while data := a.recv(1 << 16):
                if not dead.is_set():
                    b.sendall(data)
        except OSError:
            return

    def close(self) -> None:
        for s in (self.listener, *self.sockets):
            s.close()


@pytest.mark.slow
def test_a_dead_line_is_noticed_and_dialled_again(world: World) -> None:
    """Keep-alive: 10 s until the ping, 5 s until it counts as lost; nothing closes the sockets."""
    cut_now, is_cut = threading.Event(), threading.Event()

    def main(grid: GrpcGrid) -> tuple[int, int]:
        grid.wait_for_sites(1, 600)
        before = len(world.ask(grid))
        cut_now.set()
        assert is_cut.wait(600)
        return before, len(world.ask(grid, sites=["north"], timeout=600))

    server = world.server(main, grace=20)  # either end may notice first: the other one's turn comes within it
    line = Line(world.port)
    world.site("north", address=f"127.0.0.1:{line.port}", wait=40)
    assert cut_now.wait(600)
    line.dead.set()
    is_cut.set()
    assert server.ended() is None
    line.close()
    assert server.result == (1, 1)
    assert len(line.sockets) > 2, "it was not dialled again"


def test_a_failing_server_app_tells_the_sites(world: World) -> None:
    def main(grid: GrpcGrid) -> None:
        grid.wait_for_sites(1, 600)
        raise PolicyRefusal("no")

    server = world.server(main)
    site = world.site("north")
    assert isinstance(server.ended(), PolicyRefusal)
    assert isinstance(site.ended(), RunAborted)
    assert world.statuses["north"][-1] == "aborted"


def test_an_oversized_request_is_the_servers_error(world: World) -> None:
    def main(grid: GrpcGrid) -> None:
        grid.wait_for_sites(1, 600)
        message = world.requests(grid)[0]
        message.content["more"] = message.content[flower.HEADER].__class__({"x" * (9 << 20): 1})  # type: ignore[call-arg]
        list(grid.push_messages([message]))

    server = world.server(main)
    world.site("north")
    assert isinstance(server.ended(), WireError)
