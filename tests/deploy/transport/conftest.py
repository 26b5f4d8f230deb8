"""A real consortium on loopback: one server thread, site threads, real certificates."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedveil.common import canonical
from fedveil.common import flwr_adapter as flower
from fedveil.common.units import SiteId
from fedveil.common.wire import Limits, Packet
from fedveil.deploy.enrol.provision import load_roster, load_tls, make_consortium
from fedveil.deploy.transport.codec import Decoder
from fedveil.deploy.transport.grpc_grid import OPTIONS, GrpcGrid, read_tls, serve
from fedveil.deploy.transport.grpc_service import INSTANCE, SERVICE
from fedveil.deploy.transport.grpc_site import run_site

PING = Packet({"kind": "ping"})
SITES = ["north", "south", "west"]


class Task(threading.Thread):
    """A thread whose exception is kept for the test to look at."""

    def __init__(self, target: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._work = target
        self.error: BaseException | None = None
        self.result: Any = None
        self.start()

    def run(self) -> None:
        try:
            self.result = self._work()
        except BaseException as e:
            self.error = e

    def ended(self, timeout: float = 600) -> BaseException | None:
        """Wait for the end; returns the exception, if any."""
        self.join(timeout)
        assert not self.is_alive(), "the thread did not end"
        return self.error


def echo_app() -> ClientApp:
    """Sends back what it gets, with the site's name."""
    app = ClientApp()

    @app.train("echo")
    def echo(message: Message, context: Context) -> Message:
        packet = flower.from_record(message.content, Limits())
        return flower.reply(Packet({"kind": "echo", "site": context.node_config["site"]}, packet.buffers), message)

    return app


class Wire:
    """A site driven by hand."""

    def __init__(self, world: World, site: str, instance: str) -> None:
        ca, certificate, key = read_tls(load_tls(world.pki / "sites" / site))
        credentials = grpc.ssl_channel_credentials(ca, key, certificate)
        options = [*OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
        self.channel = grpc.secure_channel(f"127.0.0.1:{world.port}", credentials, options)
        self.metadata = ((INSTANCE, instance),)
        self.work = self.channel.unary_stream(f"/{SERVICE}/Work")(b"", metadata=self.metadata)
        assert canonical.loads(next(self.work))["t"] == "welcome"

    def message(self) -> Message:
        """The next message."""
        assert canonical.loads(next(self.work))["t"] == "message"
        decoder = Decoder(Limits())
        while not decoder.complete:
            decoder.feed(next(self.work))
        return decoder.result()

    def reply(self, chunks: Any) -> bytes:
        """Send ``chunks`` as one reply, whatever they are."""
        return self.channel.stream_unary(f"/{SERVICE}/Reply")(iter(chunks), metadata=self.metadata, timeout=600)

    def close(self) -> None:
        """Hang up."""
        self.work.cancel()
        self.channel.close()


class World:
    """Starts servers and sites and ends every one of them with the test."""

    PING = PING

    def __init__(self, pki: Path) -> None:
        self.pki, self.roster = pki, load_roster(pki / "server")
        self.port = 0
        self.stop = threading.Event()
        self.tasks: list[Task] = []
        self.statuses: dict[str, list[str]] = {}

    def server(self, main: Callable[[GrpcGrid], Any], *, port: int = 0, **options: Any) -> Task:
        """Serve an app that does ``main``; its return value is the task's result."""
        app, ports, results = ServerApp(), queue.Queue[int](), []

        @app.main()
        def run(grid: Grid, context: Context) -> None:
            assert isinstance(grid, GrpcGrid)
            results.append(main(grid))

        def work() -> Any:
            tls = load_tls(self.pki / "server")
            serve(app, address=f"127.0.0.1:{port}", tls=tls, roster=self.roster, ready=ports.put, **options)
            return results[0]

        task = Task(work)
        self.tasks.append(task)
        self.port = ports.get(timeout=600)
        return task

    def site(
        self, name: str, app: ClientApp | None = None, *, folder: Path | None = None, stop: Any = None, **options: Any
    ) -> Task:
        """Run a site against the server started last."""
        address = options.pop("address", f"127.0.0.1:{self.port}")
        tls = load_tls(folder or self.pki / "sites" / name)
        seen = self.statuses.setdefault(name, [])
        arguments: dict[str, Any] = {"wait": 600, "takeover": 0.3, **options}
        task = Task(
            lambda: run_site(
                app or echo_app(),
                address=address,
                tls=tls,
                site=SiteId(name),
                stop=stop or self.stop,
                on_status=seen.append,
                **arguments,
            )
        )
        self.tasks.append(task)
        return task

    def wire(self, site: str, instance: str = "one") -> Wire:
        """Connect by hand."""
        return Wire(self, site, instance)

    @staticmethod
    def requests(grid: GrpcGrid, packet: Packet = PING, sites: list[str] | None = None) -> list[Message]:
        """The same question for ``sites`` (None: all that are connected)."""
        nodes = grid.get_node_ids() if sites is None else [flower.node_id(SiteId(s)) for s in sites]
        return [flower.request(packet, to=n, action="train.echo", round=1) for n in nodes]

    @classmethod
    def ask(
        cls, grid: GrpcGrid, packet: Packet = PING, sites: list[str] | None = None, timeout: float | None = 600
    ) -> dict[str, Message]:
        """Replies by site."""
        out = grid.send_and_receive(cls.requests(grid, packet, sites), timeout=timeout)
        return {grid.site_of(m.metadata.src_node_id): m for m in out}

    @staticmethod
    def opened(message: Message) -> Packet:
        """The packet in a message."""
        return flower.from_record(message.content, Limits())

    @staticmethod
    def waiting(grid: GrpcGrid, done: threading.Event) -> list[SiteId]:
        """A server app that does nothing until ``done``; gives the sites that were connected then."""
        assert done.wait(600)
        return grid.mailbox.connected()

    @staticmethod
    def refused(call: Callable[[], Any], code: grpc.StatusCode) -> str:
        """Check that ``call`` ends with ``code``; returns the details.

        On a busy machine the server may still be ending the call before: then it is made again, as a site would.
        """
        while True:
            with pytest.raises(grpc.RpcError) as e:
                call()
            assert isinstance(e.value, grpc.Call)
            if "under way already" not in (e.value.details() or ""):
                break
            time.sleep(0.01)
        assert e.value.code() == code
        return e.value.details() or ""

    @staticmethod
    def until(condition: Callable[[], bool], timeout: float = 600) -> None:
        """Wait for a condition."""
        end = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < end, "the condition did not come true"
            time.sleep(0.01)

    def close(self) -> None:
        """End what still runs."""
        self.stop.set()
        for task in self.tasks:
            task.join(600)
        assert not [t for t in self.tasks if t.is_alive()]


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sites' and the server's folders."""
    out = tmp_path_factory.mktemp("pki")
    make_consortium(out, SITES, consortium="test")
    return out


@pytest.fixture
def world(pki: Path) -> Iterator[World]:
    """See :class:`World`."""
    made = World(pki)
    try:
        yield made
    finally:
        made.close()
