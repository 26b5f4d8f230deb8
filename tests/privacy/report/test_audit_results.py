"""An empirical audit's results beside a report: one parser, wherever they are read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from typer.testing import CliRunner

from fedveil.common import canonical, identity
from fedveil.common.errors import VerificationError
from fedveil.privacy.audit.attach import Evidence
from fedveil.privacy.audit.evidence import Conformance, Finding
from fedveil.privacy.audit.one_run import Guesses, OneRun
from fedveil.privacy.report import results
from fedveil.privacy.report.build import build_report
from fedveil.privacy.report.cli import app
from fedveil.privacy.report.verify import verify_report


def call(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


def evidence_of(w, **changes: Any) -> Evidence:
    """What an audit of the run's plan says: the noise is right, and a bound far below the claim."""
    plan = w.plan
    finding = Finding("noise: variance", "variance", 0.4, 1e-5, 5.0, 5.0, 500, "noise x0.9", (4.9, 5.2))
    sigma = plan.noise_multiplier
    noise = Conformance(plan.hash, plan.sum, sigma, sigma * 0.99, sigma * 0.97, sigma * 1.02, 0.99, 4096, (finding,))
    bound = OneRun(0.4, 0.95, plan.delta, "gaussian", Guesses(1000, 100, 60), plan.claim)
    return Evidence(plan.hash, replace(noise, **changes), bound)


def test_an_audits_results_enter_the_report_and_are_verified(spoilt, tmp_path) -> None:
    found, sigma = evidence_of(spoilt), spoilt.plan.noise_multiplier
    key, parts = tmp_path / "signing.key", [tmp_path / "noise.json", tmp_path / "one.json"]
    identity.save_signing_key(key, spoilt.server)
    for path, part in zip(parts, (replace(found, one_run=None), replace(found, conformance=None)), strict=True):
        path.write_bytes(canonical.dumps(part.to_json()))
    done = call("report", spoilt.folder, "--key", key, "--audit", parts[0], "--audit", parts[1])
    assert done.exit_code == 0, done.exception
    assert verify_report(spoilt.report).ok
    payload = canonical.loads(spoilt.report.read_bytes())["payload"]
    assert payload["audit"] == found.to_json()
    page = (spoilt.folder / "report.html").read_text(encoding="utf-8")
    measured, low, high = (f"{x * sigma:.4g}" for x in (0.99, 0.97, 1.02))
    assert f"Measured noise multiplier {measured} [{low}, {high}] against claimed {sigma:.4g}" in page
    assert "under the plan of this run" in page
    assert "No evidence above ε ≥ 0.4" in page


AUDIT_LIES = {
    "a number that its sentence does not have": (
        lambda b: b["conformance"].update(measured_noise_multiplier=5.1),
        "follow",
    ),
    "a verdict": (lambda b: b["conformance"].update(passed=False), "follow"),
    "a sentence": (lambda b: b["one_run"].update(sentence="all is well"), "follow"),
    "a field more": (lambda b: b.update(more=1), "other fields"),
    "another version": (lambda b: b.update(v=2), "follow"),
    "another plan": (lambda b: b.update(plan_hash="0" * 64), "another plan"),
    "nothing": (dict.clear, "other fields"),
    "no numbers": (lambda b: b.update(one_run={}), "one_run"),
    "an interval that is none": (lambda b: b["conformance"].update(interval=5), "interval"),
}


@pytest.mark.parametrize("lie", AUDIT_LIES)
def test_an_audit_is_read_by_the_one_parser_wherever_it_is_read(spoilt, tmp_path, lie) -> None:
    """Beside a finished report, when a report is built from it, and when it is taken in."""
    change, said = AUDIT_LIES[lie]
    body = evidence_of(spoilt).to_json()
    change(body)
    path = spoilt.folder / "audit.json"
    path.write_bytes(canonical.dumps(body))
    failed = verify_report(spoilt.report).failed
    assert failed is not None
    assert said in failed.detail
    with pytest.raises(VerificationError, match=said):
        build_report(spoilt.folder, spoilt.server)
    path.unlink()
    (tmp_path / "bad.json").write_bytes(canonical.dumps(body))
    with pytest.raises(VerificationError, match=said):
        results.attach(spoilt.folder, [tmp_path / "bad.json"])
    assert not path.exists()


def test_an_audit_speaks_of_the_plans_claims(spoilt) -> None:
    held = evidence_of(spoilt)
    assert held.one_run is not None
    other = {
        "noise multiplier": evidence_of(spoilt, claimed=spoilt.plan.noise_multiplier / 2),
        "ε or δ": replace(held, one_run=replace(held.one_run, claimed=3.0)),
        "lower bound": replace(held, one_run=replace(held.one_run, delta=1e-3)),
    }
    for said, lie in other.items():
        with pytest.raises(VerificationError, match=said):
            results.held_against(canonical.dumps(lie.to_json()), spoilt.plan)
    assert results.held_against(canonical.dumps(held.to_json()), spoilt.plan) == held


def test_files_that_hold_no_audit(spoilt, tmp_path) -> None:
    for data in (b"", b"[]", b"{", b" " * (results.LIMIT + 1)):
        (tmp_path / "bad.json").write_bytes(data)
        with pytest.raises(VerificationError):
            results.attach(spoilt.folder, [tmp_path / "bad.json"])
        (spoilt.folder / "audit.json").write_bytes(data)
        assert not verify_report(spoilt.report).ok
    with pytest.raises(VerificationError, match="cannot be read"):
        results.attach(spoilt.folder, [tmp_path / "none.json"])
