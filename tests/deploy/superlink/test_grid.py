"""The server's Grid over a SuperLink in memory: who is there, who is asked, and what a reply may claim."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization as ser
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

from fedveil.common import flwr_adapter as flower
from fedveil.common import identity
from fedveil.common.errors import IdentityError, TransportError, WireError
from fedveil.common.identity import Member, Roster
from fedveil.common.units import SiteId
from fedveil.common.wire import Limits, Packet
from fedveil.deploy.superlink.grid import SuperlinkGrid
from fedveil.deploy.superlink.runtime import Inflow

SITES = [SiteId(s) for s in ("east", "north", "west")]
PATIENCE = 600.0


def _key() -> bytes:
    public = ec.generate_private_key(ec.SECP256R1()).public_key()
    return public.public_bytes(ser.Encoding.PEM, ser.PublicFormat.SubjectPublicKeyInfo)


def _fingerprint(pem: bytes) -> str:
    der = ser.load_pem_public_key(pem).public_bytes(ser.Encoding.DER, ser.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


KEYS = {s: _key() for s in SITES}
NUMBERS = {s: 1000 + i for i, s in enumerate(SITES)}


class Memory:
    """A task whose SuperNodes answer at once, as ``answer`` says."""

    run_id = 9

    def __init__(self, answer: Callable[[Message], Message | None]) -> None:
        self.answer = answer
        self.online = [(NUMBERS[s], KEYS[s]) for s in SITES]
        self.asked: list[Message] = []
        self.half: set[str] = set()
        self.gone: set[str] = set()
        self.handed_out: set[str] = set()
        self._came: list[tuple[str, Message, Inflow]] = []

    def nodes(self) -> list[tuple[int, bytes]]:
        return self.online

    def push(self, messages: list[Message]) -> list[str]:
        ids: list[str] = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = message.object_id
            self.asked.append(message)
            ids.append(message.object_id)
            if (reply := self.answer(message)) is not None:
                reply.metadata.__dict__["_reply_to_message_id"] = message.object_id
                inflow = Inflow(get_object_tree(reply), Limits())
                for name, o in get_all_nested_objects(reply).items():
                    inflow.take(name, o.deflate())
                self._came.append((message.object_id, reply, inflow))
        return ids

    def pull(self, message_ids: list[str], limits: Limits) -> list[tuple[Message, Inflow]]:
        """Each reply's envelope once; as SuperLink does, an error for what was handed out before."""
        assert not self.handed_out & {*message_ids}, "SuperLink would answer that there is no such message"
        out = [(r, i) for m, r, i in self._came if m in message_ids]
        self.handed_out |= {m for m, _, _ in self._came if m in message_ids}
        self._came = [x for x in self._came if x[0] not in message_ids]
        return out

    def fetch(self, inflow: Inflow) -> str:
        if inflow.root in self.half:
            self.half.discard(inflow.root)
            return "partly"
        return "gone" if inflow.root in self.gone else "whole"


def _roster() -> Roster:
    def signing() -> str:
        return identity.public_hex(identity.new_signing_key())

    members = tuple(Member(s, signing(), _fingerprint(KEYS[s])) for s in SITES)
    return Roster("c", Member(identity.SERVER, signing(), "ab" * 32), members)


def _grid(answer: Callable[[Message], Message | None]) -> tuple[Any, SuperlinkGrid]:
    task: Any = Memory(answer)
    return task, SuperlinkGrid(task, _roster())


def _ask(grid: SuperlinkGrid, *sites: SiteId) -> list[Message]:
    packets = {flower.node_id(s): Packet({"kind": "q", "for": s}, {"w": b"123"}) for s in sites}
    return flower.requests(packets, action="query.ask", round=1)


def _echo(request: Message) -> Message:
    packet = flower.from_record(request.content, Limits())
    return flower.reply(Packet({"kind": "a", "from": packet.header["for"]}), request)


def test_every_site_is_asked_under_its_supernodes_number_and_answers_under_ours() -> None:
    task, grid = _grid(_echo)
    got = {
        grid.site_of(r.metadata.src_node_id): flower.from_record(r.content, Limits()).header["from"]
        for r in grid.replies(_ask(grid, *SITES), timeout=PATIENCE)
    }
    assert got == {s: s for s in SITES}
    assert [m.metadata.dst_node_id for m in task.asked] == [NUMBERS[s] for s in SITES]
    assert {m.metadata.src_node_id for m in task.asked} == {flower.SERVER_NODE}
    assert all(t["sent"] > 0 and t["received"] > 0 for t in grid.traffic.values())


def test_supernodes_with_other_keys_do_not_exist() -> None:
    task, grid = _grid(_echo)
    task.online += [(5, _key()), (6, b"no key at all"), (7, b"")]
    assert list(grid.get_node_ids()) == [flower.node_id(s) for s in SITES]
    task.online = [(5, _key())]
    assert list(grid.get_node_ids()) == []
    assert grid.wait_for_sites(1, 0.0) == 0


def test_a_site_that_never_came_is_not_asked_and_one_that_is_away_is() -> None:
    task, grid = _grid(_echo)
    task.online = task.online[1:]
    ids = list(grid.push_messages(_ask(grid, *SITES)))
    assert [bool(i) for i in ids] == [False, True, True]
    assert len(list(grid.pull_messages(ids))) == 2
    task.online = []
    assert all(list(grid.push_messages(_ask(grid, *SITES[1:]))))
    assert list(grid.replies(_ask(grid, SITES[0]), timeout=PATIENCE)) == []  # at once: nothing was sent
    with pytest.raises(TransportError, match="roster"):
        grid.site_of(12345)


def test_a_reply_cannot_claim_to_be_another_sites() -> None:
    def forged(request: Message) -> Message:
        reply = _echo(request)
        reply.metadata.__dict__.update(_src_node_id=flower.node_id(SITES[2]), _run_id=1, _message_type="train.other")
        return reply

    _, grid = _grid(forged)
    [reply] = list(grid.replies(_ask(grid, SITES[0]), timeout=PATIENCE))
    assert grid.site_of(reply.metadata.src_node_id) == SITES[0]
    assert (reply.metadata.run_id, reply.metadata.message_type) == (Memory.run_id, "query.ask")


def test_a_silent_site_is_given_up_and_the_others_are_not() -> None:
    _, grid = _grid(lambda m: None if m.metadata.dst_node_id == NUMBERS[SITES[1]] else _echo(m))
    came = [grid.site_of(r.metadata.src_node_id) for r in grid.replies(_ask(grid, *SITES), timeout=0.5)]
    assert sorted(came) == [SITES[0], SITES[2]]


def test_a_reply_that_is_not_whole_yet_is_gone_on_with() -> None:
    task, grid = _grid(_echo)
    messages = _ask(grid, SITES[0])
    ids = list(grid.push_messages(messages))
    [(_, reply, _)] = task._came
    task.half.add(reply.object_id)
    assert list(grid.pull_messages(ids)) == []
    [whole] = list(grid.pull_messages(ids))
    assert whole.metadata.reply_to_message_id == ids[0]
    assert list(grid.pull_messages(ids)) == []


def test_a_malformed_reply_is_an_error_of_that_site() -> None:
    task, grid = _grid(_echo)
    ids = list(grid.push_messages(_ask(grid, SITES[0])))
    [(_, _, inflow)] = task._came
    inflow._contents = dict.fromkeys(inflow._contents, b"not an object")
    [reply] = list(grid.pull_messages(ids))
    assert isinstance(flower.reply_error(reply), WireError)
    assert grid.site_of(reply.metadata.src_node_id) == SITES[0]


def test_a_reply_whose_objects_are_gone_is_an_error_of_that_site() -> None:
    task, grid = _grid(_echo)
    ids = list(grid.push_messages(_ask(grid, SITES[0])))
    [(_, _, inflow)] = task._came
    task.gone.add(inflow.root)
    [reply] = list(grid.pull_messages(ids))
    assert isinstance(flower.reply_error(reply), WireError)


def test_a_site_that_is_revoked_is_not_asked_and_not_heard_any_more() -> None:
    revoked: set[SiteId] = set()

    def gate(site: SiteId) -> None:
        if site in revoked:
            raise IdentityError("revoked")

    task: Any = Memory(_echo)
    grid = SuperlinkGrid(task, _roster(), gate=gate)
    ids = list(grid.push_messages(_ask(grid, *SITES)))
    revoked.add(SITES[1])
    heard = list(grid.pull_messages(ids))
    errors = [flower.reply_error(r) for r in heard]
    assert [type(e) for e in errors] == [type(None), IdentityError, type(None)]
    assert list(grid.get_node_ids()) == [flower.node_id(s) for s in (SITES[0], SITES[2])]
    before = len(task.asked)
    assert [bool(i) for i in grid.push_messages(_ask(grid, *SITES))] == [True, False, True]
    assert len(task.asked) == before + 2
