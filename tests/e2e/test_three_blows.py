"""One run with three faults: a hospital dead for good, another cut off for a minute, the server restarted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

import pytest

from fedveil.common import contract as contracts
from fedveil.common import identity
from fedveil.common.wire import sha256
from fedveil.deploy.enrol.provision import make_consortium
from fedveil.deploy.lab import demo_hospitals
from fedveil.deploy.lab.demo_hospitals import HOSPITALS

EAST, NORTH, SOUTH, WEST = HOSPITALS
STEPS, CUT_S = 20, 60.0
pytestmark = pytest.mark.slow


def reachable(c, line) -> None:
    """Let the server be known, and SOUTH dial, by the address that ``line`` leads to."""
    shutil.rmtree(c.home / "pki")
    make_consortium(c.home / "pki", HOSPITALS, consortium="diabetes-demo", host=line.host)
    key = identity.load_signing_key(c.home / "pki" / "consortium" / "consortium.key")
    (c.home / "contract.json").write_text(json.dumps(contracts.sign_contract(demo_hospitals.contract(), key)))
    here = f'127.0.0.1:{c.port}"'
    for path in (c.home / "federation.toml", *(c.home / s / "site.toml" for s in (EAST, NORTH, WEST))):
        c.replace(path, (here, f'{line.host}:{c.port}"'))
    c.replace(c.home / SOUTH / "site.toml", (here, f'{line.host}:{line.route(c.port)}"'))


def command(c, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "fedveil", *arguments], capture_output=True, text=True, cwd=c.home,
        env={**os.environ, "COLUMNS": "300"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def survived(consortium, line):
    c = consortium("blows", steps=STEPS, join_timeout=75)
    reachable(c, line)
    c.server()
    for site in (EAST, NORTH, WEST):
        c.site(site, "--wait", "150")
    c.start_in(line, SOUTH, "client", "run", f"{SOUTH}/site.toml", "--wait", "150")
    c.until_round(4)
    c.kill(WEST)
    c.until_round(6)
    line.cut()
    cut_at = time.monotonic()
    try:
        # Keep-alive finds out; then two of the three sites that a sum needs are there, and no round is opened.
        c.until("the server misses sites", lambda: "waits for sites: 2 of 3" in c.log("server"), timeout=50)
        c.before = len(c.metrics())
        c.kill("server")
        c.server("resume")
        time.sleep(CUT_S - (time.monotonic() - cut_at))
        c.during = len(c.metrics())
    finally:
        line.mend()
    codes = {name: c.code(name, 200) for name in c.processes if name != WEST}
    assert set(codes.values()) == {0}, (codes, c.log("server")[-3000:], c.log(SOUTH)[-3000:])
    return c


def test_it_completes_with_the_three_that_are_left(survived):
    [end] = survived.of_kind("run.end")
    assert end["status"] == "COMPLETED"
    assert len(survived.of_kind("run.resumed")) == 1
    assert set(survived.of_kind("round.applied")[-1]["members"]) == {EAST, NORTH, SOUTH}


def test_rounds_waited_and_at_most_the_one_under_way_was_lost(survived):
    assert survived.before < STEPS, "the cut came too late to matter"
    assert survived.during == survived.before, "a round was finished while too few sites were there"
    aborted = [r["round"] for r in survived.of_kind("round.aborted")]
    applied = [r["round"] for r in survived.of_kind("round.applied")]
    assert len(aborted) <= 1
    assert sorted(aborted + applied) == [r["round"] for r in survived.of_kind("round.open")] == [*range(1, STEPS + 1)]


def test_every_ledger_agrees_with_the_servers_journal(survived):
    applied = {r["round"]: set(r["members"]) for r in survived.of_kind("round.applied")}
    for site in HOSPITALS:
        charged = survived.charged(site)
        assert len(set(charged)) == len(charged), f"{site} was charged twice for a round"
        assert set(charged) <= set(range(1, STEPS + 1))
        assert {n for n, members in applied.items() if site in members} <= set(charged), f"{site}: a sum without charge"
    assert survived.charged(EAST) == survived.charged(NORTH) == [*range(1, STEPS + 1)]
    assert max(survived.charged(WEST)) < STEPS


def test_commands_confirm_the_model_and_the_ledgers(survived):
    key = survived.home / "pki" / "consortium" / "consortium.pub"
    said = command(survived, "audit", "verify", str(survived.run), "--consortium-key", str(key))
    assert f"not delivered: {WEST}" in said
    assert "status: COMPLETED" in command(survived, "server", "status", str(survived.run))
    data = (survived.run / "model.f32").read_bytes()
    assert sha256(data) == survived.of_kind("run.end")[0]["model_hash"]
    assert sha256(data) == survived.of_kind("round.applied")[-1]["model_hash"]
