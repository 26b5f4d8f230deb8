"""Workers that speak for many sites each: who is asked what, what is counted, and errors, without a cluster.

What a real cluster of two machines does is in tests/deploy/lab/test_ray.py.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedveil.common import flwr_adapter as flower
from fedveil.common.errors import ConfigError, FedveilError, PolicyRefusal, ProtocolError, TransportError
from fedveil.common.units import SiteId
from fedveil.common.wire import Limits, Packet
from fedveil.deploy.lab.together import RayTogetherGrid
from fedveil.deploy.transport.ray import Cluster, RayGrid, _Worker
from fedveil.privacy.secagg.plain import Together

SITES = [SiteId(f"site-{i}") for i in range(5)]


class EchoHost:
    """Answers with what it knows; site 1 is refused, site 2 fails with a record's value."""

    def __init__(self, position: int) -> None:
        self.position, self.node_config = position, {"box": f"box-{position}"}
        self.app, self.closed = ClientApp(), 0
        self.app.train("echo")(self._echo)

    def _echo(self, message: Message, context: Context) -> Message:
        index = int(context.node_config["partition-id"])
        if index == 1:
            raise PolicyRefusal("not this one")
        if index == 2:
            raise ValueError("patient Meier")
        packet = flower.from_record(message.content, Limits())
        header = {"kind": "echo", "site": index, "box": context.node_config["box"]}
        return flower.reply(Packet(header, packet.buffers), message)

    def together(self, sites: Sequence[int], request: Packet) -> Together:
        names = tuple(SITES[i] for i in sites if i != 1)
        refusals: dict[SiteId, FedveilError] = {SITES[1]: PolicyRefusal("not this one")} if 1 in sites else {}
        return Together(names, "s" * 64, np.array([len(names), self.position]), refusals)

    def close(self) -> None:
        self.closed += 1


class Here:
    """A cluster whose workers live in this process, and whose calls are carried out when they are waited for."""

    def __init__(self) -> None:
        self.made: list[EchoHost] = []
        self.calls: list[tuple[str, int]] = []

    def workers(self, make: Any, count: int) -> list[Any]:
        def host(position: int) -> EchoHost:
            self.made.append(EchoHost(position))
            return self.made[-1]

        return [_Remote(_Worker(host, i), i, self.calls) for i in range(count)]

    @staticmethod
    def results(calls: Sequence[Any]) -> list[Any]:
        return [call() for call in calls]


class _Remote:
    def __init__(self, worker: _Worker, position: int, calls: list[tuple[str, int]]) -> None:
        self._worker, self._position, self._calls = worker, position, calls

    def __getattr__(self, name: str) -> Any:
        class Method:
            @staticmethod
            def remote(*args: Any) -> Any:
                self._calls.append((name, self._position))
                return lambda: getattr(self._worker, name)(*args)

        return Method


def asked(grid: RayGrid) -> list[Message]:
    packet = Packet({"kind": "q"}, {"x": bytes(range(256)) * 40, "empty": b""})
    return [flower.request(packet, to=n, action="train.echo", round=1) for n in grid.get_node_ids()]


def test_every_worker_is_asked_once_for_all_its_sites():
    cluster = Here()
    grid = RayGrid(cluster, EchoHost, SITES, 2)  # type: ignore[arg-type]
    messages = asked(grid)
    replies = list(grid.send_and_receive(messages))
    assert cluster.calls == [("answer", 0), ("answer", 1)]
    assert [grid.site_of(m.metadata.src_node_id) for m in replies] == SITES
    errors = {grid.site_of(m.metadata.src_node_id): e for m in replies if (e := flower.reply_error(m)) is not None}
    assert {s: type(e) for s, e in errors.items()} == {SITES[1]: PolicyRefusal, SITES[2]: ProtocolError}
    assert "Meier" not in repr(errors)
    good = [flower.from_record(m.content, Limits()) for m in replies if not m.has_error()]
    said = [p.header for p in good]
    assert said == [{"kind": "echo", "site": i, "box": f"box-{i % 2}"} for i in (0, 3, 4)]
    assert all(p.buffers == {"x": bytes(range(256)) * 40, "empty": b""} for p in good)
    sent = {flower.content_bytes(m) for m in messages}
    assert {row["sent"] for row in grid.traffic.values()} == sent
    assert {s: row["received"] for s, row in grid.traffic.items()} == {
        grid.site_of(m.metadata.src_node_id): flower.content_bytes(m) for m in replies
    }


def test_answers_come_in_parts_so_that_not_all_are_held(monkeypatch):
    monkeypatch.setattr("fedveil.deploy.transport.ray._AT_ONCE", 1)
    cluster = Here()
    grid = RayGrid(cluster, EchoHost, SITES, 2)  # type: ignore[arg-type]
    replies = grid.replies(asked(grid))
    next(replies)
    assert cluster.calls == [("answer", 0), ("answer", 1)]
    assert len(list(replies)) == 4
    assert cluster.calls == [("answer", w) for w in (0, 1, 0, 1, 0)]


def test_passes_are_added_up_over_workers_and_counted_as_messages():
    grid = RayTogetherGrid(Here(), EchoHost, SITES, 2)  # type: ignore[arg-type]
    request = Packet({"kind": "contribute", "session": "a" * 64, "round": 1, "nonce": "n"})
    given = grid.together(dict.fromkeys(SITES, request))
    assert set(given.sites) == set(SITES) - {SITES[1]}
    assert given.values.tolist() == [4, 1]
    assert [type(e) for e in given.refusals.values()] == [PolicyRefusal]
    traffic = grid.traffic
    assert set(traffic) == set(SITES)
    assert traffic[SITES[0]]["received"] == traffic[SITES[4]]["received"] > traffic[SITES[1]]["received"] > 0


def test_all_workers_are_closed():
    cluster = Here()
    RayGrid(cluster, EchoHost, SITES, 3).close()  # type: ignore[arg-type]
    assert [h.closed for h in cluster.made] == [1, 1, 1]


def test_two_sites_of_one_name():
    with pytest.raises(ConfigError, match="same name"):
        RayGrid(Here(), EchoHost, [SITES[0]] * 2, 1)  # type: ignore[arg-type]


def test_ray_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FedveilError, match="needs the library ray") as refused:
        Cluster()
    assert "pip install" in refused.value.hint


def test_a_cluster_that_is_not_there(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(TransportError, match="does not answer") as refused:
        Cluster()
    assert "ray start" in refused.value.hint
