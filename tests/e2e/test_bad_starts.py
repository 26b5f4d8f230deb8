"""What must not start, or must stop: a clear error, the documented exit code, nothing lost, nothing sent."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from fedveil.common import contract as contracts
from fedveil.common import identity
from fedveil.common.units import Delta, Epsilon
from fedveil.deploy.enrol.provision import make_consortium
from fedveil.deploy.lab import demo_hospitals
from fedveil.deploy.lab.demo_hospitals import HOSPITALS
from fedveil.privacy.ledger import Ledger
from fedveil.privacy.plan import from_json
from fedveil.privacy.report.verify import verify_report

EAST, NORTH, SOUTH, WEST = HOSPITALS


@contextmanager
def listening(port: int) -> Iterator[socket.socket]:
    """A socket that takes connections and says nothing, in the server's place."""
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.bind(("127.0.0.1", port))
        s.listen()
        s.setblocking(False)
        yield s


def was_contacted(s: socket.socket) -> bool:
    try:
        s.accept()[0].close()
    except BlockingIOError:
        return False
    return True


def no_column(home):
    path = home / EAST / "patients.csv"
    path.write_text("\n".join(line.split(",", 1)[1] for line in path.read_text().splitlines()) + "\n")


def unknown_column(home):
    path = home / EAST / "patients.csv"
    head, *rows = path.read_text().splitlines()
    path.write_text("\n".join([head + ",hiv", *(r + ",1" for r in rows)]) + "\n")


def unsigned(home):
    draft = demo_hospitals.contract()
    (home / "contract.json").write_text(json.dumps(draft.model_dump(mode="json")))


def altered(home):
    path = home / "contract.json"
    text = path.read_text()
    assert '"k": 5' in text
    path.write_text(text.replace('"k": 5', '"k": 4'))


def few_rows(home):
    # Three patients of one sex: their class has fewer than k = 5 members, and only levels without sex would pass.
    path = home / EAST / "patients.csv"
    head, *rows = path.read_text().splitlines()
    of_sex = {s: [r for r in rows if r.split(",")[1] == s] for s in ("1", "2")}
    young = [r for r in of_sex["2"] if float(r.split(",")[0]) < 50]
    path.write_text("\n".join([head, *of_sex["1"], *young[:3]]) + "\n")


def a_nan(home):
    path = home / EAST / "patients.csv"
    head, first, *rows = path.read_text().splitlines()
    path.write_text("\n".join([head, ",".join([*first.split(",")[:-2], "nan", first.split(",")[-1]]), *rows]) + "\n")


def other_name(home):
    path = home / EAST / "site.toml"
    path.write_text(path.read_text().replace(f'id = "{EAST}"', 'id = "hospital-nowhere"'))


def other_key(home):
    shutil.copy(home / "pki" / "sites" / NORTH / "signing.key", home / "pki" / "sites" / EAST / "signing.key")


def other_authority(home):
    make_consortium(home / "foreign", [EAST], consortium="foreign", host="127.0.0.1")
    for name in ("tls.pem", "tls.key"):
        shutil.copy(home / "foreign" / "sites" / EAST / name, home / "pki" / "sites" / EAST / name)


def unknown_setting(home):
    path = home / EAST / "site.toml"
    path.write_text(path.read_text().replace("[limits]", "[limits]\nmax_epsilom = 9.0"))


# How a hospital's start is spoiled: the exit code, and what must be said.
CASES = {
    no_column: (21, "'age'"),
    unknown_column: (21, "positions 12"),
    unsigned: (20, "not signed"),
    altered: (20, "signature"),
    few_rows: (22, "would pass"),
    a_nan: (21, "'s6'"),
    other_name: (30, "not on the roster"),
    other_key: (30, "not the key of"),
    other_authority: (30, "was not issued by"),
    unknown_setting: (10, "max_epsilom"),
}


@pytest.mark.parametrize("spoil", CASES, ids=lambda f: f.__name__)
def test_a_spoiled_site_stops_before_it_dials(consortium, spoil):
    c = consortium(spoil.__name__, steps=4)
    spoil(c.home)
    code, said = CASES[spoil]
    with listening(c.port) as s:
        c.site(EAST)
        assert c.code(EAST) == code, c.log(EAST)
        assert not was_contacted(s)
    log = c.log(EAST)
    assert said in log
    assert "Traceback" not in log
    spends = [r for r in c.ledger(EAST) if r.kind == "spend"] if (c.home / EAST / "state").exists() else []
    assert not spends


def test_the_socket_does_notice_a_site_that_dials(consortium):
    c = consortium("control", steps=4)
    with listening(c.port) as s:
        c.site(EAST)
        c.until("a call", lambda: was_contacted(s))


def test_a_port_in_use(consortium):
    c = consortium("port", steps=4)
    with listening(c.port):
        c.server()
        assert c.code("server") == 80, c.log("server")
    assert "cannot listen on 127.0.0.1" in c.log("server")
    assert "uses the port" in c.log("server")
    assert not c.run.exists(), "a start that failed left a run that could be resumed"


def test_an_impossible_plan_is_refused_with_the_nearest(consortium):
    c = consortium("impossible", steps=4)
    c.replace(c.home / "federation.toml", ("[model]", "colluders = 2\n[model]"))
    c.server()
    assert c.code("server") == 11, c.log("server")
    assert "the nearest that holds: colluders = 1, dropouts = 1" in c.log("server")
    assert not c.run.exists()


def test_a_second_start_on_the_same_ledger(consortium):
    c = consortium("twice", steps=4)
    first = c.site(EAST)
    c.until("the first start", lambda: "connecting" in c.log(EAST))
    c.processes["second"] = first
    c.site(EAST)
    assert c.code(EAST) == 51, c.log(EAST)
    assert "in use by another process" in c.log(EAST)
    assert first.poll() is None


def test_a_certificate_that_the_server_refuses(consortium):
    c = consortium("refused", steps=4)
    other_authority(c.home)
    own, foreign = c.home / "pki" / "sites" / EAST / "ca.pem", c.home / "foreign" / "sites" / EAST / "ca.pem"
    own.write_text(foreign.read_text() + own.read_text())  # trusts the right server, has a foreign certificate
    c.server()
    c.until("the run's beginning", lambda: (c.run / "journal.jsonl").exists())
    c.site(EAST)
    assert c.code(EAST) == 80, c.log(EAST)
    assert "does not accept this site's certificate" in c.log(EAST)
    assert not c.of_kind("run.joined")


def test_a_site_with_another_contract_is_not_summed(consortium):
    c = consortium("contracts", steps=4)
    key = identity.load_signing_key(c.home / "pki" / "consortium" / "consortium.key")
    other = demo_hospitals.contract().model_copy(update={"version": "2"})
    (c.home / WEST / "contract.json").write_text(json.dumps(contracts.sign_contract(other, key)))
    c.replace(c.home / WEST / "site.toml", ('"../contract.json"', '"contract.json"'))
    c.server()
    for site in (EAST, NORTH, SOUTH):
        c.site(site)
        c.until(f"{site} has joined", lambda site=site: "working" in c.log(site))
    c.site(WEST)
    assert c.code("server") == 90, c.log("server")
    assert f"{WEST} does not take part" in c.log("server")
    assert "another data contract" in c.log("server")
    for site in HOSPITALS:
        assert c.code(site) == 90
        assert "Traceback" not in c.log(site)
        assert c.charged(site) == []


@pytest.fixture(scope="module")
def spent(consortium):
    """Every hospital's ledger carries three of the four steps: an earlier session took the rest."""
    c = consortium("spent", steps=4)
    from fedveil.common import settings
    from fedveil.privacy.planning import plan_from_settings

    federation = settings.load(c.home / "federation.toml", settings.Federation)
    event = plan_from_settings(federation, demo_hospitals.contract(), 4).event
    for site in HOSPITALS:
        key = identity.load_signing_key(c.home / "pki" / "sites" / site / "signing.key")
        (c.home / site / "state").mkdir(mode=0o700)
        ledger = Ledger.open(
            c.home / site / "state" / "ledger.jsonl", site, key, lineage=f"diabetes-{site}",
            cap=Epsilon(demo_hospitals.CAP), delta=Delta(demo_hospitals.DELTA),
        )  # fmt: skip
        for n in range(1, ledger.affords(event) - 2):
            ledger.reserve("e" * 64, n, "a" * 64, event)
        assert ledger.affords(event) == 3
        ledger.close()
    c.everybody()
    assert c.code("server") == 3, c.log("server")
    return c


def test_a_spent_budget_is_a_normal_ending(spent):
    assert spent.of_kind("run.end")[0]["status"] == "BUDGET_EXHAUSTED"
    assert [spent.charged(s) for s in HOSPITALS] == [[1, 2, 3]] * 4
    assert [spent.code(s) for s in HOSPITALS] == [0] * 4


def test_both_sides_say_in_their_logs_what_is_no_fault(spent):
    for site in HOSPITALS:
        assert "fedveil.client INFO the budget pays for 3 of the plan's 4 steps" in spent.log(site)
    assert "fedveil.server INFO mode distributed, sum keysum, 4 sites, 4 steps" in spent.log("server")
    assert "INFO 4 of 4 sites signed the report" in spent.log("server")


def test_what_was_charged_is_told_apart_from_what_was_opened(spent):
    payload = json.loads((spent.run / "report.json").read_text())["payload"]
    shown = [json.loads(x) for x in (spent.run / "metrics.jsonl").read_text().splitlines()]
    found, steps = payload["accounting"], payload["steps"]
    assert (steps["planned"], found["steps_charged"]) == (4, 3)
    assert found["epsilon_charged_pld"] == pytest.approx(shown[2]["epsilon_opened"])
    assert found["epsilon_charged_pld"] < shown[steps["opened"] - 1]["epsilon_opened"] <= payload["claim"]["epsilon"]


def test_the_last_model_and_the_report_are_kept(spent):
    end, last = spent.of_kind("run.end")[0], spent.of_kind("round.applied")[-1]
    assert (last["round"], last["model_hash"]) == (3, end["model_hash"])
    assert (spent.run / "model.f32").exists()
    assert (spent.run / "report.html").exists()
    result = verify_report(spent.run / "report.json")
    assert result.ok, result.failed
    payload = json.loads((spent.run / "report.json").read_text())["payload"]
    assert payload["status"] == "BUDGET_EXHAUSTED"
    assert {payload["sites"][s]["charged"] for s in HOSPITALS} == {3}
    assert all(payload["sites"][s]["epsilon_before"] > 0 for s in HOSPITALS)
    assert from_json(json.loads((spent.run / "plan.json").read_text())).steps == 4


def test_a_run_after_that_is_refused_before_it_begins(spent):
    spent.run = spent.home / "second"
    spent.everybody()
    assert spent.code("server") == 3, spent.log("server")
    assert "does not take part" in spent.log("server")
    assert all(spent.charged(s) == [] for s in HOSPITALS)
