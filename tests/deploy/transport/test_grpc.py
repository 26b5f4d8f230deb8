"""Real mTLS gRPC on loopback: exact bytes, who gets in, what a lost, killed or hostile site does to a run."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import threading
import time
from concurrent import futures
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedveil.common import canonical, identity
from fedveil.common import flwr_adapter as flower
from fedveil.common.errors import PolicyRefusal, ProtocolError, RunAborted, TransportError, WireError
from fedveil.common.identity import Member, Roster
from fedveil.common.units import SiteId
from fedveil.common.wire import Limits, Packet
from fedveil.deploy.provision import load_tls, make_consortium
from fedveil.deploy.transport.codec import Decoder, cut, encode
from fedveil.deploy.transport.grpc_grid import INSTANCE, OPTIONS, SERVICE, GrpcGrid, read_tls, serve
from fedveil.deploy.transport.grpc_site import run_site

if TYPE_CHECKING:
    from tests.deploy.transport.conftest import World

PING = Packet({"kind": "ping"})


def requests(grid: GrpcGrid, packet: Packet = PING, sites: list[str] | None = None) -> list[Message]:
    nodes = grid.get_node_ids() if sites is None else [flower.node_id(SiteId(s)) for s in sites]
    return [flower.request(packet, to=n, action="train.echo", round=1) for n in nodes]


def ask(
    grid: GrpcGrid, packet: Packet = PING, sites: list[str] | None = None, timeout: float | None = 20
) -> dict[str, Message]:
    out = grid.send_and_receive(requests(grid, packet, sites), timeout=timeout)
    return {grid.site_of(m.metadata.src_node_id): m for m in out}


def opened(message: Message) -> Packet:
    return flower.from_record(message.content, Limits())


def test_large_buffers_come_back_exactly_and_the_run_ends(world: World) -> None:
    big = Packet({"kind": "x"}, {"a": os.urandom(5_000_000), "empty": b"", "b": os.urandom((1 << 20) + 1)})

    def main(grid: GrpcGrid) -> tuple[Any, ...]:
        assert grid.wait_for_sites(3, 10) == 3
        assert [grid.site_of(n) for n in grid.get_node_ids()] == ["north", "south", "west"]
        return ask(grid, big), grid.traffic

    server = world.server(main)
    sites = [world.site(name) for name in ("north", "south", "west")]
    assert server.ended() is None
    assert [s.ended() for s in sites] == [None] * 3
    replies, traffic = server.result
    for name in ("north", "south", "west"):
        assert opened(replies[name]) == Packet({"kind": "echo", "site": name}, big.buffers)
        assert world.statuses[name][-1] == "finished"
        total = sum(map(len, big.buffers.values()))
        assert total < traffic[name]["sent"] < total + 2000
        assert total < traffic[name]["received"] < total + 2000


def test_many_rounds_are_quick_and_contexts_last(world: World) -> None:
    app = ClientApp()
    calls: list[Context] = []

    @app.train("echo")
    def count(message: Message, context: Context) -> Message:
        calls.append(context)
        return flower.reply(Packet({"kind": "n", "n": len(calls)}), message)

    def main(grid: GrpcGrid) -> float:
        grid.wait_for_sites(1, 10)
        ask(grid)
        start = time.perf_counter()
        for _ in range(20):
            assert len(ask(grid)) == 1
        return (time.perf_counter() - start) / 20

    server = world.server(main)
    world.site("north", app, run_config={"lr": 0.5})
    assert server.ended() is None
    assert server.result < 0.5
    assert len({id(c) for c in calls}) == 1
    assert calls[0].run_config == {"lr": 0.5}
    assert calls[0].run_id > 0


def test_our_errors_arrive_and_other_exceptions_do_not(world: World) -> None:
    def app_raising(error: Exception) -> ClientApp:
        app = ClientApp()

        @app.train("echo")
        def fail(message: Message, context: Context) -> Message:
            raise error

        return app

    def main(grid: GrpcGrid) -> dict[str, Message]:
        grid.wait_for_sites(2, 10)
        ask(grid)
        return ask(grid)

    server = world.server(main)
    world.site("north", app_raising(PolicyRefusal("too many rounds", hint="ask less")))
    world.site("south", app_raising(KeyError("patient Meier")))
    assert server.ended() is None
    north, south = (flower.reply_error(server.result[s]) for s in ("north", "south"))
    assert isinstance(north, PolicyRefusal)
    assert north.hint == "ask less"
    assert type(south) is ProtocolError
    assert "Meier" not in str(server.result["south"])


def waiting(grid: GrpcGrid, until: threading.Event) -> list[SiteId]:
    until.wait(20)
    return grid.mailbox.connected()


def test_a_foreign_authoritys_certificate_is_refused_on_both_sides(world: World, tmp_path: Path) -> None:
    make_consortium(tmp_path, ["north"], consortium="foreign")
    done = threading.Event()
    server = world.server(lambda grid: waiting(grid, done))
    # The site trusts its own authority: it refuses the server.
    error = world.site("north", folder=tmp_path / "sites" / "north").ended()
    assert isinstance(error, TransportError)
    assert "server's certificate" in error.message
    # The site trusts the right authority but shows a foreign certificate: the server refuses it.
    mixed = tmp_path / "mixed"
    shutil.copytree(tmp_path / "sites" / "north", mixed)
    right = world.pki / "sites" / "north" / "ca.pem"
    tls = load_tls(mixed)
    shutil.copy(right, mixed / "ca.pem")
    with pytest.raises(TransportError, match="does not accept this site's certificate"):
        run_site(
            ClientApp(), address=f"127.0.0.1:{world.port}", tls=tls, site=SiteId("north"), node_config={},
            stop=world.stop, wait=5,
        )  # fmt: skip
    done.set()
    assert server.ended() is None
    assert server.result == []


def test_a_certificate_that_is_not_on_the_roster_is_refused(world: World) -> None:
    members = world.roster.sites
    world.roster = Roster("test", world.roster.server, members[:2])
    done = threading.Event()
    server = world.server(lambda grid: waiting(grid, done))
    error = world.site("west").ended()
    assert isinstance(error, TransportError)
    assert "not on the roster" in error.message
    assert "enrol" in error.hint
    done.set()
    assert server.ended() is None
    assert server.result == []


def test_the_servers_own_certificate_is_no_site(world: World) -> None:
    done = threading.Event()
    server = world.server(lambda grid: waiting(grid, done))
    assert isinstance(world.site("north", folder=world.pki / "server").ended(), TransportError)
    done.set()
    assert server.ended() is None
    assert server.result == []


def test_a_site_cannot_play_the_server(world: World, tmp_path: Path) -> None:
    """Its certificate is of the right authority, but for another role and without the host's name."""
    ca, certificate, key = read_tls(load_tls(world.pki / "sites" / "south"))
    impostor = grpc.server(futures.ThreadPoolExecutor(2))
    credentials = grpc.ssl_server_credentials([(key, certificate)], ca, require_client_auth=True)
    world.port = impostor.add_secure_port("127.0.0.1:0", credentials)
    impostor.start()
    error = world.site("north").ended()
    impostor.stop(0).wait()
    assert isinstance(error, TransportError)
    assert "server's certificate" in error.message


def test_another_sites_certificate_is_refused_by_name(world: World) -> None:
    done = threading.Event()
    server = world.server(lambda grid: waiting(grid, done))
    error = world.site("north", folder=world.pki / "sites" / "south").ended()
    assert isinstance(error, TransportError)
    assert "not that of 'north'" in error.message
    done.set()
    assert server.ended() is None


def test_two_processes_with_one_identity(world: World) -> None:
    done = threading.Event()
    server = world.server(lambda grid: waiting(grid, done))
    first = world.site("north")
    until(lambda: "connected" in world.statuses["north"])
    error = world.site("north").ended()
    assert isinstance(error, TransportError)
    assert "another process is connected" in error.message
    done.set()
    assert server.ended() is None
    assert server.result == ["north"]
    assert first.ended() is None


def until(condition: Any, timeout: float = 10) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.01)


def test_a_restarted_process_takes_over_at_once(world: World) -> None:
    stop, met, go = threading.Event(), threading.Event(), threading.Event()

    def main(grid: GrpcGrid) -> int:
        grid.wait_for_sites(1, 10)
        met.set()
        go.wait(10)
        return len(ask(grid, sites=["north"]))

    server = world.server(main)
    first = world.site("north", stop=stop)
    assert met.wait(10)
    stop.set()
    assert first.ended() is None
    assert world.statuses["north"][-1] == "stopped"
    world.site("north")
    go.set()
    assert server.ended() is None
    assert server.result == 1


def test_a_site_that_dies_at_work_does_not_hold_up_the_round(world: World) -> None:
    at_work, app = threading.Event(), ClientApp()

    @app.train("echo")
    def die(message: Message, context: Context) -> Message:
        at_work.set()
        raise SystemExit  # leaves run_site without an answer, as a killed process does

    def main(grid: GrpcGrid) -> tuple[set[str], float]:
        grid.wait_for_sites(2, 10)
        start = time.monotonic()
        return set(ask(grid, timeout=60)), time.monotonic() - start

    server = world.server(main, grace=0.5)
    world.site("north")
    dead = world.site("south", app)
    assert isinstance(dead.ended(), SystemExit)
    assert at_work.is_set()
    assert server.ended() is None
    answered, seconds = server.result
    assert answered == {"north"}
    assert 0.4 < seconds < 5


def test_timeout_rules_over_a_connected_site_that_is_slow(world: World) -> None:
    release = threading.Event()
    app, handled = ClientApp(), []

    @app.train("echo")
    def slow(message: Message, context: Context) -> Message:
        handled.append(message.metadata.group_id)
        if len(handled) == 1:
            release.wait(20)
        return flower.reply(PING, message)

    def main(grid: GrpcGrid) -> tuple[float, int, int]:
        grid.wait_for_sites(1, 10)
        start = time.monotonic()
        first = len(ask(grid, timeout=0.3))
        seconds = time.monotonic() - start
        release.set()
        return seconds, first, len(ask(grid, timeout=20))

    server = world.server(main)
    world.site("north", app)
    assert server.ended() is None
    seconds, first, second = server.result
    assert (first, second) == (0, 1)
    assert 0.2 < seconds < 3
    assert len(handled) == 2


def test_messages_wait_for_a_site_that_comes_late(world: World) -> None:
    server = world.server(lambda grid: opened(ask(grid, sites=["north"], timeout=20)["north"]).header["site"])
    time.sleep(0.3)
    world.site("north")
    assert server.ended() is None
    assert server.result == "north"


def test_a_late_site_does_no_work_for_a_round_that_is_over(world: World) -> None:
    app, handled, go = ClientApp(), [], threading.Event()

    @app.train("echo")
    def work(message: Message, context: Context) -> Message:
        handled.append(message.metadata.group_id)
        return flower.reply(PING, message)

    def main(grid: GrpcGrid) -> int:
        assert ask(grid, sites=["north"]) == {}
        go.set()
        grid.wait_for_sites(1, 10)
        return len(
            list(
                grid.send_and_receive(
                    [flower.request(PING, to=flower.node_id(SiteId("north")), action="train.echo", round=2)]
                )
            )
        )

    server = world.server(main, grace=0.1)
    assert go.wait(10)
    world.site("north", app)
    assert server.ended() is None
    assert server.result == 1
    assert handled == ["2"]


def raw_channel(world: World, site: str) -> grpc.Channel:
    ca, certificate, key = read_tls(load_tls(world.pki / "sites" / site))
    credentials = grpc.ssl_channel_credentials(ca, key, certificate)
    return grpc.secure_channel(
        f"127.0.0.1:{world.port}", credentials, [*OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
    )


class Wire:
    """A hand-driven site."""

    def __init__(self, world: World, site: str, instance: str = "one") -> None:
        self.channel, self.metadata = raw_channel(world, site), ((INSTANCE, instance),)
        self.work = self.channel.unary_stream(f"/{SERVICE}/Work")(b"", metadata=self.metadata)
        assert canonical.loads(next(self.work))["t"] == "welcome"

    def message(self) -> Message:
        assert canonical.loads(next(self.work)) == {"t": "message"}
        decoder = Decoder(Limits())
        while not decoder.complete:
            decoder.feed(next(self.work))
        return decoder.result()

    def reply(self, chunks: Any) -> bytes:
        return self.channel.stream_unary(f"/{SERVICE}/Reply")(iter(chunks), metadata=self.metadata, timeout=10)

    def close(self) -> None:
        self.work.cancel()
        self.channel.close()


def refused(call: Any, code: grpc.StatusCode) -> str:
    with pytest.raises(grpc.RpcError) as e:
        call()
    assert isinstance(e.value, grpc.Call)
    assert e.value.code() == code
    return e.value.details() or ""


def test_an_unanswered_message_is_delivered_again_after_reconnection(world: World) -> None:
    server = world.server(lambda grid: opened(ask(grid, sites=["north"])["north"]).header)
    first = Wire(world, "north")
    message = first.message()
    first.close()
    second = reconnected(world)
    again = second.message()
    assert again.metadata.message_id == message.metadata.message_id
    assert again.content == message.content
    assert second.reply([b"".join(encode(flower.reply(Packet({"kind": "second"}), again)))]) == b"ok"
    assert canonical.loads(next(second.work)) == {"t": "end", "status": "finished"}
    second.close()
    assert server.ended() is None
    assert server.result == {"kind": "second"}


def reconnected(world: World) -> Wire:
    """A new process, as soon as the server has seen that the first one is gone."""
    for _ in range(200):
        try:
            return Wire(world, "north", "two")
        except grpc.RpcError:
            time.sleep(0.02)
    raise AssertionError("the first process is still connected")


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
        grid.wait_for_sites(1, 10)
        return len(ask(grid, sites=["north"]))

    server = world.server(main)
    world.site("north", app)
    assert server.ended() is None
    assert server.result == 1
    assert len(handled) == 1
    assert "lost" in world.statuses["north"]


def test_hostile_frames_do_not_disturb_the_others(world: World) -> None:
    ready, done = threading.Event(), threading.Event()

    def main(grid: GrpcGrid) -> tuple[dict[str, Message], int]:
        grid.wait_for_sites(2, 10)
        ready.set()
        replies = ask(grid, sites=["north", "south"])
        done.wait(20)
        return replies, len(ask(grid, sites=["north"]))

    server = world.server(main, limits=Limits(header=10_000, buffers=100_000))
    bad = Wire(world, "south")
    world.site("north")
    message = bad.message()
    good = flower.reply(Packet({"kind": "x"}, {"a": bytes(50)}), message)
    # Garbage that cannot be assigned to a message, a cut stream, a stranger's message: refused, still owed.
    assert "WireError" in refused(lambda: bad.reply([b"\0" * 5000]), grpc.StatusCode.INVALID_ARGUMENT)
    refused(lambda: bad.reply([]), grpc.StatusCode.ABORTED)
    refused(lambda: bad.reply(cut(encode(good)[:1])), grpc.StatusCode.ABORTED)
    stale = flower.copied(good)
    stale.metadata.__dict__["_reply_to_message_id"] = "f" * 32
    assert bad.reply(cut(encode(stale))) == b"stale"
    # A chunk over the transport's limit never reaches the decoder.
    refused(lambda: bad.reply([bytes(2 << 20)]), grpc.StatusCode.RESOURCE_EXHAUSTED)
    # Another process's name, no name, no such call.
    stranger = bad.channel.stream_unary(f"/{SERVICE}/Reply")
    refused(lambda: stranger(iter([]), metadata=((INSTANCE, "two"),)), grpc.StatusCode.FAILED_PRECONDITION)
    refused(lambda: stranger(iter([])), grpc.StatusCode.INVALID_ARGUMENT)
    refused(lambda: bad.channel.unary_unary(f"/{SERVICE}/Admin")(b""), grpc.StatusCode.UNIMPLEMENTED)
    # A readable header that breaks a bound is this site's answer: an error, at once.
    large = flower.reply(Packet({"kind": "x"}, {"a": bytes(200_000)}), message)
    assert "limit" in refused(lambda: bad.reply(cut(encode(large))), grpc.StatusCode.INVALID_ARGUMENT)
    assert bad.reply(cut(encode(good))) == b"stale"
    done.set()
    bad.close()
    assert server.ended() is None
    replies, after = server.result
    assert not replies["north"].has_error()
    assert isinstance(flower.reply_error(replies["south"]), WireError)
    assert after == 1


def test_a_reply_cannot_speak_for_another_site_or_round(world: World) -> None:
    def main(grid: GrpcGrid) -> Message:
        return next(iter(grid.send_and_receive(requests(grid, sites=["south"]), timeout=20)))

    server = world.server(main)
    bad = Wire(world, "south")
    message = bad.message()
    forged = flower.reply(Packet({"kind": "x"}), message)
    forged.metadata.__dict__.update(_src_node_id=flower.node_id(SiteId("north")), _group_id="99", _run_id=5)
    assert bad.reply(cut(encode(forged))) == b"ok"
    bad.close()
    assert server.ended() is None
    metadata = server.result.metadata
    assert metadata.src_node_id == flower.node_id(SiteId("south"))
    assert (metadata.group_id, metadata.run_id) == ("1", message.metadata.run_id)


def test_without_a_certificate_nobody_is_heard(world: World) -> None:
    done = threading.Event()
    server = world.server(lambda grid: waiting(grid, done))
    ca = (world.pki / "server" / "ca.pem").read_bytes()
    for credentials in (grpc.ssl_channel_credentials(ca), None):
        target = f"127.0.0.1:{world.port}"
        channel = grpc.secure_channel(target, credentials) if credentials else grpc.insecure_channel(target)
        with channel:
            call = channel.unary_unary(f"/{SERVICE}/Work")
            refused(lambda call=call: call(b"", timeout=5), grpc.StatusCode.UNAVAILABLE)
    done.set()
    assert server.ended() is None


def test_a_port_in_use_is_named(world: World) -> None:
    done = threading.Event()
    server = world.server(lambda grid: waiting(grid, done))
    with pytest.raises(TransportError, match=f"127.0.0.1:{world.port}"):
        serve(ServerApp(), address=f"127.0.0.1:{world.port}", tls=load_tls(world.pki / "server"), roster=world.roster)
    done.set()
    assert server.ended() is None


def test_no_server_is_an_error_with_the_address(world: World) -> None:
    error = world.site("north", address="127.0.0.1:1", wait=0.3).ended()
    assert isinstance(error, TransportError)
    assert "127.0.0.1:1" in error.message


def test_a_site_may_start_before_the_server_and_outlive_its_restart(world: World) -> None:
    port = free_port()
    seen: list[int] = []
    site = world.site("north", address=f"127.0.0.1:{port}")

    def crash(grid: GrpcGrid) -> None:
        grid.wait_for_sites(1, 10)
        seen.append(len(ask(grid)))
        raise KeyboardInterrupt

    assert isinstance(world.server(crash, port=port).ended(), KeyboardInterrupt)

    def main(grid: GrpcGrid) -> int:
        grid.wait_for_sites(1, 10)
        return len(ask(grid))

    second = world.server(main, port=port)
    assert second.ended() is None
    assert (seen, second.result) == ([1], 1)
    assert site.ended() is None
    assert world.statuses["north"].count("connected") == 2


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_a_failing_server_app_tells_the_sites(world: World) -> None:
    def main(grid: GrpcGrid) -> None:
        grid.wait_for_sites(1, 10)
        raise PolicyRefusal("no")

    server = world.server(main)
    site = world.site("north")
    assert isinstance(server.ended(), PolicyRefusal)
    assert isinstance(site.ended(), RunAborted)
    assert world.statuses["north"][-1] == "aborted"


def test_an_oversized_request_is_the_servers_error(world: World) -> None:
    def main(grid: GrpcGrid) -> None:
        grid.wait_for_sites(1, 10)
        message = requests(grid)[0]
        message.content["more"] = message.content[flower.HEADER].__class__({"x" * (9 << 20): 1})  # type: ignore[call-arg]
        list(grid.push_messages([message]))

    server = world.server(main)
    world.site("north")
    assert isinstance(server.ended(), WireError)


def test_strangers_have_no_node(world: World) -> None:
    grid = GrpcGrid(world.roster)
    with pytest.raises(TransportError):
        grid.push_messages([flower.request(PING, to=7, action="train.echo", round=1)])
    assert list(grid.get_node_ids()) == []
    key = identity.public_hex(identity.new_signing_key())
    other = Roster("x", world.roster.server, (Member(SiteId("zz"), key),))
    assert GrpcGrid(other).site_of(flower.node_id(SiteId("zz"))) == "zz"
