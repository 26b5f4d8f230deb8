"""A run of ours under SuperLink: a server and four hospitals, SuperNodes, TLS, the secure sum; and who is kept out.

The server's executor is killed after the first round and takes the run up again.
"""

from __future__ import annotations

import json
import signal
from contextlib import closing

import pytest

from fedveil.common.errors import ProtocolError
from fedveil.common.journal import parse
from fedveil.deploy.lab.demo_hospitals import HOSPITALS
from fedveil.deploy.superlink import commands
from fedveil.deploy.superlink.runtime import CLIENT, SERVER, Link
from fedveil.privacy.report.verify import verify_report

STEPS = 2


def _settings(world) -> str:
    path = world.home / "federation.toml"
    text = path.read_text()
    for old, new in (("steps = 20", f"steps = {STEPS}"), ("round_timeout = 30", "round_timeout = 180")):
        assert old in text
        text = text.replace(old, new)
    path.write_text(text.replace("join_timeout = 60", "join_timeout = 240"))
    return str(path)


@pytest.mark.slow
def test_a_run_completes_and_every_ledger_is_charged_once(world, free_port, stranger) -> None:
    federation, home = _settings(world), world.home
    world.ours("superlink", "link", federation, "--port", str(world.port))
    world.until_listening(world.port)
    ca = home / "pki" / "server" / "ca.pem"
    secret = commands.secret(home / "pki" / "server").read_bytes()
    with closing(Link(f"127.0.0.1:{world.port}", ca=ca, secret=secret)) as operator:
        foreign = operator.start_run(stranger("1.0.0"))
        intruder = world.start(
            "intruder", commands._tool("flower-supernode"), "--superlink", f"127.0.0.1:{world.port}",
            "--root-certificates", str(ca), "--host", "127.0.0.1", "--port", str(free_port()),
        )  # fmt: skip
        for guess in (b"", b"x" * 32):  # without the secret nobody takes a task
            with closing(Link(f"127.0.0.1:{world.port}", ca=ca, secret=guess)) as nobody:
                for kind in (SERVER, CLIENT):
                    with pytest.raises(ProtocolError, match="HTTP 40"):
                        nobody.acquire(kind)
        _carry_out(world, federation, free_port)
        assert operator.run_status(foreign)[:2] == ("finished", "failed")
        # It has the authority's certificate and a key of its own that nobody registered.
        assert "Failed to initialize the connection to the SuperLink" in world.log("intruder")
        assert "SuperNode ID" not in world.log("intruder")
        intruder.terminate()
    _check_outcome(world)


def _carry_out(world, federation: str, free_port) -> None:
    home = world.home
    certificates = [x for h in HOSPITALS for x in ("--certificate", str(home / "pki" / "sites" / h / "tls.pem"))]
    run = ("--run", str(home / "run"), "--port", str(world.port))
    server = world.ours("server", "server", federation, *run, *certificates)
    # A SuperNode that is not registered is not let in, and would not come back.
    world.until("the registration", lambda: world.log("server").count("may connect") == len(HOSPITALS))
    for site in HOSPITALS:
        port = str(free_port())
        world.ours(f"{site}-node", "node", str(home / site / "site.toml"), "--port", port)
        world.ours(site, "site", str(home / site / "site.toml"), "--port", port)
    metrics = home / "run" / "metrics.jsonl"
    world.until("round 1", metrics.exists, 400)
    server.kill()
    assert server.wait(600) == -signal.SIGKILL
    again = world.ours("server-again", "server", federation, *run, *certificates, "--resume")
    world.until("the server's end", lambda: again.poll() is not None, 400)
    assert again.returncode == 0, world.log("server-again")


def _check_outcome(world) -> None:
    home = world.home
    rows = parse((home / "run" / "journal.jsonl").read_bytes())
    ends = [r.body for r in rows if r.kind == "run.end"]
    assert [e["status"] for e in ends] == ["COMPLETED"]
    opened = next(r.body for r in rows if r.kind == "run.open")
    assert (opened["engine"], opened["simulated"]) == ("superlink", False)
    for site in HOSPITALS:
        ledger = parse((home / site / "state" / "ledger.jsonl").read_bytes())
        charged = [r.body["round"] for r in ledger if r.kind == "spend" and r.body["session"] == opened["session"]]
        assert charged == list(range(1, STEPS + 1)), site
        assert world.started[site].poll() is None  # its executor waits for the next run
    lines = [json.loads(x) for x in (home / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [x["members"] for x in lines] == [len(HOSPITALS)] * STEPS
    assert all(x["bytes_received"] > 0 for x in lines)
    key = (home / "pki" / "consortium" / "consortium.pub").read_text()
    result = verify_report(home / "run" / "report.json", consortium_key=key)
    assert result.ok, [c for c in result.checks if not c.passed]
    assert "refused, this server did not start it" in world.log("server")
    for name in world.started:
        assert not world.canary(name).exists()
        assert world.installed(name) == []
