"""The in-process engine: unmodified apps, sites that cannot touch each other, lost messages, light rounds."""

import tracemalloc

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedveil.common import flwr_adapter as flower
from fedveil.common.errors import ConfigError, PolicyRefusal, TransportError
from fedveil.common.units import SiteId
from fedveil.common.wire import Limits, Packet
from fedveil.deploy.transport.inprocess import InprocessGrid, run_inprocess

SITES = [SiteId("a"), SiteId("b"), SiteId("c")]


def echo_app() -> ClientApp:
    app = ClientApp()

    @app.train("echo")
    def echo(message: Message, context: Context) -> Message:
        packet = flower.from_record(message.content, Limits())
        header = {"kind": "echo", "at": context.node_config["partition-id"]}
        return flower.reply(Packet(header, packet.buffers), message)

    return app


def requests(grid: Grid, packet: Packet, action: str = "train.echo") -> list[Message]:
    return [flower.request(packet, to=n, action=action, round=1) for n in grid.get_node_ids()]


def ask(grid: Grid, packet: Packet) -> list[Message]:
    return list(grid.send_and_receive(requests(grid, packet)))


def test_an_app_runs_to_its_end_and_every_site_answers() -> None:
    seen: list[Packet] = []
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        seen.extend(flower.from_record(m.content, Limits()) for m in ask(grid, Packet({"kind": "q"}, {"x": b"\0\xff"})))

    grid = run_inprocess(app, echo_app(), SITES, lambda i: {})
    assert seen == [Packet({"kind": "echo", "at": i}, {"x": b"\0\xff"}) for i in range(3)]
    assert set(grid.traffic) == set(SITES)
    assert all(row["sent"] >= 2 and row["received"] >= 2 for row in grid.traffic.values())
    assert [grid.site_of(n) for n in grid.get_node_ids()] == SITES


def test_traffic_counts_payload_bytes() -> None:
    grid = InprocessGrid(echo_app(), SITES[:1], lambda i: {})
    ask(grid, Packet({"kind": "q"}, {"x": bytes(1000)}))
    assert grid.traffic == {"a": {"sent": 1000 + len('{"kind":"q"}'), "received": 1000 + len('{"at":0,"kind":"echo"}')}}


def test_sites_cannot_alter_each_others_messages_nor_the_servers() -> None:
    app = ClientApp()

    @app.train()
    def spoil(message: Message, context: Context) -> Message:
        config, arrays = message.content["c"], message.content["a"]
        assert config["l"] == [1], "another site's change is visible"
        assert arrays["w"].data == b"abc"  # type: ignore[union-attr]
        config["l"].append(2)  # type: ignore[union-attr]
        arrays["w"].data = b"xyz"  # type: ignore[union-attr]
        out = Message(message.content, reply_to=message)
        return out

    content = RecordDict({"c": ConfigRecord({"l": [1]}), "a": ArrayRecord({"w": Array("uint8", (3,), "s", b"abc")})})
    grid = InprocessGrid(app, SITES, lambda i: {})
    messages = [Message(content, n, "train") for n in grid.get_node_ids()]
    replies = list(grid.send_and_receive(messages))
    assert content["c"]["l"] == [1]
    assert [m.content["c"]["l"] for m in replies] == [[1, 2]] * 3


def test_contexts_last_and_belong_to_one_site() -> None:
    app = ClientApp()

    @app.query()
    def count(message: Message, context: Context) -> Message:
        record = context.state.setdefault("n", ConfigRecord({"n": 0}))
        record["n"] = int(record["n"]) + 1  # type: ignore[arg-type]
        name = str(context.node_config["name"])
        return flower.reply(Packet({"kind": "n", "n": record["n"], "name": name}), message)

    grid = InprocessGrid(app, SITES[:2], lambda i: {"name": f"box {i}"})
    first, second = list(grid.get_node_ids())
    told = []
    for node in (first, first, second):
        [m] = grid.send_and_receive([flower.request(Packet({"kind": "q"}), to=node, action="query", round=0)])
        header = flower.from_record(m.content, Limits()).header
        told.append((header["n"], header["name"]))
    assert told == [(1, "box 0"), (2, "box 0"), (1, "box 1")]


def test_errors_are_replies() -> None:
    app = ClientApp()

    @app.train("echo")
    def refuse(message: Message, context: Context) -> Message:
        raise PolicyRefusal("no")

    out = ask(InprocessGrid(app, SITES, lambda i: {}), Packet({"kind": "q"}))
    assert [type(flower.reply_error(m)) for m in out] == [PolicyRefusal] * 3


@pytest.mark.parametrize("of_reply", [False, True])
def test_dropped_messages(of_reply: bool) -> None:
    worked: list[int] = []
    app = ClientApp()

    @app.train("echo")
    def work(message: Message, context: Context) -> Message:
        worked.append(int(context.node_config["partition-id"]))
        return flower.reply(Packet({"kind": "a"}), message)

    def drop(site: SiteId, message: Message) -> bool:
        return site == "b" and bool(message.metadata.reply_to_message_id) == of_reply

    grid = InprocessGrid(app, SITES, lambda i: {}, drop=drop)
    out = ask(grid, Packet({"kind": "q"}))
    assert [grid.site_of(m.metadata.src_node_id) for m in out] == ["a", "c"]
    assert worked == ([0, 1, 2] if of_reply else [0, 2])


def test_pushed_messages_are_pulled_once() -> None:
    grid = InprocessGrid(echo_app(), SITES, lambda i: {})
    ids = list(grid.push_messages(requests(grid, Packet({"kind": "q"}))))
    assert len(list(grid.pull_messages(ids[:1]))) == 1
    assert len(list(grid.pull_messages(ids))) == 2
    assert list(grid.pull_messages(ids)) == []


def test_strangers_and_doubles_are_refused() -> None:
    with pytest.raises(ConfigError):
        InprocessGrid(echo_app(), [SITES[0], SITES[0]], lambda i: {})
    grid = InprocessGrid(echo_app(), SITES, lambda i: {})
    with pytest.raises(TransportError):
        grid.push_messages([flower.request(Packet({"kind": "q"}), to=7, action="train.echo", round=1)])


def test_a_thousand_sites_are_light() -> None:
    sites = [SiteId(f"s{i}") for i in range(1000)]
    grid = InprocessGrid(echo_app(), sites, lambda i: {})
    packet = Packet({"kind": "q"}, {"w": bytes(1 << 20)})
    ask(grid, packet)
    tracemalloc.start()
    try:
        assert len(ask(grid, packet)) == 1000
        assert tracemalloc.get_traced_memory()[1] < 100 << 20, "1 MiB for 1000 sites must not be copied"
    finally:
        tracemalloc.stop()
