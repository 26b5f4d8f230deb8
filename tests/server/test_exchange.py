"""Replies one by one over every kind of Grid, waiting for sites, and what a restarted server remembers."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from flwr.app import Message

from fedveil.common import flwr_adapter as flower
from fedveil.common.errors import FedveilError, ProtocolError
from fedveil.common.units import SiteId
from fedveil.common.wire import Packet
from fedveil.server.exchange import Exchange
from fedveil.server.strategy import SecureSumStrategy


class Wrapped:
    """A Grid around another one; without ``site_of``, like Flower's own."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def get_node_ids(self) -> Iterable[int]:
        return self.inner.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self.inner.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self.inner.pull_messages(message_ids)


class Late(Wrapped):
    """Every second pull gives nothing; then one reply."""

    pulls = 0

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self.pulls += 1
        return [] if self.pulls % 2 else self.inner.pull_messages(sorted(message_ids)[:1])


class Streaming(Wrapped):
    """Hands over replies by itself and checks that none is held by anybody when the next one is asked for."""

    given = 0

    def replies(self, messages: Iterable[Message], *, timeout: float) -> Iterator[Message]:
        for message in messages:
            [reply] = self.inner.send_and_receive([message])
            given = flower.copied(reply)
            held = weakref.ref(given), weakref.ref(given.content)
            yield given
            del given
            if message.metadata.message_type.startswith("train."):
                assert [h() for h in held] == [None, None]
                self.given += 1


class Seldom(Streaming):
    """Sites connect late: the first ``absent`` times somebody waits for them they are not there."""

    def __init__(self, inner: Any, absent: int) -> None:
        super().__init__(inner)
        self.absent, self.asked = absent, list[tuple[int, float]]()

    def wait_for_sites(self, count: int, timeout: float) -> int:
        self.asked.append((count, timeout))
        self.absent -= 1
        return count - 1 if self.absent >= 0 else count


@pytest.mark.parametrize("sum_", ["plain", "keysum", "sharedkey"])
@pytest.mark.parametrize("kind", [lambda g: g, Late, Streaming], ids=["inprocess", "pulled", "streaming"])
def test_a_run_over_every_kind_of_grid(run, kind, sum_):
    r = run(sum=sum_, steps=1, grid=kind)
    assert r.go() == "COMPLETED"
    assert [len(b["members"]) for b in r.bodies("round.applied")] == [4]


def test_a_contribution_is_in_the_sum_before_the_next_site_is_asked(run):
    seen = list[tuple[str, int]]()

    def drop(site: SiteId, message: Message) -> bool:
        if message.metadata.message_type == "train.contribute" and not message.metadata.reply_to_message_id:
            seen.append((site, len(r.strategy._sum.members)))
        return False

    r = run(drop=drop, sum="keysum", steps=2)
    assert r.go() == "COMPLETED"
    assert seen == [(f"site-{i + 1:04d}", i) for i in range(4)] * 2


def test_no_reply_is_held_while_the_next_one_is_waited_for(run):
    made = list[Streaming]()
    r = run(grid=lambda g: made.append(Streaming(g)) or made[0], sum="keysum", steps=2)
    assert r.go() == "COMPLETED"
    assert made[0].given == 2 * 4 * 4


class Silent(Wrapped):
    """Takes messages and gives nothing back."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return []


def test_a_grid_that_is_pulled_from_is_given_up_when_the_time_is_over(run):
    r = run()
    site = r.world.sites[0]

    looks = list[int]()

    class Sink(Silent):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            return [flower.stamp(m) for m in messages]

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            looks.append(1)
            return []

    exchange = Exchange(r.job, Sink(None))  # type: ignore[arg-type]
    exchange.nodes[site] = 5
    messages = exchange.messages({site: Packet({"kind": "q"})}, "query.x", 0)
    assert list(exchange.replies(messages, 0.2)) == []
    assert looks, "it was not looked for"
    assert list(exchange.replies([], math.inf)) == []  # nobody was asked: a wait would never end
    r.job.journal.close()


def test_what_is_no_packet_or_an_error_is_refused_and_the_rest_is_taken(run):
    r = run()
    exchange = Exchange(r.job, Silent(None))  # type: ignore[arg-type]
    sites = r.world.sites[:3]
    exchange.nodes.update({s: flower.node_id(s) for s in sites})
    messages = exchange.messages(dict.fromkeys(sites, Packet({"kind": "q"})), "query.x", 0)
    for m in messages:
        flower.stamp(m)
    good, bad, error = messages
    replies = [
        flower.reply(Packet({"kind": "a"}), good),
        Message(flower.RecordDict({}), reply_to=bad),
        flower.error_reply(ProtocolError("no"), error),
    ]
    replies = [flower.readdressed(a, q) for a, q in zip(replies, messages, strict=True)]
    taken, refused = list[SiteId](), dict[SiteId, FedveilError]()
    exchange.each(replies, lambda s, p: taken.append(s), refused.__setitem__)
    assert taken == sites[:1]
    assert {s: e.code for s, e in refused.items()} == {sites[1]: "WireError", sites[2]: "ProtocolError"}
    r.job.journal.close()


# ---- waiting for sites


def test_a_round_waits_until_as_many_sites_are_connected_as_a_sum_needs(run):
    made = list[Seldom]()
    r = run(grid=lambda g: made.append(Seldom(g, absent=1)) or made[0], options={"join_timeout": 7.0})
    assert r.go() == "COMPLETED"
    assert made[0].asked == [(3, 0), (3, 7.0), (3, 0), (3, 0), (3, 0)]
    assert len(r.bodies("round.applied")) == 4


def test_a_round_for_which_too_few_sites_come_is_not_opened_and_not_charged(run):
    r = run(grid=lambda g: Seldom(g, absent=100))
    assert r.go() == "ABORTED"
    assert r.bodies("round.open") == []
    assert [r.spends(i) for i in range(4)] == [[]] * 4
    assert r.bodies("run.end")[0]["status"] == "ABORTED"


def test_the_wait_can_be_set_for_a_strategy(run):
    r = run()
    assert SecureSumStrategy(r.job)._site_wait == r.job.join_timeout
    assert SecureSumStrategy(r.job, site_wait=2.5)._site_wait == 2.5
    r.job.journal.close()


# ---- what a restarted server remembers


class ServerDied(BaseException):
    """kill -9."""


def dying_at_the_end(died: list[int]):
    def drop(site: SiteId, message: Message) -> bool:
        if message.metadata.message_type == "query.finish" and not died:
            died.append(1)
            raise ServerDied
        return False

    return drop


def test_a_spent_budget_is_still_the_reason_after_the_server_died_while_ending_the_run(run):
    r = run(cap=2.0, drop=dying_at_the_end([]), durable=True)
    with pytest.raises(ServerDied):
        r.go()
    opened, spent = r.bodies("round.open"), r.spends(0)
    assert not r.bodies("run.end")
    assert r.resume() == "BUDGET_EXHAUSTED"
    assert r.bodies("run.end")[0]["status"] == "BUDGET_EXHAUSTED"
    assert r.bodies("round.open") == opened
    assert r.spends(0) == spent


def test_rounds_lost_before_a_restart_count_after_it(run):
    died = list[int]()
    end = dying_at_the_end(died)
    lost = {f"site-{i:04d}" for i in (3, 4)}

    def drop(site: SiteId, message: Message) -> bool:
        return end(site, message) or (message.metadata.message_type == "train.contribute" and site in lost)

    r = run(drop=drop, durable=True)
    with pytest.raises(ServerDied):
        r.go()
    assert len(r.bodies("round.aborted")) == 3
    assert r.resume() == "ABORTED"
    assert len(r.bodies("round.aborted")) == 3
    assert r.bodies("run.end")[0]["status"] == "ABORTED"


def test_a_run_that_was_complete_is_complete_after_a_restart(run):
    r = run(drop=dying_at_the_end([]), durable=True)
    with pytest.raises(ServerDied):
        r.go()
    assert r.resume() == "COMPLETED"
    assert [b["round"] for b in r.bodies("round.applied")] == [1, 2, 3, 4]
