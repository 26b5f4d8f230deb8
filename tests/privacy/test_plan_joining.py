"""What binds a run's participants: every statement signed by its own site, for this plan, roster and session."""

from __future__ import annotations

from typing import Any

import pytest

from fedveil.common import canonical, flwr_adapter, identity
from fedveil.common.errors import IdentityError, ProtocolError
from fedveil.common.identity import Member, Roster
from fedveil.common.journal import Copy, Head
from fedveil.common.units import SiteId
from fedveil.common.wire import Limits, Packet
from fedveil.common.workload.model import ModelSpec
from fedveil.privacy.joining import JOIN, check_join, check_joins, sum_spec
from fedveil.privacy.plan import Optimizer, make_plan

KEYS = {f"s{i}": identity.new_signing_key() for i in range(4)}
ROSTER = Roster(
    "hearts", Member(identity.SERVER, identity.public_hex(identity.new_signing_key())),
    tuple(Member(SiteId(s), identity.public_hex(k)) for s, k in KEYS.items()),
)  # fmt: skip
PLAN = make_plan(
    sites=4, records=2000, epsilon=2.0, steps=30, clip=1.0, model=ModelSpec(name="logistic", inputs=20, classes=2),
    optimizer=Optimizer(learning_rate=0.5), contract_hash="c" * 64,
)  # fmt: skip
SESSION = "5" * 64


def statement(signer: str, /, *, key: Any = None, domain: str = JOIN, **changes: Any) -> Any:
    own = Copy(Head(1, "a" * 64), "a" * 64, "d" * 64).by(signer, KEYS[signer])
    payload = {
        "v": 1, "session": SESSION, "site": signer, "plan_hash": PLAN.hash, "roster_hash": ROSTER.hash,
        "fields": {"public": signer}, "head": [1, "a" * 64], "ledger": "a" * 64, "data_set": own.data_set,
        "head_signature": own.signature, "imports": [], "peers": {},
    } | changes  # fmt: skip
    return canonical.loads(canonical.dumps(identity.signed(key or KEYS[signer], domain, payload)))


def joins(**changes: Any) -> dict[str, Any]:
    return {s: statement(s) for s in KEYS} | changes


def test_everybody_joined() -> None:
    fields = check_joins(joins(), SESSION, PLAN.hash, ROSTER)
    assert fields == {s: {"public": s} for s in KEYS}
    assert list(fields) == [m.site for m in ROSTER.sites]


@pytest.mark.parametrize(
    "documents",
    [
        None,
        [],
        "x",
        {},
        {s: statement(s) for s in list(KEYS)[:3]},
        joins(s9=statement("s0")),
        joins(server=statement("s0")),
    ],
)
def test_nobody_missing_and_nobody_else(documents) -> None:
    with pytest.raises(ProtocolError, match="exactly the roster's sites"):
        check_joins(documents, SESSION, PLAN.hash, ROSTER)


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (statement("s1", session="run-2"), ProtocolError),
        (statement("s1", plan_hash="d" * 64), ProtocolError),
        (statement("s1", roster_hash="d" * 64), ProtocolError),
        (statement("s1", site="s2"), ProtocolError),
        (statement("s1", v=2), ProtocolError),
        (statement("s1", fields=None), ProtocolError),
        (statement("s1", fields=[1]), ProtocolError),
        (statement("s1", head=None), ProtocolError),
        (statement("s1", head=[1]), ProtocolError),
        (statement("s1", ledger="A" * 64), ProtocolError),
        (statement("s1", peers=[]), ProtocolError),
        (statement("s1", head_signature="a" * 128), ProtocolError),
        (statement("s1", head=[2, "a" * 64]), ProtocolError),
        (statement("s1", data_set="e" * 64), ProtocolError),
        (statement("s1", imports=None), ProtocolError),
        (statement("s1", imports=[["a" * 64]]), ProtocolError),
        (statement("s1", imports=[["a" * 64, -1]]), ProtocolError),
        (statement("s1", imports=[["a" * 64, 1]] * 9), ProtocolError),
        (statement("s1", peers={"BAD NAME": [[1, "a" * 64, "a" * 64]]}), ProtocolError),
        (statement("s1", peers={"s2": [[1]]}), ProtocolError),
        (identity.signed(KEYS["s1"], JOIN, ["no", "object"]), ProtocolError),
        (statement("s2"), IdentityError),
        (statement("s1", key=identity.new_signing_key()), IdentityError),
        (statement("s1", key=KEYS["s2"]), IdentityError),
        (statement("s1", domain="fedveil/journal/1"), IdentityError),
        (statement("s1") | {"signature": "00" * 64}, IdentityError),
        (None, IdentityError),
        ({"payload": {}}, IdentityError),
    ],
)
def test_a_statement_that_does_not_hold_names_its_site(bad, error) -> None:
    with pytest.raises(error) as e:
        check_joins(joins(s1=bad), SESSION, PLAN.hash, ROSTER)
    assert "s1" in e.value.message


def test_a_statement_that_takes_the_others_room_names_its_site() -> None:
    """However many are as long as one may be, together they fit into the header that shows them to everybody."""
    whole = Limits.header * 3 // 4
    bare = len(canonical.dumps(statement("s1", more="")))
    room = whole // len(KEYS)
    full = joins(**{s: statement(s, more="x" * (room - bare)) for s in KEYS})
    check_joins(full, SESSION, PLAN.hash, ROSTER)
    flwr_adapter.to_record(Packet({"kind": "begin", "session": SESSION, "joins": full}))
    with pytest.raises(ProtocolError, match=f"'s1' measures {room + 1} bytes; the limit is {room}"):
        check_joins(full | {"s1": statement("s1", more="x" * (room - bare + 1))}, SESSION, PLAN.hash, ROSTER)


def test_a_site_that_is_not_on_the_roster() -> None:
    with pytest.raises(IdentityError, match="not on the roster"):
        check_join(statement("s1"), SiteId("s9"), SESSION, PLAN.hash, ROSTER)


def test_the_secure_sum_takes_its_numbers_from_the_plan() -> None:
    spec = sum_spec(PLAN, SESSION, ROSTER)
    assert (spec.protocol, spec.session, spec.plan_hash, spec.roster) == ("keysum", SESSION, PLAN.hash, ROSTER)
    assert (spec.threshold, spec.min_members) == (PLAN.threshold, PLAN.members) == (3, 3)
    assert (spec.length, spec.bound, spec.rounds) == (42, PLAN.bound, 30)
