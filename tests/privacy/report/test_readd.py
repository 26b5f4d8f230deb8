"""The kept ciphertexts added up again: an honest run passes, a changed or missing ciphertext is found by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from fedveil.client.app import make_app as client_app
from fedveil.common import canonical, cli
from fedveil.common.errors import UsageError, VerificationError
from fedveil.common.identity import Roster
from fedveil.common.journal import Journal
from fedveil.common.wire import Packet, sha256
from fedveil.common.workload.model import ModelSpec
from fedveil.deploy.lab import virtual_sites
from fedveil.deploy.transport.inprocess import run_inprocess
from fedveil.privacy import plan as plans
from fedveil.privacy.joining import chained, sum_spec
from fedveil.privacy.plan import Optimizer, make_plan
from fedveil.privacy.report import bundle
from fedveil.privacy.report import readd as report_readd
from fedveil.privacy.report.readd import readd
from fedveil.privacy.secagg import keysum_common as messages
from fedveil.privacy.secagg.contributions import from_bytes, to_parts
from fedveil.privacy.secagg.keysum_opening import Opening
from fedveil.privacy.secagg.opened_sum import KEYSUM
from fedveil.server import job as jobs
from fedveil.server.app import make_app as server_app

WORLD = virtual_sites.World.make(3)


def go(folder: Path, reveal_to: Any, steps: int = 2) -> Path:
    """A run of three sites whose server keeps the ciphertexts."""
    plan = make_plan(
        sites=3, records=30, epsilon=8.0, steps=steps, clip=1.0, contract_hash="c" * 64, colluders=1, dropouts=0,
        model=ModelSpec(name="logistic", inputs=3, classes=2), optimizer=Optimizer(learning_rate=0.5),
        reveal_to=reveal_to,
    )  # fmt: skip
    job = jobs.create(
        folder, plan, WORLD.roster, WORLD.server, documents=WORLD.documents(), durable=False, keep_ciphertexts=True
    )
    rng = np.random.default_rng(1)
    X, y = rng.standard_normal((10, 3)).astype(np.float32), np.arange(10) % 2
    sites = virtual_sites.Kept(
        lambda i: virtual_sites.make_site(WORLD.roster, i, WORLD.keys[i], plan, X, y, folder, cap=90.0, engine="closed")
    )
    server, strategy = server_app(job)
    run_inprocess(server, client_app(sites.resolve), WORLD.sites, lambda _: {})
    job.journal.close()
    assert strategy.status == "COMPLETED"
    return folder


@pytest.fixture(scope="module", params=["server", "sites"])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return go(tmp_path_factory.mktemp("readd") / "run", request.param)


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def errors(run: Path) -> dict[int, str]:
    return {found.round: found.error for found in readd(run)}


def test_an_honest_run_adds_up_and_one_round_can_be_chosen(run):
    assert errors(run) == {1: "", 2: ""}
    assert [f.round for f in readd(run, rounds=[2])] == [2]
    kept = sorted(p.name for p in (run / "ciphertexts").iterdir())
    assert kept == [f"{r}-{i}" for r in (1, 2) for i in (1, 2, 3)]
    said = CliRunner().invoke(cli.build(), ["audit", "readd", str(run)])
    assert said.exit_code == 0
    assert said.output.splitlines() == [
        f"round {r}, 3 members: the signed ciphertexts add up to the opened sum" for r in (1, 2)
    ]


def changed(change: Callable[[Packet], Packet]) -> Callable[[Path], None]:
    """Rewrites the second site's kept contribution to the second round."""

    def rewrite(run: Path) -> None:
        path = run / "ciphertexts" / "2-2"
        path.write_bytes(b"".join(to_parts(change(from_bytes(path.read_bytes())))))

    return rewrite


def _bit(p: Packet) -> Packet:
    data = p.buffers["ciphertext"]
    return Packet(p.header, {"ciphertext": bytes([data[0] ^ 1]) + data[1:]})


def _resigned(p: Packet) -> Packet:
    """Another ciphertext that its site signs today."""
    p = _bit(p)
    header = {k: v for k, v in p.header.items() if k != "signature"} | {"ciphertext": sha256(p.buffers["ciphertext"])}
    return Packet(messages.sign_header(WORLD.keys[1], header), p.buffers)


SPOILED: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a bit of a ciphertext": ("is not the one that it signed", changed(_bit)),
    "another signed ciphertext": ("not the one that the opened sum names", changed(_resigned)),
    "a header": ("signature", changed(lambda p: Packet({**p.header, "ciphertext": "0" * 64}, p.buffers))),
    "a ciphertext cut short": ("bytes instead of", changed(lambda p: Packet(p.header, {"ciphertext": b"x"}))),
    "a missing ciphertext": ("2-2 is missing", lambda r: (r / "ciphertexts" / "2-2").unlink()),
    "garbage": ("damaged", lambda r: (r / "ciphertexts" / "2-2").write_bytes(b"garbage")),
    "another site's": ("opened sum names", lambda r: shutil.copy(r / "ciphertexts/2-1", r / "ciphertexts/2-2")),
    "another round's": ("another round", lambda r: shutil.copy(r / "ciphertexts/1-2", r / "ciphertexts/2-2")),
    "the opened sum": ("journal names", lambda r: (r / "sums/2.bin").write_bytes(b"x")),
    "the opened sum's header": ("journal names", lambda r: (r / "sums/2.json").write_bytes(b"{}")),
    "no opened sum": ("is missing", lambda r: (r / "sums/2.bin").unlink()),
}


@pytest.mark.parametrize("what", SPOILED)
def test_what_differs_is_named_and_the_other_round_still_passes(run, what):
    said, spoil = SPOILED[what]
    spoil(run)
    found = errors(run)
    assert found[1] == ""
    assert said in found[2]


def test_contributions_from_another_state_than_the_journals_are_found(run, monkeypatch):
    honest = report_readd.replay

    def renamed(rows):
        history = honest(rows)
        history.applied[1].state_in = "a" * 64
        return history

    monkeypatch.setattr(report_readd, "replay", renamed)
    found = errors(run)
    assert found[1] == ""
    assert "another model state" in found[2]


def test_a_difference_ends_the_command_with_its_name_and_code(run):
    (run / "ciphertexts" / "1-3").unlink()
    said = CliRunner().invoke(cli.build(), ["audit", "readd", str(run)])
    assert isinstance(said.exception, VerificationError)
    assert "round 1, 3 members: DIFFERS: the ciphertext of 'site-0003' (ciphertexts/1-3)" in said.output
    assert "round 2, 3 members: the signed" in said.output


def test_a_sum_that_members_vouched_for_to_please_the_server_is_found(run, forge_opening):
    """Here all members vouch for another sum, so that every site takes it. Their signed ciphertexts say otherwise."""
    plan = plans.from_json(canonical.loads((run / "plan.json").read_bytes()))
    rows = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    spec = sum_spec(plan, next(r["body"]["session"] for r in rows if r["kind"] == "run.open"), roster(run))
    packet = Packet(canonical.loads((run / "sums/1.json").read_bytes()), {"opening": (run / "sums/1.bin").read_bytes()})
    o = Opening.parse(spec, packet)
    keys = dict(zip(WORLD.sites, WORLD.keys, strict=True))
    forged = forge_opening(spec, keys, 1, np.zeros(8, np.int64), nonce=o.nonce)
    assert forged.kind == KEYSUM
    replaced(run, forged)
    assert "not the one that the opened sum names" in errors(run)[1]
    honest = {s: m.digest for s, m in o.members.items()}
    forged = forge_opening(spec, keys, 1, np.zeros(8, np.int64), nonce=o.nonce, digests=honest)
    replaced(run, forged)
    assert errors(run) == {1: "the members' signed ciphertexts do not add up to the opened sum", 2: ""}


def roster(run: Path) -> Roster:
    files = bundle.read(run)
    return bundle.open_roster(files, files.pin)


def replaced(run: Path, packet: Packet) -> None:
    """Another opened sum, which the server's journal names too: it signs what it wants."""
    (run / "sums/1.json").write_bytes(canonical.dumps(packet.header))
    (run / "sums/1.bin").write_bytes(packet.buffers["opening"])
    lines = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    (run / "journal.jsonl").unlink()
    with Journal.open(run / "journal.jsonl", "server", WORLD.server) as journal:
        for row in lines:
            if row["kind"] == "round.applied" and row["body"]["round"] == 1:
                row["body"]["sum"] = chained("", packet)
            journal.append(row["kind"], row["body"])


def test_what_cannot_be_readded_is_said(run, tmp_path):
    with pytest.raises(UsageError, match="round 3 opened no sum"):
        readd(run, rounds=[3])
    with pytest.raises(VerificationError):
        readd(run, consortium_key="0" * 64)
    shutil.rmtree(run / "ciphertexts")
    with pytest.raises(UsageError, match="holds no ciphertexts"):
        readd(run)
    said = CliRunner().invoke(cli.build(), ["audit", "readd", str(tmp_path / "nothing")])
    assert isinstance(said.exception, UsageError)
