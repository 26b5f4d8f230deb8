"""A site refuses to help a server that goes on with a member whom the consortium has revoked."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest

from fedveil.client import round as line
from fedveil.client.app import make_app as client_app
from fedveil.common.errors import FedveilError, IdentityError
from fedveil.common.identity import Revocations, Roster
from fedveil.common.wire import Packet
from fedveil.common.workload.model import ModelSpec
from fedveil.deploy.lab import datasets, virtual_sites
from fedveil.deploy.transport.inprocess import run_inprocess
from fedveil.privacy.plan import Optimizer, make_plan
from fedveil.privacy.secagg import keysum_common as messages
from fedveil.server import job as jobs
from fedveil.server.app import make_app as server_app

LAST = "site-4"


def listed(*sites: str, keys: tuple[str, ...] = ()) -> Revocations:
    return Revocations(3, frozenset(sites), frozenset(keys))


def members(w, packets) -> Packet:
    header = {"kind": messages.MEMBERS, "session": w.session, "round": 1, "nonce": "nonce-1"}
    return Packet({**header, "members": [p.header for p in packets]})


@pytest.mark.parametrize("who", [LAST, "server", "site-1"])
def test_no_run_begins_with_a_revoked_member(world, who):
    w = world()
    site = w.sites[0]
    site.revoked = lambda: listed(who)
    with pytest.raises(IdentityError, match=f"'{who}' was revoked"):
        line.join(site, w.proposal())
    assert not list(site.ledger.journal.of_kind("plan.accepted"))
    site.revoked = lambda: listed("somebody-else")
    line.join(site, w.proposal())


def test_a_list_that_comes_before_the_run_has_begun(world):
    w = world()
    joins = w.statements()
    begin = Packet({"kind": "begin", "session": w.session, "joins": joins})
    w.sites[0].revoked = lambda: listed(LAST)
    with pytest.raises(IdentityError, match="revoked"):
        line.begin(w.sites[0], begin)
    w.sites[0].revoked = None
    line.begin(w.sites[0], begin)


def test_a_revoked_member_is_in_no_sum_and_the_others_go_on(world):
    w = world()
    begin = Packet({"kind": "begin", "session": w.session, "joins": w.statements()})
    for s in w.sites:
        line.begin(s, begin)
    packets = [line.contribute(s, w.request()) for s in w.sites]
    site = w.reopen(0)  # a restart in between changes nothing
    site.revoked = lambda: listed(LAST)
    line.join(site, w.proposal())  # a run that has begun can be joined again
    line.begin(site, begin)
    headless = Packet({k: v for k, v in packets[3].header.items() if k != "head"})
    for last in (packets[3], headless):
        with pytest.raises(IdentityError, match="revoked"):
            line.agree(site, members(w, [*packets[:3], last]))
    answer = line.agree(site, members(w, packets[:3]))  # as after any drop-out
    assert answer.kind == messages.AGREEMENT


def test_the_members_named_may_be_anything(world):
    w = world().begin()
    w.sites[0].revoked = lambda: listed(LAST)
    for named in (None, 5, [5], [{}], [{"site": []}], [{"site": {}}], {"site": LAST}):
        packet = members(w, [])
        packet.header["members"] = named
        with pytest.raises(FedveilError):
            line.agree(w.sites[0], packet)


def test_a_revoked_key_is_refused_until_the_roster_names_another(world):
    w = world()
    site = w.sites[0]
    rows = [replace(m, tls_key=f"{i}" * 64) for i, m in enumerate(w.roster.sites)]
    site.roster = Roster("small", w.roster.server, tuple(rows))
    site.revoked = lambda: listed(keys=("3" * 64,))
    with pytest.raises(IdentityError, match=LAST):
        site.not_revoked([LAST])
    site.not_revoked(["site-1", "site-2"])
    site.roster = Roster("small", w.roster.server, (*rows[:3], replace(rows[3], tls_key="9" * 64)))
    site.not_revoked([LAST])


@pytest.mark.parametrize(
    ("sum_", "who"), [("keysum", LAST), ("keysum", "server"), ("sharedkey", LAST), ("sharedkey", "server")]
)
def test_a_server_that_goes_on_with_or_is_revoked_gets_no_further_sum(tmp_path, sum_, who):
    """The list reaches the three first sites before round 3; the server has none, and asks all four for every round."""
    split = datasets.load("trivial", 4, 0)
    plan = make_plan(
        sites=4, records=split.records, epsilon=2.0, steps=6, clip=1.0, contract_hash="0" * 64, sum=sum_,
        model=ModelSpec(name="logistic", inputs=split.inputs, classes=2), optimizer=Optimizer(learning_rate=0.5),
    )  # fmt: skip
    w = virtual_sites.World.make(4)
    sites = [
        virtual_sites.make_site(w.roster, i, w.keys[i], plan, *split.parts[i], tmp_path / "state", cap=20.0)
        for i in range(4)
    ]
    job = jobs.create(tmp_path / "run", plan, w.roster, w.server, documents=w.documents(), durable=False)

    @contextmanager
    def resolve(context):
        yield sites[int(context.node_config["partition-id"])]

    def told(site, message):
        if message.metadata.group_id == "3":
            for s in sites[:3]:
                s.revoked = lambda: listed(w.sites[3] if who == LAST else who)
        return False

    server, strategy = server_app(job)
    run_inprocess(server, client_app(resolve), w.sites, lambda _: {}, drop=told)
    applied = {r.body["round"]: r.body["members"] for r in job.journal.of_kind("round.applied")}
    assert list(applied) == [1, 2]
    assert all(w.sites[3] in members for members in applied.values())
    refused = {(r.body["site"], r.body["code"]) for r in job.journal.of_kind("site.refused") if r.body["round"] == 3}
    assert refused == {(s, "IdentityError") for s in w.sites[:3]}
    assert strategy.status == "ABORTED"
    if (sum_, who) != ("keysum", LAST):  # with keysum, the members are known only after all have contributed
        assert all(len(list(s.ledger.journal.of_kind("spend"))) == 2 for s in sites[:3])
