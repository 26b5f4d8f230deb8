"""Sites that contribute in one pass: the charges, integers and files of one message after the other.

Sampling and noise are replaced by what repeats itself. Then whole runs are compared, one of each kind.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedveil.client import round as line
from fedveil.client import together, train
from fedveil.common import identity
from fedveil.common.errors import FedveilError, ProtocolError, UsageError
from fedveil.common.identity import sign
from fedveil.common.journal import Journal, parse
from fedveil.common.units import SiteId
from fedveil.deploy.lab import datasets, simulate
from fedveil.deploy.lab import together as lab
from fedveil.deploy.lab.simulate import Config
from fedveil.deploy.lab.virtual_sites import World
from fedveil.privacy.dp import places
from fedveil.privacy.joining import sum_spec
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.report.verify import verify_report
from fedveil.privacy.secagg.plain import Together
from fedveil.privacy.secagg.server import server_sum
from fedveil.server.rounds import Round

CLIENTS = 12
CONFIGS = {
    "records": Config(clients=CLIENTS, dataset="digits", sum="plain", steps=3, force=True),
    "clients": Config(clients=CLIENTS, dataset="digits", sum="plain", mode="client", steps=3, force=True),
    "local": Config(clients=CLIENTS, dataset="trivial", sum="plain", mode="local", steps=3),
    "uneven": Config(
        clients=CLIENTS, dataset="digits", sum="plain", mode="client", steps=2, force=True, by="dirichlet:0.3"
    ),
}


def noise(std: float, size: int) -> np.ndarray:
    """The same for every site, whatever is drawn at once: D is a divisor of ``size``."""
    return np.tile(np.arange(10) - 3, size // 10)


def seats(records: np.ndarray, rate: float, room: int) -> np.ndarray:
    """Every second record, from the last place on."""
    out = np.full((len(records), room), places.EMPTY, np.int64)
    for i, n in enumerate(records):
        taken = np.arange(0, min(n, room), 2)
        out[i, room - 1 - taken] = taken
    return out


@pytest.fixture(params=CONFIGS)
def runs(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The folders of two runs: in one pass, and by messages."""
    config = CONFIGS[request.param]
    for module in (line, together):
        monkeypatch.setattr(module, "discrete_gaussian", noise)
    monkeypatch.setattr(places, "seat_each", seats)
    monkeypatch.setattr(train, "seat", lambda n, rate, room: seats(np.array([n]), rate, room)[0])
    split = simulate.sites_of(config)
    plan = simulate.make_plan(config, split)
    out = tmp_path / "together", tmp_path / "messages"
    passes: list[int] = []
    honest = together.contribute
    monkeypatch.setattr(together, "contribute", lambda *a: passes.append(1) or honest(*a))
    simulate.run_split(config, split, plan, out[0], engine="numpy")
    assert len(passes) == plan.steps
    monkeypatch.setattr(lab, "fits", lambda _: False)
    simulate.run_split(config, split, plan, out[1], engine="numpy")
    assert len(passes) == plan.steps
    return out


def bodies(path: Path, session: str) -> Iterator[tuple[str, Any]]:
    """What the rows say, beside the session's random name and what follows from it."""
    for row in parse(path.read_bytes()):
        yield row.kind, {k: v for k, v in row.body.items() if v != session and k not in ("plan_hash", "roster_hash")}


def test_one_pass_gives_the_integers_charges_and_figures_of_messages(runs: tuple[Path, Path]) -> None:
    sessions = [next(iter(parse((run / "journal.jsonl").read_bytes()))).body["session"] for run in runs]
    sums = [sorted((run / "sums").glob("*.bin")) for run in runs]
    assert len(sums[0]) == len(sums[1]) >= 2
    assert [p.read_bytes() for p in sums[0]] == [p.read_bytes() for p in sums[1]]
    assert (runs[0] / "model.f32").read_bytes() == (runs[1] / "model.f32").read_bytes()
    ledgers = [sorted((run / "ledgers").iterdir()) for run in runs]
    assert len(ledgers[0]) == len(ledgers[1]) == CLIENTS
    for one, other in zip(*ledgers, strict=True):
        assert list(bodies(one, sessions[0])) == list(bodies(other, sessions[1]))
    metrics = [[json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    assert all(x.pop("seconds") >= 0 for lines in metrics for x in lines)
    assert metrics[0] == metrics[1]  # the traffic too, that messages would have been
    found = [verify_report(run / "report.json") for run in runs]
    assert all(f.ok for f in found), [f.failed for f in found]
    assert [c.name for c in found[0].checks] == [c.name for c in found[1].checks]
    said = [json.loads((run / "report.json").read_text())["payload"] for run in runs]
    for key in ("claim", "fallback", "steps", "status", "trust"):
        assert said[0].get(key) == said[1].get(key), key


def test_the_noise_of_a_pass_is_a_share_of_every_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without records the opened sums are noise alone: n shares' worth of it, not one."""
    config = replace(CONFIGS["local"], clients=40, mode="distributed", steps=3)
    split = datasets.load("trivial", 40, 0)
    none = replace(split, parts=[(X[:0], y[:0]) for X, y in split.parts])
    plan: PrivacyPlan = simulate.make_plan(config, split)
    simulate.run_split(config, none, plan, tmp_path / "run", report=False)
    drawn = [np.frombuffer(p.read_bytes(), "<i4") for p in (tmp_path / "run" / "sums").glob("*.bin")]
    spread = np.concatenate(drawn).std() / (plan.share_std * np.sqrt(40))
    assert 0.5 < spread < 1.7  # 30 values: beyond with a chance below 1e-7


def test_a_spent_budget_and_lost_contributions_end_a_run_as_messages_do(tmp_path: Path) -> None:
    capped = replace(CONFIGS["records"], clients=4, steps=9, cap=0.6)
    done = simulate.run(capped, tmp_path / "capped", report=False)
    assert done.status == "BUDGET_EXHAUSTED"
    journal = parse((tmp_path / "capped" / "journal.jsonl").read_bytes())
    assert {r.body["code"] for r in journal if r.kind == "site.refused"} == {"BudgetExhausted"}
    lost = simulate.run(replace(CONFIGS["local"], drop_rate=1.0), tmp_path / "lost", report=False)
    assert lost.status == "ABORTED"
    some = simulate.run(replace(CONFIGS["local"], steps=6, drop_rate=0.2), tmp_path / "some", report=False)
    assert some.status in ("COMPLETED", "ABORTED")  # who missed a sum is brought it with the next request
    by = [json.loads(x)["members"] for x in (tmp_path / "some" / "metrics.jsonl").read_text().splitlines()]
    assert min(by) < CLIENTS  # 72 contributions, each lost with 0.2: none is with 1e-7


def test_a_protected_sum_is_never_computed_in_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "fits", lambda _: True)
    with pytest.raises(ProtocolError, match="sum in the clear"):
        simulate.run(replace(CONFIGS["local"], clients=4, sum="keysum", steps=1), tmp_path / "run", report=False)


def test_the_server_takes_a_pass_for_a_sum_in_the_clear_alone_and_each_site_once() -> None:
    world = World.make(4)
    split = datasets.load("trivial", 4, 0)
    for sum_ in ("plain", "keysum"):
        plan = simulate.make_plan(replace(CONFIGS["local"], clients=4, sum=sum_), split)
        adder = server_sum(sum_spec(plan, "0" * 64, world.roster))
        if sum_ == "keysum":
            adder.begin({s: {"x25519": f"{i:064x}"} for i, s in enumerate(world.sites)}, {})
        current = Round(plan, adder, 1, "nonce", "1" * 64)
        given = Together(tuple(world.sites), "1" * 64, np.ones(plan.model.parameters, np.int64), {})
        if sum_ == "keysum":
            with pytest.raises(ProtocolError, match="one contribution after the other"):
                current.collect_together(given)
            continue
        for change in (
            {"state": "2" * 64}, {"sites": given.sites[:1] * 2}, {"values": given.values[1:]},
            {"sites": (SiteId("stranger"),)},
        ):  # fmt: skip
            wrong = given._replace(**change)
            with pytest.raises(FedveilError):
                current.collect_together(wrong)
        assert current.members == ()
        current.collect_together(given)
        assert current.members == tuple(world.sites)
        with pytest.raises(FedveilError, match="before"):
            current.collect_together(given)


def test_a_round_looks_at_no_earlier_row_and_signs_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a round would take longer the more there were before; the ledgers' rows are signed in the end."""
    within, looked = [0], []
    honest, rows = together.contribute, vars(Journal)["rows"].fget

    def contribute(*a: Any) -> Together:
        within[0] += 1
        found = honest(*a)
        within[0] -= 1
        return found

    monkeypatch.setattr(together, "contribute", contribute)
    monkeypatch.setattr(Journal, "rows", property(lambda j: (looked.append(within[0]), rows(j))[1]))
    monkeypatch.setattr(identity, "sign", lambda *a: (looked.append(within[0]), sign(*a))[1])
    config = replace(CONFIGS["local"], clients=4, steps=5)
    assert simulate.run(config, tmp_path / "run", report=False).status == "COMPLETED"
    assert looked
    assert not any(looked)


def test_ten_thousand_sites_are_the_most() -> None:
    split = datasets.load("trivial", 10_000, 0)
    plan = simulate.make_plan(Config(clients=10_000, dataset="trivial", sum="plain", mode="client", steps=3), split)
    assert plan.sites == 10_000
    with pytest.raises(UsageError, match="10001 clients"):
        datasets.load("trivial", 10_001, 0)
