"""kill -9 of a hospital, of the server, of both, at every phase of a round; a full disk; a clock that jumps.

The process kills itself at an exact point (``forks.py``), so that nothing depends on timing. Whatever the point: after
a restart the run completes, no ledger is charged twice for a round, every sum was charged at every site in it before
it was opened, and the report verifies.
"""

from __future__ import annotations

import shutil
import signal
from typing import Any

import pytest

from fedveil.common.wire import sha256
from fedveil.deploy.lab.demo_hospitals import HOSPITALS
from fedveil.privacy.report.verify import verify_report

WEST = HOSPITALS[-1]
STEPS = 5
pytestmark = pytest.mark.slow

_ROUND, _LEDGER = "fedveil.client.round", "fedveil.privacy.ledger:Ledger.reserve"
_JOURNAL = "fedveil.common.journal:Journal.append"


def at_site(name: str, when: str, nth: int = 3) -> dict[str, Any]:
    """A hospital dies before it has looked at a request, or when its answer is kept and not yet sent."""
    return {"target": f"{_ROUND}:{name}", "when": when, "nth": nth}


def at_row(kind: str, when: str, nth: int = 3) -> dict[str, Any]:
    """The server dies before or after a row of its journal is on disk."""
    return {"target": _JOURNAL, "kind": kind, "when": when, "nth": nth}


SITE = {
    "join before": at_site("join", "before", 1),
    "join after": at_site("join", "after", 1),
    "contribute before": at_site("contribute", "before"),
    "before the charge": {"target": _LEDGER, "when": "before", "nth": 3},
    "after the charge": {"target": _LEDGER, "when": "after", "nth": 3},
    "contribute after": at_site("contribute", "after"),
    "agree before": at_site("agree", "before"),
    "agree after": at_site("agree", "after"),
    "open before": at_site("open_sum", "before"),
    "open after": at_site("open_sum", "after"),
    "fingerprint before": at_site("fingerprint", "before"),
    "fingerprint after": at_site("fingerprint", "after"),
    "finish before": at_site("finish", "before", 1),
    "finish after": at_site("finish", "after", 1),
}
SERVER = {
    "joined before": at_row("run.joined", "before", 1),
    "joined after": at_row("run.joined", "after", 1),
    "begun": {"target": "fedveil.server.admission:_begin", "when": "after", "nth": 1},
    "open before": at_row("round.open", "before"),
    "open after": at_row("round.open", "after"),
    "set before": at_row("round.set", "before"),
    "set after": at_row("round.set", "after"),
    "asked to open": {"target": "fedveil.server.rounds:Round.ask", "when": "after", "nth": 3},
    "answered": {"target": "fedveil.server.rounds:Round.answer", "when": "after", "nth": 9},
    "asked to vouch": {"target": "fedveil.server.rounds:Round.verify", "when": "after", "nth": 3},
    "checkpoint": {"target": "fedveil.server.job:Job.checkpoint", "when": "after", "nth": 4},
    "applied before": at_row("round.applied", "before"),
    "applied after": at_row("round.applied", "after"),
    "end before": at_row("run.end", "before", 1),
}
BOTH = {
    "contribute": (
        {"target": "fedveil.server.rounds:Round.collect", "when": "after", "nth": 9},
        at_site("contribute", "after"),
    ),
    "agree": (at_row("round.set", "after"), at_site("contribute", "after")),
    "open": ({"target": "fedveil.server.rounds:Round.ask", "when": "before", "nth": 3}, at_site("agree", "after")),
    "apply": (at_row("round.applied", "before"), at_site("open_sum", "after")),
}


def died(c: Any, name: str) -> None:
    assert c.code(name) == -signal.SIGKILL, c.log(name)[-2000:]


def consistent(c: Any, *, absent: bool = False, most: int = 1) -> None:
    """What must hold after any crash; at most ``most`` rounds are lost."""
    [end] = c.of_kind("run.end")
    assert end["status"] == "COMPLETED"
    applied = {r["round"]: set(r["members"]) for r in c.of_kind("round.applied")}
    lost = [r["round"] for r in c.of_kind("round.aborted")]
    assert sorted([*applied, *lost]) == [*range(1, STEPS + 1)]
    assert len(lost) <= most
    assert len({(r["round"], r["nonce"]) for r in c.of_kind("round.open")}) == STEPS, "a round was opened twice"
    for site in HOSPITALS:
        charged = c.charged(site)
        assert len(charged) == len(set(charged)), f"{site} was charged twice: {charged}"
        assert {n for n, members in applied.items() if site in members} <= set(charged)
    assert sha256((c.run / "model.f32").read_bytes()) == end["model_hash"]
    key = (c.home / "pki" / "consortium" / "consortium.pub").read_text()
    result = verify_report(c.run / "report.json", consortium_key=key)
    assert result.ok, [x for x in result.checks if not x.passed]


def waiting_sites(c: Any) -> None:
    for site in HOSPITALS:
        c.site(site, "--wait", "20")


@pytest.mark.parametrize("point", SITE)
def test_a_hospital_is_killed_and_started_again(consortium: Any, point: str) -> None:
    c = consortium("site", steps=STEPS, grace=4, join_timeout=20)
    c.faults[WEST] = SITE[point]
    c.server()
    waiting_sites(c)
    died(c, WEST)
    c.site(WEST, "--wait", "6")
    assert c.code("server") == 0, c.log("server")[-3000:]
    assert c.code(WEST) in (0, 80), c.log(WEST)[-2000:]  # 80: the run was over before it was back
    consistent(c)


@pytest.mark.parametrize("point", SERVER)
def test_the_server_is_killed_and_resumed(consortium: Any, point: str) -> None:
    c = consortium("server", steps=STEPS, grace=4, join_timeout=20)
    c.faults["server"] = SERVER[point]
    c.server()
    waiting_sites(c)
    died(c, "server")
    c.server("resume")
    codes = {name: c.code(name) for name in c.processes}
    assert set(codes.values()) == {0}, (codes, c.log("server")[-3000:])
    consistent(c)
    assert c.charged(WEST) == [*range(1, STEPS + 1)], "nobody was missing, so nothing was lost"


@pytest.mark.parametrize("point", BOTH)
def test_both_are_killed(consortium: Any, point: str) -> None:
    c = consortium("both", steps=STEPS, grace=4, join_timeout=20)
    c.faults["server"], c.faults[WEST] = BOTH[point]
    c.server()
    waiting_sites(c)
    died(c, WEST)
    died(c, "server")
    c.site(WEST, "--wait", "20")
    c.server("resume")
    codes = {name: c.code(name) for name in c.processes}
    assert set(codes.values()) == {0}, (codes, c.log("server")[-3000:])
    consistent(c, most=2)  # they may die in two rounds: one without its member, one with a second set


def test_a_hospital_whose_disk_is_full_charges_nothing_that_it_does_not_keep(consortium: Any) -> None:
    c = consortium("full", steps=STEPS, grace=2)
    c.faults[WEST] = {"target": _LEDGER, "when": "before", "nth": 3, "do": "full"}
    c.server()
    waiting_sites(c)
    assert c.code("server") == 0, c.log("server")[-3000:]
    assert not (c.home / WEST / "state" / "ledger.jsonl").read_bytes().endswith(b"\n"), "the fault did not bite"
    assert c.code(WEST) == 51, "it would go on answering without a ledger"
    assert "free disk space" in c.log(WEST)
    c.site(WEST, "--wait", "1")  # with room again: the torn row is dropped, and that is recorded
    assert c.code(WEST) == 80
    assert "journal.repaired" in {r.kind for r in c.ledger(WEST)}
    assert c.charged(WEST) == [1, 2]
    refused = {r["code"] for r in c.of_kind("site.refused") if r["site"] == WEST}
    assert "JournalError" in refused, c.log(WEST)[-2000:]
    assert all(WEST not in r["members"] for r in c.of_kind("round.applied") if r["round"] not in c.charged(WEST))
    assert "Traceback" not in c.log("server")


def test_a_server_whose_disk_is_full_stops_and_goes_on_when_there_is_room(consortium: Any) -> None:
    c = consortium("room", steps=STEPS)
    c.faults["server"] = at_row("round.set", "before") | {"do": "full"}
    c.server()
    waiting_sites(c)
    assert c.code("server", 60) == 51, c.log("server")[-3000:]
    assert "free disk space" in c.log("server")
    # The sites were told that the run was aborted: they are started again, as their operators would.
    for site in HOSPITALS:
        assert c.code(site, 30) == 90
    c.server("resume")
    waiting_sites(c)
    codes = {name: c.code(name) for name in c.processes}
    assert set(codes.values()) == {0}, (codes, c.log("server")[-3000:])
    consistent(c)


@pytest.mark.parametrize("who", ["server", WEST])
def test_a_clock_that_jumps_changes_nothing(consortium: Any, who: str) -> None:
    c = consortium("clock", steps=STEPS)
    point = at_row("round.open", "after") if who == "server" else at_site("contribute", "before")
    c.faults[who] = point | {"do": "clock"}
    c.everybody()
    codes = {name: c.code(name) for name in c.processes}
    assert set(codes.values()) == {0}, (codes, c.log("server")[-3000:])
    consistent(c)
    assert c.charged(WEST) == [*range(1, STEPS + 1)]


def test_a_second_server_on_the_same_run_is_refused(consortium: Any) -> None:
    c = consortium("twins", steps=STEPS)
    c.server()
    c.until("the run's beginning", lambda: (c.run / "journal.jsonl").exists() and bool(c.of_kind("run.open")))
    first = c.processes["server"]
    c.server("resume")
    assert c.code("server") == 80
    assert "uses the port" in c.log("server")
    text = (c.home / "federation.toml").read_text()
    (c.home / "other.toml").write_text(text.replace(f":{c.port}", ":0"))
    c.start("server", "server", "resume", "other.toml", str(c.run))
    assert c.code("server") == 51, c.log("server")[-2000:]
    assert "in use by another process" in c.log("server")
    c.processes["server"] = first
    waiting_sites(c)
    codes = {name: c.code(name) for name in c.processes}
    assert set(codes.values()) == {0}, (codes, c.log("server")[-3000:])
    consistent(c)


def test_sigterm_ends_after_the_round(consortium: Any) -> None:
    c = consortium("drained", steps=20)
    c.everybody()
    c.until_round(2)
    c.processes["server"].send_signal(signal.SIGTERM)
    assert c.code("server", 60) == 128 + signal.SIGTERM, c.log("server")[-2000:]
    assert c.journal()[-1].kind in ("round.applied", "round.aborted", "run.joined"), "stopped in the middle of a round"
    assert not c.of_kind("round.aborted")
    done = len(c.of_kind("round.applied"))
    assert 2 <= done < 20
    c.server("resume")
    codes = {name: c.code(name) for name in c.processes}
    assert set(codes.values()) == {0}, (codes, c.log("server")[-3000:])
    assert [r["round"] for r in c.of_kind("round.applied")] == [*range(1, 21)]
    assert all(c.charged(s) == [*range(1, 21)] for s in HOSPITALS)


def test_a_second_machine_under_one_identity_is_refused_and_reported(consortium: Any) -> None:
    """Somebody copied the hospital's keys: the first session goes on, the second is turned away and on record."""
    c = consortium("rival", steps=STEPS)
    shutil.copytree(c.home / WEST, c.home / "rival")
    c.server()
    c.site(WEST)
    c.until("the first session", lambda: "connected" in c.log(WEST))
    c.start("rival", "client", "run", "rival/site.toml")
    c.until("the refusal", lambda: f"{WEST}: a second live process under its identity was refused" in c.log("server"))
    for site in HOSPITALS[:-1]:
        c.site(site)
    codes = {name: c.code(name) for name in c.processes}
    assert codes.pop("rival") == 80, c.log("rival")[-2000:]
    assert set(codes.values()) == {0}, (codes, c.log("server")[-3000:])
    [row] = c.of_kind("site.refused")
    assert (row["site"], row["code"]) == (WEST, "TransportError")
    assert "second live process" in row["reason"]
    consistent(c)
