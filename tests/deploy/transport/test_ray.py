"""Flower's own simulation engine: configuration reaches the apps, answers and errors come back."""

import importlib.util
import sys
from pathlib import Path

import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedveil.common import flwr_adapter as flower
from fedveil.common.errors import ConfigError, FedveilError, PolicyRefusal, ProtocolError
from fedveil.common.units import SiteId
from fedveil.common.wire import Limits, Packet
from fedveil.deploy.transport.ray import ConfiguredClient, run_ray

SITES = [SiteId("a"), SiteId("b"), SiteId("c")]
CLIENT = """
from flwr.clientapp import ClientApp
from fedveil.common import flwr_adapter as flower
from fedveil.common.errors import PolicyRefusal
from fedveil.common.wire import Limits, Packet

app = ClientApp()


@app.train("echo")
def echo(message, context):
    site = context.node_config["site"]
    if site == "b":
        raise PolicyRefusal("not b")
    if site == "c":
        raise ValueError("patient Meier")
    packet = flower.from_record(message.content, Limits())
    header = {"kind": "echo", "site": site, "box": context.node_config["box"]}
    return flower.reply(Packet(header, packet.buffers), message)
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_apps_run_unmodified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ray_toy_client.py").write_text(CLIENT)
    monkeypatch.syspath_prepend(str(tmp_path))
    client = importlib.import_module("ray_toy_client").app
    replies: list[Message] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        packet = Packet({"kind": "q"}, {"x": bytes(range(256)) * 4000, "empty": b""})
        messages = [flower.request(packet, to=n, action="train.echo", round=1) for n in grid.get_node_ids()]
        replies.extend(grid.send_and_receive(messages, timeout=600))

    run_ray(server, client, sites=SITES, node_config=lambda i: {"box": i}, cpus=0.5)
    errors = [e for m in replies if (e := flower.reply_error(m)) is not None]
    assert sorted(type(e).__name__ for e in errors) == [PolicyRefusal.__name__, ProtocolError.__name__]
    assert "Meier" not in repr(errors)
    [good] = [flower.from_record(m.content, Limits()) for m in replies if not m.has_error()]
    assert good.header == {"kind": "echo", "site": "a", "box": 0}
    assert good.buffers == {"x": bytes(range(256)) * 4000, "empty": b""}


def test_configuration_is_laid_over_flowers_context() -> None:
    app = ClientApp()
    seen: list[tuple[object, ...]] = []

    @app.query()
    def look(message: Message, context: Context) -> Message:
        context.state = flower.RecordDict({"seen": flower.ConfigRecord({"n": len(seen)})})
        seen.append((context.node_config["site"], context.node_config["num-partitions"]))
        return flower.reply(Packet({"kind": "a"}), message)

    wrapped = ConfiguredClient(app, [{"site": "a"}, {"site": "b"}])
    message = flower.request(Packet({"kind": "q"}), to=5, action="query", round=0)
    for i in range(2):
        context = Context(1, 5, {"partition-id": i, "num-partitions": 2}, flower.RecordDict(), {})
        assert not wrapped(message, context).has_error()
        assert context.state["seen"] == {"n": i}
    assert seen == [("a", 2), ("b", 2)]


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError):
        run_ray(ServerApp(), ClientApp(), sites=[SITES[0]] * 2, node_config=lambda i: {})
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FedveilError, match="ray"):
        run_ray(ServerApp(), ClientApp(), sites=SITES, node_config=lambda i: {})
